"""The page of a run: everything is in it, nothing leaves it, and no text breaks it."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from model import UnifiedTransformerConfig
from pipelines.decode import DecodedSpan
from pipelines.generate.output import to_bytes
from pipelines.pretrain.recipe import PretrainRecipe
from pipelines.recipe import dump_recipe
from pipelines.report.charts import short, waveform
from pipelines.report.markup import Markup, tag
from pipelines.report.media import LONGEST_TEXT, PageError, prose
from pipelines.report.page import report, write_page
from pipelines.report.summary import summarize
from pipelines.rows import spread
from pipelines.sequence import Modality
from pipelines.shards.dataset import Dataset
from pipelines.show import ShownRow
from tests.pipelines.test_tokenize import run_units
from tests.pipelines.tiny import tiny_recipe

HOSTILE = "</p><script src=http://evil.example/x.js>alert('1')</script> & \"quoted\" <img onerror=x> \x00\ud800"


BASELINE = {"text": 6.4213, "image": 6.35, "audio": 6.38, "audio_codebooks": [5.42, 6.6571]}


MIDDLE = {"text": 6.1, "image": 6.2, "audio": 6.05, "audio_codebooks": [5.0, 6.5]}


FINAL = {"text": 5.7129, "image": 5.95, "audio": 5.9, "audio_codebooks": [4.6084, 6.2]}


SAMPLING = {"temperature": 0.85, "top_k": 40, "top_p": 1.0, "min_p": 0.0}


@dataclass
class Element:
    name: str
    attributes: dict[str, str | None]
    text: str = ""
    children: list[Element] = field(default_factory=list)


class Tree(HTMLParser):
    """Parses strictly: every element is closed, in order."""

    VOID = ("img", "meta")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.all: list[Element] = []
        self._open: list[Element] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.all.append(Element(name, dict(attrs)))
        if name not in self.VOID:
            self._open.append(self.all[-1])

    def handle_startendtag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        assert name in self.VOID
        self.all.append(Element(name, dict(attrs)))

    def handle_endtag(self, name: str) -> None:
        assert self._open.pop().name == name

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.text += data

    def named(self, name: str) -> list[Element]:
        return [element for element in self.all if element.name == name]

    def styled(self, style: str) -> list[Element]:
        return [element for element in self.all if style in (element.attributes.get("class") or "").split()]


def _losses(step: int) -> dict[str, float | None]:
    fall = math.exp(-step / 30)
    # Not every step has a target of every modality.
    return {"text": 5.5 + 4 * fall, "image": None if step % 3 == 0 else 5.8 + fall, "audio": 5.7 + 2 * fall}


def write_run(folder: Path, *, steps: int = 60, finished: bool = True) -> Path:
    """What `pipelines.pretrain` leaves, without having trained."""
    recipe = PretrainRecipe.model_validate(
        {
            "output": str(folder),
            "data": {"dataset": "tokens", "sequence_length": 128},
            "batch": {"sequences": 4, "micro_batch": 2},
            "steps": 60,
        }
    )
    (folder / "model").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    records: list[dict[str, Any]] = [{"kind": "baseline", "step": 0, "loss": BASELINE}]
    for step in range(1, steps + 1):
        told = {"learning_rate": 3e-3 / step, "gradient_norm": 1.0, "tokens_per_s": 500.0, "padding_share": 0.25}
        records.append({"kind": "train", "step": step, "loss": _losses(step), **told})
        if step in (30, 60):
            records.append({"kind": "validation", "step": step, "loss": FINAL if step == 60 else MIDDLE})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if finished:
        config = UnifiedTransformerConfig(
            text_vocab_size=80, image_vocab_size=32, audio_vocab_size=32, hidden_size=32, num_layers=2,
            num_attention_heads=4, ffn_hidden_size=64, max_sequence_length=128, device="cpu",
        )  # fmt: skip
        (folder / "model/config.json").write_text(json.dumps(config.to_dict()))
        result = {"steps": 60, "validation": FINAL, "baseline": BASELINE}
        (folder / "finished.json").write_text(json.dumps(result))
    return folder


def _spans(text: str) -> list[DecodedSpan]:
    rng = np.random.default_rng(3)
    return [
        DecodedSpan(modality=Modality.TEXT, text=text),
        DecodedSpan(modality=Modality.IMAGE, pixels=rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)),
        DecodedSpan(
            modality=Modality.AUDIO, waveform=rng.uniform(-1, 1, 4000).astype(np.float32), sample_rate_hz=16000
        ),
    ]


def write_generated(folder: Path, prompt: str, text: str = " and more") -> Path:
    """One file of each modality, as `braid generate` writes them."""
    folder.mkdir(parents=True)
    for span in _spans(text):
        record = {
            "prompt": [{"text": prompt}, {"image": "/far/away/cat.png"}] if span.text is None else [{"text": prompt}],
            "sample": 2,
            "span": 0,
            "modality": span.modality.label,
            "truncated": True,
            "step": 60,
            "seed": 4711,
            "sampling": {m.label: SAMPLING for m in Modality},
        }
        file = folder / f"x-{span.modality.label}{span.suffix}"
        file.write_bytes(to_bytes(span, record))
        file.with_name(f"{file.name}.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    recipe = tiny_recipe(tmp_path_factory.mktemp("page"))
    made = run_units(recipe)
    made.storage.write("recipes/1.yaml", dump_recipe(recipe).encode())
    return made


@pytest.fixture(scope="module")
def page(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    run, generated = write_run(folder / "run"), write_generated(folder / "generated", "a red apple")
    out = report(folder / "deep/page.html", run=run, dataset=dataset.uri, generated=generated, rows=9, title="My run")
    return out.read_text("utf-8")


def _bare(tmp_path: Path, **given: Any) -> Tree:
    parts: dict[str, Any] = {"dataset": None, "rows": [], "run": None, "generated": None, "title": "A title"}
    return Tree(write_page(tmp_path / "page.html", **(parts | given)).read_text("utf-8"))


def test_the_page_tells_all_three_parts(page: str) -> None:
    tree = Tree(page)
    assert [e.text for e in tree.named("h1")] == ["My run"]
    assert [e.text for e in tree.named("h2")] == ["What went in", "How it learned", "What came out"]
    assert len(tree.named("article")) == 9
    assert len(tree.named("figure")) == 6 + 3
    assert {"Pictures", "Sounds", "Texts"} <= {e.text for e in tree.named("h3")}


def test_the_page_asks_for_nothing_outside_itself(page: str) -> None:
    tree = Tree(page)
    assert not re.search(r"https?://|@import|url\(", page)
    assert not tree.named("script")
    assert not tree.named("link")
    for element in tree.all:
        for name in ("src", "href", "srcset", "data", "poster", "action"):
            assert (element.attributes.get(name) or "#").startswith(("#", "data:image/png;", "data:audio/wav;"))
    policies = [e.attributes["content"] for e in tree.named("meta") if "http-equiv" in e.attributes]
    assert policies
    assert (policies[0] or "").startswith("default-src 'none'")


def test_every_picture_and_sound_decodes(page: str) -> None:
    tree = Tree(page)
    pictures = [
        base64.b64decode((e.attributes["src"] or "").partition(",")[2], validate=True) for e in tree.named("img")
    ]
    sounds = [
        base64.b64decode((e.attributes["src"] or "").partition(",")[2], validate=True) for e in tree.named("audio")
    ]
    assert len(pictures) > 1
    assert len(sounds) > 1
    assert {Image.open(io.BytesIO(png)).size for png in pictures} == {(16, 16)}
    for wav in sounds:
        samples, rate = soundfile.read(io.BytesIO(wav))
        assert len(samples)
        assert rate in (8000, 16000)
    assert len(tree.styled("wave")) == len(sounds)


def test_the_figures_of_the_dataset_are_those_of_its_statistics(page: str, dataset: Dataset) -> None:
    figures, tree = summarize(dataset), Tree(page)
    cells = [e.text for e in tree.all if e.name in ("td", "dd", "th")]
    expected = [figures["documents"], *figures["tokens"].values()]
    expected += [source["documents"] for source in figures["sources"].values()]
    expected += [source["tokens"][m] for source in figures["sources"].values() for m in source["tokens"]]
    for value in expected:
        assert f"{value:,}" in cells
    for name, book in figures["codebooks"].items():
        assert name in cells
        assert f"{book['perplexity']:,.1f}" in cells


def test_the_figures_of_the_run_are_those_of_its_files(page: str) -> None:
    tree = Tree(page)
    told = [e.text for e in tree.named("dd")]
    config = UnifiedTransformerConfig(
        text_vocab_size=80, image_vocab_size=32, audio_vocab_size=32, hidden_size=32, num_layers=2,
        num_attention_heads=4, ffn_hidden_size=64, max_sequence_length=128, device="cpu",
    )  # fmt: skip
    assert short(float(f"{config.num_parameters():.3g}")) in told
    # 60 steps of 4 x 128 slots, a quarter of them padding, at 500 tokens a second.
    assert {"60", "23k", "46.1 s", "500"} <= set(told)
    rows = {e.text for e in tree.named("tr")}
    assert "text5.7136.4210.7082.03" in rows
    assert "codebook 04.6085.4200.8122.25" in rows
    assert "605.7135.9505.9004.6086.200" in rows
    assert "sequence_length: 128" in tree.named("pre")[0].text


def test_charts_show_what_was_recorded_and_say_it_in_words(page: str) -> None:
    tree = Tree(page)
    charts = tree.styled("chart")
    assert len(charts) == 6
    ids = {e.attributes["id"]: e.text for e in tree.all if "id" in e.attributes}
    for chart in charts:
        assert chart.attributes["role"] == "img"
        assert ids[chart.attributes["aria-labelledby"] or ""]
        assert ids[chart.attributes["aria-describedby"] or ""]
    said = ids["loss-text-desc"]
    assert said == "Training from 9.37 to 6.04; unigram 6.42; validation 5.71 at step 60."
    assert ids["codebooks-desc"] == "At step 60: codebook 0 -0.81, codebook 1 -0.46."
    # Two validations of three modalities and of two codebooks, each a dot that names its value.
    dots = [e.text for e in tree.named("circle") if e.text]
    assert len(dots) == 2 * (3 + 2)
    assert "validation, step 60: 5.713" in dots
    training = next(e for e in tree.styled("train") if (e.attributes.get("d") or "").count("L") > 5)
    assert (training.attributes["d"] or "").count("L") == 60 - 1


def test_a_generated_file_stands_with_its_prompt_and_settings(page: str) -> None:
    tree = Tree(page)
    assert [e.text for e in tree.styled("prompt")] == ["a red apple + cat.png"] * 2
    assert [e.text for e in tree.styled("before")] == ["a red apple"]
    assert "a red apple and more" in [e.text for e in tree.styled("prose")]
    settings = [e.text for e in tree.styled("settings")]
    assert settings[0] == "seed 4711, sample 2, step 60, temperature 0.85, top-k 40"
    assert settings[-1].endswith("cut at its limit")
    assert "Generated picture for the prompt: a red apple + cat.png" in [e.attributes["alt"] for e in tree.named("img")]


def test_hostile_texts_stay_text(tmp_path: Path) -> None:
    row = ShownRow(row_id=HOSTILE, source=HOSTILE, num_tokens=9, spans=_spans(HOSTILE), files=[None] * 3)
    generated = write_generated(tmp_path / "generated", HOSTILE[:-1], HOSTILE[:-1])
    tree = _bare(tmp_path, rows=[row], generated=generated, title=HOSTILE)
    assert not tree.named("script")
    assert len(tree.named("img")) == 2
    assert not any(name.startswith("on") for element in tree.all for name in element.attributes)
    shown = HOSTILE.replace("\x00", "\N{REPLACEMENT CHARACTER}").replace("\ud800", "?")
    assert tree.named("h1")[0].text == shown
    assert tree.styled("source")[0].text == shown
    assert any(shown in (image.attributes["alt"] or "") for image in tree.named("img"))


@given(text=st.text(alphabet=st.characters()), value=st.text(alphabet=st.characters()))
def test_any_text_comes_back_from_the_markup(text: str, value: str) -> None:
    (element,) = Tree(tag("p", text, title=value).encode().decode()).all
    assert _plain(element.text) == _plain(text)
    assert _plain(element.attributes["title"] or "") == _plain(value)


def _plain(text: str) -> str:
    """What is left of a text on a page: no control characters, no lone surrogates."""
    seen = text.encode("utf-8", "replace").decode()
    return "".join("\N{REPLACEMENT CHARACTER}" if re.match(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", c) else c for c in seen)


def test_only_markup_is_taken_as_markup() -> None:
    assert tag("p", Markup("<b>x</b>"), "<b>", None, 3) == "<p><b>x</b>&lt;b&gt;3</p>"
    assert tag("img", alt="", hidden=True, src=None, x_y=1) == '<img alt="" hidden x-y="1"/>'


def test_a_part_that_is_not_given_is_not_spoken_of(tmp_path: Path) -> None:
    tree = _bare(tmp_path)
    assert not tree.named("h2")
    assert not tree.named("nav")
    (tmp_path / "empty").mkdir()
    assert [e.text for e in _bare(tmp_path, run=write_run(tmp_path / "run")).named("h2")] == ["How it learned"]
    assert not _bare(tmp_path, generated=tmp_path / "empty").named("h2")


def test_a_run_in_the_middle_of_a_line_is_shown_as_far_as_it_is(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=20, finished=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    tree = _bare(tmp_path, run=run)
    assert "20 of 60" in [e.text for e in tree.named("dd")]
    assert "not finished" in tree.styled("subtitle")[0].text
    assert len(tree.styled("chart")) == 5
    assert not tree.named("table")


def test_a_run_that_has_taken_no_step_shows_its_recipe(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", finished=False)
    (run / "metrics.jsonl").unlink()
    tree = _bare(tmp_path, run=run)
    assert not tree.styled("chart")
    assert "sequence_length: 128" in tree.named("pre")[0].text


def test_a_long_run_makes_a_small_page(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    run = write_run(tmp_path / "run", steps=20_000)
    write_page(out, dataset=None, rows=[], run=run, generated=None, title="Long")
    assert out.stat().st_size < 100_000
    assert "means of 84 steps" in out.read_text("utf-8")


def test_what_is_no_run_and_what_is_no_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PageError, match="no run of Braid"):
        _bare(tmp_path, run=tmp_path)
    with pytest.raises(PageError, match="no such folder"):
        _bare(tmp_path, generated=tmp_path / "nowhere")
    generated = write_generated(tmp_path / "generated", "p")
    for damaged in ("[1]", '{"prompt": [{"text": 3}]}', '{"prompt": 5}', "{"):
        (generated / "x-text.txt.json").write_text(damaged)
        with pytest.raises(PageError, match=r"x-text\.txt\.json"):
            _bare(tmp_path, generated=generated)
    (generated / "x-text.txt.json").unlink()
    assert "x-text.txt" in [e.text for e in _bare(tmp_path, generated=generated).styled("settings")]


def test_a_long_text_opens_on_request_and_has_an_end() -> None:
    text = "word " * LONGEST_TEXT
    tree = Tree(prose(text))
    assert len(tree.styled("prose")[0].text) < 310
    assert tree.styled("prose")[1].text == text[:LONGEST_TEXT]
    assert tree.named("summary")[0].text == f"All {len(text):,} characters (the first {LONGEST_TEXT:,})"


def test_rows_are_spread_over_the_dataset(dataset: Dataset) -> None:
    assert spread(dataset, 4) == [0, 10, 21, 31]
    assert spread(dataset, 100) == list(range(42))
    assert spread(dataset, 0) == []


def test_a_waveform_follows_the_loudness() -> None:
    samples = np.concatenate([np.full(600, 0.1), np.full(600, -0.5)]).astype(np.float32)
    (outline,) = Tree(waveform(samples, 16000)).named("path")
    heights = [float(h) for h in re.findall(r"v([\d.]+)", outline.attributes["d"] or "")]
    assert len(heights) == 120
    assert heights[0] == pytest.approx(heights[-1] / 5, rel=0.02)
    assert Tree(waveform(np.zeros(3, np.float32), 16000)).named("path")
