"""Embed the newest tokens of several sequences, in one look-up if that gives the same result."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from offramp.model.backbone import Backbone
from offramp.model.runtime import Step

Rows = list[list[int]]  # token ids (B, T): the same number of tokens for each row of a state


def embed_all(backbone: Backbone, texts: Sequence[Rows], firsts: Sequence[int]) -> list[tuple[Tensor, Step]]:
    """Token ids (B, T) for each of several states, at positions `first`, `first` + 1, … → what `Backbone.embed` gives."""
    if len(texts) == 1 or backbone.engine == "library blocks":  # a library's embeddings may depend on positions
        return [
            backbone.embed(torch.tensor(rows, device=backbone.device), first)
            for rows, first in zip(texts, firsts, strict=True)
        ]
    flat = list(chain.from_iterable(chain.from_iterable(texts)))
    h, _ = backbone.embed(torch.tensor([flat], device=backbone.device), 0)
    pieces = h[0].split([len(rows) * len(rows[0]) for rows in texts])
    hidden = [piece.view(len(rows), len(rows[0]), -1) for piece, rows in zip(pieces, texts, strict=True)]
    return [(h, backbone.step(h, first)) for h, first in zip(hidden, firsts, strict=True)]
