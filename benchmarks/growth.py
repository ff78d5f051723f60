"""How does the cost of a decode step grow with the context, the rows of a chunk, the batch, and the exit?

    .venv/bin/python benchmarks/growth.py [MODEL] [--random] [--formats bfloat16,int4] [--rounds 3] [--figure FILE]

A step is embedding, blocks and head for new tokens after a context that is in memory already. Keys and values are cropped
after each repetition, so that each does the same work. A Mamba state is not cropped: a step costs the same after any text.
Of a chunk, only the last row gets logits, as when a prompt is read; every row of verified drafts does, and every sequence
of a batch. A step that leaves early also fills the blocks that it skips, by `project`.

Formats take turns, round by round, so that a slow minute of the machine affects all of them.

Prints a table in Markdown for each of the five, with medians in milliseconds. Writes everything to build/bench/growth.json,
and draws it in build/bench/growth.svg, or FILE.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from datetime import date
from math import floor, log10
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

import offramp
from offramp.machine import processor
from offramp.model.backbone import Backbone
from offramp.model.compiled.formats import FORMATS
from offramp.model.loading import outline
from offramp.model.runtime import AnyState
from speed import read_bandwidth

WORK = Path("build/bench")
CONTEXT = 256  # tokens of context while something else grows
PIECE = 512  # tokens of a context that are read at once
WARMUP, REPETITIONS = 2, 7  # in each round
Axes = dict[str, tuple[int, ...]]


def axes_of(backbone: Backbone) -> Axes:
    """The values to measure: contexts up to 4,096 tokens, or up to 16,384 where memory does not grow with them."""
    sixths = sorted({max(1, round(backbone.n_blocks * part / 6)) for part in range(1, 7)})
    return {
        "context": (64, 256, 1024, 4096) if "attention" in backbone.kinds else (64, 256, 1024, 4096, 16384),
        "chunk rows": (1, 2, 4, 8, 16),
        "verified rows": (1, 2, 3, 4, 5, 6, 7, 8),
        "batch": (1, 2, 4, 8, 16),
        "blocks run": tuple(sixths),
    }


def machine(threads: int, bandwidth: float) -> str:
    """The machine and the versions in one line; `bandwidth` in GB/s."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{processor()}, {os.cpu_count()} cores, {threads} threads, {memory:.0f} GiB of memory read at "
        f"{bandwidth:.1f} GB/s; {date.today()}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


def read(backbone: Backbone, state: AnyState, start: int, length: int) -> None:
    """Fill `state` from `start` to `length` random tokens by `project`. A step costs the same after any tokens."""
    for first in range(start, length, PIECE):
        ids = torch.randint(0, backbone.vocab_size, (1, min(PIECE, length - first)))
        h, step = backbone.embed(ids, first)
        backbone.project(h, 0, backbone.n_blocks, state, step)


def decode(
    backbone: Backbone, state: AnyState, batch: int = 1, rows: int = 1, blocks: int | None = None, verified: bool = False
) -> None:
    """Run one step: `rows` tokens of each of `batch` sequences, through the first `blocks` blocks (default: all)."""
    blocks = blocks or backbone.n_blocks
    h, step = backbone.embed(torch.randint(0, backbone.vocab_size, (batch, rows)), state.length(0))
    h = backbone.run(h, 0, blocks, state, step)
    backbone.logits(h if verified else h[:, -1:])
    if blocks < backbone.n_blocks:
        backbone.project(h, blocks, backbone.n_blocks, state, step)


def measure(backbone: Backbone, axes: Axes) -> Iterator[tuple[str, list[list[float]]]]:
    """For each axis, the milliseconds of every repetition at every value."""
    long, state, seen = backbone.state(max(axes["context"]) + 1), backbone.state(CONTEXT + max(axes["chunk rows"])), 0

    def timed(state: AnyState, **shape: Any) -> list[float]:
        length, times = state.length(0), []
        for _ in range(WARMUP + REPETITIONS):
            started = time.perf_counter()
            decode(backbone, state, **shape)
            times.append(1000 * (time.perf_counter() - started))
            if length:
                state.crop(length)
        return times[WARMUP:]

    def at_context(length: int) -> list[float]:
        nonlocal seen
        read(backbone, long, seen, length)
        seen = length
        return timed(long)

    def in_batch(size: int) -> list[float]:
        state.select(torch.zeros(size, dtype=torch.int64))
        return timed(state, batch=size)

    read(backbone, state, 0, CONTEXT)
    ways: dict[str, Callable[[int], list[float]]] = {
        "context": at_context,
        "chunk rows": lambda rows: timed(state, rows=rows),
        "verified rows": lambda rows: timed(state, rows=rows, verified=True),
        "blocks run": lambda blocks: timed(state, blocks=blocks),
        "batch": in_batch,  # last, since the state keeps the copied sequences
    }
    for axis, way in ways.items():
        yield axis, [way(value) for value in axes[axis]]


