"""The loader: packing loses and repeats nothing, targets are the next tokens, and any position is restored exactly."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import MODALITIES, PackedBatch
from pipelines.interleave import EncodedSpan, interleave
from pipelines.loading import Index, Loader, LoadingError, StepBatch
from pipelines.loading.index import _cuts
from pipelines.loading.packing import best_fit, permutation, plan_window, windows
from pipelines.sequence import Modality
from pipelines.shards.checksums import ShardError
from pipelines.shards.dataset import Dataset
from pipelines.shards.schema import Row
from pipelines.shards.split import is_validation
from tests.pipelines.corpora import VOCABULARY, make_dataset, write_unit

T = 64


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Five shards of documents with media (at most 74 tokens) and one of long texts."""
    folder = tmp_path_factory.mktemp("loading") / "tokens"
    dataset = make_dataset(folder, units=5, rows=40, seed=3)
    rng = np.random.default_rng(4)
    dataset.commit(
        [write_unit(dataset, "long", [_text_row(f"l{i}", int(rng.integers(1, 400)), rng) for i in range(9)])]
    )
    return Dataset.open(folder)


def _text_row(identity: str, pieces: int, rng: np.random.Generator) -> Row:
    text = EncodedSpan(modality=Modality.TEXT, codes=rng.integers(0, 50, pieces, dtype=np.int32))
    return Row(
        row_id=identity,
        content_hash=rng.bytes(16).hex(),
        source=f"text/{identity}",
        sequence=interleave(VOCABULARY, [text]),
    )


def _train(dataset: Dataset) -> Index:
    return Index.build(dataset, T).split(validation=False)


def _loader(index: Index, **changes: object) -> Loader:
    settings: dict[str, object] = {"sequences": 4, "micro_batch": 2, "seed": 1, "window_tokens": 3000}
    return Loader(index, **(settings | changes))  # type: ignore[arg-type]


def _ids(step: StepBatch) -> list[np.ndarray]:
    return [t.numpy() for b in step.micro_batches for t in (b.token_ids, b.modality_ids, b.positions, b.cu_seqlens)]


def _epoch(step: StepBatch) -> int:
    (position,) = step.after.streams.values()
    return position.epoch


def _same(one: StepBatch, other: StepBatch) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(_ids(one), _ids(other), strict=True))


def _documents(dataset: Dataset, *, validation: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    rows = [row for batch in dataset.read() for row in batch.to_pylist()]
    return [
        (np.array(row["token_ids"]), np.array(row["modality_ids"]))
        for row in rows
        if is_validation(row["source"], dataset.validation_share) == validation
    ]


def _targets(batch: PackedBatch) -> Counter[tuple[int, int, int, int]]:
    """(modality and id of the predicting token, modality and id of the target) of each target."""
    found: Counter[tuple[int, int, int, int]] = Counter()
    ids, modalities = batch.token_ids.flatten(), batch.modality_ids.flatten()
    for modality, name in enumerate(MODALITIES):
        targets = batch.targets[name]
        at = targets.positions[: targets.count]
        found.update(
            (int(m), int(i), modality, int(t))
            for m, i, t in zip(modalities[at], ids[at], targets.ids[: targets.count], strict=True)
        )
    return found


@pytest.mark.parametrize("validation", [False, True])
def test_an_epoch_predicts_each_token_once_from_the_one_before(dataset: Dataset, validation: bool) -> None:
    index = Index.build(dataset, T).split(validation=validation)
    expected: Counter[tuple[int, int, int, int]] = Counter()
    tokens = 0
    for ids, modalities in _documents(dataset, validation=validation):
        tokens += len(ids)
        expected.update(
            (int(modalities[i]), int(ids[i]), int(modalities[i + 1]), int(ids[i + 1])) for i in range(len(ids) - 1)
        )
    found: Counter[tuple[int, int, int, int]] = Counter()
    seen = 0
    for step in _loader(index, endless=False):
        seen += step.tokens
        for batch in step.micro_batches:
            batch.check()
            found += _targets(batch)
    assert found == expected
    assert seen == tokens == index.tokens


def test_epochs_hold_the_same_documents_in_another_order(dataset: Dataset) -> None:
    index = _train(dataset)
    steps = list(_loader(index, endless=False))
    twice = list(islice(_loader(index), 2 * len(steps)))
    assert all(_same(a, b) for a, b in zip(steps[:-1], twice, strict=False)), (
        "the first epoch does not depend on the next"
    )
    assert not any(_same(steps[0], other) for other in twice[len(steps) - 1 :])
    assert {_epoch(step) for step in twice} >= {0, 1}


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=200),
    room=st.integers(0, 50),
    most=st.integers(1, 12),
)
def test_packing_puts_each_piece_into_one_sequence_within_its_limits(lengths: list[int], room: int, most: int) -> None:
    capacity = max(lengths) + room
    sequence = best_fit(np.array(lengths), capacity, most)
    filled = np.bincount(sequence, weights=lengths)
    assert len(sequence) == len(lengths)
    assert 0 < filled.min() <= filled.max() <= capacity
    assert np.bincount(sequence).max() <= most
    if most >= capacity:
        assert np.count_nonzero(filled * 2 <= capacity) <= 1, "two half-empty sequences would have been one"


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_cuts_spare_media_and_cover_the_document(data: st.DataObject) -> None:
    parts = data.draw(st.lists(st.tuples(st.booleans(), st.integers(1, 40)), min_size=1, max_size=12))
    media: list[tuple[int, int]] = []
    at = 1
    for is_media, length in parts:
        size = length + 3 if is_media else length
        if is_media:
            media.append((at, at + size))
        at += size
    total = at + 1
    longest = max((stop - start for start, stop in media), default=1)
    capacity = longest + data.draw(st.integers(0, 30))
    bounds = _cuts(media, total, capacity)
    assert bounds[0] == 0
    assert bounds[-1] == total
    assert all(0 < b - a <= capacity for a, b in pairwise(bounds))
    assert not any(start < cut < stop for cut in bounds for start, stop in media)


