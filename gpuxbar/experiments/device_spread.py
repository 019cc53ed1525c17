"""How measured devices differ from the mean one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gpuxbar.experiments.measured import Pulses

__all__ = ["SIGNIFICANT", "Devices", "devices_of"]

SIGNIFICANT = 3.0  # standard errors


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


def devices_of(pulses: Pulses, step: np.ndarray, mean: np.ndarray, asymmetry: float = 0.0) -> Devices:
    """How devices differ from steps of this mean and asymmetry: in the size of their steps, and in the asymmetry of these where
    that shows."""
    count = int(pulses.device.max()) + 1
    if count < 3:
        return Devices(np.ones((count, 2)), 0.0, 0.0)
    both, error, known = _ratios(pulses.device, step, mean, count)
    size = _variance(both[known], error[known])
    likely = _drawn_in(both, np.where(known, error, np.inf), size)
    ratio = np.stack([likely, likely], 1)
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
    if apart <= SIGNIFICANT * (2 * np.mean(noise**2) / (both_ways.sum() - 1)) ** 0.5:
        return Devices(ratio, size**0.5, 0.0)
    spread = _variance(steps @ whole, errors @ whole**2)
    size_of = _drawn_in(steps @ whole, errors @ whole**2, spread)
    lean = _drawn_in(steps @ half, noise, apart, 0.0)
    ratio[both_ways] = np.stack([size_of - lean / (1 - asymmetry), size_of + lean / (1 + asymmetry)], 1)
    return Devices(ratio, spread**0.5, apart**0.5)


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


def _drawn_in(values: np.ndarray, errors: np.ndarray, variance: float, mean: float = 1.0) -> np.ndarray:
    """Values of this mean and variance nearest to those measured with squared errors."""
    return mean + (values - mean) * variance / np.maximum(variance + errors, 1e-30)


def _variance(values: np.ndarray, errors: np.ndarray) -> float:
    """Of values beyond that of their errors."""
    return max(float(values.var(ddof=1) - errors.mean()), 0.0) if len(values) > 2 else 0.0
