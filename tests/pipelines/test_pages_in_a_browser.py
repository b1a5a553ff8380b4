"""The pages as people open them: in Chromium, in both themes, on a phone and on a desk."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.pipelines.pages import needs_chromium, open_browser

pytestmark = needs_chromium

PAGES = ("stats", "evaluation", "difference", "run")

_BROKEN = """() => [
    ...[...document.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.alt),
    ...[...document.querySelectorAll('audio')].filter(a => !(a.readyState > 0 && a.duration > 0)).map(a => a.ariaLabel),
]"""

_LOADED = """() => [...document.images].every(i => i.complete)
    && [...document.querySelectorAll('audio')].every(a => a.readyState > 0 || a.error)"""

# Texts that stick out of the window, but for what scrolls by itself or waits off screen for the keyboard.
_OVERFLOWING = """() => [...document.querySelectorAll('body *')].filter(e => {
    const box = e.getBoundingClientRect();
    return box.right > document.documentElement.clientWidth + 1 && box.width > 0 && !e.closest('.scroll, pre, .skip');
}).map(e => e.outerHTML.slice(0, 80))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as started:
        yield started


def _wait(page: Any, condition: str) -> None:
    """Ask again and again from here, because the page's own policy forbids the driver to."""
    until = time.monotonic() + 10
    while not page.evaluate(condition):
        assert time.monotonic() < until, condition
        time.sleep(0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", [PAGES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in PAGES[1:])])
def test_a_page_opens_without_a_fault(browser: Any, pages: Path, name: str, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if not request.url.startswith("data:") else None)
    address = (pages / f"{name}.html").as_uri()
    page.goto(address)
    _wait(page, _LOADED)
    assert said == [address]
    assert page.evaluate(_BROKEN) == []
    assert page.evaluate(_OVERFLOWING) == []
    dark = (
        sum(map(int, page.evaluate("getComputedStyle(document.body).backgroundColor").strip("rgb()").split(","))) < 200
    )
    assert dark == (scheme == "dark")
    context.close()


def test_samples_stand_beside_their_originals(browser: Any, pages: Path) -> None:
    page = browser.new_page()
    page.goto((pages / "stats.html").as_uri())
    assert page.locator(".samples .card").count() == 12
    names = page.locator(".pair figcaption").all_inner_texts()
    assert names
    assert names == ["original", "from tokens"] * (len(names) // 2)
    sides = page.locator(".sound .side").all_inner_texts()
    assert sides == ["original", "from tokens"] * (len(sides) // 2)
    page.close()


def test_a_player_plays(browser: Any, pages: Path) -> None:
    page = browser.new_page()
    page.goto((pages / "stats.html").as_uri())
    page.evaluate("void document.querySelector('audio').play()")
    _wait(page, "() => document.querySelector('audio').ended")
    page.close()


def test_the_keyboard_reaches_everything(browser: Any, pages: Path) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 900})
    page.goto((pages / "stats.html").as_uri())
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.innerText") == "Skip to the content"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    seen = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.tagName + ' ' + document.activeElement.className"))
    assert {"A ", "DIV scroll", "AUDIO "} <= seen
    page.close()


def test_every_heading_region_and_chart_has_a_name(browser: Any, pages: Path) -> None:
    page = browser.new_page()
    for name in PAGES:
        page.goto((pages / f"{name}.html").as_uri())
        unnamed = page.evaluate("""() => [...document.querySelectorAll('[aria-labelledby], [aria-describedby]')].flatMap(
            e => ['aria-labelledby', 'aria-describedby'].map(a => e.getAttribute(a)).filter(Boolean)
                .filter(id => !document.getElementById(id)?.textContent.trim()))""")
        assert unnamed == []
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
        assert len(ids) == len(set(ids))
        levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(e => +e.tagName[1])")
        assert levels[0] == 1
        assert all(after - before <= 1 for before, after in pairwise(levels))
    page.close()
