"""The tables that `benchmarks/paper.py` and `benchmarks/paper_times.py` give, in Markdown.

    .venv/bin/python benchmarks/paper_tables.py build/paper/*/*.json* [--check PAGE …] [--figure FILE.svg]

The files are Results (`MODEL-TASK.json`, or packed by xz) and times (`MODEL-TASK-times-BATCH.jsonl`). It also knows what
earlier versions of these scripts wrote: other conditions, and times in `MODEL-TASK-times.json`. With `--check`, it compares
pages with these tables instead, and fails if something differs. The first page must have all rows, and no other row about
these models and tasks. Each percentage in its text must be in a row, too. In the other pages that holds for each percentage
in a paragraph, or in a row of a table, that links to the first page. `--figure` draws the change of each task's score
against how many times as fast as full depth answers are made.

Most cells are what is saved where consistency (token F1 with full depth's answer) falls to 0.9, in a straight line between
the conditions that were measured: FLOPs saved and, in brackets, mean blocks run. Of several seeds: the mean, the lowest and
the highest.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

import answers
from offramp.errors import OfframpError
from offramp.evaluation.results import Result, load_results
from offramp.extras.report.curves import CONSISTENT, crossing
from offramp.extras.report.figures import COLOURS, MARKERS
from paper import COUNTS, FILLS, GATES, LOSSES, MODES, PENALTY, PLAIN, RISKS, THE_PAPERS
from paper_exits import Recipe

MODELS = ("smollm2", "smollm2-hybrid", "smollm2-mamba", "mamba-tiny-ee")  # in this order; others come after them
# What earlier versions compared, too: exits of several seeds, and of the task's own answers; and how they named the others.
SEEDS, MATCHED, SHIPPED, DRAFTS = (0, 1, 2), "the task's answers", "shipped", "drafts"
ALONE, TIMES, COLUMNS = "-times-1.jsonl", "-times.json", ("consistency", "score", "time saved", "tokens/s")
KEPT = (0.98, 0.95, 0.9, 0.8)  # consistencies of the shipped exits' table
GLANCE = (
    "full depth's score",
    "FLOPs saved by the paper's recipe",
    "by a mamba gate",
    "by second keys",
    "with a guarantee",
    "time saved by exits",
    "by verified drafts",
)
NONE = "–"
TASKS = tuple(COUNTS)
Row = dict[str, float]
Found = tuple[float, float]  # FLOPs saved, mean blocks run
Interval = tuple[float, float, float]  # a value and its 95% interval
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

    def at(self, results: Iterable[Result], consistency: float = CONSISTENT) -> Found | None:
        """What conditions save where they fall to this consistency."""
        found = crossing([self.full, *results], consistency, ("flops_saved", "mean_blocks"))
        return (found[0], found[1]) if found else None

    def change(self, result: Result) -> Interval:
        """By how much a condition's score is above full depth's, and the 95% interval of that."""
        pairs = zip(result.items, self.full.items, strict=True)
        return interval([{"change": own.scores[self.measure] - full.scores[self.measure]} for own, full in pairs], "change")

    def cell(self, curves: Iterable[list[Result]]) -> str:
        """What a curve saves where it falls to a consistency of 0.9, or those of several seeds."""
        return cell([self.at(curve) for curve in curves if curve])

    def made(self, recipe: Recipe) -> list[Result]:
        """The curve of exits that were made for the experiment."""
        return [each for each in self.results if (each.condition.label, gate_of(each)) == (recipe.label, recipe.gate)]

    @property
    def jumps(self) -> bool:
        """Whether the exits jump."""
        return any(each.condition.label.startswith("jump") for each in self.results)

    def of(self, label: str) -> list[Result]:
        """The conditions of exits with this label, under the fill `project`."""
        return [each for each in self.results if (each.condition.label, each.condition.fill) == (label, "project")]

    def shipped(self) -> list[Result]:
        """The shipped exits' line of second keys."""
        return [each for each in self.of(SHIPPED) if each.condition.calibration is None]


