"""Schedules, and entries in a real crontab; what systemd would read; the doctor."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.recurring.doctor import examine
from pipelines.recurring.entries import Installed, InstallError, Table, all_entries, install, keeper, remove
from pipelines.recurring.lease import Lease
from pipelines.recurring.recipe import tokenize_recipe
from pipelines.recurring.schedule import Schedule, ScheduleError
from pipelines.recurring.state import State
from pipelines.recurring.systemd import units
from tests.pipelines.jobs import run_units
from tests.pipelines.nightly import Nightly

needs_cron = pytest.mark.skipif(
    not shutil.which("crontab"), reason="there is no crontab here; install the package cron"
)


@pytest.mark.parametrize(
    ("text", "cron", "calendar"),
    [
        ("02:30", "30 2 * * *", ["*-*-* 02:30:00"]),
        ("7:05", "5 7 * * *", ["*-*-* 07:05:00"]),
        ("hourly", "0 * * * *", ["*-*-* *:00:00"]),
        ("weekly", "0 2 * * sun", ["Sun *-*-* 02:00:00"]),
        ("*/20 8-10 * * mon-fri", "*/20 8-10 * * mon-fri", ["Mon,Tue,Wed,Thu,Fri *-*-* 08,09,10:00,20,40:00"]),
        ("0 0 1,15 jan *", "0 0 1,15 jan *", ["*-01-01,15 00:00:00"]),
        ("0 0 13 * 5", "0 0 13 * 5", ["*-*-13 00:00:00", "Fri *-*-* 00:00:00"]),
    ],
)
def test_times_are_understood_for_cron_and_systemd(text: str, cron: str, calendar: list[str]) -> None:
    schedule = Schedule.parse(text)
    assert (schedule.cron, schedule.on_calendar) == (cron, calendar)


@pytest.mark.parametrize(
    "text", ["25:00", "noon", "* * * *", "60 * * * *", "*/0 * * * *", "0 0 30 feb *", "5-1 * * * *", ""]
)
def test_a_time_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ScheduleError, match="--at"):
        Schedule.parse(text)


FIELD = [
    st.one_of(st.just("*"), st.integers(low, high).map(str), st.integers(2, 9).map(lambda n: f"*/{n}"))
    for low, high in ((0, 59), (0, 23), (1, 28), (1, 12), (0, 6))
]


@given(st.tuples(*FIELD), st.datetimes(datetime(2024, 1, 1), datetime(2028, 1, 1)))
def test_the_next_time_is_the_first_that_the_fields_allow(fields: tuple[str, ...], moment: datetime) -> None:
    schedule = Schedule(" ".join(fields))
    found = schedule.next_after(moment)
    minutes, hours, *_ = schedule._allowed
    assert found > moment
    assert found.minute in minutes
    assert found.hour in hours
    assert schedule._on(found)
    # No earlier day, hour or minute would do; days are enough to look at one by one.
    day = moment.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)
    while day.date() < found.date():
        assert not schedule._on(day)
        day += timedelta(days=1)
    if found.date() == moment.date():
        earlier = [(h, m) for h in hours for m in minutes if (moment.hour, moment.minute) < (h, m)]
        assert min(earlier) == (found.hour, found.minute)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd-analyze here")
def test_systemd_reads_what_is_written_for_it(tmp_path: Path) -> None:
    schedule = Schedule.parse("*/20 8-10 13 * fri")
    for line in schedule.on_calendar:
        done = subprocess.run(["systemd-analyze", "calendar", line], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    script = tmp_path / "a folder with 50% $HOME" / "tick.sh"
    script.parent.mkdir()
    script.write_text("exit 0\n")
    for suffix, text in units("night", schedule, script).items():
        (tmp_path / f"braid-night.{suffix}").write_text(text)
    files = [str(tmp_path / f"braid-night.{suffix}") for suffix in ("service", "timer")]
    done = subprocess.run(["systemd-analyze", "verify", *files], capture_output=True, text=True, check=False)
    assert "braid-night" not in done.stderr, done.stderr


@pytest.fixture
def crontab() -> Iterator[None]:
    """The crontab of whoever runs the tests, put back afterwards."""
    before = subprocess.run(["crontab", "-l"], capture_output=True, text=True, check=False)
    subprocess.run(["crontab", "-"], input="# of somebody else\n0 5 * * * true\n", text=True, check=True)
    yield
    if before.returncode:
        subprocess.run(["crontab", "-r"], check=False)
    else:
        subprocess.run(["crontab", "-"], input=before.stdout, text=True, check=True)


def _crontab() -> str:
    return subprocess.run(["crontab", "-l"], capture_output=True, text=True, check=True).stdout


@needs_cron
@pytest.mark.usefixtures("crontab")
def test_an_entry_is_made_replaced_and_removed_and_others_are_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "50% off, 'quoted'"
    folder.mkdir()
    nightly = Nightly(folder)
    state = nightly.state
    install("nightly", nightly.file, [], state, "cron", "02:30")
    install("nightly", nightly.file, ["tokenize.new_inputs=3"], state, "cron", "hourly")
    install("other", nightly.file, [], state, "cron", "daily")
    with pytest.raises(InstallError, match="a pipeline named nightly is installed already, with its state in"):
        install("nightly", nightly.file, [], State(folder / "another state"), "cron", "02:30")
    assert _crontab().startswith("# of somebody else\n0 5 * * * true\n")
    entries = {entry.name: entry for entry in all_entries()}
    assert {name: entry.at for name, entry in entries.items()} == {"nightly": "0 * * * *", "other": "0 2 * * *"}
    assert all(entry.enabled for entry in entries.values())
    assert _crontab().count("# braid pipeline nightly") == 1
    assert "tokenize.new_inputs=3" not in (state.folder / "tick.sh").read_text()  # the last one installed was `other`
    assert remove("nightly", state) == ["cron"]
    assert remove("nightly", state) == []
    assert [entry.name for entry in all_entries()] == ["other"]
    remove("other", state)
    assert _crontab() == "# of somebody else\n0 5 * * * true\n"


@needs_cron
@pytest.mark.usefixtures("crontab")
def test_what_the_entry_runs_ticks_as_the_installing_shell_would(tmp_path: Path) -> None:
    nightly = Nightly(tmp_path, pretrain=None, evaluate=None, export=None)
    run_units(tokenize_recipe(nightly.recipe))
    install("nightly", nightly.file, [], nightly.state, "cron", "02:30")
    (line,) = [line for line in _crontab().splitlines() if "braid pipeline" in line]
    command = line.split(None, 5)[5].replace(r"\%", "%")
    # As cron does it: another folder, an empty environment, sh.
    subprocess.run(["/bin/sh", "-c", command], cwd="/", env={"HOME": "/root", "PATH": "/usr/bin:/bin"}, check=True)
    assert "nothing to do" in (nightly.state.last_tick or {})["said"]
    assert "nothing to do" in (nightly.state.folder / "tick.log").read_text()


def test_a_scheduler_that_is_not_here_is_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for via, said in (("cron", "install the package cron"), ("scrontab", "SLURM"), ("systemd", "use --via cron")):
        with pytest.raises(InstallError, match=said):
            keeper(via)
    with pytest.raises(InstallError, match="known are cron, scrontab, systemd"):
        keeper("anacron")


def test_a_cancelled_entry_of_scrontab_is_seen_and_replaced_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """SLURM writes a cancelled entry back as a comment; the table's text is all that counts here."""
    table = Table("scrontab")
    lines = [
        "0 1 * * * /bin/sh /other.sh",
        "#DISABLED: #SCRON --job-name=braid-nightly",
        "#DISABLED: 30 2 * * * /bin/sh /state/tick.sh # braid pipeline nightly",
    ]
    monkeypatch.setattr(Table, "_read", lambda self: lines)
    monkeypatch.setattr(Table, "_write", lambda self, new: lines.__setitem__(slice(None), new))
    (entry,) = table.entries()
    assert (entry.name, entry.at, entry.script, entry.enabled) == ("nightly", "30 2 * * *", "/state/tick.sh", False)
    table.put("nightly", Schedule.parse("hourly"), Path("/state/tick.sh"), ["--partition=main"])
    assert lines == [
        "0 1 * * * /bin/sh /other.sh",
        "#SCRON --job-name=braid-nightly --output=/state/scrontab.log --open-mode=append --partition=main",
        "0 * * * * /bin/sh /state/tick.sh # braid pipeline nightly",
    ]
    assert table.entries()[0].enabled
    assert table.drop("nightly")
    assert lines == ["0 1 * * * /bin/sh /other.sh"]


