"""Train exits for a frozen backbone, from the backbone's own outputs (DYNAMAX, arXiv 2504.20922).

0. Plan: a short probe says how many answers fit into the time, and how long the exits' tails should be (`planning`).
1. Teacher: the model answers prompts; hidden states at the exits and the final distribution are written to shards.
2. The sketch of a large LM head learns to name the model's next tokens (`sketch`).
3. Adapters: each read-out is distilled towards the final distribution (`Trainer.fit_adapters`).
4. Gates learn when a token may leave: when its read-out is sure, and later tokens lose nothing (`Trainer.fit_gates`). The
   gates of exits that draft learn nothing.

A text is used for adapters, gates or validation, never for two of them: a gate must learn how good the read-out is on new
text.

Texts are read from disk when a step needs them, so memory does not grow with the text. Everything random is a function of
the seed and the step, so a resumed run of so many epochs gives the same result as one without interruption.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp import __version__
from offramp.exits.exits import Exits
from offramp.exits.learned import TRAINED, hashes_of
from offramp.exits.ngrams import ngrams_of
from offramp.exits.policy import Policy
from offramp.files import write_atomically
from offramp.model.backbone import Backbone, HasBackbone, backbone_of
from offramp.model.costs import Costs
from offramp.progress import Progress, silent
from offramp.training.answering import MakeShards, made_shards
from offramp.training.config import TrainConfig
from offramp.training.data import Data, gather, lines_of
from offramp.training.loop import accelerator_for, alone
from offramp.training.planning import planned, shape_of
from offramp.training.points import policies
from offramp.training.sketch import DIMS, chosen_sketch
from offramp.training.teacher import TeacherText
from offramp.training.trainer import Trainer, needed_layers
from offramp.training.validation import Evidence, evidence, quality


def train(
    model: Backbone | HasBackbone,
    folder: str | Path,
    config: TrainConfig | None = None,
    progress: Progress = silent,
    command: str = "",
    start: Exits | None = None,
    make_shards: MakeShards = made_shards,
) -> Exits:
    """Train exits and save them in `folder`; its subfolder `.training` holds unfinished work.

    Called again with the same config after an interruption, it resumes the work. `command` goes into the record. `start`:
    exits to go on from; they keep their shape. `make_shards` makes the shards, as `answering.made_shards` does in this
    process. Raises `BadInput` for unusable files or settings, for other places than those of `start`, and where another
    training is at work in `folder`; `CorruptFile` for damaged work files.
    """
    backbone = backbone_of(model)
    with alone(Path(folder), backbone.device):
        return _train(backbone, Path(folder), config or TrainConfig(), progress, command, start, make_shards)


def _train(
    backbone: Backbone,
    folder: Path,
    config: TrainConfig,
    progress: Progress,
    command: str,
    start: Exits | None,
    make_shards: MakeShards,
) -> Exits:
    work, accelerator = folder / ".training", accelerator_for(backbone.device)
    progress = progress if accelerator.is_main_process else silent
    torch.manual_seed(config.seed)
    with _Clock(work / "seconds") as clock:
        with accelerator.main_process_first():
            plan = planned(backbone, config, work, progress, start)
        exits = Exits.new(backbone, start.config if start else shape_of(backbone, config, plan.layers, plan.tails))
        if start is not None:
            exits.shortlist, exits.sketch, exits.ngrams = start.shortlist, start.sketch, start.ngrams
        settings = {**asdict(config), "start": start.training if start else None}
        text = replace(config, answers=plan.answers)
        only = "adapters" if exits.drafts else "gates" if start is not None and config.epochs == 0 else ""
        data = gather(backbone, text, needed_layers(exits), work, progress, settings, only, make_shards)
        _add_tables(exits, data, backbone.vocab_size, start)
        trainer = Trainer(backbone, exits, config, work, progress)
        if exits.config.sketch and exits.sketch is None:
            dims = DIMS if config.sketch is None else (config.sketch,)
            exits.sketch, named = chosen_sketch(backbone, data.adapters, data.held, dims, trainer.fit)
            exits.config = replace(exits.config, sketch=len(exits.sketch[0]) if exits.sketch else 0, candidates=named)
        if start is None:
            trainer.standardise(data.adapters)
        else:
            exits.modules.load_state_dict(start.modules.state_dict())
        if exits.config.readout != "none":
            trainer.fit_adapters(data.adapters, plan.adapter_hours)
        labelled = trainer.labels(data.gates + data.held)
        gates, held = labelled[: len(data.gates)], labelled[len(data.gates) :]
        if config.gate_target == "harmless":
            trainer.measure_harm(held, plan.harm_hours and plan.harm_hours / 3)
            trainer.measure_harm(gates, plan.harm_hours and plan.harm_hours * 2 / 3)
        if not exits.drafts:  # a draft needs no gate: its own confidence ranks better
            trainer.fit_gates(gates, plan.gate_hours)

    exits.modules.eval().requires_grad_(False)
    shown = evidence(exits, held)
    exits.policy = _default_policy(exits, config, shown, Costs(backbone))
    exits.training = {
        "command": command,
        "config": {**asdict(config), **asdict(exits.config), "prompts": None, "texts": []},
        "plan": asdict(plan),
        "text": data.files,
        "tokens": _counted_tokens(data),
        "seconds": round(clock.seconds, 1),
        "versions": {"torch": torch.__version__, "offramp": __version__},
        "validation": quality(exits, shown, trainer.acceptance(held.texts)),
        "curve": trainer.fit.curve,
        **_learned_from(config, start),
    }
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        exits.save(folder)
        shutil.rmtree(work)
    accelerator.wait_for_everyone()
    return Exits.load(folder, backbone)


def _add_tables(exits: Exits, data: Data, vocabulary: int, start: Exits | None) -> None:
    """Add the short list of tokens and the table of n-grams that the exits' config asks for."""
    if exits.config.shortlist and exits.shortlist is None:
        exits.shortlist = frequent_tokens(data.adapters, exits.config.shortlist, vocabulary)
    if exits.drafts:
        learned = ((each.ids, each.top_ids[:, 0], each.counted) for each in data.adapters)
        exits.ngrams = ngrams_of(learned, start.ngrams if start else None)
        exits.config = replace(exits.config, ngrams=len(exits.ngrams.keys))


