"""Which of the three backends an array runs on, and why."""

from __future__ import annotations

from ctypes import CDLL
from typing import Any, Literal

import numpy as np

from gpuxbar.launch import host

__all__ = ["Backend", "backend", "explain", "host_library", "is_cupy"]

Backend = Literal["cuda", "host", "reference"]


def is_cupy(array: Any) -> bool:
    """Whether an array is CuPy's, without importing CuPy."""
    return type(array).__module__.split(".")[0] == "cupy"


def backend(array: Any) -> Backend:
    """The backend that serves an array: CuPy -> cuda; NumPy -> host, or reference without a compiler.

    The environment variable GPUXBAR_BACKEND=reference, set before gpuxbar is imported, sends NumPy arrays to the reference.
    """
    if is_cupy(array):
        return "cuda"
    if not isinstance(array, np.ndarray):
        raise TypeError(
            f"gpuxbar: `array` must be a NumPy or CuPy array, got {type(array).__name__}; convert it first"
        )
    return "host" if host_library() is not None else "reference"


def host_library() -> CDLL | None:
    """The library that serves NumPy arrays and tensors of the CPU; None: the reference does."""
    return host.library() if host.WANTED == "host" or not _wants_reference() else None


def explain() -> tuple[Backend, str]:
    """The backend of NumPy arrays and CPU tensors, and the reason."""
    if _wants_reference():
        return "reference", "GPUXBAR_BACKEND=reference is set"
    lib = host.library()
    if lib is None:
        return "reference", "no C++ compiler was found"
    threads = f"threads: {host.threads()}" if lib.gpuxbar_openmp() else "one thread, for want of OpenMP"
    return "host", f"host kernels built with {host.compiler()}; {threads}"


def _wants_reference() -> bool:
    """Whether GPUXBAR_BACKEND asks for the reference."""
    if host.WANTED not in ("host", "reference"):
        raise ValueError(
            f"gpuxbar: `GPUXBAR_BACKEND` must be reference or host, got {host.WANTED!r}; unset it for host kernels, and the reference "
            "where there is no compiler"
        )
    return host.WANTED == "reference"
