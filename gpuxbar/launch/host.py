"""The host backend's shared library: `kernels/host/*.cpp`, built on first use with the system compiler.

The cache key covers sources, headers, flags and all that the compiler says of itself, its libraries and this CPU, so that
neither an edited header runs stale code nor a CPU the code of another that shares the cache.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from gpuxbar.launch.nvrtc import CompileError
from gpuxbar.launch.sources import UNFINISHED, cached, kernel_dir, once

__all__ = ["address", "build", "compiler", "elsewhere", "host_call", "library", "set_threads", "threads"]

WANTED = os.environ.get("GPUXBAR_BACKEND") or "host"  # looked at once: every read of a layer asks
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native" if platform.machine().lower() in ("x86_64", "amd64") else "-mcpu=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-Wno-unknown-pragmas",
    "-Wno-ignored-attributes",
    "-Wno-psabi",
)
# without OpenMP's library, which Apple's compiler has not, kernels run on one thread
THREADS = ("-fopenmp", "-fopenmp-simd")
ABOUT = """
#include <cstddef>
#if defined(_OPENMP)
#include <omp.h>
#endif
"""
PLAIN = {int, float, bool, NoneType}
IN_MEMORY = (ctypes.Structure, ctypes.Array, ctypes.c_int64, ctypes.c_double)
ROOM = 16 << 20  # bytes, several times those of a build


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
    path = build(cxx)
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise CompileError(
            f"host kernels: what {cxx} built must load into this Python, got {error}; "
            "set CXX to a compiler of this Python's environment, or GPUXBAR_CACHE to a folder of your own if it may not be read"
        ) from error
    lib.gpuxbar_openmp.restype = lib.gpuxbar_threads.restype = ctypes.c_int64
    if not lib.gpuxbar_openmp():
        warnings.warn(
            f"gpuxbar found no OpenMP with {cxx}: NumPy and CPU tensors run on one thread; "
            "install its library (libomp) or set CXX to a compiler that has it",
            RuntimeWarning,
            stacklevel=2,
        )
    if hasattr(os, "register_at_fork"):  # else a forked process waits forever for threads that it has not
        os.register_at_fork(before=lib.gpuxbar_end_threads)
    return lib


def build(cxx: str, more: tuple[str, ...] = ()) -> Path:
    """Compile the host kernels, with `more` flags and then those of `$GPUXBAR_CXXFLAGS`, unless such a build is cached."""
    root = kernel_dir()
    sources = sorted((root / "host").glob("*.cpp"))
    headers = sorted([*(root / "host").glob("*.hpp"), *(root / "include" / "gpuxbar").glob("*.cuh")])
    command, macros = _command(cxx, (*more, *shlex.split(os.environ.get("GPUXBAR_CXXFLAGS", ""))))
    key = hashlib.sha256("\0".join([macros, *command[1:]]).encode())
    for path in (*sources, *headers):
        key.update(path.name.encode() + b"\0" + path.read_bytes())
    target = cached(f"host-{key.hexdigest()[:24]}.so")
    return once(target, lambda: _build(command, sources, target))


def _command(cxx: str, more: tuple[str, ...]) -> tuple[list[str], str]:
    """The compiler with flags that it takes, with OpenMP if it can, and the macros that it then defines.

    They name its version, those of its libraries, and every instruction set of this CPU that it would use.
    """
    for threads in THREADS:
        command = [cxx, *FLAGS, threads, *more]
        done = subprocess.run(
            [*command, "-dM", "-E", "-x", "c++", "-"],
            input=ABOUT,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            return command, done.stdout
    raise CompileError(_refusal(command, done))


def _build(command: list[str], sources: list[Path], target: Path) -> None:
    """Compile the sources side by side and link them."""
    with (
        tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=target.parent) as scratch,
        ThreadPoolExecutor(_processors()) as pool,
    ):
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        compiling = [command[0], f"-I{kernel_dir() / 'include'}", *command[1:], "-c"]
        try:
            for _ in pool.map(lambda s, o: _run([*compiling, str(s), "-o", str(o)]), sources, objects):
                pass  # an error of any is raised here
            built = Path(scratch) / target.name
            _run([command[0], "-shared", *map(str, objects), *command[1:], "-o", str(built)])
        except CompileError:
            (Path(scratch) / "room").write_bytes(
                bytes(ROOM)
            )  # the compiler's message may not tell that there is none
            raise
        os.replace(built, target)


def _processors() -> int:
    """How many processors this process may use, where the system tells: on a shared machine fewer than it has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(command: list[str]) -> None:
    """Run a compiler."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(_refusal(command, done))


def _refusal(command: list[str], done: subprocess.CompletedProcess[str]) -> str:
    return (
        f"host kernels: {command[0]} failed with status {done.returncode}; "
        f"set CXX to g++ 11 or clang++ 14 or later, GPUXBAR_CXXFLAGS to flags that it lacks\n{done.stderr}"
    )


def host_call(lib: ctypes.CDLL | None, name: str, *args: object) -> int:
    """Call a host kernel: arrays, structs, counters and sums go as pointers, None as a null pointer, integers as int64 or
    addresses, floats as double. Returns the int64 that the kernel gives, if it gives one."""
    assert lib is not None  # else `backend` had chosen the reference
    function = getattr(lib, name)
    if function.argtypes is None:
        # integers of 64 bits go as pointers do, and one kernel takes arrays of one call and addresses or None of the next
        kinds = [ctypes.c_double if isinstance(arg, float) else ctypes.c_void_p for arg in args]
        function.restype, function.argtypes = ctypes.c_int64, kinds
    found: int = function(*[arg if type(arg) in PLAIN else _c_value(arg) for arg in args])
    return found


def address(array: np.ndarray) -> int:
    """Where the values of a C-contiguous array lie."""
    try:  # several times as fast as `ctypes`
        return ctypes.addressof(ctypes.c_char.from_buffer(array))  # type: ignore[arg-type]
    except (TypeError, ValueError):  # not to be written to, or empty
        if not isinstance(array, np.ndarray):
            raise elsewhere(array) from None
        return array.ctypes.data


def elsewhere(array: Any) -> TypeError:
    """What to raise of an array that is not NumPy's among those that are."""
    kind = type(array)
    return TypeError(
        f"gpuxbar: arrays must be all NumPy's or all CuPy's, got NumPy's and a {kind.__module__}.{kind.__name__}; "
        "move them by cupy.asarray or cupy.asnumpy"
    )


def _c_value(arg: Any) -> Any:
    if type(arg) is np.ndarray:
        return address(arg)
    if isinstance(arg, IN_MEMORY):
        return ctypes.byref(arg)
    return int(arg) if isinstance(arg, np.integer) else address(arg)


def set_threads(count: int) -> None:
    """Threads of the host kernels called from this thread; results do not depend on it."""
    lib = library()
    if lib is not None:
        host_call(lib, "gpuxbar_set_threads", count)


def threads() -> int:
    """How many threads host kernels called from this thread run on; 1 without OpenMP and on the reference."""
    lib = library()
    return 1 if lib is None else int(lib.gpuxbar_threads())
