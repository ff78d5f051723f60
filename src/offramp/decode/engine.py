"""The engine: a backbone, its exits and a policy, ready to decode. How a step works is in `decode.batch`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Unpack

from offramp.decode.batch import Batch
from offramp.decode.fills import fill_named
from offramp.decode.heads import Head
from offramp.decode.request import Decided, Generation, Limits, Prefilled, Request, Talk, Token
from offramp.decode.sampling import Choose, Sampling
from offramp.decode.timing import Timed, untimed
from offramp.errors import BadInput
from offramp.exits.exits import Exit, Exits
from offramp.exits.policy import Policy
from offramp.model.backbone import Backbone
from offramp.model.costs import Costs

SHARED = 64  # tokens that neighbouring prompts must have in common, for these to be read only once


@dataclass(frozen=True)
class Segment:
    """Blocks `start` to `stop` - 1, which lie between two exits."""

    start: int
    stop: int


class Engine:
    """Decodes with a backbone and, if given, its exits.

    `policy`: when a token leaves (the exits' own by default); `fill`: a name in `decode.fills.FILLS`; `sampling`: how a
    token is chosen (the most probable by default), or a function from logits (V,) and the ids before to an id;
    `max_pending`: the most tokens that wait at exits; when that many wait, the next token goes to the top without asking
    gates, so a chunk has at most `max_pending` + 1 rows; `lookup`: with `verify`, if the last `lookup` tokens stand earlier
    in the text, the tokens that followed them there are drafts (0: no look-up). To see where time goes, set `timed` to a
    `Timer`. Raises `BadInput` for a policy that does not fit the exits, an unknown fill, and `max_pending` below 1.
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
        if max_pending < 1:
            raise BadInput(f"At most {max_pending} waiting tokens is too few.", "Give 1 or more.")
        self.backbone, self.max_pending = backbone, max_pending
        self.timed: Timed = untimed
        self.fill = fill_named(fill)(backbone)
        self.lookup = lookup if self.fill.verifies else 0
        self.costs = Costs(backbone)
        sampling = sampling or Sampling()
        self.choose: Choose = sampling.chooser() if isinstance(sampling, Sampling) else sampling
        if exits and policy is None and exits.calibration:
            self._check_guarantee(exits)
        self.policy = policy or (exits.policy if exits else Policy(()))
        self._open(exits)
        self._choose_heads(exits)

    def _open(self, exits: Exits | None) -> None:
        """Divide the blocks at the exits that are open: those whose threshold is below 1."""
        all_exits = list(exits or ())
        thresholds = self.policy.thresholds
        if len(thresholds) != len(all_exits):
            raise BadInput(
                f"{len(thresholds)} thresholds do not fit {len(all_exits)} exits.", "Give one threshold for each exit."
            )
        self.thresholds = {exit.block: threshold for exit, threshold in zip(all_exits, thresholds, strict=True)}
        self.open_exits: list[tuple[Exit, int]] = [
            (exit, index) for index, exit in enumerate(all_exits) if thresholds[index] < 1
        ]
        bounds = [0, *(exit.block for exit, _ in self.open_exits), self.backbone.n_blocks]
        self.segments = [Segment(start, stop) for start, stop in pairwise(bounds)]
        self.top = len(self.segments) - 1

    def _choose_heads(self, exits: Exits | None) -> None:
        """Set `head`, which reads out at the top, and `exit_head`, which reads out at exits."""
        self.head = Head.whole(self.backbone)
        if self.policy.candidates and not self.fill.verifies:
            self.head = Head.sketched(self.backbone, exits.sketch if exits else None, self.policy.candidates)
        shortlist = exits.shortlist if exits else None
        self.exit_head = self.head if shortlist is None else Head.short(self.backbone, shortlist)

    @property
    def prefill_flops(self) -> int:
        """FLOPs of recurrent gates and read-outs for each token of a prompt."""
        parts = [part for exit, _ in self.open_exits for part in (exit.gate, exit.adapter)]
        return sum(part.flops() for part in parts if part.recurrent)

    def segment_flops(self, segment: Segment, tokens: int, end: int) -> int:
        """FLOPs of a segment's blocks for `tokens` tokens, the last of which is at position `end` - 1."""
        blocks, contexts = range(segment.start, segment.stop), range(end - tokens + 1, end + 1)
        return sum(self.costs.block(block, context) for block in blocks for context in contexts)

    def part_of(self, number: int) -> str:
        """The timer's name for a segment: `shallow` before the first open exit, `deep` after it; `blocks` without exits."""
        return "deep" if number else "shallow" if self.top else "blocks"

    def batch(self) -> Batch:
        """An empty batch, to which requests are added. `stream` and `generate` are built on it."""
        return Batch(self)

    def stream(self, prompt: str | list[int], talk: Talk | None = None, **limits: Unpack[Limits]) -> Iterator[Token]:
        """Yield tokens as they are decided, for a prompt (text, or token ids).

        A token's text may be empty and come with a later token: a character can span tokens, and text that may turn out
        to begin a stop string is held back. Raises `BadInput` (empty prompt, prompt beyond the context) and `BadNumbers`
        (NaN logits).
        """
        batch = self.batch()
        batch.add(self._ids(prompt), talk, **limits)
        return (event.token for event in batch.run() if isinstance(event, Decided))

    def generate(self, prompt: str | list[int], **limits: Unpack[Limits]) -> Generation:
        """Answer a prompt (text, or token ids): `stream` run to its end, with times and totals."""
        return self.generate_batch([prompt], **limits)[0]

    def generate_batch(self, prompts: Many[str | list[int]], **limits: Unpack[Limits]) -> list[Generation]:
        """Answer several prompts side by side.

        Sequences leave at exits and end independently. A beginning that neighbouring prompts share, such as the examples
        before a question, is read once. Times in the results are those of the whole batch.
        """
        started = prefilled = time.perf_counter()
        ids = [self._ids(prompt) for prompt in prompts]
        for prompt in ids:
            self.backbone.prompts.check(prompt)
        batch = self.batch()
        requests = [batch.add(prompt, talk, **limits) for prompt, talk in zip(ids, self.shared_talks(ids), strict=True)]
        for event in batch.run():
            if isinstance(event, Prefilled):
                prefilled = time.perf_counter()
        decode = time.perf_counter() - prefilled
        return [self.summarise(request, prefilled - started, decode) for request in requests]

    def read(self, ids: list[int]) -> Talk:
        """A talk that has read all of these ids but the last."""
        talk, batch = Talk(), self.batch()
        batch.add(ids, talk, max_tokens=1)
        batch.step()
        return talk

    def shared_talks(self, prompts: Many[list[int]]) -> list[Talk]:
        """A talk for each prompt. Neighbouring prompts with a long common beginning share what is computed for it."""
        groups: list[tuple[list[int], int]] = []
        for ids in prompts:
            if groups:
                beginning, count = groups[-1]
                pairs = takewhile(lambda pair: pair[0] == pair[1], zip(beginning, ids[:-1], strict=False))
                common = [id for id, _ in pairs]
                if len(common) >= max(SHARED, len(beginning) / 2):
                    groups[-1] = common, count + 1
                    continue
            groups.append((ids[:-1], 1))
        return [talk for beginning, count in groups for talk in (self.forked(beginning, count) if count > 1 else [Talk()])]

    def forked(self, ids: list[int], count: int) -> list[Talk]:
        """`count` talks that have read all of these ids but the last. They are read once."""
        talk = self.read(ids)
        return [talk, *(talk.fork() for _ in range(count - 1))]

    def summarise(self, request: Request, prefill_seconds: float, decode_seconds: float) -> Generation:
        """The answer of a finished request, with totals. The times are given in seconds."""
        tokens, prompt = request.tokens, request.sequence.prompt
        full = sum(self.costs.full(prompt + index) for index in range(len(tokens)))
        last, blocks = tokens[-1], self.backbone.n_blocks
        drafted = last.rejected + sum(token.exit_block < blocks for token in tokens)
        return Generation(
            text="".join(token.text for token in tokens),
            tokens=tokens,
            blocks=blocks,
            mean_blocks=sum(token.exit_block for token in tokens) / len(tokens),
            flops_saved=1 - last.cumulative_flops / full,
            tokens_per_deep_pass=len(tokens) / max(1, last.deep_passes),
            acceptance_rate=1 - last.rejected / drafted if self.fill.verifies and drafted else None,
            prefill_seconds=prefill_seconds,
            decode_tokens_per_second=len(tokens) / decode_seconds,
            fill=self.fill.name,
            thresholds=self.thresholds,
            finish_reason=request.finish_reason or "length",
        )

    def _ids(self, prompt: str | list[int]) -> list[int]:
        return self.backbone.prompts.encode(prompt) if isinstance(prompt, str) else prompt

    def _check_guarantee(self, exits: Exits) -> None:
        """Warn if the fill or the weight format is not the one that the exits' policy was calibrated with."""
        used = {"fill": self.fill.name, "weights": self.backbone.weight_format}
        calibrated = {name: exits.calibration.get(name) for name in used}
        differs = [f"{name} {calibrated[name]}, not {value}" for name, value in used.items() if calibrated[name] != value]
        if differs and not self.fill.verifies:
            warnings.warn(
                f"These thresholds were calibrated with {' and '.join(differs)}: here they guarantee nothing. "
                "Calibrate anew: offramp calibrate",
                stacklevel=4,
            )
