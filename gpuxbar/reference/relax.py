"""Decay of devices towards their rest, in NumPy float64: the oracle of `ops.relax`."""

from __future__ import annotations

import numpy as np

from gpuxbar.reference.random import Purpose, normals, uniforms

__all__ = ["relax"]


def relax(
    g: np.ndarray, *, g_rest: float, rate: float, spread: float, stuck_low: float = 0.0, stuck_high: float = 0.0,
    seed: int = 0,
) -> np.ndarray:  # fmt: skip
    """Conductances [P, R, C] after `rate` median time constants, whose logarithm has the deviation `spread`."""
    g = np.array(g, np.float64)
    rows, cols = np.arange(g.shape[1]), g.shape[2]
    for slot, plane in enumerate(g):
        tau = np.exp(spread * normals(rows, cols, purpose=Purpose.RETENTION, slot=slot, seed=seed))
        u = uniforms(rows, cols, purpose=Purpose.STUCK, slot=slot, seed=seed)
        free = (u >= stuck_low) & (u <= 1 - stuck_high)
        plane[free] = (g_rest + (plane - g_rest) * np.exp(-rate / tau))[free]
    return g
