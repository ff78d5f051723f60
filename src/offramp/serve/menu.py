"""The ways in which a server can answer: at full depth, with drafts, or with exits at one of their calibrated points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from offramp.decode.engine import Engine
from offramp.decode.fills import FILLS, Fill, fill_named
from offramp.errors import BadInput, CorruptFile, OfframpError
from offramp.exits.calibrated import differences
from offramp.exits.exits import Exits
from offramp.exits.policy import Policy
from offramp.model.backbone import Backbone

FULL = "full"  # the name of full depth, beside those of fills


@dataclass(frozen=True)
class Point:
    """A policy that a calibration tested, and what it measured: the mean loss of an answer, the share of FLOPs saved, and
    whether it passed the test.
    """

    policy: Policy
    loss: float
    flops_saved: float
    passed: bool


def _points(exits: Exits) -> list[Point]:
    """What the exits' calibration tested. Raises `CorruptFile` where the record lacks something."""
    try:
        return [
            Point(Policy.from_json(each["policy"]), each["loss"], each["flops_saved"], each["passed"])
            for each in exits.calibration.get("tested", [])
        ]
    except (KeyError, TypeError, ValueError, AttributeError, OfframpError) as error:
        raise CorruptFile(f"The exits' calibration is damaged: {error!r}.", "Calibrate again.") from error


def _serves(fill: type[Fill], backbone: Backbone) -> bool:
    try:
        fill(backbone)
    except BadInput:
        return False
    return True


class Menu:
    """Engines by fill and point, made when they are first asked for. `usual` answers where a request names neither.

    exits: those that decide, or None; drafts: those that draft for `verify`, or None. `fills`: what a request can ask for.
    """

    def __init__(self, backbone: Backbone, exits: Exits | None, drafts: Exits | None, usual: Engine) -> None:
        self.backbone, self.exits, self.usual = backbone, exits, usual
        self._drafts = drafts or exits
        self.points = _points(exits) if exits else []
        here = [
            name for name, fill in FILLS.items() if (self._drafts if fill.verifies else exits) and _serves(fill, backbone)
        ]
        self.fills = [FULL, *here]
        self._made: dict[tuple[str, int | None], Engine] = {(FULL if usual.is_full else usual.fill.name, None): usual}

    def engine(self, fill: str | None, point: int | None) -> Engine:
        """The engine for a fill, and for a calibrated point (by its number) where exits decide. Raises `BadInput`."""
        if fill is None and point is None:
            return self.usual
        fill = fill or "project"
        if fill not in self.fills:
            raise BadInput(f"There is no fill '{fill}' here.", f"Choose from {', '.join(self.fills)}.")
        if point is not None and not 0 <= point < len(self.points):
            raise BadInput(f"There is no point {point} here.", f"There are {len(self.points)}, from 0.")
        decides = fill != FULL and not fill_named(fill).verifies
        key = fill, point if decides else None
        if key not in self._made:
            policy = self.points[point].policy if decides and point is not None else None
            exits = self.exits if decides else None if fill == FULL else self._drafts
            self._made[key] = Engine(self.backbone, exits, policy, fill) if exits else Engine(self.backbone)
        return self._made[key]

    def guarantee(self, engine: Engine, **used: Any) -> dict[str, Any] | None:
        """What is guaranteed of the answers of an engine that are `used` in this way (see `exits.calibrated.differences`).

        It is a loss, a risk and a delta; or None where the engine's policy passed no test, or another use was tested.
        """
        passed = any(point.passed and point.policy == engine.policy for point in self.points)
        if not passed or self.exits is None or engine.fill.verifies:
            return None
        tested = self.exits.calibration
        if differences(tested, {"fill": engine.fill.name, "weights": self.backbone.weight_format, **used}):
            return None
        return {name: tested.get(name) for name in ("loss", "risk", "delta")}

    def describe(self) -> dict[str, Any]:
        """The menu for the page. `tested` is the use under which points passed: elsewhere they guarantee nothing."""
        tested = self.exits.calibration if self.exits else {}
        same = not differences(tested, {"weights": self.backbone.weight_format})
        return {
            "blocks": self.backbone.n_blocks,
            "fills": self.fills,
            "usual": {"fill": FULL if self.usual.is_full else self.usual.fill.name},
            "points": [
                {"loss": point.loss, "flops_saved": point.flops_saved, "passed": point.passed and same}
                for point in self.points
            ],
            "tested": {name: tested.get(name) for name in ("fill", "max_tokens")},
        }
