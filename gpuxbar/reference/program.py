"""Programming weights onto conductance planes, in NumPy float64.

w = clip(weight / w_max, -1, 1); a device's target is g_min + |w| (g_max - g_min) on its side of the pair (or a
digit of |w|), rounded to levels; then device spread, write noise, clipping at 0 and stuck cells.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuxbar.reference.random import Purpose, normals, uniforms

__all__ = ["program"]


def program(
    weight: np.ndarray,
    *,
    w_max: np.ndarray,
    g_min: float,
    g_max: float,
    slices: int = 1,
    slice_bits: int | None = None,
    levels: int | None = None,
    merge: str = "none",
    write_noise: float = 0.0,
    device_spread: float = 0.0,
    stuck_at_g_min: float = 0.0,
    stuck_at_g_max: float = 0.0,
    seed: int = 0,
    step: int = 0,
) -> np.ndarray:
    """Conductances float32 [S, G * I, O], S, of weights [G, O, I] on pairs of devices.

    Args:
        weight: Weights, float [G, O, I].
        w_max: Weight of a full pair, float [1] or [G * O].
        g_min, g_max: Conductance window, S.
        slices, slice_bits: Devices of a magnitude and bits of each; `slice_bits=None` is continuous.
        levels: Levels of an unsliced device; None: continuous.
        merge: "none" [2 slices], "subtract" [slices] or "all" [1]; see `mapping.Planes`.
        write_noise: Standard deviation of a write, S, redrawn with every `step`.
        device_spread: Relative standard deviation between devices, drawn once per seed.
        stuck_at_g_min, stuck_at_g_max: Rates of stuck cells, drawn once per seed.
    """
    n_groups, n_out, n_in = weight.shape
    scale = np.broadcast_to(
        np.asarray(w_max, np.float64).reshape(-1, 1), (n_groups * n_out if np.size(w_max) > 1 else 1, 1)
    )
    w = np.asarray(weight, np.float64)
    w = np.clip(w / (scale.reshape(n_groups, n_out, 1) if np.size(w_max) > 1 else scale[0, 0]), -1.0, 1.0)
    w = w.transpose(0, 2, 1).reshape(n_groups * n_in, n_out)
    rows = np.arange(len(w))
    planes = []
    for side, sign in enumerate((1.0, -1.0)):
        for k, share in enumerate(_shares(np.maximum(sign * w, 0.0), slices, slice_bits, levels)):
            g = g_min + share * (g_max - g_min)
            where: dict[str, Any] = {"slot": side * slices + k, "seed": seed}
            if device_spread:
                g = g * (1.0 + device_spread * normals(rows, n_out, purpose=Purpose.DEVICE_SPREAD, **where))
            if write_noise:
                g = g + write_noise * normals(rows, n_out, purpose=Purpose.WRITE, step=step, **where)
            g = np.maximum(g, 0.0)
            if stuck_at_g_min or stuck_at_g_max:
                u = uniforms(rows, n_out, purpose=Purpose.STUCK, **where)
                g = np.where(u < stuck_at_g_min, g_min, np.where(u > 1.0 - stuck_at_g_max, g_max, g))
            planes.append(g)
    g = np.stack(planes)
    if merge != "none":
        g = g[:slices] - g[slices:]
    if merge == "all":
        base = 2.0 ** (slice_bits or 0)
        g = np.tensordot(base ** np.arange(slices), g, axes=1)[None]
    return np.ascontiguousarray(g, dtype=np.float32)


def _shares(
    magnitude: np.ndarray, slices: int, slice_bits: int | None, levels: int | None
) -> list[np.ndarray]:
    """The share of the conductance window of each slice, least significant first."""
    if slice_bits is None:
        return [magnitude if levels is None else np.rint(magnitude * (levels - 1)) / (levels - 1)]
    base = 2**slice_bits
    code = np.rint(magnitude * (float(base) ** slices - 1)).astype(np.int64)
    return [(code // base**k % base) / (base - 1) for k in range(slices)]
