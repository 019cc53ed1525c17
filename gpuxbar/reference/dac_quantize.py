"""Digital values to DAC codes, in NumPy float64: the oracle of `ops.dac_quantize`."""

from __future__ import annotations

import numpy as np

__all__ = ["dac_quantize"]


def dac_quantize(x: np.ndarray, *, lsb: np.ndarray, code_max: int, signed: bool = True) -> np.ndarray:
    """clip(round(x / lsb), -code_max or 0, code_max), half to even; int16."""
    step = np.asarray(lsb, np.float64).reshape(-1, *[1] * (x.ndim - 1))
    return np.clip(np.rint(x / step), -code_max if signed else 0, code_max).astype(np.int16)
