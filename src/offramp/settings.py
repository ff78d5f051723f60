"""Fields of frozen dataclasses that the command line offers as flags. Default and help stand in one place."""

from __future__ import annotations

from dataclasses import field
from typing import Any

# Panels of a verb's help, beside the first one.
RESEARCH, SEVERAL = "Research", "Several machines"


def setting(default: Any, help: str = "", flag: str = "", draft: Any = None, panel: str | None = None) -> Any:
    """A dataclass field with this default and, if it has a `help` line, a flag.

    `flag` is the flag's name; without it, the field's own. `draft` is the default under `offramp train --draft`, if that
    differs. `panel`: that of the help in which the flag stands; None for the first one.
    """
    return field(default=default, metadata={"help": help, "flag": flag, "draft": draft, "panel": panel})
