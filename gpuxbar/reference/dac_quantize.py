"""Digital values to DAC codes, in NumPy float64: the oracle of `ops.dac_quantize` and `ops.dac_fit`."""

from __future__ import annotations

import numpy as np

__all__ = ["SMALLEST_RANGE", "dac_fit", "dac_quantize"]

SMALLEST_RANGE = 1e-30  # of values that are all 0, which drive code 0 whatever its step


def dac_quantize(x: np.ndarray, *, lsb: np.ndarray, code_max: int, signed: bool = True) -> np.ndarray:
    """clip(round(x / lsb), -code_max or 0, code_max), half to even; int16."""
    step = np.asarray(lsb, np.float64).reshape(-1, *[1] * (x.ndim - 1))
    return np.clip(np.rint(x / step), -code_max if signed else 0, code_max).astype(np.int16)


def dac_fit(
    x: np.ndarray, scale: np.ndarray, *, code_max: int, signed: bool = True, per_sample: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Codes of x times the scale of its second axis, and the step that takes the largest magnitude to `code_max`."""
    values = x.astype(np.float64) * np.asarray(scale, np.float64).reshape(-1, *[1] * (x.ndim - 2))
    largest = np.abs(values).max(tuple(range(1, x.ndim)), initial=0.0)
    largest = largest if per_sample else largest.max(initial=0.0, keepdims=True)
    lsb = np.maximum(largest, SMALLEST_RANGE) / code_max
    return dac_quantize(values, lsb=lsb, code_max=code_max, signed=signed), lsb
