"""The settings of an update law as the kernels take them."""

from __future__ import annotations

import ctypes
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from gpuxbar.spec import (
    Agarwal,
    AgarwalSymmetric,
    ConstantStep,
    ExponentialStep,
    Ideal,
    LinearStep,
    LookupTable,
    NeuroSim,
    PiecewiseStep,
    PowerStep,
    SoftBounds,
    UpdateLaw,
)

__all__ = ["LAWS", "OWN", "TRAITS", "Parameters", "parameters"]

NODES, SCORES = 9, 17
SIDES = {"both": 0, "reference": 1, "one_sided": 2}
LAWS = {
    ConstantStep: 0, Ideal: 0, LinearStep: 0, SoftBounds: 1, Agarwal: 2, AgarwalSymmetric: 3, NeuroSim: 4,
    ExponentialStep: 5, PowerStep: 6, PiecewiseStep: 7, LookupTable: 8,
}  # fmt: skip

# fields of a law's own parameter each way, and whether its spread is relative
OWN: dict[type, tuple[str, str, bool]] = {
    LinearStep: ("slope_up", "slope_down", False),
    SoftBounds: ("up", "down", True),
    ExponentialStep: ("amplitude_up", "amplitude_down", True),
    PowerStep: ("exponent_up", "exponent_down", False),
    Agarwal: ("nu", "nu", True),
    AgarwalSymmetric: ("alpha", "alpha", True),
    NeuroSim: ("nonlinearity_ltp", "nonlinearity_ltd", False),
}

# parameters that a law may lack: what CUDA kernels are compiled for
TRAITS = (
    "step_spread", "asymmetry_spread", "low_spread", "high_spread", "spread_up", "spread_down", "gamma2", "cycle2",
    "pulse_cycle2", "range_cycle2", "write_noise", "lognormal", "integer_pulses",
)  # fmt: skip


class Parameters(ctypes.Structure):
    """Twin of `struct UpdateLaw` in kernels/include/gpuxbar/update.cuh."""

    _fields_ = [
        *((name, ctypes.c_float) for name in (
            "shape_up", "shape_down", "spread_up", "spread_down", "second_up", "second_down", "room_up", "room_down")),
        ("node_up", ctypes.c_float * NODES), ("node_down", ctypes.c_float * NODES),
        *((name, ctypes.c_float) for name in (
            "pulses", "step_spread", "asymmetry", "asymmetry_spread", "low_spread", "high_spread", "floor", "gamma2",
            "cycle2", "pulse_cycle2", "range_cycle2", "write_noise")),
        *((name, ctypes.c_int32) for name in ("law", "lognormal", "integer_pulses", "sides")),
        ("scatter", ctypes.c_float * SCORES * NODES * 2),
    ]  # fmt: skip

    @cached_property
    def traits(self) -> int:
        """Bit by bit, which of TRAITS the law has."""
        return sum(1 << bit for bit, name in enumerate(TRAITS) if getattr(self, name))


@lru_cache(maxsize=1024)
def parameters(law: UpdateLaw, g_min: float, g_max: float) -> Parameters:
    """What the kernels need of a law, for a window in S; shared by all calls, so only to be read."""
    span = g_max - g_min
    common: dict[str, Any] = {
        "pulses": law.nominal_pulses or 1.0,  # without steps, a change is one
        "step_spread": law.step_spread, "asymmetry": law.asymmetry,
        "asymmetry_spread": law.asymmetry_spread, "low_spread": law.low_spread, "high_spread": law.high_spread,
        "floor": _floor(g_min, span), "write_noise": law.write_noise / span, "law": LAWS[type(law)],
        "lognormal": law.lognormal_steps, "integer_pulses": law.integer_pulses, "sides": SIDES[law.sides],
    }  # fmt: skip
    return Parameters(**common, **_noise(law), **_shape(law))


def _floor(g_min: float, span: float) -> np.float32:
    """The share of a window where g = 0, rounded up as far as float32 takes not to make g negative."""
    floor, low, width = np.float32(-g_min / span), np.float32(g_min), np.float32(span)
    while min(float(floor * width + low), float(floor) * float(width) + float(low)) < 0:
        floor = np.nextafter(floor, np.float32(0))
    return floor


def _noise(law: UpdateLaw) -> dict[str, float]:
    if isinstance(law, Ideal | LookupTable):
        return {}
    if isinstance(law, Agarwal | AgarwalSymmetric):
        return {"gamma2": law.gamma**2, "cycle2": law.cycle**2}
    if isinstance(law, NeuroSim):
        return {"range_cycle2": law.cycle**2}
    if law.cycle_of == "nominal":
        return {"range_cycle2": (law.cycle / law.pulses) ** 2}
    return {"pulse_cycle2": law.cycle**2}


def _shape(law: UpdateLaw) -> dict[str, Any]:
    """The law's own parameters each way, in the mirrored form of laws.cuh, with the spread of the first."""
    if isinstance(law, ConstantStep | Ideal):
        return {}
    if isinstance(law, PiecewiseStep | LookupTable):
        at = np.linspace(0, 1, NODES)
        nodes = [np.interp(at, np.linspace(0, 1, len(values)), values) for values in (law.up, law.down[::-1])]
        measured = {"scatter": _scatter(law)} if isinstance(law, LookupTable) else {}
        return {
            **_ways(1.0, 1.0, law.spread, law.spread),
            **{name: (ctypes.c_float * NODES)(*node) for name, node in zip(("node_up", "node_down"), nodes, strict=True)},
            **measured,
        }  # fmt: skip
    *fields, relative = OWN[type(law)]
    up, down = (getattr(law, field) for field in fields)
    rates = {}
    if isinstance(law, ExponentialStep):
        # rate z = rate (b -+ a) + 2 a rate v, with v = y upwards and 1 - y downwards
        up *= np.exp(law.rate_up * (law.b - law.a))
        down *= np.exp(-law.rate_down * (law.b + law.a))
        rates = {"second_up": 2 * law.a * law.rate_up, "second_down": 2 * law.a * law.rate_down}
    return {
        **_ways(up, down, *(law.spread * (way if relative else 1.0) for way in (up, down))),
        **rates,
        **(_room(np.float32(up), np.float32(down)) if isinstance(law, SoftBounds) else {}),
    }


def _room(up: np.float32, down: np.float32) -> dict[str, Any]:
    return {"room_up": down / (up + down), "room_down": up / (up + down)}


def _ways(up: float, down: float, spread_up: float, spread_down: float) -> dict[str, Any]:
    return {"shape_up": up, "shape_down": down, "spread_up": spread_up, "spread_down": spread_down}


def _scatter(law: LookupTable) -> Any:
    """The measured scatter at the kernels' nodes, in order of conductance both ways; signed as the conductance is."""
    at = np.linspace(0, 1, NODES)
    tables = []
    for rows in (law.scatter_up, law.scatter_down):
        values = np.array(rows)
        tables.append([np.interp(at, np.linspace(0, 1, len(values)), column) for column in values.T])
    table = np.ascontiguousarray(np.array(tables).transpose(0, 2, 1), np.float32)
    return (ctypes.c_float * SCORES * NODES * 2).from_buffer_copy(table.tobytes())
