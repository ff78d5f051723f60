"""Does a calibrated risk hold on questions that were not calibrated on? Draws twenty splits of the same questions.

    .venv/bin/python benchmarks/guarantee.py TruthfulQA.csv trivia.jsonl [--model smollm2] [--exits DIR] [--count 400]

The model answers each question at full depth, and once with each candidate policy
(`offramp.training.lines.candidates`). Losses are kept in --work, so that an interrupted run goes on. Then, in each
split, one half of the questions calibrates (pilot and test, as `offramp calibrate` does), and the loss of the chosen policy
is measured on the other half. The splits share their questions, so they illustrate the guarantee and do not prove it.
`tests/test_calibration.py` simulates it on independent draws.

Prints a table in Markdown and draws the held-out mean loss of each split with two standard errors.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import offramp
from answers import questions_in
from offramp import Engine, Policy
from offramp.errors import OfframpError
from offramp.exits.exit_set import ExitSet
from offramp.files import write_atomically
from offramp.training.calibration import PILOT, answers, gain
from offramp.training.lines import KINDS, candidates
from offramp.training.losses import LOSSES, Question, read_questions
from offramp.training.risk import fixed_sequence, path

SPLITS = 20


def questions_of(files: list[Path], count: int) -> list[Question]:
    """The questions of lowest hash, equally many of each file, `count` in all."""
    chosen: list[Question] = []
    for file in files:
        if file.suffix == ".jsonl":
            questions = read_questions(file)
        else:
            questions = [Question(prompt) for prompt in questions_in(file, 10**6)]
        unique = {question.prompt: question for question in questions}.values()
        by_hash = sorted(unique, key=lambda question: hashlib.sha256(question.prompt.encode()).digest())
        chosen += by_hash[: count // len(files)]
    return chosen


def split(
    losses: dict[str, list[float]],
    gains: dict[str, list[float]],
    saved: dict[str, list[float]],
    risk: float,
    delta: float,
    seed: int,
) -> dict[str, Any]:
    """Calibrate on one half; give the chosen policy (None: closed), and its loss and saved FLOPs on the other half."""
    names, count = list(losses), len(next(iter(losses.values())))
    order = random.Random(seed).sample(range(count), count)
    calibration, held = order[: count // 2], order[count // 2 :]
    first = round(PILOT * len(calibration))
    pilot, test = calibration[:first], calibration[first:]

    def part(values: list[float], indices: list[int]) -> list[float]:
        return [values[index] for index in indices]

    means = [(fmean(part(losses[name], pilot)), fmean(part(gains[name], pilot))) for name in names]
    on_path = [names[index] for index in path(means, risk)]
    tested = fixed_sequence((part(losses[name], test) for name in on_path), risk, delta)
    passed = [name for name, (_, _, ok) in zip(on_path, tested, strict=False) if ok]
    if not passed:
        return {"policy": None, "loss": 0.0, "error": 0.0, "flops_saved": 0.0}
    held_losses = part(losses[passed[-1]], held)
    return {
        "policy": passed[-1],
        "loss": fmean(held_losses),
        "error": stdev(held_losses) / sqrt(len(held_losses)),
        "flops_saved": fmean(part(saved[passed[-1]], held)),
    }


def draw(splits: list[dict[str, Any]], risk: float, title: str, file: Path) -> None:
    """Draw each split's held-out loss, with two standard errors, and its saved FLOPs."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "offramp"  # makes the same file for the same figure
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(7, 4.6), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    places = range(1, len(splits) + 1)
    losses, intervals = [result["loss"] for result in splits], [2 * result["error"] for result in splits]
    above.errorbar(places, losses, intervals, fmt="o", capsize=3)
    above.axhline(risk, linestyle="--", color="tab:red")
    above.annotate(f"risk {risk:g}", (len(splits), risk), ha="right", va="bottom", color="tab:red")
    above.set(ylabel="held-out mean loss", ylim=(0, None), title=title)
    below.bar(places, [100 * result["flops_saved"] for result in splits])
    below.set(ylabel="FLOPs saved, %", xlabel="split", xticks=list(places))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("questions", type=Path, nargs="+", help="TruthfulQA.csv, lines, or JSON lines as TriviaQA's")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype")
    parser.add_argument("--exits", type=Path)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--policy", default="thresholds", choices=KINDS)
    parser.add_argument("--fill", default="project")
    parser.add_argument("--loss", default="f1", choices=LOSSES)
    parser.add_argument("--risk", type=float, default=0.05)
    parser.add_argument("--delta", type=float, default=0.05)
    parser.add_argument("--work", type=Path, default=Path("build/guarantee"))
    parser.add_argument("--figure", type=Path, default=Path("build/guarantee/guarantee.svg"))
    args = parser.parse_args(argv)
    try:
        backbone = offramp.load(args.model, args.dtype).backbone
        exits = ExitSet.find(args.exits, backbone).require_early(backbone)
        questions = questions_of(args.questions, args.count)
    except OfframpError as error:
        parser.error(f"{error} {error.hint}")
    ids = [backbone.prompts.encode(question.prompt) for question in questions]
    parts = (args.model, backbone.source.sha256, backbone.weight_format, exits.training, args.fill, args.tokens, args.loss)
    prompts = [question.prompt for question in questions]
    mark = hashlib.sha256(json.dumps([*parts, prompts]).encode()).hexdigest()[:12]

    full: list[Any] = []

    def kept(name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        file = args.work / mark / f"{name}.json"
        if not file.exists():
            write_atomically(file, json.dumps(make()).encode())
        return dict(json.loads(file.read_text()))

    def run(policy: Policy) -> dict[str, Any]:
        if not full:
            full.extend(answers(Engine(backbone), ids, args.tokens))
        early = answers(Engine(backbone, exits, policy, args.fill), ids, args.tokens)
        triples = zip(early, full, questions, strict=True)
        return {
            "policy": asdict(policy),
            "losses": [LOSSES[args.loss].of(answer, whole, question) for answer, whole, question in triples],
            "gain": [gain(answer, args.fill) for answer in early],
            "flops_saved": [answer.flops_saved for answer in early],
            "mean_blocks": fmean(answer.mean_blocks for answer in early),
        }

    records: dict[str, dict[str, Any]] = {}
    print("| thresholds | mean loss | FLOPs saved | mean blocks run |\n|---|---|---|---|")
    for line in candidates(len(exits), args.policy, exits.policy.confidence, exits.named(backbone.vocab_size)):
        for policy in line:
            name = " ".join(f"{threshold:.3g}" for threshold in policy.thresholds)
            name += f", {policy.candidates} candidates" if policy.candidates else ""
            record = records[name] = kept(f"{policy.confidence} {policy.decay} {name}", partial(run, policy))
            loss = fmean(record["losses"])
            print(f"| {name} | {loss:.3f} | {fmean(record['flops_saved']):.1%} | {record['mean_blocks']:.1f} |", flush=True)
            if loss > 2.5 * args.risk:  # the rest of the line is bolder and would never be tested
                break
    losses = {name: record["losses"] for name, record in records.items()}
    gains = {name: record["gain"] for name, record in records.items()}
    saved = {name: record["flops_saved"] for name, record in records.items()}
    splits = [split(losses, gains, saved, args.risk, args.delta, seed) for seed in range(SPLITS)]
    title = f"{args.model}, {args.fill}: {SPLITS} splits of {len(questions)} questions"
    print(
        f"\n{title}; risk {args.risk}, delta {args.delta}, loss {args.loss}; {backbone.weight_format}, {args.tokens} tokens"
    )
    print(f"held-out loss above the risk: {sum(result['loss'] > args.risk for result in splits)} of {SPLITS}")
    closed = sum(result["policy"] is None for result in splits)
    print(f"closed: {closed} of {SPLITS}; FLOPs saved, mean: {fmean(result['flops_saved'] for result in splits):.1%}")
    for result in splits:
        held_out = f"loss {result['loss']:.3f} ± {2 * result['error']:.3f}"
        print(f"- {result['policy'] or 'closed'}: {held_out}, saved {result['flops_saved']:.1%}")
    draw(splits, args.risk, title, args.figure)


if __name__ == "__main__":
    main()
