"""The pages on paper, by keyboard and to a screen reader."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from pypdf import PdfReader

from tests.pipelines.pages import needs_chromium, open_browser

pytestmark = needs_chromium

PAGES = ("stats", "run", "evaluation", "difference", "comparison", "tokenizer", "pipeline")
FIRST_IN_FULL = [*PAGES[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in PAGES[2:])]

_PAPER = {"width": 700, "height": 990}
"""Pixels of A4 within the margins of `page.css`."""

_CUT = """() => [...document.querySelectorAll('body *')].filter(e => {
    const box = e.getBoundingClientRect(), style = getComputedStyle(e);
    return box.width > 0 && (box.right > document.documentElement.clientWidth + 1
        || (style.overflow !== 'visible' && !e.closest('svg, .unseen, .pieces') && e.scrollHeight > e.clientHeight + 1));
}).map(e => e.outerHTML.slice(0, 80))"""

_CLOSED = """() => [...document.querySelectorAll('details')].filter(
    d => [...d.children].some(e => e.getBoundingClientRect().height === 0)).map(d => d.outerHTML.slice(0, 80))"""

_SILENT = """() => [...document.querySelectorAll('audio')].filter(a => a.getBoundingClientRect().height > 0
    || !getComputedStyle(a.parentElement, '::after').content.includes('heard')).map(a => a.ariaLabel)"""

# In the order of the page, without what a cell shows as a drawing.
_TOLD = """() => [...document.querySelectorAll('h1, h2, h3, caption, th, td, dt, dd, figcaption, pre, .prose')]
    .filter(e => e.getClientRects().length).map(e => e.innerText)"""

_STOP = """() => {
    const e = document.activeElement, style = getComputedStyle(e);
    const seen = style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) > 0 || e.tagName === 'AUDIO';
    return [e.tagName, seen, (e.ariaLabel || e.innerText || '').trim()];
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as started:
        yield started


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_nothing(browser: Any, pages: Path, name: str, scheme: str) -> None:
    page = browser.new_page(color_scheme=scheme)
    page.goto((pages / f"{name}.html").as_uri())
    page.evaluate((resources.files("axe_playwright_python") / "axe.min.js").read_text())
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    assert found["passes"], "it looked"
    assert [(fault["id"], [node["html"][:100] for node in fault["nodes"]]) for fault in found["violations"]] == []
    page.close()


@pytest.mark.parametrize("name", FIRST_IN_FULL)
def test_on_paper_nothing_is_cut_closed_or_played(browser: Any, pages: Path, name: str, tmp_path: Path) -> None:
    page = browser.new_page(viewport=_PAPER)
    page.goto((pages / f"{name}.html").as_uri())
    page.emulate_media(media="print")
    assert page.evaluate(_CUT) == []
    assert page.evaluate(_CLOSED) == []
    assert page.evaluate(_SILENT) == []
    told = page.evaluate(_TOLD)
    page.pdf(path=tmp_path / "page.pdf", format="A4")
    page.close()
    sheets = PdfReader(tmp_path / "page.pdf").pages
    paper = _joined("".join(sheet.extract_text() for sheet in sheets))
    # Word by word: lines of cells that stand beside each other come out mixed.
    assert [word for text in told for word in text.split() if _joined(word) not in paper] == []


def _joined(text: str) -> str:
    """Without white space, ligatures, and what a font may lack."""
    return re.sub(r"[^!-~]", "", unicodedata.normalize("NFKC", text))


def test_a_screen_reader_meets_landmarks_headings_tables_and_what_a_run_was(browser: Any, pages: Path) -> None:
    page = browser.new_page()
    page.goto((pages / "pipeline.html").as_uri())
    tree = page.locator("body").aria_snapshot()
    parts = re.findall(r"^- (\w+)", tree, re.M)
    assert parts == ["link", "banner", "main", "contentinfo"]
    assert '- heading "Pipeline nightly" [level=1]' in tree
    drawn = (
        'navigation "Sections"',
        'region "Overview"',
        'heading "All runs" [level=2]',
        'list "The last runs, the newest',
    )
    assert [line for line in drawn if f"- {line}" not in tree] == []
    assert re.search(r'listitem "run 2, 2026-11-03 02:30 UTC: failed\. export:', tree)
    assert re.search(r'columnheader "outcome"', tree)
    assert re.search(r'rowheader "run 3"', tree)
    assert re.search(r'img "Duration of each run"', tree)
    page.close()


@pytest.mark.parametrize("name", FIRST_IN_FULL)
def test_every_stop_of_the_keyboard_has_a_name_and_is_seen(browser: Any, pages: Path, name: str) -> None:
    page = browser.new_page()
    page.goto((pages / f"{name}.html").as_uri())
    stops = []
    for _ in range(150):
        page.keyboard.press("Tab")
        stop = page.evaluate(_STOP)
        if stop[0] == "BODY":
            break
        stops.append(stop)
    assert stops[-1][0] != "A", "it went past the navigation"
    assert [stop for stop in stops if not stop[1] or not stop[2]] == []
    page.close()
