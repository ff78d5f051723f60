"""Where tasks come from: the Hugging Face hub, or the official file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from offramp.errors import BadInput, reason_of
from offramp.files import install_hint, sha256_of_text


def from_hub(name: str, config: str | None, split: str) -> list[dict[str, Any]]:
    """The rows of a data set on the hub. Raises `BadInput` where it cannot be fetched."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise missing("datasets", error) from error
    try:
        return list(load_dataset(name, config, split=split))
    except Exception as error:  # the library raises its own, its HTTP library's and the system's errors
        reason = reason_of(error)
        raise BadInput(f"The data set {name} could not be fetched: {reason}", "Name a file with it: --data FILE") from error


def read_file(data: str | Path) -> tuple[str, str, str]:
    """A file's text, its name, and a hash. Raises `BadInput` for one that cannot be read."""
    path = Path(data).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read: {error}.", "Give the task's official file.") from error
    return text, path.name, sha256_of_text(text)


def not_official(data: str | Path, format: str, error: Exception) -> BadInput:
    """The error for a file of another form."""
    return BadInput(f"{data} is not {format}: {error!r}.", "Give the task's official file.")


def missing(library: str, error: ImportError) -> BadInput:
    """The error for a library that is not installed."""
    return BadInput(f"The library {library} is not installed.", install_hint("eval"))
