"""Names in help lines, such as {gates}: they come from the tables of the classes that have them.

These tables import torch, which takes seconds. So a verb's names are looked up only when its own help is shown.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

from typer.core import TyperCommand, TyperOption

# Where the names of each word stand.
NAMES = {
    "gates": "exits.gates.GATES",
    "readouts": "exits.readouts.READOUTS",
    "fills": "decode.fills.FILLS",
    "modes": "decode.modes.MODES",
    "formats": "model.compiled.formats.FORMATS",
    "losses": "training.losses.LOSSES",
    "policies": "training.lines.KINDS",
    "tasks": "evaluation.tasks.TASKS",
}


def with_names(help: str) -> str:
    """A help line with names in the place of each {word} that `NAMES` knows."""

    def names(found: re.Match[str]) -> str:
        module, _, table = NAMES[found[1]].rpartition(".")
        *most, last = getattr(import_module(f"offramp.{module}"), table)
        return f"{', '.join(most)} or {last}"

    return re.sub(rf"{{({'|'.join(NAMES)})}}", names, help)


class Verb(TyperCommand):
    """A verb whose help lines get their names when they are shown."""

    def format_help(self, *arguments: Any) -> None:
        """As typer does it, with the names."""
        for option in self.params:
            if isinstance(option, TyperOption) and option.help:
                option.help = with_names(option.help)
        super().format_help(*arguments)
