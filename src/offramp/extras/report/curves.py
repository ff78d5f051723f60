"""Curves through Results: conditions that differ only in their thresholds, and what a curve costs at a consistency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby, pairwise

from offramp.evaluation.results import Result

MOST_CURVES = 12  # curves that a figure shows by name
CONSISTENT = 0.9  # the consistency at which curves are compared


def curves(results: list[Result]) -> list[tuple[str, list[Result]]]:
    """Groups of conditions that differ only in their thresholds: a curve for each kind of exits, fill and gate, full depth
    first.

    Conditions under the exits' own policy, calibrated or not, are in their gate's curve.
    """

    def label(result: Result) -> str:
        condition, policy = result.condition, result.condition.policy
        if condition.fill is None:
            return "full depth"
        if policy is None:
            return condition.name
        extras = [] if own(result) else policy.extras
        words = ", ".join([condition.fill, policy.confidence_name(condition.gate or ""), *extras])
        return f"{condition.label}: {words}" if condition.label else words

    return sorted(
        ((name, list(curve)) for name, curve in groupby(sorted(results, key=label), key=label)),
        key=lambda curve: curve[0] != "full depth",
    )


def leading(results: list[Result]) -> list[Result]:
    """The conditions that figures show by name: all, or for each fill and gate those of the exits that save most."""
    found = curves(results)
    if len(found) <= MOST_CURVES:
        return results

    def saved(curve: list[Result]) -> float:
        counted = [each for each in curve if each.summary["token_f1"].mean >= CONSISTENT and not own(each)]
        return max((each.summary["flops_saved"].mean for each in counted), default=-math.inf)

    best: dict[str, list[Result]] = {}
    for name, curve in found:
        kind = name.removeprefix(f"{curve[0].condition.label}: ")
        best[kind] = max(best.get(kind, curve), curve, key=saved)
    return [result for curve in best.values() for result in curve]


def own(result: Result) -> bool:
    """Whether thresholds were the exits' own, by calibration or by default."""
    return result.condition.calibration is not None


def examples(results: list[Result]) -> dict[str, Result]:
    """One condition of each curve: of those with a token F1 of at least 0.5, the one whose tokens leave earliest."""
    found = {}
    for name, curve in curves(results):
        early = [result for result in curve if result.condition.policy]
        kept = [result for result in early if result.summary["token_f1"].mean >= 0.5] or early
        if kept:
            found[name] = min(kept, key=lambda result: result.summary["mean_blocks"].mean)
    return found


def at_consistency(results: list[Result], wanted: float, names: Sequence[str]) -> dict[str, list[float]]:
    """For each curve that falls to this consistency, what `crossing` gives. Exits' own policies are left out."""
    full = [result for result in results if result.condition.policy is None]
    found = {}
    for label, curve in curves(results):
        early = [result for result in curve if result.condition.policy and not own(result)]
        if point := crossing([*full, *early], wanted, names):
            found[label] = point
    return found


def crossing(results: list[Result], wanted: float, names: Sequence[str]) -> list[float] | None:
    """The means of these metrics where a curve falls to this consistency; None for one that does not.

    `results` is full depth, and the curve's conditions. A value is interpolated in a straight line between the conditions
    whose consistency is nearest, above and below.
    """
    full, *curve = results
    curve.sort(key=lambda result: -result.summary["token_f1"].mean)
    points = [[each.summary[name].mean for name in ("token_f1", *names)] for each in (full, *curve)]
    for before, after in pairwise(points):
        if before[0] >= wanted > after[0]:
            share = (before[0] - wanted) / (before[0] - after[0])
            return [a + share * (b - a) for a, b in zip(before[1:], after[1:], strict=True)]
    return None
