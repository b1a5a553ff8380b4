"""The model's Triton kernels against the formulas in float64. Where Triton is installed, TRITON_INTERPRET=1 runs them too."""

import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from model import elementwise, float8, heads, triton_elementwise, triton_float8  # noqa: E402
from pipelines.pretrain import master_adamw, triton_adamw  # noqa: E402

pytestmark = pytest.mark.gpu
T, D, N, H = 7, 48, 3, 16


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape).to(DEVICE)


def double(*tensors: Tensor) -> list[Tensor]:
    """On the CPU, where the formulas run."""
    return [tensor.detach().double().cpu().clone() for tensor in tensors]


def zero() -> Tensor:
    """A peak before it is raised."""
    return torch.zeros((), device=DEVICE)


def assert_near(found: Tensor, right: Tensor) -> None:
    assert (found.double().cpu() - right).norm() <= 1e-6 * right.norm()


def test_norm_its_sum_with_a_residual_and_its_backward_pass() -> None:
    x, y, grad, around = randn(4, T, D)
    weight = randn(D)
    for found, right in zip(
        triton_elementwise.norm(x, None, weight, 1e-5, None), elementwise.norm(*double(x, weight), 1e-5), strict=True
    ):
        assert_near(found, right)
    total, right_total, peak = y.clone(), double(y)[0], zero()
    found = triton_elementwise.norm(total, x, weight, 1e-5, peak)
    right = elementwise.add_norm_(right_total, *double(x, weight), 1e-5)
    for one, other in zip((*found, total), (*right, right_total), strict=True):
        assert_near(one, other)
    assert peak == found[0].abs().max()
    arguments, peak = (grad, total, weight, found[1], found[2], around), zero()
    backward = triton_elementwise.norm_backward(*arguments, None, peak)
    for one, other in zip(backward, elementwise.norm_backward(*double(*arguments)), strict=True):
        assert_near(one, other)
    assert peak == backward[0].abs().max()
    kept = randn(T, D)
    assert triton_elementwise.norm_backward(*arguments, kept, None)[2] is kept


def test_rotation_and_its_backward_pass() -> None:
    qkv, cos, sin = randn(T, 3, N, H), randn(T, H // 2), randn(T, H // 2)
    right = elementwise.rotate_(*double(qkv, cos, sin))
    assert_near(triton_elementwise.rotate_(qkv, cos, sin), right)
    for largest in range(3):
        gradients, peak = randn(3, T, N, H), zero()
        gradients[largest, 4, 1, 5] = -20.0
        joined = triton_elementwise.join_rotated(*gradients, cos, sin, peak)
        assert_near(joined, elementwise.join_rotated(*double(*gradients, cos, sin)))
        assert peak == joined.abs().max()


def test_gelu_and_its_backward_pass() -> None:
    h, grad, peak = 3 * randn(T, D), randn(T, D), zero()
    active = triton_elementwise.gelu(h, peak=peak)
    assert_near(active, elementwise.gelu(*double(h)))
    assert peak == active.abs().max()
    right, peak = elementwise.gelu_backward_(*double(grad, h)), zero()
    for one, other in zip(triton_elementwise.gelu_backward_(grad, h, None, peak), right, strict=True):
        assert_near(one, other)
    assert peak == grad.abs().max()


def test_what_was_kept_is_not_made_again() -> None:
    h, grad, kept = randn(T, D), randn(T, D), randn(T, D)
    before, right = torch.stack((h, kept)), elementwise.gelu_backward_(*double(grad, h))[0]
    found, output = triton_elementwise.gelu_backward_(grad, h, kept, None)
    assert_near(found, right)
    assert output is kept
    assert torch.equal(torch.stack((h, kept)), before)


def test_the_normal_distribution_is_within_2e_7_far_out_too() -> None:
    h = torch.linspace(-12, 12, 20001).to(DEVICE)
    right = elementwise.gelu(*double(h))
    error = (triton_elementwise.gelu(h).double().cpu() - right).abs() / h.double().cpu().abs().clamp(min=1)
    assert error.max() < 2e-7


def test_a_peak_is_raised_and_never_lowered_and_no_number_is_the_highest() -> None:
    h, peak = randn(T, D).bfloat16(), zero()
    active = triton_elementwise.gelu(h, peak=peak)
    assert 0 < peak == active.abs().max()
    before = peak.clone()
    triton_elementwise.gelu(h / 2, peak=peak)
    assert peak == before
    h[3, 3] = float("nan")
    triton_elementwise.gelu(h, peak=peak)
    assert peak.isnan()


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("dtype", [float8.E4M3, float8.E5M2])
def test_rounding_to_float8_is_the_formula_bit_for_bit(dtype: torch.dtype, turn: bool) -> None:
    exact = torch.arange(-12, 13, 2).repeat(70, 12) * torch.finfo(dtype).max / 16
    # Triton 3.6's interpreter loses the carry when it rounds, so there only what needs no rounding is compared.
    many = [randn(70, 150) * scale for scale in (1e-8, 1.0, 1e8)] if DEVICE == "cuda" else []
    for x in (0 * exact, exact / 8, *many):
        x = x.bfloat16().to(DEVICE)
        peak = torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32)
        found, inverse = triton_float8.quantize(x, peak, dtype, turn)
        right, right_inverse = float8.quantize(x.cpu(), dtype, transpose=turn)
        assert torch.equal(found.cpu().float(), right.float())
        assert inverse.cpu() == right_inverse


@pytest.mark.parametrize("no_number", [float("nan"), float("inf")])
def test_no_number_stays_none_in_float8(no_number: float) -> None:
    x = randn(70, 150).bfloat16()
    x[3, 3] = no_number
    found, inverse = triton_float8.quantize(x, torch.tensor(no_number, device=DEVICE), float8.E4M3, False)
    assert not (found.float() * inverse)[3, 3].isfinite()


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
