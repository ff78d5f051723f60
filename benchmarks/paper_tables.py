"""The tables that `benchmarks/paper.py` and `benchmarks/paper_times.py` give, in Markdown, and a figure.

    .venv/bin/python benchmarks/paper_tables.py build/paper/*/*.json* [--figure FILE.svg] > tables.md
    .venv/bin/python benchmarks/paper_tables.py build/paper/*/*.json* --check tables.md PAGE …

The files are Results (`MODEL-TASK.json`) and times (`MODEL-TASK-times-BATCH.jsonl`). With `--check`, it
compares pages with these tables instead, and fails if something differs. The first page must have all rows, and no other
row about these models and tasks. The pages beside it may have some of the rows; each percentage in their text, and each
number like "1.06 times", must be in a row. In pages elsewhere that holds for a paragraph, or a row of a table, that links
to one of these.
`--figure` draws consistency against how many times as fast as full depth answers are made.

Most cells are what is saved where consistency (token F1 with full depth's answer) falls to 0.9, in a straight line between
the conditions that were measured: FLOPs saved and, in brackets, mean blocks run.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

import answers
from offramp.errors import OfframpError
from offramp.evaluation.results import Result, load_results
from offramp.extras.report.curves import CONSISTENT, crossing
from offramp.extras.report.figures import COLOURS, MARKERS
from offramp.metrics import token_f1
from paper import COUNTS, FILLS, GATES, LOSSES, MODELS, MODES, PENALTY, RISKS, THE_PAPERS
from paper_exits import Recipe

ALONE, BESIDE = "-times-1.jsonl", "-times-8.jsonl"
GLANCE = ("full depth's score", *MODES, "the paper's recipe")
TIMED = tuple(name for name in answers.COLUMNS if name != "FLOPs saved")  # of the tables of times; Results have the FLOPs
NONE = "–"
TASKS = tuple(COUNTS)
Interval = tuple[float, float, float]  # a value and its 95% interval
Times = tuple[dict[str, Any], list[answers.Turn]]  # what a file of times says first, and its turns
Table = tuple[str, tuple[str, ...], list[str]]  # a title, the head's cells, and the rows


@dataclass(frozen=True)
class Group:
    """The Results of one model on one task, with one repetition penalty; the first is full depth's."""

    model: str
    task: str
    results: list[Result]

    @property
    def title(self) -> str:
        return f"{self.model}, {self.task}"

    @property
    def full(self) -> Result:
        return self.results[0]

    @property
    def measure(self) -> str:
        """The task's main score."""
        return answers.MAIN_SCORES[self.full.task.name.lower()]

    def change(self, result: Result) -> Interval:
        """By how much a condition's score is above full depth's, and the 95% interval of that."""
        pairs = zip(result.items, self.full.items, strict=True)
        changes = [own.scores[self.measure] - full.scores[self.measure] for own, full in pairs]
        drawn = np.random.default_rng(0).integers(len(changes), size=(1000, len(changes)))
        low, high = np.percentile([fmean(changes[place] for place in places) for places in drawn.tolist()], [2.5, 97.5])
        return fmean(changes), float(low), float(high)

    def cell(self, recipe: Recipe) -> str:
        """What exits that were made for the experiment save where they fall to a consistency of 0.9."""
        found = crossing([self.full, *self.made(recipe)], CONSISTENT, ("flops_saved", "mean_blocks"))
        return f"{share(found[0])} ({found[1]:.1f})" if found else NONE

    def made(self, recipe: Recipe) -> list[Result]:
        """The curve of exits that were made for the experiment."""
        return [each for each in self.results if (each.condition.label, gate_of(each)) == (recipe.label, recipe.gate)]

    @property
    def jumps(self) -> bool:
        """Whether the exits jump."""
        return any(each.condition.label.startswith("jump") for each in self.results)

    def labelled(self, label: str) -> Result | None:
        """The condition with this label, if there is one."""
        return next((each for each in self.results if each.condition.label == label), None)


def plain(value: float, digits: int) -> str:
    """A number without a zero before the point."""
    return f"{value:.{digits}f}".removeprefix("0")


def gate_of(result: Result) -> str:
    """The gate's name, or that of the confidence in its place; "" at full depth."""
    policy = result.condition.policy
    return policy.confidence_name(result.condition.gate or "") if policy else ""


def point(result: Result | None) -> str:
    """FLOPs saved, mean blocks, and consistency."""
    if not result:
        return NONE
    summary = result.summary
    kept = plain(summary["token_f1"].mean, 3)
    return f"{share(summary['flops_saved'].mean)} ({summary['mean_blocks'].mean:.1f}), {kept}"


