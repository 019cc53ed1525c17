"""Argument checks shared by the ops: what is wrong, where, and the way out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import lru_cache, wraps
from math import inf
from types import NoneType
from typing import Any, TypeVar

import numpy as np

from gpuxbar.launch import Backend, backend, elsewhere, is_cupy
from gpuxbar.reference.tile_mvm import ConvGeometry

__all__ = [
    "NUMBER",
    "NotFiniteError",
    "check_array",
    "check_integers",
    "check_kind",
    "check_lines",
    "check_numbers",
    "check_place",
    "check_shape",
    "check_window",
    "check_written",
    "counter",
    "host_backend",
    "integer",
    "kept",
    "require_finite",
    "require_finite_values",
    "scalar_array",
]

T = TypeVar("T")
NUMBER = (int, float, np.number)  # what a setting is that is no array


class NotFiniteError(ValueError):
    """Values that must be finite are NaN or infinite, as those of a training that diverges."""


def kept(function: Callable[..., T]) -> Callable[..., T]:
    """What a function of settings alone says is kept; where settings cannot be, as lists, it is asked every time."""
    known = lru_cache(maxsize=4096, typed=True)(function)

    @wraps(function)
    def ask(*settings: Any, **named: Any) -> T:
        try:
            return known(*settings, **named)
        except TypeError:
            pass  # of settings that cannot be kept, or what the function says of them
        return function(*settings, **named)

    return ask


def check_array(
    op: str, name: str, array: Any, dtype: str | tuple[str, ...], ndim: int | Collection[int]
) -> None:
    """Refuse an array of another dtype or rank, or one that is not C-contiguous."""
    kind = getattr(array, "dtype", _NO_DTYPE)
    dtypes = _dtypes(dtype)
    ranks = (ndim,) if isinstance(ndim, int) else ndim
    if kind in dtypes and array.ndim in ranks and array.flags.c_contiguous:
        return
    if kind not in dtypes:  # a byte-swapped dtype is another one
        names, is_array = [wanted.name for wanted in dtypes], hasattr(array, "astype")
        got = getattr(kind, "name", str(kind)) if is_array else type(array).__name__
        if not getattr(kind, "isnative", True):
            got = f"byte-swapped {got}"
        way_out = (
            f"convert it with .astype({names[0]!r})"
            if is_array
            else f"make it one by np.array(..., {names[0]!r})"
        )
        raise TypeError(f"{op}: `{name}` must be an array of {' or '.join(names)}, got {got}; {way_out}")
    if array.ndim not in ranks:
        raise ValueError(
            f"{op}: `{name}` must have {' or '.join(map(str, ranks))} axes, got {array.ndim} (shape {tuple(array.shape)}); reshape it"
        )
    if not array.flags.c_contiguous:
        raise ValueError(
            f"{op}: `{name}` must be C-contiguous, got strides {tuple(array.strides)} for shape {tuple(array.shape)}; "
            "pass a contiguous copy (ascontiguousarray)"
        )


_NO_DTYPE = np.dtype(object)  # not None, which NumPy takes for float64


@lru_cache
def _dtypes(names: str | tuple[str, ...]) -> tuple[np.dtype[Any], ...]:
    return tuple(np.dtype(name) for name in ((names,) if isinstance(names, str) else names))


def check_shape(
    op: str, name: str, array: Any, shape: tuple[int, ...], way_out: str, wanted_by: str = ""
) -> None:
    """Refuse an array of another shape."""
    if tuple(array.shape) != tuple(shape):
        raise ValueError(
            f"{op}: `{name}` must have shape {tuple(shape)}{wanted_by and f' for {wanted_by}'}, got {tuple(array.shape)}; {way_out}"
        )


def host_backend(op: str, name: str, array: Any, on_gpu: str) -> Backend:
    """The backend of an array for an operation that a GPU has no kernel for; refuses CuPy's."""
    where = backend(array)
    if where == "cuda":
        raise TypeError(f"{op}: `{name}` must be a NumPy array, got CuPy's; on a GPU, {on_gpu}")
    return where


def check_place(op: str, like: str, arrays: Mapping[str, Any]) -> None:
    """Refuse what is no CuPy array beside `like`, which is one, before a kernel tells of it by a name of its own."""
    for name, array in arrays.items():
        if array is not None and not is_cupy(array):
            raise TypeError(
                f"{op}: `{name}` must be a CuPy array, as `{like}` is, got {type(array).__name__}; move it by cupy.asarray"
            )


def check_numbers(op: str, name: str, value: Any, unit: str, way_out: str, *, zero: bool = False) -> None:
    """Refuse numbers that are not finite and above 0 (or at least 0); values on a GPU are not read back."""
    if is_cupy(value):
        return
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    if isinstance(value, (int, float)) and (0 < value < inf or (zero and value == 0)):
        return
    values = np.asarray(value)
    low = f"{'at least' if zero else 'above'} 0 {unit}".rstrip()
    for rule, good in (("finite", np.isfinite(values)), (low, values >= 0 if zero else values > 0)):
        if not good.all():
            got = f"{values[~good].flat[0]:g} {unit}".rstrip()
            raise ValueError(f"{op}: `{name}` must be {rule}, got {got}; {way_out}")


