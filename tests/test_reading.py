"""A short text is read once in float32: it shows what each layer gets, and what a weight format changes."""

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers

import offramp
from models import SMALL, byte_tokenizer, compiled_only, saved, tiny
from offramp.errors import UnsupportedModel
from offramp.model import loading
from offramp.model.backbone import Backbone
from offramp.model.compiled.formats import FORMATS
from offramp.model.compiled.library import Fine
from offramp.model.compiled.parts import COARSE
from offramp.model.families import FAMILIES, Scales
from offramp.model.lending import OWN
from offramp.model.loading import check, outline
from offramp.model.reading import Reading, change_of, read

pytestmark = [compiled_only, pytest.mark.filterwarnings("ignore::UserWarning")]
QUANTISED = [name for name, format in FORMATS.items() if format.quantised]


@cache
@torch.inference_mode(False)
def knowing() -> Backbone:
    """A tiny llama that has learned the short text by heart, nearly."""
    base = tiny("llama")
    model = copy.deepcopy(base.model).requires_grad_(True)
    ids = read(base, OWN).ids.clone()
    adam = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        adam.zero_grad()
        model(ids, labels=ids).loss.backward()
        adam.step()
    return Backbone(model, base.tokenizer, base.source)


@pytest.fixture
def folder(tmp_path: Path, own_cache: Path) -> Path:
    return saved(knowing(), tmp_path / "model")


@torch.inference_mode()
def test_it_finds_what_the_librarys_model_finds() -> None:
    backbone = knowing()
    reading = read(backbone, OWN)
    layer = backbone.model.model.layers[2].mlp.down_proj
    inputs = []
    with layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0])):
        logits = backbone.model(reading.ids).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), reading.ids[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(reading.losses.flatten(), losses, rtol=1e-4, atol=1e-4)
    assert (reading.likeliest == logits.argmax(-1)).float().mean() > 0.99
    found = reading.inputs["model.layers.2.mlp.down_proj"]
    torch.testing.assert_close(found.power, inputs[0].square().mean((0, 1)))
    assert 1e-3 < found.lost8 < COARSE
    assert 1e-6 < found.lost16 < 1e-4
    assert len(reading.inputs) == 6 * 7 + 1


def test_a_file_gives_back_what_was_packed_and_nothing_where_it_is_damaged(tmp_path: Path) -> None:
    reading, file = read(tiny("mamba2"), OWN), tmp_path / "reading.bin"
    assert Reading.unpacked(file) is None
    content = reading.packed()
    file.write_bytes(content)
    again = Reading.unpacked(file)
    assert again is not None
    assert torch.equal(again.losses, reading.losses)
    assert again.inputs.keys() == reading.inputs.keys()
    for damaged in (b"", content[:-1], content[:200] + b"?" + content[201:]):
        file.write_bytes(damaged)
        assert Reading.unpacked(file) is None


def test_the_text_is_read_once_for_all_formats_and_again_where_the_file_is_damaged(
    folder: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    monkeypatch.setattr(loading, "read", lambda *given: reads.append(1) or read(*given))
    for dtype in ("float32", "bfloat16", *QUANTISED, "int4"):
        offramp.load(str(folder), dtype)
    assert len(reads) == 1
    file = next((own_cache / "readings").glob("*"))
    content = file.read_bytes()
    file.write_bytes(content[:-9])
    offramp.load(str(folder), "int4")
    assert len(reads) == 2
    assert Reading.unpacked(file) is not None


@pytest.mark.parametrize("keep", [False, True])
def test_a_load_says_what_the_format_changes_and_remembers_it(folder: Path, keep: bool, monkeypatch) -> None:
    notes = []
    backbone = offramp.load(str(folder), "int8", keep=keep, progress=lambda *call: notes.append(call)).backbone
    change = backbone.change
    assert change is not None
    assert change == change_of(backbone, read(knowing(), OWN))
    assert abs(change.worse) < 0.03
    assert change.agreement > 0.9
    assert notes[-1] == ("comparing", 6, 6, str(change))
    monkeypatch.setattr(loading, "change_of", lambda *_: pytest.fail("it was measured again"))
    assert offramp.load(str(folder), "int8").backbone.change == change
    assert outline(str(folder), "int8").change == change
    assert outline(str(folder), "int4").change is None


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_format_that_makes_a_model_much_worse_is_warned_of_and_runs(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(loading, "MUCH", -1.0)
    with pytest.warns(UserWarning, match=r"loses much in int4: perplexity .* Try bfloat16"):
        assert offramp.load(str(folder), "int4").backbone.change is not None


def test_a_model_that_knows_nothing_is_not_compared(tmp_path: Path, own_cache: Path) -> None:
    assert offramp.load(str(saved(tiny("qwen2"), tmp_path / "model")), "int4").backbone.change is None


@cache
def outliers() -> tuple[Backbone, Backbone]:
    """A model, and the same one with one channel of each norm 1,000 times as large, and weights for it as small."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.05}
    config = transformers.LlamaConfig(**SMALL | sizes, tie_word_embeddings=False)
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    planted = copy.deepcopy(plain)
    for block in planted.model.layers:
        attention, mlp = block.self_attn, block.mlp
        readers = {
            block.input_layernorm: (attention.q_proj, attention.k_proj, attention.v_proj),
            block.post_attention_layernorm: (mlp.gate_proj, mlp.up_proj),
        }
        for norm, layers in readers.items():
            norm.weight.data[5] *= 1000
            for layer in layers:
                layer.weight.data[:, 5] /= 1000
    return loading.wrap(plain, byte_tokenizer()), loading.wrap(planted, byte_tokenizer())


@pytest.mark.parametrize("dtype", FORMATS)
@torch.inference_mode()
def test_outliers_load_in_every_format_and_change_little_but_the_weights(dtype: str, tmp_path, own_cache) -> None:
    _, planted = outliers()
    loaded = offramp.load(str(saved(planted, tmp_path / "model")), dtype, keep=True).backbone
    ids = torch.arange(40, 90)[None]
    wanted, found = copy.deepcopy(loaded.model).float()(ids).logits, loaded.forward(ids)  # the format's own weights
    assert float((found - wanted).norm() / wanted.norm()) < 0.03
    for block in loaded.runtime.blocks:
        assert isinstance(block.mlp.fields["gate_up"], Fine) == FORMATS[dtype].quantised
        assert not isinstance(block.mlp.fields["down"], Fine)


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_wrong_row_is_refused_in_every_format(dtype: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = 1.08 if dtype == "bfloat16" else 1.005
    monkeypatch.setitem(FAMILIES, "llama", replace(FAMILIES["llama"], scales=lambda config: Scales(logits=wrong)))
    with pytest.raises(UnsupportedModel, match=r"differ from the library's by \d"):
        offramp.load(str(folder), dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_bfloat16_is_checked_in_float32(family: str) -> None:
    backbone = Backbone(copy.deepcopy(tiny(family).model).bfloat16(), None, tiny(family).source)
    before = {name: (id(each), each.dtype) for name, each in backbone.model.named_parameters()}
    assert max(check(backbone)) <= 1e-5
    assert {name: (id(each), each.dtype) for name, each in backbone.model.named_parameters()} == before
