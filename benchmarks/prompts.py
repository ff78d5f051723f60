"""Prompts to train and calibrate exits with, in parts that share none.

    PYTHONPATH=. .venv/bin/python benchmarks/prompts.py --trivia opentriviaqa.jsonl --instructions dolly-1000.jsonl

It writes six files of JSON lines to build/prompts. `first`, `second` and `calibrate` are a mix of prompts written for
offramp, instructions and trivia questions. `first` and `second` are for two stages of a training. In them, offramp's own
list and the instructions come several times, so that they are answered at several temperatures. `own-train`,
`own-calibrate` and `own-result` are trivia questions alone, with their answers.

Nothing was learned from the prompts of `calibrate`. They are those of `calibration-prompts/`, written for this, and trivia
questions that no training of exits used, and that were held out where mamba-tiny learned its language (`lm.corpus`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
from pathlib import Path

from lm.corpus import HELD
from lm.documents import hash_share, letters_of
from offramp.files import read_lines, write_atomically
from offramp.training.data import PROMPTS

REPEATS = 5  # of offramp's own prompts and of instructions
LONGEST = 800  # characters of an instruction
# Earlier calibrations tested so many prompts of each source, and the path was chosen after one of them: they are used up.
SPENT = {"own": 240, "instructions": 120, "trivia": 540}
FRESH = Path(__file__).parent / "calibration-prompts"
FRESH_TRIVIA = 540
FIRST, SECOND = 10476, 12000  # prompts of the two stages: 0.9 and 1.1 million tokens of answers
MATCHED = {"own-train": 4000, "own-calibrate": 1000, "own-result": 400}


def instructions(path: Path) -> list[dict[str, str]]:
    """The instructions of a file of prompts in Alpaca's format, without that format."""
    found = (re.sub(r"(?s)^.*### Instruction:\n|\n*### Response:\s*$", "", line) for line in read_lines(path, ("prompt",)))
    return [{"prompt": prompt} for prompt in dict.fromkeys(found) if len(prompt) <= LONGEST]


def trivia(path: Path) -> list[dict[str, str]]:
    """Trivia questions, each once, with their answers."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return list({row["question"]: {"prompt": row["question"], "answer": row["answer"]} for row in rows}.values())


def divided(sources: dict[str, list[dict[str, str]]], share: float = 1.0) -> dict[str, list[dict[str, str]]]:
    """The six parts; `share` makes them smaller."""
    draw = random.Random(0)
    for rows in sources.values():
        draw.shuffle(rows)
    questions, parts = iter(sources["trivia"]), {}
    for name, count in MATCHED.items():
        parts[name] = [next(questions) for _ in range(round(count * share))]
    spent = {name: round(count * share) for name, count in SPENT.items()}
    sources = {**sources, "trivia": list(questions)}
    rest = {name: rows[spent[name] :] for name, rows in sources.items()}
    repeated = [row for name in ("own", "instructions") for row in rest[name][: round(len(sources[name]) * share)]]
    new = min(len(rest["trivia"]) // REPEATS, round(3000 * share))
    train: list[dict[str, str]] = []
    for turn in range(REPEATS):
        rows = repeated + rest["trivia"][turn * new : (turn + 1) * new]
        # Temperatures are used in turn, line by line: a line more or less gives a prompt another one at each turn.
        rows = rows[: len(rows) - (len(rows) - 1) % 3]
        train += [{"prompt": row["prompt"]} for row in rows]
    first, second = 3 * round(FIRST * share / 3), round(SECOND * share)
    parts["first"], parts["second"] = train[:first], train[first : first + second]
    spent_trivia = sources["trivia"][: spent["trivia"]]
    used = {letters_of(row["prompt"]) for row in itertools.chain(spent_trivia, *parts.values())}
    unused = {letters_of(row["prompt"]): row["prompt"] for row in rest["trivia"][REPEATS * new :]}
    held = [question for key, question in unused.items() if hash_share(key) < 2 * HELD and key not in used]
    written = [line for name in ("own", "instructions") for line in read_lines(FRESH / f"{name}.txt", ())]
    parts["calibrate"] = [{"prompt": prompt} for prompt in [*written, *held[: round(FRESH_TRIVIA * share)]]]
    return parts


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trivia", type=Path, required=True)
    parser.add_argument("--instructions", type=Path, required=True)
    parser.add_argument("--share", type=float, default=1.0, help="of all parts; for a trial")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/prompts"))
    args = parser.parse_args(argv)
    own = [{"prompt": line} for line in read_lines(PROMPTS, ("prompt",))]
    sources = {"own": own, "instructions": instructions(args.instructions), "trivia": trivia(args.trivia)}
    args.output.mkdir(parents=True, exist_ok=True)
    for name, rows in divided(sources, args.share).items():
        write_atomically(args.output / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
        print(f"{name}: {len(rows)} prompts")


if __name__ == "__main__":
    main()
