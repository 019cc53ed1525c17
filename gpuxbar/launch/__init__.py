"""Compiling, finding and calling kernels; the only layer below the ops that touches a compiler or CuPy."""

from gpuxbar.launch.backend import Backend, backend, explain, is_cupy
from gpuxbar.launch.host import host_call, library

__all__ = ["Backend", "backend", "explain", "host_call", "is_cupy", "library"]
