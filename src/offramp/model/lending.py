"""Runs of the library's model in float32, with weights that are lent to it one block at a time.

So a model on the meta device, whose weights are on the disk, runs in little memory, and one in memory in bfloat16 runs in
float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import BadNumbers
from offramp.model.backbone import Backbone
from offramp.model.checkpoint import Values

CHUNK = 16  # tokens that a Mamba-2 mixer of the library takes at once: its memory grows with their square


@dataclass(frozen=True)
class Lender:
    """Lends weights to a library's model.

    `weight` gives the value of a parameter: it takes the module, the parameter's name there, and the parameter itself.
    `returned` is called after each part of the model has run, with the number of parts that have run and of all parts.
    """

    weight: Callable[[nn.Module, str, Tensor], Tensor] = lambda module, name, parameter: parameter.detach()
    returned: Callable[[int, int], None] = lambda count, total: None


OWN = Lender()  # lends a model in memory its own weights


def lender_of(
    values: Values,
    changed: Mapping[nn.Module, Callable[[], Tensor]],
    returned: Callable[[int, int], None] = lambda count, total: None,
) -> Lender:
    """Lends a checkpoint's values, but to `changed` modules another weight."""

    def weight(module: nn.Module, name: str, parameter: Tensor) -> Tensor:
        if name == "weight" and module in changed:
            return changed[module]()
        return values.whole(parameter, parameter.dtype)

    return Lender(weight, returned)


@contextmanager
def lent(backbone: Backbone, lender: Lender) -> Iterator[None]:
    """While the context is open, the library's model is in float32, and each part has its weights only while it runs."""
    modules = backbone.modules
    parts = [modules.embedding, *modules.blocks, modules.norm, modules.head]
    own = {module: dict(module.named_parameters(recurse=False)) for module in backbone.model.modules()}
    shape = {each: _frozen(torch.empty(each.shape, device="meta")) for each in backbone.model.parameters()}
    shapes = {module: {name: shape[each] for name, each in parameters.items()} for module, parameters in own.items()}
    returned = 0

    def lend(module: nn.Module) -> None:
        for name, parameter in own.get(module, {}).items():
            value = lender.weight(module, name, parameter)
            module._parameters[name] = _frozen(value.to(backbone.device, torch.float32))

    def before(part: nn.Module, _: Any) -> None:
        for module in part.modules():
            lend(module)

    def after(part: nn.Module, *_: Any) -> None:
        nonlocal returned
        for module in part.modules():
            module._parameters |= shapes.get(module, {})
        returned += 1
        lender.returned(returned, len(parts))

    hooks = [part.register_forward_pre_hook(before) for part in parts]
    hooks += [part.register_forward_hook(after, always_call=True) for part in parts]
    in_parts = {module for part in parts for module in part.modules()}
    chunks = [(mixer, mixer.chunk_size) for mixer in modules.mixers if hasattr(mixer, "chunk_size")]
    try:
        for module in own:
            if module in in_parts:
                module._parameters |= shapes[module]
            else:  # positions
                lend(module)
        for mixer, size in chunks:
            mixer.chunk_size = min(size, CHUNK)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, parameters in own.items():
            module._parameters |= parameters
        for mixer, size in chunks:
            mixer.chunk_size = size


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


def require_finite(backbone: Backbone, logits: Tensor) -> None:
    """Raise `BadNumbers` unless all logits are finite."""
    if not torch.isfinite(logits).all():
        raise BadNumbers(
            f"{backbone.name} gives NaN or infinite logits in {backbone.weight_format}.",
            "Try --dtype float32; if that fails too, the weights are damaged: fetch them again.",
        )
