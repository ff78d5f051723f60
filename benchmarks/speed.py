"""How fast is decoding beside other libraries, on the same machine, model and prompts?

    make bench    or    .venv/bin/python benchmarks/speed.py [--peers a,b] [--ours int8] [--rounds 3] [--tokens 64]
                                                             [--model NAME]

Every peer is a worker process (`benchmarks/peers.py`) in an environment of its own under build/bench, made from
`benchmarks/requirements/`; those that need only our dependencies share .venv. All are loaded and warmed up. Then they take
turns, prompt by prompt, and one computes at a time, so that a slow minute of the machine affects all of them. A ratio is
our tokens a second over a peer's, within one round. The table gives the median of the rounds, the lowest and the highest.

Prints the table in Markdown and writes everything to build/bench/speed.json. A peer that cannot be installed or run gets
a row with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.util import find_spec
from math import exp
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from offramp.machine import processor
from offramp.model.compiled.formats import FORMATS
from offramp.model.hub import ALIASES, Wheel, resolve
from offramp.model.loading import library_folder

MODEL = "smollm2"
HERE = Path(__file__).parent
WORK = Path("build/bench")
SCORED, WINDOW = 8192, 512  # tokens of text for the perplexity, and how many are read at once
LIMIT = 900  # seconds a worker may take for one answer; loading and compiling included
PROMPTS = [
    "Why is the sky blue?",
    "Write a short letter to a neighbour who has lent me a ladder, thanking her.",
    "Explain to a child how a bicycle stays upright, in three sentences.",
    "List five things to check before buying a second-hand car, with a reason for each.",
]


@dataclass(frozen=True)
class Entry:
    """A row of the table: which environment, which weights, and the worker's other options."""

    environment: str  # a file in requirements/, or "" for .venv
    weights: str  # "folder", "gguf" or "name"
    options: tuple[str, ...]


ENTRIES = {
    "transformers-float32": Entry("", "folder", ("transformers", "--dtype", "float32")),
    "transformers-bfloat16": Entry("", "folder", ("transformers", "--dtype", "bfloat16")),
    "layerskip": Entry("", "folder", ("layerskip", "--dtype", "float32")),
    "lookup": Entry("", "folder", ("lookup", "--dtype", "float32")),
    "economize-draft": Entry("economize", "folder", ("economize", "--dtype", "float32")),
    "economize-calm": Entry("economize", "folder", ("economize", "--dtype", "float32", "--way", "calm", "--layer", "25")),
    "llamacpp-file": Entry("llamacpp", "gguf", ("llamacpp",)),
    "llamacpp-file-lookup": Entry("llamacpp", "gguf", ("llamacpp", "--lookup")),
    "llamacpp-q4_0": Entry("llamacpp", "gguf", ("llamacpp", "--requantise", "Q4_0")),
    "llamacpp-q8_0": Entry("llamacpp", "gguf", ("llamacpp", "--requantise", "Q8_0")),
}


class Failed(Exception):
    """A peer that cannot go on, with the reason for its row."""


def paths_of(model: str, whole: bool = True) -> dict[str, str]:
    """What a worker may load for a model: its `name`, its safetensors `folder`, and its `gguf` file if it has one.

    Without `whole`, the folder of a GGUF file has only what describes the model: its tokenizer and its config.
    """
    paths = {"name": model, "folder": str(library_folder(model) if whole else resolve(model).path)}
    if model.endswith(".gguf"):
        paths["gguf"] = model
    wheel = ALIASES.get(model)
    if isinstance(wheel, Wheel):
        package, _, file = wheel.member.partition("/")
        spec = find_spec(package)
        assert spec, f"{package} is not installed: run make"
        assert spec.submodule_search_locations
        paths["gguf"] = str(Path(spec.submodule_search_locations[0]) / file)
    return paths


def chat_ids(tokenizer: Any, text: str) -> list[int]:
    """A question → token ids, through the chat template where the tokenizer has one."""
    if not tokenizer.chat_template:
        return list(tokenizer(text)["input_ids"])
    chat = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(prompt, add_special_tokens=False)["input_ids"])


def ours(dtype: str) -> str:
    """The name of offramp's row in this format."""
    return f"offramp-{dtype}"


def entry(name: str) -> Entry:
    """The entry of a peer, or of offramp in a format."""
    return ENTRIES.get(name) or Entry("", "name", ("offramp", "--dtype", name.removeprefix("offramp-")))


def interpreter(environment: str) -> str:
    """The environment's Python. Installs the environment if its requirements changed. Raises `Failed` if pip fails."""
    if not environment:
        return sys.executable
    folder, wanted = WORK / environment, HERE / "requirements" / f"{environment}.txt"
    python, stamp = folder / "bin" / "python", folder / ".installed"
    if not stamp.exists() or stamp.read_text() != wanted.read_text():
        print(f"Installing {wanted} into {folder} …", file=sys.stderr)
        with (WORK / f"{environment}.pip.log").open("w") as log:
            for command in (
                [sys.executable, "-m", "venv", str(folder)],
                [str(python), "-m", "pip", "install", "-r", str(wanted)],
            ):
                if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode:
                    raise Failed(f"does not install: {last_words(Path(log.name))}")
        stamp.write_text(wanted.read_text())
    return str(python)


