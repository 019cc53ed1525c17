"""How far one device moves, in NumPy float64: the oracle of `kernels/include/gpuxbar/laws.cuh`.

Each law is written as its source has it, in the conductance and not in the kernels' mirrored form; see `spec.laws`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["moved", "neurosim_rate", "nonlinearity_label", "scattered"]

Array = np.ndarray


def nonlinearity_label(a: Array | float) -> Array:
    """NeuroSim's label of A_norm: 10.10153 times the largest deviation of the staircase from a line."""
    a = np.asarray(a, np.float64)
    full = -np.expm1(-1.0 / a)
    x = -a * np.log(a * full)
    return np.sqrt(2.0) / 0.14 * (-np.expm1(-x / a) / full - x)


def neurosim_rate(label: Array | float) -> Array:
    """1 / A_norm of labels in -9.5 .. 9.5, with the label's sign, by bisection; 0 for labels below 1e-5."""
    label = np.asarray(label, np.float64)
    low, high = np.full(label.shape, np.log(1e-6)), np.full(label.shape, np.log(100.0))
    for _ in range(60):
        middle = (low + high) / 2
        below = nonlinearity_label(np.exp(-middle)) < np.abs(label)
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.where(np.abs(label) < 1e-5, 0.0, np.sign(label) * np.exp((low + high) / 2))


def moved(
    law: dict[str, Any], y: Array, t: Array, z_up: Array | float = 0.0, z_down: Array | float = 0.0
) -> Array:
    """Share of the device's own window after a signed change `t` of it.

    Args:
        law: The dumped spec of a law.
        y: Share before, 0 to 1.
        t: Wanted change, in shares of the window, times the device's gain.
        z_up, z_down: Standard normals of the device's own parameter, each way.
    """
    y, t = np.asarray(y, np.float64), np.asarray(t, np.float64)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        up = LAWS[law["law"]](law, y, np.maximum(t, 0.0), np.asarray(z_up, np.float64), True)
        down = LAWS[law["law"]](law, y, np.maximum(-t, 0.0), np.asarray(z_down, np.float64), False)
    return np.where(t > 0, up, np.where(t < 0, down, y))


def scattered(law: dict[str, Any], y: Array, z: Array, rising: Array) -> Array:
    """What a pulse of a lookup table deviates by at shares y of the window, in nominal steps, for normals z."""
    found = []
    for rows in (law["scatter_down"], law["scatter_up"]):
        table, scores = np.array(rows), np.linspace(-4.0, 4.0, len(rows[0]))
        nodes = np.linspace(0.0, 1.0, len(table))
        at_node = np.stack([np.interp(z, scores, row) for row in table])
        hats = np.maximum(
            0.0, 1 - np.abs(np.asarray(y)[None] - nodes.reshape(-1, *[1] * np.ndim(y))) * (len(table) - 1)
        )
        found.append((hats * at_node).sum(0))
    return np.where(rising, found[1], found[0])


def _both(law: dict[str, Any], up: str, down: str, rising: bool) -> float:
    return float(law[up if rising else down])


def _ideal(law: dict[str, Any], y: Array, t: Array, z: Array, rising: bool) -> Array:
    return y + t if rising else y - t


def _linear_step(law: dict[str, Any], y: Array, t: Array, z: Array, rising: bool) -> Array:
    """dy/dt = 1 - slope (2y - 1) upwards, -(1 + slope (2y - 1)) downwards."""
    slope = _both(law, "slope_up", "slope_down", rising) + law["spread"] * z
    slope = np.where(np.abs(slope) < 1e-9, 1e-9, slope)
    sign = 1.0 if rising else -1.0
    rest = 0.5 + sign / (2 * slope)  # where the flow comes to rest
    return rest + (y - rest) * np.exp(-2 * slope * t)


def _soft_bounds(law: dict[str, Any], y: Array, t: Array, z: Array, rising: bool) -> Array:
    rate = np.maximum(_both(law, "up", "down", rising) * (1 + law["spread"] * z), 0.0)
    return 1 - (1 - y) * np.exp(-rate * t) if rising else y * np.exp(-rate * t)


def _agarwal(law: dict[str, Any], y: Array, t: Array, z: Array, rising: bool) -> Array:
    nu = np.maximum(law["nu"] * (1 + law["spread"] * z), 1e-9)
    g1 = 1 / -np.expm1(-nu)
    return y + (g1 - y) * -np.expm1(-nu * t) if rising else y + (1 - g1 - y) * -np.expm1(-nu * t)