def score(group: Group) -> str:
    """Full depth's score: ROUGE-L in percent for TruthfulQA, pass@1 for code, F1 from 0 to 1 for the others."""
    return f"{group.full.summary[group.measure].mean:.3f}"


def signed(value: float) -> str:
    """A number with its sign."""
    return f"{value:+z.3f}".replace("-", "−")


def glance(group: Group, times: dict[Path, Times]) -> Iterator[str]:
    """Full depth's score. Of each mode and the paper's recipe: how many times as fast it is alone, and in brackets beside
    seven other answers; and the change of the score.
    """
    cells, known = [score(group)], [times[file] for file in times if subject(file) == (group.model, group.task)]
    for name in GLANCE[1:]:
        names = {about["conditions"].get(name) for about, _ in known}
        result = group.labelled(name) or next((each for each in group.results if each.condition.name in names), None)
        speeds = [f"{answers.faster(turns, name, next(iter(turns[0]))):.2f}" for _, turns in known if name in turns[0]]
        fast = " (".join(speeds[:2]) + ")" * (len(speeds) > 1)
        cells.append(f"{fast or NONE}; {signed(group.change(result)[0])}" if result else NONE)
    yield row(group.title, cells)


def modes(group: Group) -> Iterator[str]:
    """Each mode: the score and its change, with its 95% interval; FLOPs saved, blocks run, and token F1 with full depth."""
    for result in (each for each in group.results if each.condition.label in MODES):
        middle, low, high = map(signed, group.change(result))
        cells = [f"{result.summary[group.measure].mean:.3f}", f"{middle} ({low} to {high})", point(result)]
        yield row(f"{group.title}, {result.condition.label}", cells)


def gates(group: Group) -> Iterator[str]:
    """Each gate, with a jump and without; and what the paper has: a target of 5 tokens, and its recipe."""
    for jump in (True, False):
        recipes = [Recipe(gate, jump) for gate in GATES] + [Recipe("mamba", jump, k=5), *([] if jump else [THE_PAPERS])]
        cells = [group.cell(recipe) for recipe in recipes]
        if set(cells) != {NONE}:
            yield row(f"{group.title}, {'jump' if jump else 'no jump'}", [*cells, NONE][: len(GATES) + 2])


def calibrated(group: Group) -> Iterator[str]:
    """The policies that were calibrated for the task, by loss and risk."""
    for loss in LOSSES:
        cells = [point(group.labelled(f"early, risk {risk:g}, loss {loss}")) for risk in RISKS]
        if set(cells) != {NONE}:
            yield row(f"{group.title}, {loss}", cells)


def fills(group: Group) -> Iterator[str]:
    """The fills under one policy."""
    found = {each.condition.fill: each for each in group.results if each.condition.label == "fills"}
    if found:
        yield row(group.title, [point(found.get(fill)) for fill in ("project", *FILLS)])


def row(name: str, cells: Iterable[str]) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join([name, *cells])} |"


def share(value: float) -> str:
    """A share in percent, with a digit after the point where it is small."""
    percent = 100 * value
    shown = f"{percent:.0f}%" if abs(percent) >= 19.95 else f"{percent:.1f}%"
    return "0.0%" if shown == "-0.0%" else shown.replace("-", "−")


def subject(file: Path) -> tuple[str, str]:
    """The model and the task that a file of times is about, by its name."""
    model, task = file.name.partition("-times")[0].rsplit("-", 1)
    return model, task


def times_in(file: Path) -> Times:
    """What a file of times says first, and its turns."""
    about, *turns = map(json.loads, file.read_text("utf-8").splitlines())
    return about, turns


def timed_rows(file: Path, times: Times) -> list[str]:
    """The rows of a file of times; some peers failed, and it says why."""
    about, turns = times
    title, first = ", ".join(subject(file)), next(iter(turns[0]))
    cells_of = {name: answers.cells(turns, name, first) for name in turns[0]}
    found = []
    for name, cells in cells_of.items():
        kept = (cell for column, cell in zip(answers.COLUMNS, cells, strict=True) if column in TIMED)
        found.append(row(f"{title}: {name}", [cell.replace("-", "−") for cell in kept]))
    return found + [row(f"{title}: {name}", [f"failed: {reason}"]) for name, reason in about["failures"].items()]


