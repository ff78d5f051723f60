"""The server's page in a real browser: Debian's chromium, or the one that CHROMIUM names. Skipped where there is none.

Screenshots are left in build/page.
"""

from __future__ import annotations

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
from test_serve import FAMILIES, serving

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
    with serving(FAMILIES[0]) as served:
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


def test_a_message_is_answered_with_shaded_tokens(page) -> None:
    text = ask(page, "What?")
    assert text == page.served.alone([{"role": "user", "content": "What?"}], 24)
    assert 0 < page.locator(".token.early.drafted").count() < page.locator(".token").count() == 24
    assert re.fullmatch(r"[\d.]+ of 6", page.text_content("[data-meter=blocks]"))
    assert page.text_content("[data-meter=drafts]").endswith("%")
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / "desktop.png")


def test_a_token_says_where_it_left_and_what_full_depth_would_say(page) -> None:
    ask(page, "Hello")
    page.focus(".answer")
    page.keyboard.press("End")
    until(page, "document.querySelector('#token').textContent.includes('Full depth')")
    said = page.text_content("#token")
    assert re.search(r"(Chosen at full depth|A draft that stood)", said)
    assert 3 <= len(re.findall(r"\d\.\d%", said)) <= 5  # tokens that are written alike stand for one
    page.keyboard.press("Home")
    until(page, "document.querySelectorAll('.token')[0].classList.contains('chosen')")


def test_fills_and_points_change_the_next_answer_and_the_meter(page) -> None:
    ask(page, "Hello")
    before = page.text_content("[data-meter=saved]")
    page.select_option("#fill", "copy")
    assert page.locator("#fill-help").text_content().startswith("A token that leaves counts.")
    ask(page, "Hello")
    assert page.text_content("[data-meter=saved]") != before
    assert page.locator(".turn.assistant").last.locator(".token.early:not(.drafted)").count() > 0


def test_comparing_marks_the_tokens_that_differ(page) -> None:
    page.select_option("#fill", "copy")
    text = ask(page, "Hello")
    page.click("text=Compare with full depth")
    page.wait_for_selector(".answers + .help")
    full = page.locator(".answer").last.text_content()
    assert full == page.served.alone([{"role": "user", "content": "Hello"}], 24)
    assert (page.locator(".token.differs").count() > 0) == (full != text)
    assert page.text_content("[data-meter=full]") != "–"


def test_regenerate_stop_and_a_new_conversation(page, monkeypatch) -> None:
    first = ask(page, "Hello")
    page.click("text=Regenerate")
    until(page, "document.querySelectorAll('.turn.assistant .row').length == 1")
    assert page.locator(".answer").last.text_content() == first
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
    page.wrong[:] = [text for text in page.wrong if "400 (Bad Request)" not in text]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_stands_in_the_way_of_anybody(page, scheme: str, width: int) -> None:
    """No violation that axe-core knows, nothing wider than the window, in light and dark, on a phone and on a desk."""
    from axe_playwright_python.sync_playwright import Axe

    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    page.select_option("#fill", "copy")
    ask(page, "Hello")
    page.click("text=Compare with full depth")
    page.wait_for_selector(".answers + .help")
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / f"{scheme}-{width}.png", full_page=True)
