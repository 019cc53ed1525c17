"""Devices that were measured one by one, in place of those that a law's spreads draw from the seed."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuxbar import reference
from gpuxbar.ops.checks import check_window
from gpuxbar.ops.laws import OWN, parameters
from gpuxbar.spec import UpdateLaw

__all__ = ["device_map", "draw_device_map", "spread_names"]

OP = "device_map"
LARGEST = 10  # times g_max, above which no device's window ends but in another unit
# each a field of `Parameters` that is above 0 where its device parameter spreads, in the order of `struct Spreads`
SPREADS = {
    "step": "step_spread", "asymmetry": "asymmetry_spread", "low": "low_spread", "high": "high_spread", "up": "spread_up",
    "down": "spread_down",
}  # fmt: skip


def spread_names(law: UpdateLaw) -> tuple[str, ...]:
    """The device parameters in which devices of a law differ, in the order of a map's planes; () where all are alike."""
    values = parameters(law, 0.0, 1.0)
    return tuple(name for name, field in SPREADS.items() if getattr(values, field) != 0)


def device_map(
    law: UpdateLaw,
    *,
    g_min: float,
    g_max: float,
    step_up: Any = None,
    step_down: Any = None,
    g_low: Any = None,
    g_high: Any = None,
    shape_up: Any = None,
    shape_down: Any = None,
) -> np.ndarray:
    """A map of measured devices, for `ops.Pairs` and `AnalogLayer.set_device_map`.

    A map holds each device's parameters as deviations from the law's nominal ones, in units of the law's spreads: give the
    law the spreads that were measured. Only parameters with a spread above 0 are stored, 2 bytes each for a device.

    Args:
        law: An update law of the spec; what it has a spread of is needed here, anything else must not be given.
        g_min, g_max: Nominal conductance window, S.
        step_up, step_down: Steps of the devices over the nominal one, [2 slices, G * I, O], at least 0; needed together for
            `step_spread` or `asymmetry_spread`. Steps of a law that depend on the conductance: where the nominal device
            makes a nominal step.
        g_low: Lower ends of their windows, S; for `low_spread`.
        g_high: Upper ends, S; for `high_spread`.
        shape_up, shape_down: The law's own parameter each way, as the law has it (`slope_up`, `nu`, `nonlinearity_ltp`, ..; a
            factor of all steps for a piecewise one); for `spread`.

    Returns:
        float16 [K, 2, G * I, O], for the K parameters that spread, in the order of step, asymmetry, low, high, up, down.
        Rounded to 11 bits of the deviation.

    Raises:
        ValueError: A parameter with a spread is missing, or one without is given; shapes differ; values are not finite or
            beyond 65504 spreads; ends of a window cross, or lie outside 0 to 10 g_max; steps differ up and down in another way
            than the law's asymmetry has a spread for.
    """
    check_window(OP, g_min, g_max)
    names = spread_names(law)
    given = {
        "step_up": step_up, "step_down": step_down, "g_low": g_low, "g_high": g_high, "shape_up": shape_up,
        "shape_down": shape_down,
    }  # fmt: skip
    steps = "step" in names or "asymmetry" in names
    needed = [
        *(("step_up", "step_down") if steps else ()), *(("g_low",) if "low" in names else ()),
        *(("g_high",) if "high" in names else ()), *(("shape_up",) if "up" in names else ()),
        *(("shape_down",) if "down" in names else ()),
    ]  # fmt: skip
    for name, array in given.items():
        if (name in needed) != (array is not None):
            raise ValueError(
                f"{OP}: `{name}` must {'' if name in needed else 'not '}be given for a law that spreads in "
                f"{', '.join(names) or 'nothing'}, got {'none' if array is None else 'one'}; "
                f"{'measure it, or set its spread to 0' if name in needed else 'give the law the spread of it'}"
            )
    arrays = {name: np.asarray(given[name], np.float64) for name in needed}
    if not arrays:
        raise ValueError(
            f"{OP}: `law` must have a spread, got {law.law!r} without; devices that are all alike need no map"
        )
    shape = next(iter(arrays.values())).shape
    for name, array in arrays.items():
        if len(shape) != 3 or shape[0] % 2 or array.shape != shape:
            raise ValueError(
                f"{OP}: `{name}` must have shape [2 slices, G * I, O], alike for all, got {array.shape}; give the positive devices "
                "first, then the negative ones"
            )
        if not np.isfinite(array).all():
            raise ValueError(
                f"{OP}: `{name}` must be finite, got {array[~np.isfinite(array)].flat[0]:g}; give a device that does not "
                "answer a step of 0"
            )
    _check_ends(arrays, g_min, g_max)
    found: dict[str, np.ndarray] = {}
    if steps:
        found |= _steps(law, arrays["step_up"], arrays["step_down"])
    span = g_max - g_min
    if "low" in names:
        found["low"] = (arrays["g_low"] - g_min) / span / law.low_spread
    if "high" in names:
        found["high"] = (arrays["g_high"] - g_max) / span / law.high_spread
    up, down, relative = OWN.get(type(law), (None, None, True))  # else a factor of 1
    for way, field in (("up", up), ("down", down)):
        if way in names:
            nominal = 1.0 if field is None else getattr(law, field)
            spread = law.spread * (nominal if relative else 1.0)  # type: ignore[union-attr]
            found[way] = (arrays[f"shape_{way}"] - nominal) / spread
    planes = np.stack([found[name] for name in names])
    if np.abs(planes).max(initial=0.0) > np.finfo(np.float16).max:
        raise ValueError(
            f"{OP}: devices must lie within 65504 spreads of the nominal one, got {np.abs(planes).max():g}; set the "
            "law's spreads to those measured"
        )
    return planes.astype(np.float16)


def draw_device_map(law: UpdateLaw, shape: tuple[int, int, int], *, seed: int) -> np.ndarray:
    """The map of the devices that a seed draws, to look at or to change: those that `device_update` has without a map.

    Args:
        law: Of `gpuxbar.spec`.
        shape: [2 slices, G * I, O], as conductances lie.
        seed: Of the array.

    Returns:
        Normals, float16 [K, *shape], a plane for each of `spread_names(law)`; rounded to 11 bits.
    """
    planes, rows, cols = shape
    drawn = [reference.drawn_devices(np.arange(rows), cols, plane, seed) for plane in range(planes)]
    names = spread_names(law)
    return np.array([[each[name] for each in drawn] for name in names], np.float16).reshape(
        len(names), *shape
    )


def _check_ends(arrays: dict[str, np.ndarray], g_min: float, g_max: float) -> None:
    """Windows of devices, of which one end may be the nominal one."""
    for name in ("g_low", "g_high"):
        ends = arrays.get(name, np.empty(0))
        if ends.min(initial=0.0) < 0 or ends.max(initial=0.0) > LARGEST * g_max:
            raise ValueError(
                f"{OP}: `{name}` must be 0 to {LARGEST * g_max:g} S, {LARGEST} times g_max, got {ends.min():g} to {ends.max():g}; give "
                "it in S"
            )
    crossed = np.greater_equal(arrays.get("g_low", g_min), arrays.get("g_high", g_max))
    if crossed.any():
        raise ValueError(
            f"{OP}: `g_low` must be below `g_high` of each device, or g_min and g_max where these are not given, got "
            f"{crossed.sum()} of which it is not; swap them"
        )


def _steps(law: UpdateLaw, up: np.ndarray, down: np.ndarray) -> dict[str, np.ndarray]:
    """Deviations of the common step and of the asymmetry."""
    if min(up.min(initial=0.0), down.min(initial=0.0)) < 0:
        raise ValueError(
            f"{OP}: `step_up` and `step_down` must be at least 0, got {min(up.min(), down.min()):g}; both are sizes"
        )
    common, asymmetry = (up + down) / 2, (up - down) / 2
    found = {}
    for name, value, spread in (
        ("step", np.log(np.maximum(common, 1e-30)) if law.lognormal_steps else common - 1, law.step_spread),
        ("asymmetry", asymmetry - law.asymmetry, law.asymmetry_spread),
    ):
        if spread:
            found[name] = value / spread
        elif np.abs(value).max(initial=0.0) > 1e-6:
            what = "step_spread" if name == "step" else "asymmetry_spread"
            raise ValueError(
                f"{OP}: `step_up` and `step_down` must deviate only in what the law has a spread for, got {what}=0 and a "
                f"deviation of {np.abs(value).max():g}; set {what}"
            )
    return found
