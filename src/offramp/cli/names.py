"""Names in help lines, such as {gates}: they come from the tables of the classes that have them.

These tables import torch, which takes seconds. So a verb's names are looked up only when its own help is shown.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from typer.core import TyperCommand, TyperOption


def _gates() -> Iterable[str]:
    from offramp.exits.gates import GATES

    return GATES


def _readouts() -> Iterable[str]:
    from offramp.exits.readouts import READOUTS

    return READOUTS


def _fills() -> Iterable[str]:
    from offramp.decode.fills import FILLS

    return FILLS


def _early_fills() -> Iterable[str]:
    from offramp.decode.fills import FILLS

    return (name for name, fill in FILLS.items() if not fill.verifies)


def _modes() -> Iterable[str]:
    from offramp.decode.modes import MODES

    return MODES


def _confidences() -> Iterable[str]:
    from offramp.exits.policy import CONFIDENCES

    return CONFIDENCES


def _formats() -> Iterable[str]:
    from offramp.model.compiled.weights import FORMATS

    return FORMATS


def _losses() -> Iterable[str]:
    from offramp.training.losses import LOSSES

    return LOSSES


def _policies() -> Iterable[str]:
    from offramp.training.lines import KINDS

    return KINDS


def _tasks() -> Iterable[str]:
    from offramp.evaluation.tasks import TASKS

    return TASKS


NAMES: dict[str, Callable[[], Iterable[str]]] = {
    "gates": _gates,
    "readouts": _readouts,
    "fills": _fills,
    "early_fills": _early_fills,  # those with which exits decide
    "modes": _modes,
    "confidences": _confidences,
    "formats": _formats,
    "losses": _losses,
    "policies": _policies,
    "tasks": _tasks,
}


def with_names(help: str) -> str:
    """A help line with names in the place of each {word} that `NAMES` knows."""

    def names(found: re.Match[str]) -> str:
        *most, last = NAMES[found[1]]()
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
