"""Thresholds with a guarantee: Learn then Test (Angelopoulos et al., arXiv 2110.01052), on whole answers.

A user names a risk α and a δ, and gives calibration prompts from the distribution of later prompts. The model answers them
at full depth and with exits. A loss in [0, 1] says how far the two answers differ. With probability 1 − δ over the
calibration prompts, the policy that is returned has an expected loss of at most α on new prompts. This holds for any model,
any exits and any fill but `verify`, whose answers are full depth's.

Each policy is a hypothesis: "its expected loss is above α". Its p-value comes from the mean loss over n prompts
(`p_value`). Policies are tested one after another along a path from nearly closed to open, each at level δ, up to the
first hypothesis that is not rejected (fixed-sequence testing, section 3). The last policy that passed is the result.

The guarantee holds for each length of answers by itself, up to the longest. The loss is measured on the answers' first 1,
2, 3, … tokens, and a policy's loss is the one at the length with the largest mean. A policy passes only if it passes at
every length. So its p-value is the largest over the lengths, and needs no correction for their number (an
intersection–union test).

The order of the path must not depend on the prompts of the test. With several exits, policies have no natural order. How
bold a policy is depends on how often each exit is right, and on what its skipped blocks cost the rest of the answer. So a
share of the prompts, the pilot, is spent on finding the path. The path consists of the candidates that no other candidate
beats in both loss and gain (saved FLOPs, or with `defer` saved deep passes). The pilot's answers also show how often each
exit is right, so that policies can be made for a precision (`points`). The path of an earlier calibration can be tested
again on new prompts (`retest`). This needs no pilot.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

from offramp import sandbox
from offramp.decode.engine import Engine
from offramp.decode.fills import fill_named
from offramp.decode.request import Generation
from offramp.decode.sampling import Sampling
from offramp.errors import BadInput, CorruptFile, reason_of
from offramp.exits.calibrated import Calibration, Tested
from offramp.exits.exits import Exits
from offramp.exits.learned import PILOTED, TRAINED, hashes_of, known_among
from offramp.exits.policy import Policy
from offramp.files import sha256_of_text
from offramp.model.backbone import Backbone, HasBackbone, backbone_of
from offramp.model.costs import Costs
from offramp.progress import Progress, silent
from offramp.training.answering import write_shards
from offramp.training.config import CalibrationConfig, TrainConfig
from offramp.training.lines import candidates, heads
from offramp.training.losses import LOSSES, Question, losses_by_length
from offramp.training.points import policies
from offramp.training.risk import fixed_sequence, path, prompts_needed
from offramp.training.teacher import TeacherTexts, group_texts
from offramp.training.trainer import Trainer, needed_layers
from offramp.training.validation import evidence

PILOT = 0.2  # share of the prompts that finds the path
PRECISIONS = (0.998, 0.995, 0.99, 0.985, 0.98, 0.97, 0.96, 0.95, 0.93, 0.91, 0.88, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3)
ROUNDS = 6  # rounds in which tokens of the pilot's answers jump, to see how often exits with tails are right
MEASURED = 24  # tokens of a pilot's answer whose harm is measured at each exit
BATCH = 64  # most answers side by side


def precision_line(
    backbone: Backbone,
    exits: Exits,
    prompts: list[list[int]],
    config: CalibrationConfig,
    head: tuple[int, int],
    progress: Progress = silent,
) -> list[Policy]:
    """Policies for falling precisions, from how often exits are right in the model's answers to prompts (token ids).

    If the config's fill leaves approximate states, the later tokens that these change count, too. `head`: the policies'
    `candidates` and `exit_candidates`.
    """
    groups = group_texts(prompts, [], config.max_tokens, batch=48)
    with TemporaryDirectory() as folder:
        texts = TeacherTexts.open(write_shards(backbone, groups, needed_layers(exits), Path(folder)))
        trainer = Trainer(backbone, exits, TrainConfig(), Path(folder), progress)
        labelled = trainer.labels(texts, ROUNDS)
        if not fill_named(config.fill).waits:
            trainer.measure_harm(labelled, most=MEASURED)
        known = evidence(exits, labelled)
    return policies(exits, known, Costs(backbone), PRECISIONS, *head)


def gain(answer: Generation, fill: str) -> float:
    """The share of FLOPs that an answer saved; with a fill that runs skipped blocks later, of deep passes."""
    return 1 - 1 / answer.tokens_per_deep_pass if fill_named(fill).waits else answer.flops_saved


def calibrate(
    model: Backbone | HasBackbone,
    exits: Exits,
    questions: list[Question],
    config: CalibrationConfig | None = None,
    progress: Progress = silent,
) -> Calibration:
    """Find the boldest policy that keeps the risk on these questions; set `exits.policy` and `exits.calibration`.

    If the exits learned from other weights, they become this model's. Calibrations for other formats of the same weights
    are kept.

    A prompt's hash, not its position, decides if it belongs to the pilot. Raises `BadInput` for settings that make no
    sense, for too few prompts, and for prompts that the exits learned from.
    """
    backbone = backbone_of(model)
    (record,) = calibrations(backbone, exits, questions, [config or CalibrationConfig()], progress)
    exits.promise(asdict(record), backbone)
    return record


def calibrations(
    backbone: Backbone,
    exits: Exits,
    questions: list[Question],
    configs: Sequence[CalibrationConfig],
    progress: Progress = silent,
) -> list[Calibration]:
    """The records of calibrations for several configs, which share their answers and differ only in risk, delta and loss.

    The exits do not change. The rest is as in `calibrate`. Also raises `BadInput` for configs that differ in other
    settings.
    """
    configs = [replace(each, loss=each.loss or "f1") for each in configs]
    config = configs[0]
    for each in configs:
        _check(questions, each)
        if replace(each, risk=config.risk, delta=config.delta, loss=config.loss) != config:
            raise BadInput("These calibrations cannot share their answers.", "Only risk, delta and loss may differ.")
    confidence = config.confidence or exits.policy.confidence
    named = exits.named(backbone.vocab_size)
    lines = candidates(len(exits), config.kind, confidence, named, config.whole_head)
    written = written_path(exits) if config.retest else None
    questions = sorted(questions, key=lambda question: sha256_of_text(question.prompt))
    pilot = 0 if written else max(1, round(PILOT * len(questions)))
    check_unknown(exits, [question.prompt for question in questions], pilot)
    trial = _Trial.begin(backbone, exits, questions, pilot, config, progress)
    if written:
        return [trial.calibrated(written, each) for each in configs]
    if config.kind == "precision" and len(exits):
        head = heads(named, config.whole_head)
        lines.append(precision_line(backbone, exits, trial.ids[: trial.pilot], config, head, progress))
    return [trial.calibrated(trial.find_path(lines, each), each) for each in configs]


def written_path(exits: Exits) -> list[Policy]:
    """The path of the exits' last calibration. Raises `BadInput` where there is none."""
    known = exits.calibration
    path = [each["policy"] for each in known.get("tested", [])] + list(known.get("untested", []))
    if not path:
        raise BadInput("These exits have no path from an earlier calibration.", "Calibrate them without --retest.")
    return [Policy.from_json(policy) for policy in path]


