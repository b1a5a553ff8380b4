"""The demo corpus, made from small packages of our own; no network."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from pipelines.corpus import debian
from pipelines.corpus.debian import package
from pipelines.corpus.demo import REFERENCE, STAMPS, caption_in, manual_sections, prepare
from pipelines.corpus.documents import Document, Slice
from pipelines.corpus.errors import CorpusError
from pipelines.corpus.json_lines import JsonLinesSource
from pipelines.corpus.media_folder import MediaFolderSource
from pipelines.sequence import Modality

MANUAL = """The Manual

Table of Contents

Preface
    1. Disclaimer
1. Tutorials

1.\xa0Disclaimer

    No warranty, of
    any kind.

Chapter\xa01.\xa0Tutorials

Table of Contents

1.1. Console basics
    1.1.1. The prompt

1.1.\xa0Console basics

1.1.1.\xa0The
prompt

    Type this:

      $ ls
   
    See Section\xa01.1.
"""
CATEGORIES = {"animals/birds": 8, "animals/fish": 4, "food": 6, "symbols": 2}


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    root = tmp_path / "packages"
    stamps = root / STAMPS / "usr/share/tuxpaint/stamps"
    for category, count in CATEGORIES.items():
        (stamps / category).mkdir(parents=True)
        for i in range(count):
            stem = stamps / category / f"thing.{i}"
            Image.fromarray(rng.integers(0, 256, (9, 7, 4), dtype=np.uint8)).save(f"{stem}.png")
            Path(f"{stem}.txt").write_text(f"A thing {i}.\nde.utf8=Ein Ding {i}.\nfr.utf8=Une chose {i}. \n")
            soundfile.write(f"{stem}_desc_fr.ogg", rng.uniform(-0.5, 0.5, 8000), 8000)
            soundfile.write(f"{stem}.ogg", rng.uniform(-0.5, 0.5, 800), 8000)
    # One without speech, one without caption, one whose speech is a link.
    (stamps / "food/thing.0_desc_fr.ogg").unlink()
    (stamps / "food/thing.1.txt").write_text("A thing.\nde.utf8=Ein Ding.\n")
    (stamps / "food/thing.2_desc_fr.ogg").unlink()
    (stamps / "food/thing.2_desc_fr.ogg").symlink_to("thing.3_desc_fr.ogg")
    manual = root / REFERENCE / "usr/share/debian-reference"
    manual.mkdir(parents=True)
    with gzip.open(manual / "debian-reference.en.txt.gz", "wt", encoding="utf-8") as file:
        file.write(MANUAL)
    return root


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


def test_the_readers_find_captions_pictures_voices_and_text(packages: Path, tmp_path: Path) -> None:
    out = prepare(tmp_path / "demo/corpus", tmp_path / "cache", packages_folder=packages)
    stamps = MediaFolderSource(reader="media_folder", name="stamps", path=str(out / "stamps"))
    text = JsonLinesSource(reader="jsonl", name="text", path=str(out / "text"), id_field="id")
    documents = [
        document
        for source in (stamps, text)
        for document in source.read([Slice(input=i, start=0, stop=i.size) for i in source.inputs()])
        if isinstance(document, Document)
    ]
    assert len(documents) == sum(CATEGORIES.values()) - 2 + 2
    bird = next(d for d in documents if d.source == "stamps/animals/birds/thing.3")
    assert {s.modality for s in bird.spans} == set(Modality)
    assert next(s.text for s in bird.spans if s.text) == "Une chose 3."
    assert [d.source for d in documents[-2:]] == ["text/debian-reference.jsonl#1", "text/debian-reference.jsonl#1.1.1"]


def test_the_manual_becomes_sections_without_its_tables_of_contents() -> None:
    assert list(manual_sections(MANUAL)) == [
        {"id": "1", "title": "Disclaimer", "text": "Disclaimer\n\nNo warranty, of\nany kind."},
        {"id": "1.1.1", "title": "The prompt", "text": "The prompt\n\nType this:\n\n  $ ls\n\nSee Section 1.1."},
    ]


def test_captions_are_found_by_language() -> None:
    text = "A duck.\nfr.utf8=Un canard. \nfr_CA.utf8=autre\n"
    assert [caption_in(text, language) for language in ("en", "fr", "de")] == ["A duck.", "Un canard.", ""]
    assert caption_in("", "en") == ""


def test_fewer_stamps_are_spread_over_the_categories(packages: Path, tmp_path: Path) -> None:
    out = prepare(tmp_path / "corpus", tmp_path / "cache", stamps=9, packages_folder=packages)
    chosen = Counter(path.relative_to(out / "stamps").parts[0] for path in (out / "stamps").rglob("*.png"))
    assert chosen == {"animals": 6, "food": 2, "symbols": 1}


def test_making_it_again_changes_no_byte_and_no_time(packages: Path, tmp_path: Path) -> None:
    out = prepare(tmp_path / "corpus", tmp_path / "cache", packages_folder=packages)
    first = files(out)
    prepare(out, tmp_path / "cache", packages_folder=packages)
    assert files(out) == first
    prepare(out, tmp_path / "cache", stamps=3, packages_folder=packages)
    assert len(files(out)) < len(first)
    prepare(out, tmp_path / "cache", packages_folder=packages)
    first.pop("demo-corpus.json")
    assert files(out).items() >= first.items()
    assert [path.name for path in tmp_path.iterdir() if "corpus" in path.name] == ["corpus"]


def test_foreign_folders_are_left_alone(packages: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/thesis.txt").write_text("mine")
    with pytest.raises(CorpusError, match="no demo corpus"):
        prepare(tmp_path / "corpus", tmp_path / "cache", packages_folder=packages)
    assert (tmp_path / "corpus/thesis.txt").read_text() == "mine"


def test_a_failure_leaves_nothing_behind(packages: Path, tmp_path: Path) -> None:
    manual = packages / REFERENCE / "usr/share/debian-reference/debian-reference.en.txt.gz"
    manual.write_bytes(manual.read_bytes()[:-20])
    with pytest.raises(EOFError):
        prepare(tmp_path / "demo/corpus", tmp_path / "cache", packages_folder=packages)
    assert list((tmp_path / "demo").iterdir()) == []


def test_an_unknown_language_lists_the_spoken_ones(packages: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"'xx'; there are fr \(19\)"):
        prepare(tmp_path / "corpus", tmp_path / "cache", language="xx", packages_folder=packages)


def test_without_apt_get_the_command_says_what_to_do(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.corpus.demo", "--out", "corpus", "--cache", "cache"],
        cwd=tmp_path,
        env={"PATH": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "apt-get" in done.stderr
    assert "--packages DIR" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb makes and unpacks the package")
def test_deb_files_are_unpacked_into_the_cache_once(tmp_path: Path) -> None:
    archive = deb(tmp_path / "debs", "hello-data", "1.0")
    unpacked = package("hello-data", tmp_path / "cache", archive.parent)
    assert (unpacked / "usr/share/hello.txt").read_text() == "hello 1.0"
    archive.write_bytes(b"damaged later")
    assert package("hello-data", tmp_path / "cache", archive.parent) == unpacked
    (tmp_path / "debs/other_1_all.deb").write_bytes(random.Random(1).randbytes(100))
    with pytest.raises(CorpusError, match=r"other_1_all\.deb: dpkg-deb could not unpack it"):
        package("other", tmp_path / "cache", archive.parent)
    with pytest.raises(CorpusError, match="holds neither"):
        package("absent", tmp_path / "cache", archive.parent)
    assert [path.name for path in (tmp_path / "cache/packages").iterdir()] == ["hello-data_1.0_all"]


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb makes and unpacks the package")
def test_missing_package_lists_are_fetched_once_and_kept_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    archive = deb(tmp_path / "mirror", "hello-data", "2.0")
    apt_get(
        tmp_path / "bin",
        f"""echo "$*" >> {tmp_path}/calls
        case "$*" in
        *update*) touch {tmp_path}/lists;;
        *download*) test -e {tmp_path}/lists && cp {archive} . || {{ echo "E: Unable to locate package" >&2; exit 100; }};;
        esac""",
    )
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    cache = tmp_path / "cache"
    unpacked = package("hello-data", cache)
    assert (unpacked / "usr/share/hello.txt").read_text() == "hello 2.0"
    assert "fetching lists of our own" in capfd.readouterr().out
    calls = (tmp_path / "calls").read_text().splitlines()
    assert ["update" in call for call in calls] == [False, True, False]
    assert f"Dir::State::Lists={cache}/apt/lists" in calls[1]
    assert package("hello-data", cache) == unpacked
    assert len((tmp_path / "calls").read_text().splitlines()) == 3
    assert capfd.readouterr().out == ""


def test_a_failed_download_is_told_in_apt_gets_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apt_get(tmp_path / "bin", f'echo "$*" >> {tmp_path}/calls; echo "E: the disk is on fire" >&2; exit 100')
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(CorpusError, match=r"the disk is on fire[\s\S]*--packages DIR"):
        package("hello-data", tmp_path / "cache")
    assert "update" not in (tmp_path / "calls").read_text()
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_cache_follows_the_desktop_convention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert debian.default_cache() == Path("/somewhere/braid")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert debian.default_cache() == Path.home() / ".cache/braid"


def deb(folder: Path, name: str, version: str) -> Path:
    tree = folder / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: A <a@example.org>\nDescription: x\n"
    )
    (tree / "usr/share").mkdir(parents=True)
    (tree / "usr/share/hello.txt").write_text(f"hello {version}")
    subprocess.run(["dpkg-deb", "--root-owner-group", "-b", str(tree), str(folder)], check=True, capture_output=True)
    return folder / f"{name}_{version}_all.deb"


def apt_get(folder: Path, script: str) -> None:
    folder.mkdir()
    (folder / "apt-get").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "apt-get").chmod(0o755)


def test_the_summary_counts_what_was_made(packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = prepare(tmp_path / "corpus", tmp_path / "cache", packages_folder=packages)
    said = capsys.readouterr().out
    assert "18 of 18 pictures" in said
    assert "3 categories" in said
    assert "2 sections" in said
    lines = (out / "text/debian-reference.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["1", "1.1.1"]
