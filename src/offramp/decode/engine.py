"""The engine: the ways to ask for answers by a plan. How a step works is in `decode.batch`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from copy import copy
from typing import Protocol, Unpack

from offramp.decode.batch import Batch
from offramp.decode.fills import fill_named
from offramp.decode.modes import USUAL_FILL, Way, mode_of, settled, usual_mode
from offramp.decode.plan import Plan
from offramp.decode.request import (
    Decided,
    Finished,
    Generation,
    Limits,
    Prefilled,
    Request,
    Talk,
    Token,
    drafts_of,
)
from offramp.decode.sampling import Choose, Sampling
from offramp.decode.sequence import begin_alike
from offramp.decode.stepper import Steppers
from offramp.errors import BadInput
from offramp.exits.exit_set import ExitSet
from offramp.exits.exits import Exits
from offramp.exits.policy import Policy
from offramp.model.backbone import Backbone, HasBackbone, backbone_of
from offramp.progress import Progress, silent

SHARED = 64  # neighbouring prompts with this many tokens in common have them read only once
ALIKE = 16  # the same for a beginning that all prompts share


class HasExits(HasBackbone, Protocol):
    """A model together with its exits, such as `offramp.load` gives."""

    @property
    def exits(self) -> ExitSet:
        """The model's exits; empty if there are none."""
        ...


