"""The runtime that calls the library's own blocks, one range at a time, so that decoding can stop after any of them.

A row in `families` says how a model family differs: scales, masks, how keys and values come out of the projections. The
library's attention takes a `State` in place of its cache. Mamba blocks run with a mixer of our own (see `mamba`). Blocks
may run on several devices (see `offload`). A block's memory stays on its device. The tensors that these methods take and
return are on the device of the embedding.

Shapes: B batch, T tokens of this call, D hidden size, V vocabulary, N blocks, H key/value heads, P head dim.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.model.checkpoint import Values
from offramp.model.compiled.formats import FORMATS
from offramp.model.compiled.panels import PANELS
from offramp.model.compiled.weights import Weight
from offramp.model.families import Family
from offramp.model.headers import DTYPES
from offramp.model.hooks import brought_in
from offramp.model.mamba import remember, with_own_mixer
from offramp.model.modules import Modules
from offramp.model.runtime import AnyState, BlockInput, Step
from offramp.model.state import State


@dataclass
class LibraryStep(Step):
    """Positions (1, T), the library's rotary tables, and the attention masks made so far."""

    positions: Tensor
    rotary: Any = None
    masks: dict[tuple[int | None, int], Tensor | None] = field(default_factory=dict)


class LibraryBlocks:
    """The `Runtime` that calls the library's modules block by block. `Runtime` documents the methods.

    The library's model stays as it is.
    """

    engine = "library blocks"

    def __init__(self, modules: Modules, family: Family, config: Any) -> None:
        self._modules, self._family, self._config, self._scales = modules, family, config, family.scales(config)
        self._multipliers = [family.multipliers(block) for block in modules.blocks]
        self.dtype = self.kept_dtype = modules.head.weight.dtype
        self.weight_format = str(self.dtype).removeprefix("torch.")
        name = family.mixer or ""
        self._blocks = [
            block if mixer is None else with_own_mixer(block, name)
            for block, mixer in zip(modules.blocks, modules.mixers, strict=True)
        ]
        self._takes_use_cache = ["use_cache" in inspect.signature(type(block).forward).parameters for block in self._blocks]

    @property
    def bits(self) -> float:
        return float(8 * self.dtype.itemsize)

    @contextmanager
    def exact(self) -> Iterator[None]:
        kept = self.dtype, self.weight_format
        self.dtype, self.weight_format = torch.float32, "float32"
        try:
            yield
        finally:
            self.dtype, self.weight_format = kept

    def state(self, capacity: int) -> State:
        return State(self._modules.kinds, capacity)

    def embed(self, ids: Tensor, first: int) -> tuple[Tensor, Step]:
        h = self._modules.embedding(ids)
        if self._scales.embedding != 1.0:
            h = h * self._scales.embedding
        step = self.step(h, first)
        if self._modules.positions is not None:
            h = h + self._modules.positions(step.positions).to(h.device)
        return h, step

    def step(self, h: Tensor, first: int) -> LibraryStep:
        batch, tokens = h.shape[:2]
        positions = torch.arange(first, first + tokens, device=h.device)[None]
        rotary = self._modules.rotary
        if rotary is None:
            return LibraryStep(batch, tokens, first, positions)
        if self._family.rotary_per_kind:
            tables = {kind: rotary(h, positions, kind) for kind in set(self._modules.layer_types)}
            return LibraryStep(batch, tokens, first, positions, tables)
        return LibraryStep(batch, tokens, first, positions, rotary(h, positions))

    def run_all(self, parts: Sequence[BlockInput], start: int, stop: int) -> list[Tensor]:
        return [self._run(h, start, stop, state, step) for h, state, step in parts]

    def _run(self, h: Tensor, start: int, stop: int, state: AnyState, step: Step) -> Tensor:
        assert isinstance(step, LibraryStep)
        device = h.device
        for index in range(start, stop):
            attends = self._modules.attention[index] is not None
            kwargs: dict[str, Any] = {
                "attention_mask": self._mask(index, state.length(index), step, h.dtype) if attends else None,
                "position_ids": step.positions,
                self._family.cache_kwarg: state,
            }
            if self._takes_use_cache[index]:
                kwargs["use_cache"] = True
            if step.rotary is not None:
                kwargs["position_embeddings"] = self._tables(index, step)
            out = self._blocks[index](h, **kwargs)
            h = out[0] if isinstance(out, tuple) else out
        return h.to(device)

    def remember_all(self, parts: Sequence[BlockInput], start: int, stop: int) -> None:
        for h, state, step in parts:
            for index in range(start, stop):
                self.remember_keys(h, index, state, step)
                self.remember_state(h, index, state)

    def remember_keys(self, h: Tensor, index: int, state: AnyState, step: Step) -> None:
        attention = self._modules.attention[index]
        if attention is None:
            return
        assert isinstance(step, LibraryStep)
        with brought_in(self._modules.blocks[index]), brought_in(attention):
            of = self._multipliers[index]
            keys, values = self._family.keys_values(attention, self._normed(h, index) * of.attention_in)
            keys = keys * of.keys
        if step.rotary is not None and getattr(attention, "use_rope", True):
            rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
            keys, _ = rotate(keys, keys, *(table.to(keys.device) for table in self._tables(index, step)))
        cast(State, state).update(keys, values, index)

    def remember_state(self, h: Tensor, index: int, state: AnyState) -> None:
        memory = cast(State, state).ssm[index]
        if memory is not None:
            with brought_in(self._modules.blocks[index]):
                remember(self._modules.mixers[index], self._normed(h, index), memory)

    def _normed(self, h: Tensor, index: int) -> Tensor:
        name = self._family.norms[0]
        normed: Tensor = getattr(self._blocks[index], name)(h.to(self.dtype)) if name else h
        return normed

    def logits(self, h: Tensor, rows: Tensor | None = None) -> Tensor:
        if rows is not None:
            return self.head_of(rows)(h)
        out: Tensor = self._modules.head(self._ready(h))
        return self._scales.finish(out.to(h.device)).float()

    def head_of(self, rows: Tensor) -> Callable[[Tensor], Tensor]:
        weight = self._head_rows(rows)
        return lambda h: self._scales.finish(F.linear(self._ready(h), weight.to(h.device))).float()

    def sketched(self, reduce: Tensor, expand: Tensor, candidates: int) -> Callable[[Tensor], Tensor]:
        sketch = self.head_weight().to(expand.device) @ expand

        def logits(h: Tensor) -> Tensor:
            x = self.final(h).reshape(-1, h.shape[-1])
            estimates, rows = F.linear(x @ reduce.T, sketch), x.to(self.dtype)
            out = torch.full_like(estimates, float("-inf"))
            for row, ids in enumerate(estimates.topk(candidates, dim=-1, sorted=False).indices):
                raw = F.linear(rows[row : row + 1], self._head_rows(ids).to(rows.device))[0]
                out[row, ids] = self._scales.finish(raw).float()
            return out.view(*h.shape[:-1], len(sketch))

        return logits

    def final(self, h: Tensor) -> Tensor:
        normed: Tensor = self._modules.norm(h).to(h.device)
        return normed.float()

    def head_weight(self) -> Tensor:
        with brought_in(self._modules.head):
            weight: Tensor = self._modules.head.weight.detach()
        return weight.float()

    def _ready(self, h: Tensor) -> Tensor:
        """The head's input: the final norm of h (some Mamba models keep the residual stream in float32)."""
        normed: Tensor = self._modules.norm(h).to(h.device, self.dtype)
        return normed

    def _head_rows(self, rows: Tensor) -> Tensor:
        with brought_in(self._modules.head):
            weight: Tensor = self._modules.head.weight[rows.to(self._modules.head.weight.device)]
        return weight

    def block_bytes(self, index: int) -> int:
        return stored_bytes(self._modules.blocks[index], self.dtype.itemsize, active_experts(self._config))

    def head_bytes(self) -> int:
        rows, columns = self._modules.head.weight.shape
        return Weight.bytes_of(rows, columns, self.dtype.itemsize)

    def drop_spare_weights(self) -> None:
        pass  # every weight is in use

    def _tables(self, index: int, step: LibraryStep) -> Any:
        return step.rotary[self._modules.layer_types[index]] if self._family.rotary_per_kind else step.rotary

    def _mask(self, index: int, past: int, step: LibraryStep, dtype: torch.dtype) -> Tensor | None:
        key = (self._modules.windows[index], past)
        if key not in step.masks:
            step.masks[key] = self._make_mask(*key, step, dtype)
        return step.masks[key]

    def _make_mask(self, window: int | None, past: int, step: LibraryStep, dtype: torch.dtype) -> Tensor | None:
        """Which of `past` remembered tokens and the T new ones each new token may see: (1, 1, T, past + T).

        Returns None where the attention function needs no mask: for one token that sees everything, and with SDPA for T
        tokens that have nothing before them.
        """
        tokens, device = step.tokens, step.positions.device
        everything = window is None or past + tokens <= window
        if everything and (tokens == 1 or (past == 0 and self._family.implementation == "sdpa")):
            return None
        queries = torch.arange(past, past + tokens, device=device)[:, None]
        keys = torch.arange(past + tokens, device=device)[None, :]
        sees = keys <= queries
        if window is not None:
            sees &= keys > queries - window
        return self.as_mask(sees, dtype)

    def as_mask(self, sees: Tensor, dtype: torch.dtype) -> Tensor:
        """Which keys each token sees, (T, keys), as the library's attention takes it, beside hidden states of this dtype.

        For SDPA, True means "sees". The eager function adds the mask to the scores.
        """
        if self._family.implementation == "sdpa":
            return sees[None, None]
        return torch.where(sees, 0.0, torch.finfo(dtype).min).to(dtype)[None, None]


