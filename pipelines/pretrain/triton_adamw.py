"""The step of `master_adamw` as one Triton kernel; TRITON_INTERPRET=1 runs it on the CPU, for tests.

A step is bound by memory: with float32 gradients and bfloat16 moments it reads 12 bytes a weight and writes 8. Whether it
is taken at all, and how biases are corrected, it reads from the device, too.
"""

# A kernel's arguments have no Python types, and its constants are written large, as the field does.
# mypy: disallow-untyped-defs=False, check-untyped-defs=False
# ruff: noqa: N803

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from pipelines.pretrain.master_adamw import Update

_BLOCK = 2048


@triton.jit
def _adamw_kernel(
    weight, low, grad, exp_avg, exp_avg_sq, size, beta1, beta2, epsilon, decay, correction, found_inf,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < tl.where(tl.load(found_inf) == 0, size, 0)
    step_size, root_correction = tl.load(correction), tl.load(correction + 1)
    g = tl.load(grad + at, mask=there, other=0.0).to(tl.float32)
    first = tl.load(exp_avg + at, mask=there, other=0.0).to(tl.float32)
    second = tl.load(exp_avg_sq + at, mask=there, other=0.0).to(tl.float32)
    high = tl.load(weight + at, mask=there, other=0).to(tl.int32)
    rest = tl.load(low + at, mask=there, other=0).to(tl.int32)
    master = ((high << 16) + rest).to(tl.float32, bitcast=True)
    first += (g - first) * (1 - beta1)
    second = second * beta2 + g * g * (1 - beta2)
    tl.store(exp_avg + at, first.to(exp_avg.dtype.element_ty), mask=there)
    tl.store(exp_avg_sq + at, second.to(exp_avg_sq.dtype.element_ty), mask=there)
    master = master * decay - step_size * first / (tl.sqrt(second) / root_correction + epsilon)
    bits = master.to(tl.int32, bitcast=True)
    high = (bits + 0x8000) >> 16
    tl.store(weight + at, high.to(tl.int16), mask=there)
    tl.store(low + at, (bits - (high << 16)).to(tl.int16), mask=there)


def update_(
    weight: Tensor,
    low: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    numbers: Update,
    correction: Tensor,
) -> None:
    """See `master_adamw.update_`; all are contiguous."""
    size = weight.numel()
    if not size:
        return
    _adamw_kernel[(triton.cdiv(size, _BLOCK),)](
        weight.view(torch.int16), low, grad, exp_avg, exp_avg_sq, size, numbers.beta1, numbers.beta2, numbers.epsilon,
        1 - numbers.learning_rate * numbers.weight_decay, correction, numbers.found_inf,
        BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip
