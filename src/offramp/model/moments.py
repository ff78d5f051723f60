"""What the linear layers of a model get, block by block, while the library's model reads a short text.

Rounding needs it (`compiled.rounding`): M (K, K), the mean of x xᵀ over a layer's inputs x. All of a model's would take
more memory than the model. So a block's inputs are kept only while it is converted, and M is made for one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, partial

import torch
from torch import Tensor, nn

from offramp.model.backbone import Backbone
from offramp.model.compiled.rounding import Inputs, inputs_of
from offramp.model.lending import Lender, lent
from offramp.model.library_blocks import LibraryBlocks
from offramp.model.reading import text_ids

TOKENS = 176  # of a piece of text: more than a reading has, since moments of few tokens fit that text too well
LARGEST = 8192  # columns: of a layer with more, only the mean squares are used, since M would take too long


class Moments:
    """Reads the short text with the library's blocks, whose weights are lent, one block after another."""

    def __init__(self, backbone: Backbone, lender: Lender) -> None:
        self._backbone, self._lender = backbone, lender
        self._runtime = LibraryBlocks(backbone.modules, backbone.family, backbone.config)
        ids = text_ids(backbone, TOKENS)
        self._state = self._runtime.state(ids.shape[1])
        with torch.inference_mode(), lent(backbone, lender), self._runtime.exact():
            self._h, self._step = self._runtime.embed(ids, 0)

    @torch.inference_mode()
    def of_block(self, index: int) -> dict[nn.Module, Callable[[], Inputs]]:
        """What each linear layer of a block gets: found when it is asked for. Blocks are asked for in their order."""
        found: dict[nn.Module, Callable[[], Inputs]] = {}
        newest: list[tuple[Tensor, Callable[[], Inputs]]] = []  # layers that share their input share what is known of it

        def note(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            if not newest or newest[0][0] is not args[0]:
                rows = args[0].flatten(0, -2).float()
                known = rows if rows.shape[1] <= LARGEST else rows.square().mean(0)
                newest[:] = [(args[0], cache(partial(inputs_of, known)))]
            found[layer] = newest[0][1]

        with lent(self._backbone, self._lender), self._runtime.exact(), ExitStack() as hooks:
            for module in self._backbone.blocks[index].modules():
                if isinstance(module, nn.Linear):
                    hooks.callback(module.register_forward_pre_hook(note).remove)
            (self._h,) = self._runtime.run_all([(self._h, self._state, self._step)], index, index + 1)
        return found