class Engine:
    """Decodes a model's answers in a mode, or by rules of one's own.

    `model`: what `offramp.load` gives, or a `Backbone`. `mode`: full, exact or early, perhaps with a point
    (`decode.modes`). `exits`: the model's own by default, or those that ship for a backbone. With a mode other than full,
    `policy` and `fill` replace the mode's own.

    For research, a group of exits (`Exits`) may be given without a mode: then `policy` is theirs by default, and `fill`
    project. A backbone without a mode and without exits decodes at full depth. `sampling`: how a token is chosen (the most
    probable by default), or a function from logits (V,) and the ids before to an id. The other arguments are those of a
    `Plan`. Raises as `Plan` and `modes.settled` do.
    """

    def __init__(
        self,
        model: HasExits | Backbone,
        exits: ExitSet | Exits | None = None,
        policy: Policy | None = None,
        fill: str | None = None,
        sampling: Sampling | Choose | None = None,
        *,
        mode: str | None = None,
        max_pending: int | None = None,
        lookup: int = 2,
    ) -> None:
        way = _way(model, exits, policy, fill, mode)
        self.plan = Plan(backbone_of(model), way.exits, policy or way.policy, way.fill, max_pending, lookup)
        self.steppers = Steppers(self.plan)
        self._sample(sampling)

    @property
    def backbone(self) -> Backbone:
        """The model that decodes."""
        return self.plan.backbone

    @property
    def mode(self) -> str:
        """The mode whose promise the plan keeps."""
        return self.plan.mode

    def _sample(self, sampling: Sampling | Choose | None) -> None:
        """Choose tokens in this way from now on."""
        sampling = sampling or Sampling()
        self._choose: Choose = sampling.chooser() if isinstance(sampling, Sampling) else sampling
        self.plan.check_sampling(sampling)

    def sampling(self, sampling: Sampling | Choose | None) -> Engine:
        """An engine with the same plan that chooses tokens in another way."""
        made = copy(self)
        made._sample(sampling)
        return made

    def batch(self) -> Batch:
        """An empty batch, to which requests are added. `stream` and `generate` are built on it."""
        return Batch(self.plan, self.steppers, self._choose)

    def stream(
        self,
        prompt: str | list[int],
        talk: Talk | None = None,
        *,
        progress: Progress = silent,
        **limits: Unpack[Limits],
    ) -> Iterator[Token]:
        """Yield tokens as they are decided, for a prompt (text, or token ids). A long prompt reports its `progress`.

        A token's text may be empty, and come with a later token. There are two reasons: a character can span tokens, and
        text that may begin a stop string is held back. Raises `BadInput` (empty prompt, prompt beyond the context) and
        `BadNumbers` (NaN logits).
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
        """Answer several prompts side by side: `answers` in the order of the prompts."""
        ids = [self._ids(prompt) for prompt in prompts]
        made = dict(self.answers(ids, len(ids), progress=progress, **limits))
        return [made[index] for index in range(len(ids))]

    def answers(
        self,
        prompts: list[list[int]],
        most: int,
        choose: list[Choose] | None = None,
        *,
        progress: Progress = silent,
        **limits: Unpack[Limits],
    ) -> Iterator[tuple[int, Generation]]:
        """Answer prompts (token ids), at most `most` side by side, and fewer where their memory would be too large.

        Yields the index and the answer of each prompt when its answer ends; the next prompt takes its place. `choose`: one
        for each answer, in place of the engine's own. A long beginning that neighbouring prompts share, such as the
        examples before a question, is read once, unless `most` is 1. Times are divided equally between the answers that are
        side by side.
        """
        for ids in prompts:
            self.backbone.prompts.check(ids)
        batch, waiting, room = self.batch(), deque(enumerate(prompts)), limits.get("max_tokens", 128)
        # Answers made one at a time have their prompts read one at a time, and so have times of their own.
        talks = self.shared_talks(prompts, progress) if most > 1 else (Talk() for _ in prompts)
        running: dict[Request, tuple[int, dict[str, float]]] = {}  # its index, and the times so far when it joined
        seen = {**batch.seconds}
        spent = dict.fromkeys(seen, 0.0)  # seconds so far, divided by the number of answers side by side

        def join() -> None:
            while waiting:
                lengths = (len(waiting[0][1]), *(request.sequence.prompt for request in running))
                if len(running) >= self.plan.costs.at_once(max(lengths) + room, most):
                    return
                index, ids = waiting.popleft()
                request = batch.add(ids, next(talks), choose[index] if choose else None, **limits)
                running[request] = index, {**spent}

        join()
        for event in batch.run(progress):
            for kind, seconds in batch.seconds.items():
                spent[kind] += (seconds - seen[kind]) / len(running)
            seen = {**batch.seconds}
            if isinstance(event, Finished):
                index, before = running.pop(event.request)
                yield index, self.summarise(event.request, *(spent[kind] - before[kind] for kind in ("prefill", "decode")))
                join()

    def read(self, ids: list[int], progress: Progress = silent, talk: Talk | None = None) -> Talk:
        """A talk that has read all of these ids but the last. A given `talk` has read a beginning of them, and goes on."""
        talk, batch = talk or Talk(), self.batch()
        batch.add(ids, talk, max_tokens=1)
        next(event for event in batch.run(progress) if isinstance(event, Prefilled))
        return talk

    def shared_talks(self, prompts: Iterable[list[int]], progress: Progress = silent) -> Iterator[Talk]:
        """A talk for each prompt, made when it is asked for. They share what is computed for a common beginning.

        The beginning of all prompts, such as that of a chat template, is read once. So is the common beginning of
        neighbours.
        """
        prompts = list(prompts)
        alike = begin_alike(prompts) if len(prompts) > 1 else 0
        alike = alike if alike >= ALIKE else 0
        beginning = self.read(prompts[0][:alike], progress) if alike else Talk()
        groups: list[tuple[list[int], int, int]] = []  # newest prompt, length of the common beginning, size
        for ids in prompts:
            if groups:
                last, length, count = groups[-1]
                common = min(length, begin_alike([last, ids]))
                if common - alike >= max(SHARED, (length - alike) / 2):
                    groups[-1] = ids, common, count + 1
                    continue
            groups.append((ids, len(ids) - 1, 1))
        for ids, length, count in groups:
            talk = beginning.fork()
            if count > 1:
                self.read(ids[:length], progress, talk)
            yield from (talk.fork() for _ in range(count - 1))
            yield talk

    def forked(self, ids: list[int], count: int, progress: Progress = silent) -> list[Talk]:
        """`count` talks that have read all of these ids but the last. They are read once."""
        talk = self.read(ids, progress)
        return [talk, *(talk.fork() for _ in range(count - 1))]

    def summarise(self, request: Request, prefill_seconds: float, decode_seconds: float) -> Generation:
        """The answer of a finished request, with totals; times in seconds. Raises `ValueError` for one without tokens."""
        tokens, prompt = request.tokens, request.sequence.prompt
        if not tokens:
            raise ValueError("the request has no tokens yet")
        full = sum(self.plan.costs.full(prompt + index) for index in range(len(tokens)))
        last, blocks = tokens[-1], self.backbone.n_blocks
        drafted, _ = drafts_of(tokens)
        return Generation(
            text="".join(token.text for token in tokens),
            tokens=tokens,
            blocks=blocks,
            mean_blocks=sum(token.blocks for token in tokens) / len(tokens),
            flops_saved=1 - last.cumulative_flops / full,
            tokens_per_deep_pass=len(tokens) / max(1, last.deep_passes),
            acceptance_rate=1 - last.rejected / drafted if drafted else None,
            prefill_seconds=prefill_seconds,
            decode_tokens_per_second=len(tokens) / decode_seconds,
            mode=self.mode,
            fill=self.plan.fill.name,
            thresholds=self.plan.thresholds,
            policy=self.plan.policy.describe(self.plan.gate),
            finish_reason=request.finish_reason or "length",
        )

    def _ids(self, prompt: str | list[int]) -> list[int]:
        return self.backbone.prompts.encode(prompt) if isinstance(prompt, str) else prompt


def _way(
    model: HasExits | Backbone, exits: ExitSet | Exits | None, policy: Policy | None, fill: str | None, mode: str | None
) -> Way:
    """The way to decode that an engine's arguments ask for."""
    backbone = backbone_of(model)
    if mode == "full":
        if policy or fill:
            raise BadInput("The mode full has no exits, so no policy and no fill.", "Leave them out, or the mode.")
        return Way(None, USUAL_FILL)
    if mode is None and (isinstance(exits, Exits) or (exits is None and isinstance(model, Backbone))):
        fill = fill or USUAL_FILL
        if exits and not (policy or fill_named(fill).verifies):  # their own policy is for the weights that they know
            ExitSet(exits).require_early(backbone)
        return Way(exits, fill)
    if isinstance(exits, Exits):
        exits = ExitSet(exits)
    elif exits is None:
        exits = ExitSet.shipped(model) if isinstance(model, Backbone) else model.exits
    if mode is None:
        mode = mode_of(fill) if policy or fill else usual_mode(backbone, exits)
    return settled(mode, exits, backbone, fill)
