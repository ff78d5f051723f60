"""Weights are streamed: converted a piece at a time, kept in the cache in their format, and mapped from there."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import offramp
from models import SMALL, byte_tokenizer, saved, tiny
from offramp import Exits, ExitsConfig
from offramp.errors import ExitsMismatch, OfframpError
from offramp.model import library_blocks, loading, store
from offramp.model.checkpoint import PIECE, Gguf, Safetensors, Values, checkpoint_for, fingerprint
from offramp.model.families import FAMILIES
from offramp.model.lean.weights import Int8
from offramp.model.store import Store

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
IDS = torch.arange(40, 52)[None]


@pytest.fixture
def folder(tmp_path: Path, own_cache: Path) -> Path:
    return saved(tiny("llama"), tmp_path / "model")


def conversions(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "formats").glob("*")) + sorted((cache / "formats").glob(".*"))


@torch.inference_mode()
def logits(folder: Path, dtype: str = "float32", **kwargs) -> torch.Tensor:
    return offramp.load(str(folder), dtype, **kwargs).forward(IDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_librarys_model_is_what_the_library_would_load(
    family: str, dtype: torch.dtype, tmp_path, own_cache, monkeypatch
) -> None:
    monkeypatch.setitem(library_blocks.TOLERANCE, torch.bfloat16, 1.0)  # rounding sends some of jamba's tokens elsewhere
    folder = saved(tiny(family), tmp_path / "model")
    implementation = FAMILIES[family].implementation
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=implementation)
    ours = offramp.load(str(folder), str(dtype).removeprefix("torch."), keep=True).model
    for kind in ("named_parameters", "named_buffers"):
        wanted, found = dict(getattr(theirs, kind)()), dict(getattr(ours, kind)())
        assert wanted.keys() == found.keys()
        for name, tensor in wanted.items():
            assert found[name].dtype == tensor.dtype, name
            assert torch.equal(found[name], tensor), name
    assert theirs.generation_config.to_dict() == ours.generation_config.to_dict()


def test_shards_are_one_model_and_stray_files_are_left_alone(folder: Path, tmp_path) -> None:
    sharded = tmp_path / "sharded"
    tiny("llama").model.save_pretrained(sharded, max_shard_size="40KB")
    byte_tokenizer().save_pretrained(sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    (sharded / "consolidated.safetensors").write_bytes(b"something else")
    assert torch.equal(logits(sharded, "bfloat16"), logits(folder, "bfloat16"))


@pytest.mark.parametrize("family", ["llama", "mamba2", "gpt2"])
def test_a_second_load_reads_only_the_cache_and_trusts_its_self_check(family, tmp_path, own_cache, monkeypatch) -> None:
    folder = saved(tiny(family), tmp_path / "model")
    first = offramp.load(str(folder), "bfloat16")
    weights = folder / "model.safetensors"
    stamp = weights.stat().st_mtime_ns
    weights.write_bytes(bytes(weights.stat().st_size))
    os.utime(weights, ns=(stamp, stamp))  # the hash of a file is kept by its size and time
    monkeypatch.setattr(loading, "check", lambda *_: pytest.fail("the self-check ran again"))
    second = offramp.load(str(folder), "bfloat16")
    with torch.inference_mode():
        assert torch.equal(first.forward(IDS), second.forward(IDS))
    assert second.source.fingerprint == first.source.fingerprint
    assert second.stop_ids == first.stop_ids


def test_other_code_checks_itself_again(folder: Path, monkeypatch) -> None:
    logits(folder)
    checks = []
    monkeypatch.setattr(loading, "check", lambda *_: checks.append(1) or (0.0, 0.0))
    logits(folder)
    assert not checks
    monkeypatch.setattr(loading, "__version__", "another")
    logits(folder)
    assert checks


def test_a_changed_config_is_another_model(folder: Path) -> None:
    before = logits(folder)
    config = json.loads((folder / "config.json").read_text())
    config["rms_norm_eps"] = 0.5
    (folder / "config.json").write_text(json.dumps(config))
    assert not torch.equal(logits(folder), before)


@pytest.mark.parametrize("dtype", ["bfloat16", "int4"])
def test_the_blocks_of_a_loaded_model_have_shapes_only(folder: Path, dtype: str) -> None:
    backbone = offramp.load(str(folder), dtype)
    assert all(parameter.is_meta for parameter in backbone.model.parameters())
    assert backbone.device.type == "cpu"


def test_a_conversion_tells_its_progress(folder: Path) -> None:
    heard = []
    logits(folder, "int4", progress=lambda stage, done, total, note="": heard.append((stage, done, total)))
    assert [call for call in heard if call[0] == "converting"] == [("converting", n + 1, 7) for n in range(7)]
    assert heard[-1] == ("checking", 9, 9)
    heard.clear()
    logits(folder, "int4", progress=lambda *call: heard.append(call))
    assert not heard


def test_an_interrupted_conversion_leaves_nothing(folder: Path, own_cache: Path) -> None:
    def interrupt(stage: str, done: int, total: int, note: str = "") -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        logits(folder, progress=interrupt)
    assert conversions(own_cache) == []
    assert torch.isfinite(logits(folder)).all()
    assert len(conversions(own_cache)) == 1


def test_what_a_killed_conversion_left_is_removed_and_a_running_one_stays(folder: Path, own_cache: Path) -> None:
    for name in ("dead", "alive"):
        (own_cache / "formats" / f".{name}").mkdir(parents=True)
        (own_cache / "formats" / f".{name}" / store.LOCK).touch()
    with (own_cache / "formats" / ".alive" / store.LOCK).open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        logits(folder)
        assert not (own_cache / "formats" / ".dead").exists()
        assert (own_cache / "formats" / ".alive").exists()


def test_a_full_disk_gets_one_sentence_and_leaves_nothing(folder: Path, own_cache: Path, monkeypatch) -> None:
    write = Store._write

    def full(self: Store, part: str, made) -> None:
        write(self, part, made)
        if part == "2":
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Store, "_write", full)
    with pytest.raises(OfframpError, match="disk is full") as raised:
        logits(folder)
    assert "OFFRAMP_CACHE" in raised.value.hint
    assert conversions(own_cache) == []


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_cache_is_made_anew(folder: Path, own_cache: Path, damage: str) -> None:
    before = logits(folder)
    file = next((own_cache / "formats").glob("*/3.bin"))
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:-100] if damage == "cut" else bytes(len(content)))
    assert torch.equal(logits(folder), before)
    assert next((own_cache / "formats").glob("*/3.bin")).read_bytes() == content


def test_a_fingerprint_depends_on_the_weights_and_not_on_how_they_were_loaded(folder: Path, tmp_path) -> None:
    marks = {offramp.load(str(folder), dtype).source.fingerprint for dtype in ("float32", "bfloat16", "int4")}
    for dtype in (torch.float32, torch.bfloat16):
        shutil.rmtree(os.environ["OFFRAMP_CACHE"])
        marks.add(offramp.load(str(folder), str(dtype).removeprefix("torch."), keep=True).source.fingerprint)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        marks.add(offramp.wrap(model, byte_tokenizer()).source.fingerprint)
        model.save_pretrained(tmp_path / str(dtype), max_shard_size="40KB")
        byte_tokenizer().save_pretrained(tmp_path / str(dtype))
        marks.add(offramp.load(str(tmp_path / str(dtype)), "float32").source.fingerprint)
    marks.add(loading.outline(str(folder)).source.fingerprint)
    assert marks == {tiny("llama").source.fingerprint}
    assert tiny("llama", 1).source.fingerprint not in marks


def test_a_change_of_any_matrix_changes_the_fingerprint() -> None:
    model = tiny("llama").model
    before = fingerprint(model)
    for name, parameter in model.named_parameters():
        kept = parameter.clone()
        parameter += 0.1
        assert fingerprint(model) != before, name
        parameter.copy_(kept)
    assert fingerprint(model) == before


@pytest.mark.parametrize("shape", [(512, 64), (64, 512), (3000, 40, 4)])
def test_a_fingerprint_sees_changes_of_a_few_rows_or_columns(shape: tuple[int, ...]) -> None:
    model = torch.nn.Module()
    model.register_parameter("weight", torch.nn.Parameter(torch.zeros(shape), requires_grad=False))
    before, flat = fingerprint(model), model.weight.view(shape[0], -1)
    for part in range(16):
        for changed in (flat[part::16], flat[:, part::16]):
            changed += 1
            assert fingerprint(model) != before
            changed -= 1
    assert fingerprint(model) == before


def test_exits_of_earlier_versions_still_fit(folder: Path, tmp_path) -> None:
    for backbone in (offramp.load(str(folder), "float32"), tiny("llama")):
        exits = Exits.new(backbone, ExitsConfig((2,), gate_width=32, readout_width=32))
        del exits.backbone["fingerprint"]
        exits.backbone["sha256"] = backbone.source.sha256
        exits.save(tmp_path / "exits")
        assert len(Exits.load(tmp_path / "exits", backbone)) == 1
        with pytest.raises(ExitsMismatch):
            Exits.load(tmp_path / "exits", tiny("llama", 1))


def test_a_head_that_differs_from_the_embedding_it_should_be_tied_to_is_not_streamed(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tied = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    assert checkpoint_for(folder, tied) is None
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert checkpoint_for(folder, tied) is not None


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_torch_file_is_left_to_the_library(family: str, tmp_path, own_cache) -> None:
    folder = saved(tiny(family), tmp_path / "model")
    wanted = logits(folder)
    torch.save(tiny(family).model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert checkpoint_for(folder, tiny(family).model) is None
    torch.testing.assert_close(logits(folder), wanted, rtol=1e-5, atol=1e-5)
    assert offramp.load(str(folder), "float32").source.fingerprint == tiny(family).source.fingerprint


def test_rows_of_a_file_are_rows_of_its_tensors(folder: Path) -> None:
    checkpoint, model = Safetensors([folder / "model.safetensors"]), tiny("llama").model
    for name, parameter in model.named_parameters():
        assert checkpoint.shapes[name] == tuple(parameter.shape)
        assert torch.equal(checkpoint.rows(name, 3, 9), parameter[3:9])
        assert torch.equal(checkpoint.entries(name, torch.tensor([3, 0, 9])), parameter.flatten()[[3, 0, 9]])


def test_gguf_rows_have_the_librarys_names_order_and_values(tmp_path) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quantize

    model = tiny("llama").model
    weights = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    queries = weights["model.layers.0.self_attn.q_proj.weight"]
    turned = queries.reshape(4, 2, 4, 32).swapaxes(1, 2).reshape(32, 32)  # llama.cpp's order of a head's rows
    packed = quantize(weights["model.embed_tokens.weight"], GGMLQuantizationType.Q8_0)
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("blk.0.attn_q.weight", np.ascontiguousarray(turned))
    writer.add_tensor("token_embd.weight", packed, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = Gguf(tmp_path / "x.gguf", model)
    wanted = {
        "model.layers.0.self_attn.q_proj.weight": queries,
        "model.embed_tokens.weight": dequantize(packed, GGMLQuantizationType.Q8_0),
        "model.norm.weight": weights["model.norm.weight"],
    }
    assert checkpoint.shapes == {name: value.shape for name, value in wanted.items()}
    for name, value in wanted.items():
        for start, stop in ((0, 7), (5, 32)):
            assert torch.equal(checkpoint.rows(name, start, stop), torch.from_numpy(value[start:stop].copy())), name
        places = torch.arange(0, value.size, 5).flip(0)
        assert torch.equal(checkpoint.entries(name, places), torch.from_numpy(value.flatten()[places])), name


def test_large_tensors_are_read_in_pieces() -> None:
    tensor = torch.randn(1030, PIECE // 512)
    pieces = list(Values().pieces(tensor))
    assert len(pieces) == 3
    assert all(piece.numel() <= PIECE for _, _, piece in pieces)
    assert torch.equal(torch.cat([piece for _, _, piece in pieces]), tensor)


def test_a_store_makes_tensors_once_and_a_damaged_one_again(tmp_path) -> None:
    calls = []

    def make():
        calls.append(1)
        return Int8.tensors(torch.ones(4, 8))

    for _ in range(2):
        kept = Store(tmp_path / "x")
        assert kept.part("0", lambda get: get("qkv", make))["w"].shape == (4, 8)
        kept.finish()
    assert len(calls) == 1
    file = tmp_path / "x" / "0.bin"
    file.write_bytes(file.read_bytes()[:40])
    assert Store(tmp_path / "x").part("0", lambda get: get("qkv", make))["w"].shape == (4, 8)
    assert len(calls) == 2


def test_of_two_conversions_at_once_the_first_is_kept(tmp_path) -> None:
    first, second = Store(tmp_path / "x"), Store(tmp_path / "x")
    for n, kept in enumerate((first, second)):
        kept.part("0", lambda get, n=n: get("a", lambda: {"": torch.tensor([n])}))
    first.finish()
    second.finish()
    second.note("a check", (0.0, 0.1))
    third = Store(tmp_path / "x")
    assert third.complete
    assert third.passed("a check") == (0.0, 0.1)
    assert third.part("0", lambda get: get("a", dict))[""].tolist() == [0]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_mapped_tensors_begin_at_cache_lines_and_a_change_stays_in_the_process(tmp_path) -> None:
    kept = Store(tmp_path / "x")

    def build(get):
        return [get(str(n), lambda n=n: {"": torch.full((n,), float(n))})[""] for n in (3, 5, 17)]

    tensors = kept.part("0", build)
    kept.finish()
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)
    tensors[0] += 1
    assert Store(tmp_path / "x").part("0", build)[0].tolist() == [3.0, 3.0, 3.0]


PEAK = """
import resource, sys
import torch, offramp.model.loading, transformers.models.llama.modeling_llama
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
backbone = offramp.load(sys.argv[1], sys.argv[2])
backbone.forward(torch.arange(16)[None])
runtime = backbone.runtime
weights = sum(map(runtime.block_bytes, range(backbone.n_blocks))) + runtime.head_bytes() + runtime.embedding.nbytes
print(peak() - before, weights)
"""


def test_loading_takes_little_more_memory_than_the_weights_in_their_format(tmp_path, own_cache) -> None:
    """100 million parameters, which take 400 MB in float32 and 200 MB in the file."""
    config = transformers.LlamaConfig(
        **SMALL
        | {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "initializer_range": 0.02}
        | {"vocab_size": 8192},
        tie_word_embeddings=False,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert model.num_parameters() > 100e6
    model.save_pretrained(tmp_path / "model", max_shard_size="60MB")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    del model
    for dtype in ("int4", "int4", "bfloat16"):
        command = [sys.executable, "-c", PEAK, str(tmp_path / "model"), dtype]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        used, weights = map(int, shown.split())
        assert used <= 1.15 * weights + 150e6, (dtype, used, weights)
