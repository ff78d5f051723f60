"""Thresholds with a guarantee: Learn then Test (Angelopoulos et al., arXiv 2110.01052), on whole answers.

A user names a risk α and a δ. Over calibration prompts, drawn as later prompts will be, the model answers at full depth and
with exits, and a loss in [0, 1] says how far the two answers differ. The policy that is returned has, with probability
1 − δ over the calibration prompts, an expected loss of at most α on new ones. This holds for any model, exits and fill.

Each policy is a hypothesis "its expected loss is above α", with a p-value from the mean loss over n prompts (`p_value`).
They are tested one after another along a path from nearly closed to open, each at level δ, until the first that is not
rejected (fixed-sequence testing, section 3 there); the last one rejected is the result. The order must not depend on
the prompts of the test. With several exits there is no natural order: which of two policies is bolder depends on how right
each exit is and on what its skipped blocks cost the rest of the answer. So a part of the prompts, the pilot, is spent on
finding the path: of all candidates, those that no other beats in both, loss and saved FLOPs (with `defer`, deep passes).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from offramp.decode.engine import Engine
from offramp.decode.fills import FILLS
from offramp.decode.request import Generation
from offramp.errors import BadInput
from offramp.exits.exits import Exits
from offramp.exits.policy import PATIENCE, Policy
from offramp.files import read_lines
from offramp.metrics import best_f1, token_f1
from offramp.model.backbone import Backbone
from offramp.progress import Progress, silent

PILOT = 0.2  # of the prompts find the path
LONGEST = 8  # policies on the path: more would only cost time
CANDIDATES = (8192, 4096, 2048, 1024, 512)
GRID = (0.98, 0.96, 0.94, 0.92, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.35)
BATCH = 16  # answers side by side


def p_value(mean: float, n: int, risk: float) -> float:
    """Hoeffding–Bentkus p-value (section 3.1 there) of "the expected loss is above the risk α", given n losses' mean.

    The smaller of exp(−n h(min(mean, α), α)), h the relative entropy of two coins, and e · P(Binomial(n, α) ≤ ⌈n mean⌉).
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


MOST = 1_000_000  # prompts


def prompts_needed(mean: float, risk: float, delta: float) -> int | None:
    """How many prompts would show that a policy of this mean loss keeps the risk; None if not even a million would."""
    if mean >= risk:
        return None
    n = 1
    while p_value(mean, n, risk) > delta:
        n *= 2
        if n > MOST:  # as good as never; and the sum over so many losses would take minutes
            return None
    low, high = n // 2, n
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if p_value(mean, middle, risk) <= delta else (middle, high)
    return high


def fixed_sequence(losses: Iterator[Many[float]], risk: float, delta: float) -> Iterator[tuple[float, float, bool]]:
    """Test policies along a path, given each one's losses: mean, p-value, whether it passed; the first failure ends it."""
    for found in losses:
        mean = fmean(found)
        p = p_value(mean, len(found), risk)
        yield mean, p, p <= delta
        if p > delta:
            return


