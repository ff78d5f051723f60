"""What an answer with exits loses, beside the full-depth answer to the same question: a number from 0 to 1."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from offramp.decode.request import Generation
from offramp.files import read_lines
from offramp.metrics import best_recall, token_f1


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
    """Full depth's word recall of the references minus this answer's; 0 if that is negative.

    Recall, since a model that answers in sentences has a word F1 near 0 with a short reference, and so nothing to lose.
    """
    return max(0.0, best_recall(full.text, question.references) - best_recall(early.text, question.references))


LOSSES: dict[str, Callable[[Generation, Generation, Question], float]] = {
    "f1": f1_loss,
    "exact": exact_loss,
    "task": task_loss,
}


def losses_by_length(early: Generation, full: Generation, question: Question, loss: str, longest: int) -> list[float]:
    """What the first 1, 2, … `longest` tokens of an answer lose."""
    found = [0.0] * sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(early.ids, full.ids, strict=False)))
    for length in range(len(found) + 1, min(longest, max(len(early.tokens), len(full.tokens))) + 1):
        found.append(LOSSES[loss](_first(early, length), _first(full, length), question))
    return [*found, *found[-1:] * (longest - len(found))]


def _first(answer: Generation, length: int) -> Generation:
    """The answer as it would be with a limit of `length` tokens: a later token changes no earlier one."""
    tokens = answer.tokens[:length]
    return replace(answer, tokens=tokens, text="".join(token.text for token in tokens))
