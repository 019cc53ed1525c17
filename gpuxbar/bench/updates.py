"""What the expected-value update is measured by: every spread and noise of a law, on the kernel and in a training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from gpuxbar import ops, reference
from gpuxbar.nn import AnalogLinear
from gpuxbar.optim import InSituSGD
from gpuxbar.spec import CrossbarSpec, SoftBounds

__all__ = ["expected_update", "in_situ_step"]

Run = dict[str, Callable[[], object]]

WINDOW: dict[str, Any] = {"g_min": 1e-6, "g_max": 10e-6}  # S
LAW = SoftBounds(
    up=2,
    down=2,
    spread=0.1,
    step_spread=0.3,
    asymmetry_spread=0.01,
    low_spread=0.1,
    high_spread=0.1,
    cycle=0.3,
)


def expected_update(
    batch: int = 256, inputs: int = 1024, outputs: int = 1024
) -> tuple[Run, Callable[[], float]]:
    """`ops.device_update` of a gradient, in outer products of the batch; the check is in shares of the window."""
    rng = np.random.default_rng(0)
    x, d = torch.randn(batch, inputs), torch.randn(batch, outputs)
    dw = rng.normal(0, 1e-3, (1, outputs, inputs)).astype(np.float32)
    g = rng.uniform(WINDOW["g_min"], WINDOW["g_max"], (2, inputs, outputs)).astype(np.float32)
    w_max = np.ones(outputs, np.float32)

    def ours(cells: np.ndarray) -> object:
        return ops.device_update(cells, dw, law=LAW, w_max=w_max, **WINDOW, seed=1, step=3)

    def check() -> float:
        rows = min(inputs, 64)
        part = np.ascontiguousarray(dw[:, :, :rows])
        expected, _, _ = reference.device_update(
            g[:, :rows], part, law=LAW.model_dump(), w_max=w_max, **WINDOW, seed=1, step=3
        )
        cells = g.copy()
        ours(cells)
        return float(np.abs(cells[:, :rows] - expected).max() / (WINDOW["g_max"] - WINDOW["g_min"]))

    worked = g.copy()
    return {"ideal": lambda: d.T @ x, "gpuxbar": lambda: ours(worked)}, check


def in_situ_step(
    batch: int = 256, inputs: int = 1024, outputs: int = 1024
) -> tuple[Run, Callable[[], float]]:
    """Outer product and update through `InSituSGD`, in outer products; its cells are checked by `expected_update`."""
    x, d = torch.randn(batch, inputs), torch.randn(batch, outputs)
    spec = CrossbarSpec.model_validate({"device": WINDOW, "update": LAW.model_dump()})
    layer = AnalogLinear(inputs, outputs, bias=False, spec=spec)
    optimiser = InSituSGD(layer.parameters(), lr=1e-5)

    def ours() -> object:
        layer.weight.grad = d.T @ x
        return optimiser.step()

    _, check = expected_update(batch, min(inputs, 64), outputs)
    return {"ideal": lambda: d.T @ x, "gpuxbar": ours}, check
