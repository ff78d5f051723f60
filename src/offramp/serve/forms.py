"""Answers in OpenAI's forms: whole, or in the parts of a stream, for chats and for completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from typing import Any

import openai.types as completions
import openai.types.chat as chats

from offramp.serve.answers import Server
from offramp.serve.choices import Choice

LEAST = -9999.0  # stands for −∞, which JSON does not have


class Form:
    """The form of answers to completions, or of answers in a chat.

    `whole` is OpenAI's type for an answer. The parts of a stream are dicts of the same form: checking each would take time
    that decoding needs. OpenAI's client, which tests the server, checks them.
    """

    whole: Any
    prefix: str  # of an answer's id
    kind: str
    piece_kind: str

    def __init__(self, server: Server, model: str) -> None:
        self.server = server
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def answer(self, chosen: list[Choice]) -> Any:
        """All answers to a request, which have ended."""
        found = [
            {"index": index, "finish_reason": choice.reason, "offramp": self.server.about(choice), **self.text_of(choice)}
            for index, choice in enumerate(chosen)
        ]
        return self.whole.model_validate({
            **self.head, "object": self.kind, "choices": found, "usage": self.server.usage(chosen).model_dump(),
        })  # fmt: skip

    def part(self, index: int, choice: Choice, at: int | None) -> dict[str, Any]:
        """A part of a stream: token `at` of a choice, or its end."""
        if at is None:
            own = {"finish_reason": choice.reason, "offramp": self.server.about(choice), **self.end()}
        else:
            token = choice.tokens[at]
            own = {"finish_reason": None, "offramp": {"id": token.id, **choice.note(token)}, **self.delta(choice, at)}
        return {**self.head, "object": self.piece_kind, "choices": [{"index": index, **own}]}

    def last(self, chosen: list[Choice]) -> dict[str, Any]:
        """The part of a stream that has the usage."""
        usage = self.server.usage(chosen).model_dump()
        return {**self.head, "object": self.piece_kind, "choices": [], "usage": usage}

    def text_of(self, choice: Choice) -> dict[str, Any]:
        """An answer's text, and the log probabilities of its tokens if they were asked for."""
        raise NotImplementedError

    def delta(self, choice: Choice, at: int) -> dict[str, Any]:
        """The same for token `at` alone."""
        raise NotImplementedError

    def end(self) -> dict[str, Any]:
        """The same for the end of a stream, which has no token."""
        raise NotImplementedError

    def written(self, id: int) -> str:
        """A token's own text."""
        text: str = self.server.backbone.tokenizer.decode([id])
        return text


class ChatForm(Form):
    """Answers in a chat."""

    whole, prefix = chats.ChatCompletion, "chatcmpl"
    kind, piece_kind = "chat.completion", "chat.completion.chunk"

    def text_of(self, choice: Choice) -> dict[str, Any]:
        text = "".join(token.text for token in choice.tokens)
        return {
            "message": {"role": "assistant", "content": text},
            "logprobs": self._logprobs(choice, range(len(choice.tokens))),
        }

    def delta(self, choice: Choice, at: int) -> dict[str, Any]:
        role = {"role": "assistant"} if at == 0 else {}
        return {"delta": {**role, "content": choice.tokens[at].text}, "logprobs": self._logprobs(choice, [at])}

    def end(self) -> dict[str, Any]:
        return {"delta": {}}

    def _logprobs(self, choice: Choice, places: Iterable[int]) -> dict[str, Any] | None:
        if choice.logprobs is None:
            return None
        content = []
        for at in places:
            _, id, nats, best = self.server.logprobs_of(choice, at)
            content.append({**self._entry(id, nats), "top_logprobs": [self._entry(*each) for each in best]})
        return {"content": content, "refusal": None}

    def _entry(self, id: int, nats: float) -> dict[str, Any]:
        text = self.written(id)
        return {"token": text, "bytes": list(text.encode()), "logprob": max(nats, LEAST)}


class CompletionForm(Form):
    """Answers that go on from a text."""

    whole, prefix = completions.Completion, "cmpl"
    kind = piece_kind = "text_completion"

    def text_of(self, choice: Choice) -> dict[str, Any]:
        return {
            "text": "".join(token.text for token in choice.tokens),
            "logprobs": self._logprobs(choice, range(len(choice.tokens))),
        }

    def delta(self, choice: Choice, at: int) -> dict[str, Any]:
        return {"text": choice.tokens[at].text, "logprobs": self._logprobs(choice, [at])}

    def end(self) -> dict[str, Any]:
        return {"text": "", "logprobs": None}

    def _logprobs(self, choice: Choice, places: Iterable[int]) -> dict[str, Any] | None:
        if choice.logprobs is None:
            return None
        found = [self.server.logprobs_of(choice, at) for at in places]
        return {
            "tokens": [self.written(id) for _, id, _, _ in found],
            "token_logprobs": [max(nats, LEAST) for _, _, nats, _ in found],
            # Several tokens may be written alike: parts of a character. The likeliest of them stands.
            "top_logprobs": [{self.written(id): max(nats, LEAST) for id, nats in reversed(best)} for *_, best in found],
        }
