"""What updates are measured by: every spread and noise of a law, on the kernels and in a training step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from gpuxbar import ops, reference
from gpuxbar.bench.peers import aihwkit_tile
from gpuxbar.bridge.outer_product import weight_gradient
from gpuxbar.nn import AnalogLinear
from gpuxbar.optim import InSituSGD
from gpuxbar.spec import Carry, ConstantStep, CrossbarSpec, Programming, PulseTrain, SoftBounds, UpdateLaw

__all__ = [
    "CONSTANT",
    "COUNTED_SOFT",
    "LAW",
    "carries",
    "expected_update",
    "in_situ_step",
    "pulse_update",
    "streamed",
]

Run = dict[str, Callable[[], object]]

WINDOW: dict[str, Any] = {"g_min": 1e-6, "g_max": 10e-6}  # S
SPREADS: dict[str, Any] = {
    "step_spread": 0.3, "asymmetry_spread": 0.01, "low_spread": 0.1, "high_spread": 0.1,
}  # fmt: skip
LAW = SoftBounds(up=2, down=2, spread=0.1, cycle=0.3, **SPREADS)
CONSTANT = ConstantStep(cycle=0.3, **SPREADS)
# pulses of such devices may be counted ahead where they all lead one way and make no noise
COUNTED_SOFT = SoftBounds(up=2, down=2, spread=0.1, sides="one_sided", **SPREADS)
SLICES, SLICE_BITS, CARRY = 4, 2, Carry()
CHECKED = 64  # wordlines that the oracle looks at


def expected_update(
    batch: int = 256, inputs: int = 1024, outputs: int = 1024, stored: bool = False, sliced: bool = False
) -> tuple[Run, Callable[[], float]]:
    """`ops.device_update` of a gradient, in outer products of the batch; the check is in shares of the window.

    `stored`: the devices come from a map and are not drawn anew. `sliced`: changes are so large that every slice takes a digit.
    """
    rng = np.random.default_rng(0)
    x, d = torch.randn(batch, inputs), torch.randn(batch, outputs)
    size = (1, outputs, inputs)
    dw = (rng.uniform(-0.4, 0.4, size) if sliced else rng.normal(0, 1e-3, size)).astype(np.float32)
    shape = (2 * SLICES if sliced else 2, inputs, outputs)
    g = rng.uniform(WINDOW["g_min"], WINDOW["g_max"], shape).astype(np.float32)
    made: dict[str, Any] = {"law": LAW, **WINDOW, "seed": 1}
    if sliced:
        made |= {"slice_bits": SLICE_BITS, "carry": CARRY}
    if stored:
        made["device_map"] = ops.draw_device_map(LAW, shape, seed=1)
    how: dict[str, Any] = {"w_max": np.ones(outputs, np.float32), "step": 3}
    weight = np.empty(size, np.float32)

    def ours(cells: np.ndarray) -> object:
        return ops.device_update(ops.Pairs(cells, **made), dw, out=weight, **how)

    def check() -> float:
        plain = ops.Pairs(g, **made).plain
        if stored:
            plain["device_map"] = {name: plane[:, :CHECKED] for name, plane in plain["device_map"].items()}
        part = np.ascontiguousarray(dw[:, :, :CHECKED])
        expected, _, _ = reference.device_update(g[:, :CHECKED], part, **plain, **how)
        cells = g.copy()
        ours(cells)
        return _error(cells, expected)

    worked = g.copy()
    return {"ideal": lambda: d.T @ x, "gpuxbar": lambda: ours(worked)}, check


def streamed(batch: int = 32, inputs: int = 1024, outputs: int = 1024) -> tuple[Run, Callable[[], float]]:
    """`ops.streamed_update` of normal inputs, of 8 bits, and errors that ask for digits of all slices.

    In outer products of the batch. The check is in shares of the window, where errors ask for whole numbers of 2^-12 units:
    no digit of them lies on an edge.
    """
    rng = np.random.default_rng(0)
    rule, full = Carry(scheme="streamed"), 2.0 ** (SLICES * SLICE_BITS) - 1
    top = 2.0**rule.input_bits - 1
    x = np.clip(rng.normal(0, top / 3, (batch, inputs)), -top, top).astype(np.float32)
    x[0, 0] = top  # so that a code is 1, and an error what it asks for, in units
    d = (np.rint(rng.uniform(-1, 1, (batch, outputs)) * 4096) / 4096).astype(np.float32)
    g = rng.uniform(WINDOW["g_min"], WINDOW["g_max"], (2 * SLICES, inputs, outputs)).astype(np.float32)
    made: dict[str, Any] = {"law": LAW, **WINDOW, "slice_bits": SLICE_BITS, "carry": rule, "seed": 1}
    how: dict[str, Any] = {"rate": 1.0, "w_max": np.full(outputs, full, np.float32), "step": 3}

    def ours(cells: np.ndarray, x: np.ndarray, d: np.ndarray) -> object:
        return ops.streamed_update(ops.Pairs(cells, **made), x, d, **how)

    def oracle(cells: np.ndarray, x: np.ndarray, d: np.ndarray) -> np.ndarray:
        return reference.streamed_update(cells, x, d, **ops.Pairs(cells, **made).plain, **how)[0]

    return _of_samples(ours, oracle, g, x, d)


def carries(batch: int = 256, inputs: int = 1024, outputs: int = 1024) -> tuple[Run, Callable[[], float]]:
    """`ops.carry` where the lowest digits are anywhere in their window, in outer products of the batch.

    They are put back before every carry, with the other sign, so that higher digits stay where they are in the mean.
    """
    rng = np.random.default_rng(0)
    x, d = torch.randn(batch, inputs), torch.randn(batch, outputs)
    start = np.full((2 * SLICES, inputs, outputs), 0.5 * sum(WINDOW.values()), np.float32)
    start[::SLICES] = rng.uniform(WINDOW["g_min"], WINDOW["g_max"], (2, inputs, outputs))
    writes = Programming(write_noise=1e-8)
    made: dict[str, Any] = {
        "law": LAW, **WINDOW, "slice_bits": SLICE_BITS, "carry": CARRY, "programming": writes, "seed": 1,
    }  # fmt: skip
    worked, lowest = start.copy(), [start[::SLICES].copy(), start[::SLICES][::-1].copy()]

    def ours() -> None:
        lowest.reverse()
        worked[::SLICES] = lowest[0]
        ops.carry(ops.Pairs(worked, **made), updates=CARRY.interval)

    def check() -> float:
        expected, _ = reference.carry(
            start[:, :CHECKED], rule=CARRY.model_dump(), slices=SLICES, slice_bits=SLICE_BITS, updates=CARRY.interval, seed=1,
            **WINDOW, **writes.model_dump(),
        )  # fmt: skip
        cells = start.copy()
        ops.carry(ops.Pairs(cells, **made), updates=CARRY.interval)
        return _error(cells, expected)

    return {"ideal": lambda: d.T @ x, "gpuxbar": ours}, check


def in_situ_step(
    batch: int = 256, inputs: int = 1024, outputs: int = 1024
) -> tuple[Run, Callable[[], float]]:
    """Outer product, as a layer's backward makes it, and update through `InSituSGD`, in outer products of PyTorch's.

    The cells are checked by `expected_update`.
    """
    x, d = torch.randn(batch, inputs), torch.randn(batch, outputs)
    spec = CrossbarSpec.model_validate({"device": WINDOW, "update": LAW.model_dump()})
    layer = AnalogLinear(inputs, outputs, bias=False, spec=spec)
    optimiser = InSituSGD(layer.parameters(), lr=1e-5)

    def ours() -> object:
        layer.weight.grad = weight_gradient(d, x, torch.ones(1))
        return optimiser.step()

    _, check = expected_update(batch, min(inputs, 64), outputs)
    return {"ideal": lambda: d.T @ x, "gpuxbar": ours}, check


def pulse_update(
    law: UpdateLaw, mode: str, wanted: float = 0.1, batch: int = 256, inputs: int = 1024, outputs: int = 1024
) -> tuple[Run, Callable[[], float]]:
    """`ops.pulse_update` of normal inputs and errors by trains of 31 slots, in outer products of the batch.

    `wanted`: coincidences that an input and an error of 1 want; 0.64 of it on average. In sequence, aihwkit runs beside
    where it is installed: its tile has one device a weight, ours two.
    """
    rng = np.random.default_rng(0)
    x, d = (rng.normal(size=(batch, lines)).astype(np.float32) for lines in (inputs, outputs))
    g = rng.uniform(WINDOW["g_min"], WINDOW["g_max"], (2, inputs, outputs)).astype(np.float32)
    w_max, pulses = np.ones(outputs, np.float32), law.nominal_pulses
    assert pulses is not None
    train = PulseTrain.model_validate({"length": 31, "bound_management": False, "mode": mode})
    rate = wanted * (2 if law.sides == "both" else 1) / pulses
    made: dict[str, Any] = {"law": law, **WINDOW, "seed": 1}
    how: dict[str, Any] = {"rate": rate, "w_max": w_max, "step": 3}

    def ours(cells: np.ndarray, x: np.ndarray, d: np.ndarray) -> object:
        return ops.pulse_update(ops.Pairs(cells, **made), x, d, train=train, **how)

    def oracle(cells: np.ndarray, x: np.ndarray, d: np.ndarray) -> np.ndarray:
        plain = ops.Pairs(cells, **made).plain
        return reference.pulse_update(cells, x, d, train=train.model_dump(), **plain, **how)[0]

    run, check = _of_samples(ours, oracle, g, x, d)
    tile = aihwkit_tile(law, train, wanted, outputs, inputs) if mode == "exact" else None
    if tile is not None:
        run["aihwkit"] = partial(tile.update, torch.from_numpy(x), torch.from_numpy(d))
    return run, check


def _of_samples(
    ours: Callable[..., object],
    oracle: Callable[..., np.ndarray],
    g: np.ndarray,
    x: np.ndarray,
    d: np.ndarray,
) -> tuple[Run, Callable[[], float]]:
    """An update of cells by samples beside their outer product, and its error by some samples of some wordlines."""
    worked, tx, td = g.copy(), torch.from_numpy(x), torch.from_numpy(d)

    def check() -> float:
        cells, part, error = (np.ascontiguousarray(a) for a in (g[:, :CHECKED], x[:8, :CHECKED], d[:8]))
        expected = oracle(cells, part, error)
        ours(cells, part, error)
        return _error(cells, expected)

    return {"ideal": lambda: td.T @ tx, "gpuxbar": lambda: ours(worked, x, d)}, check


def _error(cells: np.ndarray, expected: np.ndarray) -> float:
    """The largest, in shares of the window; of the wordlines that the oracle knows."""
    return float(np.abs(cells[:, : expected.shape[1]] - expected).max() / (WINDOW["g_max"] - WINDOW["g_min"]))
