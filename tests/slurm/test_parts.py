"""The parts of a submission that need no cluster."""

from __future__ import annotations

import os
import subprocess
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.launch import read_cluster, sweep, swept
from pipelines.recipe import RecipeError
from slurm import code
from slurm.checks import SubmissionError
from slurm.commands import fields, outside_of_any_job
from slurm.entry import resolve
from slurm.logs import read
from slurm.rendezvous import hosts, join, port
from slurm.script import after_the_tasks, before_the_tasks
from slurm.settings import ClusterRecipe, minutes
from slurm.submission import Task, new_folder, script


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n1", ["n1"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[08-10,12],login", ["n08", "n09", "n10", "n12", "login"]),
        ("rack[1-2]node[1-2]-ib", ["rack1node1-ib", "rack1node2-ib", "rack2node1-ib", "rack2node2-ib"]),
    ],
)
def test_lists_of_nodes_are_expanded_as_slurm_does(text: str, expected: list[str]) -> None:
    assert hosts(text) == expected


def test_tasks_find_each_other_by_slurms_variables_alone() -> None:
    environment = {
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "n[12-13]",
        "SLURM_PROCID": "3",
        "SLURM_NTASKS": "4",
        "SLURM_LOCALID": "1",
    }
    join(environment)
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["LOCAL_RANK"]) == ("3", "4", "1")
    assert environment["MASTER_ADDR"] == "n12"
    again = {**environment, "SLURM_RESTART_COUNT": "1"}
    other = {**environment, "SLURM_JOB_ID": "78"}
    assert len({port(environment), port(again), port(other), port(environment, 1)}) == 4


@given(st.integers(1, 2**31), st.integers(0, 200), st.integers(0, 9))
def test_ports_stay_below_those_of_outgoing_connections(job: int, restarts: int, offset: int) -> None:
    environment = {"SLURM_JOB_ID": str(job), "SLURM_RESTART_COUNT": str(restarts)}
    assert 12000 <= port(environment, offset) < 32768


@pytest.mark.parametrize(
    ("time", "expected"),
    [(90, 90), ("90", 90), ("1:30", 1.5), ("2:00:00", 120), ("1-00:00:00", 1440), ("1-12", 2160), ("0:00:30", 0.5)],
)
def test_times_are_read_as_sbatch_reads_them(time: int | str, expected: float) -> None:
    assert minutes(time) == expected


