"""A sketch of the LM head: a low-rank map that guesses the head's likeliest tokens.

It begins as the map with the smallest error of all logits (`closest`). But errors do not matter for tokens that nobody
would choose. So the sketch then learns to give the model's own next tokens a high probability.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.model.backbone import Backbone
from offramp.training.distillation import Distillation
from offramp.training.loop import Budget, Fit, Loss, step_generator
from offramp.training.teacher import TeacherText, lengths_of

STEPS, EPOCHS = 200, 4  # steps, or epochs if they are fewer; more change little
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

    fit.run("sketch", sketch, texts, Budget(min(STEPS, fit.steps_of(texts, EPOCHS))), RATE, loss_of, lengths_of(texts))
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
