"""The CUDA device as the ops see it: memory, kernel launches and batched products, through CuPy.

Everything runs on CuPy's current device and stream; nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Protocol

import numpy as np

from gpuxbar.launch.cubin import cubin
from gpuxbar.launch.cublas import gemm_strided_batched
from gpuxbar.launch.kernel import Array, Kernel
from gpuxbar.launch.trace import span

__all__ = ["CudaDevice", "Device", "Precision", "cuda_device"]

# Arithmetic of a product: (operand dtype, cuBLAS compute type); int16 holds the bits of bf16, which NumPy has not
Precision = {
    "fp32": ("float32", 68),
    "tf32": ("float32", 77),
    "fp16": ("float16", 68),
    "fp16x2": ("float16", 68),
    "bf16": ("int16", 68),
}
CUBLAS_WORKSPACE = (
    32 << 20
)  # bytes: what cuBLAS takes by default on Hopper, more than on any other architecture
_CUDA_TYPE = {"float32": 0, "float16": 2, "int16": 14}


class Device(Protocol):
    """What an op needs of a device; tests drive the same ops over a CPU build of the kernels.

    `workspace`: bytes that the partial sums of one call may take; larger batches go in chunks.
    `arch`, `multiprocessors`: compute capability ("sm_90") and size, for choosing among kernels.
    """

    workspace: int
    arch: str
    multiprocessors: int

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """An uninitialised C-contiguous array."""

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        """A C-contiguous array of zeros."""

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        values: Mapping[str, Any],
        macros: Mapping[str, int] | None = None,
        shared: int = 0,
    ) -> None:
        """Check the arguments and run a kernel compiled with these macros; `shared`: bytes of dynamic shared memory."""

    def matmul(
        self,
        a: Any,
        b: Any,
        c: Any,
        shape: tuple[int, int, int, int],
        strides: tuple[int, int, int],
        lds: tuple[int, int, int],
        alpha: float,
        beta: float,
        precision: str,
    ) -> None:
        """c[q] = alpha a[q] b[q] + beta c[q]; shape (batch, m, n, k), row-major with leading dimensions `lds`."""  # fmt: skip


class CudaDevice:
    """CuPy's current device. `empty` allocates by CuPy's current allocator unless another is given."""

    def __init__(self, empty: Callable[[tuple[int, ...], str], Any] | None = None, workspace: int = 64 << 20):
        import cupy

        self._cupy = cupy
        self.workspace = workspace
        self.empty = empty or cupy.empty
        self.arch, self.multiprocessors = _properties(cupy.cuda.runtime.getDevice())

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        array = self.empty(shape, dtype)
        array.fill(0)
        return array

    def launch(
        self, kernel: Kernel, grid: tuple[int, ...], block: tuple[int, ...], values: Mapping[str, Any],
        macros: Mapping[str, int] | None = None, shared: int = 0,
    ) -> None:  # fmt: skip
        arguments = kernel.bind(values)
        for name, value in zip(kernel.arguments, arguments, strict=True):
            # CuPy would pass the values of a NumPy array where the kernel takes an address
            array = isinstance(kernel.arguments[name], Array) and value is not None
            if array and not isinstance(value, self._cupy.ndarray):
                raise TypeError(
                    f"{kernel.name}: `{name}` must be a CuPy array, got {type(value).__name__}; move it by cupy.asarray"
                )
        kernel.check_grid(grid)
        if 0 in grid:  # CuPy would round an empty grid up to one block
            return
        function = _function(kernel.file, kernel.name, kernel.arch or self.arch, tuple(sorted((macros or {}).items())),
                             self._cupy.cuda.runtime.getDevice())  # fmt: skip
        if shared:  # with what a kernel declares it may be more than it gets unasked, 48 KB
            function.max_dynamic_shared_size_bytes = shared
        with span(kernel.name):
            function(
                grid, block, tuple(np.uintp(0) if a is None else a for a in arguments), shared_mem=shared
            )

    def matmul(
        self, a: Any, b: Any, c: Any, shape: tuple[int, int, int, int], strides: tuple[int, int, int],
        lds: tuple[int, int, int], alpha: float, beta: float, precision: str,
    ) -> None:  # fmt: skip
        from cupy.cuda import device, get_current_stream

        if 0 in shape[:3]:
            return
        dtype, compute = Precision[precision]
        kind = _CUDA_TYPE[dtype]
        left, right, out = (
            (array.data.ptr, of, ld, stride)
            for array, of, ld, stride in zip((a, b, c), (kind, kind, 0), lds, strides, strict=True)
        )
        handle, stream = device.get_cublas_handle(), get_current_stream().ptr
        scratch = self.empty(
            (CUBLAS_WORKSPACE,), "int8"
        )  # of this call's own, so that a CUDA graph owns it too
        gemm_strided_batched(
            handle,
            stream,
            (scratch.data.ptr, CUBLAS_WORKSPACE),
            shape,
            left,
            right,
            out,
            alpha,
            beta,
            compute,
        )


@cache
def _properties(ordinal: int) -> tuple[str, int]:
    """Architecture and multiprocessors of a device."""
    import cupy

    device = cupy.cuda.Device(ordinal)
    return f"sm_{device.compute_capability}", device.attributes["MultiProcessorCount"]


@cache
def _function(file: str, name: str, arch: str, macros: tuple[tuple[str, int], ...], ordinal: int) -> Any:
    """A loaded kernel; a module belongs to one device, hence `ordinal`."""
    import cupy

    del ordinal
    path, _ = cubin(file, arch, dict(macros))
    return cupy.RawModule(path=str(path)).get_function(name)


def cuda_device() -> CudaDevice:
    """The device that serves CuPy arrays."""
    return CudaDevice()
