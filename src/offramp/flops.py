"""Analytic FLOPs and bytes: what one decoded token costs in each part of a model. A multiply-add counts as 2 FLOPs.

| part | FLOPs for one token with a context of L tokens, itself included | source |
|------|------------------------------------------------------------------|--------|
| linear layers of a block | 2 · (entries of their weight matrices) | Kaplan et al., arXiv 2001.08361, table 1 |
| attention of a block | 2 · L · heads · head dim, for the scores and again for the values | ibid. |
| LM head | 2 · V · D | ibid. |
| `project` fill of a block | 2 · (entries of its K and V projections) | CALM, arXiv 2207.07061, section 3.2 |
| `copy` fill | 0: it moves numbers, it computes none | |
| gate, read-out adapter | 2 · (entries of their weight matrices), and `Mixer.scan_flops` | arXiv 2405.21060 |

Norms, activations, rotary tables and residuals are left out: they are below 1% of a block's products. A block with a
sliding window sees at most the window. Bytes are the weights read for a token, in the format they are kept in, plus its
block's keys and values.
"""

from __future__ import annotations

from torch import nn

from offramp.backbone import Backbone


def linear(module: nn.Module) -> int:
    """FLOPs of one token through every weight matrix in `module`: 2 · entries."""
    return 2 * sum(parameter.numel() for parameter in module.parameters() if parameter.ndim == 2)


def exit_part(module: nn.Module) -> int:
    """FLOPs of one token through a gate or a read-out adapter."""
    from offramp.exits import Mixer

    mixers = [part for part in module.modules() if isinstance(part, Mixer)]
    convs = sum(2 * part.conv_weight.numel() for part in mixers)  # counted by scan_flops, not as a matrix product
    return linear(module) - convs + sum(part.scan_flops() for part in mixers)


class Costs:
    """FLOPs and bytes of a backbone's parts. `block(i, context)`, `fill(i)` and `head` are FLOPs for one token."""

    def __init__(self, backbone: Backbone) -> None:
        config = backbone.config
        self._heads: int = config.num_attention_heads
        self._kv_heads, self._head_dim = backbone.kv_shape(0)
        self._linear = [linear(block) for block in backbone.blocks]
        self._windows = [backbone.window(index) for index in range(backbone.n_blocks)]
        self._itemsize = backbone.dtype.itemsize
        lean = backbone.lean
        self._weight_bytes = [
            sum(weight.nbytes for weight in lean.blocks[index].weights)
            if lean
            else sum(parameter.numel() for parameter in block.parameters()) * self._itemsize
            for index, block in enumerate(backbone.blocks)
        ]
        self.n_blocks = backbone.n_blocks
        self.head = 2 * backbone.vocab_size * backbone.hidden_size
        self.head_bytes = lean.head.nbytes if lean else backbone.vocab_size * backbone.hidden_size * self._itemsize
        self.fill_project: int = 2 * backbone.hidden_size * backbone.family.projected * self._kv_heads * self._head_dim

    def _seen(self, index: int, context: int) -> int:
        window = self._windows[index]
        return context if window is None else min(context, window)

    def block(self, index: int, context: int) -> int:
        """FLOPs of block `index` for one token that sees `context` tokens, itself included."""
        return self._linear[index] + 4 * self._seen(index, context) * self._heads * self._head_dim

    def block_bytes(self, index: int, context: int) -> int:
        """Bytes read by block `index` for one token: its weights and the keys and values it sees."""
        kept = 2 * self._seen(index, context) * self._kv_heads * self._head_dim
        return self._weight_bytes[index] + kept * self._itemsize

    def full(self, context: int) -> int:
        """FLOPs of one token at full depth, LM head included."""
        return sum(self.block(index, context) for index in range(self.n_blocks)) + self.head
