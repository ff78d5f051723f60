"""What the lean paths of all block kinds share: the weights in one format, the final norm and head, two engines.

An engine does the work: `native` where a C compiler is at hand, and torch's operators, which also serve GPUs and are what
`native` is tested against. `loading.check` compares both with the library's own logits.

Shapes: B batch, T tokens of this call, D hidden size, R = B · T rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.model.lean.native import CWeight, Native, NativeMamba, library
from offramp.model.lean.weights import Format, Int4, Int8, Store, Weight
from offramp.model.state import State

Part = tuple[Tensor, State, "LeanStep"]  # hidden states (B, T, D), what their blocks remember, what they share
Make = Callable[[str, list[nn.Linear], Tensor | None], Weight]


class RMSNorm:
    """x / √(mean x² + eps) · weight, over the last dim."""

    def __init__(self, norm: Any, order: Tensor | None = None) -> None:
        weight: Tensor = norm.weight.detach().float().clone()
        self.eps: float = norm.variance_epsilon
        self.weight = (weight if order is None else weight[order]).contiguous()
        self._scaled = self.weight * math.sqrt(len(weight))
        self._floor = torch.tensor(math.sqrt(len(weight) * self.eps), device=weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot(self._floor)
        return x * self._scaled / length


@dataclass
class LeanStep:
    """What all blocks of one call share: the batch, its tokens, and the sequence of each row (R,), -1 for none."""

    batch: int
    tokens: int
    sequences: Tensor


class Lean:
    """A whole model on the lean path: its blocks, final norm and head, in one weight format.

    What it takes to run the blocks differs from kind to kind: see `LeanLlama` and `lean_mamba.LeanMamba`.
    """

    blocks: Sequence[Any]  # each with its `weights`
    _native: Native | NativeMamba | None = None

    def __init__(self, norm: nn.Module, head: nn.Linear, format: Format, store: Store) -> None:
        self._format, self._store = format, store
        self._device = head.weight.device
        self.norm = RMSNorm(norm)
        self.head = self._maker("head", format.head)("weight", [head], None)

    def step(self, first: int | Tensor, batch: int, tokens: int, mask: Tensor | None = None) -> LeanStep:
        """For `tokens` tokens of each sequence, at position `first` and on; `first` (B,) may differ from row to row.

        Tokens that `mask` (B, T) hides are not there.
        """
        raise NotImplementedError

    def run(self, h: Tensor, start: int, stop: int, state: State, step: LeanStep, fill: bool = False) -> Tensor:
        """h (B, T, D) through blocks `start` to `stop` - 1; with `fill`, they only remember what they would of h."""
        return self.run_all([(h, state, step)], start, stop, fill)[0]

    def run_all(self, parts: Sequence[Part], start: int, stop: int, fill: bool = False) -> list[Tensor]:
        """`run` for several states at once, which the native engine does in one pass over the weights."""
        wide = [h.float().reshape(-1, h.shape[-1]) for h, _, _ in parts]
        if start == stop:
            rows = wide
        elif self._native is None:
            rows = [h.clone(memory_format=torch.contiguous_format) for h in wide]
            for x, (_, state, step) in zip(rows, parts, strict=True):
                self._run_torch(x, start, stop, state, step, fill)
        else:
            together = wide[0].clone(memory_format=torch.contiguous_format) if len(wide) == 1 else torch.cat(wide)
            self._run_native(together, start, stop, parts, fill)
            rows = list(together.split([len(h) for h in wide]))
        return [x.view(h.shape) for x, (h, _, _) in zip(rows, parts, strict=True)]

    def _run_torch(self, rows: Tensor, start: int, stop: int, state: State, step: LeanStep, fill: bool) -> None:
        """rows (R, D) of one state through the blocks, in place."""
        raise NotImplementedError

    def _run_native(self, rows: Tensor, start: int, stop: int, parts: Sequence[Part], fill: bool) -> None:
        """The rows of all parts, one after another, through the blocks, in place."""
        raise NotImplementedError

    def logits(self, h: Tensor, rows: Tensor | None = None) -> Tensor:
        """Final norm and head: h (…, D) → (…, V), or of the tokens `rows` only. Gradients pass through with `rows`."""
        normed = self.norm(h.float())
        if rows is not None:
            return F.linear(normed, self.head.pick(rows).dense())
        flat = normed.reshape(-1, h.shape[-1])
        out = self._native.product(self._head, flat.contiguous()) if self._native else self.head(flat)
        return out.view(*h.shape[:-1], -1)

    def head_of(self, rows: Tensor) -> Callable[[Tensor], Tensor]:
        """`logits` of the tokens `rows` only, without gradients, as a function that has its weights picked out once."""
        weight = self.head.pick(rows)
        native, handle = self._native, CWeight.of(weight)

        def logits(h: Tensor) -> Tensor:
            flat = self.norm(h.float()).reshape(-1, h.shape[-1])
            out = native.product(handle, flat.contiguous()) if native else weight(flat)
            return out.view(*h.shape[:-1], -1)

        return logits

    def rough(self, expand: Tensor) -> Callable[[Tensor], Tensor]:
        """The head behind a map `expand` (D, k), as one product in the head's own format: z (n, k) → (n, V)."""
        kind = type(self.head)
        product = self.head.dense() @ expand
        weight = kind(kind.tensors(product.to(self.head.w.dtype) if kind is Weight else product))
        native, handle = self._native, CWeight.of(weight)
        return lambda z: native.product(handle, z.contiguous()) if native else weight(z)

    @property
    def engine(self) -> str:
        """What does the work: `native` or `torch`."""
        return "native" if self._native else "torch"

    @property
    def tolerance(self) -> float:
        """How far logits may be from the library's, as shares of the largest, for the products' rounding.

        float32: 1e-4. Integer weights: 2e-3 where rows are rounded to 16 bits (`native`), 1e-1 where to bfloat16 (torch).
        bfloat16: 1e-1, since the library rounds every result, which alone puts SmolLM2's logits 4e-2 off.
        """
        if self._format.quantised:
            return 2e-3 if self._native else 1e-1
        return 1e-4 if self.head.w.dtype == torch.float32 else 1e-1

    def _compiles(self, dims: int) -> bool:
        """Whether `native.c` can do the work: a compiler, weights and inner `dims` of whole vectors, on the CPU."""
        weights = self._weights
        fits = all(weight.columns % (32 if isinstance(weight, Int4 | Int8) else 8) == 0 for weight in weights)
        return bool(fits and dims % 8 == 0 and self._device.type == "cpu" and library())

    @property
    def _weights(self) -> list[Weight]:
        return [weight for block in self.blocks for weight in block.weights] + [self.head]

    @cached_property
    def _head(self) -> CWeight:
        return CWeight.of(self.head)

    @property
    def _columns(self) -> int:
        return max(weight.columns for weight in self._weights)

    def _maker(self, name: int | str, kind: type[Weight]) -> Make:
        """Makes a weight of some linear layers, stacked, in this order of rows, and gives it to those layers too.

        So the library's own model then computes with the very weights that are multiplied here.
        """

        def make(part: str, layers: list[nn.Linear], order: Tensor | None) -> Weight:
            weight = torch.cat([layer.weight.detach() for layer in layers])
            bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])
            if order is not None:
                weight, bias = weight[order], None if bias is None else bias[order]
            if not self._format.quantised:
                return kind(kind.tensors(weight), bias)
            weight = weight.float()
            made = kind(self._store(f"{name}/{part}", lambda: kind.tensors(weight)), bias)
            dense = made.dense() if order is None else torch.empty_like(weight).index_copy_(0, order, made.dense())
            for layer, piece in zip(layers, dense.split([layer.out_features for layer in layers]), strict=True):
                layer.weight = nn.Parameter(piece.to(layer.weight.dtype), requires_grad=False)
            return made

        return make


def joined(parts: list[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def numbered(steps: Sequence[LeanStep]) -> Tensor:
    """The sequence of each row, (R,), counted over all steps."""
    firsts = list(accumulate((step.batch for step in steps), initial=0))[:-1]
    moved = [torch.where(step.sequences < 0, -1, step.sequences + at) for step, at in zip(steps, firsts, strict=True) if at]
    return joined([steps[0].sequences, *moved])
