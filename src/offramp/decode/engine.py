"""The decode loop: one token at a time, block range by block range, leaving at the first exit that is sure enough.

A step embeds the newest token and runs it up to the first exit. There the gate reads the hidden state. If its
confidence is above the threshold, the read-out turns the hidden state into logits and the token leaves; otherwise it
goes on to the next exit, and at last to the top.

    embed ─ blocks ─┬─ blocks ─┬─ blocks ─ norm ─ head
                  exit 1     exit 2

What the blocks that a token skipped remember of it is the fill's business. Most fills make something up at once (see
`decode.fills`). Two wait instead: a token that left stands in a queue at its exit, and the next one that goes on takes
all who wait there along as one chunk, for which the weights are read only once. So every block sees every token in the
end, and its state is exact.

`defer`: what the exit said stands. `verify`: it is a draft; once the token has reached the top, the full model's logits
decide, drafts that differ are taken back, and only what stands is given out. The tokens are those of full depth.

Exits whose threshold is 1 never fire, so they are left out altogether: full depth costs nothing extra.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from offramp.decode.detokenizer import Text
from offramp.decode.fills import FILLS, WAITING, make_fill
from offramp.decode.sampling import Choose, Sampling
from offramp.decode.sequence import Decision, Sequence, looked_up
from offramp.errors import BadInput, BadNumbers
from offramp.exits.exits import Exits
from offramp.exits.policy import PATIENCE, TRAINING_FREE, Policy
from offramp.model.backbone import Backbone, Step
from offramp.model.costs import Costs
from offramp.model.lean.base import LeanStep, joined

ALL_FILLS = (*FILLS, *WAITING)
SHARED = 64  # tokens that prompts side by side must begin with alike to have them read once
FOUND = 3  # drafts taken from a place where the text repeats itself: four rows cost little more than one, eight do


@dataclass(frozen=True)
class Token:
    """One generated token.

    `exit_block` is the number of blocks run for its logits (with `verify`, for the draft that stood), `confidence` the
    exiting gate's. `deep_passes` and `rejected` count, up to here, the chunks that went to the top and the drafts taken
    back.
    """

    id: int
    text: str
    exit_block: int
    confidence: float | None  # None at full depth
    flops: int
    cumulative_flops: int
    deep_passes: int
    rejected: int


@dataclass(frozen=True)
class Generation:
    """A finished answer and what it cost.

    `blocks` is the model's depth N; `flops_saved` is 1 − FLOPs of decoding (blocks, fills, gates, read-outs, heads) over
    full-depth decoding of the same tokens, the prefill left out of both. `tokens_per_deep_pass` is how many tokens came
    for each pass through the top blocks, and `acceptance_rate` the share of drafts that stood (None but for `verify`).
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
    fill: str
    thresholds: dict[int, float]
    finish_reason: str  # "stop" or "length"

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]


@dataclass
class Run:
    """Work that a sequence asks for: h (1, T, D) through blocks `start` to `stop` - 1."""

    sequence: Sequence
    h: Tensor
    step: Step | LeanStep
    start: int
    stop: int


@dataclass
class Read:
    """Work that a sequence asks for: the logits (n, V) of h (1, n, D), or what else the head gives."""

    h: Tensor
    head: Head


@dataclass(eq=False)
class Head:
    """From hidden states (…, D) to logits, and the FLOPs of one."""

    logits: Callable[[Tensor], Tensor]
    flops: int

    @classmethod
    def sketched(cls, backbone: Backbone, sketch: tuple[Tensor, Tensor] | None, candidates: int) -> Head:
        """One that reads out so many candidates. Raises `BadInput` for exits without a sketch and for too many."""
        if sketch is None or candidates > backbone.vocab_size:
            raise BadInput(
                f"{candidates} candidates cannot be read out: "
                + (
                    "the exits hold no sketch of the head."
                    if sketch is None
                    else f"there are {backbone.vocab_size} tokens."
                ),
                "Give 0 for all tokens, or exits trained with --sketch.",
            )
        dims, hidden = sketch[0].shape
        flops = 2 * (hidden * dims + backbone.vocab_size * dims + candidates * hidden)
        return cls(backbone.sketched(*sketch, candidates), flops)


Work = Generator["Run | Read", Tensor, Any]


