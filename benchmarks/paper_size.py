"""Do models of the paper's size load and decode here, and how fast? Mistral-7B-v0.3 and Mamba-Codestral-7B, at random.

    .venv/bin/python benchmarks/paper_size.py [--models mistral,codestral] [--formats int4,bfloat16] [--small]

No weights are fetched: a checkpoint of each model's shape is written in shards (14.5 GB in bfloat16) with random weights.
It and its cache take about 40 GB of build/bench/paper_size, which is removed at the end, also after a failure. For each
format, every step below is a process of its own (step 1 is two), which loads the model by `offramp.load`:

1. First load and second load: seconds, and the peak memory of the process, mapped pages included, after it has answered.
2. Prefill of `PROMPT` tokens. Then passes of one row and of several through all blocks and the head, at a fixed context,
   beside the time that reading a token's bytes (weights, keys, values, states) takes at the memory bandwidth of the same
   minutes. What a further row costs decides what drafts gain (`offramp inspect MODEL --what-if rows=…`).

Prints tables in Markdown and writes everything to build/bench/paper_size.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers.utils import logging

import offramp
from offramp import Engine
from offramp.machine import peak_memory
from offramp.model.backbone import Backbone
from offramp.model.costs import Costs
from random_model import config_of, write_random
from speed import machine, read_bandwidth

WORK = Path("build/bench")
FORMATS = ("int4", "bfloat16")
PROMPT = 512  # tokens of the prefill
CONTEXT = 64  # tokens before a token that is timed
ROWS = (1, 2, 4, 8)  # of a pass
GB = 1e9


@dataclass(frozen=True)
class Shape:
    """A model: its hub name, and what `--small` changes of its config."""

    name: str
    small: dict[str, int]


HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
SHAPES = {
    "mistral": Shape(
        "mistralai/Mistral-7B-v0.3",
        {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 1024, **HEADS},
    ),
    "codestral": Shape(
        "mistralai/Mamba-Codestral-7B-v0.1",
        {"hidden_size": 128, "num_heads": 8, "head_dim": 32, "n_groups": 2, "num_hidden_layers": 4, "vocab_size": 1024},
    ),
}


@dataclass(frozen=True)
class Job:
    """What a process needs to know: the checkpoint's folder, the weight format, the threads, how often to repeat."""

    folder: Path
    format: str
    threads: int
    repetitions: int

    def load(self) -> Backbone:
        """The model, with a cache that is removed together with the checkpoint."""
        os.environ["OFFRAMP_CACHE"] = str(self.folder.parent / "cache")
        torch.set_num_threads(self.threads)
        logging.set_verbosity_error()  # every process would say which faster kernels are missing
        return offramp.load(str(self.folder), self.format).backbone