def plain(value: float, digits: int) -> str:
    """A number without a zero before the point."""
    return f"{value:.{digits}f}".removeprefix("0")


def gate_of(result: Result) -> str:
    """The gate's name, or that of the confidence in its place; "" at full depth."""
    policy = result.condition.policy
    return policy.confidence_name(result.condition.gate or "") if policy else ""


def cell(several: Sequence[Found | None]) -> str:
    """What one curve saves, or those of several seeds."""
    found = [each for each in several if each]
    if not found:
        return NONE
    saved, blocks = ([each[place] for each in found] for place in range(2))
    ends = f"{share(min(saved))} to {share(max(saved))}; " if len(found) > 1 else ""
    return f"{share(fmean(saved))} ({ends}{fmean(blocks):.1f})"


def modes(group: Group) -> Iterator[str]:
    """Each mode: the score and its change, with its 95% interval; token F1 with full depth; FLOPs saved and blocks run."""
    for result in (each for each in group.results if each.condition.label in MODES):
        middle, low, high = group.change(result)
        cells = [
            f"{result.summary[group.measure].mean:.3f}",
            f"{middle:+.3f} ({low:+.3f} to {high:+.3f})".replace("-", "−"),
        ]
        yield row(f"{group.title}, {result.condition.label}", [*cells, point(result)])


def gates(group: Group) -> Iterator[str]:
    """Each gate, with a jump and without."""
    for jump in (True, False):
        curves = [[group.made(Recipe(gate, jump, seed=seed)) for seed in SEEDS] for gate in GATES]
        if any(map(any, curves)):
            yield row(f"{group.title}, {'jump' if jump else 'no jump'}", [group.cell(seeds) for seeds in curves])


def learned_from(group: Group) -> Iterator[str]:
    """The Mamba gate on other texts and targets; and a feed-forward gate on the task's own answers."""
    jump = group.jumps
    recipes = [Recipe("mamba", jump), Recipe("mamba", jump, k=5), Recipe("mamba", jump, PLAIN), THE_PAPERS]
    recipes += [Recipe("ffn", jump), Recipe("ffn", jump, MATCHED)]
    curves = [group.made(recipe) for recipe in recipes]
    if any(curves[1:4]):
        yield row(group.title, [group.cell([curve]) for curve in curves])


def shipped(group: Group) -> Iterator[str]:
    """The shipped exits with second keys, at several consistencies, and under their own policy."""
    line, own = group.shipped(), group.of(SHIPPED)
    own = [each for each in own if each not in line]
    if own:
        yield row(group.title, [cell([group.at(line, kept)]) for kept in KEPT] + [point(own[0])])


def point(result: Result) -> str:
    """FLOPs saved, mean blocks, and consistency."""
    summary = result.summary
    kept = plain(summary["token_f1"].mean, 3)
    return f"{share(summary['flops_saved'].mean)} ({summary['mean_blocks'].mean:.1f}), {kept}"


def calibrated(group: Group) -> Iterator[str]:
    """The policies that were calibrated for the task, by loss and risk."""
    for loss in LOSSES:
        found = [guaranteed(group, risk, loss) for risk in RISKS]
        if any(found):
            yield row(f"{group.title}, {loss}", [first(each) for each in found])


def guaranteed(group: Group, risk: float, loss: str) -> list[Result]:
    """The condition that was calibrated for this risk and loss."""
    return [each for whose in ("early", SHIPPED) for each in group.of(f"{whose}, risk {risk:g}, loss {loss}")]


def first(several: list[Result]) -> str:
    """A cell of the first of several Results, if there is any."""
    return point(several[0]) if several else NONE


