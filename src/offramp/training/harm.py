"""The harm of an early exit to later tokens: of its token, the skipped blocks remember only what the fill stored.

Even if the token itself is right, the rest of the answer may change. This harm is measured on text whose exact hidden
states are known. The blocks after the exit run once with all tokens exact, and once for each token that leaves: its skipped
blocks are filled by `project`, its tail's blocks remember what the jump computed, and all other tokens stay exact. The harm
is the sum, over the later tokens, of the square root of the Kullback-Leibler divergence between the two next-token
distributions, times a constant. The square root is proportional to how far logits move, and so to how often the most
probable token changes. On SmolLM2 the constant is the same for all exits, and for small and large harms.

Harms are very unequal. So a gate that foresees them avoids much of the harm, and gives up little of the savings.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from offramp.exits.exits import Exit
from offramp.model.backbone import Backbone
from offramp.training.teacher import TeacherText

CHANGES = 0.5  # how many most probable tokens change for a root of one nat; 0.49 to 0.55 at three exits of SmolLM2
CONSIDERED = 4  # most probable tokens of each position


@torch.inference_mode()
def harms(backbone: Backbone, exit: Exit, text: TeacherText, place: int, adapted: Tensor, positions: list[int]) -> Tensor:
    """Estimate how many later tokens change if the token at each of the n `positions` leaves, (n,).

    `place` is that of the exit's block among the text's hidden states; adapted (1, T, D) is the adapter's output for them.
    Only counted positions matter. The distributions are over the tokens that are among the likeliest anywhere in the text.
    The text's last token must not be among the positions, since no token follows it.
    """
    start, stop = exit.block, backbone.n_blocks
    h = text.hidden[None, :, place].to(backbone.device, backbone.dtype)
    exact = backbone.state(h.shape[1])
    exact.watch(start, stop)
    top = backbone.run(h, start, stop, exact, backbone.step(h, 0))
    jumps, tails, later = [], [], []
    for position in positions:
        state = copy.deepcopy(exact)
        state.crop(position, start, stop)
        state.settle()
        token, after = h[:, position : position + 1], h[:, position + 1 :]
        step = backbone.step(token, position)
        jumps.append((token, state, step))
        tails.append((adapted[:, position : position + 1].to(h.dtype), state, step))
        later.append((after, state, backbone.step(after, position + 1)))
    backbone.runtime.remember_all(jumps, start, stop - exit.tail)
    backbone.run_all(tails, stop - exit.tail, stop)
    tops = backbone.run_all(later, start, stop)
    matter = [text.counted[position + 1 :] for position in positions]
    rows = text.top_ids[text.counted, :CONSIDERED].long().unique().to(h.device)
    expected = torch.cat([top[0, -len(each) :][each] for each in matter])
    changed = torch.cat([rest[0][each] for rest, each in zip(tops, matter, strict=True)])
    p, q = (backbone.logits(states, rows).log_softmax(-1) for states in (expected, changed))
    roots = (p.exp() * (p - q)).sum(-1).clamp(min=0).sqrt().split([int(each.sum()) for each in matter])
    return CHANGES * torch.stack([each.sum() for each in roots]).cpu()
