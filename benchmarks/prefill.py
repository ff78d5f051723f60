"""How fast are prompts read, and how fast are many of them answered, beside other libraries?

    .venv/bin/python benchmarks/prefill.py [--parts prompts,shapes,files,batch,training] [--formats bfloat16,int4]
                                           [--lengths 512,2048] [--rounds 5] [--shapes lfm2-350m,mamba2-370m]

- `prompts`: read a prompt of `--lengths` tokens and choose one token. Each format takes turns with its peer: bfloat16 and
  float32 with `transformers`, file, int4 and int8 with llama.cpp on the model's GGUF file (Q4_1, and Q8_0 made from it).
- `shapes`: the same for models of known shapes with random weights, and decode `--tokens` tokens, against `transformers` on
  the same weights, in float32 where ours are, else in bfloat16.
- `files`: the same shapes in int4, against llama.cpp on the same weights as Q4_0, in a file that its own converter writes.
- `batch`: `--prompts` prompts side by side, `--tokens` new tokens each, at full depth, against the library's `generate` on
  one batch padded on the left. Tokens are the new ones, seconds those from the first prompt to the last token.
- `training`: the model's own answers to `--training-prompts` prompts, made and written as `offramp train` does. It has no
  peer.

Peers are processes, as in `benchmarks/speed.py`. Both of a pair are loaded and warmed up on every request; then they take
turns, so that a slow minute affects both. A ratio is our tokens a second over the peer's, within one round. The tables give
the median of the rounds, and the lowest and highest ratio.

Prints tables in Markdown and writes everything to build/bench/prefill.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from subprocess import CalledProcessError
from typing import Any

from transformers import AutoTokenizer

from offramp.files import put
from offramp.training.data import PROMPTS
from random_model import SHAPES, config_of, write_gguf, write_random
from speed import MODEL, WORK, Row, Worker, chat_ids, entry, machine, ours, paths_of, read_bandwidth, spread

PEERS = {
    "bfloat16": "transformers-bfloat16",
    "int4": "llamacpp-file",
    "file": "llamacpp-file",
    "float32": "transformers-float32",
    "int8": "llamacpp-q8_0",
}
PARTS = ("prompts", "shapes", "files", "batch", "training")
Request = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """Requests for our row and, but for training, a peer's; `title` and `labels` name the table and its lines."""

    title: str
    names: tuple[str, ...]
    paths: dict[str, str]
    requests: list[Request]
    labels: list[str]


def folder_of(shape: str) -> Path:
    """A checkpoint of this shape with random weights, written once."""
    folder = WORK / f"{shape.replace('/', '--')}-random"
    if not folder.exists():
        unfinished = folder.with_suffix(".part")
        shutil.rmtree(unfinished, ignore_errors=True)
        write_random(config_of(shape), unfinished)
        put(unfinished, folder)
    return folder


def gguf_of(folder: Path) -> Path:
    """The checkpoint as a GGUF file, written once."""
    file = folder.with_name(f"{folder.name}.gguf")
    if not file.exists():
        try:
            write_gguf(folder, file)
        except CalledProcessError as error:
            raise SystemExit(f"llama.cpp's converter does not write {folder}: {error.stderr[-200:]}") from None
    return file


def of_shape(shape: str, args: argparse.Namespace) -> Iterator[Trial]:
    """For each format, prompts to read and tokens to decode by random weights of a shape."""
    folder = folder_of(shape)
    paths = {"name": str(folder), "folder": str(folder)}
    formats = [format for format in args.formats if format != "file"] if "shapes" in args.parts else []
    pairs = [(format, PEERS["float32" if format == "float32" else "bfloat16"]) for format in formats]
    if "files" in args.parts and "int4" in args.formats:
        paths["gguf"] = str(gguf_of(folder))
        pairs.append(("int4", "llamacpp-q4_0"))
    for format, peer in pairs:
        (trial,) = readings(f"The shape of {shape}, random weights", paths, [format], args.lengths)
        decode = {"op": "generate", "ids": trial.requests[0]["ids"][:32], "tokens": args.tokens}
        labels = [*trial.labels, f"decoding {args.tokens} tokens"]
        yield replace(trial, names=(trial.names[0], peer), requests=[*trial.requests, decode], labels=labels)


def readings(title: str, paths: dict[str, str], formats: list[str], lengths: list[int]) -> list[Trial]:
    """For each format, prompts of these lengths to read: the beginnings of the text of offramp's own prompts."""
    tokenizer = AutoTokenizer.from_pretrained(paths["folder"], trust_remote_code=False)
    ids = tokenizer(PROMPTS.read_text(encoding="utf-8"))["input_ids"]
    if len(ids) < max(lengths):
        raise SystemExit(f"The prompts that come with offramp have {len(ids)} tokens: give shorter --lengths.")
    requests = [{"op": "prefill", "ids": ids[:length]} for length in lengths]
    labels = [f"{length} tokens" for length in lengths]
    return [Trial(title, (ours(format), PEERS[format]), paths, requests, labels) for format in formats]


