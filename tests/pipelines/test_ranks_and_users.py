"""Several processes of a run, and runs of several users on one node."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipelines.pretrain.metrics import ROLL_BACK, read_metrics
from pipelines.recipe import dump_recipe
from pipelines.shards.dataset import Dataset
from pipelines.shards.split import is_validation
from tests.pipelines.corpora import VOCABULARY, random_row, write_unit
from tests.pipelines.spiking import tell_spikes
from tests.pipelines.training import ROOT, TINY, TWO_RANKS, losses_of, run_recipe, started, trained

_SHARE = 0.2


def _dataset(folder: Path, held_out: int) -> Dataset:
    """So many documents of the validation split, and twenty others."""
    rng = np.random.default_rng(3)
    rows = [random_row(str(n), rng) for n in range(400)]
    split = [[row for row in rows if is_validation(row.source, _SHARE) == validation] for validation in (False, True)]
    dataset = Dataset.create(folder, VOCABULARY, validation_share=_SHARE)
    dataset.commit([write_unit(dataset, "u", [*split[0][:20], *split[1][:held_out]])])
    return dataset


@pytest.mark.slow
def test_two_ranks_go_back_together_and_validate_where_one_has_nothing_to_validate_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, none = _dataset(tmp_path / "one", 1), _dataset(tmp_path / "none", 0)
    model = TINY["model"] | {"dropout": 0.0}
    base = run_recipe(one, tmp_path / "two", steps=8, model=model, batch={"sequences": 8, "micro_batch": 2})
    values = base.model_dump(mode="json")
    values["data"] |= {"dataset": "", "mixture": [{"dataset": one.uri, "weight": 3.0}, {"dataset": none.uri}]}
    values["validation"] |= {"every": 2}
    values["faults"] |= {"spikes": "roll_back", "spike_sigmas": 1000.0}
    recipe = type(base).model_validate(values)
    spikes = "from tests.pipelines.spiking import tell_spikes; tell_spikes([6], 8)"
    process = started(recipe, tmp_path, *TWO_RANKS, before=spikes)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said.decode()
    tell_spikes([6], 8, monkeypatch.setattr)
    alone = trained(type(base).model_validate(values | {"output": str(tmp_path / "alone")})).folder
    back = [read_metrics(folder / "metrics.jsonl", ROLL_BACK) for folder in (tmp_path / "two", alone)]
    assert [[(r["spike"], r["to"], r["batches"]) for r in each] for each in back] == [[(6, 4, 2)]] * 2
    for kind in ("train", "validation"):
        for ours, theirs in zip(
            *(read_metrics(folder / "metrics.jsonl", kind) for folder in (tmp_path / "two", alone)), strict=True
        ):
            assert ours["loss"]["text"] == pytest.approx(theirs["loss"]["text"], rel=1e-5)
            for name, losses in theirs["datasets"].items():
                for modality, loss in losses.items():
                    found = ours["datasets"][name][modality]
                    assert found == (loss if loss is None else pytest.approx(loss, rel=1e-5))
    validations = read_metrics(tmp_path / "two/metrics.jsonl", "validation")
    assert [r["step"] for r in validations] == [2, 4, 6, 8]
    assert validations[0]["datasets"]["one"]["text"] == pytest.approx(validations[0]["loss"]["text"])
    assert validations[0]["datasets"]["none"]["text"] is None


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that all users may enter."""
    folder = Path(tempfile.mkdtemp(prefix="braid-users-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def _as(user: int) -> list[str]:
    """Runs a command as another user, if we may."""
    if user == os.getuid():
        return []
    command = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--no-new-privs"]
    try:
        subprocess.run([sys.executable, "-c", ""], user=user, group=user, extra_groups=[], check=True)
    except (PermissionError, subprocess.CalledProcessError):
        # This Python lies where only we may read.
        command += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    return command


def _left(*users: int) -> list[str]:
    """What lies in shared memory and in the folder of temporary files, but for the logs that torchrun leaves there."""
    found = [entry for folder in ("/dev/shm", tempfile.gettempdir()) for entry in Path(folder).iterdir()]
    ours = [entry for entry in found if entry.lstat().st_uid in users]
    for entry in ours:
        if entry.name.startswith("torchelastic_") and entry.stat().st_uid != os.getuid():
            shutil.rmtree(entry)
    return sorted(str(entry) for entry in ours if not entry.name.startswith("torchelastic_"))


@pytest.mark.slow
def test_two_users_train_on_one_node_at_once_and_leave_nothing(open_folder: Path) -> None:
    other_users = os.getuid() == 0 and shutil.which("setpriv") is not None
    users = [54321, 54322] if other_users else [os.getuid()] * 2
    dataset = _dataset(open_folder / "tokens", 5)
    before = _left(*users)
    processes = []
    for number, user in enumerate(users):
        home = open_folder / f"user-{number}"
        home.mkdir(mode=0o700)
        os.chown(home, user, -1)
        recipe = run_recipe(dataset, home / "run", batch={"sequences": 8, "micro_batch": 2}, steps=6)
        file = open_folder / f"{number}.yaml"
        file.write_text(dump_recipe(recipe))
        code = "import sys; from pipelines.pretrain import main; main(sys.argv[1])"
        script = open_folder / "train.py"
        script.write_text(code)
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "HOME": str(home),
            "USER": home.name,
            "OMP_NUM_THREADS": "1",
        }
        processes.append(
            subprocess.Popen(
                [*_as(user), sys.executable, *TWO_RANKS, str(script), str(file)],
                cwd=home,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        )
    ends = [process.communicate(timeout=250)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n\n".join(ends)
    one, other = (losses_of(open_folder / f"user-{number}/run") for number in (0, 1))
    assert len(one) == 6
    assert one == other
    assert _left(*users) == before
