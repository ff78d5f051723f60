"""How far a read-out is from the model's own distribution, without the cost of its whole LM head.

The teacher's distribution is that of its most probable tokens. The softmax is over these tokens of the whole batch and a
new random sample of the others. Each of the others is weighted by the inverse of its chance to be drawn, which estimates
the full softmax.

The loss is cross-entropy. Or, for drafts, it is −log of the probability that the read-out gives to all tokens together that
the teacher finds nearly as likely as its own: any of them will do (DYNAMAX, arXiv 2504.20922, aims its gates at the
teacher's top k).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offramp.training.teacher import TeacherText


@dataclass(frozen=True)
class Distillation:
    """The targets for the n counted positions of a batch of texts.

    `rows` (R,): the tokens of the softmax, rising; `offset` (R,): what to add to their logits. `columns` (n, K): the places
    of the teacher's tokens in `rows`; `targets` (n, K): their probabilities, or with `several` 1 for each that will do.
    """

    rows: Tensor
    offset: Tensor
    columns: Tensor
    targets: Tensor
    several: bool = False

    @classmethod
    def of(
        cls,
        texts: Sequence[TeacherText],
        vocabulary: int,
        generator: torch.Generator,
        device: torch.device,
        shortlist: Tensor | None = None,
        near: float = 0.0,
    ) -> Distillation:
        """The softmax is over `shortlist` if there is one; then the teacher's other tokens are left out.

        With `near`, each token will do that is at least so many times as likely as the teacher's own.
        """
        counted = pad_batch([text.counted for text in texts])
        teacher = pad_batch([text.top_ids for text in texts])[counted].long()
        targets = pad_batch([text.top_logp for text in texts])[counted].float().softmax(-1)
        if near:
            targets = (targets >= near * targets.amax(-1, keepdim=True)).float()
        if shortlist is None:
            rows, offset = sampled_vocabulary(teacher, vocabulary, generator)
        else:
            rows, offset = shortlist, torch.zeros(len(shortlist))
        columns = torch.searchsorted(rows, teacher).clamp(max=len(rows) - 1)
        targets = targets * (rows[columns] == teacher)
        rows, offset, columns, targets = (tensor.to(device) for tensor in (rows, offset, columns, targets))
        return cls(rows, offset, columns, targets, near > 0)

    def loss(self, logits: Tensor, which: Tensor | slice = slice(None)) -> Tensor:
        """The mean loss, in nats, of logits (m, R) at the positions `which`, by default all."""
        likelihoods, targets = (logits + self.offset).log_softmax(-1).gather(-1, self.columns[which]), self.targets[which]
        if self.several:
            some = targets.sum(-1) > 0
            found = likelihoods[some].masked_fill(targets[some] == 0, -torch.inf).logsumexp(-1)
        else:
            found = (targets * likelihoods).sum(-1)
        return -found.sum() / max(1, len(logits))


def sampled_vocabulary(
    teacher: Tensor, vocabulary: int, generator: torch.Generator, sample: int = 6144
) -> tuple[Tensor, Tensor]:
    """The tokens of one step's softmax, rising, and what to add to their logits, both (n,).

    They are the teacher's tokens (n, K), each once, and a random sample of `sample` others.
    """
    taught = teacher.unique()
    is_other = torch.ones(vocabulary, dtype=torch.bool)
    is_other[taught] = False
    rest = is_other.nonzero().squeeze(1)
    if len(rest) <= sample:
        return torch.arange(vocabulary), torch.zeros(vocabulary)
    drawn = rest[torch.randperm(len(rest), generator=generator)[:sample]]
    offset = torch.zeros(vocabulary)
    offset[drawn] = float(torch.tensor(len(rest) / sample).log())
    rows = torch.cat([taught, drawn]).sort().values
    return rows, offset[rows]


def pad_batch(tensors: list[Tensor]) -> Tensor:
    """Tensors (T, …) of different lengths T → one batch (B, longest T, …), with zeros at the ends."""
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True)
