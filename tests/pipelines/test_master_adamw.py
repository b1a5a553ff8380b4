"""AdamW with masters of 16 + 16 bits: exact masters, the steps of a float64 AdamW, and checkpoints that change nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.pretrain.faults import take_step
from pipelines.pretrain.master_adamw import MasterAdamW, join, split_

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@given(
    st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**120), max_value=2.0**120),
        min_size=1,
    )
)
def test_a_master_is_its_weight_and_the_other_sixteen_bits_exactly(values: list[float]) -> None:
    master = torch.tensor(values, dtype=torch.float32)
    weight, low = torch.empty_like(master, dtype=torch.bfloat16), torch.empty_like(master, dtype=torch.int16)
    split_(master, weight, low)
    assert torch.equal(join(weight, low).view(torch.int32), master.view(torch.int32))
    # The nearest bfloat16; of two equally near ones either.
    assert torch.equal((weight.double() - master).abs(), (master.bfloat16().double() - master).abs())


def trained(optimizer: MasterAdamW, weight: torch.nn.Parameter, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        gradient = torch.randn(weight.shape, generator=generator)
        weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
        optimizer.step()
        optimizer.zero_grad()


def started(moments: torch.dtype = torch.float32) -> tuple[torch.nn.Parameter, MasterAdamW]:
    weight = torch.nn.Parameter(torch.randn(30, 40, generator=torch.Generator().manual_seed(9)).bfloat16())
    return weight, MasterAdamW([weight], moments=moments, accumulate=True, **SETTINGS)


@pytest.mark.parametrize(("moments", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_steps_are_those_of_adamw_in_float64(moments: torch.dtype, error: float) -> None:
    weight, optimizer = started(moments)
    twin = torch.nn.Parameter(weight.detach().double())
    theirs = torch.optim.AdamW([twin], **SETTINGS)
    for step in range(25):
        trained(optimizer, weight, range(step, step + 1))
        twin.grad = torch.randn(twin.shape, generator=torch.Generator().manual_seed(step)).double()
        theirs.step()
    (master,) = optimizer.masters().values()
    assert (master - twin).norm() / twin.norm() < error
    assert torch.equal(weight.detach(), master.bfloat16())


def test_a_step_that_is_not_to_be_taken_leaves_weight_master_moments_and_count() -> None:
    weight, optimizer = started()
    twin, undisturbed = started()
    for step in range(6):
        gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
        weight.grad.copy_(gradient)  # type: ignore[union-attr]
        if step in (0, 3):
            weight.grad[0, 0] = float("nan")  # type: ignore[index]
            before = weight.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])
        else:
            twin.grad.copy_(gradient)  # type: ignore[union-attr]
            undisturbed.step()
        take_step(optimizer, torch.tensor(float(step in (0, 3))))
        if step in (0, 3):
            assert torch.equal(weight.detach(), before[0])
            after = optimizer.state_dict()["state"]
            assert all(torch.equal(after[0][name], value) for name, value in before[1][0].items())
        optimizer.zero_grad()
        undisturbed.zero_grad()
    assert int(optimizer.state[weight]["step"]) == 4
    assert torch.equal(*(next(iter(o.masters().values())) for o in (optimizer, undisturbed)))


def test_steps_too_small_for_the_weight_add_up_in_the_master() -> None:
    weight = torch.nn.Parameter(torch.ones(8).bfloat16())
    optimizer = MasterAdamW([weight], accumulate=True, **(SETTINGS | {"lr": 1e-5, "weight_decay": 0.0}))
    for _ in range(1000):
        weight.grad.fill_(1.0)  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
    assert weight.detach().float().tolist() == pytest.approx([0.99] * 8, abs=2e-3)


def test_a_loaded_state_goes_on_bit_for_bit() -> None:
    weight, optimizer = started(torch.bfloat16)
    trained(optimizer, weight, range(5))
    saved, values = copy.deepcopy(optimizer.state_dict()), weight.detach().clone()
    trained(optimizer, weight, range(5, 9))
    other, resumed = started(torch.bfloat16)
    with torch.no_grad():
        other.copy_(values)
    resumed.load_state_dict(saved)
    trained(resumed, other, range(5, 9))
    assert torch.equal(*(next(iter(o.masters().values())) for o in (optimizer, resumed)))


def test_moments_of_another_type_are_refused_with_the_remedy() -> None:
    with pytest.raises(
        ValueError, match=r"exp_avg as torch.bfloat16, this run as torch.float32: set optimizer.moments"
    ):
        started()[1].load_state_dict(started(torch.bfloat16)[1].state_dict())


def test_masters_are_for_bfloat16_weights(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"a weight of type torch.float32"):
        MasterAdamW([torch.nn.Parameter(torch.ones(2))], **SETTINGS)
