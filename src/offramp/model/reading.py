"""A short text that comes with offramp, read once by the library's model in float32 with the model's own weights.

It finds what later decides how the model runs, and what a weight format is compared with: what each linear layer gets as
its input, and how likely each next token is. The cache keeps it.

Shapes: P pieces of text, T tokens of each, K columns of a linear layer (its inputs).
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.files import ASSETS
from offramp.model.backbone import Backbone
from offramp.model.compiled.formats import Change
from offramp.model.compiled.rounding import GROUP, LayerInput
from offramp.model.lending import Lender, lent, require_finite
from offramp.progress import Progress, silent

EDITION = 1  # raise it when what a reading holds, or how it is found, changes
TOKENS = 96  # of a piece of text, at most
FEWEST = 16  # tokens of a piece; a tokenizer that makes fewer gets random ids instead
BETWEEN = "\n=====\n"
EACH = 8  # of so many tokens, one shows what rounding a layer's input loses
MOST16 = 127 * 255 + 127  # the largest of its integers of 16 bits
AT_ONCE = 32  # tokens whose logits are in memory at once


@dataclass(frozen=True)
class Reading:
    """What was found: `ids` (P, T); of each next token its `losses` (P, T - 1) in nats, and what was `likeliest`; and what
    each linear layer got, by its name in the library's model.
    """

    ids: Tensor
    losses: Tensor
    likeliest: Tensor
    inputs: dict[str, LayerInput]

    def inputs_of(self, model: nn.Module) -> dict[nn.Module, LayerInput]:
        """What each linear layer of the library's `model` got."""
        return {module: self.inputs[name] for name, module in model.named_modules() if name in self.inputs}

    def packed(self) -> bytes:
        """The content of a file: a hash of the rest, and the rest as safetensors."""
        from safetensors.torch import save

        tensors = {"ids": self.ids, "losses": self.losses, "likeliest": self.likeliest}
        for name, found in self.inputs.items():
            tensors |= {f"power {name}": found.power.clone(), f"lost {name}": torch.tensor([found.lost8, found.lost16])}
        content = save(tensors)
        return hashlib.sha256(content).digest() + content

    @classmethod
    def unpacked(cls, file: Path) -> Reading | None:
        """The reading in a file; None if it is missing or damaged."""
        from safetensors.torch import load

        try:
            content = file.read_bytes()
        except OSError:
            return None
        if hashlib.sha256(content[32:]).digest() != content[:32]:
            return None
        tensors = load(content[32:])
        inputs = {
            name.removeprefix("power "): LayerInput(tensor, *tensors[name.replace("power", "lost", 1)].tolist())
            for name, tensor in tensors.items()
            if name.startswith("power ")
        }
        return cls(tensors["ids"], tensors["losses"], tensors["likeliest"], inputs)


@cache
def short_text() -> str:
    """The text: pieces of prose, talk, code and lists, with `BETWEEN` between them."""
    return (ASSETS / "reading.txt").read_text("utf-8")


