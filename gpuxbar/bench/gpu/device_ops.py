"""What updates and wires take on a GPU. `check` holds small ones against the float64 oracle before any is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from gpuxbar import ops, reference
from gpuxbar.bench.cases import OracleMismatch
from gpuxbar.bench.parasitics import WIRES, tiles
from gpuxbar.bench.updates import COUNTED_SOFT, LAW, WINDOW
from gpuxbar.launch import Device
from gpuxbar.spec import PulseTrain

__all__ = ["TIMED", "Timed", "check"]

There = Callable[[np.ndarray], Any]
Method = Literal["exact", "mean_field", "ladder"]
Pair = tuple[Any, np.ndarray]  # what the device finds, and the oracle

INPUTS, OUTPUTS, BATCH = 4096, 2048, 256
TILES, SIDE, DRIVEN = 6000, 128, 4
MADE: dict[str, Any] = {**WINDOW, "seed": 1}
TRAIN = PulseTrain(length=31, bound_management=False, mode="aggregated")


@dataclass(frozen=True)
class Timed:
    """Something to time.

    Attributes:
        name, size: For the table.
        target_us: Microseconds that it is to take on an H200 at most; None: not set.
        build: Of full size on a device: what to call, again and again.
        compare: Of small size: what the device finds, and the oracle.
        error: What they may differ by, relative to the largest.
    """

    name: str
    size: str
    target_us: float | None
    build: Callable[[Device, There], Callable[[], object]]
    compare: Callable[[Device, There], Pair]
    error: float


def _cells(inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Conductances, wanted changes and weights of full pairs."""
    rng = np.random.default_rng(0)
    g = rng.uniform(WINDOW["g_min"], WINDOW["g_max"], (2, inputs, outputs)).astype(np.float32)
    return g, rng.normal(0, 1e-3, (1, outputs, inputs)).astype(np.float32), np.ones(outputs, np.float32)


def _map(inputs: int, outputs: int) -> np.ndarray:
    found: np.ndarray = ops.draw_device_map(LAW, (2, inputs, outputs), seed=1)
    return found


def _update(device: Device, there: There, stored: bool) -> Callable[[], object]:
    g, dw, w_max = map(there, _cells(INPUTS, OUTPUTS))
    devices = there(np.tile(_map(64, OUTPUTS), (1, 1, INPUTS // 64, 1))) if stored else None
    pairs = ops.Pairs(g, law=LAW, device_map=devices, **MADE)
    return partial(ops.device_update, pairs, dw, w_max=w_max, step=3, device=device)


def _compare_update(device: Device, there: There, stored: bool) -> Pair:
    g, dw, w_max = _cells(37, 35)
    devices = _map(37, 35) if stored else None
    plain = ops.Pairs(g, law=LAW, device_map=devices, **MADE).plain
    expected, _, _ = reference.device_update(g, dw, w_max=w_max, step=3, **plain)
    pairs = ops.Pairs(there(g), law=LAW, device_map=None if devices is None else there(devices), **MADE)
    ops.device_update(pairs, there(dw), w_max=there(w_max), step=3, device=device)
    return pairs.g, expected


def _vectors(batch: int, inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Inputs and errors, and the rate at which two of 1 want a tenth of a coincidence."""
    rng = np.random.default_rng(1)
    x, d = (rng.normal(size=(batch, lines)).astype(np.float32) for lines in (inputs, outputs))
    assert COUNTED_SOFT.nominal_pulses is not None
    return x, d, 0.1 / COUNTED_SOFT.nominal_pulses


def _pulses(device: Device, there: There) -> Callable[[], object]:
    g, _, w_max = _cells(INPUTS, OUTPUTS)
    x, d, rate = _vectors(BATCH, INPUTS, OUTPUTS)
    pairs = ops.Pairs(there(g), law=COUNTED_SOFT, **MADE)
    return partial(
        ops.pulse_update, pairs, there(x), there(d), rate=rate, train=TRAIN, w_max=there(w_max), step=3, device=device
    )  # fmt: skip


def _compare_pulses(device: Device, there: There) -> Pair:
    g, _, w_max = _cells(37, 35)
    x, d, rate = _vectors(9, 37, 35)
    plain = ops.Pairs(g, law=COUNTED_SOFT, **MADE).plain
    expected, *_ = reference.pulse_update(
        g, x, d, rate=rate, train=TRAIN.model_dump(), w_max=w_max, step=3, **plain
    )
    pairs = ops.Pairs(there(g), law=COUNTED_SOFT, **MADE)
    ops.pulse_update(
        pairs, there(x), there(d), rate=rate, train=TRAIN, w_max=there(w_max), step=3, device=device
    )  # fmt: skip
    return pairs.g, expected


def _wires(device: Device, there: There, method: Method) -> Callable[[], object]:
    g = there(tiles(TILES, SIDE))
    return partial(ops.effective_conductance, g, method=method, device=device, **WIRES)


def _compare_wires(device: Device, there: There, method: Method) -> Pair:
    g = tiles(2, 40)
    expected = reference.effective_conductance(g, method=method, **WIRES)
    return ops.effective_conductance(there(g), method=method, device=device, **WIRES), expected


def _driven(count: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and tiles."""
    v = np.random.default_rng(1).uniform(-1, 1, (count, DRIVEN, side))
    return v.astype(np.float32), tiles(count, side)


def _inputs(device: Device, there: There) -> Callable[[], object]:
    v, g = map(there, _driven(TILES, SIDE))
    return partial(ops.solve_for_inputs, v, g, device=device, **WIRES)


def _compare_inputs(device: Device, there: There) -> Pair:
    v, g = _driven(2, 40)
    expected = reference.solve_for_inputs(v, g, **WIRES)
    return ops.solve_for_inputs(there(v), there(g), device=device, **WIRES), expected


_UPDATED = f"{2 * INPUTS * OUTPUTS / 1e6:.1f} M cells"
_TILED = f"{TILES} tiles of {SIDE} x {SIDE}"


def _timed_update(how: str, target_us: float, stored: bool) -> Timed:
    ways = partial(_update, stored=stored), partial(_compare_update, stored=stored)
    return Timed(f"update, devices {how}", _UPDATED, target_us, *ways, 1e-5)


def _timed_wires(method: Method, target_us: float) -> Timed:
    ways = partial(_wires, method=method), partial(_compare_wires, method=method)
    return Timed(f"wires, {method}", _TILED, target_us, *ways, 2e-5)


TIMED = (
    _timed_update("drawn", 75.0, False),
    _timed_update("from a map", 98.0, True),
    Timed(
        "pulses counted over the batch", f"{_UPDATED}, batch {BATCH}", None, _pulses, _compare_pulses, 1e-4
    ),
    _timed_wires("exact", 40e3),
    _timed_wires("mean_field", 3e3),
    _timed_wires("ladder", 1e3),
    Timed("wires, given inputs", f"{_TILED}, {DRIVEN} inputs each", None, _inputs, _compare_inputs, 2e-5),
)


def check(device: Device, there: There, back: Callable[[Any], np.ndarray]) -> str:
    """The largest error of all.

    Raises:
        OracleMismatch: One is not what the oracle computes.
    """
    worst = 0.0
    for timed in TIMED:
        found, expected = timed.compare(device, there)
        off = float(np.abs(back(found) - expected).max() / np.abs(expected).max())
        if not off <= timed.error:
            raise OracleMismatch(f"{timed.name}: off by {off:.1e}, more than {timed.error:.0e}")
        worst = max(worst, off)
    return f"off by {worst:.0e} at most"
