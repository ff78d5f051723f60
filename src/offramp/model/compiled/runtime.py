"""The runtime of compiled blocks: it runs a whole model in C, in one weight format.

Models of the llama kind have attention and MLPs, models of the Mamba-2 kind mixers alone, and hybrids (Bamba) all three.
The residual stream is float32 in every format. `selfcheck.check` compares logits with the library's own.

Shapes: B batch, T tokens of this call, D hidden size, R = B · T rows, P head dim.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from offramp.errors import UnsupportedModel
from offramp.model.checkpoint import Values
from offramp.model.compiled.blocks import Attention, Block, CompiledStep, Mixer, RotaryTables, native_block
from offramp.model.compiled.native import Addresses, Native, Rows
from offramp.model.compiled.parts import Changed, Maker, RMSNorm
from offramp.model.compiled.steps import Ask, Asked, DrafterParts, GateParts, Gates, Steps
from offramp.model.compiled.structures import CDrafter, CHead, CMambaBlock, CMambaShape, CShape, CSketch, CWeight, address
from offramp.model.compiled.weights import FORMATS, GROUP, Int4, Int8, Weight, multiplies_bfloat16
from offramp.model.modules import Modules
from offramp.model.runtime import Part, Step, joined
from offramp.model.state import State
from offramp.model.store import Built, Get, Store

SLICE = 4096  # rows of a head that are in float32 at once


class Compiled:
    """The `Runtime` that runs a whole model in compiled C: its blocks, final norm and head, in one weight format.

    `Runtime` documents the methods. Hidden states are float32.
    """

    engine = "compiled blocks"
    dtype = kept_dtype = torch.float32

    def __init__(self, modules: Modules, weight_format: str, store: Store, values: Values) -> None:
        """Raises `ValueError` for a model that the compiled code does not fit, or whose weights do not fit the format, one
        of `weights.FORMATS`.
        """
        attends = any(attention is not None for attention in modules.attention)
        rotary_dim = 2 * modules.rotary.inv_freq.numel() if attends else 0
        dim = next((attention.head_dim for attention in modules.attention if attention is not None), 0)
        self._tables = RotaryTables(modules.rotary, dim) if attends else None
        self._modules, self.weight_format, self._store, self._values = modules, weight_format, store, values
        self._format = FORMATS[weight_format]
        self._sketches = WeakTensorKeyDictionary()
        self.changed: Changed = []
        self.norm, self.head, self.embedding = self._part("ends", self._ends)
        parts = zip(modules.blocks, modules.attention, modules.mixers, modules.windows, strict=True)
        make = [partial(self._block, index, *part, rotary_dim) for index, part in enumerate(parts)]
        self.blocks = [self._part(str(index), block) for index, block in enumerate(make)]
        self._attention = next((block.mixer for block in self.blocks if isinstance(block.mixer, Attention)), None)
        self._mixer = next((block.mixer for block in self.blocks if isinstance(block.mixer, Mixer)), None)
        self._check_sizes()
        store.finish()
        self._native = self._compiled()
        if self._attention:
            self.keep_keys_in(torch.float32 if weight_format == "float32" else torch.bfloat16)

    def _part(self, name: str, build: Callable[[Maker], Built]) -> Built:
        """What `build` makes of the tensors of one part of the model."""

        def with_maker(get: Get) -> tuple[Built, Changed]:
            changed: Changed = []
            return build(Maker(get, self._values, self.weight_format, changed)), changed

        built, changed = self._store.part(name, with_maker)
        self.changed += changed
        return built

    def _ends(self, make: Maker) -> tuple[RMSNorm, Weight, Tensor]:
        """Final norm, head and embedding. A head that is the embedding is kept once, unless it becomes integers."""
        head = make.matrix("head", [self._modules.head], head=True)
        tied = self._modules.head.weight is self._modules.embedding.weight and not self._format.quantised
        norm, embedding = make.norm("norm", self._modules.norm), head.w if tied else make.embedding(self._modules.embedding)
        width = norm.weight.numel()
        sizes = head.columns == embedding.shape[1] == width > 0
        if not (sizes and 0 < head.rows <= len(embedding) and _fills_vectors(head)):
            raise ValueError("the shapes of its head or its embedding do not fit")
        return norm, head, embedding

    def _block(
        self, index: int, block: Any, attention: Any, mixer: Any, window: int | None, rotary_dim: int, make: Maker
    ) -> Block:
        """A block whose shapes are as the compiled code takes them for granted."""
        made, width = Block(block, attention, mixer, window, rotary_dim, make), self.norm.weight.numel()
        if not (all(part.fits(width) for part in made.parts) and all(map(_fills_vectors, made.weights))):
            raise ValueError(f"the shapes of block {index} do not fit")
        return made

    def _check_sizes(self) -> None:
        """Raises `ValueError` for blocks of different sizes: the compiled code has scratch for one size of each part."""
        sizes = {(type(part), part.sizes) for block in self.blocks for part in block.parts}
        has_mlp = {block.mlp is not None for block in self.blocks}
        same = len(has_mlp) == 1 and len(sizes) == len({kind for kind, _ in sizes})
        if not same or (self._attention and True not in has_mlp):
            raise ValueError("its blocks have different sizes")

    def _compiled(self) -> Native:
        width, attention, mixer = self.norm.weight.numel(), self._attention, self._mixer
        blocks, mixers = [], []
        shape, mamba_shape = CShape(), CMambaShape()
        for block in self.blocks:
            if block.mlp:
                blocks.append(native_block(block.mixer if isinstance(block.mixer, Attention) else None, block.mlp))
            if mixer:
                mixers.append(block.mixer.native() if isinstance(block.mixer, Mixer) else CMambaBlock())
        if self.blocks[0].mlp:
            heads = attention.sizes if attention else (0, 0, 0)
            shape = CShape(width, *heads, *self.blocks[0].mlp.sizes)
        if mixer:
            mamba_shape = CMambaShape(width, *mixer.sizes)
        weights = [self.head, *(weight for block in self.blocks for weight in block.weights)]
        return Native(blocks, mixers, shape, mamba_shape, max(weight.columns for weight in weights))

    @property
    def keeps_keys(self) -> bool:
        """Whether a block has attention, and so keeps keys and values."""
        return self._attention is not None

    def keep_keys_in(self, dtype: torch.dtype) -> None:
        """Keep the keys and values of new texts in float32 or bfloat16."""
        self.kept_dtype = dtype
        self._native.keep_halves(dtype == torch.bfloat16)

    def embed(self, ids: Tensor, first: int) -> tuple[Tensor, Step]:
        h = F.embedding(ids, self.embedding).float()
        return h, self.step(h, first)

    def step(self, h: Tensor, first: int) -> CompiledStep:
        batch, tokens = h.shape[:2]
        sequences = torch.zeros(tokens, dtype=torch.int64)
        if batch > 1:
            sequences = torch.arange(batch).repeat_interleave(tokens)
        if self._tables is None:
            return CompiledStep(batch, tokens, first, sequences)
        return CompiledStep(batch, tokens, first, sequences, *self._tables.rows(first, batch, tokens))

    def run_all(self, parts: Sequence[Part], start: int, stop: int) -> list[Tensor]:
        """`Runtime.run_all`, in one pass over the weights."""
        flat = [_rows(h) for h, _, _ in parts]
        rows = flat[0].clone(memory_format=torch.contiguous_format) if len(flat) == 1 else torch.cat(flat)
        if start < stop:
            self._call(self._native.run, rows, start, stop, parts)
        pieces = [rows] if len(flat) == 1 else rows.split([len(x) for x in flat])
        return [x.view(h.shape) for x, (h, _, _) in zip(pieces, parts, strict=True)]

    def remember_all(self, parts: Sequence[Part], start: int, stop: int) -> None:
        """`Runtime.remember_all`, in one pass over the weights."""
        if start < stop:
            rows = joined([_rows(h) for h, _, _ in parts]).contiguous()
            self._call(self._native.remember, rows, start, stop, parts)

    def remember_keys(self, h: Tensor, index: int, state: State, step: Step) -> None:
        if state.kv[index] is not None:
            self.remember_all([(h, state, step)], index, index + 1)

    def remember_state(self, h: Tensor, index: int, state: State) -> None:
        if state.ssm[index] is not None:
            self.remember_all([(h, state, self.step(h, 0))], index, index + 1)

    def gates(self, blocks: Sequence[int], gates: Sequence[GateParts]) -> Gates | None:
        """Gates after so many blocks each, for `run_until`; None if they cannot be compiled."""
        compiled = Gates(blocks, gates) if gates else None
        return compiled if compiled and compiled.width <= self._native.room_for_gates else None

    def run_until(self, part: Part, start: int, asked: Asked) -> tuple[Tensor, int]:
        """Run one token from block `start` up to the first gate that is sure enough, or to the top.

        Returns its hidden state (1, 1, D) there, and the number of blocks before.
        """
        rows = _rows(part[0]).clone(memory_format=torch.contiguous_format)
        run = self._call(partial(self._native.run, asked=asked), rows, start, len(self.blocks), [part])
        return rows[None], start + run

    def ask(self, gates: Gates, index: int, h: Tensor) -> float:
        """The logit of one of the gates for a hidden state h (1, 1, D)."""
        return self._native.ask(gates.compiled[index], h.float().contiguous())

    def drafter(self, parts: DrafterParts) -> CDrafter:
        """An exit that drafts, for `Ask.drafter`. The parts must stay alive. Raises `ValueError` for wrong shapes."""
        width, inner = self.norm.weight.numel(), parts.down.columns
        columns = width * (3 if parts.middle else 2)
        shapes = parts.inward.shape, parts.down.shape, parts.list.columns
        if shapes != ((width + 2 * inner, columns), (width, inner), width) or not parts.list.rows:
            raise ValueError(f"an exit of the shapes {shapes} cannot draft for {width} dims")
        return parts.compiled(self.norm.weight, self.norm.eps)

    def ask_for(self, ids: Sequence[int], enough: int, most: int, ends: Tensor, **more: Any) -> Ask:
        """What `take_steps` is asked for. `more`: other fields of `Ask`, but a `sketch` is what `sketched` takes."""
        sketch = more.pop("sketch", None)
        compiled = self._compiled_sketch(*sketch) if sketch else None
        return Ask(ids, enough, most, ends, self.embedding, self._head, compiled, **more)

    def take_steps(self, ask: Ask, state: State, position: int) -> Steps:
        """Decode one sequence greedily, in one call of the compiled code, from the token at `position` on."""
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

    def _addresses(self, start: int, stop: int, parts: Sequence[tuple[State, int, int, int]]) -> Addresses:
        """The memories of blocks `start` to `stop` - 1 for the compiled code, with room for tokens.

        Each part has its state, the number of its sequences, the position of its first new token, and one more than the
        highest position.
        """
        like, found = self.norm.weight, Addresses([[] for _ in range(start, stop)], [[] for _ in range(start, stop)])
        for state, batch, first, end in parts:
            for index in range(start, stop):
                kv, ssm, mixer = state.kv[index], state.ssm[index], self.blocks[index].mixer
                keys, mixed = [0] * batch, [0] * (2 * batch)
                if kv is not None and isinstance(mixer, Attention):
                    keys = kv.addresses((batch, 2 * mixer.heads, mixer.dim), self.kept_dtype, first, end)
                elif ssm is not None and isinstance(mixer, Mixer):
                    mixed = ssm.addresses(like, *mixer.shapes(batch))
                found.kv[index - start] += keys
                found.mixed[index - start] += mixed
        return found

    def _call(self, native: Callable[..., int], rows: Tensor, start: int, stop: int, parts: Sequence[Part]) -> int:
        """Call `native`, the compiled `run` or `remember`, with the rows (R, D) of all parts, one part after another.

        First, the parts' memories get room for the new tokens; afterwards they record what they took in. `run` changes the
        rows in place. Returns the number of blocks that ran; the others remember nothing of the tokens.
        """
        steps, states = [_compiled_step(step) for _, _, step in parts], [state for _, state, _ in parts]
        places = zip(states, steps, strict=True)
        memory = self._addresses(start, stop, [(state, step.batch, step.first, step.end) for state, step in places])
        positions = [step.positions for step in steps if step.positions is not None]
        turns, end = [step.turn for step in steps if step.turn is not None], max(step.end for step in steps)
        given = Rows(_numbered(steps), joined(positions), joined(turns), end) if positions else Rows(_numbered(steps))
        watched = any(ssm.watched for state in states for ssm in state.ssm[start:stop] if ssm is not None)
        journal = self._native.journal(stop - start, len(rows)) if watched else None
        run = native(rows, start, memory, given, journal)
        after = 0
        for state, step in zip(states, steps, strict=True):
            first, after = after, after + step.batch * step.tokens
            self._record(state, start, run, step, None if journal is None else journal[:, first:after])
            for kv in state.kv[start + run : stop]:
                if kv is not None:
                    kv.crop(step.first)
        return run

    def _record(self, state: State, start: int, run: int, step: CompiledStep, journal: Tensor | None) -> None:
        """Count the step's tokens in the mixers' memories of the blocks that ran; a journal (blocks, R, 2C + H) says how to
        repeat them.
        """
        for index, ssm in enumerate(state.ssm[start : start + run]):
            mixer = self.blocks[start + index].mixer
            if ssm is None or not isinstance(mixer, Mixer):
                continue
            if journal is None:
                ssm.record(step.tokens)
            else:
                notes = journal[index].view(step.batch, step.tokens, -1)
                replay = partial(self._native.replay, start + index, notes)
                ssm.record(step.tokens, notes[..., : mixer.channels], replay)

    def logits(self, h: Tensor, rows: Tensor | None = None) -> Tensor:
        if rows is not None:  # torch's operators, for gradients
            return F.linear(self.final(h), self.head.pick(rows).dense())
        out = self._native.logits(self._head, None, _rows(h).contiguous())
        return out.view(*h.shape[:-1], self.head.rows)

    def head_of(self, rows: Tensor) -> Callable[[Tensor], Tensor]:
        """`Runtime.head_of`, without gradients. It picks the tokens' weights once."""
        product = self._product_with(self.head.pick(rows))

        def logits(h: Tensor) -> Tensor:
            return product(self.norm(_rows(h))).view(*h.shape[:-1], len(rows))

        return logits

    def sketched(self, reduce: Tensor, expand: Tensor, candidates: int) -> Callable[[Tensor], Tensor]:
        sketch = self._compiled_sketch(reduce, expand, candidates)

        def logits(h: Tensor) -> Tensor:
            out = self._native.logits(self._head, sketch, _rows(h).contiguous())
            return out.view(*h.shape[:-1], self.head.rows)

        return logits

    def _sketch(self, reduce: Tensor, expand: Tensor) -> tuple[Weight, Weight]:
        """A sketch's two weights, in the head's format, made once. Raises `ValueError` for maps that do not fit."""
        if expand not in self._sketches:
            if reduce.shape != expand.T.shape or (self._format.quantised and len(reduce) % GROUP):
                raise ValueError(f"maps of {tuple(reduce.shape)} and {tuple(expand.shape)} make no sketch of this head")
            kind, size = type(self.head), self.head.rows
            pieces = []
            for first in range(0, size, SLICE):
                product = self.head.pick(slice(first, min(size, first + SLICE))).dense() @ expand
                pieces.append(kind.tensors(product.to(self.head.w.dtype) if kind is Weight else product))
            tensors = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
            self._sketches[expand] = Weight.of(reduce.float()), kind(kind.packed(tensors))
        made: tuple[Weight, Weight] = self._sketches[expand]
        return made

    def _compiled_sketch(self, reduce: Tensor, expand: Tensor, candidates: int) -> CSketch:
        if not 0 < candidates <= self.head.rows:
            raise ValueError(f"{candidates} candidates of {self.head.rows} tokens")
        first, second = self._sketch(reduce, expand)
        return CSketch(CWeight.of(first), CWeight.of(second, fine=True), candidates)

    def product_of(self, layer: nn.Linear) -> Callable[[Tensor], Tensor]:
        """A function x (n, K) → (n, N) that multiplies with a linear layer's weights, kept in bfloat16 unless the blocks'
        are float32.
        """
        dtype = torch.float32 if self.weight_format == "float32" else torch.bfloat16
        bias = None if layer.bias is None else layer.bias.detach()
        return self._product_with(Weight({"w": layer.weight.detach().to(dtype)}, bias))

    def _product_with(self, weight: Weight) -> Callable[[Tensor], Tensor]:
        """A function x (n, K) → (n, N) that multiplies with this weight in compiled code. It keeps the weight alive."""
        return partial(self._product, weight, CWeight.of(weight))

    def _product(self, _: Weight, handle: CWeight, x: Tensor) -> Tensor:
        return self._native.product(handle, x.contiguous())

    def final(self, h: Tensor) -> Tensor:
        return self.norm(h.float())

    def head_weight(self) -> Tensor:
        return self.head.dense()

    def block_bytes(self, index: int) -> int:
        return sum(weight.nbytes for weight in self.blocks[index].weights)

    def head_bytes(self) -> int:
        return self.head.nbytes

    def filled(self, block: nn.Module) -> nn.Module:
        """A copy of one of the library's blocks, with the weights that this runtime runs with."""
        changed = {id(module): weight for module, weight in self.changed}
        copied, multiplies = copy.deepcopy(block), self.weight_format != "float32" and multiplies_bfloat16()
        dtype = torch.bfloat16 if multiplies else torch.float32
        for module, twin in zip(block.modules(), copied.modules(), strict=True):
            for name, parameter in module.named_parameters(recurse=False):
                from_integers = changed.get(id(module)) if name == "weight" else None
                value = self._values.whole(parameter, dtype) if from_integers is None else from_integers().to(dtype)
                if value.is_meta:
                    raise UnsupportedModel(
                        "The library's weights of this model were freed, so nothing can be trained through its blocks.",
                        "Train exits without tails (--layers), or load the model with keep=True.",
                    )
                twin._parameters[name] = nn.Parameter(value, requires_grad=False)
        return copied

    def drop_spare_weights(self) -> None:
        for part in (*self._modules.blocks, self._modules.embedding, self._modules.norm, self._modules.head):
            part.to("meta")

    @property
    def tolerance(self) -> float:
        """How far logits may be from the library's because products are rounded, as a share of the largest logit.

        float32: 1e-4. Integer weights: 1e-1, since rows are rounded to 8-bit integers. bfloat16: 1e-1, since the library
        rounds every result; that alone moves SmolLM2's logits by 4e-2.
        """
        return 1e-4 if self.head.w.dtype == torch.float32 else 1e-1

    @cached_property
    def _head(self) -> CHead:
        return CHead(CWeight.of(self.head, fine=True), address(self.norm.weight), self.norm.eps)


def _rows(h: Tensor) -> Tensor:
    """Hidden states (B, T, D) as float32 rows (R, D)."""
    return h.float().reshape(-1, h.shape[-1])


def _numbered(steps: Sequence[CompiledStep]) -> Tensor:
    """The sequence of each row, (R,), numbered through over all steps."""
    firsts = accumulate((step.batch for step in steps), initial=0)
    return joined([step.sequences + first if first else step.sequences for step, first in zip(steps, firsts, strict=False)])


def _fills_vectors(weight: Weight) -> bool:
    """Whether the weight's columns fill whole vectors of the compiled code."""
    return weight.columns % (32 if isinstance(weight, Int4 | Int8) else 8) == 0


def _compiled_step(step: Step) -> CompiledStep:
    assert isinstance(step, CompiledStep)
    return step
