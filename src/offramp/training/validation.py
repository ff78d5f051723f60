"""How good exits are on held-out text, and the thresholds that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offramp.exits.exits import Exits
from offramp.metrics import auroc
from offramp.training.teacher import TeacherText

LEAST = 30  # if fewer tokens leave, a precision means nothing


@dataclass(frozen=True)
class Labels:
    """The labels of J exits at n positions.

    oracle (n, K): the oracle's most probable tokens; agrees (n, J): 1 where the exit's most probable token is among the
    first k of them, 0 where not, −1 where it is unknown; top_prob (n, J): the probability of the exit's own. harm (n, J):
    how many later tokens change if the token leaves (`training.harm`); NaN where it is unknown.
    """

    oracle: Tensor
    agrees: Tensor
    top_prob: Tensor
    harm: Tensor

    @classmethod
    def unknown(cls, oracle: Tensor, exits: int) -> Labels:
        """Labels that are all unknown."""
        shape = len(oracle), exits
        return cls(oracle, torch.full(shape, -1, dtype=torch.int8), torch.zeros(shape), torch.full(shape, torch.nan))

    def split(self, sizes: list[int]) -> list[Labels]:
        """The labels in pieces of these sizes."""
        parts = (self.oracle.split(sizes), self.agrees.split(sizes), self.top_prob.split(sizes), self.harm.split(sizes))
        return [Labels(*pieces) for pieces in zip(*parts, strict=True)]


@dataclass(frozen=True)
class LabelledTexts:
    """Texts, each with the exits' labels at its counted positions. `places`: each block's place among the hidden states."""

    texts: Sequence[TeacherText]
    labels: list[Labels]
    places: dict[int, int]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, part: slice) -> LabelledTexts:
        return LabelledTexts(self.texts[part], self.labels[part], self.places)

    def together(self) -> Labels:
        """The labels of all texts in one piece."""
        parts = zip(*((each.oracle, each.agrees, each.top_prob, each.harm) for each in self.labels), strict=True)
        return Labels(*map(torch.cat, parts))


@dataclass(frozen=True)
class Evidence:
    """Measurements of n tokens at one exit, each (n,).

    The gate's confidence, the read-out's own, whether it is right, and the `harm` if the token leaves: how many later
    tokens change. The harm is 0 if it was not measured, for example for a fill with exact states.
    """

    gate: Tensor
    key: Tensor
    agrees: Tensor
    harm: Tensor

    @property
    def worth(self) -> Tensor:
        """The worth of each token that leaves, (n,): 1, less 1 if it is wrong, less the later tokens that change."""
        return self.agrees.double() - self.harm


@torch.inference_mode()
def evidence(exits: Exits, labelled: LabelledTexts) -> list[Evidence]:
    """The evidence on each exit from the texts' labelled positions; if harm was measured, from those where it is known."""
    device = next(exits.modules.parameters()).device
    confidence: list[list[Tensor]] = [[] for _ in exits]
    for text in labelled.texts:
        for index, exit in enumerate(exits):
            logit, _ = exit.gate(text.hidden[None, :, labelled.places[exit.block]].float().to(device))
            confidence[index].append(logit[0].sigmoid().cpu()[text.counted])
    labels = labelled.together()
    measured = ~labels.harm.isnan()
    shown = []
    for index, gate in enumerate(confidence):
        known = labels.agrees[:, index] >= 0
        if (known & measured[:, index]).any():
            known &= measured[:, index]
        key, agrees, harm = labels.top_prob[known, index], labels.agrees[known, index], labels.harm[known, index]
        shown.append(Evidence(torch.cat(gate)[known], key, agrees.bool(), harm.nan_to_num(0.0)))
    return shown


def quality(exits: Exits, shown: list[Evidence], acceptance: list[dict[str, list[float]]]) -> list[dict[str, Any]]:
    """Measures of each exit from its evidence, and of its drafts by their place in a run (`Trainer.acceptance`).

    `agreement` with the oracle's top k; areas under the ROC curve of the gate, where no drafts are made, and of the
    read-out's own confidence; and the shares of the tokens that may leave if 99% and 95% of them must be right, ranked by
    that confidence.
    """
    return [
        {
            "block": exit.block,
            "tail": exit.tail,
            "tokens": len(tokens.agrees),
            "agreement": round(float(tokens.agrees.float().mean()), 4),
            **({} if drafts else {"gate_auroc": round(auroc(tokens.gate, tokens.agrees), 4)}),
            "key_auroc": round(auroc(tokens.key, tokens.agrees), 4),
            "leave_at_99": round(lowest(tokens.key, tokens.agrees, 0.99)[1] / max(1, len(tokens.agrees)), 4),
            "leave_at_95": round(lowest(tokens.key, tokens.agrees, 0.95)[1] / max(1, len(tokens.agrees)), 4),
            **{name: [round(share, 4) for share in shares] for name, shares in drafts.items()},
        }
        for exit, tokens, drafts in zip(exits, shown, acceptance, strict=True)
    ]


def lowest(confidence: Tensor, worth: Tensor, precision: float) -> tuple[float, int]:
    """The lowest threshold above which the tokens' mean worth is at least `precision`, and the number of these tokens.

    `confidence` and `worth` are (n,); a token's worth is 1 or true if it is right. Without such a threshold, or with fewer
    than `LEAST` tokens above it: (1, 0).
    """
    ordered, order = confidence.double().sort(descending=True)
    right, count = worth[order].double().cumsum(0), torch.arange(1, len(ordered) + 1)
    below = torch.cat([ordered[1:], ordered.new_zeros(1)])
    # Tokens with the same confidence leave together or not at all.
    good = ((below < ordered) & (right >= precision * count) & (count >= LEAST)).nonzero()[:, 0]
    if not len(good):
        return 1.0, 0
    place = int(good[-1])
    return float(ordered[place] + below[place]) / 2, place + 1
