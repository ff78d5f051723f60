"""A model's parts and what they cost: its blocks, where exits would go, and what a token costs that leaves there."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from offramp.errors import OfframpError
from offramp.exits.config import ExitsConfig, suggested_places
from offramp.exits.exits import Exits
from offramp.exits.readouts import DeepAdapter
from offramp.model.backbone import Backbone
from offramp.model.checkpoint import Held, held_in
from offramp.model.compiled.formats import FILE, Change
from offramp.model.compiled.library import kernels
from offramp.model.compiled.panels import LAYOUTS
from offramp.model.costs import Costs
from offramp.model.families import UNBOUNDED
from offramp.training.config import draft_config

CONTEXT = 256  # tokens before the one whose costs are stated


@dataclass(frozen=True)
class Leaving:
    """The cost of a token that leaves after a block: parameters of the blocks that ran, FLOPs, bytes moved.

    All include the exit's `tail`, the last blocks that run after its adapter. FLOPs and bytes also include all gates that
    were asked, the read-outs (2 bytes an entry), the `project` fill of skipped blocks, and the head.
    """

    after_block: int
    tail: int
    parameters: int
    flops: int
    bytes: int


@dataclass(frozen=True)
class Anatomy:
    """The parts of a model. Costs are FLOPs at a context of `cost_context` tokens.

    `bits` are those of a weight, as it runs; `file` is what the model's files hold. `change` says what the weight format
    changes in a short text, where the model has been loaded in it on this machine. `kernels` are the processor's
    instructions that compiled blocks multiply with on this machine; "" without a compiler. `full_bytes` are the bytes that
    a token moves at full depth. `draft_flops` and `draft_bytes` are those of a draft, by an exit as `offramp train --draft`
    makes it. Fields that end in `_in_blocks` are costs divided by that of a mean block. `context` is None where it is
    unbounded. `exits` holds the layers, tails and thresholds of the model's exits, and its policy in words. It is None if
    there are none; then `gate` and `readout` are the default kinds, and `leaving` is for exits at `suggested_layers`, with
    `suggested_tails`.
    """

    model: str
    sha256: str
    model_type: str
    weight_format: str
    precision: str
    bits: float
    file: list[Held]
    change: Change | None
    kernels: str
    blocks: int
    hidden_size: int
    vocab_size: int
    context: int | None
    parameters: int
    parameters_per_block: list[int]
    kinds: list[str]
    cost_context: int
    block_flops: list[int]
    block_bytes: list[int]
    full_flops: int
    full_bytes: int
    draft_flops: int
    draft_bytes: int
    head_in_blocks: float
    gate: str
    gate_in_blocks: float
    readout: str
    readout_in_blocks: float
    fill_project_in_blocks: float
    leaving: list[Leaving]
    suggested_layers: list[int]
    suggested_tails: list[int]
    exits: dict[str, Any] | None

    def runs(self, kind: str) -> str:
        """What multiplies weights that the files hold in this type."""
        if self.weight_format != FILE:
            return self.weight_format
        return f"panels of {LAYOUTS[kind].bits} bits" if kind in LAYOUTS else "rows of floats"


def anatomy(backbone: Backbone, exits: Exits | None, context: int = CONTEXT) -> Anatomy:
    """The parts of a model and their costs, for its exits or default ones. An `outline` without weights is enough."""
    costs = Costs(backbone)
    layers, tails = suggested_places(backbone.n_blocks)
    parts = exits if exits is not None and len(exits) else Exits.new(backbone, ExitsConfig(layers, tails=tails))
    first = next(iter(parts))
    block_flops = [costs.block(index, context) for index in range(backbone.n_blocks)]
    block_bytes = [costs.block_bytes(index, context) for index in range(backbone.n_blocks)]
    mean_block, drafted = fmean(block_flops), _drafting(backbone, costs, context)
    return Anatomy(
        model=backbone.name,
        sha256=backbone.source.fingerprint,
        model_type=backbone.config.model_type,
        weight_format=backbone.weight_format,
        precision=backbone.precision,
        bits=backbone.runtime.bits,
        file=_held(backbone),
        change=backbone.change,
        kernels=kernels(),
        blocks=backbone.n_blocks,
        hidden_size=backbone.hidden_size,
        vocab_size=backbone.vocab_size,
        context=backbone.context if backbone.context < UNBOUNDED else None,
        parameters=_parameters(backbone.model),
        parameters_per_block=[_parameters(block) for block in backbone.blocks],
        kinds=backbone.kinds,
        cost_context=context,
        block_flops=block_flops,
        block_bytes=block_bytes,
        full_flops=costs.full(context),
        full_bytes=sum(block_bytes) + costs.head_bytes,
        draft_flops=drafted[0],
        draft_bytes=drafted[1],
        head_in_blocks=costs.head / mean_block,
        gate=parts.config.gate,
        gate_in_blocks=first.gate.flops() / mean_block,
        readout=parts.config.readout,
        readout_in_blocks=first.adapter.flops() / mean_block,
        fill_project_in_blocks=costs.projected(range(backbone.n_blocks)) / backbone.n_blocks / mean_block,
        leaving=[
            _leaving(backbone, costs, parts, *place, context) for place in (*parts.config.places, (backbone.n_blocks, 0))
        ],
        suggested_layers=list(layers),
        suggested_tails=list(tails),
        exits=None if exits is None else _exits_found(exits),
    )


def _held(backbone: Backbone) -> list[Held]:
    """What the model's files hold; nothing for a model that has none, or damaged ones."""
    with suppress(OfframpError, OSError, ValueError):
        return held_in(Path(backbone.source.path))
    return []


