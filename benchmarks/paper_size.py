"""Do models of the paper's size load, decode, train and verify here? Mistral-7B-v0.3 and Mamba-Codestral-7B, at random.

    .venv/bin/python benchmarks/paper_size.py [--models mistral,codestral] [--formats int4,bfloat16] [--small]

No weights are fetched: a checkpoint of each model's shape is written in shards (14.5 GB in bfloat16) with random weights.
It and its cache take about 40 GB of build/bench/paper_size, which is removed at the end, also after a failure. For each
format, every step below is a process of its own (step 1 is two), which loads the model by `offramp.load`:

1. First load and second load: seconds, and the peak memory of the process, mapped pages included, after it has answered.
2. Prefill of `PROMPT` tokens. Then one token at a time through the first blocks and the head, at a fixed context, beside
   the time that reading their bytes (weights, keys, values, states) takes at the memory bandwidth of the same minutes.
3. Exits after a half and three quarters of the blocks are trained on a few thousand tokens, with each of `GATES`. Then
   `TOKENS` tokens are decoded with every fill. The thresholds let about half of the tokens leave at each exit.
4. `verify` with drafts that are full depth's own answer, a third of them corrupted: random weights make random drafts, of
   which hardly one would stand. (In the process of step 3.)

Prints tables in Markdown and writes everything to build/bench/paper_size.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from random import Random
from statistics import median, median_low
from typing import Any
from unittest.mock import patch

import torch
from transformers.utils import logging

import offramp
from growth import machine
from offramp import Engine, Exits, Policy, TrainConfig
from offramp.decode.fills import FILLS
from offramp.decode.sampling import Sampler
from offramp.errors import BadInput
from offramp.exits.ngrams import Ngrams
from offramp.model.backbone import Backbone
from offramp.model.compiled.library import MOST_DRAFTS
from offramp.model.costs import Costs
from offramp.training.data import PROMPTS
from random_model import config_of, write_random
from speed import read_bandwidth

WORK = Path("build/bench")
FORMATS = ("int4", "bfloat16")
GATES = ("linear", "mamba")
PROMPT = 512  # tokens of the prefill
CONTEXT = 64  # tokens before a token that is timed
TOKENS = 16  # decoded with each fill
TEXT, QUESTIONS, ANSWER = 2048, 8, 8  # tokens of text, and prompts with tokens of answers, to train on
EPOCHS = 2
VERIFIED = 48  # tokens decoded from drafts
ALWAYS = 1e-30  # a threshold that every confidence exceeds; at 0 no gate would be asked
GB = 1e9


@dataclass(frozen=True)
class Shape:
    """A model: its hub name, the exits to time, and what `--small` changes of its config."""

    name: str
    depths: tuple[int, ...]
    small: dict[str, int]


HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
SHAPES = {
    "mistral": Shape(
        "mistralai/Mistral-7B-v0.3",
        (8, 16, 24, 32),
        {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 1024, **HEADS},
    ),
    "codestral": Shape(
        "mistralai/Mamba-Codestral-7B-v0.1",
        (16, 32, 48, 64),
        {"hidden_size": 128, "num_heads": 8, "head_dim": 32, "n_groups": 2, "num_hidden_layers": 4, "vocab_size": 1024},
    ),
}


@dataclass(frozen=True)
class Job:
    """What a process needs to know: the checkpoint's folder, the weight format, the threads, the exits to time."""

    folder: Path
    format: str
    threads: int
    depths: tuple[int, ...]
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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB


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
    """Tokens a second of the prefill, the milliseconds and bytes of a token at each exit, and the bandwidth in GB/s."""
    backbone = job.load()
    engine, prompt = Engine(backbone), random_ids(backbone, PROMPT)
    speeds = []
    for _ in range(job.repetitions + 1):
        started = time.perf_counter()
        next(engine.stream(prompt, max_tokens=1))
        speeds.append(PROMPT / (time.perf_counter() - started))
    most = peak()  # before the bandwidth is measured, which takes memory of its own
    costs = Costs(backbone)
    read = {
        blocks: sum(costs.block_bytes(block, CONTEXT + 1) for block in range(blocks)) + costs.head_bytes
        for blocks in job.depths
    }
    return {"prefill": speeds[1:], "peak": most, "bytes": read, **steps(backbone, job)}