def fills(group: Group) -> Iterator[str]:
    """The fills under one policy, and verified drafts."""
    others = [each for each in group.results if each.condition.label.startswith((SHIPPED, "fills"))]
    by_fill = {fill: [each for each in others if each.condition.fill == fill] for fill in (*FILLS, "verify")}
    tried = [each for several in by_fill.values() for each in several]
    if tried:
        policy = tried[0].condition.policy
        same = [each for each in others if (each.condition.fill, each.condition.policy) == ("project", policy)]
        drafts = [each for each in group.results if each.condition.label == DRAFTS]
        yield row(group.title, [first(several) for several in (same, *by_fill.values(), drafts)])


def glance(group: Group, times: dict[tuple[str, str], dict[str, list[Row]]]) -> Iterator[str]:
    """Full depth's score; FLOPs saved at a consistency of 0.9, and with a guarantee; and the time that this saves."""
    rows = times.get((group.model, group.task), {})
    seeds = [group.made(Recipe("mamba", group.jumps, seed=seed)) for seed in SEEDS]
    cells = [group.cell(curves) for curves in ([group.made(THE_PAPERS)], seeds, [group.shipped()])]
    cells = [score(group), *cells, first(guaranteed(group, 0.05, "f1"))]
    for name in ("exits that ship", "verified drafts"):
        cells.append(share(interval(rows[name], "time saved")[0]) if name in rows else NONE)
    yield row(group.title, cells)


def score(group: Group) -> str:
    """Full depth's score: ROUGE-L in percent for TruthfulQA, pass@1 for code, F1 from 0 to 1 for the others."""
    return f"{group.full.summary[group.measure].mean:.3f}"


def row(name: str, cells: Iterable[str]) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join([name, *cells])} |"


def share(value: float) -> str:
    """A share in percent, with a digit after the point where it is small."""
    percent = 100 * value
    shown = f"{percent:.0f}%" if abs(percent) >= 19.95 else f"{percent:.1f}%"
    return "0.0%" if shown == "-0.0%" else shown.replace("-", "−")


def interval(rows: list[Row], measure: str) -> Interval:
    """The mean of a measure (of times, the median) and its 95% interval."""
    middle: Callable[[Any], Any] = median if measure == "time saved" else fmean
    values = [row[measure] for row in rows]
    drawn = np.random.default_rng(0).integers(len(values), size=(1000, len(values)))
    low, high = np.percentile([middle([values[place] for place in places]) for places in drawn.tolist()], [2.5, 97.5])
    return float(middle(values)), float(low), float(high)


def subject(file: Path) -> tuple[str, str]:
    """The model and the task that a file of times is about, by its name."""
    model, task = file.name.partition("-times")[0].rsplit("-", 1)
    return model, task


def rows_of(file: Path) -> list[str]:
    """The rows of an earlier version's file of times: each contender's measures, or why it failed."""
    record, title = json.loads(file.read_text("utf-8")), ", ".join(subject(file))
    shown: dict[str, Callable[[float], str]] = {"time saved": share, "tokens/s": "{:.0f}".format}
    found = []
    for name, values in record["rows"].items():
        cells = []
        for column in COLUMNS:
            middle, low, high = map(shown.get(column, "{:.3f}".format), interval(values, column))
            cells.append(f"{middle} ({low} to {high})")
        found.append(row(f"{title}: {name}", cells))
    return found + [row(f"{title}: {name}", [f"failed: {reason}"]) for name, reason in record["failures"].items()]


def timed_rows(file: Path) -> list[str]:
    """The rows of a file of times, which says in its first line why some peers failed."""
    about, *turns = map(json.loads, file.read_text("utf-8").splitlines())
    title, first = ", ".join(subject(file)), next(iter(turns[0]))
    found = [row(f"{title}: {name}", answers.cells(turns, name, first)) for name in turns[0]]
    return found + [row(f"{title}: {name}", [f"failed: {reason}"]) for name, reason in about["failures"].items()]


