"""The protocol of a stepper: the code that runs requests through the blocks and decides their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from offramp.decode.request import Request
from offramp.decode.sequence import Decision


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
