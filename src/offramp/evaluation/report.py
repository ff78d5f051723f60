"""A page to look at from Results of `offramp eval`: one file, nothing fetched, its figures also as SVG files beside it.

What must be read is text and tables; figures use colours that colour-blind readers can tell apart (Okabe and Ito), and a
marker for each besides. Ink takes the page's colour, so that figures can be read in the dark.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from html import escape
from itertools import groupby, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from offramp.errors import BadInput
from offramp.evaluation.evaluation import difference
from offramp.files import write_atomically

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vPX"
INK = "#010203"  # stands for the colour of the page's text
# Scores by the one that a figure shows first; measures by what they are called.
QUALITY = {
    "f1": "F1",
    "exact_match": "exact match",
    "rougeL_max": "ROUGE-L",
    "rouge1_max": "ROUGE-1",
    "rouge1_acc": "ROUGE-1 accuracy",
    "rougeL_diff": "ROUGE-L difference",
    "bleu_max": "BLEU",
    "bleu_acc": "BLEU accuracy",
    "mc2": "MC2",
    "mc1": "MC1",
}
MEASURES = {
    "token_f1": "consistency (token F1)",
    "same_answer": "same answer",
    "same_choice": "same choice",
    "rouge_l": "ROUGE-L with full depth",
    "mean_blocks": "mean blocks run",
    "flops_saved": "FLOPs saved",
    "flops_per_token": "FLOPs a token",
    "flops_per_request": "FLOPs a request",
    "prefill_seconds": "prefill, s",
    "decode_seconds": "decode, s",
    "tokens_per_second": "tokens/s",
}
Result = dict[str, Any]


def write(results: list[Result], page: Path) -> list[Path]:
    """Write the page, and its figures to a folder beside it; returns the figures' paths.

    Raises `BadInput` where `matplotlib` is missing, for no results, and for Results that lack something.
    """
    if not results:
        raise BadInput("There are no results to report.", "Name files that offramp eval --json wrote.")
    figures: dict[str, str] = {}
    try:
        sections = [_section(*group, figures) for group in _grouped(results)]
        body = f"""<h1>Early exits: what they keep and what they save</h1>
