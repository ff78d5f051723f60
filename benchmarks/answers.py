"""How long do whole answers take, with their prompts read? Modes and peers on a task's questions, and what they score.

    .venv/bin/python benchmarks/answers.py MODEL --task humaneval --data FILE [--modes full,exact,early] [--batch 8]
                                           [--dtype bfloat16] [--exits DIR] [--peers llamacpp-file] [--run-code]

Every question is answered by all in turn, in an order that changes from question to question; one computes at a time. With
`--batch`, so many questions are answered side by side, and a turn has so many. A peer (`benchmarks/speed.py`) makes as many
tokens as the first mode's answer has, and gets no score. A ratio is the first mode's time over all questions by another's;
intervals are 95%, by bootstrap over turns. A new run goes on from WORK, where each turn is kept when it is done.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

import offramp
from offramp import Engine
from offramp.decode.request import Generation
from offramp.errors import OfframpError
from offramp.evaluation.evaluation import to_six_digits
from offramp.evaluation.task import Item, Task
from offramp.evaluation.tasks import load_task
from offramp.files import read_lines, write_atomically
from offramp.machine import machine
from offramp.metrics import token_f1
from speed import WORK, Failed, Worker, paths_of

MAIN_SCORES = {"truthfulqa": "rougeL_max", "triviaqa": "f1", "humaneval": "pass@1", "mbpp": "pass@1", "coqa": "f1"}
COLUMNS = ("score", "its change", "time", "tokens/s", "tokens a pass", "FLOPs saved", "token F1", "equal")
Record = dict[str, Any]  # of one contender in one turn
Turn = dict[str, Record]
Measure = Callable[[list[Turn], str, str], float]  # of turns, a contender and the one that it is compared with


def questions_in(path: Path, count: int) -> list[str]:
    """At most `count` questions of TruthfulQA.csv, of lines, or of JSON lines (`prompt`, `question`), evenly spaced."""
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as stream:
            lines = [row["Question"] for row in csv.DictReader(stream)]
    else:
        lines = read_lines(path, ("prompt", "question"))
    return lines[:: max(1, len(lines) // count)][:count]


def answered(engine: Engine, task: Task, prompts: list[list[int]], most: int) -> tuple[list[Generation], float]:
    """The answers to a turn's prompts in their order, and the seconds that they took."""
    made: dict[int, Generation] = {}
    started = time.perf_counter()
    if len(prompts) == 1:
        made[0] = engine.generate(prompts[0], max_tokens=task.max_tokens, stop=task.stop)
    else:
        made.update(engine.answers(prompts, most, max_tokens=task.max_tokens, stop=task.stop))
    seconds = time.perf_counter() - started
    return [made[place] for place in range(len(prompts))], seconds


def record_of(answers: list[Generation], seconds: float, task: Task, items: list[Item]) -> Record:
    """What is kept of a turn: its time, and for each answer its ids, score, passes and FLOPs."""
    scores = [
        task.score(answer.text.strip(), item)[MAIN_SCORES[task.name]] for answer, item in zip(answers, items, strict=True)
    ]
    flops = [answer.tokens[-1].cumulative_flops for answer in answers]
    return {
        "seconds": seconds,
        "ids": [answer.ids for answer in answers],
        "scores": scores,
        "passes": sum(len(answer.tokens) / answer.tokens_per_deep_pass for answer in answers),
        "flops": sum(flops),
        "full_flops": sum(used / (1 - answer.flops_saved) for used, answer in zip(flops, answers, strict=True)),
    }


def take_turn(
    number: int, items: list[Item], task: Task, engines: dict[str, Engine], workers: dict[str, Worker], most: int
) -> Turn:
    """Let all contenders answer some questions, in an order of this turn's own."""
    first, backbone = next(iter(engines)), next(iter(engines.values())).backbone
    prompts = [backbone.prompts.encode(item.prompt, raw=not task.chat) for item in items]
    turn: Turn = {}
    for name in random.Random(number).sample(list(engines), len(engines)):
        turn[name] = record_of(*answered(engines[name], task, prompts, most), task, items)
    for name, worker in workers.items():
        lengths = [len(ids) for ids in turn[first]["ids"]]
        made = [worker.ask(op="generate", ids=ids, tokens=tokens) for ids, tokens in zip(prompts, lengths, strict=True)]
        seconds = sum(each["prefill_seconds"] + each["decode_seconds"] for each in made)
        turn[name] = {"seconds": seconds, "ids": [each["ids"] for each in made]}
    return {name: turn[name] for name in (*engines, *workers)}


def faster(turns: list[Turn], name: str, first: str) -> float:
    """How many times as fast as the first a contender made all answers."""
    return float(sum(turn[first]["seconds"] for turn in turns) / sum(turn[name]["seconds"] for turn in turns))


def change(turns: list[Turn], name: str, first: str) -> float:
    """By how much a contender's mean score is above the first's."""
    pairs = ((turn[name]["scores"], turn[first]["scores"]) for turn in turns)
    return fmean(mine - theirs for pair in pairs for mine, theirs in zip(*pair, strict=True))


