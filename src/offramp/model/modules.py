"""The library's modules of one model, found by the names in its family's row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from offramp.errors import UnsupportedModel
from offramp.model.families import Family
from offramp.model.mamba import is_mixer

KINDS = {(True, False): "attention", (False, True): "mamba", (True, True): "both", (False, False): "neither"}


@dataclass(frozen=True)
class Modules:
    """Embedding, blocks, final norm and head of a model.

    Four sequences have one entry for each block. `attention` and `mixers` hold its attention and its Mamba mixer, None
    where it has none. `layer_types` holds full_attention, sliding_attention, or the config's word for a block without
    attention. `windows` holds the number of tokens that a token sees, itself included; None if it sees all of them.
    """

    embedding: Any
    blocks: list[nn.Module]
    norm: Any
    head: Any
    positions: Any = None  # an embedding of absolute positions
    rotary: Any = None  # makes the rotary tables
    attention: Sequence[Any] = ()
    mixers: Sequence[Any] = ()
    layer_types: Sequence[str] = ()
    windows: Sequence[int | None] = ()

    @classmethod
    def of(cls, model: Any, family: Family) -> Modules:
        """The modules of the library's `model`. Raises `UnsupportedModel` for an unknown kind of attention."""
        trunk = getattr(model, family.trunk)
        blocks = list(getattr(trunk, family.blocks))
        attention = [_attention_of(block, family) for block in blocks]
        mixers = [_mixer_of(block, family) for block in blocks]
        types = _layer_types(model.config, attention, mixers)
        sizes = {"sliding_attention": getattr(model.config, "sliding_window", None)}
        return cls(
            embedding=model.get_input_embeddings(),
            blocks=blocks,
            norm=getattr(trunk, family.norm),
            head=model.get_output_embeddings(),
            positions=getattr(trunk, family.positions) if family.positions else None,
            rotary=getattr(trunk, family.rotary) if family.rotary else None,
            attention=attention,
            mixers=mixers,
            layer_types=types,
            windows=[sizes.get(kind) for kind in types],
        )

    def with_blocks(self, blocks: list[nn.Module], family: Family) -> Modules:
        """The same modules, but with these blocks, which are copies of the model's own."""
        attention = [_attention_of(block, family) for block in blocks]
        return replace(self, blocks=blocks, attention=attention, mixers=[_mixer_of(block, family) for block in blocks])

    @property
    def kinds(self) -> list[str]:
        """The kind of each block's memory: a name in `state.KINDS`."""
        pairs = zip(self.attention, self.mixers, strict=True)
        return [KINDS[attention is not None, mixer is not None] for attention, mixer in pairs]


def _mixer_of(block: nn.Module, family: Family) -> Any:
    part = getattr(block, family.mixer, None) if family.mixer else None
    return part if part is not None and is_mixer(part) else None


def _attention_of(block: nn.Module, family: Family) -> Any:
    part = getattr(block, family.attention, None)
    if part is None or is_mixer(part):
        return None
    # nemotron_h gives one name to attention, Mamba mixer and MLP.
    return part if family.attention != family.mixer or hasattr(part, "num_key_value_groups") else None


def _layer_types(config: Any, attention: list[Any], mixers: list[Any]) -> list[str]:
    types = getattr(config, "layer_types", None)
    if types is None:
        sliding = getattr(config, "sliding_window", None) is not None
        return ["sliding_attention" if sliding else "full_attention"] * len(attention)
    parts = zip(types, attention, mixers, strict=True)
    unknown = {kind for kind, attends, mixes in parts if attends is not None and mixes is None}
    unknown -= {"full_attention", "sliding_attention"}
    if unknown:
        raise UnsupportedModel(f"Blocks of the kind {', '.join(sorted(unknown))} are not supported yet.")
    return list(types)
