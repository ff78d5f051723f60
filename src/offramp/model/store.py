"""Tensors in the format that they run in, kept in a folder of the cache and mapped into memory.

A conversion fills a temporary folder beside it, one file for each part of the model, and renames it when all parts are
on the disk. Its files are plain: each tensor begins at a multiple of 64 bytes, so that the compiled code reads whole cache
lines. `record.json` says what is where. It also says which self-checks the tensors have passed, and what the format
changes.

A lock beside the folders is held while one of them begins, gets its name, or changes its record. A temporary folder has its
own lock, which tells that its conversion runs. Where the system has no such locks, as on Windows, nothing is kept.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar

import torch
from torch import Tensor

from offramp.errors import CorruptFile, OfframpError
from offramp.files import cache_folder, in_the_cache, put, read_json, sha256_of_text, write_atomically
from offramp.progress import Progress, silent

try:
    import fcntl
except ModuleNotFoundError:  # Windows: no locks of this kind, so nothing is kept, and weights are converted each time
    fcntl = None  # type: ignore[assignment]

Tensors = dict[str, Tensor]
Get = Callable[[str, Callable[[], Tensors]], Tensors]  # (key, what makes the tensors) → the tensors under that key
Built = TypeVar("Built")

LAYOUT = 7  # raise it when what is kept under a key changes
ALIGNED = 64
UNUSED = 30 * 24 * 3600  # seconds; what nobody has loaded for so long is removed
RECORD, LOCK = "record.json", ".lock"


class Store:
    """A model's converted tensors, made once. Without a folder, nothing is kept.

    `parts` is the number of parts that the model has, for the progress. Tensors are put on `device`. Parts of up to `held`
    bytes in all are read into memory and stay there, the first ones first; the others are mapped.
    """

    def __init__(
        self,
        folder: Path | None = None,
        device: torch.device | None = None,
        parts: int = 0,
        progress: Progress = silent,
        held: int = 0,
    ) -> None:
        self.device = device or torch.device("cpu")
        self._room = held
        self._folder, self._parts, self._progress = folder, parts, progress
        record = _complete(folder) if folder else None
        self.complete = record is not None
        self._record: dict[str, Any] = record or {"parts": {}}
        self._unfinished: Path | None = None  # the temporary folder
        self._discard: Callable[[], Any] = lambda: None  # removes the temporary folder, at the latest when the process ends
        self._maps: list[mmap.mmap] = []
        if folder and folder.parent.is_dir():
            with suppress(OSError):  # a cache that cannot be written to can still be read
                if self.complete:
                    os.utime(folder / RECORD)
                _sweep(folder.parent)

    @classmethod
    def of(cls, sha256: str, config: Path, kind: str, **settings: Any) -> Store:
        """The store of a model, named by its weights' hash and its config, in one format. `settings`: the constructor's."""
        if fcntl is None:
            return cls(**settings)
        key = sha256_of_text(f"{LAYOUT} {sha256} {config.read_text('utf-8')}")[:16]
        return cls(cache_folder() / "formats" / f"{key}-{kind}", **settings)

    def part(self, name: str, build: Callable[[Get], Built]) -> Built:
        """The result of `build` for one part. `build` gets a function, and asks it for all tensors of the part by key.

        A key's tensors come from the part's file. If there is none yet, `build` runs twice: the first run makes the
        tensors, and the second gets them mapped. Raises `OfframpError` where the cache cannot be written.
        """
        with self._discarded_if_it_fails():
            if not self.complete:
                made: dict[str, Tensors] = {}

                def make(key: str, tensors: Callable[[], Tensors]) -> Tensors:
                    made[key] = tensors()
                    if self._folder is None:
                        made[key] = {name: tensor.to(self.device) for name, tensor in made[key].items()}
                    return made[key]

                built = build(make)
                if self._folder is None:
                    return built
                del built
                self._write(name, made)
                self._progress("converting", len(self._record["parts"]), self._parts)
            kept = self._mapped(name)
            return build(lambda key, _: kept[key] if key in kept else self._lacks(f"{name}, {key}"))

    def finish(self) -> None:
        """All parts have been made: give the folder its name. If another process was faster, use its folder."""
        temporary, folder = self._unfinished, self._folder
        if temporary is None or folder is None:
            return
        with self._discarded_if_it_fails(), _locked(folder.parent):
            self._record["files"] = _files(temporary)
            write_atomically(temporary / RECORD, json.dumps(self._record).encode())
            os.chmod(temporary, 0o755)
            other = _complete(folder)
            if other is not None:  # its files may be in use
                self._record = other
            else:
                shutil.rmtree(folder, ignore_errors=True)
                put(temporary, folder)
                (folder / LOCK).unlink()
            self._discard()
            self._unfinished, self.complete = None, True

    def release(self) -> None:
        """Free the pages in memory; they are read again from the files when they are next needed."""
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)

    def passed(self, check: str) -> tuple[float, float] | None:
        """The differences that a self-check of this name once found, if it passed."""
        found = self._record.get("checks", {}).get(check)
        return None if found is None else (found[0], found[1])

    @property
    def change(self) -> dict[str, float] | None:
        """What `note` got as the change that the format makes."""
        found: dict[str, float] | None = self._record.get("change")
        return found

    def note(self, check: str, differences: tuple[float, float], change: dict[str, float] | None = None) -> None:
        """Record that the self-check of this name passed, and what the format changes.

        If that cannot be written, the check is repeated next time.
        """
        if self._folder and self.complete:
            with suppress(OSError), _locked(self._folder.parent):
                record = _complete(self._folder)  # another process may have noted a check meanwhile
                if record is not None:
                    record.setdefault("checks", {})[check] = differences
                    record["change"] = change
                    write_atomically(self._folder / RECORD, json.dumps(record).encode())

    def _write(self, part: str, made: dict[str, Tensors]) -> None:
        if self._unfinished is None:
            self._begin()
        assert self._unfinished
        places: dict[str, dict[str, Any]] = {}
        with (self._unfinished / f"{part}.bin").open("wb") as stream:
            for key, tensors in made.items():
                places[key] = {}
                for name, tensor in tensors.items():
                    stream.write(bytes(-stream.tell() % ALIGNED))
                    dtype = str(tensor.dtype).removeprefix("torch.")
                    places[key][name] = [dtype, list(tensor.shape), stream.tell()]
                    stream.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        self._record["parts"][part] = places

    def _begin(self) -> None:
        """Make the temporary folder, and lock it."""
        assert self._folder
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self._folder.parent):
            self._unfinished = Path(tempfile.mkdtemp(dir=self._folder.parent, prefix=f".{self._folder.name}."))
            lock = (self._unfinished / LOCK).open("wb")
            self._discard = weakref.finalize(self, _remove, self._unfinished, lock)
            fcntl.flock(lock, fcntl.LOCK_EX)

    @contextmanager
    def _discarded_if_it_fails(self) -> Iterator[None]:
        try:
            with in_the_cache():
                yield
        except BaseException:
            if self._unfinished is not None:
                self._discard()
                self._unfinished, self._record = None, {"parts": {}}
            raise

    def _lacks(self, what: str) -> NoReturn:
        raise CorruptFile(f"The converted weights in {self._folder} lack a tensor ({what}).", "Delete this folder.")

    def _mapped(self, part: str) -> dict[str, Tensors]:
        """The tensors of a part's file, by key. On a CPU, mapped ones share its pages; a change stays in this process."""
        folder = self._unfinished or self._folder
        assert folder
        if part not in self._record["parts"]:
            self._lacks(part)
        file = folder / f"{part}.bin"
        size = file.stat().st_size
        with file.open("rb") as stream:
            if size <= self._room:
                self._room -= size
                mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                stream.readinto(mapped)
            else:
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
                self._maps.append(mapped)
        out: dict[str, Tensors] = {}
        for key, tensors in self._record["parts"][part].items():
            out[key] = {}
            for name, (dtype, shape, offset) in tensors.items():
                flat = torch.frombuffer(mapped, dtype=getattr(torch, dtype), count=prod(shape), offset=offset)
                out[key][name] = flat.view(shape).to(self.device)
        return out


