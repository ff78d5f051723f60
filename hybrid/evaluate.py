"""How well do models predict text, and what do they answer?

    python -m hybrid.evaluate smollm2 smollm2-hybrid --text wikitext2-test.txt --prompts PROMPTS.jsonl --samples FILE.md

For each model:

- With `--text`: perplexity and bits per byte of a plain text, in windows of `WINDOW` tokens that begin with no context.
- With `--prompts`: the first model answers the prompts at temperature 1 (each token is one of its 16 likeliest).
  Perplexity of these answers, and how often a model's likeliest token is the first model's.
- With `--samples`: what each model answers to the first `SAMPLES` prompts, greedily, in each of `--modes`, is written to a
  file.

Models with another tokenizer than the first have only bits per byte to compare. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import torch

import offramp
from lm.corpus import report
from offramp import Engine
from offramp.errors import OfframpError
from offramp.files import read_lines, write_atomically
from offramp.model.backbone import Backbone
from offramp.training.config import TrainConfig
from offramp.training.data import gather
from offramp.training.teacher import TeacherTexts

WINDOW = 512
SAMPLES, SAMPLE_TOKENS = 20, 96
HEADER = "| model | perplexity | bits per byte | perplexity of answers | its likeliest token is the first model's |"


@torch.inference_mode()
def nats_of(backbone: Backbone, ids: list[int]) -> torch.Tensor:
    """The log probabilities (T - 1, V) of what follows each of the ids but the last."""
    h, step = backbone.embed(torch.tensor([ids]))
    top = backbone.run(h, 0, backbone.n_blocks, backbone.state(len(ids)), step)
    return backbone.logits(top)[0, :-1].float().log_softmax(-1)


def of_text(backbone: Backbone, text: str, most: int) -> tuple[float, float]:
    """Perplexity, and bits per byte, of at most so many tokens of a text."""
    ids = backbone.tokenizer(text, add_special_tokens=False)["input_ids"][:most]
    nats, tokens, size = 0.0, 0, 0
    for start in range(0, len(ids) - 1, WINDOW):
        window = ids[start : start + WINDOW]
        if len(window) < 2:
            break
        made = nats_of(backbone, window).gather(1, torch.tensor(window[1:])[:, None])
        nats, tokens = nats - float(made.sum()), tokens + len(window) - 1
        size += len(backbone.tokenizer.decode(window[1:]).encode())
    return math.exp(nats / tokens), nats / math.log(2) / size


def answers_of(backbone: Backbone, prompts: Path, count: int, folder: Path) -> TeacherTexts:
    """The model's answers to so many prompts, drawn at temperature 1."""
    config = TrainConfig(prompts=str(prompts), max_prompts=count, temperatures=(1.0,))
    data = gather(backbone, config, (backbone.n_blocks,), folder)
    return data.adapters + data.gates + data.held


def of_answers(backbone: Backbone, texts: TeacherTexts) -> tuple[float, float]:
    """Perplexity of the answers, and how often the model's likeliest token is that of the model that wrote them."""
    nats, right, count = 0.0, 0, 0
    for text in texts:
        where = text.counted[:-1]  # nothing is known of what follows the last token
        made = nats_of(backbone, text.ids.tolist())[where]
        nats -= float(made.gather(1, text.ids[1:][where].long()[:, None]).sum())
        right += int((made.argmax(-1) == text.top_ids[:-1, 0][where]).sum())
        count += int(where.sum())
    return math.exp(nats / count), right / count


def samples(engines: dict[str, Engine], prompts: list[str]) -> str:
    """What each engine answers to the prompts, greedily, as a Markdown document."""
    parts = [f"# Answers of {' and '.join(engines)}\n\nGreedy, {SAMPLE_TOKENS} tokens at most. No prompt is left out.\n"]
    answers = {name: engine.generate_batch(prompts, max_tokens=SAMPLE_TOKENS) for name, engine in engines.items()}
    for number, prompt in enumerate(prompts):
        parts.append(f"## {number + 1}. {' '.join(prompt.split())}\n")
        parts += [f"- **{name}**: {' '.join(made[number].text.split())}" for name, made in answers.items()]
        parts.append("")
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--text", type=Path, help="a plain text")
    parser.add_argument("--tokens", type=int, default=60_000, help="most tokens of the text")
    parser.add_argument("--prompts", type=Path, help="a file of prompts that no model was trained on")
    parser.add_argument("--count", type=int, default=200, help="most prompts to answer")
    parser.add_argument("--modes", default="full", help="of the samples, by comma")
    parser.add_argument("--samples", type=Path, help=f"write answers to the first {SAMPLES} prompts to this Markdown file")
    args = parser.parse_args(argv)
    if args.samples and not args.prompts:
        parser.error("--samples needs --prompts.")
    try:
        evaluate(args)
    except OfframpError as error:
        report(parser, error)


def evaluate(args: Any) -> None:
    """Print the table, and write the samples."""
    loaded = {name: offramp.load(name) for name in args.models}
    models = {name: model.backbone for name, model in loaded.items()}
    with tempfile.TemporaryDirectory() as folder:
        texts = answers_of(models[args.models[0]], args.prompts, args.count, Path(folder)) if args.prompts else None
        print(f"{HEADER}\n|{'---|' * HEADER.count(' | ')}---|")
        for name, backbone in models.items():
            cells = ["–"] * 4
            if args.text:
                perplexity, bits = of_text(backbone, args.text.read_text("utf-8"), args.tokens)
                cells[:2] = [f"{perplexity:.2f}", f"{bits:.3f}"]
            if texts is not None:
                perplexity, same = of_answers(backbone, texts)
                cells[2:] = [f"{perplexity:.3f}", f"{100 * same:.1f}%"]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
    if args.samples:
        prompts = read_lines(args.prompts, ("prompt", "question"))[:SAMPLES]
        modes = args.modes.split(",")
        engines = {
            ", ".join([name, *([mode] if modes[1:] else [])]): model.engine(mode)
            for name, model in loaded.items()
            for mode in modes
        }
        write_atomically(args.samples, samples(engines, prompts).encode())


if __name__ == "__main__":
    main()
