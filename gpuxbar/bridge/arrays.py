"""Tensors as the arrays of the ops, without a copy: NumPy on a CPU, CuPy on a GPU.

PyTorch allocates, CuPy only views. Everything in `on_device` runs on PyTorch's device and current stream and takes its
memory from PyTorch, so a CUDA graph that is being captured owns it; autograd calls backward from threads of its own, so
every operator enters it anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpuxbar.launch import CudaDevice, Device, span

__all__ = ["array", "explain_gpu", "on_cpu", "on_device", "tensor"]


def on_cpu(t: Tensor) -> bool:
    """Whether a tensor lies there, for what a GPU leaves to PyTorch's functions."""
    return t.is_cpu


def on_device(t: Tensor, name: str) -> AbstractContextManager[Device | None]:
    """The device that the ops run on for a tensor; None is the CPU. On a GPU, a profiler sees a span of that name."""
    return ON_CPU if t.is_cpu else _on_gpu(t, name)


ON_CPU: AbstractContextManager[None] = nullcontext()


@contextmanager
def _on_gpu(t: Tensor, name: str) -> Iterator[Device]:
    if t.device.type != "cuda":
        raise NotImplementedError(
            f"gpuxbar: tensors must be on the CPU or a CUDA device, got {t.device}; call .cpu() or .cuda()"
        )
    import cupy

    def memory(size: int) -> Any:
        return _memory(torch.empty(size, dtype=torch.uint8, device=t.device))

    with (
        torch.cuda.device(t.device),
        cupy.cuda.Device(t.device.index),
        cupy.cuda.Stream.from_external(torch.cuda.current_stream()),
        cupy.cuda.using_allocator(memory),
        span(name),
    ):
        yield CudaDevice()


def array(t: Tensor) -> Any:
    """A view of a tensor, of a GPU's current device alone; of a contiguous copy if it is not contiguous."""
    t = (t.detach() if t.requires_grad else t).contiguous()
    if t.is_cpu:
        return t.numpy()
    import cupy

    if t.device.index != torch.cuda.current_device():
        raise ValueError(
            f"gpuxbar: tensors of one call must be on one device, got one on {t.device} and another on "
            f"cuda:{torch.cuda.current_device()}; move them by .to()"
        )
    # DLPack would give the same view, in ten times as long, and make streams wait that are one
    return cupy.ndarray(t.shape, _dtype(t.dtype), _memory(t))


def _memory(t: Tensor) -> Any:
    """Where the values of a contiguous tensor lie in a GPU's memory, for CuPy, which keeps the tensor."""
    import cupy

    return cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(t.data_ptr(), t.nbytes, t, t.device.index), 0)


@cache
def _dtype(kind: torch.dtype) -> np.dtype[Any]:
    return np.dtype(str(kind).removeprefix("torch."))


def explain_gpu() -> tuple[str, str]:
    """The backend of CUDA tensors, "cuda" or "none", and the reason."""
    if not torch.cuda.is_available():
        return "none", "PyTorch finds no usable GPU"
    try:
        import cupy

        count = cupy.cuda.runtime.getDeviceCount()
    except ImportError:
        return "none", "CuPy is not installed: pip install 'gpuxbar[cuda13]' or 'gpuxbar[cuda12]'"
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return "none", f"CuPy cannot use the driver: {error}"
    return "cuda", f"CuPy {cupy.__version__}, {count} GPU{'s' if count > 1 else ''}"


def tensor(a: Any) -> Tensor:
    """A view of an array."""
    return torch.from_numpy(a) if isinstance(a, np.ndarray) else torch.from_dlpack(a)
