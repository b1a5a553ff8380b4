"""Products by cuBLASLt's kernels against float64; which matrices they take is told anywhere."""

import itertools

import pytest
import torch
from torch import Tensor

from model import products
from model.cublaslt import CublasLt, Layout

SIZES = (256, 512, 384)
BF16 = torch.bfloat16
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def pair(left_transposed: bool, right_transposed: bool, device: str) -> tuple[Tensor, Tensor]:
    rows, inner, columns = SIZES
    left, right = (
        torch.randn(rows, inner, device=device, dtype=BF16),
        torch.randn(inner, columns, device=device, dtype=BF16),
    )
    return left.T.contiguous().T if left_transposed else left, right.T.contiguous().T if right_transposed else right


def test_a_layout_says_how_matrices_are_stored_or_that_no_kernel_takes_them() -> None:
    room = torch.empty(1 << 20, dtype=torch.uint8)
    start = -room.data_ptr() % 256

    def at(offset: int, dtype: torch.dtype, *shape: int) -> Tensor:
        """Somewhere in the room: a layout is about where matrices lie, not about what is in them."""
        size = torch.tensor(shape).prod().item() * dtype.itemsize
        return room[start + offset : start + offset + size].view(dtype).view(*shape)

    left, right, out = at(0, BF16, 64, 32), at(4096, BF16, 32, 16), at(8192, torch.float32, 64, 16)
    cpu = torch.device("cpu")
    assert Layout.of(out, left, right, True) == (64, 32, 16, False, False, BF16, torch.float32, True, cpu)
    turned = at(0, BF16, 32, 64).T, at(4096, BF16, 16, 32).T
    assert Layout.of(out, *turned, False) == (64, 32, 16, True, True, BF16, torch.float32, False, cpu)
    assert Layout.of(out, at(2, BF16, 64, 32), right, True) is None  # aligned to 2 bytes
    assert Layout.of(out[:, :8], left, right[:, :8], True) is None  # rows apart
    assert Layout.of(out, left.float(), right.float(), True) is None
    assert Layout.of(at(8192, torch.float32, 64, 15), left, at(4096, BF16, 32, 15), True) is None


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(("left_transposed", "right_transposed"), list(itertools.product((False, True), repeat=2)))
@pytest.mark.parametrize(("to", "add"), [(BF16, False), (torch.float32, False), (torch.float32, True)])
def test_every_kernel_makes_the_product(
    left_transposed: bool, right_transposed: bool, to: torch.dtype, add: bool
) -> None:
    left, right = pair(left_transposed, right_transposed, "cuda")
    before = torch.randn(SIZES[0], SIZES[2], device="cuda").to(to)
    layout = Layout.of(before, left, right, add)
    assert layout is not None
    right_one = left.double() @ right.double() + (before.double() if add else 0)
    kernels = CublasLt().kernels(layout)
    assert kernels
    for kernel in kernels:
        out = before.clone()
        kernel(out, left, right)
        assert (out.double() - right_one).norm() <= (1e-5 if to == torch.float32 else 4e-3) * right_one.norm()


@pytest.mark.gpu
@on_gpu
def test_tuned_products_and_their_gradients_are_those_of_torch() -> None:
    x, weight, grad = (torch.randn(*shape, device="cuda", dtype=BF16) for shape in ((512, 256), (384, 256), (512, 384)))
    strided = torch.randn(512, 300, device="cuda", dtype=BF16)[:, :256]
    leaf = torch.nn.Parameter(weight.clone())
    leaf.grad_dtype = torch.float32  # as where the optimizer keeps the masters

    def all_of_them() -> list[Tensor]:
        leaf.grad = total = torch.ones_like(leaf, dtype=torch.float32)
        assert products.weight_gradient(leaf, grad, x) is None
        plain = products.weight_gradient(weight, grad, x)
        assert plain is not None
        made = [products.product(each, weight) for each in (x, strided)]
        return [*made, products.input_gradient(grad, weight), plain, total]

    expected = all_of_them()
    products.tune(True)
    try:
        for _ in range(2):
            for found, right in zip(all_of_them(), expected, strict=True):
                assert (found - right).norm() <= 4e-3 * right.norm()
    finally:
        products.tune(False)
