"""What people see in the terminal: answers coloured by what each token came from, and small tables."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any

from rich.table import Table
from rich.text import Text

from offramp.cli.shown import console as make_console
from offramp.decode.request import Generation, Token
from offramp.evaluation.anatomy import Anatomy
from offramp.evaluation.bench import Comparison, EngineComparison
from offramp.evaluation.metrics_table import metrics_of
from offramp.evaluation.results import Result, penalty_words
from offramp.evaluation.what_if import Saving
from offramp.exits.calibrated import Calibration
from offramp.exits.exits import Exits
from offramp.metrics import token_f1
from offramp.model.backbone import Backbone
from offramp.model.compiled.formats import Change

console = make_console(highlight=False)
# What a token came from: its colour, its mark in the legend, and its name. Full depth has the terminal's own colour.
SOURCES = {
    "exit": ("green", "■", "an exit"),
    "table": ("cyan", "■", "a table"),
    "text": ("yellow", "■", "the text so far"),
    "full": ("default", "□", "full depth"),
}


def _coloured(token: Token) -> Text:
    return Text(token.text, SOURCES[token.source][0])


def shade(token: Token) -> str:
    """A token's text with terminal codes for the colour of what it came from; plain text without a terminal."""
    with console.capture() as captured:
        console.print(_coloured(token), end="", soft_wrap=True)
    return captured.get()


def legend() -> None:
    """What the colours mean, in a line."""
    named = {source: Text.assemble((mark, colour), " ", name) for source, (colour, mark, name) in SOURCES.items()}
    full = named.pop("full")
    rest = Text.assemble("; chosen by ", full, ", which checks all guesses.")
    console.print(Text("Guessed by ") + Text(" ").join(named.values()) + rest)


def answer_in_colour(question: str, full: Generation, answer: Generation) -> None:
    """A question, its answer at full depth, and its answer in another mode, each token in the colour of its source."""
    console.print(Text(f"\n{question}", "bold"))
    name = answer.mode.ljust(5)
    console.print(Text("full   ", "dim") + Text(full.text.strip()), soft_wrap=True)
    # Only the name is dim, not what is appended.
    console.print(Text.assemble((f"{name}  ", "dim"), *map(_coloured, answer.tokens)), soft_wrap=True)
    if answer.mode == "early":
        blocks = " ".join(str(token.exit_block) for token in answer.tokens)
        console.print(Text(f"left after block  {blocks}", "dim"), soft_wrap=True)


def speed_beside(full: Generation, answer: Generation) -> str:
    """How many times as fast as full depth an answer was made, and whether its tokens are the same."""
    ratio = answer.decode_tokens_per_second / full.decode_tokens_per_second
    same = "same tokens" if answer.ids == full.ids else "other tokens"
    return f"{ratio:.1f} times as fast as full depth, {same}"


