"""The PTX that NVRTC makes of the kernels, on the CPU: `PtxDevice` is a `ShimDevice` that reads it and runs it.

What g++ never sees of a kernel is in it: the texts and operands of inline assembly, how parameters, vectors and shared
memory are laid out, and what the compiler moved. ptx.cpp says which faults are errors and what is not modelled.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np

import cuda_shim
from cuda_shim import HERE, ShimDevice, _compile
from gpuxbar.launch import CudaDevice
from gpuxbar.launch import device as device_module
from gpuxbar.launch.cubin import closure, options
from gpuxbar.launch.kernel import Array
from gpuxbar.launch.nvrtc import compile_cuda


def ptx(file, arch, macros):
    """The PTX of a kernel file, from the compiler's step before the cubin, by the very options."""
    root = cuda_shim.kernel_dir()
    texts = tuple(path.read_bytes() for path in closure(root / file, root / "include"))
    return _ptx(file, arch, tuple(sorted(macros.items())), root, texts)


@cache
def _ptx(file, arch, macros, root, texts):
    del texts  # of the file and all that it includes
    flags = [
        flag.replace("-arch=sm_", "-arch=compute_")
        for flag in options(arch, dict(macros))
        if "ptxas" not in flag
    ]
    text, _ = compile_cuda((root / file).read_text(), file, [*flags, f"-I{root / 'include'}"], "PTX")
    return text.rstrip(b"\0").decode()


@cache
def _library():
    parts = [HERE / f"{part}.cpp" for part in ("block", "tensor", "hopper", "ptx")]
    text = "".join(f'#include "{part}"\n' for part in parts)
    library = ctypes.CDLL(str(_compile("ptx", text, [*parts, *sorted(HERE.glob("*.hpp"))], ["-O1"])))
    library.ptx_load.restype = ctypes.c_void_p
    library.ptx_inlined.restype = library.ptx_counted.restype = ctypes.c_char_p
    return library


@dataclass(frozen=True)
class Counted:
    """An instruction of a launch: how often warps executed it, and lanes came to it; the array that it touches, the sectors of
    32 bytes or wavefronts of shared memory that it takes, and the fewest for as many bytes. See counts.hpp."""

    text: str
    warps: int
    lanes: int
    array: int
    sectors: int
    fewest_sectors: int
    waves: int
    fewest_waves: int


class Program:
    """One kernel of a text of PTX, ready to run; `approximate`: whether it has instructions that are."""

    def __init__(self, text, name):
        self.name, error = name, ctypes.create_string_buffer(512)
        self._at = _library().ptx_load(text.encode(), name.encode(), error, ctypes.c_size_t(512))
        if self._at is None:
            raise RuntimeError(f"{name}: {error.value.decode()}")
        self._at = ctypes.c_void_p(self._at)
        self.approximate = ".approx" in text.split(f".entry {name}(")[1].split(".entry ")[0]

    def launch(self, grid, block, shared, most_shared, values, arrays, order, eager):
        """`values`: the parameters' bytes; `arrays`: (address, bytes, of which an item, whether written) of what may be touched."""
        sizes = [(ctypes.c_uint * 3)(*(*size, 1, 1)[:3]) for size in (grid, block)]
        lengths = (ctypes.c_size_t * len(values))(*map(len, values))
        pointers = (ctypes.c_char_p * len(values))(*values)
        table = np.array([(at, at + size, item, written) for at, size, item, written in arrays], np.uint64)
        error = ctypes.create_string_buffer(512)
        if _library().ptx_launch(
            self._at, *sizes, ctypes.c_size_t(shared), ctypes.c_size_t(most_shared), ctypes.c_size_t(len(values)),
            pointers, lengths, ctypes.c_size_t(len(arrays)), ctypes.c_void_p(table.ctypes.data),
            ctypes.c_uint64(order), ctypes.c_int(eager), error, ctypes.c_size_t(512),
        ):  # fmt: skip
            raise RuntimeError(f"{self.name}: {error.value.decode()}")

    def counting(self, whether):
        """Whether launches are counted from now on; the next ones one after the other."""
        _library().ptx_count(self._at, ctypes.c_int(whether))

    def counted(self):
        """Every instruction."""
        numbers, found = (ctypes.c_uint64 * 7)(), []
        while (text := _library().ptx_counted(self._at, ctypes.c_size_t(len(found)), numbers)) is not None:
            found.append(Counted(text.decode(), *numbers))
        return found

    def inlined(self):
        """(text, whether it has been run) of every piece of inline assembly."""
        ran, found = ctypes.c_int(), []
        while (
            text := _library().ptx_inlined(self._at, ctypes.c_size_t(len(found)), ctypes.byref(ran))
        ) is not None:
            found.append((text.decode(), bool(ran.value)))
        return found


_program = cache(Program)


class PtxDevice(ShimDevice):
    """Launches as `CudaDevice` does, down to the parameters that it passes.

    `programs`: what has been launched. `counts`: whether its accesses to memory are counted; then `counted` has, for every
    launch, its kernel, its macros, its instructions and the names of its arrays.
    """

    _cupy = SimpleNamespace(
        ndarray=np.ndarray, cuda=SimpleNamespace(runtime=SimpleNamespace(getDevice=lambda: 0))
    )

    def __init__(self, *args, counts=False, **settings):
        super().__init__(*args, **settings)
        self.programs, self.counts, self.counted = [], counts, []

    def launch(self, kernel, grid, block, values, macros=None, shared=0):
        self.launches.append(kernel.name)
        self.macros.append(macros or {})
        self.grids.append(grid)

        def function(file, name, arch, macros, ordinal):
            del ordinal
            it = _program(ptx(file, arch, dict(macros)), name)
            self.programs.append(it)
            return _Function(it, self, kernel)

        with patch.object(device_module, "_function", function):
            CudaDevice.launch(self, kernel, grid, block, values, macros, shared)


class _Function:
    """Stands in for CuPy's: an array goes as its address, a number or a struct as its bytes."""

    def __init__(self, program, device, kernel):
        self.program, self.device, self.kernel = program, device, kernel
        self.max_dynamic_shared_size_bytes = 0

    def __call__(self, grid, block, arguments, shared_mem):
        values, arrays, names = [], [], []
        for (name, declared), value in zip(self.kernel.arguments.items(), arguments, strict=True):
            if isinstance(declared, Array) and isinstance(value, np.ndarray):
                values.append(np.uint64(value.ctypes.data).tobytes())
                arrays.append((value.ctypes.data, value.nbytes, value.itemsize, declared.written))
                names.append(name)
            else:
                values.append(value.tobytes())
        if self.device.counts:
            self.program.counting(True)
        self.program.launch(
            grid, block, shared_mem, self.max_dynamic_shared_size_bytes, values, arrays, self.device.order, self.device.eager
        )  # fmt: skip
        if self.device.counts:
            self.device.counted.append(
                (self.kernel.name, self.device.macros[-1], self.program.counted(), names)
            )
            self.program.counting(False)
