"""Weights are streamed: converted a piece at a time, kept in the cache in their format, and mapped from there."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import offramp
from models import SMALL, byte_tokenizer, saved, tiny
from offramp import files
from offramp.errors import CorruptFile, OfframpError
from offramp.files import write_atomically
from offramp.model import fingerprints, loading, selfcheck, store
from offramp.model.checkpoint import PIECE, Gguf, Safetensors, Values, checkpoint_for, fingerprint
from offramp.model.compiled.weights import Int8
from offramp.model.families import FAMILIES
from offramp.model.store import Store

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
IDS = torch.arange(40, 52)[None]


@pytest.fixture
def folder(tmp_path: Path, own_cache: Path) -> Path:
    return saved(tiny("llama"), tmp_path / "model")


def conversions(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "formats").glob("*") if path.name != store.LOCK)


@torch.inference_mode()
def logits(folder: Path, dtype: str = "float32", **kwargs) -> torch.Tensor:
    return offramp.load(str(folder), dtype, **kwargs).backbone.forward(IDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_librarys_model_is_what_the_library_would_load(family: str, dtype: torch.dtype, tmp_path, own_cache) -> None:
    folder = saved(tiny(family), tmp_path / "model")
    implementation = FAMILIES[family].implementation
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=implementation)
    ours = offramp.load(str(folder), str(dtype).removeprefix("torch."), keep=True).backbone.model
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
    first = offramp.load(str(folder), "bfloat16").backbone
    monkeypatch.setattr(loading, "checkpoint_for", lambda *_: pytest.fail("the weights were read again"))
    monkeypatch.setattr(loading, "check", lambda *_: pytest.fail("the self-check ran again"))
    second = offramp.load(str(folder), "bfloat16").backbone
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
    backbone = offramp.load(str(folder), dtype).backbone
    assert all(parameter.is_meta for parameter in backbone.model.parameters())
    assert backbone.device.type == "cpu"


def test_a_conversion_tells_its_progress(folder: Path) -> None:
    heard = []
    logits(folder, "int4", progress=lambda stage, done, total, note="": heard.append((stage, done, total)))
    assert [call for call in heard if call[0] == "converting"] == [("converting", n + 1, 7) for n in range(7)]
    assert [call for call in heard if call[0] == "reading"] == [("reading", n + 1, 9) for n in range(9)]
    assert heard[-1] == ("checking", 9, 9)
    heard.clear()
    logits(folder, "int4", progress=lambda *call: heard.append(call))
    assert not heard


def changed_names(folder: Path) -> None:
    """Make the model one that the library must convert: its tensors have other names than the library's."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("lost", ["verdict", "fingerprint"])
def test_a_model_that_is_not_streamed_loads_again_after_an_upgrade(folder: Path, own_cache: Path, lost: str) -> None:
    changed_names(folder)
    assert checkpoint_for(folder, tiny("llama").model) is None
    first = offramp.load(str(folder), "bfloat16").backbone
    if lost == "verdict":
        record = next((own_cache / "formats").glob("*/record.json"))
        record.write_text(json.dumps(json.loads(record.read_text()) | {"checks": {}}))
    else:
        (own_cache / "fingerprints.json").unlink()
    again = offramp.load(str(folder), "bfloat16").backbone
    assert again.source.fingerprint == first.source.fingerprint
    assert first.source.fingerprint
    assert all(parameter.is_meta for parameter in again.model.parameters())


def test_a_fingerprint_of_an_earlier_kind_is_made_again(folder: Path, own_cache: Path) -> None:
    wanted = offramp.load(str(folder), "float32").backbone.source
    (own_cache / "fingerprints.json").write_text(json.dumps({wanted.sha256: "old"}))
    assert offramp.load(str(folder), "float32").backbone.source.fingerprint == wanted.fingerprint


def test_the_self_check_is_repeated_when_the_code_has_changed(folder: Path, monkeypatch) -> None:
    logits(folder)
    checks = []
    monkeypatch.setattr(loading, "check", lambda *_: checks.append(1) or (0.0, 0.0))
    monkeypatch.setattr(loading, "code_hash", lambda: "other code")
    logits(folder)
    assert checks


def test_the_hash_of_the_code_covers_the_runtime(tmp_path, monkeypatch) -> None:
    copy = tmp_path / "model"
    shutil.copytree(Path(selfcheck.__file__).parent, copy)
    monkeypatch.setattr(selfcheck, "__file__", str(copy / "selfcheck.py"))
    same = selfcheck.code_hash.__wrapped__()
    (copy / "compiled" / "blocks.py").open("a").write("# changed")
    assert selfcheck.code_hash.__wrapped__() != same


