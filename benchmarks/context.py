"""What does a token cost after a long text, in time and in memory? Models beside each other.

    .venv/bin/python benchmarks/context.py smollm2 smollm2-hybrid [--formats bfloat16] [--rounds 5]

A step is embedding, all blocks and head for one new token. The text before it is in memory already: random tokens.
Models take turns, step by step, so that a slow minute of the machine affects all of them. Memory is that of one
sequence: keys and values, and Mamba states.

Prints a table in Markdown for each format: medians in milliseconds, the median ratio to the first model's step with its
lowest and highest round, and megabytes.
"""

from __future__ import annotations

import argparse
import os
import time
from statistics import median

import torch

import offramp
from offramp.model.backbone import Backbone
from offramp.model.runtime import AnyState
from speed import machine, read_bandwidth

CONTEXTS = (64, 256, 1024, 4096, 16384)
STEPS = 8  # of each model in a round
PIECE = 512  # tokens of a text that are read at once


def read(backbone: Backbone, state: AnyState, length: int) -> None:
    """Fill `state` with `length` random tokens by `project`. A step costs the same after any tokens."""
    for first in range(0, length, PIECE):
        ids = torch.randint(0, backbone.vocab_size, (1, min(PIECE, length - first)))
        h, step = backbone.embed(ids, first)
        backbone.project(h, 0, backbone.n_blocks, state, step)


def timed(backbone: Backbone, state: AnyState, start: int) -> float:
    """Milliseconds of a step at position `start`."""
    started = time.perf_counter()
    h, step = backbone.embed(torch.randint(0, backbone.vocab_size, (1, 1)), start)
    backbone.logits(backbone.run(h, 0, backbone.n_blocks, state, step))
    return 1000 * (time.perf_counter() - started)


def rounds(models: dict[str, tuple[Backbone, AnyState]], length: int, count: int) -> dict[str, list[float]]:
    """For each model, the median milliseconds of a step in each round, after so many tokens."""
    found: dict[str, list[float]] = {name: [] for name in models}
    position = length
    for number in range(count + 1):
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(STEPS):
            for name, (backbone, state) in models.items():
                times[name].append(timed(backbone, state, position))
            position += 1
        if number:  # the first round warms up
            for name, several in times.items():
                found[name].append(median(several))
    return found


def cells(ms: dict[str, list[float]], models: dict[str, tuple[Backbone, AnyState]]) -> list[str]:
    """Of each model: milliseconds, the ratio to the first model's, and megabytes."""
    first = next(iter(ms.values()))
    made = []
    for name, several in ms.items():
        ratios = [a / b for a, b in zip(several, first, strict=True)]
        ratio = "" if several is first else f" (×{median(ratios):.2f}, {min(ratios):.2f}–{max(ratios):.2f})"
        made += [f"{median(several):.2f}{ratio}", f"{models[name][1].bytes / 1e6:.1f}"]
    return made


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="models; the first is what the others are compared with")
    parser.add_argument("--formats", default="bfloat16", help="weight formats, by comma")
    parser.add_argument("--contexts", default=",".join(map(str, CONTEXTS)), help="tokens before the step, rising, by comma")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    contexts = [int(each) for each in args.contexts.split(",")]
    print(machine(args.threads, read_bandwidth(args.threads)))
    torch.manual_seed(0)
    for weights in args.formats.split(","):
        backbones = {name: offramp.load(name, weights).backbone for name in args.models}
        print(f"\n{weights}, {args.rounds} rounds of {STEPS} steps\n")
        print("| tokens before |" + "".join(f" {name}, ms | MB |" for name in backbones))
        print("|---:|" + "---:|---:|" * len(backbones))
        for length in contexts:
            models = {
                name: (backbone, backbone.state(length + (args.rounds + 1) * STEPS)) for name, backbone in backbones.items()
            }
            for backbone, state in models.values():
                read(backbone, state, length)
            made = cells(rounds(models, length, args.rounds), models)
            print(f"| {length} | {' | '.join(made)} |", flush=True)


if __name__ == "__main__":
    main()
