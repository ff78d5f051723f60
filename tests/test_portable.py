"""Machines that lack something: a compiled library, or what only Unix has, as far as one can tell from here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import offramp
from helpers import modest_exits
from models import saved, tiny
from offramp import Engine
from offramp.errors import UnsupportedModel
from offramp.evaluation.results import load_results
from offramp.model.backbone import require_compiled
from offramp.model.core import NOTHING
from offramp.model.families import FAMILIES

# Windows has neither of these modules, and reads files in another encoding where none is named. Only offramp's own code is
# looked at: other libraries have code of their own for Windows, which is not installed here.
AS_ON_WINDOWS = """
import builtins, warnings
find = builtins.__import__

def lacking(name, globals=None, *others, **named):
    if name in ("fcntl", "resource") and (globals or {}).get("__name__", "").startswith("offramp"):
        raise ModuleNotFoundError(name)
    return find(name, globals, *others, **named)

builtins.__import__ = lacking
warnings.filterwarnings("ignore", category=EncodingWarning)
warnings.filterwarnings("error", category=EncodingWarning, module="offramp")
from offramp.cli.app import main
main()
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved(tiny("llama"), tmp_path / "model")


def ran(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What a program says that ends without an error."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def test_without_library_and_locks_everything_runs_and_says_so_once(model, tmp_path) -> None:
    windows = ["-X", "warn_default_encoding", "-c", AS_ON_WINDOWS]
    lacking = {"OFFRAMP_CORE": "none", "OFFRAMP_CACHE": str(tmp_path / "cache")}
    said = ran(*windows, "generate", model, "Grüß Gott", "--max-tokens", "4", "--dtype", "float32", **lacking)
    assert said.stderr.count(NOTHING) == 1
    assert not (tmp_path / "cache" / "formats").exists()
    expected = Engine(offramp.load(str(model), "float32").backbone).generate("Grüß Gott", max_tokens=4)
    assert said.stdout == f"{expected.text}\n"
    questions = [{"question": f"Größe {i}?", "answer": {"value": "groß", "aliases": []}} for i in range(8)]
    (tmp_path / "own.jsonl").write_text("\n".join(json.dumps(each, ensure_ascii=False) for each in questions), "utf-8")
    exits = tmp_path / "exits"
    modest_exits("llama").save(exits)
    task = ["eval", model, "--task", "triviaqa", "--data", tmp_path / "own.jsonl", "--json", tmp_path / "out.json"]
    ran(*windows, *task, "--limit", "2", "--exits", exits, "--threshold", "0.5", **lacking)
    results = load_results([tmp_path / "out.json"])
    assert [result.peak_memory_bytes for result in results] == [0] * len(results)


def test_without_compiled_code_the_librarys_blocks_run_and_int4_is_refused(model, own_cache, monkeypatch) -> None:
    compiled_one = offramp.load(str(model), "float32").backbone
    monkeypatch.setattr("offramp.model.backbone.library", lambda: None)
    plain, half = (offramp.load(str(model), dtype).backbone for dtype in ("float32", "bfloat16"))
    assert (plain.engine, half.engine) == ("library blocks", "library blocks")
    assert (plain.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    answers = [Engine(each).generate([1, 2, 3], max_tokens=20, end_ids=frozenset()).ids for each in (compiled_one, plain)]
    assert answers[0] == answers[1]
    for dtype in ("int8", "int4"):
        with pytest.raises(
            UnsupportedModel, match=f"has no compiled blocks in {dtype}: the C code is not compiled here"
        ) as no:
            offramp.load(str(model), dtype)
        assert "gcc" in no.value.hint


def test_on_a_gpu_there_are_no_compiled_blocks() -> None:
    family, gpu = FAMILIES["llama"], torch.device("cuda")
    with pytest.raises(UnsupportedModel, match="tiny has no compiled blocks in int4: they run on a CPU") as no:
        require_compiled("tiny", family, "int4", gpu)
    assert 'device="cpu"' in no.value.hint
