"""The verbs that measure: eval, report, inspect and bench."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offramp.cli.flags import Only
from offramp.cli.options import DecodingOptions, Json, Model, Ray, Reference, check_batch, cluster_at
from offramp.cli.progress import command_line, progress_bars, resumable
from offramp.decode.sampling import Sampling
from offramp.errors import BadInput
from offramp.settings import setting

if TYPE_CHECKING:
    from offramp.evaluation.bench import FillComparison
    from offramp.evaluation.evaluation import Condition
    from offramp.model.backbone import Backbone


@dataclass(frozen=True)
class EvaluationOptions:
    """How many questions to ask, and how."""

    limit: int | None = setting(None, "Ask only this many questions of each task. Default: all.")
    batch: int = setting(64, "Most answers side by side; times are shares of the batch's. 1: each answer by itself.")
    seed: int = setting(0, "Seed of the resampling that gives the intervals.")


def evaluate(
    model: Model,
    task: Annotated[str, typer.Option(help="truthfulqa, truthfulqa-mc, triviaqa or coqa, or several of them with commas.")],
    *,
    data: Annotated[
        list[str] | None,
        typer.Option(help="The task's official file, or TASK=FILE for one of several tasks. Default: from the hub."),
    ] = None,
    decoding: Annotated[DecodingOptions, Only("exits", "fill", "confidence", "decay", "candidates", "dtype")],
    threshold: Annotated[
        list[str] | None,
        typer.Option(help="As for generate. May be repeated to measure several. Default: the exits' own policy."),
    ] = None,
    reference: Reference = None,
    sampling: Annotated[Sampling, Only("repetition_penalty")],
    options: EvaluationOptions,
    ray: Ray = None,
    out: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.", show_default=False)] = None,
) -> None:
    """Score answers on a task, with exits and at full depth, and show what they cost. Ctrl-C is safe."""
    from offramp.cli.terminal import result_line
    from offramp.evaluation.evaluation import Evaluation
    from offramp.evaluation.processes import processes, share_out
    from offramp.evaluation.results import save_results
    from offramp.evaluation.tasks import load_task
    from offramp.files import cache_folder

    check_batch(options.batch)
    names = task.split(",")
    tasks = [load_task(name, _file_for(name, names, data or []), options.limit) for name in names]
    tasks = [replace(task, repetition_penalty=sampling.repetition_penalty) for task in tasks]
    backbone = decoding.load(model)
    reference_model = decoding.load(reference) if reference else None
    conditions = _conditions(backbone, decoding, threshold)
    # Answers of a cluster have its machines' times, so they are kept apart.
    folder = "answers" if ray is None else "answers-ray"
    work = out.with_name(f".{out.name}.{folder}") if out else cache_folder() / folder
    results, runs, others = [], [], processes()
    with resumable(), cluster_at(ray) as cluster:
        for questions in tasks:
            with progress_bars() as progress:
                batch, seed = options.batch, options.seed
                run = Evaluation(backbone, questions, work, reference_model, batch, seed, command_line(), progress)
                if cluster:
                    cluster.answer(run, conditions)
                elif others:
                    share_out(run, conditions, others)
                    if not others.is_main_process:
                        continue
                task_results = [run.run(condition) for condition in conditions]
            for result in task_results:
                result_line(result)
            runs.append(run)
            results += task_results
    if others and not others.is_main_process:
        return
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
    early = [Condition(decoding.fill_name, policy, exits) for policy in policies]
    return [Condition(), *early] if exits else [Condition()]


def _file_for(task: str, tasks: list[str], data: list[str]) -> str | None:
    """The file that `--data` names for a task, or None. Raises `BadInput` if that is not clear."""
    plain = [entry for entry in data if not entry.startswith(tuple(f"{name}=" for name in tasks))]
    if plain and (len(data) > 1 or len(tasks) > 1):
        raise BadInput("It is not clear which --data is for which task.", "For example: --data triviaqa=FILE")
    return plain[0] if plain else dict(entry.split("=", 1) for entry in data).get(task)


def report(
    results: Annotated[list[Path], typer.Argument(help="Files that offramp eval --json wrote.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write; figures go to a folder beside it.")],
) -> None:
    """Make a page from results: quality and consistency against cost, where tokens leave, coloured answers."""
    from offramp.evaluation.report import write
    from offramp.evaluation.results import load_results

    figures = write(load_results(results), output)
    print(f"{output}, and {len(figures)} figures in {figures[0].parent}" if figures else output)


def inspect(
    model: Model,
    *,
    decoding: Annotated[DecodingOptions, Only("exits", "dtype")],
    what_if: Annotated[
        list[str] | None,
        typer.Option(
            "--what-if",
            help="Also show what would be saved if exits agreed with full depth this often (agreement=0.5,0.6,0.7, one "
            "share for each exit), or drafts (drafts=0.5). bandwidth=GB/S adds times. rows=SHARE: what each further row of "
            "a chunk costs, in steps of full depth; default: as on this machine. May be repeated.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a model's blocks, where exits would go, and what a token costs there. The config is enough."""
    from offramp.cli.terminal import anatomy_table, savings_table
    from offramp.evaluation.anatomy import anatomy
    from offramp.evaluation.what_if import Scenario
    from offramp.evaluation.what_if import what_if as savings
    from offramp.model.loading import outline

    scenario = Scenario.parse(what_if) if what_if else None
    backbone = outline(model, decoding.dtype)
    facts = anatomy(backbone, decoding.find_exits(backbone))
    found = savings(facts, scenario) if scenario else []
    if as_json:
        print(json.dumps({**asdict(facts), **({"what_if": [asdict(each) for each in found]} if scenario else {})}))
        return
    anatomy_table(facts)
    if scenario:
        savings_table(found)