def test_a_span_that_does_not_fit_is_refused_before_the_run_with_its_row(dataset: Dataset) -> None:
    # The pictures have 20 codes, the longest sound has 16; all of them have 3 opening tokens.
    # Too short by far or by one: the remedy is the same, and it is enough.
    for sequence_length in (12, 22):
        with pytest.raises(
            LoadingError, match=r"tokens version 6, row \dx\d+: a media span needs 23 tokens.*Raise it to 23"
        ):
            Index.build(dataset, sequence_length)
    assert Index.build(dataset, 23).tokens == dataset.statistics().tokens()


def test_padding_is_a_document_of_its_own_that_predicts_nothing(dataset: Dataset) -> None:
    index = _train(dataset)
    for step in _loader(index, endless=False):
        documents = 0
        for batch in step.micro_batches:
            flat = batch.token_ids.flatten()
            predicting = torch.cat([t.positions[: t.count] for t in batch.targets.values()])
            starts = batch.cu_seqlens.unique().tolist()
            for start, stop in pairwise(starts):
                inside = int(((predicting >= start) & (predicting < stop)).sum())
                # A whole document predicts all but its first token, a piece that goes on also the next one's first.
                assert inside in (0, stop - start - 1, stop - start)
                if inside == 0 and stop - start > 1:
                    assert bool((flat[start:stop] == VOCABULARY.end).all())
                    documents += stop - start
        assert documents + step.tokens <= step.slots


def test_shapes_are_fixed_but_for_the_stated_sizes_of_targets(dataset: Dataset) -> None:
    index = _train(dataset)
    for sizes in (1, 8):
        shapes = set()
        for step in _loader(index, endless=False, target_sizes=sizes):
            for batch in step.micro_batches:
                shapes.add((tuple(batch.token_ids.shape), len(batch.cu_seqlens)))
                assert {len(t.ids) * sizes % batch.token_ids.numel() for t in batch.targets.values()} == {0}
        assert len(shapes) == 1


def test_the_same_seed_gives_the_same_batches_and_another_seed_others(dataset: Dataset) -> None:
    index = _train(dataset)
    one, same, other = (list(islice(_loader(index, seed=seed), 5)) for seed in (1, 1, 2))
    assert all(map(_same, one, same))
    assert not any(map(_same, one, other))


