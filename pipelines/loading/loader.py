"""The batches of one rank: planned for all ranks alike, assembled for this one.

Enters: a dataset version as an `Index`, and `Loader`'s settings. Leaves: one `StepBatch` for each optimizer step.
Always holds: global batch number n follows from index, seed and settings alone, rank r of w takes rows r/w to
(r + 1)/w of it, and the state after a step restores the next one without making those before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from model import PackedBatch
from pipelines.loading.batch import pack
from pipelines.loading.index import Index, LoadingError
from pipelines.loading.packing import plan_window, windows
from pipelines.loading.prefetch import Prefetcher
from pipelines.loading.windows import Rows, Window


@dataclass(frozen=True, slots=True)
class Position:
    """The next sequence to be taken."""

    epoch: int = 0
    window: int = 0
    sequence: int = 0
    """Index among the window's sequences; their number means the start of the next window."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBatch:
    """What one rank computes in one optimizer step."""

    micro_batches: tuple[PackedBatch, ...]
    tokens: int
    """Tokens of this rank that are not padding."""
    slots: int
    """Tokens of this rank, padding included."""
    after: Position
    """Where the next step begins."""


class Loader:
    """An iterator over the optimizer steps of one rank, which can say where it is and be put there.

    Shapes are fixed: `cu_seqlens` has room for `index.pieces_per_sequence` pieces and the padding of each row. The
    targets of a modality are padded to the next multiple of B*T / `target_sizes`, so a head sees at most that many
    shapes and computes on few slots beyond its own tokens; `target_sizes=1` makes it one shape, B*T.
    """

    def __init__(
        self,
        index: Index,
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
        pin_memory: bool = False,
    ) -> None:
        """
        Args:
            index: the pieces of one split.
            sequences: rows of a global batch, over all ranks and micro batches.
            micro_batch: rows that a rank computes at once: B.
            seed: of the order of everything.
            window_tokens: tokens that are shuffled and packed together, and held in memory up to three times.
            endless: go on with the next epoch, batches reaching over the border; otherwise stop after one, the last
                batch filled up with rows of padding.
            prefetch: steps made ahead by a thread; 0 makes them when asked.

        Raises:
            LoadingError: the split is empty, or the rows of a batch cannot be divided among the ranks.
        """
        if sequences % (multiple := micro_batch * world_size):
            raise LoadingError(
                f"batch.sequences is {sequences}: it must be a multiple of batch.micro_batch x ranks = {micro_batch} x "
                f"{world_size}; the next is {sequences + -sequences % multiple}"
            )
        if endless and not len(index.length):
            raise LoadingError(
                f"{index.dataset.uri} version {index.dataset.version}: no document to train on; tokenize some, or "
                f"lower its validation share of {index.dataset.validation_share}"
            )
        self.index = index
        self._sequences, self._micro_batch = sequences, micro_batch
        self._seed, self._window_tokens = seed, window_tokens
        self._rank, self._world_size = rank, world_size
        self._endless, self._target_sizes = endless, target_sizes
        self._prefetch, self._pin_memory = prefetch, pin_memory
        self._position = Position()
        self._steps: Iterator[StepBatch] | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> StepBatch:
        if self._steps is None:
            steps = self._make(self._position)
            self._steps = Prefetcher(steps, self._prefetch) if self._prefetch else steps
        step = next(self._steps)
        self._position = step.after
        return step

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread; the next step starts one again."""
        if isinstance(self._steps, Prefetcher):
            self._steps.close()
        self._steps = None

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is: plain numbers, under 1 kB, the same on all ranks."""
        position = self._position
        return {
            "epoch": position.epoch,
            "window": position.window,
            "sequence": position.sequence,
            "order": self._order(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go where a loader of the same order was, whatever its ranks and batch sizes.

        Raises:
            LoadingError: that loader made its sequences otherwise; it names what differs.
        """
        mine, theirs = self._order(), state["order"]
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
        self._position = Position(state["epoch"], state["window"], state["sequence"])

    def _order(self) -> dict[str, Any]:
        """Everything that the order of sequences depends on."""
        index = self.index
        return {
            "dataset version": index.dataset.version,
            "fingerprint": index.dataset.vocabulary.fingerprint,
            "documents": index.documents,
            "tokens": index.tokens,
            "sequence length": index.sequence_length,
            "pieces per sequence": index.pieces_per_sequence,
            "window tokens": self._window_tokens,
            "seed": self._seed,
        }

    def _make(self, position: Position) -> Iterator[StepBatch]:
        parts: list[tuple[Window, int, int]] = []
        needed = self._sequences
        for epoch, number, window in self._windows(position):
            at = position.sequence if (epoch, number) == (position.epoch, position.window) else 0
            while at < window.plan.sequences:
                taken = min(needed, window.plan.sequences - at)
                parts.append((window, at, at + taken))
                at, needed = at + taken, needed - taken
                if not needed:
                    yield self._assemble(parts, Position(epoch, number, at))
                    parts, needed = [], self._sequences
        if parts:
            yield self._assemble(parts, Position(1, 0, 0))

    def _windows(self, position: Position) -> Iterator[tuple[int, int, Window]]:
        """(epoch, number, window) from a position on."""
        epoch, number = position.epoch, position.window
        while self._endless or epoch == 0:
            blocks = windows(self.index, self._seed, epoch, self._window_tokens)
            for window in range(number, len(blocks)):
                plan = plan_window(self.index, blocks[window], self._seed, epoch, window)
                yield epoch, window, Window(self.index, blocks[window], plan)
            epoch, number = epoch + 1, 0

    def _assemble(self, parts: list[tuple[Window, int, int]], after: Position) -> StepBatch:
        share = self._sequences // self._world_size
        first, last = self._rank * share, (self._rank + 1) * share
        mine: list[Rows] = []
        at = tokens = 0
        for window, start, stop in parts:
            low, high = max(first - at, 0), min(last - at, stop - start)
            if low < high:
                mine.append(window.rows(start + low, start + high))
                tokens += window.tokens(start + low, start + high)
            at += stop - start
        if missing := share - sum(len(rows.token_ids) for rows in mine):
            mine.append(Rows.empty(missing, self.index.sequence_length, self.index.dataset.vocabulary.end))
        rows = Rows.concatenate(mine)
        return StepBatch(
            micro_batches=tuple(
                self._pack(rows.slice(b, b + self._micro_batch)) for b in range(0, share, self._micro_batch)
            ),
            tokens=tokens,
            slots=rows.token_ids.size,
            after=after,
        )

    def _pack(self, rows: Rows) -> PackedBatch:
        batch = pack(rows, self.index.pieces_per_sequence, self._target_sizes)
        return batch.pin_memory() if self._pin_memory else batch
