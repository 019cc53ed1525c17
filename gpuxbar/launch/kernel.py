"""Declared kernel signatures: order, dtype, axes and access of every argument, checked before any launch.

A raw kernel checks nothing: a Python float goes as a double, a transposed view is read as it lies, a missing
argument is read from whatever lies there. `Kernel.bind` makes each of these an error that names the argument;
a test compares every declaration with the text of its `.cu` file.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

GRID = (2**31 - 1, 65535, 65535)  # blocks along each axis that CUDA can launch

__all__ = ["Array", "In", "InOut", "Kernel", "Out", "Scalar", "Struct"]


@dataclass(frozen=True)
class Array:
    """An array argument: dtypes the macros choose among, named axes, whether it may be absent (null)."""

    dtype: str
    axes: str = ""
    optional: bool = False
    written: bool = False

    @cached_property
    def dtypes(self) -> tuple[np.dtype[Any], ...]:
        return tuple(np.dtype(name) for name in self.dtype.split("|"))

    @cached_property
    def names(self) -> list[str]:
        """Of the axes; none where they are not looked at."""
        return self.axes.split()


def In(dtype: str, axes: str = "", optional: bool = False) -> Array:
    """A C-contiguous array that is only read."""
    return Array(dtype, axes, optional)


def Out(dtype: str, axes: str = "", optional: bool = False) -> Array:
    """A C-contiguous array that is written."""
    return Array(dtype, axes, optional, written=True)


InOut = Out


@dataclass(frozen=True)
class Scalar:
    """A number passed by value, cast to the declared dtype."""

    dtype: str

    @cached_property
    def cast(self) -> Callable[[Any], Any]:
        kind = np.dtype(self.dtype)
        size = 2 ** (8 * kind.itemsize)
        return (lambda value: kind.type(int(value) % size)) if kind.kind == "u" else kind.type


@dataclass(frozen=True)
class Struct:
    """A C struct passed by value: its name in C and its twin, an instance of which is the argument."""

    dtype: str
    twin: type[ctypes.Structure]


class Kernel:
    """One `extern "C"` kernel of `kernels/<file>`, named as the file unless `name` says otherwise.

    `arch`: the only architecture it is for, where that is not the device's own name ("sm_90a" for "sm_90").
    """

    def __init__(
        self, file: str, *, name: str | None = None, arch: str | None = None, **arguments: Array | Scalar | Struct
    ):  # fmt: skip
        self.file, self.name, self.arch = file, name or file.removesuffix(".cu"), arch
        self.arguments: Mapping[str, Array | Scalar | Struct] = arguments

    def bind(self, values: Mapping[str, Any]) -> list[Any]:
        """The arguments in order: arrays, None for a null pointer, NumPy scalars, structs as
        arrays of one element; checked against the declaration."""
        if values.keys() != self.arguments.keys():
            missing, unknown = self.arguments.keys() - values.keys(), values.keys() - self.arguments.keys()
            raise TypeError(
                f"{self.name}: arguments must be those declared, missing {sorted(missing)}, unknown {sorted(unknown)}"
            )
        sizes: dict[str, tuple[int, str]] = {}
        return [self._bound(name, values[name], sizes) for name in self.arguments]

    def check_grid(self, grid: tuple[int, ...]) -> None:
        """Refuse more blocks than CUDA can launch, which it calls an invalid argument."""
        if any(size > most for size, most in zip(grid, GRID, strict=False)):
            raise ValueError(
                f"{self.name}: the grid must be at most {' x '.join(map(str, GRID))} blocks, got "
                f"{' x '.join(map(str, grid))}; split the array into smaller ones"
            )

    def _bound(self, name: str, value: Any, sizes: dict[str, tuple[int, str]]) -> Any:
        declared = self.arguments[name]
        if isinstance(declared, Scalar):
            return declared.cast(value)
        if isinstance(declared, Struct):
            if not isinstance(value, declared.twin):
                raise TypeError(
                    f"{self.name}: `{name}` must be a {declared.twin.__name__}, got {type(value).__name__}"
                )
            return np.frombuffer(bytes(value), f"V{ctypes.sizeof(value)}")  # CuPy passes one element by value
        if value is None:
            if not declared.optional:
                raise TypeError(f"{self.name}: `{name}` must be an array of {declared.dtype}, got None")
            return None
        if value.dtype not in declared.dtypes:
            raise TypeError(
                f"{self.name}: `{name}` must be an array of {declared.dtype}, got {value.dtype.name}; convert it first"
            )
        if not value.flags.c_contiguous:
            raise ValueError(
                f"{self.name}: `{name}` must be C-contiguous, got strides {tuple(value.strides)}; pass a contiguous copy"
            )
        axes = declared.names
        if axes and len(axes) != value.ndim:
            raise ValueError(
                f"{self.name}: `{name}` must have axes [{declared.axes}], got shape {tuple(value.shape)}"
            )
        for axis, size in zip(axes, value.shape, strict=False):
            known, owner = sizes.setdefault(axis, (size, name))
            if known != size:
                raise ValueError(
                    f"{self.name}: axis {axis} of `{name}` must be {known} as in `{owner}`, got {size}"
                )
        return value
