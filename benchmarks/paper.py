"""Repeats the experiment of DYNAMAX (arXiv 2504.20922) on small models, with exits that open: gates, read-outs, fills.

    .venv/bin/python benchmarks/paper.py --truthfulqa TruthfulQA.csv --triviaqa trivia.jsonl --coqa coqa.json \\
        --text wikitext2-valid.txt --text books.txt [--quick]

For each model and task, in batches: full depth; the exits that ship (their own policy; a line of second keys; the policies
calibrated for risks of 0.02, 0.05 and 0.1, with the losses F1 and task, on questions that are not scored); and exits that
are trained here, all on texts of one size. These differ in one thing each, and run at several thresholds: the gate (linear,
ffn, mamba, or max-prob, which needs no training), jump or no jump, top-1 or top-5 agreement, own answers or plain text
(TEXT, for the paper's web text) or the task's own answers (TriviaQA), and the training's seed. Further thresholds are near
that at which consistency falls to 0.9. Then every fill, under the shipped exits' policy that skips most blocks at a
consistency of 0.9; verified drafts; and some of it again with the paper's repetition penalty of 1.1.

From CoQA come all turns of the file's conversations. It is a smoke test: there, exits that are trained here differ in gate
and jump alone, run at fewer thresholds, and nothing has a penalty.

Times are taken by `benchmarks/paper_times.py`, one answer at a time. After an interruption, the same command goes on.
Results go to WORK/MODEL-TASK.json, and WORK/report.html shows them all. Without files, the tasks come from the hub.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import offramp
from offramp import Exits, Policy
from offramp.errors import OfframpError
from offramp.evaluation.evaluation import Condition, Evaluation, fingerprint
from offramp.evaluation.results import ConditionInfo, Result, load_results, save_results
from offramp.evaluation.task import Task
from offramp.evaluation.tasks import load_task
from offramp.exits.policy import TRAINING_FREE
from offramp.extras.report.curves import CONSISTENT
from offramp.extras.report.page import write
from offramp.files import write_atomically
from offramp.training.calibration import calibrations, precision_line
from offramp.training.config import CalibrationConfig, TrainConfig
from offramp.training.data import prompts_of, turns
from offramp.training.lines import heads
from offramp.training.losses import Question
from offramp.training.teacher import TextGroup, group_texts, read_texts
from paper_exits import Recipe, Workshop, mark

MODELS = ("smollm2", "smollm2-hybrid", "mamba-tiny-ee")
COUNTS = {"truthfulqa": 200, "triviaqa": 300, "coqa": None}  # questions that are scored
GATES = ("linear", "ffn", "mamba", "max-prob")
THRESHOLDS = (0.9, 0.8, 0.6, 0.4)
LOWEST, HALVINGS = 0.2, 4  # the interval from this threshold to 1 is halved so often, to find where consistency falls
SMOKE = "coqa"  # the smoke test: its prompts are long, and its questions few
SEEDS = (0, 1, 2)
RISKS, LOSSES = (0.02, 0.05, 0.1), ("f1", "task")
POINTS = 5  # policies of a line of second keys
FILLS = ("freeze", "copy", "defer", "verify")
PENALTY = 1.1  # the paper's
SHIPPED, DRAFTS = "shipped", "drafts"  # labels of the exits that ship
OWN, PLAIN, MATCHED = "own answers", "plain text", "the task's answers"
THE_PAPERS = Recipe("mamba", False, PLAIN, k=5)
GATHERED = 48  # texts side by side


class Experiment:
    """One task on one model.

    `scored` are the task's questions that are scored, `others` those that are not: the first `calibration` of them are
    calibrated on, and the rest is the matched workload. `model`: MODEL, or MODEL=DIR for exits that do not ship.
    """

    def __init__(self, model: str, task_name: str, args: argparse.Namespace) -> None:
        name, _, folder = model.partition("=")
        backbone, task = offramp.load(name).backbone, load_task(task_name, getattr(args, task_name))
        self.backbone, self.args, self.source, self.name = backbone, args, name, Path(name).name
        self.shipped = Exits.load(folder, backbone) if folder else offramp.ExitSet.shipped(backbone).early
        count = COUNTS[task_name] if args.count is None else args.count
        self.scored, self.others = replace(task, items=task.items[:count]), task.items[count:] if count else []
        self.task = task
        self.work = args.work / f"{self.name}-{self.mark}"
        workshop = Workshop(backbone, self.texts, self.work / "exits", args.epochs)
        self.made = workshop.exits
        self.jumps = (True, False) if workshop.shape.tails else (False,)

    @property
    def mark(self) -> str:
        """A short hash of what the exits are made of."""
        args, texts = self.args, [str(file) for file in self.args.text or []]
        return mark(self.backbone.source.fingerprint, args.own_prompts, args.prompts, texts, args.epochs)

    @property
    def brief(self) -> bool:
        """Whether only the gates are compared, without the variants of their training and without a penalty."""
        return bool(self.args.quick) or self.task.name == SMOKE

    def texts(self) -> dict[str, list[TextGroup]]:
        """What exits learn from: own answers, as many tokens of plain text, and answers to other questions of the task."""
        backbone, count = self.backbone, self.args.prompts
        config = TrainConfig(prompts=self.args.own_prompts, max_prompts=count)
        asked, temperatures = turns(prompts_of(backbone, config), config.temperatures, count)
        found = {OWN: group_texts(asked, [], config.answer_tokens, GATHERED, temperatures)}
        if self.args.text:
            most = count // 3 // len(self.args.text)  # as long as the answers, roughly
            pieces = [piece for file in self.args.text for piece in read_texts(file, backbone)[:most]]
            found[PLAIN] = group_texts([], pieces, 0, GATHERED)
        return found

    @property
    def gates(self) -> list[Recipe]:
        """The recipes of the exits that are made here and differ in gate and jump alone."""
        return [Recipe(gate, jump) for jump in self.jumps for gate in GATES]

    @property
    def variants(self) -> list[Recipe]:
        """The recipes with another seed, target or text. The matched workload has its own."""
        if self.brief:
            return []
        jump, learned = self.jumps[0], [gate for gate in GATES if gate not in TRAINING_FREE]
        found = [Recipe(gate, jump, seed=seed) for seed in SEEDS[1:] for gate in learned]
        found += [Recipe(gate, jump, k=5) for gate in learned]
        return found + ([*(Recipe("mamba", jump, PLAIN) for jump in self.jumps), THE_PAPERS] if self.args.text else [])

    def at(self, threshold: float, recipe: Recipe, exits: Exits | None = None) -> Condition:
        """Exits that are made here, with one threshold for all."""
        confidence = recipe.gate if recipe.gate in TRAINING_FREE else "gate"
        exits = exits or self.made(recipe)
        return Condition("project", Policy((threshold,) * len(exits), confidence), exits, recipe.label)

    def condition_of(self, info: ConditionInfo) -> Condition:
        """The condition that a Result is of, if its exits ship or have a recipe."""
        exits: Exits | None = self.shipped
        if not info.label.startswith(SHIPPED):
            assert info.policy
            gate = info.policy.confidence_name(info.gate or "")
            (recipe,) = (each for each in self.gates + self.variants if (each.label, each.gate) == (info.label, gate))
            exits = self.made(recipe)
        return Condition(info.fill or "project", info.policy, exits, info.label)

    def with_shipped(self, exits: Exits) -> Iterator[Condition]:
        """The shipped exits: their own policy, the line of second keys, and what is calibrated for this task."""
        yield Condition("project", None, exits, SHIPPED)
        yield from self.second_keys
        yield from self.calibrated(exits)
        yield from self.drafts()

    def drafts(self) -> list[Condition]:
        """Verified drafts, if exits that draft ship."""
        drafts = offramp.ExitSet.shipped(self.backbone).drafting
        return [Condition("verify", None, drafts, DRAFTS)] if drafts else []

    @cached_property
    def second_keys(self) -> list[Condition]:
        """The shipped exits' second keys for falling precisions, from answers to offramp's own prompts; the whole head."""
        assert self.shipped
        exits = self.shipped

        def line() -> list[dict[str, Any]]:
            prompts = prompts_of(self.backbone, TrainConfig(prompts=self.args.own_prompts, max_prompts=self.args.pilot))
            head = heads(exits.named(self.backbone.vocab_size), whole_head=True)
            return [asdict(policy) for policy in precision_line(self.backbone, exits, prompts, CalibrationConfig(), head)]

        found = self.once(f"second-keys-{self.args.pilot}", line)
        places = sorted({round(place * (len(found) - 1) / (POINTS - 1)) for place in range(POINTS)}) if found else []
        return [Condition("project", Policy.from_json(found[place]), exits, SHIPPED) for place in places]

    def calibrated(self, exits: Exits) -> Iterator[Condition]:
        """The shipped exits under the policies that are calibrated for this task, one for each risk and loss."""
        questions = [Question(item.prompt, item.references) for item in self.others[: self.args.calibration]]
        if not questions:  # turns of one conversation are not independent draws
            return
        config = CalibrationConfig(max_tokens=self.task.max_tokens, stop=self.task.stop, raw=True, whole_head=True)
        configs = [replace(config, risk=risk, loss=loss) for risk in RISKS for loss in LOSSES]

        def records() -> list[dict[str, Any]]:
            return [asdict(record) for record in calibrations(self.backbone, exits, questions, configs)]

        for record in self.once(f"{self.task.name}-calibrated-{len(questions)}", records):
            chosen = copy.copy(exits)
            chosen.policy, chosen.calibration = Policy.from_json(record["policy"]), record
            yield Condition("project", None, chosen, f"{SHIPPED}, risk {record['risk']:g}, loss {record['loss']}")

    def matched(self, run: Evaluation) -> list[Result]:
        """Exits that learn from the model's answers to other questions of this task, asked as they are scored."""
        items = self.others[self.args.calibration :]
        if len(items) < self.args.prompts // 2:
            return []
        prompts = [list(self.backbone.tokenizer(item.prompt)["input_ids"]) for item in items[: self.args.prompts]]
        groups = group_texts(prompts, [], self.task.max_tokens, GATHERED)
        workshop = Workshop(
            self.backbone, lambda: {MATCHED: groups}, self.work / f"{self.task.name}-exits", self.args.epochs
        )
        recipe = Recipe("ffn", self.jumps[0], MATCHED)
        return list(around(run, lambda threshold: self.at(threshold, recipe, workshop.exits(recipe)), HALVINGS))

    def results(self) -> list[Result]:
        """Answer the questions under all conditions."""
        run, exits = self.evaluation(self.scored), self.shipped
        smoke = self.task.name == SMOKE
        thresholds = () if smoke and not self.args.quick else self.args.thresholds
        grid = [self.at(threshold, recipe) for recipe in self.gates for threshold in thresholds]
        found = [run.run(condition) for condition in (Condition(), *grid)]
        if not self.args.quick:
            there = {result.condition.name for result in found}
            halvings = HALVINGS - 1 if smoke else HALVINGS
            recipes = self.gates + self.variants
            near = [each for recipe in recipes for each in around(run, partial(self.at, recipe=recipe), halvings)]
            found += [result for result in near if result.condition.name not in there]
        if not self.brief:
            found += self.matched(run)
        if exits is None:
            return found
        pairs = [(condition, run.run(condition)) for condition in self.with_shipped(exits)]
        found += [result for _, result in pairs]
        chosen = boldest([result for _, result in pairs], blocks_skipped)
        tried = next(condition for condition, result in pairs if result is chosen)
        fills = [fill for fill in FILLS if fill != "freeze" or "mamba" in self.backbone.kinds]
        found += [run.run(replace(tried, fill=fill, policy=tried.used_policy)) for fill in fills]
        if not self.brief:
            run = self.evaluation(replace(self.scored, repetition_penalty=PENALTY))
            found += [run.run(condition) for condition in (Condition(), *self.second_keys, *self.drafts())]
            found += around(run, partial(self.at, recipe=Recipe("mamba", self.jumps[0])), HALVINGS)
        return found

    def once(self, name: str, make: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """What `make` makes for the shipped exits; kept on disk, so that it is made once."""
        assert self.shipped
        file = self.work / f"{name}-{mark(fingerprint(self.shipped))}.json"
        if not file.exists():
            write_atomically(file, json.dumps(make()).encode())
        found: list[dict[str, Any]] = json.loads(file.read_text("utf-8"))
        return found

    def evaluation(self, task: Task) -> Evaluation:
        """A run over these questions, whose answers are kept."""
        args, name = self.args, f"{self.name} {task.name}"

        def on_progress(stage: str, completed: int, total: int, note: str = "") -> None:
            if completed == total:
                print(f"{time.strftime('%H:%M:%S')} {name}: {stage} {note}", flush=True)

        kept = self.work / f".{task.name}"
        return Evaluation(self.backbone, task, kept, batch=args.batch, command=shlex.join(sys.argv), progress=on_progress)


def around(run: Evaluation, at: Callable[[float], Condition], halvings: int) -> Iterator[Result]:
    """Results of exits at thresholds closer and closer to that at which answers are no longer consistent."""
    low, high = LOWEST, 1.0
    for _ in range(halvings):
        middle = round((low + high) / 2, 6)
        yield (result := run.run(at(middle)))
        if result.summary["token_f1"].mean >= CONSISTENT:
            high = middle
        else:
            low = middle


def boldest(results: list[Result], measure: Callable[[Result], float]) -> Result:
    """The result with the most of a measure, of those that are consistent, skip blocks, and read out with the whole head.

    If there is none, it is the most consistent.
    """

    def kept(result: Result) -> float:
        return result.summary["token_f1"].mean

    def counts(result: Result) -> bool:
        info, skips = result.condition, result.summary["mean_blocks"].mean < result.blocks
        return bool(info.policy and not info.policy.candidates and info.fill == "project" and skips)

    counted = [each for each in results if counts(each) and kept(each) >= CONSISTENT]
    return max(counted, key=measure) if counted else max(results, key=kept)


def blocks_skipped(result: Result) -> float:
    """How many blocks a token skips, on average."""
    return result.blocks - result.summary["mean_blocks"].mean


def flops_saved(result: Result) -> float:
    """The share of full depth's FLOPs that is saved."""
    return result.summary["flops_saved"].mean


def run(experiment: Experiment) -> Path:
    """Run the experiment, and return the file of its results."""
    args, shipped = experiment.args, experiment.shipped
    setup = [args.count, args.calibration, args.thresholds, args.batch, args.pilot, args.quick, experiment.task.sha256]
    folder = mark(experiment.mark, setup, shipped and [fingerprint(shipped), asdict(shipped.policy)])
    file: Path = args.work / folder / f"{experiment.name}-{experiment.task.name}.json"
    if not file.exists():
        save_results(experiment.results(), file)
    return file


def parser_of(doc: str) -> argparse.ArgumentParser:
    """A parser with the flags that say which experiment it is; `doc` is the script's."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    for task in COUNTS:
        parser.add_argument(f"--{task}", type=Path, help="the task's official file; default: from the hub")
    parser.add_argument("--text", type=Path, action="append", help="a plain text to train exits on, too; may be repeated")
    parser.add_argument("--models", default=",".join(MODELS), help="models, by comma; MODEL=DIR: exits in DIR")
    parser.add_argument("--tasks", default=",".join(COUNTS), help="tasks, by comma")
    parser.add_argument("--count", type=int, help="questions of each task; default: 200, 300, all")
    parser.add_argument("--calibration", type=int, default=200, help="other questions to calibrate on")
    parser.add_argument("--own-prompts", help="prompts whose answers exits learn from; default: offramp's own list")
    parser.add_argument("--prompts", type=int, default=1200, help="how many of them")
    parser.add_argument("--pilot", type=int, default=120, help="how many of them say where second keys are")
    parser.add_argument("--epochs", type=int, default=2, help="passes of the trainings over their text")
    parser.add_argument("--batch", type=int, default=32, help="answers side by side")
    parser.add_argument("--quick", action="store_true", help="few questions, thresholds and trainings")
    parser.add_argument("--work", type=Path, default=Path("build/paper"), help="holds all that is made")
    return parser


def finish(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Read the arguments, and fill in what follows from them."""
    args = parser.parse_args(argv)
    args.thresholds = THRESHOLDS
    if unknown := set(args.tasks.split(",")).difference(COUNTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(COUNTS)}")
    if args.quick:
        args.count, args.calibration, args.prompts, args.pilot, args.epochs = 8, 0, 96, 24, 1
        args.thresholds = THRESHOLDS[1::2]
    return args


def main(argv: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    args = finish(parser, argv)
    files = []
    try:
        for name in args.models.split(","):
            for task in args.tasks.split(","):
                files.append(run(Experiment(name, task, args)))
        figures = write(load_results(files), args.work / "report.html")
    except OfframpError as error:
        parser.error(f"{error} {error.hint}")
    print(f"{args.work / 'report.html'}, and {len(figures)} figures")


if __name__ == "__main__":
    main()
