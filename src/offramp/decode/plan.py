"""How to decode: the blocks cut into segments at the open exits, the heads, the fill, and the costs."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from offramp.decode.drafts import DraftRule, accepted_by, asking_cost
from offramp.decode.fills import fill_named
from offramp.decode.heads import Head
from offramp.decode.row_costs import row_costs
from offramp.decode.sampling import Choose, Sampling
from offramp.decode.sequence import Work
from offramp.decode.timing import Timed, untimed
from offramp.errors import BadInput
from offramp.exits.calibrated import differences, points_of
from offramp.exits.exits import Exit, Exits
from offramp.exits.parts import ExitPart, with_products
from offramp.exits.policy import Policy
from offramp.model.backbone import Backbone
from offramp.model.compiled.library import DEPTHS, MOST_DRAFTS
from offramp.model.compiled.runtime import Compiled
from offramp.model.costs import Costs
from offramp.model.runtime import joined


@dataclass(frozen=True)
class Segment:
    """Blocks `start` to `stop` - 1, between two open exits, or one and the model's beginning or end."""

    start: int
    stop: int


class Plan:
    """A backbone, its exits and the rules to decode by: all that a step needs to know, and that no step changes.

    `policy`: when a token leaves (the exits' own by default); `fill`: a name in `decode.fills.FILLS`; `max_pending`: the
    most tokens that wait at exits (default: 7), or drafts with `verify` (default: the limit). When so many wait, the next
    token goes to the top without asking gates, so a chunk has at most `max_pending` + 1 rows; `lookup`: with `verify`, if
    the last `lookup` tokens or more stand earlier in the text, the token that followed them there may be a draft (0: no
    look-up). To see where time goes, set `timed` to a `Timer`. Raises `BadInput` for a policy that does not fit the exits,
    an unknown fill, and `max_pending` below 1; `ValueError` for a table of n-grams that does not fit the model.
    """

    def __init__(
        self,
        backbone: Backbone,
        exits: Exits | None = None,
        policy: Policy | None = None,
        fill: str = "project",
        max_pending: int | None = None,
        lookup: int = 2,
    ) -> None:
        if max_pending is not None and max_pending < 1:
            raise BadInput(f"max_pending is {max_pending}, but at least one token must be able to wait.", "Give 1 or more.")
        self.backbone, self.exits = backbone, exits
        self.timed: Timed = untimed
        self._has_warned = False
        self.costs = Costs(backbone)
        self.policy = policy or (exits.policy if exits else Policy(()))
        self.gate = exits.config.gate if exits else "gate"
        self._open(exits)
        self.fill = fill_named(fill)(backbone, self.longest_tail)
        self.max_pending = max_pending or (MOST_DRAFTS if self.fill.verifies else 7)
        self.lookup = lookup if self.fill.verifies else 0
        self._choose_heads(exits)
        self.drafts = self._draft_rule(exits) if self.fill.verifies else None
        known = exits.calibration if exits else {}
        tested = policy is None or policy in [point.policy for point in points_of(known)]
        self._calibration: dict[str, Any] = known if tested and not self.fill.verifies else {}

    def _open(self, exits: Exits | None) -> None:
        """Divide the blocks at the open exits: those where a token may leave."""
        all_exits = list(exits or ())
        thresholds = self.policy.thresholds
        if len(thresholds) != len(all_exits):
            raise BadInput(
                f"{len(thresholds)} thresholds do not fit {len(all_exits)} exits.", "Give one threshold for each exit."
            )
        self.thresholds = {exit.block: threshold for exit, threshold in zip(all_exits, thresholds, strict=True)}
        self.open_exits: list[tuple[Exit, int]] = [
            (exit, index) for index, exit in enumerate(all_exits) if self.policy.opens(index)
        ]
        exits_in_order, runtime = [exit for exit, _ in self.open_exits], self.backbone.runtime
        # The gates and read-outs that run: with the backbone's compiled products, if it has them.
        self.parts: dict[ExitPart, ExitPart] = {
            part: with_products(part, runtime.product_of) if isinstance(runtime, Compiled) else part
            for exit in exits_in_order
            for part in (exit.gate, exit.adapter)
        }
        self.middle = exits.config.middle if exits and self.open_exits else 0
        self.longest_tail = max((exit.tail for exit, _ in self.open_exits), default=0)
        bounds = [0, *(exit.block for exit, _ in self.open_exits), self.backbone.n_blocks]
        self.segments = [Segment(start, stop) for start, stop in pairwise(bounds)]
        self.top = len(self.segments) - 1

    def _choose_heads(self, exits: Exits | None) -> None:
        """Set `head`, which reads out at the top, `whole_head`, which a request may ask for, and `exit_head`."""
        self.head = self.whole_head = Head.whole(self.backbone, self.costs.head)
        backbone, costs, sketch = self.backbone, self.costs, exits.sketch if exits else None
        if self.policy.candidates and not self.fill.verifies:
            self.head = Head.sketched(backbone, costs, sketch, self.policy.candidates)
        self.exit_head = self.head
        if exits and exits.shortlist is not None:
            self.exit_head = Head.short(backbone, costs.head, exits.shortlist)
        elif self.policy.exit_candidates and self.open_exits:
            self.exit_head = Head.sketched(backbone, costs, sketch, self.policy.exit_candidates)

    @property
    def mode(self) -> str:
        """The mode (`decode.modes`) whose promise these rules keep."""
        if self.fill.verifies:
            return "exact"
        return "full" if self.is_full else "early"

    @property
    def is_full(self) -> bool:
        """Whether nothing but full depth runs: no exit is open, and no sketch stands in for the head."""
        return not self.open_exits and self.head is self.whole_head

    def _draft_rule(self, exits: Exits | None) -> DraftRule:
        """The rule of drafts. Raises `ValueError` for a table of n-grams that does not fit the model."""
        if exits and exits.ngrams:
            exits.ngrams.check(self.backbone.vocab_size)
        return DraftRule(
            rows=row_costs(self.backbone),
            asking=tuple(asking_cost(self.backbone, exit, self.exit_head.flops) for exit, _ in self.open_exits),
            ngrams=exits.ngrams if exits else None,
            accepted=accepted_by(exits, self.open_exits[0][0]) if exits and self.open_exits else (0.0,) * DEPTHS,
        )

    @property
    def steppers_share(self) -> bool:
        """Whether one stepper can go on with a text that another began. It can if exits keep nothing of the text."""
        return not self.open_exits or not (self.fill.waits or self.has_recurrent_parts)

    @property
    def has_recurrent_parts(self) -> bool:
        """Whether a gate or a read-out of an open exit keeps a memory of the text."""
        return any(part.recurrent for exit, _ in self.open_exits for part in (exit.gate, exit.adapter))

    @property
    def prefill_flops(self) -> int:
        """FLOPs of recurrent gates and read-outs for each token of a prompt."""
        parts = [part for exit, _ in self.open_exits for part in (exit.gate, exit.adapter)]
        return sum(part.flops() for part in parts if part.recurrent)

    def work(self, start: int, stop: int, tokens: int, end: int) -> Work:
        """The work of blocks `start` to `stop` - 1 for `tokens` tokens, the last of which is at position `end` - 1."""
        contexts = range(end - tokens + 1, end + 1)
        flops = sum(self.costs.blocks(start, stop, context) for context in contexts)
        return Work(flops, tokens * (stop - start))

    @property
    def first_tail(self) -> int:
        """The number of blocks before the longest tail of the open exits."""
        return self.backbone.n_blocks - self.longest_tail

    @property
    def takes_back(self) -> bool:
        """Whether the tails' blocks may have to forget a token that has run through them.

        That is so if the read-out may keep the token, or if its exact states come later.
        """
        has_keys = any(self.policy.has_key(index) for _, index in self.open_exits)
        return self.fill.waits or has_keys or self.policy.confidence != "gate"

    def logits_of(self, head: Head, hidden: list[Tensor]) -> list[Tensor]:
        """Run a head once on the rows of several sequences: hidden states (1, n, D) each → logits (n, V) each."""
        with self.timed("heads"):
            logits = head.logits(joined(hidden, dim=1))[0]
        return [logits] if len(hidden) == 1 else list(logits.split([h.shape[1] for h in hidden]))

    def check_numbers(self, logits: Tensor) -> None:
        """Raise `BadNumbers` if a logit is NaN, or the highest is infinite."""
        if not torch.isfinite(logits.amax()):
            raise self.backbone.bad_numbers()

    def part_of(self, number: int) -> str:
        """The timer's name for a segment: `shallow` before the first open exit, `deep` after it; `blocks` without exits."""
        return "deep" if number else "shallow" if self.top else "blocks"

    def check_sampling(self, sampling: Sampling | Choose) -> None:
        """Warn if fill, weight format or sampling are not those that the exits' policy was calibrated with."""
        if not self._calibration:
            return
        used: dict[str, Any] = {"fill": self.fill.name, "weights": self.backbone.weight_format}
        if isinstance(sampling, Sampling):
            used |= {"temperature": sampling.temperature, "repetition_penalty": sampling.repetition_penalty}
        self._warn(differences(self._calibration, used), 5)  # so that the warning names the line that makes the engine

    def check_use(self, max_tokens: int, raw: bool | None = None) -> None:
        """Warn, once, if answers may be longer than those that the exits' policy was calibrated with.

        If it is known whether prompts are `raw`, that is compared too.
        """
        if not self._calibration or self._has_warned:
            return
        differs = differences(self._calibration, {"max_tokens": max_tokens, **({} if raw is None else {"raw": raw})})
        self._has_warned = bool(differs)
        self._warn(differs)

    def _warn(self, differs: list[str], stacklevel: int = 4) -> None:
        if differs:
            warnings.warn(
                f"These thresholds were calibrated with {' and '.join(differs)}, so they guarantee nothing here. "
                "Calibrate anew: offramp calibrate",
                stacklevel=stacklevel,
            )
