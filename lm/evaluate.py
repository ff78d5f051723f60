"""How good is a trained model at each depth? Bits per byte on the test split, and samples to read.

    python -m lm.evaluate MODEL CORPUS [--read-out-steps 600] [--samples FILE.md]

Every test token is predicted with at least 1,024 tokens before it (fewer only at the text's start): the first half of a
window of 2,048 is context. After each block, the model's own final norm and head read the hidden state out. They were
trained for the last block only. `--read-out-steps` trains a read-out for the middle of the model, which shows how well half
the depth can predict.

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
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm.corpus import END, Lengths, Tokens, load_tokens, piece_bytes, report
from lm.documents import question_and_answer
from lm.forward import Forward
from lm.train import Settings, batch_at
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


class ReadOut(nn.Module):
    """A low-rank residual adapter before the model's own final norm and head: h (B, T, D) → (B, T, D)."""

    def __init__(self, width: int, rank: int = 64) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, h: Tensor) -> Tensor:
        correction: Tensor = self.up(self.down(h))
        return h + correction


def train_read_out(forward: Forward, tokens: Tokens, block: int, steps: int, settings: Settings) -> ReadOut:
    """Fit a read-out after `block` blocks to the training text by cross-entropy; the model stays as it is."""
    torch.manual_seed(settings.seed)
    read_out = ReadOut(forward.model.config.hidden_size)
    optimizer = torch.optim.AdamW(read_out.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    for step in range(steps):
        batch = batch_at(tokens, step, settings)
        with torch.no_grad():
            h = at_depth(forward, batch[:, :-1], block)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (1 - step / steps)
        loss = forward.loss(read_out(h), batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return read_out.requires_grad_(False)


def at_depth(forward: Forward, ids: Tensor, block: int) -> Tensor:
    """The hidden state (B, T, D) after `block` blocks. Deeper blocks do not run. Raises `ValueError` if there are fewer."""
    for blocks_run, h in enumerate(forward.states(ids), start=1):
        if blocks_run == block:
            return h
    raise ValueError(f"the model has no block {block}")


@dataclass(frozen=True)
class Depths:
    """How good the read-out is after each block.

    bits: bits per byte. agreement: how often the likeliest piece is the same as after the last block. trained: bits and
    agreement of the trained read-out.
    """

    bits: list[float]
    agreement: list[float]
    trained: tuple[float, float]


@torch.no_grad()
def depths(forward: Forward, tokens: Tokens, lengths: Lengths, block: int = 0, read_out: ReadOut | None = None) -> Depths:
    """Measure over all tokens the read-out after each block, and `read_out`, if it is given, after `block` blocks."""
    rows, counted = windows(tokens)
    size = int(lengths[rows[:, 1:]][counted].sum())
    blocks = len(forward.model.backbone.layers)
    nats, same = np.zeros(blocks + 1), np.zeros(blocks + 1)  # the last is the trained read-out's
    for at in range(0, len(rows), BATCH):
        ids, mask = torch.from_numpy(rows[at : at + BATCH]), torch.from_numpy(counted[at : at + BATCH])
        states = list(forward.states(ids[:, :-1]))
        if read_out:
            states.append(read_out(states[block - 1]))
        last = forward.likeliest(states[blocks - 1])
        for index, h in enumerate(states):
            nats[index] += float(forward.surprise(h, ids[:, 1:])[mask].double().sum())
            same[index] += int((forward.likeliest(h) == last)[mask].sum())
    bits, agreement = (nats / math.log(2) / size).tolist(), (same / counted.sum()).tolist()
    return Depths(bits[:blocks], agreement[:blocks], (bits[-1], agreement[-1]))


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
    parser.add_argument("--read-out-steps", type=int, default=0, help="train a read-out at half depth, 4,096 tokens a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        test, train = load_tokens(args.corpus, "test"), load_tokens(args.corpus, "train")
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
    forward = Forward(model)
    half, read_out = len(model.backbone.layers) // 2, None
    if args.read_out_steps:
        settings = Settings(batch=16, length=256, learning_rate=1e-3, seed=args.seed)
        read_out = train_read_out(forward, train, half, args.read_out_steps, settings)
    measured = depths(forward, test, piece_bytes(tokenizer), half, read_out)
    by_block, (trained, agrees) = measured.bits, measured.trained
    result: dict[str, Any] = {
        "model": args.model.name,
        "windows": f"{WINDOW} tokens, the first {CONTEXT} as context",
        "bits_per_byte": round(by_block[-1], 4),
        "untrained_read_out": [round(bits, 4) for bits in by_block],
        "untrained_agreement": [round(share, 4) for share in measured.agreement],
    }
    if read_out:
        result["trained_read_out"] = {"block": half, "steps": args.read_out_steps}
        result["trained_read_out"] |= {"bits_per_byte": round(trained, 4), "agreement": round(agrees, 4)}
        result["full_depth_is_better_by"] = round(1 - by_block[-1] / trained, 4)
    print(json.dumps(result, indent=1))
    if args.out:
        write_atomically(args.out, json.dumps(result, indent=1).encode())
    if args.samples:
        questions = [line for line in PROMPTS.read_text().splitlines() if line.endswith("?")]
        written = samples(model, tokenizer, questions, seed=args.seed)
        write_atomically(args.samples, markdown(written, args.model.name, args.seed).encode())


if __name__ == "__main__":
    main()
