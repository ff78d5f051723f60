"""Requests on their way: their jobs for the scheduler, and the answers that come back."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import openai.types as completions
from fastapi import Response

from offramp.decode.request import Limits, Token, drafts_of
from offramp.decode.sampling import Choose
from offramp.decode.sequence import begin_alike
from offramp.errors import BadInput, OfframpError, TooLarge
from offramp.serve.choices import Arrived, Choice, Choices, Recorder
from offramp.serve.grammar import Grammar, Grammars
from offramp.serve.menu import Menu
from offramp.serve.metrics import Metrics
from offramp.serve.protocol import AnswerRequest, ChatRequest, CompletionRequest
from offramp.serve.scheduler import Full, Job, Scheduler

if TYPE_CHECKING:
    from llguidance import LLMatcher

log = logging.getLogger("offramp.serve")


class JsonLines(logging.Formatter):
    """A log in JSON, one object a line. It contains no text of prompts or answers."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line = {"time": self.formatTime(record), "level": record.levelname.lower(), "event": record.getMessage()}
        error = {"error": self.formatException(record.exc_info)} if record.exc_info else {}
        return json.dumps({**line, **getattr(record, "facts", {}), **error})


OTHER = "\u2047 other"  # a text that no message begins with
LONG = 1 << 15  # characters of a prompt that is read beside others


@dataclass(frozen=True)
class Rules:
    """The limits of a server, in bytes, tokens, and seconds, and its names. name: the model's. key: the API key, or None.

    hosts: names that requests may call the server by, beside `localhost`, this machine's name, and addresses. most_arrival:
    how long a request's body may take to arrive.
    """

    name: str
    key: str | None = None
    most_body: int = 1 << 20
    most_tokens: int = 4096
    most_seconds: float = 600.0
    hosts: tuple[str, ...] = ()
    most_arrival: float = 30.0


class Refused(Exception):
    """A request that is not answered: the HTTP status, and OpenAI's words for it."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, headers: Any = None
    ) -> None:
        super().__init__(message)
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        usual = "server_error" if status >= 500 else "invalid_request_error"
        self.status, self.headers = status, headers or {}
        self.error = {"message": message, "type": kinds.get(status, usual), "param": param, "code": code}

    @property
    def response(self) -> Response:
        """The answer in OpenAI's form."""
        return Response(json.dumps({"error": self.error}), self.status, self.headers, "application/json")


class Post:
    """Carries events from the engine's thread to the threads of loops: all events of a step at once.

    If each token woke a loop, both threads would wait for each other each time.
    """

    def __init__(self) -> None:
        self._lock, self._bag = threading.Lock(), list[tuple[asyncio.AbstractEventLoop, asyncio.Queue[Any], Any]]()

    def put(self, loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Any], what: Any) -> None:
        """Keep an event for a loop's queue until `send`."""
        with self._lock:
            self._bag.append((loop, queue, what))

    def send(self) -> None:
        """Put all events into their queues, in the threads of their loops."""
        with self._lock:
            bag, self._bag = self._bag, []
        for loop in dict.fromkeys(loop for loop, _, _ in bag):
            with suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(_deliver, [(queue, what) for owner, queue, what in bag if owner is loop])


def _deliver(things: list[tuple[asyncio.Queue[Any], Any]]) -> None:
    for queue, what in things:
        queue.put_nowait(what)


