"""The lean path for blocks of the Mamba-2 kind: norm, one product in, convolution and scan in place, one product out.

The convolution's window and the scan's state are written in place, so a token costs the same whatever came before it. As in
`lean`, two engines do the work: `native.c`, and torch's operators with `scan`, which `native.c` is tested against.

Shapes: B batch, T tokens, R = B · T rows, D hidden size, E inner width (H heads of P dims), G groups, N state size, W the
convolution's width, C = E + 2 G N its channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.model.lean.base import Lean, LeanStep, Make, Part, RMSNorm, numbered
from offramp.model.lean.native import CMambaBlock, CMambaShape, CWeight, NativeMamba, address, rows_of
from offramp.model.lean.weights import Format, Store, Weight
from offramp.model.scan import causal_conv, scan
from offramp.model.state import SSM, State


@dataclass
class MambaStep(LeanStep):
    """`mask` (B, T): which tokens are there; None where all are."""

    mask: Tensor | None = None


class LeanMambaBlock:
    """One block of the Mamba-2 kind (arXiv 2405.21060, section 7)."""

    def __init__(self, block: Any, make: Make) -> None:
        mixer = block.mixer
        self.heads, self.dim = mixer.num_heads, mixer.head_dim
        self.groups, self.states = mixer.n_groups, mixer.ssm_state_size
        self.inner, self.channels = mixer.intermediate_size, mixer.conv_dim
        self.limits: tuple[float, float] = mixer.time_step_limit
        self.project_in = make("in", [mixer.in_proj], None)
        self.advance_in = self.project_in.pick(slice(self.inner, None))
        self.project_out = make("out", [mixer.out_proj], None)
        self.norm = RMSNorm(block.norm)
        self.gated_norm, self.gated_eps = _own(mixer.norm.weight), float(mixer.norm.variance_epsilon)
        self.conv = _own(mixer.conv1d.weight.squeeze(1).T)  # (W, C)
        self.conv_bias = None if mixer.conv1d.bias is None else _own(mixer.conv1d.bias)
        self.dt_bias, self.decay, self.skip = _own(mixer.dt_bias), _own(-mixer.A_log.float().exp()), _own(mixer.D)

    @property
    def weights(self) -> tuple[Weight, ...]:
        return self.project_in, self.project_out

    def memory(self, ssm: SSM, like: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Window (B, W - 1, C) and state (B, H, P, N), to be written in place."""
        return ssm.room(like, (batch, len(self.conv) - 1, self.channels), (batch, self.heads, self.dim, self.states))

    def __call__(self, h: Tensor, ssm: SSM, step: MambaStep) -> None:
        """Add what the block says to h (R, D) in place, and move the memory on."""
        z, xBC, dt = self.project_in(self.norm(h)).split([self.inner, self.channels, self.heads], dim=-1)
        y = self._advance(xBC, dt, ssm, step).reshape(len(h), -1) * F.silu(z)
        groups = y.unflatten(1, (self.groups, -1))
        y = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.gated_eps)
        h += self.project_out(y.flatten(1) * self.gated_norm)

    def remember(self, h: Tensor, ssm: SSM, step: MambaStep) -> None:
        """Only move the memory on as if h (R, D) were the block's input."""
        xBC, dt = self.advance_in(self.norm(h)).split([self.channels, self.heads], dim=-1)
        self._advance(xBC, dt, ssm, step)

    def _advance(self, xBC: Tensor, dt: Tensor, ssm: SSM, step: MambaStep) -> Tensor:
        """Convolution and scan: (R, C) and (R, H) → (B, T, H, P)."""
        window, state = self.memory(ssm, xBC, step.batch)
        rows = (step.batch, step.tokens, -1)
        inputs = xBC.reshape(rows)
        xBC, new = causal_conv(inputs, self.conv.T, self.conv_bias, window, step.mask)
        size = self.groups * self.states
        x, B, C = xBC.split([self.inner, size, size], dim=-1)
        dt = F.softplus(dt.reshape(rows) + self.dt_bias).clamp(*self.limits)
        x, B, C = x.unflatten(2, (self.heads, -1)), B.unflatten(2, (self.groups, -1)), C.unflatten(2, (self.groups, -1))
        y, h = scan(x, dt, self.decay, B, C, self.skip, state, step.mask)
        window.copy_(new)
        state.copy_(h)

        def replay(h: Tensor, n: int) -> Tensor:
            return scan(x[:, :n], dt[:, :n], self.decay, B[:, :n], C[:, :n], self.skip, h)[1]

        ssm.record(step.tokens, inputs, replay)
        return y

    def native(self) -> CMambaBlock:
        parts = (self.norm.weight, self.gated_norm, self.conv, self.conv_bias, self.dt_bias, self.decay, self.skip)
        weights = map(CWeight.of, self.weights)
        return CMambaBlock(*weights, *map(address, parts), self.norm.eps, self.gated_eps, *self.limits)


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().float().clone(memory_format=torch.contiguous_format)


