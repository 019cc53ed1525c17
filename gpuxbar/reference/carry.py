"""Carries of sliced weights, in NumPy float64: the oracle of `ops.carry`.

From the lowest slice up, digit d = window (g_pos - g_neg) / (g_max - g_min) gives trunc(d / base) to the next one and keeps the
rest. A highest digit of `base` or more makes all digits base - 1 of its sign.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuxbar.reference.program import written
from gpuxbar.reference.random import Purpose, uniforms

__all__ = ["carry", "slices_due"]

UNRESOLVED = 2.0**-10  # of a unit


def slices_due(updates: int, slices: int, base: int, scheme: str, interval: int) -> int:
    """Slices, from the lowest up, that give up their excess after so many updates."""
    if updates <= 0:
        return 0
    waits = [interval * (base**k if scheme == "periodic" else 1) for k in range(slices - 1)]
    return sum(updates % wait == 0 for wait in waits)


def carry(
    g: np.ndarray,
    *,
    rule: dict[str, Any],
    slices: int,
    slice_bits: int,
    updates: int,
    g_min: float,
    g_max: float,
    balanced: bool = True,
    pulse_count: np.ndarray | None = None,
    stuck_at_g_min: float = 0.0,
    stuck_at_g_max: float = 0.0,
    seed: int = 0,
    **writes: float,
) -> tuple[np.ndarray, np.ndarray]:
    """(conductances after a carry, which devices were written), [2 slices, R, C] each.

    `rule` is a dumped `spec.Carry`, and `writes` are as `written` has them.
    """
    base, window, span = 2**slice_bits, 2 ** (slice_bits + rule["headroom_bits"]) - 1, g_max - g_min
    due = slices_due(updates, slices, base, rule["scheme"], rule["interval"])
    cells = np.array(g, np.float64)
    planes, rows = range(2 * slices), np.arange(g.shape[1])
    u = np.stack(
        [uniforms(rows, g.shape[2], purpose=Purpose.STUCK, slot=plane, seed=seed) for plane in planes]
    )
    free = (u >= stuck_at_g_min) & (u <= 1.0 - stuck_at_g_max)
    if pulse_count is not None:
        free &= pulse_count >= 0
    pairs = free[:slices] & free[slices:]
    digits = (cells[:slices] - cells[slices:]) / span * window
    changed = np.zeros(digits.shape, bool)
    for k in range(due):
        out = (
            np.trunc((np.abs(digits[k]) + UNRESOLVED) / base) * np.sign(digits[k]) * (pairs[k] & pairs[k + 1])
        )
        digits[k] -= base * out
        digits[k + 1] += out
        changed[k : k + 2] |= out != 0
    if due == slices - 1:
        over = (np.abs(digits[-1]) + UNRESOLVED >= base) & pairs[-1]
        digits = np.where(over, np.sign(digits[-1]) * (base - 1), digits)
        changed |= over
    if due and not balanced:  # one-sided devices that have come far
        looked = slices if due == slices - 1 else due
        common = (np.minimum(cells[:slices], cells[slices:]) - g_min) / span * window
        changed[:looked] |= common[:looked] >= 1
    sides = np.concatenate([digits, -digits]) / window
    share = np.clip((1 + sides) / 2 if balanced else sides, 0, 1)
    both = np.concatenate([changed & pairs] * 2)
    for plane in planes:
        value = written(
            g_min + span * share[plane], g_max=g_max, purpose=Purpose.CARRY, slot=plane, seed=seed, step=updates & 0xFFFFFFFF,
            **writes,
        )  # fmt: skip
        cells[plane] = np.where(both[plane], value, cells[plane])
    return cells, both
