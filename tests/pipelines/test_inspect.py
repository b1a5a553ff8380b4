"""Rows found, shown and asked for; two datasets compared; what the documentation says of other engines."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.decode import DecodedSpan
from pipelines.originals import beside, find_originals
from pipelines.report.difference import Side, compare, divergence_bits, opened
from pipelines.report.difference_page import change
from pipelines.rows import Search, find_row, rows_at, search, spread
from pipelines.sequence import Modality
from pipelines.shards.dataset import Dataset, DatasetError
from pipelines.shards.reader import ShardError
from pipelines.show import ShownRow, dataset_tokenizers, show
from pipelines.show_terminal import outline, print_row
from pipelines.sql import SqlError, ask, print_csv, print_json, print_table
from tests.pipelines.corpora import make_dataset, random_row, write_unit
from tests.pipelines.jobs import run_units
from tests.pipelines.tiny import tiny_recipe

DOCUMENT = (Path(__file__).parent.parent.parent / "docs" / "inspect.md").read_text()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """In the folder `data/animals` of a folder of its own."""
    folder = tmp_path_factory.mktemp("inspect")
    return run_units(tiny_recipe(folder, f"dataset={folder / 'data' / 'animals'}"), each=True)


def _rows(dataset: Dataset) -> list[dict[str, object]]:
    return [row for shard in dataset.shards() for row in pq.read_table(shard.path).to_pylist()]


def test_rows_are_found_by_index_and_by_id(dataset: Dataset) -> None:
    rows = _rows(dataset)
    assert [row.values for row in rows_at(dataset, [30, 0, 11])] == [rows[0], rows[11], rows[30]]
    assert find_row(dataset, "11").values == rows[11]
    whole = str(rows[5]["row_id"])
    assert find_row(dataset, whole).values == find_row(dataset, whole[:12]).values == rows[5]
    with pytest.raises(DatasetError, match=r"no row 42; version .* has rows 0 to 41"):
        list(rows_at(dataset, [1, 42]))
    with pytest.raises(DatasetError, match="row ids begin with"):
        find_row(dataset, "")
    assert spread(dataset, 3) == [0, 14, 28]


@pytest.mark.parametrize(
    "wanted",
    [
        Search(source="stamps"),
        Search(source="stamps/s00*"),
        Search(source="lines"),
        Search(modalities=(Modality.IMAGE, Modality.AUDIO)),
        Search(modalities=(Modality.TEXT,), max_tokens=30),
        Search(min_tokens=40, max_tokens=90),
        Search(source="nothing"),
        Search(min_tokens=10**6),
    ],
)
def test_a_search_finds_what_a_scan_finds(dataset: Dataset, wanted: Search) -> None:
    def fits(row: dict[str, object]) -> bool:
        source, spans = str(row["source"]), {span["modality"] for span in row["spans"]}  # type: ignore[attr-defined]
        named = (
            not wanted.source
            or source.split("/")[0] == wanted.source
            or re.match(wanted.source.replace("*", ".*") + "$", source)
        )
        tokens = int(row["num_tokens"])  # type: ignore[call-overload]
        return bool(
            named
            and wanted.min_tokens <= tokens <= (wanted.max_tokens or 10**9)
            and spans >= {int(m) for m in wanted.modalities}
        )

    expected = [row for row in _rows(dataset) if fits(row)]
    assert [row.values for row in search(dataset, wanted, 1000)] == expected
    assert [row.values for row in search(dataset, wanted, 2)] == expected[:2]


def test_a_search_for_text_leaves_out_documents_of_media_alone(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", units=1, rows=3)
    assert len(list(search(dataset, Search(modalities=(Modality.TEXT,)), 9))) == 3


def test_originals_are_what_the_tokenizers_saw(dataset: Dataset) -> None:
    tokenizers = dataset_tokenizers(dataset)
    stored = list(search(dataset, Search(modalities=(Modality.IMAGE,)), 3))
    stored += list(search(dataset, Search(source="lines"), 2))
    originals = find_originals(dataset, stored, tokenizers)
    assert [original.missing for original in originals] == [""] * 5
    for row, original in zip(show(dataset, stored, tokenizers=tokenizers), originals, strict=True):
        texts = [(span.text, raw.text) for span, raw in zip(row.spans, original.spans, strict=True) if span.text]
        # The tiny model's normalizer drops the space at a text's end.
        assert all(raw and decoded == raw.rstrip() for decoded, raw in texts)
        assert [s.modality for s in row.spans] == [s.modality for s in original.spans]
        for span, raw in zip(row.spans, beside(row.spans, original.spans), strict=True):
            if span.pixels is not None:
                assert raw is not None
                assert raw.pixels is not None
                assert span.pixels.shape == raw.pixels.shape
                # The tokenizers do the same with it as the job did.
                assert tokenizers.image is not None
                codes = tokenizers.image.encode(raw.pixels[None])[0]
                assert np.array_equal(tokenizers.image.decode(codes[None])[0], span.pixels)


def test_an_original_that_changed_or_is_gone_is_not_shown(tmp_path: Path) -> None:
    dataset = run_units(tiny_recipe(tmp_path))
    tokenizers = dataset_tokenizers(dataset)
    stored = list(search(dataset, Search(source="stamps"), 3))
    names = [row.values["source"].partition("/")[2] for row in stored]
    (tmp_path / "stamps" / f"{names[0]}.txt").write_text("another caption")
    (tmp_path / "stamps" / f"{names[1]}.png").unlink()
    originals = find_originals(dataset, stored, tokenizers)
    assert originals[0].missing == "its input has changed since"
    assert originals[1].missing == "not found in its input any more"
    assert originals[2].missing == ""
    late = find_originals(dataset, stored, tokenizers, timeout_s=-1)
    assert {original.missing for original in late} == {"not reached within -1 s"}


def test_a_terminal_with_colours_shows_pictures_as_blocks_and_another_does_not() -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[:2] = (255, 0, 0)
    spans = [
        DecodedSpan(modality=Modality.IMAGE, pixels=pixels),
        DecodedSpan(modality=Modality.AUDIO, waveform=np.linspace(0, 1, 96, dtype=np.float32), sample_rate_hz=8000),
    ]
    row = ShownRow(row_id="0123456789abcdef", source="s/[red]x", num_tokens=9, spans=spans, files=[None, None])
    said = {}
    for colours in (True, False):
        console = Console(
            file=io.StringIO(), width=80, force_terminal=colours, color_system="truecolor" if colours else None
        )
        print_row(row, console)
        said[colours] = console.file.getvalue()  # type: ignore[attr-defined]
    assert "s/[red]x" in said[False]
    assert "▀" not in said[False]
    assert "38;2;255;0;0;48;2;255;0;0m▀" in said[True]
    assert "38;2;0;0;0;48;2;0;0;0m▀" in said[True]
    assert outline(np.linspace(0, 1, 96, dtype=np.float32), 8) in "▁▂▃▄▅▆▇█"


def test_the_command_shows_a_search(dataset: Dataset, tmp_path: Path) -> None:
    asked = [
        "show",
        dataset.uri,
        "--source",
        "stamps/*",
        "--modality",
        "image",
        "--limit",
        "2",
        "--out",
        str(tmp_path / "o"),
    ]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0
    assert done.output.count("from stamps/") == 2
    assert {path.suffix for path in (tmp_path / "o").iterdir()} == {".txt", ".png", ".wav"}
    assert "No such document" in CliRunner().invoke(app, ["show", dataset.uri, "--source", "none"]).output
    for wrong in ([], ["0", "--source", "stamps"], ["--modality", "video"]):
        assert CliRunner().invoke(app, ["show", dataset.uri, *wrong]).exit_code == 2


def test_sql_answers_over_a_version(dataset: Dataset) -> None:
    rows = _rows(dataset)
    (answer,) = ask(dataset, "select count(*) n, sum(num_tokens) t from documents").read_all().to_pylist()
    assert answer == {"n": len(rows), "t": sum(int(row["num_tokens"]) for row in rows)}  # type: ignore[call-overload]
    spans = (
        ask(dataset, "select modality, count(*) n from spans group by modality order by n desc").read_all().to_pylist()
    )
    assert {entry["modality"]: entry["n"] for entry in spans} == {
        m.label: sum(span["modality"] == m for row in rows for span in row["spans"])  # type: ignore[attr-defined]
        for m in Modality
    }
    joined = "select count(*) n from documents a join documents b using (row_id) join shards on true"
    assert ask(dataset, joined).read_all().to_pylist() == [{"n": len(rows) * len(dataset.shards())}]
    first = Dataset.open(dataset.uri, 1)
    assert ask(first, "select count(*) n from documents").read_all()["n"].to_pylist() == [
        sum(shard.rows for shard in first.shards())
    ]
    assert ask(dataset, "select * from quarantine").read_all().num_rows == 0
    empty = Dataset.open(dataset.uri, 0)
    assert ask(empty, "select count(*) n from documents").read_all()["n"].to_pylist() == [0]
    assert ask(empty, "select * from spans").read_all().num_rows == 0


def test_sql_reads_through_the_checksums(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", units=1, rows=40)
    path = Path(dataset.shards()[0].path)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 8
    path.write_bytes(bytes(data))
    with pytest.raises((SqlError, ShardError), match="damaged"):
        ask(dataset, "select sum(list_sum(token_ids)) from documents").read_all()


def test_a_wrong_query_is_one_message(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", units=1, rows=2)
    with pytest.raises(SqlError, match="no_such"):
        ask(dataset, "select no_such from documents")
    with pytest.raises(SqlError, match="syntax"):
        ask(dataset, "selekt 1")


def test_answers_are_printed_as_table_json_and_csv(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", units=1, rows=5)
    query = "select row_id, num_tokens, [1, 2] as two from documents order by row_id"
    said = {}
    for name, form in (("table", print_table), ("json", print_json), ("csv", print_csv)):
        console = Console(file=io.StringIO(), width=100)
        form(ask(dataset, query), console, 2)
        said[name] = console.file.getvalue()  # type: ignore[attr-defined]
    assert "0x1" in said["table"]
    assert "0x3" not in said["table"]
    assert "The first 2 rows" in said["table"]
    assert [json.loads(line)["row_id"] for line in said["json"].splitlines()] == [f"0x{i}" for i in range(5)]
    assert said["csv"].splitlines()[0] == "row_id,num_tokens,two"
    assert len(said["csv"].splitlines()) == 6


def test_two_versions_are_compared(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", units=3, rows=20)
    sides = [Side.of(opened(version, dataset.uri)) for version in ("1", "3")]
    told = compare(*sides)
    figures = {entry["name"]: (entry["a"], entry["b"]) for entry in told["figures"]}
    assert figures["documents"] == (20, 60)
    assert figures["total tokens"] == tuple(side.statistics.tokens() for side in sides)
    assert told["shards"] == {"both": 1, "a": 0, "b": 2}
    assert told["vocabulary"] == []
    assert 19 <= told["common_documents"] <= 21
    assert 0 < told["codebooks"]["image"]["divergence_bits"] < 0.2
    same = compare(sides[1], sides[1])
    assert {entry["distance"] for entry in same["lengths"].values()} == {0.0}
    assert all(book["divergence_bits"] == 0 for book in same["codebooks"].values())
    assert same["pieces"] == []
    assert json.loads(json.dumps(told)) == json.loads(json.dumps(compare(*sides)))


def test_datasets_of_other_tokenizers_are_compared_without_their_ids(dataset: Dataset, tmp_path: Path) -> None:
    other = make_dataset(tmp_path / "other", units=1)
    told = compare(Side.of(dataset), Side.of(other))
    assert any("text_sha256" in line for line in told["vocabulary"])
    assert {book["divergence_bits"] for book in told["codebooks"].values()} == {None}
    assert told["pieces"] == []
    assert told["sources"]["lines"]["b"] == {"documents": 0, "tokens": 0}


def test_the_divergence_is_zero_for_equals_and_one_for_strangers() -> None:
    a, b = np.array([3, 5, 0, 0]), np.array([0, 0, 2, 2])
    assert divergence_bits(a, 7 * a) == pytest.approx(0, abs=1e-12)
    assert divergence_bits(a, b) == pytest.approx(1)
    p, q = np.array([0.5, 0.5]), np.array([0.25, 0.75])
    m = (p + q) / 2
    by_hand = ((p * np.log2(p / m)).sum() + (q * np.log2(q / m)).sum()) / 2
    assert divergence_bits(np.array([2, 2]), np.array([1, 3])) == pytest.approx(by_hand)
    assert [change(2, 3), change(0, 3), change(3, 3)] == ["+50.0%", "new", "="]


def test_the_command_compares(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", units=2)
    run = CliRunner()
    done = run.invoke(app, ["stats", dataset.uri, "--diff", "1", "2", "--json"])
    assert json.loads(done.stdout)["b"]["version"] == 2
    page = tmp_path / "diff.html"
    pinned = [f"{dataset.uri}@1", dataset.uri]
    assert run.invoke(app, ["stats", "--diff", *pinned, "--html", str(page)]).exit_code == 0
    assert "<title>d v1 and d v2" in page.read_text()
    assert "documents" in run.invoke(app, ["stats", "--diff", *pinned]).output
    assert run.invoke(app, ["stats"]).exit_code == 2
    assert run.invoke(app, ["stats", dataset.uri, "--diff", "1", "2", "--version", "1"]).exit_code == 2
    with pytest.raises(DatasetError, match="no version; give two versions"):
        opened("yesterday", dataset.uri)


def test_a_change_of_one_row_is_seen(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", units=1)
    dataset.commit([write_unit(dataset, "more", [random_row("x", np.random.default_rng(9))])])
    told = compare(Side.of(opened("1", dataset.uri)), Side.of(opened("2", dataset.uri)))
    assert told["sources"]["stamps"]["a"]["documents"] + 1 == told["sources"]["stamps"]["b"]["documents"]


def _snippets() -> dict[str, str]:
    return dict(re.findall(r"^([A-Z][\w ]+|pyarrow):\n\n```python\n(.*?)```", DOCUMENT, re.M | re.S))


def test_every_engine_has_a_snippet() -> None:
    assert list(_snippets()) == ["DuckDB", "Polars", "pyarrow", "Ray Data", "Hugging Face datasets"]


@pytest.mark.parametrize(
    "engine",
    [
        *("DuckDB", "Polars", "pyarrow"),
        *(pytest.param(engine, marks=pytest.mark.slow) for engine in ("Ray Data", "Hugging Face datasets")),
    ],
)
def test_the_snippet_of_an_engine_runs(dataset: Dataset, engine: str, tmp_path: Path) -> None:
    folder = Path(dataset.uri).parent.parent
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _snippets()[engine]], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_commands_of_the_document_run(dataset: Dataset, tmp_path: Path) -> None:
    folder = Path(dataset.uri).parent.parent
    lines = re.findall(r"^    braid (sql .*)$", DOCUMENT, re.M)
    assert len(lines) == 3
    for line in lines:
        query, _, rest = line.removeprefix("sql data/animals ").strip('"').partition('" ')
        done = CliRunner().invoke(app, ["sql", str(folder / "data/animals"), query, *rest.split()])
        assert done.exit_code == 0, done.output
