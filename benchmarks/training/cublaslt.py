"""cuBLASLt by ctypes: every kernel that its heuristics offer for a product, to be timed one by one.

Enters: row-major matrices on one GPU, the left one and the right one possibly transposed. Leaves: calls that each make the
product by one kernel. Names and numbers are those of cublasLt.h of CUDA 13.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_COMPUTE_32F = 68
_TYPES = {torch.float32: 0, torch.bfloat16: 14}
_TRANSA, _TRANSB = 3, 4
_MAX_WORKSPACE_BYTES = 1
_CONFIG = {
    "id": (0, ctypes.c_int32),
    "tile": (1, ctypes.c_uint32),
    "split_k": (2, ctypes.c_uint32),
    "swizzle": (4, ctypes.c_uint32),
    "custom": (5, ctypes.c_uint32),
    "stages": (6, ctypes.c_uint32),
    "inner": (7, ctypes.c_uint16),
    "cluster": (8, ctypes.c_uint16),
}
WORKSPACE_BYTES = 64 << 20


class _Found(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace_bytes", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


class CublasLt:
    """The library that torch has loaded, with a handle and a workspace of its own."""

    def __init__(self) -> None:
        torch.zeros(1, device="cuda") @ torch.zeros(1, device="cuda")
        loaded = {
            line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "cublasLt.so" in line
        }
        if not loaded:
            raise RuntimeError("torch has loaded no libcublasLt.so: its CUDA build links it otherwise")
        self._library = ctypes.CDLL(sorted(loaded)[0])
        self._handle = ctypes.c_void_p()
        self._call("cublasLtCreate", ctypes.byref(self._handle))
        self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")

    def kernels(
        self, left: Tensor, right: Tensor, out: Tensor, add: bool, most: int = 64
    ) -> Iterator[tuple[dict[str, Any], Callable[[Tensor, Tensor, Tensor], None]]]:
        """For each kernel what it is, and a call that makes out = left @ right (or adds it) with tensors of these layouts.

        Args:
            left: [M, K], or the transpose of a contiguous matrix.
            right: [K, N], the same.
            out: [M, N], contiguous.
        """
        # Row-major out is column-major out transposed, so the right matrix is the library's first.
        description, preference = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cublasLtMatmulDescCreate", ctypes.byref(description), _COMPUTE_32F, _TYPES[torch.float32])
        for attribute, matrix in ((_TRANSA, right), (_TRANSB, left)):
            value = ctypes.c_int32(int(not matrix.is_contiguous()))
            self._call(
                "cublasLtMatmulDescSetAttribute", description, attribute, ctypes.byref(value), ctypes.c_size_t(4)
            )
        layouts = [self._layout(x) for x in (right, left, out)]
        self._call("cublasLtMatmulPreferenceCreate", ctypes.byref(preference))
        size = ctypes.c_uint64(WORKSPACE_BYTES)
        self._call(
            "cublasLtMatmulPreferenceSetAttribute",
            preference, _MAX_WORKSPACE_BYTES, ctypes.byref(size), ctypes.c_size_t(8),
        )  # fmt: skip
        found, count = (_Found * most)(), ctypes.c_int()
        self._call(
            "cublasLtMatmulAlgoGetHeuristic",
            self._handle, description, *layouts, layouts[2], preference, most, found, ctypes.byref(count),
        )  # fmt: skip
        one, beta = ctypes.c_float(1), ctypes.c_float(float(add))
        for kernel in found[: count.value]:

            def run(a: Tensor, b: Tensor, to: Tensor, kernel: _Found = kernel) -> None:
                pointer = ctypes.c_void_p(to.data_ptr())
                self._call(
                    "cublasLtMatmul",
                    self._handle, description, ctypes.byref(one),
                    ctypes.c_void_p(b.data_ptr()), layouts[0], ctypes.c_void_p(a.data_ptr()), layouts[1],
                    ctypes.byref(beta), pointer, layouts[2], pointer, layouts[2], ctypes.byref(kernel.algorithm),
                    ctypes.c_void_p(self._workspace.data_ptr()), ctypes.c_size_t(WORKSPACE_BYTES),
                    ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
                )  # fmt: skip

            yield self._told(kernel), run

    def _layout(self, matrix: Tensor) -> ctypes.c_void_p:
        stored = matrix if matrix.is_contiguous() else matrix.T
        rows, columns = stored.shape
        layout = ctypes.c_void_p()
        self._call(
            "cublasLtMatrixLayoutCreate",
            ctypes.byref(layout), _TYPES[matrix.dtype],
            ctypes.c_uint64(columns), ctypes.c_uint64(rows), ctypes.c_int64(columns),
        )  # fmt: skip
        return layout

    def _told(self, kernel: _Found) -> dict[str, Any]:
        told: dict[str, Any] = {"workspace_mib": kernel.workspace_bytes >> 20, "waves": round(kernel.waves, 2)}
        for name, (attribute, kind) in _CONFIG.items():
            value, written = kind(), ctypes.c_size_t()
            self._call(
                "cublasLtMatmulAlgoConfigGetAttribute",
                ctypes.byref(kernel.algorithm), attribute, ctypes.byref(value),
                ctypes.c_size_t(ctypes.sizeof(kind)), ctypes.byref(written),
            )  # fmt: skip
            told[name] = value.value
        return told

    def _call(self, name: str, *arguments: Any) -> None:
        if status := getattr(self._library, name)(*arguments):
            raise RuntimeError(f"{name} answered {status}")
