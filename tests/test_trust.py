"""What comes from strangers replaces no other model's weights, and runs no code."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import stat
from pathlib import Path

import pytest
import torch
import transformers

import offramp
from helpers import modest_exits, run_cli
from models import byte_tokenizer, saved, tiny
from offramp import Exits
from offramp.errors import CorruptFile, ModelNotFound, OfframpError, UnsupportedModel
from offramp.files import cache_folder, sha256_of
from offramp.model import hub, loading
from offramp.model.checkpoint import INDEX, RECORD, WHOLE, weights_in
from offramp.model.hub import resolve
from offramp.training.loop import Budget, Fit

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
IDS = torch.arange(40, 52)[None]
ROOT = Path(__file__).parent.parent


@torch.inference_mode()
def logits(folder: Path) -> torch.Tensor:
    return offramp.load(str(folder), "float32").backbone.forward(IDS)


@pytest.fixture
def honest(tmp_path: Path, own_cache: Path) -> Path:
    return saved(tiny("llama"), tmp_path / "honest")


@pytest.fixture
def strange(tmp_path: Path, own_cache: Path) -> Path:
    """A stranger's folder, with other weights of the same shape."""
    return saved(tiny("llama", 1), tmp_path / "strange")


def test_a_folder_does_not_say_itself_which_weights_it_has(honest: Path, strange: Path) -> None:
    wanted = tiny("llama").forward(IDS)
    (strange / RECORD).write_text(json.dumps({"sha256": resolve(str(honest)).sha256}))
    assert not torch.allclose(logits(strange), wanted, atol=1e-3)
    assert torch.allclose(logits(honest), wanted, atol=1e-3)


def test_a_folder_does_not_send_to_another_file(honest: Path, strange: Path) -> None:
    (honest / "x.gguf").write_bytes(b"GGUF")
    (strange / RECORD).write_text(json.dumps({"gguf": str(honest / "x.gguf"), "sha256": "0" * 64}))
    assert torch.allclose(logits(strange), tiny("llama", 1).forward(IDS), atol=1e-3)
    (strange / WHOLE).unlink()
    with pytest.raises(ModelNotFound, match="no weights"):
        resolve(str(strange))


