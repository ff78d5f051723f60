"""Four modes say what a user gets; the fourth, `close`, is not offered yet.

A mode chooses among a model's exits and a fill. `MODES` describes each of them, and every interface reads it: the command
line, Python, the server and its page, transformers and llm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from offramp.decode.drafts import DraftRule, asking_cost
from offramp.decode.fills import FILLS, fill_named
from offramp.decode.row_costs import row_costs
from offramp.errors import BadInput, CorruptFile
from offramp.exits.exit_set import ExitSet
from offramp.exits.exits import Exits
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


def check_mode(name: str) -> None:
    """Raises `BadInput` for an unknown mode."""
    if name not in MODES:
        raise BadInput(f"There is no mode '{name}'.", f"Choose from {', '.join(MODES)}.")


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

    It follows from what a draft of the first open exit costs, and from how often a first, second, … one was right on
    held-out text when the exit was trained. Raises `CorruptFile` for a damaged record.
    """
    first = next((exit for index, exit in enumerate(exits) if exits.policy.opens(index)), None)
    if first is None:
        return 1.0
    try:
        held = next((row for row in exits.validation if row["block"] == first.block), {})
        right = [float(share) for share in held.get("acceptance") or [held.get("agreement", 0.0)] * 3]
    except (KeyError, TypeError, ValueError) as error:  # a stranger's record may hold anything
        raise CorruptFile(f"The exits' record of their training is damaged: {error!r}.", "Train them again.") from error
    listed = backbone.vocab_size if exits.shortlist is None else len(exits.shortlist)
    asking = asking_cost(backbone, first, Costs(backbone).head * listed // backbone.vocab_size)
    rule = DraftRule(row_costs(backbone))
    best = tokens = chance = 1.0
    for drafts, share in enumerate(right[:MOST_DRAFTS], start=1):
        chance *= share
        tokens += chance
        best = max(best, tokens / (rule.pass_cost(1 + drafts) + drafts * asking))
    return best


def settled(mode: str, exits: ExitSet, backbone: Backbone, fill: str | None = None) -> tuple[Exits | None, str]:
    """The exits and the fill of a mode. A `fill` replaces the mode's own, if it keeps the mode's promise.

    The fill of `early` is the one that the exits were calibrated with. Raises `BadInput` for an unknown mode or fill, for
    a fill of another mode, and for `early` without exits; `ExitsMismatch` for `early` with exits of other weights.
    """
    check_mode(mode)
    if fill is not None and (fill_named(fill).verifies != (mode == "exact") or mode == "full"):
        other = f"the fill '{fill}' belongs to the mode {mode_of(fill)}"
        raise BadInput(f"The mode '{mode}' has no fill '{fill}'; {other}.", "Leave out the mode or the fill.")
    if mode == "full":
        return None, USUAL_FILL
    if mode == "exact":
        if exits.drafting and not exits.drafting.owner.fits(backbone):
            raise exits.drafting.owner.mismatch(backbone, "The exits")
        return exits.drafting, fill or "verify"
    early = exits.require_early(backbone)
    return early, fill or str(early.calibration.get("fill", USUAL_FILL))
