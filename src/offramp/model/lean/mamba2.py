"""The lean path for blocks of the Mamba-2 kind: norm, one product in, convolution and scan in place, one product out.

The convolution's window and the scan's state are written in place. A token costs the same, however long the text before it
is. The torch engine uses `scan`.

Shapes: B batch, T tokens, R = B · T rows, D hidden size, E inner width (H heads of P dims), G groups, N state size, W the
convolution's width, C = E + 2 G N its channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from offramp.model.checkpoint import Values
from offramp.model.lean.base import Lean, LeanStep, Maker, numbered, pieces_of
from offramp.model.lean.native import NativeMamba
from offramp.model.lean.steps import Ask, Steps
from offramp.model.lean.structures import CMambaBlock, CMambaShape, CWeight, address
from offramp.model.lean.weights import Weight
from offramp.model.modules import Modules
from offramp.model.runtime import Part, Step, joined
from offramp.model.scan import causal_conv, scan
from offramp.model.state import SSM, State
from offramp.model.store import Store


@dataclass
class MambaStep(LeanStep):
    """`mask` (B, T) is False for padding; None where there is none."""

    mask: Tensor | None = None


Memories = Sequence[tuple[SSM, MambaStep]]


class LeanMambaBlock:
    """One block of the Mamba-2 kind (arXiv 2405.21060, section 7)."""

    def __init__(self, block: Any, make: Maker) -> None:
        mixer = block.mixer
        self.heads, self.dim = mixer.num_heads, mixer.head_dim
        self.groups, self.states = mixer.n_groups, mixer.ssm_state_size
        self.inner, self.channels = mixer.intermediate_size, mixer.conv_dim
        self.limits: tuple[float, float] = mixer.time_step_limit
        self.project_in = make.matrix("in", [mixer.in_proj])
        self.project_out = make.matrix("out", [mixer.out_proj])
        self.norm = make.norm("norm", block.norm)
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

    @cached_property
    def advance_in(self) -> Weight:
        """The rows of `project_in` that the memory depends on."""
        return self.project_in.pick(slice(self.inner, None))

    def shapes(self, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of a memory: window (B, W - 1, C) and state (B, H, P, N)."""
        return (batch, self.conv.shape[0] - 1, self.channels), (batch, self.heads, self.dim, self.states)

    def __call__(self, h: Tensor, memories: Memories) -> None:
        """Add the block's output to h (R, D) in place, and update the memories.

        Each of them is for as many rows as its step has, in order. Only convolution and scan treat them one by one.
        """
        z, xBC, dt = self.project_in(self.norm(h)).split([self.inner, self.channels, self.heads], dim=-1)
        y = self._advance_each(xBC, dt, memories) * F.silu(z)
        groups = y.unflatten(1, (self.groups, -1))
        y = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.gated_eps)
        h += self.project_out(y.flatten(1) * self.gated_norm)

    def remember(self, h: Tensor, memories: Memories) -> None:
        """Only update the memories, as if h (R, D) were the block's input."""
        xBC, dt = self.advance_in(self.norm(h)).split([self.channels, self.heads], dim=-1)
        self._advance_each(xBC, dt, memories)

    def _advance_each(self, xBC: Tensor, dt: Tensor, memories: Memories) -> Tensor:
        """`_advance` for the rows of each memory: (R, E)."""
        sizes = [step.batch * step.tokens for _, step in memories]
        pieces = zip(pieces_of(xBC, sizes), pieces_of(dt, sizes), memories, strict=True)
        return joined([self._advance(x, steps, ssm, step).reshape(len(x), -1) for x, steps, (ssm, step) in pieces])

    def _advance(self, xBC: Tensor, dt: Tensor, ssm: SSM, step: MambaStep) -> Tensor:
        """Convolution and scan: xBC (R, C) and dt (R, H) → (B, T, H, P)."""
        window, state = ssm.room(xBC, *self.shapes(step.batch))
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
        """The block as the C code takes it. The C code holds addresses only, so this block must stay alive."""
        parts = (self.norm.weight, self.gated_norm, self.conv, self.conv_bias, self.dt_bias, self.decay, self.skip)
        weights = (CWeight.of(weight, fine=True) for weight in self.weights)
        return CMambaBlock(*weights, *map(address, parts), self.norm.eps, self.gated_eps, *self.limits)


