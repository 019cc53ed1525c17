"""In every process on the stand-in (see __main__.py): what Python imports of CuPy, gpuxbar and PyTorch is led to it."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import sys
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path

LIBRARY = ctypes.CDLL(os.environ["STANDIN_LIBRARY"])

# What CuPy's headers and kernels take of CUDA beyond what gpuxbar's do, and cuda_shim has not.
CUPY = """
#include <assert.h>
#include <math.h>
#include <stddef.h>
static inline unsigned short __float2half_rn(float x) { return shim::float_to_half(x); }
static inline float __half2float(unsigned short x) { return shim::half_to_float(x); }
#define __half_as_ushort(x) shim::bits(x)
#define __ushort_as_half(x) shim::unbits<half>(x)
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline long long __double_as_longlong(double x) { return shim::bits(x); }
static inline double __longlong_as_double(long long x) { return shim::unbits<double>(x); }
"""
COMPLEX = "#include <cupy/complex.cuh>\n"  # would bring headers of CUDA that define what cuda_shim does


class Resolved(ctypes.Structure):
    """Where a kernel is built, and how many threads a block of it may have."""

    _fields_ = (("library", ctypes.c_char * 4096), ("threads", ctypes.c_int))


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Resolved))
def resolve(image, name, found):
    """A kernel of an image, "standin PATH" with what to build in that file; 0 if there is none."""
    try:
        name, path = name.decode(), Path(image.decode().split(" ", 1)[1])
        library, text = build(name, **json.loads(path.read_text()))
    except Exception as error:
        print(f"standin: {name}: {error}", file=sys.stderr)
        return 0
    bounds = re.search(rf"__launch_bounds__\((\d+)[^)]*\)\s*(?:CLUSTERED\s*)?{name}\(", text)
    found.contents.library, found.contents.threads = str(library).encode(), int(bounds[1]) if bounds else 1024
    return 1


def build(name, file=None, macros=None, source="", options=()):
    """The library of a kernel of gpuxbar's, by its file and macros, or of one that CuPy wrote; and its text."""
    import cuda_shim

    from gpuxbar.launch.sources import kernel_dir

    if file:
        return cuda_shim.build(file, name, macros), (kernel_dir() / file).read_text()
    shim = "".join(f'#include "{cuda_shim.HERE / part}.hpp"\n' for part in ("tensor", "halves"))
    text = f"{shim}{CUPY}{source.replace(COMPLEX, '')}\nSHIM_EXPORT({name}, {name})\n"
    flags = ["-O1", "-w", *options, f"-DKEY=0x{hashlib.sha256(text.encode()).hexdigest()[:16]}"]
    return cuda_shim._compile(name[:40], text, [], flags, cuda_shim._runtime("tensor", ())), text


def patch_gpuxbar(device):
    """Kernels are compiled by NVRTC as ever, but others than these are loaded."""
    compile_by_nvrtc = device.cubin

    def cubin(file, arch, macros):
        path, log = compile_by_nvrtc(file, arch, macros)
        described = path.with_suffix(".standin")
        described.write_text(json.dumps({"file": file, "macros": macros}))
        return described, log

    device.cubin = cubin


def patch_cublas(cublas):
    """Its library is found as ever, but another is called."""
    find = cublas._library
    cublas._library = lambda: find() and LIBRARY


def patch_cupy(compiler):
    def compiled(source, options=(), *_, **__):
        from gpuxbar.launch.sources import cached

        kept = [option for option in options if option.startswith(("-I", "-D"))]
        text = json.dumps({"source": source, "options": kept})
        path = cached(f"cupy-{hashlib.sha256(text.encode()).hexdigest()[:20]}.standin")
        path.write_text(text)
        return f"standin {path}\0".encode(), {}

    compiler._compile_using_nvrtc_no_warning = compiled


def patch_torch(_):
    from operators_on_the_host import replace_operators

    replace_operators(LIBRARY)


PATCHES = {
    "gpuxbar.launch.device": patch_gpuxbar, "gpuxbar.launch.cublas": patch_cublas, "cupy.cuda.compiler": patch_cupy, "torch": patch_torch,
}  # fmt: skip


class Finder:
    """Finds CuPy's runtime as it was compiled for this, and patches modules once they are imported."""

    def find_spec(self, name, path=None, target=None):
        if name == "cupy_backends.cuda.api.runtime":
            return spec_from_file_location(name, os.environ["STANDIN_RUNTIME"])
        patch = PATCHES.pop(name, None)
        if patch is None:
            return None
        spec = find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            patch(module)

        spec.loader.exec_module = exec_module
        return spec


LIBRARY.standin_resolve_by(resolve)
sys.meta_path.insert(0, Finder())
