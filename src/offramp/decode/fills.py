"""What happens to the states of the blocks that a token skipped.

| fill | attention blocks remember | Mamba blocks remember | cost |
|------|---------------------------|-----------------------|------|
| `project` | keys and values of the exit's hidden state | their state moved on by it | 5% of attention, half of Mamba |
| `copy` | those of the last attention block that was computed | their state as it was | none |
| `freeze` | as `project` | their state as it was | as `project` in attention blocks |

`project` runs each block's own projections, convolution and scan, but no attention, gate path, output or MLP: it is CALM's
state propagation for attention and DYNAMAX's partial forward for Mamba (arXiv 2504.20922), whose two ways without
computation are `copy` and `freeze`. All are approximate: later tokens see what skipped blocks would have remembered only
roughly. A block that has both parts fills both. A new fill is a new class in `FILLS`.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from offramp.errors import BadInput
from offramp.model.backbone import Backbone, Step
from offramp.model.costs import Costs
from offramp.model.lean.base import LeanStep
from offramp.model.state import State


class Fill(Protocol):
    """Called once for a token that left after `block` blocks, with its hidden state h (B, 1, D) there."""

    def __init__(self, backbone: Backbone) -> None: ...

    def __call__(self, h: Tensor, block: int, state: State, step: Step | LeanStep) -> None: ...

    def flops(self, block: int, costs: Costs) -> int:
        """FLOPs for one token that left after `block` blocks."""
        ...


class Project:
    """Each skipped block's own keys, values and state of the exit's hidden state (arXiv 2207.07061, section 3.2)."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone

    def __call__(self, h: Tensor, block: int, state: State, step: Step | LeanStep) -> None:
        self._backbone.project(h, block, self._backbone.n_blocks, state, step)

    def flops(self, block: int, costs: Costs) -> int:
        return sum(costs.project_keys[block:]) + sum(costs.project_state[block:])


class Freeze:
    """Mamba states as they were; keys and values as in `Project`, since attention needs some for every position."""

    def __init__(self, backbone: Backbone) -> None:
        if "mamba" not in backbone.kinds and "both" not in backbone.kinds:
            raise BadInput(f"{backbone.name} has no Mamba blocks whose state could be frozen.", "Use project or copy.")
        self._backbone = backbone

    def __call__(self, h: Tensor, block: int, state: State, step: Step | LeanStep) -> None:
        for skipped in range(block, self._backbone.n_blocks):
            self._backbone.project_keys(h, skipped, state, step)

    def flops(self, block: int, costs: Costs) -> int:
        return sum(costs.project_keys[block:])


class Copy:
    """The last computed attention block's keys and values, copied to each skipped one; Mamba states as they were."""

    def __init__(self, backbone: Backbone) -> None:
        self._attention = [index for index, kind in enumerate(backbone.kinds) if kind in ("attention", "both")]
        shapes = {backbone.kv_shape(index) for index in self._attention}
        if len(shapes) > 1:
            raise BadInput(
                f"The fill 'copy' needs the same key and value shape in every block; {backbone.name} has "
                f"{', '.join(f'{heads} heads of {dim}' for heads, dim in sorted(shapes))}.",
                "Use --fill project.",
            )
        self._backbone = backbone

    def __call__(self, h: Tensor, block: int, state: State, step: Step | LeanStep) -> None:
        skipped = [index for index in self._attention if index >= block]
        computed = [index for index in self._attention if index < block]
        if not computed:  # a hybrid's exit below its first attention block: nothing to copy
            for index in skipped:
                self._backbone.project_keys(h, index, state, step)
            return
        source = state.kv[computed[-1]]
        assert source is not None
        keys, values = source.keys[:, :, -h.shape[1] :], source.values[:, :, -h.shape[1] :]
        for index in skipped:
            state.update(keys, values, index)

    def flops(self, block: int, costs: Costs) -> int:
        return 0 if any(index < block for index in self._attention) else sum(costs.project_keys[block:])


FILLS: dict[str, type[Fill]] = {"project": Project, "copy": Copy, "freeze": Freeze}
WAITING = ("defer", "verify")  # fill nothing: the engine has the token's deeper blocks computed later


def make_fill(name: str, backbone: Backbone) -> Fill:
    """The fill of this name for this backbone. Raises `BadInput` where there is none, or where it cannot work."""
    if name not in FILLS:
        raise BadInput(f"There is no fill '{name}'.", f"Choose from {', '.join((*FILLS, *WAITING))}.")
    return FILLS[name](backbone)