def test_faults_of_a_cluster_recipe_come_all_at_once(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("partition: main\nnode: 2\ntime: tomorrow\nsbatch: {gres: 'gpu:1'}\nsignal_before_s: 1\n")
    with pytest.raises(RecipeError) as caught:
        read_cluster(str(file), [])
    said = str(caught.value)
    assert "c.yaml:2: node: unknown key; did you mean nodes?" in said
    assert "c.yaml:3: time = 'tomorrow': 'tomorrow' is no time; write 90 (minutes)" in said
    assert "gres has a key of its own here: write gpus_per_node" in said
    assert "c.yaml:5: signal_before_s = 1:" in said


def test_overrides_of_the_cluster_are_told_from_those_of_the_recipe() -> None:
    settings, others = read_cluster("cluster/default", ["steps=5", "slurm.nodes=3", "slurm.sbatch.exclusive=true"])
    assert (settings.nodes, settings.sbatch, others) == (3, {"exclusive": True}, ["steps=5"])


def test_the_archive_depends_on_the_code_alone_and_unpacks_whole(tmp_path: Path) -> None:
    first = code.archive(("slurm", "configs", "absent"), tmp_path / "a.zip")
    assert code.archive(("configs", "slurm"), tmp_path / "b.zip") == first
    with zipfile.ZipFile(tmp_path / "a.zip") as packed:
        names = packed.namelist()
    assert {"slurm/entry.py", "configs/cluster/default.yaml"} <= set(names)
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests/")]
    folder = code.unpack(tmp_path / "a.zip")
    assert code.unpack(tmp_path / "b.zip") == folder
    assert (folder / "slurm/entry.py").read_bytes() == Path(code.__file__).with_name("entry.py").read_bytes()
    assert folder.parent.stat().st_mode & 0o077 == 0


def test_scripts_are_valid_shell(tmp_path: Path) -> None:
    cluster = ClusterRecipe(setup=("module() { true; }",), environment={"A": "it's"}, memory_gb=1.5)
    text = script(Task(target="a:b", recipe="r"), cluster, tmp_path / "a job")
    assert "#SBATCH --mem=1536M" in text
    assert not (tmp_path / "a job").exists()
    file = tmp_path / "script.sh"
    file.write_text(text)
    assert subprocess.run(["bash", "-n", str(file)], check=False).returncode == 0


def test_nodes_of_several_kinds_become_one_job_with_one_step(tmp_path: Path) -> None:
    kinds = {"nodes": 2, "gpus_per_node": 4, "cpus_per_task": 8, "partition": "gpu", "sbatch": {"exclusive": True}}
    cluster = ClusterRecipe.model_validate({"cpus_per_task": 3, "account": "us", "time": "1:30:00", "groups": [kinds]})
    for folder in (tmp_path / "job", tmp_path / "a job"):
        text = script(Task(target="a:b", recipe="r", ray={}), cluster, folder)
        first, _, rest = text.partition("#SBATCH hetjob\n")
        second = [line for line in rest.splitlines() if line.startswith("#SBATCH ")]
        assert "#SBATCH --cpus-per-task=3" in first
        for words in ("partition=gpu", "account=us", "nodes=2", "gpus-per-node=4", "cpus-per-task=32", "time=90"):
            assert f"#SBATCH --{words}" in second
        assert {"#SBATCH --exclusive", "#SBATCH --no-kill", "#SBATCH --requeue"} <= set(second)
        (step,) = (line for line in text.splitlines() if line.startswith("srun "))
        said = subprocess.run(
            ["bash", "-c", f'set -- {step.removeprefix("srun ")}; printf "%s\\n" "$@"'],
            env={"SLURM_JOB_ID": "7"},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.splitlines()
        parts = [said[: said.index(":")], said[said.index(":") + 1 :]]
        for number, (part, cpus) in enumerate(zip(parts, (3, 32), strict=True)):
            assert part[0] == f"--het-group={number}"
            assert f"--cpus-per-task={cpus}" in part
            assert f"{folder}/7_%t_log.out" in part
            assert part[-1] == str(folder)
    with pytest.raises(SubmissionError, match="groups: nodes of several kinds are for tokenization"):
        script(Task(target="a:b", recipe="r"), cluster, tmp_path / "job")


@pytest.mark.parametrize(
    ("state", "left", "status", "requeued"),
    [
        ("RUNNING", {"requeue-7-0.json": "{}"}, 0, True),
        ("CANCELLED", {"requeue-7-0.json": "{}"}, 0, False),
        ("RUNNING", {"requeue-7-1.json": "{}"}, 0, False),
        ("RUNNING", {"fault-7-0-1.json": "{}"}, 1, False),
        ("RUNNING", {"lost-7-0-1.json": "{}"}, 1, True),
        ("RUNNING", {"losses-7": "7-0\n7-1\n7-2\n"}, 1, False),
        ("RUNNING", {"exit-7-0": "5"}, 1, False),
        ("RUNNING", {}, 0, False),
    ],
)
def test_what_the_tasks_leave_decides_whether_a_job_is_queued_again(
    tmp_path: Path, state: str, left: dict[str, str], status: int, requeued: bool
) -> None:
    """With a scontrol that writes down what it is asked; the real one is in test_interruption."""
    for name, text in left.items():
        (tmp_path / name).write_text(text)
    stand_in = tmp_path / "scontrol"
    stand_in.write_text(
        f'#!/bin/bash\n[ "$1" = show ] && echo "JobState={state}" || {{ echo "$@" >>{tmp_path}/asked; exit 1; }}\n'
    )
    (tmp_path / "srun").write_text("#!/bin/bash\nexit 0\n")
    for file in (stand_in, tmp_path / "srun"):
        file.chmod(0o755)
    cluster = ClusterRecipe()
    lines = [*before_the_tasks(cluster, tmp_path, "X"), f"(exit {status})", *after_the_tasks(cluster, tmp_path)]
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1"},
        check=False,
        capture_output=True,
    )
    asked = (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""
    assert asked == ("requeue 7\n" if requeued else "")
    assert done.returncode == (5 if "exit-7-0" in left else status)


def test_sweeps_are_all_combinations() -> None:
    assert sweep(["a.b=1,2", "c=x"]) == [{"a.b": "1", "c": "x"}, {"a.b": "2", "c": "x"}]
    assert sweep([]) == [{}]
    with pytest.raises(RecipeError, match="write KEY=VALUE,VALUE"):
        sweep(["a.b"])


def test_each_job_of_a_sweep_has_a_run_folder_of_its_own() -> None:
    made = swept("pretrain/demo", ["steps=20"], ["optimizer.learning_rate=1e-3,3e-4", "seed=1,2"])
    assert [(r.optimizer.learning_rate, r.seed, r.steps) for r in made] == [
        (1e-3, 1, 20),
        (1e-3, 2, 20),
        (3e-4, 1, 20),
        (3e-4, 2, 20),
    ]
    assert made[0].output == "demo/run/learning_rate=1e-3_seed=1"
    assert len({r.output for r in made}) == 4


def test_targets_that_are_none_are_refused() -> None:
    assert resolve("pathlib:Path") is Path
    with pytest.raises(ValueError, match=r"write package\.module:name"):
        resolve("pathlib.Path")
    with pytest.raises(ValueError, match="has no callable nothing"):
        resolve("pathlib:nothing")


def test_values_with_spaces_are_read_whole() -> None:
    assert fields("JobId=7 Reason=Nodes required are DOWN Dependency=(null)") == {
        "JobId": "7",
        "Reason": "Nodes required are DOWN",
        "Dependency": "(null)",
    }


def test_a_job_may_submit_another_one_as_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SBATCH_PARTITION", "SLURM_CONF"):
        monkeypatch.setenv(name, "1")
    with outside_of_any_job():
        assert {name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))} == {"SLURM_CONF"}
    assert os.environ["SLURM_NTASKS"] == "1"


def test_lines_are_merged_and_never_torn(tmp_path: Path) -> None:
    (tmp_path / "7_0_log.out").write_text("a\nb\nhalf")
    (tmp_path / "7_1_log.out").write_text("c\n")
    (tmp_path / "71_0_log.out").write_text("of another job\n")
    rounds = iter([False, True])

    def ended() -> bool:
        done = next(rounds)
        if done:
            (tmp_path / "7_0_log.out").write_text("a\nb\nhalf and half\nd\n")
        return done

    assert list(read(tmp_path, "7", ended=ended)) == [(0, "a"), (0, "b"), (1, "c"), (0, "half and half"), (0, "d")]
    assert list(read(tmp_path, "7", task=1)) == [(1, "c")]


def test_folders_of_jobs_never_collide(tmp_path: Path) -> None:
    first = new_folder(tmp_path, "a/b c")
    first.mkdir()
    assert new_folder(tmp_path, "a/b c") != first
    assert "/" not in first.name
    assert " " not in first.name
