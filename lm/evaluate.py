"""How good is a trained model? Bits per byte on the test split, and samples to read.

    python -m lm.evaluate MODEL CORPUS [--samples FILE.md]

Every test token is predicted with at least 1,024 tokens before it (fewer only at the text's start): the first half of a
window of 2,048 is context.

Samples are the first that the seed gives, without selection. Half of them answer questions of offramp's own list of
prompts; the other half have an empty prompt.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm.corpus import END, Lengths, Tokens, load_tokens, piece_bytes, report
from lm.documents import question_and_answer
from lm.forward import Forward
from offramp.errors import BadInput, OfframpError
from offramp.files import write_atomically
from offramp.training.data import PROMPTS

WINDOW = 2048
CONTEXT = 1024
BATCH = 4


def windows(
    tokens: Tokens, window: int = WINDOW, context: int = CONTEXT
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Rows of tokens (n, window + 1), and which targets of each row count (n, window).

    Every token of the text but the first counts in one row.
    """
    rows, counted = [], []
    for start in range(0, max(1, len(tokens) - 1 - context), window - context):
        row = tokens[start : start + window + 1]
        target = np.arange(1, window + 1)
        rows.append(np.pad(row, (0, window + 1 - len(row))))
        counted.append((target < len(row)) & ((target > context) | (start == 0)))
    return np.stack(rows).astype(np.int64), np.stack(counted)


@torch.no_grad()
def bits_per_byte(forward: Forward, tokens: Tokens, lengths: Lengths) -> float:
    """The model's bits per byte over all tokens."""
    rows, counted = windows(tokens)
    nats = 0.0
    for at in range(0, len(rows), BATCH):
        ids, mask = torch.from_numpy(rows[at : at + BATCH]), torch.from_numpy(counted[at : at + BATCH])
        nats += float(forward.surprise(forward.last(ids[:, :-1]), ids[:, 1:])[mask].double().sum())
    return nats / math.log(2) / int(lengths[rows[:, 1:]][counted].sum())


@dataclass(frozen=True)
class Sample:
    """A text that the model wrote after a prompt."""

    prompt: str
    text: str


def samples(
    model: Any, tokenizer: Any, questions: list[str], count: int = 20, most: int = 120, seed: int = 0
) -> list[Sample]:
    """`count` samples at temperature 0.8 and top-p 0.95: half answer questions, half have an empty prompt."""
    chosen = sorted(np.random.default_rng(seed).permutation(len(questions))[: count // 2].tolist())
    prompts = [END + question_and_answer(questions[index]) for index in chosen] + [END] * (count - len(chosen))
    out = []
    for number, prompt in enumerate(prompts):
        torch.manual_seed(seed + number)
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        settings = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0, "max_new_tokens": most}
        ids_out = model.generate(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"], **settings)[0]
        out.append(Sample(prompt, tokenizer.decode(ids_out[ids["input_ids"].shape[1] :], skip_special_tokens=True)))
    return out


def markdown(written: list[Sample], name: str, seed: int) -> str:
    """The samples as a Markdown document."""
    parts = [f"# Samples of {name}\n\nTemperature 0.8, top-p 0.95, seed {seed}; prompts in bold, none left out.\n"]
    for number, sample in enumerate(written, start=1):
        prompt = " ".join(sample.prompt.removeprefix(END).split())
        parts.append(f"{number}. {f'**{prompt}** ' if prompt else ''}{' '.join(sample.text.split())}\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("corpus", type=Path, help="a folder made by python -m lm.corpus")
    parser.add_argument("-o", "--out", type=Path, help="write the numbers to this JSON file too")
    parser.add_argument("--samples", type=Path, help="write 20 samples to this Markdown file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        test = load_tokens(args.corpus, "test")
        model = (
            AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, trust_remote_code=False)
            .eval()
            .requires_grad_(False)
        )
        tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
        if tokenizer.get_vocab() != AutoTokenizer.from_pretrained(args.corpus, trust_remote_code=False).get_vocab():
            raise BadInput(f"{args.model} and {args.corpus} have different tokenizers.")
    except OfframpError as error:
        report(parser, error)
    result = {
        "model": args.model.name,
        "windows": f"{WINDOW} tokens, the first {CONTEXT} as context",
        "bits_per_byte": round(bits_per_byte(Forward(model), test, piece_bytes(tokenizer)), 4),
    }
    print(json.dumps(result, indent=1))
    if args.out:
        write_atomically(args.out, json.dumps(result, indent=1).encode())
    if args.samples:
        questions = [line for line in PROMPTS.read_text().splitlines() if line.endswith("?")]
        written = samples(model, tokenizer, questions, seed=args.seed)
        write_atomically(args.samples, markdown(written, args.model.name, args.seed).encode())


if __name__ == "__main__":
    main()