def interval(turns: list[Turn], measure: Measure, name: str, first: str) -> tuple[float, float, float]:
    """A measure of all turns, and its 95% interval."""
    drawn = np.random.default_rng(0).integers(len(turns), size=(1000, len(turns)))
    resampled = [measure([turns[place] for place in places], name, first) for places in drawn.tolist()]
    low, high = np.percentile(resampled, [2.5, 97.5])
    return measure(turns, name, first), float(low), float(high)


def cells(turns: list[Turn], name: str, first: str) -> list[str]:
    """A contender's row of the table, compared with the first."""
    own, base = [turn[name] for turn in turns], [turn[first] for turn in turns]
    ids, base_ids = ([made for each in side for made in each["ids"]] for side in (own, base))
    tokens = sum(map(len, ids))
    speed = ["{:.2f} ({:.2f} to {:.2f})".format(*interval(turns, faster, name, first))]
    speed.append(f"{tokens / sum(each['seconds'] for each in own):.1f}")
    alike = [fmean(map(token_f1, ids, base_ids)), fmean(mine == theirs for mine, theirs in zip(ids, base_ids, strict=True))]
    if "scores" not in own[0]:
        return ["–", "–", *speed, "–", "–", *map("{:.3f}".format, alike)]
    return [
        f"{fmean(score for each in own for score in each['scores']):.3f}",
        "{:+z.3f} ({:+z.3f} to {:+z.3f})".format(*interval(turns, change, name, first)),
        *speed,
        f"{tokens / sum(each['passes'] for each in own):.2f}",
        f"{1 - sum(each['flops'] for each in own) / sum(each['full_flops'] for each in own):z.1%}",
        *map("{:.3f}".format, alike),
    ]


def table(turns: list[Turn]) -> str:
    """All contenders in Markdown, compared with the first."""
    first = next(iter(turns[0]))
    lines = [["", *COLUMNS], ["---"] * (len(COLUMNS) + 1), *([name, *cells(turns, name, first)] for name in turns[0])]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def turns_of(
    file: Path, about: Record, task: Task, engines: dict[str, Engine], workers: dict[str, Worker], batch: int
) -> list[Turn]:
    """The turns that are kept in a file, and those that were missing. Raises `Failed` where a peer fails."""
    if not file.exists():
        write_atomically(file, (json.dumps(about) + "\n").encode())
    whole = file.read_bytes().rpartition(b"\n")[0]  # a run that was cut off may have left part of a line
    kept = [json.loads(line) for line in whole.splitlines()]
    if not kept or kept[0] != about:
        raise SystemExit(f"{file} is of other settings or another machine: remove it to start anew.")
    turns, asked = kept[1:], [task.items[at : at + batch] for at in range(0, len(task.items), batch)]
    if len(turns) < len(asked):
        take_turn(0, asked[0], task, engines, workers, batch)  # warms up
    with file.open("r+b") as out:
        out.truncate(out.seek(len(whole) + 1))
        for number in range(len(turns), len(asked)):
            turn = take_turn(number, asked[number], task, engines, workers, batch)
            turns.append(turn)
            line = json.dumps({name: rounded(record) for name, record in turn.items()})
            out.write(f"{line}\n".encode())
            out.flush()
    return turns


def run(args: argparse.Namespace, file: Path, about: Record) -> list[Turn]:
    """The turns of all contenders. Raises as `offramp.load` and `Worker` do."""
    model = offramp.load(args.model, args.dtype, **({"exits": args.exits} if args.exits else {}))
    task = load_task(args.task, args.data, args.questions, args.run_code)
    engines = {name: model.engine(name) for name in args.modes.split(",")}
    workers: dict[str, Worker] = {}
    try:
        for name in args.peers.split(",") if args.peers else []:
            workers[name] = Worker(name, paths_of(args.model, whole=False), 2)
        return turns_of(file, about, task, engines, workers, args.batch)
    finally:
        for worker in workers.values():
            worker.close()


def rounded(record: Record) -> Record:
    """A record without the digits that nothing was measured to."""
    numbers = {name: value for name, value in record.items() if isinstance(value, float)}
    return record | to_six_digits(numbers)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--task", required=True, choices=MAIN_SCORES)
    parser.add_argument("--data", type=Path, help="the task's official file")
    parser.add_argument("--modes", default="full,exact", help="by comma; the others are compared with the first")
    parser.add_argument("--peers", default="", help="by comma, as benchmarks/speed.py names them")
    parser.add_argument("--dtype")
    parser.add_argument("--exits", type=Path)
    parser.add_argument("--questions", type=int)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--run-code", action="store_true")
    parser.add_argument("--out", type=Path, help="where the turns are kept (default: a file in build/bench)")
    args = parser.parse_args(argv)
    WORK.mkdir(parents=True, exist_ok=True)
    file = args.out or WORK / f"answers-{Path(args.model).stem}-{args.task}-{args.dtype or 'own'}-{args.batch}.jsonl"
    here = {name: value for name, value in machine().items() if name != "date"}
    about = {"machine": here} | {name: str(value) for name, value in vars(args).items() if name != "out"}
    try:
        turns = run(args, file, about)
    except (OfframpError, Failed) as error:
        parser.error(f"{error} {getattr(error, 'hint', '')}".strip())
    print(f"{args.model}, {args.task}, {len(turns)} turns of {args.batch}; {machine()}\n")
    print(table(turns))


if __name__ == "__main__":
    main()