def _learned_from(config: TrainConfig, start: Exits | None) -> dict[str, Any]:
    """The hashes of all prompts that the exits learned from, in all their trainings; and the last training's record.

    If an earlier training did not record its prompts, there are no hashes.
    """
    lines = lines_of(config)
    if start is None:
        return {TRAINED: hashes_of(lines)}
    before = {name: value for name, value in start.training.items() if name != TRAINED}
    known = start.training.get(TRAINED)
    return {**({} if known is None else {TRAINED: hashes_of(lines, known)}), "start": before}


def _default_policy(exits: Exits, config: TrainConfig, shown: list[Evidence], costs: Costs) -> Policy:
    """A policy with the config's threshold, or for each exit with the rule that reaches its precision on held-out text.

    The rules are guesses from single tokens that leave. Only a calibration tests whole answers.
    """
    number = exits.config.candidates if exits.sketch else 0
    closed = (1.0,) * len(exits)
    if config.threshold is not None:
        return Policy((config.threshold,) * len(exits), config.confidence, candidates=number)
    found = policies(exits, shown, costs, [config.precision], number, number // 4)
    return found[0] if found else Policy(closed, candidates=number)


def _counted_tokens(data: Data) -> dict[str, int]:
    parts = {"adapters": data.adapters, "gates": data.gates, "validation": data.held}
    return {name: sum(int(text.counted.sum()) for text in texts) for name, texts in parts.items()}


class _Clock:
    """Measures the seconds of work, including those of earlier interrupted runs."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds = float(path.read_text("utf-8") or 0) if path.exists() else 0.0

    def __enter__(self) -> _Clock:
        self._started = time.time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.time() - self._started
        if self._path.parent.is_dir():  # the folder is missing if the work never began
            write_atomically(self._path, str(self.seconds).encode())


def frequent_tokens(texts: Sequence[TeacherText], count: int, vocabulary: int) -> Tensor:
    """The `count` tokens with the most teacher probability over all counted positions, in rising order."""
    mass = torch.zeros(vocabulary)
    for text in texts:
        ids, logp = text.top_ids[text.counted], text.top_logp[text.counted]
        mass.index_add_(0, ids.flatten().long(), logp.float().exp().flatten())
    return mass.topk(count).indices.sort().values
