"""The server's page in a real browser: Debian's chromium, or the one that CHROMIUM names. Skipped where there is none.

Screenshots are left in build/page.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from offramp.decode import plan
from offramp.decode.batch import Batch
from offramp.exits.policy import Policy
from test_serve import FAMILIES, calibration, fetch, serving

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
PICTURES = Path(__file__).parents[1] / "build" / "page"

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium here")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, monkeypatch) -> Iterator[Any]:
    """A page of a server, on which nothing may be logged as an error, and nothing may come from elsewhere.

    Drafts cost nothing there: those of a tiny model would not pay.
    """
    monkeypatch.setattr(plan, "row_costs", lambda format: (0.0,) * 8)
    monkeypatch.setattr(plan, "asking_cost", lambda *parts: 0.0)
    tested = calibration((Policy((0.9,) * 3), False), (Policy((0.3,) * 3), True))
    with serving(FAMILIES[0], calibration=tested) as served:
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.wrong = []
        page.served = served
        page.on(
            "console", lambda message: page.wrong.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: page.wrong.append(str(error)))
        page.on("request", lambda asked: asked.url.startswith((served.address, "data:")) or page.wrong.append(asked.url))
        page.goto(served.address)
        page.wait_for_selector("#starts button")
        page.fill("#length", "24")
        yield page
        assert page.wrong == []
        page.close()


def until(page: Any, expression: str) -> None:
    """Wait until a JavaScript expression is true. The page's own rules keep the browser's way of waiting out."""
    end = time.monotonic() + 20
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        time.sleep(0.02)


def ask(page: Any, text: str) -> str:
    """Send a message and wait for its answer."""
    answers = page.locator(".turn.assistant").count()
    page.fill("#message", text)
    page.press("#message", "Enter")
    until(page, f"document.querySelectorAll('.turn.assistant .row').length > {answers}")
    return page.locator(".answer").last.text_content()


def figures(page: Any) -> dict[str, str]:
    """What is told of the last answer."""
    rows = page.locator("#meter div")
    texts = [rows.nth(index).locator("dt, dd").all_text_contents() for index in range(rows.count())]
    return dict(texts)


def test_the_modes_come_first_with_their_promises(page) -> None:
    page.focus(".skip")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.value") == "exact"
    modes = json.loads(fetch(f"{page.served.address}/offramp/menu").text)["modes"]
    for mode, label in zip(modes, page.locator("#modes label").all_text_contents(), strict=True):
        assert label == f"{mode['name']} saves {mode['saves']}{mode['promise']}"


def test_an_exact_answer_is_coloured_by_what_its_tokens_came_from(page) -> None:
    text = ask(page, "What?")
    assert text == page.served.alone([{"role": "user", "content": "What?"}], 24)
    counts = {source: page.locator(f".answer .token.{source}").count() for source in ("exit", "text", "table", "full")}
    assert 0 < counts["exit"] < sum(counts.values()) == 24
    assert page.locator(".answer .token.early").count() == 0
    legend = [item.split()[-1] for item in page.locator(".legend li").all_text_contents()]
    assert legend == [str(count) for count in counts.values()]
    told = figures(page)
    assert list(told) == ["Tokens a pass", "Drafts that stood", "Tokens a second", "Times as fast as full depth"]
    stood, made = re.fullmatch(r"(\d+) of (\d+)", told["Drafts that stood"]).groups()
    assert 24 - counts["full"] == int(stood) <= int(made)
    assert float(told["Tokens a pass"]) >= 1
    assert told["Times as fast as full depth"] == "not measured"
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / "exact.png")


def test_the_mode_decides_what_is_told_of_the_next_answer(page) -> None:
    assert page.locator("#points").is_hidden()
    page.check("[value=early]")
    assert page.locator("#points").is_visible()
    ask(page, "Hello")
    assert 0 < page.locator(".answer .token.early").count() <= page.locator(".answer .token").count() == 24
    assert page.locator(".answer .token.exit").count() == 0
    told = figures(page)
    assert {"Blocks for a token", "FLOPs saved", "Guarantee"} < set(told)
    assert re.fullmatch(r"[\d.]+ of 6", told["Blocks for a token"])
    assert told["FLOPs saved"].endswith("%")
    assert told["Guarantee"] == "loss (f1) at most 0.05, with probability 0.9"
    page.screenshot(path=PICTURES / "early.png")
    page.fill("#temperature", "0.5")
    assert "not with these settings" in page.text_content("#point-value")
    page.check("[value=full]")
    text = ask(page, "Hello")
    assert len(text) > 0
    assert list(figures(page)) == ["Tokens a second"]
    assert page.locator(".turn.assistant").last.locator(".legend").count() == 0
    assert page.get_by_text("Compare with full depth").count() == 1


def test_a_token_says_what_it_came_from_and_what_full_depth_would_say(page) -> None:
    assert "\n" not in page.text_content("#token")
    ask(page, "Hello")
    page.focus(".answer")
    page.keyboard.press("End")
    until(page, "document.querySelector('#token').textContent.includes('likeliest')")
    said = page.text_content("#token")
    assert re.search(r"(Chosen at full depth|A draft .* Full depth chose the same token)", said)
    assert 3 <= len(re.findall(r"\d\.\d%", said)) <= 5  # tokens that are written alike stand for one
    page.keyboard.press("Home")
    until(page, "document.querySelectorAll('.token')[0].classList.contains('chosen')")


@pytest.mark.parametrize("mode", ["exact", "early"])
def test_comparing_measures_the_speed_and_marks_the_tokens_that_differ(page, mode: str) -> None:
    page.check(f"[value={mode}]")
    text = ask(page, "Hello")
    page.click("text=Compare with full depth")
    page.wait_for_selector(".answers + .help")
    full = page.locator(".answer").last.text_content()
    assert full == page.served.alone([{"role": "user", "content": "Hello"}], 24)
    assert (full == text) or mode != "exact"
    assert (page.locator(".token.differs").count() > 0) == (full != text)
    times = figures(page)["Times as fast as full depth"]
    assert float(times) > 0
    assert f" {times} times as fast." in page.text_content(".answers + .help")


def test_regenerate_draws_anew(page) -> None:
    first = ask(page, "Hello")
    regenerate(page)
    assert page.locator(".answer").text_content() == first
    assert "at temperature 0 nothing is drawn" in page.text_content(".turn.assistant .help")
    page.fill("#temperature", "1")
    regenerate(page)
    drawn = page.locator(".answer").text_content()
    regenerate(page)
    assert len({first, drawn, page.locator(".answer").text_content()}) == 3
    assert page.locator(".turn.assistant .help").count() == 0


def regenerate(page: Any) -> None:
    """Ask for the only answer again, and wait for it."""
    page.evaluate("document.querySelector('.turn.assistant').classList.add('old')")
    page.click("text=Regenerate")
    until(page, "document.querySelectorAll('.turn.assistant:not(.old) .row').length == 1")


def test_stop_and_a_new_conversation(page, monkeypatch) -> None:
    ask(page, "Hello")
    # The long answer waits in the middle until it is stopped, however fast the machine is.
    steps, stopped, step = count(), threading.Event(), Batch.step
    monkeypatch.setattr(Batch, "step", lambda batch: (next(steps) < 20 or stopped.wait(20)) and step(batch))
    page.fill("#length", "400")
    page.fill("#message", "More")
    page.press("#message", "Enter")
    until(page, "document.querySelectorAll('.turn')[3]?.querySelectorAll('.token').length > 3")
    page.click("#stop")
    stopped.set()
    until(page, "document.querySelectorAll('.turn.assistant .row').length == 2")
    assert page.locator(".answer").last.locator(".token").count() < 400
    page.click("#clear")
    assert page.locator(".turn").count() == 0
    assert page.locator("#starts").is_visible()


def test_an_error_is_shown(page) -> None:
    page.fill("#message", "long " * 400)
    page.press("#message", "Enter")
    page.wait_for_selector(".error")
    assert "tokens long" in page.text_content(".error")
    page.wrong[:] = [text for text in page.wrong if "413 (Request Entity Too Large)" not in text]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_stands_in_the_way_of_anybody(page, scheme: str, width: int) -> None:
    """No violation that axe-core knows, nothing wider than the window, in light and dark, on a phone and on a desk."""
    from axe_playwright_python.sync_playwright import Axe

    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    ask(page, "What?")
    page.check("[value=early]")
    ask(page, "Hello")
    page.locator(".turn").last.get_by_text("Compare with full depth").click()
    page.wait_for_selector(".answers + .help")
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / f"{scheme}-{width}.png", full_page=True)
