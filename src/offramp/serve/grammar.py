"""Answers in JSON: only tokens are chosen after which the text can still fit a schema (`llguidance`)."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from asyncio.subprocess import DEVNULL, PIPE
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from offramp.decode.sampling import Choose
from offramp.errors import BadInput, NothingFits, TooLarge
from offramp.model.backbone import Backbone
from offramp.serve import schema_trial

if TYPE_CHECKING:
    from llguidance import LLMatcher

MOST_SCHEMA = 1 << 16  # characters
MOST_MULTIPLE = 10_000  # of all `multipleOf` of a schema
MOST_GRAMMAR = 20_000  # symbols of a grammar: what fits next is looked for in all of them
SECONDS, PATIENCE = 2, 20  # of the processor's time, and of waiting, until a schema counts as too large
BYTES = 1 << 30  # of memory


class Grammars:
    """Compiles JSON schemas for a model, one at a time, beside everything else that a server does."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._one_at_a_time = asyncio.Semaphore()
        self._thread = ThreadPoolExecutor(1, "offramp-grammars")

    async def matcher(self, schema: dict[str, Any]) -> LLMatcher:
        """A matcher of a schema. Its copies follow an answer each.

        Raises `BadInput` for a schema that is invalid or too large. Where the caller is cancelled, compiling ends.
        """
        _check_multiples(schema)
        text = json.dumps(schema)
        if len(text) > MOST_SCHEMA:
            raise TooLarge(f"The schema has {len(text):,} characters.", f"It may have {MOST_SCHEMA:,}.")
        async with self._one_at_a_time:
            await _try_apart(text)
            return await asyncio.get_running_loop().run_in_executor(self._thread, compile_schema, self._backbone, text)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def compile_schema(backbone: Backbone, schema: str) -> LLMatcher:
    """A matcher of a JSON schema, in this thread. Raises `BadInput` for one that is invalid or too large."""
    from llguidance import LLMatcher, LLParserLimits

    limits, tokens = LLParserLimits(max_grammar_size=MOST_GRAMMAR), _tokens_of(backbone.tokenizer, backbone.stop_ids)
    matcher = LLMatcher(tokens, LLMatcher.grammar_from_json_schema(schema), log_level=0, limits=limits)
    matcher.compute_bitmask()  # the first one takes longest: here it keeps no other answer waiting
    if matcher.is_error():
        raise _unusable(matcher.get_error())
    return matcher


async def _try_apart(schema: str) -> None:
    """Compile a schema in a process of its own, with limits. Raises `BadInput` where that fails."""
    limits = map(str, (MOST_GRAMMAR, SECONDS, BYTES))
    trial = await asyncio.create_subprocess_exec(
        sys.executable, "-I", schema_trial.__file__, *limits, stdin=PIPE, stdout=PIPE, stderr=DEVNULL
    )
    try:
        async with asyncio.timeout(PATIENCE):
            said, _ = await trial.communicate(schema.encode())
    except TimeoutError:
        raise _unusable("it takes too long to compile") from None
    finally:
        if trial.returncode is None:
            trial.kill()
    if trial.returncode or said:
        raise _unusable(said.decode("utf-8", "replace") or "it is too large, or nested too deeply")


def _unusable(reason: str) -> BadInput:
    return BadInput(
        f"The schema cannot be used: {reason.splitlines()[0].rstrip('.')}.", "Give a JSON schema, or make it simpler."
    )


class Grammar:
    """A `Choose` that keeps an answer within a JSON schema, and lets another one choose among the tokens that fit.

    When drafts are rejected, the text becomes shorter, and the matcher goes back, too. Raises `NothingFits` if none of the
    tokens that were read out fits, and `BadInput` if the matcher gives up.
    """

    reads_all = True  # what fits may be unlikely

    def __init__(self, matcher: LLMatcher, prompt: int, choose: Choose) -> None:
        """`prompt`: the number of the prompt's ids. `choose`: chooses among the tokens that fit."""
        self._matcher, self._prompt, self.choose = matcher, prompt, choose
        self._taken: list[int] = []

    def __call__(self, logits: Tensor, ids: list[int]) -> int:
        bits = np.unpackbits(self.allowed(ids).view(np.uint8), count=len(logits), bitorder="little")
        fitting = logits.masked_fill(torch.from_numpy(bits == 0).to(logits.device), float("-inf"))
        if fitting.amax() == float("-inf"):
            raise NothingFits("No token of the model fits the schema here.", "Make the schema simpler.")
        return self.choose(fitting, ids)

    def allowed(self, ids: list[int]) -> np.ndarray:
        """Which tokens fit after these ids: a bit for each token, in words of uint32, from the lowest bit on."""
        self._follow(ids[self._prompt :])
        words = np.frombuffer(self._matcher.compute_bitmask(), dtype="<u4")
        if self._matcher.is_error():
            raise BadInput(
                f"The schema cannot be followed: {self._matcher.get_error().splitlines()[0]}", "Make it simpler."
            )
        return words

    def _follow(self, answer: list[int]) -> None:
        """Bring the matcher to where the answer ends."""
        same = 0
        while same < min(len(answer), len(self._taken)) and answer[same] == self._taken[same]:
            same += 1
        if same < len(self._taken):
            self._matcher.rollback(len(self._taken) - same)
        self._matcher.consume_tokens(answer[same:])
        self._taken = [*answer]


def _check_multiples(schema: Any) -> None:
    """Raise `BadInput` if the least common multiple of all `multipleOf` in a schema is too large.

    Without the decimal point: 0.25 counts as 25. The matcher needs a state for each remainder, and has no limit for that.
    """
    multiple, parts = 1, [schema]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            number = part.get("multipleOf")
            digits = Decimal(str(number)).as_tuple().digits if type(number) in (int, float) else ()
            if any(digits):
                multiple = math.lcm(multiple, int("".join(map(str, digits))))
            parts += part.values()
        elif isinstance(part, list):
            parts += part
        if multiple > MOST_MULTIPLE:
            raise BadInput(
                "The schema's multipleOf make too large a grammar.",
                f"Their least common multiple, without the decimal point, may be {MOST_MULTIPLE:,}.",
            )


@cache
def _tokens_of(tokenizer: Any, ends: frozenset[int]) -> Any:
    """The tokenizer as `llguidance` has it. Each of `ends` may end an answer: a chat's end is often not the text's."""
    import llguidance.hf

    return llguidance.hf.from_tokenizer(tokenizer, eos_token=sorted(id for id in ends if id < len(tokenizer)) or None)
