"""Token ids → text, piece by piece, as they are decided."""

from __future__ import annotations

from typing import Any


class Detokenizer:
    """Turns token ids into text piece by piece: whole characters only, and nothing that may begin a stop string.

    `stopped`: whether a stop string has come; the text ends before it.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(string for string in stop if string)
        self._ids: list[int] = []
        self._sent = ""
        self.stopped = False

    def push(self, token: int, last: bool) -> str:
        """The text that this token completes, which may be empty. With the `last` token, nothing is held back."""
        self._ids.append(token)
        if self._tokenizer is None:
            return ""
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        starts = [start for string in self._stop if (start := text.find(string)) >= 0]
        if starts:
            text, self.stopped = text[: min(starts)], True
        elif not last:
            text = text.rstrip("\ufffd")
            text = text[: len(text) - self._held(text)]
        piece = text[len(self._sent) :]
        self._sent += piece
        return piece

    def _held(self, text: str) -> int:
        """How many characters at the end of the text may begin a stop string."""
        longest = 0
        for string in self._stop:
            for size in range(min(len(string) - 1, len(text)), 0, -1):
                if text.endswith(string[:size]):
                    longest = max(longest, size)
                    break
        return longest
