"""The plan of a run: compare what the sources list now with what the dataset holds.

Enters: the sources of a recipe, a dataset and its ledger. Leaves: the units still to be done, written into the ledger
before any of them runs. Always holds: an input that the ledger knows keeps its unit for ever, so a run that was killed,
and one that was not, cut the corpus alike; a changed input makes new units that replace all the units it was in, and they
become visible together.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.corpus.documents import Input
from pipelines.corpus.errors import CorpusError
from pipelines.corpus.sources import Source
from pipelines.crash import crash_point
from pipelines.shards.dataset import Dataset, DatasetError
from pipelines.tokenize.ledger import COMPARED, TRIES, Ledger
from pipelines.tokenize.recipe import UnitSettings
from pipelines.tokenize.units import WorkUnit, grouped

_CHUNK = 2**16
"""Inputs that are Python objects at once while a source is listed."""

_EXAMPLES = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What a run shall do besides what is new or changed."""

    retire_missing: bool = False
    """Remove the rows of inputs that their source no longer lists."""
    force: bool = False
    """Even if that is more than half of what a source gave."""
    retry: bool = False
    """Do units with rejects again."""
    reasons: tuple[str, ...] = ()
    """Of those, only units with rejects for one of these reasons; all if there are none."""
    without: frozenset[str] = frozenset()
    """Units that are left undone, with those that wait for them: a recurring pipeline sets aside what failed too often."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Missing:
    """Inputs of one source that the dataset knows and the source no longer lists."""

    inputs: int
    examples: list[str]
    """Uris of the first of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a run has to do."""

    pending: list[WorkUnit]
    done: int
    """Number of units that need nothing."""
    missing: dict[str, Missing] = field(default_factory=dict)
    """By source, where any are missing."""
    together: frozenset[str] = frozenset()
    """Pending units that are committed all at once: those that a request for retirement has made."""
    begun: bool = False
    """Whether an earlier run has planned some of the pending units, but not done them."""
    set_aside: tuple[str, ...] = ()
    """Units that would be pending, but for `Request.without`."""


class Listing:
    """The inputs that a source lists now, as Arrow columns: a Python object for each would take three times the memory."""

    _SCHEMA = pa.schema(
        [
            pa.field("uri", pa.large_string()),
            pa.field("size", pa.int64()),
            pa.field("etag", pa.large_string()),
            pa.field("parts", pa.large_list(pa.large_string())),
            pa.field("divisible", pa.bool_()),
        ]
    )

    def __init__(self, inputs: Iterable[Input]) -> None:
        items = iter(inputs)
        batches = []
        while chunk := list(islice(items, _CHUNK)):
            columns = [pa.array([getattr(item, f.name) for item in chunk], f.type) for f in self._SCHEMA]
            batches.append(pa.RecordBatch.from_arrays(columns, schema=self._SCHEMA))
        self._table = pa.Table.from_batches(batches, self._SCHEMA).combine_chunks()
        self.uri, self.etag = (self._table[name].combine_chunks() for name in ("uri", "etag"))

    def inputs(self, mask: pa.Array) -> list[Input]:
        """The inputs where a mask is true."""
        return [Input(**row | {"parts": tuple(row["parts"])}) for row in self._table.filter(mask).to_pylist()]

    @property
    def digest(self) -> str:
        """Equal for listings of the same inputs in the same states; 20 hexadecimal digits."""
        digest = hashlib.blake2b(digest_size=10)
        for column in (self.uri, self.etag):
            for start in range(0, len(column), _CHUNK):
                digest.update("\0".join(column.slice(start, _CHUNK).to_pylist()).encode())
            digest.update(b"\0\0")
        return digest.hexdigest()

    def named(self, uris: Collection[str]) -> dict[str, Input]:
        """Those of some inputs that are there, by uri, in the source's order."""
        return {item.uri: item for item in self.inputs(_among(self.uri, uris))}


