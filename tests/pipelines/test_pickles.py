"""Pickles of others: tensors come out, nothing in them runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pipelines.tokenizers.checkpoint import CheckpointError
from pipelines.tokenizers.convert import convert
from pipelines.tokenizers.pickles import read_state_dict
from tests.pipelines.released import write_lightning

STATE = {"encoder.weight": torch.arange(6.0).view(2, 3), "steps": torch.tensor(7)}


class Runs:
    """Calls a function with an argument when it is unpickled without care."""

    def __init__(self, function: Callable[..., Any], argument: str) -> None:
        self.made = function, (argument,)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return self.made


def assert_is_state(found: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(found, STATE, rtol=0, atol=0)


def test_a_checkpoint_of_lightning_gives_its_tensors(tmp_path: Path) -> None:
    write_lightning(tmp_path / "last.ckpt", STATE)
    assert_is_state(read_state_dict(tmp_path / "last.ckpt"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_bare_state_dict_is_read_in_both_formats_of_torch(tmp_path: Path, zipped: bool) -> None:
    torch.save(STATE, tmp_path / "x.th", _use_new_zipfile_serialization=zipped)
    assert_is_state(read_state_dict(tmp_path / "x.th"))


def test_safetensors_are_read(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "x.safetensors")
    assert_is_state(read_state_dict(tmp_path / "x.safetensors"))
    (tmp_path / "x.safetensors").write_bytes(b"\x08")
    with pytest.raises(CheckpointError, match=r"cannot read \S*x\.safetensors"):
        read_state_dict(tmp_path / "x.safetensors")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("function", "name"), [(os.mkdir, r"posix\.mkdir"), (eval, r"(builtins\.)?eval"), (exec, r"(builtins\.)?exec")]
)
def test_a_pickle_that_would_run_code_is_refused_by_name_and_does_not_run(
    tmp_path: Path, function: Callable[..., Any], name: str, zipped: bool
) -> None:
    trace = tmp_path / "it ran"
    argument = str(trace) if function is os.mkdir else f"__import__('os').mkdir({str(trace)!r})"
    file = tmp_path / "evil.ckpt"
    torch.save({"state_dict": STATE, "extra": Runs(function, argument)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=rf"evil\.ckpt is refused: it names {name}, and loading"):
        convert(file, tmp_path / "out")
    assert not trace.exists()
    assert not (tmp_path / "out").exists()
    # The trap works: read without care, it does run.
    torch.load(file, weights_only=False)
    assert trace.exists()


def test_all_names_that_are_refused_are_told_at_once(tmp_path: Path) -> None:
    write_lightning(tmp_path / "x.ckpt", STATE, one=Runs(os.mkdir, "a"), two=Runs(os.rmdir, "a"))
    with pytest.raises(CheckpointError, match=r"it names posix\.mkdir, posix\.rmdir, and"):
        read_state_dict(tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, but a state dict is wanted"),
        ({}, "holds a dict, but"),
        ({"state_dict": {}}, "holds a dict, but"),
        ({"epoch": 3, "weights": torch.zeros(2)}, r"under 'epoch' stands no tensor; found keys \['epoch'\]"),
    ],
)
def test_what_is_no_state_dict_is_named(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "x.th")
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(tmp_path / "x.th")


@pytest.mark.parametrize("damage", [b"", b"<html>404</html>", b"PK\x03\x04cut"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "x.th").write_bytes(damage)
    with pytest.raises(CheckpointError, match=r"cannot read \S*x\.th"):
        read_state_dict(tmp_path / "x.th")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_checkpoint_is_named(tmp_path: Path, zipped: bool) -> None:
    torch.save({"a": torch.zeros(5000)}, tmp_path / "x.th", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "x.th").read_bytes()
    for share in (0.2, 0.6, 0.99):
        (tmp_path / "x.th").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(CheckpointError, match=r"cannot read \S*x\.th"):
            read_state_dict(tmp_path / "x.th")
