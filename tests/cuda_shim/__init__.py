"""The CUDA kernels on the CPU: `ShimDevice` is a `launch.Device` over NumPy arrays and a C++ build of the `.cu` files."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

from gpuxbar.launch.sources import cached, kernel_dir, once

HERE = Path(__file__).parent
FLAGS = (
    "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=off", "-fno-strict-aliasing", "-march=native",
    "-fvisibility=hidden", "-fno-gnu-unique", "-fno-extern-tls-init", "-Wno-unknown-pragmas", "-Wno-attributes",
)  # fmt: skip
SANITIZE = (
    "-fsanitize=address,bounds,alignment,shift,integer-divide-by-zero,signed-integer-overflow",
    "-fno-sanitize-recover=all",
    "-g1",  # lines
)
FORWARD, REVERSE = 0, 1  # thread orders; above 1: seeds of random ones


def build(file, name, macros, flags=()):
    """Path of the shared library of one kernel file and set of macros."""
    root = kernel_dir()
    kernel = root / file
    twins = "hopper" if "wgmma.cuh" in kernel.read_text() else "tensor"
    text = f'#include "{HERE / twins}.hpp"\n#include "{kernel}"\nSHIM_EXPORT({name}, gpuxbar::{name})\n'
    sources = sorted([kernel, *HERE.glob("*.hpp"), *(root / "include" / "gpuxbar").glob("*.cuh")])
    defines = [f"-D{key}={value}" for key, value in sorted(macros.items())]
    return _compile(name, text, sources, ["-O1", *flags, *defines], _runtime(twins, flags))


@cache
def _runtime(twins, flags):
    """Path of the shared library of what runs kernels."""
    parts = [HERE / f"{part}.cpp" for part in ("block", "tensor", "hopper")[: 2 + (twins == "hopper")]]
    text = "".join(f'#include "{part}"\n' for part in parts)
    return _compile(twins, text, [*parts, *sorted(HERE.glob("*.hpp"))], ["-O2", *flags])


def _compile(name, text, sources, flags, library=None):
    """Path of the shared library of a text, which includes the sources and needs another library."""
    command = [os.environ.get("CXX", "g++"), *FLAGS, *flags]
    what = (command, name, library and library.name)  # not where the files lie
    key = hashlib.sha256(repr(what).encode())
    for path in sources:
        key.update(path.read_bytes())
    target = cached(f"shim-{name}-{key.hexdigest()[:20]}.so")

    def make():
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            source, built = Path(scratch) / f"{name}.cpp", Path(scratch) / target.name
            source.write_text(text)
            links = [f"-Wl,-soname,{target.name}", "-Wl,-rpath,$ORIGIN", *([str(library)] if library else [])]
            # sanitizers are not for g++
            environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
            done = subprocess.run(
                [*command, f"-I{kernel_dir() / 'include'}", "-o", str(built), str(source), *links],
                capture_output=True, text=True, env=environment, check=False,
            )  # fmt: skip
            if done.returncode:
                raise RuntimeError(done.stderr)
            os.replace(built, target)

    return once(target, make)


def tf32(x):
    """Finite numbers rounded to 11 significant bits, to nearest, as tensor cores take float32 operands."""
    return ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def bf16(bits):
    """The numbers whose upper halves are given."""
    return (bits.astype(np.uint16).astype(np.uint32) << 16).view(np.float32)


class ShimDevice:
    """Runs kernels on the CPU in a given thread order; products in float64, of rounded operands for "tf32". New memory holds NaN.

    `eager`: asynchronous copies land at the earliest moment, else at the latest. `arch` and `multiprocessors` are
    what the planner of `ops.tile_mvm` sees.
    """

    def __init__(
        self, order=FORWARD, flags=(), workspace=1 << 26, *, eager=False, arch="sm_90", multiprocessors=4
    ):
        self.order, self.flags, self.workspace = order, flags, workspace
        self.launches, self.macros, self.grids = [], [], []
        self.eager, self.arch, self.multiprocessors = eager, arch, multiprocessors

    def empty(self, shape, dtype):
        array = np.empty(shape, dtype)
        array.view(np.uint8).fill(0xFF)
        return array

    def zeros(self, shape, dtype):
        array = self.empty(shape, dtype)
        array.fill(0)
        return array

    def launch(self, kernel, grid, block, values, macros=None, shared=0):
        arguments = kernel.bind(values)
        self.launches.append(kernel.name)
        self.macros.append(macros or {})
        self.grids.append(grid)
        kernel.check_grid(grid)
        text = (kernel_dir() / kernel.file).read_text()
        threads = re.search(
            rf"__launch_bounds__\((\d+)[^)]*\)\s*(?:CLUSTERED\s*)?{kernel.name}\(", text
        ).group(1)
        assert np.prod(block) <= int(threads), (kernel.name, block)
        assert grid[0] % (macros or {}).get("CLUSTER", 1) == 0, (kernel.name, grid)
        assert shared <= 227 << 10, (kernel.name, shared)  # what a block of Hopper's may have
        if 0 in grid:
            return
        library = ctypes.CDLL(str(build(kernel.file, kernel.name, macros or {}, self.flags)))
        signature = library[f"shim_sig_{kernel.name}"]
        signature.restype = ctypes.c_char_p
        wanted = signature().decode().rstrip(",").split(",")
        assert len(wanted) == len(arguments), (kernel.name, len(wanted), len(arguments))
        keep = []
        for code, name, value in zip(wanted, kernel.arguments, arguments, strict=True):
            got = value.dtype.kind.replace("V", "s") + str(value.dtype.itemsize) if value is not None else ""
            if code[0] == "*":
                assert value is None or code[1:] == got.replace("f2", "u2"), (kernel.name, name, code, got)
                keep.append(ctypes.c_void_p(None if value is None else value.ctypes.data))
            else:
                assert code == got, (kernel.name, name, code, got)
                keep.append((ctypes.c_char * value.dtype.itemsize).from_buffer_copy(value.tobytes()))
        pointers = (ctypes.c_void_p * len(keep))(*(ctypes.addressof(k) for k in keep))
        sizes = [(ctypes.c_uint * 3)(*(*size, 1, 1)[:3]) for size in (grid, block)]
        error = ctypes.create_string_buffer(512)
        launch = library[f"shim_launch_{kernel.name}"]
        order, eager = ctypes.c_uint64(self.order), ctypes.c_int(self.eager)
        if launch(*sizes, ctypes.c_size_t(shared), pointers, order, eager, error, ctypes.c_size_t(512)):
            raise RuntimeError(f"{kernel.name}: {error.value.decode()}")

    def matmul(self, a, b, c, shape, strides, lds, alpha, beta, precision):
        batch, m, n, k = shape

        def view(array, rows, cols, ld, stride):
            item = array.itemsize
            last = (batch - 1) * stride + (rows - 1) * ld + cols
            assert 0 in (batch, rows, cols) or last <= array.size, "operand ends outside its array"
            return np.lib.stride_tricks.as_strided(
                array, (batch, rows, cols), (stride * item, ld * item, item)
            )

        left, right = view(a, m, k, lds[0], strides[0]), view(b, k, n, lds[1], strides[1])
        out = view(c, m, n, lds[2], strides[2])
        if precision == "tf32":
            left, right = tf32(left), tf32(right)
        elif precision == "bf16":
            left, right = bf16(left), bf16(right)
        product = np.matmul(left.astype(np.float64), right.astype(np.float64))
        out[...] = alpha * product + (beta * out if beta else 0.0)
