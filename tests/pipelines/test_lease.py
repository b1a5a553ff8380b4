"""The lease: one holder at a time, whatever dies, sleeps or is removed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pipelines.recurring.lease import HeldError, Holder, Lease, LostError, heartbeat_age_s, read_holder, whoami
from pipelines.recurring.recipe import LeaseSettings

ROOT = Path(__file__).parents[2]
QUICK = LeaseSettings(ttl_s=1.0)

HOLD = """
import sys, time
from pathlib import Path
from pipelines.recurring.lease import Lease, LostError
from pipelines.recurring.recipe import LeaseSettings
with Lease.take(Path(sys.argv[1]), LeaseSettings(ttl_s=float(sys.argv[2])), "a test") as lease:
    print("held", flush=True)
    for line in sys.stdin:
        try:
            lease.require()
            print("still held", flush=True)
        except LostError as error:
            print(error, flush=True)
"""


def _holder(folder: Path, ttl_s: float = 1.0) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), str(ttl_s)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def _ask(process: subprocess.Popen[str]) -> str:
    assert process.stdin
    assert process.stdout
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def test_while_it_is_held_another_process_learns_who_holds_it(tmp_path: Path) -> None:
    process = _holder(tmp_path)
    try:
        time.sleep(1.5)  # Longer than `ttl_s`: the heartbeat keeps it.
        with pytest.raises(
            HeldError, match=rf"a test of .* on \S+, process {process.pid}, since .*, holds the lease in"
        ):
            Lease.take(tmp_path, QUICK, "me")
        assert _ask(process) == "still held"
    finally:
        _end(process)


def test_of_many_that_ask_at_once_one_gets_it(tmp_path: Path) -> None:
    def ask(n: int) -> Lease | None:
        try:
            return Lease.take(tmp_path, QUICK, f"asker {n}")
        except HeldError:
            return None

    for _ in range(5):
        with ThreadPoolExecutor(16) as pool:
            (lease,) = [lease for lease in pool.map(ask, range(16)) if lease]
        lease.require()
        lease.release()
    assert read_holder(tmp_path) is None
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_a_holder_of_this_machine_that_was_killed_is_followed_at_once(tmp_path: Path) -> None:
    process = _holder(tmp_path, ttl_s=1000.0)
    _end(process)
    began = time.monotonic()
    with Lease.take(tmp_path, LeaseSettings(ttl_s=1000.0), "me") as lease:
        assert lease.generation == 2
    assert time.monotonic() - began < 5


def test_a_holder_elsewhere_is_followed_when_it_was_silent_for_long_enough(tmp_path: Path) -> None:
    lease = Lease.take(tmp_path, QUICK, "me")
    lease._ended.set()  # As at a power cut: no heartbeat any more, and no word.
    elsewhere = replace(Holder.me("tick"), host="n7", process="another machine 1")
    (tmp_path / "00000001.json").write_text(json.dumps(asdict(elsewhere)))
    with pytest.raises(HeldError, match=r"tick of .* on n7, .* taken for dead after 1 s"):
        Lease.take(tmp_path, QUICK, "other")
    time.sleep(1.1)
    assert heartbeat_age_s(tmp_path) > 1
    Lease.take(tmp_path, QUICK, "other").release()


def test_a_holder_that_slept_while_another_took_over_notices_before_it_commits(tmp_path: Path) -> None:
    process = _holder(tmp_path)
    try:
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(1.2)
        with Lease.take(tmp_path, QUICK, "the successor") as mine:
            os.kill(process.pid, signal.SIGCONT)
            assert "lost the lease" in (said := _ask(process))
            assert f"taken over by the successor of {whoami()}" in said
            mine.require()
    finally:
        _end(process)


def test_a_lease_that_was_removed_by_hand_stops_its_holder(tmp_path: Path) -> None:
    with Lease.take(tmp_path, QUICK, "me") as lease:
        (tmp_path / "00000001.json").unlink()
        with pytest.raises(LostError, match="its file was removed; nothing more is committed"):
            lease.require()


def test_a_lease_that_was_removed_by_hand_and_taken_by_another_is_not_the_first_ones(tmp_path: Path) -> None:
    # No heartbeat comes between the two, for that would find the file gone.
    with Lease.take(tmp_path, LeaseSettings(ttl_s=1000.0), "me") as lease:
        (tmp_path / "00000001.json").unlink()
        with Lease.take(tmp_path, QUICK, "another") as other:
            assert other.generation == lease.generation
            with pytest.raises(LostError, match="taken over by another of"):
                lease.require()
            other.require()


def test_no_lease_lives_for_ever(tmp_path: Path) -> None:
    with Lease.take(tmp_path, LeaseSettings(ttl_s=1.0, most_h=0.3 / 3600), "hangs") as lease:
        lease.require()
        time.sleep(0.6)
        assert lease.lost
        with pytest.raises(LostError, match=r"held for lease\.most_h"):
            lease.require()
        time.sleep(1.0)
        # This very process lives, and its lease is over all the same.
        Lease.take(tmp_path, QUICK, "successor").release()


def test_a_damaged_lease_is_over_after_its_time(tmp_path: Path) -> None:
    (tmp_path / "00000007.json").write_text("{")
    with pytest.raises(HeldError, match="a damaged lease"):
        Lease.take(tmp_path, QUICK, "me")
    time.sleep(1.1)
    with Lease.take(tmp_path, QUICK, "me") as lease:
        assert lease.generation == 8


def test_of_two_who_ask_at_one_moment_the_slower_is_told_who_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both look while it is free; the other's link comes first."""
    from pipelines.recurring import lease as module

    real, held = module.create_exclusively, []

    def slow(file: Path, content: bytes) -> bool:
        monkeypatch.setattr(module, "create_exclusively", real)
        held.append(Lease.take(tmp_path, QUICK, "the faster"))
        return real(file, content)

    monkeypatch.setattr(module, "create_exclusively", slow)
    with pytest.raises(HeldError, match=rf"^the faster of .*, process {os.getpid()}, since .*, holds the lease in"):
        Lease.take(tmp_path, QUICK, "the slower")
    held[0].release()


def test_a_number_that_became_free_again_is_no_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look of a slow process and its link, the lease was taken and given back twice."""
    from pipelines.recurring import lease as module

    real = module.create_exclusively

    def slow(file: Path, content: bytes) -> bool:
        monkeypatch.setattr(module, "create_exclusively", real)
        for _ in range(2):
            Lease.take(tmp_path, QUICK, "quick").release()
        return real(file, content)

    monkeypatch.setattr(module, "create_exclusively", slow)
    with pytest.raises(HeldError, match="at this moment"):
        Lease.take(tmp_path, QUICK, "slow")
    assert [p.name for p in tmp_path.glob("*.json")] == ["00000002.json"]
