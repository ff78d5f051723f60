"""Early exits for any Hugging Face causal language model: easy tokens leave the network early."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offramp.backbone import Backbone
    from offramp.engine import Engine, Generation, Token
    from offramp.errors import OfframpError
    from offramp.exits import Exits, ExitsConfig, shipped_for
    from offramp.families import FAMILIES, Family
    from offramp.loading import load, wrap
    from offramp.policy import Policy
    from offramp.training import TrainConfig, train

__version__ = "0.1.0"

_HOMES = {
    "backbone": ("Backbone",),
    "library": ("decoding",),
    "engine": ("Engine", "Generation", "Talk", "Token"),
    "errors": ("OfframpError",),
    "exits": ("Exits", "ExitsConfig", "shipped_for"),
    "families": ("FAMILIES", "Family"),
    "loading": ("load", "wrap"),
    "policy": ("Policy",),
    "sampling": ("Sampling",),
    "training": ("TrainConfig", "train"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
__all__ = [
    "FAMILIES",
    "Backbone",
    "Engine",
    "Exits",
    "ExitsConfig",
    "Family",
    "Generation",
    "OfframpError",
    "Policy",
    "Sampling",
    "Talk",
    "Token",
    "TrainConfig",
    "decoding",
    "load",
    "shipped_for",
    "train",
    "wrap",
]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import: `offramp --help` must not wait for it.
    if name in _HOME_OF:
        return getattr(importlib.import_module(f"offramp.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module 'offramp' has no attribute '{name}'")
