"""How much time do exits save, one answer at a time? Ours, the paper's recipe, and peers, on the same questions.

    .venv/bin/python benchmarks/paper_times.py (the arguments of paper.py) [--questions 24] [--peers lookup,layerskip]

It goes on from the Results of `benchmarks/paper.py` for the same arguments. Of the conditions in them it takes those that
save most at a consistency of 0.9: of the shipped exits with the whole head (and again with the fill `defer`), of exits
trained here, and of the paper's recipe; and verified drafts. Peers are processes of their own (`benchmarks/speed.py`);
their full depth is that of transformers. Every question is answered by all in turn, in an order that changes from question
to question; one computes at a time. Intervals are 95%, by bootstrap over questions.

Writes WORK/MODEL-TASK-times.json, and the figure WORK/MODEL-TASK-times.svg: consistency against time saved.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import nan
from pathlib import Path
from typing import Any

from offramp import Engine
from offramp.errors import OfframpError
from offramp.evaluation.evaluation import Condition, to_six_digits
from offramp.evaluation.results import Result, load_results
from offramp.evaluation.task import Item
from offramp.extras.report.figures import COLOURS, MARKERS
from offramp.files import write_atomically
from offramp.machine import machine
from offramp.metrics import token_f1
from paper import OWN, SHIPPED, THE_PAPERS, Experiment, boldest, finish, flops_saved, parser_of, run
from speed import ENTRIES, WORK, Failed, Worker, entry, paths_of
from trade import SCORES, Row, interval

FULL, THEIRS = "full depth", "transformers-float32"
LLAMA = "llamacpp"  # how the names of peers begin that are their own full depth
LEFT = -1.0  # the smallest time saved that the figure shows
COLUMNS = ("consistency", "score", "time saved", "tokens/s")
TIMES = "-times.json"  # how the names of files of times end
Answer = Callable[[list[int]], tuple[list[int], float]]  # a prompt → the answer's ids, and tokens a second


@dataclass(frozen=True)
class Contender:
    """One way to answer. `baseline`: the name of the full depth that it is compared with."""

    baseline: str
    answer: Answer


def chosen(experiment: Experiment, results: list[Result]) -> dict[str, Condition]:
    """The conditions to time, by the names that the table gives them."""
    plain = [each for each in results if each.task.repetition_penalty == 1 and each.condition.policy]
    groups = {
        "exits that ship": [each for each in plain if each.condition.label.startswith(SHIPPED)],
        "exits trained here": [each for each in plain if OWN in each.condition.label],
        "the paper's recipe": [each for each in plain if each.condition.label == THE_PAPERS.label],
    }
    found = {FULL: Condition()}
    for name, members in groups.items():
        if members:
            found[name] = experiment.condition_of(boldest(members, flops_saved).condition)
    if experiment.shipped:
        found["exits that ship, own policy"] = Condition("project", None, experiment.shipped, SHIPPED)
        found["exits that ship, defer"] = replace(found["exits that ship"], fill="defer")
    for condition in experiment.drafts():
        found["verified drafts"] = condition
    return found


def of_engine(engine: Engine, experiment: Experiment) -> Answer:
    """Answers by offramp."""
    task = experiment.task

    def answer(ids: list[int]) -> tuple[list[int], float]:
        made = engine.generate(ids, max_tokens=task.max_tokens, stop=task.stop)
        return made.ids, made.decode_tokens_per_second

    return answer


def of_worker(worker: Worker, experiment: Experiment) -> Answer:
    """Answers by a peer, which does not stop by itself: they are cut at an end of text, and at the task's stop strings."""
    ends, tokenizer, task = experiment.backbone.stop_ids, experiment.backbone.tokenizer, experiment.task

    def answer(ids: list[int]) -> tuple[list[int], float]:
        made = worker.ask(op="generate", ids=ids, tokens=task.max_tokens)
        kept: list[int] = []
        for id in made["ids"]:
            kept.append(id)
            if id in ends or any(stop in tokenizer.decode(kept) for stop in task.stop):
                break
        if not made["decode_tokens"]:  # the answer came at once, so nobody can tell decoding from reading the prompt
            return kept, len(made["ids"]) / made["prefill_seconds"]
        return kept, made["decode_tokens"] / made["decode_seconds"]

    return answer


def text_of(ids: list[int], experiment: Experiment) -> str:
    """The text of an answer, up to the task's stop strings."""
    text: str = experiment.backbone.tokenizer.decode(ids, skip_special_tokens=True)
    for stop in experiment.task.stop:
        text = text.partition(stop)[0]
    return text.strip()


def measured(contenders: dict[str, Contender], experiment: Experiment, items: list[Item]) -> dict[str, list[Row]]:
    """What each contender's answer to each question is worth, and the time that it took."""
    task, rows = experiment.task, {name: list[Row]() for name in contenders}
    for number, item in enumerate(items):
        ids = experiment.backbone.prompts.encode(item.prompt, raw=True)
        order = random.Random(number).sample(list(contenders), len(contenders))
        answers = {name: contenders[name].answer(ids) for name in order}
        for name, (made, speed) in answers.items():
            full, full_speed = answers[contenders[name].baseline]
            score = task.score(text_of(made, experiment), item)[SCORES[task.name]]
            kept = token_f1(made, full)
            values = {"consistency": kept, "score": score, "time saved": 1 - full_speed / speed, "tokens/s": speed}
            rows[name].append(to_six_digits(values))
    return rows


