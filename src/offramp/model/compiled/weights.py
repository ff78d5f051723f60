"""Weight formats: how a linear layer's weights are kept.

| format | blocks | head |
|--------|--------|------|
| `float32` | float32 | float32 |
| `bfloat16` | bfloat16 | bfloat16 |
| `int8` | 8 bits, one scale a row | as the blocks |
| `int4` | 4 bits, a scale and a minimum for every 32 | 8 bits, one scale a row |
| `int4-head4` | as `int4` | as the blocks |

Weights that already lie on a 4-bit grid, such as those of a GGUF file in Q4_0 or Q4_1, keep their values in `int4`. Rows
are float32 before and after a product, in every format. Compiled code multiplies them (`native`).

Shapes: N rows of a weight (outputs), K its columns (inputs).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from offramp.model.store import Tensors

GROUP = 32
PANEL = 16  # rows of an int4 weight that are kept together


class Weight:
    """Weights as they are, float32 or bfloat16."""

    scale: Tensor | None = None

    def __init__(self, tensors: Tensors, bias: Tensor | None = None) -> None:
        self.w = tensors["w"].contiguous()
        self.rows, self.columns = self.w.shape
        self.bias = None if bias is None else bias.float()

    @classmethod
    def tensors(cls, weight: Tensor) -> Tensors:
        """The weight (N, K) in this format, in parts whose rows are the weight's."""
        return {"w": weight}

    @classmethod
    def packed(cls, tensors: Tensors) -> Tensors:
        """`tensors` in the order in which they are kept."""
        return tensors

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None = None) -> Self:
        """A weight (N, K) in this format."""
        return cls(cls.packed(cls.tensors(weight)), bias)

    @classmethod
    def bytes_of(cls, rows: int, columns: int, itemsize: int) -> int:
        """`nbytes` of a weight (N, K), without making it. An entry of a plain format takes `itemsize` bytes."""
        return rows * columns * itemsize

    @property
    def name(self) -> str:
        """What the weights are kept in: float32, bfloat16, int8 or int4."""
        return str(self.w.dtype).removeprefix("torch.") if type(self) is Weight else type(self).__name__.lower()

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
    def tensors(cls, weight: Tensor) -> Tensors:
        scale = (weight.abs().amax(1) / 127).clamp(min=1e-12)
        return {"w": (weight / scale[:, None]).round().to(torch.int8), "scale": scale}

    def dense(self) -> Tensor:
        return self.w.float().mul_(self.scale[:, None])