@dataclass
class _Trial:
    """Tries policies on the same questions, and compares with the same answers of full depth."""

    backbone: Backbone
    exits: Exits
    questions: list[Question]
    pilot: int  # the number of questions that find the path; they come first
    config: CalibrationConfig
    ids: list[list[int]]  # the token ids of each question's prompt
    references: list[Generation]  # full depth's answer to each question
    sampling: Sampling
    progress: Progress
    early: dict[tuple[Policy, bool], list[Generation]] = field(default_factory=dict)  # answers so far, pilot's and test's

    @classmethod
    def begin(
        cls,
        backbone: Backbone,
        exits: Exits,
        questions: list[Question],
        pilot: int,
        config: CalibrationConfig,
        progress: Progress,
    ) -> _Trial:
        """Answer all questions at full depth."""
        ids = [backbone.prompts.encode(question.prompt, config.raw) for question in questions]

        def report(count: int) -> None:
            progress("full depth", count, len(ids))

        sampling = Sampling(repetition_penalty=config.repetition_penalty)
        references = answers(Engine(backbone, sampling=sampling), ids, config.max_tokens, config.stop, report)
        return cls(backbone, exits, questions, pilot, config, ids, references, sampling, progress)

    def calibrated(self, order: list[Policy], config: CalibrationConfig) -> Calibration:
        """The record of a calibration that tests policies in this order."""
        tested = self.test(order, config)
        passed = [test.policy for test in tested if test.passed]
        piloted = [question.prompt for question in self.questions[: self.pilot]]
        return Calibration(
            policy=passed[-1] if passed else Policy.closed(len(self.exits)),
            loss=config.loss,
            fill=config.fill,
            weights=self.backbone.weight_format,
            risk=config.risk,
            delta=config.delta,
            n=len(self.questions) - self.pilot,
            pilot=self.pilot,
            max_tokens=config.max_tokens,
            stop=config.stop,
            raw=config.raw,
            repetition_penalty=config.repetition_penalty,
            prompts_sha256=sha256_of_text("\n".join(question.prompt for question in self.questions)),
            pilot_hashes=hashes_of(piloted, "" if self.pilot else self.exits.calibration.get(PILOTED, "")),
            tested=tuple(tested),
            untested=tuple(order[len(tested) :]),
            needed=prompts_needed(tested[0].loss, config.risk, config.delta) if tested and not passed else None,
        )

    def losses(self, policy: Policy, loss: str, in_pilot: bool) -> tuple[int, list[float], list[Generation]]:
        """Each question's loss under a policy, for the pilot or the test, at the length where the mean is largest.

        Returns that length, the losses and the whole answers.
        """
        part = slice(self.pilot) if in_pilot else slice(self.pilot, None)
        longest = self.config.max_tokens
        if (policy, in_pilot) not in self.early:
            engine = Engine(self.backbone, self.exits, policy, self.config.fill, self.sampling)
            self.early[policy, in_pilot] = answers(engine, self.ids[part], longest, self.config.stop)
        early = self.early[policy, in_pilot]
        triples = zip(early, self.references[part], self.questions[part], strict=True)
        by_length = list(zip(*(losses_by_length(*triple, loss, longest) for triple in triples), strict=True))
        worst = max(range(longest), key=lambda place: fmean(by_length[place]))
        return worst + 1, list(by_length[worst]), early

    def find_path(self, lines: list[list[Policy]], config: CalibrationConfig) -> list[Policy]:
        """The policies to test, in order, found on the pilot's questions."""
        tried: list[Policy] = []
        results: list[tuple[float, float]] = []
        total = sum(map(len, lines))
        for number, line in enumerate(lines):
            for policy in line:
                _, losses, early = self.losses(policy, config.loss, in_pilot=True)
                tried.append(policy)
                results.append((fmean(losses), fmean(gain(answer, config.fill) for answer in early)))
                self.progress("pilot", len(tried), total, f"loss {results[-1][0]:.3f}")
                if results[-1][0] > 2 * config.risk:  # the rest of the line is bolder and loses more
                    break
            total = len(tried) + sum(map(len, lines[number + 1 :]))
        return [tried[index] for index in path(results, config.risk)]

    def test(self, policies: list[Policy], config: CalibrationConfig) -> list[Tested]:
        """Test the path on the other questions, up to the first policy that fails."""
        kept: list[tuple[int, list[Generation]]] = []

        def along_the_path() -> Iterator[list[float]]:
            for policy in policies:
                length, losses, early = self.losses(policy, config.loss, in_pilot=False)
                kept.append((length, early))
                self.progress("test", len(kept), len(policies), f"loss {fmean(losses):.3f}")
                yield losses

        tested = []
        results = fixed_sequence(along_the_path(), config.risk, config.delta)
        for (mean, p, passed), policy in zip(results, policies, strict=False):
            length, early = kept[-1]
            saved = fmean(answer.flops_saved for answer in early)
            blocks = fmean(answer.mean_blocks for answer in early)
            tested.append(Tested(policy, mean, length, p, passed, saved, blocks))
        return tested


