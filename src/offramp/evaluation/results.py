"""Results: what a condition scored on a task, what it cost, and everything that a second run needs.

Results are frozen dataclasses, kept as JSON. Their means have 95% intervals, by bootstrap over the questions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from offramp.errors import BadInput, OfframpError
from offramp.evaluation.metrics_table import metrics_of
from offramp.exits.policy import Policy
from offramp.files import write_atomically

RESAMPLES = 1000


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, mean: float, resampled: np.ndarray[Any, Any]) -> Interval:
        """A mean, with the interval between percentiles of the means of the resamples (RESAMPLES,)."""
        low, high = np.quantile(resampled, (0.025, 0.975))
        return cls(float(mean), float(low), float(high))


@dataclass(frozen=True)
class ModelInfo:
    """Which weights ran, in which format. `sha256` is their fingerprint (`checkpoint.fingerprint`)."""

    name: str
    sha256: str
    weights: str


@dataclass(frozen=True)
class ConditionInfo:
    """How answers were decoded. All but the name is None for full depth.

    `fill`: its name. `gate` is the kind of the exits' gates.
    `calibration` is the record of the exits' own policy, which is empty if that was not calibrated. It is None if the user
    chose the policy. `label` says which exits these are.
    """

    name: str
    fill: str | None
    gate: str | None
    policy: Policy | None
    calibration: dict[str, Any] | None
    label: str


@dataclass(frozen=True)
class TaskInfo:
    """Which questions were asked, and how. `batch`: answers side by side. A repetition penalty of 1 is none."""

    name: str
    questions: int
    source: str
    sha256: str
    note: str
    max_tokens: int
    batch: int
    repetition_penalty: float


def penalty_words(penalty: float) -> str:
    """What a title says of a repetition penalty; nothing for none."""
    return "" if penalty == 1 else f", repetition penalty {penalty:g}"


@dataclass(frozen=True)
class ScoredAnswer:
    """An answer to one question: its pieces of text, the block that each left at, and what it scored and cost."""

    id: str
    question: str
    text: str
    pieces: list[str]
    exits: list[int]
    full_text: str  # the answer at full depth
    scores: dict[str, float]
    measures: dict[str, float]


@dataclass(frozen=True)
class ScoredChoice:
    """A multiple-choice question: the log-likelihoods (nats) of its right and wrong answers, and what they score."""

    id: str
    right: list[float]
    wrong: list[float]
    scores: dict[str, float]
    measures: dict[str, float]


Scored = ScoredAnswer | ScoredChoice


@dataclass(frozen=True)
class Result:
    """One condition on one task. `blocks` is the model's depth; `exit_histogram`: tokens that left at each block."""

    command: str
    seed: int
    machine: dict[str, Any]
    model: ModelInfo
    exits: dict[str, Any] | None
    condition: ConditionInfo
    task: TaskInfo
    blocks: int
    summary: dict[str, Interval]
    exit_histogram: dict[int, int]
    peak_memory_bytes: int
    items: list[Scored]

    def to_json(self) -> dict[str, Any]:
        """The record that `from_json` reads."""
        return {"offramp": "result", **asdict(self)}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Result:
        """Read a record. Raises `KeyError`, `TypeError`, `ValueError`, `AttributeError` or `BadInput` for another one."""
        if record["offramp"] != "result":
            raise ValueError("not a Result")
        condition = record["condition"]
        policy = condition["policy"]
        if policy is not None:
            policy = Policy.from_json(policy)
        parsed: dict[str, Any] = {
            "model": ModelInfo(**record["model"]),
            "condition": ConditionInfo(**{**condition, "policy": policy}),
            "task": TaskInfo(**record["task"]),
            "summary": {name: Interval(**interval) for name, interval in record["summary"].items()},
            "exit_histogram": {int(block): count for block, count in record["exit_histogram"].items()},
            "items": [ScoredChoice(**item) if "right" in item else ScoredAnswer(**item) for item in record["items"]],
        }
        return cls(**{field.name: parsed.get(field.name, record[field.name]) for field in fields(cls)})


def summary(items: Sequence[Scored], seed: int = 0) -> dict[str, Interval]:
    """Mean and 95% interval of every score and measure, by bootstrap (percentiles of 1,000 resamples).

    The items are resampled. Turns of a conversation share what is before the "/" of their ids; a conversation is drawn as a
    whole, unless it is the only one. `tokens_per_second` is the number of all tokens over the time of all decoding.
    """
    weights = _resampled(items, seed)
    columns = {name: _column(items, name) for name in (*items[0].scores, *items[0].measures)}
    intervals = {name: Interval.of(values.mean(), weights @ values / weights.sum(1)) for name, values in columns.items()}
    if "decode_seconds" in columns:
        tokens, seconds = columns["tokens"], columns["decode_seconds"]
        speed = tokens.sum() / seconds.sum()
        intervals["tokens_per_second"] = Interval.of(speed, weights @ tokens / (weights @ seconds))
    return intervals


def difference(items: Sequence[Scored], others: Sequence[Scored], name: str, seed: int = 0) -> Interval:
    """How much larger a score or measure is in `items` than in `others`, on the same questions: paired bootstrap."""
    places = {item.id: place for place, item in enumerate(others)}
    other_values = _column(others, name)[[places[item.id] for item in items]]
    gaps = _column(items, name) - other_values
    weights = _resampled(items, seed)
    return Interval.of(gaps.mean(), weights @ gaps / weights.sum(1))


def _column(items: Sequence[Scored], name: str) -> np.ndarray[Any, Any]:
    return np.array([item.scores[name] if name in item.scores else item.measures[name] for item in items])


def _resampled(items: Sequence[Scored], seed: int) -> np.ndarray[Any, Any]:
    """How often each item is in each resample, (RESAMPLES, n)."""
    _, groups = np.unique([item.id.partition("/")[0] for item in items], return_inverse=True)
    if len(items) > 1 and not groups.any():  # a single group would give no spread
        groups = np.arange(len(items))
    count = int(groups.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    return np.asarray(drawn[:, groups], dtype=float)


def save_results(results: Sequence[Result], file: Path) -> None:
    """Write Results as JSON, with the label, unit and better way of each metric that they have."""
    known = metrics_of(dict.fromkeys(name for result in results for name in result.summary))
    metrics = {metric.name: {key: getattr(metric, key) for key in ("label", "unit", "better")} for metric in known}
    content = {"metrics": metrics, "results": [result.to_json() for result in results]}
    write_atomically(file, json.dumps(content, indent=1, ensure_ascii=False).encode())


def load_results(files: Sequence[Path]) -> list[Result]:
    """The Results in files that `offramp eval` wrote. Raises `BadInput` for other files."""
    results: list[Result] = []
    for file in files:
        try:
            results += [Result.from_json(record) for record in json.loads(file.read_bytes())["results"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OfframpError) as error:
            raise BadInput(f"{file} holds no results: {error!r}.", "Name a file that offramp eval wrote.") from error
    return results
