"""Staircases: potentiation and then depression of devices by single pulses, computed and drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gpuxbar import ops
from gpuxbar.spec import Device, UpdateLaw

__all__ = ["plot_staircases", "staircase"]

MOST = 2000  # pulses that are drawn unasked


def staircase(
    law: UpdateLaw, window: Device, *, pulses: int | None = None, devices: int = 20, seed: int = 0
) -> np.ndarray:
    """Conductances shown by devices that start at g_min: `pulses` up, then as many down; [2 pulses + 1, devices], S.

    `pulses`: as many as nominally span the window if None, 1000 for an ideal law; at most 2000.
    """
    nominal = law.nominal_pulses or 1000.0
    count = min(round(nominal), MOST) if pulses is None else pulses
    if not 1 <= count <= 100_000:
        raise ValueError(f"staircase: `pulses` must be 1 to 100000, got {count}; draw fewer")
    # where the window has more pulses than are drawn, each stands for several
    change = max(1 / nominal, 1 / count)
    up_and_down = law.model_copy(update={"sides": "reference"})
    g = np.full((2, 1, devices), window.g_min, np.float32)
    g_held = g.copy() if law.write_noise else None
    path = [g[0, 0].copy()]
    pairs = ops.Pairs(g, law=up_and_down, g_min=window.g_min, g_max=window.g_max, g_held=g_held, seed=seed)
    w_max = np.ones(devices, np.float32)
    for step in range(2 * count):
        dw = np.full((1, devices, 1), change if step < count else -change, np.float32)
        ops.device_update(pairs, dw, w_max=w_max, step=step)
        path.append(g[0, 0].copy())
    return np.array(path)


def plot_staircases(devices: dict[str, tuple[UpdateLaw, Device]], path: str | Path, **settings: Any) -> None:
    """Draw staircases of single devices, and of the nominal one without noise and spread, to a PNG: a panel a law and window."""
    from matplotlib.figure import Figure

    columns = min(len(devices), 4)
    rows = -(-len(devices) // columns)
    size = (6, 3.5) if len(devices) == 1 else (2.9 * columns, 2 * rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (title, (law, window)) in zip(axes, devices.items(), strict=False):
        _draw(axis, law, window, settings)
        axis.set_title(title, fontsize="medium")
    for axis in axes[len(devices) :]:
        axis.remove()
    figure.supxlabel("pulse (up, then down)", fontsize="medium")
    figure.supylabel("conductance (uS)", fontsize="medium")
    axes[0].legend(loc="upper right", fontsize="small")
    figure.savefig(path, dpi=100)


def _draw(axis: Any, law: UpdateLaw, window: Device, settings: dict[str, Any]) -> None:
    spreads = {name for name in type(law).model_fields if name.endswith("spread")}
    quiet = dict.fromkeys(spreads | {"gamma", "cycle", "write_noise"} & type(law).model_fields.keys(), 0.0)
    axis.plot(staircase(law, window, **settings) * 1e6, color="tab:blue", alpha=0.25, linewidth=0.7)
    # the scatter of a table is part of it
    nominal = law if law.law == "lookup_table" else law.model_copy(update=quiet)
    path = staircase(nominal, window, **{**settings, "devices": 1})
    axis.plot(path * 1e6, color="black", label="nominal device")
    axis.grid(alpha=0.3)
