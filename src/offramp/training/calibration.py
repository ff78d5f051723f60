"""Thresholds with a guarantee: Learn then Test (Angelopoulos et al., arXiv 2110.01052), on whole answers.

A user names a risk α and a δ, and gives calibration prompts from the distribution of later prompts. The model answers them
at full depth and with exits. A loss in [0, 1] says how far the two answers differ. With probability 1 − δ over the
calibration prompts, the policy that is returned has an expected loss of at most α on new prompts. This holds for any model,
any exits and any fill.

Each policy is a hypothesis: "its expected loss is above α". Its p-value comes from the mean loss over n prompts
(`p_value`). Policies are tested one after another along a path from nearly closed to open, each at level δ, up to the
first hypothesis that is not rejected (fixed-sequence testing, section 3). The last policy that passed is the result.

The order of the path must not depend on the prompts of the test. Several exits have no natural order: which of two policies
is bolder depends on how often each exit is right and on what its skipped blocks cost the rest of the answer. So a share of
the prompts, the pilot, is spent on finding the path. The path consists of the candidates that no other candidate beats in
both loss and gain (saved FLOPs, or with `defer` saved deep passes).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from offramp.decode.engine import Engine
from offramp.decode.fills import fill_named
from offramp.decode.request import Generation
from offramp.errors import BadInput
from offramp.exits.exits import Exits
from offramp.exits.policy import PATIENCE, Policy
from offramp.files import read_lines, sha256_of_text
from offramp.metrics import best_f1, token_f1
from offramp.model.backbone import Backbone
from offramp.progress import Progress, silent
from offramp.training.config import CalibrationConfig

PILOT = 0.2  # share of the prompts that finds the path
LONGEST = 8  # policies on the path; more would only cost time
CANDIDATES = (8192, 4096, 2048, 1024, 512)  # tokens that a sketch of the head names
GRID = (0.98, 0.96, 0.94, 0.92, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.35)
BATCH = 64  # most answers side by side


def p_value(mean: float, n: int, risk: float) -> float:
    """Hoeffding–Bentkus p-value (section 3.1) of "the expected loss is above the risk α", given the mean of n losses.

    It is the smaller of exp(−n h(min(mean, α), α)), where h is the relative entropy of two coins, and
    e · P(Binomial(n, α) ≤ ⌈n mean⌉).
    """
    below = min(mean, risk)
    entropy = sum(p * math.log(p / q) for p, q in ((below, risk), (1 - below, 1 - risk)) if p)
    # Rounding must not lift a mean of k / n above k.
    tail = sum(map(math.exp, _log_binomial(n, risk, math.ceil(n * mean - 1e-9))))
    return min(1.0, math.exp(-n * entropy), math.e * tail)


def _log_binomial(n: int, p: float, most: int) -> Iterator[float]:
    """log P(Binomial(n, p) = k) for k up to `most`."""
    for k in range(min(n, most) + 1):
        ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        yield ways + k * math.log(p) + (n - k) * math.log1p(-p)


MOST = 1_000_000  # the largest number of prompts that `prompts_needed` gives


def prompts_needed(mean: float, risk: float, delta: float) -> int | None:
    """The number of prompts that would show that a policy with this mean loss keeps the risk; None above a million."""
    if mean >= risk:
        return None
    n = 1
    while p_value(mean, n, risk) > delta:
        n *= 2
        if n > MOST:  # nobody has more, and the sum in `p_value` would take minutes
            return None
    low, high = n // 2, n
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if p_value(mean, middle, risk) <= delta else (middle, high)
    return high


def fixed_sequence(losses: Iterator[Sequence[float]], risk: float, delta: float) -> Iterator[tuple[float, float, bool]]:
    """Test policies along a path, up to the first that fails.

    Takes each policy's losses. Yields each policy's mean loss, its p-value, and whether it passed.
    """
    for policy_losses in losses:
        mean = fmean(policy_losses)
        p = p_value(mean, len(policy_losses), risk)
        yield mean, p, p <= delta
        if p > delta:
            return


def path(pilot: list[tuple[float, float]], risk: float, longest: int = LONGEST) -> list[int]:
    """The indices of the candidates to test, in the order of the test.

    `pilot` has each candidate's mean loss and gain on the pilot prompts. A candidate is left out if another loses less and
    gains at least as much, if it gains nothing, or if it loses twice the risk. Candidates of equal loss all stay, because a
    pilot is too small to tell them apart. The order is that of rising gain, so the safest comes first. If more than
    `longest` candidates are left, every n-th is kept, from the first on.
    """
    order = [
        index
        for index, (loss, gain) in enumerate(pilot)
        if gain > 0 and loss < 2 * risk and not any(lower < loss and higher >= gain for lower, higher in pilot)
    ]
    order.sort(key=lambda index: pilot[index][1])
    return order[:: -(-len(order) // longest)] if order else []


def candidates(count: int, kind: str, confidence: str = "gate", vocabulary: int = 0) -> list[list[Policy]]:
    """Lists of policies for `count` exits; each list, called a line, goes from nearly closed to open.

    There is one line for each exit that may be the first open one. The deepest comes first, so that deep exits open before
    shallow ones can do harm. The policies of a line, by `kind`:

    - `thresholds`: one threshold for all open exits, over `GRID`;
    - `decay`: the same, and it falls along the answer over 16 tokens (CALM);
    - `patience`: a token leaves where 2, 3, … open exits in a row read out the same token;
    - `fixed`: every token leaves at that exit.

    `vocabulary` is the model's, for exits with a sketch of the head, else 0. With a sketch, one more line comes first: it
    closes all exits and reads out fewer and fewer candidates. The other lines then read out a middling number of them.
    Raises `BadInput` for an unknown `kind`.
    """
    if kind not in KINDS:
        raise BadInput(f"There is no policy '{kind}'.", f"Choose from {', '.join(KINDS)}.")
    fewer = [number for number in CANDIDATES if number < vocabulary]
    lines = [[Policy((1.0,) * count, confidence, candidates=number) for number in fewer]]
    middling = fewer[len(fewer) // 2] if fewer else 0
    for closed in reversed(range(count)):
        opened = count - closed

        def policy(threshold: float, confidence: str = confidence, closed: int = closed, decay: float = 0.0) -> Policy:
            return Policy((1.0,) * closed + (threshold,) * (count - closed), confidence, decay, middling)

        if kind == "thresholds":
            lines.append([policy(threshold) for threshold in GRID])
        elif kind == "decay":
            lines.append([policy(threshold, decay=16.0) for threshold in GRID])
        elif kind == PATIENCE:
            lines.append([policy((run - 0.5) / opened, PATIENCE) for run in range(opened, 1, -1)])
        elif kind == "fixed":
            alone = (1.0,) * closed + (0.0,) + (1.0,) * (opened - 1)
            lines.append([Policy(alone, candidates=middling)])
    return [line for line in lines if line]


KINDS = ("thresholds", "decay", PATIENCE, "fixed")


@dataclass(frozen=True)
class Question:
    """A prompt, and answers that count as right (only the loss `task` needs them)."""

    prompt: str
    references: tuple[str, ...] = ()


def read_questions(file: str | Path) -> list[Question]:
    """Read prompts from a file of lines, or of JSON lines with `prompt` or `question`.

    A JSON line may have right answers in `answer` or `answers`: a text, a list of texts, or TriviaQA's object with `value`
    and `aliases`. Raises `BadInput` for a file that is neither.
    """
    prompts = read_lines(file, ("prompt", "question"))
    if Path(file).suffix != ".jsonl":
        return [Question(prompt) for prompt in prompts]
    lines = [line for line in Path(file).expanduser().read_text(encoding="utf-8").split("\n") if line.strip()]
    questions = []
    for prompt, line in zip(prompts, lines, strict=True):
        record = json.loads(line)
        answer = record.get("answers", record.get("answer", ()))
        if isinstance(answer, dict):
            answer = [answer.get("value"), *(answer.get("aliases") or ())]
        texts = answer if isinstance(answer, list) else [answer]
        questions.append(Question(prompt, tuple(str(text) for text in texts if text not in (None, ()))))
    return questions


def f1_loss(early: Generation, full: Generation, question: Question) -> float:
    """1 − token F1 with the full model's answer."""
    return 1 - token_f1(early.ids, full.ids)


