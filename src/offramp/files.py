"""Files: writes that survive a crash, lines of prompts, hashes, the cache folder, and the assets that come with offramp."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from offramp.errors import BadInput, OfframpError

try:
    import fcntl
except ModuleNotFoundError:  # Windows: no locks of this kind
    fcntl = None  # type: ignore[assignment]

ASSETS = Path(__file__).parent / "assets"  # prompts and model shapes
PACKAGES = "offramp.packages"  # the group of entry points of packages with models and exits
MODELS_PACKAGE = "offramp-models"  # a distribution of its own, with the models and exits that ship


def is_installed(package: str) -> bool:
    """Whether a distribution with models and exits is installed."""
    return importlib.util.find_spec(package.replace("-", "_")) is not None


def install_package(package: str) -> str:
    """The hint for such a distribution that is missing. None of them is on PyPI."""
    return f"Install it in a clone of offramp: pip install ./{package}"


def install_hint(extra: str) -> str:
    """The hint for a package that is missing, which this extra of offramp brings."""
    return f"Install it in a clone of offramp: pip install '.[{extra}]'"


def shipped(kind: str) -> list[Path]:
    """The folders of a kind, "models" or "exits", in installed packages that bring such.

    A package says so by an entry point of the group `PACKAGES`, whose value is the name of a package of Python. That holds
    files, and is not imported.
    """
    names = sorted({entry.value for entry in entry_points(group=PACKAGES) if entry.value.isidentifier()})
    specs = [spec for spec in map(importlib.util.find_spec, names) if spec]
    places = [Path(place) / kind for spec in specs for place in spec.submodule_search_locations or ()]
    return [folder for place in places for folder in sorted(place.glob("*")) if folder.is_dir()]


def cache_folder() -> Path:
    """`$OFFRAMP_CACHE`, or `offramp` in the user's cache folder. A new one is open to its owner only."""
    configured = os.environ.get("OFFRAMP_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(configured) if configured else home / "offramp"
    with suppress(OSError):  # whoever writes there says so
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


@contextmanager
def in_the_cache() -> Iterator[None]:
    """Turn what the system raises where the cache folder is full or cannot be written into a sentence and a hint."""
    try:
        yield
    except OSError as error:
        named = isinstance(error.filename, str | os.PathLike)
        within = named and Path(error.filename).absolute().is_relative_to(cache_folder().absolute())
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message, hint = f"The disk with the cache folder {cache_folder()} is full.", "Free some space, or name"
        elif error.errno == errno.EROFS or (within and isinstance(error, PermissionError)):
            message, hint = f"The cache folder {cache_folder()} cannot be used: {error.strerror}.", "Name"
        else:
            raise
        raise OfframpError(message, f"{hint} a folder elsewhere in OFFRAMP_CACHE.") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file: `path` holds what it held before, or all of the new content. On return it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.chmod(temporary, 0o644)
        put(Path(temporary), path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(place: Path, known: str = "") -> Iterator[Path]:
    """A new folder to fill, which then takes the place of `place`: never half a folder under that name.

    If `place` has the file `known` by then, it stays: another process made the same folder, and may be reading it.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as temporary:
        made = Path(temporary) / place.name
        made.mkdir()
        yield made

        def is_there() -> bool:
            return bool(known) and (place / known).is_file()

        if not is_there():
            shutil.rmtree(place, ignore_errors=True)
            try:
                put(made, place)
            except OSError:  # the other process was faster by as long as it takes to write to the disk
                if not is_there():
                    raise


def put(made: Path, place: Path) -> None:
    """Give a complete file or folder its name, where no folder is yet. Its content is on the disk before the name is."""
    for path in (made, *made.rglob("*")):
        _sync(path)
    os.replace(made, place)
    _sync(place.parent)


def _sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    windows = os.name == "nt"
    if windows and path.is_dir():  # it cannot be opened there
        return
    handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems know no fsync of folders
            raise
    finally:
        os.close(handle)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """While the context is open, no other process works in this folder. Raises `BadInput` if one does.

    Where the system has no such locks, as on Windows, nothing is checked.
    """
    if fcntl is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / ".lock"
    with lock.open("ab") as held:
        taken = False
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # with another error, the file system knows no locks
            taken = isinstance(error, BlockingIOError)
        # The file may have been removed by whoever held it, after it was opened here.
        if taken or not lock.exists() or not os.path.samestat(os.fstat(held.fileno()), lock.stat()):
            raise BadInput(f"Another command is at work in {folder}.", "Wait until it ends, or name another folder.")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; empty if the file is missing or damaged."""
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def sha256_of(*files: Path) -> str:
    """SHA-256 over the files' contents in this order.

    The cache folder keeps it by each file's path, inode, size and times. Who writes to a file changes its `ctime`, and no
    program can set that back.
    """
    cache = cache_folder() / "hashes.json"
    facts = [(str(file), file.stat()) for file in files]
    key = repr([(path, of.st_ino, of.st_size, of.st_mtime_ns, of.st_ctime_ns) for path, of in facts])
    known = read_json(cache)
    if key not in known:
        digest = hashlib.sha256()
        for file in files:
            with file.open("rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
        known[key] = digest.hexdigest()
        with suppress(OSError):  # it is computed again next time
            write_atomically(cache, json.dumps(known, indent=1).encode())
    return str(known[key])


def sha256_of_text(text: str) -> str:
    """SHA-256 of a text in UTF-8, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def json_of(text: str) -> Any:
    """What a JSON text says. Raises `ValueError` for no JSON, for what is nested too deeply, and for half a surrogate pair,
    which JSON can write and UTF-8 cannot.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    json.dumps(value, ensure_ascii=False).encode()
    return value


def read_lines(path: str | Path, fields: tuple[str, ...]) -> list[str]:
    """The lines of a text file; of a `.jsonl` file, the first of `fields` that each line has. Empty lines are skipped.

    Raises `BadInput` for a file that is missing, empty, not UTF-8, or not JSON lines with such a field.
    """
    path = Path(path).expanduser()
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read: {error}.", "Give a UTF-8 text file, or JSON lines.") from error
    if path.suffix == ".jsonl":
        for number, line in enumerate(lines):
            try:
                record = json_of(line)
                lines[number] = next(str(record[field]) for field in fields if field in record)
            except (ValueError, StopIteration, TypeError) as error:
                raise BadInput(
                    f"{path}, line {number + 1}, is not a JSON object with {' or '.join(map(repr, fields))}.",
                    "A .jsonl file holds one JSON object a line.",
                ) from error
    if not lines:
        raise BadInput(f"{path} is empty.", "Give at least one line.")
    return lines
