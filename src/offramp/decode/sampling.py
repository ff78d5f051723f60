"""From logits to a token: the most probable one, or one drawn at random.

A draw depends on the seed, the place of the token in its text, and the logits, and on nothing else (the Gumbel-max trick:
the largest of log p plus noise). So whoever decides on a place, an early exit's draft or full depth, decides under the same
noise; what `verify` lets stand is what full depth would have drawn, token for token, and drafts are wrong less often than
if each were drawn anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from offramp.errors import BadInput
from offramp.settings import setting

if TYPE_CHECKING:  # the command line reads the fields of `Sampling`, and must not wait for torch
    from torch import Tensor

Choose = Callable[["Tensor", "list[int]"], int]  # logits (V,) and all ids before → the next id


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: all but the draw itself by the library's logits processors, in the library's order.

    temperature: 0 takes the most probable token and needs none of the others but `repetition_penalty` (1 is none);
    top_k: only so many (0: all); top_p: only the most probable that together have this probability (1: all); min_p: only
    those with at least this share of the highest probability (0: all); seed: of the draws. Raises `BadInput` for values
    outside these ranges.
    """

    temperature: float = setting(0.0, "0 takes the most probable token; above 0, tokens are drawn.")
    top_k: int = setting(0, "Draw from this many most probable tokens; 0: from all.")
    top_p: float = setting(1.0, "Draw from the most probable tokens that together have this probability.")
    min_p: float = setting(0.0, "Draw from tokens with at least this share of the highest probability.")
    seed: int = setting(0, "Seed of the draws.")
    repetition_penalty: float = setting(1.0, "Repetition penalty; 1 is none.")

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise BadInput(f"A temperature of {self.temperature} is not 0 or more.", "0 takes the most probable token.")
        if self.top_k < 0:
            raise BadInput(f"The {self.top_k} most probable tokens cannot be kept.", "0 keeps all.")
        if not 0 < self.top_p <= 1:
            raise BadInput(f"A top-p of {self.top_p} is not in (0, 1].", "1 keeps all tokens.")
        if not 0 <= self.min_p <= 1:
            raise BadInput(f"A min-p of {self.min_p} is not in [0, 1].", "0 keeps all tokens.")
        if not self.repetition_penalty > 0:
            raise BadInput(f"A repetition penalty of {self.repetition_penalty} is not positive.", "1 is no penalty.")

    def chooser(self) -> Choose:
        import transformers as library

        processors = library.LogitsProcessorList()
        if self.repetition_penalty != 1:
            processors.append(library.RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if not self.temperature:
            return chooser(processors, None)
        if self.temperature != 1:
            processors.append(library.TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            processors.append(library.TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            processors.append(library.TopPLogitsWarper(self.top_p))
        if self.min_p:
            processors.append(library.MinPLogitsWarper(self.min_p))
        return chooser(processors, self.seed)


def chooser(processors: Any, seed: int | None) -> Choose:
    """Chooses from what the library's `processors` make of the logits: the best, or with a seed, a draw."""

    import torch

    def choose(logits: Tensor, ids: list[int]) -> int:
        if processors:
            logits = processors(torch.tensor([ids], device=logits.device), logits[None])[0]
        if seed is not None:
            logits = logits - _exponential(seed, len(ids), len(logits)).to(logits.device).log()
        return int(logits.argmax())

    return choose


def _exponential(seed: int, place: int, size: int) -> Tensor:
    import torch

    digest = hashlib.sha256(f"{seed}/{place}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.empty(size).exponential_(generator=generator)