@torch.inference_mode()
def read(backbone: Backbone, lender: Lender) -> Reading:
    """Let the library's model read the short text, with weights that are lent. Raises `BadNumbers`."""
    ids = text_ids(backbone, TOKENS).to(backbone.device)
    scored: list[tuple[Tensor, Tensor]] = []
    watch = _Watch()

    def read_out(head: Any, args: Any) -> Any:
        """Logits of few tokens at a time, since those of all tokens may take more memory than the model."""
        rows, tokens = args[0][:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        for h, piece in zip(rows.split(AT_ONCE), tokens.split(AT_ONCE), strict=True):
            scored.append(_scored(backbone.family.scales(backbone.config).finish(head.forward(h)), piece))
        return args[0][:, -1:]

    with lent(backbone, lender), ExitStack() as hooks:
        for name, module in backbone.model.named_modules():
            if isinstance(module, nn.Linear):
                hooks.callback(module.register_forward_pre_hook(partial(watch, name)).remove)
        hooks.callback(backbone.modules.head.register_forward_pre_hook(read_out).remove)
        backbone.model(ids, use_cache=False)
    losses, likeliest = (torch.cat(parts).view(len(ids), -1).cpu() for parts in zip(*scored, strict=True))
    require_finite(backbone, losses)
    return Reading(ids.cpu(), losses, likeliest, watch.inputs)


@torch.inference_mode()
def change_of(backbone: Backbone, reading: Reading, progress: Progress = silent) -> Change | None:
    """Compare the backbone as it runs with a reading. None for a model that knows nothing of texts, such as a random one.

    Raises `BadNumbers`.
    """
    before = float(reading.losses.mean().exp())
    if before >= backbone.vocab_size / 2:
        return None
    losses, same = [], []
    for number, (ids, likeliest) in enumerate(zip(reading.ids, reading.likeliest, strict=True), 1):
        ids = ids.to(backbone.device)
        lost, found = _scored(backbone.forward(ids[None])[0, :-1], ids[1:])
        losses.append(lost)
        same.append((found.cpu() == likeliest).float())
        after = float(torch.cat(losses).mean().exp())
        change = Change(before, after, float(torch.cat(same).mean()))
        progress("comparing", number, len(reading.ids), str(change) if number == len(reading.ids) else "")
    require_finite(backbone, torch.cat(losses))
    return change


def text_ids(backbone: Backbone, tokens: int) -> Tensor:
    """The short text as ids (P, T), at most so many `tokens` of a piece; random ids where no tokenizer fits the model."""
    pieces = short_text().split(BETWEEN)
    found = [] if backbone.tokenizer is None else [backbone.tokenizer(piece)["input_ids"] for piece in pieces]
    length = min([tokens, backbone.context, *map(len, found)])
    if found and length >= FEWEST:
        ids = torch.tensor([piece[:length] for piece in found])
        if int(ids.max()) < backbone.vocab_size:
            return ids
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, backbone.vocab_size, (len(pieces), min(tokens, backbone.context)), generator=generator)


def _scored(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Of logits (n, V) and the tokens that follow (n,): how unlikely each is, in nats, and the likeliest tokens (n,)."""
    return F.cross_entropy(logits.float(), ids, reduction="none"), logits.argmax(-1)


class _Watch:
    """Notes in `inputs` what linear layers get, while a model runs."""

    def __init__(self) -> None:
        self.inputs: dict[str, LayerInput] = {}
        self._newest: tuple[Tensor, Tensor, Tensor] | None = None  # an input, which several layers may get, and its parts

    def __call__(self, name: str, layer: nn.Linear, args: tuple[Tensor, ...]) -> None:
        if self._newest is None or self._newest[0] is not args[0]:
            self._newest = args[0], *_parts_of(args[0].flatten(0, -2))
        _, power, rows = self._newest
        whole, rest8, rest16 = F.linear(rows, layer.weight).square().sum(-1).clamp(min=1e-30)
        lost8, lost16 = (float((rest / whole).mean().sqrt()) for rest in (rest8, rest16))
        self.inputs[name] = LayerInput(power, lost8, lost16)


def _parts_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows x (n, K): the mean square of each column; and some of the rows, and what they lose in 8 bits and in 16."""
    some = x[::EACH]
    return x.square().mean(0).cpu(), torch.stack([some, some - _rounded(some, 127), some - _rounded(some, MOST16)])


def _rounded(x: Tensor, most: int) -> Tensor:
    """Rows x (n, K) as whole numbers up to `most`, with a scale for each `GROUP` columns, as in core/rows.c.

    There, int8 weights have a scale for twice as many.
    """
    groups = F.pad(x, (0, -x.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / most
    whole = torch.round(groups / scale)
    return whole.mul(scale).flatten(1)[:, : x.shape[1]]
