"""`braid stats`: its figures are those of a brute-force scan, in JSON, in the terminal and on the page."""

from __future__ import annotations

import io
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import jsonschema
import numpy as np
import polars
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pipelines.corpus.documents import Reject
from pipelines.report.histogram import bar_chart, edges, histogram, spark
from pipelines.report.padding import expected_padding
from pipelines.report.remarks import remarks
from pipelines.report.summary import SCHEMA, summarize
from pipelines.report.terminal import render
from pipelines.shards import dataset as dataset_module
from pipelines.shards.dataset import Dataset
from pipelines.shards.statistics import Statistics
from tests.pipelines.corpora import VOCABULARY, make_dataset, random_row, write_unit
from tests.pipelines.jobs import run_units, text_recipe, write_text
from tests.pipelines.tiny import tiny_recipe

SCHEMA_FILE = Path(__file__).parent.parent.parent / "docs" / "stats.schema.json"

Counts = st.dictionaries(st.integers(1, 200_000), st.integers(1, 50), min_size=1, max_size=60)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """All three modalities from raw files, a broken picture among them, in several versions."""
    folder = tmp_path_factory.mktemp("stats")
    recipe = tiny_recipe(folder)
    (folder / "stamps" / "s003.png").write_bytes(b"no picture")
    return run_units(recipe, each=True)


def _scanned(dataset: Dataset) -> polars.DataFrame:
    return polars.read_parquet([shard.path for shard in dataset.shards()])


def test_every_figure_equals_a_scan_of_all_shards(dataset: Dataset) -> None:
    figures, rows = summarize(dataset), _scanned(dataset)
    assert figures["documents"] == rows.height
    assert figures["tokens"]["total"] == rows["num_tokens"].sum()
    for modality in ("text", "image", "audio"):
        assert figures["tokens"][modality] == rows[f"num_{modality}"].sum()
    assert _unbinned(figures["histograms"]["document_tokens"]) == rows.height
    for low, high, count in figures["histograms"]["document_tokens"]:
        assert count == rows.filter(polars.col("num_tokens").is_between(low, high)).height
    spans = rows.explode("spans")["spans"].struct.unnest()
    for index, modality in enumerate(("text", "image", "audio")):
        lengths = spans.filter(polars.col("modality") == index)["length"]
        told = figures["spans"][modality]
        assert told["count"] == len(lengths)
        assert list(told["length"].values()) == [
            int(np.quantile(lengths.to_numpy(), float(q), method="inverted_cdf")) for q in told["length"]
        ]
        for low, high, count in figures["histograms"][f"{modality}_span"]:
            assert count == int(lengths.is_between(low, high).sum())
    assert {int(low): count for low, _, count in figures["histograms"]["spans_per_document"] if count} == Counter(
        rows["spans"].list.len().to_list()
    )
    names = rows["source"].str.split("/").list.first()
    for name, source in figures["sources"].items():
        of = rows.filter(names == name)
        assert source["documents"] == of.height
        assert [source["tokens"][m] for m in ("text", "image", "audio")] == [
            of[f"num_{m}"].sum() for m in ("text", "image", "audio")
        ]


