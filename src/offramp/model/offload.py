"""A library's model that accelerate has spread: over devices, the memory of the processor, and the disk.

Accelerate puts a hook on each module that has weights. Before the module runs, its hook moves the inputs to where it runs,
and brings in weights that are kept elsewhere. Afterwards the hook lets them go: they are on the meta device again. A hook
sees only calls of its module. This file serves code of ours that reads a weight without calling its module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import UnsupportedModel
from offramp.model.checkpoint import Values, named_tensors

Hook = Any  # accelerate's ModelHook


def brought_in(module: nn.Module) -> AbstractContextManager[None]:
    """While the context is open, a module's weights are where the module runs. Without a hook they always are."""
    hook = module.__dict__.get("_hf_hook")
    return nullcontext() if hook is None else _open(module, hook)


@contextmanager
def _open(module: nn.Module, hook: Hook) -> Iterator[None]:
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def share_hook(copied: nn.Module, module: nn.Module) -> None:
    """Let a copy of a module do what the module's hook does. Its function in the copy would run the module itself."""
    hook, forward = module.__dict__.get("_hf_hook"), type(module).forward
    if hook is None:
        return

    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = hook.pre_forward(module, *args, **kwargs)
        return hook.post_forward(module, forward(copied, *args, **kwargs))

    copied.forward = call


def device_of(module: nn.Module) -> torch.device:
    """The device that a module with a weight runs on."""
    named = [hook.execution_device for hook in _hooks(module) if getattr(hook, "execution_device", None) is not None]
    weight: Any = module.weight
    return torch.device(named[-1]) if named else weight.device


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate brings in weights of this model only when they are needed."""
    return any(_offloading(module) for module in model.modules())


def values_of(model: nn.Module) -> Values:
    """What reads the values of a model's tensors, wherever accelerate keeps them.

    Raises `UnsupportedModel` for a tensor on the meta device that no hook brings in.
    """
    absent = [name for name, tensor in named_tensors(model).items() if tensor.is_meta]
    if not absent:
        return Values()
    offloaded = Offloaded(model)
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
            for hook in _offloading(module):
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

    def _tensor(self, name: str) -> Tensor:
        """A whole tensor. The newest is kept, since it is asked for row by row."""
        if self._newest is None or self._newest[0] != name:
            self._newest = None
            weights, key = self.kept.get(name, (self._held, name))
            self._newest = name, weights[key].detach().cpu()
        return self._newest[1]


def _hooks(module: nn.Module) -> list[Hook]:
    """The module's hooks, in the order in which they run before it."""
    hook = module.__dict__.get("_hf_hook")
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def _offloading(module: nn.Module) -> list[Hook]:
    return [hook for hook in _hooks(module) if getattr(hook, "offload", False) and hook.weights_map is not None]
