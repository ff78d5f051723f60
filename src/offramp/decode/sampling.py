"""From logits to a token: the most probable one, or one drawn at random.

A draw depends only on the seed, the token's position in the text, and the logits. It is the Gumbel-max trick: the token
with the largest log p plus noise is drawn. So an exit's draft and full depth decide a position under the same noise. The
drafts that stand with `verify` are what full depth would have drawn, and fewer are rejected than with new noise each time.
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
    """How tokens are chosen. The library's logits processors do all but the draw itself, in the library's order.

    At a temperature of 0, of the other fields only `repetition_penalty` matters. Raises `BadInput` for values outside their
    ranges.
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
        """A function that chooses tokens by these settings."""
        import transformers as library

        processors = library.LogitsProcessorList()
        if not self.temperature:
            return Greedy(self.repetition_penalty)
        if self.repetition_penalty != 1:
            processors.append(library.RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature != 1:
            processors.append(library.TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            processors.append(library.TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            processors.append(library.TopPLogitsWarper(self.top_p))
        if self.min_p:
            processors.append(library.MinPLogitsWarper(self.min_p))
        return chooser(processors, self.seed)


def most_probable(logits: Tensor, ids: list[int]) -> int:
    """The most probable token, the first of equals."""
    # On a CPU, NumPy finds the largest several times as fast as torch.
    return int(logits.numpy().argmax() if logits.device.type == "cpu" else logits.argmax())


@dataclass(frozen=True)
class Greedy:
    """Takes the most probable token, after a repetition penalty as the library has it. Compiled code can do that, too."""

    repetition_penalty: float = 1.0

    def __call__(self, logits: Tensor, ids: list[int]) -> int:
        if self.repetition_penalty != 1:
            import torch

            seen = torch.tensor(ids, device=logits.device)
            score, penalty = logits[seen], self.repetition_penalty
            logits = logits.index_put((seen,), torch.where(score < 0, score * penalty, score / penalty))
        return most_probable(logits, ids)


def chooser(processors: Any, seed: int | None) -> Choose:
    """A function that applies the library's `processors` to the logits and takes the best token, or draws with a seed."""
    import torch

    if not processors and seed is None:
        return Greedy()

    def choose(logits: Tensor, ids: list[int]) -> int:
        if processors:
            logits = processors(torch.tensor([ids], device=logits.device), logits[None])[0]
        if seed is not None:
            logits = logits - _exponential(seed, len(ids), len(logits)).to(logits.device).log()
        return most_probable(logits, ids)

    return choose


def _exponential(seed: int, position: int, size: int) -> Tensor:
    """Exponential noise (size,) that depends only on seed and position. Minus its logarithm is Gumbel noise."""
    import torch

    digest = hashlib.sha256(f"{seed}/{position}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.empty(size).exponential_(generator=generator)
