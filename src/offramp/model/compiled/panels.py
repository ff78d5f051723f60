"""Weights in panels, one class for each type of GGUF files that has integers: what core/layouts.h says of them.

A panel keeps 16 rows together. A block is 32 columns of it: planes of bits, then scales and minima. Entries of 8 bits are
in blocks of 64 columns, row by row. The values are those of the file, bit for bit up to float32's rounding.

Shapes: N rows of a weight, K its columns; P panels, G = K / 32 groups of a row, S = K / 256.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from offramp.model.compiled.rounding import GROUP
from offramp.model.compiled.weights import Weight
from offramp.model.store import Tensors

SUPER = 256  # columns that have one float16 scale where scales are integers
PANEL = 16  # rows of a weight that are kept together
LONG = 64  # columns of a block of entries of 8 bits
LONG_SIZES = LONG, LONG // GROUP * 2  # bytes of a row in it: entries, and scales
CODES = torch.tensor([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=torch.float32)


@dataclass(frozen=True)
class Layout:
    """A row of the table in core/layouts.h.

    `bits` of an entry; `codes`: they are places in `CODES`; `super`: scales are integers of 8 bits, times a float16 for 256
    columns; `lows`: minima are kept. Else `centre` is subtracted from the entries.
    """

    bits: int
    codes: bool = False
    super: bool = False
    lows: bool = False

    @property
    def scales(self) -> int:
        """Scales of a row in a block."""
        return 2 if self.bits in (2, 3, 6) else 1

    @property
    def numbers(self) -> int:
        """Scales and minima of a row in a block."""
        return self.scales * (1 + self.lows)

    @property
    def centre(self) -> int:
        """What is subtracted from an entry, where no minimum is kept; 0 for signed entries."""
        return 0 if self.lows or self.codes or self.bits == 8 else 1 << (self.bits - 1)

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of so many columns."""
        if self.bits == 8:
            return -(-columns // LONG) * sum(LONG_SIZES)
        block = GROUP * self.bits // 8 + self.numbers * (1 if self.super else 2)
        return columns // GROUP * block + (columns // SUPER * 2 * (1 + self.lows) if self.super else 0)


class Panels(Weight):
    """A weight in panels.

    `tensors` are by rows: `q` (N, G, 4 · bits) uint8, planes of bits; `ends` (N, G, scales, then minima), float16 or int8;
    and with integers as scales, `units` (N, S, 1 or 2) float16, what scales and minima are multiplied by. `w` (P, bytes)
    keeps 16 rows together.
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
    def of_entries(cls, q: Tensor, ends: Tensor, units: Tensor | None = None) -> Tensors:
        """`tensors` of entries (N, G, 32) uint8, of scales and minima, and of the units of these."""
        if cls.layout.super and q.shape[1] * GROUP % SUPER:
            raise ValueError(f"rows of {q.shape[1] * GROUP} weights cannot be cut into groups of {SUPER}")
        parts = {"q": _planes(q, cls.layout.bits), "ends": ends}
        return parts if units is None else parts | {"units": units}

    @classmethod
    def packed(cls, tensors: Tensors) -> Tensors:
        of, shape = cls.layout, torch.tensor([len(tensors["q"]), tensors["q"].shape[1] * GROUP])
        spare = -len(tensors["q"]) % PANEL
        q, ends = (F.pad(tensors[name], (0, 0, 0, 0, 0, spare)) for name in ("q", "ends"))
        if of.bits == 8:
            return {"w": _in_long_blocks(q.flatten(1), ends.flatten(1)), "shape": shape}
        # (P, G, planes, 16 rows · their bytes), and as many numbers of 16 rows
        w = torch.cat([_together(q.unflatten(2, (of.bits, 4))), _together(ends[..., None])], dim=2)
        if of.super:
            units = _together(F.pad(tensors["units"], (0, 0, 0, 0, 0, spare))[..., None])
            w = torch.cat([units, w.unflatten(1, (-1, SUPER // GROUP)).flatten(2)], dim=2)
        return {"w": w.flatten(1), "shape": shape}

    def _rows(self, rows: slice | Tensor) -> Tensors:
        of = self.layout
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(self.rows)
            panels = self.w[start // PANEL : -(-stop // PANEL)]
            own: slice | Tensor = slice(start % PANEL, stop - start // PANEL * PANEL)
        else:  # index_select is several times as fast as indexing
            panels, own = self.w.index_select(0, rows // PANEL), torch.arange(len(rows)) * PANEL + rows % PANEL
        w, out = panels, {}
        if of.bits == 8:
            q, ends = _of_long_blocks(panels, self.columns)
            return {"q": q[own], "ends": ends[own]}
        if of.super:
            w = panels.unflatten(1, (self.columns // SUPER, -1))
            units, w = w.tensor_split([2 * PANEL * (1 + of.lows)], dim=2)
            out["units"] = _apart(units.contiguous().view(torch.float16).unflatten(2, (-1, PANEL, 1)))[own]
        w = w.reshape(len(panels), self.columns // GROUP, -1)
        q, ends = w.tensor_split([4 * PANEL * of.bits], dim=2)
        dtype = torch.int8 if of.super else torch.float16
        out["q"] = _apart(q.unflatten(2, (of.bits, PANEL, 4)))[own]
        out["ends"] = _apart(ends.contiguous().view(dtype).unflatten(2, (-1, PANEL, 1)))[own]
        return out

    def dense(self) -> Tensor:
        return self.values(self._rows(slice(None)))

    @classmethod
    def values(cls, tensors: Tensors) -> Tensor:
        """The values of `tensors`, (N, K) in float32."""
        of, q, ends = cls.layout, _entries(tensors["q"], cls.layout.bits), tensors["ends"].float()
        if of.super:
            units = tensors["units"].float().repeat_interleave(of.scales, 2)
            ends *= units.repeat_interleave(SUPER // GROUP, 1)
        if of.bits == 8:
            q = q.view(torch.int8)
        weight: Tensor = CODES[q.int()] if of.codes else q.float()
        weight = weight.sub_(of.centre).unflatten(2, (of.scales, -1)).mul_(ends[:, :, : of.scales, None])
        if of.lows:
            weight += ends[:, :, of.scales :, None]
        flat: Tensor = weight.flatten(1)
        return flat


def _together(parts: Tensor) -> Tensor:
    """Numbers (N, G, n, b) of rows as bytes (P, G, ·): those of 16 rows side by side, for each n."""
    numbers: Tensor = parts.unflatten(0, (-1, PANEL)).permute(0, 2, 3, 1, 4).contiguous()
    return numbers.flatten(2).view(torch.uint8)


def _apart(parts: Tensor) -> Tensor:
    """Numbers (P, G, n, 16, b) of panels by their rows: (N, G, n · b)."""
    return parts.permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(2)


def _in_long_blocks(q: Tensor, scales: Tensor) -> Tensor:
    """Bytes (N, K) and scales (N, G) of rows as panels (P, bytes) of blocks of 64 columns."""
    filled = [F.pad(part, (0, -part.shape[1] % size)) for part, size in ((q, LONG), (scales, LONG // GROUP))]
    # (P, 16 rows, blocks, bytes) of each → (P, blocks, bytes of both)
    parts = [part.view(torch.uint8).unflatten(1, (-1, size)) for part, size in zip(filled, LONG_SIZES, strict=True)]
    blocks = [part.unflatten(0, (-1, PANEL)).transpose(1, 2).flatten(2) for part in parts]
    return torch.cat(blocks, dim=2).flatten(1)


def _of_long_blocks(panels: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Of such panels, bytes (N, G, 32) and scales (N, G, 1) of all rows."""
    blocks = panels.unflatten(1, (-1, PANEL * sum(LONG_SIZES))).split([PANEL * size for size in LONG_SIZES], dim=2)
    q, scales = (part.unflatten(2, (PANEL, -1)).transpose(1, 2).flatten(2).flatten(0, 1) for part in blocks)
    return q[:, :columns].unflatten(1, (-1, GROUP)), scales.view(torch.float16)[:, : columns // GROUP, None]


def _planes(q: Tensor, bits: int) -> Tensor:
    """Entries (N, G, 32) of so many bits as planes (N, G, 4 · bits), four bytes of a row in each."""
    v = q.unflatten(2, (8, 4))  # (N, G, 8, 4)
    if bits == 8:
        return q
    planes = [(v[:, :, :4] & 15) | (v[:, :, 4:] << 4)] if bits & 4 else []
    begun = bits & 4
    if bits & 2:
        shifts = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
        planes.append(((v >> begun & 3).unflatten(2, (2, 4)) << shifts).sum(3, dtype=torch.uint8))
        begun += 2
    if bits & 1:
        shifts = torch.arange(8, dtype=torch.uint8)[:, None]
        planes.append(((v >> begun & 1) << shifts).sum(2, keepdim=True, dtype=torch.uint8))
    return torch.cat(planes, dim=2).flatten(2)


def _entries(planes: Tensor, bits: int) -> Tensor:
    """Planes (N, G, 4 · bits) as entries (N, G, 32)."""
    if bits == 8:
        return planes
    rest = planes.unflatten(2, (bits, 4))
    v = torch.zeros(*planes.shape[:2], 8, 4, dtype=torch.uint8)
    begun = 0
    if bits & 4:
        v = torch.cat([rest[:, :, :4] & 15, rest[:, :, :4] >> 4], dim=2)
        rest, begun = rest[:, :, 4:], 4
    if bits & 2:
        shifts = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
        v = v | ((rest[:, :, :2, None] >> shifts & 3) << begun).flatten(2, 3)
        rest, begun = rest[:, :, 2:], begun + 2
    if bits & 1:
        v = v | ((rest >> torch.arange(8, dtype=torch.uint8)[:, None] & 1) << begun)
    return v.flatten(2)


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
    "IQ4_NL": Layout(4, codes=True),
    "IQ4_XS": Layout(4, codes=True, super=True),
}
PANELS: dict[str, type[Panels]] = {
    kind: type(kind, (Panels,), {"kind": kind, "layout": layout}) for kind, layout in LAYOUTS.items()
}
