"""From the typed command to the queued job, on a real SLURM: `python -m benchmarks.submission`.

Both jobs are submitted to the test cluster (root, `bash tests/slurm/install.sh`), a command started anew each time as a user
starts it, and cancelled again. The other side is `sbatch` with the script that the command has written, which is the least
that a submission takes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from benchmarks.measuring import close, result
from pipelines.recipe import dump_recipe
from tests.pipelines.tiny import write_corpus, write_recipe
from tests.slurm.cluster import Cluster, unavailable
from tests.slurm.training import dataset, training_recipe


def timed(command: list[str]) -> tuple[float, str]:
    """Seconds, and what it printed."""
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    took = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
    return took, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeat", type=int, default=7)
    arguments = parser.parse_args()
    if reason := unavailable():
        raise SystemExit(reason)
    results = []
    with tempfile.TemporaryDirectory() as name, Cluster() as cluster:
        os.environ |= {key: cluster.environment[key] for key in ("SLURM_CONF", "PATH")}
        folder = Path(name)
        pretrain = folder / "pretrain.yaml"
        pretrain.write_text(dump_recipe(training_recipe(dataset(folder), folder / "run")))
        (folder / "corpus").mkdir()
        write_corpus(folder / "corpus")
        tokenize = write_recipe(folder / "corpus")
        # Nothing is to run: what is timed is the way there.
        settings = ["slurm.sbatch.hold=true", "slurm.time=10"]
        for job, recipe in (("pretrain", pretrain), ("tokenize", tokenize)):
            command = [sys.executable, "-m", "pipelines.cli", job, str(recipe), "--on", "slurm", *settings]
            ours, theirs = [], []
            for _ in range(arguments.repeat):
                took, said = timed(command)
                ours.append(took)
                job_id = said.split()[1]
                (script,) = folder.glob(f"**/{job_id}_submission.sh")
                took, said = timed(["sbatch", str(script)])
                theirs.append(took)
                timed(["scancel", job_id, said.split()[-1]])
            ids = cluster.run("squeue", "-h", "-o", "%i").split()
            results.append(
                result(
                    f"submission of a {job} job / sbatch alone",
                    statistics.median(ours),
                    statistics.median(theirs),
                    "s",
                    checked=f"all {arguments.repeat} were queued, on hold, and cancelled; {len(ids)} are left",
                )
            )
            print(yaml.safe_dump(results[-1], sort_keys=False))
    close(results)


if __name__ == "__main__":
    main()
