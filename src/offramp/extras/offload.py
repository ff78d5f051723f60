"""The weights of a model that accelerate has spread: they are read where accelerate keeps them, without a run."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from itertools import chain

from torch import Tensor, nn

from offramp.errors import UnsupportedModel
from offramp.model.checkpoint import Values, kind_of, named_tensors
from offramp.model.hooks import offloading


def values_of(model: nn.Module) -> Values:
    """What reads the values of a model's tensors, some of which are on the meta device.

    Raises `UnsupportedModel` for one that no hook brings in.
    """
    offloaded = Offloaded(model)
    absent = [name for name, tensor in named_tensors(model).items() if tensor.is_meta]
    if missing := [name for name in absent if name not in offloaded.kept]:
        raise UnsupportedModel(
            f"The model lacks weights: {missing[0]} is on the meta device, and no hook of accelerate's brings it in.",
            'Load them with the model: from_pretrained(..., device_map="auto", offload_folder=...)',
        )
    return Values(model, lambda: offloaded)


class Offloaded:
    """A `Checkpoint` of what accelerate keeps for a model's hooks, and of the tensors that the model itself holds."""

    def __init__(self, model: nn.Module) -> None:
        self._held = named_tensors(model)
        self.kept: dict[str, tuple[Mapping[str, Tensor], str]] = {}  # name in the model → a hook's map, and the name there
        for path, module in model.named_modules():
            for hook in offloading(module):
                inside = bool(hook.place_submodules)
                for name, tensor in chain(module.named_parameters(recurse=inside), module.named_buffers(recurse=inside)):
                    if tensor.is_meta:
                        self.kept[f"{path}.{name}" if path else name] = hook.weights_map, name
        self._newest: tuple[str, Tensor] | None = None

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._held.items()}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._tensor(name)[start:stop]

    def entries(self, name: str, places: Tensor) -> Tensor:
        return self._tensor(name).flatten()[places]

    def kind(self, name: str) -> str:
        return kind_of(self._held[name])

    def _tensor(self, name: str) -> Tensor:
        """A whole tensor. The newest is kept, since it is asked for row by row."""
        if self._newest is None or self._newest[0] != name:
            self._newest = None
            weights, key = self.kept.get(name, (self._held, name))
            self._newest = name, weights[key].detach().cpu()
        return self._newest[1]
