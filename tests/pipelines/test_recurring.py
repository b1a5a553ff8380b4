"""Recurring pipelines: what is due, what is remembered of failures, what is recorded; steps are scripted here."""

from __future__ import annotations

import http.server
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.pretrain.stages import claim_stage
from pipelines.recipe import RecipeError
from pipelines.recurring.due import added, look_at_export, look_at_inputs, look_at_pretrain
from pipelines.recurring.lease import Lease, LostError
from pipelines.recurring.recipe import Retries, pretrain_recipe, tokenize_recipe
from pipelines.recurring.state import Outcome, Plan, Result, State
from pipelines.recurring.tick import Ticked, tick
from tests.pipelines.jobs import run_units
from tests.pipelines.nightly import STEPS, Nightly


class Scripted:
    """An executor whose steps do as they are told."""

    name = "scripted"

    def __init__(self) -> None:
        self.outcomes: dict[str, Outcome | None] = {}
        """By step; `done` where nothing is said, and None ends the run without a word."""
        self.units: list[str] = []
        self.going_on = ""
        self.plans: list[Plan] = []

    def start(self, state: State, plan: Plan, retries: Retries, lease: Lease) -> bool:
        self.plans.append(plan)
        if self.going_on:
            return False
        for step in plan.steps:
            outcome = self.outcomes.get(step, "done")
            if outcome is None:
                break
            units = self.units if outcome == "failed" else []
            result = Result(
                step=step, attempt=1, outcome=outcome, why="as told", begun=plan.begun, seconds=0, host="h", units=units
            )
            state.add_result(plan.number, result)
            if outcome == "failed":
                break
        return True

    def under_way(self, state: State, plan: Plan) -> str:
        return self.going_on


def _tick(nightly: Nightly, executor: Scripted, trigger: str = "tick") -> Ticked:
    return tick("nightly", nightly.recipe, trigger, executor)


def test_new_inputs_are_due_and_done_inputs_are_not(tmp_path: Path) -> None:
    nightly = Nightly(tmp_path)
    tokenize = tokenize_recipe(nightly.recipe)

    def look(**changes: Any) -> tuple[bool, str]:
        recipe = nightly.recipe.model_copy(
            update={"tokenize": nightly.recipe.tokenize.model_copy(update=changes)} if changes else {}
        )
        found = look_at_inputs(recipe, tokenize, [], all_of_it=False)
        return found.tokenize.due, found.tokenize.why

    assert look() == (True, "10 new or changed inputs in 4 units")
    assert look(new_inputs=11) == (False, "10 new or changed inputs in 4 units, fewer than new_inputs = 11")
    run_units(tokenize)
    assert look() == (False, "all 4 units of the inputs are in version 1")
    nightly.write("new", "the fox")
    nightly.write("t0", "another text")
    assert look()[0]
    assert look(new_inputs=9) == (False, "4 new or changed inputs in 2 units, fewer than new_inputs = 9")


def test_the_digest_tells_whether_anything_came_or_changed(tmp_path: Path) -> None:
    nightly = Nightly(tmp_path)
    tokenize = tokenize_recipe(nightly.recipe)

    def digest() -> str:
        return look_at_inputs(nightly.recipe, tokenize, [], all_of_it=False).inputs

    seen = [digest()]
    assert digest() == seen[0]
    run_units(tokenize)
    assert digest() == seen[0]
    for name, text in (("new", "the fox"), ("new", "the changed fox")):
        nightly.write(name, text)
        seen.append(digest())
    assert len(set(seen)) == 3


