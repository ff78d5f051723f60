"""What the commands print. It may hold a stranger's text (tokens, names in files), which must not steer the terminal."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

# Characters that a terminal obeys instead of showing them, but for tabs and new lines; and those that turn the direction of
# text.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str, stream: IO[str] | None = None) -> str:
    """A text for a stream (stdout). On a terminal, U+FFFD takes the place of `CONTROLS`; others get the text as it is."""
    return CONTROLS.sub("\ufffd", text) if (stream or sys.stdout).isatty() else text


def say(text: str, end: str = "\n", stream: IO[str] | None = None) -> None:
    """Print a text at once, on stdout or another stream."""
    print(printable(text, stream), end=end, file=stream or sys.stdout, flush=True)


def console(**settings: Any) -> Console:
    """rich's console, which shows no `CONTROLS` on a terminal but its own."""
    from rich.console import Console
    from rich.segment import Segment

    class Shown(Console):
        def render(self, *arguments: Any, **named: Any) -> Iterator[Segment]:
            for segment in super().render(*arguments, **named):
                hides = self.is_terminal and not segment.control
                yield segment._replace(text=CONTROLS.sub("\ufffd", segment.text)) if hides else segment

    return Shown(**settings)