def test_codes_and_pieces_are_counted_as_a_scan_counts_them(dataset: Dataset) -> None:
    figures = summarize(dataset)
    tokens = _scanned(dataset).select("token_ids", "modality_ids").explode("token_ids", "modality_ids")
    v = dataset.vocabulary
    ids = {m: tokens.filter(polars.col("modality_ids") == m)["token_ids"].to_numpy() for m in range(3)}
    pieces = Counter(ids[0][ids[0] < v.text_pieces].tolist())
    assert figures["text_pieces"]["used"] == len(pieces)
    assert {entry["id"]: entry["count"] for entry in figures["text_pieces"]["top"]} == dict(
        sorted(pieces.items(), key=lambda item: (-item[1], item[0]))[: len(figures["text_pieces"]["top"])]
    )
    books = {"image": ids[1]} | {
        f"audio {q}": ids[2][ids[2] // v.audio_codebook_size == q] for q in range(v.audio_codebooks)
    }
    for name, codes in books.items():
        _, counts = np.unique(codes, return_counts=True)
        p = counts / counts.sum()
        told = figures["codebooks"][name]
        assert told["used"] == len(counts)
        assert told["entropy_bits"] == pytest.approx(float(-(p * np.log2(p)).sum()), abs=1e-3)
        assert told["perplexity"] == pytest.approx(2 ** float(-(p * np.log2(p)).sum()), abs=0.06)


def test_raw_bytes_are_those_of_the_corpus(dataset: Dataset, tmp_path: Path) -> None:
    folder = Path(dataset.uri).parent
    kept = [file for file in (folder / "stamps").iterdir() if file.stem != "s003"]
    sizes = {ending: sum(f.stat().st_size for f in kept if f.suffix == ending) for ending in (".txt", ".png", ".wav")}
    raw = summarize(dataset)["sources"]["stamps"]["raw_bytes"]
    assert (raw["text"], raw["image"], raw["audio"]) == (sizes[".txt"], sizes[".png"], sizes[".wav"])
    assert raw["documents"] == len(kept) / 3
    texts = text_recipe(tmp_path, a="größer", b="fox")
    assert summarize(run_units(texts))["raw_bytes"] == {"text": 11, "image": 0, "audio": 0, "total": 11, "documents": 2}


def test_rejects_come_from_the_roll_up_and_leave_with_their_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = text_recipe(tmp_path)
    write_text(tmp_path, "t3", b"\xff\xfe\xff")
    figures = summarize(run_units(recipe))
    assert figures["quarantine"] == {"text: not UTF-8": 1}
    assert figures["sources"]["texts"]["rejected"] == {"text: not UTF-8": 1}
    with monkeypatch.context() as patched:
        patched.setattr(dataset_module.Quarantine, "read", None)
        assert summarize(Dataset.open(recipe.dataset))["quarantine"] == {"text: not UTF-8": 1}
    write_text(tmp_path, "t3", "mended, and longer")
    assert summarize(run_units(recipe))["quarantine"] == {}


def test_what_an_older_braid_did_not_count_is_read_or_said_to_be_unknown(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", units=0)
    reject = Reject(source="s/a.png", position=0, reason="image: cannot be decoded", error="s/a.png: truncated")
    shard = write_unit(dataset, "u", [random_row("r", np.random.default_rng(0))], [reject])
    for source in shard.statistics["sources"].values():
        for key in ("rejected", "raw_bytes", "weighed"):
            del source[key]
    dataset.commit([shard])
    figures = summarize(dataset)
    assert figures["quarantine"] == {"image: cannot be decoded": 1}
    assert figures["raw_bytes"]["documents"] == 0
    assert "unknown" not in json.dumps(figures["raw_bytes"])


def test_a_report_opens_no_shard(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = summarize(dataset)

    def refuse(*arguments: object) -> None:
        raise AssertionError("a shard was opened")

    for module in ("reader", "rollup", "dataset"):
        for name in ("open_shard", "read_footer"):
            monkeypatch.setattr(f"pipelines.shards.{module}.{name}", refuse, raising=False)
    assert summarize(Dataset.open(dataset.uri)) == expected


def test_the_json_is_as_its_schema_says(dataset: Dataset, tmp_path: Path) -> None:
    schema = json.loads(SCHEMA_FILE.read_text())
    assert schema["properties"]["schema"]["const"] == SCHEMA
    jsonschema.Draft202012Validator.check_schema(schema)
    for one in (dataset, make_dataset(tmp_path / "none", units=0), make_dataset(tmp_path / "random", units=2)):
        figures = json.loads(json.dumps(summarize(one)))
        jsonschema.validate(figures, schema)
        assert figures.keys() == schema["properties"].keys()


def test_growth_tells_each_version_and_stays_short(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", units=60, rows=1)
    told = summarize(dataset)["growth"]
    assert len(told) == 48
    assert [told[0]["version"], told[-1]["version"]] == [1, 60]
    for entry in told:
        assert entry["documents"] == Dataset.open(dataset.uri, entry["version"]).statistics().documents
        assert entry["time_ms"] > 1_600_000_000_000
    assert summarize(Dataset.open(dataset.uri, 7))["growth"][-1]["version"] == 7


def test_pieces_go_by_their_ids_where_the_tokenizer_is_another_one(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", units=1)
    pieces = summarize(dataset)["text_pieces"]
    assert pieces["top"][0]["piece"] is None
    assert "its tokenizers are unknown" in pieces["missing_names"]


def test_the_terminal_shows_the_figures(dataset: Dataset) -> None:
    console = Console(file=io.StringIO(), width=140)
    figures = summarize(dataset)
    render(figures, console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    for value in (f"{figures['documents']:,} documents", f"{figures['tokens']['audio']:,}", "image: unknown format"):
        assert value in said
    assert spark(figures["histograms"]["document_tokens"]) in said


@given(counts=Counts)
def test_every_counted_thing_lies_in_exactly_one_bin(counts: dict[int, int]) -> None:
    bins = histogram(counts)
    assert len(bins) <= 64
    assert all(before[1] + 1 == after[0] for before, after in pairwise(bins))
    assert bins[0][0] <= min(counts)
    assert bins[-1][1] >= max(counts)
    for low, high, count in bins:
        assert count == sum(n for value, n in counts.items() if low <= value <= high)
    assert len(spark(bins)) == len(bins)
    assert bar_chart("k", "t", "d", bins, x_label="x", y_label="y").count("<rect") == len(bins)


@given(one=Counts, other=Counts)
def test_two_histograms_share_the_edges_that_hold_both(one: dict[int, int], other: dict[int, int]) -> None:
    within = edges(min(*one, *other), max(*one, *other))
    first, second = histogram(one, within), histogram(other, within)
    assert [bin[:2] for bin in first] == [bin[:2] for bin in second]
    assert _unbinned(first) == sum(one.values())
    assert _unbinned(second) == sum(other.values())


def _unbinned(bins: list[tuple[int, int, int]]) -> int:
    return sum(count for *_, count in bins)


@given(lengths=st.lists(st.integers(3, 5000), min_size=1, max_size=200), length=st.sampled_from([16, 512, 4096]))
def test_padding_is_never_negative_and_least_when_packed(lengths: list[int], length: int) -> None:
    told = expected_padding(Counter(lengths), length)
    pieces = sum(-(-n // length) for n in lengths)
    assert told.separate == pytest.approx(1 - sum(lengths) / (pieces * length))
    assert 0 <= told.packed <= told.separate + 1e-9
    assert told.cut == sum(n > length for n in lengths) / len(lengths)


def test_padding_of_many_documents_is_estimated_from_a_sample() -> None:
    lengths = np.random.default_rng(0).integers(3, 2000, 60_000)
    whole = expected_padding(Counter(lengths[:20_000].tolist()), 2048)
    many = expected_padding(Counter(lengths.tolist()), 2048)
    assert many.packed == pytest.approx(whole.packed, abs=0.005)


def test_remarks_name_what_is_outside_of_its_limits(dataset: Dataset) -> None:
    figures = summarize(dataset)
    said = " ".join(figures["remarks"])
    assert "are in quarantine" in said
    healthy = figures | {"quarantine": {}, "distinct_documents": figures["documents"], "padding": []}
    assert remarks(healthy) == []
    doubled = healthy | {"documents": 100, "distinct_documents": 50}
    assert remarks(doubled) == ["About 50% of the documents repeat others; training reads every copy."]
    assert remarks(summarize(Dataset.create(Path(dataset.uri).parent / "e", VOCABULARY, validation_share=0))) == [
        "The dataset has no documents."
    ]


def test_statistics_of_rejects_merge_and_subtract() -> None:
    one, two = Statistics.empty(VOCABULARY), Statistics.empty(VOCABULARY)
    for statistics, count in ((one, 1), (two, 2)):
        for n in range(count):
            statistics.reject(Reject(source="s/x", position=n, reason="text: empty", error=""))
    one.merge(Statistics.from_json(json.loads(json.dumps(two.to_json()))))
    assert one.sources["s"].rejected == {"text: empty": 3}
    one.subtract(two)
    assert one.sources["s"].rejected == {"text: empty": 1}
