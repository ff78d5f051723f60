"""What a person sees in the terminal: answers coloured by exit, and small tables."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from offramp.backbone import Backbone
from offramp.engine import Generation, Token
from offramp.exits import Exits, ExitsConfig, suggested_layers
from offramp.flops import Costs, exit_part
from offramp.metrics import token_f1

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


def answer_in_colour(question: str, full: Generation, early: Generation) -> None:
    """A question, its answer at full depth, and its answer with exits, each token in its exit's colour."""
    console.print(Text(f"\n{question}", "bold"))
    console.print(Text("full depth  ", "dim") + Text(full.text.strip()), soft_wrap=True)
    coloured = Text("with exits  ", "dim")
    for token in early.tokens:
        coloured.append(token.text, _colour(token.exit_block, early.blocks))
    console.print(coloured, soft_wrap=True)
    left = [f"{token.exit_block}" for token in early.tokens]
    console.print(Text(f"left after  {' '.join(left)}", "dim"), soft_wrap=True)


def comparison_table(backbone: Backbone, pairs: list[tuple[Generation, Generation]]) -> None:
    """Full depth beside exits, over all answers (rates are medians, the rest means)."""
    table = Table(title=f"{backbone.name}, {backbone.weight_format}, fill {pairs[0][1].fill}", title_justify="left")
    for column in ("", "tokens/s", "mean blocks run", "FLOPs saved", "consistency"):
        table.add_column(column, justify="right" if column else "left")
    for name, side in (("full depth", 0), ("with exits", 1)):
        runs = [pair[side] for pair in pairs]
        table.add_row(
            name,
            f"{median(run.decode_tokens_per_second for run in runs):.1f}",
            f"{mean(run.mean_blocks for run in runs):.1f} of {backbone.n_blocks}",
            f"{mean(run.flops_saved for run in runs):.1%}",
            f"{mean(token_f1(run.ids, full.ids) for run, (full, _) in zip(runs, pairs, strict=True)):.2f}",
        )
    console.print()
    console.print(table)
    thresholds = ", ".join(f"{threshold:g} at block {block}" for block, threshold in pairs[0][1].thresholds.items())
    console.print(Text(f"thresholds: {thresholds}. Consistency: token F1 with the full-depth answer.", "dim"))


def training_table(exits: Exits, folder: Path) -> None:
    table = Table(title=f"Exits in {folder}, on held-out text", title_justify="left")
    for column in ("after block", "agrees with full depth", "gate AUROC", "default threshold"):
        table.add_column(column, justify="right")
    for row, threshold in zip(exits.training["validation"], exits.thresholds, strict=True):
        shown = "closed" if threshold >= 1 else f"{threshold:.3f}"
        table.add_row(str(row["block"]), f"{row['agreement']:.1%}", f"{row['gate_auroc']:.3f}", shown)
    console.print(table)
    console.print(Text(f"{exits.training['seconds'] / 60:.1f} minutes. Try: offramp demo --exits {folder}", "dim"))


def anatomy(backbone: Backbone, exits: Exits | None, context: int = 256) -> dict[str, Any]:
    """A model's parts and their costs, in parameters, and in blocks: FLOPs over those of a mean block at this context."""
    costs = Costs(backbone)
    per_block = [sum(parameter.numel() for parameter in block.parameters()) for block in backbone.blocks]
    flops = [costs.block(index, context) for index in range(backbone.n_blocks)]
    block = mean(flops)
    layers = list(suggested_layers(backbone.n_blocks))
    parts = exits or Exits.new(backbone, ExitsConfig(tuple(layers)))
    first = next(iter(parts))
    return {
        "model": backbone.name,
        "sha256": backbone.source.sha256,
        "model_type": backbone.config.model_type,
        "weight_format": backbone.weight_format,
        "blocks": backbone.n_blocks,
        "hidden_size": backbone.hidden_size,
        "vocab_size": backbone.vocab_size,
        "context": backbone.context,
        "parameters": sum(parameter.numel() for parameter in backbone.model.parameters()),
        "parameters_per_block": per_block,
        "kinds": backbone.kinds,
        "cost_context": context,
        "block_flops": flops,
        "head_in_blocks": costs.head / block,
        "gate": parts.config.gate,
        "gate_in_blocks": exit_part(first.gate) / block,
        "readout": parts.config.readout,
        "readout_in_blocks": exit_part(first.adapter) / block,
        "fill_project_in_blocks": costs.fill_project / block,
        "suggested_layers": layers,
        "exits": None if exits is None else {"layers": list(exits.config.layers), "thresholds": list(exits.thresholds)},
    }


def anatomy_table(facts: dict[str, Any]) -> None:
    table = Table(title=f"{facts['model']} ({facts['model_type']}, {facts['weight_format']})", title_justify="left")
    table.add_column("part")
    table.add_column("", justify="right")
    sizes = facts["parameters_per_block"]
    spread = f"{sizes[0]:,}" if len(set(sizes)) == 1 else f"{min(sizes):,} to {max(sizes):,}"
    exits = facts["exits"]
    rows = [
        ("blocks", f"{facts['blocks']} × {facts['kinds'][0]}"),
        (
            "hidden size, vocabulary, context",
            f"{facts['hidden_size']:,}, {facts['vocab_size']:,}, {facts['context']:,}",
        ),
        ("parameters", f"{facts['parameters']:,}"),
        ("parameters per block", spread),
        ("one LM head call", f"{facts['head_in_blocks']:.2f} blocks"),
        (f"one gate ({facts['gate']})", f"{facts['gate_in_blocks']:.3f} blocks"),
        (f"one read-out adapter ({facts['readout']})", f"{facts['readout_in_blocks']:.3f} blocks"),
        ("the project fill, per skipped block", f"{facts['fill_project_in_blocks']:.3f} blocks"),
        ("exits would go after blocks", ", ".join(map(str, facts["suggested_layers"]))),
        ("exits found", "none" if exits is None else "after blocks " + ", ".join(map(str, exits["layers"]))),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(Text(f"Costs are FLOPs at a context of {facts['cost_context']} tokens, in units of a mean block.", "dim"))


def bench_table(result: dict[str, Any]) -> None:
    """What `bench.compare` found."""
    table = Table(title=f"{result['model']}, {result['tokens']} tokens, {result['pairs']} pairs", title_justify="left")
    for title in ("", "weights", "tokens/s", "ms a token"):
        table.add_column(title, justify="left" if title in ("", "weights") else "right")
    for side in ("ours", "theirs"):
        one = result[side]
        rate = one["tokens_per_second"]
        table.add_row(one["name"], one["weights"], f"{rate:.1f}", f"{1000 / rate:.1f}")
    console.print(table)
    low, high = result["spread"]
    console.print(f"ratio {result['ratio']:.2f} (pairs from {low:.2f} to {high:.2f})")
    parts = ", ".join(f"{part} {milliseconds:.2f}" for part, milliseconds in result["parts_ms"].items())
    console.print(Text(f"of ours, ms a token: {parts}", "dim"))
    console.print(Text(", ".join(f"{key} {value}" for key, value in result["machine"].items()), "dim"))
