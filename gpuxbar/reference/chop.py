"""Signs of wordlines that flip at random, in NumPy: the oracle of `ops.chop`."""

from __future__ import annotations

import numpy as np

from gpuxbar.reference.random import Purpose, uniforms

__all__ = ["chop"]


def chop(sign: np.ndarray, lines: np.ndarray, *, flip: float, step: int, seed: int = 0) -> np.ndarray:
    """Signs [G, I] after each of the given wordlines flipped, in every group on its own, with probability `flip`."""
    sign = np.array(sign)
    groups, inputs = sign.shape
    rows = (np.arange(groups)[:, None] * inputs + lines).ravel()
    flipped = uniforms(rows, 1, purpose=Purpose.CHOPPER, step=step, seed=seed).ravel() < flip
    sign.reshape(-1)[rows[flipped]] *= -1
    return sign
