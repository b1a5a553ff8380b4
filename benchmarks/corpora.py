"""Real corpora for the benchmarks, from Debian packages: texts in three scripts, drawings with captions, speech.

Everything is made below a folder once and kept; licences stand in docs/third_party.md.
"""

from __future__ import annotations

import gzip
import html
import io
import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipelines.corpus.debian import default_cache, package

TEXT_PACKAGES = {
    "latin": ("debian-reference-en", "debian-reference-de", "debian-handbook"),
    "cyrillic": ("manpages-ru", "fortunes-ru"),
    "japanese": ("debian-reference-ja", "manpages-ja"),
}

_DOCUMENT_CHARACTERS = 2000
"""Sections are joined to documents of at least so many characters, about those of web pages."""


def texts(folder: Path, files: int = 8) -> dict[str, Path]:
    """JSON lines of each script, in a folder with some files of equal length, documents in random order."""
    made: dict[str, Path] = {}
    for script, packages in TEXT_PACKAGES.items():
        made[script] = folder / script
        if made[script].is_dir():
            continue
        documents = [d for name in packages for d in _documents(package(name, default_cache()))]
        random.Random(0).shuffle(documents)
        lines = [json.dumps({"id": f"{script}-{i}", "text": d}, ensure_ascii=False) for i, d in enumerate(documents)]
        partial = folder / f".{script}"
        partial.mkdir(parents=True, exist_ok=True)
        for index in range(files):
            (partial / f"{index}.jsonl").write_text(
                "".join(f"{line}\n" for line in lines[index::files]), encoding="utf-8"
            )
        partial.rename(made[script])
    return made


def media(folder: Path, kind: str, count: int) -> Path:
    """So many pictures (`png`) or sounds (`wav`) in a folder, repeated under other names where there are too few."""
    name, ending = {"png": ("tuxpaint-stamps-default", ".png"), "wav": ("asterisk-core-sounds-en-wav", ".wav")}[kind]
    target = folder / f"{kind}-{count}"
    if not target.is_dir():
        found = sorted(p for p in package(name, default_cache()).rglob(f"*{ending}") if p.stat().st_size > 4000)
        random.Random(0).shuffle(found)
        partial = folder / f".{kind}-{count}"
        partial.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            shutil.copyfile(found[index % len(found)], partial / f"{index:06}{ending}")
        partial.rename(target)
    return target


def _documents(package_folder: Path) -> Iterator[str]:
    pages = (
        p for p in sorted(package_folder.rglob("*")) if p.is_file() and re.search(r"\.(html|gz)$|/fortunes/", str(p))
    )
    buffer = ""
    for page in pages:
        text = _text(page.read_bytes())
        for section in re.split(r"\n\s*\n\s*\n", text or ""):
            buffer += section + "\n"
            if len(buffer) > _DOCUMENT_CHARACTERS:
                yield buffer.strip()
                buffer = ""


def _text(data: bytes) -> str | None:
    if data.startswith(b"\x1f\x8b"):
        data = gzip.GzipFile(fileobj=io.BytesIO(data)).read()
    try:
        text = data.decode()
    except UnicodeDecodeError:
        # Databases and pictures of the packages.
        return None
    if "<html" in text[:1000].lower():
        text = html.unescape(re.sub(r"<[^>]+>", " ", re.sub(r"(?s)<(script|style).*?</\1>", "", text)))
    return text.replace("\x00", "")