class LeanMamba(Lean):
    """Blocks of the Mamba-2 kind. Raises `ValueError` for a model whose shapes a format does not fit."""

    _native: NativeMamba | None

    def __init__(self, modules: Modules, weight_format: str, store: Store, values: Values, native: bool = True) -> None:
        super().__init__(modules, weight_format, store, values)
        self.blocks = [self._part(str(index), partial(LeanMambaBlock, block)) for index, block in enumerate(modules.blocks)]
        store.finish()
        self._native = None
        first = self.blocks[0]
        if native and self._compiles(first.states):
            width = first.project_out.rows
            shape = CMambaShape(width, first.heads, first.dim, first.groups, first.states, len(first.conv))
            self._native = NativeMamba([block.native() for block in self.blocks], shape, self._columns)

    def _step(self, first: int | Tensor, batch: int, tokens: int, mask: Tensor | None = None) -> MambaStep:
        sequences = torch.zeros(tokens, dtype=torch.int64, device=self._device)
        if batch > 1:
            sequences = torch.arange(batch, device=self._device).repeat_interleave(tokens)
        if mask is not None:
            sequences = sequences.masked_fill(~mask.flatten(), -1)
        return MambaStep(batch, tokens, sequences, mask)

    def remember_keys(self, h: Tensor, index: int, state: State, step: Step) -> None:
        pass  # no block has attention

    def remember_state(self, h: Tensor, index: int, state: State) -> None:
        self.remember_all([(h, state, self.step(h, 0))], index, index + 1)

    def _memories(self, start: int, stop: int, state: State) -> list[SSM]:
        return [ssm for ssm in state.ssm[start:stop] if ssm is not None]

    def take_steps(self, ask: Ask, state: State, position: int) -> Steps:
        assert self._native
        memories, shapes = self._memories(0, len(self.blocks), state), self.blocks[0].shapes(1)
        steps = self._native.step(ask, [ssm.addresses(self.norm.weight, *shapes) for ssm in memories])
        for index, ssm in enumerate(memories):
            ssm.record(len(steps.ids) + (index < steps.run))
        return steps

    def _call(self, native: Callable[..., int], rows: Tensor, start: int, stop: int, parts: Sequence[Part]) -> int:
        """Call `native` with all rows (R, D) and the parts' memories, and record there what they took in."""
        assert self._native
        addresses: list[list[int]] = [[] for _ in range(start, stop)]
        memories = [self._memories(start, stop, state) for _, state, _ in parts]
        for (_, _, step), own in zip(parts, memories, strict=True):
            shapes = self.blocks[start].shapes(step.batch)
            for ssm, places in zip(own, addresses, strict=True):
                places += ssm.addresses(rows, *shapes)
        watched = any(ssm.watched for own in memories for ssm in own)
        journal = self._native.journal(stop - start, len(rows)) if watched else None
        run = native(rows, start, addresses, numbered([_mamba(step) for _, _, step in parts]), journal)
        first = 0
        for (_, _, step), own in zip(parts, memories, strict=True):
            after = first + step.batch * step.tokens
            for index, ssm in enumerate(own[:run]):
                if journal is None:
                    ssm.record(step.tokens)
                else:
                    notes = journal[index, first:after].view(step.batch, step.tokens, -1)
                    replay = partial(self._native.replay, start + index, notes)
                    ssm.record(step.tokens, notes[..., : self.blocks[start].channels], replay)
            first = after
        return run


def _mamba(step: Step) -> MambaStep:
    assert isinstance(step, MambaStep)
    return step
