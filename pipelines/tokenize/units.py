"""Work units: what one task reads and writes.

Enters: slices of inputs. Leaves: units of bounded size, each with an id over what it reads. Always holds: the same inputs in
the same state, cut in the same way for the same reason, have the same id.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from pipelines.corpus.documents import Input, Slice
from pipelines.tokenize.recipe import UnitSettings

_NOTHING = Slice(input=Input(uri="", size=0, etag="", parts=()), start=0, stop=0)
"""Stands in the row of a unit that reads nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkUnit:
    """What one task reads and writes: some slices of one source's inputs, one shard."""

    source: str
    slices: tuple[Slice, ...]
    """None where all inputs of the replaced units are gone: then the shard is empty, and stands for that."""
    replaces: tuple[str, ...] = ()
    """The units that held an earlier state of the same inputs. Units that replace the same ones are committed together."""
    id: str = field(init=False)
    """20 hexadecimal digits over what the unit reads."""

    def __post_init__(self) -> None:
        # With what it replaces: a file that changes to and fro, or is tried again, makes a new unit each time.
        digest = hashlib.blake2b(json.dumps([self.source, self.replaces]).encode(), digest_size=10)
        for piece in self.slices:
            digest.update(json.dumps([piece.input.uri, piece.input.etag, piece.start, piece.stop]).encode())
        object.__setattr__(self, "id", digest.hexdigest())

    @property
    def size(self) -> int:
        """Bytes to read."""
        return sum(piece.stop - piece.start for piece in self.slices)

    def rows(self) -> Iterator[dict[str, object]]:
        """The unit as rows of the ledger, one a slice; what it replaces stands in the first."""
        replaces = self.replaces
        for piece in self.slices or (_NOTHING,):
            item = piece.input
            yield {
                "unit": self.id,
                "replaces": list(replaces),
                "source": self.source,
                "start": piece.start,
                "stop": piece.stop,
                "uri": item.uri or None,
                "size": item.size,
                "etag": item.etag,
                "parts": list(item.parts),
                "divisible": item.divisible,
            }
            replaces = ()

    def record(self) -> dict[str, object]:
        """The unit as JSON: it stands in its shard's footer, from which a lost ledger is made again."""
        return {"rows": list(self.rows())}

    @classmethod
    def from_rows(cls, rows: list[dict[str, object]]) -> WorkUnit:
        """The unit whose `rows` these are."""
        slices = tuple(
            Slice(
                input=Input(
                    uri=row["uri"],  # type: ignore[arg-type]
                    size=row["size"],  # type: ignore[arg-type]
                    etag=row["etag"],  # type: ignore[arg-type]
                    parts=tuple(row["parts"]),  # type: ignore[arg-type]
                    divisible=row["divisible"],  # type: ignore[arg-type]
                ),
                start=row["start"],  # type: ignore[arg-type]
                stop=row["stop"],  # type: ignore[arg-type]
            )
            for row in rows
            if row["uri"] is not None
        )
        return cls(source=str(rows[0]["source"]), slices=slices, replaces=tuple(rows[0]["replaces"]))  # type: ignore[arg-type]


def grouped(
    source: str, inputs: Iterable[Input], settings: UnitSettings, *, replaces: tuple[str, ...] = ()
) -> list[WorkUnit]:
    """Units of bounded size over the inputs, in their order."""
    units: list[WorkUnit] = []
    group: list[Slice] = []
    size = 0
    for piece in (piece for item in inputs for piece in _slices(item, settings.bytes)):
        more = piece.stop - piece.start
        if group and (size + more > settings.bytes or len(group) >= settings.inputs):
            units.append(WorkUnit(source=source, slices=tuple(group), replaces=replaces))
            group, size = [], 0
        group.append(piece)
        size += more
    if group:
        units.append(WorkUnit(source=source, slices=tuple(group), replaces=replaces))
    return units


def _slices(item: Input, most: int) -> Iterator[Slice]:
    if not item.divisible or item.size <= most:
        yield Slice(input=item, start=0, stop=item.size)
        return
    for start in range(0, item.size, most):
        yield Slice(input=item, start=start, stop=min(start + most, item.size))
