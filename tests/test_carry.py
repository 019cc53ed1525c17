"""Sliced weights trained in situ: updates of digits, carries, and layers that are trained with both."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from cuda_shim import FORWARD, REVERSE, ShimDevice
from test_in_situ_devices import run, trained_and_resumed
from torch import nn

import gpuxbar as gx
from gpuxbar import ops, reference
from gpuxbar.nn import AnalogLinear
from gpuxbar.reference.carry import slices_due
from gpuxbar.spec import Agarwal, Carry, ConstantStep, Endurance, Ideal, Programming, SoftBounds, presets

G_MIN, G_MAX = 1e-6, 10e-6  # S
RANGE = G_MAX - G_MIN
WINDOW = {"g_min": G_MIN, "g_max": G_MAX}
SEED = 2**40 + 7
STUCK = {"stuck_at_g_min": 0.05, "stuck_at_g_max": 0.03}
SCHEMES = ("accumulate", "periodic")
SIDES = {
    True: ConstantStep(),
    False: ConstantStep(sides="one_sided"),
}  # whether written around the middle of the window
# slices, bits, bits of headroom
LIES = [
    pytest.param((3, 2, 2), id="three-of-2"),
    pytest.param((8, 1, 3), id="binary"),
    pytest.param((2, 8, 1), id="two-of-8"),
]
LIMIT = Endurance(pulses=1e6)
BACKENDS = [None, ShimDevice(order=REVERSE), ShimDevice(order=11)]
IDS = ["host", "kernel", "kernel-shuffled"]


def lie(slices, bits, headroom, **rule):
    """How weights lie on so many slices, as `Pairs` takes it."""
    return {"slice_bits": bits, "carry": Carry(headroom_bits=headroom, **rule)}


def pairs_of(g, s, law=SIDES[True], **more):
    """Pairs that lie so; `more`: their other settings, and those of programming."""
    writes = Programming(**{key: more.pop(key) for key in Programming.model_fields if key in more})
    return ops.Pairs(g, law=law, programming=writes, **WINDOW, **s, **more)


def carried(g, pairs, updates):
    """What the oracle makes of conductances of such pairs, and which devices it writes."""
    return reference.carry(
        g, rule=pairs.carry.model_dump(), slices=pairs.slices, slice_bits=pairs.slice_bits, updates=updates,
        balanced=pairs.balanced, pulse_count=pairs.pulse_count, seed=pairs.seed, **WINDOW, **pairs.programming.model_dump(),
    )  # fmt: skip


def cells(planes, rows, cols, seed=0):
    return np.random.default_rng(seed).uniform(G_MIN, G_MAX, (planes, rows, cols)).astype(np.float32)


def from_digits(digits, s, balanced=True):
    """Conductances of digits [slices, R, C]."""
    share = np.stack([digits, -digits]) / s["carry"].window(s["slice_bits"])
    share = (1 + share) / 2 if balanced else np.maximum(share, 0)
    return (G_MIN + RANGE * share).astype(np.float32).reshape(-1, *digits.shape[1:])


def digits_of(g, s):
    positive, negative = np.split(g.astype(np.float64), 2)
    return (positive - negative) / RANGE * s["carry"].window(s["slice_bits"])


def units_of(g, s):
    """The represented weight, in units of the lowest slice."""
    return np.tensordot(2.0 ** (s["slice_bits"] * np.arange(len(g) // 2)), digits_of(g, s), axes=1)


@pytest.mark.parametrize("device", BACKENDS, ids=IDS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", LIES)
def test_updates_match_the_oracle(shape, scheme, device):
    rng = np.random.default_rng(1)
    s = lie(*shape, scheme=scheme)
    groups, outputs, inputs = 2, 37 if device is None else 20, 5
    dw = rng.normal(0, 0.1, (groups, outputs, inputs)).astype(np.float32)
    dw[rng.random(dw.shape) < 0.2] = 0.0
    w_max = rng.uniform(0.5, 2.0, groups * outputs).astype(np.float32)
    for law in (Agarwal(nu=2.0, gamma=0.02), SoftBounds(spread=0.2, write_noise=1e-7, sides="one_sided")):
        g = cells(2 * shape[0], groups * inputs, outputs)
        g_held = g + np.float32(1e-7) if law.write_noise else None
        pairs, how = pairs_of(g, s, law, g_held=g_held, seed=SEED, **STUCK), {"w_max": w_max, "step": 9}
        expected, held, weights = reference.device_update(g, dw, g_held=g_held, **pairs.plain, **how)
        read = ops.device_update(pairs, dw, device=device, **how)
        np.testing.assert_allclose(g, expected, rtol=0, atol=3e-6 * RANGE)
        if g_held is not None:
            np.testing.assert_allclose(g_held, held, rtol=0, atol=3e-6 * RANGE)
        top = s["carry"].window(s["slice_bits"]) / 2.0 ** s["slice_bits"]  # in w_max, of the highest slice
        np.testing.assert_allclose(read, weights, rtol=0, atol=2e-6 * 2 * top)


@pytest.mark.parametrize("device", BACKENDS, ids=IDS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", LIES)
def test_carries_match_the_oracle(shape, scheme, device):
    s = lie(*shape, scheme=scheme, interval=3)
    for balanced, updates in ((True, 3), (False, 3 * 2 ** shape[1]), (True, 3 * 2 ** (shape[0] * shape[1]))):
        g = cells(2 * shape[0], 6, 71 if updates == 3 else 72)
        g_held, dead = g.copy(), np.where(cells(*g.shape, seed=3) < 1.5e-6, -5, 4).astype(np.int32)
        law = SIDES[balanced].model_copy(update={"write_noise": 1e-7})
        pairs = pairs_of(
            g, s, law, g_held=g_held, endurance=LIMIT, pulse_count=dead, write_noise=1e-7, device_spread=0.05, seed=SEED, **STUCK
        )  # fmt: skip
        expected, written = carried(g, pairs, updates)
        before = g.copy()
        ops.carry(pairs, updates=updates, device=device)
        assert 0 < written.mean() < 1
        np.testing.assert_allclose(g, expected, rtol=0, atol=3e-6 * RANGE)
        np.testing.assert_array_equal(g[~written], before[~written])
        np.testing.assert_array_equal(g_held, g)


@pytest.mark.parametrize("device", BACKENDS[:2], ids=IDS[:2])
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1)])
def test_little_to_carry(shape, device):
    s = lie(3, 2, 2)
    g = cells(6, *shape)
    ops.carry(pairs_of(g, s), updates=np.full(1, 64), device=device)
    assert (np.abs(digits_of(g, s)) < 4).all()


def test_reference_serves_without_a_compiler(monkeypatch):
    s = lie(3, 2, 2)
    law = Agarwal(nu=1, write_noise=1e-7)
    dw = np.random.default_rng(0).normal(0, 0.1, (1, 7, 5)).astype(np.float32)
    results = []
    for name in ("auto", "reference"):
        if name == "reference":
            monkeypatch.setattr("gpuxbar.launch.host.WANTED", name)
        g, g_held = cells(6, 5, 7), cells(6, 5, 7)
        pairs = pairs_of(g, s, law, g_held=g_held, write_noise=1e-7)
        ops.carry(pairs, updates=64)
        results.append((g, g_held, ops.device_update(pairs, dw, w_max=np.ones(7, np.float32))))
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6 * np.abs(theirs).max())


def test_a_change_of_ideal_devices_is_the_change():
    """By accumulation, whatever its size: below a unit too, since the lowest slice is analog."""
    s = lie(4, 2, 2)
    dw = np.linspace(-1, 1, 41, dtype=np.float32).reshape(1, 1, 41) ** 5  # down to a thousandth of a unit
    g = from_digits(np.zeros((4, 41, 1)), s)
    read = ops.device_update(pairs_of(g, s, Ideal()), dw, w_max=np.ones(1, np.float32))
    np.testing.assert_allclose(read, dw, rtol=0, atol=5e-7)
    digits = digits_of(g, s)
    assert np.abs(digits).max() < 4
    np.testing.assert_allclose(digits[1:], np.rint(digits[1:]), atol=1e-4)
    assert (digits * np.sign(dw.T)[None, :, :, 0] > -1e-4).all()  # of one sign
    # 0.3 w_max is 76.5 units: 1 * 64 + 0 * 16 + 3 * 4 + 0.5
    g = from_digits(np.zeros((4, 1, 1)), s)
    dw = np.full((1, 1, 1), 0.3, np.float32)
    ops.device_update(pairs_of(g, s, Ideal()), dw, w_max=np.ones(1, np.float32))
    np.testing.assert_allclose(digits_of(g, s).ravel(), [0.5, 3, 0, 1], atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_with_ideal_devices_is_ideal(scheme):
    """After many updates and carries the weight is the sum of its changes, to float32 error of the read-out."""
    s = lie(4, 2, 3, scheme=scheme, interval=3)
    rng = np.random.default_rng(0)
    total, w_max = np.zeros((1, 9, 7)), np.full(9, 0.7, np.float32)
    pairs = pairs_of(from_digits(np.zeros((4, 7, 9)), s), s, Ideal())
    most = 0.0
    for update in range(60):
        # a tenth of the lowest digit's window each, which carries at every third update clear
        dw = rng.uniform(-0.005, 0.009, total.shape).astype(np.float32)
        ops.carry(pairs, updates=update)
        read = ops.device_update(pairs, dw, w_max=w_max)
        total += dw
        most = max(most, np.abs(read - total).max())
    assert most < 3e-6
    assert np.abs(total).max() > 0.1  # 36 units: more than the lowest slice holds


def test_the_law_acts_on_every_slice():
    """Two devices of Agarwal's law: a change of 1 * 4 + 2 units moves each pair by its own digit, from where it is."""
    s, nu, window = lie(2, 2, 2), 3.0, 15
    digits = np.array([3.0, -5.0]).reshape(2, 1, 1)
    g = from_digits(digits, s)
    dw = np.full((1, 1, 1), 6 / 15, np.float32)  # of w_max, which is 15 units
    read = ops.device_update(pairs_of(g, s, Agarwal(nu=nu)), dw, w_max=np.ones(1, np.float32))

    def moved(y, up):  # Agarwal's formula in shares of the window
        g1 = 1 / (1 - np.exp(-nu))
        way = (g1 - y) * (1 - np.exp(-nu * up)) if up > 0 else (1 - g1 - y) * (1 - np.exp(nu * up))
        return y + way

    expected = []
    for digit, change in ((3.0, 2.0), (-5.0, 1.0)):
        y, half = (1 + digit / window) / 2, change / window / 2
        expected.append(window * (moved(y, half) - moved(1 - y, -half)))
    np.testing.assert_allclose(digits_of(g, s).ravel(), expected, atol=1e-4)
    assert read.item() == pytest.approx((expected[0] + 4 * expected[1]) / 15, abs=1e-6)
    assert abs(expected[0] - 5) > 0.05 < abs(expected[1] + 4)


