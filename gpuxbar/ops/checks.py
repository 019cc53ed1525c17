"""Argument checks shared by the ops: what is wrong, where, and the way out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

__all__ = ["check_array", "scalar_array"]


def check_array(
    op: str, name: str, array: Any, dtype: str | Sequence[str], ndim: int | Sequence[int]
) -> None:
    """Refuse an array of another dtype or rank, or one that is not C-contiguous."""
    dtypes = (dtype,) if isinstance(dtype, str) else tuple(dtype)
    ranks = (ndim,) if isinstance(ndim, int) else tuple(ndim)
    if getattr(array, "dtype", _NO_DTYPE) not in _dtypes(dtypes):
        got = getattr(getattr(array, "dtype", None), "name", type(array).__name__)
        raise TypeError(
            f"{op}: `{name}` must be an array of {' or '.join(dtypes)}, got {got}; convert it with .astype({dtypes[0]!r})"
        )
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
def _dtypes(names: tuple[str, ...]) -> tuple[np.dtype[Any], ...]:
    return tuple(np.dtype(name) for name in names)


def scalar_array(xp: Any, value: Any, dtype: str = "float32") -> Any:
    """A one-dimensional array of a number or an array, so that kernels read every scalar from memory."""
    return xp.ascontiguousarray(xp.asarray(value, dtype=dtype)).reshape(-1)
