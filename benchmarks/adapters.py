"""Which adapter takes a token best over the middle of the network: linear, a gated MLP, or a Mamba block?

    .venv/bin/python benchmarks/adapters.py [--model smollm2] [--layers 10,15,20] [--tails 4,3,3] [--answers 3000]

All kinds have about the same number of parameters, and so of FLOPs. They are trained on the same own answers, in
the same order. A tenth of the answers is held out. The table has the agreement with full depth on these, and the share of
tokens that may leave if 95% of them must be right (ranked by max-prob), with 95% intervals over texts and seeds.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import offramp
from offramp import Exits, ExitsConfig
from offramp.exits.readouts import READOUTS
from offramp.machine import machine
from offramp.model.backbone import Backbone
from offramp.training.config import TrainConfig
from offramp.training.data import gather
from offramp.training.trainer import Trainer, needed_layers
from offramp.training.validation import Labels, lowest

KINDS = ("linear", "ffn", "mamba")
ROUNDS, REPETITIONS = 8, 1000


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers, by comma."""
    return tuple(map(int, text.split(",")))


def parameters(backbone: Backbone, config: ExitsConfig) -> int:
    """The parameters of an adapter."""
    with torch.device("meta"):
        adapter = READOUTS[config.readout](backbone.hidden_size, config.readout_width, tail=1)
    return sum(parameter.numel() for parameter in adapter.parameters())


def alike(backbone: Backbone, config: ExitsConfig, wanted: int) -> ExitsConfig:
    """The config with the width, a multiple of 32, at which an adapter has nearest to `wanted` parameters."""
    configs = [replace(config, readout_width=width) for width in range(32, 4096, 32)]
    return min(configs, key=lambda each: abs(parameters(backbone, each) - wanted))


def measures(labels: list[Labels], chosen: np.ndarray, index: int) -> tuple[float, float]:
    """Agreement and the share that may leave at 95% precision, of exit `index` on the `chosen` texts."""
    agrees = torch.cat([labels[number].agrees[:, index] for number in chosen])
    top_prob = torch.cat([labels[number].top_prob[:, index] for number in chosen])
    known = agrees >= 0
    right = agrees[known].bool()
    return float(right.float().mean()), lowest(top_prob[known], right, 0.95)[1] / int(known.sum())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--own-prompts", help="prompts to answer; default: offramp's own list")
    parser.add_argument("--layers", type=numbers, default=(10, 15, 20))
    parser.add_argument("--tails", type=numbers, default=(4, 3, 3))
    parser.add_argument("--width", type=int, default=1536, help="of the gated MLP; the other kinds get as many parameters")
    parser.add_argument("--answers", type=int, default=3000)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("build/adapters"))
    args = parser.parse_args(argv)
    backbone = offramp.load(args.model, args.dtype).backbone
    settings = TrainConfig(
        prompts=args.own_prompts, answers=args.answers, answer_tokens=args.tokens, epochs=args.epochs, gate_epochs=0
    )
    base = ExitsConfig(args.layers, "linear", "ffn", readout_width=args.width, tails=args.tails)
    data = gather(backbone, settings, needed_layers(Exits.new(backbone, base)), args.work / "text")
    texts = data.adapters + data.gates
    wanted = parameters(backbone, base)
    print(f"{backbone.name}, {backbone.weight_format}; {machine()}")
    print(f"{len(texts)} answers, {sum(int(text.counted.sum()) for text in texts)} tokens, {args.epochs} epochs\n")
    places = " | ".join(f"{layer} + {tail}: agreement | may leave at 95%" for layer, tail in base.places)
    print(f"| adapter | parameters | minutes | {places} |\n|---|---|---|" + "---|---|" * len(base.layers), flush=True)
    for kind in KINDS:
        config = alike(backbone, replace(base, readout=kind), wanted)
        width = config.readout_width
        runs: list[list[Labels]] = []
        started = time.perf_counter()
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            exits = Exits.new(backbone, config)
            trainer = Trainer(backbone, exits, replace(settings, seed=seed), args.work / f"{kind}-{width}-{seed}")
            trainer.standardise(texts)
            trainer.fit_adapters(texts)
            exits.modules.eval().requires_grad_(False)
            runs.append(trainer.labels(data.held, ROUNDS).labels)
        minutes = (time.perf_counter() - started) / 60 / args.seeds
        cells = [cell for index in range(len(config.layers)) for cell in intervals(runs, index)]
        print(f"| {kind}, {width} | {parameters(backbone, config):,} | {minutes:.1f} | {' | '.join(cells)} |", flush=True)


def intervals(runs: list[list[Labels]], index: int) -> list[str]:
    """Both measures of exit `index`, as "64.6% (63.1–66.0)"."""
    draws, count = np.random.default_rng(0), len(runs[0])
    everything = np.arange(count)
    mean = np.mean([measures(run, everything, index) for run in runs], axis=0)
    resampled = []
    for _ in range(REPETITIONS):
        chosen, seeds = draws.integers(count, size=count), draws.integers(len(runs), size=len(runs))
        resampled.append(np.mean([measures(runs[seed], chosen, index) for seed in seeds], axis=0))
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    return [f"{m:.1%} ({100 * lo:.1f}–{100 * hi:.1f})" for m, lo, hi in zip(mean, low, high, strict=True)]


if __name__ == "__main__":
    main()
