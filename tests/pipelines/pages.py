"""All pages that Braid writes, made of tiny parts, and a browser to open them in."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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
from pipelines.recurring.page import write_page as write_pipeline_page
from pipelines.report.comparison import compare as compare_runs
from pipelines.report.difference import Side, compare
from pipelines.report.difference_page import write_difference_page
from pipelines.report.page import write_page
from pipelines.report.stats_page import write_stats_page
from pipelines.sequence import Modality
from pipelines.shards.dataset import Dataset
from pipelines.show import ShownRow, show
from pipelines.tokenize.tokenizers import Tokenizers
from pipelines.tokenizers.check import check
from tests.pipelines.jobs import run_units
from tests.pipelines.nightly import recorded_nightly
from tests.pipelines.test_page import write_run
from tests.pipelines.tiny import tiny_recipe

CHROMIUM = shutil.which("chromium")

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here; on Debian: apt-get install --no-install-recommends chromium"
)


def write_pages(folder: Path) -> Path:
    """Of a dataset, of two of its versions, of a model on it, of a run with hostile texts, of two runs, of a tokenizer and of
    a pipeline; returns the folder."""
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
    compare_runs(folder / "comparison.html", [run, write_run(folder / "other")])
    check(str(folder / "image"), folder / "stamps", folder / "tokenizer.html", items=4)
    (folder / "nightly").mkdir()
    write_pipeline_page(recorded_nightly(folder / "nightly").state, "nightly").rename(folder / "pipeline.html")
    return folder


@contextmanager
def open_browser() -> Iterator[Any]:
    """A headless Chromium. Not for a whole session: while it is open, no other code can run an event loop of its own."""
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--mute-audio"]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=CHROMIUM, args=[*flags, "--autoplay-policy=no-user-gesture-required"]
        )
        yield started
        started.close()
