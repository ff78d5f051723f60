"""Blocks as the compiled code takes them: attention, a mixer and an MLP, as far as a block has them.

Queries, keys and values are one product, gate and up another. Dims that the rotary embedding turns together stand side by
side here: the rows of the projections are reordered once. What differs between families is in a row of `families`, or read
off the modules: biases, norms of queries and keys (over each head, or over the whole row), activations, blocks without
rotary positions. core/offramp.h names the fields of the parts; the library checks that shapes fit.

Shapes: T tokens, P head dim; of mixers, H heads, N state size, W the convolution's width, C its channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offramp.model.compiled.library import CompiledPart, Fine, constant
from offramp.model.compiled.parts import Maker
from offramp.model.compiled.weights import Weight
from offramp.model.families import Family
from offramp.model.mamba import convolution_of, is_convolution, is_mamba1, state_shape, width_of
from offramp.model.modules import Modules

# Names of an MLP's layers: the first ones, a gate before the other if there are two, and the last one.
MLPS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("input_linear",), "output_linear"),
    (("w1", "w3"), "w2"),
    (("up_proj",), "down_proj"),
)
ACTIVATIONS = {
    "SiLU": "OFFRAMP_SILU",
    "SiLUActivation": "OFFRAMP_SILU",
    "GELUTanh": "OFFRAMP_GELU",
    "ReLUSquaredActivation": "OFFRAMP_SQUARED_RELU",
}
ROPE_TYPES = {"default", "linear", "llama3", "yarn"}  # rotary kinds whose angles do not depend on the text's length


def around(
    name: str, norms: Sequence[Any], make: Maker, before: float = 1.0, after: float = 1.0, factors: Tensor | None = None
) -> dict[str, Any]:
    """The fields for what stands around a part: norms before and after it, which may be None, and multipliers.

    `before` is that of its input, `after` that of what it adds to the hidden state; `factors` are those of the results of
    its first product. Raises `ValueError` for a multiplier of an input that no norm gives.
    """
    first, last = norms
    if first is None and before != 1:
        raise ValueError("a part's input has a multiplier and no norm")
    made = {
        "norm": first and make.norm(name, first, factor=before),
        "norm_after": last and make.norm(f"{name}_after", last),
    }
    found = {field: norm for field, norm in made.items() if norm}
    eps = max(eps for _, eps in found.values())
    return {**{field: weight for field, (weight, _) in found.items()}, "eps": eps, "factor": after, "factors": factors}


def attention_part(
    attention: Any, fields: dict[str, Any], keys: float, rotary: RotaryTable | None, window: int | None, make: Maker
) -> CompiledPart:
    """A block's attention. A token sees `window` tokens, itself included; None means all. `keys`: their multiplier."""
    dim = attention.head_dim
    out = attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj
    queries = out.in_features // dim
    heads = queries // attention.num_key_value_groups
    if not getattr(attention, "use_rope", True):
        rotary = None
    # Rotary dim i turns with dim i + rotary_dim / 2.
    rotary_dim = rotary.turned if rotary else 0
    order = torch.cat([torch.arange(rotary_dim).view(2, -1).T.flatten(), torch.arange(rotary_dim, dim)])

    def per_head(count: int) -> Tensor:
        rows: Tensor = torch.arange(count)[:, None] * dim + order
        return rows.flatten()

    fused = hasattr(attention, "qkv_proj")
    qkv = [attention.qkv_proj] if fused else [attention.q_proj, attention.k_proj, attention.v_proj]
    turned = per_head(queries + heads)
    rows = torch.cat([turned, torch.arange(len(turned), (queries + 2 * heads) * dim)])
    norms: dict[str, Tensor | float] = {}
    own = [getattr(attention, f"{name}_norm", None) or getattr(attention, f"{name}_layernorm", None) for name in "qk"]
    if own[0] is not None:
        each = own[0].weight.numel() == dim
        orders = (order, order) if each else (per_head(queries), per_head(heads))
        q_norm, eps = make.norm("q_norm", own[0], orders[0])
        k_norm, _ = make.norm("k_norm", own[1], orders[1])
        norms = {"q_norm": q_norm, "k_norm": k_norm, "norm_heads": each, "head_eps": eps}
    if keys != 1:
        sizes = torch.tensor([queries, heads, heads]) * dim
        fields = {**fields, "factors": torch.tensor([1.0, keys, 1.0]).repeat_interleave(sizes)}
    matrix = make.matrix("qkv", qkv, rows, careful=qkv[1:])
    return CompiledPart(
        "attention", qkv=Fine(matrix), o=make.product("o", [out]), heads=heads, dim=dim, window=window,
        rotary=rotary.number if rotary else 0, scale=float(attention.scaling),
        cap=getattr(attention, "attn_logit_softcapping", None), **norms, **fields,
    )  # fmt: skip


