"""A short trial on the model chooses the length of the exits' tails. It confirms or corrects `suggested_places`.

The trial uses the answers of the probe. It trains adapters for a short time each: with shorter tails, with those of the
rule, and with longer ones. The tails whose exits save most on held-out answers win. After so short a training, exits are
worse than they will be, but all are affected alike.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from offramp.exits.config import ExitsConfig
from offramp.exits.exits import Exits
from offramp.model.backbone import Backbone
from offramp.model.costs import Costs
from offramp.progress import Progress, silent
from offramp.training.config import TrainConfig
from offramp.training.points import saved
from offramp.training.teacher import TeacherTexts
from offramp.training.trainer import Trainer
from offramp.training.validation import evidence

PRECISION = 0.9  # precision at which tokens leave; at a higher one, too few would leave after so short a training
ROUNDS = 6


def variants(tails: tuple[int, ...], layers: tuple[int, ...], n_blocks: int) -> list[tuple[int, ...]]:
    """Tails that the trial compares for exits after these blocks: those of the rule, shorter and longer ones."""
    step = max(1, max(tails) // 3)
    shifted = [
        tuple(min(n_blocks - layer - 1, max(0, tail + by)) for tail, layer in zip(tails, layers, strict=True))
        for by in (0, -step, step)
    ]
    return list(dict.fromkeys(shifted))


def tried(
    backbone: Backbone,
    config: TrainConfig,
    parts: ExitsConfig,
    texts: TeacherTexts,
    layers: tuple[int, ...],
    work: Path,
    hours: float,
    progress: Progress = silent,
) -> tuple[int, ...]:
    """The best tails for exits like `parts`, after `hours` of training for all candidates together.

    The hidden states of the texts are those after the blocks `layers`.
    """
    held = max(1, len(texts) // 4)
    settings = replace(config, batch=min(config.batch, len(texts) - held))
    costs, found = Costs(backbone), []
    candidates = variants(parts.tails, parts.layers, backbone.n_blocks)
    for number, tails in enumerate(candidates):
        torch.manual_seed(config.seed)
        exits = Exits.new(backbone, replace(parts, tails=tails if any(tails) else ()))
        folder = work / f"tails-{'-'.join(map(str, tails))}"
        trainer = Trainer(backbone, exits, settings, folder, layers=layers)
        trainer.standardise(texts[held:])
        trainer.fit_adapters(texts[held:], hours / len(candidates))
        exits.modules.eval().requires_grad_(False)
        shown = evidence(exits, trainer.labels(texts[:held], ROUNDS))
        found.append(saved(exits, shown, costs, PRECISION))
        shutil.rmtree(folder, ignore_errors=True)
        progress("trial", number + 1, len(candidates), f"tails {', '.join(map(str, tails))}")
    return candidates[found.index(max(found))]