def trials(args: argparse.Namespace) -> list[Trial]:
    """What to measure, in order. A format whose peer needs a file that the model does not come with is left out."""
    whole = any(entry(PEERS[format]).weights == "folder" for format in args.formats)
    paths = paths_of(args.model, whole)
    formats = [format for format in args.formats if entry(PEERS[format]).weights in paths]
    against_library = [format for format in formats if PEERS[format].startswith("transformers")]
    found = []
    if "prompts" in args.parts:
        found += readings(f"A prompt, {args.model}", paths, formats, args.lengths)
    for shape in args.shapes if {"shapes", "files"} & {*args.parts} else ():
        found += of_shape(shape, args)
    if "batch" in args.parts:
        lines = PROMPTS.read_text(encoding="utf-8").splitlines()
        tokenizer = AutoTokenizer.from_pretrained(paths["folder"], trust_remote_code=False)
        prompts = [chat_ids(tokenizer, line) for line in lines[:: len(lines) // args.prompts][: args.prompts]]
        request = {"op": "batch", "prompts": prompts, "tokens": args.tokens}
        label, title = f"{len(prompts)} prompts, {args.tokens} new tokens each", f"Side by side, {args.model}"
        found += [Trial(title, (ours(format), PEERS[format]), paths, [request], [label]) for format in against_library]
    if "training" in args.parts:
        request = {"op": "teach", "prompts": args.training_prompts, "tokens": args.tokens}
        label = f"{args.training_prompts} prompts, {args.tokens} tokens of answer each"
        names = (ours("bfloat16"),)
        found.append(Trial(f"Own answers for training, {args.model}", names, paths, [request], [label]))
    return found


def take_turns(trial: Trial, rounds: int, threads: int) -> list[Row]:
    """Start the trial's workers, warm each up on every request, let them take turns, and stop them."""
    rows = [Row(name) for name in trial.names]

    def start(row: Row) -> None:
        row.worker = Worker(row.name, trial.paths, threads)
        for request in trial.requests:
            row.worker.ask(**request)

    def run(row: Row, request: Request) -> None:
        assert row.worker
        row.runs[-1].append(row.worker.ask(**request))

    try:
        for row in rows:
            row.attempt(start)
        for _ in range(rounds):
            for row in rows:
                row.runs.append([])
            for request in trial.requests:
                for row in rows:
                    row.attempt(lambda row, request=request: run(row, request))
    finally:
        for row in rows:
            if row.worker:
                row.worker.close()
    print(f"{trial.title}: {' and '.join(trial.names)} done", file=sys.stderr)
    return rows


def rate(run: dict[str, Any]) -> float:
    """Tokens a second of a worker's answer: those that it decoded, or else those that it read."""
    kind = "decode_" if "decode_tokens" in run else ""
    return float(run[f"{kind}tokens"] / run[f"{kind}seconds"])


def figures(trial: Trial, rows: list[Row]) -> list[dict[str, Any]]:
    """For each request of a trial, every row's tokens a second in each round, and the ratios of ours to the peer's."""
    failures = {row.name: row.failure for row in rows if row.failure is not None}
    results = []
    for at, label in enumerate(trial.labels):
        speeds = {row.name: [rate(runs[at]) for runs in row.runs] for row in rows if row.name not in failures}
        ratios = [our / their for our, their in zip(*speeds.values(), strict=True)] if len(speeds) == 2 else None
        facts = {"title": trial.title, "label": label, "names": trial.names, "failures": failures}
        results.append({**facts, "speeds": speeds, "ratios": ratios})
    return results


def table(results: list[dict[str, Any]]) -> str:
    """The results of one title as a Markdown table."""

    def speed(result: dict[str, Any], name: str) -> str:
        if name in result["failures"]:
            return f"failed: {result['failures'][name]}"
        return f"{median(result['speeds'][name]):,.0f}"

    lines = [["ours", "what", "ours, tokens/s", "peer", "its tokens/s", "ours / it: median (lowest–highest)"]]
    lines.append(["---", "---", "---:", "---", "---:", "---:"])
    for result in results:
        own, *peers = result["names"]
        line = [own, result["label"], speed(result, own)]
        line += [peers[0], speed(result, peers[0])] if peers else ["–", "–"]
        lines.append([*line, spread(result["ratios"])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def by_comma(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", type=by_comma, default=list(PARTS), help=f"by comma: {', '.join(PARTS)}")
    parser.add_argument("--formats", type=by_comma, default=list(PEERS), help=f"by comma: {', '.join(PEERS)}")
    parser.add_argument("--model", default=MODEL, help="a model without a GGUF file has no llama.cpp to compare with")
    parser.add_argument("--lengths", type=lambda text: [int(part) for part in by_comma(text)], default=[512, 2048])
    parser.add_argument("--shapes", type=by_comma, default=["AntonV/mamba2-130m-hf"], help=f"by comma: {', '.join(SHAPES)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=64, help="prompts side by side")
    parser.add_argument("--training-prompts", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each answer")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    for given, known in ((args.parts, PARTS), (args.formats, PEERS)):
        if unknown := set(given) - set(known):
            parser.error(f"unknown {', '.join(sorted(unknown))}; there are {', '.join(known)}")

    WORK.mkdir(parents=True, exist_ok=True)
    bandwidth = read_bandwidth(args.threads)
    results: list[dict[str, Any]] = []
    rows: list[Row] = []
    for trial in trials(args):
        measured = take_turns(trial, args.rounds, args.threads)
        rows += measured
        results += figures(trial, measured)
    note = machine(args.threads, bandwidth, rows)
    settings = {key: value for key, value in vars(args).items() if key not in ("parts", "formats")}
    (WORK / "prefill.json").write_text(json.dumps({"machine": note, **settings, "results": results}, indent=1))
    print(f"{note}\n\n{args.rounds} rounds, by turns")
    for title in dict.fromkeys(result["title"] for result in results):
        print(f"\n{title}:\n\n{table([result for result in results if result['title'] == title])}")


if __name__ == "__main__":
    main()
