"""Drift and low-frequency noise of programmed devices, in NumPy float64: the oracle of `ops.drift`.

Source: Joshi et al., Nature Communications 2020.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuxbar.reference.random import Purpose, normals

__all__ = ["drift"]

SMALLEST = 1e-6  # share of g_max below which exponent and noise stay as they are there


def drift(
    g: np.ndarray, age: float, *, law: dict[str, Any], g_max: float, seed: int = 0, step: int = 0,
    flicker_step: int = 0,
) -> np.ndarray:  # fmt: skip
    """Conductances [P, R, C] at an age, s; `law` is a dumped `spec.Drift` or `spec.MeasuredDrift`."""
    g = np.asarray(g, np.float64)
    _, n_rows, n_cols = g.shape
    rows = np.arange(n_rows)

    def z(purpose: Purpose, step: int) -> np.ndarray:
        draws = [normals(rows, n_cols, purpose=purpose, slot=p, step=step, seed=seed) for p in range(len(g))]
        return np.array(draws).reshape(g.shape)

    if law["law"] == "measured":
        shift, std = (_at_age(law, name, age, g / g_max) for name in ("shift", "std"))
        return np.maximum(g + shift + std * z(Purpose.DRIFT, step), 0.0)
    t = law["t_0"] + age
    r = np.maximum(g / g_max, SMALLEST)

    def line(name: str) -> np.ndarray:
        return np.clip(law[name] - law[f"{name}_slope"] * np.log(r), law[f"{name}_min"], law[f"{name}_max"])

    nu = np.abs(line("nu") + line("nu_std") * z(Purpose.DRIFT, step))
    share = np.minimum(law["flicker"] / r ** law["flicker_exponent"], law["flicker_max"])
    share = share * np.sqrt(np.log((t + law["t_read"]) / (2 * law["t_read"])))
    return np.maximum(g * (t / law["t_0"]) ** -nu * (1 + share * z(Purpose.FLICKER, flicker_step)), 0.0)


def _at_age(law: dict[str, Any], name: str, age: float, r: np.ndarray) -> np.ndarray:
    """A column of the table between ages, then between shares."""
    times = np.log1p(np.array([0.0, *law["ages"]]) / law["t_0"])
    rows = np.array([np.zeros(len(law["shares"])), *law[name]])
    now = [np.interp(np.log1p(age / law["t_0"]), times, column) for column in rows.T]
    return np.interp(r, law["shares"], now)
