"""What is written into a batch on its way to a GPU."""

import numpy as np
import pytest
import torch

from pipelines.tokenizers import clip_batches, gpu_batches


@pytest.mark.parametrize("lengths", [[5], [7, 7], [7, 1, 4]])
def test_clips_fill_a_batch_with_silence_behind_each(lengths: list[int]) -> None:
    rows = torch.full((len(lengths), 7), 9.0)
    waveforms = [np.arange(1, length + 1, dtype=np.float32) for length in lengths]
    waveforms[0].flags.writeable = False
    clip_batches.fill(rows, waveforms)
    assert rows.tolist() == [[*range(1, length + 1), *[0] * (7 - length)] for length in lengths]


def test_clips_of_other_layouts_become_float32() -> None:
    rows = torch.empty(1, 4)
    clip_batches.fill(rows, [np.arange(6, dtype=np.float64)[::2]])
    assert rows.tolist() == [[0, 2, 4, 0]]


@pytest.mark.parametrize("count", [1, 3, 4])
def test_items_fill_a_batch_with_zeros_behind_them(count: int) -> None:
    staged = torch.full((4, 2, 3), 9, dtype=torch.uint8)
    items = np.random.default_rng(0).integers(0, 255, (count, 2, 3), np.uint8)
    items.flags.writeable = False
    gpu_batches.fill(staged, list(items))
    assert np.array_equal(staged[:count].numpy(), items)
    assert not staged[count:].any()