class Outline(LibraryBlocks):
    """A model's shape without weights, which cannot run. Its sizes in bytes are those that compiled blocks would have.

    `values` tell the types of its file's tensors.
    """

    def __init__(self, modules: Modules, family: Family, config: Any, weight_format: str, values: Values) -> None:
        super().__init__(modules, family, config)
        self.weight_format, self._format, self._values = weight_format, FORMATS[weight_format], values
        self.dtype = torch.float32  # as in compiled blocks: hidden states, keys and values

    @property
    def bits(self) -> float:
        parameters = chain.from_iterable(block.parameters() for block in self._modules.blocks)
        matrices = [parameter for parameter in parameters if parameter.ndim == 2]
        head, kinds = self._modules.head.weight, self._format
        size = self._bytes_of(head, kinds.head) + sum(self._bytes_of(matrix, kinds.blocks) for matrix in matrices)
        return float(8 * size / (head.numel() + sum(matrix.numel() for matrix in matrices)))

    def block_bytes(self, index: int) -> int:
        parameters = list(self._modules.blocks[index].parameters())
        matrices = [self._bytes_of(parameter, self._format.blocks) for parameter in parameters if parameter.ndim == 2]
        others = sum(parameter.numel() for parameter in parameters if parameter.ndim != 2)
        return sum(matrices) + others * self._format.loaded.itemsize

    def head_bytes(self) -> int:
        return self._bytes_of(self._modules.head.weight, self._format.head)

    def _bytes_of(self, matrix: Tensor, kind: type[Weight] | None) -> int:
        itemsize = self._format.loaded.itemsize
        if kind is None:
            held = self._values.kind(matrix)
            kind, itemsize = PANELS.get(held, Weight), DTYPES.get(held, torch.float32).itemsize
        rows, columns = matrix.shape
        return kind.bytes_of(rows, columns, itemsize)


def active_experts(config: Any) -> float:
    """The share of a block's experts that one token is sent to; 1 for a model without experts."""
    routed = getattr(config, "num_experts_per_tok", None)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    return routed / experts if routed and experts else 1.0


def stored_bytes(block: nn.Module, itemsize: int, active: float) -> int:
    """Bytes of the parameters that one token reads; times `active` for stacked experts."""
    parameters = block.named_parameters()
    entries = (part.numel() * (active if part.ndim == 3 and "conv" not in name else 1) for name, part in parameters)
    return round(sum(entries)) * itemsize
