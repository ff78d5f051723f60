"""Fixtures: each family, a cache folder for one test, and the real model."""

from __future__ import annotations

from pathlib import Path

import pytest

from models import VARIANTS, cache_in  # imported before offramp, since it keeps the Hugging Face hub out
from offramp.model.backbone import Backbone

pytest.register_assert_rewrite("helpers")  # a failing comparison in a helper shows its values


@pytest.fixture(params=VARIANTS, scope="session")
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    folder = cache_in(tmp_path / "cache")
    monkeypatch.setenv("OFFRAMP_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Backbone:
    """The real model in float32, with the library's own model kept beside it."""
    import offramp

    return offramp.load("smollm2", "float32", keep=True)
