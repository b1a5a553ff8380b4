"""Mixtures and stages: global batches depend on recipe and data alone, and every place of a run is restored exactly."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import MODALITIES
from pipelines.loading import Component, Index, Loader, LoadingError, Stage, StepBatch
from pipelines.loading.mixture import Chooser
from pipelines.sequence import Modality, VocabularyError
from pipelines.shards.dataset import Dataset
from tests.pipelines.corpora import VOCABULARY, make_dataset

T = 80
SEQUENCES = 8


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Stage, ...]:
    """Three datasets of different sizes, in a stage of two and one of three that goes on for ever."""
    folder = tmp_path_factory.mktemp("mixing")
    a, b, c = (
        Index.build(make_dataset(folder / name, units=units, rows=20, seed=seed), T).split(validation=False)
        for name, units, seed in (("a", 4, 1), ("b", 2, 2), ("c", 1, 3))
    )
    first = (Component(name="a", index=a, weight=3), Component(name="b", index=b, weight=1))
    then = (
        Component(name="b", index=b, weight=1),
        Component(name="c", index=c, weight=1),
        Component(name="a", index=a, weight=0.5),
    )
    return Stage(components=first, sequences=SEQUENCES * 40 + 3), Stage(components=then)


def _loader(stages: tuple[Stage, ...], **changes: object) -> Loader:
    settings: dict[str, object] = {
        "sequences": SEQUENCES, "micro_batch": 1, "seed": 1, "window_tokens": 3000, "prefetch": 0, "workers": 0,
    }  # fmt: skip
    return Loader(stages, **(settings | changes))  # type: ignore[arg-type]


def _rows(step: StepBatch) -> list[bytes]:
    """All that a rank is given, row by row: tokens, boundaries, targets and where they come from."""
    found = []
    for batch, source in zip(step.micro_batches, step.sources, strict=True):
        arrays = [batch.token_ids, batch.modality_ids, batch.positions, batch.cu_seqlens, source]
        for name in MODALITIES:
            target = batch.targets[name]
            arrays += [target.positions[: target.count], target.ids[: target.count]]
        digest = hashlib.sha256()
        for array in arrays:
            digest.update(array.numpy().tobytes())
        found.append(digest.digest())
    return found


def _global_hash(ranks: list[Loader]) -> bytes:
    """Of the next global batch, put together from the ranks."""
    return hashlib.sha256(b"".join(row for rank in ranks for row in _rows(next(rank)))).digest()


def _hashes(stages: tuple[Stage, ...], count: int, world_size: int, **changes: object) -> list[bytes]:
    """Of so many global batches."""
    ranks = [_loader(stages, rank=r, world_size=world_size, **changes) for r in range(world_size)]
    try:
        return [_global_hash(ranks) for _ in range(count)]
    finally:
        for rank in ranks:
            rank.close()


@pytest.fixture(scope="module")
def expected(stages: tuple[Stage, ...]) -> list[bytes]:
    return _hashes(stages, 500, 1)


@pytest.mark.parametrize(("world_size", "workers", "count"), [(2, 1, 100), (4, 3, 100), (8, 0, 60)])
def test_global_batches_are_the_same_for_any_ranks_and_workers(
    stages: tuple[Stage, ...], expected: list[bytes], world_size: int, workers: int, count: int
) -> None:
    prefetch = 2 if workers else 0
    assert _hashes(stages, count, world_size, workers=workers, prefetch=prefetch) == expected[:count]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_500_global_batches_are_the_same_for_any_ranks_and_workers(
    stages: tuple[Stage, ...], expected: list[bytes], world_size: int, workers: int
) -> None:
    assert len(set(expected)) == 500
    assert _hashes(stages, 500, world_size, workers=workers, prefetch=2 if workers else 0) == expected


@pytest.mark.parametrize(
    ("seed", "count"), [*((seed, 120) for seed in range(4)), pytest.param(9, 500, marks=pytest.mark.slow)]
)
def test_stopped_at_random_batches_and_resumed_with_other_ranks_nothing_changes(
    stages: tuple[Stage, ...], expected: list[bytes], seed: int, count: int
) -> None:
    rng = random.Random(seed)
    at, state = 0, None
    while at < count:
        world_size, workers = rng.choice([1, 2, 4, 8]), rng.choice([0, 1, 3])
        ranks = [
            _loader(stages, rank=r, world_size=world_size, workers=workers, prefetch=rng.choice([0, 2]))
            for r in range(world_size)
        ]
        for rank in ranks:
            if state is not None:
                rank.load_state_dict(json.loads(json.dumps(state)))
        for _ in range(min(rng.randint(1, 40), count - at)):
            got = _global_hash(ranks)
            assert got == expected[at]
            at += 1
        states = [rank.state_dict() for rank in ranks]
        assert all(other == states[0] for other in states)
        state = states[0]
        for rank in ranks:
            rank.close()


@settings(max_examples=100, deadline=None)
@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), count=st.integers(1, 300), data=st.data())
def test_every_dataset_gives_its_share_to_within_one_wherever_one_looks(
    weights: list[float], count: int, data: st.DataObject
) -> None:
    index = _Nothing()
    stage = Stage(
        components=tuple(Component(name=str(i), index=index, weight=w) for i, w in enumerate(weights))  # type: ignore[arg-type]
    )
    chooser = Chooser((stage,))
    chosen: list[int] = []
    while len(chosen) < count:
        chosen += chooser.choose(data.draw(st.integers(1, 50))).tolist()
        given_ = Counter(chosen)
        for number, weight in enumerate(weights):
            assert abs(given_[number] - weight / sum(weights) * len(chosen)) <= len(weights) / 2 + 0.01
    assert Chooser((stage,)).choose(len(chosen)).tolist() == chosen


class _Nothing:
    class dataset:  # noqa: N801 - stands for an object
        version = 0


def test_a_stage_ends_with_its_budget_and_streams_go_on_in_the_next(stages: tuple[Stage, ...]) -> None:
    budget = stages[0].sequences or 0
    loader = _loader(stages, micro_batch=SEQUENCES)
    seen = np.concatenate([source.numpy() for step in islice(loader, 60) for source in step.sources])
    names = np.array(loader.names)[seen]
    first, then = Counter(names[:budget].tolist()), Counter(names[budget:].tolist())
    assert first == {"a": round(budget * 0.75), "b": budget - round(budget * 0.75)}
    assert abs(then["b"] - then["c"]) <= 1
    assert abs(then["a"] - then["b"] / 2) <= 1
    state = loader.state_dict()
    assert state["stage"] == 1
    assert sum(state["taken"].values()) == 60 * SEQUENCES - budget


def test_the_last_stage_may_end_and_its_last_batch_is_filled_up(stages: tuple[Stage, ...]) -> None:
    short = (Stage(components=stages[0].components, sequences=SEQUENCES + 3),)
    steps = list(_loader(short, micro_batch=SEQUENCES))
    assert len(steps) == 2
    assert 0 < steps[1].tokens < steps[0].tokens
    targets = steps[1].micro_batches[0].targets.values()
    assert all(int(t.positions.max()) < 3 * T for t in targets)


def test_every_dataset_is_taken_once_where_validation_asks_for_all(stages: tuple[Stage, ...]) -> None:
    loader = _loader(stages[1:], endless=False, micro_batch=4)
    steps = list(loader)
    assert sum(step.tokens for step in steps) == sum(c.index.tokens for c in stages[1].components)
    order = np.concatenate([source.numpy() for step in steps for source in step.sources])
    used = order[: len(order) - SEQUENCES]
    assert (np.diff(used) >= 0).all()


def test_the_state_is_small_and_says_what_differs(stages: tuple[Stage, ...]) -> None:
    loader = _loader(stages, micro_batch=SEQUENCES)
    assert len(json.dumps(loader.state_dict())) < 2000
    for _ in range(200):
        next(loader)
    state = loader.state_dict()
    assert len(json.dumps(state)) < 2000
    other = Stage(components=(Component(name="b", index=stages[1].components[0].index),))
    with pytest.raises(LoadingError, match=r"c: documents: \d+ there, None here"):
        _loader((stages[0], other)).load_state_dict(state)


def test_stages_to_come_may_be_others(stages: tuple[Stage, ...], expected: list[bytes]) -> None:
    loader = _loader((stages[0], Stage(components=stages[0].components)))
    for _ in range(20):
        next(loader)
    went_on = _loader(stages)
    went_on.load_state_dict(loader.state_dict())
    got = [hashlib.sha256(b"".join(_rows(next(went_on)))).digest() for _ in range(40)]
    assert got == expected[20:60]


def test_datasets_that_do_not_fit_together_are_refused(stages: tuple[Stage, ...], tmp_path: Path) -> None:
    twice = Stage(components=stages[0].components[:1] * 2)
    with pytest.raises(LoadingError, match="two datasets of one mixture are called a"):
        _loader((twice,))
    view = Index.build(make_dataset(tmp_path / "v"), T, codebooks=1)
    mixed = Stage(components=(*stages[0].components, Component(name="v", index=view)))
    with pytest.raises(VocabularyError, match="audio_codebooks: 2, 1"):
        _loader((mixed,))


def test_a_view_of_the_first_codebooks_drops_the_others_and_nothing_else(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", units=2, rows=30, seed=5)
    index = Index.build(dataset, 48, 1)
    assert index.vocabulary == VOCABULARY.first_codebooks(1)
    assert index.vocabulary.fingerprint != VOCABULARY.fingerprint
    assert Index.build(dataset, 48, 2).codebooks is None
    wanted: Counter[tuple[int, int]] = Counter()
    for batch in dataset.read():
        for row in batch.to_pylist():
            ids, modalities = np.array(row["token_ids"]), np.array(row["modality_ids"])
            keep = (modalities != Modality.AUDIO) | (ids < VOCABULARY.audio_codebook_size)
            wanted.update(zip(modalities[keep].tolist(), ids[keep].tolist(), strict=True))
    assert sum(wanted.values()) == index.tokens
    got: Counter[tuple[int, int]] = Counter()
    for step in Loader(index, sequences=2, micro_batch=2, seed=0, window_tokens=2000, endless=False):
        for batch in step.micro_batches:
            batch.check()
            flat, modalities = batch.token_ids.flatten().numpy(), batch.modality_ids.flatten().numpy()
            got.update(zip(modalities.tolist(), flat.tolist(), strict=True))
    padding = got - wanted
    assert not wanted - got
    assert set(padding) <= {(0, VOCABULARY.end)}


def test_an_older_version_of_a_dataset_is_another_stream(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", units=2)
    old = Index.build(Dataset.open(dataset.uri, version=1), T)
    new = Index.build(dataset, T)
    stages = (
        Stage(components=(Component(name="d", index=old),), sequences=SEQUENCES * 2),
        Stage(components=(Component(name="d", index=new),)),
    )
    loader = _loader(stages, micro_batch=SEQUENCES)
    for _ in range(3):
        next(loader)
    assert loader.names == ["d", "d"]
    assert set(loader.state_dict()["streams"]) == {"d@1", "d@2"}