def penalised(pair: dict[float, Group]) -> Iterator[str]:
    """Full depth's score, and what the shipped exits and the Mamba gate save, without a repetition penalty and with it."""
    if set(pair) == {1.0, PENALTY}:
        cells = []
        for measure in ("score", "shipped", "mamba"):
            for group in pair.values():
                if measure == "score":
                    cells.append(score(group))
                else:
                    curve = group.shipped() if measure == "shipped" else group.made(Recipe("mamba", group.jumps))
                    cells.append(group.cell([curve]))
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


def tables(results: list[Result], timed: Iterable[Path]) -> Iterator[Table]:
    """All tables that have rows."""
    pairs, timed = groups_of(results), sorted(timed, key=lambda file: place(*subject(file)))
    earlier = [file for file in timed if file.name.endswith(TIMES)]
    times = {subject(file): json.loads(file.read_text("utf-8"))["rows"] for file in earlier}
    of_results = (
        ("At a glance", GLANCE, partial(glance, times=times)),
        ("Modes", ("score", "change", "saved"), modes),
        ("Gates", GATES, gates),
        ("What gates learn from", ("mamba", "k = 5", PLAIN, "the paper's recipe", "ffn", f"ffn, {MATCHED}"), learned_from),
        ("The exits that ship", (*(f"consistency {kept}" for kept in KEPT), "own policy"), shipped),
        ("With a guarantee", tuple(f"risk {risk}" for risk in RISKS), calibrated),
        ("Fills", ("project", *FILLS, "verify", DRAFTS), fills),
    )
    for title, head, rows in of_results:
        yield title, head, [line for pair in pairs for line in rows(pair[1.0])]
    head = tuple(f"{what}, penalty {penalty}" for what in ("score", "shipped", "mamba") for penalty in (1, PENALTY))
    yield "A repetition penalty", head, [line for pair in pairs for line in penalised(pair)]
    yield "Times", COLUMNS, [line for file in earlier for line in rows_of(file)]
    for batch, title in ((1, "One answer at a time"), (8, "Eight answers side by side")):
        files = [file for file in timed if file.name.endswith(f"-times-{batch}.jsonl")]
        yield title, answers.COLUMNS, [line for file in files for line in timed_rows(file)]


