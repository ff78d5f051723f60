"""The report in a real browser: nothing is fetched, nothing fails, the figures and the answers are there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers import exits_for, task
from models import tiny
from offramp import Policy
from offramp.cli.terminal import result_line
from offramp.errors import BadInput
from offramp.evaluation.evaluation import Condition, Evaluation
from offramp.evaluation.results import Interval, Result, load_results, save_results
from offramp.extras.report.curves import crossing
from offramp.extras.report.page import write

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    exits = exits_for("llama", "ffn")
    conditions = [Condition(), *(Condition("project", Policy((threshold,) * 3), exits) for threshold in (0.3, 0.5, 0.9))]
    plain = Evaluation(tiny("llama"), task(), work, command="offramp eval <tiny>")
    choice = Evaluation(
        tiny("llama"),
        task(name="truthfulqa-mc", multiple_choice=True, score=lambda answer, item: {}),
        work,
        command="other",
    )
    return [evaluation.run(condition) for evaluation in (plain, choice) for condition in conditions]


@pytest.fixture(scope="module")
def page(results, tmp_path_factory) -> Path:
    page = tmp_path_factory.mktemp("report") / "report.html"
    write(results, page)
    return page


def test_a_curve_is_read_between_the_consistencies_nearest_to_the_one_asked_for() -> None:
    """A more open policy may run more blocks than full depth, since tails and late blocks count."""

    def measured(token_f1: float, mean_blocks: float, flops_saved: float) -> Any:
        values = {"token_f1": token_f1, "mean_blocks": mean_blocks, "flops_saved": flops_saved}
        return SimpleNamespace(summary={name: Interval(value, value, value) for name, value in values.items()})

    curve = [measured(*each) for each in ((1.0, 30, 0.0), (0.8, 29, 0.03), (0.92, 31, -0.03), (0.95, 29.5, 0.0))]
    assert crossing(curve, 0.9, ("flops_saved", "mean_blocks")) == pytest.approx([-0.02, 31 - 1 / 3])
    assert crossing(curve, 0.7, ("flops_saved",)) is None


def test_kinds_of_exits_and_penalties_are_kept_apart(tmp_path) -> None:
    """Exits with another label have a curve of their own, and answers with a repetition penalty a section of their own."""
    exits, policy = exits_for("llama"), Policy((0.5,) * 3)
    conditions = [Condition(), *(Condition("project", policy, exits, label) for label in ("jump", "no jump"))]
    evaluations = [Evaluation(tiny("llama"), task(repetition_penalty=penalty), tmp_path) for penalty in (1.0, 1.8)]
    write([evaluation.run(each) for evaluation in evaluations for each in conditions], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert text.count("<details") >= 2
    assert len(re.findall(r"<summary><h2>[^<]*, repetition penalty 1.8</h2></summary>", text)) == 1
    for label in ("jump", "no jump"):
        assert text.count(f"<th>{label}: project, mamba, 0.5 0.5 0.5</th>") == 2


def test_figures_name_the_exits_that_save_most_where_there_are_many(results, tmp_path) -> None:
    full, early = results[0], results[1]

    def exits(number: int, kept: float, saved: float) -> Result:
        """Other exits, with this consistency and these savings."""
        summary = early.summary | {"token_f1": Interval(kept, kept, kept), "flops_saved": Interval(saved, saved, saved)}
        return replace(early, condition=replace(early.condition, name=f"e{number}", label=f"e{number}"), summary=summary)

    many = [exits(number, 0.95 if number < 9 else 0.5, number / 20) for number in range(14)]
    write([full, *many[:9]], tmp_path / "few.html")
    assert "Grey dots" not in (tmp_path / "few.html").read_text()
    write([full, *many], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "Grey dots are all others" in text
    assert all(f"<th>e{number}</th>" in text for number in range(14))
    figure = next((tmp_path / "report-figures").glob("*-consistency.svg")).read_text()
    assert re.findall(r">(e\d+): ", figure) == ["e8"]
    assert "all others" in figure


def test_the_page_holds_everything_by_itself(page: Path, results) -> None:
    text = page.read_text()
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', text)
    assert text.count("<svg") == 6
    assert all(result.condition.name in text for result in results)
    assert "offramp eval &lt;tiny&gt;" in text  # escaped
    assert "#010203" not in text
    assert "F1 less full depth&#39;s" in text
    assert "At consistency 0.9" in text
    figures = sorted((page.parent / "report-figures").glob("*.svg"))
    assert len(figures) == 6
    assert all("currentColor" not in figure.read_text() for figure in figures)


def test_the_same_results_give_the_same_page(page: Path, results, tmp_path) -> None:
    write(results, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes() == page.read_bytes()


def test_no_results_are_refused(tmp_path) -> None:
    with pytest.raises(BadInput, match="no results"):
        write([], tmp_path / "report.html")


def test_results_that_lack_a_metric_are_refused(results, tmp_path) -> None:
    for missing in ("mean_blocks", "f1"):
        summary = {name: value for name, value in results[0].summary.items() if name not in (missing, "exact_match")}
        with pytest.raises(BadInput, match="lacks something"):
            write([replace(results[0], summary=summary)], tmp_path / "report.html")


def test_a_strangers_results_write_and_fetch_nothing_else(results, tmp_path) -> None:
    one = results[0]
    outside = replace(one, task=replace(one.task, name="x/../../../outside/owned"))
    styled = replace(one, model=replace(one.model, name='m style="}body{background:url(//x)}x{" $\\frac$'))
    figures = write([outside, styled], tmp_path / "a" / "b" / "report.html")
    assert {figure.parent for figure in figures} == {tmp_path / "a" / "b" / "report-figures"}
    assert not (tmp_path / "outside").exists()
    for style in re.findall("<style>.*?</style>", (tmp_path / "a" / "b" / "report.html").read_text(), re.DOTALL):
        assert "url(" not in style
    for wrong in (replace(one, items=[]), replace(one, summary=one.summary | {"token_f1": Interval("1", 0, 1)})):  # type: ignore[arg-type]
        with pytest.raises(BadInput, match="lacks something"):
            write([wrong], tmp_path / "wrong.html")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
@pytest.mark.parametrize(
    ("name", "size", "flags"), [("desktop", "1200,2600", ()), ("phone", "390,3200", ("--force-dark-mode",))]
)
def test_a_browser_shows_it_without_an_error(page: Path, tmp_path, name: str, size: str, flags: tuple[str, ...]) -> None:
    assert CHROMIUM
    common = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}",
        f"--window-size={size}",
    ]
    common += ["--enable-logging=stderr", "--v=0", *flags]
    picture = Path(os.environ.get("OFFRAMP_ARTEFACTS", tmp_path)) / f"report-{name}.png"
    done = subprocess.run([*common, f"--screenshot={picture}", page.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert picture.stat().st_size > 20_000
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    # The page measures its own layout: nothing overlaps the edge, and every figure has a size once its section is open.
    # Then a condition is searched for, and one that there is not.
    probe = tmp_path / "probe.html"
    script = """<script>addEventListener('load', () => {
        const large = one => one.checkVisibility() && one.getBoundingClientRect().height > 50;
        const shown = () => [...document.querySelectorAll('figure svg')].filter(large);
        const wider = () => document.documentElement.scrollWidth > innerWidth, said = [shown().length, wider()];
        for (const section of document.querySelectorAll('details')) section.open = true;
        said.push(shown().length, wider());
        for (const text of ['Project  0.9', 'magic', '']) {
            find.value = text;
            find.dispatchEvent(new Event('input'));
            const rows = [...document.querySelectorAll('tr.condition')];
            said.push(found.textContent, rows.filter(row => row.checkVisibility()).length);
        }
        document.title = said.join('; ');
    })</script></body>"""
    probe.write_text(page.read_text().replace("</body>", script))
    done = subprocess.run([*common, "--dump-dom", probe.as_uri()], capture_output=True, text=True, timeout=120)
    assert "<title>1; false; 6; false; 2 found; 2; 0 found; 0; ; 0</title>" in done.stdout


def test_a_score_of_somebodys_own_task_is_kept_and_shown(tmp_path, capsys) -> None:
    own = task(name="mine", score=lambda answer, item: {"vowels": float(sum(letter in "aeiou" for letter in answer))})
    results = [Evaluation(tiny("llama"), own, tmp_path / "work").run(Condition())]
    save_results(results, tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["metrics"]["vowels"]["label"] == "vowels"
    write(load_results([tmp_path / "out.json"]), tmp_path / "report.html")
    assert "<th>vowels</th>" in (tmp_path / "report.html").read_text()
    result_line(results[0])
    assert "vowels" in capsys.readouterr().out


def test_results_that_do_not_compare_are_kept_apart(results, tmp_path) -> None:
    model = replace(results[0].model, weights="<b>int4</b>")
    other = replace(results[0], model=model, items=results[0].items[:1])
    write([results[0], results[1], other], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert text.count("<h2") == 3  # two sections, and what was run
    assert "<b>int4" not in text
