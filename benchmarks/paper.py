"""Repeats the experiment of DYNAMAX (arXiv 2504.20922) on small models: gates and fills on three tasks.

    .venv/bin/python benchmarks/paper.py --truthfulqa TruthfulQA.csv --triviaqa trivia.jsonl --coqa coqa.json [--quick]

For each model, the gates are `linear`, `ffn` and `mamba`, trained on the same own answers beside the same read-outs, and
`max-prob`, which needs no training. Each gate runs at five thresholds, and at the threshold calibrated for the task (risk
0.05, on questions that are not scored). Then every fill runs with the gate that saves most at its calibrated threshold. If
that opens no exit, fills run at the threshold that saves most while consistency stays at 0.8.

From CoQA come all turns of five conversations. A model that `offramp tune` made is compared with the model it was made
from. Without files, the tasks come from the hub.

After an interruption, the same command goes on. Results go to WORK/MODEL-TASK.json, and WORK/report.html shows them all.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import offramp
from exits import exits_for, with_gate
from offramp import Exits, Policy
from offramp.errors import BadInput, OfframpError
from offramp.evaluation.evaluation import Condition, Evaluation, fingerprint
from offramp.evaluation.report import write
from offramp.evaluation.results import load_results, save_results
from offramp.evaluation.tasks import load_task
from offramp.exits.policy import TRAINING_FREE
from offramp.model.backbone import Backbone
from offramp.model.hub import ALIASES
from offramp.training.calibration import Question, calibrate
from offramp.training.config import CalibrationConfig, TrainConfig
from offramp.training.data import gather
from offramp.training.trainer import Trainer, needed_layers

TASKS = ("truthfulqa", "triviaqa", "coqa")
GATES = ("linear", "ffn", "mamba", "max-prob")
THRESHOLDS = (0.98, 0.95, 0.9, 0.8, 0.6)
FILLS = ("project", "freeze", "copy", "defer", "verify")


def trained(
    backbone: Backbone, base: Exits, gates: list[str], prompts: str | None, count: int | None, work: Path
) -> dict[str, Exits]:
    """For each gate, exits with it and the read-outs of `base`; kept in the folder `work`."""
    config = TrainConfig(prompts=prompts, max_prompts=count, gate_target="agreement")  # the paper's
    missing = [gate for gate in gates if gate not in TRAINING_FREE and not (work / gate / "offramp.json").exists()]
    if missing:
        data = gather(backbone, config, needed_layers(base), work / "text")
        labelled = Trainer(backbone, base, config, work).labels(data.gates)
        for gate in missing:
            torch.manual_seed(config.seed)
            exits = with_gate(backbone, base, gate, base.config.readout)
            (work / gate).mkdir(parents=True, exist_ok=True)
            trainer = Trainer(backbone, exits, config, work / gate)
            trainer.standardise(data.adapters, "gate")
            trainer.fit_gates(labelled)
            exits.modules.eval().requires_grad_(False)
            exits.training = {"command": shlex.join(sys.argv), "gate": gate, "read-outs": base.training.get("command")}
            exits.save(work / gate)
    return {gate: copy.copy(base) if gate in TRAINING_FREE else Exits.load(work / gate, backbone) for gate in gates}


def untuned(backbone: Backbone) -> Backbone:
    """The model that `offramp tune` made this one from, to compare with; the model itself if it was not tuned."""
    record = Path(backbone.source.path) / "tuning.json"
    return offramp.load(json.loads(record.read_text())["untuned"]["name"]) if record.is_file() else backbone


def mark(*settings: Any) -> str:
    """A short hash of settings, to name files by."""
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]


def run(model: str, task_name: str, data: Path | None, args: argparse.Namespace) -> Path:
    """Run the experiment for one model and task, and return the file of its results."""
    source, _, folder = model.partition("=")
    name = Path(source).name
    backbone = offramp.load(source)
    reference = untuned(backbone)
    base = exits_for(backbone, Path(folder) if folder else None)
    learned = [fingerprint(base), args.prompts, *([args.own_prompts] if args.own_prompts else [])]
    everything = load_task(task_name, data)
    setup = [args.count, args.calibration, args.thresholds, args.batch, args.gates, everything.sha256]
    work: Path = args.work / mark(backbone.source.sha256, reference.source.sha256, learned, setup)
    file = work / f"{name}-{task_name}.json"
    if file.exists():
        return file
    count = args.count
    if task_name == "coqa":
        stories = list(dict.fromkeys(item.id.partition("/")[0] for item in everything.items))[: 1 if args.quick else 5]
        count = sum(item.id.partition("/")[0] in stories for item in everything.items)
    scored = replace(everything, items=everything.items[:count])
    unscored = [Question(item.prompt) for item in everything.items[count:]][: args.calibration]
    if task_name == "coqa":  # turns of one conversation are not independent draws
        unscored = []
    gates = trained(
        backbone, base, args.gates.split(","), args.own_prompts, args.prompts, args.work / f"{name}-{mark(learned)}"
    )
    kept = work / f".{name}-{task_name}"

    def on_progress(stage: str, completed: int, total: int, note: str = "") -> None:
        if completed == total:
            print(f"{time.strftime('%H:%M:%S')} {name} {task_name} {stage} {note}", flush=True)

    evaluation = Evaluation(
        backbone, scored, kept, reference, args.batch, command=shlex.join(sys.argv), progress=on_progress
    )
    results = [evaluation.run(Condition()), evaluation.run(Condition("project", None, base))]
    consistent: list[tuple[float, Policy, Exits]] = []
    calibrated: list[tuple[float, Policy, Exits]] = []
    for gate, exits in gates.items():
        confidence = gate if gate in TRAINING_FREE else "gate"
        for threshold in args.thresholds:
            policy = Policy((threshold,) * len(exits), confidence)
            results.append(evaluation.run(Condition("project", policy, exits)))
            summary = results[-1].summary
            if summary["token_f1"].mean >= 0.8:
                consistent.append((summary["flops_saved"].mean, policy, exits))
        if unscored:
            chosen = copy.copy(exits)
            tokens, stop = everything.max_tokens, everything.stop
            config = CalibrationConfig(kind="thresholds", confidence=confidence, max_tokens=(tokens,), stop=stop, raw=True)
            try:
                calibrate(backbone, chosen, unscored, config, reference)
            except BadInput as error:
                on_progress("calibration", 1, 1, str(error))
                continue
            results.append(evaluation.run(Condition("project", None, chosen)))
            if min(chosen.policy.thresholds) < 1:
                calibrated.append((results[-1].summary["flops_saved"].mean, chosen.policy, chosen))
    # Where calibration opens no exit, fills differ only under thresholds that change some answers.
    for _, policy, exits in sorted(calibrated or consistent, key=lambda run: -run[0])[:1]:
        for fill in FILLS[1:]:
            if fill != "freeze" or "mamba" in backbone.kinds:
                results.append(evaluation.run(Condition(fill, policy, exits)))
    save_results(results, file)
    return file


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--truthfulqa", type=Path)
    parser.add_argument("--triviaqa", type=Path)
    parser.add_argument("--coqa", type=Path)
    parser.add_argument("--models", default=",".join(ALIASES), help="models, by comma; MODEL=DIR: exits in DIR")
    parser.add_argument("--tasks", default=",".join(TASKS), help="tasks, by comma")
    parser.add_argument("--gates", default=",".join(GATES), help="gates, by comma")
    parser.add_argument("--count", type=int, default=100, help="questions of each task")
    parser.add_argument("--calibration", type=int, default=300, help="other questions to calibrate on")
    parser.add_argument("--own-prompts", help="prompts whose answers the gates learn from; default: offramp's own list")
    parser.add_argument("--prompts", type=int, help="use only the first PROMPTS of them; default: all")
    parser.add_argument("--batch", type=int, default=16, help="answers side by side; times are shares of a batch's")
    parser.add_argument("--quick", action="store_true", help="20 minutes: few questions, two thresholds, no calibration")
    parser.add_argument("--work", type=Path, default=Path("build/paper"), help="holds one folder for each setting")
    args = parser.parse_args(argv)
    args.thresholds = THRESHOLDS
    for names, known in ((args.tasks, TASKS), (args.gates, GATES)):
        if unknown := set(names.split(",")).difference(known):
            parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    if args.quick:
        args.count, args.calibration, args.prompts, args.thresholds = 12, 0, 100, THRESHOLDS[1:4:2]
    files = []
    try:
        for name in args.models.split(","):
            for task in args.tasks.split(","):
                files.append(run(name, task, getattr(args, task), args))
        figures = write(load_results(files), args.work / "report.html")
    except OfframpError as error:
        parser.error(f"{error} {error.hint}")
    print(f"{args.work / 'report.html'}, and {len(figures)} figures")


if __name__ == "__main__":
    main()
