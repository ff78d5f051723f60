"""Is each full-depth answer to a task's prompts the one that `transformers` generates?

    .venv/bin/python benchmarks/agreement.py triviaqa rc.nocontext.jsonl [--model smollm2] [--dtype float32] [--count 200]

In float32 every answer must be the library's. For an answer that is not, the script prints the two best logits at the first
token that differs; if they are closer than 1e-4, it is a tie. In bfloat16 answers may differ; the script prints how
many are the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import offramp
from offramp import Engine
from offramp.errors import OfframpError
from offramp.evaluation.tasks import TASKS, load_task


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=[name for name in TASKS if name != "truthfulqa-mc"])
    parser.add_argument("data", type=Path, nargs="?", help="the task's file; default: from the hub")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--count", type=int, default=200)
    args = parser.parse_args(argv)
    try:
        task = load_task(args.task, args.data, args.count)
        backbone = offramp.load(args.model, args.dtype, keep=True).backbone
    except OfframpError as error:
        parser.error(f"{error} {error.hint}")
    engine, model, same = Engine(backbone), backbone.model, 0
    for number, item in enumerate(task.items, start=1):
        prompt = list(backbone.tokenizer(item.prompt)["input_ids"])
        ours = engine.generate(prompt, max_tokens=task.max_tokens, stop=task.stop).ids
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(ours), do_sample=False)
            library_ids = generated[0, len(prompt) :].tolist()
            if ours == library_ids:
                same += 1
            else:
                place = next(at for at, (our, its) in enumerate(zip(ours, library_ids, strict=False)) if our != its)
                best = model(torch.tensor([prompt + ours[:place]])).logits[0, -1].float().topk(2).values.tolist()
                print(f"{item.id}: token {place + 1} differs; best logits {best[0]:.5f} and {best[1]:.5f}", flush=True)
        if number % 20 == 0:
            print(f"{same} of {number}", flush=True)
    print(f"{backbone.name}, {backbone.weight_format}, {task.name}: {same} of {len(task.items)} answers are the library's")


if __name__ == "__main__":
    main()
