"""Which pulses of a measurement are fitted, and which judge the fit."""

from __future__ import annotations

import numpy as np

from gpuxbar.experiments.measured import Pulses
from gpuxbar.spec import Device

__all__ = ["held_out", "in_a_row", "prepared", "shares"]

HOLD_OUT = 0.2  # of the pulses
SAME = 1e-3  # of the window, by which a conductance may differ from where the pulse before led to
FAR = 0.1  # of the window, from it


def prepared(
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
    change = np.abs(one.dg)
    moved = change[change > 0]  # of coarse reads most may tell no change
    far = change > times * (np.median(moved) if len(moved) else 0.0)
    back = in_a_row(one, float(np.ptp(one.g_before)))
    back &= far[:-1] & far[1:] & (one.dg[:-1] * one.dg[1:] < 0)
    apart = np.zeros(len(one), bool)
    apart[order] = np.append(back, False) | np.append(False, back)
    return apart


def in_a_row(pulses: Pulses, span: float) -> np.ndarray:
    """Of pulses sorted by device: which of them, but the last, ends where the next begins, in a window of `span`, S."""
    ends = pulses.g_before[:-1] + pulses.dg[:-1]
    one: np.ndarray = pulses.device[1:] == pulses.device[:-1]
    return one & (np.abs(ends - pulses.g_before[1:]) < SAME * span)


def held_out(pulses: Pulses, seed: int) -> tuple[Pulses, Pulses]:
    """The pulses to fit, and those to judge the fit by."""
    # of a stream of its own: a simulated measurement may use the plain seed
    chosen = np.random.default_rng((seed, len(pulses))).random(len(pulses)) < HOLD_OUT
    return pulses[~chosen], pulses[chosen]


def shares(pulses: Pulses, window: Device) -> tuple[np.ndarray, np.ndarray]:
    """Conductance before and change, in shares of the window."""
    span = window.g_max - window.g_min
    return (pulses.g_before - window.g_min) / span, pulses.dg / span
