"""Templates: in which order the pieces of a captioned document follow one another, and what text stands between them.

Enters: the pieces of a document by modality. Leaves: its spans. Always holds: which template a document gets depends on
its row id and the source's seed alone.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import ClassVar

from pydantic import Field, field_validator

from pipelines.corpus.documents import Document, RawSpan, Reject, joined
from pipelines.corpus.filters import draw
from pipelines.corpus.reader import Reader
from pipelines.sequence import Modality

_PIECES = {modality.label: modality for modality in Modality}


class CaptionedReader(Reader):
    """Base of the readers of media with captions."""

    decides_rows: ClassVar[frozenset[str]] = Reader.decides_rows | {"templates"}

    templates: tuple[str, ...] = Field(default=("{text}{image}{audio}", "{image}{audio}{text}"), min_length=1)
    """Each document draws one. `{text}`, `{image}` and `{audio}` stand for what the document has of each, `{language}`
    for its language tag; text between them stands as it is, but only where the document has all that the template
    names. What a template does not name is left out."""

    @field_validator("templates")
    @classmethod
    def _readable(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            named = [name for _, name in _parsed(template) if name]
            if unknown := sorted(set(named) - {*_PIECES, "language"}):
                raise ValueError(f"template {template!r} names {{{unknown[0]}}}; known: text, image, audio, language")
            if not set(named) & set(_PIECES) or len(set(named)) < len(named):
                raise ValueError(
                    f"template {template!r} must name at least one of {{text}}, {{image}}, {{audio}}, each at most once"
                )
        return templates

    def document(
        self, source: str, position: int, pieces: Mapping[Modality, Sequence[RawSpan]], language: str = ""
    ) -> Document | Reject:
        """The pieces in the order of the template that the document draws."""
        row_id = Document(source=source, position=position, spans=()).row_id
        template = self.templates[int(draw("template", self.seed, row_id) * len(self.templates))]
        parsed = _parsed(template)
        whole = all(language if name == "language" else pieces.get(_PIECES[name]) for _, name in parsed if name)
        spans: list[RawSpan] = []
        for literal, name in parsed:
            if whole:
                _append_text(spans, literal)
            if name == "language":
                _append_text(spans, language if whole else "")
            elif name:
                for piece in joined(pieces.get(_PIECES[name], ())):
                    if piece.modality is Modality.TEXT and piece.codes is None:
                        _append_text(spans, piece.text, piece.uri)
                    else:
                        spans.append(piece)
        document = joined(spans)
        if not document:
            return Reject(
                source=source,
                position=position,
                reason="document: empty",
                error=f"{source}: nothing in it for the template {template!r}",
            )
        return Document(source=source, position=position, spans=document, language=language)


def _append_text(spans: list[RawSpan], text: str, uri: str = "") -> None:
    """Text goes on with the text before it, as the template has it."""
    if spans and spans[-1].modality is Modality.TEXT and spans[-1].codes is None:
        spans[-1] = replace(spans[-1], text=spans[-1].text + text, uri=spans[-1].uri or uri)
    elif text:
        spans.append(RawSpan(modality=Modality.TEXT, text=text, uri=uri))


@lru_cache(maxsize=1024)
def _parsed(template: str) -> tuple[tuple[str, str], ...]:
    """Pairs of literal text and the placeholder behind it, "" at the end."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"template {template!r}: {error}; write {{{{ for a brace itself") from error
    if any(specification or conversion for _, _, specification, conversion in parts):
        raise ValueError(f"template {template!r}: a placeholder is a name in braces alone, such as {{text}}")
    return tuple((literal, name or "") for literal, name, _, _ in parts)