@pytest.mark.parametrize("prefetch", [0, 2])
def test_resume_yields_the_same_next_batch(dataset: Dataset, prefetch: int) -> None:
    index = _train(dataset)
    undisturbed = list(islice(_loader(index), 60))
    assert _epoch(undisturbed[-1]) > 0
    for stop in (0, 1, 7, 23, 55):
        with _loader(index, prefetch=prefetch) as first:
            for _ in range(stop):
                next(first)
            state = first.state_dict()
        with _loader(index, prefetch=prefetch) as second:
            second.load_state_dict(state)
            assert all(_same(next(second), expected) for expected in undisturbed[stop : stop + 4])


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_global_batches_do_not_depend_on_the_ranks(dataset: Dataset, ranks: int) -> None:
    index = _train(dataset)
    whole = _loader(index, sequences=8, micro_batch=8)
    parts = [_loader(index, sequences=8, micro_batch=2, rank=r, world_size=ranks) for r in range(ranks)]
    for n in range(12):
        expected = next(whole).micro_batches[0].token_ids.numpy()
        got = np.concatenate([b.token_ids.numpy() for part in parts for b in next(part).micro_batches])
        assert np.array_equal(got, expected)
        if n == 5:
            # Half way, two ranks take over from however many there were.
            state = parts[0].state_dict()
            parts = [_loader(index, sequences=8, micro_batch=1, rank=r, world_size=2) for r in range(2)]
            for part in parts:
                part.load_state_dict(state)


def test_a_position_of_other_data_is_refused_naming_what_differs(dataset: Dataset) -> None:
    state = _loader(_train(dataset)).state_dict()
    with pytest.raises(LoadingError, match="seed: 1 there, 2 here"):
        _loader(_train(dataset), seed=2).load_state_dict(state)
    older = Dataset.open(dataset.uri, version=5)
    with pytest.raises(LoadingError, match="dataset version: 6 there, 5 here"):
        _loader(_train(older)).load_state_dict(state)


def test_windows_bound_what_is_read_at_once(dataset: Dataset) -> None:
    index = _train(dataset)
    plans = windows(index, 1, 0, 2000)
    assert len(plans) > 2
    assert sorted(np.concatenate(plans).tolist()) == list(range(len(index.blocks)))
    pieces = np.concatenate([plan_window(index, blocks, 1, 0, w).pieces for w, blocks in enumerate(plans)])
    assert sorted(pieces.tolist()) == list(range(len(index.length)))


def test_little_is_padding_where_lengths_vary(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    dataset = Dataset.create(tmp_path / "d", VOCABULARY, validation_share=0)
    rows = [_text_row(f"t{i}", int(np.exp(rng.uniform(np.log(3), np.log(300)))), rng) for i in range(2000)]
    dataset.commit([write_unit(dataset, "u", rows)])
    steps = list(_loader(_train(dataset), window_tokens=10**9, endless=False))
    assert sum(step.tokens for step in steps) / sum(step.slots for step in steps) > 0.99


def test_an_impossible_division_among_ranks_is_refused(dataset: Dataset) -> None:
    with pytest.raises(LoadingError, match=r"must be a multiple of batch\.micro_batch x ranks = 3 x 2; the next is 12"):
        _loader(_train(dataset), sequences=8, micro_batch=3, world_size=2)


def test_a_dataset_without_training_documents_is_refused(tmp_path: Path) -> None:
    empty = Dataset.create(tmp_path / "d", VOCABULARY, validation_share=0.1)
    with pytest.raises(LoadingError, match="no document to train on"):
        _loader(_train(empty))
    assert list(_loader(_train(empty), endless=False)) == []


def test_a_fault_while_reading_ahead_reaches_the_caller(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", units=2, rows=30)
    index = _train(dataset)
    shard = Path(dataset.shards()[0].path)
    data = bytearray(shard.read_bytes())
    rng = np.random.default_rng(0)
    for at in rng.integers(4, len(data) // 4, 20):
        data[at] ^= 0xFF
    shard.write_bytes(bytes(data))
    with _loader(index) as loader, pytest.raises(ShardError, match="damaged between bytes"):
        list(islice(loader, 50))


def test_permutations_are_pinned_for_ever() -> None:
    assert sorted(permutation(1000, 5).tolist()) == list(range(1000))
    assert permutation(6, 42).tolist() == [0, 1, 4, 2, 5, 3]


def test_documents_are_held_out_by_their_source(dataset: Dataset) -> None:
    index = Index.build(dataset, T)
    assert index.split(validation=True).documents == len(_documents(dataset, validation=True))
    assert index.split(validation=True).documents + index.split(validation=False).documents == index.documents


@pytest.mark.slow
def test_streaming_holds_no_more_at_the_end_than_at_the_beginning(dataset: Dataset) -> None:
    # In a process of its own: what other tests' threads open and close meanwhile is not the loader's.
    options = f"--tokens 3000000 --sequence-length {T} --window-tokens 3000 --workers 2".split()
    command = [sys.executable, "-m", "tests.campaigns.stream_tokens", dataset.uri, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 13
