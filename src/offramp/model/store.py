"""Tensors in the format that they run in, kept in a folder of the cache and mapped into memory.

A conversion fills a temporary folder beside it, one file for each part of the model, and renames it when all parts are
there. Its files are plain: each tensor begins at a multiple of 64 bytes, so that the compiled code reads whole cache lines.
`record.json` says what is where. It also says which self-checks the tensors have passed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from torch import Tensor

from offramp.errors import OfframpError
from offramp.files import cache_folder, read_json, sha256_of_text, write_atomically
from offramp.progress import Progress, silent

Tensors = dict[str, Tensor]
Get = Callable[[str, Callable[[], Tensors]], Tensors]  # (key, what makes the tensors) → the tensors under that key
Built = TypeVar("Built")

LAYOUT = 1  # raise it when what is kept under a key changes
ALIGNED = 64
RECORD, LOCK = "record.json", ".lock"


class Store:
    """What a model runs on, made once. Without a folder, nothing is kept.

    `parts` is the number of parts that the model has; it serves the progress. Tensors are put on `device`.
    """

    def __init__(
        self,
        folder: Path | None = None,
        device: torch.device | None = None,
        parts: int = 0,
        progress: Progress = silent,
    ) -> None:
        self.device = device or torch.device("cpu")
        self._folder, self._parts, self._progress = folder, parts, progress
        self._record = read_json(folder / RECORD) if folder else {}
        self.complete = bool(folder and self._record and _files(folder) == self._record.get("files"))
        if not self.complete:
            self._record = {"parts": {}}
        self._unfinished: tuple[Path, IO[bytes]] | None = None  # the temporary folder, and its locked file
        self._maps: list[mmap.mmap] = []

    @classmethod
    def of(cls, sha256: str, config: Path, kind: str, **settings: Any) -> Store:
        """The store of a model, named by its weights' hash and its config, in one format. `settings`: the constructor's."""
        key = sha256_of_text(f"{LAYOUT} {sha256} {config.read_text()}")[:16]
        return cls(cache_folder() / "formats" / f"{key}-{kind}", **settings)

    def part(self, name: str, build: Callable[[Get], Built]) -> Built:
        """What `build` makes of one part's tensors. It gets a function that it asks for all of them, by key.

        A key's tensors come from the part's file. If there is none yet, `build` runs twice: the first run makes the
        tensors, and the second gets them mapped. Raises `OfframpError` for a full disk.
        """
        if not self.complete:
            with self._discarded_if_it_fails():
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
        return build(lambda key, _: kept[key])

    def finish(self) -> None:
        """All parts have been made: give the folder its name."""
        if self._unfinished is None or self._folder is None:
            return
        with self._discarded_if_it_fails():
            temporary, lock = self._unfinished
            self._record["files"] = _files(temporary)
            write_atomically(temporary / RECORD, json.dumps(self._record).encode())
            (temporary / LOCK).unlink()
            os.chmod(temporary, 0o755)
            other = Store(self._folder)
            if other.complete:  # another process was faster; its files may be in use
                self._record = other._record
                shutil.rmtree(temporary)
            else:
                shutil.rmtree(self._folder, ignore_errors=True)
                os.rename(temporary, self._folder)
            lock.close()
            self._unfinished, self.complete = None, True

    def release(self) -> None:
        """Let go of the pages in memory; they are read again from the files when they are next needed."""
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)

    def passed(self, check: str) -> tuple[float, float] | None:
        """The differences that a self-check of this name once found, if it passed."""
        found = self._record.get("checks", {}).get(check)
        return None if found is None else (found[0], found[1])

    def note(self, check: str, differences: tuple[float, float]) -> None:
        """Remember that the self-check of this name passed."""
        if self._folder and self.complete:
            self._record.setdefault("checks", {})[check] = differences
            write_atomically(self._folder / RECORD, json.dumps(self._record).encode())

    def _write(self, part: str, made: dict[str, Tensors]) -> None:
        if self._unfinished is None:
            self._unfinished = self._begin()
        places: dict[str, dict[str, Any]] = {}
        with (self._unfinished[0] / f"{part}.bin").open("wb") as stream:
            for key, tensors in made.items():
                places[key] = {}
                for name, tensor in tensors.items():
                    stream.write(bytes(-stream.tell() % ALIGNED))
                    dtype = str(tensor.dtype).removeprefix("torch.")
                    places[key][name] = [dtype, list(tensor.shape), stream.tell()]
                    stream.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        self._record["parts"][part] = places

    def _begin(self) -> tuple[Path, IO[bytes]]:
        """A new temporary folder. Those of runs that were killed are removed; the lock tells that a run is alive."""
        assert self._folder
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        for lock in self._folder.parent.glob(f".*/{LOCK}"):
            with lock.open("rb") as stream:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    continue
                shutil.rmtree(lock.parent, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(dir=self._folder.parent, prefix=f".{self._folder.name}."))
        lock_file = (temporary / LOCK).open("wb")
        fcntl.flock(lock_file, fcntl.LOCK_EX)
        return temporary, lock_file

    @contextmanager
    def _discarded_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            if self._unfinished is not None:
                shutil.rmtree(self._unfinished[0], ignore_errors=True)
                self._unfinished[1].close()
                self._unfinished, self._record = None, {"parts": {}}
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                assert self._folder
                raise OfframpError(
                    f"The disk is full: the converted weights do not fit into {self._folder.parent}.",
                    "Free some space, or name a folder on another disk in OFFRAMP_CACHE.",
                ) from error
            raise

    def _mapped(self, part: str) -> dict[str, Tensors]:
        """The tensors of a part's file, by key. On a CPU they share its pages; a change to one stays in this process."""
        folder = self._unfinished[0] if self._unfinished else self._folder
        assert folder
        with (folder / f"{part}.bin").open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        self._maps.append(mapped)
        out: dict[str, Tensors] = {}
        for key, tensors in self._record["parts"][part].items():
            out[key] = {}
            for name, (dtype, shape, offset) in tensors.items():
                flat = torch.frombuffer(mapped, dtype=getattr(torch, dtype), count=prod(shape), offset=offset)
                out[key][name] = flat.view(shape).to(self.device)
        return out


def _files(folder: Path) -> dict[str, list[int]]:
    """Sizes and times of change of the files with tensors, by name: a file that was cut or changed shows."""
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(folder.glob("*.bin"))}
