"""Work units: what one task reads, and the ledger that remembers which inputs belong to which unit.

Enters: the inputs that the sources list now. Leaves: the units still to be done. Always holds: an input that the ledger
knows keeps its unit for ever, so a run that was killed, and one that was not, cut the corpus alike; a changed input makes
new units that replace all the units it was in, and they become visible together.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
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
        pa.field("replaces", pa.list_(pa.field("element", pa.string()))),
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
    replaces: tuple[str, ...] = ()
    """The units that held an earlier state of the same inputs. Units that replace the same ones are committed together."""

    @property
    def id(self) -> str:
        """20 hexadecimal digits over what the unit reads."""
        # With what it replaces: a file that changes to and fro makes a new unit each time.
        digest = hashlib.blake2b(json.dumps([self.source, self.replaces]).encode(), digest_size=10)
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
                "replaces": list(self.replaces),
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
    done: int
    """Number of units that need nothing."""


class Ledger:
    """The inputs table of a dataset: which inputs are known, at which state, in which unit."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage.below("inputs")
        DeltaTable.create(self._storage.uri, LEDGER_SCHEMA, mode="ignore")
        self._table = DeltaTable(self._storage.uri)
        self._units: dict[str, WorkUnit] = {}
        self._read_at = -1

    @staticmethod
    def exists(storage: Storage) -> bool:
        return bool(DeltaTable.is_deltatable(storage.below("inputs").uri))

    def units(self) -> dict[str, WorkUnit]:
        """All units by id, those that others replace too."""
        self._table.update_incremental()
        if self._table.version() == self._read_at:
            return self._units
        grouped: dict[str, list[dict[str, object]]] = defaultdict(list)
        names = pa.table(self._table.get_add_actions(flatten=True))["path"].to_pylist()
        for name in sorted(names):
            table = pq.read_table(self._storage.path(name), filesystem=self._storage.filesystem)
            for row in table.to_pylist():
                grouped[row["unit"]].append(row)
        self._units = {unit: _unit(rows) for unit, rows in grouped.items()}
        self._read_at = self._table.version()
        return self._units

    def ancestors(self, units: Collection[str]) -> set[str]:
        """What these units replace, and what that replaced, back to the first: the middle ones may never have been done."""
        known = self.units()
        found: set[str] = set()
        open_ids = [name for name in units if name in known and known[name].replaces]
        while open_ids:
            for name in known[open_ids.pop()].replaces:
                if name not in found:
                    found.add(name)
                    # An ancestor may be unknown where a lost ledger was made again from the shards.
                    if name in known:
                        open_ids.append(name)
        return found

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


def plan(dataset: Dataset, ledger: Ledger, sources: Iterable[Source], settings: UnitSettings) -> Plan:
    """Compare the sources with the dataset, and write units for what is new or changed into its ledger.

    Raises:
        CorpusError: a source is missing or empty.
    """
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
    replaced = {name for unit in known.values() for name in unit.replaces}
    added: list[WorkUnit] = []
    for source, inputs in listed.items():
        current = [unit for name, unit in known.items() if name not in replaced and unit.source == source]
        for outdated in _outdated(current, inputs):
            mine = {piece.input.uri for unit in outdated for piece in unit.slices}
            # What is no longer listed is left out: there is nothing to read.
            present = [item for item in inputs if item.uri in mine]
            added += _grouped(source, present, settings, replaces=tuple(sorted(unit.id for unit in outdated)))
        seen = {piece.input.uri for unit in current for piece in unit.slices}
        added += _grouped(source, [item for item in inputs if item.uri not in seen], settings)
    return added


def _outdated(current: list[WorkUnit], inputs: Iterable[Input]) -> list[list[WorkUnit]]:
    """The units with a changed input, in groups that must be replaced together because they share inputs."""
    etags = {item.uri: item.etag for item in inputs}
    holders: dict[str, list[WorkUnit]] = defaultdict(list)
    for unit in current:
        for uri in {piece.input.uri for piece in unit.slices}:
            holders[uri].append(unit)
    changed = [u for u in current if any(etags.get(p.input.uri, p.input.etag) != p.input.etag for p in u.slices)]
    groups: list[list[WorkUnit]] = []
    grouped: set[str] = set()
    for first in changed:
        group, waiting = [], [first]
        while waiting:
            unit = waiting.pop()
            if unit.id not in grouped:
                grouped.add(unit.id)
                group.append(unit)
                waiting += [other for piece in unit.slices for other in holders[piece.input.uri]]
        if group:
            groups.append(group)
    return groups


def _compare(
    listed: Mapping[str, list[Input]], known: Mapping[str, WorkUnit], added: list[WorkUnit], held: set[str]
) -> Plan:
    units = dict(known) | {unit.id: unit for unit in added}
    replaced = {name for unit in units.values() for name in unit.replaces}
    wanted = [unit for name, unit in units.items() if unit.source in listed and name not in replaced]
    now = {name: {(item.uri, item.etag): item for item in inputs} for name, inputs in listed.items()}
    pending = [_located(unit, now[unit.source]) for unit in wanted if unit.id not in held]
    return Plan(pending=pending, done=len(wanted) - len(pending))


def _located(unit: WorkUnit, now: Mapping[tuple[str, str], Input]) -> WorkUnit:
    """The unit with its files where the source lists them now: a corpus may have moved since it was planned."""
    slices = tuple(replace(p, input=now.get((p.input.uri, p.input.etag), p.input)) for p in unit.slices)
    return replace(unit, slices=slices)


def _grouped(
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
    return WorkUnit(source=str(rows[0]["source"]), slices=tuple(slices), replaces=tuple(rows[0]["replaces"]))  # type: ignore[arg-type]
