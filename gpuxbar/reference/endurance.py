"""Pulses that devices take and bear, in NumPy: the oracle of the counts of `ops.device_update` and `ops.pulse_update`."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuxbar.reference.random import Purpose, normals, uniforms

__all__ = ["wear", "whole_pulses"]


def whole_pulses(pulses: np.ndarray, plane: int, seed: int, step: int) -> np.ndarray:
    """Pulses of one plane [R, C], parts of one rounded up with their own probability."""
    u = uniforms(
        np.arange(len(pulses)), pulses.shape[1], purpose=Purpose.WEAR, slot=plane, step=step, seed=seed
    )
    return np.floor(pulses + u).astype(np.int64)


def wear(
    count: np.ndarray, pulses: np.ndarray, endurance: dict[str, Any], plane: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(counts after whole pulses of one plane, which devices have failed by them); `endurance` is a dumped spec."""
    z = normals(np.arange(len(count)), count.shape[1], purpose=Purpose.ENDURANCE, slot=plane, seed=seed)
    alive = count >= 0
    total = np.minimum(count.astype(np.int64) + np.where(alive, pulses, 0), 2**31 - 1)
    fails = alive & (pulses > 0) & (total > endurance["pulses"] * np.exp(endurance["spread"] * z))
    return np.where(fails, -total, total).astype(np.int32), fails
