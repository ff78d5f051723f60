"""The self-check: a model's logits, as offramp computes them, beside those of the library's own model.

The weights of a model on the meta device are lent to the library one block at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import BadNumbers, UnsupportedModel
from offramp.model.backbone import Backbone
from offramp.model.hooks import is_offloaded
from offramp.model.mamba import is_mamba1


@dataclass(frozen=True)
class Lender:
    """Lends weights to a library's model on the meta device.

    `weight` gives the value of a module's parameter, by its name. `returned` is called after each part of the model has
    run, with the number of parts that have run and of all parts.
    """

    weight: Callable[[nn.Module, str], Tensor]
    returned: Callable[[int, int], None]


@dataclass(frozen=True)
class Reference:
    """The library's own logits (1, T, V) for fixed token ids: `full` in one pass, `cached` in three pieces over its cache.

    `pieces` are the three pieces that offramp reads. The library's Mamba-1 computes pieces of several tokens wrongly, so
    for such a model the library reads the tokens one by one.
    """

    ids: Tensor
    pieces: list[Tensor]
    full: Tensor
    cached: Tensor

    @classmethod
    @torch.inference_mode()
    def of(cls, backbone: Backbone, lender: Lender | None = None) -> Reference:
        """Run the library's model. Raises `BadNumbers` when its logits are not finite.

        A model on the meta device needs a `lender`, unless hooks of accelerate's bring its weights in. With either, the
        model runs once, in one pass, for `full` and `cached`: another pass would read all weights again. A hybrid without
        any attention also runs in one pass: with a cache, the library asks an attention for the length of the text, and
        fails.
        """
        generator = torch.Generator().manual_seed(0)
        length = min(16, backbone.context)
        ids = torch.randint(0, backbone.vocab_size, (1, length), generator=generator).to(backbone.device)
        pieces = [ids[:, : length - 4], ids[:, length - 4 : length - 1], ids[:, length - 1 :]]
        with nullcontext() if lender is None else lent(backbone, lender):
            full = backbone.model(ids, use_cache=False).logits.float()
        if not torch.isfinite(full).all():
            raise BadNumbers(
                f"{backbone.name} gives NaN or infinite logits in {backbone.weight_format}.",
                "Try --dtype float32; if that fails too, the weights are damaged: fetch them again.",
            )
        is_hybrid = hasattr(backbone.config, "layers_block_type")
        keeps_no_attention = is_hybrid and not {"attention", "both"} & set(backbone.kinds)
        reads_anew = lender is not None or is_offloaded(backbone.model) or keeps_no_attention
        return cls(ids, pieces, full, full if reads_anew else _cached(backbone, pieces))


def _cached(backbone: Backbone, pieces: list[Tensor]) -> Tensor:
    """The library's logits for the pieces, over its own cache."""
    ids = torch.cat(pieces, 1)
    length = ids.shape[1]
    has_mamba1 = any(mixer is not None and is_mamba1(mixer) for mixer in backbone.modules.mixers)
    positions = torch.arange(length, device=ids.device)[None]
    sizes = [1] * length if has_mamba1 else [piece.shape[1] for piece in pieces]
    cache, cached = None, []
    for piece, place in zip(ids.split(sizes, dim=1), positions.split(sizes, dim=1), strict=True):
        before: dict[str, Any] = {"cache": cache} if cache is not None else {}
        out = backbone.model(piece, **before, position_ids=place, use_cache=True)
        cache = out.cache
        cached.append(out.logits.float())
    return torch.cat(cached, 1)


@contextmanager
def lent(backbone: Backbone, lender: Lender) -> Iterator[None]:
    """While the context is open, each part of a model on the meta device has its weights only while it runs."""
    modules = backbone.modules
    parts = [modules.embedding, *modules.blocks, modules.norm, modules.head]
    on_loan: list[tuple[nn.Module, str, Any]] = []
    returned = 0

    def lend(part: nn.Module, _: Any) -> None:
        for module in part.modules():
            for name, parameter in module.named_parameters(recurse=False):
                on_loan.append((module, name, parameter))
                value = lender.weight(module, name).to(backbone.device, parameter.dtype)
                module._parameters[name] = nn.Parameter(value, requires_grad=False)

    def take_back(*_: Any) -> None:
        nonlocal returned
        for module, name, parameter in on_loan:
            module._parameters[name] = parameter
        on_loan.clear()
        returned += 1
        lender.returned(returned, len(parts))

    hooks = [part.register_forward_pre_hook(lend) for part in parts]
    hooks += [part.register_forward_hook(take_back, always_call=True) for part in parts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@cache
def code_hash() -> str:
    """A hash of the Python code that runs models."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@torch.inference_mode()
def check(backbone: Backbone, lender: Lender | None = None) -> tuple[float, float]:
    """Compare a full pass, and a pass in pieces over a state, with the library's own logits.

    A model on the meta device needs a `lender`. Returns the largest differences (full, cached), as shares of the largest
    logit. Raises `UnsupportedModel` when one exceeds what rounding explains, `Runtime.tolerance`.
    """
    reference = Reference.of(backbone, lender)
    ours, state, seen, middle = [], backbone.state(), 0, backbone.n_blocks // 2
    for piece in reference.pieces:
        h, step = backbone.embed(piece, seen)
        h = backbone.run(h, 0, middle, state, step)
        ours.append(backbone.logits(backbone.run(h, middle, backbone.n_blocks, state, step)))
        seen += piece.shape[1]
    scale = reference.full.abs().max().clamp(min=1e-6)
    full = float((backbone.forward(reference.ids) - reference.full).abs().max() / scale)
    cached = float((torch.cat(ours, 1) - reference.cached).abs().max() / scale)
    allowed = backbone.runtime.tolerance
    if not (full <= allowed and cached <= allowed):
        raise UnsupportedModel(
            f"offramp would decode {backbone.name} wrongly: its logits differ from the library's by {full:.1e} in a full "
            f"pass and {cached:.1e} in a cached one, as shares of the largest logit ({allowed:.0e} is allowed).",
            f"The row for the family '{backbone.config.model_type}' in families.FAMILIES does not fit this model.",
        )
    return full, cached
