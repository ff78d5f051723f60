"""The compiled C code. Several libraries are installed with the package; the fastest one for this processor is loaded.

`core/variants.txt` lists the libraries, and what each needs. The environment variable `OFFRAMP_CORE` chooses another one:
its name, the file of a library, or "none".
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import NoReturn

from offramp.errors import OfframpError
from offramp.machine import processor_words

LIBRARIES = Path(__file__).parents[1] / "libraries"
SOURCES = Path(__file__).parents[3] / "core"  # in a clone
SLOW = "so the library's blocks run: they are slower, and in float32 or bfloat16 only."
NOTHING = f"No compiled library is installed, {SLOW} Install gcc or clang, and then offramp again."
UNUSABLE = f"The compiled library cannot be used ({{}}), {SLOW}"


@cache
def library() -> ctypes.CDLL | None:
    """The library for this processor. If there is none, a warning says so, and the result is None.

    Raises `OfframpError` if the library that `OFFRAMP_CORE` names cannot be used, and in a clone if the library was made
    from other sources than those there.
    """
    chosen = _chosen()
    if chosen is None or chosen == "none":
        warnings.warn(NOTHING, stacklevel=2)
        return None
    file = Path(chosen) if os.sep in chosen else _installed(chosen)
    try:
        loaded = ctypes.CDLL(str(file))
        loaded.offramp_sources.restype = loaded.offramp_variant.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        warnings.warn(UNUSABLE.format(error), stacklevel=2)
        return None
    made_from = sources()
    if made_from and loaded.offramp_sources().decode() != made_from:
        raise OfframpError(f"{file} was not made from the C code in {SOURCES}.", "Build it again: make core")
    return loaded


def variant() -> str:
    """The name of the library in use, and of the C code it was made from; "" where there is none."""
    loaded = library()
    return f"{loaded.offramp_variant().decode()} {loaded.offramp_sources().decode()}" if loaded else ""


def program() -> Path:
    """The program without Python, offramp-run, for this processor. Raises `OfframpError` where none is installed."""
    file = LIBRARIES / f"offramp-run-{_chosen()}"
    if not file.is_file():
        raise OfframpError("The program offramp-run is not installed.", "Install gcc or clang, and then offramp again.")
    return file


def run() -> NoReturn:
    """Become `program`, with this process's arguments."""
    try:
        os.execv(program(), ["offramp-run", *sys.argv[1:]])
    except OfframpError as error:
        sys.exit(f"offramp-run: {error}\n{error.hint}")


def _chosen() -> str | None:
    """The library that `OFFRAMP_CORE` names, or the best one; None where there is none."""
    return os.environ.get("OFFRAMP_CORE") or best()


def installed() -> list[str]:
    """The names of the libraries that were installed."""
    return sorted(file.stem.removeprefix("libofframp-") for file in LIBRARIES.glob("libofframp-*.so"))


def best() -> str | None:
    """The name of the fastest library that was installed and that this processor can run."""
    return next((name for name in reversed(runnable(chosen=True)) if name in installed()), None)


def runnable(chosen: bool = False) -> list[str]:
    """The variants that this processor can run, the fastest last; with `chosen`, without those that are slower on it."""
    words, names = processor_words(), []
    table = LIBRARIES / "variants.txt"
    rows = table.read_text("utf-8").splitlines() if table.exists() else []
    for name, machine, *rest in (row.split() for row in rows if not row.startswith("#")):
        needs = {word for word in rest if word[0] not in "-!"}
        if machine == platform.machine() and needs <= words:
            words.add(name)
            if not (chosen and any(word[1:] in words for word in rest if word[0] == "!")):
                names.append(name)
    return names or ["default"]


def sources() -> str:
    """The hash of the C code, as CMakeLists.txt computes it; "" where only the package is installed."""
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(SOURCES.glob("*.[ch]"))]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16] if hashes else ""


def _installed(name: str) -> Path:
    """The file of a library. Raises `OfframpError` for one that this processor cannot run."""
    there = installed()
    if name not in there:
        listed = ", ".join(there) or "none"
        raise OfframpError(f"There is no compiled library {name!r}; installed: {listed}.", "In a clone: make variants")
    if name not in runnable():
        listed = ", ".join(each for each in there if each in runnable()) or "none"
        raise OfframpError(f"This processor cannot run the compiled library {name!r}.", f"It can run: {listed}.")
    return LIBRARIES / f"libofframp-{name}.so"
