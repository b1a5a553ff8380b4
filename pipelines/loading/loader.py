"""The batches of one rank: planned for all ranks alike, assembled for this one.

Enters: `Stage`s of datasets as `Index`es, and `Loader`'s settings. Leaves: one `StepBatch` for each optimizer step.
Always holds: global batch number n follows from the stages, seed and settings alone, rank r of w takes rows r/w to
(r + 1)/w of it, and the state after a step restores the next one without making those before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from model import PackedBatch
from pipelines.loading.batch import pack
from pipelines.loading.index import Index, Int64s, LoadingError
from pipelines.loading.mixture import Chooser, Component, Stage, require_mixture
from pipelines.loading.prefetch import Prefetcher
from pipelines.loading.stream import Part, Position, Stream
from pipelines.loading.windows import Rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a run stands in its data."""

    stage: int = 0
    taken: dict[str, int] = field(default_factory=dict)
    """Sequences that each dataset has given in this stage."""
    streams: dict[str, Position] = field(default_factory=dict)
    """The next sequence of each dataset that has given any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBatch:
    """What one rank computes in one optimizer step."""

    micro_batches: tuple[PackedBatch, ...]
    sources: tuple[Tensor, ...]
    """int64 [B] for each micro batch: which of `Loader.names` each row is from."""
    tokens: int
    """Tokens of this rank that are not padding."""
    slots: int
    """Tokens of this rank, padding included."""
    after: Place
    """Where the next step begins."""


@dataclass(frozen=True, slots=True)
class Given:
    """What one dataset gives to a global batch."""

    number: int
    """Of the dataset."""
    rows: Int64s
    """[sequences]: their rows in the global batch, ascending."""
    parts: Sequence[Part]
    """As many sequences, in order."""


class Loader:
    """An iterator over the optimizer steps of one rank, which can say where it is and be put there.

    Shapes are fixed: `cu_seqlens` has room for `pieces_per_sequence` pieces and the padding of each row. The
    targets of a modality are padded to the next multiple of B*T / `target_sizes`, so a head sees at most that many
    shapes and computes on few slots beyond its own tokens; `target_sizes=1` makes it one shape, B*T.
    """

    def __init__(
        self,
        data: Index | Sequence[Stage],
        *,
        sequences: int,
        micro_batch: int,
        seed: int,
        window_tokens: int,
        rank: int = 0,
        world_size: int = 1,
        endless: bool = True,
        target_sizes: int = 8,
        prefetch: int = 2,
        workers: int = 1,
        pin_memory: bool = False,
    ) -> None:
        """
        Args:
            data: the pieces of one split of one dataset, or stages of mixtures.
            sequences: rows of a global batch, over all ranks and micro batches.
            micro_batch: rows that a rank computes at once: B.
            seed: of the order of everything.
            window_tokens: tokens of a dataset that are shuffled and packed together, at 5 bytes each in memory up to
                three times.
            endless: go on with the next epoch, batches reaching over the border; otherwise take each dataset once, one
                after the other, the last batch filled up with rows of padding.
            prefetch: steps made ahead by a thread; 0 makes them when asked.
            workers: threads that read windows ahead; 0 reads them when they are needed.

        Raises:
            LoadingError: a split is empty, the datasets cannot be mixed, or the rows of a batch cannot be divided among
                the ranks.
        """
        if sequences % (multiple := micro_batch * world_size):
            raise LoadingError(
                f"batch.sequences is {sequences}: it must be a multiple of batch.micro_batch x ranks = {micro_batch} x "
                f"{world_size}; the next is {sequences + -sequences % multiple}"
            )
        self.stages = _one_stage(data) if isinstance(data, Index) else tuple(data)
        require_mixture(self.stages)
        self._components = {c.key: c for stage in self.stages for c in stage.components}
        for component in self._components.values() if endless else ():
            _require_documents(component.index)
        self.index = self.stages[0].components[0].index
        self.names = [component.name for component in self._components.values()]
        """By number in `StepBatch.sources`; the same name stands for several versions of a dataset."""
        self.pieces_per_sequence = max(c.index.pieces_per_sequence for c in self._components.values())
        self._sequences, self._micro_batch = sequences, micro_batch
        self._seed, self._window_tokens = seed, window_tokens
        self._rank, self._world_size = rank, world_size
        self._endless, self._target_sizes = endless, target_sizes
        self._prefetch, self._pin_memory = prefetch, pin_memory
        self._workers = workers
        self._place = Place()
        self._steps: Iterator[StepBatch] | None = None
        self._readers: ThreadPoolExecutor | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> StepBatch:
        if self._steps is None:
            if self._workers:
                self._readers = ThreadPoolExecutor(self._workers, thread_name_prefix="braid-reader")
            steps = self._make(self._place)
            self._steps = Prefetcher(steps, self._prefetch) if self._prefetch else steps
        step = next(self._steps)
        self._place = step.after
        return step

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads; the next step starts them again."""
        if isinstance(self._steps, Prefetcher):
            self._steps.close()
        self._steps = None
        if self._readers is not None:
            self._readers.shutdown(cancel_futures=True)
            self._readers = None

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is: plain numbers and names, some 200 bytes for each dataset, the same on all ranks."""
        place = self._place
        return {
            "stage": place.stage,
            "taken": place.taken,
            "streams": {key: [p.epoch, p.window, p.sequence] for key, p in place.streams.items()},
            "order": self._order(place),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go where a loader of the same order was, whatever its ranks and batch sizes.

        Stages that come after the saved one may be others.

        Raises:
            LoadingError: that loader made its sequences otherwise; it names what differs.
        """
        place = Place(
            stage=state["stage"],
            taken=dict(state["taken"]),
            streams={key: Position(*position) for key, position in state["streams"].items()},
        )
        mine, theirs = self._order(place), state["order"]
        differing = [
            f"{k}: {theirs.get(k)} there, {mine.get(k)} here" for k in mine | theirs if mine.get(k) != theirs.get(k)
        ]
        if differing:
            raise LoadingError(
                "the saved position belongs to another order of the data: "
                + "; ".join(differing)
                + ". Go on with the settings of that run, or start a new one."
            )
        self.close()
        self._place = place

    def _order(self, place: Place) -> dict[str, Any]:
        """Everything that the order of sequences depends on, from a place on to the end of its stage."""
        stage = self.stages[place.stage] if place.stage < len(self.stages) else Stage(components=())
        order: dict[str, Any] = {
            "fingerprint": self.index.vocabulary.fingerprint,
            "sequence length": self.index.sequence_length,
            "window tokens": self._window_tokens,
            "seed": self._seed,
            "sequences of the stage": stage.sequences,
        }
        for component in stage.components:
            index = component.index
            order |= {
                f"{component.name}: dataset version": index.dataset.version,
                f"{component.name}: documents": index.documents,
                f"{component.name}: tokens": index.tokens,
                f"{component.name}: pieces per sequence": index.pieces_per_sequence,
            }
            if len(stage.components) > 1:
                order[f"{component.name}: weight"] = component.weight
        return order

    def _make(self, place: Place) -> Iterator[StepBatch]:
        return self._endlessly(place) if self._endless else self._once()

    def _endlessly(self, place: Place) -> Iterator[StepBatch]:
        chooser = Chooser(self.stages, place.stage, dict(place.taken))
        keys = list(self._components)
        streams: dict[str, Stream] = {}
        positions = dict(place.streams)
        while len(chosen := chooser.choose(self._sequences)):
            given = []
            for number in np.unique(chosen).tolist():
                key = keys[number]
                if key not in streams:
                    streams[key] = self._stream(self._components[key].index, positions.get(key, Position()))
                rows = np.flatnonzero(chosen == number)
                given.append(Given(number, rows, streams[key].take(len(rows))))
                positions[key] = streams[key].position
            after = Place(stage=chooser.stage, taken=dict(chooser.taken), streams=dict(positions))
            yield self._assemble(given, after)
            still = {c.key for stage in self.stages[chooser.stage :] for c in stage.components}
            for key in streams.keys() - still:
                del streams[key]

    def _once(self) -> Iterator[StepBatch]:
        given: list[Given] = []
        filled = 0
        for number, component in enumerate(self._components.values()):
            stream = self._stream(component.index, Position())
            while parts := stream.take(self._sequences - filled):
                count = sum(map(len, parts))
                given.append(Given(number, np.arange(filled, filled + count), parts))
                filled += count
                if filled == self._sequences:
                    yield self._assemble(given, Place())
                    given, filled = [], 0
        if given:
            yield self._assemble(given, Place())

    def _stream(self, index: Index, position: Position) -> Stream:
        return Stream(
            index,
            seed=self._seed,
            window_tokens=self._window_tokens,
            endless=self._endless,
            position=position,
            readers=self._readers,
        )

    def _assemble(self, given: Sequence[Given], after: Place) -> StepBatch:
        share = self._sequences // self._world_size
        first = self._rank * share
        padding = self.index.vocabulary.end
        rows = Rows.allocate(share, self.index.sequence_length)
        sources = np.zeros(share, np.int64)
        filled = np.zeros(share, np.bool_)
        tokens = 0
        for one in given:
            low, high = np.searchsorted(one.rows, [first, first + share]).tolist()
            sources[one.rows[low:high] - first] = one.number
            filled[one.rows[low:high] - first] = True
            at = 0
            for part in one.parts:
                start, stop = max(low - at, 0), min(high - at, len(part))
                if start < stop:
                    mine = one.rows[at + start : at + stop] - first
                    part.window.fill(rows, mine, part.start + start, part.start + stop, padding)
                    tokens += part.window.tokens(part.start + start, part.start + stop)
                at += len(part)
        rows.pad(np.flatnonzero(~filled), padding)
        return StepBatch(
            micro_batches=tuple(
                self._pack(rows.slice(b, b + self._micro_batch)) for b in range(0, share, self._micro_batch)
            ),
            sources=torch.from_numpy(sources).split(self._micro_batch),
            tokens=tokens,
            slots=rows.token_ids.size,
            after=after,
        )

    def _pack(self, rows: Rows) -> PackedBatch:
        batch = pack(rows, self.pieces_per_sequence, self._target_sizes)
        return batch.pin_memory() if self._pin_memory else batch


def _one_stage(index: Index) -> tuple[Stage, ...]:
    name = index.dataset.uri.rstrip("/").rpartition("/")[2]
    return (Stage(components=(Component(name=name, index=index),)),)


def _require_documents(index: Index) -> None:
    if not len(index.length):
        raise LoadingError(
            f"{index.dataset.uri} version {index.dataset.version}: no document to train on; tokenize some, or "
            f"lower its validation share of {index.dataset.validation_share}"
        )
