"""The record of a calibration: what it holds, how a use of exits differs from it, and a check of strangers' records."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from offramp.errors import CorruptFile, OfframpError
from offramp.exits.policy import Policy

LARGEST_NUMBER = 1 << 30  # largest whole number in a stranger's record


@dataclass(frozen=True)
class Tested:
    """A policy on the path, and whether it passed.

    `loss`: its mean loss on the prompts of the test, for answers of at most `length` tokens. That is the length with the
    largest loss. Savings are means over whole answers.
    """

    policy: Policy
    loss: float
    length: int
    p_value: float
    passed: bool
    flops_saved: float
    mean_blocks: float


@dataclass(frozen=True)
class Calibration:
    """The guarantee of a calibration: `policy` keeps the expected `loss` at `risk` or less, with probability 1 − `delta`.

    That holds for a limit of `max_tokens` tokens, and for each lower one. `pilot` prompts found the path, and `n` others
    tested it; `pilot_hashes` are hashes of the first (`exits.learned`). `tested` holds the policies of the path up to the
    first that failed, and `untested` those after it. If none passed, `policy` is closed. Then `needed` is the number of
    test prompts with which the first one would have passed, or None if no number would do. `raw`: the prompts had no chat
    template.
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
    repetition_penalty: float
    prompts_sha256: str
    pilot_hashes: str
    tested: tuple[Tested, ...]
    untested: tuple[Policy, ...]
    needed: int | None

    @property
    def passed(self) -> bool:
        """Whether any policy passed the test."""
        return any(test.passed for test in self.tested)


@dataclass(frozen=True)
class Point:
    """A policy that a calibration tested, and what it measured: the mean loss of an answer, the share of FLOPs saved, and
    whether it passed the test.
    """

    policy: Policy
    loss: float
    flops_saved: float
    passed: bool


def points_of(calibration: dict[str, Any]) -> list[Point]:
    """The points of `early` that a calibration tested.

    Raises `CorruptFile` if its record is not complete.
    """
    try:
        return [
            Point(Policy.from_json(each["policy"]), each["loss"], each["flops_saved"], each["passed"])
            for each in calibration.get("tested", [])
        ]
    except (KeyError, TypeError, ValueError, AttributeError, OfframpError) as error:
        raise CorruptFile(f"The exits' calibration is damaged: {error!r}.", "Calibrate again.") from error


def differences(calibration: dict[str, Any], used: dict[str, Any]) -> list[str]:
    """How a use differs from what a calibration tested, in words: "fill project, not copy".

    `used` may name `fill`, `weights`, `temperature`, `repetition_penalty`, `max_tokens`, `raw` and `stop`. Answers may be
    shorter than those of the test: each length up to the longest was tested.
    """
    found = []
    for name, value in used.items():
        tested = calibration.get(name, {"temperature": 0.0, "repetition_penalty": 1.0}.get(name, value))
        if name == "max_tokens":
            found += [f"answers of at most {tested} tokens, not {value}"] if value > tested else []
        elif name == "raw":
            found += ["prompts as they are" if tested else "the model's chat template"] if value != tested else []
        elif name == "stop":
            found += ["other stop texts"] if list(value) != list(tested) else []
        elif value != tested:
            found.append(f"{name.replace('_', ' ')} {tested}, not {value}")
    return found


def check_types(made: Any) -> None:
    """Raises `TypeError` if a dataclass, made from a stranger's JSON, holds a value of a wrong type."""
    _check_fields(type(made), {item.name: getattr(made, item.name) for item in fields(made)})


def check_calibration(record: dict[str, Any]) -> None:
    """Check a stranger's record of a calibration. Raises `TypeError`, or as `Policy.from_json` does."""
    _check_fields(Calibration, record)


def _check_fields(kind: Any, record: dict[str, Any]) -> None:
    """Check those fields of a dataclass that the record has."""
    for name, hint in get_type_hints(kind).items():
        if name in record:
            _check(name, record[name], hint)


def _check(name: str, value: Any, hint: Any) -> None:
    number = float in (get_args(hint) or (hint,))
    if get_origin(hint) is tuple:
        right = isinstance(value, list | tuple)
        for each in value if right else ():
            _check(name, each, get_args(hint)[0])
    elif isinstance(value, dict) and is_dataclass(hint):
        check_types(Policy.from_json(value)) if hint is Policy else _check_fields(hint, value)
        return
    elif isinstance(value, bool):
        right = hint is bool
    elif isinstance(value, int):
        right = (number or isinstance(value, hint)) and abs(value) <= LARGEST_NUMBER
    elif isinstance(value, float):
        right = number and math.isfinite(value)
    else:
        right = isinstance(value, hint)
    if not right:
        raise TypeError(f"{name} is {value!r}")