def _exits_found(exits: Exits) -> dict[str, Any]:
    places = {"layers": list(exits.config.layers), "tails": [tail for _, tail in exits.config.places]}
    return {**places, "thresholds": list(exits.policy.thresholds), "rules": exits.policy.in_words()}


def _leaving(backbone: Backbone, costs: Costs, exits: Exits, stop: int, tail: int, context: int) -> Leaving:
    passed = [exit for exit in exits if exit.block <= stop]
    # A recurrent read-out runs on every token that reaches it. Others run only where the token leaves.
    readouts = [exit.adapter.flops() for exit in passed if exit.adapter.recurrent or exit.block == stop]
    skipped = range(stop, backbone.n_blocks - tail)
    run = [index for index in range(backbone.n_blocks) if index not in skipped]
    asked = sum(exit.gate.flops() for exit in passed) + sum(readouts)
    return Leaving(
        after_block=stop,
        tail=tail,
        parameters=sum(_parameters(backbone.blocks[index]) for index in run),
        flops=sum(costs.block(index, context) for index in run) + costs.projected(skipped) + asked + costs.head,
        # A product reads half as many entries as it has FLOPs, and a read-out's or gate's entry has 2 bytes.
        bytes=sum(costs.block_bytes(index, context) for index in run)
        + sum(costs.projected_bytes(index) for index in skipped)
        + asked
        + costs.head_bytes,
    )


def _drafting(backbone: Backbone, costs: Costs, context: int) -> tuple[int, int]:
    """FLOPs and bytes of a draft by an exit as `offramp train --draft` makes it, in 8 bits, or 4 where blocks have 4."""
    config = draft_config(backbone.kinds)
    tail = range(backbone.n_blocks - config.tails[0], backbone.n_blocks)
    adapter = DeepAdapter(backbone.hidden_size, config.readout_width, len(tail), 1 + bool(config.middle))
    vocabulary = min(config.shortlist or backbone.vocab_size, backbone.vocab_size)
    entries = adapter.flops() // 2 + vocabulary * backbone.hidden_size
    weights = entries // 2 if backbone.precision == "int4" else entries
    return (
        2 * entries + sum(costs.block(index, context) for index in tail),
        weights + sum(costs.block_bytes(index, context) for index in tail),
    )


def _parameters(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
