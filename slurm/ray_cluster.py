"""A Ray cluster inside one allocation: a head on the first node, workers on all of them, and the job beside the head.

Enters: one task on each node, started by srun. Leaves: the callable's effects, and `exit-ATTEMPT` with its exit code. Always
holds: all nodes are given back as soon as the callable ends; a node that is lost takes only its own work with it; whoever
has not read the token in the job's folder (0600) cannot join; ports follow from the job or are free ones that the kernel
chose, and temporary files lie on the node's own disk, so that several jobs may share a node.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slurm import commands, rendezvous
from slurm.context import JobContext

if TYPE_CHECKING:
    from slurm.entry import Entry

START_S = 120.0
"""Nodes that have not joined by then are done without; they may join later."""

DEAD_NODE_S = 900.0
"""SLURM's controller notices a dead node after SlurmdTimeout, 300 s by default."""

_POLL_S = 0.3


class RayClusterError(RuntimeError):
    """The Ray cluster did not start; the message says on which node and where its logs are."""


class _ToldToStopError(BaseException):
    """USR2 or TERM came; no `except Exception` on the way keeps it."""


def run(entry: Entry, task: JobContext) -> None:
    """Be this node's part of the cluster; the first one runs the callable."""
    ended = task.folder / f"exit-{task.attempt}"
    token = task.folder / f"ray-token-{task.attempt}"
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    if task.rank == 0:
        _lead(entry, task, token, ended)
    else:
        _follow(task, token, ended)


def _lead(entry: Entry, task: JobContext, token: Path, ended: Path) -> None:
    _write_token(token)
    port = rendezvous.port()
    local = tempfile.gettempdir()
    # Ray's sockets lie there, and the name of a socket has at most 107 bytes.
    temporary = Path(tempfile.mkdtemp(prefix="braid-ray-", dir=local if len(local) <= 20 else "/tmp"))
    code = 1
    head = _start(task, "--head", f"--port={port}", f"--temp-dir={temporary}", "--include-dashboard=false")
    try:
        address = f"{_own_address()}:{port}"
        os.environ["RAY_ADDRESS"] = address
        with _stoppable(task):
            _await_nodes(head, address, task)
            entry.run()
        code = 0
    except _ToldToStopError as told:
        task.requeue(f"{told}: what was finished is committed")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
        raise
    finally:
        # The others end when they see it.
        partial = ended.with_name(f".{ended.name}")
        partial.write_text(str(code))
        partial.replace(ended)
        _end(head)
        token.unlink(missing_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)


def _follow(task: JobContext, token: Path, ended: Path) -> None:
    deadline = time.monotonic() + START_S
    first = rendezvous.hosts(os.environ["SLURM_JOB_NODELIST"])[0]
    address = f"{first}:{rendezvous.port()}"
    while not (token.exists() and _listens(first, rendezvous.port())):
        if ended.exists():
            return
        if time.monotonic() > deadline:
            raise RayClusterError(f"node {socket.gethostname()}: the head on {first} does not answer; see its log")
        time.sleep(_POLL_S)
    worker = _start(task, f"--address={socket.gethostbyname(first)}:{address.rpartition(':')[2]}")
    try:
        while not ended.exists() and worker.poll() is None:
            time.sleep(_POLL_S)
    finally:
        _end(worker)
    if not ended.exists():
        _without_head(task, first, ended)


def _without_head(task: JobContext, first: str, ended: Path) -> None:
    """The first node is dead, and the job's script with it: a job that may lose nodes lives on without, and does nothing.

    So a node that is left has it queued again, when SLURM has seen which node it must not use.

    Raises:
        RayClusterError: it cannot; or Ray ended here alone.
    """
    deadline = time.monotonic() + DEAD_NODE_S
    while time.monotonic() < deadline and not ended.exists():
        try:
            # A line for each group of nodes.
            lists = commands.run("squeue", "-h", "-j", os.environ["SLURM_JOB_ID"], "-o", "%N").split()
            nodes = rendezvous.hosts(",".join(lists))
            if first not in nodes:
                print(f"braid: the node of the head, {first}, is lost: the job is queued again", flush=True)
                commands.run("scontrol", "requeue", task.id)
                return
        except commands.SlurmError as error:
            print(f"braid: {error}", file=sys.stderr, flush=True)
        time.sleep(5)
    if not ended.exists():
        # Of a worker that died alone; the head goes on without it.
        raise RayClusterError(
            f"node {socket.gethostname()}: Ray ended; see {task.folder}/ray-{task.attempt}-{task.rank}.log"
        )


def _start(task: JobContext, *options: str) -> subprocess.Popen[bytes]:
    """Start Ray's processes of this node."""
    # Where nodes are of several kinds, the first of these variables is that of the last kind on all of them.
    alike = "SLURM_HET_SIZE" not in os.environ
    cpus = (alike and os.environ.get("SLURM_CPUS_PER_TASK")) or os.environ.get("SLURM_CPUS_ON_NODE") or "1"
    visible = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    command = (
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"),
        f"--node-ip-address={_own_address()}",
        f"--num-cpus={cpus}",
        f"--num-gpus={len(visible)}",
        # 0 lets the kernel choose: the defaults are fixed ports, which a second job on this node would want too.
        "--min-worker-port=0",
        "--max-worker-port=0",
        "--dashboard-agent-listen-port=0",
        "--metrics-export-port=0",
        *options,
    )
    log = (task.folder / f"ray-{task.attempt}-{task.rank}.log").open("ab")
    with log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def _await_nodes(head: subprocess.Popen[bytes], address: str, task: JobContext) -> None:
    """Wait until all nodes have joined, or long enough."""
    import ray

    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + START_S
    while not _listens(host, int(port)):
        if head.poll() is not None or time.monotonic() > deadline:
            raise RayClusterError(
                f"node {socket.gethostname()}: Ray's head did not start; see {task.folder}/ray-{task.attempt}-0.log"
            )
        time.sleep(_POLL_S)
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False, "configure_logging": False}
    ray.init(address=address, **quiet)
    try:
        while (there := sum(node["Alive"] for node in ray.nodes())) < task.world_size and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        print(f"braid: Ray runs on {there} of {task.world_size} nodes", flush=True)
    finally:
        ray.shutdown()


@contextmanager
def _stoppable(task: JobContext) -> Iterator[None]:
    """Let USR2 and TERM end the callable from within, so that it commits what is finished."""

    def told(number: int, frame: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise _ToldToStopError(signal.Signals(number).name)

    numbers = (signal.SIGUSR2, signal.SIGTERM)
    for number in numbers:
        signal.signal(number, told)
    if early := task.signals & set(numbers):
        told(min(early), None)
    yield
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ray's processes of this node; never `ray stop`, which ends every Ray that it can see.

    On TERM it would drain for half a minute, for which there is nothing left: what is of worth is committed.
    """
    for number, patience_s in ((signal.SIGTERM, 1.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue


def _write_token(file: Path) -> None:
    # Never readable by others, not even for a moment.
    partial = file.with_name(f".{file.name}")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
        opened.write(secrets.token_hex(32))
    partial.replace(file)


def _own_address() -> str:
    return socket.gethostbyname(socket.gethostname())


def _listens(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(2.0)
        return probe.connect_ex((host, port)) == 0
