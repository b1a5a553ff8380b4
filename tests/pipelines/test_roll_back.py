"""Going back at a spike: the steps since the checkpoint are taken anew with other batches, however often it is killed."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.loading import Loader
from pipelines.pretrain import loop
from pipelines.pretrain.checkpoint import list_checkpoints
from pipelines.pretrain.inventory import summary
from pipelines.pretrain.metrics import ROLL_BACK, read_metrics
from pipelines.pretrain.recipe import PretrainRecipe
from pipelines.pretrain.run import RunError
from pipelines.shards.dataset import Dataset
from tests.pipelines.spiking import tell_spikes
from tests.pipelines.training import losses_of, run_recipe, torch_weights, trained

SEQUENCES = 4


def _recipe(dataset: Dataset, output: Path, **more: Any) -> PretrainRecipe:
    return run_recipe(
        dataset,
        output,
        steps=14,
        faults={"spikes": "roll_back", "spike_sigmas": 1000.0, **more},
        checkpoints={"every": 4, "keep": 1},
        validation={"every": 7},
        logging={"every": 5, "tensorboard": True},
    )


@pytest.fixture
def spikes(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Batches, from 1 on, whose losses are told too high."""
    chosen: set[int] = set()
    tell_spikes(chosen, SEQUENCES, monkeypatch.setattr)
    return chosen


def _records(folder: Path) -> list[Any]:
    """All that does not tell of times."""
    kept = []
    for kind in ("train", "validation", "telemetry", ROLL_BACK):
        for record in read_metrics(folder / "metrics.jsonl", kind):
            kept.append({k: v for k, v in record.items() if k not in ("tokens_per_s", "data_wait_share", "memory_gb")})
    return kept


def test_a_spike_is_followed_by_the_batches_after_it_from_the_last_checkpoint_on(
    dataset: Dataset, tmp_path: Path, spikes: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    spikes.add(6)
    result = trained(_recipe(dataset, tmp_path / "run"))
    (record,) = read_metrics(result.folder / "metrics.jsonl", ROLL_BACK)
    assert [record[key] for key in ("step", "spike", "to", "batches", "count")] == [5, 6, 4, 2, 1]
    assert record["loss"]["text"] > 1000
    assert [r["step"] for r in read_metrics(result.folder / "metrics.jsonl", "train")] == list(range(1, 15))
    assert (summary(result.folder)["roll_backs"], summary(result.folder)["faults"]) == (1, 0)
    spikes.clear()
    take = Loader.__next__

    def passing_over(loader: Loader) -> Any:
        while sum(loader._place.taken.values()) in (4 * SEQUENCES, 5 * SEQUENCES):
            take(loader)
        return take(loader)

    monkeypatch.setattr(Loader, "__next__", passing_over)
    expected = trained(_recipe(dataset, tmp_path / "expected"))
    assert losses_of(result.folder) == losses_of(expected.folder)
    assert torch_weights(result.folder) == torch_weights(expected.folder)


class _KilledError(Exception):
    pass


def _killed(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    compute, calls = loop.forward_backward, itertools.count(1)

    def dying(*arguments: Any, **named: Any) -> Any:
        if next(calls) == at:
            raise _KilledError
        return compute(*arguments, **named)

    monkeypatch.setattr(loop, "forward_backward", dying)


def _told_to_stop(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count(1)

    def agreed(self: Any) -> bool:
        if next(calls) == at:
            self._note(signal.SIGUSR2, None)
        return bool(self._received)

    monkeypatch.setattr(loop.Interruption, "agreed", agreed)


@pytest.mark.parametrize(
    ("stop", "at"),
    [(_killed, 7), (_killed, 9), (_killed, 11), (_told_to_stop, 5), (_told_to_stop, 6), (_told_to_stop, 8)],
)
def test_a_run_that_was_stopped_goes_back_as_an_undisturbed_one(
    dataset: Dataset,
    tmp_path: Path,
    spikes: set[int],
    stop: Callable[[int, pytest.MonkeyPatch], None],
    at: int,
) -> None:
    # Back from step 6 to 4, and from there again at the next batch but one.
    spikes.update((6, 8))
    expected = trained(_recipe(dataset, tmp_path / "undisturbed"))
    assert [r["count"] for r in read_metrics(expected.folder / "metrics.jsonl", ROLL_BACK)] == [1, 2]
    recipe = _recipe(dataset, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        stop(at, patch)
        with pytest.raises((_KilledError, RunError)):
            trained(recipe)
    assert trained(recipe).resumed_from is not None
    assert _records(tmp_path / "run") == _records(expected.folder)
    assert torch_weights(tmp_path / "run") == torch_weights(expected.folder)


def test_going_back_is_bounded_and_needs_a_checkpoint(dataset: Dataset, tmp_path: Path, spikes: set[int]) -> None:
    spikes.update((3, 6, 8, 10))
    result = trained(_recipe(dataset, tmp_path / "run", roll_backs=2))
    told = {r["step"]: r["fault"] for r in read_metrics(result.folder / "metrics.jsonl", "train") if "fault" in r}
    assert told == {3: "spike, skipped", 6: "spike, skipped"}
    assert [r["spike"] for r in read_metrics(result.folder / "metrics.jsonl", ROLL_BACK)] == [6, 6]
    assert list_checkpoints(result.folder / "checkpoints")[-1].name == "step-00000014"


def test_where_a_run_would_go_back_to_may_not_change(dataset: Dataset, tmp_path: Path) -> None:
    recipe = _recipe(dataset, tmp_path / "run")
    trained(recipe)
    other = recipe.model_copy(update={"checkpoints": recipe.checkpoints.model_copy(update={"every": 7})})
    with pytest.raises(RunError, match=r"checkpoints\.every: 4 there, 7 here"):
        trained(other)


def test_stages_must_leave_batches_to_go_on_with(dataset: Dataset, tmp_path: Path) -> None:
    values = _recipe(dataset, tmp_path).model_dump(mode="json")
    values["data"] |= {"dataset": "", "stages": [{"mixture": [{"dataset": dataset.uri}], "steps": 14}]}
    with pytest.raises(ValueError, match=r"leave the length of the last stage of data\.stages out"):
        PretrainRecipe.model_validate(values)
