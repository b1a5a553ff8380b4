"""Nodes of several kinds in one job: SLURM's heterogeneous jobs, for which submitit has no way.

Enters: the script that submitit writes for the first group of nodes. Leaves: the script of the whole job. Always holds: one
step runs on all nodes, in which ranks, the number of tasks and the list of nodes count over all groups; log files bear the
id of the job, which is that of its first group.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from slurm.settings import ClusterRecipe, NodeGroup


def with_groups(text: str, cluster: ClusterRecipe, folder: Path) -> str:
    """The script with the further groups of a recipe.

    Args:
        text: a script with options of sbatch and one line that begins with `srun`.
        folder: of the job, where log files lie.
    """
    lines = text.split("\n")
    last = max(index for index, line in enumerate(lines) if line.startswith("#SBATCH "))
    (step,) = (index for index, line in enumerate(lines) if line.startswith("srun "))
    lines[step] = _step(lines[step].removeprefix("srun "), cluster, folder)
    more = [line for group in cluster.groups for line in ("#SBATCH hetjob", *_options(group, cluster))]
    return "\n".join([*lines[: last + 1], *more, *lines[last + 1 :]])


def _options(group: NodeGroup, cluster: ClusterRecipe) -> list[str]:
    """Of one group; SLURM hands on none but a few from the first."""
    values = {
        "partition": group.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "nodes": group.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": group.gpus_per_node or None,
        "cpus-per-task": group.cpus,
        "mem": group.memory,
        "time": cluster.whole_minutes,
        "no-kill": True,
        "requeue": True,
        **group.options,
    }
    return [
        f"#SBATCH --{name}" + ("" if value is True else f"={shlex.quote(str(value))}")
        for name, value in values.items()
        if value is not None
    ]


def _step(command: str, cluster: ClusterRecipe, folder: Path) -> str:
    # srun would put the id of a group's own job into the names of its log files.
    quoted = shlex.quote(str(folder)) != str(folder)
    command = command.replace("%j_", "'\"$SLURM_JOB_ID\"'_" if quoted else "${SLURM_JOB_ID}_", 1)
    parts = []
    for number, group in enumerate(cluster.all_groups):
        own = re.sub(r"--cpus-per-task=\d+", f"--cpus-per-task={group.cpus}", command, count=1)
        parts.append(f"--het-group={number} {own}")
    return "srun " + " : ".join(parts)
