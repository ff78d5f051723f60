"""A hybrid made from a model of the llama kind: Mamba-2 mixers in the places of some of its attentions.

The mixers have a file of their own, in integers of 4 bits (`write_mixers`); smollm2-hybrid's is older, and has 8. They are
added to the model's weights when it is loaded (`to_bamba`). The result is the library's Bamba: a block has an attention or
a Mamba-2 mixer, and then a gated MLP.

A mixer begins from an attention's weights ("The Mamba in the Llama", arXiv 2408.15237), in which several heads of queries
share a head of keys and values. So several heads of C share a head of B and of x. Bamba has no heads that share x: what is
shared is repeated here.

A mixer's tensors. D is the hidden size, W the convolution's width; of Q heads of P dims, G are not shared:

| name | shape | |
|---|---|---|
| x, B | (G · P, D) | from values and keys |
| C, z | (Q · P, D) | from queries; the gate, with `z_bias` (Q · P) |
| dt | (Q, D) | step sizes, with `dt_bias` (Q) |
| taps, conv_bias | (2 G · P + Q · P, W), (2 G · P + Q · P) | the convolution of x, B and C |
| A_log, D | (Q) | decay and skip |
| norm, out | (Q · P), (D, Q · P) | the norm after the scan, and the output projection |
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from offramp.errors import CorruptFile
from offramp.files import write_atomically

MIXERS = "mixers.safetensors"  # the file's name
Mixer = dict[str, Tensor]
MATRICES = ("x", "B", "C", "z", "dt", "out")
VECTORS = ("z_bias", "dt_bias", "taps", "conv_bias", "A_log", "D", "norm")
ROUNDED = ("x", "B", "C", "z", "out")  # kept in integers
GROUP = 32  # values of a row that share a scale
SHARES = torch.linspace(0.75, 1.05, 13)  # of the scale at which a group's largest value is -8; the best is taken
AGAIN = "Install the package with this model again, or get the file again."


def write_mixers(file: Path, mixers: dict[int, Mixer], record: dict[str, Any]) -> None:
    """Write the mixers of some blocks: large matrices in integers of 4 bits, two in a byte, the rest in float32."""
    tensors = {}
    for block, mixer in mixers.items():
        for name in ROUNDED:
            tensors[f"{block}.{name}"], tensors[f"{block}.{name}.scale"] = _rounded(mixer[name].float())
        tensors |= {f"{block}.{name}": mixer[name].float().contiguous() for name in ("dt", *VECTORS)}
    write_atomically(file, save(tensors, {"record": json.dumps(record)}))


def base_of(file: Path) -> str:
    """The alias of the model that the mixers of a file belong to: `base` in its record. Raises `CorruptFile`."""
    try:
        with safe_open(file, "pt") as tensors:
            return str(json.loads(tensors.metadata()["record"])["base"])
    except Exception as error:  # whatever safetensors raises for bytes that it cannot read
        raise CorruptFile(f"The mixers in {file} are damaged: {error!r}", AGAIN) from error


def read_mixers(file: Path) -> dict[int, Mixer]:
    """The mixers of each block that has one, in float32. Raises `CorruptFile` for a damaged file."""
    mixers: dict[int, Mixer] = {}
    try:
        with safe_open(file, "pt") as tensors:
            kept = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118 - it is not a dict
    except Exception as error:  # whatever safetensors raises for bytes that it cannot read
        raise CorruptFile(f"The mixers in {file} are damaged: {error}", AGAIN) from error
    for key, value in kept.items():
        block, _, name = key.partition(".")
        if not (block.isdecimal() and len(block) < 6):
            continue
        if name in VECTORS:
            mixers.setdefault(int(block), {})[name] = value.float()
        scale = kept.get(f"{key}.scale", torch.ones(*value.shape[:1], 1))
        if name in MATRICES and value.ndim == 2 and _fits(value, scale):
            mixers.setdefault(int(block), {})[name] = _restored(value, scale)
    if not mixers or any(set(mixer) != {*MATRICES, *VECTORS} for mixer in mixers.values()):
        raise CorruptFile(f"The mixers in {file} are not complete.", AGAIN)
    return dict(sorted(mixers.items()))


def _rounded(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix (n, w) in integers of 4 bits: uint8 (n, w / 2), and a scale of each group (n, w / `GROUP`) in bfloat16."""
    groups = matrix.unflatten(1, (-1, math.gcd(GROUP, matrix.shape[1])))
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scales = (largest * SHARES / -8).bfloat16()  # (n, groups, shares)
    scales[scales == 0] = 1
    errors = [(_steps(groups, scale) * scale.float() - groups).square().sum(-1) for scale in scales.split(1, dim=-1)]
    scale = scales.gather(-1, torch.stack(errors, -1).argmin(-1, keepdim=True))
    steps = (_steps(groups, scale) + 8).to(torch.uint8).flatten(1)
    return steps[:, ::2] | steps[:, 1::2] << 4, scale[..., 0].contiguous()