def exact_loss(early: Generation, full: Generation, question: Question) -> float:
    """1 if the answer differs from the full model's at all."""
    return float(early.ids != full.ids)


def task_loss(early: Generation, full: Generation, question: Question) -> float:
    """Full depth's word F1 with the references minus this answer's; 0 if that is negative."""
    return max(0.0, best_f1(full.text, question.references) - best_f1(early.text, question.references))


def gain(answer: Generation, fill: str) -> float:
    """The share of FLOPs that an answer saved; with a fill that runs skipped blocks later, the share of deep passes."""
    return 1 - 1 / answer.tokens_per_deep_pass if fill_named(fill).waits else answer.flops_saved


LOSSES: dict[str, Callable[[Generation, Generation, Question], float]] = {
    "f1": f1_loss,
    "exact": exact_loss,
    "task": task_loss,
}


@dataclass(frozen=True)
class Tested:
    """A policy on the path: what it lost and saved on the prompts of the test (means), and whether it passed."""

    policy: Policy
    loss: float
    p_value: float
    passed: bool
    flops_saved: float
    mean_blocks: float


@dataclass(frozen=True)
class Calibration:
    """The guarantee of a calibration: `policy` keeps the expected `loss` at `risk` or less, with probability 1 − `delta`.

    `pilot` prompts found the path, and `n` others tested it. `tested` holds the policies of the path up to the first that
    failed. If none passed, `policy` is closed, and `needed` is the number of test prompts with which the first one would
    have passed, or None if it would not with any. `raw`: the prompts took no chat template.
    """

    policy: Policy
    loss: str
    fill: str
    weights: str
    risk: float
    delta: float
    n: int
    pilot: int
    max_tokens: int
    stop: tuple[str, ...]
    raw: bool
    reference: str
    prompts_sha256: str
    tested: tuple[Tested, ...]
    needed: int | None

    @property
    def passed(self) -> bool:
        """Whether any policy passed the test."""
        return any(test.passed for test in self.tested)