class LeanMamba(Lean):
    """Blocks of the Mamba-2 kind. Raises `ValueError` for a model whose shapes a format does not fit."""

    _native: NativeMamba | None

    def __init__(
        self, blocks: list[nn.Module], norm: nn.Module, head: nn.Linear, format: Format, store: Store, native: bool = True
    ) -> None:
        super().__init__(norm, head, format, store)
        self.blocks = [LeanMambaBlock(block, self._maker(index, format.blocks)) for index, block in enumerate(blocks)]
        store.save()
        self._native = None
        first = self.blocks[0]
        if native and self._compiles(first.states):
            width = first.project_out.rows
            shape = CMambaShape(width, first.heads, first.dim, first.groups, first.states, len(first.conv))
            self._native = NativeMamba([block.native() for block in self.blocks], shape, self._columns)

    def step(self, first: int | Tensor, batch: int, tokens: int, mask: Tensor | None = None) -> MambaStep:
        sequences = torch.zeros(tokens, dtype=torch.int64, device=self._device)
        if batch > 1:
            sequences = torch.arange(batch, device=self._device).repeat_interleave(tokens)
        if mask is not None:
            sequences = sequences.masked_fill(~mask.flatten(), -1)
        return MambaStep(batch, tokens, sequences, mask)

    def _run_torch(self, rows: Tensor, start: int, stop: int, state: State, step: LeanStep, fill: bool) -> None:
        assert isinstance(step, MambaStep)
        for block, ssm in zip(self.blocks[start:stop], state.ssm[start:stop], strict=True):
            assert ssm is not None
            (block.remember if fill else block)(rows, ssm, step)

    def _run_native(self, rows: Tensor, start: int, stop: int, parts: Sequence[Part], fill: bool) -> None:
        memories: list[list[tuple[int, int]]] = [[] for _ in range(start, stop)]
        ssms = [[ssm for ssm in state.ssm[start:stop] if ssm] for _, state, _ in parts]
        for (_, _, step), blocks in zip(parts, ssms, strict=True):
            for block, ssm, addresses in zip(self.blocks[start:stop], blocks, memories, strict=True):
                window, h = block.memory(ssm, rows, step.batch)
                addresses += zip(rows_of(window), rows_of(h), strict=True)
        assert isinstance(self._native, NativeMamba)
        watched = any(ssm.watched for blocks in ssms for ssm in blocks)
        journal = self._native.run(rows, start, memories, numbered([step for _, _, step in parts]), fill, watched)
        first = 0
        for (_, _, step), blocks in zip(parts, ssms, strict=True):
            after = first + step.batch * step.tokens
            for index, (block, ssm) in enumerate(zip(self.blocks[start:stop], blocks, strict=True)):
                if journal is None:
                    ssm.record(step.tokens)
                else:
                    notes = journal[index, first:after].view(step.batch, step.tokens, -1)
                    replay = partial(self._native.replay, start + index, notes)
                    ssm.record(step.tokens, notes[..., : block.channels], replay)
            first = after
