"""The frame of every page that Braid writes: one HTML file with everything inside.

Enters: a title and sections. Leaves: the file. Always holds: the page asks nothing of any network, its policy forbids it to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from pipelines.report.markup import Markup, tag, trusted

POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; base-uri 'none'"
_STRANDS = ("text", "image", "audio")

Section = tuple[str, str, Markup]
"""Its id on the page, its name in the navigation, and itself."""


def write_document(out: Path, title: str, subtitle: str, sections: Sequence[Section], *, styles: str = "") -> Path:
    """Write a page; its folder is made if it is not there.

    Args:
        styles: A style sheet of this package that the page needs beside `page.css`.

    Returns:
        `out`.
    """
    page = tag("html", _head(title, styles), _body(title, subtitle, sections), lang="en")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(f"<!doctype html>\n{page}\n", encoding="utf-8")
    return out


def _head(title: str, styles: str) -> Markup:
    folder = resources.files("pipelines.report")
    style = "".join((folder / name).read_text("utf-8") for name in ("page.css", styles) if name)
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("title", f"{title} · Braid"),
        tag("style", trusted(style)),
    )


def _body(title: str, subtitle: str, sections: Sequence[Section]) -> Markup:
    links = [tag("li", tag("a", name, href=f"#{key}")) for key, name, _ in sections]
    return tag(
        "body",
        tag("a", "Skip to the content", href="#content", class_="skip"),
        tag(
            "header",
            _braid(),
            tag("h1", title),
            tag("p", subtitle, class_="subtitle") if subtitle else None,
            tag("nav", tag("ul", *links), aria_label="Sections") if len(links) > 1 else None,
        ),
        tag("main", *(section for _, _, section in sections), id="content"),
        tag("footer", tag("p", "Written by Braid. This file holds everything it shows.")),
    )


def _braid() -> Markup:
    """The mark: three strands."""
    strands = []
    for index, modality in enumerate(_STRANDS):
        heights = (12 - 8 * math.sin(x / 7 + index * 2 * math.pi / 3) for x in range(0, 133, 2))
        path = "".join(f"{'L' if x else 'M'}{2 * x} {y:.1f}" for x, y in enumerate(heights))
        strands.append(tag("path", d=path, class_=modality))
    return tag("svg", *strands, viewBox="-2 0 136 24", aria_hidden="true", class_="mark")
