"""Work units: what one task reads, and the ledger that remembers which inputs belong to which unit.

Enters: the inputs that the sources list now. Leaves: the units still to be done. Always holds: an input that the ledger
knows keeps its unit for ever, so a run that was killed, and one that was not, cut the corpus alike; a changed input makes
a new unit that replaces the old one, inputs and all.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, Transaction
from deltalake.exceptions import CommitFailedError
from deltalake.transaction import AddAction

from pipelines.corpus.documents import Input, Slice
from pipelines.corpus.sources import Source
from pipelines.shards.dataset import Dataset, DatasetError
from pipelines.shards.reader import read_footer
from pipelines.shards.storage import Storage
from pipelines.tokenize.recipe import UnitSettings

LEDGER_SCHEMA = pa.schema(
    [
        pa.field("unit", pa.string()),
        pa.field("replaces", pa.string()),
        pa.field("source", pa.string()),
        pa.field("uri", pa.string()),
        pa.field("size", pa.int64()),
        pa.field("etag", pa.string()),
        pa.field("parts", pa.list_(pa.field("element", pa.string()))),
        pa.field("divisible", pa.bool_()),
        pa.field("start", pa.int64()),
        pa.field("stop", pa.int64()),
    ]
)

_COMMIT_TRIES = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkUnit:
    """What one task reads and writes: some slices of one source's inputs, one shard."""

    source: str
    slices: tuple[Slice, ...]
    replaces: str = ""
    """The unit that held an earlier state of the same inputs."""

    @property
    def id(self) -> str:
        """20 hexadecimal digits over what the unit reads."""
        # With what it replaces: a file that changes to and fro makes a new unit each time.
        digest = hashlib.blake2b(f"{self.source}\n{self.replaces}".encode(), digest_size=10)
        for piece in self.slices:
            digest.update(json.dumps([piece.input.uri, piece.input.etag, piece.start, piece.stop]).encode())
        return digest.hexdigest()

    @property
    def size(self) -> int:
        """Bytes to read."""
        return sum(piece.stop - piece.start for piece in self.slices)

    def rows(self) -> Iterator[dict[str, object]]:
        """The unit as rows of the ledger."""
        for piece in self.slices:
            yield {
                "unit": self.id,
                "replaces": self.replaces,
                "source": self.source,
                "start": piece.start,
                "stop": piece.stop,
                **asdict(piece.input),
            }

    def record(self) -> dict[str, object]:
        """The unit as JSON: it stands in its shard's footer, from which a lost ledger is made again."""
        return {"rows": list(self.rows())}


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a run has to do."""

    pending: list[WorkUnit]
    retired: dict[str, list[str]]
    """For a pending unit that replaces others: which of them the shards still hold."""
    done: int
    """Number of units that need nothing."""


class Ledger:
    """The inputs table of a dataset: which inputs are known, at which state, in which unit."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage.below("inputs")
        DeltaTable.create(self._storage.uri, LEDGER_SCHEMA, mode="ignore")
        self._table = DeltaTable(self._storage.uri)

    @staticmethod
    def exists(storage: Storage) -> bool:
        return bool(DeltaTable.is_deltatable(storage.below("inputs").uri))

    def units(self) -> dict[str, WorkUnit]:
        """All units by id, those that others replace too."""
        self._table.update_incremental()
        grouped: dict[str, list[dict[str, object]]] = defaultdict(list)
        names = pa.table(self._table.get_add_actions(flatten=True))["path"].to_pylist()
        for name in sorted(names):
            table = pq.read_table(self._storage.path(name), filesystem=self._storage.filesystem)
            for row in table.to_pylist():
                grouped[row["unit"]].append(row)
        return {unit: _unit(rows) for unit, rows in grouped.items()}

    def append(self, units: Iterable[WorkUnit]) -> bool:
        """Remember new units; False if another job has written to the ledger since `units()` was read."""
        rows = [row for unit in units for row in unit.rows()]
        if not rows:
            return True
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, LEDGER_SCHEMA), sink, compression="zstd", write_page_checksum=True)
        data = sink.getvalue().to_pybytes()
        name = f"{uuid.uuid4().hex}.parquet"
        self._storage.write(name, data)
        counter = (self._table.transaction_version("braid") or 0) + 1
        action = AddAction(name, len(data), {}, int(time.time() * 1000), True, json.dumps({"numRecords": len(rows)}))
        try:
            self._table.create_write_transaction(
                [action],
                "append",
                LEDGER_SCHEMA,
                commit_properties=CommitProperties(
                    app_transactions=[Transaction("braid", counter)], max_commit_retries=0
                ),
            )
        except CommitFailedError:
            self._storage.filesystem.delete_file(self._storage.path(name))
            return False
        return True

    def repair(self, dataset: Dataset) -> None:
        """Add the units that the shards hold and the ledger does not, from the shards' footers."""
        for _ in range(_COMMIT_TRIES):
            known = set(self.units())
            lost = [shard for shard in dataset.shards() if shard.unit not in known]
            if self.append(_unit(json.loads(read_footer(dataset.storage, s.name)["unit"])["rows"]) for s in lost):
                return
        raise DatasetError(f"{self._storage.uri}: {_COMMIT_TRIES} writes in a row lost against other jobs; try later")


