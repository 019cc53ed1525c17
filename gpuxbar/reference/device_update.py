"""Wanted weight changes through the device law, in NumPy float64: the oracle of `ops.device_update`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpuxbar.reference.endurance import wear, whole_pulses
from gpuxbar.reference.laws import moved, scattered
from gpuxbar.reference.random import Purpose, normals, uniforms

__all__ = ["Cells", "device_update", "drawn_devices"]


@dataclass(frozen=True)
class Cells:
    """One plane of devices: rows of them, their window in shares of the nominal one, their gains and parameters."""

    law: dict[str, Any]
    low: np.ndarray
    high: np.ndarray
    gain_up: np.ndarray
    gain_down: np.ndarray
    z_up: np.ndarray
    z_down: np.ndarray

    @classmethod
    def draw(
        cls, law: dict[str, Any], rows: np.ndarray, cols: int, plane: int, seed: int, floor: float,
        device_map: dict[str, np.ndarray] | None = None,
    ) -> Cells:  # fmt: skip
        """The devices of a map (see `device_update`) or a seed; `floor` is the share of the window where g = 0."""
        z = drawn_devices(rows, cols, plane, seed)
        if device_map is not None:
            none = np.zeros((plane + 1, len(rows), cols))
            z = {name: np.asarray(device_map.get(name, none)[plane], np.float64) for name in z}
        spread = law["step_spread"] * z["step"]
        common = np.exp(spread) if law["lognormal_steps"] else 1 + spread
        asymmetry = law["asymmetry"] + law["asymmetry_spread"] * z["asymmetry"]
        low = np.maximum(law["low_spread"] * z["low"], floor)
        high = np.maximum(1 + law["high_spread"] * z["high"], low + 0.01)
        return cls(
            law, low, high, np.abs(common + asymmetry), np.abs(common - asymmetry),
            z["up"], z["down"],
        )  # fmt: skip

    def law_window(self, rising: bool) -> tuple[np.ndarray, np.ndarray]:
        """(where a law's y is 0, and from there to where it is 1), in shares of the nominal window."""
        law, width = self.law, self.high - self.low
        if law["law"] == "soft_bounds":
            # steps are nominal where those of the nominal device are alike, and 0 at the bound
            alike = law["up"] / (law["up"] + law["down"])
            if rising:
                span = np.maximum(self.high - alike, min(1 - alike, 0.01)) / (1 - alike)
                return self.high - span, span
            return self.low, np.maximum(alike - self.low, min(alike, 0.01)) / alike
        if law["law"] == "exponential_step":
            # around the middle of the nominal window, as wide as the device's own
            return (1 - width) / 2, width
        return self.low, width

    def flow(self, x: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Shares of the nominal window after a wanted change from inside the device's own, wherever its ends are."""
        to = x
        for rising, gain in ((True, self.gain_up), (False, self.gain_down)):
            origin, span = self.law_window(rising)
            own = np.where((wanted > 0) == rising, wanted, 0.0)
            then = origin + span * moved(
                self.law, (x - origin) / span, own * gain / span, self.z_up, self.z_down
            )
            to = np.where(own != 0, then, to)
        return to

    def change(self, x: np.ndarray, wanted: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Shares of the nominal window after a wanted change, with noise z of the cycle."""
        law = self.law
        gain = np.where(wanted > 0, self.gain_up, self.gain_down)
        inside = np.clip(x, self.low, self.high)
        y = (inside - self.low) / (self.high - self.low)
        to = self.flow(inside, wanted)
        size = np.abs(to - inside)
        if law["law"] == "lookup_table":
            to = to + scattered(law, y, z, wanted > 0) * gain / law["pulses"] * np.sqrt(
                np.abs(wanted) * law["pulses"]
            )
        else:
            to = to + deviation(law, size, np.abs(wanted), gain) * z
        return np.where(wanted != 0, np.clip(to, self.low, self.high), x)


def drawn_devices(rows: np.ndarray, cols: int, plane: int, seed: int) -> dict[str, np.ndarray]:
    """Normals that a seed draws for the devices of a plane, [rows, cols] each."""
    drawn: dict[str, np.ndarray] = {}
    for purpose, first, second in (
        (Purpose.UPDATE_SPREAD_STEP, "step", "asymmetry"),
        (Purpose.UPDATE_SPREAD_WINDOW, "low", "high"),
        (Purpose.UPDATE_SPREAD_SHAPE, "up", "down"),
    ):
        pairs = normals(rows, 2 * cols, purpose=purpose, slot=plane, seed=seed, generator="fast")
        drawn |= {first: pairs[:, ::2], second: pairs[:, 1::2]}
    return drawn


def deviation(law: dict[str, Any], size: np.ndarray, wanted: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """Standard deviation of a change of `size`, where `wanted` was asked for; in shares of the window."""
    if law["law"] == "ideal":
        return np.zeros_like(size)
    if law["law"] in ("agarwal", "agarwal_symmetric"):
        return np.sqrt(law["gamma"] ** 2 * size + (law["cycle"] * size) ** 2)
    pulses = wanted * law.get("pulses", law.get("levels"))
    if law["law"] == "neurosim":
        return law["cycle"] * gain * np.sqrt(pulses)
    if law["cycle_of"] == "nominal":
        return law["cycle"] * gain / law["pulses"] * np.sqrt(pulses)
    return size * law["cycle"] / np.sqrt(np.maximum(pulses, 1e-30))


def digits_of(units: np.ndarray, slices: int, base: int) -> np.ndarray:
    """Signed digits, [slices, ...], of numbers up to a full one in size; the lowest has what is below a unit, too."""
    whole, part = np.divmod(np.minimum(np.abs(units), base**slices - 1), 1)
    digits = np.stack([whole.astype(np.int64) // base**k % base for k in range(slices)]).astype(float)
    digits[0] += part
    return np.asarray(digits * np.sign(units))


def sliced(
    share: np.ndarray, slices: int, slice_bits: int | None, carry: dict[str, Any] | None
) -> tuple[np.ndarray, np.ndarray]:
    """What pairs are asked for, [slices, ...], in shares of their window, and the share of a full weight of each window."""
    if carry is None or slice_bits is None:
        return share[None], np.ones(1)
    base, window = 2**slice_bits, 2 ** (slice_bits + carry["headroom_bits"]) - 1
    full = base**slices - 1
    units = share * full
    if carry["scheme"] == "periodic":
        digits = np.concatenate([units[None], np.zeros((slices - 1, *share.shape))])
    else:
        digits = digits_of(units, slices, base)
    return digits / window, float(base) ** np.arange(slices) * window / full


def device_update(
    g: np.ndarray,
    dw: np.ndarray | None,
    *,
    digits: np.ndarray | None = None,
    factor: float = 1.0,
    law: dict[str, Any],
    w_max: np.ndarray,
    g_min: float,
    g_max: float,
    slices: int = 1,
    slice_bits: int | None = None,
    carry: dict[str, Any] | None = None,
    g_held: np.ndarray | None = None,
    endurance: dict[str, Any] | None = None,
    pulse_count: np.ndarray | None = None,
    device_map: dict[str, np.ndarray] | None = None,
    stuck_at_g_min: float = 0.0,
    stuck_at_g_max: float = 0.0,
    seed: int = 0,
    step: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(conductances shown and held, [2 slices, G * I, O] each, weights read out [G, O, I]); `law` and `carry` are dumped specs.

    Wanted are factor * dw, or in their place `digits`, [slices, G, I, O], changes of digits in units. `pulse_count`,
    [2 slices, G * I, O], is updated in place where given. `device_map`: normals of the devices in place of drawn
    ones, like g each, 0 where none are given: "step", "asymmetry", "low", "high" ends of the window, the law's own parameter
    "up" and "down".
    """
    span = g_max - g_min
    if digits is not None and carry is not None and slice_bits is not None:
        _, groups, n_in, n_out = digits.shape
        window_units = 2 ** (slice_bits + carry["headroom_bits"]) - 1
        asked = np.asarray(digits, np.float64).reshape(slices, groups * n_in, n_out) / window_units
    else:
        assert dw is not None
        groups, n_out, n_in = dw.shape
        per_output = np.asarray(w_max, np.float64).reshape(groups, n_out, 1)
        change = factor * np.asarray(dw, np.float64) / per_output
        asked, _ = sliced(change.transpose(0, 2, 1).reshape(groups * n_in, n_out), slices, slice_bits, carry)
    rows = np.arange(groups * n_in)
    held = np.array(g if g_held is None else g_held, np.float64)
    shown = np.array(g, np.float64)
    for plane, own in enumerate((*asked, *-asked)):
        wanted = np.clip(
            {"both": own / 2, "reference": own * (plane < slices), "one_sided": np.maximum(own, 0.0)}[
                law["sides"]
            ],
            -1.0,
            1.0,
        )
        if law["integer_pulses"]:
            pulses = law.get("pulses", law.get("levels"))
            wanted = np.rint(wanted * pulses) / pulses
        cells = Cells.draw(law, rows, n_out, plane, seed, -g_min / span, device_map)
        where: dict[str, Any] = {"slot": plane, "seed": seed}
        u = uniforms(rows, n_out, purpose=Purpose.STUCK, **where)
        touched = (wanted != 0) & ~((u < stuck_at_g_min) | (u > 1.0 - stuck_at_g_max))
        if pulse_count is not None:
            touched &= pulse_count[plane] >= 0
        z = normals(rows, n_out, purpose=Purpose.CYCLE, step=step, **where)
        to = g_min + span * cells.change((held[plane] - g_min) / span, wanted, z)
        held[plane] = np.where(touched, to, held[plane])
        if g_held is not None:
            noise = law["write_noise"] * normals(
                rows, n_out, purpose=Purpose.UPDATE_WRITE, step=step, **where
            )
            shown[plane] = np.where(touched, np.maximum(held[plane] + noise, 0.0), shown[plane])
        if pulse_count is not None and endurance is not None:
            pulses = np.where(touched, np.abs(wanted) * law.get("pulses", law.get("levels")), 0.0)
            whole = np.where(touched, whole_pulses(pulses, plane, seed, step), 0)
            pulse_count[plane], fails = wear(pulse_count[plane], whole, endurance, plane, seed)
            if endurance["failed"] != "held":
                for cells_of in (held, shown):
                    cells_of[plane] = np.where(
                        fails, {"g_min": g_min, "g_max": g_max}[endurance["failed"]], cells_of[plane]
                    )
    if g_held is None:
        shown = held
    lie: dict[str, Any] = {"slices": slices, "slice_bits": slice_bits, "carry": carry}
    return shown, held, read_out(shown, w_max=w_max, groups=groups, g_min=g_min, g_max=g_max, **lie)


def read_out(
    g: np.ndarray,
    *,
    w_max: np.ndarray,
    groups: int,
    g_min: float,
    g_max: float,
    slices: int = 1,
    slice_bits: int | None = None,
    carry: dict[str, Any] | None = None,
) -> np.ndarray:
    """Weights [G, O, I] that pairs [2 slices, G * I, O] stand for; of sliced ones after a carry."""
    _, digit_weights = sliced(np.zeros(()), slices, slice_bits, carry)
    cells = np.asarray(g, np.float64)
    pair = np.tensordot(digit_weights, cells[:slices] - cells[slices:], axes=1) / (g_max - g_min)
    rows, cols = pair.shape
    weights = pair.reshape(groups, rows // groups, cols).transpose(0, 2, 1)
    return weights * np.asarray(w_max, np.float64).reshape(groups, cols, 1)