def test_an_interrupted_conversion_leaves_nothing(folder: Path, own_cache: Path) -> None:
    def interrupt(stage: str, done: int, total: int, note: str = "") -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        logits(folder, progress=interrupt)
    assert conversions(own_cache) == []
    assert torch.isfinite(logits(folder)).all()
    assert len(conversions(own_cache)) == 1


def test_a_conversion_interrupted_while_its_files_are_mapped_leaves_nothing(folder: Path, own_cache, monkeypatch) -> None:
    mapped = Store._mapped

    def interrupt(self: Store, part: str):
        if part == "2":
            raise KeyboardInterrupt
        return mapped(self, part)

    monkeypatch.setattr(Store, "_mapped", interrupt)
    with pytest.raises(KeyboardInterrupt):
        logits(folder)
    assert conversions(own_cache) == []


def test_a_conversion_that_the_end_of_the_process_cuts_off_leaves_nothing(tmp_path) -> None:
    code = """
import sys, torch
from pathlib import Path
from offramp.model.store import Store
kept = Store(Path(sys.argv[1]))
kept.part("0", lambda get: get("a", lambda: {"": torch.ones(3)}))
print(len([path for path in Path(sys.argv[1]).parent.iterdir() if path.is_dir()]))
"""
    shown = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "1"
    assert [path.name for path in tmp_path.iterdir()] == [store.LOCK]


def test_what_a_killed_conversion_left_is_removed_and_a_running_one_stays(folder: Path, own_cache: Path) -> None:
    logits(folder)
    for name in ("dead", "alive", "cut off at once"):
        (own_cache / "formats" / f".{name}").mkdir()
        if name != "cut off at once":
            (own_cache / "formats" / f".{name}" / store.LOCK).touch()
    with (own_cache / "formats" / ".alive" / store.LOCK).open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        logits(folder)  # it is enough that a model is loaded
        assert [name for name in conversions(own_cache) if name.startswith(".")] == [".alive"]


def test_weights_that_nobody_loads_for_long_are_removed(folder: Path, own_cache: Path) -> None:
    logits(folder)
    (name,) = conversions(own_cache)
    other, old = own_cache / "formats" / "other", time.time() - store.UNUSED - 9
    shutil.copytree(own_cache / "formats" / name, other)
    for place in (own_cache / "formats" / name, other):
        os.utime(place / store.RECORD, (old, old))
    logits(folder)
    assert conversions(own_cache) == [name]


def test_a_full_disk_gets_one_sentence_and_leaves_nothing(folder: Path, own_cache: Path, monkeypatch) -> None:
    write = Store._write

    def full(self: Store, part: str, made) -> None:
        write(self, part, made)
        if part == "2":
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Store, "_write", full)
    with pytest.raises(OfframpError, match=r"disk with the cache folder .* is full") as raised:
        logits(folder)
    assert "OFFRAMP_CACHE" in raised.value.hint
    assert conversions(own_cache) == []


def test_a_cache_folder_that_cannot_be_written_gets_one_sentence(folder: Path, own_cache: Path, monkeypatch) -> None:
    def denied(**where) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(where["dir"]))

    monkeypatch.setattr(store.tempfile, "mkdtemp", denied)
    with pytest.raises(OfframpError, match=r"cache folder .* cannot be used: Permission denied") as raised:
        logits(folder)
    assert not isinstance(raised.value, CorruptFile)
    assert "OFFRAMP_CACHE" in raised.value.hint


def test_a_model_that_may_not_be_read_is_not_taken_for_a_cache_that_may_not_be_written(folder: Path, monkeypatch) -> None:
    def denied(self: Safetensors, name: str, start: int, stop: int) -> torch.Tensor:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder / "model.safetensors"))

    monkeypatch.setattr(Safetensors, "rows", denied)
    with pytest.raises(CorruptFile, match="Permission denied"):
        logits(folder)


def test_a_full_disk_stops_no_load_once_the_weights_are_converted(folder: Path, own_cache: Path, monkeypatch) -> None:
    def full(path: Path, content: bytes) -> None:
        if path.parent.name.startswith(".") and path.name == "record.json":  # of a conversion
            return write_atomically(path, content)
        raise OSError(errno.ENOSPC, "No space left on device")

    for module in (files, fingerprints, loading, store):
        monkeypatch.setattr(module, "write_atomically", full)
    assert torch.isfinite(logits(folder)).all()
    assert not (own_cache / "fingerprints.json").exists()
    assert "checks" not in json.loads(next((own_cache / "formats").glob("*/record.json")).read_text())


