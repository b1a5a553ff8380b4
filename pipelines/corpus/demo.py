"""The demo corpus: pictures with written and spoken captions, and English text, from two Debian packages.

    python -m pipelines.corpus.demo --out demo/corpus [--language fr] [--stamps N] [--packages DIR]

Enters: tuxpaint-stamps-default (drawings and photographs, captions in many languages) and debian-reference-en (a manual).
Leaves: `stamps/` for reader `media_folder` and `text/debian-reference.jsonl` for reader `jsonl`. Always holds: the same
packages and settings give the same files, with the same modification times, so making it again changes no dataset.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from pipelines.corpus.debian import default_cache, package
from pipelines.corpus.errors import CorpusError

STAMPS = "tuxpaint-stamps-default"
REFERENCE = "debian-reference-en"

DEFAULT_STAMPS = 767
"""All that have a French caption, spoken too: 18 minutes of speech. At 0.1 s a picture and audio encoded 12 times as fast
as it plays, they take two cores one and a half minutes."""

_ABOUT = "demo-corpus.json"

# Body headings have a no-break space after the number; the tables of contents have a plain one.
_HEADING = re.compile(r"(?:Chapter\xa0|Appendix\xa0)?((?:[A-Z]|\d+)(?:\.\d+)*)\.\xa0(.*)", re.DOTALL)
_CONTENTS = re.compile(r"Table of Contents$|(?:[A-Z]|\d+)(?:\.\d+)*\. |-{20,}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Stamp:
    """A picture that has a caption in one language, and that caption spoken."""

    name: str
    """Relative path without suffix, such as `animals/birds/duck`."""
    caption: str
    picture: Path
    text: Path
    speech: Path


def prepare(
    out: Path,
    cache: Path,
    *,
    language: str = "fr",
    stamps: int = DEFAULT_STAMPS,
    packages_folder: Path | None = None,
) -> Path:
    """Make the demo corpus, or find it made.

    Args:
        out: the corpus's folder; an older demo corpus there is replaced.
        cache: where the packages are downloaded and unpacked.
        language: of the captions.
        stamps: how many, spread over the categories; all if there are fewer.
        packages_folder: take the packages from here instead of downloading them.

    Raises:
        CorpusError: the packages cannot be had, no stamp is captioned in the language, or `out` holds something else.
    """
    source = package(STAMPS, cache, packages_folder) / "usr/share/tuxpaint/stamps"
    manual = package(REFERENCE, cache, packages_folder) / "usr/share/debian-reference/debian-reference.en.txt.gz"
    for needed in (source, manual):
        if not needed.exists():
            raise CorpusError(
                f"{needed} is missing: another version of its package, or unpacked in part; use Debian 12's"
            )
    about = {"language": language, "stamps": stamps, "manual": _digest(manual), "pictures": str(source)}
    if out.exists():
        if not (out / _ABOUT).is_file() and any(out.iterdir()):
            raise CorpusError(f"{out}: holds something that is no demo corpus; name another folder with --out")
        if (out / _ABOUT).is_file() and json.loads((out / _ABOUT).read_text()) == about:
            print(f"The demo corpus is there already: {out}")
            return out
    captioned = list(captioned_stamps(source, language))
    if not captioned:
        spoken = ", ".join(f"{name} ({count})" for name, count in sorted(languages(source).items()))
        raise CorpusError(f"no stamp has a written and a spoken caption in {language!r}; there are {spoken}")
    names = set(spread((stamp.name for stamp in captioned), stamps))
    chosen = [stamp for stamp in captioned if stamp.name in names]
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as here:
        made = Path(here, "new")
        for stamp in chosen:
            _write_stamp(stamp, made / "stamps")
        sections = list(manual_sections(gzip.decompress(manual.read_bytes()).decode()))
        lines = "".join(json.dumps(section, ensure_ascii=False) + "\n" for section in sections)
        _write(made / "text/debian-reference.jsonl", lines, like=manual)
        (made / _ABOUT).write_text(json.dumps(about, indent=2) + "\n")
        if out.exists():
            out.rename(Path(here, "old"))
        made.rename(out)
    print(_summary(out, language, chosen, len(captioned), sections))
    return out


def captioned_stamps(source: Path, language: str) -> Iterator[Stamp]:
    """The stamps that have a picture, a caption and a spoken caption in a language, by name."""
    suffix = "_desc.ogg" if language == "en" else f"_desc_{language}.ogg"
    for picture in sorted(source.rglob("*.png")):
        text, speech = picture.with_suffix(".txt"), picture.with_name(picture.stem + suffix)
        if text.is_file() and speech.is_file() and (caption := caption_in(text.read_text("utf-8"), language)):
            name = picture.relative_to(source).with_suffix("").as_posix()
            yield Stamp(name=name, caption=caption, picture=picture, text=text, speech=speech)


def caption_in(text: str, language: str) -> str:
    """The caption in a stamp's text: English is the first line, others are lines `fr.utf8=...`; else empty."""
    first, *others = text.splitlines() or [""]
    if language == "en":
        return first.strip()
    key = f"{language}.utf8="
    return next((line.removeprefix(key).strip() for line in others if line.startswith(key)), "")


