"""The verbs that measure: eval, report, inspect and bench."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli.flags import Only
from offramp.cli.options import Batch, DecodingOptions, Json, Model, Reference, check_batch
from offramp.cli.progress import command_line, progress_bars, resumable
from offramp.errors import BadInput

if TYPE_CHECKING:
    from offramp.evaluation.evaluation import Condition
    from offramp.model.backbone import Backbone


def evaluate(
    model: Model,
    task: Annotated[str, typer.Option(help="One or several of truthfulqa, truthfulqa-mc, triviaqa, coqa, with commas.")],
    *,
    data: Annotated[
        list[str] | None,
        typer.Option(help="The task's official file, or TASK=FILE for one of several tasks. Default: from the hub."),
    ] = None,
    decoding: Annotated[DecodingOptions, Only("exits", "fill", "confidence", "decay", "candidates", "dtype")],
    threshold: Annotated[
        list[str] | None,
        typer.Option(help="As for generate. May be repeated, to measure each. Default: the exits' own policy."),
    ] = None,
    reference: Reference = None,
    limit: Annotated[int | None, typer.Option(help="Ask only this many questions of each task. Default: all.")] = None,
    batch: Batch = 1,
    seed: Annotated[int, typer.Option(help="Seed of the resampling that gives the intervals.")] = 0,
    out: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.", show_default=False)] = None,
) -> None:
    """Score answers on a task, with exits and at full depth, and show what they cost. Ctrl-C is safe."""
    from offramp.cli.terminal import result_line
    from offramp.evaluation.evaluation import Evaluation
    from offramp.evaluation.results import save_results
    from offramp.evaluation.tasks import load_task
    from offramp.files import cache_folder

    check_batch(batch)
    names = task.split(",")
    tasks = [load_task(name, _file_for(name, names, data or []), limit) for name in names]
    backbone = decoding.load(model)
    other = decoding.load(reference) if reference else None
    conditions = _conditions(backbone, decoding, threshold)
    work = out.with_name(f".{out.name}.answers") if out else cache_folder() / "answers"
    results, runs = [], []
    with resumable():
        for questions in tasks:
            with progress_bars() as progress:
                run = Evaluation(backbone, questions, work, other, batch, seed, command_line(), progress)
                of_this_task = [run.run(condition) for condition in conditions]
            for result in of_this_task:
                result_line(result)
            runs.append(run)
            results += of_this_task
    if out:
        save_results(results, out)
    for file in {file for run in runs for file in run.files}:
        file.unlink(missing_ok=True)
    with suppress(OSError):  # another run's answers are there too
        work.rmdir()


def _conditions(backbone: Backbone, decoding: DecodingOptions, thresholds: list[str] | None) -> list[Condition]:
    """Full depth, and with exits one condition for each threshold, or the exits' own policy."""
    from offramp.evaluation.evaluation import Condition

    exits = decoding.find_exits(backbone)
    settings: list[str | None] = [*thresholds] if thresholds else [None]
    policies = [replace(decoding, threshold=threshold).policy(backbone, exits) for threshold in settings]
    early = [Condition(decoding.fill, policy, exits) for policy in policies]
    return [Condition(), *early] if exits else [Condition()]


def _file_for(task: str, tasks: list[str], data: list[str]) -> str | None:
    """The file that `--data` names for a task. Raises `BadInput` where that is not clear."""
    named = dict(entry.split("=", 1) for entry in data if "=" in entry)
    plain = [entry for entry in data if "=" not in entry]
    if len(plain) > 1 or (plain and len(tasks) > 1) or set(named) - set(tasks):
        raise BadInput("It is not clear which --data is for which task.", "For example: --data triviaqa=FILE")
    return named.get(task, plain[0] if plain else None)


def report(
    results: Annotated[list[Path], typer.Argument(help="Files that offramp eval --json wrote.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write; its figures lie beside it.")],
) -> None:
    """Make a page from results: quality and consistency against cost, exits by position, coloured answers."""
    from offramp.evaluation.report import write
    from offramp.evaluation.results import load_results

    figures = write(load_results(results), output)
    print(f"{output}, and {len(figures)} figures in {figures[0].parent}" if figures else output)


def inspect(model: Model, *, decoding: Annotated[DecodingOptions, Only("exits", "dtype")], as_json: Json = False) -> None:
    """Show a model's blocks, where exits would go, and what a token costs there. The config is enough."""
    from offramp.cli.terminal import anatomy_table
    from offramp.evaluation.anatomy import anatomy
    from offramp.model.loading import outline

    backbone = outline(model, decoding.dtype)
    facts = anatomy(backbone, decoding.find_exits(backbone))
    if as_json:
        print(json.dumps(asdict(facts)))
    else:
        anatomy_table(facts)


BENCH_DECODING = DecodingOptions(dtype="bfloat16")


def bench(
    *,
    model: Annotated[str, typer.Option(help="The model, as for generate.")] = "smollm2",
    against: Annotated[str, typer.Option(help="The library to compare with: transformers.")] = "transformers",
    tokens: Annotated[int, typer.Option(help="Tokens to decode in each run.")] = 48,
    prefill: Annotated[
        int | None, typer.Option(help="Time the reading of a prompt of this many tokens instead of decoding.")
    ] = None,
    random: Annotated[
        bool, typer.Option("--random", help="Random weights in the model's shape: only its config is needed.")
    ] = False,
    fills: Annotated[
        str | None, typer.Option(help="Compare fills with one another instead: full,defer,verify.", show_default=False)
    ] = None,
    decoding: Annotated[
        DecodingOptions, Only("exits", "threshold", "confidence", "decay", "candidates", "dtype")
    ] = BENCH_DECODING,
    pairs: Annotated[int, typer.Option(help="Pairs of runs, taking turns.")] = 5,
    as_json: Json = False,
) -> None:
    """Time decoding at full depth beside another library: paired runs, so that a slow minute meets both."""
    from offramp.cli.terminal import bench_table, fills_table
    from offramp.evaluation.bench import compare, compare_prefill
    from offramp.model.loading import outline

    if against != "transformers":
        raise BadInput(f"'{against}' cannot be compared with here.", "Use transformers; `make bench` has more peers.")
    if tokens < 2 or pairs < 1 or (prefill is not None and prefill < 2):
        raise BadInput("A run needs at least 2 tokens, and there must be at least one pair.", "Try --tokens 48 --pairs 5.")
    backbone = outline(model, decoding.dtype, random=True) if random else decoding.load(model, keep=fills is None)
    if fills is not None:
        result = _compare_fills(backbone, decoding, fills.split(","), tokens, pairs)
    elif prefill is not None:
        result = compare_prefill(backbone, prefill, pairs)
    else:
        result = compare(backbone, tokens, pairs)
    if as_json:
        print(json.dumps(result))
    else:
        (bench_table if fills is None else fills_table)(result)


def _compare_fills(
    backbone: Backbone, decoding: DecodingOptions, fills: list[str], tokens: int, pairs: int
) -> dict[str, Any]:
    from offramp.evaluation.bench import compare_fills

    exits, policies = {}, {}
    for fill in fills:
        chosen = replace(decoding, fill=fill)
        exits[fill] = None if fill == "full" else chosen.require_exits(backbone)
        policies[fill] = chosen.policy(backbone, exits[fill]) if exits[fill] else None
    return compare_fills(backbone, exits, policies, tokens, pairs)