<p>{escape(_intro(results))}</p>
{_contents(results)}
{"".join(sections)}
<h2 id="run">What was run</h2>
{_runs(results)}"""
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise BadInput(
            f"A Result lacks something that the page shows: {error!r}.",
            "Was it made by another version? Run offramp eval again.",
        ) from error
    write_atomically(page, f"{_HEAD}<main>\n{body}\n</main>\n</body>\n</html>\n".encode())
    folder = page.with_name(f"{page.stem}-figures")
    for name, svg in figures.items():
        write_atomically(folder / f"{name}.svg", svg.replace("currentColor", "#222").encode())
    return [folder / f"{name}.svg" for name in figures]


def _grouped(results: list[Result]) -> list[tuple[str, str, list[Result]]]:
    """Results that can be compared: of one model in one weight format, on the same questions, in times on one machine."""

    def key(result: Result) -> str:
        model, task, machine = (result[name] for name in ("model", "task", "machine"))
        same = [model["name"], task["name"], model, result["reference"], task["sha256"], task["max_tokens"], task["batch"]]
        return json.dumps([*same, machine["processor"], machine["threads"], [item["id"] for item in result["items"]]])

    found: list[tuple[str, str, list[Result]]] = []
    for number, (_, group) in enumerate(groupby(sorted(results, key=key), key=key)):
        some = list(group)
        model, task = some[0]["model"], some[0]["task"]
        title = f"{model['name']} on {task['name']}"
        others = [one for one in found if one[1].startswith(title)]
        title += f", {model['weights']}, {task['questions']} questions" if others else ""
        anchor = "".join(character if character.isalnum() else "-" for character in f"{model['name']}-{task['name']}")
        found.append((f"{anchor}-{number}" if others else anchor, title, some))
    return found


def _intro(results: list[Result]) -> str:
    questions = sum(result["task"]["questions"] for result in results)
    models = ", ".join(sorted({result["model"]["name"] for result in results}))
    return (
        f"{len(results)} conditions, {questions} answers; models: {models}. Bars, and the small print in tables, are 95% "
        "intervals, by bootstrap over questions. Consistency is token F1 with the full model's answer. Large hollow marks "
        "are the exits' own thresholds, calibrated or by default."
    )


def _contents(results: list[Result]) -> str:
    links = [f'<li><a href="#{anchor}">{escape(title)}</a></li>' for anchor, title, _ in _grouped(results)]
    return f'<nav><ul>{"".join(links)}<li><a href="#run">What was run</a></li></ul></nav>'


def _section(anchor: str, title: str, results: list[Result], figures: dict[str, str]) -> str:
    first = results[0]
    quality = next(name for name in QUALITY if name in first["summary"])
    note = f" <strong>{escape(first['task']['note'])}.</strong>" if first["task"]["note"] else ""
    reference = first["reference"]
    other = f" Compared with {escape(reference['name'])} at full depth." if reference != first["model"] else ""
    parts = [f'<h2 id="{anchor}">{escape(title)}</h2>']
    about = f"{first['task']['questions']} questions, {first['model']['weights']} weights."
    if first["task"]["batch"] > 1:
        about += f" {first['task']['batch']} answers side by side; times are their shares."
    parts.append(f"<p>{escape(about)}{note}{other}</p>")
    if "flops_per_token" in first["summary"]:
        drawn = {
            "cost": (_pareto, quality, "flops_per_token", f"{QUALITY[quality]} against FLOPs a token"),
            "latency": (_pareto, quality, "tokens_per_second", f"{QUALITY[quality]} against speed"),
            "consistency": (_pareto, "token_f1", "flops_saved", "Consistency against FLOPs saved"),
            "depth": (_pareto, "token_f1", "mean_blocks", "Consistency against mean blocks run"),
            "positions": (_positions, "", "", "Where tokens leave, by their place in the answer"),
        }
        for name, (draw, y, x, caption) in drawn.items():
            svg = draw(results, x, y)
            figures[f"{anchor}-{name}"] = svg
            parts.append(f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>")
        parts.append(_at_consistency(results))
    parts.append(_table(results))
    if "flops_per_token" in first["summary"]:
        parts.append(_answers(results))
    return "\n".join(parts)


def _curves(results: list[Result]) -> list[tuple[str, list[Result]]]:
    """Conditions that differ only in their thresholds, one curve for each fill and gate; full depth first.

    Those that ran the exits' own policy, calibrated or not, are in their gate's curve.
    """

    def label(result: Result) -> str:
        condition = result["condition"]
        if condition["policy"] is None:
            return "full depth"
        policy = condition["policy"]
        parts = [condition["fill"], condition["gate"] if policy["confidence"] == "gate" else policy["confidence"]]
        if not _own(result):
            parts += [f"decay {policy['decay']:g}"] if policy["decay"] else []
            parts += [f"{policy['candidates']:,} candidates"] if policy["candidates"] else []
        return ", ".join(parts)

    return sorted(
        ((name, list(some)) for name, some in groupby(sorted(results, key=label), key=label)),
        key=lambda curve: curve[0] != "full depth",
    )


def _own(result: Result) -> bool:
    """Whether thresholds were the exits' own, by calibration or by default."""
    return result["condition"]["calibration"] is not None


def _telling(results: list[Result]) -> list[Result]:
    """One condition of each curve: of those that keep at least half of full depth's tokens the earliest to leave."""

    def blocks(result: Result) -> float:
        return float(result["summary"]["mean_blocks"]["mean"])

    curves = [[one for one in some if one["condition"]["policy"]] for _, some in _curves(results)]
    kept = [[one for one in some if one["summary"]["token_f1"]["mean"] >= 0.5] or some for some in curves]
    return [min(some, key=blocks) for some in kept if some]


def _figure(draw: Callable[[Any], None]) -> str:
    try:
        import matplotlib
    except ImportError as error:
        raise BadInput("The library matplotlib is not installed.", "Install it: pip install 'offramp[eval]'") from error
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
    return svg[svg.index("<svg") :].replace("fill: #ffffff", "fill: none").replace(INK, "currentColor")


