"""Philox4x32 and the draws made of it, in NumPy: the oracle of `kernels/include/gpuxbar/{philox,normal}.cuh`.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; Box and Muller,
Ann. Math. Stat. 29 (1958).
"""

from __future__ import annotations

from enum import IntEnum
from math import prod

import numpy as np

__all__ = ["Purpose", "normals", "philox", "round_keys", "uniforms"]


class Purpose(IntEnum):
    """What a draw is for; twin of `enum Purpose` in philox.cuh."""

    READ = 1
    READ_TRANSPOSED = 2
    WRITE = 3
    DEVICE_SPREAD = 4
    STUCK = 5
    ADC_GAIN = 6
    ADC_OFFSET = 7
    TEST_READ = 8
    CYCLE = 16
    UPDATE_SPREAD_SHAPE = 17
    UPDATE_SPREAD_STEP = 18
    UPDATE_SPREAD_WINDOW = 19
    UPDATE_WRITE = 23
    DRIFT = 24
    FLICKER = 25
    RETENTION = 26
    ENDURANCE = 27
    WEAR = 28
    CARRY = 29
    CHOPPER = 32
    PULSE_INPUT = 33
    PULSE_ERROR = 34
    PULSE_CYCLE = 35


def round_keys(seed: int, rounds: int = 10) -> list[int]:
    """The key of every round of Philox4x32, high word << 32 | low word."""
    return [
        ((seed >> 32) + i * 0xBB67AE85 & 0xFFFFFFFF) << 32 | (seed + i * 0x9E3779B9 & 0xFFFFFFFF)
        for i in range(rounds)
    ]


def philox(counter: np.ndarray, seed: int, rounds: int = 10) -> np.ndarray:
    """Philox4x32 of uint32 counters [..., 4] under a 64-bit seed; returns uint32 [..., 4]."""
    mask = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = (np.asarray(counter)[..., i].astype(np.uint64) for i in range(4))
    for key in round_keys(seed, rounds):
        key_lo, key_hi = key & 0xFFFFFFFF, key >> 32
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(key_lo),
            p1 & mask,
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(key_hi),
            p0 & mask,
        )
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def words(
    rows: np.ndarray, n_groups: int, *, purpose: int, slot: int, step: int, seed: int, rounds: int = 10
) -> np.ndarray:
    """The four words of every (row, column group); uint32 [len(rows), n_groups, 4]."""
    rows = np.asarray(rows, dtype=np.uint64)
    counter = np.empty((rows.size, n_groups, 4), dtype=np.uint32)
    counter[..., 0] = np.arange(n_groups, dtype=np.uint32)
    counter[..., 1] = (rows & np.uint64(0xFFFFFFFF)).astype(np.uint32)[:, None]
    counter[..., 2] = int(purpose) << 24 | slot
    counter[..., 3] = step & 0xFFFFFFFF
    return philox(counter, seed, rounds)


def normals(
    rows: np.ndarray,
    n_cols: int,
    *,
    purpose: int,
    slot: int = 0,
    step: int = 0,
    seed: int = 0,
    generator: str = "exact",
) -> np.ndarray:
    """Standard normals of (row, column), float64 [len(rows), n_cols].

    Args:
        rows: Logical row indices, int [n].
        n_cols: Number of columns.
        purpose: A `Purpose`.
        slot: Conversion or plane, below 2**24.
        step: Step counter; its low 32 bits count.
        seed: 64-bit key.
        generator: "exact" (Philox-10, 32-bit Box-Muller) or "fast" (Philox-7, 16-bit Box-Muller).
    """
    where = {"purpose": purpose, "slot": slot, "step": step, "seed": seed}
    if generator == "exact":
        w = words(rows, -(-n_cols // 4), **where).astype(np.float64)
        radius_word, phase_word = (w[..., 0::2] + 0.5) * 2.0**-32, w[..., 1::2] * 2.0**-32
    else:
        w32 = words(rows, -(-n_cols // 8), rounds=7, **where)
        radius_word = ((w32 & 0xFFFF).astype(np.float64) + 0.5) * 2.0**-16
        phase_word = (w32 >> 16).astype(np.float64) * 2.0**-16
    radius = np.sqrt(-2.0 * np.log(radius_word))
    z = np.stack([radius * np.cos(2 * np.pi * phase_word), radius * np.sin(2 * np.pi * phase_word)], axis=-1)
    return z.reshape(len(z), prod(z.shape[1:]))[:, :n_cols]


def uniforms(
    rows: np.ndarray, n_cols: int, *, purpose: int, slot: int = 0, step: int = 0, seed: int = 0
) -> np.ndarray:
    """Uniforms in (0, 1) of (row, column), float64 [len(rows), n_cols]: 24 bits of one word each."""
    w = words(rows, -(-n_cols // 4), purpose=purpose, slot=slot, step=step, seed=seed)
    u = ((w >> 8).astype(np.float64) + 0.5) * 2.0**-24
    return u.reshape(len(u), prod(u.shape[1:]))[:, :n_cols]