def with_peers(
    experiment: Experiment, names: list[str], contenders: dict[str, Contender]
) -> tuple[list[Worker], dict[str, str]]:
    """Start the peers and add them to the contenders. Returns their processes, and why others cannot run."""
    workers, failures = list[Worker](), dict[str, str]()
    paths = paths_of(experiment.source)
    WORK.mkdir(parents=True, exist_ok=True)
    for name in [THEIRS, *names] if names else []:
        try:
            if entry(name).weights not in paths:
                raise Failed(f"needs a GGUF file, which {experiment.name} does not come with")
            worker = Worker(name, paths, experiment.args.threads)
            workers.append(worker)
            contender = Contender(name if name.startswith(LLAMA) else THEIRS, of_worker(worker, experiment))
            contender.answer(experiment.backbone.prompts.encode("Hello", raw=True))  # warms up
            contenders[name] = contender
        except Failed as failure:
            failures[name] = str(failure)
    return workers, failures


def draw(rows: dict[str, list[Row]], title: str, file: Path) -> None:
    """Draw consistency against time saved, with intervals. What takes more than twice the time is named, with its place."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "offramp"  # makes the same file for the same figure
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    shown = [name for name in rows if name not in (FULL, THEIRS) and not name.startswith(LLAMA)]
    for number, name in enumerate(shown):
        values = rows[name]
        (x, *x_ends), (y, *y_ends) = (interval(values, measure) for measure in ("time saved", "consistency"))
        x_bars, y_bars = ([[abs(end - middle)] for end in ends] for middle, ends in ((x, x_ends), (y, y_ends)))
        if x < LEFT:
            name, x = f"{name} (at {share(x)})", nan
        look = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        axes.errorbar(x, y, y_bars, x_bars, linestyle="", capsize=2, label=name, **look)
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="time saved, of own full depth", ylabel="consistency with full depth", title=title)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(file, metadata={"Date": None})


def timed(model: str, task: str, args: argparse.Namespace) -> None:
    """Time one model on one task."""
    experiment = Experiment(model, task, args)
    file = run(experiment)
    conditions = chosen(experiment, load_results([file]))
    engines = {name: condition.engine(experiment.backbone) for name, condition in conditions.items()}
    contenders = {name: Contender(FULL, of_engine(engine, experiment)) for name, engine in engines.items()}
    workers, failures = with_peers(experiment, [name for name in args.peers.split(",") if name], contenders)
    try:
        items = experiment.scored.items[: args.questions]
        measured(contenders, experiment, items[:1])  # warms up
        rows = measured(contenders, experiment, items)
    finally:
        for worker in workers:
            worker.close()
    record: dict[str, Any] = {"machine": machine(), "rows": rows, "failures": failures}
    record["policies"] = {name: condition.name for name, condition in conditions.items()}
    out = file.with_name(f"{file.stem}{TIMES}")
    write_atomically(out, json.dumps(record, indent=1).encode())
    title = f"{experiment.name} on {experiment.task.name}, {len(items)} questions"
    draw(rows, title, out.with_suffix(".svg"))
    print("\n".join([f"\n{title}; {machine()}\n", row("", COLUMNS), f"|{'---|' * (len(COLUMNS) + 1)}", *rows_of(out)]))


def row(name: str, cells: Iterable[str]) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join([name, *cells])} |"


def share(value: float) -> str:
    """A share in percent, with a digit after the point where it is small."""
    percent = 100 * value
    shown = f"{percent:.0f}%" if abs(percent) >= 19.95 else f"{percent:.1f}%"
    return "0.0%" if shown == "-0.0%" else shown.replace("-", "−")


def subject(file: Path) -> tuple[str, str]:
    """The model and the task that a file of times is about, by its name."""
    model, task = file.name.removesuffix(TIMES).rsplit("-", 1)
    return model, task


def rows_of(file: Path) -> list[str]:
    """The rows of a file of times: each contender's measures, or why it failed."""
    record, title = json.loads(file.read_text("utf-8")), ", ".join(subject(file))
    shown: dict[str, Callable[[float], str]] = {"time saved": share, "tokens/s": "{:.0f}".format}
    found = []
    for name, values in record["rows"].items():
        cells = []
        for column in COLUMNS:
            middle, low, high = map(shown.get(column, "{:.3f}".format), interval(values, column))
            cells.append(f"{middle} ({low} to {high})")
        found.append(row(f"{title}: {name}", cells))
    return found + [row(f"{title}: {name}", [f"failed: {reason}"]) for name, reason in record["failures"].items()]


def main(argv: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--questions", type=int, default=24, help="questions of each task that are timed")
    parser.add_argument("--peers", default="", help="peers, by comma, as benchmarks/speed.py names them")
    parser.add_argument("--threads", type=int, default=2, help="of the peers")
    args = finish(parser, argv)
    if unknown := set(args.peers.split(",")) - {"", *ENTRIES}:
        parser.error(f"unknown peers {', '.join(sorted(unknown))}; there are {', '.join(ENTRIES)}")
    try:
        for name in args.models.split(","):
            for task in args.tasks.split(","):
                if task in SCORES:
                    timed(name, task, args)
    except OfframpError as error:
        parser.error(f"{error} {error.hint}")


if __name__ == "__main__":
    main()
