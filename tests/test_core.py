"""Which compiled library is loaded: the best for the processor, or the one that is asked for; and no stale one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from models import compiled_only
from offramp.errors import OfframpError
from offramp.model import core

TABLE = Path(__file__).parent.parent / "core" / "variants.txt"
V3 = "abm avx2 bmi1 bmi2 f16c fma movbe"
V4 = f"{V3} avx512bw avx512cd avx512dq avx512f avx512vl avx512_vnni"
ALL = ["x86-64", "x86-64-v3", "x86-64-v3-vnni", "x86-64-v4", "x86-64-v4-vnni", "x86-64-v4-vnni-bf16"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A package with these libraries, which are empty files, on another processor."""
    monkeypatch.setattr(core, "LIBRARIES", tmp_path)
    monkeypatch.delenv("OFFRAMP_CORE", raising=False)
    shutil.copy(TABLE, tmp_path)

    def made(machine: str, words: str, names: list[str]) -> None:
        monkeypatch.setattr(core.platform, "machine", lambda: machine)
        monkeypatch.setattr(core, "processor_words", lambda: set(words.split()))
        for name in names:
            (tmp_path / f"libofframp-{name}.so").touch()

    return made


@pytest.mark.parametrize(
    ("machine", "words", "names", "best"),
    [
        ("x86_64", "", ALL, "x86-64"),
        ("x86_64", V3, ALL, "x86-64-v3"),
        ("x86_64", V3.replace("fma", ""), ALL, "x86-64"),
        ("x86_64", f"{V3} avx_vnni", ALL, "x86-64-v3-vnni"),
        ("x86_64", f"{V4} avx_vnni", ALL, "x86-64-v4-vnni"),
        ("x86_64", f"AuthenticAMD {V4} avx512_bf16", ALL, "x86-64-v4-vnni-bf16"),
        ("x86_64", f"GenuineIntel {V4} avx512_bf16", ALL, "x86-64-v4-vnni"),
        ("x86_64", V4, ["x86-64-v3"], "x86-64-v3"),
        ("x86_64", V3, ["x86-64-v4"], None),
        ("aarch64", "fp asimd", ["aarch64", "aarch64-dotprod"], "aarch64"),
        ("aarch64", "fp asimd asimddp", ["aarch64", "aarch64-dotprod"], "aarch64-dotprod"),
        ("riscv64", "", ["default"], "default"),
        ("x86_64", V4, [], None),
    ],
)
def test_the_best_library_that_is_installed_and_runs_is_chosen(machine, words, names, best, place):
    place(machine, words, names)
    assert core.best() == best


@pytest.mark.parametrize(
    ("asked", "said", "hint"),
    [
        ("x86-64-v9", "no compiled library 'x86-64-v9'; installed: x86-64, x86-64-v4", "make variants"),
        ("x86-64-v4", "cannot run the compiled library 'x86-64-v4'", "It can run: x86-64."),
    ],
)
def test_a_library_that_cannot_be_had_is_refused_in_one_sentence(asked, said, hint, place, monkeypatch):
    place("x86_64", V3, ["x86-64", "x86-64-v4"])
    monkeypatch.setenv("OFFRAMP_CORE", asked)
    with pytest.raises(OfframpError, match=said) as error:
        core.library.__wrapped__()
    assert hint in error.value.hint


@pytest.mark.parametrize(("names", "said"), [([], core.NOTHING), (["x86-64"], "cannot be used .*too short")])
def test_a_library_that_is_missing_or_damaged_is_said_in_one_sentence(names, said, place):
    place("x86_64", "", names)
    with pytest.warns(UserWarning, match=said):
        assert core.library.__wrapped__() is None


@compiled_only
def test_a_library_of_other_sources_is_refused(tmp_path, monkeypatch):
    for file in core.SOURCES.glob("*.[ch]"):
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(core, "SOURCES", tmp_path)
    assert core.library.__wrapped__() is not None
    with (tmp_path / "build.c").open("a") as file:
        file.write("\n")
    with pytest.raises(OfframpError, match="was not made from the C code") as error:
        core.library.__wrapped__()
    assert "make core" in error.value.hint


@compiled_only
@pytest.mark.parametrize("name", [name for name in core.installed() if name in core.runnable()])
def test_a_library_can_be_asked_for_by_its_name_and_by_its_file(name):
    command = [sys.executable, "-c", "from offramp.model.core import variant; print(variant())"]
    for asked in (name, str(core.LIBRARIES / f"libofframp-{name}.so")):
        ran = subprocess.run(command, env={**os.environ, "OFFRAMP_CORE": asked}, capture_output=True, text=True, check=True)
        assert ran.stdout.split()[0] == name
