"""Device laws fitted to measured pulses: a lookup table or a parametric law."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from pydantic import TypeAdapter
from scipy.optimize import least_squares
from scipy.special import ndtr

from gpuxbar.experiments.chosen_pulses import held_out, prepared, shares
from gpuxbar.experiments.device_spread import devices_of
from gpuxbar.experiments.fit_check import Fit, judged, predicted, pulse_count
from gpuxbar.experiments.measured import Pulses
from gpuxbar.spec import CrossbarSpec, Device, LookupTable, PiecewiseStep, SpecError, UpdateLaw
from gpuxbar.spec.errors import nearest

__all__ = ["fit_law", "fit_table"]

LAW: TypeAdapter[UpdateLaw] = TypeAdapter(UpdateLaw)
SCORES = np.linspace(-4.0, 4.0, 17)
BINS = 2, 3, 5, 9
FEWEST = 20  # pulses of one direction in a bin


def fit_table(
    pulses: Pulses,
    *,
    bins: int = 9,
    g_min: float | None = None,
    g_max: float | None = None,
    misread: float | None = None,
    seed: int = 0,
) -> Fit:
    """Tabulate mean steps and scatter at `bins` conductances, evenly spaced over the window.

    Means are the piecewise linear least squares through the pulses; scatter is the quantiles of what is left around
    them; the spread between devices is what their mean steps differ by beyond the error of the mean, and so is that of their
    asymmetry where it shows: every law has these two, and none has a spread for each direction, so that up and down steps which
    scatter by different shares get what they have in common. A fifth of the pulses is held out and judged by the table made of
    the others.

    Args:
        pulses: Measured single pulses.
        bins: 2, 3, 5 or 9.
        g_min, g_max: Window, S; the extremes of `g_before` if None. Pulses that begin outside a given one, or end more than a
            tenth of it away, are taken for misread and left out.
        misread: Left out, too, are pulses before and after a conductance that departs from those read before and after it, the same
            way, by more than this many median changes; None: none are.
        seed: Of the choice of the held-out pulses.

    Returns:
        The law, its window, and how it does on what was held out.

    Raises:
        ValueError: `bins` is another number, a bin has too few pulses, most pulses lie outside the window, or changes do not go the
            way of their direction.

    Source:
        Agarwal et al., IJCNN 2016 (tables of measured changes).
    """
    _require_bins("fit_table", bins)
    window, inside = prepared("fit_table", pulses, g_min, g_max, misread)
    train, test = held_out(inside, seed)
    y, step = shares(train, window)
    _require_filled("fit_table", train, y, window, bins)
    flows, nominal = _flows("fit_table", train, y, step, bins)
    mean = _mean_step(flows, nominal, y, train.rising)
    devices = devices_of(train, step, mean)
    ratio = devices.of(train)
    rest = (step - ratio * mean) / (nominal * np.maximum(ratio, 1e-3))
    scatter = {
        way: _quantiles(y[train.rising == way], rest[train.rising == way], bins) for way in (True, False)
    }
    law = LookupTable(
        pulses=1 / nominal, up=tuple(flows[True].tolist()), down=tuple(flows[False].tolist()),
        scatter_up=scatter[True], scatter_down=scatter[False], **devices.spreads,
    )  # fmt: skip
    return judged(law, window, inside, test, devices, left_out=len(pulses) - len(inside))


SHAPES: dict[str, dict[str, tuple[float, float, float]]] = {  # start, least and largest
    "agarwal": {"nu": (1.0, 1e-3, 20.0)},
    "agarwal_symmetric": {"alpha": (1.0, 1e-2, 20.0)},
    "constant_step": {},
    "exponential_step": {
        "amplitude_up": (0.1, -100.0, 100.0), "amplitude_down": (0.1, -100.0, 100.0), "rate_up": (1.0, 1e-2, 20.0),
        "rate_down": (1.0, 1e-2, 20.0),
    },
    "linear_step": {"slope_up": (0.3, -1.0, 1.0), "slope_down": (0.3, -1.0, 1.0)},
    "neurosim": {"nonlinearity_ltp": (1.0, -9.0, 9.0), "nonlinearity_ltd": (1.0, -9.0, 9.0)},
    "power_step": {"exponent_up": (1.0, 0.0, 10.0), "exponent_down": (1.0, 0.0, 10.0)},
    "soft_bounds": {},
}  # fmt: skip
FIXED: dict[str, tuple[dict[str, float], ...]] = {  # beside them, in turn
    "exponential_step": (
        {"a": 1.0, "b": 0.0},
        {"a": -1.0, "b": 0.0},
    ),  # steps that bend up, or down, on the way
    "soft_bounds": ({"up": 2.0, "down": 2.0},),  # its steps are half in mid-window
}


def fit_law(
    pulses: Pulses,
    law: str,
    *,
    bins: int = 9,
    g_min: float | None = None,
    g_max: float | None = None,
    misread: float | None = None,
    seed: int = 0,
) -> Fit:
    """Fit a parametric law by least squares to the same pulses, with its asymmetry, spreads and cycle noise.

    Noise of laws with a `cycle_of` is that of the nominal step or of the step itself, whichever is likelier.

    Args:
        pulses: Measured single pulses.
        law: "agarwal", "agarwal_symmetric", "constant_step", "exponential_step", "linear_step", "neurosim", "piecewise_step",
            "power_step", "soft_bounds".
        bins: Of a piecewise step: as for `fit_table`.
        g_min, g_max, misread, seed: As for `fit_table`. Soft bounds need the ends at which steps would be 0, which measurements seldom
            reach.

    Returns:
        The law, its window, and how it does on what was held out.

    Raises:
        ValueError: The law is not one of these; else as `fit_table`.
    """
    known = (*SHAPES, "piecewise_step")
    if law not in known:
        raise ValueError(
            f"fit_law: `law` must be a law that can be fitted, got {law!r}; {nearest(law, known)}"
        )
    if law == "piecewise_step":
        _require_bins("fit_law", bins)
    window, inside = prepared("fit_law", pulses, g_min, g_max, misread)
    train, test = held_out(inside, seed)
    y, step = shares(train, window)
    size = float(np.where(train.rising, step, -step).mean())
    _require_rising("fit_law", size)
    if law == "piecewise_step":
        _require_filled("fit_law", train, y, window, bins)
        flows, nominal = _flows("fit_law", train, y, step, bins)
        shape = PiecewiseStep(
            pulses=1 / nominal, up=tuple(flows[True].tolist()), down=tuple(flows[False].tolist())
        )
        found = shape.model_dump()
    else:
        found = _shaped(law, y, step, train.rising, size)
    mean = predicted(found, y, train.rising)
    devices = devices_of(train, step, mean, found["asymmetry"])
    ratio = devices.of(train)
    rest = step - ratio * mean
    noise = float(np.mean(rest**2))
    if law.startswith("agarwal"):
        found["gamma"] = np.sqrt(noise / np.mean(np.abs(mean)))
    elif law == "neurosim":
        found["cycle"], found["levels"] = np.sqrt(noise), max(round(found["levels"]), 2)
    else:
        found |= _cycle(rest, ratio * mean, found["pulses"])
    law_found = _lawful(found | devices.spreads)
    return judged(law_found, window, inside, test, devices, left_out=len(pulses) - len(inside))


def _lawful(found: dict[str, Any]) -> UpdateLaw:
    """The law of these settings, which a fit may have led beyond what a law takes."""
    try:
        law = CrossbarSpec(update=found).update
    except SpecError as error:
        raise ValueError(
            f"fit_law: `law` must fit these pulses by settings in its range, got {found['law']!r} and: {error}; check g_min and "
            "g_max, which are in S, or take another law"
        ) from None
    assert law is not None
    return law


def _cycle(rest: np.ndarray, mean: np.ndarray, pulses: float) -> dict[str, Any]:
    """Scatter `rest` around steps `mean` as a share of the nominal step or of these, whichever makes it likelier as Gaussian."""
    nominal = np.sqrt(np.mean(rest**2))
    # steps of 0 do not scatter, unless with the nominal one
    with np.errstate(divide="ignore", invalid="ignore"):
        of_step = np.sqrt(np.mean((rest / mean) ** 2))
        likelier = np.log(of_step) + np.mean(np.log(np.abs(mean))) < np.log(nominal)
    if likelier:
        return {"cycle": of_step, "cycle_of": "step"}
    return {"cycle": nominal * pulses, "cycle_of": "nominal"}


def _shaped(law: str, y: np.ndarray, step: np.ndarray, rising: np.ndarray, size: float) -> dict[str, Any]:
    """The settings of a law without noise whose steps come nearest to those measured; `size`: their mean."""
    base, shapes = LAW.validate_python({"law": law}).model_dump(), SHAPES[law]
    shown, way = np.unique(np.stack([np.rint(y * 200) / 200, rising]), axis=1, return_inverse=True)
    weight = np.bincount(way.ravel())
    target = np.bincount(way.ravel(), step) / weight

    def settings(p: np.ndarray, fixed: dict[str, float]) -> dict[str, Any]:
        scale = {pulse_count(law): float(1 / (size * np.exp(p[0]))), "asymmetry": np.tanh(p[1])}
        return base | scale | fixed | dict(zip(shapes, map(float, p[2:]), strict=True))

    def off(p: np.ndarray, fixed: dict[str, float]) -> np.ndarray:
        return np.sqrt(weight) * (predicted(settings(p, fixed), shown[0], shown[1] > 0) - target) / size

    bounds = [(-3.0, 3.0), (-3.0, 3.0), *((low, high) for _, low, high in shapes.values())]
    start = [0.0, 0.0, *(first for first, _, _ in shapes.values())]
    # steps by which a slope shows: laws take exponents and rates close to a special value for that value
    fit = partial(least_squares, off, start, bounds=tuple(zip(*bounds, strict=True)), diff_step=1e-4)
    found = [(fit(args=(fixed,)), fixed) for fixed in FIXED.get(law, ({},))]
    best, fixed = min(found, key=lambda one: one[0].cost)
    return settings(best.x, fixed)


def _require_bins(op: str, bins: int) -> None:
    if bins not in BINS:
        raise ValueError(f"{op}: `bins` must be 2, 3, 5 or 9, got {bins}; choose one of these")


def _require_rising(op: str, step: float) -> None:
    if not step > 0:
        raise ValueError(
            f"{op}: column 'dg' must rise with direction +1 and fall with -1, got a mean step of {step:.3g} of the "
            "window; check the sign of 'direction'"
        )


def _require_filled(op: str, pulses: Pulses, y: np.ndarray, window: Device, bins: int) -> None:
    def filled(bins: int, way: bool) -> np.ndarray:
        return np.bincount(np.rint(y[pulses.rising == way] * (bins - 1)).astype(int), minlength=bins)

    for way, name in ((True, "+1"), (False, "-1")):
        count = filled(bins, way)
        if count.min() < FEWEST:
            enough = [n for n in BINS if n < bins and min(*filled(n, True), *filled(n, False)) >= FEWEST]
            fewer = f", take {enough[-1]} bins" if enough else ""
            k, span = int(count.argmin()), window.g_max - window.g_min
            ends = [window.g_min + span * min(max((k + h) / (bins - 1), 0.0), 1.0) for h in (-0.5, 0.5)]
            raise ValueError(
                f"{op}: bin {k + 1} of {bins} ({ends[0]:.4g} to {ends[1]:.4g} S) must hold at least {FEWEST} pulses of "
                f"direction {name} to fit, got {count[k]}; measure there{fewer} or narrow g_min and g_max"
            )


def _hats(y: np.ndarray, bins: int) -> np.ndarray:
    """Weights of the nodes at y, [len(y), bins]."""
    return np.maximum(0.0, 1 - np.abs(y[:, None] * (bins - 1) - np.arange(bins)))


def _means(y: np.ndarray, step: np.ndarray, bins: int) -> np.ndarray:
    return np.linalg.lstsq(_hats(y, bins), step, rcond=None)[0]


def _flows(
    op: str, pulses: Pulses, y: np.ndarray, step: np.ndarray, bins: int
) -> tuple[dict[bool, np.ndarray], float]:
    """Mean steps at the nodes both ways, in nominal ones, and the nominal step as a share of the window."""
    means = {way: _means(y[pulses.rising == way], step[pulses.rising == way], bins) for way in (True, False)}
    nominal = float(np.concatenate([means[True], -means[False]]).mean())
    _require_rising(op, nominal)
    flows = {way: np.maximum(means[way] if way else -means[way], 0.0) / nominal for way in (True, False)}
    return flows, nominal


def _mean_step(
    flows: dict[bool, np.ndarray], nominal: float, y: np.ndarray, rising: np.ndarray
) -> np.ndarray:
    at = {way: np.interp(y, np.linspace(0, 1, len(flow)), flow) for way, flow in flows.items()}
    return nominal * np.where(rising, at[True], -at[False])


def _quantiles(y: np.ndarray, rest: np.ndarray, bins: int) -> tuple[tuple[float, ...], ...]:
    node = np.rint(y * (bins - 1)).astype(int)
    return tuple(tuple(np.quantile(rest[node == k], ndtr(SCORES)).tolist()) for k in range(bins))
