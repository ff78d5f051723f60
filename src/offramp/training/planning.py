"""The plan of a training: where exits go, how many answers the model makes, and how long the exits learn.

A short probe measures how fast the model answers, and so how many answers fit into the time. The same answers are used to
choose the length of the exits' tails (`places`).
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from offramp.errors import BadInput
from offramp.exits.config import ExitsConfig, suggested_places
from offramp.exits.exits import Exits
from offramp.files import write_atomically
from offramp.model.backbone import Backbone
from offramp.progress import Progress, silent
from offramp.training.answering import write_shards
from offramp.training.config import TrainConfig
from offramp.training.data import prompts_of, turns
from offramp.training.drafting import check_tails
from offramp.training.places import tried, variants
from offramp.training.sketch import DIMS
from offramp.training.teacher import TeacherTexts, TextGroup, group_texts

# Shares of the time; the rest is for labels.
PROBING, TRYING = 0.05, 0.1  # for answers that only the trial needs, and for the trial
DECIDING = 0.34, 0.36, 0.06, 0.06  # for answers, adapters, gates, and measuring harm
DRAFTING = 0.5, 0.42, 0.0, 0.0  # exits that draft have no use for gates and harm, and there is no trial
MOST_ANSWERS = 12  # answers to one prompt at most: more would add little
PROBED, MOST_TRIED = 64, 256  # answers of the probe; those that the trial uses, at most


@dataclass(frozen=True)
class Schedule:
    """The plan: the exits' places, the number of answers, and hours for adapters, gates and measuring harm.

    Without a number there is one answer for each prompt. Hours are None where epochs are given.
    """

    layers: tuple[int, ...]
    tails: tuple[int, ...]
    answers: int | None = None
    adapter_hours: float | None = None
    gate_hours: float | None = None
    harm_hours: float | None = None


def planned(
    backbone: Backbone, config: TrainConfig, work: Path, progress: Progress = silent, start: Exits | None = None
) -> Schedule:
    """The plan for the config's budget, for exits that go on from `start` or are new.

    It is kept in the folder `work`, and resumed work follows it. The stage "plan" tells it to the user. Raises `BadInput`
    where the config wants other places than those of `start`.
    """
    layers, tails = suggested_places(backbone.n_blocks)
    if start is not None:
        layers, tails = start.config.layers, start.config.tails or (0,) * len(start.config.layers)
        if config.layers not in (None, layers) or config.tails not in ((), tails):
            raise BadInput(
                "The exits of --start are at other places.",
                "Leave --layers and --tails out, or train new exits, without --start.",
            )
    elif config.layers:
        layers, tails = config.layers, config.tails
    tails = config.tails or tails
    shape_of(backbone, config, layers, tails).check(backbone)
    free = start is None and not config.layers and not config.tails and config.epochs is None
    if (start.config if start else config).readout == "deep":
        for each in variants(tails, layers, backbone.n_blocks) if free else [tails]:
            check_tails(backbone, each)
    if config.epochs is not None:
        return Schedule(layers, tails, config.answers)
    kept = work / "budget.json"
    if not kept.exists():
        plan, note = _measured(backbone, config, layers, tails, work / "probe", progress, free)
        write_atomically(kept, json.dumps(asdict(plan)).encode())
        progress("plan", 1, 1, note)
    record = json.loads(kept.read_text("utf-8"))
    return Schedule(**{**record, "layers": tuple(record["layers"]), "tails": tuple(record["tails"])})


def shape_of(backbone: Backbone, config: TrainConfig, layers: tuple[int, ...], tails: tuple[int, ...]) -> ExitsConfig:
    """The shape of new exits at these places."""
    shortlist = config.shortlist if config.shortlist < backbone.vocab_size else 0
    # With few tokens or dims, a sketch would cost as much as the head. How many dims it gets, its loss says (`sketch`).
    large = backbone.vocab_size >= 16384 and backbone.hidden_size >= 8 * DIMS[0]
    sketch = (DIMS[0] if large else 0) if config.sketch is None else config.sketch
    return ExitsConfig(
        layers,
        config.gate,
        config.readout,
        config.gate_width,
        config.readout_width,
        shortlist,
        sketch,
        tails if any(tails) else (),
        middle=config.middle,
    )


def _measured(
    backbone: Backbone,
    config: TrainConfig,
    layers: tuple[int, ...],
    tails: tuple[int, ...],
    folder: Path,
    progress: Progress,
    free: bool,
) -> tuple[Schedule, str]:
    """A plan from a few answers side by side, and its text. If the tails are `free`, a trial chooses them."""
    prompts = prompts_of(backbone, config)
    candidates = variants(tails, layers, backbone.n_blocks) if free else []
    starts = {backbone.n_blocks - tail for each in candidates for tail in each if tail}
    needed = tuple(sorted({*layers, *starts, backbone.n_blocks}))
    shutil.rmtree(folder, ignore_errors=True)

    def answered(first: int, last: int) -> TeacherTexts:
        asked, temperatures = turns(prompts, config.temperatures, last)
        groups, done = group_texts(asked[first:], [], config.answer_tokens, 48, temperatures[first:]), first

        def after_group(group: TextGroup) -> None:
            nonlocal done
            done += len(group.ids)
            progress("probe", done, last)

        return TeacherTexts.open(write_shards(backbone, groups, needed, folder / str(first), after_group))

    started = time.perf_counter()
    texts = answered(0, PROBED)
    seconds = (time.perf_counter() - started) / PROBED
    tokens = sum(int(text.counted.sum()) for text in texts) / PROBED
    if free:
        more = min(MOST_TRIED - PROBED, int(3600 * config.hours * PROBING / seconds))
        texts = texts + answered(PROBED, PROBED + more) if more else texts
        parts = shape_of(backbone, config, layers, tails)
        tails = tried(backbone, config, parts, texts, needed, folder, TRYING * config.hours, progress)
    shutil.rmtree(folder)
    answering, fitting, gating, measuring = (
        config.hours * share for share in (DRAFTING if config.readout == "deep" else DECIDING)
    )
    answers = config.answers or min(MOST_ANSWERS * len(prompts), max(1, int(3600 * answering / seconds)))
    gates = None if config.gate_epochs is not None else gating
    plan = Schedule(layers, tails, answers, fitting, gates, measuring)
    where = ", ".join(f"{layer} + {tail}" for layer, tail in zip(layers, tails or [0] * len(layers), strict=True))
    minutes, training = answers * seconds / 60, 60 * (fitting + gating)
    says = f"{answers:,} answers of about {tokens:.0f} tokens in {minutes:.0f} min; {training:.0f} min of training"
    return plan, f"exits after blocks {where}; {says}"
