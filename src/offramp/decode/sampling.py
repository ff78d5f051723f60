"""From logits to a token: the most probable one, or one drawn at random. core/choose.c has the same rule in C.

A draw depends only on the seed, the token's position in the text, and the logits. It is the Gumbel-max trick: the token
with the largest log p plus noise is drawn. So an exit's draft and full depth decide a position under the same noise. The
drafts that stand with `verify` are what full depth would have drawn, and fewer are rejected than with new noise each time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from offramp.errors import BadInput
from offramp.settings import RESEARCH, setting

if TYPE_CHECKING:  # the command line reads the fields of `Sampling`, and must not wait for torch
    import numpy as np
    from torch import Tensor

LEAST_TEMPERATURE = 1e-6  # below it, logits over the temperature would overflow
Choose = Callable[["Tensor", "list[int]"], int]  # logits (V,) and all ids before → the next id


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The library's logits processors do all but the draw itself, in the library's order.

    At a temperature of 0, of the other fields only `repetition_penalty` matters. Raises `BadInput` for values outside their
    ranges.
    """

    temperature: float = setting(0.0, "0 takes the most probable token; above 0, tokens are drawn.")
    top_k: int = setting(0, "Draw from so many of the most probable tokens (0: from all).")
    top_p: float = setting(1.0, "Draw from the most probable tokens that together have this probability.")
    min_p: float = setting(0.0, "Draw from tokens with at least this share of the highest probability.")
    seed: int = setting(0, "Seed of the draws.")
    repetition_penalty: float = setting(1.0, "Repetition penalty; 1 is none.", panel=RESEARCH)

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise BadInput(
                f"A temperature of {self.temperature} is not a finite number of 0 or more.",
                "0 takes the most probable token.",
            )
        if self.top_k < 0:
            raise BadInput(f"A top-k of {self.top_k} is below 0.", "0 keeps all.")
        if not 0 < self.top_p <= 1:
            raise BadInput(f"A top-p of {self.top_p} is not in (0, 1].", "1 keeps all tokens.")
        if not 0 <= self.min_p <= 1:
            raise BadInput(f"A min-p of {self.min_p} is not in [0, 1].", "0 keeps all tokens.")
        if not self.repetition_penalty > 0:
            raise BadInput(f"A repetition penalty of {self.repetition_penalty} is not positive.", "1 is no penalty.")

    def chooser(self) -> Sampler:
        """A `Choose` with these settings."""
        return Sampler(*astuple(self))


@dataclass(frozen=True)
class Sampler(Sampling):
    """A `Choose` by its settings."""

    def __call__(self, logits: Tensor, ids: list[int]) -> int:
        if self.temperature:
            return _best(self._processors, self.seed, logits, ids)
        return _most_probable(self.penalised(logits, ids))

    def penalised(self, logits: Tensor, ids: list[int]) -> Tensor:
        """The logits (V,) after the repetition penalty."""
        if self.repetition_penalty == 1:
            return logits
        import torch

        seen = torch.tensor(ids, dtype=torch.int64, device=logits.device)
        score, penalty = logits[seen], self.repetition_penalty
        return logits.index_put((seen,), torch.where(score < 0, score * penalty, score / penalty))

    @cached_property
    def _processors(self) -> Any:
        """The library's processors, in its order."""
        import transformers as library

        processors = library.LogitsProcessorList()
        if self.repetition_penalty != 1:
            processors.append(library.RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature != 1:
            processors.append(library.TemperatureLogitsWarper(max(self.temperature, LEAST_TEMPERATURE)))
        if self.top_k:
            processors.append(library.TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            processors.append(library.TopPLogitsWarper(self.top_p))
        if self.min_p:
            processors.append(library.MinPLogitsWarper(self.min_p))
        return processors


def sampler_of(choose: Choose) -> Sampler | None:
    """The settings of a `choose`, within a grammar or not; None for a function without settings."""
    inner = getattr(choose, "choose", choose) if hasattr(choose, "allowed") else choose
    return inner if isinstance(inner, Sampler) else None


def chooser(processors: Any, seed: int | None) -> Choose:
    """A function that applies the library's `processors` to the logits and takes the best token, or draws with a seed.

    It is a `Sampler` if settings can express the processors.
    """
    return _sampler(processors, seed) or (lambda logits, ids: _best(processors, seed, logits, ids))


def _sampler(processors: Any, seed: int | None) -> Sampler | None:
    """The settings of a `Sampler` that does the same as these processors; None if there are none."""
    settings: dict[str, Any] = {}
    if processors:
        import transformers as library

        order = {
            library.RepetitionPenaltyLogitsProcessor: ("repetition_penalty", "penalty"),
            library.TemperatureLogitsWarper: ("temperature", "temperature"),
            library.TopKLogitsWarper: ("top_k", "top_k"),
            library.TopPLogitsWarper: ("top_p", "top_p"),
            library.MinPLogitsWarper: ("min_p", "min_p"),
        }
        kinds = [type(processor) for processor in processors]
        in_order = [kind for kind in order if kind in kinds]
        plain = all(getattr(each, "min_tokens_to_keep", 1) == 1 for each in processors)
        if kinds != in_order or not plain or any(getattr(each, "prompt_ignore_length", None) for each in processors):
            return None
        settings = {order[kind][0]: getattr(each, order[kind][1]) for kind, each in zip(kinds, processors, strict=True)}
    settings["temperature"] = 0.0 if seed is None else settings.get("temperature", 1.0)
    return Sampler(**settings, seed=seed or 0)


def _best(processors: Any, seed: int | None, logits: Tensor, ids: list[int]) -> int:
    import torch

    if processors:
        logits = processors(torch.tensor([ids], dtype=torch.int64, device=logits.device), logits[None])[0]
    if seed is not None:
        logits = logits + torch.from_numpy(noise(seed, len(ids), len(logits))).to(logits.device)
    return _most_probable(logits)


def _most_probable(logits: Tensor) -> int:
    """The most probable token, the first of equals."""
    # On a CPU, NumPy finds the largest several times as fast as torch.
    return int(logits.numpy().argmax() if logits.device.type == "cpu" else logits.argmax())


def noise(seed: int, position: int, tokens: int | np.ndarray) -> np.ndarray:
    """Gumbel noise in float32 for these tokens, or for the first n of all.

    It is a function of the seed, the position and each token, by hashes (core/choose.h).
    """
    import numpy as np

    key = _mixed((seed + 0x9E3779B97F4A7C15 * (position + 1)) % 2**64)
    x = (np.arange(tokens) if isinstance(tokens, int) else tokens).astype(np.uint32) + np.uint32(key % 2**32)
    x = _fmix32(_fmix32(x) ^ np.uint32(key >> 32))
    u = np.minimum(x.astype(np.float32) * np.float32(2**-32) + np.float32(2**-33), np.float32(1 - 2**-24))
    gumbel: np.ndarray = -np.log(-np.log1p(-u))
    return gumbel


def _mixed(z: int) -> int:
    """The last steps of splitmix64."""
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def _fmix32(x: np.ndarray) -> np.ndarray:
    """The last steps of MurmurHash3, of uint32 numbers."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ x >> shift) * factor
    mixed: np.ndarray = x ^ x >> 16
    return mixed
