"""Is the Mamba gate better than others, and because it remembers? Compares gates of one size over several seeds.

    .venv/bin/python benchmarks/gates.py TruthfulQA.csv [--model smollm2] [--exits DIR] [--count 100] [--max-prompts 400]

All gates judge the same read-outs, those of the given exits (default: the shipped ones). They learn from the same own
answers, and are measured on the same questions, none of which was trained on:

- `mamba`: a Mamba block of `--width` beside a linear path, as in the shipped gates;
- `ffn`: a feed-forward gate with as many parameters;
- `linear`: a linear map, which has no width;
- `mamba, memory cut`: the trained `mamba` gate, with an empty memory at every token;
- `mamba, never a memory`: a gate that was also trained with an empty memory at every token.

Prints a table in Markdown: parameters, FLOPs a token, and each exit's area under the ROC curve: the mean over seeds, with a
95% interval over questions and seeds (bootstrap). The last column is the mean over exits minus that of `mamba`, on the same
resampled questions and seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import offramp
from answers import questions_in
from offramp import Exits
from offramp.exits.parts import ExitPart, Memory
from offramp.metrics import auroc
from offramp.training.answering import write_shards
from offramp.training.config import TrainConfig
from offramp.training.data import gather
from offramp.training.teacher import TeacherTexts, group_texts
from offramp.training.trainer import Trainer, needed_layers
from offramp.training.validation import LabelledTexts
from paper_exits import mark, with_gate

REPETITIONS = 400


class Forgetful(ExitPart):
    """A gate that sees every token with an empty memory."""

    def __init__(self, gate: ExitPart) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, h: Tensor, memory: Memory = None) -> tuple[Tensor, Memory]:
        score, _ = self.gate(h.flatten(0, 1)[:, None])
        return score.view(h.shape[:2]), None


def equal(size: Callable[[int], int], wanted: int) -> int:
    """The width, a multiple of 16, at which `size(width)` is nearest to `wanted`."""
    return min(range(16, 1024, 16), key=lambda width: abs(size(width) - wanted))


@torch.inference_mode()
def scores(exits: Exits, answers: LabelledTexts) -> list[list[Tensor]]:
    """For each question and exit, the gate's logits on the answer's tokens."""
    return [
        [exit.gate(text.hidden[None, :, answers.places[exit.block]].float())[0][0][text.counted] for exit in exits]
        for text in answers.texts
    ]


def area(logits: list[list[Tensor]], answers: LabelledTexts, chosen: np.ndarray, index: int) -> float:
    """The area under the ROC curve of exit `index`, over the answers to the `chosen` questions."""
    agrees = torch.cat([answers.labels[number].agrees[:, index] for number in chosen])
    known = agrees >= 0
    return auroc(torch.cat([logits[number][index] for number in chosen])[known], agrees[known].bool())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("questions", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--exits", type=Path)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--own-prompts", help="prompts whose answers the gates learn from; default: offramp's own list")
    parser.add_argument("--max-prompts", type=int)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("build/gates"))
    args = parser.parse_args(argv)
    backbone = offramp.load(args.model).backbone
    base = Exits.load(args.exits, backbone) if args.exits else offramp.ExitSet.shipped(backbone).early
    if not base:
        parser.error(f"No exits ship for {backbone.name}. Give --exits.")
    settings = TrainConfig(
        prompts=args.own_prompts, max_prompts=args.max_prompts, gate_epochs=args.epochs, gate_target="agreement"
    )
    # Texts for other settings, or of another model, are kept elsewhere.
    args.work /= mark(asdict(settings), base.training, backbone.source.fingerprint)
    data = gather(backbone, settings, needed_layers(base), args.work / "text")
    prompts = [backbone.prompts.encode(question) for question in questions_in(args.questions, args.count)]
    groups = group_texts(prompts, [], args.tokens, batch=48)
    shards = args.work / f"asked-{mark(prompts, args.tokens)}"
    shards.mkdir(parents=True, exist_ok=True)
    reader = Trainer(backbone, base, settings, args.work)
    answers = reader.labels(TeacherTexts.open(write_shards(backbone, groups, needed_layers(base), shards)))
    to_learn = reader.labels(data.gates)

    def parameters(exits: Exits) -> int:
        return sum(parameter.numel() for exit in exits for parameter in exit.gate.parameters())

    def flops(exits: Exits) -> int:
        return sum(exit.gate.flops() for exit in exits)

    mamba = with_gate(backbone, base, "mamba", args.width)
    kinds = {
        "mamba": ("mamba", args.width),
        "ffn": ("ffn", equal(lambda width: parameters(with_gate(backbone, base, "ffn", width)), parameters(mamba))),
        "linear": ("linear", 16),
        "mamba, never a memory": ("mamba", args.width),
    }
    logits: dict[str, list[list[list[Tensor]]]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for name, (kind, width) in kinds.items():
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            exits = with_gate(backbone, base, kind, width)
            sizes[name] = (parameters(exits), flops(exits))
            folder = args.work / f"{name} {width} {seed}"
            folder.mkdir(parents=True, exist_ok=True)
            trainer = Trainer(backbone, exits, replace(settings, seed=seed), folder)
            trainer.standardise(data.adapters, "gate")
            if name == "mamba, never a memory":
                for exit in exits:
                    exit.gate = Forgetful(exit.gate)
            trainer.fit_gates(to_learn)
            logits.setdefault(name, []).append(scores(exits, answers))
            if name == "mamba":
                for exit in exits:
                    exit.gate = Forgetful(exit.gate)
                logits.setdefault("mamba, memory cut", []).append(scores(exits, answers))
                sizes["mamba, memory cut"] = sizes["mamba"]

    count = len(base)
    draws = np.random.default_rng(0)
    resampled: dict[str, list[list[float]]] = {name: [] for name in logits}
    for _ in range(REPETITIONS):
        chosen, seeds = draws.integers(len(answers), size=len(answers)), draws.integers(args.seeds, size=args.seeds)
        for name, runs in logits.items():
            areas = [[area(runs[seed], answers, chosen, index) for index in range(count)] for seed in seeds]
            resampled[name].append(np.mean(areas, axis=0).tolist())
    tokens = sum(len(labels.agrees) for labels in to_learn.labels)
    print(f"\n{backbone.name}, {backbone.weight_format}: gates trained on {tokens} tokens, {args.seeds} seeds; measured on")
    asked = sum(len(labels.agrees) for labels in answers.labels)
    print(f"{asked} tokens of answers to {len(answers)} questions\n")
    columns = " | ".join(f"block {layer}" for layer in base.config.layers)
    print(f"| gate | parameters | FLOPs a token | {columns} | mean, against mamba |")
    print("|---|---|---|" + "---|" * (count + 1))
    everything = np.arange(len(answers))
    for name, runs in logits.items():
        cells = []
        for index in range(count):
            mean = np.mean([area(run, answers, everything, index) for run in runs])
            low, high = np.nanquantile([areas[index] for areas in resampled[name]], (0.025, 0.975))
            cells.append(f"{mean:.3f} ({low:.3f}–{high:.3f})")
        gaps = np.nanmean(resampled[name], axis=1) - np.nanmean(resampled["mamba"], axis=1)
        low, high = np.quantile(gaps, (0.025, 0.975))
        gap = "" if name == "mamba" else f"{np.mean(gaps):+.3f} ({low:+.3f} – {high:+.3f})"
        print(f"| {name} | {sizes[name][0]:,} | {sizes[name][1]:,} | {' | '.join(cells)} | {gap} |")


if __name__ == "__main__":
    main()
