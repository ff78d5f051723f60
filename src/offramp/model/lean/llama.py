"""Attention and the MLP of blocks of the llama kind: what the library's blocks compute, with fewer operations.

Queries, keys and values are one product, gate and up another. Keys and values are written in place. The residual stream is
float32 in every format and is added to in place. Rotary tables are made once. Dims that the rotary embedding turns together
stand side by side here (the rows of the projections are reordered once), so that turning is one multiplication of complex
numbers.

What differs between families is read off the modules: biases, norms of queries and keys (over each head, or over the whole
row), norms before (llama) or after (olmo2) attention and MLP, blocks without rotary positions.

Shapes: B batch, T tokens of this call, D hidden size, Q query heads, H key/value heads, P head dim, R = B · T rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.model.lean.base import LeanStep, Maker, RMSNorm, pieces_of
from offramp.model.lean.structures import CBlock, CWeight, address
from offramp.model.lean.weights import Weight
from offramp.model.runtime import joined
from offramp.model.state import KV

MOST_HEADS = 1 << 16  # of one block: crew.h counts the pieces of a phase in 24 bits, and a call has 256 rows
ROPE_TYPES = {"default", "linear", "llama3", "yarn"}  # rotary kinds whose angles do not depend on the text's length


@dataclass
class RotaryStep(LeanStep):
    """The position of each row, `positions` (R,), and its rotary pairs, `turn` (R, P).

    `first` is the position of the first token; None where each sequence has its own first position (a ragged batch). `end`
    is one more than the highest position.
    """

    first: int | None
    end: int
    positions: Tensor
    turn: Tensor
    masks: dict[tuple[int | None, int], Tensor | None] = field(default_factory=dict)

    @property
    def places(self) -> int | Tensor:
        """The positions that the tokens' keys and values are written at, as `KV.write` takes them."""
        return self.positions.view(self.batch, self.tokens) if self.first is None else self.first

    def mask(self, window: int | None, group: int) -> Tensor | None:
        """The mask (B, 1, T · group, end), added to the scores of each token's `group` queries; None if all is seen."""
        key = window, group
        if key not in self.masks:
            behind = self.positions[:, None] - torch.arange(self.end, device=self.turn.device)  # (R, end)
            hidden = behind < 0 if window is None else (behind < 0) | (behind >= window)
            mask = torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, float("-inf"))
            mask = mask.repeat_interleave(group, dim=0).view(self.batch, 1, self.tokens * group, self.end)
            self.masks[key] = mask if hidden.any() else None
        return self.masks[key]


Memories = Sequence[tuple[KV, RotaryStep]]