def fresh(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """The result of `function` in a process of its own; {"failure": reason} if it fails, or is killed for its memory."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except Exception as error:  # whatever stops one model, the others go on
            return {"failure": f"{type(error).__name__}: {error}".splitlines()[0]}


def peak() -> float:
    """The most memory that this process has had, in GB, pages of mapped files included."""
    return peak_memory() / GB


def random_ids(backbone: Backbone, count: int) -> list[int]:
    """Token ids of a prompt, the same ones each time."""
    generator = torch.Generator().manual_seed(count)
    return list(torch.randint(0, backbone.vocab_size, (count,), generator=generator).tolist())


def write(shape: Shape, small: bool, folder: Path, threads: int) -> dict[str, Any]:
    """Write the checkpoint; returns its bytes, and the seconds that it took."""
    torch.set_num_threads(threads)
    started = time.perf_counter()
    size = write_random(config_of(shape.name, **(shape.small if small else {})), folder)
    return {"bytes": size, "seconds": time.perf_counter() - started}


def load_once(job: Job) -> dict[str, Any]:
    """Load the model and let it answer in a few tokens, which reads every weight: seconds of loading, and peaks in GB.

    `allowed` is the most memory that loading may take: the weights in their format and 15%, and 0.8 GB.
    """
    started = time.perf_counter()
    backbone = job.load()
    seconds, loaded = time.perf_counter() - started, peak()
    Engine(backbone).generate(random_ids(backbone, CONTEXT), max_tokens=4)
    answered, runtime = peak(), backbone.runtime
    embedding = 0 if backbone.config.tie_word_embeddings else backbone.vocab_size * backbone.hidden_size * 2
    weights = (sum(map(runtime.block_bytes, range(backbone.n_blocks))) + runtime.head_bytes() + embedding) / GB
    facts = {"engine": backbone.engine, "weights": weights, "allowed": 1.15 * weights + 0.8}
    return {**facts, "seconds": seconds, "peak_loaded": loaded, "peak": answered}


def measure(job: Job) -> dict[str, Any]:
    """Tokens a second of the prefill, the bytes of a token, the milliseconds of passes, and the bandwidth in GB/s."""
    backbone = job.load()
    engine, prompt = Engine(backbone), random_ids(backbone, PROMPT)
    speeds = []
    for _ in range(job.repetitions + 1):
        started = time.perf_counter()
        next(engine.stream(prompt, max_tokens=1))
        speeds.append(PROMPT / (time.perf_counter() - started))
    most = peak()  # before the bandwidth is measured, which takes memory of its own
    costs = Costs(backbone)
    read = sum(costs.block_bytes(block, CONTEXT + 1) for block in range(backbone.n_blocks)) + costs.head_bytes
    return {"prefill": speeds[1:], "peak": most, "bytes": read, **passes(backbone, job)}


@torch.inference_mode()
def passes(backbone: Backbone, job: Job) -> dict[str, Any]:
    """Time passes of `ROWS` rows after `CONTEXT` tokens, through all blocks and the head, by turns."""
    state = backbone.state(CONTEXT + max(ROWS))

    def run(ids: list[int], first: int) -> None:
        h, step = backbone.embed(torch.tensor([ids]), first)
        logits = backbone.logits(backbone.run(h, 0, backbone.n_blocks, state, step))
        assert logits.isfinite().all(), f"{job.format}: logits are not finite"

    run(random_ids(backbone, CONTEXT), 0)
    times: dict[int, list[float]] = {rows: [] for rows in ROWS}
    bandwidths = []
    for repetition in range(job.repetitions + 1):
        bandwidths.append(read_bandwidth(job.threads))
        for rows in ROWS:
            started = time.perf_counter()
            run(random_ids(backbone, rows), CONTEXT)
            if repetition:  # the first warms up
                times[rows].append(1000 * (time.perf_counter() - started))
            if "attention" in backbone.kinds:  # a Mamba state goes on: a step costs the same after any text
                state.crop(CONTEXT)
    return {"ms": times, "bandwidth": median(bandwidths), "bandwidths": bandwidths}


def run_model(key: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write a checkpoint of this shape, and do everything with it in every format."""
    shape = SHAPES[key]
    result: dict[str, Any] = {"model": shape.name, "written": fresh(write, shape, args.small, folder, args.threads)}
    for format in args.formats:
        job = Job(folder, format, args.threads, args.repetitions)
        parts: dict[str, Any] = {}
        for part, function in {"first": load_once, "second": load_once, "speed": measure}.items():
            parts[part] = fresh(function, job)
            if "failure" in parts[part]:
                break
        result[format] = parts
    return result


def table(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table. All columns but the first are numbers, mostly."""
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def loads(result: dict[str, Any], formats: list[str]) -> str:
    """What loading takes, and how fast a prompt is read."""
    lines = []
    for format in formats:
        first, second, speed = (result[format].get(part, {}) for part in ("first", "second", "speed"))
        weights = [f"{first['weights']:.2f}", f"{first['allowed']:.1f}"] if "weights" in first else ["–", "–"]
        loading = [f"{part[key]:.1f}" if key in part else "–" for part in (first, second) for key in ("seconds", "peak")]
        prefill = f"{median(speed['prefill']):.0f}" if "prefill" in speed else "–"
        lines.append([f"{format} ({first.get('engine', 'failed')})", *weights, *loading, prefill])
    head = ["weights", "GB", "GB allowed", "first load, s", "peak, GB", "second load, s", "peak, GB"]
    return table([*head, f"prefill of {PROMPT}, tokens/s"], lines)


def rows_table(speed: dict[str, Any]) -> str:
    """The time of passes, beside what reading one token's bytes takes."""
    least = speed["bytes"] / speed["bandwidth"] / 1e6
    times = {rows: median(ms) for rows, ms in speed["ms"].items()}
    lines = [[str(rows), f"{ms:.1f}", f"{ms / times[1]:.2f}", f"{ms / least:.2f}"] for rows, ms in times.items()]
    return table(["rows", "ms", "over one row", "over reading the bytes of one row"], lines)


def report(result: dict[str, Any], formats: list[str]) -> str:
    """Everything about a model in Markdown."""
    written = result["written"]
    if "failure" in written:
        return f"{result['model']}: no checkpoint: {written['failure']}"
    size = f"A checkpoint of {written['bytes'] / GB:.1f} GB, written in {written['seconds']:.0f} s."
    paragraphs = [f"## The shape of {result['model']}", size, loads(result, formats)]
    for format in formats:
        for part, facts in result[format].items():
            if "failure" in facts:
                paragraphs.append(f"{format}, {part}: failed: {facts['failure']}")
            elif part == "speed":
                note = f"{format}, context {CONTEXT}, memory read at {facts['bandwidth']:.1f} GB/s meanwhile"
                read = f"a token reads {facts['bytes'] / GB:.2f} GB"
                paragraphs += [f"{note}; peak {facts['peak']:.1f} GB after the prefill; {read}:", rows_table(facts)]
    return "\n\n".join(paragraphs)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(SHAPES), help=", ".join(SHAPES))
    parser.add_argument("--formats", type=lambda text: text.split(","), default=list(FORMATS), help=", ".join(FORMATS))
    parser.add_argument("--small", action="store_true", help="tiny models of the same families, to try the script")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    for given, known in ((args.models, SHAPES), (args.formats, FORMATS)):
        if unknown := set(given) - set(known):
            parser.error(f"unknown {', '.join(sorted(unknown))}; there are {', '.join(known)}")

    WORK.mkdir(parents=True, exist_ok=True)
    bandwidth = fresh(bandwidth_of, args.threads)["bandwidth"]
    note = machine(args.threads, bandwidth)
    print(f"{note}\n\nRandom weights; medians of {args.repetitions}", flush=True)
    results, work = [], WORK / "paper_size"
    for key in args.models:
        shutil.rmtree(work, ignore_errors=True)  # a run that was killed may have left one
        try:
            results.append(run_model(key, args, work / "model"))
        finally:
            shutil.rmtree(work, ignore_errors=True)
        print(f"\n{report(results[-1], args.formats)}", flush=True)
        (WORK / "paper_size.json").write_text(json.dumps({"machine": note, "results": results}, indent=1))


def bandwidth_of(threads: int) -> dict[str, Any]:
    """The memory bandwidth. A process that starts another one passes on its peak memory, so the first must stay small."""
    return {"bandwidth": read_bandwidth(threads)}


if __name__ == "__main__":
    main()
