"""Batched products by cuBLAS's C interface, through ctypes.

CuPy's own wrapper refuses every call while its stream is being captured into a CUDA graph; the library itself does not.
Coefficients are read from the host when a call is made, so a graph keeps their values.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_longlong, c_size_t, c_void_p
from functools import cache
from typing import Any

__all__ = ["CublasError", "gemm_strided_batched"]

_OPERAND = (c_void_p, c_int, c_int, c_longlong)  # address, cudaDataType, leading dimension, stride
_GEMM = (c_void_p, *(c_int,) * 5, c_void_p, *_OPERAND, *_OPERAND, c_void_p, *_OPERAND, *(c_int,) * 3)
_DEFAULT_ALGORITHM = -1


class CublasError(RuntimeError):
    """cuBLAS refused a call; the text holds its status."""


def gemm_strided_batched(
    handle: int, stream: int, workspace: tuple[int, int], shape: tuple[int, int, int, int], a: tuple[int, int, int, int],
    b: tuple[int, int, int, int], c: tuple[int, int, int, int], alpha: float, beta: float, compute: int,
    library: Any = None,
) -> None:  # fmt: skip
    """c[q] = alpha a[q] b[q] + beta c[q], row-major; shape (batch, m, n, k).

    `workspace`: (address, bytes) of device memory for this call. cuBLAS's own is shared by all streams of a handle, and in
    a graph that is being captured would become a node of it. `a`, `b`, `c`: (address, cudaDataType, leading dimension,
    stride between the matrices of the batch).
    """
    library = library or _library()
    batch, m, n, k = shape
    factors = (c_float * 2)(alpha, beta)
    alpha_at = ctypes.addressof(factors)
    _require(library.cublasSetStream_v2(c_void_p(handle), c_void_p(stream)), "cublasSetStream")
    address, size = workspace
    _require(
        library.cublasSetWorkspace_v2(c_void_p(handle), c_void_p(address), c_size_t(size)),
        "cublasSetWorkspace",
    )
    # row-major c = a b is column-major c^T = b^T a^T
    arguments = (
        handle,
        0,
        0,
        n,
        m,
        k,
        alpha_at,
        *b,
        *a,
        alpha_at + 4,
        *c,
        batch,
        compute,
        _DEFAULT_ALGORITHM,
    )
    function = library.cublasGemmStridedBatchedEx
    typed = (kind(value) for kind, value in zip(_GEMM, arguments, strict=True))
    _require(function(*typed), "cublasGemmStridedBatchedEx")


def _require(status: int, name: str) -> None:
    if status:
        raise CublasError(
            f"{name} failed with status {status}; see cublasStatus_t in the cuBLAS documentation"
        )


@cache
def _library() -> ctypes.CDLL:
    """The library that CuPy has loaded."""
    from cuda import pathfinder  # type: ignore[import-not-found,import-untyped,unused-ignore]

    return ctypes.CDLL(pathfinder.load_nvidia_dynamic_lib("cublas").abs_path)
