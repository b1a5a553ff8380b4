"""The lines of a job's script around its tasks.

Enters: a cluster recipe and the job's folder. Leaves: shell. Always holds: whether a job is queued again is decided here,
on the node where its script runs, after all tasks have ended: because it asked for it (`requeue-*.json`), or because tasks
were lost without a fault of their own, so often as the recipe allows; a cancelled job never is.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from slurm.settings import ClusterRecipe


def before_the_tasks(cluster: ClusterRecipe, folder: Path, variable: str) -> list[str]:
    """Make Python ready, and say in one sentence if it is not there."""
    quoted = shlex.quote(str(folder))
    lines = [
        "umask 077",
        f"export {variable}={quoted}",
        *(f"export {name}={shlex.quote(value)}" for name, value in cluster.environment.items()),
        *cluster.setup,
        f"export PYTHONPATH={quoted}/code.zip${{PYTHONPATH:+:$PYTHONPATH}}",
        'braid_attempt="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"',
        'braid_attempt="${braid_attempt:-$SLURM_JOB_ID}-${SLURM_RESTART_COUNT:-0}"',
        "braid_fault() {",
        '  echo "braid: $1" >&2',
        """  printf '{"error": "%s", "message": "%s", "node": "%s"}\\n' "$2" "$1" "$(hostname)" """
        f'>{quoted}/"fault-$braid_attempt-script.json"',
        "  exit 1",
        "}",
    ]
    if cluster.interpreter is not None:
        python = shlex.quote(str(cluster.interpreter))
        lines.append(
            f'[ -x {python} ] || braid_fault "node $(hostname) has no {cluster.interpreter}; set venv in the cluster recipe '
            'to an environment on a folder that all nodes see" MissingPython'
        )
    return lines


_REQUEUE = """\
# What the tasks have left decides whether the job is queued again.
braid_status=$?
braid_id="${braid_attempt%-*}"
braid_requeue() {
  # Of a job with nodes of several kinds the first line is the one that counts.
  said="$(scontrol show job -o "$SLURM_JOB_ID" | head -n 1)"
  case "$said" in *JobState=CANCELLED*) exit "$braid_status" ;; esac
  # For whoever asks later why it stopped: the controller forgets it.
  echo "$said BraidAsked=$(date +%s) BraidSignal=@SIGNAL@" >"controller-$braid_attempt.txt"
  # SLURM ends this script when it has taken the job back.
  scontrol requeue "$braid_id" && sleep 120
}
if [ -e "requeue-$braid_attempt.json" ]; then
  echo "braid: queued again: saved, and asked for it" >&2
  braid_requeue
elif [ -e "exit-$braid_attempt" ]; then
  exit "$(cat "exit-$braid_attempt")"
elif [ "$braid_status" -ne 0 ] && ! compgen -G "fault-$braid_attempt-*.json" >/dev/null; then
  echo "braid: tasks were lost, and none says why" >&2
  # If a node is dead, SLURM will notice, and queue the job again elsewhere: until then it would be sent there again.
  if ! timeout 30 srun --overlap --immediate=20 --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \\
      --ntasks-per-node=1 --output=/dev/null --error=/dev/null true; then
    echo "braid: a node does not answer; waiting for SLURM to notice" >&2
    sleep @TIMEOUT@
  fi
  echo "$braid_attempt" >>"losses-$braid_id"
  if [ "$(wc -l <"losses-$braid_id")" -le @MOST@ ]; then braid_requeue; fi
fi
exit "$braid_status"
"""

_AWK = '$1 == "SlurmdTimeout" { print $3 + 30; found = 1 } END { if (!found) print 330 }'
_NODE_TIMEOUT = f"\"$(scontrol show config | awk '{_AWK}')\""


def after_the_tasks(cluster: ClusterRecipe, folder: Path) -> list[str]:
    """Decide how the job goes on."""
    text = _REQUEUE.replace("@TIMEOUT@", _NODE_TIMEOUT).replace("@MOST@", str(cluster.lost_rank_restarts))
    text = text.replace("@SIGNAL@", str(cluster.signal_before_s))
    # First of all, for everything that comes between changes it.
    first, status, *others = text.splitlines()
    return [status, first, f"cd {shlex.quote(str(folder))} || exit $braid_status", *others]
