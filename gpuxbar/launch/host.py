"""The host backend's shared library: `kernels/host/*.cpp`, built on first use with the system compiler.

The cache key covers sources, headers, flags and compiler, so an edited header never runs stale code.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from gpuxbar.launch.nvrtc import CompileError
from gpuxbar.launch.sources import cache_dir, kernel_dir, once

__all__ = ["address", "build", "compiler", "host_call", "library", "set_threads"]

FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fopenmp",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-shared",
    "-Wno-unknown-pragmas",
    "-Wno-ignored-attributes",
    "-Wno-psabi",
)


def compiler() -> str | None:
    """Path of the C++ compiler: `$CXX` if set, else g++, else clang++; None without one."""
    wanted = os.environ.get("CXX")
    if wanted and shutil.which(wanted) is None:
        raise CompileError(
            f"host kernels: `CXX` must be the name or path of a C++ compiler, got {wanted!r}, which is not found; "
            "unset it to use g++ or clang++"
        )
    candidates = (wanted,) if wanted else ("g++", "clang++")
    return next((path for name in candidates if (path := shutil.which(name))), None)


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The loaded library, or None (one warning) where there is no compiler: the reference then serves."""
    cxx = compiler()
    if cxx is None:
        warnings.warn(
            "gpuxbar found no C++ compiler: NumPy and CPU tensors run on the slow float64 reference; "
            "install g++ or set CXX",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return ctypes.CDLL(str(build(cxx)))


def build(cxx: str, flags: tuple[str, ...] = FLAGS) -> Path:
    """Compile the host kernels unless a build of the same sources, flags, compiler and CPU is cached."""
    root = kernel_dir()
    sources = sorted((root / "host").glob("*.cpp"))
    headers = sorted([*(root / "host").glob("*.hpp"), *(root / "include" / "gpuxbar").glob("*.cuh")])
    # the predefined macros name the compiler's version and every instruction set of this CPU that it would use
    command = [cxx, *flags, "-dM", "-E", "-x", "c++", os.devnull]
    macros = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    key = hashlib.sha256("\0".join([macros, *flags]).encode())
    for path in (*sources, *headers):
        key.update(path.name.encode() + b"\0" + path.read_bytes())
    target = cache_dir() / f"host-{key.hexdigest()[:24]}.so"
    return once(target, lambda: _build(cxx, flags, sources, target))


def _build(cxx: str, flags: tuple[str, ...], sources: list[Path], target: Path) -> None:
    """Compile the sources side by side and link them."""
    with (
        tempfile.TemporaryDirectory(dir=target.parent) as scratch,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        compiling = [cxx, *flags, f"-I{kernel_dir() / 'include'}", "-c"]
        for _ in pool.map(lambda s, o: _run([*compiling, str(s), "-o", str(o)]), sources, objects):
            pass  # an error of any is raised here
        built = Path(scratch) / target.name
        _run([cxx, *flags, *map(str, objects), "-o", str(built)])
        os.replace(built, target)


def _run(command: list[str]) -> None:
    """Run a compiler."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(
            f"host kernels: {command[0]} failed with status {done.returncode}; "
            f"set CXX to a C++17 compiler with OpenMP\n{done.stderr}"
        )


def host_call(lib: ctypes.CDLL | None, name: str, *args: object) -> None:
    """Call a host kernel: arrays go as pointers, None as a null pointer, integers as int64, floats as double."""
    assert lib is not None  # else `backend` had chosen the reference
    function = getattr(lib, name)
    if function.argtypes is None:
        function.restype, function.argtypes = None, [_c_type(arg) for arg in args]
    function(*[_c_value(arg) for arg in args])


def address(array: np.ndarray) -> int:
    """Where the values of a C-contiguous array lie."""
    try:  # several times as fast as `ctypes`
        return ctypes.addressof(ctypes.c_char.from_buffer(array))  # type: ignore[arg-type]
    except (TypeError, ValueError):  # not to be written to, or empty
        return array.ctypes.data


def _c_type(arg: object) -> Any:
    if arg is None or isinstance(arg, np.ndarray):
        return ctypes.c_void_p
    return ctypes.c_double if isinstance(arg, float) else ctypes.c_int64


def _c_value(arg: Any) -> Any:
    if isinstance(arg, np.ndarray):
        return address(arg)
    return arg if arg is None or isinstance(arg, float) else int(arg)


def set_threads(count: int) -> None:
    """Threads of the host kernels called from this thread; results do not depend on it."""
    lib = library()
    if lib is not None:
        lib.omp_set_num_threads(ctypes.c_int(count))