def test_a_stage_is_due_when_enough_has_come_since_the_last_one(tmp_path: Path) -> None:
    nightly = Nightly(tmp_path)
    recipe, tokenize = nightly.recipe, tokenize_recipe(nightly.recipe)

    def look(*, all_of_it: bool = False, **conditions: int) -> tuple[bool, str]:
        assert recipe.pretrain
        changed = recipe.model_copy(update={"pretrain": recipe.pretrain.model_copy(update=conditions)})
        due = look_at_pretrain(changed, tokenize, all_of_it=all_of_it)
        return due.due, due.why

    assert look() == (False, "there is no dataset yet")
    run_units(tokenize)
    assert look() == (True, "10 new documents in version 1")
    assert look(new_documents=11) == (False, "10 new documents in version 1, fewer than new_documents = 11")
    assert look(new_documents=11, all_of_it=True)[0]
    assert look(new_tokens=10**6) == (
        False,
        "10 new documents of 172 tokens in version 1, fewer than new_tokens = 1,000,000",
    )
    assert look(new_tokens=10**6, new_documents=10)[0]
    assert look(new_tokens=172)[0]
    claim_stage(tmp_path / "run", STEPS, 1, "a test")
    assert look() == (True, "stage 1 is not finished")
    (tmp_path / "run" / "finished.json").write_text(json.dumps({"steps": STEPS}))
    assert look() == (False, "0 new documents in version 1 since stage 1")
    assert not look(all_of_it=True)[0]
    nightly.write("new", "the fox")
    run_units(tokenize)
    assert look() == (True, "1 new documents in version 2 since stage 1")
    # Of a changed input all documents of its unit are new; that the old ones have gone does not count against them.
    nightly.write("t0", "a changed text, and a longer one")
    dataset = run_units(tokenize)
    assert look() == (True, "4 new documents in version 3 since stage 1")
    documents, tokens = added(dataset, 1, tokens=True)
    assert (documents, added(dataset, 0, tokens=True)) == (4, (11, dataset.statistics().tokens()))
    assert added(dataset, 3, tokens=True) == (0, 0)
    assert 0 < tokens < dataset.statistics().tokens()


def test_nothing_is_trained_on_a_dataset_over_its_error_budget(tmp_path: Path) -> None:
    nightly = Nightly(tmp_path, {"good": "the fox"})
    nightly.write("bad", b"caf\xe9")
    tokenize = tokenize_recipe(nightly.recipe)
    run_units(tokenize)
    strict = tokenize.model_copy(update={"error_budget": 0.1})
    due = look_at_pretrain(nightly.recipe, strict, all_of_it=True)
    assert not due.due
    assert "1 of 2 documents (50.0%) could not be tokenized, over the error_budget of 10.0%" in due.why


def test_a_refused_stage_is_not_exported(tmp_path: Path) -> None:
    nightly = Nightly(tmp_path)
    stage = claim_stage(tmp_path / "run", STEPS, 1, "a test")
    (tmp_path / "run" / "finished.json").write_text(json.dumps({"steps": STEPS}))
    assert look_at_export(nightly.recipe).why == "stage 1 was not evaluated"
    file = tmp_path / "run" / "stages" / f"{stage.number:04d}.evaluation.json"
    file.write_text(json.dumps({"refused": "text 9 over at_most = 5"}))
    assert look_at_export(nightly.recipe).why == "stage 1 was refused: text 9 over at_most = 5"
    file.write_text(json.dumps({"refused": ""}))
    assert look_at_export(nightly.recipe).due
    # A copy without the link is of an export that was killed.
    (tmp_path / "models/stage-0001").mkdir(parents=True)
    assert look_at_export(nightly.recipe).due
    (tmp_path / "models/latest").symlink_to("stage-0001")
    assert look_at_export(nightly.recipe).why == "stage 1 was exported"


def test_a_run_is_planned_from_the_first_step_that_is_due(tmp_path: Path) -> None:
    nightly, executor = Nightly(tmp_path), Scripted()
    assert _tick(nightly, executor).record
    assert executor.plans[0].steps == ["tokenize", "pretrain", "evaluate", "export", "clean"]
    run_units(tokenize_recipe(nightly.recipe))
    _tick(nightly, executor)
    assert executor.plans[1].steps == ["pretrain", "evaluate", "export", "clean"]
    claim_stage(tmp_path / "run", STEPS, 1, "a test")
    (tmp_path / "run" / "finished.json").write_text(json.dumps({"steps": STEPS}))
    _tick(nightly, executor)
    assert executor.plans[2].steps == ["evaluate", "export", "clean"]
    assert [record.number for record in nightly.state.records()] == [3, 2, 1]


