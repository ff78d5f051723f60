"""The ways in which a server can answer: the modes, and their points."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from offramp.decode.engine import Engine
from offramp.decode.modes import MODES, parted
from offramp.errors import BadInput
from offramp.exits.calibrated import differences, points_of
from offramp.exits.exit_set import ExitSet
from offramp.model.backbone import Backbone


class Menu:
    """Engines by mode, made when they are first needed. `usual` answers if a request names none.

    `modes`: those that a request can ask for.
    """

    def __init__(self, backbone: Backbone, exits: ExitSet, usual: Engine) -> None:
        self.backbone, self.exits, self.usual = backbone, exits, usual
        self.modes = tuple(dict.fromkeys((*exits.modes(backbone), usual.mode)))
        self.points = points_of(exits.early.calibration) if exits.early and "early" in self.modes else []
        same = [number for number, point in enumerate(self.points, 1) if point.policy == usual.plan.policy]
        self._usual = f"early:{same[0]}" if usual.mode == "early" and same else usual.mode
        self._made = {usual.mode: usual, self._usual: usual}

    def engine(self, mode: str | None) -> Engine:
        """The engine of a mode, perhaps with a point: `early:3`. Raises `BadInput`."""
        if mode is None:
            return self.usual
        if parted(mode)[0] not in self.modes:
            raise BadInput(f"There is no mode '{mode}' here.", f"Choose from {', '.join(self.modes)}.")
        if mode not in self._made:
            self._made[mode] = Engine(self.backbone, self.exits, mode=mode)
        return self._made[mode]

    def guarantee(self, engine: Engine, **used: Any) -> dict[str, Any] | None:
        """The guarantee for an engine's answers that are `used` in this way (see `exits.calibrated.differences`).

        It is a loss, a risk and a delta; or None where the engine's policy passed no test, or another use was tested.
        """
        passed = any(point.passed and point.policy == engine.plan.policy for point in self.points)
        if not passed or self.exits.early is None or engine.plan.fill.verifies:
            return None
        tested = self.exits.early.calibration
        if differences(tested, {"fill": engine.plan.fill.name, "weights": self.backbone.weight_format, **used}):
            return None
        return {name: tested.get(name) for name in ("loss", "risk", "delta")}

    def describe(self) -> dict[str, Any]:
        """The menu for the page. `tested` is the use under which points of `early` passed: elsewhere they guarantee
        nothing.

        A promise names the calibration's own risk where a point passed.
        """
        tested = self.exits.early.calibration if self.points and self.exits.early else {}
        same = not differences(tested, {"weights": self.backbone.weight_format})
        promised = tested if same and any(point.passed for point in self.points) else {}
        return {
            "blocks": self.backbone.n_blocks,
            "modes": [asdict(mode) | {"promise": mode.promised(promised)} for mode in map(MODES.__getitem__, self.modes)],
            "usual": self._usual,
            "points": [
                {"loss": point.loss, "flops_saved": point.flops_saved, "passed": point.passed and same}
                for point in self.points
            ],
            "tested": {name: tested.get(name) for name in ("max_tokens",)},
        }