@torch.inference_mode()
def steps(backbone: Backbone, job: Job) -> dict[str, Any]:
    """Time one token after `CONTEXT` others through the first blocks and the head, for each of the job's exits by turns."""
    state = backbone.state(CONTEXT + 1)

    def run(ids: list[int], first: int, blocks: int) -> int:
        h, step = backbone.embed(torch.tensor([ids]), first)
        logits = backbone.logits(backbone.run(h, 0, blocks, state, step)[:, -1:])
        assert logits.isfinite().all(), f"{job.format}: logits after {blocks} blocks are not finite"
        return int(logits.argmax())

    token = run(random_ids(backbone, CONTEXT), 0, backbone.n_blocks)
    times: dict[int, list[float]] = {blocks: [] for blocks in job.depths}
    bandwidths = []
    for repetition in range(job.repetitions + 1):
        bandwidths.append(read_bandwidth(job.threads))
        for blocks in job.depths:
            started = time.perf_counter()
            token = run([token], CONTEXT, blocks)
            if repetition:  # the first warms up
                times[blocks].append(1000 * (time.perf_counter() - started))
            if "attention" in backbone.kinds:  # a Mamba state goes on: a step costs the same after any text
                state.crop(CONTEXT)
    return {"ms": times, "bandwidth": median(bandwidths), "bandwidths": bandwidths}


