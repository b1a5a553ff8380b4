"""The model's Triton kernels against the formulas in float64. Where Triton is installed, TRITON_INTERPRET=1 runs them too."""

import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from model import elementwise, heads, triton_elementwise  # noqa: E402
from pipelines.pretrain import master_adamw, triton_adamw  # noqa: E402

pytestmark = pytest.mark.gpu
T, D, N, H = 7, 48, 3, 16


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape).to(DEVICE)


def double(*tensors: Tensor) -> list[Tensor]:
    """On the CPU, where the formulas run."""
    return [tensor.detach().double().cpu().clone() for tensor in tensors]


def assert_near(found: Tensor, right: Tensor) -> None:
    assert (found.double().cpu() - right).norm() <= 1e-6 * right.norm()


def test_norm_its_sum_with_a_residual_and_its_backward_pass() -> None:
    x, y, grad, around = randn(4, T, D)
    weight = randn(D)
    for found, right in zip(
        triton_elementwise.norm(x, None, weight, 1e-5), elementwise.norm(*double(x, weight), 1e-5), strict=True
    ):
        assert_near(found, right)
    total, right_total = y.clone(), double(y)[0]
    found = triton_elementwise.norm(total, x, weight, 1e-5)
    right = elementwise.add_norm_(right_total, *double(x, weight), 1e-5)
    for one, other in zip((*found, total), (*right, right_total), strict=True):
        assert_near(one, other)
    arguments = (grad, total, weight, found[1], found[2], around)
    for one, other in zip(
        triton_elementwise.norm_backward(*arguments), elementwise.norm_backward(*double(*arguments)), strict=True
    ):
        assert_near(one, other)


def test_rotation_and_its_backward_pass() -> None:
    qkv, cos, sin = randn(T, 3, N, H), randn(T, H // 2), randn(T, H // 2)
    right = elementwise.rotate_(*double(qkv, cos, sin))
    assert_near(triton_elementwise.rotate_(qkv, cos, sin), right)
    arguments = (*randn(3, T, N, H), cos, sin)
    assert_near(triton_elementwise.join_rotated(*arguments), elementwise.join_rotated(*double(*arguments)))


def test_gelu_and_its_backward_pass() -> None:
    h, grad = randn(T, D), randn(T, D)
    assert_near(triton_elementwise.gelu(h), elementwise.gelu(*double(h)))
    right = elementwise.gelu_backward_(*double(grad, h))
    for one, other in zip(triton_elementwise.gelu_backward_(grad, h), right, strict=True):
        assert_near(one, other)


@pytest.mark.parametrize("vocabulary", [50, 9001])
def test_the_loss_of_a_softmax_and_its_gradient(vocabulary: int) -> None:
    logits = randn(5, vocabulary + 7)[:, :vocabulary]
    ids = torch.tensor([3, vocabulary - 1, -100, 0, 7])
    coefficient = torch.tensor(0.3)
    (wide,) = double(logits)
    right = heads._softmax_loss_(wide, ids, coefficient.double(), 0.01)
    found = triton_elementwise.softmax_loss_(logits, ids.to(DEVICE), coefficient.to(DEVICE), 0.01, -100)
    for one, other in zip((*found, logits), (*right, wide), strict=True):
        assert_near(one, other)


@pytest.mark.parametrize("skipped", [False, True])
def test_a_step_of_the_optimizer(skipped: bool) -> None:
    master, grad, first = torch.randn(3, 5000)
    second = torch.rand(5000)
    weight, low = torch.empty_like(master, dtype=torch.bfloat16), torch.empty_like(master, dtype=torch.int16)
    master_adamw.split_(master, weight, low)
    if skipped:
        grad[7] = float("nan")
    right = [part.clone() for part in (weight, low, grad, first, second)]
    found = [part.clone().to(DEVICE) for part in right]
    for parts, update, device in ((right, master_adamw.update_, "cpu"), (found, triton_adamw.update_, DEVICE)):
        numbers = master_adamw.Update(1e-2, 0.9, 0.95, 1e-8, 0.1, torch.tensor(float(skipped), device=device))
        (correction,) = numbers.corrections(torch.tensor([3.0], device=device))
        update(*parts, numbers, correction)
    assert torch.equal(found[0].cpu(), weight) == skipped
    assert_near(master_adamw.join(found[0].cpu(), found[1].cpu()), master_adamw.join(*right[:2]).double())
    for one, other in zip(found[3:], right[3:], strict=True):
        assert_near(one, other.double())
