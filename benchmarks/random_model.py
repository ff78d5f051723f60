"""Checkpoints of random weights, for models that cannot be fetched: the time of a step does not depend on the values."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from offramp.files import ASSETS

# Shapes of small models that people run, by their configs on the hub: the fields that decide their size.
HYBRID = {"tie_word_embeddings": True, "max_position_embeddings": 32768}
SHAPES: dict[str, dict[str, Any]] = {
    "granite-4.0-h-350m": HYBRID
    | {"model_type": "granitemoehybrid", "hidden_size": 768, "num_hidden_layers": 32, "vocab_size": 100352}
    | {"num_attention_heads": 12, "num_key_value_heads": 4, "shared_intermediate_size": 2048, "intermediate_size": 2048}
    | {"layer_types": ["attention" if block in (10, 13, 17, 27) else "mamba" for block in range(32)]}
    | {"mamba_n_heads": 48, "mamba_d_head": 32, "mamba_d_state": 128, "mamba_n_groups": 1, "mamba_expand": 2}
    | {"num_local_experts": 0, "num_experts_per_tok": 0, "attention_multiplier": 0.015625, "logits_scaling": 3.0}
    | {"embedding_multiplier": 12.0, "residual_multiplier": 0.246, "position_embedding_type": "nope"},
    "falcon-h1-0.5b": HYBRID
    | {"model_type": "falcon_h1", "hidden_size": 1024, "num_hidden_layers": 36, "vocab_size": 32784}
    | {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 2048}
    | {"mamba_d_ssm": 1536, "mamba_n_heads": 24, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1},
    "gemma-3-270m": HYBRID
    | {"model_type": "gemma3_text", "hidden_size": 640, "num_hidden_layers": 18, "vocab_size": 262144}
    | {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "intermediate_size": 2048}
    | {"sliding_window": 512, "query_pre_attn_scalar": 256},
    "lfm2-350m": HYBRID
    | {"model_type": "lfm2", "hidden_size": 1024, "num_hidden_layers": 16, "vocab_size": 65536}
    | {"num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 4608, "block_auto_adjust_ff_dim": False}
    | {"layer_types": ["full_attention" if block in (2, 5, 8, 10, 12, 14) else "conv" for block in range(16)]},
    "mamba2-370m": {"model_type": "mamba2", "hidden_size": 1024, "num_hidden_layers": 48, "vocab_size": 50288}
    | {"num_heads": 32, "head_dim": 64, "state_size": 128, "n_groups": 1, "expand": 2, "tie_word_embeddings": True},
}
# Runs llama.cpp's converter. It knows tokenizers by a hash of what they make of a text, and not ours, which no one trained.
CONVERT = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
import convert_hf_to_gguf
sys.argv[1:] = [sys.argv[2], "--outfile", sys.argv[3], "--outtype", "bf16"]
convert_hf_to_gguf.main()
"""
SHARD = 2_000_000_000  # bytes of a shard, which is also about the memory that writing takes


def config_of(name: str, **changed: Any) -> Any:
    """The library's config of one of `SHAPES`, or of a model whose shape comes with offramp; `changed` fields win.

    Random weights draw any token, so none ends a text. Mamba's default spread of 0.1 would amplify rounding a thousandfold.
    """
    changed = {"initializer_range": 0.02, "eos_token_id": None, **changed}
    if name in SHAPES:
        return AutoConfig.for_model(**{**SHAPES[name], **changed})
    file = ASSETS / "configs" / f"{name.replace('/', '--')}.json"
    return AutoConfig.from_pretrained(file, **changed, trust_remote_code=False)


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
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if config.model_type == "granitemoehybrid":  # its blocks have other names on the hub than the library writes
        described_in = folder / "config.json"
        kinds = {"linear_attention": "mamba", "full_attention": "attention"}
        described = json.loads(described_in.read_text())
        described["layer_types"] = [kinds[kind] for kind in described["layer_types"]]
        described_in.write_text(json.dumps(described, indent=2))
    byte_tokenizer(config.vocab_size).save_pretrained(folder)
    return total


def _parts(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The modules that hold weights, with their names: embedding, every block, final norm, and a head that is not tied."""
    decoder, names = model.get_decoder(), {module: name for name, module in model.named_modules()}
    parts = [model.get_input_embeddings(), *decoder.layers]
    others = [child for child in decoder.children() if child is not decoder.layers and child is not parts[0]]
    parts += [child for child in others if any(True for _ in child.parameters())]
    if not model.config.tie_word_embeddings:
        parts.append(model.get_output_embeddings())
    for part in parts:
        yield names[part], part


def write_gguf(folder: Path, file: Path) -> None:
    """Write a checkpoint of ours as a GGUF file in bfloat16, by llama.cpp's own converter.

    The converter comes with the source of llama-cpp-python, which is fetched next to `file`. Raises
    `subprocess.CalledProcessError` where it cannot be fetched, or does not know the model.
    """
    source = file.with_name("llama.cpp")
    if not source.exists():
        requirements = Path(__file__).parent / "requirements" / "llamacpp.txt"
        (wanted,) = re.findall(r"^llama-cpp-python==[\d.]+", requirements.read_text(), re.MULTILINE)
        with TemporaryDirectory(dir=file.parent) as work:
            _run("-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", work, wanted)
            with tarfile.open(next(Path(work).glob("*.tar.gz"))) as archive:
                archive.extractall(work, filter="data")
            next(Path(work).glob("*/vendor/llama.cpp")).rename(source)
    unfinished = file.with_suffix(".part")
    _run("-c", CONVERT, str(source), str(folder), str(unfinished))
    unfinished.rename(file)


def _run(*arguments: str) -> None:
    """Run Python with these arguments. What it prints goes to the error, where it fails."""
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True)


def byte_tokenizer(vocabulary: int) -> Any:
    """A tokenizer that reads a text byte by byte, and has a word for every other id of the vocabulary.

    It has one merge, since llama.cpp loads none without.
    """
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "qz"]
    symbols += [f" w{index}" for index in range(len(symbols), vocabulary)]
    tokenizer = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(symbols)}, [("q", "z")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