def answers(
    engine: Engine,
    prompts: list[list[int]],
    max_tokens: int,
    stop: tuple[str, ...] = (),
    report: Callable[[int], None] = lambda count: None,
) -> list[Generation]:
    """An answer of at most `max_tokens` tokens to each prompt (token ids). `report` gets the count so far."""
    answered: dict[int, Generation] = {}
    for index, answer in engine.answers(prompts, BATCH, max_tokens=max_tokens, stop=stop):
        answered[index] = answer
        report(len(answered))
    return [answered[index] for index in range(len(prompts))]


def check_unknown(exits: Exits, prompts: list[str], pilot: int) -> None:
    """Raises `BadInput` for prompts that exits, gates or an earlier path learned from; warns if the record lacks them.

    The first prompts are those of the `pilot`, which may use an earlier one's prompts again.
    """
    learned, earlier = (history.get(name) for history, name in ((exits.training, TRAINED), (exits.calibration, PILOTED)))
    if exits.training and learned is None:
        warnings.warn(
            "These exits have no record of the prompts they learned from, so these prompts cannot be checked against it.",
            stacklevel=4,
        )
    try:
        known = known_among(prompts, learned or "")
        known += known_among(prompts[pilot:], earlier or "")
    except (ValueError, TypeError) as error:
        raise CorruptFile(f"The exits' record of their prompts is damaged: {reason_of(error)}", "Train again.") from error
    if known:
        raise BadInput(
            f"{len(known)} of the {len(prompts)} prompts were used to train these exits or to find their thresholds, "
            f"such as {known[0][:60]!r}: a test on them guarantees nothing.",
            "Give prompts that were never used for these exits.",
        )