def kept(kind: str, of: Tensor, make: Callable[[], Tensors]) -> Tensors:
    """What `make` makes of a tensor, in a format of this name: made once, and then found in the cache by the tensor's hash.

    Where the cache cannot be written, it is made each time: a model in a cache that is only read still needs its exits.
    """
    if fcntl is None:
        return make()
    content = hashlib.sha256(of.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()
    key = sha256_of_text(f"{LAYOUT} {content} {of.dtype} {list(of.shape)}")[:16]
    store = Store(cache_folder() / "formats" / f"{key}-{kind}")
    try:
        tensors = store.part("weight", lambda get: get("weight", make))
        store.finish()
    except (OSError, OfframpError):
        return make()
    return tensors


def _files(folder: Path) -> dict[str, list[int]]:
    """The sizes and times of change of the files with tensors, by name. They show whether a file was cut or changed."""
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(folder.glob("*.bin"))}


def _complete(folder: Path) -> dict[str, Any] | None:
    """The record of a folder; None if it is missing, or does not agree with the files."""
    record = read_json(folder / RECORD)
    return record if record and _files(folder) == record.get("files") else None


def _remove(folder: Path, lock: IO[bytes]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.close()


@contextmanager
def _locked(formats: Path) -> Iterator[None]:
    """The lock of all stores in a folder."""
    with (formats / LOCK).open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sweep(formats: Path) -> None:
    """Remove the temporary folders of conversions that were killed, and weights that were not loaded for long.

    Such are those of models that were deleted, and those that an older version of offramp converted.
    """
    with _locked(formats):
        for record in formats.glob(f"[!.]*/{RECORD}"):
            with suppress(OSError):
                if time.time() - record.stat().st_mtime > UNUSED:
                    shutil.rmtree(record.parent, ignore_errors=True)
        for folder in formats.glob(".*/"):
            with suppress(OSError), (folder / LOCK).open("ab") as own:
                fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