def languages(source: Path) -> Counter[str]:
    """Spoken captions by language."""
    names = (re.search(r"_desc(?:_([A-Za-z_@]+))?\.ogg$", path.name) for path in source.rglob("*.ogg"))
    return Counter(match[1] or "en" for match in names if match)


def spread(names: Iterable[str], count: int) -> list[str]:
    """So many names such as `animals/duck`, each first folder in proportion, sorted; which ones is fixed by the names."""
    categories: dict[str, list[str]] = defaultdict(list)
    for name in names:
        categories[name.split("/")[0]].append(name)
    ranked: list[tuple[float, str]] = []
    for members in categories.values():
        # Neighbours by name are alike (coins, letters), so they are shuffled.
        members.sort(key=lambda name: hashlib.blake2b(name.encode()).digest())
        ranked += [((rank + 0.5) / len(members), name) for rank, name in enumerate(members)]
    return sorted(name for _, name in sorted(ranked)[:count])


def manual_sections(text: str) -> Iterator[dict[str, str]]:
    """The sections of the manual's text form: `id` (their number), `title`, and `text` with the title in front."""
    section: dict[str, str] | None = None
    seen: Counter[str] = Counter()
    blocks = (block.rstrip() for block in re.split(r"\n[ \t]*\n", text))
    for block in blocks:
        if heading := _HEADING.fullmatch(block.lstrip("\n")):
            if section and "\n\n" in section["text"]:
                yield section
            title = " ".join(heading[2].split())
            seen[heading[1]] += 1
            # The preface numbers its sections from 1 as the chapters do.
            number = heading[1] if seen[heading[1]] == 1 else f"{heading[1]}-{seen[heading[1]]}"
            section = {"id": number, "title": title, "text": title}
        elif section and block.strip() and not _CONTENTS.match(block.lstrip("\n")):
            body = re.sub(r"^ {1,4}", "", block.strip("\n").replace("\xa0", " "), flags=re.MULTILINE)
            section["text"] += f"\n\n{body}"
    if section and "\n\n" in section["text"]:
        yield section


def _write_stamp(stamp: Stamp, folder: Path) -> None:
    target = folder / stamp.name
    target.parent.mkdir(parents=True, exist_ok=True)
    for file, suffix in ((stamp.picture, ".png"), (stamp.speech, ".ogg")):
        # Appended, because a name may hold dots; `copy2` follows links and keeps the modification time.
        shutil.copy2(file, target.with_name(target.name + suffix))
    _write(target.with_name(f"{target.name}.txt"), f"{stamp.caption}\n", like=stamp.text)


def _write(file: Path, text: str, *, like: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    status = like.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def _digest(file: Path) -> str:
    return hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()


def _summary(out: Path, language: str, chosen: list[Stamp], of: int, sections: list[dict[str, str]]) -> str:
    import soundfile

    seconds = sum(soundfile.info(stamp.speech).duration for stamp in chosen)
    categories = len({stamp.name.split("/")[0] for stamp in chosen})
    captions = sum(len(stamp.caption) for stamp in chosen)
    text = sum(len(section["text"]) for section in sections)
    return (
        f"Demo corpus in {out}:\n"
        f"  stamps/  {len(chosen)} of {of} pictures that have a caption written and spoken in {language!r}, "
        f"from {categories} categories: {captions:,} characters, {seconds / 60:.1f} minutes of speech\n"
        f"  text/    {len(sections)} sections of the Debian Reference in English: {text:,} characters"
    )


def main(
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    language: Annotated[str, typer.Option(help="Language of the captions.")] = "fr",
    stamps: Annotated[int, typer.Option(min=1, help="How many captioned pictures.")] = DEFAULT_STAMPS,
    packages: Annotated[
        Path | None, typer.Option(help="Folder with the two packages, as .deb files or unpacked under their names.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Where packages are kept; ~/.cache/braid by default.")] = None,
) -> None:
    """Make the demo corpus."""
    try:
        prepare(out, cache or default_cache(), language=language, stamps=stamps, packages_folder=packages)
    except CorpusError as error:
        print(f"braid: {error}", file=sys.stderr)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    typer.run(main)
