"""Early exits for Hugging Face causal language models: easy tokens leave the network early."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offramp.decode.engine import Engine
    from offramp.decode.facade import Model, load, wrap
    from offramp.decode.hf_generate import decoding, generate_with_exits
    from offramp.decode.modes import MODES
    from offramp.decode.request import Generation, Talk, Token
    from offramp.decode.sampling import Sampling
    from offramp.errors import OfframpError
    from offramp.exits.config import ExitsConfig
    from offramp.exits.exit_set import ExitSet
    from offramp.exits.exits import Exits
    from offramp.exits.policy import Policy
    from offramp.model.backbone import Backbone
    from offramp.model.families import FAMILIES, Family
    from offramp.training.calibration import calibrate
    from offramp.training.config import CalibrationConfig, TrainConfig
    from offramp.training.training import train

__version__ = "0.1.0"

_HOMES = {
    "decode.engine": ("Engine",),
    "decode.facade": ("Model", "load", "wrap"),
    "decode.hf_generate": ("decoding", "generate_with_exits"),
    "decode.modes": ("MODES",),
    "decode.request": ("Generation", "Talk", "Token"),
    "decode.sampling": ("Sampling",),
    "errors": ("OfframpError",),
    "exits.config": ("ExitsConfig",),
    "exits.exit_set": ("ExitSet",),
    "exits.exits": ("Exits",),
    "exits.policy": ("Policy",),
    "model.backbone": ("Backbone",),
    "model.families": ("FAMILIES", "Family"),
    "training.calibration": ("calibrate",),
    "training.config": ("CalibrationConfig", "TrainConfig"),
    "training.training": ("train",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
__all__ = [
    "FAMILIES",
    "MODES",
    "Backbone",
    "CalibrationConfig",
    "Engine",
    "ExitSet",
    "Exits",
    "ExitsConfig",
    "Family",
    "Generation",
    "Model",
    "OfframpError",
    "Policy",
    "Sampling",
    "Talk",
    "Token",
    "TrainConfig",
    "calibrate",
    "decoding",
    "generate_with_exits",
    "load",
    "train",
    "wrap",
]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import: `offramp --help` must not wait for it.
    if name in _HOME_OF:
        return getattr(importlib.import_module(f"offramp.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module 'offramp' has no attribute '{name}'")
