"""Steppers: the code that runs requests through the blocks and decides their tokens. A plan has two."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

from offramp.decode.compiled import CompiledStepper
from offramp.decode.plan import Plan
from offramp.decode.reference import Reference
from offramp.decode.request import Request
from offramp.decode.sampling import Choose, sampler_of
from offramp.decode.sequence import Decision
from offramp.model.compiled.runtime import Compiled


class Stepper(Protocol):
    """Steps requests: reads pieces of prompts, and decides at least one token of each other request."""

    def step(
        self, reading: Sequence[tuple[Request, int]], deciding: Sequence[Request]
    ) -> list[tuple[Request, list[Decision]]]:
        """Read and decide. Returns the decisions of each request that has any, in the order of `deciding`.

        `reading`: requests, each with the position up to which its prompt is to be read at full depth, beyond what was read
        before. `deciding`: requests whose prompts have been read except for the last token. There may be decisions after
        the one that ends the text. An error of one request alone goes to its `fail`, and that request has no decisions.
        """
        ...


class Steppers:
    """The steppers of a plan: compiled code where it can serve a request, else the reference."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._runtime = plan, plan.backbone.runtime
        self.compiled = CompiledStepper.of(plan)
        if plan.fill.verifies and not self.compiled:
            with_these = " with these exits" if plan.exits else ""
            warnings.warn(
                f"Only compiled code makes drafts, and it does not run {plan.backbone.name}{with_these}. So 'exact' runs "
                "full depth here: the same tokens, no faster. offramp inspect MODEL says why.",
                stacklevel=3,  # the line that makes the engine
            )

    def of(self, choose: Choose) -> Stepper:
        """The stepper for requests that choose tokens in this way.

        The reference makes no drafts: where they are wanted, it runs full depth, whose tokens are the same.
        """
        if self._runtime is not self._plan.backbone.runtime:  # the backbone now runs other blocks
            self._runtime, self.compiled = self._plan.backbone.runtime, CompiledStepper.of(self._plan)
        if self.compiled and sampler_of(choose):
            return self.compiled
        self._reference.plan.timed = self._plan.timed
        return self._reference

    @cached_property
    def _reference(self) -> Reference:
        return Reference(Plan(self._plan.backbone) if self._plan.fill.verifies else self._plan)

    def may_cut(self, choose: Choose) -> bool:
        """Whether a prompt gives the same bits wherever it is cut. Compiled code does so, and torch does not."""
        alone = self.of(choose) is self.compiled or not self._plan.has_recurrent_parts
        return isinstance(self._runtime, Compiled) and alone
