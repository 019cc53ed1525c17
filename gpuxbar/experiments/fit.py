"""Device laws fitted to measured pulses: a lookup table or a parametric law, with a hold-out check and its picture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import TypeAdapter
from scipy.optimize import least_squares
from scipy.special import ndtr

from gpuxbar import reference
from gpuxbar.experiments.measured import Pulses
from gpuxbar.spec import CrossbarSpec, Device, LookupTable, PiecewiseStep, SpecError, UpdateLaw
from gpuxbar.spec.errors import nearest

__all__ = ["Fit", "fit_law", "fit_table", "plot_fit"]

LAW: TypeAdapter[UpdateLaw] = TypeAdapter(UpdateLaw)
SCORES = np.linspace(-4.0, 4.0, 17)
BINS = 2, 3, 5, 9
FEWEST = 20  # pulses of one direction in a bin
HOLD_OUT = 0.2  # of the pulses
SAME = 1e-3  # of the window, by which a conductance may differ from where the pulse before led to
SIGNIFICANT = 3.0  # standard errors
FAR = 0.1  # of the window, from it


@dataclass(frozen=True)
class Fit:
    """A law fitted to measured pulses, and how well it foretells those that were held out.

    Attributes:
        explained: Share of the variance of held-out changes that the mean step explains, up and down.
        distance: Kolmogorov-Smirnov distance of the held-out changes to the law's distribution, up and down: in the low, the middle
            or the high third of their conductances, whichever is worst.
        limit: Distance that a right law exceeds in any third in 1 % of cases, up and down.
        rank: Place of each held-out change in the law's distribution, 0 to 1; evenly spread for a right law.
        read_noise: Standard deviation of a measured conductance, S, by changes measured one after another on a device: a misread
            conductance makes one too large and the next too small. 0 where that does not show; changes of a device that depend on
            one another otherwise are taken for it, or hide it.
        read_share: Share of the scatter of changes that this makes; the law takes all scatter for its own.
        left_out: How many pulses begin outside the window or end far from it: misread, and neither fitted nor held out.
    """

    law: UpdateLaw
    window: Device
    held_out: Pulses
    explained: tuple[float, float]
    distance: tuple[float, float]
    limit: tuple[float, float]
    rank: np.ndarray
    read_noise: float
    read_share: float
    left_out: int

    @property
    def passed(self) -> bool:
        return all(d <= limit for d, limit in zip(self.distance, self.limit, strict=True))


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
    window, inside = _prepared("fit_table", pulses, g_min, g_max, misread)
    train, test = _held_out(inside, seed)
    y, step = _shares(train, window)
    _require_filled("fit_table", train, y, window, bins)
    flows, nominal = _flows("fit_table", train, y, step, bins)
    mean = _mean_step(flows, nominal, y, train.rising)
    devices = _devices(train, step, mean)
    ratio = devices.of(train)
    rest = (step - ratio * mean) / (nominal * np.maximum(ratio, 1e-3))
    scatter = {
        way: _quantiles(y[train.rising == way], rest[train.rising == way], bins) for way in (True, False)
    }
    law = LookupTable(
        pulses=1 / nominal, up=tuple(flows[True].tolist()), down=tuple(flows[False].tolist()),
        scatter_up=scatter[True], scatter_down=scatter[False], **devices.spreads,
    )  # fmt: skip
    return _judged(law, window, inside, test, devices, left_out=len(pulses) - len(inside))


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
    window, inside = _prepared("fit_law", pulses, g_min, g_max, misread)
    train, test = _held_out(inside, seed)
    y, step = _shares(train, window)
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
    mean = _predicted(found, y, train.rising)
    devices = _devices(train, step, mean, found["asymmetry"])
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
    return _judged(law_found, window, inside, test, devices, left_out=len(pulses) - len(inside))


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
        scale = {_count(law): float(1 / (size * np.exp(p[0]))), "asymmetry": np.tanh(p[1])}
        return base | scale | fixed | dict(zip(shapes, map(float, p[2:]), strict=True))

    def off(p: np.ndarray, fixed: dict[str, float]) -> np.ndarray:
        return np.sqrt(weight) * (_predicted(settings(p, fixed), shown[0], shown[1] > 0) - target) / size

    bounds = [(-3.0, 3.0), (-3.0, 3.0), *((low, high) for _, low, high in shapes.values())]
    start = [0.0, 0.0, *(first for first, _, _ in shapes.values())]
    # steps by which a slope shows: laws take exponents and rates close to a special value for that value
    fit = partial(least_squares, off, start, bounds=tuple(zip(*bounds, strict=True)), diff_step=1e-4)
    found = [(fit(args=(fixed,)), fixed) for fixed in FIXED.get(law, ({},))]
    best, fixed = min(found, key=lambda one: one[0].cost)
    return settings(best.x, fixed)


def _count(law: str) -> str:
    """The setting that holds how many nominal pulses span the window."""
    return "levels" if law == "neurosim" else "pulses"


def _predicted(
    law: dict[str, Any], y: np.ndarray, rising: np.ndarray | bool, ratio: np.ndarray | float = 1.0
) -> np.ndarray:
    """Mean changes by a pulse, in shares of the window, of devices that make this ratio of the law's steps."""
    step = ratio * np.where(rising, 1 + law["asymmetry"], law["asymmetry"] - 1) / law[_count(law["law"])]
    moved: np.ndarray = reference.laws.moved(law, y, np.broadcast_to(step, y.shape))
    return moved - y


