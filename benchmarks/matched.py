"""What do calibrated exits save on other prompts of the workload that they were trained and calibrated for?

    .venv/bin/python benchmarks/matched.py result.jsonl --exits own=DIR --exits "own, task loss=DIR" [--tokens 48]

Answers all prompts at full depth, and under each folder's own policy. The table has the loss (1 − token F1 with full
depth's answer), the share of answers that stay the same, the share of the right answers' words that they have (recall), the
FLOPs saved, and the mean blocks run; with 95% intervals, by bootstrap over prompts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import offramp
from offramp import Engine, Exits
from offramp.decode.request import Generation
from offramp.errors import OfframpError
from offramp.machine import machine
from offramp.metrics import best_recall
from offramp.training.calibration import answers
from offramp.training.losses import Question, f1_loss, read_questions
from trade import Row, interval

COLUMNS = ("1 − token F1", "same answer", "word recall", "FLOPs saved", "mean blocks run")


def row(answer: Generation, full: Generation, question: Question) -> Row:
    """What one answer is worth and saves."""
    measures = (
        f1_loss(answer, full, question),
        float(answer.ids == full.ids),
        best_recall(answer.text, question.references) if question.references else 0.0,
        answer.flops_saved,
        answer.mean_blocks,
    )
    return dict(zip(COLUMNS, measures, strict=True))


def cell(rows: list[Row], column: str) -> str:
    """A mean and its interval."""
    mean, low, high = interval(rows, column)
    if column == "mean blocks run":
        return f"{mean:.2f} ({low:.2f}–{high:.2f})"
    return f"{mean:.1%} ({100 * low:.1f}–{100 * high:.1f})"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", type=Path, help="lines, or JSON lines with 'prompt' and perhaps 'answer'")
    parser.add_argument("--exits", action="append", required=True, metavar="NAME=DIR")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype")
    parser.add_argument("--fill", default="project")
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args(argv)
    try:
        backbone = offramp.load(args.model, args.dtype).backbone
        named = [(name, Exits.load(folder, backbone)) for name, _, folder in (each.partition("=") for each in args.exits)]
        questions = read_questions(args.prompts)
    except OfframpError as error:
        parser.error(f"{error} {error.hint}")
    ids = [backbone.prompts.encode(question.prompt) for question in questions]
    print(f"{backbone.name}, {backbone.weight_format}, {args.fill}, {len(ids)} prompts, {args.tokens} tokens; {machine()}")
    print(f"\n| exits | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    full = answers(Engine(backbone), ids, args.tokens)
    for name, exits in [("none", None), *named]:
        early = answers(Engine(backbone, exits, fill=args.fill), ids, args.tokens) if exits else full
        rows = [row(*triple) for triple in zip(early, full, questions, strict=True)]
        print(f"| {name} | {' | '.join(cell(rows, column) for column in COLUMNS)} |", flush=True)


if __name__ == "__main__":
    main()