def test_a_config_does_not_change_what_is_known_of_the_same_weights(honest: Path, tmp_path) -> None:
    shorter = shutil.copytree(honest, tmp_path / "shorter")
    config = json.loads((shorter / "config.json").read_text())
    (shorter / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    assert logits(shorter).shape == logits(honest).shape
    assert offramp.load(str(honest), "float32").backbone.source.fingerprint == tiny("llama").source.fingerprint


def test_mixers_belong_to_an_alias(tmp_path, own_cache, monkeypatch) -> None:
    (tmp_path / hub.MIXERS).write_bytes(b"")
    monkeypatch.setattr(hub, "base_of", lambda file: "org/name")
    with pytest.raises(ModelNotFound, match="'org/name', which is not an alias"):
        resolve(str(tmp_path))


def test_a_gguf_file_is_described_by_nothing_that_lies_beside_it(tmp_path, own_cache, monkeypatch) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    given = []

    def describe(folder, **settings):
        given.extend(Path(folder).iterdir())
        raise ValueError("that will do")

    monkeypatch.setattr(hub, "read_gguf", lambda file: ("llama", {}))
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", describe)
    with pytest.raises(CorruptFile, match="that will do"):
        resolve(str(tmp_path / "x.gguf"))
    assert given == []


@pytest.mark.parametrize("named", ["../honest/model.safetensors", "sub/x.safetensors", "..", 3])
def test_an_index_names_files_beside_it_only(named, honest: Path, strange: Path) -> None:
    (strange / WHOLE).unlink()
    (strange / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": named}}))
    with pytest.raises(CorruptFile, match="must name the files of weights"):
        resolve(str(strange))


def test_the_hash_is_that_of_the_files_that_are_read(honest: Path, tmp_path) -> None:
    sharded = tmp_path / "sharded"
    tiny("llama").model.save_pretrained(sharded, max_shard_size="40KB")
    byte_tokenizer().save_pretrained(sharded)
    before, shards = resolve(str(sharded)).sha256, weights_in(sharded)
    (sharded / "stray.safetensors").write_bytes(b"stray")
    assert resolve(str(sharded)).sha256 == before == sha256_of(*shards)
    shards[0].rename(tmp_path / "gone")
    with pytest.raises(CorruptFile, match=f"not complete: there is no .*{shards[0].name}"):
        resolve(str(sharded))
    shutil.copy(honest / WHOLE, sharded)  # which the library prefers to an index
    assert weights_in(sharded) == [sharded / WHOLE]
    assert resolve(str(sharded)).sha256 == resolve(str(honest)).sha256


def test_the_library_too_reads_only_the_files_of_the_hash(honest: Path, strange: Path, monkeypatch) -> None:
    shutil.copy(honest / WHOLE, strange / "other.safetensors")
    config = json.loads((strange / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    (strange / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(honest)}))
    monkeypatch.setattr(loading, "checkpoint_for", lambda *_: None)  # as for weights that the library must convert
    assert torch.allclose(logits(strange), tiny("llama", 1).forward(IDS), atol=1e-3)


def test_a_file_of_the_same_size_and_time_is_not_taken_for_the_one_before(tmp_path, own_cache) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    before, times = sha256_of(file), file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert sha256_of(file) != before


def test_a_new_cache_folder_is_its_owners_only(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path / "new" / "cache"))
    assert stat.S_IMODE(cache_folder().stat().st_mode) == 0o700


@pytest.mark.parametrize("part", ["config", "tokenizer"])
def test_code_that_comes_with_a_model_is_not_run_even_if_the_user_says_yes(part: str, honest: Path, tmp_path) -> None:
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n"
    (honest / "evil.py").write_text(code)
    file = honest / ("config.json" if part == "config" else "tokenizer_config.json")
    changed = {
        "config": {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}},
        "tokenizer": {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}},
    }
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed[part]}))
    ran = run_cli("generate", str(honest), "Hello", "--max-tokens", "1", stdin="y\ny\ny\n")
    assert not (tmp_path / "ran").exists()
    if part == "config":  # a tokenizer of its own is not needed: the library has one for this family
        assert ran.code == 1
        assert "code of its own, and offramp runs no code that comes with a model" in ran.stderr
        for way in (loading.load, loading.outline):
            with pytest.raises(UnsupportedModel, match="code of its own"):
                way(str(honest))


@pytest.mark.parametrize("folder", ["src", "lm", "hybrid", "benchmarks"])
def test_no_call_lets_the_library_run_a_models_code(folder: str) -> None:
    calls = [
        (file.name, node.lineno, {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords})
        for file in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("from_pretrained", "from_config")
        and ast.unparse(node.func.value) not in ("GenerationConfig", "Exits")  # these have no code
    ]
    assert [call for call in calls if call[2].get("trust_remote_code") != "False"] == []
    assert folder == "hybrid" or calls


class Evil:
    """A pickle that makes a file when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_a_checkpoint_of_a_training_runs_no_code(tmp_path) -> None:
    layer = torch.nn.Linear(2, 1)

    def loss_of(batch: list[int], step: int):
        loss = layer(torch.ones(len(batch), 2)).square().mean()
        return loss, [loss]

    def fit(steps: int) -> Fit:
        made = Fit(tmp_path / "work", torch.device("cpu"), batch=2)
        made.run("stage", layer, range(8), Budget(steps), 1e-3, loss_of)
        return made

    first = fit(2).curve
    checkpoint, evil = next((tmp_path / "work").rglob("step-*")), pickle.dumps(Evil(tmp_path / "ran"))
    assert fit(2).curve == first  # from the checkpoint
    for name in ("custom_checkpoint_0.pkl", "optimizer.bin"):  # accelerate would read the first as any pickle
        (checkpoint / name).write_bytes(evil)
        with pytest.raises(CorruptFile, match="is damaged"):
            fit(4)
        (checkpoint / name).unlink()
        assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["gate", "readout"])
def test_exits_name_no_code(kind: str, tmp_path) -> None:
    modest_exits("llama").save(tmp_path)
    record = json.loads((tmp_path / "offramp.json").read_text())
    record["config"][kind] = "os.system"
    (tmp_path / "offramp.json").write_text(json.dumps(record))
    with pytest.raises(OfframpError, match=r"no .* 'os\.system'"):
        Exits.load(tmp_path, tiny("llama"))