@pytest.mark.parametrize("balanced", [True, False], ids=["balanced", "one-sided"])
@pytest.mark.parametrize("shape", LIES)
def test_a_carry_keeps_the_weight_and_puts_digits_in_range(shape, balanced):
    s = lie(*shape)
    slices, bits, _ = shape
    window = s["carry"].window(bits)
    digits = np.random.default_rng(0).uniform(-window, window, (slices, 11, 13))
    digits[-1] *= 0.3 / 2 ** shape[2]
    g = from_digits(digits, s, balanced)
    before, old = units_of(g, s), g.copy()
    ops.carry(pairs_of(g, s, SIDES[balanced]), updates=64)
    scale = window * 2.0 ** (bits * (slices - 1))
    room = np.abs(before) < 2.0 ** (bits * slices) - 2.0 ** (bits * (slices - 1))  # for what comes from below
    assert room.mean() > 0.1
    np.testing.assert_allclose(units_of(g, s)[room], before[room], rtol=0, atol=3e-7 * scale)
    assert (np.abs(digits_of(g, s)) < 2**bits).all()
    again = g.copy()
    ops.carry(pairs_of(again, s, SIDES[balanced]), updates=128)
    np.testing.assert_array_equal(again, g)  # nothing is left to carry
    if balanced:
        np.testing.assert_allclose((g[:slices] + g[slices:]) / 2, (G_MIN + G_MAX) / 2, rtol=1e-6)
    else:
        np.testing.assert_allclose(np.minimum(g[:slices], g[slices:]), G_MIN, rtol=1e-6)
    same = old == g
    assert 0 < same.mean() < 1
    if balanced:
        assert (same[:slices] != same[slices:]).mean() < 0.01  # pairs are written as pairs


