"""The folder of a pipeline: what was begun, what came of it, who works on it.

    STATE/lease/                    see `lease`
    STATE/runs/000012/plan.json     run 12 was begun: its recipes, its steps, and why
    STATE/runs/000012/pretrain.1.json, .log   what the first attempt at a step came to, and what it said
    STATE/runs/000012.json          the record of run 12: its end, however it came
    STATE/paused.json               no tick does anything while it is there
    STATE/last_tick.json            when somebody last ticked, and what was said
    STATE/history.html              the page

Always holds: plan, results and record are each created once, whole, by one process, and never change; numbers of runs
have no gaps, and a run without a record is under way or was lost. All of it is plain JSON on any file system with hard
links.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from pipelines.exclusive import create_exclusively
from pipelines.shards.storage import Storage

Outcome = Literal["done", "skipped", "refused", "failed", "lost"]
"""`skipped`: not due when its turn came; `refused`: the evaluation said no; `lost`: it ended without a word."""

T = TypeVar("T")

ENDED_WELL = ("done", "skipped")


class StateError(ValueError):
    """A file of the state folder cannot be used; the message names it and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run that was begun."""

    number: int
    pipeline: str
    trigger: str
    """`tick`, `run` or `backfill`."""
    steps: list[str]
    why: dict[str, str]
    """For each step, due or not, what was found."""
    inputs: str
    """Digest over the listing of all sources: equal while no input comes or changes."""
    without: list[str]
    """Units that are set aside."""
    version: int
    """Of the dataset, at the end of the run before: what came in between, by hand or from a process that was taken for dead,
    counts for this run, so that the records' sums are the dataset's."""
    trained_to: int
    """Step with which the last finished stage ended, at the end of the run before."""
    recipe: dict[str, Any]
    tokenize: dict[str, Any]
    pretrain: dict[str, Any] | None
    """The resolved recipes."""
    folder: str
    """Working folder, against which relative paths are meant."""
    executor: str
    host: str
    pid: int
    generation: int
    """Of the lease."""
    begun: str
    """UTC."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one attempt at a step came to."""

    step: str
    attempt: int
    outcome: Outcome
    why: str
    """One sentence."""
    begun: str
    seconds: float
    host: str
    did: dict[str, Any] = field(default_factory=dict)
    """Figures, by name."""
    units: list[str] = field(default_factory=list)
    """Units of inputs that failed."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """A run that has ended."""

    number: int
    pipeline: str
    trigger: str
    outcome: Outcome
    why: str
    steps: list[Result]
    """In order; of steps that were tried several times, each attempt."""
    planned: list[str]
    due: dict[str, str]
    version: int
    """Of the dataset when the run had ended."""
    documents: int
    """That came to the dataset after `Plan.version`, whatever the steps could still say."""
    tokens: int
    trained_to: int
    """Step with which the last finished stage had ended when the run had; `steps_trained` of them are this run's."""
    steps_trained: int
    executor: str
    host: str
    begun: str
    ended: str
    seconds: float
    memory: dict[str, Any]
    """What later ticks must know about failures; see `memory`."""
    alerts: list[dict[str, Any]] = field(default_factory=list)

    def last(self, step: str) -> Result | None:
        """The last attempt at a step."""
        return next((r for r in reversed(self.steps) if r.step == step), None)

    def did(self, name: str) -> Any:
        """A figure of whichever step has it; None if none has."""
        return next((r.did[name] for r in reversed(self.steps) if name in r.did), None)


class State:
    """Reads and writes the folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self.lease = self.folder / "lease"
        self.runs = self.folder / "runs"
        self.page = self.folder / "history.html"
        self._storage = Storage.of(self.folder)

    def numbers(self) -> list[int]:
        """Of all runs that were begun, ascending."""
        found = sorted(int(p.name) for p in self.runs.glob("[0-9]*[0-9]"))
        # The newest folder may have been made by a process that died before it wrote the plan.
        while found and not (self.run_folder(found[-1]) / "plan.json").exists():
            found.pop()
        return found

    def begin(self, plan: Plan) -> bool:
        """Begin a run; False if another process has taken its number."""
        return create_exclusively(self.run_folder(plan.number) / "plan.json", _json(plan))

    def plan(self, number: int) -> Plan:
        return self._made(Plan, self.run_folder(number) / "plan.json")

    def conclude(self, record: Record) -> bool:
        """Record the end of a run; False if another process has done so."""
        return create_exclusively(self.runs / f"{record.number:06d}.json", _json(record))

    def record(self, number: int) -> Record | None:
        """The record of a run; None while it has none."""
        file = self.runs / f"{number:06d}.json"
        if not file.exists():
            return None
        record = self._made(Record, file)
        return replace(record, steps=[Result(**r) for r in record.steps])  # type: ignore[arg-type]

    def records(self, most: int | None = None) -> Iterator[Record]:
        """Records, the newest first."""
        for number in list(reversed(self.numbers()))[:most]:
            if record := self.record(number):
                yield record

    def add_result(self, number: int, result: Result) -> bool:
        """Say what an attempt at a step came to; False if that was said already."""
        return create_exclusively(self.run_folder(number) / f"{result.step}.{result.attempt}.json", _json(result))

    def results(self, number: int, steps: Sequence[str]) -> list[Result]:
        """What is known of the steps of a run, in order."""
        found = []
        for step in steps:
            files = self.run_folder(number).glob(f"{step}.*.json")
            found += sorted((self._made(Result, file) for file in files), key=lambda r: r.attempt)
        return found

    def log(self, number: int, step: str, attempt: int) -> Path:
        return self.run_folder(number) / f"{step}.{attempt}.log"

    def run_folder(self, number: int) -> Path:
        return self.runs / f"{number:06d}"

    def pause(self, who: str, why: str) -> None:
        self._storage.write("paused.json", json.dumps({"by": who, "why": why, "at": now()}, indent=1).encode())

    def resume(self) -> bool:
        """Whether it was paused."""
        if not (self.folder / "paused.json").exists():
            return False
        (self.folder / "paused.json").unlink(missing_ok=True)
        return True

    @property
    def paused(self) -> dict[str, str] | None:
        """Who paused it, why and when; None if nobody has."""
        file = self.folder / "paused.json"
        return self._read(file) if file.exists() else None

    def ticked(self, said: str) -> None:
        """Remember that somebody ticked."""
        content = {"at": now(), "host": socket.gethostname(), "said": said}
        self._storage.write("last_tick.json", json.dumps(content, indent=1).encode())

    @property
    def last_tick(self) -> dict[str, str] | None:
        file = self.folder / "last_tick.json"
        return self._read(file) if file.exists() else None

    def _made(self, kind: type[T], file: Path) -> T:
        try:
            return kind(**self._read(file))
        except TypeError as error:
            raise StateError(f"{file} was written by another version of Braid: {error}; update Braid") from error

    def _read(self, file: Path) -> dict[str, Any]:
        try:
            values = json.loads(file.read_bytes())
            if not isinstance(values, dict):
                raise ValueError("no mapping")
        except ValueError as error:
            raise StateError(f"{file} is damaged: {error}; restore it from a copy, or delete it") from error
        return values


def now() -> str:
    """UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def seconds_since(begun: str) -> float:
    return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(begun)).total_seconds())


def _json(item: Plan | Result | Record) -> bytes:
    return json.dumps(asdict(item), indent=1).encode()