def _check(questions: list[Question], config: CalibrationConfig) -> None:
    if config.kind == "precision" and config.confidence not in (None, "gate"):
        raise BadInput(
            f"Policies of the kind 'precision' need the gate, not {config.confidence}.", "Add --policy thresholds."
        )
    if config.loss not in LOSSES:
        raise BadInput(f"There is no loss '{config.loss}'.", f"Choose from {', '.join(LOSSES)}.")
    if fill_named(config.fill).verifies:
        raise BadInput(
            "With 'verify', answers are the full model's own, so there is nothing to calibrate.",
            "Its thresholds only change the speed: offramp bench --compare full,exact",
        )
    for name, value in (("risk", config.risk), ("delta", config.delta)):
        if not 0 < value < 1:
            raise BadInput(f"A {name} of {value} is not between 0 and 1.", "0.05 is usual.")
    if config.max_tokens < 1:
        raise BadInput(f"{config.max_tokens} tokens cannot be generated.", "Give --max-tokens 1 or more.")
    share, needed = 1.0 if config.retest else 1 - PILOT, prompts_needed(0.0, config.risk, config.delta)
    if needed is None or len(questions) * share < needed:
        raise BadInput(
            f"{len(questions)} prompts are too few: even if no answer differed, they could not show a risk of "
            f"{config.risk}.",
            f"Give at least {math.ceil(needed / share) + 1}." if needed else "Give a higher risk, such as 0.05.",
        )
    if config.loss == "task":
        if not all(question.references or question.program for question in questions):
            raise BadInput(
                "The loss 'task' needs right answers with the prompts.",
                "Give JSON lines with 'answer' or 'answers', such as TriviaQA's, or with a 'program' that tests code.",
            )
        if any(question.program for question in questions):
            sandbox.check(config.run_code)
    if len({question.prompt for question in questions}) < len(questions):
        raise BadInput("Some prompts occur twice, but the test needs independent prompts.", "Keep each prompt once.")