def test_whole_digits_stay_whole():
    """7 + 6 * 4 + 1 * 16 = 47 = 3 + 3 * 4 + 2 * 16, though float32 may hold a little less than the digits."""
    s = lie(3, 2, 2)
    for sign in (1, -1):
        g = from_digits(sign * np.array([7.0, 6.0, 1.0]).reshape(3, 1, 1), s)
        ops.carry(pairs_of(g, s), updates=64)
        np.testing.assert_allclose(sign * digits_of(g, s).ravel(), [3, 3, 2], atol=1e-4)
    s, low = lie(5, 2, 6), np.arange(0.0, 256, 4)
    digits = np.zeros((5, 1, 64))
    digits[0] = low
    g = from_digits(digits, s)
    assert 10 < (digits_of(g, s)[0] < low).sum() < 54
    ops.carry(pairs_of(g, s), updates=64)
    np.testing.assert_allclose(digits_of(g, s)[:, 0], [low // 4**k % 4 for k in range(5)], atol=1e-3)


def test_a_weight_beyond_full_is_clipped():
    s = lie(3, 2, 2)
    digits = np.array([[1.0, 3.2, 3.0], [-9.0, 0.0, -3.0], [0.5, 2.0, 14.0], [0.0, 5.0, 3.0]]).T.reshape(
        3, 1, 4
    )
    g = from_digits(digits, s)
    ops.carry(pairs_of(g, s), updates=64)
    expected = np.array([[1.0, 3.2, 3.0], [-1.0, -2.0, -3.0], [3.0, 3.0, 3.0], [3.0, 3.0, 3.0]]).T
    np.testing.assert_allclose(digits_of(g, s)[:, 0], expected, atol=1e-4)
    assert units_of(g, s)[0, 2] == pytest.approx(63, abs=1e-3)  # a full weight


def test_pairs_that_cannot_be_written_neither_give_nor_take():
    s = lie(4, 2, 2)
    digits = np.full((4, 1, 64), 6.0)
    digits[3] = 0.0
    g, count = from_digits(digits, s), np.zeros((8, 1, 64), np.int32)
    count[4 + 1, 0, 0] = count[2, 0, 1] = -9  # of the second slice, and of the third
    ops.carry(pairs_of(g, s, endurance=LIMIT, pulse_count=count), updates=64)
    np.testing.assert_allclose(digits_of(g, s)[:, 0, 0], [6, 6, 2, 1], atol=1e-4)
    np.testing.assert_allclose(digits_of(g, s)[:, 0, 1], [2, 7, 6, 0], atol=1e-4)
    np.testing.assert_allclose(digits_of(g, s)[:, 0, 2], [2, 3, 3, 1], atol=1e-4)
    # stuck cells are those that programming draws, plane by plane
    weight = np.ones((1, 40, 30), np.float32)
    way = {"slices": 4, "slice_bits": 2, "headroom_bits": 2, "balanced": True, **WINDOW, "seed": SEED}
    way["programming"] = Programming(**STUCK)
    stuck = np.isin(ops.program(weight, w_max=np.ones(1, np.float32), **way), np.float32([G_MIN, G_MAX]))
    g = from_digits(np.full((4, 30, 40), 5.0), s)
    before = g.copy()
    ops.carry(pairs_of(g, s, seed=SEED, **STUCK), updates=64)
    assert stuck.mean() == pytest.approx(0.08, abs=0.01)
    np.testing.assert_array_equal(g[stuck], before[stuck])


@pytest.mark.parametrize("device", BACKENDS, ids=IDS)
def test_pairs_that_cannot_be_written_are_left_to_updates(device):
    """The other device of a failed one makes up for it; to set that back, or to clip the weight, would undo it."""
    s = lie(2, 2, 2)
    g, count = np.full((4, 1, 6), G_MIN, np.float32), np.zeros((4, 1, 6), np.int32)
    high, crowd = (G_MIN + share * RANGE for share in (1.0, 0.6))
    # one-sided pairs of the lower slice that have come far
    g[0, 0, :2], g[2, 0, :2], count[0, 0, 0] = high, crowd, -1
    g[1, 0, 2:4], g[3, 0, 2:4], count[1, 0, 2] = high, crowd, -1  # and of the upper one, of 6 units
    # a weight beyond full, whose lower pair is the failed one
    g[1, 0, 4:], g[0, 0, 4:], count[2, 0, 4] = high, crowd, -1
    before = g.copy()
    ops.carry(pairs_of(g, s, SIDES[False], endurance=LIMIT, pulse_count=count), updates=64, device=device)
    failed = [0, 2]
    np.testing.assert_array_equal(g[..., failed], before[..., failed])
    np.testing.assert_array_equal(g[::2, 0, 4], before[::2, 0, 4])  # of the lower pair
    np.testing.assert_allclose(digits_of(g, s)[:, 0, [1, 3, 5]], [[2, 3, 3], [1, 3, 3]], atol=1e-4)
    np.testing.assert_allclose(np.minimum(g[:2], g[2:])[:, 0, 1::2], G_MIN)


def test_a_carry_writes_with_the_noise_of_programming():
    s = lie(2, 2, 2)
    g = from_digits(np.stack([np.full((50, 60), 9.0), np.zeros((50, 60))]), s)
    more = {"write_noise": (1e-7, 2e-7), "device_spread": 0.02}
    once, twice, later = g.copy(), g.copy(), g.copy()
    for array, updates in ((once, 64), (twice, np.full(1, 64)), (later, 128)):
        ops.carry(pairs_of(array, s, **more), updates=updates)
    np.testing.assert_array_equal(once, twice)
    target = from_digits(np.stack([np.full((50, 60), 1.0), np.full((50, 60), 2.0)]), s)
    off, noise = once - target, 1e-7 + 2e-7 * target / G_MAX
    assert (off / np.hypot(noise, 0.02 * target)).std() == pytest.approx(1, abs=0.03)
    assert (
        abs(np.corrcoef((off / noise).ravel(), ((later - target) / noise).ravel())[0, 1]) < 0.75
    )  # spread stays


def test_slices_carry_when_they_are_to():
    assert [slices_due(n, 3, 4, "accumulate", 5) for n in (0, 1, 5, 6, 10)] == [0, 0, 2, 0, 2]
    assert [slices_due(n, 4, 4, "periodic", 5) for n in (0, 5, 10, 20, 40, 80, 160, 320)] == [
        0,
        1,
        1,
        2,
        2,
        3,
        3,
        3,
    ]
    assert slices_due(5 * 4**9, 3, 4, "periodic", 5) == 2  # the highest gives to none
    for scheme in SCHEMES:
        s = lie(3, 2, 2, scheme=scheme, interval=2)
        for updates in range(40):
            g = from_digits(np.array([9.0, 9.0, 0.0]).reshape(3, 1, 1), s)
            other = g.copy()
            ops.carry(pairs_of(g, s), updates=updates)
            ops.carry(pairs_of(other, s), updates=np.full(1, updates), device=ShimDevice(order=FORWARD))
            np.testing.assert_array_equal(g, other)
            due = slices_due(updates, 3, 4, scheme, 2)
            expected = {0: [9, 9, 0], 1: [1, 11, 0], 2: [1, 3, 2]}[due]
            np.testing.assert_allclose(digits_of(g, s).ravel(), expected, atol=1e-4)


def test_one_sided_pairs_are_set_back():
    """Both devices of a pair have risen by 5 units and more: a carry lowers them, whatever their difference."""
    s = lie(2, 2, 2)
    g = np.full((4, 1, 1), G_MIN + 5.5 / 15 * RANGE, np.float32)
    g[0] += np.float32(1.25 / 15 * RANGE)
    high = g.copy()
    ops.carry(pairs_of(g, s, SIDES[False]), updates=64)
    np.testing.assert_allclose(digits_of(g, s).ravel(), [1.25, 0], atol=1e-4)
    np.testing.assert_allclose((g.ravel() - G_MIN) / RANGE * 15, [1.25, 0, 0, 0], atol=1e-4)
    ops.carry(pairs_of(high, s), updates=64)  # others lie as they are until they carry
    assert high.min() > 3e-6


@pytest.mark.parametrize("device", BACKENDS[:2], ids=IDS[:2])
def test_programming_leaves_headroom(device):
    """By hand: 0.9 of 63 units is 57 = 1 + 2 * 4 + 3 * 16; and every mapping against the oracle."""
    weight, one = np.array([[[0.9, -0.9, 0.0]]], np.float32), np.ones(1, np.float32)
    digits = np.array([[1, 2, 3], [-1, -2, -3], [0, 0, 0]], float).T[:, :, None]
    for balanced in (True, False):
        s = {"w_max": one, **WINDOW, "slices": 3, "slice_bits": 2, "headroom_bits": 2, "balanced": balanced}
        g = ops.program(weight, device=device, **s)
        np.testing.assert_allclose(g, from_digits(digits, lie(3, 2, 2), balanced), rtol=1e-6)
    weight = np.random.default_rng(0).normal(0, 0.5, (2, 19, 7)).astype(np.float32)
    for lies in ({"slices": 4, "slice_bits": 2, "headroom_bits": 3}, {"levels": 16}, {}):
        s = {
            "w_max": np.ones(38, np.float32),
            **WINDOW,
            **lies,
            "balanced": True,
            "seed": SEED,
        }
        expected = reference.program(weight, write_noise=1e-7, **s)
        g = ops.program(weight, programming=Programming(write_noise=1e-7), device=device, **s)
        off = ~(np.abs(g - expected) <= 2e-6 * RANGE)
        assert off.mean() <= 5e-3  # rounding edges


@pytest.mark.parametrize(
    ("value", "s", "text"),
    [
        (np.nan, lie(3, 2, 2), "`g` must be finite, got 72 NaN or infinite values"),
        (2e-6, {}, "`pairs` must be slices, got one pair; build them with slice_bits and a carry"),
    ],
    ids=["nan", "one-pair"],
)
def test_carry_names_bad_input_and_changes_nothing(value, s, text):
    g = np.full((6 if s else 2, 3, 4), value, np.float32)
    before = g.copy()
    with pytest.raises(ValueError, match=f"^carry: {text}"):
        ops.carry(pairs_of(g, s), updates=64)
    np.testing.assert_array_equal(g, before)


def test_programming_names_bad_slices():
    weight = np.zeros((1, 4, 3), np.float32)
    s = {"w_max": np.ones(1, np.float32), **WINDOW}
    with pytest.raises(
        ValueError, match="program: `headroom_bits` must be 0 to 8, and 0 without slices, got 1; it widens"
    ):
        ops.program(weight, headroom_bits=1, **s)
    with pytest.raises(
        ValueError, match="program: `balanced` must be False with merge='offset', got True; it places"
    ):
        ops.program(weight, balanced=True, merge="offset", **s)
    with pytest.raises(
        ValueError,
        match="program: `levels` must be None for slices with headroom or in balanced pairs, got 4",
    ):
        ops.program(weight, slices=2, slice_bits=2, balanced=True, levels=4, **s)


SLICED = {"mapping": {"slices": 4, "slice_bits": 2, "headroom": 2.0}, "update": {"law": "agarwal", "nu": 0.5}, "carry": {"interval": 3}}  # fmt: skip


def layer_of(name="layer", **overrides):
    torch.manual_seed(0)
    spec = gx.CrossbarSpec.model_validate(SLICED).with_overrides(overrides)
    return AnalogLinear(12, 7, spec=spec, name=name)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("sides", ["both", "one_sided"])
def test_a_layer_begins_with_its_weights(sides, scheme):
    layer = layer_of(update={"sides": sides}, carry={"scheme": scheme})
    weight = layer.weight.detach().clone()
    x = torch.randn(5, 12)
    digital = layer(x)
    layer.begin_in_situ()
    unit = layer.w_max[0].item() / 255
    assert layer.g_cells.shape == (8, 12, 7)
    assert (layer.weight - weight).abs().max().item() <= unit / 2 * 1.001
    digits = digits_of(layer.g_cells.numpy(), lie(4, 2, 2))
    np.testing.assert_allclose(digits, np.rint(digits), atol=1e-4)
    assert np.abs(digits).max() < 3.001
    # reads see the slices, before as well as after
    torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(digital, x @ weight.T + layer.bias, rtol=1e-5, atol=x.abs().sum() * unit)


@pytest.mark.parametrize("scheme", ["differential", "subtracted"])
def test_reads_of_both_directions_see_the_slices(scheme):
    """Every plane is converted on its own, by converters fine enough to tell a wrong digital weight."""
    adc = {"bits": 16, "range": "worst_case"}
    layer = layer_of(
        mapping={"scheme": scheme},
        dac={"bits": 8},
        adc=adc,
        parasitics={"r_wordline": 1e-3},
        tile={"rows": 8, "cols": 4},
    )
    run(layer, 7)
    x = torch.randn(6, 12, requires_grad=True)
    y = layer(x)
    exact = x.detach() @ layer.weight.T + layer.bias
    assert (y - exact).abs().max() < 0.02 * exact.abs().max()
    d = torch.randn(6, 7)
    y.backward(d)
    exact = d @ layer.weight
    assert (x.grad - exact).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_carries_come_as_often_as_set(scheme, monkeypatch):
    """Counted by what they write: before updates 4, 7 and 10, which follow 3, 6 and 9."""
    layer = layer_of(carry={"scheme": scheme}, mapping={"headroom": 1.0})
    layer.begin_in_situ()
    s, rng = lie(4, 2, 2), np.random.default_rng(0)
    changed = []
    for _ in range(10):
        layer.g_cells.copy_(torch.from_numpy(from_digits(rng.uniform(4, 9, (4, 12, 7)), s)))
        before = layer.g_cells.clone()
        layer.update_cells(torch.zeros_like(layer.weight))
        changed.append(not torch.equal(layer.g_cells, before))
    assert [n for n, one in enumerate(changed) if one] == [3, 6, 9]
    assert layer.carry_step.item() == 10
    assert layer.update_step.item() == 11


@pytest.mark.parametrize("overrides", [
    {}, {"carry": {"scheme": "periodic"}, "update": {"sides": "one_sided"}},
    {"update": {"law": "soft_bounds", "cycle": 0.3, "write_noise": 1e-7}, "programming": {"write_noise": 5e-8, "stuck_at_g_min": 0.02},
     "endurance": {"pulses": 300, "spread": 0.5}, "retention": {"tau": 500.0}},
], ids=["accumulate", "periodic", "everything"])  # fmt: skip
def test_a_resumed_run_equals_an_uninterrupted_one(overrides):
    whole = trained_and_resumed(partial(layer_of, **overrides))
    assert whole.carry_step.item() == 10


def test_refreshing_keeps_digits_and_the_count():
    layer = layer_of(update={"sides": "one_sided"})
    run(layer, 5)
    weight = layer.weight.detach().clone()
    layer.refresh()
    assert (layer.weight - weight).abs().max().item() <= layer.w_max[0].item() / 255 / 2 * 1.001
    assert layer.carry_step.item() == 5
    assert layer.saturation() < 3.001 / 15


@pytest.mark.parametrize(("nu", "headroom", "units"), [(0.0, 1, 40.0), (1.5, 1, 4.7), (1.5, 3, 40.0)])
def test_digits_of_asymmetric_devices_carry_with_enough_headroom(nu, headroom, units):
    """2000 changes of 0.1 units, 60 % of them up, ask for 40 units. A digit rests where 0.6 f_up = 0.4 f_down, with f = nu (G1 - v)
    and v = 1/2 +- digit / (2 window): in a window of 15 units at 4.7, where it does not carry at 8; in one of 63 beyond that."""
    mapping = {"scheme": "subtracted", "slices": 3, "slice_bits": 3, "w_max": 511.0}
    carry = {"scheme": "periodic", "interval": 10, "headroom_bits": headroom}
    spec = gx.CrossbarSpec(mapping=mapping, update={"law": "agarwal", "nu": nu}, carry=carry)
    layer = nn.Linear(16, 16, bias=False)
    nn.init.zeros_(layer.weight)
    model, _ = gx.convert(nn.Sequential(layer), spec)
    optimiser = gx.optim.InSituSGD(model.parameters(), lr=1.0)
    random = torch.Generator().manual_seed(0)
    for _ in range(2000):
        up = torch.rand(16, 16, generator=random) < 0.6
        model[0].weight.grad = torch.where(up, -0.1, 0.1)
        optimiser.step()
    # changes deviate by 4.4 units a weight, 0.3 in the mean of 256; middles of windows make steps larger, their rest smaller
    assert model[0].weight.mean().item() == pytest.approx(units, abs=1.0 if nu == 0 or headroom == 1 else 8.0)


@pytest.mark.parametrize(
    "carry",
    [{"scheme": "accumulate", "interval": 16}, {"scheme": "periodic", "interval": 1, "headroom_bits": 6}],
)
def test_digits_are_learned_by_two_bit_slices(carry, learn):
    """Six of them learn as digital weights do, by either scheme."""
    spec = {
        "mapping": {"slices": 6, "slice_bits": 2},
        "update": {"law": "agarwal", "nu": 0.1},
        "carry": carry,
    }
    digital = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    model, _ = gx.convert(digital, gx.CrossbarSpec.model_validate(spec))
    optimiser = gx.optim.InSituSGD(model.parameters(), lr=0.1, momentum=0.9)
    assert learn(model, optimiser, epochs=4, batch=32)[-1] > 0.88


def test_txsim_trains_on_sliced_weights():
    """32 bits in 16 slices: changes far below what a 2-bit slice of w_max resolves are kept."""
    sliced = {"mapping": {"slices": 16, "slice_bits": 2}, "carry": {"scheme": "accumulate"}}
    layer = AnalogLinear(12, 7, spec=presets.preset("txsim-in-situ").with_overrides(sliced))
    run(layer, 3)
    weight = layer.weight.detach().clone()
    layer.update_cells(torch.full_like(weight, 3e-6) * layer.w_max[:, None])
    moved = (layer.weight - weight) / layer.w_max[:, None]
    assert moved.mean().item() == pytest.approx(3e-6, rel=0.1)
    assert layer.g_cells.shape == (32, 12, 7)
