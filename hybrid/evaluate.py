"""How well do models with mixers predict text, beside SmolLM2?

    python -m hybrid.evaluate smollm2 smollm2-hybrid --text wikitext2-test.txt --answers WORK

For each model: perplexity and bits per byte of a plain text, in windows of `WINDOW` tokens that begin with no context; and
with `--answers`, over held-out answers of SmolLM2 in the folder of `hybrid.distil`: perplexity of the token that SmolLM2
finds likeliest, and how often the model finds the same. Models with another tokenizer have only bits per byte to compare.
Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

import offramp
from hybrid.distil import held_texts
from offramp.model.backbone import Backbone
from offramp.training.teacher import TeacherTexts

WINDOW = 512
HELD = 96  # answers


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
        found = nats_of(backbone, window).gather(1, torch.tensor(window[1:])[:, None])
        nats, tokens = nats - float(found.sum()), tokens + len(window) - 1
        size += len(backbone.tokenizer.decode(window[1:]).encode())
    return math.exp(nats / tokens), nats / math.log(2) / size


def of_answers(backbone: Backbone, texts: TeacherTexts) -> tuple[float, float]:
    """Perplexity of the teacher's likeliest tokens over its answers, and how often the model finds the same likeliest."""
    nats, right, count = 0.0, 0, 0
    for text in texts:
        where = text.counted.clone()
        where[-1] = False  # `nats_of` says nothing about what follows the last token
        wanted = text.top_ids[where][:, 0].long()
        found = nats_of(backbone, text.ids.tolist())[where[:-1]]
        nats -= float(found.gather(1, wanted[:, None]).sum())
        right, count = right + int((found.argmax(-1) == wanted).sum()), count + len(wanted)
    return math.exp(nats / count), right / count


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--text", type=Path, help="a plain text")
    parser.add_argument("--answers", type=Path, help="the folder that hybrid.distil worked in")
    parser.add_argument("--tokens", type=int, default=60_000, help="most tokens of the text")
    args = parser.parse_args(argv)
    held = held_texts(args.answers)[:HELD] if args.answers else None
    print(
        "| model | perplexity | bits per byte | of answers: perplexity | the same likeliest token |\n|---|---|---|---|---|"
    )
    for name in args.models:
        backbone, cells = offramp.load(name), ["–"] * 4
        if args.text:
            perplexity, bits = of_text(backbone, args.text.read_text(), args.tokens)
            cells[:2] = [f"{perplexity:.2f}", f"{bits:.3f}"]
        if held is not None:
            perplexity, same = of_answers(backbone, held)
            cells[2:] = [f"{perplexity:.3f}", f"{100 * same:.1f}%"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
