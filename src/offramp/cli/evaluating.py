"""The verbs that measure: eval, report, inspect and bench."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offramp.cli.flags import Only
from offramp.cli.options import DecodingOptions, Json, Model, Ray, cluster_at
from offramp.cli.progress import command_line, progress_bars, resumable
from offramp.cli.shown import say
from offramp.errors import BadInput
from offramp.settings import RESEARCH, setting

if TYPE_CHECKING:
    from offramp.decode.engine import Engine
    from offramp.decode.facade import Model as LoadedModel
    from offramp.evaluation.evaluation import Condition


@dataclass(frozen=True)
class EvaluationOptions:
    """How many questions to ask, and how."""

    limit: int | None = setting(None, "Ask at most this many questions of each task (default: all).")
    batch: int = setting(64, "Largest number of answers made at once; a time is the batch's time divided by its answers.")


def evaluate(
    model: Model,
    task: Annotated[str, typer.Option(help="One of {tasks}, or several of them with commas.", show_default=False)],
    *,
    data: Annotated[
        list[str] | None,
        typer.Option(help="The task's official file, or TASK=FILE for one of several tasks (default: from the hub)."),
    ] = None,
    decoding: Annotated[DecodingOptions, Only("exits", "fill", "candidates", "dtype")],
    threshold: Annotated[
        list[str] | None,
        typer.Option(
            help="As for generate; repeat it to measure several (default: the exits' own policy).", rich_help_panel=RESEARCH
        ),
    ] = None,
    options: EvaluationOptions,
    run_code: Annotated[
        bool,
        typer.Option("--run-code", help="Run programs that the model writes, in a sandbox (for humaneval and mbpp)."),
    ] = False,
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

    if options.batch < 1:
        raise BadInput(f"Answers cannot be made {options.batch} at a time.", "Give --batch 1 or more.")
    names = task.split(",")
    tasks = [load_task(name, _file_for(name, names, data or []), options.limit, run_code) for name in names]
    loaded = decoding.load(model)
    backbone = loaded.backbone
    conditions = _conditions(loaded, decoding, threshold)
    # Answers of a cluster have its machines' times, so they are kept apart.
    folder = "answers" if ray is None else "answers-ray"
    work = out.with_name(f".{out.name}.{folder}") if out else cache_folder() / folder
    results, runs, others = [], [], processes()
    with resumable(), cluster_at(ray) as cluster:
        for questions in tasks:
            with progress_bars() as progress:
                batch, command = options.batch, command_line()
                run = Evaluation(backbone, questions, work, batch=batch, command=command, progress=progress)
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
    _remove({file for run in runs for file in run.files}, work)


def _remove(files: set[Path], folder: Path) -> None:
    """Remove files, and their folder if nothing else is in it."""
    for file in files:
        file.unlink(missing_ok=True)
    with suppress(OSError):  # another run's answers are there too
        folder.rmdir()


def _conditions(model: LoadedModel, decoding: DecodingOptions, thresholds: list[str] | None) -> list[Condition]:
    """Full depth, and with exits one condition for each threshold, or the exits' own policy."""
    from offramp.decode.modes import mode_of
    from offramp.evaluation.evaluation import Condition

    mode = decoding.mode or mode_of(decoding.fill)
    if mode == "full" or not (model.exits or thresholds or decoding.mode):
        return [Condition()]
    early = []
    settings: list[str | None] = [*thresholds] if thresholds else [None]
    for threshold in settings:
        way = replace(decoding, mode=mode, threshold=threshold).way(model)
        early.append(Condition(way.fill, way.policy, way.exits))
    return [Condition(), *early]


def _file_for(task: str, tasks: list[str], data: list[str]) -> str | None:
    """The file that `--data` names for a task, or None. Raises `BadInput` if that is not clear."""
    plain = [entry for entry in data if not entry.startswith(tuple(f"{name}=" for name in tasks))]
    if plain and (len(data) > 1 or len(tasks) > 1):
        raise BadInput("It is not clear which --data is for which task.", "For example: --data triviaqa=FILE")
    return plain[0] if plain else dict(entry.split("=", 1) for entry in data).get(task)


def report(
    results: Annotated[list[Path], typer.Argument(help="Files that offramp eval --json wrote.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Page to write; its figures go to a folder beside it.")],
) -> None:
    """Make a page from results: quality and consistency against cost, where tokens leave, coloured answers."""
    from offramp.evaluation.results import load_results
    from offramp.extras.report.page import write

    figures = write(load_results(results), output)
    say(f"{output}, and {len(figures)} figures in {figures[0].parent}" if figures else str(output))


