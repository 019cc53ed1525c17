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
    """NVRTC of the pip packages if there, else the system's by name."""
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or [] if spec else []:
        found = sorted(Path(root).glob("*/lib/libnvrtc.so.*"), reverse=True)
        if found:
            return str(found[0])
    return "libnvrtc.so"


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