class Server:
    """Answers requests with the engines of a menu, which a scheduler runs, within the server's rules."""

    def __init__(self, menu: Menu, scheduler: Scheduler, rules: Rules, metrics: Metrics) -> None:
        self.menu, self.scheduler, self.rules, self.metrics = menu, scheduler, rules, metrics
        self.backbone = menu.backbone
        self.grammars = Grammars(self.backbone)
        # Long prompts have a thread of their own, so that short ones need not wait for them.
        self._short, self._long = ThreadPoolExecutor(1, "offramp-prompts"), ThreadPoolExecutor(1, "offramp-long-prompts")
        sequence = menu.usual.read([0, 0]).sequence
        assert sequence is not None
        self._state = sequence.state  # of one token, which says how much memory others take
        self._post = Post()
        scheduler.after = self._post.send

    def choices(
        self,
        loop: asyncio.AbstractEventLoop,
        asked: AnswerRequest,
        ids: list[int],
        borders: tuple[int, ...] = (),
        matcher: LLMatcher | None = None,
    ) -> Choices:
        """The answers that a request asks for: one job for each. Their tokens will arrive in the loop's thread.

        matcher: of the schema that they must fit, if any.

        The first job is to be handed in; the others are its twins. Raises `BadInput` for a request that cannot be served.
        """
        most = asked.longest or self.rules.most_tokens
        limits: Limits = {"max_tokens": min(most, self.rules.most_tokens), "stop": tuple(asked.stop)}
        most_logprobs = _wanted_logprobs(asked)
        used = None if matcher is not None else {
            **limits, "raw": not isinstance(asked, ChatRequest),
            "temperature": asked.temperature, "repetition_penalty": asked.repetition_penalty,
        }  # fmt: skip
        made = []
        arrived = asyncio.Queue[Arrived]()
        size = self._state.bytes_for(min(len(ids) + limits["max_tokens"], self.backbone.context))
        engine = self.menu.engine(asked.offramp.mode)
        for number in range(asked.n):
            choose: Choose = asked.sampling(number).chooser()
            if matcher is not None:
                choose = Grammar(matcher.deep_copy(), len(ids), choose)
            recorder = None if most_logprobs is None else Recorder(choose, most_logprobs)
            tell = partial(self._tell, loop, arrived, number)
            job = Job(engine, ids, limits, recorder or choose, tell, borders, bytes=size)
            made.append(Choice(asked.offramp.ids, used, job, recorder))
        made[0].job.twins = [choice.job for choice in made[1:]]
        return Choices(made, arrived)

    def thread_for(self, characters: int) -> ThreadPoolExecutor:
        """The thread that renders and tokenises a prompt of so many characters."""
        return self._long if characters >= LONG else self._short

    def close(self) -> None:
        """End the threads."""
        for thread in (self._short, self._long):
            thread.shutdown(wait=False, cancel_futures=True)
        self.grammars.close()

    def _tell(self, loop: Any, arrived: asyncio.Queue[Arrived], number: int, what: Token | Exception | None) -> None:
        """Pass on an event of answer `number`, in the engine's thread."""
        self._post.put(loop, arrived, (number, what))

    def end(self, chosen: list[Choice]) -> None:
        """Cancel the running answers of a request, and count it."""
        job = chosen[0].job
        self.metrics.finished(chosen)
        self.scheduler.cancel(job)
        facts = {
            "prompt_tokens": len(job.ids),
            "cached_tokens": job.cached,
            "tokens": sum(len(choice.tokens) for choice in chosen),
            "seconds": round(time.monotonic() - job.asked, 3),
            "mode": job.engine.mode,
        }
        log.info("answered", extra={"facts": facts})

    def borders(self, messages: list[dict[str, Any]], ids: list[int]) -> tuple[int, ...]:
        """The places, in ids, at which other conversations may part from this one.

        Chats with the same system prompt share the ids before the first message after it. Other ends of this chat share
        those before the last message. Its next turn goes on from the end of the answer.
        """
        first = next((place for place, each in enumerate(messages) if each["role"] not in ("system", "developer")), 0)
        found = set()
        for place in {first, len(messages) - 1}:
            with suppress(Refused, OfframpError):  # the other conversation may be too long, or refused by the template
                other = self.rendered([*messages[:place], {**messages[place], "content": OTHER}])
                found.add(begin_alike([ids, other]))
        return tuple(sorted(found - {0}))

    def rendered(self, messages: list[dict[str, Any]]) -> list[int]:
        """A conversation's ids. Raises `Refused` if the model has no chat template, or if that refuses the messages."""
        if not getattr(self.backbone.tokenizer, "chat_template", None):
            raise Refused(400, f"{self.rules.name} has no chat template. Use /v1/completions.", "messages")
        try:
            return self.backbone.prompts.encode_chat(messages)
        except OfframpError:
            raise
        except Exception as error:  # a template may raise anything
            raise Refused(400, f"The model's chat template refuses these messages: {error}", "messages") from error

    def logprobs_of(self, choice: Choice, index: int) -> tuple[Token, int, float, list[tuple[int, float]]]:
        """A token of a choice, its id and log probability, and the likeliest tokens with theirs."""
        assert choice.logprobs
        token = choice.tokens[index]
        id, nats, best = choice.logprobs.found.get(len(choice.job.ids) + index, (token.id, 0.0, []))
        return token, id, nats, best

    def usage(self, chosen: list[Choice]) -> completions.CompletionUsage:
        """The numbers of a request's tokens: in the prompt, in its cached part, and in the answers."""
        prompt, made = len(chosen[0].job.ids), sum(len(choice.tokens) for choice in chosen)
        details = {"cached_tokens": chosen[0].job.cached}
        return completions.CompletionUsage.model_validate({
            "prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made,
            "prompt_tokens_details": details,
        })  # fmt: skip

    def about(self, choice: Choice) -> dict[str, Any]:
        """The work of exits for an answer: each token's block and confidence, and whether it was a draft; and totals."""
        job, engine, blocks = choice.job, choice.job.engine, self.backbone.n_blocks
        tokens = [choice.note(token) for token in choice.tokens]
        prompt = {"prompt_token_ids": job.ids} if choice.shows_ids else {}
        made = job.made
        if made is None:
            return {"tokens": tokens, **prompt}
        drafts, stood = drafts_of(choice.tokens)
        return {
            "tokens": tokens,
            **prompt,
            "blocks": blocks,
            "mean_blocks": made.mean_blocks,
            "flops_saved": made.flops_saved,
            "mode": made.mode,
            "num_draft_tokens": drafts,
            "num_accepted_tokens": stood,
            "acceptance_rate": made.acceptance_rate,
            "tokens_per_pass": made.tokens_per_deep_pass,
            "prefill_seconds": made.prefill_seconds,
            "tokens_per_second": made.decode_tokens_per_second,
            "guarantee": None if choice.used is None else self.menu.guarantee(engine, **choice.used),
        }


def _wanted_logprobs(asked: AnswerRequest) -> int | None:
    if isinstance(asked, ChatRequest):
        return asked.top_logprobs if asked.logprobs else None
    return asked.logprobs if isinstance(asked, CompletionRequest) else None


def refused(error: BaseException) -> Refused:
    """The words for a client about an error."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, Refused):
        return error
    if isinstance(error, Full):
        return Refused(429, f"{error} {error.hint}", None, "rate_limit_exceeded", {"Retry-After": str(error.seconds)})
    if isinstance(error, BadInput):
        return Refused(413 if isinstance(error, TooLarge) else 400, f"{error} {error.hint}")
    if not isinstance(error, OfframpError):
        log.error("request failed", exc_info=error)
    return Refused(500, f"The engine failed: {error}" if isinstance(error, OfframpError) else "The engine failed.")