def check_written(op: str, **arrays: Any) -> None:
    """Refuse NumPy arrays that are to be written to but must not be; None is none."""
    for name, array in arrays.items():
        if isinstance(array, np.ndarray) and not array.flags.writeable:
            raise ValueError(f"{op}: `{name}` must be writable, got a read-only array; pass a copy")


def check_kind(op: str, name: str, value: Any, *kinds: type[Any]) -> None:
    """Refuse what is no such object of the library."""
    if not isinstance(value, kinds):
        known = [kind.__name__ for kind in kinds]
        raise TypeError(
            f"{op}: `{name}` must be a gpuxbar.{kinds[0].__module__.split('.')[1]}.{' or '.join(known)}, got {type(value).__name__}; "
            f"build one by {known[0]}(...)"
        )


def check_integers(op: str, **values: Any) -> None:
    """Refuse what is no integer; None is not given."""
    for name, value in values.items():
        if not isinstance(value, (int, np.integer, NoneType)):
            raise TypeError(f"{op}: `{name}` must be an integer, got {value!r}; give a whole number")


def integer(op: str, name: str, value: Any) -> int:
    """A count given as an integer or as an array of one, of the host."""
    if is_cupy(value):
        raise elsewhere(value)
    array = np.asarray(value)
    if array.dtype.kind not in "iu" or array.size != 1:
        raise ValueError(f"{op}: `{name}` must be one integer, got {value!r}; count the calls")
    return int(array.item())


def counter(name: str, value: Any) -> dict[str, Any]:
    """A count as a kernel takes it: from device memory, or by value."""
    by_value = isinstance(value, int)
    return {name: None if by_value else value.reshape(-1), f"{name}_value": value if by_value else 0}


def check_lines(
    op: str, g: Any, x: Any, d: Any, w_max: Any, groups: int, conv: ConvGeometry | None
) -> tuple[int, int, int]:
    """Refuse inputs and errors that are not those of arrays g, [2 slices, G * I, O]; returns samples, I and O."""
    check_integers(op, groups=groups)
    axes = 2 if conv is None else 4
    for name, array, rank in (("x", x, axes), ("d", d, axes), ("w_max", w_max, 1)):
        check_array(op, name, array, "float32", rank)
    batch, rows = (len(x), x.shape[1]) if conv is None else (len(x) * conv.pixels, groups * conv.inputs)
    cols = d.shape[1]
    if groups < 1 or rows % groups or cols % groups:
        raise ValueError(
            f"{op}: `groups` must divide the inputs and the outputs, got {groups} for {rows} inputs and {cols} outputs; "
            "give the layer's groups"
        )
    images = conv and (len(x), groups * conv.channels, conv.height, conv.width)
    for name, array, shape in (
        ("g", g, (len(g), rows, cols // groups)),
        ("x", x, images or (batch, rows)),
        ("d", d, (batch, cols) if conv is None else (len(x), cols, *conv.out)),
        ("w_max", w_max, (cols,)),
    ):
        check_shape(op, name, array, shape, "check the axes", f"x {tuple(x.shape)} in {groups} groups")
    check_numbers(op, "w_max", w_max, "", "use the largest weight")
    return batch, rows // groups, cols // groups


def check_window(op: str, g_min: float, g_max: float) -> None:
    """Refuse a conductance window without width or end."""
    if not 0 <= g_min < g_max:
        raise ValueError(
            f"{op}: need 0 <= g_min < g_max, got {g_min:g} S and {g_max:g} S; widen or swap the window"
        )
    if g_max == inf:
        raise ValueError(f"{op}: `g_max` must be finite, got inf S; give the window's end")


def require_finite(op: str, name: str, bad: int, way_out: str) -> None:
    """Refuse an array of which `bad` values are NaN or infinite; they come of a diverging loss, or of what is said."""
    require_finite_values(f"{op}: `{name}`", bad, way_out)


def require_finite_values(what: str, bad: int, way_out: str) -> None:
    """`require_finite` for values that are called otherwise."""
    if bad:
        raise NotFiniteError(
            f"{what} must be finite, got {bad} NaN or infinite values; look for a diverging loss or {way_out}"
        )


def scalar_array(value: Any, dtype: str = "float32") -> np.ndarray:
    """A one-dimensional array of a number or an array of the host, so that kernels read every scalar from memory."""
    if (
        isinstance(value, np.ndarray)
        and value.ndim == 1
        and value.dtype == dtype
        and value.flags.c_contiguous
    ):
        return value
    if is_cupy(value):
        raise elsewhere(value)
    return np.ascontiguousarray(value, dtype).reshape(-1)
