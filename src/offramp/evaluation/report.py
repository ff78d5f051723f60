"""An HTML page made from Results of `offramp eval`: one file that fetches nothing. Its figures lie beside it as SVG.

First comes an overview, with a figure for each task. A section for each model and task is folded under its title; what is
typed into the search box shows the conditions whose names have all its words.

Everything that must be read is in text and tables. Figures use colours that colour-blind readers can tell apart (Okabe and
Ito), and a marker for each curve. Lines and letters take the colour of the page's text, so that figures can be read in the
dark.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from hashlib import sha256
from html import escape
from itertools import groupby, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from offramp.errors import BadInput
from offramp.evaluation.metrics_table import METRICS, Metric, metrics_of
from offramp.evaluation.results import Interval, Result, ScoredAnswer, difference, penalty_words
from offramp.files import install_hint, write_atomically

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vPX"
INK = "#010203"  # stands for the colour of the page's text
GREY = "#888888"
MOST_CURVES = 12  # curves that a figure shows by name
CONSISTENT = 0.9  # the consistency at which curves are compared


def write(results: list[Result], page: Path) -> list[Path]:
    """Write the page, and its figures to a folder beside it. Returns the figures' paths.

    Raises `BadInput` where `matplotlib` is missing, for no results, and for Results that lack something.
    """
    if not results:
        raise BadInput("There are no results to report.", "Name files that offramp eval --json wrote.")
    figures: dict[str, str] = {}
    try:
        groups = _grouped(results)
        body = f"""<h1>Early exits: what they keep and what they save</h1>
<p>{escape(_intro(results))}</p>
{_overview(groups, figures)}
{_SEARCH}
{"".join(_section(*group, figures) for group in groups)}
<details id="run"><summary><h2>What was run</h2></summary>
{_runs(results)}</details>"""
    except KeyError as error:
        raise BadInput(
            f"A Result lacks something that the page shows: {error}.",
            "Was it made by another version? Run offramp eval again.",
        ) from error
    write_atomically(page, f"{_HEAD}<main>\n{body}\n</main>\n{_SCRIPT}</body>\n</html>\n".encode())
    folder = page.with_name(f"{page.stem}-figures")
    for name, svg in figures.items():
        write_atomically(folder / f"{name}.svg", svg.replace("currentColor", "#222").encode())
    return [folder / f"{name}.svg" for name in figures]


def _grouped(results: list[Result]) -> list[tuple[str, str, list[Result]]]:
    """Anchor, title and Results of each section.

    Results of a section can be compared: one model in one weight format, the same questions, times on one machine.
    """

    def key(result: Result) -> str:
        model, task, machine = result.model, result.task, result.machine
        same = [model.name, task.name, asdict(model), asdict(result.reference), task.sha256, task.max_tokens, task.batch]
        same += [task.repetition_penalty, machine["processor"], machine["threads"], [item.id for item in result.items]]
        return json.dumps(same)

    sections: list[tuple[str, str, list[Result]]] = []
    for number, (_, group) in enumerate(groupby(sorted(results, key=key), key=key)):
        members = list(group)
        model, task = members[0].model, members[0].task
        title = f"{model.name} on {task.name}{penalty_words(task.repetition_penalty)}"
        anchor = "".join(character if character.isalnum() else "-" for character in title.replace(" on ", "-"))
        if any(earlier.startswith(title) for _, earlier, _ in sections):
            title += f", {model.weights}, {task.questions} questions"
            anchor += f"-{number}"
        sections.append((anchor, title, members))
    return sections


def _intro(results: list[Result]) -> str:
    questions = sum(result.task.questions for result in results)
    models = ", ".join(sorted({result.model.name for result in results}))
    return (
        f"{len(results)} conditions, {questions} answers; models: {models}. Bars, and the small print in tables, are 95% "
        "intervals, by bootstrap over questions. Consistency is token F1 with the full model's answer. Large hollow marks "
        "are the exits' own thresholds, calibrated or by default."
    )


def _overview(groups: list[tuple[str, str, list[Result]]], figures: dict[str, str]) -> str:
    """A figure for each task that asks for answers: every condition of every model, and the best of each model."""
    tasks: dict[str, list[tuple[str, list[Result]]]] = {}
    for _, title, results in groups:
        if "token_f1" in results[0].summary:
            task = results[0].task.name
            tasks.setdefault(task, []).append((title.replace(f" on {task}", ""), results))
    parts = []
    for task, models in tasks.items():
        figures[f"overview-{task}"] = svg = _fronts(models)
        caption = f"{task}: consistency against FLOPs saved. A dot is a condition; lines join each model's best ones."
        parts.append(f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>")
    return "\n".join(parts)


def _front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (x, y) that none exceeds in both, by rising x."""
    best: list[tuple[float, float]] = []
    for point in sorted(points, reverse=True):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best[::-1]


