"""SmolLM2 with mixers in the places of attentions, for training: hidden states with gradients to the mixers.

Everything but the mixers is the library's and frozen, in `dtype`. The residual stream is float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybrid.mixer import Mixer, scan_by_head
from lm.forward import Kernels


class Student:
    """A `LlamaForCausalLM` in which the blocks of `mixers` have a mixer instead of their attention.

    mixers: a module's list with a `Mixer` or None for each block, or nothing for the model as it is.
    """

    def __init__(self, model: Any, dtype: torch.dtype, compiled: bool = False) -> None:
        self.model = model.to(dtype).requires_grad_(False).eval()
        self.dtype, self.epsilon = dtype, float(model.config.rms_norm_eps)
        kernels = Kernels(scan=scan_by_head)
        self.kernels = kernels.compiled() if compiled else kernels

    @property
    def blocks(self) -> Any:
        return self.model.model.layers

    def new_mixers(self) -> nn.ModuleList:
        """A mixer for each block, begun from its attention."""
        return nn.ModuleList(Mixer(block.self_attn, self.epsilon) for block in self.blocks)

    def states(self, ids: Tensor, mixers: dict[int, Mixer]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """ids (B, T) → of each block its mixer's (or attention's) input and output, and its output, (B, T, D) each."""
        h = self.model.model.embed_tokens(ids).float()
        turn = self.model.model.rotary_emb(h.to(self.dtype), torch.arange(ids.shape[1], device=ids.device)[None])
        for index, block in enumerate(self.blocks):
            u = self.normed(h, block.input_layernorm)
            mixed = mixers[index](u, self.kernels, self.dtype) if index in mixers else self.attend(block, u, turn)
            h = h + mixed
            h = h + block.mlp(self.normed(h, block.post_attention_layernorm))
            yield u, mixed, h

    @staticmethod
    def attend(block: Any, u: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        out: Tensor = block.self_attn(hidden_states=u, position_embeddings=turn, attention_mask=None)[0]
        return out

    def normed(self, h: Tensor, norm: Any) -> Tensor:
        normed: Tensor = self.kernels.norm(h, self.epsilon, self.dtype) * norm.weight
        return normed

    def last(self, ids: Tensor, mixers: dict[int, Mixer]) -> Tensor:
        """ids (B, T) → the normed hidden state after the last block, (B, T, D)."""
        *_, (_, _, h) = self.states(ids, mixers)
        return self.normed(h, self.model.model.norm)

    def logits(self, h: Tensor, rows: Tensor | None = None) -> Tensor:
        """Normed hidden states (…, D) → the logits of all tokens, or of the tokens `rows`, in float32."""
        head = self.model.lm_head.weight
        return F.linear(h, head if rows is None else head[rows]).float()
