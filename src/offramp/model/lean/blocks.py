"""The lean path of a whole model: each block has an attention or a Mamba-2 mixer, and then an MLP or none.

Models of the llama kind have attention and MLPs, models of the Mamba-2 kind mixers alone, and hybrids (Bamba) all three.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from offramp.model.checkpoint import Values
from offramp.model.lean.base import Lean, LeanStep, Maker, numbered
from offramp.model.lean.llama import LeanAttention, LeanMLP, RotaryStep, RotaryTables, native_block
from offramp.model.lean.mamba2 import LeanMixer
from offramp.model.lean.native import Addresses, Native, Rows
from offramp.model.lean.steps import Ask, Steps
from offramp.model.lean.structures import CMambaBlock, CMambaShape, CShape
from offramp.model.lean.weights import Weight
from offramp.model.modules import Modules
from offramp.model.runtime import Part, Step, joined
from offramp.model.state import KV, SSM, State
from offramp.model.store import Store


class LeanBlock:
    """One block: `mixer` is its attention or its Mamba-2 mixer. The names of norms are those of the library's families."""

    def __init__(self, block: Any, attention: Any, mixer: Any, window: int | None, rotary_dim: int, make: Maker) -> None:
        names = ("input_layernorm", "post_attention_layernorm", "pre_ff_layernorm", "post_feedforward_layernorm")
        norms = [getattr(block, name) for name in names if hasattr(block, name)]
        norm_first = hasattr(block, "input_layernorm")
        self.mixer: LeanAttention | LeanMixer
        if mixer is not None:
            self.mixer = LeanMixer(mixer, norms[0] if norms else block.norm, make)
        else:
            self.mixer = LeanAttention(attention, norms[0], norm_first, rotary_dim, window, make)
        mlp = getattr(block, "mlp", None) or getattr(block, "feed_forward", None)
        self.mlp = LeanMLP(mlp, norms[1], norm_first, make) if mlp is not None else None

    @property
    def weights(self) -> tuple[Weight, ...]:
        """The matrices that a token is multiplied with."""
        return self.mixer.weights + (self.mlp.weights if self.mlp else ())

    def __call__(self, h: Tensor, memories: Sequence[tuple[Any, Any]]) -> None:
        """Add the block's outputs to h (R, D) in place, and update the memories.

        Each of the memories is for as many rows as its step has, in order.
        """
        self.mixer(h, memories)
        if self.mlp:
            self.mlp(h)

    def remember(self, h: Tensor, memories: Sequence[tuple[Any, Any]]) -> None:
        """Only update the memories, as if h (R, D) were the block's input."""
        self.mixer.remember(h, memories)


