"""Programming weights onto conductance planes, in NumPy float64: the oracle of `ops.program` and `ops.reprogram`.

w = clip(weight / w_max, -1, 1); a device's target is g_min + |w| (g_max - g_min) on its side of the pair (or a
digit of |w|, or (1 + w) / 2 of the window of a single device), rounded to levels; then device spread, write noise,
clipping at 0 and stuck cells.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuxbar.reference.random import Purpose, normals, uniforms

__all__ = ["fingerprint", "program", "reprogram", "written"]


def program(
    weight: np.ndarray,
    *,
    w_max: np.ndarray,
    g_min: float,
    g_max: float,
    slices: int = 1,
    slice_bits: int | None = None,
    headroom_bits: int = 0,
    balanced: bool = False,
    levels: int | None = None,
    merge: str = "none",
    stuck_at_g_min: float = 0.0,
    stuck_at_g_max: float = 0.0,
    sigma_g: float = 0.0,
    exponent: float = 0.5,
    seed: int = 0,
    step: int = 0,
    **writes: float,
) -> Any:
    """See `gpuxbar.ops.program`; float64 throughout, rounded to float32 at the end. `writes`: as `written` has them."""
    n_groups, n_out, n_in = weight.shape
    scale = np.asarray(w_max, np.float64)
    scale = np.broadcast_to(scale.reshape(-1, 1, 1) if scale.size == 1 else scale.reshape(n_groups, n_out, 1), (n_groups, n_out, 1))  # fmt: skip
    w = np.clip(np.asarray(weight, np.float64) / scale, -1.0, 1.0)
    w = w.transpose(0, 2, 1).reshape(n_groups * n_in, n_out)
    if merge == "offset":
        shares = [_offset_share(w, levels)]
    else:
        signed = np.sign(w) * np.stack(_shares(np.abs(w), slices, slice_bits, headroom_bits))
        shares = [
            _rounded(
                (1 + sign * share) / 2 if balanced else np.maximum(sign * share, 0.0), levels, slice_bits
            )
            for sign in (1.0, -1.0)
            for share in signed
        ]
    planes = []
    for slot, share in enumerate(shares):
        target = g_min + share * (g_max - g_min)
        g = written(target, g_max=g_max, purpose=Purpose.WRITE, slot=slot, seed=seed, step=step, **writes)
        if stuck_at_g_min or stuck_at_g_max:
            u = uniforms(np.arange(len(g)), n_out, purpose=Purpose.STUCK, slot=slot, seed=seed)
            g = np.where(u < stuck_at_g_min, g_min, np.where(u > 1.0 - stuck_at_g_max, g_max, g))
        planes.append(g)
    devices = np.stack(planes)
    base = 2.0 ** (slice_bits or 0)
    g = _merged(devices, merge, slices, base, -1.0)
    if not sigma_g:
        return g
    variance = (sigma_g * (devices / g_max) ** exponent) ** 2
    return g, _merged(variance, merge, slices, base**2, 1.0)


def written(
    target: np.ndarray, *, g_max: float, purpose: Purpose, slot: int, seed: int, step: int, device_spread: float = 0.0,
    write_noise: float | tuple[float, ...] = 0.0,
) -> np.ndarray:  # fmt: skip
    """What a write leaves of the targets of a plane, [R, C], where no cell is stuck."""
    rows, cols = np.arange(len(target)), target.shape[1]
    where: dict[str, Any] = {"slot": slot, "seed": seed}
    terms = np.atleast_1d(write_noise)
    g = target
    if device_spread:
        g = g * (1.0 + device_spread * normals(rows, cols, purpose=Purpose.DEVICE_SPREAD, **where))
    if terms.any():
        deviation = sum(term * (target / g_max) ** power for power, term in enumerate(terms))
        g = g + deviation * normals(rows, cols, purpose=purpose, step=step, **where)
    return np.maximum(g, 0.0)


def fingerprint(weight: np.ndarray) -> int:
    """The 64-bit sum over all places e of bits(weight[e]) times an odd number of e; signed, like an int64."""
    mask = np.uint64(0xFFFFFFFF)
    bits = np.ascontiguousarray(weight, np.float32).ravel().view(np.uint32).astype(np.uint64)
    place = np.arange(bits.size, dtype=np.uint64) & mask
    place = (place ^ place >> np.uint64(16)) * np.uint64(0x7FEB352D) & mask
    low = (place ^ place >> np.uint64(15)) * np.uint64(0x846CA68B) & mask
    high = (low ^ low >> np.uint64(16)) * np.uint64(0x9E3779B9) & mask
    factor = (low | np.uint64(1)) + (high << np.uint64(32))
    total = int((bits * factor).sum(dtype=np.uint64)) if bits.size else 0
    return total - 2**64 if total >= 2**63 else total


def reprogram(
    weight: np.ndarray,
    g: np.ndarray,
    w_max: np.ndarray,
    state: np.ndarray,
    noise_var: np.ndarray | None = None,
    *,
    write_step: int,
    scale: str = "tensor",
    full_weight: float | None = None,
    **settings: Any,
) -> None:
    """See `gpuxbar.ops.reprogram`."""
    total = (fingerprint(weight) + write_step) % 2**64
    version = total - 2**64 if total >= 2**63 else total
    if version != state[0] or version == 0:
        magnitude = np.abs(weight).reshape(w_max.size, weight.shape[2])
        if full_weight is not None:
            w_max[...] = full_weight
        elif scale == "column":
            w_max[...] = np.maximum(magnitude.max(axis=1, initial=0.0), 1e-30)
        else:
            w_max[...] = max(magnitude.max(initial=0.0), 1e-30)
        written = program(weight, w_max=w_max, step=total & 0xFFFFFFFF, **settings)
        if noise_var is None:
            g[...] = written
        else:
            g[...], noise_var[...] = written
    state[...] = version


def _merged(devices: np.ndarray, merge: str, slices: int, base: float, negative: float) -> np.ndarray:
    """The stored planes, float32: the sides of a pair joined with weights 1 and `negative`, its slices with base**k."""
    planes = devices
    if merge in ("subtract", "all"):
        planes = planes[:slices] + negative * planes[slices:]
    if merge == "all":
        planes = np.tensordot(base ** np.arange(slices), planes, axes=1)[None]
    return np.ascontiguousarray(planes, dtype=np.float32)


def _shares(
    magnitude: np.ndarray, slices: int, slice_bits: int | None, headroom_bits: int
) -> list[np.ndarray]:
    """The share of the conductance window of each slice, least significant first."""
    if slice_bits is None:
        return [magnitude]
    base = 2**slice_bits
    code = np.rint(magnitude * (float(base) ** slices - 1)).astype(np.int64)
    return [(code // base**k % base) / (base * 2**headroom_bits - 1) for k in range(slices)]


def _rounded(share: np.ndarray, levels: int | None, slice_bits: int | None) -> np.ndarray:
    """The nearest level of a share of the window; digits are levels already."""
    return share if levels is None or slice_bits else np.rint(share * (levels - 1)) / (levels - 1)


def _offset_share(w: np.ndarray, levels: int | None) -> np.ndarray:
    """The share of the window of a single device; the middle level is w = 0, an even number leaves the last unused."""
    if levels is None:
        return (1.0 + w) / 2
    middle = (levels - 1) // 2
    return (middle + np.rint(w * middle)) / (levels - 1)