def peers(alone: dict[tuple[str, str], Times]) -> Table:
    """How many times as fast as full depth `exact` and other libraries make one answer at a time."""
    theirs = (name for about, turns in alone.values() for name in [*turns[0], *about["failures"]] if is_peer(name, turns))
    head = ("exact", *dict.fromkeys(theirs))
    rows = []
    for (model, task), (about, turns) in alone.items() if head[1:] else ():
        speeds = {name: f"{answers.faster(turns, name, next(iter(turns[0]))):.2f}" for name in turns[0]}
        cells = speeds | dict.fromkeys(about["failures"], "cannot")
        rows.append(row(f"{model}, {task}: peers", [cells.get(name, NONE) for name in head]))
    return "Peers", head, rows


def is_peer(name: str, turns: list[answers.Turn]) -> bool:
    """Whether a contender is another library; one that failed has no turns."""
    return "scores" not in turns[0].get(name, {})


def penalised(pair: dict[float, Group]) -> Iterator[str]:
    """With a repetition penalty and without: full depth's score, and what modes and the Mamba gate save."""
    if set(pair) == {1.0, PENALTY}:
        cells = [score(group) for group in pair.values()]
        cells += [point(group.labelled("early")) for group in pair.values()]
        cells += [group.cell(Recipe("mamba", group.jumps)) for group in pair.values()]
        yield row(pair[1.0].title, cells)


def place(model: str, task: str) -> tuple[int, int]:
    """Where a model and a task come in the tables: in the experiment's order, and what it does not know at the end."""
    orders = (MODELS, model), (TASKS, task)
    found = [order.index(name) if name in order else len(order) for order, name in orders]
    return found[0], found[1]


def groups_of(results: list[Result]) -> list[dict[float, Group]]:
    """For each model and task, the Results by their repetition penalty."""

    def key(result: Result) -> tuple[str, str]:
        return Path(result.model.name).name.removesuffix(".gguf"), result.task.name

    found = []
    for (model, task), members in groupby(sorted(results, key=lambda each: place(*key(each))), key):
        by_penalty: dict[float, list[Result]] = {}
        for each in members:
            by_penalty.setdefault(each.task.repetition_penalty, []).append(each)
        found.append({penalty: Group(model, task, several) for penalty, several in by_penalty.items()})
    return found


def tables(results: list[Result], times: dict[Path, Times]) -> Iterator[Table]:
    """All tables."""
    pairs = groups_of(results)
    of_results = (
        ("At a glance", GLANCE, partial(glance, times=times)),
        ("Modes", ("score", "its change", "FLOPs saved (mean blocks), consistency"), modes),
        ("Gates", (*GATES, "mamba, k = 5", "the paper's recipe"), gates),
        ("With a guarantee", tuple(f"risk {risk}" for risk in RISKS), calibrated),
        ("Fills", ("project", *FILLS), fills),
    )
    for title, head, rows in of_results:
        yield title, head, [line for pair in pairs for line in rows(pair[1.0])]
    head = tuple(f"{what}, penalty {penalty}" for what in ("score", "early", "mamba") for penalty in (1, PENALTY))
    yield "A repetition penalty", head, [line for pair in pairs for line in penalised(pair)]
    yield peers({subject(file): times[file] for file in times if file.name.endswith(ALONE)})
    for end, title in ((ALONE, "One answer at a time"), (BESIDE, "Eight answers side by side")):
        files = [file for file in times if file.name.endswith(end)]
        yield title, TIMED, [line for file in files for line in timed_rows(file, times[file])]


def draw(times: dict[Path, Times], out: Path) -> None:
    """Draw how many times as fast as full depth one answer at a time is made, and its consistency: a panel for each model.

    A marker is the mean of the tasks, its bars reach from the lowest task to the highest. Those of peers are hollow.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "offramp"  # makes the same file for the same figure
    from matplotlib import pyplot

    files = [file for file in times if file.name.endswith(ALONE)]
    models = list(dict.fromkeys(subject(file)[0] for file in files))
    size = 3.1 * len(models) + 2.2, 3.9
    figure, (panels,) = pyplot.subplots(1, len(models), figsize=size, sharey=True, squeeze=False, layout="constrained")
    looks: dict[str, dict[str, str]] = {}
    for model, axes in zip(models, panels, strict=True):
        of_model = [times[file] for file in files if subject(file)[0] == model]
        for name in dict.fromkeys(name for _, turns in of_model for name in turns[0] if drawn(name, turns)):
            points = [speed_and_consistency(turns, name) for _, turns in of_model if name in turns[0]]
            (x, *across), (y, *along) = ((fmean(each), min(each), max(each)) for each in zip(*points, strict=True))
            look = looks.setdefault(name, look_of(len(looks), peer=is_peer(name, of_model[0][1])))
            bars = [[[abs(end - middle)] for end in ends] for middle, ends in ((y, along), (x, across))]
            axes.errorbar(x, y, *bars, linestyle="", elinewidth=0.8, **look)
        axes.axvline(1, color="grey", linewidth=0.8)
        axes.set(xlim=(0, None), xlabel="times as fast as full depth", title=model)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("consistency")
    keys = [pyplot.Line2D([], [], linestyle="", **look, label=name) for name, look in looks.items()]
    figure.legend(handles=keys, loc="outside right upper", frameon=False)
    figure.savefig(out, metadata={"Date": None})
    pyplot.close(figure)


def drawn(name: str, turns: list[answers.Turn]) -> bool:
    """Whether a contender is in the figure: modes, the paper's recipe, and peers are."""
    return name in GLANCE or is_peer(name, turns)


