"""A Mamba-2 mixer that begins from an attention's weights, and becomes the mixer of the library's Bamba.

"The Mamba in the Llama" (arXiv 2408.15237) puts queries in the place of C, keys of B, values of x, and keeps the output
projection. Linear attention is then the mixer with a decay of 1: y_t = C_t Σ_s B_s x_s.

| attention | mixer | shape |
|---|---|---|
| queries | C | Q heads of N dims |
| keys | B | G heads, each for Q / G heads of C |
| values | x | G heads of P dims, each for Q / G heads of C |
| output projection | output projection | D × Q P |

Bamba has no heads that share x, so `as_bamba` repeats what is shared here. Its norm after the scan is over each head, which
would take away how large a head's output is. But the norm's ε is 1e-5, and values as small as √ε pass through it almost
unchanged: that is what `SMALL` is for. Large outputs are held back, as a softmax holds them back.

Shapes: B batch, T tokens, D hidden size, Q query heads, G key/value heads, P = N dims of a head, W the convolution's width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm.forward import CHUNK, Convolution, Kernels, chunked_scan, rms_norm

WIDTH = 4  # of the convolution
SMALL = 3e-3  # the size of the mixer's x, beside the attention's values: about √ε of the norm after the scan
STEPS = (0.03, 0.5)  # the smallest and the largest step size that a head begins with
RATE = 0.5  # the decay rate that all heads begin with
OPEN = 1.2785  # silu(OPEN) = 1: the gate begins open


class Mixer(nn.Module):
    """The mixer's parameters, in float32. `attention` is a `LlamaAttention`."""

    def __init__(self, attention: Any, epsilon: float) -> None:
        super().__init__()
        queries, keys, values, out = (
            getattr(attention, f"{name}_proj").weight.detach().float().clone() for name in ("q", "k", "v", "o")
        )
        self.dim, self.epsilon = attention.head_dim, epsilon
        self.heads, self.shared = len(queries) // self.dim, attention.num_key_value_groups
        scale = self.dim**-0.25  # attention divides queries · keys by √P
        self.x, self.B, self.C = (nn.Parameter(part) for part in (values, keys * scale, queries * scale))
        self.z, self.z_bias = nn.Parameter(torch.zeros_like(queries)), nn.Parameter(torch.full((len(queries),), OPEN))
        channels = len(values) + len(keys) + len(queries)
        taps = torch.zeros(channels, WIDTH)
        taps[:, -1] = 1.0
        self.taps, self.conv_bias = nn.Parameter(taps), nn.Parameter(torch.zeros(channels))
        self.dt = nn.Parameter(torch.zeros(self.heads, queries.shape[1]))
        # Heads that share keys and values begin with different step sizes, so with different memories.
        first, last = map(math.log, STEPS)
        steps = torch.exp(torch.linspace(first, last, self.heads)).view(self.shared, -1).T.flatten()
        self.dt_bias = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))
        self.A_log = nn.Parameter(torch.full((self.heads,), math.log(RATE)))
        self.D, self.norm = nn.Parameter(torch.zeros(self.heads)), nn.Parameter(torch.ones(len(queries)))
        self.out = nn.Parameter(out)

    def forward(self, u: Tensor, kernels: Kernels, dtype: torch.dtype) -> Tensor:
        """What the block adds to its hidden state: u (B, T, D), normed and in `dtype` → (B, T, D), from an empty state."""
        return F.linear(self.scanned(u, kernels, dtype), (self.out * self.norm).to(dtype))

    def scanned(self, u: Tensor, kernels: Kernels, dtype: torch.dtype) -> Tensor:
        """What goes into the output projection, without the norm's scale: u (B, T, D) → (B, T, Q · P)."""
        tokens = u.shape[1]
        u = F.pad(u, (0, 0, WIDTH - 1, -tokens % CHUNK))  # without biases, the projection of zeros is zeros
        projected = F.linear(u, torch.cat([self.x * SMALL, self.B, self.C, self.z, self.dt]).to(dtype))
        width, inner = len(self.taps), self.heads * self.dim
        xBC, z, dt = projected.split([width, inner, self.heads], dim=-1)
        xBC = Convolution.apply(xBC, self.taps.T.contiguous(), self.conv_bias * self._sizes, kernels)  # type: ignore[no-untyped-call]
        x, B, C = xBC.split([len(self.x), len(self.B), len(self.C)], dim=-1)
        xBC = torch.cat([self._repeated(x, 2), self._repeated(B, 2), C], dim=-1)
        z, dt = z[:, WIDTH - 1 :] + self.z_bias.to(dtype), dt[:, WIDTH - 1 :]
        y: Tensor = kernels.scan(xBC, dt, z, self.dt_bias, self.A_log, self.D, self.epsilon)
        return y[:, :tokens]

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """The mixer as `offramp.model.hybrid` keeps it."""
        kept = {name: parameter.detach().clone() for name, parameter in self.named_parameters()}
        kept["x"], kept["conv_bias"] = self.x * SMALL, self.conv_bias * self._sizes
        return kept

    @torch.no_grad()
    def take(self, tensors: dict[str, Tensor]) -> None:
        """Become a mixer that `tensors` gave."""
        for name, parameter in self.named_parameters():
            parameter.copy_(tensors[name])
        self.x.div_(SMALL)
        self.conv_bias.div_(self._sizes)

    @property
    def _sizes(self) -> Tensor:
        """What a parameter of 1 stands for in each of the convolution's channels."""
        sizes = self.taps.new_ones(len(self.taps))
        sizes[: len(self.x)] = SMALL
        return sizes

    def _repeated(self, part: Tensor, dim: int) -> Tensor:
        """Each shared head of a dim, once for each of the heads that share it."""
        repeated: Tensor = part.unflatten(dim, (-1, self.dim)).repeat_interleave(self.shared, dim).flatten(dim, dim + 1)
        return repeated


def scan_by_head(xBC: Tensor, dt: Tensor, z: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, epsilon: float) -> Tensor:
    """The scan, the gate z (B, T, E), and the norm over each head after it, without its scale."""
    heads, inner = len(A_log), z.shape[-1]
    y = chunked_scan(xBC, F.softplus(dt + dt_bias), -torch.exp(A_log), D, inner // heads, inner // heads)
    y = (y * F.silu(z)).float().unflatten(-1, (heads, -1))
    return rms_norm(y, epsilon, z.dtype).flatten(-2)
