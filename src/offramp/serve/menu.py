"""The ways in which a server can answer: in a mode, and if exits decide, at one of their calibrated points."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from offramp.decode.engine import Engine
from offramp.decode.modes import MODES
from offramp.errors import BadInput, CorruptFile, OfframpError
from offramp.exits.calibrated import differences
from offramp.exits.exit_set import ExitSet
from offramp.exits.exits import Exits
from offramp.exits.policy import Policy
from offramp.model.backbone import Backbone


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
    """The points that the exits' calibration tested. Raises `CorruptFile` if the record is not complete."""
    try:
        return [
            Point(Policy.from_json(each["policy"]), each["loss"], each["flops_saved"], each["passed"])
            for each in exits.calibration.get("tested", [])
        ]
    except (KeyError, TypeError, ValueError, AttributeError, OfframpError) as error:
        raise CorruptFile(f"The exits' calibration is damaged: {error!r}.", "Calibrate again.") from error


class Menu:
    """Engines by mode and point, made when they are first needed. `usual` answers if a request names neither.

    `modes`: those that a request can ask for.
    """

    def __init__(self, backbone: Backbone, exits: ExitSet, usual: Engine) -> None:
        self.backbone, self.exits, self.usual = backbone, exits, usual
        self.modes = tuple(dict.fromkeys((*exits.modes(backbone), usual.mode)))
        self.points = _points(exits.early) if exits.early and "early" in self.modes else []
        self._made: dict[tuple[str, int | None], Engine] = {(usual.mode, None): usual}

    def engine(self, mode: str | None, point: int | None) -> Engine:
        """The engine of a mode, and if exits decide, of a calibrated point (by its number). Raises `BadInput`."""
        mode = (self.usual.mode if point is None else "early") if mode is None else mode
        if mode not in self.modes:
            raise BadInput(f"There is no mode '{mode}' here.", f"Choose from {', '.join(self.modes)}.")
        if point is not None and mode != "early":
            raise BadInput(f"The mode '{mode}' has no calibrated points.", "Leave the point or the mode out.")
        if point is not None and not self.points:
            raise BadInput("There are no calibrated points here.", "Leave the point out.")
        if point is not None and not 0 <= point < len(self.points):
            raise BadInput(f"There is no point {point} here.", f"There are {len(self.points)}, from 0.")
        key = mode, point if mode == "early" else None
        if key not in self._made:
            policy = None if key[1] is None else self.points[key[1]].policy
            self._made[key] = Engine(self.backbone, self.exits, policy, mode=mode)
        return self._made[key]

    def guarantee(self, engine: Engine, **used: Any) -> dict[str, Any] | None:
        """The guarantee for an engine's answers that are `used` in this way (see `exits.calibrated.differences`).

        It is a loss, a risk and a delta; or None where the engine's policy passed no test, or another use was tested.
        """
        passed = any(point.passed and point.policy == engine.policy for point in self.points)
        if not passed or self.exits.early is None or engine.fill.verifies:
            return None
        tested = self.exits.early.calibration
        if differences(tested, {"fill": engine.fill.name, "weights": self.backbone.weight_format, **used}):
            return None
        return {name: tested.get(name) for name in ("loss", "risk", "delta")}

    def describe(self) -> dict[str, Any]:
        """The menu for the page. `tested` is the use under which points passed: elsewhere they guarantee nothing.

        A promise names the calibration's own risk where a point passed.
        """
        tested = self.exits.early.calibration if self.points and self.exits.early else {}
        same = not differences(tested, {"weights": self.backbone.weight_format})
        promised = tested if same and any(point.passed for point in self.points) else {}
        return {
            "blocks": self.backbone.n_blocks,
            "modes": [asdict(mode) | {"promise": mode.promised(promised)} for mode in map(MODES.__getitem__, self.modes)],
            "usual": self.usual.mode,
            "points": [
                {"loss": point.loss, "flops_saved": point.flops_saved, "passed": point.passed and same}
                for point in self.points
            ],
            "tested": {name: tested.get(name) for name in ("max_tokens",)},
        }
