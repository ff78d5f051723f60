"""How much time do modes and exits save? Ours, the paper's recipe, and peers, on the same questions, in turn.

    .venv/bin/python benchmarks/paper_times.py (the arguments of paper.py) [--questions 24] [--peers lookup,layerskip]

It goes on from the Results of `benchmarks/paper.py` for the same arguments. The modes are timed, and of the exits in the
Results those that save most FLOPs at a consistency of 0.9: of the calibrated ones (again with the fill `defer`), of those
trained here, and of the paper's recipe. One answer at a time, with the peers, then eight side by side, without them. How
turns are taken and kept, and what peers do, is in `benchmarks/answers.py`.

Writes WORK/MODEL-TASK-times-BATCH.jsonl; `benchmarks/paper_tables.py` makes tables and a figure of these files.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from answers import table, turns_of
from offramp.errors import OfframpError
from offramp.evaluation.evaluation import Condition
from offramp.evaluation.results import Result, load_results
from offramp.machine import machine
from paper import OWN, THE_PAPERS, Experiment, boldest, finish, flops_saved, parser_of, run
from speed import ENTRIES, WORK, Failed, Worker, entry, paths_of

FULL, THEIRS = "full depth", "transformers-float32"
BATCHES = (1, 8)


def chosen(experiment: Experiment, results: list[Result]) -> dict[str, Condition]:
    """The conditions to time, by the names that the table gives them."""
    plain = [each for each in results if each.task.repetition_penalty == 1 and each.condition.policy]
    found = {FULL: Condition()} | {condition.label: condition for condition in experiment.in_modes()}
    calibrated = {condition.name: condition for condition in experiment.calibrated()}
    if tested := [each for each in plain if each.condition.name in calibrated]:
        best = calibrated[boldest(tested, flops_saved).condition.name]
        found |= {"early, calibrated here": best, "early, calibrated here, defer": replace(best, fill="defer")}
    for name, words in (("exits trained here", OWN), ("the paper's recipe", THE_PAPERS.label)):
        if made := [each for each in plain if words in each.condition.label]:
            found[name] = experiment.condition_of(boldest(made, flops_saved).condition)
    return found


def with_peers(experiment: Experiment, names: list[str]) -> tuple[dict[str, Worker], dict[str, str]]:
    """Start the peers. Returns their processes, and why others cannot run."""
    workers, failures, paths = dict[str, Worker](), dict[str, str](), paths_of(experiment.source)
    WORK.mkdir(parents=True, exist_ok=True)
    ids = experiment.backbone.prompts.encode("Hello", raw=True)
    for name in [THEIRS, *names] if names else []:
        try:
            if entry(name).weights not in paths:
                raise Failed(f"needs a GGUF file, which {experiment.name} does not come with")
            workers[name] = Worker(name, paths, experiment.args.threads)
            workers[name].ask(op="generate", ids=ids, tokens=4)
        except Failed as failure:
            failures[name] = str(failure)
            if name in workers:
                workers.pop(name).close()
    return workers, failures


def timed(model: str, task: str, args: argparse.Namespace) -> None:
    """Time one model on one task, and print a table for each number of answers side by side."""
    experiment = Experiment(model, task, args)
    file = run(experiment)
    results = load_results([file])
    if len(results) == 1:  # a task that the model does not solve
        return
    conditions = chosen(experiment, results)
    engines = {name: condition.engine(experiment.backbone) for name, condition in conditions.items()}
    questions = replace(experiment.scored, items=experiment.scored.items[: args.questions])
    about: dict[str, Any] = {"machine": {name: value for name, value in machine().items() if name != "date"}}
    about["questions"] = len(questions.items)
    about["conditions"] = {name: condition.name for name, condition in conditions.items()}
    for batch in BATCHES:
        workers, failures = with_peers(experiment, args.peers.split(",") if args.peers and batch == 1 else [])
        try:
            out = file.with_name(f"{file.stem}-times-{batch}.jsonl")
            turns = turns_of(out, about | {"failures": failures}, questions, engines, workers, batch)
        finally:
            for worker in workers.values():
                worker.close()
        print(f"\n{experiment.name}, {task}, {len(questions.items)} questions, {batch} side by side; {machine()}\n")
        print("\n".join([table(turns), *(f"| {name} | failed: {reason} |" for name, reason in failures.items())]))


def main(argv: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--questions", type=int, default=24, help="questions of each task that are timed")
    parser.add_argument("--peers", default="", help="peers, by comma, as benchmarks/speed.py names them")
    parser.add_argument("--threads", type=int, default=2, help="of the peers")
    args = finish(parser, argv)
    if unknown := set(args.peers.split(",")) - {"", *ENTRIES}:
        parser.error(f"unknown peers {', '.join(sorted(unknown))}; there are {', '.join(ENTRIES)}")
    try:
        for name in args.models.split(","):
            for task in args.tasks.split(","):
                timed(name, task, args)
    except (OfframpError, Failed) as error:
        parser.error(f"{error} {getattr(error, 'hint', '')}".strip())


if __name__ == "__main__":
    main()