def _prepared(
    op: str, given: Pulses, g_min: float | None, g_max: float | None, misread: float | None
) -> tuple[Device, Pulses]:
    """The window, and the pulses that begin in it, do not end far from it, and have no end that stands apart."""
    pulses = given if misread is None else given[~_apart(op, given, misread)]
    low = float(pulses.g_before.min()) if g_min is None else g_min
    high = float(pulses.g_before.max()) if g_max is None else g_max
    if g_min is None and low < 0:
        raise ValueError(
            f"{op}: column 'g_before' must hold conductances of at least 0, got {low:g} S among {(pulses.g_before < 0).sum()} "
            "below 0; where small conductances were misread, give g_min, which leaves these pulses out"
        )
    if not 0 <= low < high:
        raise ValueError(
            f"{op}: column 'g_before' must span a window of conductances of at least 0, got {low:g} to {high:g} S; give g_min "
            "and g_max"
        )
    after, far = pulses.g_before + pulses.dg, FAR * (high - low)
    left_out = (pulses.g_before < low) | (pulses.g_before > high)
    if g_min is not None:
        left_out |= after < low - far
    if g_max is not None:
        left_out |= after > high + far
    if 2 * left_out.sum() > len(pulses):
        raise ValueError(
            f"{op}: column 'g_before' must lie in the window of {low:g} to {high:g} S, but where it was misread, got "
            f"{left_out.sum()} of {len(pulses)} pulses outside; widen g_min and g_max, which are in S"
        )
    return Device(g_min=low, g_max=high), pulses[~left_out]


def _apart(op: str, pulses: Pulses, times: float) -> np.ndarray:
    """Which pulses lead to or from a conductance that stands apart from those read before and after it."""
    if not times > 1:
        raise ValueError(
            f"{op}: `misread` must be above 1, got {times:g}; it counts median changes, and 10 is a large one"
        )
    order = np.argsort(pulses.device, kind="stable")
    one = pulses[order]
    far = np.abs(one.dg) > times * np.median(np.abs(one.dg))
    back = _in_a_row(one, SAME * float(np.ptp(one.g_before)))
    back &= far[:-1] & far[1:] & (one.dg[:-1] * one.dg[1:] < 0)
    apart = np.zeros(len(one), bool)
    apart[order] = np.append(back, False) | np.append(False, back)
    return apart


def _in_a_row(pulses: Pulses, same: float) -> np.ndarray:
    """Of pulses sorted by device: which of them, but the last, ends where the next begins, to within `same`, S."""
    ends = pulses.g_before[:-1] + pulses.dg[:-1]
    one: np.ndarray = pulses.device[1:] == pulses.device[:-1]
    return one & (np.abs(ends - pulses.g_before[1:]) < same)


def _held_out(pulses: Pulses, seed: int) -> tuple[Pulses, Pulses]:
    """The pulses to fit, and those to judge the fit by."""
    # of a stream of its own: a simulated measurement may use the plain seed
    chosen = np.random.default_rng((seed, len(pulses))).random(len(pulses)) < HOLD_OUT
    return pulses[~chosen], pulses[chosen]


