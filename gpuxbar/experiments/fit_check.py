"""How a law does on pulses that were held out of its fit, and pictures of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import ndtr

from gpuxbar import reference
from gpuxbar.experiments.chosen_pulses import in_a_row, shares
from gpuxbar.experiments.device_spread import SIGNIFICANT, Devices
from gpuxbar.experiments.measured import Pulses
from gpuxbar.spec import Device, LookupTable, UpdateLaw

__all__ = ["Fit", "judged", "plot_fit", "predicted", "pulse_count"]


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
        left_out: How many pulses begin outside the window, end far from it, or lead to or from a conductance that stands apart:
            misread, and neither fitted nor held out.
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


def judged(
    law: UpdateLaw, window: Device, pulses: Pulses, test: Pulses, devices: Devices, left_out: int
) -> Fit:
    """How the law foretells held-out pulses: mean, and distribution by its probability integral transform."""
    y, step = shares(test, window)
    gain = devices.of(test)
    dumped = law.model_dump()
    nominal = 1 / dumped[pulse_count(law.law)]
    mean = predicted(dumped, y, test.rising, gain)
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


def _read_noise(law: UpdateLaw, window: Device, pulses: Pulses, devices: Devices) -> tuple[float, float]:
    """Standard deviation of a read, S, and its share of the scatter of all pulses."""
    one = pulses[np.argsort(pulses.device, kind="stable")]
    y, step = shares(one, window)
    rest = step - predicted(law.model_dump(), y, one.rising, devices.of(one))
    way = 2 * one.device + one.rising
    rest -= (np.bincount(way, rest) / np.maximum(np.bincount(way), 1))[
        way
    ]  # what a device does otherwise than the law is no noise
    span = window.g_max - window.g_min
    products = -(rest[:-1] * rest[1:])[in_a_row(one, span)]
    if not products.size:
        return 0.0, 0.0
    variance = float(products.mean())
    if variance <= SIGNIFICANT * products.std() / products.size**0.5:
        return 0.0, 0.0
    return variance**0.5 * span, min(2 * variance / float(rest.var()), 1.0)


def pulse_count(law: str) -> str:
    """The setting that holds how many nominal pulses span the window."""
    return "levels" if law == "neurosim" else "pulses"


def predicted(
    law: dict[str, Any], y: np.ndarray, rising: np.ndarray | bool, ratio: np.ndarray | float = 1.0
) -> np.ndarray:
    """Mean changes by a pulse, in shares of the window, of devices that make this ratio of the law's steps."""
    step = ratio * np.where(rising, 1 + law["asymmetry"], law["asymmetry"] - 1) / law[pulse_count(law["law"])]
    moved: np.ndarray = reference.laws.moved(law, y, np.broadcast_to(step, y.shape))
    return moved - y


def plot_fit(fit: Fit, path: str | Path) -> None:
    """Draw held-out changes over the law's mean, and their ranks in its distribution, to a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.5), layout="constrained")
    up, down, ranks = figure.subplots(1, 3)
    y, _ = shares(fit.held_out, fit.window)
    at = np.linspace(0, 1, 101)
    span = fit.window.g_max - fit.window.g_min
    g = fit.window.g_min + at * span
    for axis, way, name in ((up, True, "potentiation"), (down, False, "depression")):
        mine = fit.held_out.rising == way
        axis.plot(
            fit.held_out.g_before[mine] * 1e6, fit.held_out.dg[mine] * 1e9, ".", markersize=2, alpha=0.3
        )
        axis.plot(
            g * 1e6, predicted(fit.law.model_dump(), at, way) * span * 1e9, color="black", label=fit.law.law
        )
        axis.set(xlabel="conductance before (uS)", ylabel="change (nS)", title=name)
        axis.legend()
        ranks.hist(fit.rank[mine], bins=20, range=(0, 1), density=True, histtype="step", label=name)
    ranks.axhline(1, color="black", linewidth=0.7)
    ranks.set(xlabel="rank in the law's distribution", ylabel="density", title="hold-out")
    ranks.legend()
    figure.savefig(path, dpi=120)
