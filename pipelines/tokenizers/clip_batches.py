"""Clips of any length through an encoder on a GPU, in batches; while one is computed, the next is on its way.

Enters: float32 waveforms in host memory. Leaves: int32 codes [frames, n_q] of each, in the same order. Always holds: at
most three batches are in flight, each of a bounded number of samples. The encoder's codes of a clip must not depend on its
batch, nor on the silence after it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BATCH_SAMPLES = 64 * 2**20
"""Samples of a batch, padding included, unless one clip alone has more."""


@dataclass(frozen=True, slots=True)
class _Flight:
    """A batch whose codes the device still computes."""

    indices: list[int]
    codes: Tensor
    """In pinned memory, complete once the event has happened."""
    landed: torch.cuda.Event


class ClipBatches:
    """Encodes clips on one CUDA device.

    Args:
        encode: float32 [B, F * hop] on the device -> integers [B, F, n_q] on the device.
        hop: Samples a frame.
        least_frames: Shorter clips are filled up with silence to so many frames; the silence's codes are dropped.
        batch_size: At most so many clips at a time.
        device: A CUDA device.
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        *,
        hop: int,
        least_frames: int,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.encode, self.device = encode, device
        self.hop, self.least_frames, self.batch_size = hop, least_frames, batch_size
        self._copies = torch.cuda.Stream(self.device)

    def __call__(self, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
        return self.start(waveforms)()

    def start(self, waveforms: Sequence[np.ndarray]) -> Callable[[], list[np.ndarray]]:
        """Hand all clips to the device and return, with the last batch in flight, with what waits for the codes.

        Whoever starts the next clips before asking for these keeps the device busy between the two.
        """
        frames = self._frames(waveforms)
        return self._started(frames, self._filled(waveforms, frames))

    def stage(self, waveforms: Sequence[np.ndarray]) -> Callable[[], Callable[[], list[np.ndarray]]]:
        """Copy all clips into pinned memory, which takes half as long as encoding them; what is returned is then `start`'s
        other part, to be called once. The two may be called by different threads."""
        frames = self._frames(waveforms)
        staged = deque(self._filled(waveforms, frames))

        def leaving() -> Iterator[tuple[list[int], Tensor]]:
            while staged:
                yield staged.popleft()

        return lambda: self._started(frames, leaving())

    def _frames(self, waveforms: Sequence[np.ndarray]) -> list[int]:
        return [-(-len(waveform) // self.hop) for waveform in waveforms]

    def _filled(self, waveforms: Sequence[np.ndarray], frames: list[int]) -> Iterator[tuple[list[int], Tensor]]:
        """Batches in pinned memory, each with the indices of its clips."""
        for indices in batches(frames, self.hop, self.batch_size):
            longest = max(self.least_frames, frames[indices[0]])
            rows = torch.empty(len(indices), longest * self.hop, pin_memory=True)
            fill(rows, [waveforms[index] for index in indices])
            yield indices, rows

    def _started(self, frames: list[int], filled: Iterable[tuple[list[int], Tensor]]) -> Callable[[], list[np.ndarray]]:
        codes: list[np.ndarray] = [np.empty(0)] * len(frames)
        flights: list[_Flight] = []

        def land() -> None:
            flight = flights.pop(0)
            flight.landed.synchronize()
            # A copy, for the batch's memory is used again.
            landed = flight.codes.numpy().astype(np.int32)
            for row, index in enumerate(flight.indices):
                codes[index] = landed[row, : frames[index]]

        for indices, rows in filled:
            flights.append(self._start(indices, rows))
            if len(flights) == 2:
                land()

        def result() -> list[np.ndarray]:
            while flights:
                land()
            return codes

        return result

    def _start(self, indices: list[int], rows: Tensor) -> _Flight:
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._copies):
            given = rows.to(self.device, non_blocking=True)
        current.wait_stream(self._copies)
        given.record_stream(current)
        found = self.encode(given)
        codes = torch.empty(found.shape, dtype=found.dtype, pin_memory=True).copy_(found, non_blocking=True)
        landed = torch.cuda.Event()
        landed.record(current)
        return _Flight(indices, codes, landed)


def fill(rows: Tensor, waveforms: Sequence[np.ndarray]) -> None:
    """Write waveforms into the rows of a batch, float32 [B, samples], with silence behind each."""
    parts: list[Tensor] = []
    silence = torch.zeros(rows.shape[1] - min(map(len, waveforms)))
    for waveform in waveforms:
        # torch takes no array that must not be written to.
        parts += (
            torch.from_numpy(np.require(waveform, np.float32, ["C", "W"])),
            silence[: rows.shape[1] - len(waveform)],
        )
    # One call, for after each the thread would have to wait for Python's lock, which other threads want too.
    torch.cat(parts, out=rows.view(-1))


def batches(frames: Sequence[int], hop: int, batch_size: int) -> Iterator[list[int]]:
    """Clips to compute together, the longest first, so that little of a batch is padding: indices."""
    order = sorted(range(len(frames)), key=lambda index: -frames[index])
    while order:
        size = max(1, min(batch_size, BATCH_SAMPLES // (frames[order[0]] * hop)))
        yield order[:size]
        order = order[size:]
