"""The exits that `benchmarks/paper.py` compares. They learn from texts of one size, and differ in what a `Recipe` names."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import torch

from offramp import Exits
from offramp.exits.config import ExitsConfig, suggested_places
from offramp.exits.policy import TRAINING_FREE
from offramp.files import sha256_of_text
from offramp.model.backbone import Backbone
from offramp.training.answering import write_shards
from offramp.training.config import TrainConfig
from offramp.training.data import Data, parts_of
from offramp.training.loop import claim
from offramp.training.teacher import TeacherTexts, TextGroup
from offramp.training.trainer import Trainer, needed_layers
from offramp.training.validation import LabelledTexts

WIDTH = 512  # of the read-outs; smaller in small models


@dataclass(frozen=True)
class Recipe:
    """How exits are made.

    gate: linear, ffn, mamba, or a confidence that needs no training. jump: a token that leaves runs the model's last
    blocks, too. text: what read-outs and gates learn from. k: a gate foresees whether the read-out's token is among full
    depth's k most probable ones (the paper's top-k agreement).
    """

    gate: str
    jump: bool = True
    text: str = "own answers"
    k: int = 1
    seed: int = 0

    @property
    def label(self) -> str:
        """The recipe in words, without the gate."""
        words = ["jump" if self.jump else "no jump", self.text]
        words += [f"k = {self.k}"] if self.k > 1 else []
        return ", ".join([*words, *([f"seed {self.seed}"] if self.seed else [])])


def mark(*settings: object) -> str:
    """A short hash of settings, to name files by."""
    return sha256_of_text(json.dumps(settings))[:12]


def with_gate(backbone: Backbone, base: Exits, gate: str, width: int | None = None) -> Exits:
    """Exits with an untrained gate of this kind, as wide as that of `base` by default, and the read-outs of `base`."""
    exits = Exits.new(backbone, replace(base.config, gate=gate, gate_width=width or base.config.gate_width))
    for exit, trained in zip(exits, base, strict=True):
        exit.adapter.load_state_dict(trained.adapter.state_dict())
    exits.shortlist, exits.sketch = base.shortlist, base.sketch
    return exits


class Workshop:
    """Makes exits for a model, and keeps them in the folder `work`; work that is done is not done again.

    texts: gives the groups of prompts and texts of each kind of text. epochs: passes over it, for read-outs and for gates.
    """

    def __init__(
        self, backbone: Backbone, texts: Callable[[], dict[str, list[TextGroup]]], work: Path, epochs: int
    ) -> None:
        self.backbone, self.texts, self.work = backbone, cache(texts), work
        self.config = TrainConfig(epochs=epochs, gate_epochs=epochs, gate_target="agreement")  # the paper's target
        self.exits, self._read_outs = cache(self._exits), cache(self._make_read_outs)
        self._labels, self._data = cache(self._make_labels), cache(self._gather)

    @cached_property
    def shape(self) -> ExitsConfig:
        """Exits with jumps, and read-outs as the paper's gates have: a feed-forward adapter before the head."""
        layers, tails = suggested_places(self.backbone.n_blocks)
        width = min(WIDTH, self.backbone.hidden_size)
        gate_width = min(64, width)
        return ExitsConfig(layers, "linear", "ffn", gate_width=gate_width, readout_width=width, sketch=0, tails=tails)

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks after which the texts' hidden states are kept: those that any recipe needs."""
        return needed_layers(Exits.new(self.backbone, self.shape))

    def _exits(self, recipe: Recipe) -> Exits:
        """The exits of a recipe."""
        base = self._read_outs(recipe.jump, recipe.text)
        if recipe.gate in TRAINING_FREE:
            return base
        folder = self._folder("gates", recipe)
        if not (folder / "offramp.json").exists():
            torch.manual_seed(recipe.seed)
            exits = with_gate(self.backbone, base, recipe.gate)
            trainer = self._trainer(exits, recipe, folder)
            trainer.standardise(self._data(recipe.text).adapters, "gate")
            trainer.fit_gates(self._labels(recipe.jump, recipe.text, recipe.k))
            self._save(exits, recipe, folder)
        return Exits.load(folder, self.backbone)

    def _make_read_outs(self, jump: bool, text: str) -> Exits:
        """Exits whose read-outs are trained; their gates are not."""
        recipe = Recipe("linear", jump, text)
        folder = self._folder("read-outs", recipe)
        if not (folder / "offramp.json").exists():
            torch.manual_seed(self.config.seed)
            exits = Exits.new(self.backbone, self.shape if jump else replace(self.shape, tails=()))
            trainer = self._trainer(exits, recipe, folder)
            trainer.standardise(self._data(text).adapters)
            trainer.fit_adapters(self._data(text).adapters)
            self._save(exits, recipe, folder)
        return Exits.load(folder, self.backbone)

    def _make_labels(self, jump: bool, text: str, k: int) -> LabelledTexts:
        base = self._read_outs(jump, text)
        trainer = self._trainer(base, Recipe("linear", jump, text, k), self.work)
        return trainer.labels(self._data(text).gates)

    def _trainer(self, exits: Exits, recipe: Recipe, folder: Path) -> Trainer:
        folder.mkdir(parents=True, exist_ok=True)
        config = replace(self.config, top_k=recipe.k, seed=recipe.seed)
        return Trainer(self.backbone, exits, config, folder, layers=self.layers)

    def _save(self, exits: Exits, recipe: Recipe, folder: Path) -> None:
        exits.modules.eval().requires_grad_(False)
        exits.training = {"command": shlex.join(sys.argv), "recipe": asdict(recipe)}
        exits.save(folder)

    def _gather(self, text: str) -> Data:
        """The model's hidden states and distributions over a kind of text, in three parts."""
        groups = self.texts()[text]
        folder = self.work / "text" / text.replace(" ", "-")
        claim(
            folder, {"weights": self.backbone.source.fingerprint, "layers": self.layers, "text": mark(*map(asdict, groups))}
        )
        texts = TeacherTexts.open(write_shards(self.backbone, groups, self.layers, folder))
        return Data(*parts_of(texts, self.config.seed), [])

    def _folder(self, kind: str, recipe: Recipe) -> Path:
        return self.work / kind / mark(asdict(recipe), asdict(self.shape))
