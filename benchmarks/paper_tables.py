"""The tables that `benchmarks/paper.py` and `benchmarks/paper_times.py` give, in Markdown.

    .venv/bin/python benchmarks/paper_tables.py build/paper/*/*.json [--check PAGE]

The files are Results (`MODEL-TASK.json`, or packed by xz) and times (`MODEL-TASK-times.json`). With `--check`, it prints
instead the rows that PAGE does not have, and fails if there are any.

Most cells are what is saved where consistency (token F1 with full depth's answer) falls to 0.9, in a straight line between
the conditions that were measured: FLOPs saved and, in brackets, mean blocks run. Of several seeds: the mean, the lowest and
the highest.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean

from offramp.errors import OfframpError
from offramp.evaluation.report import CONSISTENT, crossing
from offramp.evaluation.results import Result, load_results
from paper import DRAFTS, FILLS, GATES, LOSSES, MATCHED, PENALTY, PLAIN, RISKS, SEEDS, SHIPPED, THE_PAPERS
from paper_exits import Recipe
from paper_times import COLUMNS, TIMES, row, rows_of, share
from trade import SCORES

KEPT = (0.98, 0.95, 0.9, 0.8)  # consistencies of the shipped exits' table
NONE = "–"
Found = tuple[float, float]  # FLOPs saved, mean blocks run
Table = tuple[str, tuple[str, ...], list[str]]  # a title, the head's cells, and the rows


@dataclass(frozen=True)
class Group:
    """The Results of one model on one task, with one repetition penalty; the first is full depth's."""

    title: str
    penalty: float
    results: list[Result]

    @property
    def full(self) -> Result:
        return self.results[0]

    def at(self, results: Iterable[Result], consistency: float = CONSISTENT) -> Found | None:
        """What conditions save where they fall to this consistency."""
        found = crossing([self.full, *results], consistency, ("flops_saved", "mean_blocks"))
        return (found[0], found[1]) if found else None

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


def gates(group: Group) -> Iterator[str]:
    """Each gate, with a jump and without."""
    for jump in (True, False):
        curves = [[group.made(Recipe(gate, jump, seed=seed)) for seed in SEEDS] for gate in GATES]
        if any(map(any, curves)):
            cells = [cell([group.at(curve) for curve in seeds if curve]) for seeds in curves]
            yield row(f"{group.title}, {'jump' if jump else 'no jump'}", cells)


def learned_from(group: Group) -> Iterator[str]:
    """The Mamba gate on other texts and targets; and a feed-forward gate on the task's own answers."""
    jump = group.jumps
    recipes = [Recipe("mamba", jump), Recipe("mamba", jump, k=5), Recipe("mamba", jump, PLAIN), THE_PAPERS]
    recipes += [Recipe("ffn", jump), Recipe("ffn", jump, MATCHED)]
    curves = [group.made(recipe) for recipe in recipes]
    if any(curves[1:4]):
        yield row(group.title, [cell([group.at(curve)]) for curve in curves])


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
        found = [group.of(f"{SHIPPED}, risk {risk:g}, loss {loss}") for risk in RISKS]
        if any(found):
            yield row(f"{group.title}, {loss}", [first(each) for each in found])


def first(several: list[Result]) -> str:
    """A cell of the first of several Results, if there is any."""
    return point(several[0]) if several else NONE


def fills(group: Group) -> Iterator[str]:
    """The fills under one policy, and verified drafts."""
    others = [each for each in group.results if each.condition.label.startswith(SHIPPED)]
    by_fill = {fill: [each for each in others if each.condition.fill == fill] for fill in FILLS}
    tried = [each for several in by_fill.values() for each in several]
    if tried:
        policy = tried[0].condition.policy
        same = [each for each in others if (each.condition.fill, each.condition.policy) == ("project", policy)]
        drafts = [each for each in group.results if each.condition.label == DRAFTS]
        yield row(group.title, [first(several) for several in (same, *by_fill.values(), drafts)])


def penalised(pair: dict[float, Group]) -> Iterator[str]:
    """Full depth's score, and what the shipped exits and the Mamba gate save, without a repetition penalty and with it."""
    if set(pair) == {1.0, PENALTY}:
        cells = []
        for measure in ("score", "shipped", "mamba"):
            for group in pair.values():
                if measure == "score":
                    name = SCORES.get(group.full.task.name.lower(), "f1")
                    cells.append(f"{group.full.summary[name].mean:.3f}")
                else:
                    curve = group.shipped() if measure == "shipped" else group.made(Recipe("mamba", group.jumps))
                    cells.append(cell([group.at(curve)]))
        yield row(pair[1.0].title, cells)


def groups_of(results: list[Result]) -> list[dict[float, Group]]:
    """For each model and task, the Results by their repetition penalty."""

    def key(result: Result) -> tuple[str, str]:
        return result.model.name, result.task.name

    found = []
    for (model, task), members in groupby(results, key):
        by_penalty: dict[float, list[Result]] = {}
        for each in members:
            by_penalty.setdefault(each.task.repetition_penalty, []).append(each)
        title = f"{Path(model).name}, {task}"
        found.append({penalty: Group(title, penalty, several) for penalty, several in by_penalty.items()})
    return found


def tables(results: list[Result], timed: Iterable[Path]) -> Iterator[Table]:
    """All tables that have rows."""
    pairs = groups_of(results)
    of_results = (
        ("Gates", GATES, gates),
        ("What gates learn from", ("mamba", "k = 5", PLAIN, "the paper's recipe", "ffn", f"ffn, {MATCHED}"), learned_from),
        ("The exits that ship", (*(f"consistency {kept}" for kept in KEPT), "own policy"), shipped),
        ("With a guarantee", tuple(f"risk {risk}" for risk in RISKS), calibrated),
        ("Fills", ("project", *FILLS, DRAFTS), fills),
    )
    for title, head, rows in of_results:
        yield title, head, [line for pair in pairs for line in rows(pair[1.0])]
    head = tuple(f"{what}, penalty {penalty}" for what in ("score", "shipped", "mamba") for penalty in (1, PENALTY))
    yield "A repetition penalty", head, [line for pair in pairs for line in penalised(pair)]
    yield "Times", COLUMNS, [line for file in timed for line in rows_of(file)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--check", type=Path, help="a page that should have all rows")
    args = parser.parse_args(argv)
    timed = [file for file in args.files if file.name.endswith(TIMES)]
    try:
        found = list(tables(load_results([file for file in args.files if file not in timed]), timed))
    except OfframpError as error:
        parser.error(f"{error} {error.hint}")
    if not args.check:
        for title, head, rows in found:
            if rows:
                print("\n".join([f"### {title}\n", row("", head), f"|{'---|' * (len(head) + 1)}", *rows, ""]))
        return
    there = args.check.read_text("utf-8").splitlines()
    missing = [line for _, _, rows in found for line in rows if line not in there]
    if missing:
        raise SystemExit("\n".join([f"{args.check} lacks these rows:", *missing]))
    print(f"{args.check} has all {sum(len(rows) for _, _, rows in found)} rows")


if __name__ == "__main__":
    main()
