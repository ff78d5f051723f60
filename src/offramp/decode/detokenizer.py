"""Token ids → text, piece by piece, as they are decided."""

from __future__ import annotations

from typing import Any


class Detokenizer:
    """Token ids → text, piece by piece: whole characters only, and nothing that may begin a stop string."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(string for string in stop if string)
        self._ids: list[int] = []
        self._sent = ""
        self.stopped = False

    def push(self, token: int, last: bool) -> str:
        self._ids.append(token)
        if self._tokenizer is None:
            return ""
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        ends = [at for string in self._stop if (at := text.find(string)) >= 0]
        if ends:
            text, self.stopped = text[: min(ends)], True
        elif not last:
            text = text.rstrip("\ufffd")
            text = text[: len(text) - self._held(text)]
        piece = text[len(self._sent) :]
        self._sent += piece
        return piece

    def _held(self, text: str) -> int:
        longest = 0
        for string in self._stop:
            for size in range(min(len(string) - 1, len(text)), 0, -1):
                if text.endswith(string[:size]):
                    longest = max(longest, size)
                    break
        return longest