def _pareto(results: list[Result], x: str, y: str) -> str:
    scale = 1e-6 if x == "flops_per_token" else 1.0
    unit = "million " if x == "flops_per_token" else ""

    def draw(axes: Any) -> None:
        for index, (name, some) in enumerate(_curves(results)):
            style = {"color": COLOURS[index % 6], "marker": MARKERS[index % 7]}
            points = sorted((one for one in some if not _own(one)), key=lambda result: result["summary"][x]["mean"])
            across = [scale * one["summary"][x]["mean"] for one in points]
            up = [one["summary"][y] for one in points]
            # The mean of few answers may lie a hair outside the resampled ones.
            below = [max(0.0, value["mean"] - value["low"]) for value in up]
            above = [max(0.0, value["high"] - value["mean"]) for value in up]
            means = [value["mean"] for value in up]
            bars = {"linewidth": 1.4, "markersize": 5, "capsize": 2, "elinewidth": 0.8}
            axes.errorbar(across, means, [below, above], label=name, **style, **bars)
            for one in filter(_own, some):
                place = scale * one["summary"][x]["mean"], one["summary"][y]["mean"]
                axes.plot(*place, **style, markersize=10, markerfacecolor="none", linestyle="none")
        axes.set(xlabel=unit + MEASURES[x], ylabel=QUALITY.get(y) or MEASURES[y])

    return _figure(draw)


def _positions(results: list[Result], x: str, y: str) -> str:
    def draw(axes: Any) -> None:
        for index, result in enumerate(_telling(results) or results):
            exits = [item["exits"] for item in result["items"]]
            longest = max(map(len, exits))
            # Only as far as a tenth of the answers go.
            places = [place for place in range(longest) if 10 * sum(len(one) > place for one in exits) >= len(exits)]
            means = [fmean(one[place] for one in exits if len(one) > place) for place in places]
            style = {"color": COLOURS[index % 6], "marker": MARKERS[index % 7]}
            label = result["condition"]["name"]
            axes.plot([place + 1 for place in places], means, label=label, markersize=3, linewidth=1.2, **style)
        axes.set(xlabel="token of the answer", ylabel="mean blocks run", ylim=(0, results[0]["blocks"] * 1.05))

    return _figure(draw)


def _at_consistency(results: list[Result], wanted: float = 0.9) -> str:
    """What each curve costs where it first falls to this consistency, in a straight line between its conditions."""
    names = ("mean_blocks", "flops_saved", "tokens_per_second")

    def values(result: Result) -> list[float]:
        return [result["summary"][name]["mean"] for name in ("token_f1", *names)]

    def row(title: str, point: list[float]) -> str:
        cells = "".join(f"<td>{_shown(name, value)}</td>" for name, value in zip(names, point[1:], strict=True))
        return f"<tr><th>{escape(title)}</th>{cells}</tr>"

    full = [values(one) for one in results if one["condition"]["policy"] is None]
    rows = [row("full depth", one) for one in full]
    for label, some in _curves(results):
        early = [values(one) for one in some if one["condition"]["policy"] and not _own(one)]
        for before, after in pairwise([*full, *sorted(early, key=lambda point: -point[1])]):
            if before[0] >= wanted > after[0]:
                share = (before[0] - wanted) / (before[0] - after[0])
                rows.append(row(label, [a + share * (b - a) for a, b in zip(before, after, strict=True)]))
                break
    if len(rows) == len(full):
        return ""
    head = "".join(f"<th>{escape(MEASURES[name])}</th>" for name in names)
    about = f"Where consistency falls to {wanted:g}, in a straight line between the conditions measured; no intervals."
    table = f'<div class="wide"><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'
    return f"<h3>At consistency {wanted:g}</h3><p>{about}</p>{table}"