def speed_and_consistency(turns: list[answers.Turn], name: str) -> tuple[float, float]:
    """How many times as fast as full depth a contender made all answers, and their mean token F1 with full depth's."""
    first = next(iter(turns[0]))
    pairs = ((turn[name]["ids"], turn[first]["ids"]) for turn in turns)
    return answers.faster(turns, name, first), fmean(token_f1(*ids) for pair in pairs for ids in zip(*pair, strict=True))


def look_of(number: int, peer: bool) -> dict[str, str]:
    """The colour and the marker of a contender."""
    marker, fill = MARKERS[number % len(MARKERS)], "none" if peer else "full"
    return {"color": COLOURS[number % len(COLOURS)], "marker": marker, "fillstyle": fill}


def paragraphs(page: str) -> list[str]:
    """The paragraphs, items of lists and rows of tables of a page in Markdown, without code."""
    text = re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE)
    return [" ".join(each.split()) for each in re.split(r"\n\s*\n|\n(?=\||- |#)", text)]


def figures(text: str) -> set[str]:
    """The percentages in a text but "95% intervals", without their signs, and its "1.06 times"; of "1 to 2%" both."""
    shares = re.findall(r"(?:(\d[\d.]*) (?:to|and|or) −?)?(\d[\d.]*)%(?! interval)", text)
    times = re.findall(r"(?:(\d+\.\d\d) (?:to|and|or) )?(\d+\.\d\d) times", text)
    pairs = [("%", shares), (" times", times)]
    return {number + unit for unit, found in pairs for pair in found for number in pair if number}


def differences(lines: list[str], pages: dict[Path, list[str]]) -> Iterator[str]:
    """What pages (file → paragraphs) say that the tables' rows do not, and the reverse. The first page has all rows."""
    made, known = {" ".join(line.split()) for line in lines}, figures(" ".join(lines))
    known |= {f"{number} times" for number in re.findall(r"\b\d+\.\d\d\b", " ".join(lines))}
    titles = tuple(line.partition(" | ")[0] + " |" for line in made)
    first, folder = next(iter(pages)), next(iter(pages)).parent
    yield from (f"{first} lacks this row: {line}" for line in sorted(made.difference(pages[first])))
    links = [f"{folder.name}/{file.name}" for file in pages if file.parent == folder]
    for file, texts in pages.items():
        for text in texts:
            if text in made:
                continue
            if file.parent == folder and text.startswith(titles):
                yield f"{file} has this row, which is not so: {text}"
            if file.parent == folder or any(link in text for link in links):
                unknown = sorted(figures(text) - known)
                yield from (f"{file} says {figure}, which no row has: {text[:100]}" for figure in unknown)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--check", type=Path, nargs="+", help="a page that should have all rows, and pages that quote it")
    parser.add_argument("--figure", type=Path, help="draw consistency against times in this file, an SVG")
    args = parser.parse_args(argv)
    timed = [file for file in args.files if "-times" in file.name]
    try:
        results = load_results([file for file in args.files if file not in timed])
        pages = {file: paragraphs(file.read_text("utf-8")) for file in args.check or ()}
    except OfframpError as error:
        parser.error(f"{error} {error.hint}")
    except OSError as error:
        parser.error(f"{error.filename} cannot be read: {error.strerror}.")
    times = {file: times_in(file) for file in sorted(timed, key=lambda file: (place(*subject(file)), file.name))}
    if args.figure:
        draw(times, args.figure)
    found = list(tables(results, times))
    if not args.check:
        for title, head, rows in found:
            if rows:
                print("\n".join([f"### {title}\n", row("", head), f"|{'---|' * (len(head) + 1)}", *rows, ""]))
        return
    lines = [line for _, _, rows in found for line in rows]
    if wrong := list(differences(lines, pages)):
        raise SystemExit("\n".join(wrong))
    print(f"{args.check[0]} has all {len(lines)} rows, and no figure that is not in them")


if __name__ == "__main__":
    main()
