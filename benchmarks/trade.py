"""What does a user trade? Consistency and task score against the FLOPs and the time that exits save.

    .venv/bin/python benchmarks/trade.py --exits before=DIR --exits jump=DIR --pilot calibrate.jsonl \\
        --truthfulqa TruthfulQA.csv --triviaqa trivia.jsonl [--count 60] [--tokens 48]

Each folder of exits gives one line with the gate alone, at several thresholds, and one with the gate and the second key, at
several precisions. These follow from answers to the pilot's prompts, which are not scored. A single large mark is the
exits' own policy, if it is calibrated.

Every question is answered under all conditions in turn, in an order that changes from question to question, one answer at a
time. Times are ratios to full depth's on the same question. Intervals are 95%, by bootstrap over questions. Prints a table
for each task; writes WORK/trade.json and a figure. The head is the whole one, so that only exits save.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

import offramp
from offramp import Engine, Exits, Policy
from offramp.errors import OfframpError
from offramp.evaluation.task import Task
from offramp.evaluation.tasks import load_task
from offramp.files import write_atomically
from offramp.machine import machine
from offramp.metrics import token_f1
from offramp.model.backbone import Backbone
from offramp.training.calibration import precision_line
from offramp.training.config import CalibrationConfig
from offramp.training.lines import heads
from offramp.training.losses import read_questions

SCORES = {"truthfulqa": "rougeL_max", "triviaqa": "f1"}
THRESHOLDS = (0.98, 0.95, 0.9, 0.8, 0.6, 0.4)
POINTS = 6  # policies of a line with the second key
PILOT = 100
MEASURES = ("consistency", "score", "FLOPs saved", "time saved")
FULL = "full depth"
Row = dict[str, float]
Name = tuple[str, str]  # a line and a policy


def lines_of(backbone: Backbone, name: str, exits: Exits, pilot: list[list[int]], fill: str) -> dict[str, list[Policy]]:
    """The policies of each line for these exits, nearly closed first."""
    head = heads(exits.named(backbone.vocab_size), whole_head=True)
    lines = {f"{name}, gate alone": [Policy((threshold,) * len(exits), "gate", 0.0, *head) for threshold in THRESHOLDS]}
    keyed = precision_line(backbone, exits, pilot, CalibrationConfig(fill=fill), head)
    lines[f"{name}, second key"] = keyed[:: max(1, len(keyed) // POINTS)]
    if exits.calibration:
        lines[f"{name}, calibrated"] = [replace(exits.policy, candidates=0)]
    return {line: policies for line, policies in lines.items() if policies}


def measured(backbone: Backbone, task: Task, engines: dict[Name, Engine], tokens: int) -> dict[Name, list[Row]]:
    """What each engine's answer to each question is worth and saves, compared with full depth's."""
    rows: dict[Name, list[Row]] = {name: [] for name in engines}
    for number, item in enumerate(task.items):
        ids, limit = backbone.prompts.encode(item.prompt, raw=True), min(tokens, task.max_tokens)
        order = random.Random(number).sample(list(engines), len(engines))
        answers = {name: engines[name].generate(ids, max_tokens=limit, stop=task.stop) for name in order}
        full = answers[FULL, FULL]
        for name, answer in answers.items():
            rows[name].append(
                {
                    "consistency": token_f1(answer.ids, full.ids),
                    "score": task.score(answer.text, item)[SCORES[task.name]],
                    "FLOPs saved": answer.flops_saved,
                    "time saved": 1 - full.decode_tokens_per_second / answer.decode_tokens_per_second,
                }
            )
    return rows


def interval(rows: list[Row], measure: str) -> tuple[float, float, float]:
    """The mean of a measure (of times, the median) and its 95% interval."""
    middle: Callable[[Any], Any] = median if measure == "time saved" else fmean
    values = [row[measure] for row in rows]
    drawn = np.random.default_rng(0).integers(len(values), size=(1000, len(values)))
    resampled = [middle([values[place] for place in places]) for places in drawn.tolist()]
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(middle(values)), float(low), float(high)


def draw(found: dict[str, dict[str, list[list[Row]]]], file: Path) -> None:
    """Draw consistency and score against FLOPs and time saved: a row of four for each task."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "offramp"  # makes the same file for the same figure
    from matplotlib import pyplot

    pairs = [(up, across) for up in MEASURES[:2] for across in MEASURES[2:]]
    figure, grid = pyplot.subplots(len(found), 4, figsize=(15, 3.6 * len(found)), squeeze=False, layout="constrained")
    for row, (task, lines) in zip(grid, found.items(), strict=True):
        for axes, (up, across) in zip(row, pairs, strict=True):
            for line, points in lines.items():
                x, y = (np.array([interval(rows, measure) for rows in points]) for measure in (across, up))
                bars = [abs(values[:, :1] - values[:, 1:]).T for values in (y, 100 * x)]
                alone = {"fmt": "o", "markersize": 9} if len(points) == 1 else {"fmt": "o-", "markersize": 4}
                axes.errorbar(100 * x[:, 0], y[:, 0], *bars, label=line, capsize=2, **alone)
            axes.set(xlabel=f"{across}, %", ylabel=up, title=task)
            axes.grid(alpha=0.25)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(file, metadata={"Date": None})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype")
    parser.add_argument("--exits", action="append", required=True, help="NAME=DIR; may be repeated")
    parser.add_argument("--fill", default="project")
    parser.add_argument("--pilot", type=Path, required=True, help="prompts that the thresholds follow from")
    parser.add_argument("--truthfulqa", type=Path)
    parser.add_argument("--triviaqa", type=Path)
    parser.add_argument("--count", type=int, default=60, help="questions of each task")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--work", type=Path, default=Path("build/trade"))
    args = parser.parse_args(argv)
    try:
        backbone = offramp.load(args.model, args.dtype).backbone
        pilot = [backbone.prompts.encode(question.prompt) for question in read_questions(args.pilot)[:PILOT]]
        lines = {FULL: {FULL: Engine(backbone)}}
        for name, folder in (pair.split("=", 1) for pair in args.exits):
            exits = Exits.load(folder, backbone)
            for line, policies in lines_of(backbone, name, exits, pilot, args.fill).items():
                gate = exits.config.gate
                lines[line] = {each.describe(gate): Engine(backbone, exits, each, args.fill) for each in policies}
        tasks = [load_task(name, data, args.count) for name in SCORES if (data := getattr(args, name))]
    except OfframpError as error:
        parser.error(f"{error} {error.hint}")
    print(f"{backbone.name}, {backbone.weight_format}, {args.fill}; {machine()}")
    found: dict[str, dict[str, list[list[Row]]]] = {}
    for task in tasks:
        engines = {(line, name): engine for line, points in lines.items() for name, engine in points.items()}
        rows = measured(backbone, task, engines, args.tokens)
        print(f"\n{task.name}, {len(task.items)} questions\n\n| line | policy | {' | '.join(MEASURES)} |")
        print("|---|---|" + "---|" * len(MEASURES))
        for names, values in rows.items():
            cells = ["{:.3f} ({:.3f}–{:.3f})".format(*interval(values, measure)) for measure in MEASURES]
            print(f"| {' | '.join([*names, *cells])} |", flush=True)
        found[task.name] = {line: [rows[line, name] for name in points] for line, points in lines.items()}
    args.work.mkdir(parents=True, exist_ok=True)
    write_atomically(args.work / "trade.json", json.dumps({"machine": machine(), "tasks": found}).encode())
    draw(found, args.work / "trade.svg")
    print(f"\n{args.work / 'trade.svg'}")


if __name__ == "__main__":
    main()
