"""The pages as people open them: in Chromium, in both themes, on a phone and on a desk."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from model import UnifiedTransformer, UnifiedTransformerConfig
from pipelines.decode import DecodedSpan
from pipelines.evaluate import evaluate
from pipelines.evaluate.page import write_evaluation_page
from pipelines.generate import Generator
from pipelines.report.difference import Side, compare
from pipelines.report.difference_page import write_difference_page
from pipelines.report.page import write_page
from pipelines.report.stats_page import write_stats_page
from pipelines.sequence import Modality
from pipelines.shards.dataset import Dataset
from pipelines.show import ShownRow, show
from pipelines.tokenize.tokenizers import Tokenizers
from tests.pipelines.jobs import run_units
from tests.pipelines.test_page import write_run
from tests.pipelines.tiny import tiny_recipe

CHROMIUM = shutil.which("chromium")

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here; on Debian: apt-get install --no-install-recommends chromium"
)

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
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All pages: of a dataset, of two of its versions, of a model on it, and of a run with hostile texts."""
    folder = tmp_path_factory.mktemp("pages")
    recipe = tiny_recipe(folder, "tokenizers.audio.max_frames=110")
    (folder / "stamps" / "s003.png").write_bytes(b"no picture")
    for sound in (folder / "stamps").glob("*.wav"):
        # A headless Chromium does not play what is shorter than some tenths of a second.
        soundfile.write(sound, np.sin(np.arange(8000) / 9).astype(np.float32), 8000)
    dataset = run_units(recipe, each=True)
    write_stats_page(folder / "stats.html", dataset, samples=12)
    first = Side.of(Dataset.open(dataset.uri, 5))
    write_difference_page(folder / "difference.html", compare(first, Side.of(dataset)))
    sizes = {f"{m.label}_vocab_size": dataset.vocabulary.size(m) for m in Modality}
    small = {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "ffn_hidden_size": 16, "device": "cpu"}
    config = UnifiedTransformerConfig(max_sequence_length=256, **sizes, **small)  # type: ignore[arg-type]
    generator = Generator(UnifiedTransformer(config, seed=0), dataset.vocabulary, Tokenizers.load(recipe), name="tiny")
    write_evaluation_page(folder / "evaluation.html", evaluate(generator, dataset.uri, split="train", samples=4))
    hostile = "<img src=http://evil.example/x.png onerror=console.error(1)>" * 9
    row = ShownRow(
        row_id=hostile,
        source=hostile.replace(" ", ""),
        num_tokens=9,
        spans=[DecodedSpan(modality=Modality.TEXT, text=hostile)],
        files=[None],
    )
    rows = [*show(dataset, ["0", "20"]), row]
    run = write_run(folder / "run")
    write_page(folder / "run.html", dataset=dataset, rows=rows, run=run, generated=None, title="A run")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
                "--mute-audio",
                "--autoplay-policy=no-user-gesture-required",
            ],
        )
        yield started
        started.close()


def _wait(page: Any, condition: str) -> None:
    """Ask again and again from here, because the page's own policy forbids the driver to."""
    until = time.monotonic() + 10
    while not page.evaluate(condition):
        assert time.monotonic() < until, condition
        time.sleep(0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", [PAGES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in PAGES[1:])])
def test_a_page_opens_without_a_fault(browser: Any, folder: Path, name: str, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if not request.url.startswith("data:") else None)
    address = (folder / f"{name}.html").as_uri()
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


def test_samples_stand_beside_their_originals(browser: Any, folder: Path) -> None:
    page = browser.new_page()
    page.goto((folder / "stats.html").as_uri())
    assert page.locator(".samples .card").count() == 12
    names = page.locator(".pair figcaption").all_inner_texts()
    assert names
    assert names == ["original", "from tokens"] * (len(names) // 2)
    sides = page.locator(".sound .side").all_inner_texts()
    assert sides == ["original", "from tokens"] * (len(sides) // 2)
    page.close()


def test_a_player_plays(browser: Any, folder: Path) -> None:
    page = browser.new_page()
    page.goto((folder / "stats.html").as_uri())
    page.evaluate("void document.querySelector('audio').play()")
    _wait(page, "() => document.querySelector('audio').ended")
    page.close()


def test_the_keyboard_reaches_everything(browser: Any, folder: Path) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 900})
    page.goto((folder / "stats.html").as_uri())
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.innerText") == "Skip to the content"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    seen = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.tagName + ' ' + document.activeElement.className"))
    assert {"A ", "DIV scroll", "AUDIO "} <= seen
    page.close()


def test_every_heading_region_and_chart_has_a_name(browser: Any, folder: Path) -> None:
    page = browser.new_page()
    for name in PAGES:
        page.goto((folder / f"{name}.html").as_uri())
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