def _shares(pulses: Pulses, window: Device) -> tuple[np.ndarray, np.ndarray]:
    """Conductance before and change, in shares of the window."""
    span = window.g_max - window.g_min
    return (pulses.g_before - window.g_min) / span, pulses.dg / span


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


class Devices(NamedTuple):
    """How devices differ: the steps of each over the mean device's, [devices, 2], down and up, and the spreads of a law that these
    say, beyond the error of each."""

    ratio: np.ndarray
    step_spread: float
    asymmetry_spread: float

    def of(self, pulses: Pulses) -> np.ndarray:
        """Ratios of the device and direction of every pulse; what was not fitted is the last."""
        known: np.ndarray = self.ratio[
            np.minimum(pulses.device, len(self.ratio) - 1), pulses.rising.astype(int)
        ]
        return known

    @property
    def spreads(self) -> dict[str, float]:
        return {
            "step_spread": min(self.step_spread, 2.0),
            "asymmetry_spread": min(self.asymmetry_spread, 1.0),
        }


def _devices(pulses: Pulses, step: np.ndarray, mean: np.ndarray, asymmetry: float = 0.0) -> Devices:
    """How devices differ from steps of this mean and asymmetry: in the size of their steps, and in the asymmetry of these where
    that shows."""
    count = int(pulses.device.max()) + 1
    if count < 3:
        return Devices(np.ones((count, 2)), 0.0, 0.0)
    both, error, known = _ratios(pulses.device, step, mean, count)
    ratio = np.stack([both, both], 1)
    size = _variance(both[known], error[known])
    each, errors, told = (
        part.reshape(count, 2) for part in _ratios(2 * pulses.device + pulses.rising, step, mean, 2 * count)
    )
    both_ways = told.all(1)
    if both_ways.sum() < 3:
        return Devices(ratio, size**0.5, 0.0)
    # steps are (1 + s) (1 + a + d) up and (1 + s) (1 - a - d) down, of which a is the mean device's; up / (1 + a) less
    # down / (1 - a) is 2 d / (1 - a**2), and their sum as the mean device's is 2 (1 + s)
    whole, half = np.array([1 - asymmetry, 1 + asymmetry]) / 2, np.array([-1, 1]) * (1 - asymmetry**2) / 2
    steps, errors = each[both_ways], errors[both_ways]
    noise = errors @ half**2
    apart = _variance(steps @ half, noise)
    if apart <= SIGNIFICANT * noise.mean() * (2 / (both_ways.sum() - 1)) ** 0.5:
        return Devices(ratio, size**0.5, 0.0)
    ratio[both_ways] = steps
    return Devices(ratio, _variance(steps @ whole, errors @ whole**2) ** 0.5, apart**0.5)


