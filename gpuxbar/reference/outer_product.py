"""The gradient of a matrix of weights, in NumPy float64: the oracle of `ops.outer_product`."""

from __future__ import annotations

import numpy as np

__all__ = ["outer_product"]


def outer_product(d: np.ndarray, x: np.ndarray) -> np.ndarray:
    """sum_b d[b, o] x[b, i]"""
    return d.astype(np.float64).T @ x.astype(np.float64)
