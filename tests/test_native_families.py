"""The program without Python on models of every compiled family, in files of their parts."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from models import COMPILED, compiled_only, random_model
from offramp import Engine, Exits, ExitsConfig
from offramp.decode import native
from offramp.errors import BadInput
from offramp.exits.exit_set import ExitSet
from offramp.exits.policy import Policy
from offramp.model.core import program
from offramp.model.loading import wrap

pytestmark = compiled_only


def tokenizer() -> Any:
    """A byte tokenizer with one merge, of 260 tokens with those that begin and end a text."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({symbol: number for number, symbol in enumerate([*symbols, "th"])}, [("t", "h")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def with_exits(family: str, weight_format: str) -> Any:
    """A random model of a family on compiled blocks, with random exits that decide."""
    backbone = wrap(random_model(family).model, tokenizer(), f"tiny-{family}")
    backbone.use_compiled_blocks(weight_format)
    torch.manual_seed(0)
    exits = Exits.new(backbone, ExitsConfig((1, 3), "mamba", "linear", gate_width=32, readout_width=32, tails=(2, 1)))
    with torch.no_grad():
        for parameter in exits.modules.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    exits.modules.eval().requires_grad_(False)
    exits.policy = Policy((0.5, 0.4))
    return SimpleNamespace(backbone=backbone, exits=ExitSet(exits, None))


@pytest.mark.parametrize("weight_format", ["float32", "int4"])
@pytest.mark.parametrize("family", COMPILED)
def test_a_model_of_parts_gives_the_same_answers_as_python(family: str, weight_format: str, tmp_path: Path) -> None:
    model = with_exits(family, weight_format)
    assert native.write(model, tmp_path)[:1] == ("exact",)
    left = 0
    for mode in ("full", "exact", "early"):
        files = tmp_path / "model.gguf", "the other moth's path", "--exits", tmp_path / "exits.gguf"
        command = [program(), *files, "--mode", mode, "--raw", "--json", "--max-tokens", "24"]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        expected = Engine(model, mode=mode).generate(model.backbone.tokenizer(files[1])["input_ids"], max_tokens=24)
        assert len(expected.ids) > 1
        assert found["text"] == expected.text
        for name in ("id", "exit_block", "cumulative_flops"):
            assert [token[name] for token in found["tokens"]] == [getattr(token, name) for token in expected.tokens], name
        left += sum(token.exit_block < model.backbone.n_blocks for token in expected.tokens)
    assert left  # a token left early


def test_what_needs_python_is_refused(tmp_path: Path) -> None:
    on_the_librarys_blocks = SimpleNamespace(backbone=random_model("llama"), exits=ExitSet())
    with pytest.raises(BadInput, match="need Python"):
        native.write(on_the_librarys_blocks, tmp_path)
    other = with_exits("llama", "float32")
    other.backbone.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(BadInput, match="cut texts"):
        native.write(other, tmp_path)
    assert not list(tmp_path.iterdir())