def plan(
    dataset: Dataset,
    ledger: Ledger,
    sources: Iterable[Source],
    settings: UnitSettings,
    request: Request = Request(),
) -> Plan:
    """Compare the sources with the dataset, and write units for what is new or changed into its ledger.

    Raises:
        CorpusError: a source is missing or empty, or more than half of it is to be retired.
    """
    ledger.repair(dataset)
    ledger.compact()
    listed = {source.name: Listing(source.inputs()) for source in sources}
    retried = dataset.rejected_units(request.reasons) if request.retry else set()
    for _ in range(TRIES):
        ledger.refresh()
        comparison = _Comparison(listed, ledger, settings, request, retried)
        crash_point("before_ledger")
        if ledger.append(comparison.added):
            crash_point("after_ledger")
            return comparison.plan(dataset.units)
    raise DatasetError(f"{dataset.uri}: {TRIES} writes in a row lost against other jobs; try later")


def dry_plan(
    dataset: Dataset | None,
    sources: Iterable[Source],
    settings: UnitSettings,
    request: Request = Request(),
) -> Plan:
    """What `plan` would find, for a dataset that may not be there yet; nothing is written."""
    return plan_for(dataset, {source.name: Listing(source.inputs()) for source in sources}, settings, request)


def plan_for(
    dataset: Dataset | None, listed: Mapping[str, Listing], settings: UnitSettings, request: Request = Request()
) -> Plan:
    """`dry_plan` of sources that have been listed."""
    ledger = Ledger.existing(dataset.storage) if dataset else None
    retried = dataset.rejected_units(request.reasons) if dataset and request.retry else set()
    return _Comparison(listed, ledger, settings, request, retried).plan(dataset.units if dataset else ())


class _Comparison:
    """What the sources list, against what a ledger knows."""

    def __init__(
        self,
        listed: Mapping[str, Listing],
        ledger: Ledger | None,
        settings: UnitSettings,
        request: Request,
        retried: Collection[str],
    ) -> None:
        self._listed, self._ledger = listed, ledger
        self._settings, self._request, self._retried = settings, request, retried
        self.added: list[WorkUnit] = []
        """New units, to be written into the ledger."""
        self._current: set[str] = set()
        """Known units of the listed sources, which no other replaces."""
        self._missing: dict[str, Missing] = {}
        self._together: set[str] = set()
        replaced = {name for names in ledger.replaces.values() for name in names} if ledger else set()
        rows = ledger.rows if ledger else COMPARED.empty_table()
        for source, listing in listed.items():
            mine = rows.filter(pc.equal(rows["source"], source))
            self._compare(source, listing, mine.filter(pc.invert(_among(mine["unit"], replaced))))

    def _compare(self, source: str, listing: Listing, rows: pa.Table) -> None:
        """One source against the rows of its current units."""
        place = pc.index_in(rows["uri"], value_set=listing.uri)
        gone = pc.and_(pc.is_valid(rows["uri"]), pc.is_null(place))
        # Null where the input is gone, and a filter takes null for false.
        changed = pc.not_equal(rows["etag"], pc.take(listing.etag, place))
        vanished = pc.unique(rows["uri"].filter(gone))
        if len(vanished):
            self._missing[source] = Missing(inputs=len(vanished), examples=vanished[:_EXAMPLES].to_pylist())
        self._current |= set(pc.unique(rows["unit"]).to_pylist())
        outdated = set(rows["unit"].filter(changed).to_pylist()) | (self._current & set(self._retried))
        retired: set[str] = set()
        if self._request.retire_missing:
            self._require_most(source, rows, len(vanished))
            retired = set(rows["unit"].filter(gone).to_pylist())
        groups = _sharing(rows, outdated | retired)
        present = listing.named({uri for _, uris in groups for uri in uris})
        order = {uri: index for index, uri in enumerate(present)}
        for units, uris in groups:
            # What is no longer listed is left out: there is nothing to read.
            inputs = [present[uri] for uri in sorted(uris & order.keys(), key=order.__getitem__)]
            self._replace(source, units, inputs, retire=bool(units & retired))
        fresh = listing.inputs(pc.invert(pc.is_in(listing.uri, value_set=rows["uri"])))
        self.added += [self._anew(unit) for unit in grouped(source, fresh, self._settings)]

    def _replace(self, source: str, units: set[str], inputs: list[Input], *, retire: bool) -> None:
        """Put new units over some inputs in the place of the units that held them."""
        replaces = tuple(sorted(units))
        new = grouped(source, inputs, self._settings, replaces=replaces)
        if not new and retire:
            # Its empty shard keeps a slower job from bringing the retired rows back.
            new = [WorkUnit(source=source, slices=(), replaces=replaces)]
        if new:
            self._current -= units
            self.added += new
        if retire:
            self._together |= {unit.id for unit in new}

    def _anew(self, unit: WorkUnit) -> WorkUnit:
        """The unit under an id of its own: it has been there before if its inputs were retired and came back."""
        while self._ledger and unit.id in self._ledger.known:
            unit = replace(unit, replaces=(unit.id,))
        return unit

    def _require_most(self, source: str, rows: pa.Table, gone: int) -> None:
        known = pc.count_distinct(rows["uri"]).as_py()
        if 2 * gone > known and not self._request.force:
            raise CorpusError(
                f"source {source}: {gone:,} of its {known:,} known inputs are no longer listed, such as "
                f"{', '.join(self._missing[source].examples)}; is the right folder mounted? "
                "If they are meant to be gone, retire them with --force"
            )

    def plan(self, held: Collection[str]) -> Plan:
        waiting = [name for name in self._current if name not in held]
        known = self._ledger.units(waiting) if self._ledger and waiting else []
        pending = self._located(known) + self.added
        aside = {unit.id for unit in pending if unit.id in self._request.without}
        replaced = {unit.replaces for unit in pending if unit.id in aside and unit.replaces}
        aside |= {unit.id for unit in pending if unit.replaces in replaced}
        return Plan(
            pending=[unit for unit in pending if unit.id not in aside],
            done=len(self._current) - len(waiting),
            missing=self._missing,
            together=frozenset(self._together),
            begun=any(unit.id not in aside for unit in known),
            set_aside=tuple(sorted(aside)),
        )

    def _located(self, units: list[WorkUnit]) -> list[WorkUnit]:
        """Units with their files where the source lists them now: a corpus may have moved since they were planned."""
        uris: dict[str, set[str]] = defaultdict(set)
        for unit in units:
            uris[unit.source] |= {piece.input.uri for piece in unit.slices}
        now = {
            (source, item.uri, item.etag): item
            for source, names in uris.items()
            for item in self._listed[source].named(names).values()
        }
        return [
            replace(
                unit,
                slices=tuple(
                    replace(p, input=now.get((unit.source, p.input.uri, p.input.etag), p.input)) for p in unit.slices
                ),
            )
            for unit in units
        ]


