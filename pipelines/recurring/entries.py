"""Who calls `tick`: entries in a user's crontab, in SLURM's (`scrontab`) or as a timer of systemd.

Enters: a pipeline and a schedule. Leaves: one entry, which runs `STATE/tick.sh`. Always holds: nothing else in the table
is touched; an entry is known by its mark, so installing again replaces it. The script keeps what the entry could not say:
the folder, the path and the Python of the shell that installed it, whatever the scheduler's own environment is.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from pipelines.recurring.executor import ROOT
from pipelines.recurring.lease import whoami
from pipelines.recurring.schedule import Schedule
from pipelines.recurring.state import State, now
from pipelines.shards.storage import Storage

_MARK = "# braid pipeline "

_KEPT = ("PATH", "LD_LIBRARY_PATH", "SLURM_CONF", "VIRTUAL_ENV", "AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_REGION")
"""Variables of the installing shell that ticks get. No secrets: they do not belong into a file."""


class InstallError(RuntimeError):
    """An entry cannot be made, read or removed; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Installed:
    """What `STATE/installed.json` says: how the pipeline was installed last."""

    name: str
    via: str
    at: str
    """Five fields of a crontab."""
    recipe: str
    folder: str
    python: str
    host: str
    user: str
    options: list[str]
    """Of SLURM, for scrontab."""
    installed: str

    @classmethod
    def of(cls, state: State) -> Installed | None:
        """None if it never was, or was removed."""
        file = state.folder / "installed.json"
        return cls(**json.loads(file.read_bytes())) if file.exists() else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """An entry as the scheduler has it."""

    name: str
    via: str
    at: str
    script: str
    enabled: bool


class Keeper(Protocol):
    """Something that keeps the time."""

    via: str

    def unavailable(self) -> str:
        """Why it cannot be used here, with the remedy; "" if it can."""

    def entries(self) -> list[Entry]:
        """The entries of this user's pipelines."""

    def put(self, name: str, schedule: Schedule, script: Path, options: Sequence[str]) -> None:
        """Make an entry, in place of the one that the pipeline has."""

    def drop(self, name: str) -> bool:
        """Remove the entry of a pipeline; whether there was one."""

    def asleep(self) -> str:
        """Why entries would not be called, with the remedy; "" if they are."""


class Table:
    """A crontab: `crontab` of cron, or `scrontab` of SLURM, whose options stand in lines before the entry."""

    def __init__(self, via: str) -> None:
        self.via = via
        self._command = {"cron": "crontab", "scrontab": "scrontab"}[via]

    def unavailable(self) -> str:
        if shutil.which(self._command):
            return ""
        remedy = "install the package cron" if self.via == "cron" else "log in where SLURM's commands are"
        return f"there is no {self._command} here; {remedy}, or use another --via"

    def entries(self) -> list[Entry]:
        found = []
        for line in self._read():
            # A job of scrontab that was cancelled is written back so.
            enabled = not line.startswith("#")
            text = line.removeprefix("#DISABLED:").lstrip("# ").strip()
            if self._name(line) and len(fields := text.split(None, 5)) == 6:
                words = shlex.split(fields[5].replace(r"\%", "%"), comments=True)
                at = " ".join(fields[:5])
                found.append(Entry(name=self._name(line), via=self.via, at=at, script=words[-1], enabled=enabled))
        return found

    def put(self, name: str, schedule: Schedule, script: Path, options: Sequence[str]) -> None:
        lines = self._without(name)
        # cron takes an unescaped % for a line break.
        command = f"/bin/sh {shlex.quote(str(script))}".replace("%", r"\%")
        if self.via == "scrontab":
            log = shlex.quote(str(script.with_name("scrontab.log")))
            lines.append(
                " ".join(["#SCRON", f"--job-name=braid-{name}", f"--output={log}", "--open-mode=append", *options])
            )
        lines.append(f"{schedule.cron} {command} {_MARK}{name}")
        self._write(lines)

    def drop(self, name: str) -> bool:
        before = self._read()
        lines = self._without(name)
        if len(lines) == len(before):
            return False
        self._write(lines)
        return True

    def asleep(self) -> str:
        if self.via == "scrontab":
            done = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, check=False)
            return (
                "" if done.returncode == 0 else f"SLURM does not answer: {done.stdout.strip() or done.stderr.strip()}"
            )
        for process in Path("/proc").glob("[0-9]*/comm"):
            try:
                if process.read_text().strip() in ("cron", "crond"):
                    return ""
            except OSError:
                continue
        return "no cron daemon runs on this machine; start it: `service cron start`, or `systemctl start cron`"

    def _without(self, name: str) -> list[str]:
        """All lines but those of a pipeline's entry."""
        kept: list[str] = []
        for line in self._read():
            if self._name(line) == name:
                while kept and kept[-1].startswith(("#SCRON", "#DISABLED:#SCRON", "#DISABLED: #SCRON")):
                    kept.pop()
            else:
                kept.append(line)
        return kept

    @staticmethod
    def _name(line: str) -> str:
        """The pipeline whose entry a line is, or ""."""
        before, mark, name = line.rpartition(_MARK)
        return name.strip() if mark and before.strip() else ""

    def _read(self) -> list[str]:
        done = subprocess.run([self._command, "-l"], capture_output=True, text=True, check=False)
        if done.returncode and "no crontab" not in done.stderr.lower():
            raise InstallError(f"`{self._command} -l` failed: {done.stderr.strip()}")
        return done.stdout.splitlines() if not done.returncode else []

    def _write(self, lines: Sequence[str]) -> None:
        with tempfile.NamedTemporaryFile("w", suffix=".crontab") as file:
            file.write("".join(line + "\n" for line in lines))
            file.flush()
            done = subprocess.run([self._command, file.name], capture_output=True, text=True, check=False)
        if done.returncode:
            raise InstallError(f"`{self._command} FILE` failed: {done.stderr.strip() or done.stdout.strip()}")