def calibrate(
    backbone: Backbone,
    exits: Exits,
    questions: list[Question],
    config: CalibrationConfig | None = None,
    reference: Backbone | None = None,
    progress: Progress = silent,
) -> Calibration:
    """Find the boldest policy that keeps the risk on these questions; set `exits.policy` and `exits.calibration`.

    `reference` is another model, such as the one that this model was tuned from: answers are then compared with its full
    depth. It must have the same tokenizer. A prompt's hash, and not its position, decides if it belongs to the pilot.
    Raises `BadInput` for settings that make no sense and for too few prompts.
    """
    config = config or CalibrationConfig()
    _check(questions, config)
    if reference and reference.tokenizer.get_vocab() != backbone.tokenizer.get_vocab():
        raise BadInput(
            f"{reference.name} and {backbone.name} have different tokenizers.",
            "Compare with the model that it was tuned from.",
        )
    confidence = config.confidence or exits.policy.confidence
    lines = candidates(len(exits), config.kind, confidence, backbone.vocab_size if exits.sketch else 0)
    questions = sorted(questions, key=lambda question: sha256_of_text(question.prompt))
    first = max(1, round(PILOT * len(questions)))
    trial = _Trial.begin(backbone, exits, questions, config, reference or backbone, progress)
    tested = trial.test(trial.find_path(lines, first), first)
    passed = [test.policy for test in tested if test.passed]
    record = Calibration(
        policy=passed[-1] if passed else Policy.closed(len(exits)),
        loss=config.loss,
        fill=config.fill,
        weights=backbone.weight_format,
        risk=config.risk,
        delta=config.delta,
        n=len(questions) - first,
        pilot=first,
        max_tokens=config.max_tokens,
        stop=config.stop,
        raw=config.raw,
        reference=(reference or backbone).name,
        prompts_sha256=sha256_of_text("\n".join(question.prompt for question in questions)),
        tested=tuple(tested),
        needed=prompts_needed(tested[0].loss, config.risk, config.delta) if tested and not passed else None,
    )
    exits.policy, exits.calibration = record.policy, asdict(record)
    return record