def test_with_nothing_to_do_nothing_is_recorded_and_the_reasons_are_said(tmp_path: Path) -> None:
    nightly, executor = Nightly(tmp_path, pretrain=None, evaluate=None, export=None), Scripted()
    run_units(tokenize_recipe(nightly.recipe))
    ticked = _tick(nightly, executor)
    assert ticked.said == "nothing to do: tokenize: all 4 units of the inputs are in version 1"
    assert nightly.state.numbers() == []
    assert (nightly.state.last_tick or {})["said"] == ticked.said


def test_a_paused_pipeline_does_nothing_but_by_hand(tmp_path: Path) -> None:
    nightly, executor = Nightly(tmp_path), Scripted()
    nightly.state.pause("ann", "the disk is being moved")
    assert "paused by ann at" in (said := _tick(nightly, executor).said)
    assert said.endswith("the disk is being moved")
    assert executor.plans == []
    assert _tick(nightly, executor, "run").record
    assert nightly.state.resume()
    assert not nightly.state.resume()
    assert _tick(nightly, executor).record


def test_while_another_tick_works_this_one_says_who_holds_the_lease(tmp_path: Path) -> None:
    nightly, executor = Nightly(tmp_path), Scripted()
    with Lease.take(nightly.state.lease, nightly.recipe.lease, "tick of nightly"):
        ticked = _tick(nightly, executor)
    assert ticked.held
    assert "nothing done: tick of nightly of" in ticked.said
    assert executor.plans == []


