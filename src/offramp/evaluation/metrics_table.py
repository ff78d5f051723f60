"""The metrics of Results in one table: the screen, the JSON files and the report read names and formats from here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """A task's score, or a measure of how an answer compares with full depth and what it cost.

    `name` is its key in JSON, `label` what people read. `better` says which way is better. `format` is that of `show`.
    `score`: it is a task's score. `report`: the report's table has a column for it. `line`: `offramp eval` prints it.
    """

    name: str
    label: str
    unit: str = ""
    better: Literal["higher", "lower"] = "higher"
    format: Literal["number", "percent", "millions"] = "number"
    score: bool = False
    report: bool = True
    line: bool = False

    def show(self, value: float) -> str:
        """A value as people read it."""
        if self.format == "millions":
            return f"{value / 1e6:,.0f} M"
        if self.format == "percent":
            return f"{value:.1%}"
        return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


# Figures show the first of a task's scores in this table.
_TABLE = (
    Metric("f1", "F1", score=True, line=True),
    Metric("exact_match", "exact match", score=True, line=True),
    Metric("rougeL_max", "ROUGE-L", score=True, line=True),
    Metric("rouge1_max", "ROUGE-1", score=True),
    Metric("rouge1_acc", "ROUGE-1 accuracy", score=True, line=True),
    Metric("rouge1_diff", "ROUGE-1 difference", score=True, report=False),
    Metric("rougeL_diff", "ROUGE-L difference", score=True),
    Metric("rougeL_acc", "ROUGE-L accuracy", score=True, report=False),
    Metric("bleu_max", "BLEU", score=True),
    Metric("bleu_diff", "BLEU difference", score=True, report=False),
    Metric("bleu_acc", "BLEU accuracy", score=True, line=True),
    Metric("pass@1", "pass@1", score=True, line=True),
    Metric("mc2", "MC2", score=True, line=True),
    Metric("mc1", "MC1", score=True, line=True),
    Metric("token_f1", "consistency (token F1)", line=True),
    Metric("same_answer", "same answer", line=True),
    Metric("same_choice", "same choice", line=True),
    Metric("rouge_l", "ROUGE-L with full depth"),
    Metric("mean_blocks", "mean blocks run", "blocks", "lower", line=True),
    Metric("flops_saved", "FLOPs saved", format="percent", line=True),
    Metric("flops_per_token", "FLOPs a token", "FLOPs", "lower", format="millions"),
    Metric("flops_per_request", "FLOPs a request", "FLOPs", "lower", format="millions"),
    Metric("prefill_seconds", "prefill, s", "s", "lower"),
    Metric("decode_seconds", "decode, s", "s", "lower"),
    Metric("tokens", "tokens", "tokens", report=False),
    Metric("tokens_per_second", "tokens/s", "tokens/s", line=True),
)
METRICS = {metric.name: metric for metric in _TABLE}


def metrics_of(names: Iterable[str]) -> list[Metric]:
    """The metrics of these names, in the table's order. One that it lacks comes first: a score of somebody's own task."""
    given = list(names)
    own = [Metric(name, name, score=True, line=True) for name in given if name not in METRICS]
    return own + [metric for metric in _TABLE if metric.name in given]
