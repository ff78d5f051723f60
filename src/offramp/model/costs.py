"""Analytic FLOPs and bytes: what one decoded token costs in each part of a model. A multiply-add counts as 2 FLOPs.

| part | FLOPs for one token with a context of L tokens, itself included | source |
|------|------------------------------------------------------------------|--------|
| linear layers of a block | 2 · (entries of their weight matrices) | Kaplan et al., arXiv 2001.08361, table 1 |
| attention of a block | 2 · L · heads · head dim, for the scores and again for the values | ibid. |
| experts of a block | 2 · (entries of the experts that a token is sent to) | |
| convolution, scan of a Mamba block | 2 · W · channels + 6 · (entries of its state): decay, input, read-out | 2405.21060 |
| LM head | 2 · V · D | Kaplan et al., table 1 |
| `project` fill of a block | 2 · (entries of its K and V projections) | CALM, arXiv 2207.07061, section 3.2 |
| `project` fill of a Mamba block | 2 · (entries of what feeds convolution and scan), plus both | DYNAMAX, 2504.20922 |
| `copy`, `freeze` | 0, or as `project` in attention blocks that have nothing to copy | |
| gate, read-out adapter | 2 · (entries of their weight matrices), and `MambaBlock.scan_flops` | arXiv 2405.21060 |

Norms, activations, rotary tables and residuals are left out: they are below 1% of a block's products. A block with a
sliding window sees at most the window. Bytes are the weights that one token reads, in the format they are kept in, and the
block's keys and values, or twice its Mamba state, which is read and written.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from offramp.model.backbone import Backbone
from offramp.model.library_blocks import active_experts
from offramp.model.mamba import convolution_of, state_shape, width_of

ROOM = 4 << 30  # bytes for the memories of all sequences that are decoded side by side


def matrix_flops(module: nn.Module, active: float = 1.0) -> int:
    """FLOPs of one token through all weight matrices in `module`: 2 · entries, times `active` for stacked experts."""
    entries = 0
    for name, parameter in module.named_parameters():
        if parameter.ndim == 2 and not name.endswith("A_log"):  # Mamba-1's decay rates are no matrix product
            entries += parameter.numel()
        elif parameter.ndim == 3 and "conv" not in name:
            entries += round(active * parameter.numel())
    return 2 * entries


class Costs:
    """FLOPs and bytes of a backbone's parts, for one token.

    These are FLOPs: `block(i, context)`, `blocks(start, stop, context)`, `full(context)`, `head`, and the two parts of the
    `project` fill in block i, `project_keys[i]` and `project_state[i]`. These are bytes: `block_bytes(i, context)`,
    `head_bytes`, and `memory(tokens)` of a whole sequence.
    """

    def __init__(self, backbone: Backbone) -> None:
        config = backbone.config
        self.n_blocks = backbone.n_blocks
        active = active_experts(config)
        self._linear = [matrix_flops(block, active) for block in backbone.blocks]
        self._windows = [backbone.window(index) for index in range(self.n_blocks)]
        self._itemsize = backbone.runtime.kept_dtype.itemsize
        attends = [kind in ("attention", "both") for kind in backbone.kinds]
        shapes = [backbone.kv_shape(index) if attention else (0, 0) for index, attention in enumerate(attends)]
        self._queries = [config.num_attention_heads * dim if dim else 0 for _, dim in shapes]
        self._kept = [2 * heads * dim for heads, dim in shapes]
        self.project_keys: list[int] = [backbone.hidden_size * backbone.family.projected * kept for kept in self._kept]
        mixers = [backbone.mixer(index) for index in range(self.n_blocks)]
        self._scan = [0 if mixer is None else scan_flops(mixer) for mixer in mixers]
        self._states = [0 if mixer is None else state_size(mixer) for mixer in mixers]
        self.project_state: list[int] = [0 if mixer is None else projected(mixer) + scan_flops(mixer) for mixer in mixers]
        self.head = 2 * backbone.vocab_size * backbone.hidden_size
        self._hidden, self._vocabulary = backbone.hidden_size, backbone.vocab_size
        self._weight_bytes = [backbone.runtime.block_bytes(index) for index in range(self.n_blocks)]
        self.head_bytes = backbone.runtime.head_bytes()
        self._known: dict[tuple[int, int, int], int] = {}

    def _seen(self, index: int, context: int) -> int:
        window = self._windows[index]
        return context if window is None else min(context, window)

    def block(self, index: int, context: int) -> int:
        """FLOPs of block `index` for one token that sees `context` tokens, itself included."""
        return self._linear[index] + self._scan[index] + 4 * self._seen(index, context) * self._queries[index]

    def of_block(self, index: int) -> tuple[int, int, int, int]:
        """FLOPs of block `index`: for a token, for each position that it sees, and for keys and state of `project`."""
        fixed = self._linear[index] + self._scan[index]
        return fixed, 4 * self._queries[index], self.project_keys[index], self.project_state[index]

    def block_bytes(self, index: int, context: int) -> int:
        """Bytes that block `index` moves for one token: its weights, the keys and values it sees, its Mamba state twice."""
        kept = self._seen(index, context) * self._kept[index] * self._itemsize
        return self._weight_bytes[index] + kept + 2 * 4 * self._states[index]

    def blocks(self, start: int, stop: int, context: int) -> int:
        """FLOPs of blocks `start` to `stop` - 1 for one token that sees `context` tokens, itself included."""
        key = start, stop, context
        if key not in self._known:  # computed once, since every token of every sequence needs it
            self._known[key] = sum(self.block(index, context) for index in range(start, stop))
        return self._known[key]

    def projected(self, blocks: range) -> int:
        """FLOPs of the `project` fill in these blocks, for one token."""
        return sum(self.project_keys[index] + self.project_state[index] for index in blocks)

    def projected_bytes(self, index: int) -> int:
        """Bytes of weights that the `project` fill reads in block `index`, for one token."""
        share = (self.project_keys[index] + self.project_state[index]) / max(1, self._linear[index])
        return round(share * self._weight_bytes[index])

    def sketched(self, dims: int, candidates: int) -> int:
        """FLOPs of a head that reads out `candidates` tokens, which a sketch of `dims` dims has chosen."""
        return 2 * (self._hidden * dims + self._vocabulary * dims + candidates * self._hidden)

    def full(self, context: int) -> int:
        """FLOPs of one token at full depth, LM head included."""
        return self.blocks(0, self.n_blocks, context) + self.head

    def memory(self, tokens: int) -> int:
        """Bytes that a sequence of `tokens` tokens takes in the memory of all blocks: keys, values and Mamba states."""
        return tokens * self._itemsize * sum(self._kept) + 4 * sum(self._states)

    def at_once(self, tokens: int, most: int) -> int:
        """How many sequences of so many tokens to decode side by side: `most`, or fewer where `ROOM` holds no more."""
        return max(1, min(most, ROOM // max(1, self.memory(tokens))))


def state_size(mixer: Any) -> int:
    """Entries of a mixer's state."""
    return math.prod(state_shape(mixer))


def scan_flops(mixer: Any) -> int:
    """FLOPs of one token through a Mamba mixer's convolution and scan."""
    return int(2 * convolution_of(mixer).weight.numel() + 6 * state_size(mixer))


def projected(mixer: Any) -> int:
    """FLOPs of one token through the projections that feed a Mamba mixer's convolution and state (`mamba.remember`)."""
    rows = mixer.in_proj.out_features - width_of(mixer)  # all rows but the gate's
    inner = sum(
        matrix_flops(part) for part in (getattr(mixer, name, None) for name in ("x_proj", "dt_proj")) if part is not None
    )
    return int(2 * rows * mixer.in_proj.in_features + inner)
