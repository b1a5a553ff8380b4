"""HTML and SVG that cannot be broken by what stands in them.

Always holds: only `tag` and `join` make `Markup`; a plain `str` is text, and is escaped where it enters.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

_VOID = {"img", "meta"}

# Neither HTML nor XML has them; U+FFFD says that something stood there.
_CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Child = str | int | None
Attribute = str | int | float | bool | None


def tag(name: str, /, *children: Child, **attributes: Attribute) -> Markup:
    """One element.

    Args:
        children: Markup stays as it is, anything else is escaped, None is left out.
        attributes: `aria_label` becomes `aria-label`, a final underscore goes; True is a bare attribute, False and None
            leave it out.
    """
    written = "".join(
        f" {_attribute(key)}" if value is True else f' {_attribute(key)}="{_escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _VOID:
        return Markup(f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def join(children: Iterable[Child]) -> Markup:
    """Elements and texts in a row."""
    return Markup("".join(c if isinstance(c, Markup) else _escape(str(c)) for c in children if c is not None))


def trusted(text: str) -> Markup:
    """Markup of our own that comes from a file, such as the style sheet."""
    return Markup(text)


def table(caption: str, header: Sequence[Child], rows: Iterable[Sequence[Child]]) -> Markup:
    """A table whose first column names the rows; on a narrow screen it scrolls by itself.

    Args:
        caption: unique on the page, because screen readers list tables by it.
        header: "" over a column that needs no name.
    """
    head = tag("tr", *(tag("th", cell, scope="col") if cell else tag("td") for cell in header))
    body = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    content = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body))
    return tag("div", content, class_="scroll", role="region", aria_label=caption, tabindex=0)


def _attribute(key: str) -> str:
    return key.rstrip("_").replace("_", "-")


def _escape(text: str) -> str:
    # A lone surrogate, which JSON can state, has no place in UTF-8.
    return html.escape(text.encode("utf-8", "replace").decode().translate(_CONTROLS))