def _steps(groups: Tensor, scale: Tensor) -> Tensor:
    return (groups / scale.float()).round().clamp(-8, 7)


def _fits(kept: Tensor, scale: Tensor) -> bool:
    """Whether each row of a matrix in a file has scales, each for as many values."""
    width = kept.shape[1] * (2 if kept.dtype == torch.uint8 else 1)
    return scale.ndim == 2 and len(scale) == len(kept) and scale.shape[1] > 0 and width % scale.shape[1] == 0


def _restored(kept: Tensor, scale: Tensor) -> Tensor:
    """A matrix of a file in float32. uint8 holds two integers of 4 bits; other types hold one value each."""
    if kept.dtype == torch.uint8:
        kept = torch.stack([kept & 15, kept >> 4], -1).flatten(1).float() - 8
    values: Tensor = kept.float().unflatten(1, (scale.shape[1], -1)) * scale.float()[..., None]
    return values.flatten(1)


def to_bamba(llama: Any, mixers: dict[int, Mixer]) -> Any:
    """A `BambaForCausalLM` in the dtype of a `LlamaForCausalLM`, with its weights and these mixers."""
    from transformers import BambaForCausalLM

    config = bamba_config(llama.config, mixers)
    weights, made = llama.state_dict(), {}
    renamed = {
        "model.norm.": "model.final_layernorm.",
        ".mlp.": ".feed_forward.",
        ".post_attention_layernorm.": ".pre_ff_layernorm.",
    }
    for name, tensor in weights.items():
        if any(name.startswith(f"model.layers.{block}.self_attn.") for block in mixers):
            continue
        for old, new in renamed.items():
            name = name.replace(old, new)
        made[name] = tensor
    for block, mixer in mixers.items():
        for name, tensor in _bamba_mixer(mixer).items():
            made[f"model.layers.{block}.mamba.{name}"] = tensor
    dtype = llama.get_input_embeddings().weight.dtype
    model = BambaForCausalLM._from_config(config, dtype=dtype)
    model.load_state_dict(made)
    model.generation_config = llama.generation_config
    return model.eval()


def bamba_config(llama: Any, mixers: dict[int, Mixer]) -> Any:
    """The config of the Bamba that a model with this `LlamaConfig` becomes."""
    from transformers import BambaConfig

    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "hidden_act", "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
        "max_position_embeddings",
    )  # fmt: skip
    some = next(iter(mixers.values()))
    heads, inner = len(some["A_log"]), len(some["C"])
    return BambaConfig(
        **{name: getattr(llama, name) for name in same},
        rope_parameters={**llama.rope_parameters, "partial_rotary_factor": 1.0},
        attn_layer_indices=[block for block in range(llama.num_hidden_layers) if block not in mixers],
        mamba_n_heads=heads,
        mamba_d_head=inner // heads,
        mamba_n_groups=heads,
        mamba_d_state=inner // heads,
        mamba_d_conv=some["taps"].shape[1],
        mamba_expand=inner // llama.hidden_size,
        mamba_conv_bias=True,
        mamba_proj_bias=True,
    )


def _bamba_mixer(mixer: Mixer) -> dict[str, Tensor]:
    """A mixer's tensors under the library's names; what heads share is repeated."""
    heads, dim = len(mixer["A_log"]), len(mixer["C"]) // len(mixer["A_log"])

    def repeated(rows: Tensor) -> Tensor:
        each = rows.unflatten(0, (-1, dim))
        shared: Tensor = each.repeat_interleave(heads // len(each), 0).flatten(0, 1)
        return shared

    sizes = [len(mixer[name]) for name in ("x", "B", "C")]

    def channels(rows: Tensor) -> Tensor:
        x, B, C = rows.split(sizes)
        return torch.cat([repeated(x), repeated(B), C])

    rows = torch.cat([mixer["z"], channels(torch.cat([mixer["x"], mixer["B"], mixer["C"]])), mixer["dt"]])
    bias = torch.zeros(len(rows))
    bias[: len(mixer["z"])] = mixer["z_bias"]
    return {
        "in_proj.weight": rows,
        "in_proj.bias": bias,
        "conv1d.weight": channels(mixer["taps"])[:, None],
        "conv1d.bias": channels(mixer["conv_bias"]),
        "dt_bias": mixer["dt_bias"],
        "A_log": mixer["A_log"],
        "D": mixer["D"],
        "norm.weight": mixer["norm"],
        "out_proj.weight": mixer["out"],
        "out_proj.bias": torch.zeros(len(mixer["out"])),
    }
