"""How each model family differs from llama: one row for each family.

To add a family, add a row; the conformance tests then cover it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.errors import UnsupportedModel
from offramp.model.hooks import brought_in
from offramp.model.hub import Source

Config = Any  # a PreTrainedConfig of transformers; its fields differ from family to family
Norms = tuple[str | None, str | None, str | None, str | None]  # before and after attention and mixer, and the MLP
KeysValues = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]


def _split_kv(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Separate `k_proj` and `v_proj` (llama and most others), with a key norm over the whole row (olmo2) or each head."""
    k, v = attention.k_proj(x), attention.v_proj(x)
    heads = (*x.shape[:-1], -1, attention.head_dim)
    norm = getattr(attention, "k_norm", None) or getattr(attention, "k_layernorm", None)
    if norm is not None:
        over_row = norm.weight.shape[0] == k.shape[-1] and norm.weight.ndim == 1
        k = norm(k) if over_row else norm(k.view(heads))
    return k.view(heads).transpose(1, 2), v.view(heads).transpose(1, 2)


def _fused_kv(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """One `qkv_proj` whose rows are all queries, then all keys, then all values (phi3)."""
    width = attention.num_key_value_heads * attention.head_dim
    with brought_in(attention.qkv_proj):
        k, v = F.linear(x, attention.qkv_proj.weight[-2 * width :]).split(width, dim=-1)
    heads = (*x.shape[:-1], -1, attention.head_dim)
    return k.view(heads).transpose(1, 2), v.view(heads).transpose(1, 2)


def _conv1d_kv(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """GPT-2's `Conv1D`, a linear layer with its weight transposed: columns are queries, keys, values."""
    width = attention.split_size
    with brought_in(attention.c_attn):
        kv = x @ attention.c_attn.weight[:, width:] + attention.c_attn.bias[width:]
    k, v = kv.split(width, dim=-1)
    heads = (*x.shape[:-1], -1, attention.head_dim)
    return k.view(heads).transpose(1, 2), v.view(heads).transpose(1, 2)


def _interleaved_kv(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """GPT-NeoX's fused projection: query, key and value of one head stand together."""
    per_head = attention.query_key_value(x).view(*x.shape[:-1], -1, 3 * attention.head_size).transpose(1, 2)
    _, k, v = per_head.chunk(3, dim=-1)
    return k, v


class Scales(NamedTuple):
    """What a model multiplies its embeddings and its logits with, and the soft cap of its logits (None: none)."""

    embedding: float = 1.0
    logits: float = 1.0
    cap: float | None = None

    def finish(self, logits: Tensor) -> Tensor:
        """The logits as they are after the head's product."""
        if self.logits != 1:
            logits = logits * self.logits
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


class Multipliers(NamedTuple):
    """What a block multiplies: what goes into its attention and its mixer, the keys, the results of the mixer's input
    projection (each, or None) and the gate of the MLP; and what attention, mixer and MLP add to the hidden state.
    """

    attention_in: float = 1.0
    mixer_in: float = 1.0
    keys: float = 1.0
    projected: Tensor | None = None
    gate: float = 1.0
    attention: float = 1.0
    mixer: float = 1.0
    mlp: float = 1.0


def _granite(config: Config) -> Scales:
    return Scales(float(config.embedding_multiplier), 1 / config.logits_scaling)


def _of_residual(block: Any) -> Multipliers:
    factor = float(block.residual_multiplier)
    return Multipliers(attention=factor, mixer=factor, mlp=factor)


def _of_falcon(block: Any) -> Multipliers:
    mixer, attention, mlp = block.mamba, block.self_attn, block.feed_forward
    of_state = mixer.n_groups * mixer.ssm_state_size
    sizes = [mixer.intermediate_size, mixer.intermediate_size, of_state, of_state, mixer.num_heads]
    return Multipliers(
        attention_in=block.attention_in_multiplier,
        mixer_in=mixer.ssm_in_multiplier,
        keys=attention.key_multiplier,
        projected=torch.tensor(attention.config.ssm_multipliers).repeat_interleave(torch.tensor(sizes)),
        gate=mlp.gate_multiplier,
        attention=block.attn_out_multiplier,
        mixer=block.ssm_out_multiplier,
        mlp=mlp.down_multiplier,
    )


@dataclass(frozen=True)
class Family:
    """How one model family differs from llama: the names of its modules, and what it does to hidden states and logits."""

    trunk: str = "model"
    blocks: str = "layers"
    norm: str = "norm"
    attention: str = "self_attn"
    mixer: str | None = None  # the Mamba mixer; a block may have it, attention, both or neither
    mlp: str = "mlp"
    norms: Norms = ("input_layernorm", None, "post_attention_layernorm", None)
    positions: str | None = None  # an embedding of absolute positions, added to the tokens' own
    rotary: str | None = "rotary_emb"
    rotary_per_kind: bool = False  # one rotary table for each layer type (gemma3)
    cache_kwarg: str = "cache"
    implementation: str = "sdpa"  # which of the library's attention functions
    keys_values: KeysValues = _split_kv
    projected: int = 2  # how many of queries, keys and values `keys_values` computes: 2 or 3
    scales: Callable[[Config], Scales] = lambda config: Scales()
    multipliers: Callable[[Any], Multipliers] = lambda block: Multipliers()  # of a block of the library's
    norm_offset: float = 0.0  # what norms add to their weights
    compiled: bool = True  # whether there is compiled code for the blocks


_ONE_NORM: Norms = ("norm", None, None, None)
_FEED_FORWARD: Norms = ("input_layernorm", None, "pre_ff_layernorm", None)
_MAMBA = Family(trunk="backbone", norm="norm_f", mixer="mixer", norms=_ONE_NORM, rotary=None, implementation="eager")

_GEMMA = Family(
    norms=("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    norm_offset=1.0,
    scales=lambda config: Scales(cap=config.final_logit_softcapping),
)

FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "smollm3": Family(),
    "phi3": Family(keys_values=_fused_kv),
    "olmo2": Family(norms=(None, "post_attention_layernorm", None, "post_feedforward_layernorm")),
    "gemma2": replace(_GEMMA, implementation="eager"),  # SDPA has no soft cap
    "gemma3_text": replace(_GEMMA, rotary_per_kind=True),
    "granite": Family(scales=_granite, multipliers=_of_residual),
    "cohere": Family(scales=lambda config: Scales(logits=config.logit_scale), compiled=False),
    "gpt2": Family(
        trunk="transformer",
        blocks="h",
        norm="ln_f",
        attention="attn",
        norms=("ln_1", None, "ln_2", None),
        positions="wpe",
        rotary=None,
        keys_values=_conv1d_kv,
        compiled=False,
    ),
    "gpt_neox": Family(
        trunk="gpt_neox",
        norm="final_layer_norm",
        attention="attention",
        cache_kwarg="layer_past",
        keys_values=_interleaved_kv,
        projected=3,
        compiled=False,
    ),
    "mamba": _MAMBA,
    "mamba2": _MAMBA,
    "falcon_mamba": _MAMBA,
    "bamba": Family(norm="final_layernorm", mixer="mamba", mlp="feed_forward", norms=_FEED_FORWARD),
    "jamba": Family(norm="final_layernorm", mixer="mamba", rotary=None, compiled=False),
    "granitemoehybrid": Family(mixer="mamba", mlp="shared_mlp", scales=_granite, multipliers=_of_residual),
    "falcon_h1": Family(
        norm="final_layernorm",
        mixer="mamba",
        mlp="feed_forward",
        norms=_FEED_FORWARD,
        scales=lambda config: Scales(float(config.embedding_multiplier), config.lm_head_multiplier),
        multipliers=_of_falcon,
    ),
    "lfm2": Family(
        norm="embedding_norm",
        mixer="conv",
        mlp="feed_forward",
        norms=("operator_norm", None, "ffn_norm", None),
    ),
    "nemotron_h": Family(
        norm="norm_f",
        attention="mixer",
        mixer="mixer",
        mlp="mixer",
        norms=("norm", None, "norm", None),
        rotary=None,
    ),
}
MOST_BLOCKS = 10_000  # the largest models have a few hundred; the library would make any number
UNBOUNDED = 2**31  # the context of a model that has no attention


def family_of(config: Config, source: Source) -> Family:
    """The row for a model's config. Raises `UnsupportedModel` where there is none, or an absurd number of blocks."""
    if config.model_type not in FAMILIES:
        raise UnsupportedModel(
            f"'{source.name}' is of the family '{config.model_type}', which offramp has no row for.",
            f"Supported families: {', '.join(sorted(FAMILIES))}. A new family is one row in families.FAMILIES.",
        )
    blocks = getattr(config, "num_hidden_layers", None)
    if type(blocks) is not int or not 0 < blocks <= MOST_BLOCKS:
        raise UnsupportedModel(
            f"'{source.name}' cannot have {blocks} blocks.", "Check num_hidden_layers in its config.json."
        )
    return FAMILIES[config.model_type]
