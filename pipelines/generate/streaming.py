"""Generated text while it comes, character by character.

Enters: pieces as they are chosen. Leaves: what is new of each sample's text. Always holds: all that was told of a text,
joined, is the text in the end; half a character is never told.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from pipelines.generate.continuation import Continuation
from pipelines.sequence import Ids, Modality

OnText = Callable[[int, str], None]

_HALF = "\N{REPLACEMENT CHARACTER}"
"""How bytes look that are no character yet."""


class TextStream:
    """Turns pieces of the rows of a batch into text."""

    def __init__(
        self, rows: Sequence[Continuation], decode: Callable[[Ids], str], on_text: OnText, first: int = 0
    ) -> None:
        """
        Args:
            first: index of the first row among all samples.
        """
        self._rows, self._decode, self._on_text, self._first = rows, decode, on_text, first
        self._told: dict[tuple[int, int], int] = defaultdict(int)
        """Characters, by row and start of the span."""
        self._whole: set[tuple[int, int]] = set()
        """The spans of which all is told."""

    def piece(self, row: int, token_id: int) -> None:
        """A row has got another piece of text, the last one that it holds."""
        self._tell(row, closed=False)

    def close(self) -> None:
        """Nothing more comes: tell what was held back."""
        for row in range(len(self._rows)):
            self._tell(row, closed=True)

    def _tell(self, row: int, *, closed: bool) -> None:
        document = self._rows[row]
        spans = [s for s in document.grammar.spans if s.modality is Modality.TEXT]
        for span in spans:
            end = span.start + span.length
            if end <= document.prompt_tokens or (row, span.start) in self._whole:
                continue
            text = self._text(document, span.start, end)
            if span.start < document.prompt_tokens:
                # Decoded together and then cut: pieces decoded alone lose the space in front of them.
                text = text[len(self._text(document, span.start, document.prompt_tokens)) :]
            if closed or span is not spans[-1]:
                self._whole.add((row, span.start))
            else:
                text = text.rstrip(_HALF)
            told = self._told[row, span.start]
            if len(text) > told:
                self._told[row, span.start] = len(text)
                self._on_text(self._first + row, text[told:])

    def _text(self, document: Continuation, start: int, end: int) -> str:
        return self._decode(np.array(document.token_ids[start:end], np.int32))
