"""Fingerprints of models in files, which the cache keeps: computing one reads from all tensors."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from offramp.files import cache_folder, read_json, sha256_of_text, write_atomically
from offramp.model.checkpoint import EDITION, Values, fingerprint
from offramp.model.hub import Source


def with_fingerprint(source: Source, model: Any, values: Values) -> Source:
    """The source, with the fingerprint of its weights. The cache folder keeps it by their hash and the model's config."""
    cache, key = cache_folder() / "fingerprints.json", _key(source)
    known = read_json(cache)
    if key not in known:
        if values.model is not None and values.checkpoint is None:
            return source
        known[key] = fingerprint(model, values)
        with suppress(OSError):  # if it cannot be written, the fingerprint is computed again next time
            write_atomically(cache, json.dumps(known, indent=1).encode())
    return replace(source, fingerprint=known[key])


def knows_fingerprint(source: Source) -> bool:
    return _key(source) in read_json(cache_folder() / "fingerprints.json")


def _key(source: Source) -> str:
    config = (Path(source.path) / "config.json").read_text("utf-8")  # it says which of the tensors the model has
    return f"{EDITION} {source.sha256} {sha256_of_text(config)}"