class Int4(Weight):
    """4-bit integers with a scale and a minimum for every 32 weights of a row: weight = q · scale + low.

    Scales and minima are float16. `w` (panels, groups, 320) keeps 16 rows together: products.h says how.
    """

    def __init__(self, tensors: Tensors, bias: Tensor | None = None) -> None:
        super().__init__(tensors | {"w": tensors["w"].flatten(1)}, bias)
        self.w = tensors["w"]
        self.rows, self.columns = int(tensors["rows"]), GROUP * self.w.shape[1]

    @classmethod
    def bytes_of(cls, rows: int, columns: int, itemsize: int) -> int:
        return -(-rows // PANEL) * PANEL * columns // GROUP * (GROUP // 2 + 4)

    @classmethod
    def packed(cls, tensors: Tensors) -> Tensors:
        w, scale, low = tensors["w"], tensors["scale"], tensors["low"]
        spare = -len(w) % PANEL
        nibbles = F.pad(w, (0, 0, 0, spare)).view(-1, PANEL, scale.shape[1], 4, 4)
        ends = torch.stack([F.pad(part, (0, 0, 0, spare)).view(-1, PANEL, scale.shape[1]) for part in (scale, low)], dim=1)
        ends = ends.permute(0, 3, 1, 2).contiguous().view(torch.uint8)  # (panels, groups, 2, 32)
        panels = torch.cat([nibbles.permute(0, 2, 3, 1, 4).flatten(2), ends.flatten(2)], dim=2)
        return {"w": panels, "rows": torch.tensor([len(w)])}

    def _rows(self, rows: slice | Tensor) -> Tensors:
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(self.rows)
            first, lanes = start // PANEL, slice(start % PANEL, stop - start // PANEL * PANEL)
            panels = self.w[first : -(-stop // PANEL)]
            nibbles, ends = self._views(panels)
            w = nibbles.permute(0, 3, 1, 2, 4).reshape(-1, self.columns // 2)[lanes]
            scale, low = ends.permute(2, 0, 3, 1).reshape(2, -1, self.columns // GROUP)[:, lanes]
        else:
            panel, lane = rows // PANEL, rows % PANEL
            nibbles, ends = self._views(self.w)
            w, (scale, low) = nibbles[panel, :, :, lane].flatten(1), ends[panel, :, :, lane].permute(2, 0, 1)
        return {"w": w, "scale": scale, "low": low}

    def _views(self, panels: Tensor) -> tuple[Tensor, Tensor]:
        """Nibbles (panels, groups, 4, 16, 4), and scales and minima (panels, groups, 2, 16)."""
        nibbles, ends = panels.split([GROUP // 2 * PANEL, 4 * PANEL], dim=2)
        return nibbles.unflatten(2, (4, PANEL, 4)), ends.view(torch.float16).unflatten(2, (2, PANEL))

    @classmethod
    def tensors(cls, weight: Tensor) -> Tensors:
        """A group that lies on a grid of at most 16 values keeps it; any other gets 16 values over its range."""
        if weight.shape[1] % GROUP:
            raise ValueError(f"rows of {weight.shape[1]} weights cannot be cut into groups of {GROUP}")
        groups = weight.unflatten(1, (-1, GROUP))
        scale, low = _grids(groups)
        q = ((groups - low.float()) / scale.float()).nan_to_num(0, 0, 0).round().clamp(0, 15).to(torch.uint8)
        return {"w": (q[..., :16] | (q[..., 16:] << 4)).flatten(1), "scale": scale.squeeze(-1), "low": low.squeeze(-1)}

    def dense(self) -> Tensor:
        parts = self._rows(slice(None))
        halves = parts["w"].unflatten(1, (-1, GROUP // 2))
        q = torch.cat([halves & 15, halves >> 4], dim=-1)  # (N, groups, 32)
        # Step by step in place, since torch is slow at products of different dtypes.
        return q.float().mul_(parts["scale"].float()[:, :, None]).add_(parts["low"].float()[:, :, None]).flatten(1)


def multiplies_bfloat16(device: torch.device | None = None) -> bool:
    """Whether the device (the CPU by default) has instructions for bfloat16: torch multiplies faster in it."""
    if device is not None and device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _grids(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Of groups (N, G, 32): scales and minima (N, G, 1), in float16, of a grid of at most 16 points for each.

    A group whose values lie on such a grid gets that grid, if its scale and its first point are float16 numbers, as those
    of a GGUF file are. The first point may be beyond the values, and a scale may be negative, as in Q4_0. Any other group
    gets 16 points over its range.
    """
    least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    span = most - least
    scale, low = (span / 15).half(), least.half()
    # A group of one value: its q is 1, and its scale is what float16 loses of it.
    scale = torch.where(span == 0, (least - low.float()).half(), scale)
    missing = span.new_full(span.shape, float("inf")).masked_fill_(span == 0, 0)  # how far a group is from its grid
    for steps in range(15, 0, -1):
        inexact = missing > 1e-3 * span / 15
        if not inexact.any():
            break
        # Most groups of most models lie on no grid, which a few of their weights show.
        chosen = (inexact & _on_grid(groups[..., :4], least, span / steps))[..., 0]
        chosen[chosen.clone()] = _on_grid(groups[chosen], least[chosen], span[chosen] / steps)[:, 0]
        own = (span[chosen] / steps).half()
        beyond = torch.arange(16 - steps, device=groups.device) * own.float()  # from the last value to the first point
        exact = torch.cat([least[chosen] - beyond, most[chosen] + beyond], dim=-1)  # first points of a grid up, or down
        firsts = exact.half()
        errors = (firsts.float() - exact).abs() + (own.float() * steps - span[chosen]).abs()
        error, best = errors.min(-1, keepdim=True)
        better = error < missing[chosen]
        scale[chosen] = torch.where(better, torch.where(best < beyond.shape[-1], own, -own), scale[chosen])
        low[chosen] = torch.where(better, firsts.gather(-1, best), low[chosen])
        missing[chosen] = error.minimum(missing[chosen])
    return scale, low


def _on_grid(groups: Tensor, least: Tensor, scale: Tensor) -> Tensor:
    """Whether all weights of a group are the least one + a whole number of scales, up to float32's rounding: (…, 1)."""
    steps = (groups - least) / scale
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
