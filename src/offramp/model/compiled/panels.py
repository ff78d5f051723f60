"""Weights in panels, one class for each type of GGUF files that has integers: what core/layouts.h says of them.

A panel keeps 16 rows together. The library makes panels of a file's blocks, and picks rows of them.

Shapes: N rows of a weight, K its columns.
"""

from __future__ import annotations

from ctypes import byref
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from offramp.model.compiled.library import PANEL, call, constant, handle_of
from offramp.model.compiled.rounding import GROUP
from offramp.model.compiled.weights import Weight
from offramp.model.store import Tensors

SUPER = 256  # columns that have one float16 scale where scales are integers
LONG, LONG_BYTES = 64, 68  # columns of a block of entries of 8 bits; bytes of a row in it, its scales among them


@dataclass(frozen=True)
class Layout:
    """A row of the table in core/layouts.h.

    `bits` of an entry; `super`: scales are integers of 8 bits, times a float16 for 256 columns; `lows`: minima are kept.
    """

    bits: int
    super: bool = False
    lows: bool = False

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of so many columns."""
        if self.bits == 8:
            return -(-columns // LONG) * LONG_BYTES
        numbers = (2 if self.bits in (2, 3, 6) else 1) * (1 + self.lows)
        block = GROUP * self.bits // 8 + numbers * (1 if self.super else 2)
        return columns // GROUP * block + (columns // SUPER * 2 * (1 + self.lows) if self.super else 0)


class Panels(Weight):
    """A weight in panels.

    `tensors` are by rows: `blocks` (N, bytes) uint8, as a GGUF file has them. `w` (P, bytes) keeps 16 rows together.
    """

    kind: ClassVar[str]  # the type of GGUF files
    layout: ClassVar[Layout]

    def __init__(self, tensors: Tensors, bias: Tensor | None = None) -> None:
        super().__init__(tensors, bias)
        self.rows, self.columns = (int(size) for size in tensors["shape"])

    @classmethod
    def bytes_of(cls, rows: int, columns: int, itemsize: int) -> int:
        return -(-rows // PANEL) * PANEL * cls.layout.row_bytes(columns)

    @property
    def name(self) -> str:
        return self.kind

    @classmethod
    def packed(cls, tensors: Tensors) -> Tensors:
        """Panels of the blocks of rows. Raises `ValueError` for rows that are not whole blocks."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        blocks = tensors["blocks"].contiguous()
        entries, size = GGML_QUANT_SIZES[GGMLQuantizationType[cls.kind]]
        if blocks.shape[1] % size:
            raise ValueError(f"rows of {blocks.shape[1]} bytes are not whole blocks of {cls.kind}, {size} bytes each")
        rows, columns = len(blocks), blocks.shape[1] // size * entries
        made = cls._room(rows, columns)
        call("offramp_pack", cls._type(), blocks.data_ptr(), rows, columns, made.data_ptr())
        return {"w": made, "shape": torch.tensor([rows, columns])}

    @classmethod
    def _type(cls) -> int:
        return constant(f"OFFRAMP_{cls.kind}")

    @classmethod
    def _room(cls, rows: int, columns: int) -> Tensor:
        return torch.empty(-(-rows // PANEL), PANEL * cls.layout.row_bytes(columns), dtype=torch.uint8)

    def pick(self, rows: slice | Tensor) -> Weight:
        chosen = torch.arange(self.rows)[rows].contiguous()
        made = self._room(len(chosen), self.columns)
        call("offramp_pick", byref(handle_of(self)), chosen.data_ptr(), len(chosen), made.data_ptr())
        shape = torch.tensor([len(chosen), self.columns])
        return type(self)({"w": made, "shape": shape}, None if self.bias is None else self.bias[rows])

    def dense(self) -> Tensor:
        values, every = torch.empty(self.rows, self.columns), torch.arange(self.rows)
        call("offramp_values", byref(handle_of(self)), every.data_ptr(), len(every), values.data_ptr())
        return values


LAYOUTS = {
    "Q4_0": Layout(4),
    "Q4_1": Layout(4, lows=True),
    "Q5_0": Layout(5),
    "Q5_1": Layout(5, lows=True),
    "Q8_0": Layout(8),
    "Q2_K": Layout(2, super=True, lows=True),
    "Q3_K": Layout(3, super=True),
    "Q4_K": Layout(4, super=True, lows=True),
    "Q5_K": Layout(5, super=True, lows=True),
    "Q6_K": Layout(6, super=True),
    "IQ4_NL": Layout(4),
    "IQ4_XS": Layout(4, super=True),
}
PANELS: dict[str, type[Panels]] = {
    kind: type(kind, (Panels,), {"kind": kind, "layout": layout}) for kind, layout in LAYOUTS.items()
}
