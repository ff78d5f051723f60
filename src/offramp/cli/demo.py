"""The verb demo: a few answers in colour, how fast they were made, and a table of the modes."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from offramp.cli.flags import Only
from offramp.cli.options import DecodingOptions
from offramp.cli.progress import status

if TYPE_CHECKING:
    from offramp.decode.facade import Model
    from offramp.decode.request import Generation

QUESTIONS = {  # no exit that ships has learned from one of these: it would show too much
    "smollm2": [
        "Why do cats purr?",
        "What did the Romans use concrete for?",
        "List three uses of vinegar in the house.",
    ],
    "mamba-tiny": [
        "What is the capital of France?",
        "Which planet is the largest?",
        "Who wrote Romeo and Juliet?",
    ],
    "code": [
        "Write a Python function that reverses the order of the words in a sentence.",
        "Write a SQL query that counts the orders of each customer.",
        "What does this print? print([x * x for x in range(5) if x % 2])",
    ],
}
ROUNDS = 3  # measured answers of each mode to a question; the fastest counts, since other programs only slow an answer down
ENOUGH = 5.0  # seconds after which no other round begins
NOTE = (
    "A pass is once through all blocks. FLOPs are arithmetic; exact saves passes instead. Consistency: how much of an "
    "answer's tokens is full depth's, too (token F1)."
)


def demo(
    questions: Annotated[
        list[str] | None, typer.Argument(help="Questions to ask. Default: three that come with offramp.")
    ] = None,
    *,
    model: Annotated[str, typer.Option(help="The model to ask.")] = "smollm2",
    decoding: Annotated[DecodingOptions, Only("exits", "dtype")],
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 40,
) -> None:
    """Answer a few questions; show what each token came from, and how much faster it was than at full depth."""
    from rich.text import Text
    from torch import get_num_threads

    from offramp.cli.terminal import console, legend, modes_table, shade, speed_beside
    from offramp.exits.exit_set import no_exits
    from offramp.machine import processor

    loaded = decoding.load(model)
    if not loaded.exits:
        raise no_exits(loaded.backbone)
    answers: dict[str, list[Generation]] = {mode: [] for mode in loaded.modes}
    for mode in answers:
        loaded.generate("Hello", mode, max_tokens=8)  # a first answer is slow, since memory and caches are cold
    legend()
    for question in questions or _questions_for(model):
        console.print(Text(f"\n{question}", "bold"))
        for token in loaded.stream(question, "exact", max_tokens=max_tokens):
            print(shade(token), end="", flush=True)
        print()
        with status("Measuring …"):
            runs = _measured(loaded, list(answers), question, max_tokens)
        for mode, made in answers.items():
            made.append(max((run[mode] for run in runs), key=lambda answer: answer.decode_tokens_per_second))
        console.print(Text(f"→ {speed_beside(answers['full'][-1], answers['exact'][-1])}", "bold"))
    threads = get_num_threads()
    where = f"{processor()}, {threads} thread{'s' if threads > 1 else ''}"
    modes_table(f"{loaded.backbone.name}, {loaded.backbone.weight_format}; {where}", answers)
    for line in (*map(partial(_promise, loaded), answers), NOTE):
        console.print(Text(line, "dim"))


def _questions_for(model: str) -> list[str]:
    """The questions for a model by its name: its own, or those for code if the name says that it is for code."""
    return QUESTIONS.get(model.removesuffix("-ee"), QUESTIONS["code" if "code" in model.lower() else "smollm2"])


def _measured(loaded: Model, modes: list[str], question: str, max_tokens: int) -> list[dict[str, Generation]]:
    """Rounds of answers, one by each mode in turn."""
    runs: list[dict[str, Generation]] = []
    started = time.perf_counter()
    while not runs or (len(runs) < ROUNDS and time.perf_counter() - started < ENOUGH):
        runs.append({mode: loaded.generate(question, mode, max_tokens=max_tokens) for mode in modes})
    return runs


def _promise(loaded: Model, name: str) -> str:
    """A mode and its promise, with the risk that these exits were calibrated for."""
    from offramp.decode.modes import MODES

    calibrated = loaded.exits.early.calibration if loaded.exits.early else {}
    return f"{name.ljust(5)}  {MODES[name].promised(calibrated)}"
