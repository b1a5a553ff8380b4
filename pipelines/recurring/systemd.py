"""Timers of systemd: of the user's own manager, or of the machine's for root.

Enters: a pipeline and a schedule. Leaves: `braid-NAME.service` and `braid-NAME.timer`, enabled. Always holds: a time that
the machine slept through is made up for (`Persistent`), and two ticks of one timer never run at once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from pipelines.recurring.entries import Entry, InstallError
from pipelines.recurring.lease import whoami
from pipelines.recurring.schedule import Schedule


class Timers:
    """The timers of this user."""

    via = "systemd"

    def __init__(self) -> None:
        self._root = os.getuid() == 0
        home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
        self._folder = Path("/etc/systemd/system") if self._root else home / "systemd/user"

    def unavailable(self) -> str:
        if not shutil.which("systemctl"):
            return "there is no systemctl here; use --via cron"
        done = self._call("show", "--property=Version", check=False)
        return "" if done.returncode == 0 else f"systemd does not answer ({done.stderr.strip()}); use --via cron"

    def entries(self) -> list[Entry]:
        found = []
        for file in sorted(self._folder.glob("braid-*.timer")):
            texts = file.read_text(), file.with_suffix(".service").read_text()
            at, run = (_value(text, key) for text, key in zip(texts, ("# at", "ExecStart"), strict=True))
            enabled = self._call("is-enabled", file.name, check=False).returncode == 0
            name = file.stem.removeprefix("braid-")
            found.append(Entry(name=name, via=self.via, at=at, script=_unquoted(run), enabled=enabled))
        return found

    def put(self, name: str, schedule: Schedule, script: Path, options: Sequence[str]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for suffix, text in units(name, schedule, script).items():
            (self._folder / f"braid-{name}.{suffix}").write_text(text)
        self._call("daemon-reload")
        self._call("enable", "--now", f"braid-{name}.timer")

    def drop(self, name: str) -> bool:
        timer = self._folder / f"braid-{name}.timer"
        if not timer.exists():
            return False
        self._call("disable", "--now", timer.name, check=False)
        timer.unlink()
        timer.with_suffix(".service").unlink(missing_ok=True)
        self._call("daemon-reload")
        return True

    def asleep(self) -> str:
        if self._root:
            return ""
        user = whoami()
        if (Path("/var/lib/systemd/linger") / user).exists():
            return ""
        return f"timers of {user} stop at logout; let them run on: `loginctl enable-linger {user}`"

    def _call(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = ["systemctl", *([] if self._root else ["--user"]), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if check and done.returncode:
            raise InstallError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
        return done


def units(name: str, schedule: Schedule, script: Path) -> dict[str, str]:
    """The texts of service and timer."""
    quoted = str(script).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    calendar = "".join(f"OnCalendar={line}\n" for line in schedule.on_calendar)
    return {
        "service": f'[Unit]\nDescription=Braid pipeline {name}\n\n[Service]\nType=oneshot\nExecStart=/bin/sh "{quoted}"\n',
        "timer": (
            f"# at={schedule.cron}\n[Unit]\nDescription=When Braid pipeline {name} ticks\n\n[Timer]\n{calendar}"
            "Persistent=true\n\n[Install]\nWantedBy=timers.target\n"
        ),
    }


def _value(text: str, key: str) -> str:
    return next((line.partition("=")[2] for line in text.splitlines() if line.startswith(f"{key}=")), "")


def _unquoted(run: str) -> str:
    text = run.partition('"')[2].removesuffix('"')
    return text.replace("$$", "$").replace("%%", "%").replace('\\"', '"').replace("\\\\", "\\")
