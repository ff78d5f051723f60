"""Answers that a larger model writes to questions: text for `lm.corpus`.

    python -m lm.answers smollm2 trivia.jsonl --count 10000 -o answers.jsonl

It answers the `--count` questions of lowest hash. After an interruption, the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import offramp
from lm.corpus import report
from lm.documents import read_source
from offramp.errors import OfframpError

BATCH = 64


def questions_of(files: list[Path], count: int) -> list[str]:
    """The `count` questions of lowest hash in the files, each once."""
    questions = {document.question for file in files for document in read_source(file).documents if document.question}
    return sorted(questions, key=lambda text: hashlib.sha256(text.encode()).digest())[:count]


@torch.inference_mode()
def answers(backbone: Any, questions: list[str], tokens: int) -> list[str]:
    """The model's greedy answers, each cut after its last whole sentence; empty if an answer has none."""
    tokenizer = backbone.tokenizer
    prompts = [backbone.prompts.encode(question) for question in questions]
    longest = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.eos_token_id] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = backbone.model.generate(
        ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    return [whole_sentences(text) for text in tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)]


def whole_sentences(text: str) -> str:
    """The text up to the end of its last whole sentence; empty if it has none."""
    return text[: 1 + max(text.rfind(mark) for mark in ".!?")].strip()


def batches(questions: list[str]) -> Iterator[list[str]]:
    """Batches of questions of about the same length, which need little padding."""
    for start in range(0, len(questions), 16 * BATCH):
        by_length = sorted(questions[start : start + 16 * BATCH], key=len)
        yield from (by_length[at : at + BATCH] for at in range(0, len(by_length), BATCH))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="as for offramp generate")
    parser.add_argument("questions", type=Path, nargs="+", help="files of questions, as for lm.corpus")
    parser.add_argument("-o", "--out", type=Path, required=True, help="JSON lines with question and answer")
    parser.add_argument("--count", type=int, default=10_000, help="questions to answer")
    parser.add_argument("--tokens", type=int, default=48, help="the longest answer, in tokens")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        answered = {document.question for document in read_source(args.out).documents} if args.out.exists() else set()
        questions = [question for question in questions_of(args.questions, args.count) if question not in answered]
        # For many rows at once, the library's own blocks are fast, and fastest in float32.
        backbone = offramp.load(args.model, "float32", keep=True).backbone
        written = len(answered)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        for batch in batches(questions):
            pairs = zip(batch, answers(backbone, batch, args.tokens), strict=True)
            text = "".join(json.dumps({"question": question, "answer": answer}) + "\n" for question, answer in pairs)
            with args.out.open("a") as stream:
                stream.write(text)
                os.fsync(stream.fileno())
            written += len(batch)
            print(f"{written} questions", flush=True)
    except OfframpError as error:
        report(parser, error)


if __name__ == "__main__":
    main()
