"""Wanted weight changes through the device law, in NumPy float64: the oracle of `ops.device_update`.

Each law is written as its source has it, not in the shared form of the kernels; see `spec.Agarwal`,
`spec.NeuroSim` and `spec.SoftBounds`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuxbar.reference.random import Purpose, normals, uniforms

__all__ = ["device_update", "neurosim_rate", "nonlinearity_label"]


def nonlinearity_label(a: np.ndarray) -> np.ndarray:
    """NeuroSim's label of A_norm: 10.10153 times the largest deviation of the staircase from a line."""
    a = np.asarray(a, np.float64)
    full = -np.expm1(-1.0 / a)
    x = -a * np.log(a * full)
    return np.sqrt(2.0) / 0.14 * (-np.expm1(-x / a) / full - x)


def neurosim_rate(label: np.ndarray | float) -> np.ndarray:
    """1 / A_norm of labels in -9.5 .. 9.5, with the label's sign, by bisection; 0 for labels below 1e-5."""
    label = np.asarray(label, np.float64)
    low, high = np.full(label.shape, np.log(1e-6)), np.full(label.shape, np.log(100.0))
    for _ in range(60):
        middle = (low + high) / 2
        below = nonlinearity_label(np.exp(-middle)) < np.abs(label)
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.where(np.abs(label) < 1e-5, 0.0, np.sign(label) * np.exp((low + high) / 2))


def device_update(
    g: np.ndarray,
    dw: np.ndarray,
    *,
    law: dict[str, Any],
    w_max: np.ndarray,
    g_min: float,
    g_max: float,
    stuck_at_g_min: float = 0.0,
    stuck_at_g_max: float = 0.0,
    seed: int = 0,
    step: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """(new conductances [2, G * I, O], weights read out [G, O, I]); `law` is the dumped spec of the law."""
    groups, n_out, n_in = dw.shape
    span = g_max - g_min
    per_output = np.asarray(w_max, np.float64).reshape(groups, n_out, 1)
    wanted = (np.asarray(dw, np.float64) / per_output / 2).transpose(0, 2, 1).reshape(groups * n_in, n_out)
    rows = np.arange(groups * n_in)
    new = []
    for plane, sign in enumerate((1.0, -1.0)):
        where: dict[str, Any] = {"slot": plane, "seed": seed}
        before = (np.asarray(g[plane], np.float64) - g_min) / span
        d = np.clip(sign * wanted, -1.0, 1.0)
        spreads = [
            normals(rows, n_out, purpose=purpose, **where)
            for purpose in (Purpose.UPDATE_SPREAD_UP, Purpose.UPDATE_SPREAD_DOWN)
        ]
        z = normals(rows, n_out, purpose=Purpose.CYCLE, step=step, **where)
        x = np.clip(LAWS[law["law"]](before, d, z, spreads, law), 0.0, 1.0)
        u = uniforms(rows, n_out, purpose=Purpose.STUCK, **where)
        moves = (d != 0) & ~((u < stuck_at_g_min) | (u > 1.0 - stuck_at_g_max))
        new.append(np.where(moves, g_min + x * span, np.asarray(g[plane], np.float64)))
    pair = (new[0] - new[1]) / span
    weights = pair.reshape(groups, n_in, n_out).transpose(0, 2, 1) * per_output
    return np.stack(new), weights


def _agarwal(x: np.ndarray, d: np.ndarray, z: np.ndarray, spreads: list[np.ndarray], law: dict[str, Any]):
    nu_up, nu_down = (np.maximum(law["nu"] * (1 + law["spread"] * s), 1e-9) for s in spreads)
    up = (1 / -np.expm1(-nu_up) - x) * -np.expm1(-nu_up * d)
    down = (1 - 1 / -np.expm1(-nu_down) - x) * -np.expm1(nu_down * d)
    change = np.where(d > 0, up, down)
    return x + change + np.sqrt(law["gamma"] ** 2 * np.abs(change) + (law["cycle"] * change) ** 2) * z


def _neurosim(x: np.ndarray, d: np.ndarray, z: np.ndarray, spreads: list[np.ndarray], law: dict[str, Any]):
    levels = law["levels"]
    pulses = d * levels
    if law["integer_pulses"]:
        pulses = np.rint(pulses)
    labels = [
        np.clip(law[key] + law["spread"] * s, -9.5, 9.5)
        for key, s in zip(("nonlinearity_ltp", "nonlinearity_ltd"), spreads, strict=True)
    ]
    new = np.where(
        d > 0, _staircase(x, pulses, labels[0], levels), 1 - _staircase(1 - x, -pulses, labels[1], levels)
    )
    return np.where(pulses != 0, new + law["cycle"] * np.sqrt(np.abs(pulses)) * z, x)


def _staircase(x: np.ndarray, pulses: np.ndarray, label: np.ndarray, levels: int) -> np.ndarray:
    """NeuroSim's LTP curve G(P) = B (1 - exp(-P / A)): find the pulse number of x, add pulses, evaluate."""
    rate = neurosim_rate(label)
    a = levels / np.where(rate == 0, 1.0, rate)
    b = 1 / -np.expm1(-levels / a)
    p0 = -a * np.log(np.maximum(1 - x / b, 1e-300))
    return np.where(rate == 0, x + pulses / levels, b * -np.expm1(-(p0 + pulses) / a))


def _soft_bounds(x: np.ndarray, d: np.ndarray, z: np.ndarray, spreads: list[np.ndarray], law: dict[str, Any]):
    up, down = (
        np.maximum(law[key] * (1 + law["spread"] * s), 0.0)
        for key, s in zip(("up", "down"), spreads, strict=True)
    )
    new = np.where(d > 0, 1 - (1 - x) * np.exp(-up * np.abs(d)), x * np.exp(-down * np.abs(d)))
    n = np.maximum(np.abs(d) * law["pulses"], 1e-30)
    return new + np.abs(new - x) * law["cycle"] / np.sqrt(n) * z


LAWS = {"agarwal": _agarwal, "neurosim": _neurosim, "soft_bounds": _soft_bounds}
