"""When a token leaves: each exit has a confidence in [0, 1], where higher is surer, and a threshold that it must exceed.

The learned confidence is the gate's. The training-free ones are those of CALM (arXiv 2207.07061, section 3.4), similar
measures, and patience (PABEE, arXiv 2006.04152). They need the read-out's logits at every exit. This costs an LM head each
time, whether the token leaves or not.
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
    # Tokens that are not candidates have logits of −inf and add nothing.
    return 1 + (logp.exp() * logp).nan_to_num(0.0).sum(-1) / math.log(logits.shape[-1])


TRAINING_FREE: dict[str, Callable[[Tensor], Tensor]] = {"max-prob": max_prob, "margin": margin, "entropy": entropy}
# The number of open exits in a row, ending with this one, that read out the same token, over the number of open exits.
PATIENCE = "patience"
CONFIDENCES = ("gate", *TRAINING_FREE, PATIENCE)


@dataclass(frozen=True)
class Policy:
    """A token leaves at the first exit whose confidence is above its threshold.

    `thresholds` has one number in [0, 1] for each exit. 1 closes the exit. 0 lets every token leave, and no gate is asked.
    `decay` (tokens; 0: none) makes the beginning of an answer stricter: after t tokens the threshold λ is
    0.9 λ + 0.1 exp(−t / decay) (CALM, section 3.4). `candidates` (tokens; 0: all) limits the read-out, at exits and at the
    top, to the tokens that the exits' sketch of the head ranks highest, because the head of a large vocabulary costs many
    blocks. Raises `BadInput` for a threshold outside [0, 1], an unknown confidence, and negative numbers.
    """

    thresholds: tuple[float, ...]
    confidence: str = "gate"
    decay: float = 0.0
    candidates: int = 0

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

    @classmethod
    def closed(cls, exits: int) -> Policy:
        """A policy for `exits` exits under which no token leaves early."""
        return cls((1.0,) * exits)

    def threshold(self, exit: int, decided: int) -> float:
        """The threshold of an exit for the token that follows `decided` tokens of the answer."""
        threshold = self.thresholds[exit]
        return 0.9 * threshold + 0.1 * math.exp(-decided / self.decay) if self.decay and threshold < 1 else threshold

    def describe(self, gate: str = "gate") -> str:
        """The policy in words: "mamba, closed closed 0.9, decay 16". `gate` names the exits' kind of gate."""
        thresholds = " ".join(map(show_threshold, self.thresholds))
        return ", ".join([self.confidence_name(gate), thresholds, *self.extras])

    def confidence_name(self, gate: str = "gate") -> str:
        """The name of the confidence; `gate` names the exits' kind of gate."""
        return gate if self.confidence == "gate" else self.confidence

    @property
    def extras(self) -> list[str]:
        """The policy's decay and candidates in words, if it has them."""
        decay = [f"decay {self.decay:g}"] if self.decay else []
        return decay + ([f"{self.candidates:,} candidates"] if self.candidates else [])


def show_threshold(threshold: float) -> str:
    """A threshold as people read it: a number, or "closed"."""
    return "closed" if threshold >= 1 else f"{threshold:g}"
