"""Pulse trains through the device law, in NumPy float64: the oracle of `ops.pulse_update`."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuxbar.reference.device_update import Cells, deviation, read_out, sliced
from gpuxbar.reference.endurance import wear
from gpuxbar.reference.random import Purpose, normals, uniforms, words
from gpuxbar.reference.tile_mvm import ConvGeometry, by_group, unfold

__all__ = ["pulse_trains", "pulse_update"]

Array = np.ndarray


def pulse_trains(
    x: Array,
    e: Array,
    *,
    train: dict[str, Any],
    unit: Array | float,
    groups: int = 1,
    seed: int = 0,
    step: int = 0,
) -> tuple[Array, Array, Array]:
    """(signed slots of the inputs [B, G * I, 31] and of the errors [B, G * O, 31], lengths [B, G]).

    Args:
        x: Inputs, [B, G * I].
        e: Wanted pulses of a pair for an input of 1, [B, G * O].
        train: A dumped `PulseTrain`.
        unit: e of an error of 1, for the largest step of each group, [G].
        groups: G.
        seed, step: Of the random numbers.
    """
    steps = np.broadcast_to(np.asarray(unit, np.float64), (groups,))
    top_x, top_e = (np.abs(by_group(a, groups)).max(2, initial=0.0) for a in (x, e))
    wanted = top_x * top_e
    fires = wanted > 0
    length = np.full(wanted.shape, train["length"])
    if train["bound_management"]:
        length = np.clip(np.ceil(wanted), 1, train["length"]).astype(np.int64)
    with np.errstate(divide="ignore", invalid="ignore"):
        clipped = top_e * np.minimum(1.0, length / wanted)
        split = (
            np.sqrt(clipped / top_x)
            if train["update_management"]
            else np.broadcast_to(np.sqrt(steps), wanted.shape)
        )
        per_x = np.where(fires, split / np.sqrt(length), 0.0)
        per_e = np.where(fires, 1 / (split * np.sqrt(length)), 0.0)
    slots = []
    for values, per, purpose in ((x, per_x, Purpose.PULSE_INPUT), (e, per_e, Purpose.PULSE_ERROR)):
        lines = values.shape[1] // groups if groups else 0
        p = np.minimum(np.abs(values) * np.repeat(per, lines, 1), 1.0)
        long = np.repeat(length, lines, 1)
        if train["scheme"] == "deterministic_implicit":
            fired = np.arange(31) < np.rint(p * long)[..., None]
        else:
            fired = _bernoulli(p, purpose, groups, seed, step) & (np.arange(31) < long[..., None])
        slots.append(np.sign(values)[..., None] * fired)
    return slots[0], slots[1], np.where(fires, length, 1)


def _bernoulli(p: Array, purpose: Purpose, groups: int, seed: int, step: int) -> Array:
    """31 slots of each probability, in 2^-24: a slot fires where a binary fraction of 24 random bits is below it.

    Of slot s, the eight lines 8 e .. 8 e + 7 of a group share counters: {s, e} has the first 16 bits of each, the low half
    of a word before the high one, and {32 + s, e} the last 8, in the low bytes of the same halves.
    """
    batch, lines = p.shape[0], p.shape[1] // groups if groups else 0
    eights = -(-lines // 8)
    fraction = np.empty((batch, groups, eights * 8, 31))
    for sample in range(batch):
        where = {"purpose": purpose, "slot": sample, "step": step, "seed": seed}
        halves = words(np.arange(groups * eights), 64, rounds=7, **where).astype("<u4").view("<u2")
        halves = halves.reshape(groups, eights, 64, 8).swapaxes(2, 3).reshape(groups, eights * 8, 64)
        fraction[sample] = halves[..., :31] * 2.0**-16 + (halves[..., 32:63] & 255) * 2.0**-24
    return fraction[:, :, :lines].reshape(*p.shape, 31) < np.rint(p * 2**24)[..., None] / 2**24


def pulse_update(
    g: Array,
    x: Array,
    d: Array,
    *,
    rate: float,
    train: dict[str, Any],
    law: dict[str, Any],
    w_max: Array,
    g_min: float,
    g_max: float,
    groups: int = 1,
    conv: ConvGeometry | None = None,
    sign: Array | None = None,
    slices: int = 1,
    slice_bits: int | None = None,
    carry: dict[str, Any] | None = None,
    g_held: Array | None = None,
    endurance: dict[str, Any] | None = None,
    pulse_count: Array | None = None,
    device_map: dict[str, Array] | None = None,
    stuck_at_g_min: float = 0.0,
    stuck_at_g_max: float = 0.0,
    seed: int = 0,
    step: int = 0,
) -> tuple[Array, Array, Array]:
    """(conductances shown and held, [2 slices, G * I, O] each, weights read out [G, O, I]); `law`, `train` and `carry` are dumped
    specs.

    `pulse_count`, [2 slices, G * I, O], is updated in place where given; `device_map` as for `device_update`. With `conv`, x and d
    are images. `sign`, [G * I], multiplies what drives each wordline.
    """
    if conv is not None:
        x = unfold(x, conv)
        d = d.transpose(0, 2, 3, 1).reshape(len(x), d.shape[1])
    if sign is not None:
        x = x * sign
    batch, n_in, n_out = len(x), x.shape[1] // groups, d.shape[1] // groups
    span, pulses = g_max - g_min, law.get("pulses", law.get("levels"))
    w_max = np.asarray(w_max, np.float64)
    _, digit_weights = sliced(np.zeros(()), slices, slice_bits, carry)
    of_pulse = w_max * digit_weights[0] * (2 if law["sides"] == "both" else 1) / pulses
    unit = rate / of_pulse.reshape(groups, n_out).max(1)
    x_slots, e_slots, length = pulse_trains(
        np.asarray(x, np.float64), rate * np.asarray(d, np.float64) / of_pulse, train=train, unit=unit, groups=groups,
        seed=seed, step=step,
    )  # fmt: skip
    x_slots = x_slots.reshape(batch, groups, n_in, 31)
    e_slots = e_slots.reshape(batch, groups, n_out, 31)
    if train["scheme"] == "deterministic_implicit":
        product = np.einsum("bgi,bgo->bgio", x_slots.sum(3), e_slots.sum(3))
        counts = -np.rint(product / length[:, :, None, None])
    else:
        counts = -np.einsum("bgis,bgos->bgio", x_slots, e_slots)
    counts = counts.reshape(batch, groups * n_in, n_out)  # above 0: the weight rises
    if train["mode"] == "aggregated":
        bursts = [(np.maximum(counts, 0).sum(0), np.maximum(-counts, 0).sum(0))]
    else:
        bursts = [(np.maximum(c, 0), np.maximum(-c, 0)) for c in counts]
    rows = np.arange(groups * n_in)
    held, shown = np.array(g if g_held is None else g_held, np.float64), np.array(g, np.float64)
    for side, plane in enumerate((0, slices)):  # of the lowest slice
        devices = Cells.draw(law, rows, n_out, plane, seed, -g_min / span, device_map)
        u = uniforms(rows, n_out, purpose=Purpose.STUCK, slot=plane, seed=seed)
        free = ~((u < stuck_at_g_min) | (u > 1.0 - stuck_at_g_max))
        if side and law["sides"] == "reference":
            free[:] = False
        if pulse_count is not None:
            free &= pulse_count[plane] >= 0
        taken = np.zeros(free.shape, np.int64)
        before = share = (held[plane] - g_min) / span
        for sample, (raising, lowering) in enumerate(bursts):
            up, down = (lowering, raising) if side else (raising, lowering)
            if law["sides"] == "one_sided":
                down = np.zeros_like(down)
            z = normals(
                rows, 2 * n_out, purpose=Purpose.PULSE_CYCLE, slot=sample, step=step, seed=seed, generator="fast"
            )  # fmt: skip
            new = _after(devices, share, up / pulses, down / pulses, z[:, side::2])
            share = np.where(free & (up + down > 0), new, share)
            taken += np.where(free, up + down, 0).astype(np.int64)
        if g_held is not None:
            write = normals(rows, n_out, purpose=Purpose.UPDATE_WRITE, slot=plane, step=step, seed=seed)
            written = np.maximum(g_min + span * share + law["write_noise"] * write, 0.0)
            shown[plane] = np.where(taken > 0, written, shown[plane])
        if pulse_count is not None and endurance is not None:
            pulse_count[plane], fails = wear(pulse_count[plane], taken, endurance, plane, seed)
            if endurance["failed"] != "held":
                end = {"g_min": 0.0, "g_max": 1.0}[endurance["failed"]]
                share = np.where(fails, end, share)
                shown[plane] = np.where(fails, g_min + span * end, shown[plane])
        held[plane] = np.where(share != before, g_min + span * share, held[plane])
    if g_held is None:
        shown = held
    lie: dict[str, Any] = {"slices": slices, "slice_bits": slice_bits, "carry": carry}
    return shown, held, read_out(shown, w_max=w_max, groups=groups, g_min=g_min, g_max=g_max, **lie)


def _after(cells: Cells, x: Array, up: Array, down: Array, z: Array) -> Array:
    """Shares after nominal changes both ways from where the device is, with one normal for the noise of all."""
    if cells.law["law"] == "lookup_table":  # of which no sample moves a device both ways
        return cells.change(x, up - down, z)
    x = np.clip(x, cells.low, cells.high)
    to, variance = x, np.zeros_like(x)
    for change, gain, sign in ((up, cells.gain_up, 1.0), (down, cells.gain_down, -1.0)):
        step = cells.flow(x, sign * change) - x
        to = to + step
        variance = variance + np.where(change > 0, deviation(cells.law, np.abs(step), change, gain) ** 2, 0.0)
    return np.clip(to + np.sqrt(variance) * z, cells.low, cells.high)
