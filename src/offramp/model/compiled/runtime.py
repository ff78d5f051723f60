"""The runtime of compiled blocks: it runs a whole model in C, in one weight format.

Models of the llama kind have attention and MLPs, models of the Mamba-2 kind mixers alone, and hybrids (Bamba) all three.
The residual stream is float32 in every format. `selfcheck.check` compares logits with the library's own.

Shapes: B batch, T tokens of this call, D hidden size, R = B · T rows, P head dim.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from ctypes import byref, c_int64
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from offramp.errors import UnsupportedModel
from offramp.model.checkpoint import Values
from offramp.model.compiled.blocks import Block, rotary_tables
from offramp.model.compiled.formats import FORMATS, beside
from offramp.model.compiled.library import (
    CompiledPart,
    CRows,
    CSampling,
    Fine,
    Model,
    Settings,
    check_rows,
    constant,
    handle_of,
)
from offramp.model.compiled.parts import Changed, Maker, Moments
from offramp.model.compiled.rounding import GROUP, LayerInput
from offramp.model.compiled.session import Session
from offramp.model.compiled.steps import CompiledPlan, Rules
from offramp.model.compiled.weights import Weight, multiplies_bfloat16
from offramp.model.families import Family
from offramp.model.modules import Modules
from offramp.model.runtime import AnyState, BlockInput, Step, joined
from offramp.model.store import Built, Get, Store

ENDS = "ends"  # the name of the part with the embedding, the final norm and the head
SLICE = 4096  # rows of a head that are in float32 at once


class Compiled:
    """The `Runtime` that runs a whole model in compiled C: its blocks, final norm and head, in one weight format.

    `Runtime` documents the methods. Hidden states are float32.
    """

    engine = "compiled blocks"
    dtype = kept_dtype = torch.float32

    def __init__(
        self,
        modules: Modules,
        family: Family,
        config: Any,
        weight_format: str,
        store: Store,
        values: Values,
        inputs: Mapping[nn.Module, LayerInput],
        moments: Callable[[int], Moments] | None = None,
    ) -> None:
        """`weight_format` is one of `formats.FORMATS`; `inputs`: as a `Maker` takes them, and `moments` of each block.

        Raises `ValueError` for a model that the compiled code does not fit, or whose weights do not fit the format.
        """
        self.tables = rotary_tables(modules, family)
        self._modules, self._family, self._scales = modules, family, family.scales(config)
        self.weight_format, self._store, self._values = weight_format, store, values
        self._inputs, self._moments = inputs, moments
        self._format = FORMATS[weight_format]
        self._sketches = WeakTensorKeyDictionary()
        self.changed: Changed = []
        self._norm, self._eps, self.head, self.embedding = self._part(ENDS, self._make_ends)
        own = torch.tensor(getattr(modules.embedding, "scalar_embed_scale", 1.0)).to(self._format.loaded)  # gemma's
        self._embedding_scale = self._scales.embedding * float(own)
        self.ends = CompiledPart(
            "ends", head=Fine(self.head), norm=self._norm, embedding=self.embedding, eps=self._eps,
            scale=self._embedding_scale, logit_scale=self._scales.logits, cap=self._scales.cap or 0.0,
        )  # fmt: skip
        self.blocks = [
            self._part(str(i), partial(_block, self.ends, modules, i, family, self.tables))
            for i in range(len(modules.blocks))
        ]
        self._model = self._made(self.ends, [block.parts for block in self.blocks])
        store.finish()
        # As x · w · √D / √(Σ x² + D · eps): fewer operators.
        self._scaled = self._norm * math.sqrt(len(self._norm))
        self._floor = torch.tensor(math.sqrt(len(self._norm) * self._eps))
        weights = [self.head, *(weight for block in self.blocks for weight in block.weights)]
        entries = sum(weight.rows * weight.columns for weight in weights)
        self.bits = 8 * sum(weight.nbytes for weight in weights) / entries
        if self.keeps_keys and self.bits < 32:
            self.kept_dtype = torch.bfloat16

    def _part(self, name: str, build: Callable[[Maker], Built]) -> Built:
        """What `build` makes of the tensors of one part of the model."""

        def with_maker(get: Get) -> tuple[Built, Changed]:
            changed: Changed = []
            moments = partial(self._moments, int(name)) if self._moments and name != ENDS else dict
            offset = self._family.norm_offset
            return build(Maker(get, self._values, self.weight_format, changed, self._inputs, moments, offset)), changed

        built, changed = self._store.part(name, with_maker)
        self.changed += changed
        return built

    def _made(self, ends: CompiledPart, blocks: Sequence[Sequence[CompiledPart | None]]) -> Model:
        """The model of these parts, with its rotary tables."""
        model = Model(ends, blocks)
        for table in self.tables.values():
            model.rotary(table.number, table.frequencies, table.factor)
        return model

    def _make_ends(self, make: Maker) -> tuple[Tensor, float, Weight, Weight]:
        """Final norm, head and embedding. A head that is the embedding is kept once, unless it becomes integers."""
        head = make.matrix("head", [self._modules.head], head=True)
        as_it_is = self._format.blocks in (None, Weight)
        tied = self._modules.head.weight is self._modules.embedding.weight and as_it_is
        embedding = head if tied else make.embedding(self._modules.embedding)
        return *make.norm("norm", self._modules.norm), head, embedding

    @property
    def keeps_keys(self) -> bool:
        """Whether a block has attention, and so keeps keys and values."""
        return any(block.attention for block in self.blocks)

    def keep_keys_in(self, dtype: torch.dtype) -> None:
        """Keep the keys and values of new texts in float32 or bfloat16."""
        self.kept_dtype = dtype

    def state(self, capacity: int) -> Session:
        return Session(self._model, [block.shapes for block in self.blocks], self.kept_dtype, capacity)

    def embed(self, ids: Tensor, first: int) -> tuple[Tensor, Step]:
        h = self.embedding.pick(ids.flatten()).dense().view(*ids.shape, -1) * self._embedding_scale
        return h, self.step(h, first)

    def step(self, h: Tensor, first: int) -> Step:
        return Step(len(h), h.shape[1], first)

    def run_all(self, parts: Sequence[BlockInput], start: int, stop: int) -> list[Tensor]:
        """`Runtime.run_all`, in one pass over the weights."""
        flat = [_rows(h) for h, _, _ in parts]
        rows = flat[0].clone(memory_format=torch.contiguous_format) if len(flat) == 1 else torch.cat(flat)
        if start < stop:
            self._call("offramp_run", rows, start, stop, parts)
        pieces = [rows] if len(flat) == 1 else rows.split([len(x) for x in flat])
        return [x.view(h.shape) for x, (h, _, _) in zip(pieces, parts, strict=True)]

    def remember_all(self, parts: Sequence[BlockInput], start: int, stop: int) -> None:
        """`Runtime.remember_all`, in one pass over the weights."""
        self._remember(parts, start, stop, "OFFRAMP_BOTH")

    def _remember(self, parts: Sequence[BlockInput], start: int, stop: int, what: str) -> None:
        if start < stop:
            rows = joined([_rows(h) for h, _, _ in parts]).contiguous()
            self._call("offramp_remember", rows, start, stop, parts, constant(what))

    def remember_keys(self, h: Tensor, index: int, state: AnyState, step: Step) -> None:
        if self.blocks[index].attention:
            self._remember([(h, state, step)], index, index + 1, "OFFRAMP_KEYS")

    def remember_state(self, h: Tensor, index: int, state: AnyState) -> None:
        if self.blocks[index].mixer:
            self._remember([(h, state, self.step(h, state.length(index)))], index, index + 1, "OFFRAMP_STATES")

    def check(self, part: CompiledPart) -> None:
        """Raise `ValueError` for a gate, a sketch or a drafter that does not fit this model."""
        self._model.call("offramp_model_fits", part.pointer)

    def plan(self, rules: Rules) -> CompiledPlan:
        """A plan for this model. Raises `ValueError` for rules that do not fit it."""
        return CompiledPlan(self._model, rules)

    def choose(self, settings: Settings, ids: Sequence[int], logits: Tensor, allowed: np.ndarray | None = None) -> int:
        """Choose a token by logits (V,), after all ids before.

        `allowed` has a bit for each token, in words of uint32; tokens beyond them are not allowed. Returns -1 where the
        logits are not finite, and -2 where no token that is allowed has one.
        """
        check_rows(logits, self.head.rows)
        y, given, chosen = logits.clone(), (c_int64 * len(ids))(*ids), c_int64()
        words = np.zeros((len(y) + 31) // 32, np.uint32)
        if allowed is not None:
            words[: len(allowed)] = allowed[: len(words)]
        mask = None if allowed is None else words.ctypes.data
        how = byref(CSampling.of(settings))
        self._model.call("offramp_choose", how, given, len(ids), mask, y.data_ptr(), byref(chosen))
        return chosen.value

    def _call(self, name: str, rows: Tensor, start: int, stop: int, parts: Sequence[BlockInput], *what: int) -> None:
        """Call a function of the library with the rows (R, D) of all parts, one part after another."""
        check_rows(rows, self._norm.numel())
        texts = [text for _, state, step in parts for text in _session(state).rows(step.batch, step.first, step.tokens)]
        given = (CRows * len(texts))(*texts)
        self._model.call(name, start, stop, given, len(texts), *what, rows.data_ptr())

    def logits(self, h: Tensor, rows: Tensor | None = None) -> Tensor:
        if rows is not None:  # torch's operators, for gradients
            return self._scales.finish(F.linear(self.final(h), self.head.pick(rows).dense()))
        return self._read_out(None, h)

    def _read_out(self, sketch: CompiledPart | None, h: Tensor) -> Tensor:
        rows = _rows(h).contiguous()
        check_rows(rows, self._norm.numel())
        out = torch.empty(len(rows), self.head.rows, dtype=torch.float32)
        self._model.call("offramp_logits", sketch and sketch.pointer, rows.data_ptr(), len(rows), out.data_ptr())
        return out.view(*h.shape[:-1], self.head.rows)

    def head_of(self, rows: Tensor) -> Callable[[Tensor], Tensor]:
        """`Runtime.head_of`, without gradients. It picks the tokens' weights once."""
        product = self._product_with(self.head.pick(rows))

        def logits(h: Tensor) -> Tensor:
            return self._scales.finish(product(self.final(_rows(h)))).view(*h.shape[:-1], len(rows))

        return logits

    def sketched(self, reduce: Tensor, expand: Tensor, candidates: int) -> Callable[[Tensor], Tensor]:
        return partial(self._read_out, self.sketch(reduce, expand, candidates))

    def sketch(self, reduce: Tensor, expand: Tensor, candidates: int) -> CompiledPart:
        """A sketch of the head, as for `sketched`. Raises `ValueError` for maps that do not fit."""
        first, second = self._sketch(reduce, expand)
        sketch = CompiledPart("sketch", reduce=first, expand=Fine(second), candidates=candidates)
        self.check(sketch)
        return sketch

    def _sketch(self, reduce: Tensor, expand: Tensor) -> tuple[Weight, Weight]:
        """A sketch's two weights, in the head's format, made once. Raises `ValueError` for maps that do not fit."""
        if expand not in self._sketches:
            # The sketch is kept about as precisely as the head.
            kind = beside(self.head)
            if reduce.shape != expand.T.shape or (kind is not Weight and len(reduce) % GROUP):
                raise ValueError(f"maps of {tuple(reduce.shape)} and {tuple(expand.shape)} make no sketch of this head")
            size = self.head.rows
            pieces = []
            for first in range(0, size, SLICE):
                product = self.head.pick(slice(first, min(size, first + SLICE))).dense() @ expand
                pieces.append(kind.tensors(product.to(self.head.w.dtype) if kind is Weight else product))
            tensors = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
            self._sketches[expand] = Weight.of(reduce.float()), kind(kind.packed(tensors))
        made: tuple[Weight, Weight] = self._sketches[expand]
        return made

    def product_of(self, layer: nn.Linear) -> Callable[[Tensor], Tensor]:
        """A function x (n, K) → (n, N) that multiplies with a linear layer's weights, kept in bfloat16 unless the blocks'
        are float32.
        """
        dtype = torch.float32 if self.bits == 32 else torch.bfloat16
        bias = None if layer.bias is None else layer.bias.detach()
        return self._product_with(Weight({"w": layer.weight.detach().to(dtype)}, bias))

    def _product_with(self, weight: Weight) -> Callable[[Tensor], Tensor]:
        """A function x (n, K) → (n, N) that multiplies with this weight in compiled code. It keeps the weight alive."""
        handle, model = handle_of(weight), self._model
        return lambda x, _alive=weight: model.product(handle, x.contiguous())  # type: ignore[misc]

    def final(self, h: Tensor) -> Tensor:
        """`Runtime.final`, by torch's operators, for gradients."""
        h = h.float()
        length: Tensor = torch.linalg.vector_norm(h, dim=-1, keepdim=True).hypot(self._floor)
        return h * self._scaled / length

    def head_weight(self) -> Tensor:
        return self.head.dense()

    def block_bytes(self, index: int) -> int:
        return sum(weight.nbytes for weight in self.blocks[index].weights)

    def head_bytes(self) -> int:
        return self.head.nbytes

    def filled(self, block: nn.Module) -> nn.Module:
        """A copy of one of the library's blocks, with the weights that this runtime runs with."""
        changed = {id(module): weight for module, weight in self.changed}
        copied, multiplies = copy.deepcopy(block), self.bits < 32 and multiplies_bfloat16()
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

    @contextmanager
    def exact(self) -> Iterator[None]:
        """`Runtime.exact`: all rows are fine, and keys and values float32."""
        kept = self._model, self.kept_dtype
        blocks = [[part and part.exact() for part in block.parts] for block in self.blocks]
        self._model = self._made(self.ends.exact(), blocks)
        self.kept_dtype = torch.float32
        try:
            yield
        finally:
            self._model, self.kept_dtype = kept


def _block(ends: CompiledPart, *shape: Any) -> Block:
    """A block. What does not fit is refused here, before the next one is converted."""
    block = Block(*shape)
    Model(ends, [block.parts])
    return block


def _rows(h: Tensor) -> Tensor:
    """Hidden states (B, T, D) as float32 rows (R, D)."""
    return h.float().reshape(-1, h.shape[-1])


def _session(state: AnyState) -> Session:
    if not isinstance(state, Session):
        raise ValueError("this text was begun on the library's blocks")
    return state
