"""The loss of an answer with exits, compared with the full-depth answer to the same question: a number from 0 to 1."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from offramp import sandbox
from offramp.decode.request import Generation
from offramp.files import read_lines
from offramp.metrics import best_recall, token_f1


@dataclass(frozen=True)
class Question:
    """A prompt, and what only the loss `task` needs: answers that count as right, or a program that tests an answer's code.

    The code stands in the program in the place of {answer} (`sandbox.solves`).
    """

    prompt: str
    references: tuple[str, ...] = ()
    program: str = ""


def read_questions(file: str | Path) -> list[Question]:
    """Read prompts from a file of lines, or of JSON lines with `prompt` or `question`.

    A JSON line may have right answers in `answer` or `answers`: a text, a list of texts, or TriviaQA's object with `value`
    and `aliases`; or a `program`. Raises `BadInput` for a file that is neither.
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
        questions.append(
            Question(prompt, tuple(str(text) for text in texts if text not in (None, ())), str(record.get("program") or ""))
        )
    return questions


def f1_loss(early: Generation, full: Generation, question: Question) -> float:
    """1 − token F1 with the full model's answer."""
    return 1 - token_f1(early.ids, full.ids)


def exact_loss(early: Generation, full: Generation, question: Question) -> float:
    """1 if the answer differs from the full model's, else 0."""
    return float(early.ids != full.ids)


def task_loss(early: Generation, full: Generation, question: Question) -> float:
    """Full depth's word recall of the references minus this answer's; 0 if that is negative.

    With a program: 1 if full depth's code passes it and this answer's does not, else 0.

    It is recall, not F1: a model that answers in sentences has an F1 near 0 with a short reference, and so nothing to lose.
    """
    if question.program:
        return float(sandbox.solves(full.text, question.program) and not sandbox.solves(early.text, question.program))
    return max(0.0, best_recall(full.text, question.references) - best_recall(early.text, question.references))


@dataclass(frozen=True)
class Loss:
    """A way to measure an answer's loss. `label` is its name for people, `of` computes it, and `help` explains it."""

    label: str
    of: Callable[[Generation, Generation, Question], float]
    help: str


LOSSES = {
    "f1": Loss("1 − token F1", f1_loss, "1 − token F1 with full depth's answer"),
    "exact": Loss("answers that differ", exact_loss, "1 if the answers differ"),
    "task": Loss(
        "lost task score",
        task_loss,
        "how many more words of the prompt's answer it misses, as a share; for code, 1 if it alone fails",
    ),
}


def losses_by_length(early: Generation, full: Generation, question: Question, loss: str, longest: int) -> list[float]:
    """The losses of the first 1, 2, … `longest` tokens of an answer."""
    found = [0.0] * sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(early.ids, full.ids, strict=False)))
    for length in range(len(found) + 1, min(longest, max(len(early.tokens), len(full.tokens))) + 1):
        found.append(LOSSES[loss].of(_first(early, length), _first(full, length), question))
    return [*found, *found[-1:] * (longest - len(found))]


def _first(answer: Generation, length: int) -> Generation:
    """The answer with a limit of `length` tokens: the longer one's beginning, since later tokens change no earlier ones."""
    tokens = answer.tokens[:length]
    return replace(answer, tokens=tokens, text="".join(token.text for token in tokens))
