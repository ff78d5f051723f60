"""How good exits are on held-out text, and the thresholds that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from offramp.exits.exits import Exits
from offramp.metrics import auroc
from offramp.training.teacher import TeacherText


@dataclass(frozen=True)
class LabelledTexts:
    """Texts, and where each exit's read-out agrees with the oracle.

    agrees: for each text (n, J), over its n counted positions and the J exits, whether the read-out's top token is among
    the oracle's top k.
    """

    texts: Sequence[TeacherText]
    agrees: list[Tensor]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, part: slice) -> LabelledTexts:
        return LabelledTexts(self.texts[part], self.agrees[part])


@torch.inference_mode()
def scores(exits: Exits, labelled: LabelledTexts) -> list[tuple[Tensor, Tensor]]:
    """For each exit: its gate's confidence and whether its read-out agrees, over all counted positions, both (n,)."""
    device = next(exits.modules.parameters()).device
    confidence: list[list[Tensor]] = [[] for _ in exits]
    for text in labelled.texts:
        for index, exit in enumerate(exits):
            logit, _ = exit.gate(text.hidden[None, :, index].float().to(device))
            confidence[index].append(logit[0].sigmoid().cpu()[text.counted])
    agrees = torch.cat(labelled.agrees)
    return [(torch.cat(values), agrees[:, index]) for index, values in enumerate(confidence)]


def quality(exits: Exits, scored: list[tuple[Tensor, Tensor]]) -> list[dict[str, Any]]:
    """For each exit, from its `scores`: agreement with the oracle's top k, and its gate's area under the ROC curve."""
    return [
        {
            "block": exit.block,
            "agreement": round(float(agrees.float().mean()), 4),
            "gate_auroc": round(auroc(confidence, agrees), 4),
        }
        for exit, (confidence, agrees) in zip(exits, scored, strict=True)
    ]


def lowest_threshold(confidence: Tensor, agrees: Tensor, precision: float, least: int = 50) -> float:
    """The lowest threshold, of four decimals, above which the share of tokens that agree is at least `precision`.

    `confidence` and `agrees` (n,) are those of held-out tokens. Only thresholds that at least `least` of them pass count;
    1 if there is none.
    """
    ordered, index = confidence.double().sort()
    thresholds = torch.arange(10_000, dtype=torch.float64) / 10_000
    first = torch.searchsorted(ordered, thresholds, right=True)  # tokens from here on pass
    passed = len(ordered) - first
    right = F.pad(agrees[index].flip(0).long().cumsum(0), (1, 0))[passed]
    good = thresholds[(passed >= least) & (right >= precision * passed)]
    return float(good[0]) if len(good) else 1.0
