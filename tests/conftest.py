"""Fixtures: each family, a cache folder for one test, a stand-in for the hub, and the real model."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from models import VARIANTS  # imported before offramp, since it keeps the Hugging Face hub out
from offramp.model.backbone import Backbone

pytest.register_assert_rewrite("helpers")  # a failing comparison in a helper shows its values


@pytest.fixture(params=VARIANTS, scope="session")
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("OFFRAMP_CACHE", str(folder))
    return folder


@pytest.fixture
def hub(tmp_path) -> Iterator[dict[str, str]]:
    """The environment of a program whose hub is a stand-in with an empty folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    stand = subprocess.Popen([sys.executable, Path(__file__).with_name("hub_stand.py"), str(tmp_path / "hub"), str(port)])
    environment = {
        **os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_none",
        "HF_HOME": str(tmp_path / "home"), "OFFRAMP_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    yield environment
    stand.terminate()
    stand.wait()


@pytest.fixture(scope="session")
def smollm2() -> Backbone:
    """The real model in float32, with the library's own model kept beside it."""
    import offramp

    return offramp.load("smollm2", "float32", keep=True).backbone
