"""A private, real SLURM on this machine: munge, slurmdbd with MariaDB, slurmctld, and four nodes as hosts of their own.

    python -m tests.slurm.cluster        # `make slurm-lab`: start one and open a shell in it

Enters: nothing; root on Linux with the packages of `install.sh`. Leaves: `Cluster.environment`, under which sbatch, squeue
and the rest talk to it. Always holds: all state lies in one temporary folder, every node has a network namespace, a host
name and a process namespace, so that `crash` is what a power cut is to a host; several clusters may run at once; `stop`
leaves no process, namespace, bridge, name or file behind. If the process that started it is killed, its daemons end too,
and the next cluster removes the rest.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Self

from tests.slurm import configuration

NODES = 4
GPUS = 2
"""Of each node, in name: devices that are /dev/null."""

_HOSTS = Path("/etc/hosts")
_COMMANDS = ("munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd", "sbatch", "ip", "nsenter")
_SBIN = "/usr/sbin:/sbin"


class ClusterError(RuntimeError):
    """The cluster did not come up; the message ends with what the daemon said."""


def unavailable() -> str:
    """Why no cluster can run here; "" if one can."""
    if sys.platform != "linux":
        return "the test cluster needs Linux"
    if os.geteuid() != 0:
        return "the test cluster needs root, for network namespaces"
    path = f"{os.environ.get('PATH', '')}:{_SBIN}"
    if missing := [name for name in _COMMANDS if shutil.which(name, path=path) is None]:
        return f"the test cluster needs {', '.join(missing)}: bash tests/slurm/install.sh"
    if not Path("/sys/fs/cgroup/freezer").is_dir():
        return "the test cluster needs the freezer of cgroup v1 at /sys/fs/cgroup/freezer"
    return ""


class Cluster:
    """Four nodes of 4 CPUs, 5,000 MB and 2 GPUs, partitions `main` and `high`; a context manager."""

    def __init__(self) -> None:
        self.number, self._lock = _take_number()
        for left in Path(tempfile.gettempdir()).glob(f"braid-slurm-{self.number}-*"):
            # Of a cluster of this number whose process was killed.
            shutil.rmtree(left, ignore_errors=True)
        self.folder = Path(tempfile.mkdtemp(prefix=f"braid-slurm-{self.number}-"))
        self.folder.chmod(0o755)
        self.nodes = [f"n{self.number}{i}" for i in range(1, NODES + 1)]
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:{_SBIN}",
        }
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self.stop()

    def start(self) -> None:
        """Start everything, and wait until all nodes are idle.

        Raises:
            ClusterError: a part of it did not come up.
        """
        self._clear_network()
        self._make_network()
        ports = _free_ports(3)
        configuration.write(self.folder, number=self.number, nodes=self.nodes, gpus=GPUS, ports=ports)
        (self.folder / "munge.key").write_bytes(secrets.token_bytes(1024))
        (self.folder / "munge.key").chmod(0o600)
        self._spawn("munged", *configuration.munged(self.folder))
        self._spawn("mariadbd", *configuration.mariadbd(self.folder, ports[0]))
        self._await("munged", lambda: (self.folder / "munge.socket").exists())
        self._await("mariadbd", lambda: _listens(ports[0]))
        self._spawn("slurmdbd", "slurmdbd", "-D")
        self._await("slurmdbd", lambda: _listens(ports[1]))
        self.run("sacctmgr", "-i", "add", "cluster", f"braid{self.number}", check=False)
        self._await("slurmdbd", lambda: bool(self.run("sacctmgr", "-n", "show", "cluster", check=False)))
        for account in ("physics", "biology"):
            self.run("sacctmgr", "-i", "add", "account", account, "Description=x", "Organization=x")
        self.run(
            "sacctmgr", "-i", "add", "user", "root", "DefaultAccount=physics", "Account=physics,biology", check=False
        )
        self._spawn("slurmctld", "slurmctld", "-D")
        self._await("slurmctld", lambda: "UP" in self.run("scontrol", "ping", check=False))
        for node in self.nodes:
            self._boot(node)
        self.await_idle()

    def stop(self) -> None:
        """End everything and remove all traces."""
        for name in reversed(self._daemons):
            self._end(name)
        self._daemons.clear()
        self._clear_network()
        for name in self.nodes:
            for path in sorted(Path("/sys/fs/cgroup").glob(f"*/slurm_{name}"), reverse=True):
                for group in sorted((p for p in path.rglob("*") if p.is_dir()), reverse=True):
                    _remove_group(group)
                _remove_group(path)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def run(self, *command: str, check: bool = True, timeout_s: float = 60, **environment: str) -> str:
        """What a command of a user of this cluster prints; `check` makes its failure an error."""
        done = subprocess.run(
            command,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )
        if check and done.returncode:
            raise ClusterError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
        return done.stdout

    def crash(self, node: str) -> None:
        """Take a node's power: all of its processes are gone at once, and nothing is told to anybody."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()

    def revive(self, node: str) -> None:
        """Boot a crashed node again."""
        self._boot(node)

    def hide(self, node: str, folder: Path) -> None:
        """Let a node see an empty folder in place of one that all share."""
        self._inside(node, "mount", "-t", "tmpfs", "none", str(folder))

    def reveal(self, node: str, folder: Path) -> None:
        """Undo `hide`."""
        self._inside(node, "umount", str(folder))

    def _inside(self, node: str, *command: str) -> None:
        """Run a command in a node's namespaces: those of the child of its `unshare`."""
        child = Path(f"/proc/{self._daemons[node].pid}/task/{self._daemons[node].pid}/children").read_text().split()[0]
        self.run("nsenter", f"--target={child}", "--mount", *command)

    def await_idle(self, timeout_s: float = 120) -> None:
        """Wait until every node is idle."""
        self._await("slurmctld", lambda: set(self.run("sinfo", "-h", "-N", "-o", "%T").split()) == {"idle"}, timeout_s)

    def _boot(self, node: str) -> None:
        hidden = f"hostname {node}; slurmd -D -N {node} & wait $!"
        command = (
            "unshare",
            "--uts",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "bash",
            "-c",
            hidden,
        )
        self._spawn(node, "nsenter", f"--net=/run/netns/{node}", *command)

    def _spawn(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                # Whoever started the cluster may be killed; its daemons follow.
                ("setpriv", "--pdeathsig", "KILL", *command),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self.folder,
            )

    def _end(self, name: str) -> None:
        daemon = self._daemons[name]
        if name in self.nodes:
            # Its process namespace ends with it.
            daemon.kill()
            daemon.wait()
            return
        daemon.terminate()
        try:
            daemon.wait(5)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def _await(self, name: str, ready: Callable[[], bool], timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while not ready():
            daemon = self._daemons.get(name)
            ended = daemon is None or daemon.poll() is not None
            if ended or time.monotonic() > deadline:
                said = (self.folder / f"{name}.out").read_text(errors="replace")[-3000:]
                raise ClusterError(f"{name} {'ended' if ended else 'is not ready'}: {said}")
            time.sleep(0.05)

    def _make_network(self) -> None:
        bridge, net = f"braid{self.number}", f"10.77.{self.number}"
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", f"{net}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for index, node in enumerate(self.nodes, start=11):
            _ip("netns", "add", node)
            _ip("link", "add", f"v{node}", "type", "veth", "peer", "name", "eth0", "netns", node)
            _ip("link", "set", f"v{node}", "master", bridge, "up")
            _ip("-n", node, "addr", "add", f"{net}.{index}/24", "dev", "eth0")
            _ip("-n", node, "link", "set", "eth0", "up")
            _ip("-n", node, "link", "set", "lo", "up")
        with _hosts() as lines:
            if lines and not lines[-1].endswith("\n"):
                lines[-1] += "\n"
            lines += [f"{net}.{index} {node} {self._mark}\n" for index, node in enumerate(self.nodes, start=11)]

    def _clear_network(self) -> None:
        """Also of a cluster of this number that was killed."""
        for node in self.nodes:
            _ip("netns", "del", node, check=False)
            _ip("link", "del", f"v{node}", check=False)
        _ip("link", "del", f"braid{self.number}", check=False)
        with _hosts() as lines:
            lines[:] = [line for line in lines if self._mark not in line]

    @property
    def _mark(self) -> str:
        return f"# braid test cluster {self.number}"


def _take_number() -> tuple[int, IO[bytes]]:
    """The number of a cluster that nobody else runs here, held by a lock until the file is closed."""
    for number in range(1, 10):
        file = Path(f"/run/lock/braid-slurm-{number}").open("ab")  # noqa: SIM115 - it outlives this function
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            continue
        return number, file
    raise ClusterError("nine test clusters run here already")


@contextmanager
def _hosts() -> Iterator[list[str]]:
    """The lines of the hosts file, to be changed in place."""
    with Path("/run/lock/braid-slurm-hosts").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = _HOSTS.read_text()
        lines = before.splitlines(keepends=True)
        yield lines
        if "".join(lines) != before:
            # In place, for in a container the file is a mount.
            _HOSTS.write_text("".join(lines))


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those that the kernel gives to outgoing connections."""
    found: list[int] = []
    port = 20000 + secrets.randbelow(10000)
    while len(found) < count:
        port += 1
        with socket.socket() as probe:
            try:
                probe.bind(("0.0.0.0", port))
            except OSError:
                continue
        found.append(port)
    return found


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _ip(*arguments: str, check: bool = True) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise ClusterError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _remove_group(path: Path) -> None:
    for _ in range(50):
        try:
            path.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            # The kernel is still taking its processes away.
            time.sleep(0.02)
        else:
            return


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    if reason := unavailable():
        sys.exit(reason)
    with Cluster() as cluster:
        print(f"SLURM_CONF={cluster.folder / 'slurm.conf'}; nodes {', '.join(cluster.nodes)}; exit ends the cluster.")
        # The shell gets the signals of the terminal; this process stays to clear up.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        subprocess.run([os.environ.get("SHELL", "/bin/bash")], env=cluster.environment, check=False)


if __name__ == "__main__":
    main()
