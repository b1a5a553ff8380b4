"""The items of large arrays in one JSON object, `{"images": [...], "annotations": [...]}`, read one at a time.

Enters: an open file and the names of the arrays. Leaves: their items. Always holds: memory holds one item and a part of the
file around it.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Collection, Iterator
from typing import Any, BinaryIO, NoReturn

from pipelines.corpus.errors import RecordError

MOST = 16 * 2**20
"""Characters of one item, or of a value that is not asked for."""

_CHUNK = 2**20
_SPACE = " \t\r\n"
_OF_NUMBERS = "0123456789.eE+-"


def array_items(file: BinaryIO, names: Collection[str]) -> Iterator[tuple[str, Any]]:
    """The items of the arrays of these names, each with the name of its array, in the order of the file.

    Raises:
        RecordError: the file is no such JSON, or an item of it is too large; what came before is good.
    """
    text = _Text(file)
    text.take("{")
    more = not text.takes("}")
    while more:
        if not isinstance(name := text.value(), str):
            text.fail(f"expected a name in quotation marks, not {name!r}")
        text.take(":")
        if name in names and text.takes("["):
            more_items = not text.takes("]")
            while more_items:
                yield name, text.value()
                if not (more_items := text.takes(",")):
                    text.take("]")
        else:
            text.value()
        if not (more := text.takes(",")):
            text.take("}")
    text.end()


class _Text:
    """A window that moves over the text of a file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._parse = json.JSONDecoder().raw_decode
        self._window = ""
        self._at = 0
        self._passed = 0
        """Characters before the window."""
        self._ended = False

    def takes(self, sign: str) -> bool:
        """Whether this sign comes next; then it is passed."""
        self._skip_space()
        found = self._window.startswith(sign, self._at)
        self._at += found
        return found

    def take(self, sign: str) -> None:
        if not self.takes(sign):
            self.fail(f"expected {sign!r}")

    def end(self) -> None:
        self._skip_space()
        if self._at < len(self._window):
            self.fail("expected the end of the file")

    def value(self) -> Any:
        self._skip_space()
        while True:
            try:
                value, end = self._parse(self._window, self._at)
                # A number may go on where the window ends, and `0.` begins with one.
                if self._ended or self._window[end:].lstrip(_OF_NUMBERS):
                    self._at = end
                    return value
            except (ValueError, RecursionError) as error:
                # Cut off by the window's end, or no JSON; the latter shows when more text is of no help.
                if self._ended or isinstance(error, RecursionError):
                    self.fail(str(error))
            if len(self._window) - self._at > MOST:
                self.fail(f"no whole value in {MOST:,} characters")
            self._more()

    def _skip_space(self) -> None:
        while True:
            while self._at < len(self._window) and self._window[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._window) or self._ended:
                return
            self._more()

    def _more(self) -> None:
        chunk = self._file.read(_CHUNK)
        self._ended = not chunk
        try:
            self._window = self._window[self._at :] + self._decode(chunk, final=self._ended)
        except UnicodeDecodeError as error:
            message = f"not UTF-8 behind character {self._passed + self._at}; save it as UTF-8"
            raise RecordError("text: not UTF-8", message) from error
        self._passed += self._at
        self._at = 0

    def fail(self, what: str) -> NoReturn:
        raise RecordError("json: not valid", f"not JSON at character {self._passed + self._at}: {what}; write it again")
