"""Token ids → text, piece by piece, as they are decided."""

from __future__ import annotations

from typing import Any

WINDOW = 8  # tokens that are decoded again with each new one; a character, or a space between words, needs fewer


class Detokenizer:
    """Turns token ids into text piece by piece: whole characters only, and nothing that may begin a stop string.

    `stops`: the stop strings. `stopped`: whether one has come; the text ends before it.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]) -> None:
        self._tokenizer, self.stops = tokenizer, tuple(string for string in stop if string)
        # The library's tokenizer wraps a backend, which gives the same text several times as fast.
        beneath = getattr(tokenizer, "backend_tokenizer", None)
        plain = beneath is not None and not getattr(tokenizer, "clean_up_tokenization_spaces", True)
        self._text_of: Any = getattr(beneath if plain else tokenizer, "decode", None)
        self._ids: list[int] = []  # the newest tokens
        self._before = ""  # text of older tokens that was held back
        self._sent = 0  # characters of the pending text that were sent
        self.stopped = False

    def push(self, token: int, last: bool) -> str:
        """The text that this token completes, which may be empty. With the `last` token, nothing is held back."""
        if self._tokenizer is None:
            return ""
        self._ids.append(token)
        newest = self._decode(self._ids)
        text = self._before + newest
        if len(self._ids) >= 2 * WINDOW:
            self._shorten(text)
        starts = [start for string in self.stops if (start := text.find(string, self._sent)) >= 0]
        if starts:
            text, self.stopped = text[: min(starts)], True
        elif not last:
            text = text[: len(text) - len(newest) + len(newest.rstrip("\ufffd"))]
            text = text[: len(text) - self._held(text)]
        piece = text[self._sent :]
        self._sent += len(piece)
        gone = min(self._sent, len(self._before))
        self._before, self._sent = self._before[gone:], self._sent - gone
        return piece

    def _decode(self, ids: list[int]) -> str:
        text: str = self._text_of(ids, skip_special_tokens=True)
        return text

    def _shorten(self, text: str) -> None:
        """Keep only the newest tokens, if their own text ends the `text`. It does not if they begin within a character."""
        newest = self._decode(self._ids[-WINDOW:])
        if newest and text.endswith(newest):
            self._ids, self._before = self._ids[-WINDOW:], text.removesuffix(newest)

    def _held(self, text: str) -> int:
        """How many characters at the end of the text may begin a stop string."""
        longest = 0
        for string in self.stops:
            start = text.find(string[0], max(self._sent, len(text) - len(string) + 1))
            while start >= 0 and not string.startswith(text[start:]):
                start = text.find(string[0], start + 1)
            longest = max(longest, len(text) - start if start >= 0 else 0)
        return longest
