"""A few of the inputs of fuzz.py: the same ones each time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fuzz import Targets, run_one


@pytest.fixture
def targets(tmp_path: Path, own_cache: Path) -> Iterator[Targets]:
    made = Targets(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("name", "count"), [("gguf", 60), ("safetensors", 60), ("config", 3), ("exits", 15), ("requests", 20)]
)
def test_what_is_damaged_ends_well_or_in_words(name: str, count: int, targets: Targets) -> None:
    found = {number: trace for number in range(count) if (trace := run_one(targets, name, number))}
    assert not found, found