@dataclass
class _Reached:
    """How far a step got: logits (n, V) of the newest tokens, after so many blocks, what they were read from, how sure."""

    logits: Tensor
    h: Tensor  # (1, n, D)
    block: int
    confidence: float | None
    flops: int


class Engine:
    """Decodes with a backbone and, if given, its exits.

    `policy` defaults to the exits' own thresholds; `fill` is one of `ALL_FILLS`; `sampling` defaults to the most probable
    token, and may be a function of its own; at most `max_pending` tokens wait at exits, so that a chunk has at most one row
    more: at the cap, a token goes to the top whatever its gates say; with `verify`, a text that repeats its last `lookup`
    tokens is first taken to repeat what followed them (0: not). Raises `BadInput` for a policy that does not fit the exits.
    """

    def __init__(
        self,
        backbone: Backbone,
        exits: Exits | None = None,
        policy: Policy | None = None,
        fill: str = "project",
        sampling: Sampling | Choose | None = None,
        max_pending: int = 7,
        lookup: int = 3,
    ) -> None:
        self.backbone, self.fill_name = backbone, fill
        self._verifies = fill == "verify"
        self._fill = None if fill in WAITING else make_fill(fill, backbone)
        if exits and policy is None and exits.calibration:
            self._check_guarantee(exits)
        policy = policy or (exits.policy if exits else Policy(()))
        if len(policy.thresholds) != (len(exits) if exits else 0):
            raise BadInput(
                f"{len(policy.thresholds)} thresholds do not fit {len(exits) if exits else 0} exits.",
                "Give one threshold for each exit.",
            )
        if max_pending < 1:
            raise BadInput(f"At most {max_pending} waiting tokens is too few.", "1 or more.")
        self.policy = policy
        self.thresholds = {exit.block: threshold for exit, threshold in zip(exits or (), policy.thresholds, strict=True)}
        self._open = [(exit, index) for index, exit in enumerate(exits or ()) if policy.thresholds[index] < 1]
        self._stops = [*(exit.block for exit, _ in self._open), backbone.n_blocks]
        sampling = sampling or Sampling()
        self._choose: Choose = sampling.chooser() if isinstance(sampling, Sampling) else sampling
        self._max_pending, self._lookup = max_pending, lookup if self._verifies else 0
        self._shortlist = exits.shortlist if exits else None
        self.costs = Costs(backbone)
        self._head = self._exit_head = Head(backbone.logits, self.costs.head)
        if policy.candidates and not self._verifies:
            self._head = self._exit_head = Head.sketched(backbone, exits.sketch if exits else None, policy.candidates)
        if self._shortlist is not None:
            share = self.costs.head * len(self._shortlist) // backbone.vocab_size
            self._exit_head = Head(backbone.head_of(self._shortlist), share)
        self._gate_flops = [exit.gate.flops() for exit, _ in self._open]
        self._adapter_flops = [exit.adapter.flops() for exit, _ in self._open]

    @property
    def parts(self) -> list[torch.nn.Module]:
        """The gates and the read-outs' adapters that are in use."""
        return [part for exit, _ in self._open for part in (exit.gate, exit.adapter)]

    @property
    def prefill_flops(self) -> int:
        """What gates and read-outs that remember cost for each token of a prompt."""
        gates = zip(self._open, self._gate_flops, self._adapter_flops, strict=True)
        return sum(exit.gate.recurrent * gate + exit.adapter.recurrent * adapter for (exit, _), gate, adapter in gates)

    def generate(self, prompt: str, max_tokens: int = 128, stop: tuple[str, ...] = (), raw: bool = False) -> Generation:
        """Answer a prompt: `stream` run to its end, with times and totals."""
        return self.generate_ids(self.backbone.encode(prompt, raw), max_tokens, stop)

    def generate_ids(self, ids: list[int], max_tokens: int = 128, stop: tuple[str, ...] = ()) -> Generation:
        """`generate` from token ids."""
        return self.generate_batch([ids], max_tokens, stop)[0]

    def generate_batch(
        self, prompts: Many[list[int]], max_tokens: int = 128, stop: tuple[str, ...] = ()
    ) -> list[Generation]:
        """Answer several prompts, given as token ids, side by side.

        Each sequence leaves where it likes and ends when it likes. Nothing is padded: each has its own memory, and only
        the passes over the weights are shared (where the lean path is compiled; elsewhere sequences take turns), and what
        neighbours begin with alike, such as the examples before a question, is read once. Times in the results are those
        of the whole batch.
        """
        started = time.perf_counter()
        stream = self.stream_batch(prompts, max_tokens, stop)
        answers: list[list[Token]] = [[] for _ in prompts]
        reading = len(prompts)
        prefilled = started
        for index, token in stream:
            if token is not None:
                answers[index].append(token)
                continue
            reading -= 1
            if not reading:
                prefilled = time.perf_counter()
        prefill, decode = prefilled - started, time.perf_counter() - prefilled
        return [
            self.summarise(tokens, len(ids), max_tokens, prefill, decode)
            for ids, tokens in zip(prompts, answers, strict=True)
        ]

    def stream(self, prompt: str, max_tokens: int = 128, stop: tuple[str, ...] = (), raw: bool = False) -> Iterator[Token]:
        """Yield tokens as they are decided, until an end-of-text token, a stop string or `max_tokens`.

        A token's text may be empty and come with a later one: a character can span tokens, and text that may turn out
        to begin a stop string is held back. Raises `BadInput` (empty prompt, prompt beyond the context) and
        `BadNumbers` (NaN logits).
        """
        ids = self.backbone.encode(prompt, raw)
        return (token for token in self.stream_ids(ids, max_tokens, stop) if token is not None)

    def stream_ids(
        self, ids: list[int], max_tokens: int = 128, stop: tuple[str, ...] = (), talk: Talk | None = None
    ) -> Iterator[Token | None]:
        """`stream` from token ids; yields None once, when the prompt has been prefilled.

        With a `talk`, what was computed for the beginning of the same text is used again, and kept for the next turn.
        """
        talks = None if talk is None else [talk]
        return (token for _, token in self.stream_batch([ids], max_tokens, stop, talks))

    @torch.inference_mode()
    def stream_batch(
        self,
        prompts: Many[list[int]],
        max_tokens: int = 128,
        stop: tuple[str, ...] = (),
        talks: Many[Talk] | None = None,
        ends: frozenset[int] | None = None,
    ) -> Iterator[tuple[int, Token | None]]:
        """`stream_ids` for several prompts side by side: yields each token with the number of its prompt.

        `ends`: the tokens that end a text, instead of the model's own.
        """
        ends = self.backbone.stop_ids if ends is None else ends
        if max_tokens < 1:
            raise BadInput(f"{max_tokens} tokens cannot be generated.", "Give --max-tokens 1 or more.")
        works = []
        for ids in prompts:
            self.backbone.check_prompt(ids)
        for ids, talk in zip(prompts, talks or self._talks(prompts), strict=True):
            limit = min(max_tokens, self.backbone.context - len(ids))
            works.append(self._decode(self._sequence(ids, limit, talk), limit, stop, ends))
        yield from self._drive(works)

    def forked(self, ids: Many[int], count: int) -> list[Talk]:
        """Read these ids once, for so many texts that go on from them."""
        talk = Talk()
        next(self.stream_ids(list(ids), 1, talk=talk))
        shared = {id(part): part for part in self.parts}  # weights need no copies
        return [talk, *(copy.deepcopy(talk, dict(shared)) for _ in range(count - 1))]

    def _talks(self, prompts: Many[list[int]]) -> list[Talk]:
        """A talk for each prompt; neighbours that mostly begin alike have read that already."""
        groups: list[tuple[list[int], int]] = []  # what all of a group begin with, and how many they are
        for ids in prompts:
            if groups:
                begin, count = groups[-1]
                common = [
                    one for one, other in takewhile(lambda pair: pair[0] == pair[1], zip(begin, ids[:-1], strict=False))
                ]
                if len(common) >= max(SHARED, len(begin) / 2):
                    groups[-1] = common, count + 1
                    continue
            groups.append((ids[:-1], 1))
        return [talk for begin, count in groups for talk in (self.forked(begin, count) if count > 1 else [Talk()])]

    def summarise(
        self, tokens: list[Token], prompt_length: int, max_tokens: int, prefill_seconds: float, decode_seconds: float
    ) -> Generation:
        """Totals for tokens that `stream_ids` gave after a prompt of `prompt_length` tokens."""
        full = sum(self.costs.full(prompt_length + index) for index in range(len(tokens)))
        end = tokens[-1]
        drafted = end.rejected + sum(token.exit_block < self.backbone.n_blocks for token in tokens)
        stopped = len(tokens) < max_tokens or tokens[-1].id in self.backbone.stop_ids
        return Generation(
            text="".join(token.text for token in tokens),
            tokens=tokens,
            blocks=self.backbone.n_blocks,
            mean_blocks=sum(token.exit_block for token in tokens) / len(tokens),
            flops_saved=1 - tokens[-1].cumulative_flops / full,
            tokens_per_deep_pass=len(tokens) / max(1, end.deep_passes),
            acceptance_rate=1 - end.rejected / drafted if self._verifies and drafted else None,
            prefill_seconds=prefill_seconds,
            decode_tokens_per_second=len(tokens) / decode_seconds,
            fill=self.fill_name,
            thresholds=self.thresholds,
            finish_reason="stop" if stopped else "length",
        )

    def _sequence(self, ids: list[int], limit: int, talk: Talk) -> Sequence:
        """A sequence of these ids: what the talk remembers of their beginning, or a new one, which it is given."""
        old = talk.sequence
        if old is not None and old.run < len(ids) and old.ids[: old.run] == ids[: old.run] and not old.drafts:
            old.ids, old.prompt = list(ids), len(ids)
            return old
        state = self.backbone.state(len(ids) + limit)
        talk.sequence = Sequence.new(ids, state, [exit for exit, _ in self._open])
        return talk.sequence

    def _drive(self, works: list[Generator[Any, Any, None]]) -> Iterator[tuple[int, Token | None]]:
        """Have the sequences' work done, like work together, the shallowest first; yield what they give out."""
        asked: dict[int, Run | Read] = {}
        answers: dict[int, Tensor | None] = dict.fromkeys(range(len(works)))
        while answers:
            for index, answer in answers.items():
                try:
                    given = works[index].send(answer)
                    while given is None or isinstance(given, Token):
                        yield index, given
                        given = next(works[index])
                    asked[index] = given
                except StopIteration:
                    pass
            answers = self._serve(asked)
            for index in answers:
                del asked[index]

    def _serve(self, asked: dict[int, Run | Read]) -> dict[int, Tensor | None]:
        """Do those of the works that start lowest, heads last, and return what each gave."""
        runs = {index: work for index, work in asked.items() if isinstance(work, Run)}
        if not runs:
            works = {index: work for index, work in asked.items() if isinstance(work, Read)}
            if not works:
                return {}
            head = next(iter(works.values())).head
            reads = {index: work.h for index, work in works.items() if work.head is head}
            logits = self._finite(head.logits(joined(list(reads.values()), dim=1))[0])
            parts = [logits] if len(reads) == 1 else logits.split([h.shape[1] for h in reads.values()])
            return dict(zip(reads, parts, strict=True))
        start, stop = min((work.start, work.stop) for work in runs.values())
        chosen = {index: work for index, work in runs.items() if (work.start, work.stop) == (start, stop)}
        runnable = [(work.h, work.sequence.state, work.step) for work in chosen.values()]
        return dict(zip(chosen, self.backbone.run_all(runnable, start, stop), strict=True))

    def _decode(
        self, sequence: Sequence, limit: int, stop: tuple[str, ...], ends: frozenset[int]
    ) -> Generator[Any, Any, None]:
        """Everything one sequence needs: asks for work, yields None after the prompt, then tokens."""
        yield from self._prefill(sequence)
        yield None
        text, total = Text(self.backbone.tokenizer, stop), 0
        while True:
            for one in (yield from self._round(sequence, limit, ends)):
                limit -= 1
                total += one.flops
                ended = one.id in ends
                piece = text.push(one.id, last=ended or limit == 0)
                passes, rejected = sequence.deep_passes, sequence.rejected
                yield Token(one.id, piece, one.block, one.confidence, one.flops, total, passes, rejected)
                if ended or text.stopped or not limit:
                    return

    def _prefill(self, sequence: Sequence) -> Work:
        """All of the prompt but its last token, at full depth; gates and read-outs that remember see it too."""
        if sequence.run < len(sequence.ids) - 1:
            reached = yield from self._climb(sequence, len(sequence.ids) - 1, may_leave=False)
            sequence.top = reached.h[:, -1:]
            for part in (*sequence.gates, *sequence.adapters):
                part.catch_up()
        sequence.settle()

    def _round(self, sequence: Sequence, limit: int, ends: frozenset[int]) -> Generator[Run | Read, Tensor, list[Decision]]:
        """Steps until tokens are decided, at most `limit`: one, or with `verify` the drafts that stand and one more."""
        drafts, ids = sequence.drafts, sequence.ids
        if self._lookup and (found := looked_up(ids, self._lookup, min(FOUND, self._max_pending, limit - 1))):
            drafts += [Decision(id, 0, None, 0) for id in found]
            ids += found
            reached = yield from self._climb(sequence, len(ids), may_leave=False, read=True)
            return self._judge(sequence, reached)
        while True:
            # The last draft ends the text: verify it, but do not go on from it.
            last = bool(drafts) and (len(drafts) == limit or ids[-1] in ends)
            may_leave = not last and sequence.pending < self._max_pending
            reached = yield from self._climb(sequence, len(ids) - last, may_leave, read=True)
            if reached.block < self.backbone.n_blocks:
                chosen = self._choose(reached.logits[-1], ids)
                decision = Decision(chosen, reached.block, reached.confidence, reached.flops)
                ids.append(chosen)
                sequence.top = reached.h
                if not self._verifies:
                    sequence.settle()
                    return [decision]
                drafts.append(decision)
                continue
            return self._judge(sequence, reached)

    def _judge(self, sequence: Sequence, reached: _Reached) -> list[Decision]:
        """Compare the drafts with what full depth chooses at their places; take back all from the first wrong one on."""
        ids, drafts = sequence.ids, sequence.drafts
        sequence.deep_passes += 1
        decided: list[Decision] = []
        for row, logits in enumerate(reached.logits):
            sequence.top = reached.h[:, row : row + 1]
            place = len(ids) - len(drafts) + len(decided)
            chosen = self._choose(logits, ids[:place])
            if place < len(ids) and chosen == ids[place]:
                decided.append(drafts[len(decided)])
                continue
            wasted = drafts[len(decided) :]
            sequence.rejected += len(wasted)
            if wasted:
                sequence.crop(place)
            ids.append(chosen)
            flops = reached.flops + sum(draft.flops for draft in wasted)
            decided.append(Decision(chosen, reached.block, None, flops))
            break
        else:  # the last draft ended the text, and stands
            decided[-1] = replace(decided[-1], flops=decided[-1].flops + reached.flops)
        sequence.settle()
        return decided

    def _climb(
        self, sequence: Sequence, end: int, may_leave: bool, read: bool = False
    ) -> Generator[Run | Read, Tensor, _Reached]:
        """Run the tokens up to position `end` through all blocks, those that wait at exits joining them there.

        The newest may leave on its way. With `read`, the logits of those that reached the top are asked for.
        """
        backbone, flops, done, h, step = self.backbone, 0, 0, None, None
        said: list[int] = []
        if sequence.run < end:
            h, step = backbone.embed(torch.tensor([sequence.ids[sequence.run : end]], device=backbone.device), sequence.run)
            sequence.run = end
        for index, stop in enumerate(self._stops):
            if h is not None and step is not None:
                if sequence.drafts:
                    sequence.state.watch(done, stop)
                h = yield Run(sequence, h, step, done, stop)
                if read:  # the prompt's are not counted
                    spans = range(end - h.shape[1] + 1, end + 1)
                    flops += sum(self.costs.block(block, span) for block in range(done, stop) for span in spans)
            done = stop
            if index == len(self._open):
                break
            if h is not None and step is not None:
                sequence.gates[index].tell(h)
                sequence.adapters[index].tell(self._deepened(h, sequence) if self._open[index][0].adapter.reads_top else h)
                if may_leave:
                    confidence, logits, adapted, spent = yield from self._consider(index, sequence, said)
                    flops += spent
                    if logits is not None and adapted is not None:
                        return _Reached(logits, adapted, done, confidence, flops + self._left(index, sequence, h, step))
            waiting = sequence.waiting[index]
            if waiting:
                h = torch.cat(waiting if h is None else [*waiting, h], dim=1)
                step = backbone.step(h, end - h.shape[1])
                waiting.clear()
        assert h is not None
        if not read:
            return _Reached(h, h, done, None, flops)
        if not self._verifies and h.shape[1] > 1:
            h = h[:, -1:]
        logits = yield Read(h, self._head)
        return _Reached(logits, h, done, None, flops + h.shape[1] * self._head.flops)

    def _deepened(self, h: Tensor, sequence: Sequence) -> Tensor:
        """The newest of h (1, n, D), and beside it the top hidden state of the token before: (1, 1, 2 D)."""
        newest = h[:, -1:]
        top = torch.zeros_like(newest) if sequence.top is None else sequence.top.to(newest.dtype)
        return torch.cat([newest, top], dim=-1)

    def _left(self, index: int, sequence: Sequence, h: Tensor, step: Step | LeanStep) -> int:
        """The newest token has left at an exit, with h (1, n, D) of all that got there with it; FLOPs spent on that."""
        if self._fill is None:
            sequence.waiting[index].append(h)
            return 0
        block = self._open[index][0].block
        self._fill(h, block, sequence.state, step)
        return self._fill.flops(block, self.costs)

    def _consider(
        self, index: int, sequence: Sequence, said: list[int]
    ) -> Generator[Run | Read, Tensor, tuple[float, Tensor | None, Tensor | None, int]]:
        """Confidence of an exit in its newest token; if that leaves here, its logits (1, V) and what they were read from

        (1, 1, D); the FLOPs spent. A draft is only worth what all drafts before it are worth, too. `said`: the tokens that
        the exits before read out.
        """
        gate, adapter = sequence.gates[index], sequence.adapters[index]
        threshold, flops = self.policy.threshold(self._open[index][1], len(sequence.ids) - sequence.prompt), 0
        threshold /= math.prod(draft.confidence or 1.0 for draft in sequence.drafts)
        confidence, gated = 1.0, self.policy.confidence == "gate"
        if gated and threshold > 0:
            score, rows = gate.read()
            flops += rows * self._gate_flops[index]
            confidence = float(score.sigmoid())
            if not confidence > threshold:
                return confidence, None, None, flops
        adapted, rows = adapter.read()
        vocabulary, shortlist = self.backbone.vocab_size, self._shortlist
        flops += rows * self._adapter_flops[index] + self._exit_head.flops
        logits = yield Read(adapted.to(self.backbone.dtype), self._exit_head)
        if not gated:
            if self.policy.confidence == PATIENCE:
                said.append(int(logits[0].argmax()))
                alike = takewhile(said[-1].__eq__, reversed(said))
                confidence = sum(1 for _ in alike) / len(self._open)
            else:
                confidence = float(TRAINING_FREE[self.policy.confidence](logits[0]))
            if not confidence > threshold:
                return confidence, None, None, flops
        if shortlist is not None:
            logits = logits.new_full((1, vocabulary), float("-inf")).index_copy_(1, shortlist, logits)
        return confidence, logits, adapted, flops

    def _check_guarantee(self, exits: Exits) -> None:
        """Warn where the exits' calibrated policy is used otherwise than it was calibrated."""
        calibrated, here = exits.calibration, {"fill": self.fill_name, "weights": self.backbone.weight_format}
        other = [
            f"{name} {calibrated.get(name)}, not {value}" for name, value in here.items() if calibrated.get(name) != value
        ]
        if other and not self._verifies:
            warnings.warn(
                f"These thresholds were calibrated with {' and '.join(other)}: here they guarantee nothing. "
                "Calibrate anew: offramp calibrate",
                stacklevel=3,
            )

    def _finite(self, logits: Tensor) -> Tensor:
        if not torch.isfinite(logits.amax()):
            raise BadNumbers(
                f"{self.backbone.name} gave NaN or infinite logits in {self.backbone.weight_format}.",
                "Try --dtype float32; if that fails too, the weights are damaged: fetch them again.",
            )
        return logits


class Talk:
    """What has been computed of a text that goes on, turn after turn. Give it to `Engine.stream_ids` each time."""

    def __init__(self) -> None:
        self.sequence: Sequence | None = None
