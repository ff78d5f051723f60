"""Mamba-2 mixers: norm, one product in, convolution and scan in place, one product out.

The convolution's window and the scan's state are written in place. A token costs the same, however long the text before it
is. The torch engine uses `scan`.

Shapes: B batch, T tokens, R = B · T rows, D hidden size, E inner width (H heads of P dims), G groups, N state size, W the
convolution's width, C = E + 2 G N its channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from offramp.model.lean.base import LeanStep, Maker, pieces_of
from offramp.model.lean.structures import CMambaBlock, CWeight, address
from offramp.model.lean.weights import Weight
from offramp.model.runtime import joined
from offramp.model.scan import causal_conv, scan
from offramp.model.state import SSM

Memories = Sequence[tuple[SSM, LeanStep]]


class LeanMixer:
    """A Mamba-2 mixer (arXiv 2405.21060, section 7), with the norm before it."""

    def __init__(self, mixer: Any, norm: Any, make: Maker) -> None:
        self.heads, self.dim = mixer.num_heads, mixer.head_dim
        self.groups, self.states = mixer.n_groups, mixer.ssm_state_size
        self.inner, self.channels = mixer.intermediate_size, mixer.conv_dim
        self.limits: tuple[float, float] = mixer.time_step_limit
        self.project_in = make.matrix("in", [mixer.in_proj])
        self.project_out = make.matrix("out", [mixer.out_proj])
        self.norm = make.norm("norm", norm)
        self.gated_norm = make.vector("gated_norm", mixer.norm.weight)
        self.gated_eps = float(mixer.norm.variance_epsilon)
        conv = mixer.conv1d
        self.conv = make.vector("conv", conv.weight, lambda x: x.squeeze(1).T)  # (W, C)
        self.conv_bias = None if conv.bias is None else make.vector("conv_bias", conv.bias)
        self.dt_bias, self.skip = make.vector("dt_bias", mixer.dt_bias), make.vector("skip", mixer.D)
        self.decay = make.vector("decay", mixer.A_log, lambda x: -x.exp())

    @property
    def weights(self) -> tuple[Weight, ...]:
        """The matrices that a token is multiplied with."""
        return self.project_in, self.project_out

    @property
    def sizes(self) -> tuple[int, ...]:
        """Heads, their dim, groups, state size and the convolution's width, as `LeanAttention.sizes`."""
        return self.heads, self.dim, self.groups, self.states, len(self.conv)

    def fits(self, width: int) -> bool:
        """As `LeanAttention.fits`."""
        inner, rest = self.heads * self.dim, 2 * self.groups * self.states
        vectors = [(self.norm.weight, width), (self.gated_norm, inner), (self.conv_bias, inner + rest)]
        vectors += [(vector, self.heads) for vector in (self.dt_bias, self.skip, self.decay)]
        return (
            min(self.sizes) > 0
            and self.heads % self.groups == 0
            and self.states % 8 == 0
            and len(self.conv) > 1
            and (self.inner, self.channels) == (inner, inner + rest)
            and self.project_in.shape == (2 * inner + rest + self.heads, width)
            and self.project_out.shape == (width, inner)
            and self.conv.shape == (len(self.conv), inner + rest)
            and all(vector is None or vector.shape == (size,) for vector, size in vectors)
        )

    @cached_property
    def advance_in(self) -> Weight:
        """The rows of `project_in` that the memory depends on."""
        return self.project_in.pick(slice(self.inner, None))

    def shapes(self, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of a memory: window (B, W - 1, C) and state (B, H, P, N)."""
        return (batch, self.conv.shape[0] - 1, self.channels), (batch, self.heads, self.dim, self.states)

    def __call__(self, h: Tensor, memories: Memories) -> None:
        """Add the mixer's output to h (R, D) in place, and update the memories.

        Each of them is for as many rows as its step has, in order. Only convolution and scan treat them one by one.
        """
        z, xBC, dt = self.project_in(self.norm(h)).split([self.inner, self.channels, self.heads], dim=-1)
        y = self._advance_each(xBC, dt, memories) * F.silu(z)
        groups = y.unflatten(1, (self.groups, -1))
        y = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.gated_eps)
        h += self.project_out(y.flatten(1) * self.gated_norm)

    def remember(self, h: Tensor, memories: Memories) -> None:
        """Only update the memories, as if h (R, D) were its input."""
        xBC, dt = self.advance_in(self.norm(h)).split([self.channels, self.heads], dim=-1)
        self._advance_each(xBC, dt, memories)

    def _advance_each(self, xBC: Tensor, dt: Tensor, memories: Memories) -> Tensor:
        """`_advance` for the rows of each memory: (R, E)."""
        sizes = [step.batch * step.tokens for _, step in memories]
        pieces = zip(pieces_of(xBC, sizes), pieces_of(dt, sizes), memories, strict=True)
        return joined([self._advance(x, steps, ssm, step).reshape(len(x), -1) for x, steps, (ssm, step) in pieces])

    def _advance(self, xBC: Tensor, dt: Tensor, ssm: SSM, step: LeanStep) -> Tensor:
        """Convolution and scan: xBC (R, C) and dt (R, H) → (B, T, H, P)."""
        window, state = ssm.room(xBC, *self.shapes(step.batch))
        rows = (step.batch, step.tokens, -1)
        inputs = xBC.reshape(rows)
        xBC, new = causal_conv(inputs, self.conv.T, self.conv_bias, window, step.real)
        size = self.groups * self.states
        x, B, C = xBC.split([self.inner, size, size], dim=-1)
        dt = F.softplus(dt.reshape(rows) + self.dt_bias).clamp(*self.limits)
        x, B, C = x.unflatten(2, (self.heads, -1)), B.unflatten(2, (self.groups, -1)), C.unflatten(2, (self.groups, -1))
        y, h = scan(x, dt, self.decay, B, C, self.skip, state, step.real)
        window.copy_(new)
        state.copy_(h)

        def replay(h: Tensor, n: int) -> Tensor:
            return scan(x[:, :n], dt[:, :n], self.decay, B[:, :n], C[:, :n], self.skip, h)[1]

        ssm.record(step.tokens, inputs, replay)
        return y

    def native(self) -> CMambaBlock:
        """The mixer as the C code takes it. The C code holds addresses only, so this one must stay alive."""
        parts = (self.norm.weight, self.gated_norm, self.conv, self.conv_bias, self.dt_bias, self.decay, self.skip)
        weights = (CWeight.of(weight, fine=True) for weight in self.weights)
        return CMambaBlock(*weights, *map(address, parts), self.norm.eps, self.gated_eps, *self.limits)
