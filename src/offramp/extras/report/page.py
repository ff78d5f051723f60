"""The report's page: one file that fetches nothing, filled from `page.html`. Its figures lie beside it as SVG.

First comes an overview, with a figure for each task. A section for each model and task is folded under its title; what is
typed into the search box shows the conditions whose names have all its words. Everything that must be read is in text and
tables.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from offramp.errors import BadInput
from offramp.evaluation.metrics_table import METRICS, Metric, metrics_of
from offramp.evaluation.results import Interval, Result, ScoredAnswer, difference, penalty_words
from offramp.extras.report.curves import CONSISTENT, at_consistency, curves, examples, leading
from offramp.extras.report.figures import fronts, pareto, positions
from offramp.files import write_atomically

SHOWN = 3  # questions whose answers the page shows


@dataclass(frozen=True)
class Figure:
    """A figure, with the name of its file."""

    name: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Cell:
    """What a cell of a table says: a value, and where it was measured, its interval."""

    value: str
    low: str = ""
    high: str = ""

    @classmethod
    def of(cls, metric: Metric, value: Interval) -> Cell:
        """An interval as people read it."""
        return cls(metric.show(value.mean), metric.show(value.low), metric.show(value.high))


@dataclass
class Table:
    """The titles of columns, and rows with a title each."""

    columns: list[str]
    rows: list[tuple[str, list[Cell]]] = field(default_factory=list)


@dataclass(frozen=True)
class Token:
    """A token of an answer: `shade` is 0 for full depth, 1 for a late exit, up to 4 for an early one."""

    text: str
    block: int
    shade: int


@dataclass(frozen=True)
class ShownAnswer:
    """An answer under a condition. `early` names the tokens that left early, and their blocks."""

    name: str
    tokens: list[Token]
    early: list[str]


@dataclass(frozen=True)
class Question:
    """A question, full depth's answer, and others."""

    text: str
    full_text: str
    answers: list[ShownAnswer]


@dataclass(frozen=True)
class Section:
    """What the page says of Results that can be compared. `others`: there are curves that figures do not name."""

    anchor: str
    title: str
    first: Result
    table: Table
    others: bool = False
    figures: list[Figure] = field(default_factory=list)
    crossings: Table | None = None
    questions: list[Question] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """A command, and what it ran with."""

    command: str
    facts: dict[str, str]


def write(results: list[Result], page: Path) -> list[Path]:
    """Write the page, and its figures to a folder beside it. Returns the figures' paths.

    Raises `BadInput` where `matplotlib` is missing, for no results, and for Results that lack something.
    """
    if not results:
        raise BadInput("There are no results to report.", "Name files that offramp eval --json wrote.")
    try:
        groups = _grouped(results)
        overview, sections = _overview(groups), [_section(*group) for group in groups]
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(
            f"A Result lacks something that the page shows: {error!r}.",
            "Was it made by another version? Run offramp eval again.",
        ) from error
    text = _template().render(
        conditions=len(results),
        answers=sum(result.task.questions for result in results),
        models=sorted({result.model.name for result in results}),
        consistency=f"{CONSISTENT:g}",
        overview=overview,
        sections=sections,
        runs=_runs(results),
    )
    write_atomically(page, text.encode())
    folder = page.with_name(f"{page.stem}-figures")
    figures = {
        folder / f"{each.name}.svg": each.svg for part in (overview, *(s.figures for s in sections)) for each in part
    }
    for file, svg in figures.items():
        write_atomically(file, svg.replace("currentColor", "#222").encode())
    return list(figures)


def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html")


def _grouped(results: list[Result]) -> list[tuple[str, str, list[Result]]]:
    """Anchor, title and Results of each section.

    Results of a section can be compared: one model in one weight format, the same questions, times on one machine.
    """

    def key(result: Result) -> str:
        model, task, machine = result.model, result.task, result.machine
        same = [model.name, task.name, asdict(model), task.sha256, task.max_tokens, task.batch]
        same += [task.repetition_penalty, machine["processor"], machine["threads"], [item.id for item in result.items]]
        return json.dumps(same)

    sections: list[tuple[str, str, list[Result]]] = []
    for number, (_, group) in enumerate(groupby(sorted(results, key=key), key=key)):
        members = list(group)
        model, task = members[0].model, members[0].task
        title = f"{model.name} on {task.name}{penalty_words(task.repetition_penalty)}"
        anchor = _anchor(title.replace(" on ", "-"))
        if any(earlier.startswith(title) for _, earlier, _ in sections):
            title += f", {model.weights}, {task.questions} questions"
            anchor += f"-{number}"
        sections.append((anchor, title, members))
    return sections


def _overview(groups: list[tuple[str, str, list[Result]]]) -> list[Figure]:
    """A figure for each task that asks for answers: every condition of every model, and the best of each model."""
    tasks: dict[str, list[tuple[str, list[Result]]]] = {}
    for _, title, results in groups:
        if "token_f1" in results[0].summary:
            task = results[0].task.name
            tasks.setdefault(task, []).append((title.replace(f" on {task}", ""), results))
    caption = "consistency against FLOPs saved. A dot is a condition; lines join each model's best ones."
    return [Figure(_anchor(f"overview-{task}"), f"{task}: {caption}", fronts(models)) for task, models in tasks.items()]


