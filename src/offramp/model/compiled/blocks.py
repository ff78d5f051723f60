"""Blocks as the compiled code takes them: an attention or a Mamba-2 mixer, and an MLP or none.

Queries, keys and values are one product, gate and up another. Dims that the rotary embedding turns together stand side by
side here: the rows of the projections are reordered once. A mixer writes the convolution's window and the scan's state in
place, so a token costs the same, however long the text before it is.

What differs between families is read off the modules: biases, norms of queries and keys (over each head, or over the whole
row), norms before (llama) or after (olmo2) attention and MLP, blocks without rotary positions.

Shapes: B batch, T tokens, R = B · T rows, P head dim; of mixers, H heads, N state size, W the convolution's width, C its
channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offramp.model.compiled.parts import Maker, RMSNorm
from offramp.model.compiled.structures import CBlock, CMambaBlock, CWeight, address
from offramp.model.compiled.weights import Weight
from offramp.model.runtime import Step

MOST_HEADS = 1 << 16  # of one block: crew.h counts the pieces of a phase in 24 bits, and a call has 256 rows
ROPE_TYPES = {"default", "linear", "llama3", "yarn"}  # rotary kinds whose angles do not depend on the text's length


class Attention:
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


class MLP:
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
        """The inner width, as `Attention.sizes`."""
        return (self.down.columns,)

    def fits(self, width: int) -> bool:
        """As `Attention.fits`."""
        inner = self.down.columns
        shapes = self.gate_up.shape, self.down.shape
        return inner > 0 and shapes == ((2 * inner, width), (width, inner)) and len(self.norm.weight) == width


class Mixer:
    """A Mamba-2 mixer (arXiv 2405.21060, section 7), with the norm before it."""

    def __init__(self, mixer: Any, norm: Any, make: Maker) -> None:
        self.heads, self.dim = mixer.num_heads, mixer.head_dim
        self.groups, self.states = mixer.n_groups, mixer.ssm_state_size
        self.inner, self.channels = mixer.intermediate_size, mixer.conv_dim
        self.limits: tuple[float, float] = mixer.time_step_limit
        self.project_in = make.matrix("in", [mixer.in_proj])
        self.project_out = make.matrix("out", [mixer.out_proj])
        self.norm = make.norm("norm", norm)
        self.gated_norm = make.vector("gated_norm", mixer.norm.weight)
        self.gated_eps = float(mixer.norm.variance_epsilon)
        conv = mixer.conv1d
        self.conv = make.vector("conv", conv.weight, lambda x: x.squeeze(1).T)  # (W, C)
        self.conv_bias = None if conv.bias is None else make.vector("conv_bias", conv.bias)
        self.dt_bias, self.skip = make.vector("dt_bias", mixer.dt_bias), make.vector("skip", mixer.D)
        self.decay = make.vector("decay", mixer.A_log, lambda x: -x.exp())

    @property
    def weights(self) -> tuple[Weight, ...]:
        """The matrices that a token is multiplied with."""
        return self.project_in, self.project_out

    @property
    def sizes(self) -> tuple[int, ...]:
        """Heads, their dim, groups, state size and the convolution's width, as `Attention.sizes`."""
        return self.heads, self.dim, self.groups, self.states, len(self.conv)

    def fits(self, width: int) -> bool:
        """As `Attention.fits`."""
        inner, rest = self.heads * self.dim, 2 * self.groups * self.states
        vectors = [(self.norm.weight, width), (self.gated_norm, inner), (self.conv_bias, inner + rest)]
        vectors += [(vector, self.heads) for vector in (self.dt_bias, self.skip, self.decay)]
        return (
            min(self.sizes) > 0
            and self.heads % self.groups == 0
            and self.states % 8 == 0
            and len(self.conv) > 1
            and (self.inner, self.channels) == (inner, inner + rest)
            and self.project_in.shape == (2 * inner + rest + self.heads, width)
            and self.project_out.shape == (width, inner)
            and self.conv.shape == (len(self.conv), inner + rest)
            and all(vector is None or vector.shape == (size,) for vector, size in vectors)
        )

    def shapes(self, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of a memory: window (B, W - 1, C) and state (B, H, P, N)."""
        return (batch, self.conv.shape[0] - 1, self.channels), (batch, self.heads, self.dim, self.states)

    def native(self) -> CMambaBlock:
        """The mixer as the C code takes it. The C code holds addresses only, so this one must stay alive."""
        parts = (self.norm.weight, self.gated_norm, self.conv, self.conv_bias, self.dt_bias, self.decay, self.skip)
        weights = (CWeight.of(weight, fine=True) for weight in self.weights)
        return CMambaBlock(*weights, *map(address, parts), self.norm.eps, self.gated_eps, *self.limits)


class Block:
    """One block: `mixer` is its attention or its Mamba-2 mixer. The names of norms are those of the library's families."""

    def __init__(self, block: Any, attention: Any, mixer: Any, window: int | None, rotary_dim: int, make: Maker) -> None:
        names = ("input_layernorm", "post_attention_layernorm", "pre_ff_layernorm", "post_feedforward_layernorm")
        norms = [getattr(block, name) for name in names if hasattr(block, name)]
        norm_first = hasattr(block, "input_layernorm")
        self.mixer: Attention | Mixer
        if mixer is not None:
            self.mixer = Mixer(mixer, norms[0] if norms else block.norm, make)
        else:
            self.mixer = Attention(attention, norms[0], norm_first, rotary_dim, window, make)
        mlp = getattr(block, "mlp", None) or getattr(block, "feed_forward", None)
        self.mlp = MLP(mlp, norms[1], norm_first, make) if mlp is not None else None

    @property
    def parts(self) -> list[Attention | Mixer | MLP]:
        """The mixer, and the MLP if there is one."""
        return [self.mixer, self.mlp] if self.mlp else [self.mixer]

    @property
    def weights(self) -> list[Weight]:
        """The matrices that a token is multiplied with."""
        return [weight for part in self.parts for weight in part.weights]


def native_block(attention: Attention | None, mlp: MLP) -> CBlock:
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


@dataclass
class CompiledStep(Step):
    """The sequence of each row, `sequences` (R,), and the position of the first token.

    With attention, the position of each row, `positions` (R,), and its rotary pairs, `turn` (R, P).
    """

    first: int
    sequences: Tensor
    positions: Tensor | None = None
    turn: Tensor | None = None

    @property
    def end(self) -> int:
        """One more than the highest position."""
        return self.first + self.tokens


class RotaryTables:
    """The rotary pairs of each position, `turn` (T, P): cos and sin side by side, 1 and 0 for dims that do not turn.

    Raises `ValueError` for rotary positions that change with the text's length.
    """

    def __init__(self, rotary: nn.Module, dim: int) -> None:
        kind = getattr(rotary, "rope_type", "default")
        if kind not in ROPE_TYPES:
            raise ValueError(f"rotary positions of the kind '{kind}' change with the text's length")
        self._rotary, self._dim = rotary, dim
        self.turn = torch.empty(0, dim, dtype=torch.float32)
        self._count = torch.empty(0, dtype=torch.int64)

    def reach(self, length: int) -> None:
        """Make the tables at least this long."""
        if length <= len(self.turn):
            return
        length = max(256, 2 * length)
        self._count = torch.arange(length)
        cos, sin = self._rotary(torch.empty(0, dtype=torch.float32), self._count[None])
        pairs = torch.stack([cos[0], sin[0]], dim=-1)[:, : cos.shape[-1] // 2]
        rest = torch.tensor([1.0, 0.0], dtype=torch.float32).expand(length, self._dim // 2 - pairs.shape[1], 2)
        self.turn = torch.cat([pairs, rest], dim=1).flatten(1)

    def rows(self, first: int, batch: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Positions (R,) and rotary pairs (R, P) of `batch` sequences with `tokens` tokens each, from `first` on."""
        end = first + tokens
        self.reach(end)
        positions, turn = self._count[first:end], self.turn[first:end]
        return (positions, turn) if batch == 1 else (positions.repeat(batch), turn.repeat(batch, 1))