def _faults(nightly: Nightly) -> list[str]:
    return [finding.text for finding in examine("nightly", nightly.recipe) if finding.level == "fault"]


@needs_cron
@pytest.mark.usefixtures("crontab")
def test_the_doctor_finds_what_would_keep_it_from_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nightly = Nightly(tmp_path, alerts=[{"command": ["/no/such/program"]}])
    monkeypatch.setattr(Table, "asleep", lambda self: "")
    assert _faults(nightly) == ["alerts: /no/such/program: no such program; name it by its whole path"]
    nightly.file.write_text(nightly.file.read_text().replace("/no/such/program", "/bin/true"))
    install("nightly", nightly.file, [], nightly.state, "cron", "02:30")
    assert _faults(nightly) == []
    table = _crontab()
    subprocess.run(["crontab", "-"], input=table.replace("30 2 * * * /bin", "#30 2 * * * /bin"), text=True, check=True)
    assert "its entry in cron is disabled" in _faults(nightly)[0]
    subprocess.run(["crontab", "-"], input="", text=True, check=True)
    assert "its entry is no longer in cron; install it again" in _faults(nightly)[0]
    subprocess.run(["crontab", "-"], input=table, text=True, check=True)
    file = nightly.state.folder / "installed.json"
    file.write_text(file.read_text().replace('"installed": "20', '"installed": "19'))
    assert "a tick was due at 19" in _faults(nightly)[0]
    nightly.state.ticked("nothing to do")
    assert _faults(nightly) == []
    with Lease.take(nightly.state.lease, nightly.recipe.lease, "tick"):
        assert any("is at work" in f.text for f in examine("nightly", nightly.recipe))
    (tmp_path / "texts").rename(tmp_path / "gone")
    assert any(str(tmp_path / "texts") in fault for fault in _faults(nightly))


@needs_cron
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(os.getuid() != 0, reason="only root may start a cron daemon")
@pytest.mark.usefixtures("crontab")
def test_cron_fires_and_what_arrived_is_tokenized(tmp_path: Path) -> None:
    nightly = Nightly(tmp_path, pretrain=None, evaluate=None, export=None)
    daemon = None
    if keeper("cron").asleep():
        daemon = subprocess.Popen(["cron", "-f"])
    # cron reads its tables again if the second of their last change is another one than when it read them: what comes in
    # the second of the fixture's change, with the daemon's start in between, is not seen.
    time.sleep(1.1)
    try:
        install("nightly", nightly.file, [], nightly.state, "cron", "* * * * *")
        assert Installed.of(nightly.state)
        until = time.monotonic() + 300
        while nightly.state.record(1) is None and time.monotonic() < until:
            time.sleep(0.5)
        remove("nightly", nightly.state)
    finally:
        if daemon:
            daemon.terminate()
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
    record = nightly.state.record(1)
    assert record, (nightly.state.folder / "tick.log").read_text()
    assert (record.outcome, record.documents) == ("done", 10)
    assert not any("cron" in fault for fault in _faults(nightly))
