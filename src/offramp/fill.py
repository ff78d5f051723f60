"""What happens to the states of the blocks that a token skipped.

| fill | what the skipped blocks remember | cost |
|------|----------------------------------|------|
| `project` | keys and values of the exit's hidden state, by the block's own projections | 4 to 6% of a block |
| `copy` | the keys and values of the last block that was computed | none |

Both are approximate: later tokens see what the skipped blocks would have remembered only roughly. A new fill is a new
class in `FILLS`.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from offramp.backbone import Backbone, Step
from offramp.errors import BadInput
from offramp.flops import Costs
from offramp.lean import LeanStep
from offramp.state import State


class Fill(Protocol):
    """Called once for a token that left after `block` blocks, with its hidden state h (B, 1, D) there."""

    def __init__(self, backbone: Backbone) -> None: ...

    def __call__(self, h: Tensor, block: int, state: State, step: Step | LeanStep) -> None: ...

    def flops(self, block: int, costs: Costs) -> int:
        """FLOPs for one token that left after `block` blocks."""
        ...


class Project:
    """Each skipped block's own keys and values of the exit's hidden state (arXiv 2207.07061, section 3.2)."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone

    def __call__(self, h: Tensor, block: int, state: State, step: Step | LeanStep) -> None:
        self._backbone.project(h, block, self._backbone.n_blocks, state, step)

    def flops(self, block: int, costs: Costs) -> int:
        return (costs.n_blocks - block) * costs.fill_project


class Copy:
    """The last computed block's keys and values, copied to each skipped block (DYNAMAX, arXiv 2504.20922)."""

    def __init__(self, backbone: Backbone) -> None:
        shapes = {backbone.kv_shape(index) for index in range(backbone.n_blocks)}
        if len(shapes) > 1:
            raise BadInput(
                f"The fill 'copy' needs the same key and value shape in every block; {backbone.name} has "
                f"{', '.join(f'{heads} heads of {dim}' for heads, dim in sorted(shapes))}.",
                "Use --fill project.",
            )

    def __call__(self, h: Tensor, block: int, state: State, step: Step | LeanStep) -> None:
        source = state.blocks[block - 1]
        keys, values = source.keys[:, :, -h.shape[1] :], source.values[:, :, -h.shape[1] :]
        for skipped in range(block, len(state.blocks)):
            state.update(keys, values, skipped)

    def flops(self, block: int, costs: Costs) -> int:
        return 0


FILLS: dict[str, type[Fill]] = {"project": Project, "copy": Copy}


def make_fill(name: str, backbone: Backbone) -> Fill:
    """The fill of this name for this backbone. Raises `BadInput` where there is none, or where it cannot work."""
    if name not in FILLS:
        raise BadInput(f"There is no fill '{name}'.", f"Choose from {', '.join(FILLS)}.")
    return FILLS[name](backbone)