def keeper(via: str) -> Keeper:
    """Who keeps the time.

    Raises:
        InstallError: nobody of that name, or not here.
    """
    from pipelines.recurring.systemd import Timers

    if via not in KEEPERS:
        raise InstallError(f"--via {via}: unknown; known are {', '.join(KEEPERS)}")
    found: Keeper = Timers() if via == "systemd" else Table(via)
    if why := found.unavailable():
        raise InstallError(f"--via {via}: {why}")
    return found


KEEPERS = ("cron", "scrontab", "systemd")


def all_entries() -> list[Entry]:
    """The entries of this user's pipelines, of every scheduler that is here."""
    found: list[Entry] = []
    for via in KEEPERS:
        try:
            found += keeper(via).entries()
        except InstallError:
            continue
    return found


def installed_recipe(name: str) -> Path | None:
    """The recipe of a pipeline that is installed here for this user; None if there is none of that name."""
    for entry in all_entries():
        if entry.name == name and (installed := Installed.of(State(Path(entry.script).parent))):
            return Path(installed.recipe)
    return None


def install(
    name: str, recipe: Path, overrides: Sequence[str], state: State, via: str, at: str, options: Sequence[str] = ()
) -> Installed:
    """Let a scheduler call `tick`; one that was asked before lets go.

    Raises:
        ScheduleError: `at` is not understood.
        InstallError: the scheduler is not here, or refuses.
    """
    schedule, chosen = Schedule.parse(at), keeper(via)
    before = Installed.of(state)
    if other := next(
        (e for e in chosen.entries() if e.name == name and e.script != str(state.folder / "tick.sh")), None
    ):
        raise InstallError(
            f"a pipeline named {name} is installed already, with its state in {Path(other.script).parent}; rename one of the "
            f"recipes, or remove that one: `braid pipeline remove`"
        )
    script = write_script(state, recipe, overrides)
    chosen.put(name, schedule, script, options)
    if before and before.via != via:
        keeper(before.via).drop(before.name)
    installed = Installed(
        name=name,
        via=via,
        at=schedule.cron,
        recipe=str(recipe.absolute()),
        folder=str(Path.cwd()),
        python=sys.executable,
        host=socket.gethostname(),
        user=whoami(),
        options=list(options),
        installed=now(),
    )
    Storage.of(state.folder).write("installed.json", json.dumps(asdict(installed), indent=1).encode())
    return installed


def remove(name: str, state: State) -> list[str]:
    """Remove the entries of a pipeline; of which schedulers there were any."""
    gone = []
    for via in KEEPERS:
        try:
            if keeper(via).drop(name):
                gone.append(via)
        except InstallError:
            continue
    (state.folder / "installed.json").unlink(missing_ok=True)
    return gone


def write_script(state: State, recipe: Path, overrides: Sequence[str]) -> Path:
    """What an entry runs."""
    variables = {key: os.environ[key] for key in _KEPT if key in os.environ}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    call = [sys.executable, "-m", "pipelines.cli", "pipeline", "tick", str(recipe.absolute()), *overrides]
    log = shlex.quote(str(state.folder / "tick.log"))
    lines = [
        "#!/bin/sh",
        "# Written by `braid pipeline install`: one tick, in the folder and with the Python that it was installed with.",
        f"cd {shlex.quote(str(Path.cwd()))} || exit 1",
        *(f"export {key}={shlex.quote(value)}" for key, value in sorted(variables.items())),
        f"exec {shlex.join(call)} >> {log} 2>&1",
    ]
    Storage.of(state.folder).write("tick.sh", "".join(line + "\n" for line in lines).encode())
    return state.folder / "tick.sh"