class LeanAttention:
    """A block's attention, with its norm. A token sees `window` tokens, itself included; None means all of them."""

    def __init__(
        self, attention: Any, norm: Any, norm_first: bool, rotary_dim: int, window: int | None, make: Maker
    ) -> None:
        self.window, self.dim, self.scale = window, attention.head_dim, float(attention.scaling)
        self.queries = attention.o_proj.in_features // self.dim
        self.heads = self.queries // attention.num_key_value_groups
        self.rotary = bool(getattr(attention, "use_rope", True))
        # Rotary dim i turns with dim i + rotary_dim / 2.
        pairs = torch.arange(rotary_dim).view(2, -1).T.flatten()
        order = torch.cat([pairs, torch.arange(rotary_dim, self.dim)])

        def per_head(heads: int) -> Tensor:
            rows: Tensor = torch.arange(heads)[:, None] * self.dim + order
            return rows.flatten()

        fused = hasattr(attention, "qkv_proj")
        qkv = [attention.qkv_proj] if fused else [attention.q_proj, attention.k_proj, attention.v_proj]
        turned = per_head(self.queries + self.heads)
        rows = torch.cat([turned, torch.arange(len(turned), (self.queries + 2 * self.heads) * self.dim)])
        self.qkv = make.matrix("qkv", qkv, rows)
        self.o = make.matrix("o", [attention.o_proj])
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if getattr(attention, "q_norm", None) is not None:
            self.norm_heads = attention.q_norm.weight.numel() == self.dim
            orders = (order, order) if self.norm_heads else (per_head(self.queries), per_head(self.heads))
            self.q_norm = make.norm("q_norm", attention.q_norm, orders[0])
            self.k_norm = make.norm("k_norm", attention.k_norm, orders[1])
        self.norm, self.norm_first = make.norm("attention_norm", norm), norm_first

    @property
    def weights(self) -> tuple[Weight, ...]:
        """The matrices that a token is multiplied with."""
        return self.qkv, self.o

    @property
    def sizes(self) -> tuple[int, ...]:
        """Query heads, key/value heads, and their dim: what the compiled code takes to be the same in all blocks."""
        return self.queries, self.heads, self.dim

    def fits(self, width: int) -> bool:
        """Whether the compiled code can run it in a model of this hidden size: it takes for granted what is asked here."""
        inner, each = self.queries * self.dim, self.dim if self.q_norm and self.norm_heads else 0
        norms = ((self.q_norm, self.queries), (self.k_norm, self.heads))
        return (
            0 < self.heads < MOST_HEADS
            and self.queries > 0
            and self.queries % self.heads == 0
            and self.dim > 0
            and self.dim % 8 == 0
            and (self.window is None or self.window > 0)
            and self.qkv.shape == (inner + 2 * self.heads * self.dim, width)
            and self.o.shape == (width, inner)
            and len(self.norm.weight) == width
            and all(norm is None or len(norm.weight) == (each or heads * self.dim) for norm, heads in norms)
        )

    @cached_property
    def kv(self) -> Weight:
        """The projections to keys and values only."""
        return self.qkv.pick(slice(self.queries * self.dim, None))

    def __call__(self, h: Tensor, memories: Memories) -> None:
        """Add the attention's output to h (R, D) in place, and remember the tokens.

        Each of the memories is for as many rows as its step has, in order. Only attention treats them one by one.
        """
        attended = []
        for heads, (kv, step) in self._of_each(self.qkv(self.norm(h) if self.norm_first else h), memories):
            buffer = kv.write(heads[:, :, self.queries :], step.places, step.end)
            attended.append(self._attend(heads[:, :, : self.queries], buffer, step))
        out = self.o(joined(attended))
        h += out if self.norm_first else self.norm(out)

    def remember(self, h: Tensor, memories: Memories) -> None:
        """Store only what each of the memories would keep if h (R, D) were the block's input."""
        for heads, (kv, step) in self._of_each(self.kv(self.norm(h) if self.norm_first else h), memories):
            kv.write(heads, step.places, step.end)

    def _of_each(self, x: Tensor, memories: Memories) -> Iterator[tuple[Tensor, tuple[KV, RotaryStep]]]:
        """What `_heads` makes of the rows x of each memory, with the memory."""
        sizes = [len(step.positions) for _, step in memories]
        for rows, memory in zip(pieces_of(x, sizes), memories, strict=True):
            yield self._heads(rows, memory[1]), memory

    def _heads(self, x: Tensor, step: RotaryStep) -> Tensor:
        """Norm and turn x (R, heads · P), the queries, keys and values, or only the keys and values: (B, T, heads, P)."""
        heads = x.view(len(x), -1, self.dim)
        q, k, v = heads.split([heads.shape[1] - 2 * self.heads, self.heads, self.heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q = self._normed(self.q_norm, q) if q.numel() else q
            k = self._normed(self.k_norm, k)
            heads = torch.cat([q, k, v], dim=1)
        if self.rotary:
            turning = torch.view_as_complex(heads[:, : -self.heads].unflatten(2, (-1, 2)))
            turned = torch.view_as_real(turning * torch.view_as_complex(step.turn.view(len(x), 1, -1, 2))).flatten(2)
            heads = torch.cat([turned, v], dim=1)
        return heads.view(step.batch, step.tokens, -1, self.dim)

    def _normed(self, norm: RMSNorm, x: Tensor) -> Tensor:
        return norm(x) if self.norm_heads else norm(x.flatten(1)).view_as(x)

    def _attend(self, q: Tensor, buffer: Tensor, step: RotaryStep) -> Tensor:
        """Queries (B, T, Q, P) over the remembered keys and values → (R, Q · P)."""
        keys, values = buffer[:, : step.end].transpose(1, 2).chunk(2, dim=1)
        group = self.queries // self.heads
        if step.tokens == step.end and step.first == 0 and (self.window is None or step.end <= self.window):
            out = F.scaled_dot_product_attention(
                q.transpose(1, 2), keys, values, is_causal=True, scale=self.scale, enable_gqa=group > 1
            )
            return out.transpose(1, 2).flatten(2).flatten(0, 1)
        # The queries that share a key/value head are rows of one product with it.
        q = q.unflatten(2, (self.heads, group)).transpose(1, 2).flatten(2, 3)
        mask = None if self._newest_only(step) else step.mask(self.window, group)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=self.scale)
        return out.reshape(*out.shape[:2], step.tokens, -1).transpose(1, 2).reshape(len(step.positions), -1)

    def _newest_only(self, step: RotaryStep) -> bool:
        """Whether this is one token that sees everything. Then no mask need be made to find that none is needed."""
        return step.tokens == 1 and step.first is not None and (self.window is None or step.end <= self.window)


class LeanMLP:
    """A block's gated MLP, with its norm before it (`norm_first`) or after it."""

    def __init__(self, mlp: Any, norm: Any, norm_first: bool, make: Maker) -> None:
        gate_up = [mlp.gate_up_proj] if hasattr(mlp, "gate_up_proj") else [mlp.gate_proj, mlp.up_proj]
        self.gate_up, self.down = make.matrix("gate_up", gate_up), make.matrix("down", [mlp.down_proj])
        self.norm, self.norm_first = make.norm("mlp_norm", norm), norm_first

    @property
    def weights(self) -> tuple[Weight, ...]:
        """The matrices that a token is multiplied with."""
        return self.gate_up, self.down

    @property
    def sizes(self) -> tuple[int, ...]:
        """The inner width, as `LeanAttention.sizes`."""
        return (self.down.columns,)

    def fits(self, width: int) -> bool:
        """As `LeanAttention.fits`."""
        inner = self.down.columns
        shapes = self.gate_up.shape, self.down.shape
        return inner > 0 and shapes == ((2 * inner, width), (width, inner)) and len(self.norm.weight) == width

    def __call__(self, h: Tensor) -> None:
        """Add the MLP's output to h (R, D) in place."""
        gate, up = self.gate_up(self.norm(h) if self.norm_first else h).chunk(2, dim=-1)
        out = self.down(F.silu(gate) * up)
        h += out if self.norm_first else self.norm(out)


def native_block(attention: LeanAttention | None, mlp: LeanMLP) -> CBlock:
    """A block as the C code takes it. The C code holds addresses only, so the parts must stay alive."""
    block = CBlock(eps=mlp.norm.eps, norm_first=mlp.norm_first, mlp_norm=address(mlp.norm.weight))
    block.gate_up, block.down = map(CWeight.of, mlp.weights)
    if attention is not None:
        block.qkv, block.o = CWeight.of(attention.qkv, fine=True), CWeight.of(attention.o)
        block.window, block.rotary, block.scale = attention.window or 0, attention.rotary, attention.scale
        block.attention_norm = address(attention.norm.weight)
        if attention.q_norm and attention.k_norm:
            block.q_norm, block.k_norm = address(attention.q_norm.weight), address(attention.k_norm.weight)
            block.norm_heads, block.attention_eps = attention.norm_heads, attention.q_norm.eps
    return block


class RotaryTables:
    """Positions, and the rotary pairs of each: cos and sin side by side, 1 and 0 for dims that do not turn.

    Raises `ValueError` for rotary positions that change with the text's length.
    """

    def __init__(self, rotary: nn.Module, dim: int, device: torch.device) -> None:
        kind = getattr(rotary, "rope_type", "default")
        if kind not in ROPE_TYPES:
            raise ValueError(f"rotary positions of the kind '{kind}' change with the text's length")
        self._rotary, self._dim, self._device = rotary, dim, device
        self.turn = torch.empty(0, dim, dtype=torch.float32)
        self._count = torch.empty(0, dtype=torch.int64)

    def reach(self, length: int) -> None:
        """Make the tables at least this long."""
        if length <= len(self.turn):
            return
        length = max(256, 2 * length)
        self._count = torch.arange(length, device=self._device)
        self._zeros = torch.zeros_like(self._count)
        like = torch.empty(0, dtype=torch.float32, device=self._device)
        cos, sin = self._rotary(like, self._count[None])
        pairs = torch.stack([cos[0], sin[0]], dim=-1)[:, : cos.shape[-1] // 2]
        rest = torch.tensor([1.0, 0.0], dtype=torch.float32, device=self._device).expand(
            length, self._dim // 2 - pairs.shape[1], 2
        )
        self.turn = torch.cat([pairs, rest], dim=1).flatten(1)

    def step(self, first: int | Tensor, batch: int, tokens: int, real: Tensor | None) -> RotaryStep:
        """The step of `batch` sequences with `tokens` tokens each, from position `first` on; `first` (B,) may differ."""
        start: int | None
        if isinstance(first, int):
            end = first + tokens
            self.reach(max(end, batch))
            positions, turn = self._count[first:end], self.turn[first:end]
            if batch > 1:
                positions, turn = positions.repeat(batch), turn.repeat(batch, 1)
            start = first
        else:
            end = int(first.max()) + tokens
            self.reach(max(end, batch))
            positions = (first[:, None] + self._count[:tokens]).flatten()
            turn, start = self.turn[positions], None
        sequences = self._zeros[:tokens] if batch == 1 else self._count[:batch].repeat_interleave(tokens)
        return RotaryStep(batch, tokens, sequences, real, start, end, positions, turn)
