"""Requests to the engine, and what it gives back: tokens, events and finished answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypedDict

import torch
from torch import Tensor

from offramp.decode.detokenizer import Detokenizer
from offramp.decode.sampling import Choose
from offramp.decode.sequence import Decision, Sequence, TokenSource


class Limits(TypedDict, total=False):
    """When an answer ends.

    `max_tokens`: the most tokens to generate (default 128); `stop`: the answer ends before the first of these texts
    (default none); `end_ids`: tokens that end a text (default: those that the model names).
    """

    max_tokens: int
    stop: tuple[str, ...]
    end_ids: frozenset[int]


@dataclass(frozen=True)
class Token:
    """One generated token.

    `exit_block` is the number of blocks before the exit that chose it (with `verify`, before the draft that stood), and the
    model's depth for a token of full depth. `source` says what the token came from, and `drafted` whether it was a draft
    that full depth confirmed. `blocks` counts all blocks that were run for it: those before its exit, the tails of all
    exits that were asked, and blocks that ran for tokens deferred or taken back. `confidence` is that of the exit where it
    left (None at full depth). `deep_passes` counts the answer's chunks that have gone to the top so far, and `rejected` its
    drafts that have been rejected so far.
    """

    id: int
    text: str
    exit_block: int
    blocks: int
    confidence: float | None
    flops: int
    cumulative_flops: int
    deep_passes: int
    rejected: int
    source: TokenSource
    drafted: bool


def drafts_of(tokens: list[Token]) -> tuple[int, int]:
    """How many drafts were made for an answer's tokens, and how many stood."""
    stood = sum(token.drafted for token in tokens)
    return stood + (tokens[-1].rejected if tokens else 0), stood


FinishReason = Literal["stop", "length", "cancelled", "failed"]


@dataclass(eq=False)
class Request:
    """A text to continue until an end token, a stop string or the limit.

    `remaining`: the number of tokens that may still be generated; `tokens`: those generated so far. `verified`: full depth
    decides each token, so that those of other sources were drafts. `pauses`: positions in the prompt where reading pauses,
    so that the state there can be kept. `error`: what ended the
    request if its finish reason is "failed".
    """

    sequence: Sequence
    remaining: int
    end_ids: frozenset[int]
    detokenizer: Detokenizer
    choose: Choose
    verified: bool = False
    prefilled: bool = False
    pauses: list[int] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: BaseException | None = None

    @contextmanager
    def own(self) -> Iterator[None]:
        """Run code that belongs to this request alone: an exception in it ends this request, and no other."""
        try:
            yield
        except Exception as error:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """End with an error. The blocks' memory may be half-written."""
        self.finish_reason, self.error, self.sequence.whole = "failed", error, False

    @cached_property
    def reads_all(self) -> bool:
        """Whether `choose` asks full depth to read out all tokens, even if there is a sketch of the head."""
        return bool(getattr(self.choose, "reads_all", False))

    @cached_property
    def ends(self) -> Tensor:
        """`end_ids` as a tensor."""
        return torch.tensor(sorted(self.end_ids), dtype=torch.int64)

    def accept(self, decision: Decision, after: list[Decision]) -> Token:
        """Append the token of a decision. An end token, a stop string or the limit sets `finish_reason`.

        `after` are the step's decisions that follow. If the answer ends here, nobody gets them, but they cost work.
        """
        self.remaining -= 1
        ended = decision.id in self.end_ids
        text = self.detokenizer.push(decision.id, last=ended or not self.remaining)
        if ended or self.detokenizer.stopped:
            self.finish_reason = "stop"
        elif not self.remaining:
            self.finish_reason = "length"
        work = decision.work.plus(*(each.work for each in after)) if self.finish_reason else decision.work
        spent = self.tokens[-1].cumulative_flops if self.tokens else 0
        token = Token(
            decision.id,
            text,
            decision.block,
            work.blocks,
            decision.confidence,
            work.flops,
            spent + work.flops,
            decision.deep_passes,
            decision.rejected,
            decision.source,
            self.verified and decision.source != "full",
        )
        self.tokens.append(token)
        return token


@dataclass(frozen=True, eq=False)
class Reading:
    """A piece of a long prompt has been read: now `tokens` of the `total` tokens before the answer."""

    request: Request
    tokens: int
    total: int


@dataclass(frozen=True, eq=False)
class Prefilled:
    """The prompt of a request has been read: the prefill is over."""

    request: Request


@dataclass(frozen=True, eq=False)
class Decided:
    """A token of a request has been decided."""

    request: Request
    token: Token


@dataclass(frozen=True, eq=False)
class Finished:
    """A request has ended; `request.finish_reason` says why."""

    request: Request


Event = Reading | Prefilled | Decided | Finished


@dataclass(frozen=True)
class Generation:
    """A finished answer and its cost.

    `blocks` is the model's depth N; `mean_blocks` is the tokens' mean `blocks`. `flops_saved` is 1 − FLOPs of decoding
    (blocks, fills, gates, read-outs, heads) / FLOPs of full-depth decoding of the same tokens, both without the prefill.
    `tokens_per_deep_pass` is the number of tokens for each pass through the top blocks. `acceptance_rate` is the share of
    drafts that stood (None without drafts). `thresholds`: those of the exits, by block; `policy`: the policy in words.
    """

    text: str
    tokens: list[Token]
    blocks: int
    mean_blocks: float
    flops_saved: float
    tokens_per_deep_pass: float
    acceptance_rate: float | None
    prefill_seconds: float
    decode_tokens_per_second: float
    mode: str
    fill: str
    thresholds: dict[int, float]
    policy: str
    finish_reason: str  # "stop" or "length"

    @property
    def ids(self) -> list[int]:
        """The ids of the generated tokens."""
        return [token.id for token in self.tokens]


class Talk:
    """A text that grows turn by turn. The next request with this talk reuses the memory of the text."""

    def __init__(self, sequence: Sequence | None = None) -> None:
        self.sequence = sequence

    def fork(self) -> Talk:
        """A copy of this talk, which goes on independently."""
        return Talk(self.sequence.fork() if self.sequence else None)
