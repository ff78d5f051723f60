"""Fields of frozen dataclasses that the command line offers as flags. Default and help stand in one place."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def setting(default: Any, help: str = "", flag: str = "", draft: Any = None, research: bool = False) -> Any:
    """A dataclass field with this default and, if it has a `help` line, a flag.

    `flag` is the flag's name; without it, the field's own. `draft` is the default under `offramp train --draft`, if that
    differs. `research`: the flag stands in the second panel of the help.
    """
    return field(default=default, metadata={"help": help, "flag": flag, "draft": draft, "research": research})
