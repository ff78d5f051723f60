"""What was saved survives a crash: it is on the disk before it has its name, and two files that belong together say so."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import offramp
from helpers import modest_exits, run_cli
from models import saved, tiny
from offramp import Exits, TrainConfig, files
from offramp.errors import BadInput, CorruptFile
from offramp.exits import format as artefact
from offramp.exits.exit_set import ExitSet
from offramp.exits.format import RECORD, WEIGHTS
from offramp.exits.sharing import export
from offramp.files import alone_in, new_folder, write_atomically
from offramp.training.loop import Budget, Fit


class Disk:
    """What was asked of the disk: ("sync", inode) and ("name", path), in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, object]] = []
        sync, name = os.fsync, os.replace

        def fsync(handle: int) -> None:
            self.asked.append(("sync", os.fstat(handle).st_ino))
            sync(handle)

        def replace(made, place) -> None:
            self.asked.append(("name", Path(place)))
            name(made, place)

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "replace", replace)
        monkeypatch.setattr(os, "rename", lambda *_: pytest.fail("named in another way"))

    def holds(self, place: Path) -> bool:
        """Whether the content of a file or folder was synced, then it got its name, and then its folder was synced."""
        named = max(number for number, asked in enumerate(self.asked) if asked == ("name", place))
        before, after = self.asked[:named], self.asked[named:]
        content = [path.stat().st_ino for path in (place, *place.rglob("*"))]
        return all(("sync", inode) in before for inode in content) and ("sync", place.parent.stat().st_ino) in after


@pytest.fixture
def disk(monkeypatch) -> Disk:
    return Disk(monkeypatch)


def test_a_file_is_on_the_disk_before_its_name_is(tmp_path, disk: Disk) -> None:
    write_atomically(tmp_path / "file", b"new")
    assert disk.holds(tmp_path / "file")


def test_a_folder_is_on_the_disk_before_it_takes_the_place_of_another(tmp_path, disk: Disk) -> None:
    for content in ("old", "new"):
        with new_folder(tmp_path / "folder") as made:
            (made / content).mkdir()
            (made / content / "file").write_text(content)
        assert disk.holds(tmp_path / "folder")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["new"]
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "folder") as made:
        (made / "half" / "made").write_text("")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


@pytest.mark.parametrize("late", [False, True], ids=["made before", "made while ours is written to the disk"])
def test_a_folder_that_another_process_made_meanwhile_stays(tmp_path, monkeypatch, late) -> None:
    place = tmp_path / "folder"

    def other(*_: object) -> None:
        place.mkdir(exist_ok=True)
        (place / "record").write_text("theirs")

    if late:
        monkeypatch.setattr("offramp.files._sync", other)
    with new_folder(place, "record") as made:
        (made / "record").write_text("ours")
        if not late:
            other()
    assert (place / "record").read_text() == "theirs"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_converted_weights_are_on_the_disk_before_they_count(tmp_path, own_cache, disk: Disk) -> None:
    offramp.load(str(saved(tiny("llama"), tmp_path / "model")), "float32")
    (folder,) = (path for path in (own_cache / "formats").iterdir() if path.is_dir())
    named = disk.asked.index(("name", folder))
    assert all(("sync", path.stat().st_ino) in disk.asked[:named] for path in folder.glob("*.bin"))
    assert ("sync", folder.parent.stat().st_ino) in disk.asked[named:]


def test_a_checkpoint_is_on_the_disk_before_the_one_before_it_goes(tmp_path, disk: Disk) -> None:
    layer = torch.nn.Linear(2, 1)

    def loss_of(batch: list[int], step: int):
        loss = layer(torch.ones(len(batch), 2)).square().mean()
        return loss, [loss]

    Fit(tmp_path, torch.device("cpu"), batch=2).run("stage", layer, range(8), Budget(2), 1e-3, loss_of)
    (checkpoint,) = (tmp_path / "stage").iterdir()
    assert disk.holds(checkpoint)


def test_exits_and_an_export_are_on_the_disk(tmp_path, disk: Disk) -> None:
    exits = modest_exits("llama")
    export(ExitSet(exits, exits), tmp_path / "made", tiny("llama"))
    for name in (RECORD, WEIGHTS, f"draft/{RECORD}", f"draft/{WEIGHTS}", "README.md", "custom_generate/generate.py"):
        assert disk.holds(tmp_path / "made" / name)


def test_a_crash_while_exits_are_saved_leaves_no_pair_that_loads_as_another(tmp_path, monkeypatch) -> None:
    modest_exits("llama", 1).save(tmp_path)
    written = []

    def crash_at_the_second(path: Path, content: bytes) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write_atomically(path, content)

    monkeypatch.setattr(artefact, "write_atomically", crash_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        modest_exits("llama", 2).save(tmp_path)
    assert written
    with pytest.raises(CorruptFile, match=r"or does not belong to .* beside it") as raised:
        Exits.load(tmp_path, tiny("llama"))
    assert raised.value.hint


def test_weights_of_other_exits_are_refused(tmp_path) -> None:
    for seed in (1, 2):
        modest_exits("llama", seed).save(tmp_path / str(seed))
    (tmp_path / "1" / WEIGHTS).write_bytes((tmp_path / "2" / WEIGHTS).read_bytes())
    with pytest.raises(CorruptFile, match="or does not belong to"):
        Exits.load(tmp_path / "1", tiny("llama"))


def test_two_commands_are_not_at_work_in_one_folder(tmp_path, monkeypatch) -> None:
    with alone_in(tmp_path / "folder"):
        with pytest.raises(BadInput, match="Another command is at work in") as raised, alone_in(tmp_path / "folder"):
            pass
        assert raised.value.hint
        with alone_in(tmp_path / "other"):
            pass
    with alone_in(tmp_path / "folder"):
        pass
    assert list((tmp_path / "folder").iterdir()) == []
    monkeypatch.setattr(files, "fcntl", None)  # as on Windows
    with alone_in(tmp_path / "folder"), alone_in(tmp_path / "folder"):
        pass


def test_a_lock_that_was_removed_after_it_was_opened_does_not_count(tmp_path, monkeypatch) -> None:
    lock = files.fcntl.flock

    def removed_meanwhile(held, how: int) -> None:
        (tmp_path / ".lock").unlink()
        lock(held, how)

    monkeypatch.setattr(files.fcntl, "flock", removed_meanwhile)
    with pytest.raises(BadInput, match="at work"), alone_in(tmp_path):
        pass


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_training_and_calibrating_refuse_a_folder_that_is_in_use(tmp_path, own_cache) -> None:
    model, folder = saved(tiny("llama"), tmp_path / "model"), tmp_path / "exits"
    (tmp_path / "prompts.txt").write_text("".join(f"Say {number}.\n" for number in range(8)))
    modest_exits("llama").save(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with alone_in(folder):
        with pytest.raises(BadInput, match="at work in"):
            offramp.train(tiny("llama"), folder, TrainConfig(prompts=str(tmp_path / "prompts.txt"), epochs=1))
        for output in (["--exits", str(folder)], ["--exits", str(folder), "-o", str(folder)]):
            prompts = ["--prompts", str(tmp_path / "prompts.txt"), "--dtype", "float32"]
            ran = run_cli("calibrate", str(model), *prompts, *output)
            assert ran.code == 1
            assert "Another command is at work in" in ran.stderr
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