def last_words(log: Path) -> str:
    """The log's last line that names an error, or else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["no reason given"])[-1][:200]


class Worker:
    """A peer's process. Raises `Failed` if it does not start, dies, reports an error, or is silent for `LIMIT` s."""

    def __init__(self, name: str, paths: dict[str, str], threads: int) -> None:
        peer = entry(name)
        self.log = WORK / f"{name}.log"
        command = [interpreter(peer.environment), str(HERE / "peers.py"), *peer.options, "--model", paths[peer.weights]]
        settings = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--threads", str(threads), "--work", str(WORK)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **settings},
            )
        self.facts: dict[str, Any] = self._read()["ready"]

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and return the answer."""
        assert self.process.stdin
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise Failed(f"stopped: {last_words(self.log)}") from None
        return self._read()

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout
        if not select.select([self.process.stdout], [], [], LIMIT)[0]:
            self.close()
            raise Failed(f"no answer in {LIMIT} s")
        line = self.process.stdout.readline()
        if not line:
            raise Failed(f"stopped: {last_words(self.log)}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"].splitlines()[0][:200])
        return answer


@dataclass
class Row:
    """What is known of a peer: its worker, its answers `runs[round][prompt]`, or the reason why it failed."""

    name: str
    worker: Worker | None = None
    runs: list[list[dict[str, Any]]] = field(default_factory=list)
    perplexity: float | None = None
    failure: str | None = None

    def attempt(self, step: Any) -> None:
        """Run `step` for this peer. If it fails, keep the reason, and skip this peer from then on."""
        if self.failure is None:
            try:
                step(self)
            except Failed as failure:
                self.failure = str(failure)
                print(f"{self.name}: {self.failure}", file=sys.stderr)
                if self.worker:
                    self.worker.close()

    def speeds(self) -> list[float]:
        """Decoded tokens a second, one number for each round."""
        return [
            sum(run["decode_tokens"] for run in runs) / sum(run["decode_seconds"] for run in runs) for runs in self.runs
        ]

    def prefill_speed(self, lengths: list[int]) -> float:
        """Prompt tokens a second: the median round."""
        return float(median(sum(lengths) / total(runs, "prefill_seconds") for runs in self.runs))


def total(runs: list[dict[str, Any]], key: str) -> float:
    """The sum of one number of all runs."""
    return float(sum(run[key] for run in runs))


def measure(
    rows: list[Row], paths: dict[str, str], prompts: list[list[int]], text: list[int], args: argparse.Namespace
) -> None:
    """Fill in the rows: start all workers, warm each up on every prompt, then let them take turns."""

    def start(row: Row) -> None:
        began = time.perf_counter()
        row.worker = Worker(row.name, paths, args.threads)
        for prompt in prompts:
            row.worker.ask(op="generate", ids=prompt, tokens=min(args.tokens, 16))
        print(f"{row.name}: ready in {time.perf_counter() - began:.0f} s", file=sys.stderr)

    def run(row: Row, prompt: list[int]) -> None:
        assert row.worker
        row.runs[-1].append(row.worker.ask(op="generate", ids=prompt, tokens=args.tokens))

    def score(row: Row) -> None:
        assert row.worker
        windows = [text[at : at + WINDOW] for at in range(0, len(text), WINDOW)]
        row.perplexity = exp(mean(nll for ids in windows for nll in row.worker.ask(op="score", ids=ids)["nll"]))

    for row in rows:
        row.attempt(start)
    for number in range(args.rounds):
        for row in rows:
            row.runs.append([])
        for prompt in prompts:
            for row in rows:
                row.attempt(lambda row, prompt=prompt: run(row, prompt))
        print(f"round {number + 1} of {args.rounds} done", file=sys.stderr)
    if text:
        for row in rows:
            if row.failure is None:
                try:
                    score(row)
                except Failed as failure:
                    print(f"{row.name}: no perplexity: {failure}", file=sys.stderr)


NUMBERS = 200_000_000  # float32, 800 MB: more than any cache holds


def read_bandwidth(threads: int) -> float:
    """The bandwidth in GB/s at which `threads` threads read memory: the best of five sums over `NUMBERS` numbers."""
    torch.set_num_threads(threads)
    numbers = torch.ones(NUMBERS)
    times = []
    for _ in range(6):
        started = time.perf_counter()
        numbers.sum()
        times.append(time.perf_counter() - started)
    return numbers.nbytes / min(times[1:]) / 1e9


def machine(threads: int, bandwidth: float, rows: Sequence[Row] = ()) -> str:
    """The machine and the packages' versions in one line; `bandwidth` in GB/s."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    known = {"torch": torch.__version__, "transformers": transformers.__version__}
    for row in rows:
        if row.worker:
            known |= row.worker.facts["versions"]
    used = ", ".join(f"{package} {number}" for package, number in sorted(known.items()))
    return (
        f"{processor()}, {os.cpu_count()} cores, {threads} threads, {memory:.0f} GiB of memory read at "
        f"{bandwidth:.1f} GB/s; {date.today()}; Python {platform.python_version()}, {used}"
    )


