"""The hooks that accelerate puts on the modules of a model that it has spread over devices, memory, and the disk.

Before a module runs, its hook moves the inputs to where it runs, and brings in weights that are kept elsewhere. Afterwards
the hook lets them go: they are on the meta device again. A hook sees only calls of its module. This file serves code of
ours that reads a weight without calling its module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

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


def offloading(module: nn.Module) -> list[Hook]:
    """The module's hooks that bring in weights."""
    return [hook for hook in _hooks(module) if getattr(hook, "offload", False) and hook.weights_map is not None]


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate brings in weights of this model only when they are needed."""
    return any(offloading(module) for module in model.modules())


def _hooks(module: nn.Module) -> list[Hook]:
    """The module's hooks, in the order in which they run before it."""
    hook = module.__dict__.get("_hf_hook")
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))
