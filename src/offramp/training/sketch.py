"""A sketch of the LM head: a low-rank map that guesses the head's likeliest tokens.

It begins as the map with the smallest error of all logits (`closest`). But errors do not matter for tokens that nobody
would choose. So the sketch then learns to give the model's own next tokens a high probability.

How many dims and candidates it needs depends on the model. `chosen_sketch` takes the cheapest of those that miss at most
1 in 200 of the model's own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.model.backbone import Backbone
from offramp.model.costs import Costs
from offramp.training.distillation import Distillation
from offramp.training.loop import Budget, Fit, Loss, step_generator
from offramp.training.teacher import TeacherText, lengths_of

DIMS, CANDIDATES = (64, 128, 192, 256), (2048, 4096, 8192)  # to choose from
MISSED = 0.005  # the largest share of own tokens that are not among the candidates
MEASURED = 4000  # tokens that show what is missed
STEPS, EPOCHS = 800, 4  # steps, or epochs if they are fewer; more change little
CLOSEST = 500  # texts for the first map
RATE = 0.01  # learning rate, as a share of the mean size of the entries


class Sketch(nn.Module):
    """Rows x (n, D) after the final norm → their stand-ins (n, D): x reduceᵀ expandᵀ.

    The parameters are divided by the mean size of their entries, so that one learning rate suits both.
    """

    def __init__(self, reduce: Tensor, expand: Tensor) -> None:
        super().__init__()
        self.sizes = float(reduce.abs().mean()), float(expand.abs().mean())
        self.reduce, self.expand = nn.Parameter(reduce / self.sizes[0]), nn.Parameter(expand / self.sizes[1])

    def maps(self) -> tuple[Tensor, Tensor]:
        """`reduce` (k, D) and `expand` (D, k)."""
        return self.reduce * self.sizes[0], self.expand * self.sizes[1]

    def forward(self, x: Tensor) -> Tensor:
        reduce, expand = self.maps()
        return F.linear(F.linear(x, reduce), expand)


def chosen_sketch(
    backbone: Backbone, texts: Sequence[TeacherText], held: Sequence[TeacherText], dims: Sequence[int], fit: Fit
) -> tuple[tuple[Tensor, Tensor] | None, int]:
    """The cheapest sketch that misses few of the tokens of `held`, trained on the texts, and its number of candidates.

    It has one of these `dims`. If every sketch misses more, or costs as much as the head: None, and 0.
    """
    costs = Costs(backbone)
    best: tuple[tuple[Tensor, Tensor] | None, int] = None, 0
    least = costs.head
    for size in dims:
        if costs.sketched(size, CANDIDATES[0]) >= least:  # more dims cost more than what was found
            break
        maps = sketch_of(backbone, texts, size, fit)
        places = ranks(backbone, held, maps)
        for number in CANDIDATES:
            missed, cost = float((places >= number).float().mean()), costs.sketched(size, number)
            fit.curve.append({"stage": "sketch", "dims": size, "candidates": number, "missed": round(missed, 5)})
            if missed <= MISSED and cost < least:
                best, least = (maps, number), cost
    return best


@torch.inference_mode()
def ranks(backbone: Backbone, texts: Sequence[TeacherText], maps: tuple[Tensor, Tensor]) -> Tensor:
    """How many tokens a sketch finds likelier than the model's own, at up to `MEASURED` positions of the texts."""
    tops, own = [], []
    for text in texts:
        tops.append(_tops(backbone, [text]))
        own.append(text.top_ids[text.counted, 0].long())
        if sum(map(len, own)) >= MEASURED:
            break
    reduce, expand = (part.to(backbone.device) for part in maps)
    small = backbone.head_weight().float() @ expand
    found = []
    for rows, ids in zip(torch.cat(tops)[:MEASURED].split(256), torch.cat(own)[:MEASURED].split(256), strict=True):
        logits = F.linear(F.linear(rows, reduce), small)
        found.append((logits > logits.gather(1, ids[:, None].to(logits.device))).sum(1))
    return torch.cat(found).cpu()


def sketch_of(backbone: Backbone, texts: Sequence[TeacherText], dims: int, fit: Fit) -> tuple[Tensor, Tensor]:
    """The maps reduce (k, D) and expand (D, k) of a sketch, trained on the texts; k is `dims`.

    The last of the texts' hidden states must be those at the top.
    """
    sketch = Sketch(*closest(backbone, texts[:CLOSEST], dims))
    weight = backbone.head_weight().clone()  # a tensor of inference mode cannot be part of a gradient

    def loss_of(batch: list[int], step: int) -> Loss:
        chosen = [texts[index] for index in batch]
        generator = step_generator(fit.seed, step, "vocabulary of the sketch")
        wanted = Distillation.of(chosen, backbone.vocab_size, generator, fit.device)
        loss = wanted.loss(F.linear(sketch(_tops(backbone, chosen)), weight[wanted.rows]))
        return loss, [loss]

    fit.run(
        f"sketch of {dims}",
        sketch,
        texts,
        Budget(min(STEPS, fit.steps_of(texts, EPOCHS))),
        RATE,
        loss_of,
        lengths_of(texts),
    )
    reduce, expand = sketch.maps()
    return reduce.detach().cpu(), expand.detach().cpu()


@torch.inference_mode()
def closest(backbone: Backbone, texts: Sequence[TeacherText], dims: int) -> tuple[Tensor, Tensor]:
    """The maps reduce (k, D) and expand (D, k) that change the head's logits least on the texts' hidden states.

    Let W be the head's matrix and C the second moments of its inputs. The best map of rank k is L Q Qᵀ L⁻¹, where C = L Lᵀ
    and Q has the right singular vectors of W L with the k largest singular values (SVD-softmax, Shim et al. 2017, which
    takes C for the identity).
    """
    weight = backbone.head_weight()
    moments, tokens = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device), 0
    for text in texts:
        h = _tops(backbone, [text]).double()
        moments += h.T @ h
        tokens += len(h)
    moments /= tokens
    values, vectors = torch.linalg.eigh(moments + 1e-6 * moments.diagonal().mean() * torch.eye(len(moments)).to(moments))
    root = values.clamp(min=1e-12).sqrt()
    gram = (weight.T @ weight).double()
    # Right singular vectors of W L are the eigenvectors of Lᵀ Wᵀ W L.
    _, order = torch.linalg.eigh((vectors * root).T @ gram @ (vectors * root))
    best = order[:, -dims:]
    return (best.T @ (vectors / root).T).float().cpu(), ((vectors * root) @ best).float().cpu()


@torch.no_grad()
def _tops(backbone: Backbone, texts: Sequence[TeacherText]) -> Tensor:
    """The head's inputs (n, D) at the texts' counted positions."""
    tops = torch.cat([text.hidden[text.counted, -1].float() for text in texts])
    return backbone.final(tops.to(backbone.device))
