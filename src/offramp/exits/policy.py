"""When a token leaves: a confidence in [0, 1] for each exit, higher meaning surer, and a threshold it must exceed.

The learned confidence is the gate's. The training-free ones are CALM's (arXiv 2207.07061, section 3.4) and their kin, and
patience (PABEE, arXiv 2006.04152): they need the read-out's logits at every exit, which costs an LM head each time, whether
the token leaves or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from offramp.errors import BadInput


def max_prob(logits: Tensor) -> Tensor:
    """Probability of the most probable token. (…, V) → (…)."""
    return logits.softmax(-1).amax(-1)


def margin(logits: Tensor) -> Tensor:
    """Probability of the most probable token minus that of the second. (…, V) → (…)."""
    best = logits.softmax(-1).topk(2, dim=-1).values
    return best[..., 0] - best[..., 1]


def entropy(logits: Tensor) -> Tensor:
    """1 − entropy / log V: 1 for a certain distribution, 0 for a uniform one. (…, V) → (…)."""
    logp = logits.log_softmax(-1)
    # Tokens that are no candidates have −inf: they add nothing.
    return 1 + (logp.exp() * logp).nan_to_num(0.0).sum(-1) / math.log(logits.shape[-1])


TRAINING_FREE: dict[str, Callable[[Tensor], Tensor]] = {"max-prob": max_prob, "margin": margin, "entropy": entropy}
PATIENCE = (
    "patience"  # how many open exits on end, this one the last, read the same token out; a share of all that are open
)
CONFIDENCES = ("gate", *TRAINING_FREE, PATIENCE)


@dataclass(frozen=True)
class Policy:
    """A token leaves at the first exit whose confidence is above its threshold.

    A threshold of 1 closes the exit, one of 0 lets every token leave (a fixed block: no gate is asked). With a `decay` of n
    tokens, answers begin more strictly: t tokens in, the threshold λ is 0.9 λ + 0.1 exp(−t / n) (CALM). With `candidates`,
    only so many tokens are read out in full, at exits and at the top, those that the exits' sketch of the head deems
    likeliest: a head of a large vocabulary costs many blocks. Raises `BadInput` for a threshold outside [0, 1], an unknown
    confidence, and numbers below 0.
    """

    thresholds: tuple[float, ...]
    confidence: str = "gate"
    decay: float = 0.0  # none
    candidates: int = 0  # all

    def __post_init__(self) -> None:
        for threshold in self.thresholds:
            if not 0 <= threshold <= 1:
                raise BadInput(f"A threshold of {threshold} is not in [0, 1].", "1 closes an exit, 0 opens it wide.")
        if self.confidence not in CONFIDENCES:
            raise BadInput(f"There is no confidence '{self.confidence}'.", f"Choose from {', '.join(CONFIDENCES)}.")
        if not self.decay >= 0:
            raise BadInput(f"Thresholds cannot decay over {self.decay} tokens.", "Give a number of tokens, or 0 for none.")
        if self.candidates < 0:
            raise BadInput(f"{self.candidates} candidates cannot be read out.", "Give 0 for all tokens, or some thousands.")

    def threshold(self, exit: int, decided: int) -> float:
        """What a token must exceed at an exit after so many tokens of the answer."""
        threshold = self.thresholds[exit]
        return 0.9 * threshold + 0.1 * math.exp(-decided / self.decay) if self.decay and threshold < 1 else threshold