def inspect(
    model: Model,
    *,
    decoding: Annotated[DecodingOptions, Only("exits", "dtype")],
    what_if: Annotated[
        list[str] | None,
        typer.Option(
            "--what-if",
            help="Compute what exits would save at each agreement with full depth (agreement=0.5,0.6,0.7), or drafts "
            "(drafts=0.5). bandwidth=GB/S gives times; rows=SHARE is the cost of one more token in a pass.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a model's blocks, where exits would go, and what a token costs there. The config is enough."""
    from offramp.cli.terminal import anatomy_table, savings_table
    from offramp.evaluation.anatomy import anatomy
    from offramp.evaluation.what_if import Scenario
    from offramp.evaluation.what_if import what_if as savings
    from offramp.exits.exit_set import ExitSet
    from offramp.model.loading import outline

    scenario = Scenario.parse(what_if) if what_if else None
    backbone = outline(model, decoding.dtype)
    exits = ExitSet.find(decoding.exits, backbone)
    facts = anatomy(backbone, exits.early or exits.draft)
    found = savings(facts, scenario) if scenario else []
    if as_json:
        say(json.dumps({**asdict(facts), **({"what_if": [asdict(each) for each in found]} if scenario else {})}))
        return
    anatomy_table(facts)
    if scenario:
        savings_table(found)


@dataclass(frozen=True)
class Runs:
    """How many tokens a run has, and how many runs there are."""

    tokens: int = setting(48, "Tokens to decode in each run.")
    pairs: int = setting(5, "Number of pairs of runs; the sides take turns.")

    def check(self) -> None:
        """Raise `BadInput` for runs that cannot be timed."""
        if self.tokens < 2 or self.pairs < 1:
            raise BadInput(
                "A run needs at least 2 tokens, and there must be at least one pair.", "Try --tokens 48 --pairs 5."
            )


def bench(
    *,
    model: Annotated[str, typer.Option(help="The model, as for generate.")] = "smollm2",
    names: Annotated[
        str | None,
        typer.Option(
            "--compare",
            help="Modes or fills to time, such as full,exact,defer (default: full depth beside transformers).",
            show_default=False,
        ),
    ] = None,
    runs: Runs,
    prompts: Annotated[
        Path | None, typer.Option(help="With --compare, a file of prompts, as for generate (default: six of its own).")
    ] = None,
    costs: Annotated[
        bool,
        typer.Option(
            "--costs",
            help="Measure what the rows of a pass cost here, and keep it: exact then makes as many drafts as pay.",
        ),
    ] = False,
    decoding: Annotated[DecodingOptions, Only("exits", "dtype")],
    as_json: Json = False,
) -> None:
    """Time full depth beside transformers, or modes and fills, in runs that take turns."""
    from offramp.cli.terminal import bench_table, costs_table, speeds_table
    from offramp.decode.row_costs import WIDTHS, keep
    from offramp.evaluation.bench import PROMPTS, compare, compare_engines, measured_costs
    from offramp.files import read_lines

    runs.check()
    if costs:
        backbone = decoding.load(model).backbone
        found = dict(zip(WIDTHS, measured_costs(backbone), strict=True))
        keep(backbone, [*found.values()])
        say(json.dumps(found)) if as_json else costs_table(backbone, found)
        return
    loaded = decoding.load(model, keep=names is None)
    if names is None:
        result = compare(loaded.backbone, runs.tokens, runs.pairs)
        say(json.dumps(asdict(result))) if as_json else bench_table(result)
        return
    texts = read_lines(prompts, ("prompt", "question")) if prompts else PROMPTS
    engines = {name: _engine(loaded, decoding, name) for name in names.split(",")}
    compared = compare_engines(engines, runs.tokens, runs.pairs, texts)
    say(json.dumps(asdict(compared))) if as_json else speeds_table(compared)


def _engine(model: LoadedModel, decoding: DecodingOptions, name: str) -> Engine:
    """The engine of a mode or a fill. Raises `BadInput` for an unknown name, and where exits are missing."""
    from offramp.decode.fills import FILLS
    from offramp.decode.modes import MODES

    if name == "full":
        return model.engine("full")
    is_mode = name.partition(":")[0] in MODES
    if not is_mode and name not in FILLS:
        raise BadInput(
            f"There is no mode and no fill '{name}'.", f"Choose from {', '.join(dict.fromkeys((*MODES, *FILLS)))}."
        )
    chosen = replace(decoding, mode=name) if is_mode else replace(decoding, fill=name)
    return chosen.engine(model)
