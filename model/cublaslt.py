"""Matrix products of a GPU by the kernel of cuBLASLt that is fastest for their shape.

torch takes the kernel that cuBLAS chooses, and offers no way to take another; here all that the heuristics of cuBLASLt name
are timed once for each shape (`benchmarks.train_step`, sections tune and step, says what that gives). Enters: row-major
matrices, each contiguous or the transpose of one that is. Leaves: the same product, summed in float32. Always holds: where
the library cannot be called in this way, nothing is done and the caller is told so.

Called through ctypes; names and numbers are those of cublasLt.h, which are the same from CUDA 11 to 13.
"""

from __future__ import annotations

import ctypes
import logging
import statistics
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

_COMPUTE_32F = 68
_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}
_TRANSA, _TRANSB = 3, 4
_MOST = 64
_ALIGNMENT_BYTES = 256
"""Of matrices for which the heuristics choose unless told otherwise; torch allocates with more."""
ROUNDS, TURN_MS = 2, 120
"""In a few milliseconds a GPU does not reach the clock that its power limit leaves it, and the kernels that are fastest then
are others: on an H200 up to 17% slower than what they promised (`benchmarks.train_step`, section tune)."""


class _Found(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace_bytes", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


class Layout(NamedTuple):
    """All that a kernel is chosen by."""

    rows: int
    inner: int
    columns: int
    left_transposed: bool
    right_transposed: bool
    type: torch.dtype
    to: torch.dtype
    add: bool
    device: torch.device

    @classmethod
    def of(cls, out: Tensor, left: Tensor, right: Tensor, add: bool) -> Layout | None:
        """None for matrices that kernels of `CublasLt` do not take."""
        if left.dtype not in (torch.bfloat16, torch.float16) or right.dtype != left.dtype or not out.is_contiguous():
            return None
        if any(
            x.data_ptr() % _ALIGNMENT_BYTES or not (x.is_contiguous() or x.T.is_contiguous()) for x in (left, right)
        ):
            return None
        (rows, inner), columns = left.shape, right.shape[1]
        if out.data_ptr() % _ALIGNMENT_BYTES or any(size % 8 for size in (rows, inner, columns)):
            return None
        turned = not left.is_contiguous(), not right.is_contiguous()
        return cls(rows, inner, columns, *turned, left.dtype, out.dtype, add, out.device)


Product = Callable[[Tensor, Tensor, Tensor], object]
"""Makes out from (out, left, right), or adds to it."""


class CublasLt:
    """The library that torch has loaded, with a handle of its own on the current device."""

    def __init__(self) -> None:
        torch.zeros(1, 1, device="cuda") @ torch.zeros(1, 1, device="cuda")
        loaded = {
            line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "cublasLt.so" in line
        }
        if not loaded:
            raise OSError("torch has loaded no libcublasLt.so")
        self._library = ctypes.CDLL(sorted(loaded)[0])
        self._handle = ctypes.c_void_p()
        self._call("cublasLtCreate", ctypes.byref(self._handle))

    def kernels(self, layout: Layout) -> list[Product]:
        """All that the library's heuristics name, the likeliest first; none of them needs a workspace."""
        # Row-major out is column-major out transposed, so the right matrix is the library's first.
        description, preference = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cublasLtMatmulDescCreate", ctypes.byref(description), _COMPUTE_32F, _TYPES[torch.float32])
        for attribute, transposed in ((_TRANSA, layout.right_transposed), (_TRANSB, layout.left_transposed)):
            self._call(
                "cublasLtMatmulDescSetAttribute",
                description, attribute, ctypes.byref(ctypes.c_int32(transposed)), ctypes.c_size_t(4),
            )  # fmt: skip
        left = self._matrix(layout.rows, layout.inner, layout.type, layout.left_transposed)
        right = self._matrix(layout.inner, layout.columns, layout.type, layout.right_transposed)
        out = self._matrix(layout.rows, layout.columns, layout.to, False)
        # A new preference allows no workspace.
        self._call("cublasLtMatmulPreferenceCreate", ctypes.byref(preference))
        found, count = (_Found * _MOST)(), ctypes.c_int()
        self._call(
            "cublasLtMatmulAlgoGetHeuristic",
            self._handle, description, right, left, out, out, preference, _MOST, found, ctypes.byref(count),
        )  # fmt: skip
        one, beta = ctypes.c_float(1), ctypes.c_float(float(layout.add))

        def product(algorithm: Any) -> Product:
            def run(to: Tensor, a: Tensor, b: Tensor) -> None:
                pointer = ctypes.c_void_p(to.data_ptr())
                self._call(
                    "cublasLtMatmul",
                    self._handle, description, ctypes.byref(one),
                    ctypes.c_void_p(b.data_ptr()), right, ctypes.c_void_p(a.data_ptr()), left,
                    ctypes.byref(beta), pointer, out, pointer, out, ctypes.byref(algorithm), None, ctypes.c_size_t(0),
                    ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
                )  # fmt: skip

            return run

        return [product(each.algorithm) for each in found[: count.value] if each.state == 0]

    def _matrix(self, rows: int, columns: int, type: torch.dtype, transposed: bool) -> ctypes.c_void_p:
        """The layout of a matrix as it is stored."""
        if transposed:
            rows, columns = columns, rows
        layout = ctypes.c_void_p()
        self._call(
            "cublasLtMatrixLayoutCreate",
            ctypes.byref(layout), _TYPES[type], ctypes.c_uint64(columns), ctypes.c_uint64(rows), ctypes.c_int64(columns),
        )  # fmt: skip
        return layout

    def _call(self, name: str, *arguments: Any) -> None:
        if status := getattr(self._library, name)(*arguments):
            raise OSError(f"{name} answered {status}")


class Fastest:
    """Products by the fastest kernel for each layout, torch's own among them; found when a layout is first met, in two
    seconds."""

    def __init__(self) -> None:
        self._chosen: dict[Layout, Product | None] = {}

    @cached_property
    def _library(self) -> CublasLt:
        return CublasLt()

    def __call__(self, out: Tensor, left: Tensor, right: Tensor, add: bool, by_torch: Product) -> None:
        """out = left @ right, or out += it.

        Args:
            out: [M, N]
            left: [M, K]
            right: [K, N]
            by_torch: the same with torch.
        """
        layout = Layout.of(out, left, right, add)
        if layout is not None and layout not in self._chosen:
            self._chosen[layout] = self._fastest(layout, out, left, right, by_torch)
        chosen = self._chosen[layout] if layout is not None else None
        (chosen or by_torch)(out, left, right)

    def _fastest(self, layout: Layout, out: Tensor, left: Tensor, right: Tensor, by_torch: Product) -> Product | None:
        try:
            scratch = torch.zeros_like(out) if layout.add else out
            products = [by_torch, *self._library.kernels(layout)]
            ms = timed(products, [(scratch, left, right)], ROUNDS, TURN_MS)
        except (OSError, AttributeError, torch.OutOfMemoryError) as error:
            _log.warning("%s is made by the kernel of torch's choice, for others cannot be tried: %s", layout, error)
            return None
        best = min(range(len(ms)), key=ms.__getitem__)
        _log.debug("%s: %.3f ms by torch, %.3f by kernel %d of %d", layout, ms[0], ms[best], best, len(ms) - 1)
        return products[best] if best else None


def timed(
    products: list[Product], operands: list[tuple[Tensor, Tensor, Tensor]], rounds: int, turn_ms: float
) -> list[float]:
    """Milliseconds of each product, the median over rounds. In a round each is repeated for `turn_ms` when its turn comes."""
    count = max(1, round(turn_ms / _repeated_ms(products[0], operands, 3)))
    times = [[_repeated_ms(product, operands, count) for product in products] for _ in range(rounds)]
    return [statistics.median(taken) for taken in zip(*times, strict=True)]


def _repeated_ms(product: Product, operands: list[tuple[Tensor, Tensor, Tensor]], count: int) -> float:
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    product(*operands[-1])
    first.record()
    for turn in range(count):
        product(*operands[turn % len(operands)])
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / count
