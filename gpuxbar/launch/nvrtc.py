"""CUDA C++ to a cubin, or to PTX, through NVRTC, by ctypes: no GPU, driver, CuPy or CUDA header is needed.

We compile ourselves, and give CuPy only the cubin, because CuPy's own cache does not see edited headers, always
flushes denormals, and cannot target sm_90a.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Literal

__all__ = ["CompileError", "compile_cuda", "nvrtc_version"]


class CompileError(RuntimeError):
    """A compiler is not there or refused a kernel; the text is its log."""


def _library_path() -> str:
    """NVRTC of the pip packages: the newest, of those whose CUDA the driver loads if there are such. Else the system's, by name."""
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations or [] if spec else []
    found = [path for root in roots for path in Path(root).glob("*/lib/libnvrtc.so.*")]
    newest = _newest_cuda()
    loaded = [path for path in found if _cuda_of(path) <= newest]
    return str(max(loaded or found, key=_cuda_of, default="libnvrtc.so"))


def _cuda_of(path: Path) -> int:
    """The major version in libnvrtc.so.13."""
    return int(path.name.split(".")[2])


def _newest_cuda() -> int:
    """The newest major version that the driver knows; 0 without one, as where kernels are only compiled."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    return version.value // 1000


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    path = Path(_library_path())
    for builtins in path.parent.glob("libnvrtc-builtins.so*"):  # NVRTC 13.0 does not find them by itself
        ctypes.CDLL(str(builtins))
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise CompileError(
            "gpuxbar: NVRTC must be installed to compile CUDA kernels, found none; "
            "install the extra for your CUDA: pip install 'gpuxbar[cuda13]' or 'gpuxbar[cuda12]'"
        ) from error
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


@lru_cache(maxsize=1)
def nvrtc_version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def compile_cuda(
    source: str, name: str, options: list[str], form: Literal["CUBIN", "PTX"] = "CUBIN"
) -> tuple[bytes, str]:
    """Compile one source; returns it in a form, and the log (registers and spills with --ptxas-options=-v)."""
    library = _library()
    program = ctypes.c_void_p()
    status = library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
    if status:
        raise CompileError(f"{name}: {library.nvrtcGetErrorString(status).decode()}")
    try:
        texts = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = library.nvrtcCompileProgram(program, len(options), texts)
        log = _get(library, "ProgramLog", program).rstrip(b"\0").decode()
        if status:
            raise CompileError(f"{name}: {library.nvrtcGetErrorString(status).decode()}\n{log}")
        return _get(library, form, program), log
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _get(library: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    library[f"nvrtcGet{what}Size"](program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    library[f"nvrtcGet{what}"](program, text)
    return text.raw
