"""Four modes say what a user gets.

A mode chooses among a model's exits and a fill. `MODES` describes each of them, and every interface reads it: the command
line, Python, the server and its page, transformers and llm. `early` has points, which are numbered from 1 on: `early:3` is
the third policy that its calibration tested.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

from offramp.decode.drafts import accepted_by, asking_cost
from offramp.decode.fills import FILLS, fill_named
from offramp.decode.row_costs import row_costs
from offramp.errors import BadInput
from offramp.exits.calibrated import Point, points_of
from offramp.exits.exit_set import ExitSet
from offramp.exits.exits import Exits
from offramp.exits.policy import Policy
from offramp.model.backbone import Backbone
from offramp.model.compiled.library import MOST_DRAFTS
from offramp.model.costs import Costs

LEAST_GAIN = 1.1  # `exact` is the default if drafts should make decoding so many times as fast as full depth
USUAL_FILL = "project"  # the fill of exits that decide, if no calibration names another


@dataclass(frozen=True)
class Mode:
    """What a user gets: a promise, and what it saves."""

    name: str
    promise: str
    saves: str

    def promised(self, calibration: dict[str, Any]) -> str:
        """The promise, with the risk and the probability of a calibration's record where it has them."""
        if not {"risk", "delta"} <= set(calibration):
            return self.promise
        figures = {"RISK": f"{calibration['risk']:g}", "1 − DELTA": f"{1 - calibration['delta']:g}"}
        text = self.promise.removesuffix(" (offramp calibrate)")
        for name, value in figures.items():
            text = text.replace(name, value)
        return text


MODES = {
    mode.name: mode
    for mode in (
        Mode("full", "every token goes through every block: the reference", "nothing"),
        Mode("exact", "full depth's own tokens: exits draft, and full depth decides", "time"),
        Mode(
            "early",
            "exits decide; at most RISK of an answer is lost on average, with probability 1 − DELTA (offramp calibrate)",
            "FLOPs, some time",
        ),
    )
}


class Way(NamedTuple):
    """A mode's way to decode: its exits and its fill, and the policy of its point if it has one."""

    exits: Exits | None
    fill: str
    policy: Policy | None = None


def parted(mode: str) -> tuple[str, int | None]:
    """The name of a mode, and the number of its point: `early:3` is ("early", 3). Raises `BadInput`."""
    name, colon, number = mode.partition(":")
    if name == "close":
        raise BadInput("The mode close is gone: it was hardly faster than exact, and changed answers.", "Use exact.")
    if name not in MODES:
        raise BadInput(f"There is no mode '{mode}'.", f"Choose from {', '.join(MODES)}.")
    if not colon:
        return name, None
    if name != "early" or not re.fullmatch("[1-9][0-9]{0,2}", number):
        raise BadInput(f"There is no mode '{mode}'.", "Points are numbers from 1 on, of early: early:3.")
    return name, int(number)


def mode_of(fill: str | None) -> str:
    """The mode that a fill belongs to."""
    return "exact" if fill in FILLS and FILLS[fill].verifies else "early"


def usual_mode(backbone: Backbone, exits: ExitSet) -> str:
    """The mode if a user names none: `exact` if there are drafts that should pay, else `full`."""
    compiled = backbone.engine == "compiled blocks"  # the costs of drafts were measured with compiled code
    pays = compiled and exits.drafting and promised_gain(backbone, exits.drafting) >= LEAST_GAIN
    return "exact" if pays else "full"


def promised_gain(backbone: Backbone, exits: Exits) -> float:
    """How many times as fast as full depth the drafts of these exits should make decoding.

    It follows from what a draft of the first open exit costs, and from how often a first, second, … one of the exit or of
    the table was right on held-out text when the exit was trained. Raises `CorruptFile` for a damaged record.
    """
    first = next((exit for index, exit in enumerate(exits) if exits.policy.opens(index)), None)
    if first is None:
        return 1.0
    right = accepted_by(exits, first, with_table=True)
    listed = backbone.vocab_size if exits.shortlist is None else len(exits.shortlist)
    asking = asking_cost(backbone, first, Costs(backbone).head * listed // backbone.vocab_size)
    rows = row_costs(backbone)
    best = tokens = chance = 1.0
    for drafts, share in enumerate(right[:MOST_DRAFTS], start=1):
        chance *= share
        tokens += chance
        best = max(best, tokens / (1 + rows[drafts] + drafts * asking))
    return best


def settled(mode: str, exits: ExitSet, backbone: Backbone, fill: str | None = None) -> Way:
    """The way of a mode. A `fill` replaces the mode's own, if it keeps the mode's promise.

    The fill of `early` is the one that the exits were calibrated with. Raises `BadInput` for an unknown mode, point or
    fill, for a fill of another mode, and for `early` without exits; `ExitsMismatch` for `early` with exits of other
    weights.
    """
    name, point = parted(mode)
    if fill is not None and (fill_named(fill).verifies != (name == "exact") or name == "full"):
        other = f"the fill '{fill}' belongs to the mode {mode_of(fill)}"
        raise BadInput(f"The mode '{mode}' has no fill '{fill}'; {other}.", "Leave out the mode or the fill.")
    if name == "full":
        return Way(None, USUAL_FILL)
    if name == "exact":
        if exits.drafting and not exits.drafting.owner.fits(backbone):
            raise exits.drafting.owner.mismatch(backbone, "The exits")
        return Way(exits.drafting, fill or "verify")
    early = exits.require_early(backbone)
    tested = None if point is None else _point(points_of(early.calibration), point)
    if tested and not tested.passed:
        warnings.warn(f"The calibration's point {point} did not pass its test, so it guarantees nothing.", stacklevel=4)
    return Way(early, fill or str(early.calibration.get("fill", USUAL_FILL)), tested.policy if tested else None)


def _point(points: list[Point], number: int) -> Point:
    """The point of `early` with this number."""
    if not points:
        raise BadInput(
            "The mode early has no calibrated points here.", "Leave the point out, or calibrate: offramp calibrate."
        )
    if number > len(points):
        raise BadInput(f"The mode early has no point {number} here.", f"The last one is early:{len(points)}.")
    return points[number - 1]
