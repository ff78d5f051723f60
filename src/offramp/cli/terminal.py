"""What people see in the terminal: answers coloured by exit, and small tables."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from offramp.decode.request import Generation, Token
from offramp.evaluation.anatomy import Anatomy
from offramp.evaluation.bench import Comparison, FillComparison
from offramp.evaluation.metrics_table import metrics_of
from offramp.evaluation.results import Result, penalty_words
from offramp.evaluation.what_if import Saving
from offramp.exits.calibrated import Calibration
from offramp.exits.exits import Exits
from offramp.metrics import token_f1
from offramp.model.backbone import Backbone

console = Console(highlight=False)
# From early exits to late ones. Full depth has the terminal's own colour.
_COLOURS = ("green", "cyan", "yellow", "magenta")


def _colour(block: int, n_blocks: int) -> str:
    if block == n_blocks:
        return "default"
    return _COLOURS[min(len(_COLOURS) - 1, block * len(_COLOURS) // n_blocks)]


def shade(token: Token, n_blocks: int) -> str:
    """A token's text with terminal codes for the colour of the block where it left; plain text without a terminal."""
    with console.capture() as captured:
        console.print(Text(token.text, _colour(token.exit_block, n_blocks)), end="", soft_wrap=True)
    return captured.get()


def answer_in_colour(question: str, full: Generation, early: Generation, model: str | None = None) -> None:
    """A question, its answer at full depth, and its answer with exits, each token in its exit's colour."""
    console.print(Text(f"\n{question}", "bold") + Text(f"  {model}" if model else "", "dim"))
    console.print(Text("full depth  ", "dim") + Text(full.text.strip()), soft_wrap=True)
    coloured = Text.assemble(("with exits  ", "dim"))  # only this part is dim, not what is appended
    for token in early.tokens:
        coloured.append(token.text, _colour(token.exit_block, early.blocks))
    console.print(coloured, soft_wrap=True)
    blocks = [f"{token.exit_block}" for token in early.tokens]
    console.print(Text(f"left after  {' '.join(blocks)}", "dim"), soft_wrap=True)


def comparison_table(compared: list[tuple[Backbone, list[tuple[Generation, ...]]]]) -> None:
    """Full depth beside exits, over all answers of each model. Rates are medians, the other numbers means.

    Each question has an answer at full depth, one with exits, and perhaps a verified one.
    """
    names = " and ".join(f"{backbone.name}, {backbone.weight_format}" for backbone, _ in compared)
    table = Table(title=f"{names}, fill {compared[0][1][0][1].fill}", title_justify="left")
    for column in ("", "tokens/s", "mean blocks run", "FLOPs saved", "consistency"):
        table.add_column(column, justify="right" if column else "left")
    for backbone, answers in compared:
        fulls, *others = zip(*answers, strict=True)
        for name, runs in zip(("full depth", "with exits", "drafts, verified"), (fulls, *others), strict=False):
            table.add_row(
                f"{backbone.name}, {name}" if len(compared) > 1 else name,
                f"{median(run.decode_tokens_per_second for run in runs):.1f}",
                f"{mean(run.mean_blocks for run in runs):.1f} of {backbone.n_blocks}",
                f"{mean(run.flops_saved for run in runs):.1%}",
                f"{mean(token_f1(run.ids, full.ids) for run, full in zip(runs, fulls, strict=True)):.2f}",
            )
    console.print()
    console.print(table)
    for backbone, answers in compared:
        early = answers[0][1]
        blocks = ", ".join(map(str, early.thresholds))
        console.print(Text(f"{backbone.name}: exits after blocks {blocks}; policy: {early.policy}.", "dim"))
    console.print(Text("Consistency: token F1 with the full-depth answer.", "dim"))


LOSS_LABELS = {"f1": "1 − token F1", "exact": "answers that differ", "task": "lost task score"}


def calibration_table(record: Calibration, exits: Exits, folder: Path) -> None:
    """The policies that were tested, and the guarantee, or why there is none."""
    loss = LOSS_LABELS[record.loss]
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


WORSE = 0.02  # the share by which tuning may raise the perplexity without a warning