def _among(values: pa.ChunkedArray, names: Collection[str]) -> pa.ChunkedArray:
    """A mask: which values are among some names."""
    return pc.is_in(values, value_set=pa.array(names, pa.large_string()))


def _sharing(rows: pa.Table, units: set[str]) -> list[tuple[set[str], set[str]]]:
    """Units that must be replaced together because they share inputs: those given and all that hang on them.

    Returns:
        For each group its units and the uris of its inputs.
    """
    if not units:
        return []
    while True:
        part = rows.filter(_among(rows["unit"], units))
        # Null, for a unit that reads nothing, is shared with nobody.
        part = rows.filter(
            pc.or_(_among(rows["unit"], units), _among(rows["uri"], pc.drop_null(pc.unique(part["uri"]))))
        )
        if len(found := set(part["unit"].to_pylist())) == len(units):
            break
        units = found
    holders: dict[str | None, set[str]] = defaultdict(set)
    inputs: dict[str, set[str]] = defaultdict(set)
    for unit, uri in zip(part["unit"].to_pylist(), part["uri"].to_pylist(), strict=True):
        if uri is not None:
            holders[uri].add(unit)
            inputs[unit].add(uri)
    groups: list[tuple[set[str], set[str]]] = []
    left = set(units)
    for first in sorted(units):
        if first not in left:
            continue
        names, uris, waiting = set(), set(), [first]
        while waiting:
            if (name := waiting.pop()) in left:
                left.remove(name)
                names.add(name)
                uris |= inputs[name]
                waiting += [other for uri in inputs[name] for other in holders[uri]]
        groups.append((names, uris))
    return groups
