"""Gradients through the edges of a DAC's range, in NumPy float64: the oracle of `ops.dac_clip_gradient`."""

from __future__ import annotations

import numpy as np

__all__ = ["dac_clip_gradient"]


def dac_clip_gradient(
    grad: np.ndarray, x: np.ndarray, *, top: float, code_max: int, signed: bool = True
) -> tuple[np.ndarray, float]:
    """See `gpuxbar.ops.dac_clip_gradient`."""
    grad, x = grad.astype(np.float64), x.astype(np.float64)
    inside = (x <= top) & (x >= (-top if signed else 0))
    steps = x * code_max / top
    beyond = np.where(x > top, code_max, -code_max if signed else 0)
    slope = (grad * np.where(inside, np.rint(steps) - steps, beyond)).sum()
    return np.where(inside, grad, 0.0), float(slope) / max(code_max, 1)
