"""Checkpoints of random weights, for models that cannot be fetched: the time of a step does not depend on the values."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from offramp.files import ASSETS

SHARD = 2_000_000_000  # bytes of a shard, which is also about the memory that writing takes


def shipped_config(name: str, **changed: Any) -> Any:
    """The library's config of a model whose shape comes with offramp; `changed` fields win.

    Random weights draw any token, so none ends a text. Mamba's default spread of 0.1 would amplify rounding a thousandfold.
    """
    file = ASSETS / "configs" / f"{name.replace('/', '--')}.json"
    return AutoConfig.from_pretrained(
        file, **{"initializer_range": 0.02, "eos_token_id": None, **changed}, trust_remote_code=False
    )


@torch.no_grad()
def write_random(config: Any, folder: Path, shard: int = SHARD) -> int:
    """Write a checkpoint of this shape as the hub keeps them: bfloat16, in shards of about `shard` bytes, with a tokenizer.

    The weights are drawn as the library draws those of a new model, block by block, so memory holds one shard. Returns the
    bytes of all weights.
    """
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    files: dict[str, str] = {}  # where each tensor is
    held: dict[str, Tensor] = {}
    total = 0
    parts = list(_parts(model))
    for name, part in parts:
        part.to_empty(device="cpu").apply(model._init_weights)
        held |= {f"{name}.{key}": tensor for key, tensor in part.state_dict().items()}
        part.to("meta")
        size = sum(tensor.nbytes for tensor in held.values())
        if size >= shard or part is parts[-1][1]:
            file = f"model-{len(set(files.values())) + 1:05d}.safetensors"
            save_file(held, folder / file, {"format": "pt"})
            files |= dict.fromkeys(held, file)
            held, total = {}, total + size
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model.config.save_pretrained(folder)
    byte_tokenizer(config.vocab_size).save_pretrained(folder)
    return total


def _parts(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The modules that hold weights, with their names: embedding, every block, final norm, and a head that is not tied."""
    decoder, names = model.get_decoder(), {module: name for name, module in model.named_modules()}
    parts = [model.get_input_embeddings(), *decoder.layers]
    parts += [child for name, child in decoder.named_children() if name.startswith("norm")]
    if not model.config.tie_word_embeddings:
        parts.append(model.get_output_embeddings())
    for part in parts:
        yield names[part], part


def byte_tokenizer(vocabulary: int) -> Any:
    """A tokenizer that reads a text byte by byte, and has a word for every other id of the vocabulary."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols += [f" w{index}" for index in range(len(symbols), vocabulary)]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
