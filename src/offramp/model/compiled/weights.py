"""Weights of linear layers, as compiled code multiplies them: rows of floats or of 8-bit integers, and stacks.

Shapes: N rows of a weight (outputs), K its columns (inputs).
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from offramp.model.compiled.rounding import Inputs, int8
from offramp.model.store import Tensors, kept

LARGE = 1 << 18  # numbers


class Weight:
    """Weights as they are, float32, bfloat16 or float16."""

    scale: Tensor | None = None

    def __init__(self, tensors: Tensors, bias: Tensor | None = None) -> None:
        self.w = tensors["w"].contiguous()
        self.rows, self.columns = self.w.shape
        self.bias = None if bias is None else bias.float()

    @classmethod
    def tensors(cls, weight: Tensor, known: Inputs | None = None) -> Tensors:
        """The weight (N, K) in this format, in parts whose rows are the weight's. `known`: of the rows that it meets."""
        return {"w": weight}

    @classmethod
    def packed(cls, tensors: Tensors) -> Tensors:
        """`tensors` in the order in which they are kept."""
        return tensors

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None = None) -> Self:
        """A weight (N, K) in this format. To find a large one's integers takes seconds, so they are kept in the cache."""

        def made() -> Tensors:
            return cls.packed(cls.tensors(weight))

        large = cls is not Weight and weight.numel() >= LARGE
        return cls(kept(cls.__name__.lower(), weight, made) if large else made(), bias)

    @classmethod
    def bytes_of(cls, rows: int, columns: int, itemsize: int) -> int:
        """`nbytes` of a weight (N, K), without making it. An entry of a plain format takes `itemsize` bytes."""
        return rows * columns * itemsize

    @property
    def name(self) -> str:
        """What the weights are kept in: float32, bfloat16, float16, int8, or a type of GGUF files."""
        return str(self.w.dtype).removeprefix("torch.")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.rows, self.columns

    @property
    def nbytes(self) -> int:
        """Bytes of weights that one product reads."""
        return self.w.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def pick(self, rows: slice | Tensor) -> Weight:
        """A weight of these rows (outputs) only."""
        return type(self)(self.packed(self._rows(rows)), None if self.bias is None else self.bias[rows])

    def _rows(self, rows: slice | Tensor) -> Tensors:
        """These rows of the weight, as `tensors` gives them."""
        parts = {"w": self.w} if self.scale is None else {"w": self.w, "scale": self.scale}
        # index_select is several times as fast as indexing.
        return {
            name: part.index_select(0, rows) if isinstance(rows, Tensor) else part[rows] for name, part in parts.items()
        }

    def dense(self) -> Tensor:
        """The values that rows are multiplied with, (N, K) in float32."""
        return self.w.float()


class Int8(Weight):
    """Symmetric 8-bit integers with one scale a row."""

    def __init__(self, tensors: Tensors, bias: Tensor | None = None) -> None:
        super().__init__(tensors, bias)
        self.scale: Tensor = tensors["scale"]

    @classmethod
    def bytes_of(cls, rows: int, columns: int, itemsize: int) -> int:
        return rows * columns + 4 * rows

    @classmethod
    def tensors(cls, weight: Tensor, known: Inputs | None = None) -> Tensors:
        made = int8(weight, known)
        return {"w": made.codes, "scale": made.scale}

    def dense(self) -> Tensor:
        return self.w.float().mul_(self.scale[:, None])


class Stack(Weight):
    """Weights of several types, one above another, as one weight. `bias` is that of all rows."""

    def __init__(self, pieces: list[Weight]) -> None:
        self.pieces = pieces
        self.handles: Any = None  # for the compiled code
        self.rows, self.columns = sum(piece.rows for piece in pieces), pieces[0].columns
        self.bias = None

    @property
    def name(self) -> str:
        return "stacked"

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    def pick(self, rows: slice | Tensor) -> Weight:
        return Weight({"w": self.dense()[rows]})

    def dense(self) -> Tensor:
        return torch.cat([piece.dense() for piece in self.pieces])


def multiplies_bfloat16(device: torch.device | None = None) -> bool:
    """Whether the device (the CPU by default) has instructions for bfloat16: torch multiplies faster in it."""
    if device is not None and device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