def mlp_part(mlp: Any, fields: dict[str, Any], gate: float, make: Maker) -> CompiledPart:
    """A block's MLP. `gate`: the multiplier of its gate. Raises `ValueError` for an activation without compiled code."""
    first, last = next(names for names in MLPS if all(hasattr(mlp, name) for name in (*names[0], names[1])))
    layers = [getattr(mlp, name) for name in first]
    width = getattr(mlp, last).in_features
    if gate != 1:
        fields = {**fields, "factors": torch.cat([torch.full((width,), float(gate)), torch.ones(width)])}
    return CompiledPart(
        "mlp", gate_up=make.product("gate_up", layers), down=make.product("down", [getattr(mlp, last)]),
        activation=constant(_activation_of(mlp)), **fields,
    )  # fmt: skip


def _activation_of(module: Any) -> str:
    """The library's name for a module's activation. Without one, it is SiLU, by a function."""
    kind = getattr(module, "act_fn", None) or getattr(module, "activation", None)
    name = "SiLU" if kind is None else type(kind).__name__
    if name not in ACTIVATIONS:
        raise ValueError(f"there is no compiled code for the activation {name}")
    return ACTIVATIONS[name]


def mixer_part(mixer: Any, fields: dict[str, Any], make: Maker) -> CompiledPart:
    """A block's mixer: Mamba-2, Mamba, or a convolution."""
    conv = convolution_of(mixer)
    fields = {
        **fields,
        "conv": make.vector("conv", conv.weight, lambda x: x.squeeze(1).T),  # (W, C)
        "conv_bias": None if conv.bias is None else make.vector("conv_bias", conv.bias),
        "out": Fine(make.matrix("out", [mixer.out_proj])),
    }
    # In compiled code, the rows of the gate come first, and then those that are convolved.
    pieces = torch.arange(mixer.in_proj.out_features).split(width_of(mixer))
    if is_convolution(mixer):
        order = [pieces[1], pieces[2], pieces[0]]
    else:
        order = [*reversed(pieces)] if is_mamba1(mixer) else [*pieces]
    fields["in_"] = Fine(make.matrix("in", [mixer.in_proj], torch.cat(order)))
    if is_convolution(mixer):
        return CompiledPart("convolution", **fields)
    return (_mamba_part if is_mamba1(mixer) else _mamba2_part)(mixer, fields, make)


def _mamba_part(mixer: Any, fields: dict[str, Any], make: Maker) -> CompiledPart:
    """A Mamba mixer (arXiv 2312.00752, section 3.4)."""
    states = mixer.ssm_state_size
    if hasattr(mixer, "dt_layernorm"):  # falcon_mamba's norms have no weights
        rank = mixer.time_step_rank
        norms = {"dt_norm": torch.ones(rank), "b_norm": torch.ones(states), "c_norm": torch.ones(states)}
        fields = {**fields, **norms, "inner_eps": float(mixer.rms_eps)}
    return CompiledPart(
        "mamba", low=Fine(make.matrix("low", [mixer.x_proj])), steps=Fine(make.small("steps", mixer.dt_proj)),
        decay=make.vector("decay", mixer.A_log, lambda x: -x.exp()), skip=make.vector("skip", mixer.D), states=states,
        **fields,
    )  # fmt: skip