def table(axis: str, values: tuple[int, ...], ms: dict[str, list[float]]) -> str:
    """A Markdown table of milliseconds for each format, and their ratio to the first row's."""
    lines = [[axis, *(f"{format}, ms" for format in ms)], ["---:"] * (1 + len(ms))]
    for index, value in enumerate(values):
        lines.append([str(value), *(f"{times[index]:.1f} (×{times[index] / times[0]:.2f})" for times in ms.values())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figure(axes: Axes, medians: dict[str, dict[str, list[float]]]) -> str:
    """An SVG with one panel for each axis: values evenly spaced, milliseconds from zero, one line for each format."""
    width, height, dashes = 150, 120, ("none", "6 3", "2 2", "8 2 2 2", "1 3")
    parts = []
    for panel, (axis, ms) in enumerate(medians.items()):
        top, values = 1.1 * max(max(times) for times in ms.values()), axes[axis]
        places = [width * (index + 0.5) / len(values) for index in range(len(values))]
        parts.append(f'<g transform="translate({45 + 205 * panel} 45)"><path d="M0 0V{height}H{width}"/>')
        parts += [f'<text x="{x:.0f}" y="{height + 14}">{value}</text>' for x, value in zip(places, values, strict=True)]
        parts.append(
            f'<text x="{width / 2}" y="{height + 30}">{axis}</text><text x="-5" y="-9" style="text-anchor:end">ms</text>'
        )
        power = 10 ** floor(log10(top / 5))
        step = next(digit * power for digit in (1, 2, 5, 10) if 5 * digit * power >= top)
        for tick in range(int(top / step) + 1):
            y = height * (1 - tick * step / top) + 4
            parts.append(f'<text x="-5" y="{y:.0f}" style="text-anchor:end">{tick * step:g}</text>')
        for dash, times in zip(dashes, ms.values(), strict=False):
            points = " ".join(f"{x:.1f},{height * (1 - y / top):.1f}" for x, y in zip(places, times, strict=True))
            parts.append(f'<polyline points="{points}" stroke-width="2" stroke-dasharray="{dash}"/>')
        parts.append("</g>")
    for index, (dash, format) in enumerate(zip(dashes, next(iter(medians.values())), strict=False)):
        x = 45 + 150 * index
        parts.append(f'<path d="M{x} 12h30" stroke-width="2" stroke-dasharray="{dash}"/>')
        parts.append(f'<text x="{x + 36}" y="16" style="text-anchor:start">{format}</text>')
    # An image in a page does not inherit the page's colour, but it knows whether the reader prefers a dark one.
    style = (
        "svg{color:#222}@media(prefers-color-scheme:dark){svg{color:#ddd}}path,polyline{fill:none;stroke:currentColor}"
        "text{fill:currentColor;font:11px sans-serif;text-anchor:middle}"
    )
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {10 + 205 * len(medians)} 205"><style>{style}</style>'
    return "\n".join([svg, *parts, "</svg>\n"])


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--random", action="store_true", help="random weights of the model's shape, from its config alone")
    parser.add_argument("--formats", default="bfloat16,int4", help=f"formats, by comma: {', '.join(FORMATS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--figure", type=Path, default=WORK / "growth.svg")
    args = parser.parse_args(argv)

    note = machine(args.threads, read_bandwidth(args.threads))
    torch.manual_seed(0)
    backbones = {
        format: outline(args.model, format, random=True) if args.random else offramp.load(args.model, format).backbone
        for format in args.formats.split(",")
    }
    first = next(iter(backbones.values()))
    if len(set(first.kinds)) > 1 or first.kinds[0] == "both":
        parser.error(f"{args.model} mixes attention and Mamba, which is not measured here")
    axes = axes_of(first)
    times: dict[str, dict[str, list[list[float]]]] = {
        axis: {format: [[] for _ in values] for format in backbones} for axis, values in axes.items()
    }
    for _ in range(args.rounds):
        for format, backbone in backbones.items():
            for axis, measured in measure(backbone, axes):
                times[axis][format] = [old + new for old, new in zip(times[axis][format], measured, strict=True)]
    medians = {axis: {format: list(map(median, values)) for format, values in ms.items()} for axis, ms in times.items()}

    engines = {format: backbone.engine for format, backbone in backbones.items()}
    repetitions = args.rounds * REPETITIONS
    settings: dict[str, Any] = {"model": args.model, "engines": engines, "repetitions": repetitions, "axes": axes}
    for path in (WORK, args.figure.parent):
        path.mkdir(parents=True, exist_ok=True)
    (WORK / "growth.json").write_text(json.dumps({"machine": note, **settings, "medians": medians, "ms": times}, indent=1))
    args.figure.write_text(figure(axes, medians))
    print(f"{note}\n\n{args.model}, {', '.join(f'{format}: {engine}' for format, engine in engines.items())}; ", end="")
    print(f"medians of {repetitions}; context {CONTEXT} where another number grows")
    for axis, ms in medians.items():
        print(f"\n{table(axis, axes[axis], ms)}")


if __name__ == "__main__":
    main()
