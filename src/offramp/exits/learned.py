"""The prompts that exits learned from, as hashes.

A guarantee must be tested on prompts that nothing was learned from. So a record of exits holds a hash of each prompt that
read-outs, gates or thresholds learned from, and `offramp calibrate` refuses these.
"""

from __future__ import annotations

import hashlib
from base64 import b64decode, b64encode
from collections.abc import Iterable

TRAINED, PILOTED = "prompt_hashes", "pilot_hashes"  # the field of hashes in the records of a training and of a calibration
SIZE = 6  # bytes of a hash: of 10,000 prompts and 10,000 others, two share one with a probability of 4 in 10 million


def _hash(prompt: str) -> bytes:
    """The hash of a prompt; it is the same for prompts that differ in case and white space only."""
    return hashlib.sha256(" ".join(prompt.casefold().split()).encode()).digest()[:SIZE]


def hashes_of(prompts: Iterable[str], *others: str) -> str:
    """The prompts' hashes in base64, each once, sorted, with the hashes in `others`, texts that this function made."""
    return b64encode(b"".join(sorted({*map(_hash, prompts), *_read(*others)}))).decode()


def known_among(prompts: Iterable[str], *hashes: str) -> list[str]:
    """The prompts whose hashes are in texts that `hashes_of` made. Raises `ValueError` for other texts."""
    known = _read(*hashes)
    return [prompt for prompt in prompts if _hash(prompt) in known]


def _read(*hashes: str) -> set[bytes]:
    found: set[bytes] = set()
    for text in hashes:
        content = b64decode(text, validate=True)
        found |= {content[start : start + SIZE] for start in range(0, len(content), SIZE)}
    return found
