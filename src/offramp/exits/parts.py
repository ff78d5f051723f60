"""The building blocks of gates and read-outs: a common base, the scale of their inputs, and a small Mamba-2 block.

Shapes: B batch, T tokens, D the backbone's hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.model.costs import matrix_flops
from offramp.model.scan import causal_conv, scan

# The memory of a recurrent part: the convolution's window (B, W - 1, E + 2N) and the scan's state (B, H, P, N). None before
# the first token, and for parts without a memory.
Memory = tuple[Tensor, Tensor] | None


class ExitPart(nn.Module):
    """Base of gates and read-outs: hidden states (B, T, …) and a memory → the output and the new memory.

    `recurrent`: the part carries a memory from token to token, so it must see every token, in order.
    """

    recurrent: ClassVar[bool] = False

    def flops(self) -> int:
        """FLOPs of one token: 2 for each entry of a weight matrix, and those of Mamba scans (`MambaBlock.scan_flops`)."""
        blocks = [part for part in self.modules() if isinstance(part, MambaBlock)]
        convolutions = sum(2 * block.conv_weight.numel() for block in blocks)  # `scan_flops` counts them already
        return matrix_flops(self) - convolutions + sum(block.scan_flops() for block in blocks)


class Product(nn.Module):
    """A linear layer that decoding multiplies by `times`, (n, inputs) → (n, outputs), in place of its own weight."""

    def __init__(self, times: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._times = times

    def forward(self, x: Tensor) -> Tensor:
        return self._times(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


def with_products(part: ExitPart, product_of: Callable[[nn.Linear], Callable[[Tensor], Tensor]]) -> ExitPart:
    """A copy of a gate or a read-out for decoding, in which `product_of` says how each linear layer is multiplied."""
    layers = [layer for layer in part.modules() if isinstance(layer, nn.Linear)]
    # `deepcopy` takes these layers from its memo, so it does not copy their weights.
    return copy.deepcopy(part, {id(layer): Product(product_of(layer)) for layer in layers})


class MambaBlock(nn.Module):
    """A Mamba-2 block (arXiv 2405.21060, figure 6) with its input and output widths free: (B, T, width) → (B, T, out)."""

    CONV = 4

    def __init__(self, width: int, inner: int, out: int, states: int = 16, head: int = 32) -> None:
        super().__init__()
        self.inner, self.states, self.head, self.heads = inner, states, head, inner // head
        self.project_in = nn.Linear(width, 2 * inner + 2 * states + self.heads, bias=False)
        self.conv_weight = nn.Parameter(torch.randn(inner + 2 * states, self.CONV) / self.CONV)
        self.conv_bias = nn.Parameter(torch.zeros(inner + 2 * states))
        self.A_log = nn.Parameter(torch.log(torch.linspace(1, 8, self.heads)))
        self.D = nn.Parameter(torch.ones(self.heads))
        # Step sizes from 0.01 to 0.3 through softplus: memories of about three to a hundred tokens.
        self.dt_bias = nn.Parameter(torch.log(torch.expm1(torch.logspace(-2, -0.5, self.heads))))
        self.norm = nn.RMSNorm(inner, eps=1e-5)
        self.project_out = nn.Linear(inner, out, bias=out == 1)

    def forward(self, u: Tensor, memory: Memory = None) -> tuple[Tensor, Memory]:
        batch, tokens, _ = u.shape
        widths = [self.inner, self.inner + 2 * self.states, self.heads]
        z, xBC, dt = self.project_in(u).split(widths, dim=-1)
        if memory is None:
            window, h = xBC.new_zeros(batch, self.CONV - 1, xBC.shape[-1]), None
        else:
            window, h = memory
        xBC, window = causal_conv(xBC, self.conv_weight, self.conv_bias, window)
        x, B, C = xBC.split([self.inner, self.states, self.states], dim=-1)
        heads = x.reshape(batch, tokens, self.heads, self.head)
        y, h = scan(heads, F.softplus(dt + self.dt_bias), -torch.exp(self.A_log), B[:, :, None], C[:, :, None], self.D, h)
        out = self.project_out(self.norm(y.reshape(batch, tokens, self.inner) * F.silu(z)))
        return out, (window, h)

    def scan_flops(self) -> int:
        """FLOPs per token: convolution, then decay, outer product and read-out of every state entry (2 FLOPs each)."""
        return 2 * self.CONV * (self.inner + 2 * self.states) + 6 * self.inner * self.states


class Standardise(nn.Module):
    """Standardises each dim of hidden states (…, D) by its mean and spread over the training text, and clamps to ±8.

    Hidden states have dims a hundred times larger than others, and tokens (often the first) a thousand times larger
    ("massive activations", arXiv 2402.17762). A part that learns for minutes cannot also learn to undo that.
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(hidden))
        self.register_buffer("spread", torch.ones(hidden))

    def fit(self, h: Tensor) -> None:
        """Take mean and spread from hidden states (n, D)."""
        self.mean.copy_(h.mean(0))
        self.spread.copy_(h.std(0).clamp(min=1e-6))

    def forward(self, h: Tensor) -> Tensor:
        return ((h - self.mean) / self.spread).clamp(-8, 8)


def unit(h: Tensor) -> Tensor:
    """Hidden states (…, D) scaled to a root mean square of 1.

    The final norm does the same later. At this scale, a correction of ordinary size can change the direction of a state.
    """
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)
