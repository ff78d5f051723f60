"""Blocks of a GGUF file's types, as bytes, taken apart: entries, scales, minima.

The types are those of ggml (ggml-common.h and ggml-quants.c in llama.cpp). The package `gguf` computes values from them
(`gguf.dequantize`); here the integers are kept as they are, for `panels.PANELS`.

Shapes: B blocks of a row, G = groups of 32 columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from offramp.model.compiled.panels import PANELS
from offramp.model.compiled.rounding import GROUP
from offramp.model.store import Tensors

Parts = tuple[Tensor, Tensor, Tensor | None]  # entries (N, G, 32) uint8; ends (N, G, ·); units (N, S, ·) or None


def tensors_of(kind: str, rows: Tensor) -> Tensors:
    """Rows of a file (N, bytes) of this type, as `PANELS[kind].tensors` has them. Values stay what they are."""
    return PANELS[kind].of_entries(*_PARTS[kind](rows))


def _blocks(rows: Tensor, *sizes: int) -> list[Tensor]:
    """The fields of blocks, of so many bytes each: (N, B, size)."""
    return list(rows.unflatten(1, (-1, sum(sizes))).split(sizes, dim=2))


def _halves(field: Tensor) -> Tensor:
    return field.contiguous().view(torch.float16)


def _nibbles(field: Tensor) -> Tensor:
    """Bytes (…, n), as 2 · n numbers of 4 bits: first all low halves, then all high ones."""
    return torch.cat([field & 15, field >> 4], dim=-1)


def _bits(field: Tensor) -> Tensor:
    """The bits of bytes (…, n), as (…, 8 · n)."""
    return (field[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(-2)


def _shifted(field: Tensor, *shifts: int, mask: int) -> Tensor:
    """Bytes (…, n), moved right by each of the shifts and masked: (…, shifts, n)."""
    return field[..., None, :] >> torch.tensor(shifts, dtype=torch.uint8)[:, None] & mask


def _q4_0(rows: Tensor) -> Parts:
    scale, q = _blocks(rows, 2, 16)
    return _nibbles(q), _halves(scale), None


def _q4_1(rows: Tensor) -> Parts:
    ends, q = _blocks(rows, 4, 16)
    return _nibbles(q), _halves(ends), None


def _q5_0(rows: Tensor) -> Parts:
    scale, high, q = _blocks(rows, 2, 4, 16)
    return _nibbles(q) | _bits(high) << 4, _halves(scale), None


def _q5_1(rows: Tensor) -> Parts:
    ends, high, q = _blocks(rows, 4, 4, 16)
    return _nibbles(q) | _bits(high) << 4, _halves(ends), None


def _q8_0(rows: Tensor) -> Parts:
    scale, q = _blocks(rows, 2, 32)
    return q, _halves(scale), None


def _q2_k(rows: Tensor) -> Parts:
    both, q, units = _blocks(rows, 16, 64, 4)
    entries = _shifted(q.unflatten(2, (2, 32)), 0, 2, 4, 6, mask=3)
    scales, lows = both & 15, both >> 4
    return _grouped(entries), _ends(scales, lows), _units(units)


def _q3_k(rows: Tensor) -> Parts:
    high, q, packed, unit = _blocks(rows, 32, 64, 12, 2)
    entries = _shifted(q.unflatten(2, (2, 32)), 0, 2, 4, 6, mask=3).flatten(2, 3)  # (N, B, 8, 32)
    entries = entries | _shifted(high, *range(8), mask=1) << 2
    low, rest = _nibbles(packed[..., :8]), _shifted(packed[..., 8:], 0, 2, 4, 6, mask=3).flatten(2)
    return _grouped(entries), _ends((low | rest << 4).view(torch.int8) - 32), _halves(unit)


def _q4_k(rows: Tensor) -> Parts:
    units, packed, q = _blocks(rows, 4, 12, 128)
    entries = _shifted(q.unflatten(2, (4, 32)), 0, 4, mask=15)
    return _grouped(entries), _ends(*_six_bits(packed)), _units(units)


def _q5_k(rows: Tensor) -> Parts:
    units, packed, high, q = _blocks(rows, 4, 12, 32, 128)
    entries = _shifted(q.unflatten(2, (4, 32)), 0, 4, mask=15).flatten(2, 3)
    entries = entries | _shifted(high, *range(8), mask=1) << 4
    return _grouped(entries), _ends(*_six_bits(packed)), _units(units)


def _q6_k(rows: Tensor) -> Parts:
    low, high, scales, unit = _blocks(rows, 128, 64, 16, 2)
    entries = _shifted(low.unflatten(2, (2, 64)), 0, 4, mask=15).unflatten(4, (2, 32)).flatten(3, 4)  # (N, B, 2, 4, 32)
    entries = entries | _shifted(high.unflatten(2, (2, 32)), 0, 2, 4, 6, mask=3) << 4
    return _grouped(entries), _ends(scales), _halves(unit)


def _iq4_xs(rows: Tensor) -> Parts:
    unit, high, low, q = _blocks(rows, 2, 2, 4, 128)
    scales = torch.stack([low & 15, low >> 4], dim=-1).flatten(2)
    scales = scales | _shifted(high, 0, 2, 4, 6, mask=3).transpose(2, 3).flatten(2) << 4
    return _grouped(_nibbles(q.unflatten(2, (8, 16)))), _ends(scales.view(torch.int8) - 32), _halves(unit)


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """8 scales and 8 minima of 6 bits, from 12 bytes."""
    first, second, third = packed.split(4, dim=2)
    scales = torch.cat([first & 63, third & 15 | first >> 6 << 4], dim=2)
    lows = torch.cat([second & 63, third >> 4 | second >> 6 << 4], dim=2)
    return scales, lows


def _grouped(entries: Tensor) -> Tensor:
    """Entries of blocks (N, B, …) in groups of 32 columns."""
    groups: Tensor = entries.flatten(2).unflatten(2, (-1, GROUP))
    return groups.flatten(1, 2)


def _ends(*numbers: Tensor) -> Tensor:
    """Scales, and perhaps minima, each (N, B, n) and n a multiple of 8, in groups of 32 columns."""
    return torch.cat([part.view(torch.int8).unflatten(2, (8, -1)).flatten(1, 2) for part in numbers], dim=2)


def _units(field: Tensor) -> Tensor:
    """What scales and minima are multiplied by. A file subtracts minima."""
    return _halves(field) * torch.tensor([1, -1], dtype=torch.float16)


_PARTS: dict[str, Callable[[Tensor], Parts]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _q4_0,
    "IQ4_XS": _iq4_xs,
}