class LeanBlocks(Lean):
    """Blocks of the llama kind, of the Mamba-2 kind, or of both.

    Raises `ValueError` for a model whose shapes a format or the rotary tables do not fit.
    """

    blocks: list[LeanBlock]

    def __init__(self, modules: Modules, weight_format: str, store: Store, values: Values, native: bool = True) -> None:
        attends = any(attention is not None for attention in modules.attention)
        rotary_dim = 2 * modules.rotary.inv_freq.numel() if attends else 0
        dim = next((attention.head_dim for attention in modules.attention if attention is not None), 0)
        self._tables = RotaryTables(modules.rotary, dim, store.device) if attends else None
        super().__init__(modules, weight_format, store, values)
        parts = zip(modules.blocks, modules.attention, modules.mixers, modules.windows, strict=True)
        self.blocks = [self._part(str(index), partial(LeanBlock, *part, rotary_dim)) for index, part in enumerate(parts)]
        store.finish()
        self._attention = next((block.mixer for block in self.blocks if isinstance(block.mixer, LeanAttention)), None)
        self._mixer = next((block.mixer for block in self.blocks if isinstance(block.mixer, LeanMixer)), None)
        if native and self._fits() and self._compiles():
            self._native = self._compiled()
            if self._attention:
                self.keep_keys_in(torch.float32 if weight_format == "float32" else torch.bfloat16)

    def _fits(self) -> bool:
        """Whether all shapes are as the compiled code takes them for granted. It has scratch for one size of each part."""
        width, tokens = self.norm.weight.numel(), self.head.rows
        parts = [part for block in self.blocks for part in (block.mixer, block.mlp) if part is not None]
        sizes = {(type(part), part.sizes) for part in parts}
        has_mlp = {block.mlp is not None for block in self.blocks}
        return (
            width > 0
            and 0 < tokens <= len(self.embedding)
            and self.head.columns == self.embedding.shape[1] == width
            and len(has_mlp) == 1
            and (True in has_mlp or not self._attention)
            and len(sizes) == len({kind for kind, _ in sizes})
            and all(part.fits(width) for part in parts)
        )

    def _compiled(self) -> Native:
        width, attention, mixer = self.norm.weight.numel(), self._attention, self._mixer
        blocks, mixers = [], []
        shape, mamba_shape = CShape(), CMambaShape()
        for block in self.blocks:
            if block.mlp:
                blocks.append(native_block(block.mixer if isinstance(block.mixer, LeanAttention) else None, block.mlp))
            if mixer:
                mixers.append(block.mixer.native() if isinstance(block.mixer, LeanMixer) else CMambaBlock())
        if self.blocks[0].mlp:
            heads = attention.sizes if attention else (0, 0, 0)
            shape = CShape(width, *heads, *self.blocks[0].mlp.sizes)
        if mixer:
            mamba_shape = CMambaShape(width, *mixer.sizes)
        return Native(blocks, mixers, shape, mamba_shape, self._columns)

    @property
    def keeps_keys(self) -> bool:
        """Whether compiled blocks keep keys and values."""
        return self._native is not None and self._attention is not None

    def keep_keys_in(self, dtype: torch.dtype) -> None:
        """Let compiled blocks keep the keys and values of new texts in float32 or bfloat16."""
        assert self._native
        self.kept_dtype = dtype
        self._native.keep_halves(dtype == torch.bfloat16)

    def _step(self, first: int | Tensor, batch: int, tokens: int, mask: Tensor | None = None) -> LeanStep:
        # Attention needs no mask: a padding token stands after its sequence's own tokens, and what it leaves in memory is
        # written over before any token sees it.
        real = mask if self._mixer else None
        if self._tables:
            return self._tables.step(first, batch, tokens, real)
        sequences = torch.zeros(tokens, dtype=torch.int64, device=self._device)
        if batch > 1:
            sequences = torch.arange(batch, device=self._device).repeat_interleave(tokens)
        return LeanStep(batch, tokens, sequences, real)

    def remember_keys(self, h: Tensor, index: int, state: State, step: Step) -> None:
        if state.kv[index] is not None:
            self.remember_all([(h, state, step)], index, index + 1)

    def remember_state(self, h: Tensor, index: int, state: State) -> None:
        if state.ssm[index] is not None:
            self.remember_all([(h, state, self.step(h, 0))], index, index + 1)

    def _memories(self, start: int, stop: int, state: State) -> Sequence[KV | SSM | None]:
        pairs = zip(state.kv[start:stop], state.ssm[start:stop], strict=True)
        return [kv if ssm is None else ssm for kv, ssm in pairs]

    def take_steps(self, ask: Ask, state: State, position: int) -> Steps:
        assert self._native
        end, turn = position + ask.most, None
        if self._tables:
            self._tables.reach(end)
            turn = self._tables.turn
        steps = self._native.step(ask, self._addresses(0, len(self.blocks), [(state, 1, position, end)]), turn, position)
        for index, ssm in enumerate(state.ssm):
            if ssm is not None:
                ssm.record(len(steps.ids) + (index < steps.run))
        for index, kv in enumerate(state.kv):
            if kv is not None:
                kv.crop(position + len(steps.ids) + (index < steps.run))
        return steps

    def _addresses(self, start: int, stop: int, parts: Sequence[tuple[State, int, int | None, int]]) -> Addresses:
        """The memories of blocks `start` to `stop` - 1 for the compiled code, with room for tokens.

        Each part has its state, the number of its sequences, the position of its first new token (None if each sequence
        has its own), and one more than the highest position.
        """
        like, found = self.norm.weight, Addresses([[] for _ in range(start, stop)], [[] for _ in range(start, stop)])
        for state, batch, first, end in parts:
            for index in range(start, stop):
                kv, ssm, mixer = state.kv[index], state.ssm[index], self.blocks[index].mixer
                keys, mixed = [0] * batch, [0] * (2 * batch)
                if kv is not None and isinstance(mixer, LeanAttention):
                    keys = kv.addresses((batch, 2 * mixer.heads, mixer.dim), self.kept_dtype, first, end)
                elif ssm is not None and isinstance(mixer, LeanMixer):
                    mixed = ssm.addresses(like, *mixer.shapes(batch))
                found.kv[index - start] += keys
                found.mixed[index - start] += mixed
        return found

    def _call(self, native: Callable[..., int], rows: Tensor, start: int, stop: int, parts: Sequence[Part]) -> int:
        """Call `native` with all rows (R, D) and the parts' memories, and record there what they took in."""
        assert self._native
        steps, states = [_lean(step) for _, _, step in parts], [state for _, state, _ in parts]
        rotary = [step for step in steps if isinstance(step, RotaryStep)]
        ends = [(step.first, step.end) for step in rotary] or [(0, 0)] * len(parts)
        places = zip(states, steps, ends, strict=True)
        memory = self._addresses(start, stop, [(state, step.batch, *end) for state, step, end in places])
        sequences = numbered(steps)
        taken = numbered(steps, padding=True) if any(step.real is not None for step in steps) else sequences
        given = Rows(sequences, taken)
        if rotary:
            positions, turn = joined([step.positions for step in rotary]), joined([step.turn for step in rotary])
            given = Rows(sequences, taken, positions, turn, max(step.end for step in rotary))
        watched = any(ssm.watched for state in states for ssm in state.ssm[start:stop] if ssm is not None)
        journal = self._native.journal(stop - start, len(rows)) if watched else None
        run = native(rows, start, memory, given, journal)
        after = 0
        for state, step in zip(states, steps, strict=True):
            first, after = after, after + step.batch * step.tokens
            self._record(state, start, run, step, None if journal is None else journal[:, first:after])
            if run < stop - start and isinstance(step, RotaryStep):
                state_keys = (kv for kv in state.kv[start + run : stop] if kv is not None)
                for kv in state_keys:
                    kv.crop(step.end - step.tokens)
        return run

    def _record(self, state: State, start: int, run: int, step: LeanStep, journal: Tensor | None) -> None:
        """Count the step's tokens in the mixers' memories of the blocks that ran; a journal (blocks, R, 2C + H) says how to
        repeat them.
        """
        assert self._native
        for index, ssm in enumerate(state.ssm[start : start + run]):
            mixer = self.blocks[start + index].mixer
            if ssm is None or not isinstance(mixer, LeanMixer):
                continue
            if journal is None:
                ssm.record(step.tokens)
            else:
                notes = journal[index].view(step.batch, step.tokens, -1)
                replay = partial(self._native.replay, start + index, notes)
                ssm.record(step.tokens, notes[..., : mixer.channels], replay)


def _lean(step: Step) -> LeanStep:
    assert isinstance(step, LeanStep)
    return step
