"""Turn a user's prompts and conversations into token ids."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import Any

from offramp.errors import BadInput

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
        """A conversation → the token ids before the answer. Raises `BadInput` as `check` does."""
        if raw or not getattr(self._tokenizer, "chat_template", None):
            text, options = "\n".join(message["content"] for message in messages), {}
        else:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            options = {"add_special_tokens": False}
        if len(text) > self._context * self._longest:  # turning it into tokens could take seconds
            raise BadInput(f"The prompt has {len(text)} characters; {self._name} holds {self._context} tokens.", SHORTEN)
        ids = self._tokenizer(text, **options)["input_ids"]
        self.check(ids)
        return list(ids)

    @cached_property
    def _longest(self) -> int:
        """The most characters of a token."""
        return max(map(len, self._tokenizer.get_vocab()))

    def check(self, ids: list[int]) -> None:
        """Raise `BadInput` for a prompt without tokens, with ids that are no tokens, or without room for an answer."""
        if not ids:
            raise BadInput("The prompt is empty.", "Give some text to go on from.")
        if len(ids) >= self._context:
            raise BadInput(
                f"The prompt is {len(ids)} tokens long; {self._name} holds {self._context} with its answer.",
                SHORTEN,
            )
        if not 0 <= min(ids) <= max(ids) < self._size:
            raise BadInput(
                f"The prompt has ids from {min(ids)} to {max(ids)}; {self._name} has {self._size} tokens.",
                "Make the ids with the model's own tokenizer.",
            )
