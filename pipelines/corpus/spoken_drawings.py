"""Drawings whose names are written and spoken: 8,105 in the public domain, each caption by several voices of espeak-ng.

    python -m pipelines.corpus.spoken_drawings --out corpus [--voices en,de,fr] [--drawings N] [--packages DIR]

Enters: the Debian package openclipart-png, and the package espeakng-loader. Leaves: `NNNN.tar` for reader `webdataset`, a
sample for each drawing and voice: `.png` of at most 128 pixels, `.txt`, `.flac` at 16 kHz, `.json` with the language. Always
holds: all samples of a drawing have its path as their key, so they are held out from training together; the same package
and settings give the same bytes; and a tar is whole or not there, so what was interrupted is gone on with.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import re
import sys
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from pipelines.corpus.debian import default_cache, package
from pipelines.corpus.demo import spread
from pipelines.corpus.errors import CorpusError
from pipelines.corpus.espeak import speak, voices

PACKAGE = "openclipart-png"

VOICES = ("en", "en-US", "de", "fr", "es", "it", "pt", "pl")

_SIDE = 128
_RATE_HZ = 16_000
_DRAWINGS = 128
"""Of one tar."""

_ABOUT = "spoken-drawings.json"


def caption(name: str) -> str:
    """What a drawing's path says: its words, and what folders it lies in.

    `animals/birds/red_parrot_02` becomes `red parrot, birds, animals`. Numbers at the end only tell namesakes apart.
    """
    *folders, own = name.split("/")
    words = _words(re.sub(r"[-_ .]*\d+$", "", own) or own)
    said = [words]
    for folder in reversed(folders):
        if (more := _words(folder)) and more not in said and folder != "unsorted":
            said.append(more)
    return ", ".join(said)


def _words(text: str) -> str:
    text = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=\d)(?=[A-Za-z])|(?<=[A-Za-z])(?=\d)|[-_.+]+", " ", text)
    return " ".join(text.lower().split())


def prepare(
    out: Path,
    cache: Path,
    *,
    speakers: Sequence[str] = VOICES,
    drawings: int | None = None,
    packages_folder: Path | None = None,
    processes: int | None = None,
) -> Path:
    """Make the corpus, or what is missing of it.

    Args:
        speakers: voices of espeak-ng, each a sample of every drawing.
        drawings: how many, spread over the folders; None is all.
        processes: that draw and speak; None is one a core.

    Raises:
        CorpusError: a package or a voice is missing, or `out` holds something else.
    """
    if unknown := sorted(set(speakers) - set(voices())):
        raise CorpusError(f"espeak-ng has no voice {', '.join(unknown)}; it has {', '.join(voices())}")
    root = package(PACKAGE, cache, packages_folder) / "usr/share/openclipart/png"
    names = sorted(file.relative_to(root).with_suffix("").as_posix() for file in root.rglob("*.png"))
    if not names:
        raise CorpusError(f"{root}: holds no drawing: another version of the package {PACKAGE}; use Debian 12's")
    chosen = spread(names, drawings or len(names))
    about = {"voices": list(speakers), "drawings": len(chosen), "of": len(names)}
    if out.exists() and any(out.iterdir()) and not (out / _ABOUT).is_file():
        raise CorpusError(f"{out}: holds something that is no such corpus; name another folder with --out")
    if (out / _ABOUT).is_file() and (there := json.loads((out / _ABOUT).read_text())) != about:
        raise CorpusError(f"{out}: was made with {there}, now it is {about}; name another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    (out / _ABOUT).write_text(json.dumps(about) + "\n")
    chunks = [(out / f"{i // _DRAWINGS:04}.tar", chosen[i : i + _DRAWINGS]) for i in range(0, len(chosen), _DRAWINGS)]
    missing = [chunk for chunk in chunks if not chunk[0].exists()]
    # A process for each tar, for espeak-ng keeps state; anew, for threads of this one may hold locks.
    context = multiprocessing.get_context("spawn")
    count = min(processes or os.cpu_count() or 1, max(len(missing), 1))
    seconds = 0.0
    with context.Pool(count, maxtasksperchild=1) as pool:
        write = partial(_write_tar, root, tuple(speakers))
        for done, more in enumerate(pool.imap_unordered(write, missing), len(chunks) - len(missing) + 1):
            seconds += more
            print(f"\r{done}/{len(chunks)} tars, {seconds / 3600:.1f} h of speech", end="", file=sys.stderr, flush=True)
    if missing:
        print(file=sys.stderr)
    return out


def _write_tar(root: Path, speakers: Sequence[str], chunk: tuple[Path, list[str]]) -> float:
    """One tar; the seconds of its speech."""
    import soundfile
    import soxr

    file, names = chunk
    found = {name: picture for name in names if (picture := _picture(root / f"{name}.png"))}
    names, pictures = list(found), list(found.values())
    captions = [caption(name) for name in names]
    seconds = 0.0
    partial_file = file.with_suffix(".part")
    with tarfile.open(partial_file, "w") as tar:
        for voice in speakers:
            for name, picture, text, (waveform, rate_hz) in zip(
                names, pictures, captions, speak(captions, voice), strict=True
            ):
                sound = io.BytesIO()
                heard = soxr.resample(waveform, rate_hz, _RATE_HZ)
                soundfile.write(sound, heard.clip(-1, 1), _RATE_HZ, format="FLAC", subtype="PCM_16")
                seconds += len(heard) / _RATE_HZ
                # A dot would end the key.
                key = name.replace(".", "_")
                for suffix, data in (
                    ("png", picture),
                    ("txt", text.encode()),
                    ("flac", sound.getvalue()),
                    ("json", json.dumps({"language": voice}).encode()),
                ):
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    partial_file.replace(file)
    return seconds


def _picture(file: Path) -> bytes | None:
    """A small version; None of one that has more pixels than Pillow thinks sane, of which the package has 16."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as opened:
                picture = opened.convert("RGBA")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None
    picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    picture.save(data, "PNG", optimize=True)
    return data.getvalue()


def _listed(text: str) -> Iterator[str]:
    return (part.strip() for part in text.split(",") if part.strip())


def main(
    out: Annotated[Path, typer.Option(help="Folder to make, or to go on with.")],
    speakers: Annotated[str, typer.Option("--voices", help="Voices of espeak-ng, with commas.")] = ",".join(VOICES),
    drawings: Annotated[int | None, typer.Option(min=1, help="How many, spread over the folders; all.")] = None,
    packages: Annotated[Path | None, typer.Option(help="Folder with the package, as .deb file or unpacked.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Where packages are kept; ~/.cache/braid by default.")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="One a core by default.")] = None,
) -> None:
    """Make a corpus of drawings with written and spoken captions."""
    try:
        prepare(
            out,
            cache or default_cache(),
            speakers=list(_listed(speakers)),
            drawings=drawings,
            packages_folder=packages,
            processes=processes,
        )
    except CorpusError as error:
        print(f"braid: {error}", file=sys.stderr)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    typer.run(main)