@dataclass
class _Trial:
    """Tries policies on the same questions, against the same answers of full depth."""

    backbone: Backbone
    exits: Exits
    questions: list[Question]
    config: CalibrationConfig
    ids: list[list[int]]  # the token ids of each question's prompt
    references: list[Generation]  # full depth's answer to each question
    progress: Progress

    @classmethod
    def begin(
        cls,
        backbone: Backbone,
        exits: Exits,
        questions: list[Question],
        config: CalibrationConfig,
        reference: Backbone,
        progress: Progress,
    ) -> _Trial:
        """Have the reference model answer all questions at full depth."""
        ids = [backbone.prompts.encode(question.prompt, config.raw) for question in questions]

        def report(count: int) -> None:
            progress("full depth", count, len(ids))

        references = answers(Engine(reference), ids, config.max_tokens, config.stop, report)
        return cls(backbone, exits, questions, config, ids, references, progress)

    def losses(self, policy: Policy, part: slice) -> tuple[list[float], list[Generation]]:
        """Each question's loss under a policy, for this part of the questions, and the answers."""
        engine = Engine(self.backbone, self.exits, policy, self.config.fill)
        early = answers(engine, self.ids[part], self.config.max_tokens, self.config.stop)
        loss_of = LOSSES[self.config.loss]
        triples = zip(early, self.references[part], self.questions[part], strict=True)
        return [loss_of(*triple) for triple in triples], early

    def find_path(self, lines: list[list[Policy]], first: int) -> list[Policy]:
        """The policies to test, in order, found on the first `first` questions (the pilot)."""
        tried: list[Policy] = []
        results: list[tuple[float, float]] = []
        total = sum(map(len, lines))
        for number, line in enumerate(lines):
            for policy in line:
                losses, early = self.losses(policy, slice(0, first))
                tried.append(policy)
                results.append((fmean(losses), fmean(gain(answer, self.config.fill) for answer in early)))
                self.progress("pilot", len(tried), total, f"loss {results[-1][0]:.3f}")
                if results[-1][0] > 2 * self.config.risk:  # the rest of the line is bolder and loses more
                    break
            total = len(tried) + sum(map(len, lines[number + 1 :]))
        return [tried[index] for index in path(results, self.config.risk)]

    def test(self, policies: list[Policy], first: int) -> list[Tested]:
        """Test the path on the questions after the pilot's `first`, up to the first policy that fails."""
        kept: list[list[Generation]] = []

        def along_the_path() -> Iterator[list[float]]:
            for policy in policies:
                losses, early = self.losses(policy, slice(first, None))
                kept.append(early)
                self.progress("test", len(kept), len(policies), f"loss {fmean(losses):.3f}")
                yield losses

        tested = []
        results = fixed_sequence(along_the_path(), self.config.risk, self.config.delta)
        for (mean, p, passed), policy in zip(results, policies, strict=False):
            saved = fmean(answer.flops_saved for answer in kept[-1])
            blocks = fmean(answer.mean_blocks for answer in kept[-1])
            tested.append(Tested(policy, mean, p, passed, saved, blocks))
        return tested


def answers(
    engine: Engine,
    prompts: list[list[int]],
    max_tokens: int,
    stop: tuple[str, ...] = (),
    report: Callable[[int], None] = lambda count: None,
) -> list[Generation]:
    """An answer to each prompt (token ids). Prompts of similar length run side by side; `report` gets the count so far."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answered: dict[int, Generation] = {}
    while len(answered) < len(order):
        start = len(answered)
        longest = len(prompts[order[min(start + BATCH, len(order)) - 1]])
        batch = order[start : start + engine.costs.at_once(longest + max_tokens, BATCH)]
        generations = engine.generate_batch([prompts[index] for index in batch], max_tokens=max_tokens, stop=stop)
        answered.update(zip(batch, generations, strict=True))
        report(len(answered))
    return [answered[index] for index in range(len(prompts))]


def _check(questions: list[Question], config: CalibrationConfig) -> None:
    for name, value in (("risk", config.risk), ("delta", config.delta)):
        if not 0 < value < 1:
            raise BadInput(f"A {name} of {value} is not between 0 and 1.", "0.05 is usual.")
    if config.loss not in LOSSES:
        raise BadInput(f"There is no loss '{config.loss}'.", f"Choose from {', '.join(LOSSES)}.")
    if fill_named(config.fill).verifies:
        raise BadInput(
            "Verified answers are the full model's own: there is nothing to guarantee.",
            "Their thresholds are a matter of speed: offramp bench --fills full,verify --threshold …",
        )
    needed = prompts_needed(0.0, config.risk, config.delta)
    assert needed is not None
    if len(questions) * (1 - PILOT) < needed:
        raise BadInput(
            f"{len(questions)} prompts are too few: even if no answer differed, they could not show a risk of "
            f"{config.risk}.",
            f"Give at least {math.ceil(needed / (1 - PILOT)) + 1}.",
        )
    if config.loss == "task" and not all(question.references for question in questions):
        raise BadInput(
            "The loss 'task' needs right answers with the prompts.",
            "Give JSON lines with 'answer' or 'answers', such as TriviaQA's.",
        )
    if len({question.prompt for question in questions}) < len(questions):
        raise BadInput("Some prompts occur twice, but losses must be independent.", "Keep each prompt once.")
