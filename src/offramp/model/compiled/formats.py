"""Weight formats: how a linear layer's weights are kept.

| format | blocks | head |
|--------|--------|------|
| `float32` | float32 | float32 |
| `bfloat16` | bfloat16 | bfloat16 |
| `int8` | 8 bits, one scale a row | as the blocks |
| `int4` | 4 bits, a scale and a minimum for every 32; 8 bits for keys and values | 8 bits, one scale a row |
| `int4-head4` | as `int4` | as the blocks |
| `file` | each tensor as its file has it | as the blocks |

Weights that already lie on a 4-bit grid, such as those of a GGUF file in Q4_0 or Q4_1, keep their values in `int4`. Keys
and values are few weights, and a fifth of what 4 bits lose, so they get 8 bits unless they lie on such a grid. Rows are
float32 before and after a product, in every format. Compiled code multiplies them.

Shapes: N rows of a weight (outputs), K its columns (inputs).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from offramp.model.compiled.panels import LAYOUTS, Panels
from offramp.model.compiled.rounding import GROUP, Inputs, grouped
from offramp.model.compiled.weights import Int8, Stack, Weight
from offramp.model.store import Tensors

FILE = "file"


@dataclass(frozen=True)
class Change:
    """What a weight format changes: the perplexity of the short text in float32 (`before`) and in the format (`after`), and
    the share of tokens after which both find the same token likeliest.
    """

    before: float
    after: float
    agreement: float

    @property
    def worse(self) -> float:
        """The share by which the perplexity is higher in the format."""
        return self.after / self.before - 1

    def __str__(self) -> str:
        return (
            f"perplexity of a short text {self.after:.2f}, in float32 {self.before:.2f} ({self.worse:+.1%}); "
            f"the likeliest token is the same in {self.agreement:.0%}"
        )


class Int4(Panels):
    """4-bit integers with a scale and a minimum for every 32 weights of a row: weight = q · scale + low, as in Q4_1."""

    kind, layout = "Q4_1", LAYOUTS["Q4_1"]

    @classmethod
    def tensors(cls, weight: Tensor, known: Inputs | None = None) -> Tensors:
        """The weight rounded by `rounding.grouped`, with what is known of the rows that it meets."""
        made = grouped(weight, known)
        low, high = made.codes.unflatten(1, (-1, 2, GROUP // 2)).unbind(2)  # (N, K / 32, 16) each
        ends = torch.stack([made.scale, made.low], dim=-1).view(torch.uint8)
        return {"blocks": torch.cat([ends, low | high << 4], dim=2).flatten(1)}


@dataclass(frozen=True)
class Format:
    """A row of the table above. `loaded` is the dtype that the library's weights are read in.

    `blocks` and `head` are what they are kept in; None: in what their file has.
    """

    loaded: torch.dtype = torch.float32
    blocks: type[Weight] | None = Weight
    head: type[Weight] | None = Weight

    @property
    def quantised(self) -> bool:
        """Whether weights may be integers, which only compiled code multiplies."""
        return self.blocks is not Weight


class Finer(Panels):
    """8-bit integers with a scale for every 32 weights of a row, as in Q8_0."""

    kind, layout = "Q8_0", LAYOUTS["Q8_0"]

    @classmethod
    def tensors(cls, weight: Tensor, known: Inputs | None = None) -> Tensors:
        """The weight rounded to the nearest points."""
        groups = weight.float().unflatten(1, (-1, GROUP))
        scale = (groups.abs().amax(-1, keepdim=True) / 127).half()
        q = (groups / scale.float()).nan_to_num(0, 0, 0).round().clamp(-127, 127).to(torch.int8)
        return {"blocks": torch.cat([scale.contiguous().view(torch.uint8), q.view(torch.uint8)], dim=2).flatten(1)}


def beside(weight: Weight) -> type[Weight]:
    """The kind in which weights that are made of floats are kept beside this one: about as large as it."""
    while isinstance(weight, Stack):
        weight = weight.pieces[0]
    if type(weight) is Weight:
        return Weight
    return Int4 if isinstance(weight, Panels) and weight.layout.bits < 8 else Int8


def precision_of(bits: float) -> str:
    """The format whose weights have about so many bits: float32, bfloat16, int8 or int4."""
    return next(name for name, most in {"int4": 7, "int8": 12, "bfloat16": 24, "float32": inf}.items() if bits <= most)


FROM_FLOATS: dict[str, type[Panels]] = {made.kind: made for made in (Int4, Finer)}
FORMATS = {
    "float32": Format(),
    "bfloat16": Format(torch.bfloat16),
    "int8": Format(blocks=Int8, head=Int8),
    "int4": Format(blocks=Int4, head=Int8),
    "int4-head4": Format(blocks=Int4, head=Int4),
    FILE: Format(blocks=None, head=None),
}
