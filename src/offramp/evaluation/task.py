"""A task: its questions, how an answer ends, and how it is scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """One question. `prompt` ends where the answer begins. `references` are right answers, `wrong` are wrong answers."""

    id: str
    question: str
    prompt: str
    references: tuple[str, ...]
    wrong: tuple[str, ...] = ()
    best: str = ""  # TruthfulQA's best answer
    program: str = ""  # what tests an answer's code, which stands in the place of {answer}


Scores = dict[str, float]


@dataclass(frozen=True)
class Task:
    """A set of questions, how an answer to them ends, and how it is scored: `score(answer, item)` gives named scores."""

    name: str
    items: list[Item]
    stop: tuple[str, ...]
    max_tokens: int
    score: Callable[[str, Item], Scores]
    source: str
    sha256: str
    note: str = ""  # a label that every figure from this task must carry
    multiple_choice: bool = False
    repetition_penalty: float = 1.0  # of the answers' tokens; 1 is none
    chat: bool = False  # prompts go through the model's chat template
