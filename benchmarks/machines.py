"""How much faster do two workers of a Ray cluster answer than one, and what limits that?

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/machines.py [MODEL] [--workers 1,2] [--prompts 256] [--rounds 3]

For each number of workers, a cluster of as many nodes is started on this machine, each with one processor. Its workers
answer prompts of offramp's own list at full depth, as `offramp eval --ray` does; the numbers of workers take turns.

Prints a table of medians of the rounds: seconds for everything; those of answering, added up over the workers and divided
by their number; the rest (processes, imports, loading, sending, waiting for the last share); answered tokens a second; and
efficiency. That is the first row's seconds over this row's, per worker, with the lowest and highest of the rounds.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # before ray is imported: then 127.0.0.1 stays this address

import ray
from ray.cluster_utils import Cluster as Nodes

import offramp
from offramp.evaluation.evaluation import Answer, Evaluation
from offramp.evaluation.task import Item, Task
from offramp.extras.cluster import Cluster, connected
from offramp.files import read_lines
from offramp.machine import machine
from offramp.model.backbone import Backbone
from offramp.training.data import PROMPTS

NODE = {"node_ip_address": "127.0.0.1", "object_store_memory": 100 * 2**20}


@dataclass(frozen=True)
class Run:
    """Seconds of one run: all of them, and those that each worker answered; and the tokens."""

    seconds: float
    answering: float
    tokens: int


@contextmanager
def nodes(workers: int) -> Iterator[Cluster]:
    """A cluster with so many nodes of one processor, on this machine's own address."""
    made = Nodes(initialize_head=True, head_node_args={**NODE, "num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(workers):
            made.add_node(**NODE, num_cpus=1)
        with connected(made.address) as cluster:
            yield cluster
    finally:
        made.shutdown()


def run(backbone: Backbone, task: Task, workers: int, batch: int) -> Run:
    """Answer the task's questions with so many workers."""
    with nodes(workers) as cluster, tempfile.TemporaryDirectory() as folder:
        evaluation = Evaluation(backbone, task, Path(folder), batch=batch)
        started = time.monotonic()
        cluster.answer(evaluation, [])
        seconds = time.monotonic() - started
    answers = [answer for part in evaluation.answers([]) for answer in part.in_order if isinstance(answer, Answer)]
    spent = sum(answer.prefill_seconds + answer.decode_seconds for answer in answers)
    return Run(seconds, spent / workers, sum(len(answer.ids) for answer in answers))


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--prompts", type=int, default=256, help="a multiple of the workers times --batch")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32, help="prompts of a share")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args(arguments)
    backbone = offramp.load(asked.model).backbone
    lines = read_lines(PROMPTS, ())[: asked.prompts]
    items = [Item(str(number), line, line, ()) for number, line in enumerate(lines)]
    task = Task("own prompts", items, (), asked.tokens, lambda answer, item: {}, PROMPTS.name, "")
    counts = [int(count) for count in asked.workers.split(",")]
    rounds = [{count: run(backbone, task, count, asked.batch) for count in counts} for _ in range(asked.rounds)]
    facts = ", ".join(f"{name} {value}" for name, value in {**machine(), "ray": ray.__version__}.items())
    print(f"{backbone.name}, {backbone.weight_format}; {len(items)} prompts of {asked.tokens} new tokens; {facts}")
    print("\n| workers | seconds | answering | rest | tokens/s | efficiency |\n|---|---|---|---|---|---|")
    for count in counts:
        runs = [each[count] for each in rounds]
        shares = [each[counts[0]].seconds * counts[0] / each[count].seconds / count for each in rounds]
        parts = [
            median(each.seconds for each in runs),
            median(each.answering for each in runs),
            median(each.seconds - each.answering for each in runs),
            median(each.tokens / each.seconds for each in runs),
        ]
        cells = " | ".join(f"{part:.1f}" for part in parts)
        print(f"| {count} | {cells} | {median(shares):.2f} ({min(shares):.2f}–{max(shares):.2f}) |")


if __name__ == "__main__":
    main()
