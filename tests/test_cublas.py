"""The call of cuBLAS against a stand-in with its C signature and its column-major meaning; no GPU is needed."""

from __future__ import annotations

import ctypes
from ctypes import CFUNCTYPE, c_float, c_int, c_longlong, c_size_t, c_void_p
from types import SimpleNamespace

import numpy as np
import pytest

from gpuxbar.launch.cublas import CublasError, gemm_strided_batched

FP32, FP16 = 0, 2  # cudaDataType


def column_major(address, kind, rows, cols, ld, stride, batch):
    """A batch of column-major matrices in memory."""
    dtype = np.dtype({FP32: np.float32, FP16: np.float16}[kind])
    length = ((batch - 1) * stride + (cols - 1) * ld + rows) * dtype.itemsize
    memory = np.frombuffer((ctypes.c_char * length).from_address(address), dtype)
    steps = tuple(dtype.itemsize * n for n in (stride, 1, ld))
    return np.lib.stride_tricks.as_strided(memory, (batch, rows, cols), steps)


class Library:
    """cublasSetStream, which drops the workspace, cublasSetWorkspace and cublasGemmStridedBatchedEx, declared as in
    cublas_api.h."""

    def __init__(self, status=0):
        self.stream = None

        @CFUNCTYPE(c_int, c_void_p, c_void_p)
        def set_stream(handle, stream):
            assert handle == 2**40 + 1
            self.stream, self.workspace = stream, None
            return 0

        @CFUNCTYPE(c_int, c_void_p, c_void_p, c_size_t)
        def set_workspace(handle, address, size):
            assert handle == 2**40 + 1
            self.workspace = (address, size)
            return 0

        @CFUNCTYPE(c_int, c_void_p, c_int, c_int, c_int, c_int, c_int, c_void_p, c_void_p, c_int, c_int, c_longlong,
                   c_void_p, c_int, c_int, c_longlong, c_void_p, c_void_p, c_int, c_int, c_longlong, c_int, c_int, c_int)  # fmt: skip
        def gemm(handle, op_a, op_b, m, n, k, alpha, a, type_a, ld_a, stride_a, b, type_b, ld_b, stride_b, beta, c,
                 type_c, ld_c, stride_c, batch, compute, algorithm):  # fmt: skip
            self.rest = (handle, op_a, op_b, compute, algorithm)
            factors = [c_float.from_address(p).value for p in (alpha, beta)]
            left = column_major(a, type_a, m, k, ld_a, stride_a, batch).astype(np.float32)
            right = column_major(b, type_b, k, n, ld_b, stride_b, batch).astype(np.float32)
            out = column_major(c, type_c, m, n, ld_c, stride_c, batch)
            out[...] = factors[0] * (left @ right) + factors[1] * out
            return status

        self.cublasSetStream_v2, self.cublasSetWorkspace_v2 = set_stream, set_workspace
        self.cublasGemmStridedBatchedEx = gemm


@pytest.mark.parametrize("kind", [FP32, FP16])
def test_row_major_product_with_leading_dimensions(kind):
    """Every size is different, and the rows are longer than the matrices."""
    batch, m, n, k = 3, 5, 4, 7
    rng = np.random.default_rng(0)
    dtype = np.float16 if kind == FP16 else np.float32
    a = rng.integers(-4, 5, (batch, m, 9)).astype(dtype)
    b = rng.integers(-4, 5, (batch, k, 6)).astype(dtype)
    c = rng.integers(-4, 5, (batch, m, 8)).astype(np.float32)
    expected = c.copy()
    expected[:, :, :n] = 0.5 * (a[:, :, :k].astype(np.float32) @ b[:, :, :n]) + 2.0 * c[:, :, :n]
    library = Library()
    gemm_strided_batched(
        2**40 + 1, 77, (2**41, 2**33), (batch, m, n, k), (a.ctypes.data, kind, 9, m * 9), (b.ctypes.data, kind, 6, k * 6),
        (c.ctypes.data, FP32, 8, m * 8), 0.5, 2.0, 68, library,
    )  # fmt: skip
    np.testing.assert_array_equal(c, expected)
    assert (library.stream, library.workspace) == (77, (2**41, 2**33))
    assert library.rest == (2**40 + 1, 0, 0, 68, -1)


def test_a_refused_call_names_its_status():
    array = np.zeros((1, 1, 1), np.float32)
    one = (array.ctypes.data, FP32, 1, 1)
    with pytest.raises(
        CublasError, match="cublasGemmStridedBatchedEx failed with status 15; see cublasStatus_t"
    ):
        gemm_strided_batched(
            2**40 + 1, 0, (0, 0), (1, 1, 1, 1), one, one, one, 1.0, 0.0, 68, Library(status=15)
        )
    refusing = SimpleNamespace(cublasSetStream_v2=lambda *_: 1)
    with pytest.raises(CublasError, match="cublasSetStream failed with status 1"):
        gemm_strided_batched(2**40 + 1, 0, (0, 0), (1, 1, 1, 1), one, one, one, 1.0, 0.0, 68, refusing)