def tuning_table(record: dict[str, Any], folder: Path) -> None:
    """How often each block, read out by the model's own head, agrees with the untuned full depth, before and after."""
    before, after = record["held_out"]["before"], record["held_out"]["after"]
    table = Table(title=f"{folder}: agreement with the untuned model, on held-out answers of its own", title_justify="left")
    for column in ("after block", "before", "after"):
        table.add_column(column, justify="right")
    for block, (old, new) in enumerate(zip(before["agreement"], after["agreement"], strict=True), start=1):
        table.add_row(str(block), f"{old:.0%}", f"{new:.0%}")
    console.print(table)
    change = after["perplexity"] / before["perplexity"] - 1
    console.print(
        f"Perplexity of those answers at full depth: {before['perplexity']:.3f} before, {after['perplexity']:.3f} after "
        f"({change:+.1%}).",
        soft_wrap=True,
    )
    if change > WORSE:
        hint = "Try a lower --learning-rate or --exit-scale, or more prompts."
        console.print(
            f"[yellow]That is more than {WORSE:.0%} worse, too much for what early blocks gain.[/] {hint}", soft_wrap=True
        )
    console.print(f"This is another model now. Exits for it: offramp train {folder} -o DIR", soft_wrap=True)


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
        areas = (f"{row['gate_auroc']:.3f}", f"{row['key_auroc']:.3f}")
        table.add_row(str(row["block"]), f"{row['tail'] or ''}", f"{row['agreement']:.1%}", *areas, rule)
    console.print(table)
    note = "Gate and key rank the tokens by how sure the exit is: the gate before it reads out, the key afterwards."
    console.print(Text(f"{note} 0.3+0.9: leaves if the gate is above 0.3 and the key above 0.9.", "dim"))
    verified = " --fill verify" if exits.config.readout == "deep" else ""  # deep read-outs are for drafts
    minutes = exits.training["seconds"] / 60
    console.print(Text(f"{minutes:.1f} minutes. Try: offramp demo --exits {folder}{verified}", "dim"))


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
        ("compiled blocks multiply with", facts.kernels or "nothing: no compiled library"),
        ("exits", _places(facts.exits["layers"], facts.exits["tails"]) if facts.exits else "none"),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)
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
        "can save. verify: drafts by an exit as `offramp train --draft` makes it; a chunk that costs more counts as more "
        "bytes."
    )
    console.print(Text(note, "dim"))


def _places(layers: list[int], tails: list[int]) -> str:
    """Where exits are, in words: "after blocks 10 + 4, 20 + 3"."""
    return "after blocks " + ", ".join(
        f"{layer} + {tail}" if tail else str(layer) for layer, tail in zip(layers, tails, strict=True)
    )


_KIND = {"mamba": "Mamba", "both": "attention and Mamba", "neither": "neither attention nor Mamba"}


def bench_table(result: Comparison) -> None:
    """What `bench.compare` measured."""
    runs = f"{result.what}, {result.tokens} tokens{penalty_words(result.repetition_penalty)}, {result.pairs} pairs"
    table = Table(title=f"{result.model}, {runs}", title_justify="left")
    for title in ("", "weights", "tokens/s", "ms a token"):
        table.add_column(title, justify="left" if title in ("", "weights") else "right")
    for side in (result.ours, result.theirs):
        rate = side.tokens_per_second
        table.add_row(side.name, side.weights, f"{rate:.1f}", f"{1000 / rate:.1f}")
    console.print(table)
    low, high = result.spread
    console.print(f"ratio {result.ratio:.2f} (pairs from {low:.2f} to {high:.2f})")
    if result.parts_ms:
        console.print(Text(f"offramp, ms a token: {_listed(result.parts_ms)}", "dim"))
    console.print(Text(_listed(result.machine), "dim"))


def fills_table(result: FillComparison) -> None:
    """What `bench.compare_fills` measured."""
    penalty = penalty_words(result.repetition_penalty)
    runs = f"{result.prompts} prompts, up to {result.tokens} tokens{penalty}, {result.pairs} pairs"
    table = Table(title=f"{result.model}, {result.weights}, {runs}", title_justify="left")
    titles = ("", "tokens/s", "ratio", "pairs from–to", "equal", "mean blocks", "tokens a deep pass", "acceptance")
    for title in titles:
        table.add_column(title, justify="right" if title else "left")
    for name, fill in result.fills.items():
        low, high = fill.spread
        accepted = "" if fill.acceptance_rate is None else f"{fill.acceptance_rate:.0%}"
        table.add_row(
            name,
            f"{fill.tokens_per_second:.1f}",
            f"{fill.ratio:.2f}",
            f"{low:.2f}–{high:.2f}",
            f"{fill.equal:.0%}",
            f"{fill.mean_blocks:.1f}",
            f"{fill.tokens_per_deep_pass:.2f}",
            accepted,
        )
    console.print(table)
    for name, fill in result.fills.items():
        console.print(Text(f"{name}, ms a token: {_listed(fill.parts_ms)}", "dim"))
    console.print(Text(_listed(result.machine), "dim"))


def _listed(items: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}" for key, value in items.items())
