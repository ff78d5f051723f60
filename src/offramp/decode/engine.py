"""The engine: a plan, and the ways to ask for answers by it. How a step works is in `decode.batch`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Unpack

from offramp.decode.batch import Batch
from offramp.decode.plan import Plan
from offramp.decode.request import (
    Decided,
    Generation,
    Limits,
    Prefilled,
    Reading,
    Request,
    Talk,
    Token,
    drafts_of,
)
from offramp.decode.sequence import begin_alike
from offramp.progress import Progress, silent

SHARED = 64  # tokens that neighbouring prompts must have in common, for these to be read only once
ALIKE = 16  # the same for what all prompts begin with


class Engine(Plan):
    """Decodes with a backbone and, if given, its exits. The arguments are those of a `Plan`."""

    def batch(self) -> Batch:
        """An empty batch, to which requests are added. `stream` and `generate` are built on it."""
        return Batch(self)

    def stream(
        self,
        prompt: str | list[int],
        talk: Talk | None = None,
        *,
        progress: Progress = silent,
        **limits: Unpack[Limits],
    ) -> Iterator[Token]:
        """Yield tokens as they are decided, for a prompt (text, or token ids). A long prompt reports its `progress`.

        A token's text may be empty and come with a later token: a character can span tokens, and text that may turn out
        to begin a stop string is held back. Raises `BadInput` (empty prompt, prompt beyond the context) and `BadNumbers`
        (NaN logits).
        """
        batch = self.batch()
        batch.add(self._ids(prompt), talk, **limits)
        return (event.token for event in batch.run(progress) if isinstance(event, Decided))

    def generate(self, prompt: str | list[int], *, progress: Progress = silent, **limits: Unpack[Limits]) -> Generation:
        """Answer a prompt (text, or token ids): `stream` run to its end, with times and totals."""
        return self.generate_batch([prompt], progress=progress, **limits)[0]

    def generate_batch(
        self, prompts: Iterable[str | list[int]], *, progress: Progress = silent, **limits: Unpack[Limits]
    ) -> list[Generation]:
        """Answer several prompts side by side.

        Sequences leave at exits and end independently. A beginning that neighbouring prompts share, such as the examples
        before a question, is read once. Times in the results are those of the whole batch.
        """
        last, seconds = time.perf_counter(), {"prefill": 0.0, "decode": 0.0}
        ids = [self._ids(prompt) for prompt in prompts]
        for prompt in ids:
            self.backbone.prompts.check(prompt)
        batch = self.batch()
        talks = self.shared_talks(ids, progress)
        requests = [batch.add(prompt, talk, **limits) for prompt, talk in zip(ids, talks, strict=True)]
        for event in batch.run(progress):
            # The events of a step are all of one kind, so the time of the step goes with its first event.
            now = time.perf_counter()
            seconds["prefill" if isinstance(event, Reading | Prefilled) else "decode"] += now - last
            last = now
        return [self.summarise(request, seconds["prefill"], seconds["decode"]) for request in requests]

    def read(self, ids: list[int], progress: Progress = silent, talk: Talk | None = None) -> Talk:
        """A talk that has read all of these ids but the last. A given `talk` has read how they begin, and goes on."""
        talk, batch = talk or Talk(), self.batch()
        batch.add(ids, talk, max_tokens=1)
        next(event for event in batch.run(progress) if isinstance(event, Prefilled))
        return talk

    def shared_talks(self, prompts: Iterable[list[int]], progress: Progress = silent) -> list[Talk]:
        """A talk for each prompt. They share what is computed for a common beginning.

        What all prompts begin with, such as a chat template, is read once, and so is what neighbours have in common.
        """
        prompts = list(prompts)
        alike = begin_alike(prompts) if len(prompts) > 1 else 0
        alike = alike if alike >= ALIKE else 0
        beginning = self.read(prompts[0][:alike], progress) if alike else Talk()
        groups: list[tuple[list[int], int, int]] = []  # the newest prompt, how much its group has in common, its size
        for ids in prompts:
            if groups:
                last, length, count = groups[-1]
                common = min(length, begin_alike([last, ids]))
                if common - alike >= max(SHARED, (length - alike) / 2):
                    groups[-1] = ids, common, count + 1
                    continue
            groups.append((ids, len(ids) - 1, 1))
        talks = []
        for ids, length, count in groups:
            talk = beginning.fork()
            if count > 1:
                self.read(ids[:length], progress, talk)
            talks += [talk, *(talk.fork() for _ in range(count - 1))]
        return talks

    def forked(self, ids: list[int], count: int, progress: Progress = silent) -> list[Talk]:
        """`count` talks that have read all of these ids but the last. They are read once."""
        talk = self.read(ids, progress)
        return [talk, *(talk.fork() for _ in range(count - 1))]

    def summarise(self, request: Request, prefill_seconds: float, decode_seconds: float) -> Generation:
        """The answer of a finished request, with totals; times in seconds. Raises `ValueError` for one without tokens."""
        tokens, prompt = request.tokens, request.sequence.prompt
        if not tokens:
            raise ValueError("the request has no tokens yet")
        full = sum(self.costs.full(prompt + index) for index in range(len(tokens)))
        last, blocks = tokens[-1], self.backbone.n_blocks
        drafted, _ = drafts_of(tokens, blocks)
        return Generation(
            text="".join(token.text for token in tokens),
            tokens=tokens,
            blocks=blocks,
            mean_blocks=sum(token.blocks for token in tokens) / len(tokens),
            flops_saved=1 - last.cumulative_flops / full,
            tokens_per_deep_pass=len(tokens) / max(1, last.deep_passes),
            acceptance_rate=1 - last.rejected / drafted if self.fill.verifies and drafted else None,
            prefill_seconds=prefill_seconds,
            decode_tokens_per_second=len(tokens) / decode_seconds,
            fill=self.fill.name,
            thresholds=self.thresholds,
            policy=self.policy.describe(self.gate),
            finish_reason=request.finish_reason or "length",
        )

    def _ids(self, prompt: str | list[int]) -> list[int]:
        return self.backbone.prompts.encode(prompt) if isinstance(prompt, str) else prompt
