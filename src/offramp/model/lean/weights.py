"""Weight formats: how a linear layer's weights are kept, and how rows are multiplied with them.

| format | blocks | head |
|--------|--------|------|
| `float32` | float32 | float32 |
| `bfloat16` | bfloat16 | bfloat16 |
| `int8` | 8 bits, one scale a row | as the blocks |
| `int4` | 4 bits, a scale and a minimum for every 32 | 8 bits, one scale a row |
| `int4-head4` | as `int4` | as the blocks |

Weights that already lie on a 4-bit grid, such as those of a GGUF file in Q4_0 or Q4_1, keep their values in `int4`. Rows
are float32 before and after a product, in every format. The products here are torch's; `native` has faster ones.

Shapes: N rows of a weight (outputs), K its columns (inputs), R rows multiplied at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from offramp.model.store import Tensors

GROUP = 32
MANY = 256  # rows from which it is faster to unpack integer weights and multiply them as plain ones
SLICE = 1 << 22  # weights that are unpacked at once: 16 MB in float32


class Weight:
    """Weights as they are, float32 or bfloat16: x (R, K) → x · weightᵀ + bias (R, N)."""

    scale: Tensor | None = None
    low: Tensor | None = None

    def __init__(self, tensors: Tensors, bias: Tensor | None = None) -> None:
        self.w = tensors["w"].contiguous()
        self.rows, self.columns = self.w.shape
        self.bias = None if bias is None else bias.float()

    @classmethod
    def tensors(cls, weight: Tensor) -> Tensors:
        """What this format keeps of a weight (N, K)."""
        return {"w": weight}

    @classmethod
    def bytes_of(cls, rows: int, columns: int, itemsize: int) -> int:
        """`nbytes` of a weight (N, K), without making it. An entry of a plain format takes `itemsize` bytes."""
        return rows * columns * itemsize

    @property
    def name(self) -> str:
        """What the weights are kept in: float32, bfloat16, int8 or int4."""
        return str(self.w.dtype).removeprefix("torch.") if type(self) is Weight else type(self).__name__.lower()

    @property
    def nbytes(self) -> int:
        """Bytes of weights that one product reads."""
        return sum(part.nbytes for part in (self.w, self.scale, self.low) if part is not None)

    def __call__(self, x: Tensor) -> Tensor:
        y = self._times(x)
        return y if self.bias is None else y + self.bias

    def _times(self, x: Tensor) -> Tensor:
        if self.w.dtype == torch.float32:
            return F.linear(x, self.w)
        if len(x) >= 16 and x.device.type == "cpu" and not multiplies_bfloat16():
            return self._unpacked_times(x)  # many rows are faster in float32
        return F.linear(x.to(self.w.dtype), self.w).float()

    def _unpacked_times(self, x: Tensor) -> Tensor:
        """The product on a CPU by way of a plain matrix, a slice of the weight's rows at a time."""
        dtype = torch.bfloat16 if multiplies_bfloat16() else torch.float32
        x, size = x.to(dtype), max(1, SLICE // self.columns)
        slices = (slice(at, at + size) for at in range(0, self.rows, size))
        return torch.cat([F.linear(x, self._dense(rows).to(dtype)) for rows in slices], dim=-1).float()

    def pick(self, rows: slice | Tensor) -> Weight:
        """A weight of these rows (outputs) only."""
        parts = {"w": self.w, "scale": self.scale, "low": self.low}
        return type(self)(
            {
                # index_select is several times as fast as indexing.
                name: part.index_select(0, rows) if isinstance(rows, Tensor) else part[rows]
                for name, part in parts.items()
                if part is not None
            },
            None if self.bias is None else self.bias[rows],
        )

    def dense(self) -> Tensor:
        """The values that rows are multiplied with, (N, K) in float32."""
        return self._dense(slice(None))

    def _dense(self, rows: slice) -> Tensor:
        return self.w[rows].float()


class Int8(Weight):
    """Symmetric 8-bit integers with one scale a row. On a CPU the product rounds its rows to bfloat16."""

    def __init__(self, tensors: Tensors, bias: Tensor | None = None) -> None:
        super().__init__(tensors, bias)
        self.scale: Tensor = tensors["scale"]

    @classmethod
    def bytes_of(cls, rows: int, columns: int, itemsize: int) -> int:
        return rows * columns + 4 * rows

    @classmethod
    def tensors(cls, weight: Tensor) -> Tensors:
        scale = (weight.abs().amax(1) / 127).clamp(min=1e-12)
        return {"w": (weight / scale[:, None]).round().to(torch.int8), "scale": scale}

    def _times(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return F.linear(x, self.dense())
        if len(x) >= MANY or self.columns % 32:  # torch's product of packed weights fails at other widths
            return self._unpacked_times(x)
        return torch._weight_int8pack_mm(x.bfloat16(), self.w, self.scale.bfloat16()).float()

    def _dense(self, rows: slice) -> Tensor:
        return self.w[rows].float().mul_(self.scale[rows, None])


class Int4(Weight):
    """4-bit integers with a scale and a minimum for every 32 weights of a row: weight = q · scale + low.

    Byte j of a group holds q[j] in its low half and q[j + 16] in its high half. On a CPU the product rounds its rows,
    scales and minima to bfloat16; elsewhere these weights save memory only.
    """

    def __init__(self, tensors: Tensors, bias: Tensor | None = None) -> None:
        super().__init__(tensors, bias)
        self.scale: Tensor = tensors["scale"].contiguous()
        self.low: Tensor = tensors["low"].contiguous()
        self.columns = GROUP * self.scale.shape[1]

    @classmethod
    def bytes_of(cls, rows: int, columns: int, itemsize: int) -> int:
        return rows * columns // 2 + 2 * 4 * rows * columns // GROUP

    @classmethod
    def tensors(cls, weight: Tensor) -> Tensors:
        """A group that lies on a grid of at most 16 values keeps it; any other gets 16 values over its range."""
        if weight.shape[1] % GROUP:
            raise ValueError(f"rows of {weight.shape[1]} weights cannot be cut into groups of {GROUP}")
        groups = weight.unflatten(1, (-1, GROUP))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        span = (high - low).clamp(min=1e-12)
        scale = span / 15
        fitted = _on_grid(groups, low, scale)
        for steps in range(14, 0, -1):
            if fitted.all():
                break
            # Most groups of most models fit no grid, which a few of their weights show.
            some = ~fitted & _on_grid(groups[..., :4], low, span / steps)
            some[some.clone()] = _on_grid(groups[some[..., 0]], low[some[..., 0]], span[some[..., 0]] / steps)[:, 0]
            scale, fitted = torch.where(some, span / steps, scale), fitted | some
        q = ((groups - low) / scale).round().clamp(0, 15).to(torch.uint8)
        return {"w": (q[..., :16] | (q[..., 16:] << 4)).flatten(1), "scale": scale.squeeze(-1), "low": low.squeeze(-1)}

    def _q(self, rows: slice = slice(None)) -> Tensor:
        halves = self.w[rows].unflatten(1, (-1, GROUP // 2))
        return torch.cat([halves & 15, halves >> 4], dim=-1)

    @cached_property
    def _packed(self) -> tuple[Tensor, Tensor]:
        spare = (0, 0, 0, -self.rows % 16)  # torch's kernel needs a multiple of 16 rows
        q, scale, low = (F.pad(part, spare) for part in (self._q().flatten(1).int(), self.scale, self.low))
        # It computes (q - 8) · scale + zero.
        scale_zero = torch.stack([scale, low + 8 * scale], dim=-1).transpose(0, 1).contiguous().bfloat16()
        return torch._convert_weight_to_int4pack_for_cpu(q, 1), scale_zero

    def _times(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return F.linear(x, self.dense())
        if len(x) >= MANY:
            return self._unpacked_times(x)
        packed, scale_zero = self._packed
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, GROUP, scale_zero)
        return y[:, : self.rows].float()

    def _dense(self, rows: slice) -> Tensor:
        # Step by step in place, since torch is slow at products of different dtypes.
        return self._q(rows).float().mul_(self.scale[rows, :, None]).add_(self.low[rows, :, None]).flatten(1)


def multiplies_bfloat16(device: torch.device | None = None) -> bool:
    """Whether the device (the CPU by default) has instructions for bfloat16: torch multiplies faster in it."""
    if device is not None and device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _on_grid(groups: Tensor, low: Tensor, scale: Tensor) -> Tensor:
    """Whether all weights of a group are low + a whole number of scales, up to float32's rounding: (N, groups, 1)."""
    steps = (groups - low) / scale
    return ((steps - steps.round()).abs() < 1e-3).all(-1, keepdim=True)


@dataclass(frozen=True)
class Format:
    """A row of the table above. `loaded` is the dtype that the library's weights are read in."""

    loaded: torch.dtype = torch.float32
    blocks: type[Weight] = Weight
    head: type[Weight] = Weight

    @property
    def quantised(self) -> bool:
        """Whether weights are kept as integers."""
        return self.blocks is not Weight


FORMATS = {
    "float32": Format(),
    "bfloat16": Format(torch.bfloat16),
    "int8": Format(blocks=Int8, head=Int8),
    "int4": Format(blocks=Int4, head=Int8),
    "int4-head4": Format(blocks=Int4, head=Int4),
}