def draw(results: list[Result], timed: Iterable[Path], out: Path) -> None:
    """Draw the times of one answer at a time and the scores: a panel for each task, a colour for each contender, a marker
    for each model. A peer, which has no score, keeps it. Bars are 95% intervals.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "offramp"  # makes the same file for the same figure
    from matplotlib import pyplot

    files = sorted((file for file in timed if file.name.endswith(ALONE)), key=lambda file: place(*subject(file)))
    models, tasks = (list(dict.fromkeys(subject(file)[which] for file in files)) for which in (0, 1))
    size = 3.4 * len(tasks) + 2.4, 4.2
    figure, (panels,) = pyplot.subplots(1, len(tasks), figsize=size, squeeze=False, layout="constrained")
    looks: dict[str, dict[str, str]] = {}
    for file in files:
        model, task = subject(file)
        for name, x, y in points(file, results):
            look = looks.setdefault(name, look_of(len(looks)))
            bars = [[[abs(end - middle)] for end in ends] for middle, *ends in (y, x)]
            mark = MARKERS[models.index(model) % len(MARKERS)]
            panels[tasks.index(task)].errorbar(x[0], y[0], *bars, linestyle="", capsize=2, marker=mark, **look)
    for task, axes in zip(tasks, panels, strict=True):
        axes.axvline(1, color="grey", linewidth=0.8)
        axes.set(xscale="log", xlabel="times as fast as full depth", title=task)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("change of the score")
    plain = {"linestyle": "", "color": "grey"}
    keys = [pyplot.Line2D([], [], **{**plain, "marker": "s", **look}, label=name) for name, look in looks.items()]
    keys += [pyplot.Line2D([], [], **plain, marker=MARKERS[i % len(MARKERS)], label=name) for i, name in enumerate(models)]
    figure.legend(handles=keys, loc="outside right upper", frameon=False)
    figure.savefig(out, metadata={"Date": None})
    pyplot.close(figure)


def points(file: Path, results: list[Result]) -> Iterator[tuple[str, Interval, Interval]]:
    """Of each contender in a file of times: its name, how many times as fast it is, and the change of its score."""
    about, *turns = map(json.loads, file.read_text("utf-8").splitlines())
    (group,) = (pair[1.0] for pair in groups_of(results) if (pair[1.0].model, pair[1.0].task) == subject(file))
    scored = {each.condition.name: each for each in group.results}
    first, *others = turns[0]
    for name in others:
        known = scored.get(about["conditions"].get(name, ""))
        yield name, answers.interval(turns, answers.faster, name, first), group.change(known) if known else (0.0, 0.0, 0.0)


def look_of(number: int) -> dict[str, str]:
    """The colour of a contender; from the seventh on, its markers are hollow."""
    return {"color": COLOURS[number % len(COLOURS)], "fillstyle": "none" if number >= len(COLOURS) else "full"}


def paragraphs(page: str) -> list[str]:
    """The paragraphs, items of lists and rows of tables of a page in Markdown, without code."""
    text = re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE)
    return [" ".join(each.split()) for each in re.split(r"\n\s*\n|\n(?=\||- |#)", text)]


def percentages(text: str) -> set[str]:
    """The percentages in a text but "95% intervals", without their signs; of "1 to 2%" both."""
    found = re.findall(r"(?:(\d[\d.]*) (?:to|and|or) −?)?(\d[\d.]*)%(?! interval)", text)
    return {f"{number}%" for pair in found for number in pair if number}


def differences(lines: list[str], pages: dict[Path, list[str]]) -> Iterator[str]:
    """What pages (file → paragraphs) say that the tables' rows do not, and the reverse. The first page has all rows."""
    page, parts = next(iter(pages.items()))
    made = {" ".join(line.split()) for line in lines}
    titles = tuple(line.partition(" | ")[0] for line in made)
    ours = {each for each in parts if each.startswith(titles)}
    yield from (f"{page} lacks this row: {line}" for line in sorted(made - ours))
    yield from (f"{page} has this row, which is not so: {line}" for line in sorted(ours - made))
    known, link = percentages(" ".join(lines)), f"{page.parent.name}/{page.name}"
    for file, texts in pages.items():
        for text in texts:
            if text not in made and (file == page or link in text):
                unknown = sorted(percentages(text) - known)
                yield from (f"{file} says {figure}, which no row has: {text[:100]}" for figure in unknown)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--check", type=Path, nargs="+", help="a page that should have all rows, and pages that quote it")
    parser.add_argument("--figure", type=Path, help="draw scores against times in this file, an SVG")
    args = parser.parse_args(argv)
    timed = [file for file in args.files if "-times" in file.name]
    try:
        results = load_results([file for file in args.files if file not in timed])
        pages = {file: paragraphs(file.read_text("utf-8")) for file in args.check or ()}
    except OfframpError as error:
        parser.error(f"{error} {error.hint}")
    except OSError as error:
        parser.error(f"{error.filename} cannot be read: {error.strerror}.")
    if args.figure:
        draw(results, timed, args.figure)
    found = list(tables(results, timed))
    if not args.check:
        for title, head, rows in found:
            if rows:
                print("\n".join([f"### {title}\n", row("", head), f"|{'---|' * (len(head) + 1)}", *rows, ""]))
        return
    lines = [line for _, _, rows in found for line in rows]
    if wrong := list(differences(lines, pages)):
        raise SystemExit("\n".join(wrong))
    print(f"{args.check[0]} has all {len(lines)} rows, and no percentage that is not in them")


if __name__ == "__main__":
    main()