def _ratios(
    group: np.ndarray, step: np.ndarray, mean: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Step of each group of pulses over the mean one, its squared error, and whether it has one: a single pulse tells none."""
    weight = np.maximum(np.bincount(group, mean**2, count), 1e-30)
    ratio = np.bincount(group, step * mean, count) / weight
    rest = (step - ratio[group] * mean) * mean
    pulsed = np.bincount(group, minlength=count)
    own = pulsed / np.maximum(pulsed - 1, 1)  # each ratio is fitted to its group's own pulses
    return ratio, own * np.bincount(group, rest**2, count) / weight**2, pulsed > 1


def _variance(values: np.ndarray, errors: np.ndarray) -> float:
    """Of values beyond that of their errors."""
    return max(float(values.var(ddof=1) - errors.mean()), 0.0) if len(values) > 2 else 0.0


def _quantiles(y: np.ndarray, rest: np.ndarray, bins: int) -> tuple[tuple[float, ...], ...]:
    node = np.rint(y * (bins - 1)).astype(int)
    return tuple(tuple(np.quantile(rest[node == k], ndtr(SCORES)).tolist()) for k in range(bins))


def _read_noise(law: UpdateLaw, window: Device, pulses: Pulses, devices: Devices) -> tuple[float, float]:
    """Standard deviation of a read, S, and its share of the scatter of all pulses."""
    one = pulses[np.argsort(pulses.device, kind="stable")]
    y, step = _shares(one, window)
    rest = step - _predicted(law.model_dump(), y, one.rising, devices.of(one))
    way = 2 * one.device + one.rising
    rest -= (np.bincount(way, rest) / np.maximum(np.bincount(way), 1))[
        way
    ]  # what a device does otherwise than the law is no noise
    span = window.g_max - window.g_min
    products = -(rest[:-1] * rest[1:])[_in_a_row(one, SAME * span)]
    if not products.size:
        return 0.0, 0.0
    variance = float(products.mean())
    if variance <= SIGNIFICANT * products.std() / products.size**0.5:
        return 0.0, 0.0
    return variance**0.5 * span, min(2 * variance / float(rest.var()), 1.0)


def _judged(
    law: UpdateLaw, window: Device, pulses: Pulses, test: Pulses, devices: Devices, left_out: int
) -> Fit:
    """How the law foretells held-out pulses: mean, and distribution by its probability integral transform."""
    y, step = _shares(test, window)
    gain = devices.of(test)
    dumped = law.model_dump()
    nominal = 1 / dumped[_count(law.law)]
    mean = _predicted(dumped, y, test.rising, gain)
    rest = step - mean
    if isinstance(law, LookupTable):
        scale = np.maximum(gain, 1e-3) * nominal
        grid = np.linspace(-4, 4, 161)
        curve = np.stack([reference.laws.scattered(dumped, y, np.full_like(y, z), test.rising) for z in grid])
        below = (curve < rest / scale).mean(0)
        z = np.clip(below * 8 - 4, -4, 4)
    elif "gamma" in dumped:
        z = rest / np.maximum(dumped["gamma"] * np.sqrt(np.abs(mean)), 1e-30)
    else:
        # of the window where a law knows no `cycle_of`
        scale = {"step": np.abs(mean), "nominal": nominal}.get(dumped.get("cycle_of", ""), 1.0)
        z = rest / np.maximum(dumped["cycle"] * scale, 1e-30)
    explained, distance, limit = [], [], []
    for way in (True, False):
        mine = test.rising == way
        explained.append(float(1 - rest[mine].var() / max(step[mine].var(), 1e-30)) if mine.any() else 0.0)
        worst = max(
            (_off_uniform(ndtr(part)) for part in _thirds(y[mine], z[mine])), key=lambda off: off[0] / off[1]
        )
        distance.append(worst[0])
        limit.append(worst[1])
    return Fit(
        law, window, test, (explained[0], explained[1]), (distance[0], distance[1]), (limit[0], limit[1]), ndtr(z),
        *_read_noise(law, window, pulses, devices), left_out,
    )  # fmt: skip


def _thirds(y: np.ndarray, z: np.ndarray) -> list[np.ndarray]:
    """z of low, of middling and of high y, as many of each: a law may be right over all and wrong in every one."""
    return np.array_split(z[np.argsort(y, kind="stable")], 3)


def _off_uniform(u: np.ndarray) -> tuple[float, float]:
    """Kolmogorov-Smirnov distance of values to an even spread over 0 .. 1, and what chance exceeds in one of 300 cases."""
    n = max(len(u), 1)
    ranks, u = np.arange(len(u) + 1) / n, np.sort(u)
    distance = float(max((ranks[1:] - u).max(), (u - ranks[:-1]).max())) if len(u) else 0.0
    return distance, 1.79 / float(np.sqrt(n))


def plot_fit(fit: Fit, path: str | Path) -> None:
    """Draw held-out changes over the law's mean, and their ranks in its distribution, to a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.5), layout="constrained")
    up, down, ranks = figure.subplots(1, 3)
    y, _ = _shares(fit.held_out, fit.window)
    at = np.linspace(0, 1, 101)
    span = fit.window.g_max - fit.window.g_min
    g = fit.window.g_min + at * span
    for axis, way, name in ((up, True, "potentiation"), (down, False, "depression")):
        mine = fit.held_out.rising == way
        axis.plot(
            fit.held_out.g_before[mine] * 1e6, fit.held_out.dg[mine] * 1e9, ".", markersize=2, alpha=0.3
        )
        axis.plot(
            g * 1e6, _predicted(fit.law.model_dump(), at, way) * span * 1e9, color="black", label=fit.law.law
        )
        axis.set(xlabel="conductance before (uS)", ylabel="change (nS)", title=name)
        axis.legend()
        ranks.hist(fit.rank[mine], bins=20, range=(0, 1), density=True, histtype="step", label=name)
    ranks.axhline(1, color="black", linewidth=0.7)
    ranks.set(xlabel="rank in the law's distribution", ylabel="density", title="hold-out")
    ranks.legend()
    figure.savefig(path, dpi=120)