def _anchor(title: str) -> str:
    """A title as an id in the page and as a file's name."""
    return "".join(character if character.isalnum() else "-" for character in title)


def _section(anchor: str, title: str, results: list[Result]) -> Section:
    table = _table(results)
    if "flops_per_token" not in results[0].summary:  # multiple choice
        return Section(anchor, title, results[0], table)
    quality, named, token_f1 = _quality(results[0]), leading(results), METRICS["token_f1"]
    figures = [
        Figure("cost", f"{quality.label} against FLOPs a token", pareto(results, "flops_per_token", quality)),
        Figure("latency", f"{quality.label} against speed", pareto(results, "tokens_per_second", quality)),
        Figure("consistency", "Consistency against FLOPs saved", pareto(results, "flops_saved", token_f1)),
        Figure("depth", "Consistency against mean blocks run", pareto(results, "mean_blocks", token_f1)),
        Figure("positions", "Where tokens leave, by their place in the answer", positions(named)),
    ]
    figures = [Figure(f"{anchor}-{each.name}", each.caption, each.svg) for each in figures]
    others = len(named) < len(results)
    return Section(anchor, title, results[0], table, others, figures, _crossings(results), _questions(named))


def _columns(result: Result) -> list[Metric]:
    """The metrics of a result that the report's table has a column for."""
    return [metric for metric in metrics_of(result.summary) if metric.report]


def _quality(result: Result) -> Metric:
    """The score that figures show."""
    scores = [metric for metric in _columns(result) if metric.score]
    if not scores:
        raise KeyError(f"a score of {result.task.name}")
    return scores[0]


def _crossings(results: list[Result]) -> Table | None:
    """The costs of each curve where it falls to the consistency at which curves are compared."""
    metrics = [METRICS[name] for name in ("mean_blocks", "flops_saved", "tokens_per_second")]
    found = at_consistency(results, CONSISTENT, [metric.name for metric in metrics])
    if not found:
        return None
    full = [result for result in results if result.condition.policy is None]
    rows = [("full depth", [result.summary[metric.name].mean for metric in metrics]) for result in full]
    return Table(
        [metric.label for metric in metrics],
        [
            (title, [Cell(metric.show(value)) for metric, value in zip(metrics, point, strict=True)])
            for title, point in [*rows, *found.items()]
        ],
    )


def _table(results: list[Result]) -> Table:
    """Every condition with all its metrics, and its first score's difference from full depth's."""
    metrics, first = _columns(results[0]), _quality(results[0])
    full = next((result.items for result in results if result.condition.policy is None), None)
    against = [f"{first.label} less full depth's, on the same questions"] if full else []
    table = Table([*against, *(metric.label for metric in metrics)])

    def deepest_first(result: Result) -> float:
        return -result.summary["mean_blocks"].mean if "mean_blocks" in result.summary else 0.0

    for _, curve in curves(results):
        for result in sorted(curve, key=deepest_first):
            cells = [Cell.of(first, difference(result.items, full, first.name, result.seed))] if full else []
            cells += [Cell.of(metric, result.summary[metric.name]) for metric in metrics]
            table.rows.append((result.condition.name, cells))
    return table


def _questions(results: list[Result]) -> list[Question]:
    """The first few questions, with their answers under one condition of each curve."""
    early = [
        (result.condition.name, [item for item in result.items if isinstance(item, ScoredAnswer)])
        for result in examples(results).values()
    ]
    if not early:
        return []
    blocks = results[0].blocks
    return [
        Question(first.question, first.full_text, [_shown(name, items[number], blocks) for name, items in early])
        for number, first in enumerate(early[0][1][:SHOWN])
    ]


def _shown(name: str, item: ScoredAnswer, blocks: int) -> ShownAnswer:
    tokens = [Token(piece, block, _shade(block, blocks)) for piece, block in zip(item.pieces, item.exits, strict=True)]
    early = [f"{place}: {block}" for place, block in enumerate(item.exits, start=1) if block < blocks]
    return ShownAnswer(name, tokens, early)


def _shade(block: int, blocks: int) -> int:
    return 0 if block >= blocks else 4 - min(3, 4 * block // blocks)


def _runs(results: list[Result]) -> list[Run]:
    """Each command, and the models, data, exits and machine that it ran with."""
    runs = []
    for command, group in groupby(results, key=lambda result: result.command):
        members = list(group)
        used = [result.model for result in members]
        models = dict.fromkeys(f"{model.name}, {model.weights}, SHA-256 {model.sha256[:16]}" for model in used)
        machines = dict.fromkeys(
            ", ".join(f"{name} {value}" for name, value in result.machine.items()) for result in members
        )
        data = dict.fromkeys(f"{result.task.source}, SHA-256 {result.task.sha256[:16]}" for result in members)
        exits = dict.fromkeys(json.dumps(result.exits) for result in members if result.exits)
        facts = {
            "models": "; ".join(models),
            "data": "; ".join(data),
            "exits": "; ".join(exits) or "none",
            "machine": "; ".join(machines),
            "peak memory": f"{max(result.peak_memory_bytes for result in members) / 2**30:.1f} GiB",
            "seed": str(members[0].seed),
        }
        runs.append(Run(command, facts))
    return runs
