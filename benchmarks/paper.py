"""Repeats the experiment of DYNAMAX (arXiv 2504.20922) on small models: the modes, and exits that differ in one thing each.

    .venv/bin/python benchmarks/paper.py --truthfulqa TruthfulQA.csv --triviaqa trivia.jsonl --coqa coqa.json \\
        --humaneval humaneval.jsonl --mbpp mbpp.jsonl --run-code --text wikitext2-valid.txt --text books.txt [--quick]

For each model and task, in batches: full depth; the modes exact and early, with the exits that ship; and
exits that are trained here, all on texts of one size. These are a Mamba gate, a feed-forward gate of its size, and the
paper's recipe (a Mamba gate on TEXT that foresees top-5 agreement, without a jump). Each runs at several thresholds, closer
and closer to that at which consistency falls to 0.9.

Two tasks, TruthfulQA and MBPP, have more: the exits that ship, calibrated for risks of 0.02, 0.05 and 0.1 with the losses
F1 and task, on questions that are not scored; and every fill, under the calibrated policy that skips most blocks at a
consistency of 0.9. TruthfulQA also has other gates (linear, and max-prob, which needs no training), gates without a jump,
top-5 instead of top-1 agreement, and some conditions again with the paper's repetition penalty of 1.1. Of a task for code
that a model hardly ever solves, full depth's answers are all.

Times are taken by `benchmarks/paper_times.py`. After an interruption, the same command goes on. Results go to
WORK/MODEL-TASK.json, and WORK/report.html shows them all. Without files, the tasks come from the hub.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import offramp
from answers import MAIN_SCORES
from offramp import Policy
from offramp.decode.modes import settled
from offramp.errors import OfframpError
from offramp.evaluation.evaluation import Condition, Evaluation, fingerprint
from offramp.evaluation.results import ConditionInfo, Result, load_results, save_results
from offramp.evaluation.task import Task
from offramp.evaluation.tasks import load_task
from offramp.exits.policy import TRAINING_FREE
from offramp.extras.report.curves import CONSISTENT
from offramp.extras.report.page import write
from offramp.files import write_atomically
from offramp.training.calibration import calibrations
from offramp.training.config import CalibrationConfig, TrainConfig
from offramp.training.data import prompts_of, turns
from offramp.training.losses import Question
from offramp.training.teacher import TextGroup, group_texts, read_texts
from paper_exits import Recipe, Workshop, mark

MODELS = ("smollm2", "smollm2-hybrid", "smollm2-mamba")
COUNTS = {"truthfulqa": 200, "triviaqa": 200, "coqa": None, "humaneval": None, "mbpp": 100}  # questions that are scored
WHOLE = ("truthfulqa",)  # tasks with all conditions
CALIBRATED = ("truthfulqa", "mbpp")  # tasks that exits are calibrated for, with independent questions to spare
CODE, LEAST = ("humaneval", "mbpp"), 0.05  # tasks for code; the least share of them that a model solves, to be compared
MODES = ("exact", "early")
GATES = ("linear", "ffn", "mamba", "max-prob")
LOWEST, HALVINGS = 0.2, 4  # the interval from this threshold to 1 is halved so often, to find where consistency falls
RISKS, LOSSES = (0.02, 0.05, 0.1), ("f1", "task")
FILLS = ("freeze", "copy", "defer")
PENALTY = 1.1  # the paper's
OWN, PLAIN = "own answers", "plain text"
THE_PAPERS = Recipe("mamba", False, PLAIN, k=5)
GATHERED = 48  # texts side by side


class Experiment:
    """One task on one model.

    `scored` are the task's questions that are scored, `others` those that are not: the first `calibration` of them are
    calibrated on. `model`: MODEL, or MODEL=DIR for exits that do not ship.
    """

    def __init__(self, model: str, task_name: str, args: argparse.Namespace) -> None:
        name, _, folder = model.partition("=")
        self.model = offramp.load(name, exits=folder or None)
        self.backbone, self.exits = self.model.backbone, self.model.exits
        self.task = load_task(task_name, getattr(args, task_name), run_code=args.run_code)
        self.args, self.source, self.name = args, name, Path(name).name.removesuffix(".gguf")
        count, items = COUNTS[task_name] if args.count is None else args.count, self.task.items
        self.scored, self.others = replace(self.task, items=items[:count]), items[count:] if count else []
        self.work = args.work / f"{self.name}-{self.mark}"
        workshop = Workshop(self.backbone, self.texts, self.work / "exits", args.epochs)
        self.made = workshop.exits
        self.jump = bool(workshop.shape.tails)

    @property
    def mark(self) -> str:
        """A short hash of what the exits are made of."""
        args, texts = self.args, [str(file) for file in self.args.text or []]
        return mark(self.backbone.source.fingerprint, args.own_prompts, args.prompts, texts, args.epochs)

    @property
    def brief(self) -> bool:
        """Whether few kinds of exits are compared, and nothing has a penalty."""
        return bool(self.args.quick) or self.task.name not in WHOLE

    def texts(self) -> dict[str, list[TextGroup]]:
        """What exits learn from: own answers, and as many tokens of plain text."""
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
    def recipes(self) -> list[Recipe]:
        """The recipes of the exits that are made here."""
        jump, papers = self.jump, [THE_PAPERS] if self.args.text else []
        few = [Recipe("ffn", jump), Recipe("mamba", jump), *papers]
        if self.brief:
            return few
        others = [Recipe(gate, jump) for gate in GATES if gate not in ("ffn", "mamba")]
        bare = [Recipe(gate, False) for gate in ("ffn", "mamba") if jump]
        return [*few, *others, *bare, Recipe("mamba", jump, k=5)]

    def at(self, threshold: float, recipe: Recipe) -> Condition:
        """Exits that are made here, with one threshold for all."""
        confidence, exits = recipe.gate if recipe.gate in TRAINING_FREE else "gate", self.made(recipe)
        return Condition("project", Policy((threshold,) * len(exits), confidence), exits, recipe.label)

    def in_mode(self, mode: str) -> Condition:
        """A mode, with the exits that ship."""
        way = settled(mode, self.exits, self.backbone)
        return Condition(way.fill, way.policy, way.exits, mode)

    def in_modes(self) -> list[Condition]:
        """The modes that the exits serve."""
        return [self.in_mode(mode) for mode in MODES if mode in self.model.modes]

    def condition_of(self, info: ConditionInfo) -> Condition:
        """The condition of exits that are made here, by what a Result keeps of it."""
        assert info.policy
        gate = info.policy.confidence_name(info.gate or "")
        (recipe,) = (each for each in self.recipes if (each.label, each.gate) == (info.label, gate))
        return Condition("project", info.policy, self.made(recipe), info.label)

    def calibrated(self) -> list[Condition]:
        """The exits that ship under the policies that are calibrated for this task, one for each risk and loss."""
        exits, task = self.exits.early, self.task
        items = self.others[: self.args.calibration]
        if not (items and exits) or self.task.name not in CALIBRATED or self.args.quick:
            return []
        questions = [Question(item.prompt, item.references, item.program) for item in items]
        how = {"raw": not task.chat, "run_code": self.args.run_code, "stop": task.stop, "max_tokens": task.max_tokens}
        configs = [CalibrationConfig(risk, loss=loss, whole_head=True, **how) for risk in RISKS for loss in LOSSES]
        file = self.work / f"{task.name}-calibrated-{len(questions)}-{mark(fingerprint(exits))}.json"
        if not file.exists():
            records = [asdict(record) for record in calibrations(self.backbone, exits, questions, configs)]
            write_atomically(file, json.dumps(records).encode())
        found = []
        for record in json.loads(file.read_text("utf-8")):
            chosen = copy.copy(exits)
            chosen.policy, chosen.calibration = Policy.from_json(record["policy"]), record
            label = f"early, risk {record['risk']:g}, loss {record['loss']}"
            found.append(Condition("project", None, chosen, label))
        return found

    def results(self) -> list[Result]:
        """Answer the questions under all conditions."""
        run = self.evaluation(self.scored)
        found = [run.run(Condition())]
        if self.task.name in CODE and found[0].summary[MAIN_SCORES[self.task.name]].mean < LEAST:
            return found
        found += map(run.run, self.in_modes())
        tried = [(condition, run.run(condition)) for condition in self.calibrated()]
        found += [result for _, result in tried]
        found += [each for recipe in self.recipes for each in self.around(run, recipe)]
        if tried:
            chosen = boldest([result for _, result in tried], blocks_skipped)
            policy, exits = next((each.used_policy, each.exits) for each, result in tried if result is chosen)
            for fill in ("project", *FILLS):
                if fill != "freeze" or "mamba" in self.backbone.kinds:
                    found.append(run.run(Condition(fill, policy, exits, "fills")))
        if not self.brief:
            run = self.evaluation(replace(self.scored, repetition_penalty=PENALTY))
            found += [run.run(condition) for condition in (Condition(), *self.in_modes())]
            found += self.around(run, Recipe("mamba", self.jump))
        return found

    def around(self, run: Evaluation, recipe: Recipe) -> list[Result]:
        """Results of exits at thresholds closer and closer to that at which answers are no longer consistent."""
        low, high, found = LOWEST, 1.0, list[Result]()
        for _ in range(HALVINGS - self.brief):
            middle = round((low + high) / 2, 6)
            found.append(run.run(self.at(middle, recipe)))
            if found[-1].summary["token_f1"].mean >= CONSISTENT:
                high = middle
            else:
                low = middle
        return found

    def evaluation(self, task: Task) -> Evaluation:
        """A run over these questions, whose answers are kept."""
        args, name = self.args, f"{self.name} {task.name}"

        def on_progress(stage: str, completed: int, total: int, note: str = "") -> None:
            if completed == total:
                print(f"{time.strftime('%H:%M:%S')} {name}: {stage} {note}", flush=True)

        kept = self.work / f".{task.name}"
        return Evaluation(self.backbone, task, kept, batch=args.batch, command=shlex.join(sys.argv), progress=on_progress)


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
    args, exits = experiment.args, [each for each in (experiment.exits.early, experiment.exits.draft) if each]
    setup = [args.count, args.calibration, args.batch, args.quick, experiment.task.sha256]
    folder = mark(experiment.mark, setup, [[fingerprint(each), asdict(each.policy)] for each in exits])
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
    parser.add_argument("--count", type=int, help="questions of each task; default: 200, 200, all, all, 100")
    parser.add_argument("--calibration", type=int, default=200, help="other questions to calibrate on")
    parser.add_argument("--own-prompts", help="prompts whose answers exits learn from; default: offramp's own list")
    parser.add_argument("--prompts", type=int, default=1200, help="how many of them")
    parser.add_argument("--epochs", type=int, default=2, help="passes of the trainings over their text")
    parser.add_argument("--batch", type=int, default=32, help="answers side by side")
    parser.add_argument("--quick", action="store_true", help="few questions, thresholds and trainings")
    parser.add_argument("--run-code", action="store_true", help="let programs that the model writes run, shut in")
    parser.add_argument("--work", type=Path, default=Path("build/paper"), help="holds all that is made")
    return parser


def finish(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Read the arguments, and fill in what follows from them."""
    args = parser.parse_args(argv)
    if unknown := set(args.tasks.split(",")).difference(COUNTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(COUNTS)}")
    if not args.run_code and set(args.tasks.split(",")).intersection(CODE):
        parser.error("the tasks for code run what the model writes: allow it with --run-code, or leave them out of --tasks")
    if args.quick:
        args.count, args.calibration, args.prompts, args.epochs = 8, 0, 96, 1
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
