"""How good are exits on questions that nothing was trained on? Compares gates that share a read-out.

    .venv/bin/python benchmarks/exits.py QUESTIONS [--exits DIR] [--count 50] [--tokens 16] [--work DIR]

QUESTIONS is the official TruthfulQA.csv, or lines, or JSON lines with `prompt` or `question`. For the read-outs of the
given exits (default: the shipped ones), and again for untrained read-outs, a gate of each kind is trained anew, on the same
own answers. Then the script measures on the questions, with the model's own full-depth answers as the reference:

- agreement: how often an exit's top token is the full model's, and each gate's area under the ROC curve for it;
- decoding freely at three thresholds: mean blocks run, FLOPs saved, consistency (token F1 with the full answer).

Prints one table in Markdown and writes everything to WORK/exits.json. With `--formats` it shows instead how often the
given exits agree with the full model, and how well their gates rank, in each weight format.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import transformers

import offramp
from offramp import Engine, Exits, Policy
from offramp.decode.fills import FILLS
from offramp.files import read_lines
from offramp.metrics import auroc, token_f1
from offramp.model.backbone import Backbone
from offramp.model.compiled.formats import FORMATS
from offramp.model.compiled.runtime import Compiled
from offramp.training.answering import write_shards
from offramp.training.config import TrainConfig
from offramp.training.data import Data, gather
from offramp.training.teacher import TeacherTexts, group_texts
from offramp.training.trainer import Trainer, needed_layers
from offramp.training.validation import LabelledTexts, evidence, quality

GATES = ("linear", "ffn", "mamba")
THRESHOLDS = (0.5, 0.7, 0.9)


def questions_in(path: Path, count: int) -> list[str]:
    """At most `count` of the file's questions, evenly spaced."""
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as stream:
            lines = [row["Question"] for row in csv.DictReader(stream)]
    else:
        lines = read_lines(path, ("prompt", "question"))
    return lines[:: max(1, len(lines) // count)][:count]


def with_gate(backbone: Backbone, base: Exits, gate: str, readout: str) -> Exits:
    """Exits with an untrained gate of this kind and the read-outs of `base`, or untrained ones for `none`."""
    exits = Exits.new(backbone, replace(base.config, gate=gate, readout=readout))
    if readout != "none":
        for exit, trained in zip(exits, base, strict=True):
            exit.adapter.load_state_dict(trained.adapter.state_dict())
    exits.shortlist, exits.sketch = base.shortlist, base.sketch
    return exits


@torch.inference_mode()
def max_prob_scores(exits: Exits, labelled: LabelledTexts) -> list[torch.Tensor]:
    """For each exit, the probability of its likeliest token at every labelled position of all texts, (positions,)."""
    return [known.key for known in evidence(exits, labelled)]


def exits_for(backbone: Backbone, folder: Path | None) -> Exits:
    """The exits in the folder; the shipped ones for None."""
    exits = Exits.load(folder, backbone) if folder else offramp.ExitSet.shipped(backbone).early
    assert exits, f"no exits ship for {backbone.name}"
    return exits


def compare_formats(args: argparse.Namespace) -> None:
    """For each weight format, compare the exits with what the model answers in that format."""
    print("| weights | head | agreement | gate AUROC |\n|---|---|---|---|")
    for name in FORMATS:
        backbone = offramp.load(args.model, name).backbone
        exits = exits_for(backbone, args.exits)
        prompts = [backbone.prompts.encode(question) for question in questions_in(args.questions, args.count)]
        folder = args.work / f"asked-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        groups = group_texts(prompts, [], args.tokens, batch=48)
        answers = TeacherTexts.open(write_shards(backbone, groups, needed_layers(exits), folder))
        trainer = Trainer(backbone, exits, TrainConfig(), args.work)
        rows = quality(exits, evidence(exits, trainer.labels(answers)), trainer.acceptance(answers))
        agreement = " ".join(f"{row['agreement']:.0%}" for row in rows)
        head = backbone.runtime.head.name if isinstance(backbone.runtime, Compiled) else name
        print(f"| {name} | {head} | {agreement} | {' '.join(str(row['gate_auroc']) for row in rows)} |", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("questions", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--exits", type=Path)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--work", type=Path, default=Path("build/exits"))
    parser.add_argument("--fills", default="project", help=f"fills, by comma: {', '.join(FILLS)}")
    parser.add_argument("--own-prompts", help="prompts whose answers the gates learn from; default: offramp's own list")
    parser.add_argument("--formats", action="store_true", help="compare weight formats instead of gates")
    args = parser.parse_args(argv)
    if args.formats:
        compare_formats(args)
        return

    fast, exact = offramp.load(args.model).backbone, offramp.load(args.model, "float32").backbone
    base = exits_for(exact, args.exits)
    config = TrainConfig(prompts=args.own_prompts, gate_target="agreement")
    fills = args.fills.split(",")
    data: Data = gather(exact, config, needed_layers(base), args.work / "text")
    prompts = [exact.prompts.encode(question) for question in questions_in(args.questions, args.count)]
    groups = group_texts(prompts, [], args.tokens, batch=48)
    (args.work / "asked").mkdir(parents=True, exist_ok=True)
    answers = TeacherTexts.open(write_shards(exact, groups, needed_layers(base), args.work / "asked"))
    references = [Engine(fast).generate(ids, max_tokens=args.tokens) for ids in prompts]

    rows: list[dict[str, Any]] = []
    for readout in (base.config.readout, "none"):
        reader = Trainer(exact, with_gate(exact, base, base.config.gate, readout), config, args.work)
        labelled, to_learn = reader.labels(answers), reader.labels(data.gates)
        for gate in (*GATES, "max-prob"):
            exits = with_gate(exact, base, gate if gate in GATES else "linear", readout)
            folder = args.work / f"{readout}-{gate}"
            folder.mkdir(parents=True, exist_ok=True)
            if gate in GATES:
                torch.manual_seed(config.seed)
                trainer = Trainer(exact, exits, config, folder)
                trainer.standardise(data.adapters, "gate")
                trainer.fit_gates(to_learn)
                confidences = [known.gate for known in evidence(exits, labelled)]
            else:
                confidences = max_prob_scores(exits, labelled)
            agreed = [known.agrees for known in evidence(exits, labelled)]
            row: dict[str, Any] = {
                "readout": readout,
                "gate": gate,
                "agreement": [round(float(agrees.float().mean()), 3) for agrees in agreed],
                "auroc": [round(auroc(c, agrees), 3) for c, agrees in zip(confidences, agreed, strict=True)],
                "free": {},
            }
            for fill, threshold in product(fills, THRESHOLDS):
                policy = Policy((threshold,) * len(exits), "gate" if gate in GATES else "max-prob")
                engine = Engine(fast, exits, policy, fill)
                early = [engine.generate(ids, max_tokens=args.tokens) for ids in prompts]
                row["free"][f"{fill}, threshold {threshold}"] = {
                    "mean_blocks": round(mean(answer.mean_blocks for answer in early), 2),
                    "flops_saved": round(mean(answer.flops_saved for answer in early), 3),
                    "consistency": round(mean(token_f1(a.ids, b.ids) for a, b in zip(early, references, strict=True)), 3),
                }
            rows.append(row)
            print(json.dumps(row), flush=True)

    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    note = f"{machine}, transformers {transformers.__version__}; {fast.weight_format} decoding, {len(prompts)} questions"
    (args.work / "exits.json").write_text(json.dumps({"machine": note, "rows": rows}, indent=1))
    layers = ", ".join(map(str, base.config.layers))
    cells = " | ".join(f"{setting}: blocks / FLOPs saved / consistency" for setting in rows[0]["free"])
    print(f"\n{note}, {args.tokens} tokens each; exits after blocks {layers}\n")
    print(f"| read-out | gate | agreement | gate AUROC | {cells} |\n|---|---|---|---|" + "---|" * len(rows[0]["free"]))
    for row in rows:
        free = " | ".join(
            f"{v['mean_blocks']:.1f} / {v['flops_saved']:.0%} / {v['consistency']:.2f}" for v in row["free"].values()
        )
        agreement = " ".join(f"{value:.0%}" for value in row["agreement"])
        print(f"| {row['readout']} | {row['gate']} | {agreement} | {' '.join(map(str, row['auroc']))} | {free} |")


if __name__ == "__main__":
    main()
