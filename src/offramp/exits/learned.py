"""Which prompts exits learned from, and how the use of exits differs from what a calibration tested.

A guarantee must be tested on prompts that nothing was learned from. So a record of exits holds a hash of each prompt that
read-outs, gates or thresholds learned from, and `offramp calibrate` refuses these.
"""

from __future__ import annotations

import hashlib
from base64 import b64decode, b64encode
from collections.abc import Iterable
from typing import Any

SIZE = 6  # bytes of a hash: of 10,000 prompts and 10,000 others, two share one with a probability of 4 in 10 million


def _hash(prompt: str) -> bytes:
    """The same for prompts that differ in case and white space only."""
    return hashlib.sha256(" ".join(prompt.casefold().split()).encode()).digest()[:SIZE]


def hashes_of(prompts: Iterable[str], *others: str) -> str:
    """The prompts' hashes in base64, each once, in order; with those of `others`, which are such texts."""
    return b64encode(b"".join(sorted({*map(_hash, prompts), *_read(*others)}))).decode()


def known_among(prompts: Iterable[str], *hashes: str) -> list[str]:
    """Those of the prompts whose hashes are in texts that `hashes_of` made. Raises `ValueError` for other texts."""
    known = _read(*hashes)
    return [prompt for prompt in prompts if _hash(prompt) in known]


def _read(*hashes: str) -> set[bytes]:
    found: set[bytes] = set()
    for text in hashes:
        content = b64decode(text, validate=True)
        found |= {content[start : start + SIZE] for start in range(0, len(content), SIZE)}
    return found


def differences(calibration: dict[str, Any], used: dict[str, Any]) -> list[str]:
    """How a use differs from what a calibration tested, in words: "fill project, not copy".

    `used` may name `fill`, `weights`, `temperature`, `repetition_penalty`, `max_tokens`, `raw` and `stop`. Answers may be
    shorter than those of the test: each length up to the longest was tested.
    """
    found = []
    for name, value in used.items():
        tested = calibration.get(name, {"temperature": 0.0, "repetition_penalty": 1.0}.get(name, value))
        if name == "max_tokens" and isinstance(tested, list | tuple):
            lengths = ", ".join(map(str, tested))
            found.append(f"a mixture of answers of at most {lengths} tokens, and not with each length for itself")
        elif name == "max_tokens":
            found += [f"answers of at most {tested} tokens, not {value}"] if value > tested else []
        elif name == "raw":
            found += ["prompts as they are" if tested else "the model's chat template"] if value != tested else []
        elif name == "stop":
            found += ["other stop texts"] if list(value) != list(tested) else []
        elif value != tested:
            found.append(f"{name.replace('_', ' ')} {tested}, not {value}")
    return found
