"""Is a large model as fast as memory allows? Times exits of Mistral-7B-v0.3's geometry, with random weights.

    .venv/bin/python benchmarks/paper_size.py [--format int4] [--repetitions 7]

The cost of a step does not depend on the weights' values, so no weights are fetched. One block is drawn at random, and
every block gets a copy in memory of its own; the library's model has shapes only. One token at a time then runs through the
first blocks and the head, at a fixed context. Its time is compared with the time that reading its bytes (weights, keys and
values) takes at this machine's memory bandwidth, which is measured between the steps. This needs 16 GB of memory for
bfloat16, and 7 GB for int4.

Prints a table in Markdown for each format and writes everything to build/bench/paper_size.json.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MistralConfig

from growth import machine
from offramp.model.lean.base import MakeWeight
from offramp.model.lean.llama import LeanLlama
from offramp.model.lean.weights import GROUP, Int4, Int8, Store, Tensors, Weight
from offramp.model.modules import Modules
from offramp.model.state import State
from speed import read_bandwidth

WORK = Path("build/bench")
CONTEXT = 64
EXITS = (8, 16, 24, 32)
CONFIG = MistralConfig(
    vocab_size=32768,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=32768,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    sliding_window=None,
    tie_word_embeddings=False,
)


class RandomLean(LeanLlama):
    """The lean path with random weights in the layers' shapes. All blocks have the same values."""

    def _maker(self, name: int | str, kind: type[Weight]) -> MakeWeight:
        def make(part: str, layers: list[nn.Linear], order: Tensor | None) -> Weight:
            rows, columns = sum(layer.out_features for layer in layers), layers[0].in_features
            drawn = self._store(part, lambda: draw(kind, rows, columns))
            return kind({name: tensor.clone() for name, tensor in drawn.items()})

        return make


def draw(kind: type[Weight], rows: int, columns: int) -> Tensors:
    """The tensors of a random weight of this kind, with mean 0 and the standard deviation of a new model's weights."""
    deviation = CONFIG.initializer_range
    if kind is Int4:
        scale = torch.full((rows, columns // GROUP), deviation * 12**0.5 / 16)
        return {"w": torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8), "scale": scale, "low": -7.5 * scale}
    if kind is Int8:
        w = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
        return {"w": w, "scale": torch.full((rows,), deviation * 12**0.5 / 255)}
    return {"w": torch.empty(rows, columns, dtype=torch.bfloat16).normal_(std=deviation)}


def build(format: str) -> LeanLlama:
    """The lean path, made of library modules that hold only norms and rotary tables."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16)
    trunk = model.model
    for module in model.modules():
        if isinstance(module, type(trunk.norm)):
            nn.init.ones_(module.to_empty(device="cpu").weight)
    embedding = trunk.embed_tokens.to_empty(device="cpu")
    nn.init.normal_(embedding.weight, std=CONFIG.initializer_range)
    head = model.lm_head.to_empty(device="cpu")  # tells the lean path the device; its pages are never touched
    rotary = type(trunk.rotary_emb)(CONFIG)
    windows = [CONFIG.sliding_window] * CONFIG.num_hidden_layers
    modules = Modules(embedding, list(trunk.layers), trunk.norm, head, rotary=rotary, windows=windows)
    return RandomLean(modules, format, Store())


def measure(format: str, repetitions: int, threads: int) -> dict[str, Any]:
    """For each of `EXITS`, the milliseconds of every repetition and the bytes read; and the memory bandwidth in GB/s."""
    lean = build(format)
    state = State(["attention"] * len(lean.blocks), CONTEXT + 1)

    def run(ids: Tensor, first: int, blocks: int) -> Tensor:
        """Token ids (1, T) → logits (1, 1, V) of the last token after `blocks` blocks."""
        h, step = lean.embed(ids, first)
        (h,) = lean.run_all([(h, state, step)], 0, blocks)
        return lean.logits(h[:, -1:])

    logits = run(torch.randint(0, CONFIG.vocab_size, (1, CONTEXT)), 0, len(lean.blocks))
    times: dict[int, list[float]] = {blocks: [] for blocks in EXITS}
    bandwidths = []
    for repetition in range(repetitions + 1):  # by turns, so that a slow moment of the machine affects all of them
        bandwidths.append(read_bandwidth(threads))
        for blocks in EXITS:
            ids = logits[:, -1].argmax(-1, keepdim=True)
            started = time.perf_counter()
            logits = run(ids, CONTEXT, blocks)
            if repetition:  # the first warms up
                times[blocks].append(1000 * (time.perf_counter() - started))
            assert logits.isfinite().all(), f"{format}: logits after {blocks} blocks are not finite"
            state.crop(CONTEXT)
    kept = 2 * lean.heads * lean.dim * (CONTEXT + 1) * torch.float32.itemsize
    sizes = [sum(weight.nbytes for weight in block.weights) for block in lean.blocks]
    read = {blocks: sum(sizes[:blocks]) + lean.head.nbytes + blocks * kept for blocks in EXITS}
    weights = sum(sizes) + lean.head.nbytes
    facts = {"format": format, "engine": lean.engine, "weight_bytes": weights, "bandwidth": median(bandwidths)}
    return {**facts, "bandwidths": bandwidths, "bytes": read, "ms": times}


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    lines = [["exit after block", "GB read", "ms at the machine's bandwidth", "ms measured", "measured / bandwidth's"]]
    lines.append(["---:"] * len(lines[0]))
    for blocks, read in result["bytes"].items():
        least, measured = read / result["bandwidth"] / 1e6, median(result["ms"][blocks])
        lines.append([str(blocks), f"{read / 1e9:.2f}", f"{least:.0f}", f"{measured:.0f}", f"{measured / least:.2f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", choices=("int4", "bfloat16"), help="both by default, one after the other")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)

    note = machine(args.threads, read_bandwidth(args.threads))
    torch.manual_seed(0)
    print(f"{note}\n\nMistral-7B-v0.3's geometry, random weights, context {CONTEXT}; medians of {args.repetitions}")
    results = []
    for format in [args.format] if args.format else ["int4", "bfloat16"]:
        results.append(result := measure(format, args.repetitions, args.threads))
        print(f"\n{format} ({result['engine']}), {result['weight_bytes'] / 1e9:.1f} GB of weights; ", end="")
        print(f"memory read at {result['bandwidth']:.1f} GB/s meanwhile\n\n{table(result)}", flush=True)
    WORK.mkdir(parents=True, exist_ok=True)
    facts = {"machine": note, "context": CONTEXT, "results": results}
    (WORK / "paper_size.json").write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
