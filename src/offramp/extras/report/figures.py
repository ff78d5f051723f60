"""The report's figures, as SVG.

Their colours are those that colour-blind readers can tell apart (Okabe and Ito), and each curve has a marker. Lines and
letters take the colour of the page's text, so that figures can be read in the dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from hashlib import sha256
from statistics import fmean
from typing import Any

from offramp.errors import BadInput
from offramp.evaluation.metrics_table import METRICS, Metric
from offramp.evaluation.results import Result, ScoredAnswer
from offramp.extras.report.curves import curves, examples, leading, own
from offramp.files import install_hint

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vPX"
INK = "#010203"  # stands for the colour of the page's text
GREY = "#888888"


def fronts(models: list[tuple[str, list[Result]]]) -> str:
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
            for result in filter(own, results):
                axes.plot(*place(result), **style, markersize=10, markerfacecolor="none", linestyle="none")
        lowest = min((place(result)[0] for _, results in models for result in results), default=0.0)
        axes.set(xlabel=METRICS["flops_saved"].label, ylabel=METRICS["token_f1"].label)
        # Confidences that read out at every exit cost several times full depth.
        axes.set_xlim(left=max(lowest - 0.02, -0.1))

    return _figure(draw)


def _front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (x, y) that none exceeds in both, by rising x."""
    best: list[tuple[float, float]] = []
    for point in sorted(points, reverse=True):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best[::-1]


def pareto(results: list[Result], x: str, quality: Metric) -> str:
    """A figure of a quality, with intervals, against metric x: one curve for each fill and gate, or for those that lead."""
    named = leading(results)
    ids = set(map(id, named))
    others = [result for result in results if id(result) not in ids]
    million, y = METRICS[x].format == "millions", quality.name
    scale = 1e-6 if million else 1.0

    def draw(axes: Any) -> None:
        if others:
            places = [[each.summary[name].mean for each in others] for name in (x, y)]
            axes.plot([scale * value for value in places[0]], places[1], ".", color=GREY, markersize=3, label="all others")
        for index, (name, curve) in enumerate(curves(named)):
            style = {"color": COLOURS[index % 6], "marker": MARKERS[index % 7]}
            points = sorted((result for result in curve if not own(result)), key=lambda result: result.summary[x].mean)
            across = [scale * result.summary[x].mean for result in points]
            up = [result.summary[y] for result in points]
            # The mean of few answers may lie a hair outside the resampled ones.
            below = [max(0.0, value.mean - value.low) for value in up]
            above = [max(0.0, value.high - value.mean) for value in up]
            means = [value.mean for value in up]
            bars = {"linewidth": 1.4, "markersize": 5, "capsize": 2, "elinewidth": 0.8}
            axes.errorbar(across, means, [below, above], label=name, **style, **bars)
            for result in filter(own, curve):
                place = scale * result.summary[x].mean, result.summary[y].mean
                axes.plot(*place, **style, markersize=10, markerfacecolor="none", linestyle="none")
        axes.set(xlabel=("million " if million else "") + METRICS[x].label, ylabel=quality.label)

    return _figure(draw)


def positions(results: list[Result]) -> str:
    """A figure of the blocks run for the first, second, … token of an answer, on average."""
    shown = examples(results) or {"full depth": results[0]}

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
        legend = figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
        for text in legend.get_texts():
            text.set_parse_math(False)  # a model's name may have a $
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
    inside = re.compile(r'(<[^<>]*) style="([^"]*)"')  # within a tag: a text may say what it likes
    names = {style: f"s{sha256(style.encode()).hexdigest()[:6]}" for _, style in inside.findall(svg)}
    svg = inside.sub(lambda match: f'{match[1]} class="{names[match[2]]}"', svg)
    rules = "".join(f".{name}{{{style}}}" for style, name in names.items())
    return svg.replace("<defs>", f"<defs><style>{rules}</style>", 1)
