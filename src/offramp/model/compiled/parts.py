"""Makes what compiled blocks are made of: weights in one format, and vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import UnsupportedModel
from offramp.model.checkpoint import Values
from offramp.model.compiled.formats import FORMATS, FROM_FLOATS, Finer, Int4
from offramp.model.compiled.library import Fine
from offramp.model.compiled.panels import PANELS
from offramp.model.compiled.rounding import Inputs, LayerInput, inputs_of, lies_on_grids
from offramp.model.compiled.weights import Stack, Weight
from offramp.model.headers import DTYPES
from offramp.model.store import Get, Tensors

COARSE = 0.02  # rows are rounded to 16 bits where 8 would lose more than this share of a layer's output
Moments = Mapping[nn.Module, Callable[[], Inputs]]  # what a short text shows that each linear layer of a part gets
Changed = list[tuple[Any, Callable[[], Tensor]]]  # library's modules, each with the weight that this format gives it


class Maker:
    """Makes what one part of a model (a block, or the two ends) keeps: matrices in a format, and vectors in float32.

    What is kept already comes from the `Store`, and then the library's weights are not read. Where integers take the place
    of weights, `changed` gets the library's module and what its weight would have to be. `inputs`: what a short text shows
    that linear layers get, where that is known; `moments` finds more, which is asked for when weights are rounded.
    `norm_offset`: what norms add to their weights.
    """

    def __init__(
        self,
        get: Get,
        values: Values,
        weight_format: str,
        changed: Changed,
        inputs: Mapping[nn.Module, LayerInput],
        moments: Callable[[], Moments],
        norm_offset: float = 0.0,
    ) -> None:
        self._norm_offset = norm_offset
        self._get, self._values, self._changed = get, values, changed
        self._inputs, self._moments = inputs, cache(moments)
        self._format = FORMATS[weight_format]

    def matrix(
        self,
        key: str,
        layers: list[nn.Linear],
        order: Tensor | None = None,
        head: bool = False,
        careful: Sequence[nn.Linear] = (),
    ) -> Weight:
        """One weight of several stacked linear layers, with its rows in a given order.

        The order leaves each layer's rows among its own. Layers to be `careful` with get 8 bits where others get 4.
        """
        kind = self._format.head if head else self._format.blocks
        if kind is None or (kind is Int4 and careful):
            weight = self._of_types(key, layers, order, careful)
        else:
            tensors = dict(self._get(key, lambda: self._stacked(kind, layers, order)))
            weight = kind(tensors, tensors.pop("bias", None))
        if kind is not None and self._format.quantised:
            places = None if order is None else order.argsort()
            first = 0
            for layer in layers:
                rows = slice(first, first + layer.out_features)
                self._changed.append((layer, partial(_rows_of, weight, rows if places is None else places[rows])))
                first += layer.out_features
        return weight

    def _of_types(
        self,
        key: str,
        layers: list[nn.Linear],
        order: Tensor | None,
        careful: Sequence[nn.Linear] = (),
    ) -> Weight:
        """One weight of stacked layers, each in a type of its own: that of the file, or 4 bits, or 8."""
        kinds = self._kinds(key, layers, careful)
        runs = [list(run) for _, run in groupby(range(len(layers)), kinds.__getitem__)]
        pieces, first = [], 0
        for number, run in enumerate(runs):
            own = [layers[i] for i in run]
            rows = sum(layer.out_features for layer in own)
            inner = None if order is None else order[first : first + rows] - first
            tensors = dict(self._get(f"{key}.{number}", partial(self._typed, kinds[run[0]], own, inner)))
            bias = tensors.pop("bias", None)
            pieces.append(PANELS.get(kinds[run[0]], Weight)(tensors, bias))
            first += rows
        return pieces[0] if len(pieces) == 1 else Stack(pieces)

    def _kinds(self, key: str, layers: list[nn.Linear], careful: Sequence[nn.Linear]) -> list[str]:
        """The types of the layers' weights. The store keeps them, as bytes. Raises `UnsupportedModel`."""

        def kind_of(layer: nn.Linear) -> str:
            if self._format.blocks is None:
                return self._values.kind(layer.weight)
            pieces = self._values.pieces(layer.weight)
            fits = layer not in careful or all(lies_on_grids(piece.to(self._format.loaded)) for _, _, piece in pieces)
            return Int4.kind if fits else Finer.kind

        def find() -> Tensors:
            kinds = [kind_of(layer) for layer in layers]
            for kind in kinds:
                if kind not in PANELS and kind not in DTYPES:
                    raise UnsupportedModel(
                        f"The file has weights of the type {kind}, which offramp cannot run as they are.",
                        "Choose --dtype bfloat16, or a file in another type.",
                    )
            return {"": torch.tensor(list(" ".join(kinds).encode()), dtype=torch.uint8)}

        return bytes(self._get(f"{key}.types", find)[""].tolist()).decode().split()

    def _typed(self, kind: str, layers: list[nn.Linear], order: Tensor | None) -> Tensors:
        """What the store keeps of layers whose weights get this type, or have it in the file."""
        if self._format.blocks is not None:
            return self._stacked(FROM_FLOATS[kind], layers, order)
        if kind not in PANELS:
            return self._stacked(Weight, layers, order, DTYPES[kind])
        blocks = torch.cat(
            [self._values.blocks(layer.weight, *rows) for layer in layers for rows in self._values.slices(layer.weight)]
        )
        return PANELS[kind].packed({"blocks": blocks if order is None else blocks[order]}) | self._bias(layers, order)

    def product(self, key: str, layers: list[nn.Linear]) -> Weight | Fine:
        """As `matrix`, but fine where 8 bits cannot hold what one of the layers gets."""
        weight = self.matrix(key, layers)
        coarse = any(self._inputs[layer].lost8 > COARSE for layer in layers if layer in self._inputs)
        return Fine(weight) if coarse else weight

    def vector(self, key: str, parameter: Tensor, change: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        """A small tensor in float32, after a change."""
        loaded = self._format.loaded

        def make() -> Tensors:
            value = change(self._values.whole(parameter, loaded).float())
            return {"": value.clone(memory_format=torch.contiguous_format)}

        return self._get(key, make)[""]

    def small(self, key: str, layer: nn.Linear) -> Weight:
        """A weight of few columns, in the dtype that weights are loaded in unless the format is a file's."""
        if self._format.blocks is None:
            return self._of_types(key, [layer], None)
        tensors = dict(self._get(key, lambda: self._stacked(Weight, [layer], None)))
        return Weight(tensors, tensors.pop("bias", None))

    def rounded(self, numbers: Tensor) -> Tensor:
        """Numbers that are no weights, rounded to the dtype that weights are loaded in, as the library has them."""
        return numbers.to(self._format.loaded).float()

    def norm(self, key: str, norm: Any, order: Tensor | None = None, factor: float = 1.0) -> tuple[Tensor, float]:
        """An RMS norm's weight, in a given order and times a factor, and its eps."""
        eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon

        def change(x: Tensor) -> Tensor:
            return (x if order is None else x[order]).add(self._norm_offset) * factor

        return self.vector(key, norm.weight, change), eps

    def embedding(self, embedding: nn.Embedding) -> Weight:
        """The embedding (V, D): in bfloat16 unless the format is float32, or as in its file."""
        if self._format.blocks is None:
            return self._of_types("embedding", [_as_layer(embedding)], None)
        dtype = torch.float32 if self._format == FORMATS["float32"] else torch.bfloat16
        weight = Weight({"w": self._get("embedding", lambda: {"": self._values.whole(embedding.weight, dtype)})[""]})
        if self._format.quantised:
            self._changed.append((embedding, weight.dense))
        return weight

    def _stacked(
        self, kind: type[Weight], layers: list[nn.Linear], order: Tensor | None, dtype: torch.dtype | None = None
    ) -> Tensors:
        """What `kind` keeps of the layers' weights, which are read in a dtype. Few rows at a time are converted."""
        rows = sum(layer.out_features for layer in layers)
        places = torch.arange(rows) if order is None else order.argsort()
        known = self._known(layers[0]) if kind is not Weight else None
        out: Tensors = {}
        first = 0
        for layer in layers:
            for start, stop, piece in self._values.pieces(layer.weight):
                for name, part in kind.tensors(piece.to(dtype or self._format.loaded), known).items():
                    if name not in out:
                        out[name] = part.new_empty(rows, *part.shape[1:])
                    out[name][places[first + start : first + stop]] = part
            first += layer.out_features
        return kind.packed(out) | self._bias(layers, order)

    def _known(self, layer: nn.Module) -> Inputs | None:
        """What is known of a layer's inputs. Layers that are stacked share them."""
        moments = self._moments()
        if layer in moments:
            return moments[layer]()
        return inputs_of(self._inputs[layer].power) if layer in self._inputs else None

    def _bias(self, layers: list[nn.Linear], order: Tensor | None) -> Tensors:
        """The layers' biases in one, if they have some."""
        if layers[0].bias is None:
            return {}
        bias = torch.cat([self._values.whole(layer.bias, self._format.loaded).float() for layer in layers])
        return {"bias": bias if order is None else bias[order]}


def _as_layer(embedding: nn.Embedding) -> Any:
    """An embedding as a linear layer that has its weight."""
    return SimpleNamespace(weight=embedding.weight, out_features=embedding.num_embeddings, bias=None)


def _rows_of(weight: Weight, rows: slice | Tensor) -> Tensor:
    return weight.pick(rows).dense()
