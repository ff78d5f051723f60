"""Turn a user's prompts and conversations into token ids."""

from __future__ import annotations

import hashlib
import json
import re
from functools import cached_property
from typing import Any

from offramp.errors import BadInput, TooLarge

BREAK = "\ufdd0"  # no character: Unicode keeps it for what a program does within itself
SHORTEN = "Shorten the prompt, or use a model with a longer context."


class Prompts:
    """Turns prompts and conversations into token ids, and refuses those that a model cannot answer.

    `tokenizer` is the library's. `context` is the number of tokens that the model `name` holds, answer included;
    `size` is the number of its different tokens.
    """

    def __init__(self, tokenizer: Any, context: int, name: str, size: int) -> None:
        self._tokenizer, self._context, self._name, self._size = tokenizer, context, name, size

    @cached_property
    def vocabulary(self) -> str:
        """A hash of the tokenizer's tokens and their ids; empty without a tokenizer."""
        if self._tokenizer is None:
            return ""
        return hashlib.sha256(json.dumps(sorted(self._tokenizer.get_vocab().items())).encode()).hexdigest()

    def encode(self, prompt: str, raw: bool = False) -> list[int]:
        """A prompt → token ids. The chat template is used where the tokenizer has one and `raw` is false.

        Raises `BadInput` for an empty prompt and for one that fills the model's context.
        """
        if not prompt.strip():
            raise BadInput("The prompt is empty.", "Give some text to go on from.")
        return self.encode_chat([{"role": "user", "content": prompt}], raw)

    def encode_chat(self, messages: list[dict[str, str]], raw: bool = False) -> list[int]:
        """A conversation → the token ids before the answer. Raises `BadInput` as `check` does.

        Special tokens count as such only where the chat template puts them, and in a raw prompt.
        """
        raw = raw or not getattr(self._tokenizer, "chat_template", None)
        if raw:
            pieces = ["\n".join(message["content"] for message in messages)]
        else:
            broken = self._break_special(messages)
            pieces = self._tokenizer.apply_chat_template(broken, tokenize=False, add_generation_prompt=True).split(BREAK)
        length = sum(map(len, pieces))
        if length > self._context * self._longest:  # turning it into tokens could take seconds
            raise TooLarge(f"The prompt has {length} characters; {self._name} holds {self._context} tokens.", SHORTEN)
        ids = list(self._tokenizer(pieces[0], add_special_tokens=raw)["input_ids"])
        for piece in pieces[1:]:  # behind a special token, since some tokenizers put a space before a text
            ids += self._tokenizer(self._special[0] + piece, add_special_tokens=False)["input_ids"][1:]
        self.check(ids)
        return ids

    def _break_special(self, said: Any) -> Any:
        """Messages in which `BREAK` breaks the texts of special tokens: only a template may put those.

        Otherwise `<|im_start|>system` in a user's message would begin a message of the system.
        """
        if isinstance(said, str):
            text = said.replace(BREAK, "\ufffd")
            return self._special_text.sub(lambda found: found[1] + BREAK, text) if self._special else text
        if isinstance(said, dict):
            return {key: self._break_special(value) for key, value in said.items()}
        return [self._break_special(each) for each in said] if isinstance(said, list) else said

    @cached_property
    def _special(self) -> list[str]:
        """The texts of special tokens, the longest first."""
        added = getattr(self._tokenizer, "added_tokens_decoder", {}).values()
        return sorted((token.content for token in added if token.special and token.content), key=len, reverse=True)

    @cached_property
    def _special_text(self) -> re.Pattern[str]:
        """A character with which the text of a special token begins."""
        return re.compile(f"(?=(?:{'|'.join(map(re.escape, self._special))}))(.)", re.DOTALL)

    @cached_property
    def _longest(self) -> int:
        """The most characters of a token."""
        return max(map(len, self._tokenizer.get_vocab()))

    def check(self, ids: list[int]) -> None:
        """Raise `BadInput` for a prompt without tokens, with ids that are no tokens, or without room for an answer."""
        if not ids:
            raise BadInput("The prompt is empty.", "Give some text to go on from.")
        if len(ids) >= self._context:
            raise TooLarge(
                f"The prompt is {len(ids)} tokens long; {self._name} holds {self._context} with its answer.",
                SHORTEN,
            )
        if not 0 <= min(ids) <= max(ids) < self._size:
            raise BadInput(
                f"The prompt has ids from {min(ids)} to {max(ids)}; {self._name} has {self._size} tokens.",
                "Make the ids with the model's own tokenizer.",
            )
