"""Whole runs of a small pipeline by processes of their own, as a scheduler starts them; killed and put to sleep."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.crash import PIPELINE_POINTS
from pipelines.pretrain.metrics import read_metrics
from pipelines.pretrain.stages import read_stages
from pipelines.recurring.executor import Local
from pipelines.recurring.lease import Lease, read_holder
from pipelines.recurring.recipe import Retries, tokenize_recipe
from pipelines.recurring.state import Plan
from pipelines.recurring.tick import tick
from pipelines.shards.dataset import Dataset
from tests.campaigns.recurring_fortnight import run as live_through
from tests.campaigns.tokenize_kills import _processes
from tests.pipelines.jobs import run_units
from tests.pipelines.nightly import STEPS, Nightly


def _begin(nightly: Nightly, steps: list[str], lease: Lease) -> Plan:
    """A run of some steps that nobody has asked whether they are due."""
    plan = Plan(
        number=1,
        pipeline="nightly",
        trigger="tick",
        steps=steps,
        why={},
        inputs="",
        without=[],
        version=0,
        trained_to=0,
        recipe=nightly.recipe.model_dump(mode="json"),
        tokenize=tokenize_recipe(nightly.recipe).model_dump(mode="json"),
        pretrain=None,
        folder=str(nightly.folder),
        executor="local",
        host="here",
        pid=os.getpid(),
        generation=lease.generation,
        begun="2026-11-24T00:00:00+00:00",
    )
    assert nightly.state.begin(plan)
    assert not nightly.state.begin(replace(plan, pipeline="another"))
    return plan


@pytest.fixture
def nightly(tmp_path: Path) -> Nightly:
    """Whose inputs are all in its dataset."""
    made = Nightly(tmp_path, pretrain=None, evaluate=None, export=None)
    run_units(tokenize_recipe(made.recipe))
    return made


def test_a_step_that_is_killed_is_tried_again(nightly: Nightly, monkeypatch: pytest.MonkeyPatch) -> None:
    (nightly.folder / "once").touch()
    monkeypatch.setenv("BRAID_CRASH", f"step_ended:1:{nightly.folder / 'once'}")
    with Lease.take(nightly.state.lease, nightly.recipe.lease, "a test") as lease:
        plan = _begin(nightly, ["clean"], lease)
        assert Local().start(nightly.state, plan, Retries(attempts=3, wait_s=0.0), lease)
    first, second = nightly.state.results(1, ["clean"])
    assert (first.outcome, second.outcome) == ("failed", "done")
    assert "its process was killed (SIGKILL): out of memory, or by hand; see" in first.why
    assert "removed 0 files" in nightly.state.log(1, "clean", 2).read_text()


def test_no_step_follows_one_that_failed(nightly: Nightly) -> None:
    with Lease.take(nightly.state.lease, nightly.recipe.lease, "a test") as lease:
        plan = _begin(nightly, ["no such step", "clean"], lease)
        Local().start(nightly.state, plan, Retries(attempts=1), lease)
    (result,) = nightly.state.results(1, plan.steps)
    assert (result.outcome, result.step, result.why) == ("failed", "no such step", "KeyError: 'no such step'")
    assert "Traceback" in nightly.state.log(1, "no such step", 1).read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_does_each_thing_once(tmp_path: Path) -> None:
    nightly = Nightly(tmp_path)
    code, said = nightly.call("tick")
    assert code == 0, said
    assert "nightly: run 1 done: tokenize: 10 documents" in said
    assert (tmp_path / "models/latest/model.safetensors").exists()
    assert (nightly.state.folder / "history.html").exists()
    code, said = nightly.call("tick")
    assert "nothing to do" in said
    # Below the condition, and then by hand.
    nightly.file.write_text(nightly.file.read_text().replace(f"steps: {STEPS}", f"steps: {STEPS}\n  new_documents: 3"))
    nightly.write("new", "the fox is new")
    code, said = nightly.call("tick")
    record = nightly.state.record(2)
    assert record
    assert [(r.step, r.outcome) for r in record.steps][:2] == [("tokenize", "done"), ("pretrain", "skipped")]
    assert "fewer than new_documents = 3" in record.steps[1].why
    code, said = nightly.call("run", "--backfill")
    assert code == 0, said
    assert [s.number for s in read_stages(tmp_path / "run")] == [1, 2]
    assert json.loads((tmp_path / "models/latest/stage.json").read_text())["number"] == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_refused_model_is_not_exported_and_the_run_says_so(tmp_path: Path) -> None:
    nightly = Nightly(tmp_path, evaluate={"at_most": {"text": 0.1, "audio": 5.0}})
    run_units(tokenize_recipe(nightly.recipe))
    code, said = nightly.call("tick")
    assert code == 1
    assert (
        "run 1 refused: evaluate: stage 1 was refused: audio has a limit, but the validation split has no audio; text"
        in said
    )
    assert not (tmp_path / "models").exists()
    code, said = nightly.call("tick")
    assert "nothing to do" in said
    assert "export: stage 1 was refused" in said


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("point", PIPELINE_POINTS)
def test_a_run_that_is_killed_at_a_named_place_is_finished_by_the_next_tick(tmp_path: Path, point: str) -> None:
    nightly = Nightly(tmp_path)
    run_units(tokenize_recipe(nightly.recipe))
    once = tmp_path / "once"
    once.touch()
    nightly.call("tick", BRAID_CRASH=f"{point}:1:{once}")
    assert not once.exists(), "nothing came by"
    code, said = nightly.call("tick")
    assert code == 0, said
    assert "nothing to do" in nightly.call("tick")[1]
    run = tmp_path / "run"
    assert [s.to_step for s in read_stages(run)] == [STEPS]
    assert [r["step"] for r in read_metrics(run / "metrics.jsonl", "train")] == list(range(1, STEPS + 1))
    assert [p.name for p in sorted((tmp_path / "models").iterdir())] == ["latest", "stage-0001"]
    records = [nightly.state.record(number) for number in nightly.state.numbers()]
    assert all(records)
    assert sum(r.steps_trained for r in records if r) == STEPS
    assert read_holder(nightly.state.lease) is None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_of_two_ticks_at_once_one_works_and_one_says_who_holds_the_lease(tmp_path: Path) -> None:
    nightly = Nightly(tmp_path, pretrain=None, evaluate=None, export=None)
    first, second = nightly.start("tick"), nightly.start("tick")
    told = {process.pid: process.communicate(timeout=200)[0] for process in (first, second)}
    assert (first.returncode, second.returncode) == (0, 0)
    (worker,) = [pid for pid, said in told.items() if "run 1 done" in said]
    (other,) = [said for pid, said in told.items() if pid != worker]
    assert f"process {worker}, since" in other
    assert "holds the lease" in other
    assert Dataset.open(tmp_path / "tokens").statistics().documents == 10


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_steps_die_with_their_tick_and_a_signal_ends_both_and_is_recorded(tmp_path: Path) -> None:
    nightly = Nightly(tmp_path, pretrain=None, evaluate=None, export=None)
    for number, ask in ((1, signal.SIGKILL), (2, signal.SIGTERM)):
        process = nightly.start("tick", BRAID_TRIAL=f"dies-{os.getpid()}-{number}")

        def steps(number: int = number) -> list[int]:
            found = _processes(f"dies-{os.getpid()}-{number}")
            return [pid for pid, command in found if "pipelines.recurring.step" in command]

        while not steps():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(ask)
        said = process.communicate(timeout=60)[0]
        until = time.monotonic() + 5
        while steps() and time.monotonic() < until:
            time.sleep(0.02)
        assert not steps()
    assert "run 2 lost: stopped by SIGTERM, in" in said
    assert read_holder(nightly.state.lease) is None
    assert [r.outcome for r in nightly.state.records()] == ["lost", "lost"]
    ticked = tick("nightly", nightly.recipe)
    assert ticked.record
    assert (ticked.record.number, ticked.record.outcome) == (3, "done")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_some_days_in_which_much_goes_wrong_leave_what_undisturbed_ones_would(tmp_path: Path) -> None:
    _, faults = live_through(5, 4, tmp_path)
    assert faults == []
