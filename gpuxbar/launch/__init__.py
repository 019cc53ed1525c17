"""Compiling, finding and calling kernels; the only layer below the ops that touches a compiler or CuPy."""

from gpuxbar.launch.backend import Backend, backend, explain, host_library, is_cupy
from gpuxbar.launch.device import CudaDevice, Device, cuda_device
from gpuxbar.launch.host import address, elsewhere, host_call, library, set_threads, threads
from gpuxbar.launch.kernel import In, InOut, Kernel, Out, Scalar, Struct
from gpuxbar.launch.trace import span

__all__ = [
    "Backend",
    "CudaDevice",
    "Device",
    "In",
    "InOut",
    "Kernel",
    "Out",
    "Scalar",
    "Struct",
    "address",
    "backend",
    "cuda_device",
    "elsewhere",
    "explain",
    "host_call",
    "host_library",
    "is_cupy",
    "library",
    "set_threads",
    "span",
    "threads",
]