def _mamba2_part(mixer: Any, fields: dict[str, Any], make: Maker) -> CompiledPart:
    """A Mamba-2 mixer (arXiv 2405.21060, section 7)."""
    low, high = mixer.time_step_limit
    norm = mixer.norm if getattr(mixer, "mamba_rms_norm", True) else None
    gated: dict[str, Any] = {"gated_eps": 0.0}
    if norm is not None:
        gated = {"gated_norm": make.vector("gated_norm", norm.weight), "gated_eps": float(norm.variance_epsilon)}
    return CompiledPart(
        "mamba2", dt_bias=make.vector("dt_bias", mixer.dt_bias), skip=make.vector("skip", mixer.D),
        decay=make.vector("decay", mixer.A_log, lambda x: -x.exp()), heads=mixer.num_heads, groups=mixer.n_groups,
        states=mixer.ssm_state_size, gate_last=bool(getattr(norm, "norm_before_gate", False)), dt_low=low, dt_high=high,
        **gated, **fields,
    )  # fmt: skip


class Block:
    """One block: the parts of its attention, its mixer and its MLP, each of which may be None.

    `shapes`: of keys and values, heads and their dim; of a mixer, the shapes of its window (W - 1, C) and its state; None
    for what the block does not have. Raises `ValueError` for a block with parts that there is no compiled code for.
    """

    def __init__(
        self, modules: Modules, index: int, family: Family, tables: Mapping[str, RotaryTable], make: Maker
    ) -> None:
        block: Any = modules.blocks[index]
        attention, mixer = modules.attention[index], modules.mixers[index]
        before, after, before_mlp, after_mlp = (getattr(block, name) if name else None for name in family.norms)
        of = family.multipliers(block)
        self.attention = self.mixer = self.mlp = None
        keys = state = None
        if attention is not None:
            fields = around("attention_norm", (before, after), make, of.attention_in, of.attention)
            table = tables.get(modules.layer_types[index] if family.rotary_per_kind else "")
            self.attention = attention_part(attention, fields, of.keys, table, modules.windows[index], make)
            keys = self.attention.fields["heads"], self.attention.fields["dim"]
        if mixer is not None:
            factors = None if of.projected is None else make.rounded(of.projected)
            self.mixer = mixer_part(mixer, around("norm", (before, after), make, of.mixer_in, of.mixer, factors), make)
            channels, _, taps = convolution_of(mixer).weight.shape
            state = (taps - 1, channels), state_shape(mixer)
        mlp = getattr(block, family.mlp, None)
        if getattr(block, "block_sparse_moe", None) is not None or hasattr(mlp, "experts"):
            raise ValueError("there is no compiled code for experts")
        if mlp is not None and mlp is not attention and mlp is not mixer:
            self.mlp = mlp_part(mlp, around("mlp_norm", (before_mlp, after_mlp), make, after=of.mlp), of.gate, make)
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
    """How far the dims of queries and keys turn at each position (RoPE, arXiv 2104.09864).

    `number`: that of the table, from 1 on; `kind`: of the blocks that it is for, if there are several. Pair i of a head's
    `turned` dims turns by the position times frequency i of `frequencies`, and is multiplied by `factor`. Raises
    `ValueError` for rotary positions that change with the text's length.
    """

    def __init__(self, rotary: nn.Module, number: int, kind: str = "") -> None:
        types: Any = getattr(rotary, "rope_type", "default")
        used, prefix = types[kind] if kind else types, f"{kind}_" if kind else ""
        if used not in ROPE_TYPES:
            raise ValueError(f"rotary positions of the kind '{used}' change with the text's length")
        self.number = number
        self.frequencies: Tensor = getattr(rotary, f"{prefix}inv_freq").float().contiguous()
        self.factor = float(getattr(rotary, f"{prefix}attention_scaling", 1.0))
        self.turned = 2 * len(self.frequencies)


def rotary_tables(modules: Modules, family: Family) -> dict[str, RotaryTable]:
    """The rotary tables, by the kind of block that they are for; of all blocks with attention: ""."""
    attends = [attention for attention in modules.attention if attention is not None]
    if modules.rotary is None or not attends:
        return {}
    kinds = sorted(set(modules.layer_types)) if family.rotary_per_kind else [""]
    return {kind: RotaryTable(modules.rotary, number, kind) for number, kind in enumerate(kinds, 1)}