def _fronts(models: list[tuple[str, list[Result]]]) -> str:
    """A figure of consistency against FLOPs saved: a colour for each model."""

    def place(result: Result) -> tuple[float, float]:
        return result.summary["flops_saved"].mean, result.summary["token_f1"].mean

    def draw(axes: Any) -> None:
        for index, (name, results) in enumerate(models):
            style = {"color": COLOURS[index % 6], "marker": MARKERS[index % 7]}
            points = [place(result) for result in results]
            axes.plot(*zip(*points, strict=True), **style, linestyle="none", markersize=3, alpha=0.6)
            axes.plot(*zip(*_front(points), strict=True), color=style["color"], linewidth=1.4)
            axes.plot([], [], **style, linewidth=1.4, markersize=4, label=name)
            for result in filter(_own, results):
                axes.plot(*place(result), **style, markersize=10, markerfacecolor="none", linestyle="none")
        lowest = min((place(result)[0] for _, results in models for result in results), default=0.0)
        axes.set(xlabel=METRICS["flops_saved"].label, ylabel=METRICS["token_f1"].label)
        # Confidences that read out at every exit cost several times full depth.
        axes.set_xlim(left=max(lowest - 0.02, -0.1))

    return _figure(draw)


def _section(anchor: str, title: str, results: list[Result], figures: dict[str, str]) -> str:
    """A section of the page. Its figures are added to `figures`."""
    parts = [f'<details id="{anchor}"><summary><h2>{escape(title)}</h2></summary>', _about(results[0])]
    answered = "flops_per_token" in results[0].summary  # not for multiple choice
    if answered:
        quality = _quality(results[0])
        leading = _leading(results)
        if len(leading) < len(results):
            parts.append(f"<p>{_LEADING}</p>")
        drawn = {
            "cost": (_pareto(results, "flops_per_token", quality), f"{quality.label} against FLOPs a token"),
            "latency": (_pareto(results, "tokens_per_second", quality), f"{quality.label} against speed"),
            "consistency": (_pareto(results, "flops_saved", METRICS["token_f1"]), "Consistency against FLOPs saved"),
            "depth": (_pareto(results, "mean_blocks", METRICS["token_f1"]), "Consistency against mean blocks run"),
            "positions": (_positions(leading), "Where tokens leave, by their place in the answer"),
        }
        for name, (svg, caption) in drawn.items():
            figures[f"{anchor}-{name}"] = svg
            parts.append(f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>")
        parts.append(_at_consistency(results))
    parts.append(_table(results))
    if answered:
        parts.append(_answers(leading))
    return "\n".join([*parts, "</details>"])


def _about(first: Result) -> str:
    note = f" <strong>{escape(first.task.note)}.</strong>" if first.task.note else ""
    reference = first.reference
    comparison = f" Compared with {escape(reference.name)} at full depth." if reference != first.model else ""
    about = f"{first.task.questions} questions, {first.model.weights} weights."
    if first.task.batch > 1:
        about += f" {first.task.batch} answers side by side; times are their shares."
    return f"<p>{escape(about)}{note}{comparison}</p>"


def _columns(result: Result) -> list[Metric]:
    """The metrics of a result that the report's table has a column for."""
    return [metric for metric in metrics_of(result.summary) if metric.report]


def _quality(result: Result) -> Metric:
    """The score that figures show."""
    scores = [metric for metric in _columns(result) if metric.score]
    if not scores:
        raise KeyError(f"a score of {result.task.name}")
    return scores[0]


def _curves(results: list[Result]) -> list[tuple[str, list[Result]]]:
    """Groups of conditions that differ only in their thresholds: a curve for each kind of exits, fill and gate, full depth
    first.

    Conditions under the exits' own policy, calibrated or not, are in their gate's curve.
    """

    def label(result: Result) -> str:
        condition, policy = result.condition, result.condition.policy
        if policy is None:
            return "full depth"
        extras = [] if _own(result) else policy.extras
        words = ", ".join([condition.fill or "", policy.confidence_name(condition.gate or ""), *extras])
        return f"{condition.label}: {words}" if condition.label else words

    return sorted(
        ((name, list(curve)) for name, curve in groupby(sorted(results, key=label), key=label)),
        key=lambda curve: curve[0] != "full depth",
    )


_LEADING = (
    "There are more curves than a figure can name. For each fill and gate, figures and answers show by name the exits that "
    f"save most at a consistency of {CONSISTENT:g}. Grey dots are all others. The table has every condition."
)


def _leading(results: list[Result]) -> list[Result]:
    """The conditions that figures show by name: all, or for each fill and gate those of the exits that save most."""
    curves = _curves(results)
    if len(curves) <= MOST_CURVES:
        return results

    def saved(curve: list[Result]) -> float:
        counted = [each for each in curve if each.summary["token_f1"].mean >= CONSISTENT and not _own(each)]
        return max((each.summary["flops_saved"].mean for each in counted), default=-math.inf)

    best: dict[str, list[Result]] = {}
    for name, curve in curves:
        kind = name.removeprefix(f"{curve[0].condition.label}: ")
        best[kind] = max(best.get(kind, curve), curve, key=saved)
    return [result for curve in best.values() for result in curve]


def _own(result: Result) -> bool:
    """Whether thresholds were the exits' own, by calibration or by default."""
    return result.condition.calibration is not None


def _examples(results: list[Result]) -> dict[str, Result]:
    """One condition of each curve: of those with a token F1 of at least 0.5, the one whose tokens leave earliest."""
    found = {}
    for name, curve in _curves(results):
        early = [result for result in curve if result.condition.policy]
        kept = [result for result in early if result.summary["token_f1"].mean >= 0.5] or early
        if kept:
            found[name] = min(kept, key=lambda result: result.summary["mean_blocks"].mean)
    return found


def _figure(draw: Callable[[Any], None]) -> str:
    try:
        import matplotlib
    except ImportError as error:
        raise BadInput("The library matplotlib is not installed.", install_hint("eval")) from error
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    ink = {f"{part}.color": INK for part in ("text", "xtick", "ytick")} | {"axes.labelcolor": INK, "axes.edgecolor": INK}
    look = {"svg.fonttype": "none", "svg.hashsalt": "offramp", "font.family": "sans-serif", "font.size": 10}
    with matplotlib.rc_context(ink | look):
        figure = Figure(figsize=(5.2, 3.5), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        _, labels = axes.get_legend_handles_labels()
        columns = 2 if max(map(len, labels)) <= 36 else 1
        figure.set_figheight(3.5 + 0.2 * -(-len(labels) // columns))
        figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    svg = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", buffer.getvalue())  # half the size
    svg = svg[svg.index("<svg") :].replace("fill: #ffffff", "fill: none").replace(INK, "currentColor")
    return _smaller(svg)


def _smaller(svg: str) -> str:
    """A figure without what nobody sees, and whose styles are rules with names instead of being repeated at each mark."""
    svg = re.sub(r' transform="rotate\(-0 [^"]*"|(?<=<g) id="[^"]*"|\s*\n\s*(?=<)', "", svg)
    names = {style: f"s{sha256(style.encode()).hexdigest()[:6]}" for style in re.findall(r' style="([^"]*)"', svg)}
    svg = re.sub(r' style="([^"]*)"', lambda match: f' class="{names[match[1]]}"', svg)
    rules = "".join(f".{name}{{{style}}}" for style, name in names.items())
    return svg.replace("<defs>", f"<defs><style>{rules}</style>", 1)


def _pareto(results: list[Result], x: str, quality: Metric) -> str:
    """A figure of a quality, with intervals, against metric x: one curve for each fill and gate, or for those that lead."""
    leading = _leading(results)
    named = set(map(id, leading))
    others = [result for result in results if id(result) not in named]
    million, y = METRICS[x].format == "millions", quality.name
    scale = 1e-6 if million else 1.0

    def draw(axes: Any) -> None:
        if others:
            places = [[each.summary[name].mean for each in others] for name in (x, y)]
            axes.plot([scale * value for value in places[0]], places[1], ".", color=GREY, markersize=3, label="all others")
        for index, (name, curve) in enumerate(_curves(leading)):
            style = {"color": COLOURS[index % 6], "marker": MARKERS[index % 7]}
            points = sorted((result for result in curve if not _own(result)), key=lambda result: result.summary[x].mean)
            across = [scale * result.summary[x].mean for result in points]
            up = [result.summary[y] for result in points]
            # The mean of few answers may lie a hair outside the resampled ones.
            below = [max(0.0, value.mean - value.low) for value in up]
            above = [max(0.0, value.high - value.mean) for value in up]
            means = [value.mean for value in up]
            bars = {"linewidth": 1.4, "markersize": 5, "capsize": 2, "elinewidth": 0.8}
            axes.errorbar(across, means, [below, above], label=name, **style, **bars)
            for result in filter(_own, curve):
                place = scale * result.summary[x].mean, result.summary[y].mean
                axes.plot(*place, **style, markersize=10, markerfacecolor="none", linestyle="none")
        axes.set(xlabel=("million " if million else "") + METRICS[x].label, ylabel=quality.label)

    return _figure(draw)


def _positions(results: list[Result]) -> str:
    """A figure of the blocks run for the first, second, … token of an answer, on average."""
    shown = _examples(results) or {"full depth": results[0]}

    def draw(axes: Any) -> None:
        for index, (label, result) in enumerate(shown.items()):
            exits = [item.exits for item in result.items if isinstance(item, ScoredAnswer)]
            longest = max(map(len, exits))
            # Only as far as a tenth of the answers go.
            places = [place for place in range(longest) if 10 * sum(len(blocks) > place for blocks in exits) >= len(exits)]
            means = [fmean(blocks[place] for blocks in exits if len(blocks) > place) for place in places]
            style = {"color": COLOURS[index % 6], "marker": MARKERS[index % 7]}
            axes.plot([place + 1 for place in places], means, label=label, markersize=3, linewidth=1.2, **style)
        axes.set(xlabel="token of the answer", ylabel="mean blocks run", ylim=(0, results[0].blocks * 1.05))

    return _figure(draw)


def at_consistency(results: list[Result], wanted: float, names: Sequence[str]) -> dict[str, list[float]]:
    """For each curve that falls to this consistency, what `crossing` gives. Exits' own policies are left out."""
    full = [result for result in results if result.condition.policy is None]
    found = {}
    for label, curve in _curves(results):
        early = [result for result in curve if result.condition.policy and not _own(result)]
        if point := crossing([*full, *early], wanted, names):
            found[label] = point
    return found


def crossing(results: list[Result], wanted: float, names: Sequence[str]) -> list[float] | None:
    """The means of these metrics where a curve falls to this consistency; None for one that does not.

    `results` is full depth, and the curve's conditions. A value is interpolated in a straight line between the conditions
    whose consistency is nearest, above and below.
    """
    full, *curve = results
    curve.sort(key=lambda result: -result.summary["token_f1"].mean)
    points = [[each.summary[name].mean for name in ("token_f1", *names)] for each in (full, *curve)]
    for before, after in pairwise(points):
        if before[0] >= wanted > after[0]:
            share = (before[0] - wanted) / (before[0] - after[0])
            return [a + share * (b - a) for a, b in zip(before[1:], after[1:], strict=True)]
    return None


def _at_consistency(results: list[Result], wanted: float = CONSISTENT) -> str:
    """The costs of each curve where it falls to this consistency, as a table."""
    metrics = [METRICS[name] for name in ("mean_blocks", "flops_saved", "tokens_per_second")]
    found = at_consistency(results, wanted, [metric.name for metric in metrics])
    if not found:
        return ""
    full = [result for result in results if result.condition.policy is None]
    rows = [("full depth", [result.summary[metric.name].mean for metric in metrics]) for result in full]
    lines = []
    for title, point in [*rows, *found.items()]:
        cells = "".join(f"<td>{metric.show(value)}</td>" for metric, value in zip(metrics, point, strict=True))
        lines.append(f"<tr><th>{escape(title)}</th>{cells}</tr>")
    head = "".join(f"<th>{escape(metric.label)}</th>" for metric in metrics)
    about = f"Where consistency falls to {wanted:g}, in a straight line between the conditions measured; no intervals."
    table = f'<div class="wide"><table><tr><th></th>{head}</tr>{"".join(lines)}</table></div>'
    return f"<h3>At consistency {wanted:g}</h3><p>{about}</p>{table}"


def _table(results: list[Result]) -> str:
    """Every condition with all its metrics, and its first score's difference from full depth's."""
    metrics, first = _columns(results[0]), _quality(results[0])
    full = next((result.items for result in results if result.condition.policy is None), None)
    head = f"<th>{escape(first.label)} less full depth's, on the same questions</th>" if full else ""
    head += "".join(f"<th>{escape(metric.label)}</th>" for metric in metrics)

    def deepest_first(result: Result) -> float:
        return -result.summary["mean_blocks"].mean if "mean_blocks" in result.summary else 0.0

    rows = []
    for _, curve in _curves(results):
        for result in sorted(curve, key=deepest_first):
            cells = _cell(first, difference(result.items, full, first.name, result.seed)) if full else ""
            cells += "".join(_cell(metric, result.summary[metric.name]) for metric in metrics)
            rows.append(f'<tr class="condition"><th>{escape(result.condition.name)}</th>{cells}</tr>')
    return f'<div class="wide"><table><tr><th>condition</th>{head}</tr>{"".join(rows)}</table></div>'


def _cell(metric: Metric, value: Interval) -> str:
    return f"<td>{metric.show(value.mean)}<br><small>{metric.show(value.low)} – {metric.show(value.high)}</small></td>"


def _answers(results: list[Result], count: int = 3) -> str:
    """The first few answers of one condition of each curve, with each token in the shade of the block where it left."""
    early = [
        (result.condition.name, [item for item in result.items if isinstance(item, ScoredAnswer)])
        for result in _examples(results).values()
    ]
    if not early:
        return ""
    blocks = results[0].blocks
    parts = [
        f"<h3>Some answers</h3><p>The first {count} questions, under one condition of each curve: the earliest to leave of"
        " those that keep half of full depth's tokens. The darker a token's mark, the earlier it left; the block is"
    ]
    parts.append(" in its tooltip, and below the answer for tokens that left early.</p>")
    for number, question in enumerate(early[0][1][:count]):
        full = f"<div><dt>full depth</dt><dd>{escape(question.full_text)}</dd></div>"
        parts.append(f'<h4>{escape(question.question)}</h4><dl class="side" tabindex="0">{full}')
        for name, items in early:
            item = items[number]
            spans = "".join(
                f'<span class="e{_shade(block, blocks)}" title="block {block}">{escape(piece)}</span>'
                for piece, block in zip(item.pieces, item.exits, strict=True)
            )
            early_tokens = [f"{place}: {block}" for place, block in enumerate(item.exits, start=1) if block < blocks]
            small = f"<br><small>left early, token: block — {', '.join(early_tokens)}</small>" if early_tokens else ""
            parts.append(f"<div><dt>{escape(name)}</dt><dd>{spans}{small}</dd></div>")
        parts.append("</dl>")
    return "\n".join(parts)


def _shade(block: int, blocks: int) -> int:
    """The number of a shade: 0 for full depth, 1 for a late exit, up to 4 for an early one."""
    return 0 if block >= blocks else 4 - min(3, 4 * block // blocks)


def _runs(results: list[Result]) -> str:
    """Each command, and the models, data, exits and machine that it ran with."""
    parts = []
    for command, group in groupby(results, key=lambda result: result.command):
        members = list(group)
        models = dict.fromkeys(
            f"{model.name}, {model.weights}, SHA-256 {model.sha256[:16]}"
            for result in members
            for model in (result.model, result.reference)
        )
        machines = dict.fromkeys(
            ", ".join(f"{name} {value}" for name, value in result.machine.items()) for result in members
        )
        data = dict.fromkeys(f"{result.task.source}, SHA-256 {result.task.sha256[:16]}" for result in members)
        exits = dict.fromkeys(json.dumps(result.exits) for result in members if result.exits)
        facts = {
            "models": "; ".join(models),
            "data": "; ".join(data),
            "exits": "; ".join(exits) or "none",
            "machine": "; ".join(machines),
            "peak memory": f"{max(result.peak_memory_bytes for result in members) / 2**30:.1f} GiB",
            "seed": str(members[0].seed),
        }
        rows = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
        parts.append(f"<pre>{escape(command)}</pre><dl>{rows}</dl>")
    return "\n".join(parts)


_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>offramp: early exits</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --ink: #222; --page: #fff; --line: #ccc; --mark: 0, 114, 178; }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --page: #181818; --line: #555; --mark: 86, 180, 233; } }
body { color: var(--ink); background: var(--page); font: 16px/1.5 system-ui, sans-serif; margin: 0; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem; }
figure { display: inline-block; width: min(100%, 28rem); margin: 0 0.5rem 1rem 0; vertical-align: top; }
figure svg { width: 100%; height: auto; }
figcaption { font-size: 0.9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: 0.3rem 0.5rem; text-align: right; }
th:first-child { text-align: left; min-width: 9rem; }
td small { white-space: nowrap; }
dt { font-size: 0.85rem; font-weight: 600; }
dd { margin: 0 0 0.5rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.side { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(14rem, 1fr); gap: 1rem; overflow-x: auto; }
summary { cursor: pointer; }
summary h2 { display: inline; }
details { margin: 0.7rem 0; }
input { font: inherit; color: inherit; background: var(--page); border: 1px solid var(--line); padding: 0.3rem 0.5rem; }
[hidden] { display: none; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
.e1 { background: rgba(var(--mark), 0.15); }
.e2 { background: rgba(var(--mark), 0.3); }
.e3 { background: rgba(var(--mark), 0.45); }
.e4 { background: rgba(var(--mark), 0.6); }
@media print { .find { display: none; } figure, tr, dl { break-inside: avoid; } .wide { overflow: visible; } }
</style>
</head>
<body>
"""

_SEARCH = """<p class="find"><label for="find">Find conditions</label>
<input id="find" type="search" placeholder="verify, mamba 0.9, …"> <output id="found" for="find"></output></p>"""

_SCRIPT = """<script>
const find = document.querySelector("#find"), sections = [...document.querySelectorAll("main > details")];
find.addEventListener("input", () => {
  const words = find.value.toLowerCase().split(/[\\s,]+/).filter(Boolean);
  let count = 0;
  for (const section of sections) {
    const rows = [...section.querySelectorAll("tr.condition")];
    for (const row of rows) row.hidden = !words.every(word => row.cells[0].textContent.toLowerCase().includes(word));
    const shown = rows.filter(row => !row.hidden).length;
    count += shown;
    section.hidden = words.length > 0 && shown === 0;
    section.open = words.length > 0 && shown > 0;
  }
  document.querySelector("#found").textContent = words.length ? `${count} found` : "";
});
const reveal = () => {
  const aim = document.getElementById(location.hash.slice(1));
  if (aim && "open" in aim) aim.open = true;
};
addEventListener("hashchange", reveal);
addEventListener("beforeprint", () => sections.forEach(section => { section.open = true; }));
reveal();
</script>
"""
