"""Answers in JSON: a token is chosen among those with which the text can still fit a schema (`llguidance`)."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import torch
from torch import Tensor

from offramp.decode.sampling import Choose
from offramp.errors import BadInput, NothingFits


class Grammar:
    """A `Choose` that keeps an answer within a JSON schema, and lets another one choose among the tokens that fit.

    The texts that it is asked about may go back, as drafts are rejected: the matcher then goes back, too. Raises
    `NothingFits` where no token fits that has been read out, and `BadInput` where the matcher gives up.
    """

    reads_all = True  # what fits may be unlikely

    def __init__(self, tokenizer: Any, schema: dict[str, Any], prompt: int, choose: Choose) -> None:
        """`prompt`: the number of the prompt's ids. Raises `BadInput` for a schema that is none."""
        from llguidance import LLMatcher

        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
        self._matcher, self._prompt, self._choose = LLMatcher(_tokens_of(tokenizer), grammar), prompt, choose
        self._taken: list[int] = []
        if self._matcher.is_error():
            raise BadInput(f"The schema cannot be used: {self._matcher.get_error()}", "Give a JSON schema.")

    def __call__(self, logits: Tensor, ids: list[int]) -> int:
        self._follow(ids[self._prompt :])
        allowed = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        if self._matcher.is_error():
            raise BadInput(
                f"The schema cannot be followed: {self._matcher.get_error().splitlines()[0]}", "Make it simpler."
            )
        bits = (allowed[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten()[: len(logits)].bool()
        hidden = torch.ones(len(logits), dtype=torch.bool)
        hidden[: len(bits)] = ~bits
        fitting = logits.masked_fill(hidden.to(logits.device), float("-inf"))
        if fitting.amax() == float("-inf"):
            raise NothingFits("No token of the model fits the schema here.", "Make the schema simpler.")
        return self._choose(fitting, ids)

    def _follow(self, answer: list[int]) -> None:
        """Bring the matcher to where the answer ends."""
        same = 0
        while same < min(len(answer), len(self._taken)) and answer[same] == self._taken[same]:
            same += 1
        if same < len(self._taken):
            self._matcher.rollback(len(self._taken) - same)
        self._matcher.consume_tokens(answer[same:])
        self._taken = [*answer]


@cache
def _tokens_of(tokenizer: Any) -> Any:
    import llguidance.hf

    return llguidance.hf.from_tokenizer(tokenizer)