def _table(results: list[Result]) -> str:
    names = [name for name in (*QUALITY, *MEASURES) if name in results[0]["summary"]]
    titles = QUALITY | MEASURES
    first = names[0]
    full = next((one["items"] for one in results if one["condition"]["policy"] is None), None)
    head = f"<th>{escape(titles[first])} less full depth's, on the same questions</th>" if full else ""
    head += "".join(f"<th>{escape(titles[name])}</th>" for name in names)
    rows = []
    for _, some in _curves(results):
        for result in sorted(some, key=lambda one: -one["summary"].get("mean_blocks", {"mean": 0})["mean"]):
            cells = _cell(first, difference(result["items"], full, first, result["seed"])) if full else ""
            cells += "".join(_cell(name, result["summary"][name]) for name in names)
            rows.append(f"<tr><th>{escape(result['condition']['name'])}</th>{cells}</tr>")
    return f'<div class="wide"><table><tr><th>condition</th>{head}</tr>{"".join(rows)}</table></div>'


def _cell(name: str, value: dict[str, float]) -> str:
    mean, low, high = (_shown(name, value[kind]) for kind in ("mean", "low", "high"))
    return f"<td>{mean}<br><small>{low} – {high}</small></td>"


def _shown(name: str, number: float) -> str:
    if name.startswith("flops_per"):
        return f"{number / 1e6:,.0f} M"
    if name == "flops_saved":
        return f"{number:.1%}"
    return f"{number:.1f}" if abs(number) >= 10 else f"{number:.3f}"


def _answers(results: list[Result], count: int = 3) -> str:
    """The first few answers of one condition of each curve, each token in the shade of the block it left at."""
    early = _telling(results)
    if not early:
        return ""
    blocks = results[0]["blocks"]
    parts = [
        f"<h3>Some answers</h3><p>The first {count} questions, under one condition of each curve: the earliest to leave of"
        " those that keep half of full depth's tokens. The darker a token's mark, the earlier it left; the block is"
    ]
    parts.append(" in its tooltip, and below the answer for tokens that left early.</p>")
    for number in range(min(count, len(early[0]["items"]))):
        item = early[0]["items"][number]
        parts.append(f"<h4>{escape(item['question'])}</h4><dl><dt>full depth</dt><dd>{escape(item['full_text'])}</dd>")
        for result in early:
            one = result["items"][number]
            spans = "".join(
                f'<span class="e{_shade(block, blocks)}" title="block {block}">{escape(piece)}</span>'
                for piece, block in zip(one["pieces"], one["exits"], strict=True)
            )
            left = [f"{place}: {block}" for place, block in enumerate(one["exits"], start=1) if block < blocks]
            small = f"<br><small>left early, token: block — {', '.join(left)}</small>" if left else ""
            parts.append(f"<dt>{escape(result['condition']['name'])}</dt><dd>{spans}{small}</dd>")
        parts.append("</dl>")
    return "\n".join(parts)


def _shade(block: int, blocks: int) -> int:
    """0 for full depth, up to 4 for the earliest."""
    return 0 if block >= blocks else 4 - min(3, 4 * block // blocks)


def _runs(results: list[Result]) -> str:
    parts = []
    for command, some in groupby(results, key=lambda result: result["command"]):
        these = list(some)
        models = dict.fromkeys(
            f"{one['name']}, {one['weights']}, SHA-256 {one['sha256'][:16]}"
            for result in these
            for one in (result["model"], result["reference"])
        )
        machines = dict.fromkeys(", ".join(f"{name} {value}" for name, value in one["machine"].items()) for one in these)
        data = dict.fromkeys(f"{one['task']['source']}, SHA-256 {one['task']['sha256'][:16]}" for one in these)
        exits = dict.fromkeys(json.dumps(one["exits"]) for one in these if one["exits"])
        known = {
            "models": "; ".join(models),
            "data": "; ".join(data),
            "exits": "; ".join(exits) or "none",
            "machine": "; ".join(machines),
            "peak memory": f"{max(one['peak_memory_bytes'] for one in these) / 2**30:.1f} GiB",
            "seed": str(these[0]["seed"]),
        }
        rows = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in known.items())
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
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
.e1 { background: rgba(var(--mark), 0.15); }
.e2 { background: rgba(var(--mark), 0.3); }
.e3 { background: rgba(var(--mark), 0.45); }
.e4 { background: rgba(var(--mark), 0.6); }
@media print { nav { display: none; } figure, tr, dl { break-inside: avoid; } .wide { overflow: visible; } }
</style>
</head>
<body>
"""