@pytest.mark.parametrize("lost", ["key", "part"])
def test_a_cache_that_lacks_a_tensor_is_named(folder: Path, lost: str, own_cache) -> None:
    logits(folder)
    file = next((own_cache / "formats").glob("*/record.json"))
    record = json.loads(file.read_text())
    record["parts"]["3"].popitem() if lost == "key" else record["parts"].pop("3")
    file.write_text(json.dumps(record))
    with pytest.raises(CorruptFile, match="lack a tensor") as caught:
        logits(folder)
    assert caught.value.hint


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
    marks = {offramp.load(str(folder), dtype).backbone.source.fingerprint for dtype in ("float32", "bfloat16", "int4")}
    for dtype in (torch.float32, torch.bfloat16):
        shutil.rmtree(os.environ["OFFRAMP_CACHE"])
        marks.add(offramp.load(str(folder), str(dtype).removeprefix("torch."), keep=True).backbone.source.fingerprint)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        marks.add(offramp.wrap(model, byte_tokenizer()).backbone.source.fingerprint)
        model.save_pretrained(tmp_path / str(dtype), max_shard_size="40KB")
        byte_tokenizer().save_pretrained(tmp_path / str(dtype))
        marks.add(offramp.load(str(tmp_path / str(dtype)), "float32").backbone.source.fingerprint)
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


def test_a_head_that_differs_from_the_embedding_it_should_be_tied_to_is_not_streamed(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tied = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    assert checkpoint_for(folder, tied) is None
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert checkpoint_for(folder, tied) is not None


def test_a_pickle_is_never_read(tmp_path, own_cache) -> None:
    folder = saved(tiny("llama"), tmp_path / "model")
    (folder / "pytorch_model.bin").write_bytes(b"no pickle: reading it would fail")
    wanted = logits(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CorruptFile, match="pickles") as raised:
        offramp.load(str(folder), "float32")
    assert "safetensors" in raised.value.hint
    assert wanted.isfinite().all()


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
    assert {path.name for path in tmp_path.iterdir()} == {"x", store.LOCK}


def test_a_check_is_added_to_the_record_that_is_there_now(tmp_path) -> None:
    first = Store(tmp_path / "x")
    first.part("0", lambda get: get("a", lambda: {"": torch.ones(3)}))
    first.finish()
    second = Store(tmp_path / "x")
    first.note("one", (0.0, 0.1))
    second.note("two", (0.2, 0.3))
    assert (Store(tmp_path / "x").passed("one"), Store(tmp_path / "x").passed("two")) == ((0.0, 0.1), (0.2, 0.3))
    (tmp_path / "x" / "0.bin").unlink()  # another process makes it again, from a file of another time
    third = Store(tmp_path / "x")
    third.part("0", lambda get: get("a", lambda: {"": torch.ones(3)}))
    third.finish()
    first.note("three", (0.0, 0.1))
    assert Store(tmp_path / "x").complete


def test_a_conversion_gets_its_name_while_no_other_does(tmp_path, monkeypatch) -> None:
    kept = Store(tmp_path / "x")
    kept.part("0", lambda get: get("a", lambda: {"": torch.ones(3)}))
    complete = store._complete

    def looked(folder: Path):
        with (tmp_path / store.LOCK).open("ab") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return complete(folder)

    monkeypatch.setattr(store, "_complete", looked)
    kept.finish()
    kept.note("a check", (0.0, 0.1))
    monkeypatch.undo()
    assert Store(tmp_path / "x").passed("a check") == (0.0, 0.1)


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
import sys
import torch, offramp.model.loading, transformers.models.llama.modeling_llama
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
from offramp.machine import peak_memory, spare_memory
spare_memory()  # as the command line does
before = peak_memory()
backbone = offramp.load(sys.argv[1], sys.argv[2]).backbone
backbone.forward(torch.arange(16)[None])
runtime = backbone.runtime
weights = sum(map(runtime.block_bytes, range(backbone.n_blocks))) + runtime.head_bytes() + runtime.embedding.nbytes
print(peak_memory() - before, weights)
"""


def test_loading_takes_little_more_memory_than_the_weights_in_their_format(tmp_path, own_cache) -> None:
    """60 million parameters, which take 240 MB in float32 and 120 MB in the file."""
    config = transformers.LlamaConfig(
        **SMALL
        | {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "initializer_range": 0.02}
        | {"vocab_size": 8192, "num_hidden_layers": 3},
        tie_word_embeddings=False,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert model.num_parameters() > 60e6
    model.save_pretrained(tmp_path / "model", max_shard_size="60MB")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    del model
    for dtype in ("int4", "int4", "bfloat16"):
        command = [sys.executable, "-c", PEAK, str(tmp_path / "model"), dtype]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        used, weights = map(int, shown.split())
        assert used <= 1.15 * weights + 150e6, (dtype, used, weights)


@pytest.mark.parametrize("end", ["x", [2, "x"], [[2]], 10**30, -2, True])
def test_an_end_that_is_no_token_is_refused(end, tmp_path, own_cache) -> None:
    folder = saved(tiny("llama"), tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    with pytest.raises(CorruptFile):
        offramp.load(str(folder), "float32")
