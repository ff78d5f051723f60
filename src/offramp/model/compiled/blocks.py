"""Blocks as the compiled code takes them: attention, a Mamba-2 mixer and an MLP, as far as a block has them.

Queries, keys and values are one product, gate and up another. Dims that the rotary embedding turns together stand side by
side here: the rows of the projections are reordered once. What differs between families is read off the modules: biases,
norms of queries and keys (over each head, or over the whole row), norms before (llama) or after (olmo2) attention and MLP,
blocks without rotary positions. core/offramp.h names the fields of the parts; the library checks that shapes fit.

Shapes: T tokens, P head dim; of mixers, H heads, N state size, W the convolution's width, C its channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from offramp.model.compiled.library import CompiledPart, Fine
from offramp.model.compiled.parts import Maker
from offramp.model.compiled.weights import Weight
from offramp.model.families import Family

ROPE_TYPES = {"default", "linear", "llama3", "yarn"}  # rotary kinds whose angles do not depend on the text's length


def norms_around(name: str, before: Any, after: Any, make: Maker) -> dict[str, Any]:
    """The fields for the norms before and after a part, which may be None, and their eps."""
    made = {"norm": before and make.norm(name, before), "norm_after": after and make.norm(f"{name}_after", after)}
    found = {field: norm for field, norm in made.items() if norm}
    return {**{field: weight for field, (weight, _) in found.items()}, "eps": max(eps for _, eps in found.values())}


def attention_part(
    attention: Any, around: dict[str, Any], rotary_dim: int, window: int | None, make: Maker
) -> CompiledPart:
    """A block's attention, with the norms around it. A token sees `window` tokens, itself included; None means all."""
    dim = attention.head_dim
    queries = attention.o_proj.in_features // dim
    heads = queries // attention.num_key_value_groups
    # Rotary dim i turns with dim i + rotary_dim / 2.
    order = torch.cat([torch.arange(rotary_dim).view(2, -1).T.flatten(), torch.arange(rotary_dim, dim)])

    def per_head(count: int) -> Tensor:
        rows: Tensor = torch.arange(count)[:, None] * dim + order
        return rows.flatten()

    fused = hasattr(attention, "qkv_proj")
    qkv = [attention.qkv_proj] if fused else [attention.q_proj, attention.k_proj, attention.v_proj]
    turned = per_head(queries + heads)
    rows = torch.cat([turned, torch.arange(len(turned), (queries + 2 * heads) * dim)])
    norms: dict[str, Tensor | float] = {}
    if getattr(attention, "q_norm", None) is not None:
        each = attention.q_norm.weight.numel() == dim
        orders = (order, order) if each else (per_head(queries), per_head(heads))
        q_norm, eps = make.norm("q_norm", attention.q_norm, orders[0])
        k_norm, _ = make.norm("k_norm", attention.k_norm, orders[1])
        norms = {"q_norm": q_norm, "k_norm": k_norm, "norm_heads": each, "head_eps": eps}
    matrix = make.matrix("qkv", qkv, rows, careful=qkv[1:])
    return CompiledPart(
        "attention", qkv=Fine(matrix), o=make.product("o", [attention.o_proj]), heads=heads, dim=dim, window=window,
        rotary=bool(getattr(attention, "use_rope", True)), scale=float(attention.scaling), **norms, **around,
    )  # fmt: skip


def mlp_part(mlp: Any, around: dict[str, Any], make: Maker) -> CompiledPart:
    """A block's gated MLP, with the norms around it."""
    gate_up = [mlp.gate_up_proj] if hasattr(mlp, "gate_up_proj") else [mlp.gate_proj, mlp.up_proj]
    return CompiledPart(
        "mlp", gate_up=make.product("gate_up", gate_up), down=make.product("down", [mlp.down_proj]), **around
    )


def mixer_part(mixer: Any, around: dict[str, Any], make: Maker) -> CompiledPart:
    """A Mamba-2 mixer (arXiv 2405.21060, section 7), with the norms around it."""
    low, high = mixer.time_step_limit
    conv = mixer.conv1d
    return CompiledPart(
        "mamba2", in_=Fine(make.matrix("in", [mixer.in_proj])), out=Fine(make.matrix("out", [mixer.out_proj])),
        gated_norm=make.vector("gated_norm", mixer.norm.weight),
        conv=make.vector("conv", conv.weight, lambda x: x.squeeze(1).T),  # (W, C)
        conv_bias=None if conv.bias is None else make.vector("conv_bias", conv.bias),
        dt_bias=make.vector("dt_bias", mixer.dt_bias), decay=make.vector("decay", mixer.A_log, lambda x: -x.exp()),
        skip=make.vector("skip", mixer.D), heads=mixer.num_heads, groups=mixer.n_groups, states=mixer.ssm_state_size,
        gated_eps=float(mixer.norm.variance_epsilon), dt_low=low, dt_high=high, **around,
    )  # fmt: skip


class Block:
    """One block: the parts of its attention, its mixer and its MLP, each of which may be None.

    `shapes`: of keys and values, heads and their dim; of a mixer, the shapes of its window (W - 1, C) and state (H, P, N);
    None for what the block does not have.
    """

    def __init__(
        self, block: Any, attention: Any, mixer: Any, window: int | None, family: Family, rotary_dim: int, make: Maker
    ) -> None:
        before, after, before_mlp, after_mlp = (getattr(block, name) if name else None for name in family.norms)
        self.attention = self.mixer = self.mlp = None
        keys = state = None
        if attention is not None:
            around = norms_around("attention_norm", before, after, make)
            self.attention = attention_part(attention, around, rotary_dim, window, make)
            keys = self.attention.fields["heads"], self.attention.fields["dim"]
        if mixer is not None:
            self.mixer = mixer_part(mixer, norms_around("norm", before, after, make), make)
            window_shape = mixer.conv1d.weight.shape[-1] - 1, mixer.conv_dim
            state = window_shape, (mixer.num_heads, mixer.head_dim, mixer.ssm_state_size)
        mlp = getattr(block, family.mlp, None)
        if mlp is not None:
            self.mlp = mlp_part(mlp, norms_around("mlp_norm", before_mlp, after_mlp, make), make)
        self.shapes = keys, state

    @property
    def parts(self) -> tuple[CompiledPart | None, ...]:
        """The parts in the order in which a model takes them."""
        return self.attention, self.mixer, self.mlp

    @property
    def weights(self) -> list[Weight]:
        """The matrices that a token is multiplied with."""
        return [weight for part in self.parts if part for weight in part.weights]


class RotaryTable:
    """Makes the rotary pairs of each position: cos and sin side by side, 1 and 0 for dims that do not turn.

    Raises `ValueError` for rotary positions that change with the text's length.
    """

    def __init__(self, rotary: nn.Module, dim: int) -> None:
        kind = getattr(rotary, "rope_type", "default")
        if kind not in ROPE_TYPES:
            raise ValueError(f"rotary positions of the kind '{kind}' change with the text's length")
        self._rotary, self._dim = rotary, dim

    def pairs(self, length: int) -> Tensor:
        """The pairs of the first positions, (length, P)."""
        cos, sin = self._rotary(torch.empty(0, dtype=torch.float32), torch.arange(length)[None])
        pairs = torch.stack([cos[0], sin[0]], dim=-1)[:, : cos.shape[-1] // 2]
        rest = torch.tensor([1.0, 0.0], dtype=torch.float32).expand(length, self._dim // 2 - pairs.shape[1], 2)
        return torch.cat([pairs, rest], dim=1).flatten(1)
