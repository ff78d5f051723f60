"""What a person sees in the terminal: answers coloured by exit, and small tables."""

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
from offramp.exits.exits import Exits, ExitsConfig, suggested_layers
from offramp.exits.policy import Policy
from offramp.metrics import token_f1
from offramp.model.backbone import Backbone
from offramp.model.costs import Costs
from offramp.model.families import UNBOUNDED
from offramp.training.calibration import Calibration

console = Console(highlight=False)
# From early to late; full depth has no colour of its own.
_COLOURS = ("green", "cyan", "yellow", "magenta")


def _colour(block: int, n_blocks: int) -> str:
    if block == n_blocks:
        return "default"
    return _COLOURS[min(len(_COLOURS) - 1, block * len(_COLOURS) // n_blocks)]


def shade(token: Token, n_blocks: int) -> str:
    """A token's text in the colour of the block it left at, as terminal codes (plain text where there is no terminal)."""
    with console.capture() as captured:
        console.print(Text(token.text, _colour(token.exit_block, n_blocks)), end="", soft_wrap=True)
    return captured.get()


def answer_in_colour(question: str, full: Generation, early: Generation, model: str | None = None) -> None:
    """A question, its answer at full depth, and its answer with exits, each token in its exit's colour."""
    console.print(Text(f"\n{question}", "bold") + Text(f"  {model}" if model else "", "dim"))
    console.print(Text("full depth  ", "dim") + Text(full.text.strip()), soft_wrap=True)
    coloured = Text("with exits  ", "dim")
    for token in early.tokens:
        coloured.append(token.text, _colour(token.exit_block, early.blocks))
    console.print(coloured, soft_wrap=True)
    left = [f"{token.exit_block}" for token in early.tokens]
    console.print(Text(f"left after  {' '.join(left)}", "dim"), soft_wrap=True)


def comparison_table(asked: list[tuple[Backbone, list[tuple[Generation, Generation]]]]) -> None:
    """Full depth beside exits, over all answers of each model (rates are medians, the rest means)."""
    names = " and ".join(f"{backbone.name}, {backbone.weight_format}" for backbone, _ in asked)
    table = Table(title=f"{names}, fill {asked[0][1][0][1].fill}", title_justify="left")
    for column in ("", "tokens/s", "mean blocks run", "FLOPs saved", "consistency"):
        table.add_column(column, justify="right" if column else "left")
    for backbone, pairs in asked:
        for name, side in (("full depth", 0), ("with exits", 1)):
            runs = [pair[side] for pair in pairs]
            table.add_row(
                f"{backbone.name}, {name}" if len(asked) > 1 else name,
                f"{median(run.decode_tokens_per_second for run in runs):.1f}",
                f"{mean(run.mean_blocks for run in runs):.1f} of {backbone.n_blocks}",
                f"{mean(run.flops_saved for run in runs):.1%}",
                f"{mean(token_f1(run.ids, full.ids) for run, (full, _) in zip(runs, pairs, strict=True)):.2f}",
            )
    console.print()
    console.print(table)
    for backbone, pairs in asked:
        thresholds = ", ".join(f"{threshold:g} at block {block}" for block, threshold in pairs[0][1].thresholds.items())
        console.print(Text(f"{backbone.name}: thresholds {thresholds}.", "dim"))
    console.print(Text("Consistency: token F1 with the full-depth answer.", "dim"))


def calibration_table(record: Calibration, exits: Exits, folder: Path) -> None:
    """The policies that were tested along the path, and what came of it."""
    what = {"f1": "1 − token F1", "exact": "answers that differ", "task": "lost task score"}[record.loss]
    table = Table(title=f"{record.n} prompts, fill {record.fill}, {record.weights}", title_justify="left")
    for column in ("thresholds", what, "p-value", "FLOPs saved", "mean blocks run", ""):
        table.add_column(column, justify="left" if column in ("thresholds", "") else "right")
    for one in record.tested:
        cells = (f"{one.loss:.3f}", f"{one.p_value:.2g}", f"{one.flops_saved:.1%}", f"{one.mean_blocks:.1f}")
        table.add_row(_thresholds(one.policy), *cells, "passed" if one.passed else "not passed")
    console.print(table)
    sure = f"with probability {1 - record.delta:g} over such prompts"
    if record.passed:
        console.print(f"{folder}: {what} is at most {record.risk:g} on average on new ones, {sure}.", soft_wrap=True)
        return
    console.print(
        f"No policy could be shown to keep the risk at {record.risk:g}: the exits in {folder} stay closed.", soft_wrap=True
    )
    if not record.tested:
        console.print(
            "On the pilot prompts none saved anything at twice the risk: better exits are needed.", soft_wrap=True
        )
    elif record.needed:
        count = math.ceil(record.needed * (record.n + record.pilot) / record.n)
        console.print(f"If losses stay as they were, about {count} prompts would have let the first pass.", soft_wrap=True)
    else:
        console.print("The first lost about as much or more: more prompts would not help.", soft_wrap=True)


def _thresholds(policy: Policy) -> str:
    shown = " ".join("closed" if threshold >= 1 else f"{threshold:g}" for threshold in policy.thresholds)
    others = f", decay {policy.decay:g}" if policy.decay else ""
    others += f", {policy.candidates} candidates" if policy.candidates else ""
    return f"{shown} ({policy.confidence}{others})"


WORSE = 0.02  # perplexity that a tuning may cost


def tuning_table(record: dict[str, Any], folder: Path) -> None:
    """How often each block, read out as it is, says what the untuned model says in the end: before and after."""
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


def result_line(result: dict[str, Any]) -> None:
    """One condition on one task, in a line: scores first, then how it compares with full depth and what it cost."""
    summary, task = result["summary"], result["task"]
    shown = {
        "exact_match": "EM",
        "f1": "F1",
        "rougeL_max": "ROUGE-L",
        "rouge1_acc": "ROUGE-1 acc",
        "bleu_acc": "BLEU acc",
        "mc1": "MC1",
        "mc2": "MC2",
        "same_choice": "same choice",
        "token_f1": "consistency",
        "same_answer": "same answer",
        "mean_blocks": f"blocks of {result['blocks']}",
        "flops_saved": "FLOPs saved",
        "tokens_per_second": "tokens/s",
    }
    parts = []
    for name, label in shown.items():
        if name in summary:
            digits = 1 if name in ("rougeL_max", "mean_blocks", "tokens_per_second") else 3
            mean, low, high = (f"{summary[name][part]:.{digits}f}" for part in ("mean", "low", "high"))
            parts.append(f"{label} {mean} ({low}–{high})")
    note = f" [{task['note']}]" if task["note"] else ""
    head = Text(f"{task['name']}, {task['questions']} questions{note}, {result['condition']['name']}: ", "bold")
    console.print(head + Text(", ".join(parts)), soft_wrap=True)


def training_table(exits: Exits, folder: Path) -> None:
    table = Table(title=f"Exits in {folder}, on held-out text", title_justify="left")
    for column in ("after block", "agrees with full depth", "gate AUROC", "default threshold"):
        table.add_column(column, justify="right")
    for row, threshold in zip(exits.training["validation"], exits.policy.thresholds, strict=True):
        shown = "closed" if threshold >= 1 else f"{threshold:.3f}"
        table.add_row(str(row["block"]), f"{row['agreement']:.1%}", f"{row['gate_auroc']:.3f}", shown)
    console.print(table)
    verified = " --fill verify" if exits.config.readout == "deep" else ""  # what such exits are for
    minutes = exits.training["seconds"] / 60
    console.print(Text(f"{minutes:.1f} minutes. Try: offramp demo --exits {folder}{verified}", "dim"))


def anatomy(backbone: Backbone, exits: Exits | None, context: int = 256) -> dict[str, Any]:
    """A model's parts and their costs, in parameters, and in blocks: FLOPs over those of a mean block at this context.

    Needs no weights: an `outline` will do. `leaving` says what a token costs that leaves at each exit, its gates and the
    `project` fill included.
    """
    costs = Costs(backbone)
    numbers = range(backbone.n_blocks)
    flops = [costs.block(index, context) for index in numbers]
    size = [costs.block_bytes(index, context) for index in numbers]
    filled = [keys + state for keys, state in zip(costs.project_keys, costs.project_state, strict=True)]
    block = mean(flops)
    layers = list(exits.config.layers if exits else suggested_layers(backbone.n_blocks))
    parts = exits or Exits.new(backbone, ExitsConfig(tuple(layers)))
    first = next(iter(parts))
    gate, readout = first.gate.flops(), first.adapter.flops()
    leaving = []
    for number, stop in enumerate([*layers, backbone.n_blocks]):
        passed = min(number + 1, len(layers))
        # A read-out that remembers sees every token that gets there; one that does not runs where the token leaves.
        readouts = passed if first.adapter.recurrent else int(stop < backbone.n_blocks)
        leaving.append(
            {
                "after_block": stop,
                "parameters": sum(_parameters(one) for one in backbone.blocks[:stop]),
                "flops": sum(flops[:stop]) + sum(filled[stop:]) + passed * gate + readouts * readout + costs.head,
                "bytes": sum(size[:stop]) + costs.head_bytes,
            }
        )
    return {
        "model": backbone.name,
        "sha256": backbone.source.sha256,
        "model_type": backbone.config.model_type,
        "weight_format": backbone.weight_format,
        "blocks": backbone.n_blocks,
        "hidden_size": backbone.hidden_size,
        "vocab_size": backbone.vocab_size,
        "context": backbone.context if backbone.context < UNBOUNDED else None,
        "parameters": _parameters(backbone.model),
        "parameters_per_block": [_parameters(one) for one in backbone.blocks],
        "kinds": backbone.kinds,
        "cost_context": context,
        "block_flops": flops,
        "block_bytes": size,
        "full_flops": costs.full(context),
        "head_in_blocks": costs.head / block,
        "gate": parts.config.gate,
        "gate_in_blocks": gate / block,
        "readout": parts.config.readout,
        "readout_in_blocks": readout / block,
        "fill_project_in_blocks": mean(filled) / block,
        "leaving": leaving,
        "suggested_layers": list(suggested_layers(backbone.n_blocks)),
        "exits": None
        if exits is None
        else {"layers": list(exits.config.layers), "thresholds": list(exits.policy.thresholds)},
    }


def _parameters(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def anatomy_table(facts: dict[str, Any]) -> None:
    table = Table(title=f"{facts['model']} ({facts['model_type']}, {facts['weight_format']})", title_justify="left")
    table.add_column("part")
    table.add_column("", justify="right")
    sizes = facts["parameters_per_block"]
    spread = f"{sizes[0]:,}" if len(set(sizes)) == 1 else f"{min(sizes):,} to {max(sizes):,}"
    kinds = Counter(facts["kinds"]).items()
    exits, context = facts["exits"], facts["context"]
    rows = [
        ("blocks", ", ".join(f"{count} × {_KIND.get(kind, kind)}" for kind, count in kinds)),
        (
            "hidden size, vocabulary, context",
            f"{facts['hidden_size']:,}, {facts['vocab_size']:,}, {f'{context:,}' if context else 'unbounded'}",
        ),
        ("parameters", f"{facts['parameters']:,}"),
        ("parameters per block", spread),
        ("one LM head call", f"{facts['head_in_blocks']:.2f} blocks"),
        (f"one gate ({facts['gate']})", f"{facts['gate_in_blocks']:.3f} blocks"),
        (f"one read-out adapter ({facts['readout']})", f"{facts['readout_in_blocks']:.3f} blocks"),
        ("the project fill, per skipped block", f"{facts['fill_project_in_blocks']:.3f} blocks"),
        ("exits found", "none" if exits is None else "after blocks " + ", ".join(map(str, exits["layers"]))),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    leaving = Table(title="A token that leaves there" if exits else "A token that would leave there", title_justify="left")
    for title in ("after block", "parameters", "GFLOPs", "of full depth", "GB moved"):
        leaving.add_column(title, justify="right")
    for one in facts["leaving"]:
        leaving.add_row(
            str(one["after_block"]),
            f"{one['parameters']:,}",
            f"{one['flops'] / 1e9:.3f}",
            f"{one['flops'] / facts['full_flops']:.0%}",
            f"{one['bytes'] / 1e9:.3f}",
        )
    console.print(leaving)
    context = facts["cost_context"]
    console.print(
        Text(
            f"Costs at a context of {context} tokens; a block is a mean block's FLOPs. GFLOPs count gates, read-outs, "
            "project fill and head, the last row with all exits tried in vain; GB the blocks that are run and the head.",
            "dim",
        )
    )


_KIND = {"mamba": "Mamba", "both": "attention and Mamba", "neither": "neither attention nor Mamba"}


def bench_table(result: dict[str, Any]) -> None:
    """What `bench.compare` found."""
    what = f"{result['what']}, {result['tokens']} tokens, {result['pairs']} pairs"
    table = Table(title=f"{result['model']}, {what}", title_justify="left")
    for title in ("", "weights", "tokens/s", "ms a token"):
        table.add_column(title, justify="left" if title in ("", "weights") else "right")
    for side in ("ours", "theirs"):
        one = result[side]
        rate = one["tokens_per_second"]
        table.add_row(one["name"], one["weights"], f"{rate:.1f}", f"{1000 / rate:.1f}")
    console.print(table)
    low, high = result["spread"]
    console.print(f"ratio {result['ratio']:.2f} (pairs from {low:.2f} to {high:.2f})")
    if result["parts_ms"]:
        console.print(Text(f"of ours, ms a token: {_listed(result['parts_ms'])}", "dim"))
    console.print(Text(_listed(result["machine"]), "dim"))


def fills_table(result: dict[str, Any]) -> None:
    """What `bench.compare_fills` found."""
    what = f"{result['prompts']} prompts, up to {result['tokens']} tokens, {result['pairs']} pairs"
    table = Table(title=f"{result['model']}, {result['weights']}, {what}", title_justify="left")
    titles = ("", "tokens/s", "ratio", "pairs from–to", "equal", "mean blocks", "tokens a deep pass", "acceptance")
    for title in titles:
        table.add_column(title, justify="right" if title else "left")
    for name, one in result["fills"].items():
        low, high = one["spread"]
        accepted = "" if one["acceptance_rate"] is None else f"{one['acceptance_rate']:.0%}"
        table.add_row(
            name,
            f"{one['tokens_per_second']:.1f}",
            f"{one['ratio']:.2f}",
            f"{low:.2f}–{high:.2f}",
            f"{one['equal']:.0%}",
            f"{one['mean_blocks']:.1f}",
            f"{one['tokens_per_deep_pass']:.2f}",
            accepted,
        )
    console.print(table)
    for name, one in result["fills"].items():
        console.print(Text(f"{name}, ms a token: {_listed(one['parts_ms'])}", "dim"))
    console.print(Text(_listed(result["machine"]), "dim"))


def _listed(items: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}" for key, value in items.items())