def _agarwal_symmetric(law: dict[str, Any], y: Array, t: Array, z: Array, rising: bool) -> Array:
    alpha = np.maximum(law["alpha"] * (1 + law["spread"] * z), 1e-3)
    a, b = (np.exp(alpha) + 1) / np.expm1(alpha), -1 / np.expm1(alpha)
    return a / (1 + np.exp(-2 * alpha * (t if rising else -t)) * (a / (y - b) - 1)) + b


def _neurosim(law: dict[str, Any], y: Array, t: Array, z: Array, rising: bool) -> Array:
    levels = law["levels"]
    label = np.clip(_both(law, "nonlinearity_ltp", "nonlinearity_ltd", rising) + law["spread"] * z, -9.5, 9.5)
    new = _staircase(y if rising else 1 - y, t * levels, label, levels)
    return new if rising else 1 - new


def _staircase(x: Array, pulses: Array, label: Array, levels: int) -> Array:
    """NeuroSim's LTP curve G(P) = B (1 - exp(-P / A)): find the pulse number of x, add pulses, evaluate."""
    rate = neurosim_rate(label)
    a = levels / np.where(rate == 0, 1.0, rate)
    b = 1 / -np.expm1(-levels / a)
    p0 = -a * np.log(np.maximum(1 - x / b, 1e-300))
    return np.where(rate == 0, x + pulses / levels, b * -np.expm1(-(p0 + pulses) / a))


def _exponential_step(law: dict[str, Any], y: Array, t: Array, z: Array, rising: bool) -> Array:
    """dy/dt = +-max(1 - A exp(+-rate zeta), 0), zeta = a (2y - 1) + b: p = exp(-+rate zeta) obeys dp/dt = -k (p - A)."""
    amplitude = _both(law, "amplitude_up", "amplitude_down", rising) * (1 + law["spread"] * z)
    rate, sign = _both(law, "rate_up", "rate_down", rising), 1.0 if rising else -1.0
    p = np.exp(-sign * rate * (law["a"] * (2 * y - 1) + law["b"]))
    later = amplitude + (p - amplitude) * np.exp(-2 * law["a"] * rate * t)
    # p reaches 0 only where steps grow without end: beyond the bound
    zeta = -sign * np.log(np.maximum(later, 1e-300)) / rate
    return np.where(p > amplitude, ((zeta - law["b"]) / law["a"] + 1) / 2, y)


def _power_step(law: dict[str, Any], y: Array, t: Array, z: Array, rising: bool) -> Array:
    """du/dt = -u^exponent of the rest u = 1 - y or y: u^(1 - exponent) falls linearly."""
    exponent = np.maximum(_both(law, "exponent_up", "exponent_down", rising) + law["spread"] * z, 0.0)
    u = np.maximum(1 - y if rising else y, 1e-9)
    d = np.where(np.abs(1 - exponent) < 1e-6, 1e-6, 1 - exponent)
    later = np.maximum(u**d - d * t, 0.0) ** (1 / d)
    return 1 - later if rising else later


def _piecewise_step(law: dict[str, Any], y: Array, t: Array, z: Array, rising: bool) -> Array:
    """The step's inverse is the time a unit of conductance takes: add it up to the present place, then look it up."""
    factor = np.maximum(1 + law["spread"] * z, 0.0)
    values = np.asarray(law["up"] if rising else law["down"], np.float64)
    fine = np.linspace(0.0, 1.0, 20001)
    pace = 1 / np.maximum(np.interp(fine, np.linspace(0, 1, len(values)), values), 1e-9)
    elapsed = np.concatenate([[0.0], np.cumsum((pace[1:] + pace[:-1]) / 2)]) * (fine[1] - fine[0])
    then = np.interp(y, fine, elapsed) + (t * factor if rising else -t * factor)
    return np.interp(then, elapsed, fine)


LAWS: dict[str, Callable[[dict[str, Any], Array, Array, Array, bool], Array]] = {
    "agarwal": _agarwal,
    "agarwal_symmetric": _agarwal_symmetric,
    "constant_step": _ideal,
    "exponential_step": _exponential_step,
    "ideal": _ideal,
    "linear_step": _linear_step,
    "lookup_table": _piecewise_step,
    "neurosim": _neurosim,
    "piecewise_step": _piecewise_step,
    "power_step": _power_step,
    "soft_bounds": _soft_bounds,
}