def figures(row: Row, own: list[Row], lengths: list[int]) -> dict[str, Any]:
    """The row's numbers. Ratios are the speeds of each row of `own` over this row's, round by round."""
    if row.failure is not None or row.worker is None:
        return {"peer": row.name, "failure": row.failure}
    speed = median(row.speeds())
    weight_bytes = row.worker.facts["weight_bytes"]
    ratios = {
        own_row.name: [speed / row_speed for speed, row_speed in zip(own_row.speeds(), row.speeds(), strict=True)]
        for own_row in own
        if own_row.failure is None and own_row is not row
    }
    return {
        "peer": row.name,
        **row.worker.facts,
        "tokens_per_second": speed,
        "ms_per_token": 1000 / speed,
        "prefill_tokens_per_second": row.prefill_speed(lengths),
        "gigabytes_per_second": weight_bytes * speed / 1e9 if weight_bytes else None,
        "perplexity": row.perplexity,
        "speeds": row.speeds(),
        "ratios": ratios,
        "runs": row.runs,
    }


def table(results: list[dict[str, Any]], own: list[Row]) -> str:
    """The results as a Markdown table."""

    def cells(result: dict[str, Any]) -> list[str]:
        if "failure" in result:
            return [result["peer"], f"failed: {result['failure']}"]
        digits = {"gigabytes_per_second": 1, "perplexity": 2}
        optional = ["–" if result[key] is None else f"{result[key]:.{places}f}" for key, places in digits.items()]
        bits = result.get("bits")
        return [
            result["peer"],
            result["weights"],
            result["head"],
            f"{bits:.2f}" if bits else "–",
            f"{result['tokens_per_second']:.1f}",
            f"{result['ms_per_token']:.1f}",
            *(spread(result["ratios"].get(own_row.name)) for own_row in own),
            f"{result['prefill_tokens_per_second']:.0f}",
            *optional,
        ]

    ratio = [f"{own_row.name} / it: median (lowest–highest)" for own_row in own]
    titles = [
        "peer",
        "weights",
        "head",
        "bits a weight",
        "tokens/s",
        "ms a token",
        *ratio,
        "prefill tokens/s",
        "weights read, GB/s",
        "perplexity",
    ]
    rows = [titles, ["---"] * len(titles)]
    rows += [line + [""] * (len(titles) - len(line)) for line in map(cells, results)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def spread(ratios: list[float] | None) -> str:
    """The median, with the lowest and the highest in brackets."""
    return f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})" if ratios else "–"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", default=",".join(ENTRIES), help=f"peers, by comma: {', '.join(ENTRIES)}")
    parser.add_argument("--ours", default=",".join(FORMATS), help="formats to run offramp in, and to take ratios of")
    parser.add_argument("--model", default=MODEL, help="a GGUF file, or the default, for peers that need one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--text", type=Path, help=f"plain text; its first {SCORED:,} tokens, in windows of {WINDOW}, give the perplexities"
    )
    args = parser.parse_args(argv)
    peers = [name for name in args.peers.split(",") if name]
    if unknown := set(peers) - set(ENTRIES):
        parser.error(f"unknown peers {', '.join(sorted(unknown))}; there are {', '.join(ENTRIES)}")

    WORK.mkdir(parents=True, exist_ok=True)
    paths = paths_of(args.model, any(entry(name).weights == "folder" for name in peers))
    if without := [name for name in peers if entry(name).weights not in paths]:
        parser.error(f"{', '.join(without)} need a GGUF file, which {args.model} does not come with")
    tokenizer = AutoTokenizer.from_pretrained(paths["folder"], trust_remote_code=False)
    prompts = [chat_ids(tokenizer, text) for text in PROMPTS]
    text = tokenizer(args.text.read_text(encoding="utf-8"))["input_ids"][:SCORED] if args.text else []

    bandwidth = read_bandwidth(args.threads)
    own = [Row(ours(dtype)) for dtype in args.ours.split(",") if dtype]
    rows = own + [Row(name) for name in peers]
    try:
        measure(rows, paths, prompts, text, args)
        lengths = [len(prompt) for prompt in prompts]
        results = [figures(row, own, lengths) for row in rows]
        note = machine(args.threads, bandwidth, rows)
    finally:
        for row in rows:
            if row.worker:
                row.worker.close()
    settings = {"rounds": args.rounds, "tokens": args.tokens, "prompt_tokens": lengths}
    (WORK / "speed.json").write_text(json.dumps({"machine": note, **settings, "rows": results}, indent=1))
    print(f"\n{note}\n\n{args.rounds} rounds of {len(prompts)} prompts ({', '.join(map(str, lengths))} tokens), ", end="")
    print(f"{args.tokens} new tokens each, greedy\n\n{table(results, own)}\n")
    for result in results:
        if "way" in result:
            print(f"- {result['peer']}: {result['way']}")


if __name__ == "__main__":
    main()
