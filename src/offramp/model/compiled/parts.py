"""Makes what compiled blocks are made of: weights in one format, and vectors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from offramp.model.checkpoint import Values
from offramp.model.compiled.weights import FORMATS, Weight
from offramp.model.store import Get, Tensors

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
            places = None if order is None else order.argsort()
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

    def norm(self, key: str, norm: Any, order: Tensor | None = None) -> tuple[Tensor, float]:
        """An RMS norm's weight, in a given order, and its eps."""
        return self.vector(key, norm.weight, lambda x: x if order is None else x[order]), norm.variance_epsilon

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