def train_and_decode(job: Job) -> dict[str, Any]:
    """Train exits with each gate, decode with every fill, and verify."""
    backbone, work = job.load(), job.folder.parent
    text = work / "text.txt"
    text.write_bytes(PROMPTS.read_bytes()[:TEXT])  # the tokenizer makes a token of each byte
    prompt = random_ids(backbone, CONTEXT)
    full = Engine(backbone).generate(prompt, max_tokens=TOKENS)
    trained, rows = [], []
    for gate in GATES:
        layers = (backbone.n_blocks // 2, 3 * backbone.n_blocks // 4)
        config = TrainConfig(
            layers=layers,
            gate=gate,
            readout="linear",
            sketch=0,
            texts=(str(text),),
            max_prompts=QUESTIONS,
            answer_tokens=ANSWER,
            epochs=EPOCHS,
            gate_epochs=EPOCHS,
        )
        exits = offramp.train(backbone, work / f"exits-{job.format}-{gate}", config)
        facts = {"tokens": sum(exits.training["tokens"].values()), "seconds": exits.training["seconds"]}
        trained.append({"gate": gate, "layers": layers, **facts, "peak": peak()})
        policy = half_open(backbone, exits, prompt)
        rows += [{"gate": gate, **decode(backbone, exits, policy, fill, prompt, full.ids)} for fill in FILLS]
    whole = {"tokens_per_second": full.decode_tokens_per_second, "blocks": backbone.n_blocks}
    return {"trained": trained, "full": whole, "fills": rows, "verify": verify(backbone), "peak": peak()}


def half_open(backbone: Backbone, exits: Exits, prompt: list[int]) -> Policy:
    """Thresholds that half of the tokens exceed, or all if all are equally sure.

    Each is just below the median confidence of an answer whose tokens all leave at that exit.
    """
    thresholds = []
    for index in range(len(exits)):
        policy = Policy(tuple(ALWAYS if index == place else 1.0 for place in range(len(exits))))
        tokens = Engine(backbone, exits, policy).generate(prompt, max_tokens=TOKENS).tokens
        middle = median_low(token.confidence for token in tokens if token.confidence is not None)
        thresholds.append(middle * (1 - 1e-6))
    return Policy(tuple(thresholds))


def decode(
    backbone: Backbone, exits: Exits, policy: Policy, fill: str, prompt: list[int], full: list[int]
) -> dict[str, Any]:
    """Decode with one fill; `same` tokens are those of `full`, the answer at full depth, before the first that differs."""
    try:
        engine = Engine(backbone, exits, policy, fill)
    except BadInput as reason:
        return {"fill": fill, "refused": str(reason)}
    answer = engine.generate(prompt, max_tokens=TOKENS)
    same = next((at for at, (own, other) in enumerate(zip(answer.ids, full, strict=True)) if own != other), TOKENS)
    facts = {"tokens_per_second": answer.decode_tokens_per_second, "mean_blocks": answer.mean_blocks}
    return {"fill": fill, **facts, "same": same, "exit_blocks": [token.exit_block for token in answer.tokens]}


def verify(backbone: Backbone) -> dict[str, Any]:
    """Let full depth decide on drafts that are its own answer, a third of them corrupted. Nothing else drafts."""
    prompt = random_ids(backbone, CONTEXT)
    answer = Engine(backbone).generate(prompt, max_tokens=VERIFIED).ids
    drafts = list(answer)
    for place in Random(0).sample(range(VERIFIED), VERIFIED // 3):
        drafts[place] = (drafts[place] + 1) % backbone.vocab_size

    def known(_: Ngrams, ids: list[int]) -> tuple[int, float]:
        """In the place of a table's: the draft that follows these ids."""
        return drafts[len(ids) - len(prompt)], 1.0

    engine = Engine(backbone, fill="verify", sampling=Sampler().__call__, lookup=0)  # a function, so that Python drafts
    assert engine.drafts
    table = Ngrams(torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
    engine.drafts = replace(engine.drafts, rows=(0.0,) * (MOST_DRAFTS + 1), ngrams=table)
    with patch.object(Ngrams, "after", known):
        tokens = engine.generate(prompt, max_tokens=VERIFIED).tokens
    rejected = [0, *(token.rejected for token in tokens)]
    return {
        "equal": [token.id for token in tokens] == answer,
        "stood": sum(token.exit_block == 0 for token in tokens),
        "rejected": rejected[-1],
        "rollbacks": len(set(rejected)) - 1,
        "deep_passes": tokens[-1].deep_passes,
    }


def run_model(key: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write a checkpoint of this shape, and do everything with it in every format."""
    shape = SHAPES[key]
    depths = tuple(range(1, shape.small["num_hidden_layers"] + 1)) if args.small else shape.depths
    result: dict[str, Any] = {"model": shape.name, "written": fresh(write, shape, args.small, folder, args.threads)}
    for format in args.formats:
        job = Job(folder, format, args.threads, depths, args.repetitions)
        parts: dict[str, Any] = {}
        for part, function in {
            "first": load_once,
            "second": load_once,
            "speed": measure,
            "exits": train_and_decode,
        }.items():
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


def depths(speed: dict[str, Any]) -> str:
    """A token's time at each exit, beside what reading its bytes takes."""
    lines = []
    for blocks, read in speed["bytes"].items():
        least, measured = read / speed["bandwidth"] / 1e6, median(speed["ms"][blocks])
        times = [f"{least:.1f}", f"{measured:.1f}", f"{1000 / measured:.1f}", f"{measured / least:.2f}"]
        lines.append([str(blocks), f"{read / GB:.2f}", *times])
    head = ["exit after block", "GB read", "ms at the machine's bandwidth", "ms measured", "tokens/s"]
    return table([*head, "measured / bandwidth's"], lines)


def fills(part: dict[str, Any]) -> str:
    """Decoding with the trained exits, a line for each gate and fill."""
    full = part["full"]
    lines = [["none, full depth", "–", f"{full['tokens_per_second']:.1f}", str(full["blocks"]), str(TOKENS)]]
    for row in part["fills"]:
        cells = ["not for this model", "–", "–"] if "refused" in row else []
        if not cells:
            cells = [f"{row['tokens_per_second']:.1f}", f"{row['mean_blocks']:.1f}", str(row["same"])]
        lines.append([row["gate"], row["fill"], *cells])
    return table(["gate", "fill", "tokens/s", "mean blocks", f"of {TOKENS} tokens, as at full depth"], lines)


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
                paragraphs += [f"{note}; peak {facts['peak']:.1f} GB after the prefill:", depths(facts)]
            elif part == "exits":
                paragraphs += [*efforts(format, facts["trained"]), fills(facts), verdict(format, facts["verify"])]
    return "\n\n".join(paragraphs)


def efforts(format: str, trained: list[dict[str, Any]]) -> list[str]:
    """What each training took, a sentence for each gate."""
    return [
        f"{format}: exits after blocks {' and '.join(map(str, done['layers']))}, gate {done['gate']}, trained on "
        f"{done['tokens']} tokens in {done['seconds']:.0f} s; peak {done['peak']:.1f} GB."
        for done in trained
    ]


def verdict(format: str, checked: dict[str, Any]) -> str:
    """What verifying the corrupted drafts gave, in a sentence."""
    outcome = "equal to full depth's answer" if checked["equal"] else "NOT EQUAL to full depth's answer"
    return (
        f"{format}, verify: {VERIFIED} tokens {outcome}; {checked['stood']} drafts stood, {checked['rejected']} were "
        f"rejected in {checked['rollbacks']} rollbacks, in {checked['deep_passes']} deep passes."
    )


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
