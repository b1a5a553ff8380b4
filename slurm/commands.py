"""SLURM's own commands, run and read.

Enters: a command. Leaves: what it prints. Always holds: a cluster that does not answer is an error that says so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

TIMEOUT_S = 60.0


class SlurmError(RuntimeError):
    """SLURM is not here, or refuses; the message says what and what to do."""


def require(name: str) -> None:
    """
    Raises:
        SlurmError: the command is not on the path.
    """
    if shutil.which(name) is None:
        raise SlurmError(
            f"{name} is not on the path: submit from a login node of the cluster, or load SLURM's module there"
        )


def run(*command: str) -> str:
    """What a command prints.

    Raises:
        SlurmError: it is not here, fails or does not answer.
    """
    require(command[0])
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{command[0]} has not answered in {TIMEOUT_S:g} s; ask whether the cluster is up") from error
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        raise SlurmError(f"`{' '.join(command)}`: {said}")
    return done.stdout


def fields(line: str) -> dict[str, str]:
    """The `Key=value` pairs of a line of `scontrol --oneliner`."""
    found: dict[str, str] = {}
    key = ""
    for word in line.split(" "):
        name, equals, value = word.partition("=")
        if equals and name.replace(":", "").replace("_", "").replace("/", "").isalnum():
            key = name
            found[key] = value
        elif key:
            # A value with spaces, such as a reason.
            found[key] += f" {word}"
    return {key: value.strip() for key, value in found.items()}


@contextmanager
def outside_of_any_job() -> Iterator[None]:
    """Submit as from a login node, also from within a job, whose variables would become options of the new one.

    submitit has `helpers.clean_env` for this, which takes SLURM_CONF away too, and with it a cluster that is found by it.
    """
    own = {
        k: v
        for k, v in os.environ.items()
        if k.startswith(("SLURM_", "SLURMD_", "SBATCH_", "SRUN_")) and k != "SLURM_CONF"
    }
    if "SLURM_JOB_ID" not in own:
        yield
        return
    for key in own:
        del os.environ[key]
    try:
        yield
    finally:
        os.environ.update(own)