@dataclass(frozen=True)
class Runs:
    """How many tokens a run has, and how many runs there are."""

    tokens: int = setting(48, "Tokens to decode in each run.")
    prefill: int | None = setting(None, "Time the reading of a prompt of this many tokens instead of decoding.")
    pairs: int = setting(5, "Number of pairs of runs; the two sides take turns.")

    def check(self) -> None:
        """Raise `BadInput` for runs that cannot be timed."""
        if self.tokens < 2 or self.pairs < 1 or (self.prefill is not None and self.prefill < 2):
            raise BadInput(
                "A run needs at least 2 tokens, and there must be at least one pair.", "Try --tokens 48 --pairs 5."
            )


BENCH_DECODING = DecodingOptions(dtype="bfloat16")


def bench(
    *,
    model: Annotated[str, typer.Option(help="The model, as for generate.")] = "smollm2",
    against: Annotated[str, typer.Option(help="The library to compare with: transformers.")] = "transformers",
    runs: Runs,
    random: Annotated[
        bool, typer.Option("--random", help="Use random weights in the model's shape: only its config is needed.")
    ] = False,
    fills: Annotated[
        str | None, typer.Option(help="Compare fills with one another instead: full,defer,verify.", show_default=False)
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="With --fills: a file of prompts, as for generate. Default: six that come with it."),
    ] = None,
    decoding: Annotated[
        DecodingOptions, Only("exits", "threshold", "confidence", "decay", "candidates", "dtype")
    ] = BENCH_DECODING,
    sampling: Annotated[Sampling, Only("repetition_penalty")],
    as_json: Json = False,
) -> None:
    """Time full-depth decoding beside another library, in paired runs, so that a slow minute affects both."""
    from offramp.cli.terminal import bench_table, fills_table
    from offramp.evaluation.bench import compare, compare_prefill
    from offramp.model.loading import outline

    if against != "transformers":
        raise BadInput(f"'{against}' cannot be compared with here.", "Use transformers; `make bench` has more peers.")
    runs.check()
    backbone = outline(model, decoding.dtype, random=True) if random else decoding.load(model, keep=fills is None)
    if fills is not None:
        compared = _compare_fills(backbone, decoding, fills.split(","), runs, prompts, sampling)
        print(json.dumps(asdict(compared))) if as_json else fills_table(compared)
        return
    if runs.prefill is None:
        result = compare(backbone, runs.tokens, runs.pairs, sampling)
    else:
        result = compare_prefill(backbone, runs.prefill, runs.pairs)
    print(json.dumps(asdict(result))) if as_json else bench_table(result)


def _compare_fills(
    backbone: Backbone, decoding: DecodingOptions, fills: list[str], runs: Runs, file: Path | None, sampling: Sampling
) -> FillComparison:
    from offramp.evaluation.bench import PROMPTS, compare_fills
    from offramp.files import read_lines

    prompts = read_lines(file, ("prompt", "question")) if file else PROMPTS
    exits, policies = {}, {}
    for fill in fills:
        chosen = replace(decoding, fill=fill)
        exits[fill] = None if fill == "full" else chosen.require_exits(backbone)
        policies[fill] = chosen.policy(backbone, exits[fill]) if exits[fill] else None
    return compare_fills(backbone, exits, policies, runs.tokens, runs.pairs, prompts, sampling)