def modes_table(title: str, answers: dict[str, list[Generation]]) -> None:
    """What each mode did. `answers`: by mode, those to the same prompts; those of `full` are the reference.

    A cell says – where the number says nothing about the mode.
    """
    table = Table(title=title, title_justify="left")
    for column in ("mode", "tokens/s", "times as fast", "tokens a pass", "FLOPs saved", "consistency"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    fulls = answers["full"]
    for mode, runs in answers.items():
        consistency = mean(token_f1(run.ids, full.ids) for run, full in zip(runs, fulls, strict=True))
        table.add_row(
            mode,
            f"{_rate(runs):.0f}",
            "–" if mode == "full" else f"{_rate(runs) / _rate(fulls):.2f}",
            "–" if mode == "early" else f"{mean(run.tokens_per_deep_pass for run in runs):.2f}",
            f"{mean(run.flops_saved for run in runs):.1%}" if mode == "early" else "–",
            "–" if mode == "full" else f"{consistency:.2f}",
        )
    console.print()
    console.print(table)


def _rate(runs: list[Generation]) -> float:
    """Tokens a second, over all answers."""
    return sum(len(run.tokens) for run in runs) / sum(len(run.tokens) / run.decode_tokens_per_second for run in runs)


def calibration_table(record: Calibration, exits: Exits, folder: Path) -> None:
    """The policies that were tested, and the guarantee, or why there is none."""
    from offramp.training.losses import LOSSES

    loss = LOSSES[record.loss].label
    table = Table(title=f"{record.n} prompts, fill {record.fill}, {record.weights}", title_justify="left")
    for column in ("policy", loss, "p-value", "FLOPs saved", "mean blocks run", ""):
        table.add_column(column, justify="left" if column in ("policy", "") else "right")
    for test in record.tested:
        cells = (f"{test.loss:.3f}", f"{test.p_value:.2g}", f"{test.flops_saved:.1%}", f"{test.mean_blocks:.1f}")
        table.add_row(test.policy.describe(exits.config.gate), *cells, "passed" if test.passed else "not passed")
    console.print(table)
    for line in _verdict(record, folder, loss):
        console.print(line, soft_wrap=True)


def _verdict(record: Calibration, folder: Path, loss: str) -> list[str]:
    if record.passed:
        certainty = f"with probability {1 - record.delta:g} over such prompts"
        lengths = f"for answers of at most {record.max_tokens} tokens and each lower limit"
        return [f"{folder}: {loss} is at most {record.risk:g} on average on new prompts, {lengths}, {certainty}."]
    failed = f"No policy could be shown to keep the risk at {record.risk:g}: the exits in {folder} stay closed."
    if not record.tested:
        return [failed, "On the pilot prompts, none saved anything at less than twice the risk: better exits are needed."]
    if record.needed:
        count = math.ceil(record.needed * (record.n + record.pilot) / record.n)
        return [failed, f"If losses stay the same, the first policy would pass with about {count} prompts."]
    return [failed, "The first policy lost about as much as the risk, or more: more prompts would not help."]


def result_line(result: Result) -> None:
    """One condition on one task in a line: each metric with its interval."""
    task = result.task
    parts = []
    for metric in metrics_of(result.summary):
        if metric.line:
            value = result.summary[metric.name]
            mean, low, high = (metric.show(number) for number in (value.mean, value.low, value.high))
            depth = f" of {result.blocks}" if metric.name == "mean_blocks" else ""
            parts.append(f"{metric.label} {mean} ({low}–{high}){depth}")
    note = f" [{task.note}]" if task.note else ""
    penalty = penalty_words(task.repetition_penalty)
    head = Text(f"{task.name}, {task.questions} questions{penalty}{note}, {result.condition.name}: ", "bold")
    console.print(head + Text(", ".join(parts)), soft_wrap=True)


def training_table(exits: Exits, folder: Path) -> None:
    """How each trained exit did on held-out text, and when a token leaves there by default."""
    table = Table(title=f"Exits in {folder}, on held-out text", title_justify="left")
    for column in ("after block", "tail", "agrees with full depth", "gate AUROC", "key AUROC", "leaves above"):
        table.add_column(column, justify="right")
    for row, rule in zip(exits.training["validation"], exits.policy.in_words(), strict=True):
        areas = [f"{row[name]:.3f}" if name in row else "–" for name in ("gate_auroc", "key_auroc")]
        table.add_row(str(row["block"]), f"{row['tail'] or ''}", f"{row['agreement']:.1%}", *areas, rule)
    console.print(table)
    note = "Gate and key rank the tokens by how sure the exit is: the gate before it reads out, the key afterwards."
    console.print(Text(f"{note} 0.3+0.9: leaves if the gate is above 0.3 and the key above 0.9.", "dim"))
    for row in exits.training["validation"]:
        if drafts := row.get("acceptance"):
            right = ", ".join(f"{share:.0%}" for share in drafts)
            console.print(Text(f"Of a run's drafts, if those before are right, {right} are right.", "dim"))
    minutes = exits.training["seconds"] / 60
    console.print(Text(f"{minutes:.1f} minutes. Try: offramp demo --exits {folder}", "dim"))


def anatomy_table(facts: Anatomy) -> None:
    """A model's parts, and what a token costs that leaves at each exit."""
    table = Table(title=f"{facts.model} ({facts.model_type}, {facts.weight_format})", title_justify="left")
    table.add_column("part")
    table.add_column("", justify="right")
    sizes = facts.parameters_per_block
    spread = f"{sizes[0]:,}" if len(set(sizes)) == 1 else f"{min(sizes):,} to {max(sizes):,}"
    kinds = Counter(facts.kinds).items()
    context = "unbounded" if facts.context is None else f"{facts.context:,}"
    rows = [
        ("blocks", ", ".join(f"{count} × {_KIND.get(kind, kind)}" for kind, count in kinds)),
        ("hidden size, vocabulary, context", f"{facts.hidden_size:,}, {facts.vocab_size:,}, {context}"),
        ("parameters", f"{facts.parameters:,}"),
        ("parameters per block", spread),
        ("one LM head call", f"{facts.head_in_blocks:.2f} blocks"),
        (f"one gate ({facts.gate})", f"{facts.gate_in_blocks:.3f} blocks"),
        (f"one read-out adapter ({facts.readout})", f"{facts.readout_in_blocks:.3f} blocks"),
        ("the project fill, per skipped block", f"{facts.fill_project_in_blocks:.3f} blocks"),
        ("bits of a weight, as it runs", f"{facts.bits:.2f}"),
        ("compiled blocks multiply with", facts.kernels or "nothing: no compiled library"),
        ("exits", _places(facts.exits["layers"], facts.exits["tails"]) if facts.exits else "none"),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if facts.file:
        console.print(_file_table(facts))
    _change_line(facts.weight_format, facts.change)
    title = "A token that leaves there" if facts.exits else "A token that would leave there"
    leaving = Table(title=title, title_justify="left")
    for column in ("after block", "tail", "parameters", "GFLOPs", "of full depth", "GB moved"):
        leaving.add_column(column, justify="right")
    for token in facts.leaving:
        leaving.add_row(
            str(token.after_block),
            f"{token.tail or ''}",
            f"{token.parameters:,}",
            f"{token.flops / 1e9:.3f}",
            f"{token.flops / facts.full_flops:.0%}",
            f"{token.bytes / 1e9:.3f}",
        )
    console.print(leaving)
    note = (
        f"Costs are at a context of {facts.cost_context} tokens; a block is a mean block's FLOPs. A tail is the model's "
        "last blocks, which run after the exit's adapter. GFLOPs count blocks, gates, read-outs, the project fill and the "
        "head; in the last row every gate was asked and none let the token leave. GB count the same."
    )
    console.print(Text(note, "dim"))


def _file_table(facts: Anatomy) -> Table:
    """What the model's files hold, by type, and what multiplies it."""
    table = Table(title="In the model's files", title_justify="left")
    for column in ("type", "tensors", "GB", "bits a weight", "runs as"):
        table.add_column(column, justify="left" if column in ("type", "runs as") else "right")
    for held in facts.file:
        bits = 8 * held.bytes / max(1, held.entries)
        table.add_row(held.kind, str(held.tensors), f"{held.bytes / 1e9:.3f}", f"{bits:.2f}", facts.runs(held.kind))
    return table


def savings_table(found: list[Saving]) -> None:
    """What exits and drafts would save."""
    table = Table(title="What if they agreed so often? One answer at a time", title_justify="left")
    titles = ("", "GB a token", "GFLOPs a token", "times as fast", "ms a token", "")
    for title in titles:
        table.add_column(title, justify="right" if title else "left")
    for each in found:
        ms = "" if each.ms is None else f"{each.ms:.1f}"
        table.add_row(each.what, f"{each.bytes / 1e9:.3f}", f"{each.flops / 1e9:.2f}", f"{each.speed:.2f}", ms, each.how)
    console.print(table)
    note = (
        "A computation, and no measurement: times are those of reading what a token reads from memory. Exits: a gate that "
        "makes no mistake lets a token leave at the first exit that agrees with full depth, so this is the most that exits "
        "can save. exact: drafts by an exit as `offramp train --draft` makes it; a chunk that costs more counts as more "
        "bytes."
    )
    console.print(Text(note, "dim"))


def _places(layers: list[int], tails: list[int]) -> str:
    """Where exits are, in words: "after blocks 10 + 4, 20 + 3"."""
    if not layers:
        return "none, only the sketch of the head"
    places = [f"{layer} + {tail}" if tail else str(layer) for layer, tail in zip(layers, tails, strict=True)]
    return "after blocks " + ", ".join(places)


_KIND = {"mamba": "Mamba", "both": "attention and Mamba", "neither": "neither attention nor Mamba"}


def bench_table(result: Comparison) -> None:
    """What `bench.compare` measured."""
    runs = f"{result.what}, {result.tokens} tokens, {result.pairs} pairs"
    table = Table(title=f"{result.model}, {runs}", title_justify="left")
    for title in ("", "weights", "bits a weight", "tokens/s", "ms a token"):
        table.add_column(title, justify="left" if title in ("", "weights") else "right")
    for side in (result.ours, result.theirs):
        rate = side.tokens_per_second
        table.add_row(side.name, side.weights, f"{side.bits:.2f}", f"{rate:.1f}", f"{1000 / rate:.1f}")
    console.print(table)
    low, high = result.spread
    console.print(f"ratio {result.ratio:.2f} (pairs from {low:.2f} to {high:.2f})")
    _change_line(result.ours.weights, result.change)
    if result.parts_ms:
        console.print(Text(f"offramp, ms a token: {_listed(result.parts_ms)}", "dim"))
    console.print(Text(_listed(result.machine), "dim"))


def speeds_table(result: EngineComparison) -> None:
    """What `bench.compare_engines` measured."""
    runs = f"{result.prompts} prompts, up to {result.tokens} tokens, {result.pairs} pairs"
    table = Table(title=f"{result.model}, {result.weights} ({result.bits:.2f} bits a weight), {runs}", title_justify="left")
    titles = ("", "tokens/s", "ratio", "pairs\nfrom–to", "equal", "mean\nblocks", "tokens\na pass", "drafts\naccepted")
    for title in titles:  # with these breaks, the table is 80 columns wide
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for name, speed in result.speeds.items():
        low, high = speed.spread
        accepted = "" if speed.acceptance_rate is None else f"{speed.acceptance_rate:.0%}"
        table.add_row(
            name,
            f"{speed.tokens_per_second:.1f}",
            f"{speed.ratio:.2f}",
            f"{low:.2f}–{high:.2f}",
            f"{speed.equal:.0%}",
            f"{speed.mean_blocks:.1f}",
            f"{speed.tokens_per_deep_pass:.2f}",
            accepted,
        )
    console.print(table)
    _change_line(result.weights, result.change)
    for name, speed in result.speeds.items():
        console.print(Text(f"{name}, ms a token: {_listed(speed.parts_ms)}", "dim"))
    console.print(Text(_listed(result.machine), "dim"))


def costs_table(backbone: Backbone, costs: dict[int, float]) -> None:
    """What `bench.measured_costs` found, by the rows of a pass."""
    table = Table(title=f"{backbone.name}, {backbone.weight_format}: a pass, in steps of one row", title_justify="left")
    for title in ("rows", "steps"):
        table.add_column(title, justify="right")
    for rows, cost in costs.items():
        table.add_row(str(rows), f"{1 + cost:.2f}")
    console.print(table)
    console.print("Kept for this model on this machine. The mode exact makes as many drafts as pay; answers do not change.")


def _change_line(format: str, change: Change | None) -> None:
    """What a weight format changes, where that is known."""
    if change:
        console.print(f"{format}: {change}", soft_wrap=True)


def _listed(items: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}" for key, value in items.items())
