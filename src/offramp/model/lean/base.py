"""What the lean paths of all kinds of block share: weights in one format, the final norm and head, and two engines.

There are two engines. `native` runs where there is a C compiler. `torch` uses torch's operators; it also runs on GPUs, and
`native` is tested against it. `selfcheck.check` compares both with the library's own logits.

Shapes: B batch, T tokens of this call, D hidden size, R = B · T rows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from offramp.errors import UnsupportedModel
from offramp.model.checkpoint import Values
from offramp.model.lean.native import Native, library
from offramp.model.lean.steps import Ask, Asked, DrafterParts, GateParts, Gates, Steps
from offramp.model.lean.structures import CDrafter, CHead, CSketch, CWeight, address
from offramp.model.lean.weights import FORMATS, GROUP, Int4, Int8, Weight, multiplies_bfloat16
from offramp.model.modules import Modules
from offramp.model.runtime import Part, Step, joined, read_out_likeliest
from offramp.model.state import State
from offramp.model.store import Built, Get, Store, Tensors


class RMSNorm:
    """x / √(mean x² + eps) · weight, over the last dim."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps = weight, eps
        self._scaled = self.weight * math.sqrt(len(weight))
        self._floor = torch.tensor(math.sqrt(len(weight) * self.eps), device=weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot(self._floor)
        return x * self._scaled / length


SLICE = 4096  # rows of a head that are in float32 at once

Changed = list[tuple[Any, Callable[[], Tensor]]]  # library's modules, each with the weight that this format gives it


class Maker:
    """Makes what one part of a model (a block, or the two ends) keeps: matrices in a format, and vectors in float32.

    What is kept already comes from the `Store`, and then the library's weights are not read. Where integers take the place
    of weights, `changed` gets the library's module and what its weight would have to be.
    """

    def __init__(self, get: Get, values: Values, weight_format: str, changed: Changed) -> None:
        self._get, self._values, self._changed = get, values, changed
        self._format = FORMATS[weight_format]

    def matrix(self, key: str, layers: list[nn.Linear], order: Tensor | None = None, head: bool = False) -> Weight:
        """One weight of several stacked linear layers, with its rows in a given order."""
        kind = self._format.head if head else self._format.blocks
        tensors = dict(self._get(key, lambda: self._stacked(kind, layers, order)))
        weight = kind(tensors, tensors.pop("bias", None))
        if self._format.quantised:
            places = None if order is None else order.argsort().to(weight.w.device)
            first = 0
            for layer in layers:
                rows = slice(first, first + layer.out_features)
                self._changed.append((layer, partial(_rows_of, weight, rows if places is None else places[rows])))
                first += layer.out_features
        return weight

    def vector(self, key: str, parameter: Tensor, change: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        """A small tensor in float32, after a change."""
        loaded = self._format.loaded

        def make() -> Tensors:
            value = change(self._values.whole(parameter, loaded).float())
            return {"": value.clone(memory_format=torch.contiguous_format)}

        return self._get(key, make)[""]

    def norm(self, key: str, norm: Any, order: Tensor | None = None) -> RMSNorm:
        """A norm whose weight is in a given order."""
        weight = self.vector(key, norm.weight, lambda x: x if order is None else x[order])
        return RMSNorm(weight, norm.variance_epsilon)

    def embedding(self, embedding: nn.Embedding) -> Tensor:
        """The embedding, (V, D), in bfloat16 unless the format is float32."""
        dtype = torch.float32 if self._format == FORMATS["float32"] else torch.bfloat16
        weight = self._get("embedding", lambda: {"": self._values.whole(embedding.weight, dtype).contiguous()})[""]
        if self._format.quantised:
            self._changed.append((embedding, weight.float))
        return weight

    def _stacked(self, kind: type[Weight], layers: list[nn.Linear], order: Tensor | None) -> Tensors:
        """What `kind` keeps of the layers' weights. Few rows at a time are read and converted."""
        rows = sum(layer.out_features for layer in layers)
        places = torch.arange(rows) if order is None else order.argsort()
        out: Tensors = {}
        first = 0
        for layer in layers:
            for start, stop, piece in self._values.pieces(layer.weight):
                for name, part in kind.tensors(piece.to(self._format.loaded)).items():
                    if name not in out:
                        out[name] = part.new_empty(rows, *part.shape[1:])
                    out[name][places[first + start : first + stop]] = part
            first += layer.out_features
        out = kind.packed(out)
        if layers[0].bias is not None:
            bias = torch.cat([self._values.whole(layer.bias, self._format.loaded).float() for layer in layers])
            out["bias"] = bias if order is None else bias[order]
        return out


def _rows_of(weight: Weight, rows: slice | Tensor) -> Tensor:
    return weight.pick(rows).dense()


@dataclass
class LeanStep(Step):
    """`sequences` (R,): the sequence of each row. `real` (B, T) is False for padding, which no Mamba state takes in."""

    sequences: Tensor
    real: Tensor | None


class Lean:
    """The `Runtime` that has a whole model on the lean path: its blocks, final norm and head, in one weight format.

    A subclass makes `blocks` and `_native`, and implements `_step`, `_memories` and `_call`.
    `Runtime` documents the methods. Hidden states are float32, and so are keys and values unless a
    subclass says otherwise.
    """

    blocks: Sequence[Any]  # each with its `weights`
    dtype = kept_dtype = torch.float32
    _native: Native | None = None

    def __init__(self, modules: Modules, weight_format: str, store: Store, values: Values) -> None:
        """Raises `ValueError` for weights that do not fit the format, one of `weights.FORMATS`."""
        self._modules, self.weight_format, self._store, self._values = modules, weight_format, store, values
        self._format = FORMATS[weight_format]
        self._device = store.device
        self._sketches = WeakTensorKeyDictionary()
        self.changed: Changed = []
        self.norm, self.head, self.embedding = self._part("ends", self._ends)

    def _ends(self, make: Maker) -> tuple[RMSNorm, Weight, Tensor]:
        """Final norm, head and embedding. A head that is the embedding is kept once, unless it becomes integers."""
        head = make.matrix("head", [self._modules.head], head=True)
        tied = self._modules.head.weight is self._modules.embedding.weight and not self._format.quantised
        return make.norm("norm", self._modules.norm), head, head.w if tied else make.embedding(self._modules.embedding)

    def _part(self, name: str, build: Callable[[Maker], Built]) -> Built:
        """What `build` makes of the tensors of one part of the model."""

        def with_maker(get: Get) -> tuple[Built, Changed]:
            changed: Changed = []
            return build(Maker(get, self._values, self.weight_format, changed)), changed

        built, changed = self._store.part(name, with_maker)
        self.changed += changed
        return built

    def embed(self, ids: Tensor, first: int | Tensor, mask: Tensor | None = None) -> tuple[Tensor, Step]:
        h = F.embedding(ids, self.embedding).float()
        batch, tokens = ids.shape
        return h, self._step(first, batch, tokens, mask)

    def step(self, h: Tensor, first: int) -> Step:
        batch, tokens = h.shape[:2]
        return self._step(first, batch, tokens)

    def _step(self, first: int | Tensor, batch: int, tokens: int, mask: Tensor | None = None) -> Step:
        """What the blocks share for `tokens` tokens of each sequence, at positions `first`, `first` + 1, …

        `first` (B,) gives each sequence its own first position. `mask` (B, T) is False for padding.
        """
        raise NotImplementedError

    def run_all(self, parts: Sequence[Part], start: int, stop: int) -> list[Tensor]:
        """`Runtime.run_all`, in one pass over the weights."""
        flat = [_rows(h) for h, _, _ in parts]
        rows = flat[0].clone(memory_format=torch.contiguous_format) if len(flat) == 1 else torch.cat(flat)
        if self._native and start < stop:
            self._call(self._native.run, rows, start, stop, parts)
        elif start < stop:
            for block, memories in self._with_memories(start, stop, parts):
                block(rows, memories)
        pieces = pieces_of(rows, [len(x) for x in flat])
        return [x.view(h.shape) for x, (h, _, _) in zip(pieces, parts, strict=True)]

    def remember_all(self, parts: Sequence[Part], start: int, stop: int) -> None:
        """`Runtime.remember_all`, in one pass over the weights."""
        rows = joined([_rows(h) for h, _, _ in parts]).contiguous()
        if start == stop:
            return
        if self._native:
            self._call(self._native.remember, rows, start, stop, parts)
        else:
            for block, memories in self._with_memories(start, stop, parts):
                block.remember(rows, memories)

    def _with_memories(self, start: int, stop: int, parts: Sequence[Part]) -> Iterator[tuple[Any, list[tuple[Any, Any]]]]:
        """Blocks `start` to `stop` - 1, each with what it remembers of each part, and the part's step."""
        memories = [self._memories(start, stop, state) for _, state, _ in parts]
        steps = [step for _, _, step in parts]
        for block, *own in zip(self.blocks[start:stop], *memories, strict=True):
            yield block, list(zip(own, steps, strict=True))

    def _memories(self, start: int, stop: int, state: State) -> Sequence[Any]:
        """What blocks `start` to `stop` - 1 remember in the state."""
        raise NotImplementedError

    def _call(self, native: Callable[..., int], rows: Tensor, start: int, stop: int, parts: Sequence[Part]) -> int:
        """Call `native`, the compiled `run` or `remember`, with the rows (R, D) of all parts, one part after another.

        First, the parts' memories get room for the new tokens. `run` changes the rows in place. Returns the number of
        blocks that ran; the others remember nothing of the tokens.
        """
        raise NotImplementedError

    def gates(self, blocks: Sequence[int], gates: Sequence[GateParts]) -> Gates | None:
        """Gates after so many blocks each, for `run_until`; None if they cannot be compiled."""
        compiled = Gates(blocks, gates) if self._native and gates else None
        return compiled if compiled and self._native and compiled.width <= self._native.room_for_gates else None

    def run_until(self, part: Part, start: int, asked: Asked) -> tuple[Tensor, int]:
        """Run one token from block `start` up to the first gate that is sure enough, or to the top.

        Returns its hidden state (1, 1, D) there, and the number of blocks before.
        """
        assert self._native
        rows = _rows(part[0]).clone(memory_format=torch.contiguous_format)
        run = self._call(partial(self._native.run, asked=asked), rows, start, len(self.blocks), [part])
        return rows[None], start + run

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
        """Decode one sequence greedily, in one call of the compiled path, from the token at `position` on."""
        raise NotImplementedError

    def ask(self, gates: Gates, index: int, h: Tensor) -> float:
        """The logit of one of the gates for a hidden state h (1, 1, D)."""
        assert self._native
        return self._native.ask(gates.compiled[index], h.float().contiguous())

    def logits(self, h: Tensor, rows: Tensor | None = None) -> Tensor:
        """Final norm and head: h (…, D) → (…, V), or of the tokens `rows` only. Gradients pass through with `rows`."""
        if rows is not None:
            return F.linear(self.norm(h.float()), self.head.pick(rows).dense())
        flat = _rows(h)
        out = self._native.logits(self._head, None, flat.contiguous()) if self._native else self.head(self.norm(flat))
        return out.view(*h.shape[:-1], self.head.rows)

    def head_of(self, rows: Tensor) -> Callable[[Tensor], Tensor]:
        """A function that gives the `logits` of the tokens `rows` only, without gradients. It picks their weights once."""
        product = self._product_with(self.head.pick(rows))

        def logits(h: Tensor) -> Tensor:
            return product(self.norm(_rows(h))).view(*h.shape[:-1], len(rows))

        return logits

    def sketched(self, reduce: Tensor, expand: Tensor, candidates: int) -> Callable[[Tensor], Tensor]:
        first, second = self._sketch(reduce, expand)
        native, sketch = self._native, self._compiled_sketch(reduce, expand, candidates)

        def logits(h: Tensor) -> Tensor:
            rows = _rows(h)
            if native:
                out = native.logits(self._head, sketch, rows.contiguous())
            else:
                x = self.norm(rows)
                out = read_out_likeliest(second(first(x)), candidates, x, lambda row, ids: self.head.pick(ids)(row))
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
        """A function x (n, K) → (n, N) that multiplies with this weight on the engine in use. It keeps the weight alive."""
        native, handle = self._native, CWeight.of(weight)
        return lambda x: native.product(handle, x.contiguous()) if native else weight(x)

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
        copied, multiplies = copy.deepcopy(block), self.weight_format != "float32" and multiplies_bfloat16(self._device)
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
                twin._parameters[name] = nn.Parameter(value.to(self._device), requires_grad=False)
        return copied

    def drop_spare_weights(self) -> None:
        for part in (*self._modules.blocks, self._modules.embedding, self._modules.norm, self._modules.head):
            part.to("meta")

    @property
    def engine(self) -> str:
        """What does the work: `native` or `torch`."""
        return "native" if self._native else "torch"

    @property
    def tolerance(self) -> float:
        """How far logits may be from the library's because products are rounded, as a share of the largest logit.

        float32: 1e-4. Integer weights: 1e-1, since rows are rounded to 8-bit integers (`native`) or to bfloat16 (`torch`).
        bfloat16: 1e-1, since the library rounds every result; that alone moves SmolLM2's logits by 4e-2.
        """
        return 1e-4 if self.head.w.dtype == torch.float32 else 1e-1

    def _compiles(self) -> bool:
        """Whether `native` can run: it needs a compiler, a CPU, and weights whose columns fill whole vectors."""
        weights = self._weights
        fits = all(weight.columns % (32 if isinstance(weight, Int4 | Int8) else 8) == 0 for weight in weights)
        return bool(fits and self._device.type == "cpu" and library())

    @property
    def _weights(self) -> list[Weight]:
        return [weight for block in self.blocks for weight in block.weights] + [self.head]

    @cached_property
    def _head(self) -> CHead:
        return CHead(CWeight.of(self.head, fine=True), address(self.norm.weight), self.norm.eps)

    @property
    def _columns(self) -> int:
        return max(weight.columns for weight in self._weights)


def _rows(h: Tensor) -> Tensor:
    """Hidden states (B, T, D) as float32 rows (R, D)."""
    return h.float().reshape(-1, h.shape[-1])


def pieces_of(rows: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    """The rows in pieces of these sizes."""
    return [rows] if len(sizes) == 1 else rows.split(sizes)


def numbered(steps: Sequence[LeanStep], padding: bool = False) -> Tensor:
    """The sequence of each row, (R,), numbered through over all steps. With `padding`, that of a padding row is -1."""
    firsts = accumulate((step.batch for step in steps), initial=0)
    found = []
    for step, first in zip(steps, firsts, strict=False):
        own = step.sequences + first if first else step.sequences
        found.append(own.masked_fill(~step.real.flatten(), -1) if padding and step.real is not None else own)
    return joined(found)
