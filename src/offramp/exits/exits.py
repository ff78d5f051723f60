"""Exits: places after a block where decoding may stop. Each has a gate (may this token leave?) and a read-out (as what?).

Gates read the hidden state after their block and give a logit; its sigmoid is the confidence. The three kinds are the
paper's (DYNAMAX, arXiv 2504.20922): `linear` (CALM-style), `ffn`, and `mamba`, whose recurrent state remembers the tokens
before. All work in a bottleneck: a gate must be far cheaper than a block. A read-out corrects the hidden state with a
small residual adapter and hands it to the backbone's own final norm and head.

Shapes: B batch, T tokens, D the backbone's hidden size. `Memory` is what a recurrent part carries from token to token:
the convolution's window (B, W - 1, E + 2N) and the scan's state (B, H, P, N); None for parts that carry nothing.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from offramp.errors import CorruptFile, ExitsMismatch, OfframpError
from offramp.exits.gates import GATES
from offramp.exits.policy import Policy
from offramp.exits.readouts import READOUTS
from offramp.files import ASSETS, write_atomically

if TYPE_CHECKING:
    from offramp.model.backbone import Backbone


@dataclass(frozen=True)
class ExitsConfig:
    """What a set of exits is made of. `layers`: blocks run before each exit; widths: bottlenecks, in dims.

    `shortlist`: read out over only so many frequent tokens (0: all); `sketch`: dims of a sketch of the head (0: none).
    """

    layers: tuple[int, ...]
    gate: str = "mamba"
    readout: str = "mamba"
    gate_width: int = 64
    readout_width: int = 512
    shortlist: int = 0
    sketch: int = 0


class Exit(nn.Module):
    """One exit: `block` blocks are run before it."""

    def __init__(self, block: int, hidden: int, config: ExitsConfig) -> None:
        super().__init__()
        self.block = block
        self.gate = GATES[config.gate](hidden, config.gate_width)
        self.adapter = READOUTS[config.readout](hidden, config.readout_width)


SKETCH = ("sketch.reduce", "sketch.expand")  # tensors in the artefact


@dataclass
class Exits:
    """A set of exits for one backbone: what `offramp train` makes, `save` writes and `load` reads.

    `backbone` names the model they belong to (name, sha256, model_type, blocks, hidden_size); `weight_format` is the
    format its weights ran in when the exits were trained; `policy` is the default one; `training` is the record of how they
    were made, `calibration` that of what `policy` guarantees (`training.calibration`), empty for nothing. `shortlist`: the
    tokens that are read out, rising; None for all. `sketch`: two maps whose product stands for the hidden state before the
    head, reduce (k, D) and expand (D, k), so that the head behind `expand` is small (`training.sketch_of`).
    """

    config: ExitsConfig
    modules: nn.ModuleList
    backbone: dict[str, Any]
    weight_format: str
    policy: Policy
    training: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    shortlist: Tensor | None = None
    sketch: tuple[Tensor, Tensor] | None = None

    @classmethod
    def new(cls, backbone: Backbone, config: ExitsConfig) -> Exits:
        """Untrained exits, all closed. Raises `OfframpError` for layers the model does not have."""
        layers = config.layers
        if not layers or list(layers) != sorted(set(layers)) or not 0 < layers[0] <= layers[-1] < backbone.n_blocks:
            raise OfframpError(
                f"Exits after blocks {', '.join(map(str, layers)) or '(none)'} do not fit a model of {backbone.n_blocks}.",
                f"Give rising numbers from 1 to {backbone.n_blocks - 1}, such as 10,15,20.",
            )
        for kind, known, what in ((config.gate, GATES, "gate"), (config.readout, READOUTS, "read-out")):
            if kind not in known:
                raise OfframpError(f"There is no {what} '{kind}'.", f"Choose from {', '.join(known)}.")
        if config.sketch % 32 or not 0 <= config.sketch <= backbone.hidden_size:
            raise OfframpError(
                f"A sketch of {config.sketch} dims cannot be made.",
                f"Give a multiple of 32, at most {backbone.hidden_size}; 0 for none.",
            )
        for width, unit, what in ((config.gate_width, 16, "gate"), (config.readout_width, 32, "read-out")):
            if width < unit or width % unit:  # the Mamba ones are made of heads of 32
                raise OfframpError(f"A {what} {width} dims wide cannot be made.", f"Give a multiple of {unit}.")
        modules = nn.ModuleList(Exit(layer, backbone.hidden_size, config) for layer in layers)
        owner = {
            "name": backbone.name,
            "sha256": backbone.source.sha256,
            "model_type": backbone.config.model_type,
            "blocks": backbone.n_blocks,
            "hidden_size": backbone.hidden_size,
        }
        return cls(config, modules, owner, backbone.weight_format, Policy((1.0,) * len(layers)))

    def __iter__(self) -> Iterator[Exit]:
        return (exit for exit in self.modules if isinstance(exit, Exit))

    def __len__(self) -> int:
        return len(self.modules)

    def save(self, folder: str | Path) -> None:
        """Write `exits.safetensors` (bfloat16) and `offramp.json`; each appears whole or not at all."""
        from safetensors.torch import save

        folder = Path(folder)
        tensors = {key: value.detach().to(torch.bfloat16).contiguous() for key, value in self.modules.state_dict().items()}
        if self.shortlist is not None:
            tensors["shortlist"] = self.shortlist.int()
        if self.sketch is not None:
            tensors |= {name: part.bfloat16() for name, part in zip(SKETCH, self.sketch, strict=True)}
        write_atomically(folder / "exits.safetensors", save(tensors))
        self.save_record(folder)

    def save_record(self, folder: str | Path) -> None:
        """Write `offramp.json` alone: all but the weights."""
        record = {
            "offramp": 1,
            "config": asdict(self.config),
            "backbone": self.backbone,
            "weight_format": self.weight_format,
            "policy": asdict(self.policy),
            "training": self.training,
            "calibration": self.calibration,
        }
        write_atomically(Path(folder) / "offramp.json", (json.dumps(record, indent=1) + "\n").encode())

    @classmethod
    def load(cls, folder: str | Path, backbone: Backbone) -> Exits:
        """Read a folder that `save` wrote, for this backbone.

        Warns where the model runs in another weight format than the exits were trained in. Raises `ExitsMismatch` for
        another model's exits, `CorruptFile` for files that are missing, cut short or damaged.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        hint = "Name a folder that `offramp train` wrote."
        if not folder.is_dir():
            raise CorruptFile(f"There is no folder {folder} with exits.", hint)
        for name in ("offramp.json", "exits.safetensors"):
            if not (folder / name).is_file():
                raise CorruptFile(f"{folder} holds no {name}, so no exits.", hint)
        try:
            record = json.loads((folder / "offramp.json").read_text())
            owner, settings = record["backbone"], dict(record["config"])
            config = ExitsConfig(**{**settings, "layers": tuple(settings["layers"])})
            chosen = record["policy"]
            policy = Policy(**{**chosen, "thresholds": tuple(float(value) for value in chosen["thresholds"])})
            weight_format, training, calibration = record["weight_format"], record["training"], record["calibration"]
            fingerprint = owner["sha256"]
        except (ValueError, KeyError, TypeError, OfframpError) as error:
            raise CorruptFile(f"{folder / 'offramp.json'} is damaged: {error!r}.", "Train the exits again.") from error
        if fingerprint != backbone.source.sha256:
            same = "another revision or conversion of it" if owner.get("name") == backbone.name else "not for this model"
            raise ExitsMismatch(
                f"The exits in {folder} were trained for {owner.get('name')} (weights {fingerprint[:12]}), {same}: "
                f"{backbone.name} has the weights {backbone.source.sha256[:12]}.",
                f"Train exits for this model: offramp train {backbone.name} -o DIR",
            )
        exits = cls.new(backbone, config)
        try:
            tensors = load_file(folder / "exits.safetensors")
            shortlist = tensors.pop("shortlist", None)
            if (0 if shortlist is None else len(shortlist)) != config.shortlist:
                raise ValueError(f"its short list is not one of {config.shortlist} tokens")
            parts = [tensors.pop(name).float() for name in SKETCH if name in tensors]
            shapes = [(config.sketch, backbone.hidden_size), (backbone.hidden_size, config.sketch)]
            if [tuple(part.shape) for part in parts] != (shapes if config.sketch else []):
                raise ValueError(f"its sketch of the head is not one of {config.sketch} dims")
            exits.modules.load_state_dict({key: value.float() for key, value in tensors.items()})
        except Exception as error:  # SafetensorError, or RuntimeError for missing and misshapen tensors
            reason = str(error).strip().splitlines()[0][:160]
            raise CorruptFile(
                f"{folder / 'exits.safetensors'} is damaged or cut short: {reason}", "Copy it again, or train again."
            ) from error
        if not all(torch.isfinite(value).all() for value in (*exits.modules.state_dict().values(), *parts)):
            raise CorruptFile(f"{folder / 'exits.safetensors'} holds NaN or infinite weights.", "Train the exits again.")
        if weight_format != backbone.weight_format:
            warnings.warn(
                f"These exits were trained with {weight_format} weights and the model runs in {backbone.weight_format}: "
                "they may agree with it less often.",
                stacklevel=2,
            )
        exits.policy, exits.weight_format = policy, weight_format
        exits.training, exits.calibration = training, calibration
        exits.shortlist = None if shortlist is None else shortlist.long()
        exits.sketch = (parts[0], parts[1]) if parts else None
        exits.modules.eval().requires_grad_(False)
        return exits


DRAFT = "draft"  # the folder, within that of a model's exits, of those that draft for `verify`


def shipped_for(backbone: Backbone, draft: bool = False) -> Exits | None:
    """The exits that come with offramp for this backbone's weights, if any; with `draft`, rather those that draft."""
    for record in sorted((ASSETS / "exits").glob("*/offramp.json")):
        if json.loads(record.read_text())["backbone"]["sha256"] == backbone.source.sha256:
            return load_exits(record.parent, backbone, draft)
    return None


def load_exits(folder: str | Path, backbone: Backbone, draft: bool = False) -> Exits:
    """The exits in a folder; with `draft`, those that draft for `verify`, if the folder has some."""
    drafts = Path(folder) / DRAFT
    return Exits.load(drafts if draft and drafts.is_dir() else folder, backbone)


def suggested_layers(n_blocks: int) -> tuple[int, ...]:
    """Where exits go by default: after a third, a half, two thirds and five sixths of the blocks."""
    return tuple(
        sorted({min(n_blocks - 1, max(1, math.floor(n_blocks * part + 0.5))) for part in (1 / 3, 1 / 2, 2 / 3, 5 / 6)})
    )
