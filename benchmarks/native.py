"""What does the program without Python need, beside Python's offramp? Memory, time to the first token, tokens a second.

    .venv/bin/python benchmarks/native.py FOLDER [--model smollm2] [--tokens 128] [--rounds 3] [--peer llamacpp-file]

FOLDER is what `offramp export MODEL --gguf FOLDER` wrote for the same model, in its default format. All run with one
thread, one after another, in each round. Memory and start are those of whole processes; medians of all prompts and rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import offramp
from offramp.machine import machine
from offramp.model.core import program
from speed import Worker, paths_of

PROMPTS = ("Why is the sky blue?", "List three uses of vinegar in the house.", "Explain how a bicycle stays upright.")
COLUMNS = ("peak memory, MB", "first token, s", "tokens/s")
# Runs a command, and prints its peak memory in KB, in a process of its own: the system keeps the highest of all children.
WATCHED = """import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"""


def commands(model: str, folder: Path) -> dict[str, list[str]]:
    """The two programs, each with what comes before its options."""
    files = [str(folder / "model.gguf"), "--exits", str(folder / "exits.gguf"), "--threads", "1"]
    return {
        "offramp-run": [str(program()), *files],
        "offramp generate": [str(Path(sys.executable).with_name("offramp")), "generate", model],
    }


def output_of(command: list[str]) -> str:
    """What a command prints, with one thread."""
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, check=True, env=settings, stdout=subprocess.PIPE, text=True).stdout


def measure(command: list[str], prompt: str, tokens: int) -> dict[str, float]:
    """The figures of a command that answers a prompt."""
    started = time.perf_counter()
    output_of([*command, prompt, "--max-tokens", "1"])
    seconds, whole = time.perf_counter() - started, [*command, prompt, "--max-tokens", str(tokens)]
    return {
        "peak memory, MB": int(output_of([sys.executable, "-c", WATCHED, *whole])) / 1000,
        "first token, s": seconds,
        "tokens/s": json.loads(output_of([*whole, "--json"]))["decode_tokens_per_second"],
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--modes", default="full,exact", help="by comma")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--peer", default="", help="as benchmarks/speed.py names it, such as llamacpp-file: tokens/s alone")
    args = parser.parse_args(argv)
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    worker = Worker(args.peer, paths_of(args.model, whole=False), 1) if args.peer else None
    encode = offramp.load(args.model).prompts.encode if worker else None
    for prompt in PROMPTS[: args.prompts] * args.rounds:
        for name, command in commands(args.model, args.folder).items():
            for mode in args.modes.split(","):
                for what, value in measure([*command, "--mode", mode], prompt, args.tokens).items():
                    found[f"{name}, {mode}"][what].append(value)
        if worker and encode:
            made = worker.ask(op="generate", ids=encode(prompt), tokens=args.tokens)
            found[args.peer]["tokens/s"].append(len(made["ids"]) / made["decode_seconds"])
    print(f"{args.model}, {args.tokens} tokens, one thread; {machine()}\n")
    print(f"| | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for name, each in found.items():
        print(f"| {name} | {' | '.join(f'{median(each[what]):.4g}' if each[what] else '–' for what in COLUMNS)} |")


if __name__ == "__main__":
    main()
