"""Are verified answers equal to full depth's? Checks a model, or random tiny models of every family.

    .venv/bin/python benchmarks/verified.py TruthfulQA.csv [--model smollm2] [--dtype float32]
    .venv/bin/python benchmarks/verified.py --tiny [--count 200]

Every question is answered at full depth and with `--mode exact`. For answers that differ, the script prints how far apart
the two best logits are at the first token that differs. In float32, only ties may differ; in compiled blocks,
nothing may.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

import torch

import offramp
from answers import questions_in
from offramp import Engine, Policy
from offramp.errors import OfframpError
from offramp.exits.exit_set import ExitSet

TESTS = Path(__file__).parents[1] / "tests"


def compare(engine: Engine, prompts: list[list[int]], tokens: int) -> str:
    """Answer each prompt both ways, and say in a line how many answers differ, and how many drafts stood."""
    backbone, full = engine.backbone, Engine(engine.backbone)
    gaps, stood, rejected, count, passes = [], 0, 0, 0, 0
    for ids in prompts:
        whole, answer = full.generate(ids, max_tokens=tokens), engine.generate(ids, max_tokens=tokens)
        end = answer.tokens[-1]
        stood += sum(token.exit_block < backbone.n_blocks for token in answer.tokens)
        rejected, passes, count = rejected + end.rejected, passes + end.deep_passes, count + len(answer.tokens)
        if answer.ids != whole.ids:
            place = next(at for at, (our, full_id) in enumerate(zip(answer.ids, whole.ids, strict=False)) if our != full_id)
            with torch.inference_mode():
                best = backbone.forward(torch.tensor([ids + whole.ids[:place]]))[0, -1].topk(2).values
            gaps.append(float(best[0] - best[1]))
    listed = f" (best logits apart by {', '.join(f'{gap:.1e}' for gap in sorted(gaps))})" if gaps else ""
    rate = f"{stood / (stood + rejected):.0%}" if stood + rejected else "no drafts"
    return (
        f"{len(prompts)} answers, {len(gaps)} differ{listed}; {stood} drafts stood, {rejected} taken back ({rate}), "
        f"{count / max(1, passes):.2f} tokens a deep pass"
    )


def tiny_models(count: int) -> None:
    """Compare on `count` prompts for a random tiny model of each family."""
    sys.path.insert(0, str(TESTS))
    helpers, models = import_module("helpers"), import_module("models")
    for family in models.VARIANTS:
        # Of so small a model no draft would pay, so they cost nothing.
        engine = helpers.costing(Engine(models.tiny(family), helpers.modest_exits(family), Policy((0.2,) * 3), "verify"))
        line = compare(engine, helpers.some_prompts(count), 12)
        print(f"{family}: {line}", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("questions", type=Path, nargs="?")
    parser.add_argument("--tiny", action="store_true", help="random models of every family instead, with random gates")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype")
    parser.add_argument("--exits", type=Path)
    parser.add_argument("--count", type=int)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args(argv)
    if args.tiny == bool(args.questions):
        parser.error("name a file of questions, or --tiny.")
    if args.tiny:
        tiny_models(args.count or 200)
        return
    try:
        backbone = offramp.load(args.model, args.dtype).backbone
        exits = ExitSet.find(args.exits, backbone).drafting
    except OfframpError as error:
        parser.error(f"{error} {error.hint}")
    prompts = [backbone.prompts.encode(question) for question in questions_in(args.questions, args.count or 100)]
    line = compare(Engine(backbone, exits, fill="verify"), prompts, args.tokens)
    print(f"{backbone.name}, {backbone.weight_format}: {line}")


if __name__ == "__main__":
    main()
