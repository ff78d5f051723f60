"""Fills: what skipped blocks remember of a token that left early.

| fill | attention blocks remember | Mamba blocks remember | cost |
|------|---------------------------|-----------------------|------|
| `project` | keys and values of the exit's hidden state | their state, moved on by it | 5% of attention, half of Mamba |
| `copy` | keys and values of the last computed attention block | their state as it was | none |
| `freeze` | as `project` | their state as it was | as `project` in attention blocks |
| `defer` | their own, exact, later | their own, exact, later | the skipped blocks, run later in one chunk |

`project` runs each skipped block's own projections, convolution and scan, but no attention, gate path, output or MLP. It is
CALM's state propagation for attention (arXiv 2207.07061, section 3.2) and DYNAMAX's partial forward for Mamba (arXiv
2504.20922). `copy` and `freeze` are DYNAMAX's two ways without computation. These three are approximate: later tokens see
only roughly what the skipped blocks would have remembered. A block with both parts (attention and Mamba) fills both.

`defer` waits. The token is queued at its exit. The next token that passes this exit runs in one chunk with the whole queue,
so the weights are read once for all of them. In the end every block sees every token, so its state is exact. `verify` is
the mode `exact`: full depth decides each token. It runs in compiled code alone (core/drafts.c).

A new fill is one class and one row in `FILLS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from offramp.decode.sequence import OpenExit
from offramp.errors import BadInput
from offramp.exits.exits import Exit
from offramp.model.backbone import Backbone
from offramp.model.costs import Costs
from offramp.model.runtime import BlockInput


class Fill(ABC):
    """What the skipped blocks remember of a token that left early.

    `waits`: tokens that left are queued, and their skipped blocks are run later. `verifies`: a token that an exit chose
    is a draft, and full depth decides. Raises `BadInput` for a backbone that the fill cannot serve.
    """

    name: ClassVar[str]
    waits: ClassVar[bool] = False
    verifies: ClassVar[bool] = False

    def __init__(self, backbone: Backbone, longest_tail: int = 0) -> None:
        """`longest_tail` is that of the open exits."""
        self.backbone, self.first_tail = backbone, backbone.n_blocks - longest_tail

    def skipped(self, exit: Exit | OpenExit) -> range:
        """The blocks that a token skips when it leaves at `exit`: those between the exit and its tail."""
        return range(exit.block, self.backbone.n_blocks - exit.tail)

    @abstractmethod
    def leave(self, exit: OpenExit, part: BlockInput) -> None:
        """Fill the skipped blocks for a token that has left at `exit`.

        `part`: hidden states h (1, n, D) at the exit; the blocks' state; what the blocks share. The last of the hidden
        states is the token's; the others are of tokens that waited.
        """

    def flops(self, exit: Exit, costs: Costs) -> int:
        """FLOPs of `leave` for one token."""
        return 0


class Project(Fill):
    """Keys, values and state of each skipped block, from the exit's hidden state (arXiv 2207.07061, section 3.2)."""

    name = "project"

    def leave(self, exit: OpenExit, part: BlockInput) -> None:
        h, state, step = part
        skipped = self.skipped(exit)
        self.backbone.project(h, skipped.start, skipped.stop, state, step)

    def flops(self, exit: Exit, costs: Costs) -> int:
        return costs.projected(self.skipped(exit))


class Freeze(Fill):
    """Mamba states stay as they were. Attention needs keys and values at every position, so it gets `Project`'s."""

    name = "freeze"

    def __init__(self, backbone: Backbone, longest_tail: int = 0) -> None:
        super().__init__(backbone, longest_tail)
        if "mamba" not in backbone.kinds and "both" not in backbone.kinds:
            raise BadInput(f"{backbone.name} has no Mamba blocks for the fill 'freeze'.", "Use project or copy.")

    def leave(self, exit: OpenExit, part: BlockInput) -> None:
        h, state, step = part
        for skipped in self.skipped(exit):
            self.backbone.project_keys(h, skipped, state, step)

    def flops(self, exit: Exit, costs: Costs) -> int:
        return sum(costs.project_keys[index] for index in self.skipped(exit))


class Copy(Fill):
    """The last computed attention block's keys and values, copied to each skipped one. Mamba states stay as they were."""

    name = "copy"

    def __init__(self, backbone: Backbone, longest_tail: int = 0) -> None:
        super().__init__(backbone, longest_tail)
        self._attention = [index for index, kind in enumerate(backbone.kinds) if kind in ("attention", "both")]
        shapes = {backbone.kv_shape(index) for index in self._attention}
        if len(shapes) > 1:
            raise BadInput(
                f"The fill 'copy' needs the same key and value shape in every block; {backbone.name} has "
                f"{', '.join(f'{heads} heads of {dim}' for heads, dim in sorted(shapes))}.",
                "Use the fill project.",
            )

    def leave(self, exit: OpenExit, part: BlockInput) -> None:
        h, state, step = part
        skipped = [index for index in self._attention if index in self.skipped(exit)]
        computed = [index for index in self._attention if index < exit.block]
        if not computed:  # the exit is below a hybrid's first attention block, so there is nothing to copy
            for index in skipped:
                self.backbone.project_keys(h, index, state, step)
            return
        for index in skipped:
            state.copy_keys(computed[-1], index, h.shape[1])

    def flops(self, exit: Exit, costs: Costs) -> int:
        has_source = any(index < exit.block for index in self._attention)
        return 0 if has_source else sum(costs.project_keys[index] for index in self.skipped(exit))


class Defer(Fill):
    """The token waits at its exit; its skipped blocks run later, together with the next token that passes the exit.

    Until then, every block of the longest tail needs some memory of the token, since the next token may run that tail. The
    token's own tail computes it; blocks below get what `Project` stores. The later run replaces both by exact states.
    """

    name = "defer"
    waits = True

    def leave(self, exit: OpenExit, part: BlockInput) -> None:
        h, state, step = part
        exit.pending.append(h)
        skipped = self._stood_in(exit)
        if skipped:
            newest = h[:, -1:]
            step = step if step.tokens == 1 else self.backbone.step(newest, step.first + step.tokens - 1)
            self.backbone.project(newest, skipped.start, skipped.stop, state, step)

    def flops(self, exit: Exit, costs: Costs) -> int:
        return costs.projected(self._stood_in(exit))

    def _stood_in(self, exit: Exit | OpenExit) -> range:
        """The blocks of the longest tail that the exit's own tail lacks."""
        skipped = self.skipped(exit)
        return range(max(skipped.start, self.first_tail), skipped.stop)


class Verify(Defer):
    """Drafts, which full depth decides about: the first one that differs is rejected, with all after it. In C alone."""

    name = "verify"
    verifies = True


FILLS: dict[str, type[Fill]] = {fill.name: fill for fill in (Project, Copy, Freeze, Defer, Verify)}


def fill_named(name: str) -> type[Fill]:
    """The class of the fill with this name. Raises `BadInput` for an unknown name."""
    if name not in FILLS:
        raise BadInput(f"There is no fill '{name}'.", f"Choose from {', '.join(FILLS)}.")
    return FILLS[name]
