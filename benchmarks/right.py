"""How often are drafts right? Measured on the model's own answers to prompts that the exits have not learned from.

    .venv/bin/python benchmarks/right.py MODEL --prompts FILE [--exits DIR …] [--count 300] [--dtype bfloat16]

The answers are made once, at the temperatures of training, and every folder of exits drafts all of their tokens. Prints a
row for each folder: the share of first, second and third drafts that are full depth's own token, where the drafts before
them are; for the exit alone, and with the table of n-grams where that is surer than the exit is right on average.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import offramp
from offramp.exits.exit_set import ExitSet
from offramp.exits.exits import Exits
from offramp.model.backbone import Backbone
from offramp.training.config import TrainConfig
from offramp.training.data import gather
from offramp.training.trainer import Trainer, needed_layers


def drafting(folder: str | None, backbone: Backbone, parser: argparse.ArgumentParser) -> Exits:
    """The exits of a folder that draft."""
    exits = ExitSet.find(folder, backbone).drafting
    if exits is None:
        parser.error(f"No exits for drafts of {backbone.name} are in {folder or 'the packages'}.")
    return exits


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--exits", action="append", help="a folder of exits; more than once: several are compared")
    parser.add_argument("--count", type=int, default=300, help="of the first prompts of the file")
    parser.add_argument("--dtype")
    args = parser.parse_args(argv)
    backbone = offramp.load(args.model, args.dtype, keep=True).backbone
    compared = {folder or "those that ship": drafting(folder, backbone, parser) for folder in args.exits or [None]}
    first, *others = map(needed_layers, compared.values())
    if any(layers != first for layers in others):
        parser.error("These exits read states of different blocks: compare them in two calls.")
    with tempfile.TemporaryDirectory() as work:
        config = TrainConfig(prompts=args.prompts, max_prompts=args.count)
        data = gather(backbone, config, first, Path(work))
        texts = data.adapters + data.gates + data.held
        tokens = sum(int(text.counted.sum()) for text in texts)
        print(f"{backbone.name}, {backbone.weight_format}: {len(texts)} answers, {tokens:,} tokens.\n")
        print("| exits | the exit is right | with the table |\n|---|---|---|")
        for folder, exits in compared.items():
            found = Trainer(backbone, exits, config, Path(work)).acceptance(texts)[0]
            cells = (", ".join(f"{100 * share:.1f}" for share in shares) + "%" for shares in found.values())
            print(f"| {folder} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
