"""How exits are trained and models tuned: one field for each setting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TrainConfig:
    """How exits are trained; most fields are flags of `offramp train`.

    layers: blocks run before each exit (None: `suggested_layers`); top_k: the oracle's tokens that count as agreement;
    prompts: a file of prompts to answer (None: the list that comes with offramp); texts: plain text read beside them;
    max_prompts: use only the first so many; answer_tokens: longest own answer; epochs over the adapters' sequences and
    over the gates'; batch: sequences a step; precision: agreement on held-out tokens that the default thresholds ask
    for; open_from: share of the depth before which exits stay closed by default; shortlist: read out over so many of
    the answers' most frequent tokens (0: all); sketch: dims of a sketch of the head (0: none; None: some, where it
    pays); confidence, threshold: the default policy, where precision is not to choose it.
    """

    layers: tuple[int, ...] | None = None
    gate: str = "mamba"
    readout: str = "mamba"
    gate_width: int = 64
    readout_width: int = 512
    top_k: int = 1
    prompts: str | None = None
    texts: tuple[str, ...] = ()
    max_prompts: int | None = None
    answer_tokens: int = 48
    epochs: int = 4
    gate_epochs: int = 4
    batch: int = 8
    learning_rate: float = 3e-3
    gate_learning_rate: float = 1e-3
    precision: float = 0.98
    open_from: float = 2 / 3
    shortlist: int = 0
    sketch: int | None = None
    confidence: str = "gate"
    threshold: float | None = None
    seed: int = 0


def draft_config(n_blocks: int, **changed: Any) -> TrainConfig:
    """How the exit that drafts for `verify` is trained: shallow, with deep memory, over a short list.

    A draft costs little and a wrong one is only taken back, so any that is right in a quarter of cases pays.
    """
    usual: dict[str, Any] = {
        "layers": (max(1, round(n_blocks / 15)),),
        "gate": "linear",
        "readout": "deep",
        "readout_width": 256,
        "shortlist": 8192,
        "sketch": 0,
        "confidence": "max-prob",
        "threshold": 0.25,
        "answer_tokens": 96,
        "epochs": 8,
        "learning_rate": 2e-3,
    }
    return TrainConfig(**{**usual, **changed})


@dataclass(frozen=True)
class TuneConfig:
    """How a model is tuned; most fields are flags of `offramp tune`.

    rank: of the update; skip: how often a sample skips the last block; exit_scale: how much exits weigh beside the last
    block; every: a step reads out one in so many blocks; bfloat16: products in it, faster where the processor knows it;
    the others as in `TrainConfig`.
    """

    rank: int = 32
    skip: float = 0.05
    exit_scale: float = 0.02
    every: int = 4
    bfloat16: bool = True
    prompts: str | None = None
    texts: tuple[str, ...] = ()
    max_prompts: int | None = None
    answer_tokens: int = 96
    epochs: int = 2
    batch: int = 8
    learning_rate: float = 2e-4
    seed: int = 0
