"""When a token leaves: each exit has a confidence in [0, 1], where higher is surer, and a threshold that it must exceed.

The learned confidence is the gate's. The training-free ones are those of CALM (arXiv 2207.07061, section 3.4), similar
measures, and patience (PABEE, arXiv 2006.04152). They need the read-out's logits at every exit. This costs an LM head each
time, whether the token leaves or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
# Patience: the number of open exits in a row, up to this one, that read out the same token, over that of all open exits.
PATIENCE = "patience"
CONFIDENCES = ("gate", *TRAINING_FREE, PATIENCE)


@dataclass(frozen=True)
class Policy:
    """A token leaves at the first exit whose confidence is above its threshold.

    `thresholds` has one number in [0, 1] for each exit. 1 closes the exit, unless it has a second key. 0 lets every token
    leave without asking the gate, if there is no decay. `decay` (tokens; 0: none) makes the beginning of an answer
    stricter: after t tokens the threshold λ is 0.9 λ + 0.1 exp(−t / decay) (CALM, section 3.4). `candidates` (tokens; 0:
    all) limits the read-out, at exits and at the top, to the tokens that the exits' sketch of the head ranks highest: the
    head of a large vocabulary costs as much as many blocks; `exit_candidates` (0: as many as `candidates`) limits it at
    exits only.

    Exits may have a second key. Where the gate's confidence is at most the threshold but above `perhaps`, the exit reads
    out, and the token leaves if the read-out's own confidence, `key` (one of `TRAINING_FREE`), is above `keys`. Both have
    one number for each exit, or none at all. Raises `BadInput` for numbers outside [0, 1], an unknown confidence or key,
    second keys beside a training-free confidence, and negative numbers.
    """

    thresholds: tuple[float, ...]
    confidence: str = "gate"
    decay: float = 0.0
    candidates: int = 0
    exit_candidates: int = 0
    perhaps: tuple[float, ...] = ()
    keys: tuple[float, ...] = ()
    key: str = "max-prob"

    def __post_init__(self) -> None:
        for threshold in (*self.thresholds, *self.perhaps, *self.keys):
            if not 0 <= threshold <= 1:
                raise BadInput(f"A threshold of {threshold} is not in [0, 1].", "1 closes an exit, 0 opens it wide.")
        if self.perhaps or self.keys:
            if not len(self.perhaps) == len(self.keys) == len(self.thresholds):
                raise BadInput(
                    f"Second keys of {len(self.perhaps)} and {len(self.keys)} numbers do not fit {len(self.thresholds)} "
                    "exits.",
                    "Give 'perhaps' and 'keys' one number for each exit.",
                )
            if self.confidence != "gate" or self.key not in TRAINING_FREE:
                raise BadInput(
                    f"A second key '{self.key}' does not go with the confidence '{self.confidence}'.",
                    f"The confidence must be gate; keys are {', '.join(TRAINING_FREE)}.",
                )
        if self.confidence not in CONFIDENCES:
            raise BadInput(f"There is no confidence '{self.confidence}'.", f"Choose from {', '.join(CONFIDENCES)}.")
        if not self.decay >= 0:
            raise BadInput(f"Thresholds cannot decay over {self.decay} tokens.", "Give a number of tokens, or 0 for none.")
        if (fewest := min(self.candidates, self.exit_candidates)) < 0:
            raise BadInput(f"{fewest} candidates cannot be read out.", "Give 0 for all tokens, or some thousands.")

    @classmethod
    def closed(cls, exits: int) -> Policy:
        """A policy for `exits` exits under which no token leaves early."""
        return cls((1.0,) * exits)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Policy:
        """The policy of a record that `dataclasses.asdict` made; fields that it lacks have their defaults."""
        lists = {name: tuple(map(float, record.get(name, ()))) for name in ("thresholds", "perhaps", "keys")}
        return cls(**{**record, **lists})

    def opens(self, exit: int) -> bool:
        """Whether any token may leave at this exit."""
        return self.thresholds[exit] < 1 or self.has_key(exit)

    def has_key(self, exit: int) -> bool:
        """Whether this exit has a second key."""
        return bool(self.keys) and self.perhaps[exit] < 1 and self.keys[exit] < 1

    def threshold(self, exit: int, decided: int) -> float:
        """The threshold of an exit for the token that follows `decided` tokens of the answer."""
        return self._decayed(self.thresholds[exit], decided)

    def key_threshold(self, exit: int, decided: int) -> float:
        """The threshold of an exit's second key for the token that follows `decided` tokens of the answer."""
        return self._decayed(self.keys[exit], decided)

    def _decayed(self, threshold: float, decided: int) -> float:
        return 0.9 * threshold + 0.1 * math.exp(-decided / self.decay) if self.decay and threshold < 1 else threshold

    def describe(self, gate: str = "gate") -> str:
        """The policy in words: "mamba, closed closed 0.9, decay 16". `gate` names the exits' kind of gate.

        An exit with a second key is written "0.99 or 0.3+0.9": leave above 0.99, or above 0.3 if the key is above 0.9.
        """
        return ", ".join([self.confidence_name(gate), " ".join(self.in_words()), *self.extras])

    def in_words(self) -> list[str]:
        """The thresholds of each exit, in words."""
        words = [show_threshold(threshold) for threshold in self.thresholds]
        for exit, (perhaps, key) in enumerate(zip(self.perhaps, self.keys, strict=True)):
            if self.has_key(exit):
                alone = f"{words[exit]} or " if self.thresholds[exit] < 1 else ""
                words[exit] = f"{alone}{perhaps:.4g}+{key:.4g}"
        return words

    def confidence_name(self, gate: str = "gate") -> str:
        """The name of the confidence; `gate` names the exits' kind of gate."""
        return gate if self.confidence == "gate" else self.confidence

    @property
    def extras(self) -> list[str]:
        """The policy's second key, decay and candidates in words, if it has them."""
        key = [f"second key {self.key}"] if any(map(self.has_key, range(len(self.thresholds)))) else []
        decay = [f"decay {self.decay:g}"] if self.decay else []
        candidates = [f"{self.candidates:,} candidates"] if self.candidates else []
        at_exits = [f"{self.exit_candidates:,} candidates at exits"] if self.exit_candidates else []
        return key + decay + candidates + at_exits


def show_threshold(threshold: float) -> str:
    """A threshold as people read it: a number, or "closed"."""
    return "closed" if threshold >= 1 else f"{threshold:g}"
