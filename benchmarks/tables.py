"""The tables of docs/results/README.md, made from the Results beside it.

    .venv/bin/python benchmarks/tables.py docs/results/*.json.xz [--check docs/results/README.md]

Prints them in Markdown. With `--check`, prints instead the rows that the page does not have, and fails if there are any.

1. What the gates save where consistency has fallen to 0.9: FLOPs saved, and mean blocks run.
2. What they save at their calibrated thresholds: FLOPs saved, and consistency.
3. The fills under one policy: consistency, FLOPs saved, and speed with full depth as 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from offramp.errors import OfframpError
from offramp.evaluation.report import at_consistency
from offramp.evaluation.results import Result, load_results
from paper_tables import NONE, gate_of, plain
from paper_times import row, share

MODELS, TASKS = ("smollm2", "mamba-tiny", "mamba-tiny-ee"), ("TruthfulQA", "TriviaQA", "CoQA")
GATES, FILLS = ("linear", "ffn", "mamba", "max-prob"), ("project", "freeze", "copy", "defer", "verify")


def at_a_tenth_lost(results: list[Result]) -> list[str]:
    """For each gate, FLOPs saved and mean blocks run where consistency has fallen to 0.9."""
    found = at_consistency(results, 0.9, ("flops_saved", "mean_blocks"))
    cells = list[str]()
    for gate in GATES:
        saved, blocks = found.get(f"project, {gate}", (None, None))
        whole = "" if cells else f" of {results[0].blocks}"
        cells.append(NONE if saved is None or blocks is None else f"{share(saved)} ({blocks:.1f}{whole})")
    return cells


def calibrated(results: list[Result]) -> list[str]:
    """Each gate's calibrated point, which comes after its other thresholds. Where nothing passed, its policy names no gate.

    The exits that ship have such a point of their own. It comes first, and is left out.
    """
    cells, gate = dict.fromkeys(GATES, NONE), ""
    for result in results[2:]:
        policy, summary = result.condition.policy, result.summary
        if policy is None or result.condition.calibration is None:
            gate = gate_of(result)
            continue
        opens = min(policy.thresholds) < 1 or policy.candidates
        saved = f"{share(summary['flops_saved'].mean)}, {summary['token_f1'].mean:.3f}"
        cells[gate] = saved if opens else "nothing"
    return list(cells.values())


def fills(results: list[Result]) -> tuple[str, list[str]]:
    """The gate and its threshold, and a cell for each fill."""
    others = [result for result in results if result.condition.fill not in (None, "project")]
    if not others:
        return "", []
    policy = others[0].condition.policy
    same = [each for each in results if each.condition.policy == policy and gate_of(each) == gate_of(others[0])]
    cells = dict.fromkeys(FILLS, NONE)
    for result in same:
        speed = result.summary["tokens_per_second"].mean / results[0].summary["tokens_per_second"].mean
        saved, kept = result.summary["flops_saved"].mean, result.summary["token_f1"].mean
        cells[result.condition.fill or ""] = f"{plain(kept, 3)} / {share(saved)} / {plain(speed, 2)}"
    thresholds = set(policy.thresholds) if policy else set()
    how = "calibrated" if len(thresholds) > 1 else f"{min(thresholds):g}"
    return f"{gate_of(others[0])} {how}", list(cells.values())


def tables(results: list[Result]) -> Iterator[list[str]]:
    """The rows of each table."""
    by_pair = {
        (model, task.lower()): list(group)
        for (model, task), group in groupby(results, key=lambda result: (result.model.name, result.task.name))
    }
    groups = [(f"{m}, {t}", by_pair[m, t.lower()]) for m in MODELS for t in TASKS if (m, t.lower()) in by_pair]
    yield [row(title, at_a_tenth_lost(group)) for title, group in groups]
    yield [row(title, calibrated(group)) for title, group in groups if "CoQA" not in title]
    yield [row(f"{title}, {how}", cells) for title, group in groups for how, cells in [fills(group)] if cells]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--check", type=Path, help="a page that should have all rows")
    args = parser.parse_args(argv)
    try:
        found = list(tables(load_results(args.results)))
    except OfframpError as error:
        parser.error(f"{error} {error.hint}")
    if not args.check:
        print("\n\n".join("\n".join(rows) for rows in found))
        return
    there = args.check.read_text("utf-8").splitlines()
    missing = [line for rows in found for line in rows if line not in there]
    if missing:
        raise SystemExit("\n".join([f"{args.check} lacks these rows:", *missing]))
    print(f"{args.check} has all {sum(map(len, found))} rows")


if __name__ == "__main__":
    main()
