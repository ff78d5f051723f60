"""A plug-in for `llm`, Simon Willison's command line: `llm -m offramp/smollm2 "Why is the sky blue?"`.

Each alias that offramp knows is a model. Options say how to decode; the response's JSON says what exits did.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import llm
from pydantic import Field

from offramp.cli.options import DecodingOptions
from offramp.decode.engine import Engine
from offramp.decode.facade import Model
from offramp.decode.request import Decided, Prefilled, Talk
from offramp.decode.sampling import Sampling
from offramp.errors import OfframpError
from offramp.model.hub import ALIASES

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

_TALKS: OrderedDict[str, Talk] = OrderedDict()  # what was computed for conversations of llm, by their ids
_MOST_TALKS = 8


@llm.hookimpl  # type: ignore[untyped-decorator]
def register_models(register: Any) -> None:
    """Tell llm of the models."""
    for alias in ALIASES:
        register(OfframpModel(alias))


@cache
def _loaded(name: str, decoding: DecodingOptions) -> Model:
    return decoding.load(name)


@cache
def _engine(name: str, decoding: DecodingOptions, sampling: Sampling) -> Engine:
    """An engine is kept, since a conversation goes on only at the exits at which it was begun."""
    return decoding.engine(_loaded(name, replace(decoding, mode=None)), sampling)


class OfframpModel(llm.Model):  # type: ignore[misc]
    """One model, for llm."""

    can_stream = True
    supports_schema = False

    class Options(llm.Options):  # type: ignore[misc]
        """Flags of `offramp generate`, as llm takes them: -o mode exact."""

        max_tokens: int = Field(256, ge=1, description="Longest answer, in tokens.")
        temperature: float = Field(0.0, ge=0, description="0 takes the most probable token.")
        seed: int = Field(0, description="Seed of the draws.")
        mode: str | None = Field(None, description="full, exact or early, or a point: early:3.")
        exits: str | None = Field(None, description="Folder with trained exits, or their name on the hub.")
        dtype: str | None = Field(None, description="Weights: bfloat16, float32, int8, int4 or int4-head4.")

    def __init__(self, name: str) -> None:
        self.model_id, self._name = f"offramp/{name}", name

    def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any) -> Iterator[str]:
        """Yield the answer's text as it is decided. Raises `llm.ModelError` for what a user can mend."""
        try:
            given = prompt.options
            sampling = Sampling(temperature=given.temperature, seed=given.seed)
            decoding = DecodingOptions(mode=given.mode, exits=given.exits, dtype=given.dtype)
            engine = _engine(self._name, decoding, sampling)
            ids = engine.backbone.prompts.encode_chat(_messages(prompt, conversation))
            talk = Talk() if conversation is None else _talk_of(conversation.id)
            batch, started = engine.batch(), time.perf_counter()
            request, prefilled = batch.add(ids, talk, max_tokens=prompt.options.max_tokens), started
            for event in batch.run():
                if isinstance(event, Prefilled):
                    prefilled = time.perf_counter()
                elif isinstance(event, Decided):
                    yield event.token.text
        except OfframpError as error:
            raise llm.ModelError(f"{error} {error.hint}".strip()) from error
        made = engine.summarise(request, prefilled - started, time.perf_counter() - prefilled)
        response.set_usage(input=len(ids), output=len(made.tokens))
        names = (
            "mode", "policy", "blocks", "mean_blocks", "flops_saved", "acceptance_rate", "tokens_per_deep_pass",
            "decode_tokens_per_second", "finish_reason",
        )  # fmt: skip
        response.response_json = {name: getattr(made, name) for name in names}


def _talk_of(conversation: str) -> Talk:
    talk = _TALKS.setdefault(conversation, Talk())
    _TALKS.move_to_end(conversation)
    while len(_TALKS) > _MOST_TALKS:
        _TALKS.popitem(last=False)
    return talk


def _messages(prompt: Any, conversation: Any) -> list[dict[str, str]]:
    """The conversation so far, and the new prompt."""
    earlier_ones = conversation.responses if conversation else []
    systems = [each.system for each in (*(earlier.prompt for earlier in earlier_ones), prompt) if each.system]
    turns = [("system", systems[0])] if systems else []
    for earlier in earlier_ones:
        turns += [("user", earlier.prompt.prompt), ("assistant", earlier.text_or_raise())]
    return [{"role": role, "content": content} for role, content in [*turns, ("user", prompt.prompt)]]
