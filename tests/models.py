"""Tiny random models of every family, and a byte tokenizer: no weights, no network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from offramp.model.backbone import Backbone
from offramp.model.compiled.library import library
from offramp.model.families import FAMILIES
from offramp.model.loading import wrap

VOCAB, HIDDEN, BLOCKS = 260, 32, 6
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
    "initializer_range": 0.15,
}
HEADS = {
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
# What a family's config adds to `SMALL`, so that tests meet what is special about it: windows shorter than the tests'
# texts, caps and scales that are not 1, blocks without rotary positions.
PECULIAR: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 7},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3},
    "qwen3": {"head_dim": 16},
    "smollm3": {"no_rope_layer_interval": 3},
    "phi3": {},
    "olmo2": {},
    "gemma2": {"head_dim": 8, "sliding_window": 5, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"head_dim": 8, "sliding_window": 5, "sliding_window_pattern": 2},
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.25, "use_qk_norm": True},
    "gpt2": {"num_key_value_heads": None},
    "gpt_neox": {"num_key_value_heads": None},
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 4, "chunk_size": 8},
    "falcon_mamba": {"state_size": 8, "time_step_rank": 4},
    "bamba": {**HEADS, "attn_layer_indices": [1, 4]},
    "jamba": {
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "granitemoehybrid": {
        **HEADS,
        "layer_types": ["mamba", "attention"] * 3,
        "num_local_experts": 0,
        "shared_intermediate_size": 64,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
        "position_embedding_type": "rope",
    },
    "falcon_h1": {
        **HEADS,
        "mamba_d_ssm": 64,
        "embedding_multiplier": 2.0,
        "lm_head_multiplier": 0.5,
        "key_multiplier": 0.7,
        "attention_in_multiplier": 1.3,
        "attention_out_multiplier": 0.9,
        "ssm_in_multiplier": 0.8,
        "ssm_out_multiplier": 1.2,
        "ssm_multipliers": [0.9, 1.1, 1.2, 0.8, 1.3],
    },
    "lfm2": {
        "layer_types": ["conv", "full_attention", "conv"] * 2,
        "conv_L_cache": 3,
        "conv_bias": True,
        "block_auto_adjust_ff_dim": False,
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "mlp", "attention", "mamba", "mlp", "mamba"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "ssm_state_size": 8,
        "chunk_size": 8,
        "head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
        # The library limits step sizes only in passes over many tokens, so no step size may reach the limit.
        "time_step_min": 1e-6,
        "time_step_floor": 1e-6,
    },
}


@cache
@torch.inference_mode(False)  # the first test to ask may be in inference mode; training needs ordinary tensors
def tiny(family: str, seed: int = 0) -> Backbone:
    """A random float32 model of this family, wrapped (and so checked). Every test gets the same one.

    "llama/compiled" is the same model on compiled blocks.
    """
    family, _, compiled = family.partition("/")
    backbone = random_model(family, seed)
    if compiled:
        backbone.use_compiled_blocks("float32")
    return backbone


def random_model(family: str, seed: int = 0, **changes: Any) -> Backbone:
    """A random float32 model of this family, whose config has these changes."""
    torch.manual_seed(seed)
    settings = {**SMALL, **PECULIAR[family], **changes}
    if family == "gpt2":
        settings |= {"n_inner": settings.pop("intermediate_size"), "n_positions": settings.pop("max_position_embeddings")}
    config = transformers.AutoConfig.for_model(family, **{k: v for k, v in settings.items() if v is not None})
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=FAMILIES[family].implementation, dtype=torch.float32
    )
    with torch.no_grad():  # norms and biases start as ones and zeros, which would hide a missing one
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return wrap(model, byte_tokenizer(), f"tiny-{family}")


COMPILED = sorted(name for name, family in FAMILIES.items() if family.compiled and library())
# The library's own blocks of every family, and compiled ones where there are some.
VARIANTS = sorted(FAMILIES) + [f"{family}/compiled" for family in COMPILED]
# Decodes three times as fast: for tests that are not about blocks.
LLAMA = "llama/compiled" if COMPILED else "llama"
compiled_only = pytest.mark.skipif(not COMPILED, reason="no compiled library here")


@cache
def byte_tokenizer() -> Any:
    """A tokenizer with one token for each byte. 256 begins a text, and 257 ends it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def saved(backbone: Backbone, folder: Path) -> Path:
    """The backbone's model and tokenizer as a local folder."""
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    return folder