def path(pilot: list[tuple[float, float]], risk: float, longest: int = LONGEST) -> list[int]:
    """Which candidates to test, and in which order, from each one's mean loss and gain on the pilot prompts.

    In order of gain, those that no other beats in both; none that gains nothing or loses twice the risk. Of those that lose
    the same on so few prompts, none is left out: the safest goes first. If there are more than `longest`, every n-th, the
    first kept.
    """
    order = [
        index
        for index, (loss, gain) in enumerate(pilot)
        if gain > 0 and loss < 2 * risk and not any(other < loss and more >= gain for other, more in pilot)
    ]
    order.sort(key=lambda index: pilot[index][1])
    return order[:: -(-len(order) // longest)] if order else []


def candidates(count: int, kind: str, confidence: str = "gate", vocabulary: int = 0) -> list[list[Policy]]:
    """Policies for so many exits, in lines that each go from nearly closed to open.

    One line for each exit that may be the first open one, so deeper exits open before shallow ones can do harm:

    - `thresholds`: one threshold for all open exits, over `GRID`;
    - `decay`: the same, falling along the answer over 16 tokens (CALM);
    - `patience`: leave where 2, 3, … exits on end read out the same token;
    - `fixed`: every token leaves at that exit.

    For exits with a sketch of the head, of so large a `vocabulary`, the first line closes all exits and reads out ever
    fewer candidates; the others read out a middling number.
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
    """Lines, or JSON lines with `prompt` or `question`, and perhaps with `answer` or `answers`: a text, several, or

    TriviaQA's object with `value` and `aliases`. Raises `BadInput` for files that are neither.
    """
    prompts = read_lines(file, ("prompt", "question"))
    if Path(file).suffix != ".jsonl":
        return [Question(prompt) for prompt in prompts]
    lines = [line for line in Path(file).expanduser().read_text(encoding="utf-8").split("\n") if line.strip()]
    found = []
    for prompt, line in zip(prompts, lines, strict=True):
        record = json.loads(line)
        answer = record.get("answers", record.get("answer", ()))
        if isinstance(answer, dict):
            answer = [answer.get("value"), *(answer.get("aliases") or ())]
        several = answer if isinstance(answer, list) else [answer]
        found.append(Question(prompt, tuple(str(one) for one in several if one not in (None, ()))))
    return found


def f1_loss(early: Generation, full: Generation, question: Question) -> float:
    """1 − token F1 with the full model's answer: on average, how much of an answer differs."""
    return 1 - token_f1(early.ids, full.ids)


def exact_loss(early: Generation, full: Generation, question: Question) -> float:
    """1 if the answer differs from the full model's at all."""
    return float(early.ids != full.ids)


def task_loss(early: Generation, full: Generation, question: Question) -> float:
    """How much worse than the full model's the answer scores, against the references; 0 where it is better."""
    return max(0.0, best_f1(full.text, question.references) - best_f1(early.text, question.references))


def gain(answer: Generation, fill: str) -> float:
    """What a policy is bold for: FLOPs saved; with `defer`, whose blocks are run after all, deep passes."""
    return 1 - 1 / answer.tokens_per_deep_pass if FILLS[fill].waits else answer.flops_saved


LOSSES: dict[str, Callable[[Generation, Generation, Question], float]] = {
    "f1": f1_loss,
    "exact": exact_loss,
    "task": task_loss,
}


@dataclass(frozen=True)
class Tested:
    """A policy on the path: what it lost and saved on the prompts of the test, and whether it passed."""

    policy: Policy
    loss: float
    p_value: float
    passed: bool
    flops_saved: float
    mean_blocks: float


@dataclass(frozen=True)
class Calibration:
    """What was guaranteed: `policy` keeps the expected `loss` at `risk` or less, with probability 1 − `delta`.

    `n` prompts tested it, after `pilot` others found the path; `tested` is as far along it as the test went. `policy` is
    closed if none passed; `needed` is then how many prompts to test with would have let the first pass, if any would.
    `raw`: whether prompts went without a chat template.
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
        return any(one.passed for one in self.tested)


def calibrate(
    backbone: Backbone,
    exits: Exits,
    questions: list[Question],
    risk: float = 0.05,
    delta: float = 0.05,
    loss: str = "f1",
    fill: str = "project",
    kind: str = "thresholds",
    confidence: str = "gate",
    max_tokens: int = 48,
    stop: tuple[str, ...] = (),
    raw: bool = False,
    reference: Backbone | None = None,
    progress: Progress = silent,
) -> Calibration:
    """Find the boldest policy that the questions vouch for; give it to `exits.policy` and keep the record with the exits.

    Answers end after `max_tokens` and before a text of `stop`; `raw` prompts take no chat template.
    `reference`: another model to compare with than the exits' own at full depth, with the same tokenizer, such as the one
    that it was tuned from. Which prompts are the pilot's is decided by their hash, not their order. Raises `BadInput` for
    settings that make no sense and for too few prompts.
    """
    _check(questions, risk, delta, loss, fill)
    if reference and reference.tokenizer.get_vocab() != backbone.tokenizer.get_vocab():
        raise BadInput(
            f"{reference.name} and {backbone.name} have different tokenizers.",
            "Compare with the model that it was tuned from.",
        )
    lines = candidates(len(exits), kind, confidence, backbone.vocab_size if exits.sketch else 0)
    questions = sorted(questions, key=lambda one: hashlib.sha256(one.prompt.encode()).digest())
    first = max(1, round(PILOT * len(questions)))
    loss_of = LOSSES[loss]
    ids = [backbone.prompts.encode(question.prompt, raw) for question in questions]

    def said(done: int) -> None:
        progress("full depth", done, len(ids))

    references = answers(Engine(reference or backbone), ids, max_tokens, stop, said)

    def losses(policy: Policy, part: slice) -> tuple[list[float], list[Generation]]:
        given = answers(Engine(backbone, exits, policy, fill), ids[part], max_tokens, stop)
        pairs = zip(given, references[part], questions[part], strict=True)
        return [loss_of(early, full, question) for early, full, question in pairs], given

    tried: list[tuple[Policy, float, float]] = []
    total = sum(map(len, lines))
    for number, line in enumerate(lines):
        for policy in line:
            found, given = losses(policy, slice(0, first))
            tried.append((policy, fmean(found), fmean(gain(one, fill) for one in given)))
            progress("pilot", len(tried), total, f"loss {tried[-1][1]:.3f}")
            if tried[-1][1] > 2 * risk:  # bolder ones lose more
                break
        total = len(tried) + sum(map(len, lines[number + 1 :]))
    order = path([(lost, gained) for _, lost, gained in tried], risk)
    on_path = [tried[index][0] for index in order]

    kept: list[list[Generation]] = []

    def along() -> Iterator[list[float]]:
        for policy in on_path:
            found, given = losses(policy, slice(first, None))
            kept.append(given)
            progress("test", len(kept), len(on_path), f"loss {fmean(found):.3f}")
            yield found

    tested = []
    for (mean, p, passed), policy in zip(fixed_sequence(along(), risk, delta), on_path, strict=False):
        saved, blocks = (fmean(getattr(one, what) for one in kept[-1]) for what in ("flops_saved", "mean_blocks"))
        tested.append(Tested(policy, mean, p, passed, saved, blocks))
    chosen = [one.policy for one in tested if one.passed]
    needed = prompts_needed(tested[0].loss, risk, delta) if tested and not chosen else None
    record = Calibration(
        chosen[-1] if chosen else Policy((1.0,) * len(exits)),
        loss,
        fill,
        backbone.weight_format,
        risk,
        delta,
        len(questions) - first,
        first,
        max_tokens,
        stop,
        raw,
        (reference or backbone).name,
        hashlib.sha256("\n".join(one.prompt for one in questions).encode()).hexdigest(),
        tuple(tested),
        needed,
    )
    exits.policy, exits.calibration = record.policy, asdict(record)
    return record


def answers(
    engine: Engine,
    prompts: list[list[int]],
    max_tokens: int,
    stop: tuple[str, ...] = (),
    done: Callable[[int], None] = lambda _: None,
) -> list[Generation]:
    """An answer to each prompt, some side by side, those of like length together."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    given: dict[int, Generation] = {}
    for at in range(0, len(order), BATCH):
        some = order[at : at + BATCH]
        given.update(
            zip(
                some,
                engine.generate_batch([prompts[index] for index in some], max_tokens=max_tokens, stop=stop),
                strict=True,
            )
        )
        done(len(given))
    return [given[index] for index in range(len(prompts))]


def _check(questions: list[Question], risk: float, delta: float, loss: str, fill: str) -> None:
    for name, value in (("risk", risk), ("delta", delta)):
        if not 0 < value < 1:
            raise BadInput(f"A {name} of {value} is not between 0 and 1.", "0.05 is usual.")
    if loss not in LOSSES:
        raise BadInput(f"There is no loss '{loss}'.", f"Choose from {', '.join(LOSSES)}.")
    if fill in FILLS and FILLS[fill].verifies:
        raise BadInput(
            "Verified answers are the full model's own: there is nothing to guarantee.",
            "Their thresholds are a matter of speed: offramp bench --fills full,verify --threshold …",
        )
    if fill not in (*FILLS, "defer"):
        raise BadInput(f"There is no fill '{fill}'.", f"Choose from {', '.join(FILLS)}.")
    needed = prompts_needed(0.0, risk, delta)
    assert needed is not None
    if len(questions) * (1 - PILOT) < needed:
        raise BadInput(
            f"{len(questions)} prompts are too few: even if no answer differed, they could not show a risk of {risk}.",
            f"Give at least {math.ceil(needed / (1 - PILOT)) + 1}.",
        )
    if loss == "task" and not all(one.references for one in questions):
        raise BadInput(
            "The loss 'task' needs right answers beside the prompts.",
            "JSON lines with 'answer' or 'answers', such as TriviaQA's.",
        )
    if len({one.prompt for one in questions}) < len(questions):
        raise BadInput("Some prompts are there twice, but losses must be independent.", "Leave each only once.")
