"""From hidden states to logits: the whole head, a short list of tokens, or the candidates that a sketch names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from offramp.errors import BadInput
from offramp.model.backbone import Backbone
from offramp.model.costs import Costs


@dataclass(frozen=True, eq=False)
class Head:
    """Final norm and LM head, or a cheaper stand-in.

    `logits`: hidden states (1, n, D) → (1, n, V), or over the tokens of `shortlist` only; `flops`: those of one token.
    """

    logits: Callable[[Tensor], Tensor]
    flops: int
    vocab_size: int
    shortlist: Tensor | None = None

    @classmethod
    def whole(cls, backbone: Backbone, flops: int) -> Head:
        """Every token of the vocabulary; `flops` are those of the backbone's head (`Costs.head`)."""
        return cls(backbone.logits, flops, backbone.vocab_size)

    @classmethod
    def short(cls, backbone: Backbone, flops: int, shortlist: Tensor) -> Head:
        """The tokens of `shortlist` (n,) only; `flops` are those of the backbone's whole head."""
        share = flops * len(shortlist) // backbone.vocab_size
        return cls(backbone.head_of(shortlist), share, backbone.vocab_size, shortlist)

    @classmethod
    def sketched(cls, backbone: Backbone, costs: Costs, sketch: tuple[Tensor, Tensor] | None, candidates: int) -> Head:
        """The tokens that the exits' sketch ranks highest, `candidates` of them; −inf for all others.

        Raises `BadInput` for exits without a sketch, and for more candidates than tokens.
        """
        if sketch is None:
            raise BadInput(
                f"{candidates} candidates cannot be read out: the exits have no sketch of the head.",
                "Give 0 for all tokens, or train exits with a sketch.",
            )
        if candidates > backbone.vocab_size:
            raise BadInput(
                f"{candidates} candidates cannot be read out: there are {backbone.vocab_size} tokens.",
                "Give 0 for all tokens.",
            )
        flops = costs.sketched(len(sketch[0]), candidates)
        return cls(backbone.sketched(*sketch, candidates), flops, backbone.vocab_size)

    def over_vocabulary(self, logits: Tensor) -> Tensor:
        """Logits (n, …) of this head → (n, V), with −inf for tokens that are not on the short list."""
        if self.shortlist is None:
            return logits
        whole = logits.new_full((len(logits), self.vocab_size), float("-inf"))
        return whole.index_copy_(1, self.shortlist, logits)