def plan(dataset: Dataset, sources: Iterable[Source], settings: UnitSettings) -> Plan:
    """Compare the sources with the dataset, and write units for what is new or changed into its ledger.

    Raises:
        CorpusError: a source is missing or empty.
    """
    ledger = Ledger(dataset.storage)
    ledger.repair(dataset)
    listed = {source.name: list(source.inputs()) for source in sources}
    for _ in range(_COMMIT_TRIES):
        known = ledger.units()
        added = new_units(listed, known, settings)
        if ledger.append(added):
            break
    else:
        raise DatasetError(f"{dataset.uri}: {_COMMIT_TRIES} writes in a row lost against other jobs; try later")
    return _compare(listed, known, added, held={shard.unit for shard in dataset.shards()})


def dry_plan(dataset: Dataset | None, sources: Iterable[Source], settings: UnitSettings) -> Plan:
    """What `plan` would find, for a dataset that may not be there yet; nothing is written."""
    known: dict[str, WorkUnit] = {}
    held: set[str] = set()
    if dataset:
        held = {shard.unit for shard in dataset.shards()}
        if Ledger.exists(dataset.storage):
            known = Ledger(dataset.storage).units()
    listed = {source.name: list(source.inputs()) for source in sources}
    return _compare(listed, known, new_units(listed, known, settings), held)


def new_units(
    listed: Mapping[str, list[Input]], known: Mapping[str, WorkUnit], settings: UnitSettings
) -> list[WorkUnit]:
    """Units for the inputs, by source, that no known unit holds in their present state."""
    replaced = {unit.replaces for unit in known.values()}
    current = [unit for name, unit in known.items() if name not in replaced]
    added: list[WorkUnit] = []
    for source, inputs in listed.items():
        mine = [unit for unit in current if unit.source == source]
        added += _changed_units(inputs, mine)
        added += _unknown_inputs(source, inputs, mine, settings)
    return added


def _compare(
    listed: Mapping[str, list[Input]], known: Mapping[str, WorkUnit], added: list[WorkUnit], held: set[str]
) -> Plan:
    units = dict(known) | {unit.id: unit for unit in added}
    replaced = {unit.replaces for unit in units.values()}
    wanted = [unit for name, unit in units.items() if unit.source in listed and name not in replaced]
    now = {name: {(item.uri, item.etag): item for item in inputs} for name, inputs in listed.items()}
    pending = [_located(unit, now[unit.source]) for unit in wanted if unit.id not in held]
    retired = {unit.id: [name for name in _ancestors(unit, units) if name in held] for unit in pending}
    return Plan(pending=pending, retired={k: v for k, v in retired.items() if v}, done=len(wanted) - len(pending))


def _located(unit: WorkUnit, now: Mapping[tuple[str, str], Input]) -> WorkUnit:
    """The unit with its files where the source lists them now: a corpus may have moved since it was planned."""
    slices = tuple(replace(p, input=now.get((p.input.uri, p.input.etag), p.input)) for p in unit.slices)
    return replace(unit, slices=slices)


def _ancestors(unit: WorkUnit, units: Mapping[str, WorkUnit]) -> Iterator[str]:
    """What a unit replaces, and what that replaced, back to the first: the middle ones may never have been done."""
    while unit.replaces:
        yield unit.replaces
        unit = units[unit.replaces]


def _unknown_inputs(
    source: str, inputs: Iterable[Input], current: Iterable[WorkUnit], settings: UnitSettings
) -> list[WorkUnit]:
    seen = {piece.input.uri for unit in current for piece in unit.slices}
    units: list[WorkUnit] = []
    group: list[Slice] = []
    for item in inputs:
        if item.uri in seen:
            continue
        for piece in _slices(item, settings.bytes):
            full = sum(p.stop - p.start for p in group) + piece.stop - piece.start > settings.bytes
            if group and (full or len(group) >= settings.inputs):
                units.append(WorkUnit(source=source, slices=tuple(group)))
                group = []
            group.append(piece)
    if group:
        units.append(WorkUnit(source=source, slices=tuple(group)))
    return units


def _slices(item: Input, most: int) -> Iterator[Slice]:
    if not item.divisible or item.size <= most:
        yield Slice(input=item, start=0, stop=item.size)
        return
    for start in range(0, item.size, most):
        yield Slice(input=item, start=start, stop=min(start + most, item.size))


def _changed_units(inputs: Iterable[Input], current: Iterable[WorkUnit]) -> list[WorkUnit]:
    """For each current unit with a changed input: the same slices of what lies there now."""
    now = {item.uri: item for item in inputs}
    units: list[WorkUnit] = []
    for unit in current:
        slices = tuple(_now(piece, now.get(piece.input.uri, piece.input)) for piece in unit.slices)
        if any(new.input.etag != old.input.etag for new, old in zip(slices, unit.slices, strict=True)):
            units.append(WorkUnit(source=unit.source, slices=slices, replaces=unit.id))
    return units


def _now(piece: Slice, item: Input) -> Slice:
    """The slice in the input's present state; the last one follows the end of a file that grew or shrank."""
    last = piece.stop == piece.input.size
    stop = item.size if last else min(piece.stop, item.size)
    return Slice(input=item, start=min(piece.start, item.size), stop=stop)


def _unit(rows: list[dict[str, object]]) -> WorkUnit:
    slices = [
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
    ]
    return WorkUnit(source=str(rows[0]["source"]), slices=tuple(slices), replaces=str(rows[0]["replaces"]))