def test_a_tick_that_slept_while_another_worked_begins_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is taken for dead while it lists the sources."""
    from pipelines.recurring import tick as module

    nightly, executor, other = Nightly(tmp_path), Scripted(), Scripted()
    real = module.look_at_inputs

    def slow(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(module, "look_at_inputs", real)
        (lease,) = nightly.state.lease.glob("*.json")
        lease.rename(lease.with_suffix(".away"))
        assert _tick(nightly, other).record
        return real(*arguments, **options)

    monkeypatch.setattr(module, "look_at_inputs", slow)
    with pytest.raises(LostError):
        _tick(nightly, executor)
    assert (executor.plans, nightly.state.numbers()) == ([], [1])
    assert other.plans


def test_a_failed_step_is_tried_in_so_many_runs_and_again_when_inputs_come(tmp_path: Path) -> None:
    nightly, executor = Nightly(tmp_path), Scripted()
    executor.outcomes = {"tokenize": "failed"}
    for _ in range(3):
        record = _tick(nightly, executor).record
        assert record
        assert (record.outcome, record.why) == ("failed", "tokenize: as told")
    given_up = _tick(nightly, executor)
    assert given_up.record is None
    assert "tokenize: given up after it failed in 3 runs; mend it and call `braid pipeline run`" in given_up.said
    nightly.write("new", "the fox")
    for _ in range(3):
        assert _tick(nightly, executor).record
    assert _tick(nightly, executor).record is None
    executor.outcomes = {}
    assert _tick(nightly, executor, "run").record
    record = nightly.state.record(7)
    assert record
    assert record.memory["failed"] == {}


def test_what_was_given_up_does_not_hold_up_what_else_is_due(tmp_path: Path) -> None:
    nightly, executor = Nightly(tmp_path), Scripted()
    run_units(tokenize_recipe(nightly.recipe))
    nightly.write("new", "the fox")
    executor.outcomes = {"tokenize": "failed"}
    for _ in range(3):
        _tick(nightly, executor)
    _tick(nightly, executor)
    assert executor.plans[-1].steps == ["pretrain", "evaluate", "export", "clean"]


def test_units_that_fail_again_and_again_are_set_aside(tmp_path: Path) -> None:
    nightly, executor = Nightly(tmp_path), Scripted()
    tokenize = tokenize_recipe(nightly.recipe)
    from tests.pipelines.jobs import make_plan

    poison = make_plan(tokenize).pending[0].id
    executor.outcomes, executor.units = {"tokenize": "failed"}, [poison]
    for _ in range(3):
        _tick(nightly, executor)
    assert executor.plans[-1].without == []
    executor.outcomes = {}
    _tick(nightly, executor)
    assert executor.plans[-1].without == [poison]
    assert "1 units are set aside after failures" in executor.plans[-1].why["tokenize"]
    _tick(nightly, executor, "run")
    assert executor.plans[-1].without == []


def test_a_run_that_ended_without_a_word_is_recorded_by_the_next_tick(tmp_path: Path) -> None:
    nightly, executor = Nightly(tmp_path), Scripted()
    executor.outcomes = {"pretrain": None}
    lost = _tick(nightly, executor).record
    assert lost
    assert (lost.outcome, lost.why) == ("lost", "it ended without a word, in or before pretrain")
    plan = replace(nightly.state.plan(1), number=2)
    nightly.state.begin(plan)
    executor.outcomes = {}
    _tick(nightly, executor)
    assert [(r.number, r.outcome) for r in nightly.state.records()] == [(3, "done"), (2, "lost"), (1, "lost")]


def test_a_run_whose_steps_go_on_elsewhere_is_left_alone(tmp_path: Path) -> None:
    nightly, executor = Nightly(tmp_path), Scripted()
    executor.going_on = "job 17 is pending"
    assert _tick(nightly, executor).said == "run 1: job 17 is pending"
    assert _tick(nightly, executor).said == "run 1 is under way: job 17 is pending"
    assert len(executor.plans) == 1
    executor.going_on = ""
    _tick(nightly, executor)
    record = nightly.state.record(1)
    assert record
    assert record.outcome == "lost"


def test_a_source_that_is_not_there_is_a_failure_that_is_recorded(tmp_path: Path) -> None:
    nightly = Nightly(tmp_path)
    (tmp_path / "texts").rename(tmp_path / "unmounted")
    executor = Scripted()
    executor.outcomes = {"tokenize": "failed"}
    record = _tick(nightly, executor).record
    assert record
    assert str(tmp_path / "texts") in record.due["tokenize"]
    (tmp_path / "unmounted").rename(tmp_path / "texts")
    executor.outcomes = {}
    assert _tick(nightly, executor).record


@contextmanager
def _webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    got: list[dict[str, Any]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/hook", got
    finally:
        server.shutdown()
        server.server_close()


def test_alerts_tell_of_failure_giving_up_and_recovery(tmp_path: Path) -> None:
    script = 'import json, os, sys; r = json.load(sys.stdin); open(sys.argv[1], "a").write('
    script += 'os.environ["BRAID_EVENT"] + " " + str(r["record"]["number"]) + "\\n")'
    with _webhook() as (url, got):
        alerts = [
            {"command": [sys.executable, "-c", script, str(tmp_path / "told")]},
            {"webhook": url, "on": ["failed", "done"]},
            {"command": ["/no/such/program"], "on": ["failed"]},
        ]
        nightly, executor = Nightly(tmp_path, alerts=alerts), Scripted()
        executor.outcomes = {"tokenize": "failed"}
        for _ in range(3):
            _tick(nightly, executor)
        executor.outcomes = {}
        nightly.write("new", "the fox")
        _tick(nightly, executor)
    assert (tmp_path / "told").read_text().split("\n") == ["failed 1", "failed 2", "given_up 3", "recovered 4", ""]
    assert [(g["event"], g["record"]["number"]) for g in got] == [
        ("failed", 1),
        ("failed", 2),
        ("failed", 3),
        ("done", 4),
    ]
    assert got[0]["text"] == "run 1 failed: tokenize: as told"
    first = nightly.state.record(1)
    assert first
    assert [bool(alert["error"]) for alert in first.alerts] == [False, False, True]
    assert "/no/such/program" in first.alerts[2]["error"]
    # What lets one write to the webhook stands in no file of the state folder.
    assert not [p for p in (tmp_path / "state").rglob("*.json") if "/hook" in p.read_text()]


def test_a_learning_rate_that_follows_the_length_of_the_run_is_refused_before_any_work(tmp_path: Path) -> None:
    nightly = Nightly(tmp_path)
    text = (tmp_path / "pretrain.yaml").read_text().replace("wsd", "cosine")
    (tmp_path / "pretrain.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"schedule\.kind = cosine.*set schedule\.kind: wsd"):
        pretrain_recipe(nightly.recipe, "tokens")
    with pytest.raises(RecipeError):
        _tick(nightly, Scripted())
    assert nightly.state.numbers() == []
