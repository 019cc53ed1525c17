"""pulse_update: trains against theory, kernels against the float64 oracle, counted against sequential, the messages."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
import torch
from cuda_shim import FORWARD, REVERSE, ShimDevice
from torch import nn

from gpuxbar import ops, reference
from gpuxbar.nn import AnalogLinear, calibrate, convert
from gpuxbar.nn.streams import Streams
from gpuxbar.ops import ConvGeometry
from gpuxbar.optim import InSituSGD
from gpuxbar.reference import pulse_trains
from gpuxbar.spec import (
    Agarwal,
    AgarwalSymmetric,
    ConstantStep,
    CrossbarSpec,
    Endurance,
    ExponentialStep,
    Ideal,
    LinearStep,
    LookupTable,
    NeuroSim,
    PiecewiseStep,
    PowerStep,
    Programming,
    PulseTrain,
    SoftBounds,
)

G_MIN, G_MAX = 1e-6, 10e-6  # S
WINDOW = {"g_min": G_MIN, "g_max": G_MAX}
SEED = 2**40 + 7
TRAINS = {
    "managed": PulseTrain(),
    "plain": PulseTrain(length=10, update_management=False, bound_management=False),
    "implicit": PulseTrain(scheme="deterministic_implicit"),
    "implicit-plain": PulseTrain(length=7, scheme="deterministic_implicit", bound_management=False),
    "counted": PulseTrain(mode="aggregated"),
    "counted-implicit": PulseTrain(length=12, mode="aggregated", scheme="deterministic_implicit"),
}
CONSTANT = ConstantStep(pulses=200, cycle=0.3, step_spread=0.3, asymmetry=0.1, asymmetry_spread=0.1)
LAWS = {
    "constant": CONSTANT,
    "constant-one-sided": ConstantStep(pulses=200, cycle=0.3, sides="one_sided"),
    "constant-reference": ConstantStep(pulses=100, sides="reference", low_spread=0.1, high_spread=0.1),
    "linear": LinearStep(slope_up=0.4, slope_down=-0.7, spread=0.1, cycle=0.5, cycle_of="nominal", pulses=150),
    "soft": SoftBounds(pulses=200, cycle=0.3, spread=0.2, low_spread=0.1, high_spread=0.15),
    "agarwal": Agarwal(nu=2.0, gamma=0.01, pulses=300),
    "agarwal-one-sided": Agarwal(nu=2.0, spread=0.2, pulses=300, sides="one_sided"),
    "soft-one-sided": SoftBounds(pulses=200, spread=0.2, low_spread=0.1, high_spread=0.15, sides="one_sided"),
    "symmetric": AgarwalSymmetric(alpha=3.0, gamma=0.02, pulses=300),
    "neurosim": NeuroSim(nonlinearity_ltp=1.75, nonlinearity_ltd=-2.4, levels=64, cycle=0.005),
    "exponential": ExponentialStep(pulses=200, spread=0.1, cycle=1.0, low_spread=0.1),
    "power": PowerStep(exponent_up=0.6, exponent_down=2.3, pulses=200, spread=0.1),
    "piecewise": PiecewiseStep(up=(1.5, 1.2, 0.8), down=(0.2, 1.7), pulses=200, spread=0.1),
    "table": LookupTable(
        pulses=200, up=(2.0, 1.0, 0.3), down=(0.3, 1.0, 2.0), step_spread=0.2, high_spread=0.1,
        scatter_up=[[0.2 * score for score in range(-8, 9)]] * 3,
        scatter_down=[[0.1 * k * score for score in range(-8, 9)] for k in range(3)],
    ),
    "soft-write": SoftBounds(pulses=200, cycle=0.3, spread=0.2, low_spread=0.1, write_noise=3e-7),
    "constant-write": ConstantStep(pulses=200, cycle=0.3, step_spread=0.3, write_noise=3e-7),
    "constant-reference-write": ConstantStep(pulses=100, sides="reference", write_noise=3e-7),
}  # fmt: skip
COUNTED = (
    "constant", "constant-one-sided", "constant-reference", "agarwal-one-sided", "soft-one-sided", "constant-write",
    "constant-reference-write",
)  # fmt: skip


def case(batch, groups, inputs, outputs, seed=0):
    rng = np.random.default_rng(seed)
    g = rng.uniform(G_MIN, G_MAX, (2, groups * inputs, outputs)).astype(np.float32)
    x = np.maximum(rng.normal(0.3, 1, (batch, groups * inputs)), 0).astype(np.float32)
    d = rng.normal(0, 0.1, (batch, groups * outputs)).astype(np.float32)
    d[rng.random(d.shape) < 0.1] = 0
    return g, x, d, rng.uniform(0.5, 2.0, groups * outputs).astype(np.float32)


SHAPES = [(1, 1, 1, 1), (5, 2, 37, 71), (3, 1, 70, 36)]


def assert_matches_oracle(law, train, shape, device=None, rate=0.1):
    batch, groups, *_ = shape
    g, x, d, w_max = case(*shape)
    g_held = g + np.float32(1e-7) if law.write_noise else None
    new, how = g.copy(), {"rate": rate, "w_max": w_max, "groups": groups, "step": 9}
    stuck = Programming(stuck_at_g_min=0.05, stuck_at_g_max=0.03)
    new_held = None if g_held is None else g_held.copy()
    pairs = ops.Pairs(new, law=law, g_held=new_held, programming=stuck, seed=SEED, **WINDOW)
    cells, held, weights = reference.pulse_update(
        g, x, d, train=train.model_dump(), g_held=g_held, **pairs.plain, **how
    )
    read = ops.pulse_update(pairs, x, d, train=train, device=device, **how)
    # float32 arithmetic of about ten operations a sample; NeuroSim's labels go through a fit of 1e-5
    atol = (1e-5 if law.law == "neurosim" else 3e-6) * (G_MAX - G_MIN)
    np.testing.assert_allclose(new, cells, rtol=0, atol=atol)
    if new_held is not None:
        np.testing.assert_allclose(new_held, held, rtol=0, atol=atol)
    np.testing.assert_allclose(read, weights, rtol=0, atol=2 * w_max.max() * atol / (G_MAX - G_MIN))
    if g.size > 2:
        assert (new != g).mean() > 0.1
        assert new_held is None or (new - new_held)[new != g].std() > 2e-7
    if law.sides == "reference":
        np.testing.assert_array_equal(new[1], g[1])


PAIRS = [
    *((law, train) for law in LAWS for train in ("managed", "plain")),
    *((law, train) for law in COUNTED for train in TRAINS if train not in ("managed", "plain")),
]
# every law, every mode
KERNEL_PAIRS = [
    *((law, "managed") for law in LAWS),
    *(("constant", train) for train in TRAINS if train != "managed"),
    ("soft-one-sided", "counted"),
    ("constant-write", "counted"),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("law", "train"), PAIRS)
def test_host_matches_oracle(law, train, shape):
    assert_matches_oracle(LAWS[law], TRAINS[train], shape)


ORDERS = [FORWARD, REVERSE, 11, 12]


@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize(("law", "train"), KERNEL_PAIRS)
def test_kernel_matches_oracle(law, train, shape):
    """The CUDA kernels on the CPU; every thread order in turn."""
    device = ShimDevice(order=ORDERS[(len(law) + len(train) + shape[0]) % 4])
    assert_matches_oracle(LAWS[law], TRAINS[train], shape, device)


@pytest.mark.parametrize("sides", ["both", "reference", "one_sided"])
def test_whole_pulses_are_those_of_a_change_of_as_many(sides):
    """Without noise: what algorithms write in whole pulses needs no trains."""
    law = SoftBounds(pulses=200, up=1.5, down=2.2, spread=0.1, sides=sides)
    g, w_max = case(1, 1, 5, 3)[0], np.ones(3, np.float32)
    pulses = np.random.default_rng(0).integers(-6, 7, (3, 5)).astype(np.float32)
    step = (2 if sides == "both" else 1) / 200
    changed, pulsed = (ops.Pairs(g.copy(), law=law, seed=SEED, **WINDOW) for _ in range(2))
    ops.device_update(changed, (pulses * np.float32(step))[None], w_max=w_max)
    train = PulseTrain(scheme="deterministic_implicit")
    for o, i in np.argwhere(pulses):
        x, d = np.zeros((1, 5), np.float32), np.zeros((1, 3), np.float32)
        x[0, i], d[0, o] = 1, -pulses[o, i]
        ops.pulse_update(pulsed, x, d, rate=step, train=train, w_max=w_max)
    np.testing.assert_allclose(pulsed.g, changed.g, rtol=0, atol=1e-6 * (G_MAX - G_MIN))
    assert (changed.g != g).mean() > 0.3


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("law", "train"), [("soft", "managed"), ("constant", "counted")])
def test_kernel_gives_the_same_bits_in_every_thread_order(law, train, order):
    g, x, d, w_max = case(35, 2, 45, 68)
    results = []
    for device in (ShimDevice(), ShimDevice(order, workspace=1)):
        pairs = ops.Pairs(g.copy(), law=LAWS[law], **WINDOW)
        step = np.full(1, 9) if device.order else 9  # by value, or from memory
        how = {"rate": 0.1, "w_max": w_max, "groups": 2, "step": step, "device": device}
        results.append((pairs.g, ops.pulse_update(pairs, x, d, train=TRAINS[train], **how)))
        assert device.launches == ["pulse_trains", "pulse_update"]
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])


@pytest.mark.parametrize("device", [None, ShimDevice()], ids=["host", "kernel"])
def test_errors_are_clipped_as_in_the_oracle(device):
    """Ten times more pulses wanted than a train of 31 holds."""
    assert_matches_oracle(ConstantStep(pulses=2000), TRAINS["managed"], SHAPES[1], device, rate=2.0)


def test_chunks_of_samples_follow_one_another():
    assert_matches_oracle(LAWS["soft"], TRAINS["managed"], (300, 1, 3, 5))
    assert_matches_oracle(LAWS["constant-reference"], TRAINS["counted"], (300, 1, 3, 5))


@pytest.mark.parametrize("law", ["soft", "agarwal-one-sided"])
def test_rare_coincidences_match_the_oracle(law):
    """About one in 100 samples, on lines of a word and a part of one."""
    assert_matches_oracle(LAWS[law], PulseTrain(length=3), (150, 1, 3, 70), rate=0.003)


def test_rare_coincidences_are_found_as_frequent_ones_are():
    """To the bit: a group alone, and beside one whose devices move all the time; one of its own moves at every sample."""
    batch, inputs, outputs = 4500, 2, 70
    g, x, d, w_max = case(batch, 2, inputs, outputs)
    x[:, :inputs] *= 0.02
    d[:, :outputs] *= 0.02
    x[:, 0], d[:, outputs - 1] = 1, 0.5
    x[:, inputs:] *= 10
    train = PulseTrain(bound_management=False)
    made, how = {"law": LAWS["soft"], "seed": SEED, **WINDOW}, {"rate": 0.1, "train": train, "step": 9}
    both, alone = g.copy(), g[:, :inputs].copy()
    ops.pulse_update(ops.Pairs(both, **made), x, d, w_max=w_max, groups=2, **how)
    lines = x[:, :inputs].copy(), d[:, :outputs].copy()
    ops.pulse_update(ops.Pairs(alone, **made), *lines, w_max=w_max[:outputs], **how)
    np.testing.assert_array_equal(alone, both[:, :inputs])
    assert (alone != g[:, :inputs]).mean() > 0.5


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("law", ["constant", "constant-reference", "soft-one-sided"])
def test_counted_pulses_of_few_pairs_match_the_oracle(law, stored):
    """Wordlines of whose pairs none, few or most see a coincidence; few are gathered from the lines of a block."""
    g, x, d, w_max = case(6, 2, 70, 90)
    x[:, ::3] = 0
    x[:, 1::3] *= 0.1
    x[:, 2::3] += 5
    known = ops.draw_device_map(LAWS[law], g.shape, seed=3) if stored else None
    stuck = Programming(stuck_at_g_min=0.05, stuck_at_g_max=0.03)
    new, how = g.copy(), {"rate": 0.05, "w_max": w_max, "groups": 2, "step": 2**32 - 5}
    pairs = ops.Pairs(new, law=LAWS[law], programming=stuck, device_map=known, seed=SEED, **WINDOW)
    train = PulseTrain(mode="aggregated", bound_management=False)
    cells, _, weights = reference.pulse_update(g, x, d, train=train.model_dump(), **pairs.plain, **how)
    read = ops.pulse_update(pairs, x, d, train=train, **how)
    # as of `assert_matches_oracle`
    np.testing.assert_allclose(new, cells, rtol=0, atol=3e-6 * (G_MAX - G_MIN))
    np.testing.assert_allclose(read, weights, rtol=0, atol=6e-6 * w_max.max())
    moved = (cells != g).any(0)[:, :64].sum(1)
    assert (moved == 0).any()
    assert (moved > 40).any()
    assert moved[(moved > 0) & (moved < 20)].sum() > 128


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 530), (530, 3)])
def test_coincidences_of_many_slots_are_counted(inputs, outputs, same_on_threads):
    """Of more samples than are counted together, on lines in blocks of 256 and of a word."""
    g, x, d, w_max = case(150, 2, inputs, outputs)
    train, law = PulseTrain(mode="aggregated", update_management=False, bound_management=False), CONSTANT
    how = {"rate": 30.0, "w_max": w_max, "groups": 2, "step": 9}

    def updated():
        pairs = ops.Pairs(g.copy(), law=law, seed=SEED, **WINDOW)
        ops.pulse_update(pairs, x, d, train=train, **how)
        return pairs.g

    new = same_on_threads(updated, (2, 8))  # for the more threads the smaller blocks
    plain = ops.Pairs(g, law=law, seed=SEED, **WINDOW).plain
    cells, *_ = reference.pulse_update(g, x, d, train=train.model_dump(), **plain, **how)
    np.testing.assert_allclose(new, cells, rtol=0, atol=3e-6 * (G_MAX - G_MIN))
    inside = (new > 1.5 * G_MIN) & (new < 0.8 * G_MAX)
    assert inside.mean() > 0.1  # not all at an end of their window, where counts do not matter
    assert (new != g).mean() > 0.9


@pytest.mark.parametrize("scale", [1.0, 0.02], ids=["frequent", "rare"])
def test_pulses_of_many_samples_are_all_counted(scale):
    g, x, d, w_max = case(700, 1, 5, 70)
    counts = [np.zeros(g.shape, np.int32) for _ in range(2)]
    made = {**WINDOW, "law": LAWS["soft"], "endurance": Endurance(pulses=2000, spread=0.5), "seed": SEED}
    ours, plain = (ops.Pairs(g.copy(), pulse_count=count, **made) for count in counts)
    how = {"rate": 0.1, "w_max": w_max, "step": 3}
    x = np.float32(scale) * x
    ops.pulse_update(ours, x, d, train=PulseTrain(), **how)
    expected, *_ = reference.pulse_update(g, x, d, train=PulseTrain().model_dump(), **plain.plain, **how)
    assert counts[1].max() > (40 if scale == 1 else 1)
    assert (counts[0] != counts[1]).mean() < 2e-3
    assert (np.abs(ours.g - expected) <= 2e-5 * (WINDOW["g_max"] - WINDOW["g_min"])).mean() > 1 - 5e-3


@pytest.mark.parametrize("scale", [1.0, 0.03], ids=["frequent", "rare"])
def test_noise_of_the_nominal_step_is_that_of_its_direction(scale):
    law = ConstantStep(pulses=200, cycle=1.0, cycle_of="nominal", asymmetry=0.5)
    g, x, d, w_max = case(60, 1, 9, 70)
    ours, how = ops.Pairs(g.copy(), law=law, **WINDOW, seed=SEED), {"rate": 0.1, "w_max": w_max, "step": 3}
    x = np.float32(scale) * x
    ops.pulse_update(ours, x, d, train=PulseTrain(), **how)
    expected, *_ = reference.pulse_update(g, x, d, train=PulseTrain().model_dump(), **ours.plain, **how)
    assert (ours.g != g).mean() > 0.1
    assert (np.abs(ours.g - expected) <= 3e-6 * (WINDOW["g_max"] - WINDOW["g_min"])).mean() > 1 - 5e-3


@pytest.mark.parametrize(("law", "train"), [("soft", "managed"), ("constant", "counted")])
def test_the_same_bits_on_any_number_of_threads(law, train, same_on_threads):
    g, x, d, w_max = case(20, 2, 90, 65)

    def updated():
        pairs = ops.Pairs(g.copy(), law=LAWS[law], **WINDOW)
        return pairs.g, ops.pulse_update(pairs, x, d, rate=0.1, train=TRAINS[train], w_max=w_max, groups=2)

    same_on_threads(updated)


GEOMETRIES = {
    "same": ConvGeometry(2, 7, 9, (3, 3), padding=(1, 1)),
    "strided": ConvGeometry(3, 8, 6, (2, 3), stride=(2, 1), padding=(0, 2), dilation=(3, 2)),
    "one-pixel": ConvGeometry(5, 1, 1, (1, 1)),
    "by-position": ConvGeometry(
        3, 6, 5, (3, 2), stride=(1, 2), padding=(1, 0), line_order="position_channel"
    ),
}


def images(conv, groups=2, outputs=5, n=3):
    g, _, _, w_max = case(1, groups, conv.inputs, outputs)
    rng = np.random.default_rng(1)
    x = np.maximum(rng.normal(0.3, 1, (n, groups * conv.channels, conv.height, conv.width)), 0)
    d = rng.normal(0, 0.1, (n, groups * outputs, *conv.out))
    return g, x.astype(np.float32), d.astype(np.float32), w_max


@pytest.mark.parametrize("train", ["managed", "counted", "implicit"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_images_pulse_as_their_patches(geometry, train):
    """To the bit on each backend; the reference unfolds them itself."""
    conv = GEOMETRIES[geometry]
    g, x, d, w_max = images(conv)
    patches, errors = reference.unfold(x, conv), d.transpose(0, 2, 3, 1).reshape(-1, d.shape[1]).copy()
    made, how = {**WINDOW, "seed": SEED}, {"rate": 0.1, "w_max": w_max, "groups": 2, "step": 9}
    law, train = CONSTANT, TRAINS[train]
    expected, *_ = reference.pulse_update(
        g, x, d, law=law.model_dump(), train=train.model_dump(), conv=conv, **made, **how
    )
    for device in (None, ShimDevice(order=11)):
        pairs, alike = (ops.Pairs(g.copy(), law=law, **made) for _ in range(2))
        ops.pulse_update(pairs, x, d, train=train, conv=conv, device=device, **how)
        ops.pulse_update(alike, patches, errors, train=train, device=device, **how)
        np.testing.assert_array_equal(pairs.g, alike.g)
        np.testing.assert_allclose(pairs.g, expected, rtol=0, atol=3e-6 * (G_MAX - G_MIN))
    assert (pairs.g != g).mean() > 0.1


@pytest.mark.parametrize("train", ["managed", "counted", "implicit"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_signs_of_wordlines_are_those_of_their_inputs(geometry, train):
    """To the bit on each backend, of lines and of images, whose pixels lie on lines of either sign."""
    conv = GEOMETRIES[geometry]
    g, x, d, w_max = images(conv)
    sign = np.random.default_rng(2).choice(np.float32([-1, 1]), 2 * conv.inputs)
    patches, errors = reference.unfold(x, conv), d.transpose(0, 2, 3, 1).reshape(-1, d.shape[1]).copy()
    made, how = {**WINDOW, "seed": SEED}, {"rate": 0.1, "w_max": w_max, "groups": 2, "step": 9}
    law, train = CONSTANT, TRAINS[train]
    oracle = {"law": law.model_dump(), "train": train.model_dump(), **made, **how}
    expected, *_ = reference.pulse_update(g, x, d, conv=conv, sign=sign, **oracle)
    np.testing.assert_array_equal(reference.pulse_update(g, patches * sign, errors, **oracle)[0], expected)
    for device in (None, ShimDevice(order=11)):
        alike = []
        for lines, more in (
            ((x, d), {"conv": conv, "sign": sign}),
            ((patches, errors), {"sign": sign}),
            ((patches * sign, errors), {}),
        ):
            pairs = ops.Pairs(g.copy(), law=law, **made)
            ops.pulse_update(pairs, *lines, train=train, device=device, **how, **more)
            alike.append(pairs.g)
        np.testing.assert_array_equal(alike[0], alike[2])
        np.testing.assert_array_equal(alike[1], alike[2])
        np.testing.assert_allclose(alike[0], expected, rtol=0, atol=3e-6 * (G_MAX - G_MIN))


@pytest.mark.parametrize("device", [None, ShimDevice()], ids=["host", "kernel"])
def test_rare_pulses_are_not_lost(device):
    """Chances of 2^-18 a slot: the first 16 random bits leave open whether a slot fires, the last ones decide.

    Errors fill every slot, so each pulse of an input is a coincidence.
    """
    train, lines, batch = PulseTrain(bound_management=False), 6000, 16
    x = np.full((batch, lines), 2.0**-18, np.float32)
    x[:, 0], d = 1, np.full((batch, 1), 31, np.float32)
    law = ConstantStep(pulses=2**14, sides="reference")
    g = np.full((2, lines, 1), (G_MIN + G_MAX) / 2, np.float32)
    pairs, how = (
        ops.Pairs(g, law=law, seed=SEED, **WINDOW),
        {"rate": 2.0**-14, "w_max": np.ones(1, np.float32)},
    )
    *_, weights = reference.pulse_update(g, x, d, train=train.model_dump(), **pairs.plain, **how)
    read = ops.pulse_update(pairs, x, d, train=train, device=device, **how)
    pulses, wanted = (np.rint(w[0, 0] * law.pulses) for w in (read, weights))
    np.testing.assert_array_equal(pulses, wanted)
    assert -pulses[0] == 31 * batch
    slots = 31 * batch * (lines - 1)
    assert -pulses[1:].sum() == pytest.approx(slots / 2**18, abs=4 * np.sqrt(slots / 2**18))


def test_neighbouring_lines_and_slots_fire_independently():
    """Lines of one counter, halves of one word, slots and samples: correlations within 4.5 standard errors of 0."""
    p, repeats = 0.3, 600
    x, _, _ = many(PulseTrain(length=10, bound_management=False), [1.0, *[p] * 17], [10.0], repeats)
    fired = (x[:, 1:] != 0).astype(float)[..., :10]
    assert fired.mean() == pytest.approx(p, abs=4.5 * np.sqrt(p * (1 - p) / fired.size))
    z = (fired - p) / np.sqrt(p * (1 - p))
    for axis in (0, 1, 2):
        for lag in (1, 2, 7, 8):
            a, b = np.moveaxis(z, axis, 0)[lag:], np.moveaxis(z, axis, 0)[:-lag]
            assert abs((a * b).mean()) < 4.5 / np.sqrt(a.size)


def many(train, x, e, repeats=400):
    """Trains of one input and one error vector, drawn `repeats` times: slots [repeats, lines, 31] each."""
    x, e = (np.tile(np.asarray(values, float), (repeats, 1)) for values in (x, e))
    return pulse_trains(x, e, train=train.model_dump(), unit=0.25, seed=SEED)


def test_update_management_gives_both_sides_the_same_probability():
    """Of max|x| = 2 and max|e| = 3, 6 pulses are wanted: 6 slots, and sqrt(6 / 6) on both sides."""
    x, e, length = many(PulseTrain(length=31), [2.0, -1.0], [3.0, 0.6])
    assert (length == 6).all()
    assert (x[:, 0].sum(1) == 6).all()
    assert (e[:, 0].sum(1) == 6).all()
    n = 400 * 6
    for slots, p in ((-x[:, 1], 0.5), (e[:, 1], 0.2)):
        assert slots.sum() / n == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / n))
    x, e, length = many(PulseTrain(length=24, bound_management=False), [2.0, -1.0], [3.0, 0.6])
    assert (length == 24).all()
    for slots, p in ((x[:, 0], 0.5), (e[:, 0], 0.5), (-x[:, 1], 0.25), (e[:, 1], 0.1)):
        assert slots.sum() / (24 * 400) == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / (24 * 400)))


def test_without_update_management_the_probabilities_are_gokmens():
    """|x| sqrt(rate / (step length)) and |d| the same; here rate / step = 0.25 and so e = 0.25 d."""
    x, e, _ = many(
        PulseTrain(length=16, update_management=False, bound_management=False), [2.0], [0.25 * 4.0]
    )
    for slots, p in ((x[:, 0], 2 * np.sqrt(0.25 / 16)), (e[:, 0], 4 * np.sqrt(0.25 / 16))):
        assert slots.sum() / (16 * 400) == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / (16 * 400)))


def test_a_train_too_short_clips_errors_not_inputs():
    x, e, length = many(PulseTrain(length=10), [4.0, 2.0], [10.0, 2.5, 0.5])
    assert (length == 10).all()
    assert (x[:, 0].sum(1) == 10).all()
    assert (e[:, 0].sum(1) == 10).all()
    assert (e[:, 1].sum(1) == 10).all()
    assert x[:, 1].sum() / 4000 == pytest.approx(0.5, abs=4 * np.sqrt(0.25 / 4000))
    assert e[:, 2].sum() / 4000 == pytest.approx(0.2, abs=4 * np.sqrt(0.16 / 4000))


def changes(train, x, d, *, rate=0.01, law=None, copies=4000, batch=1, seed=1):
    """Weight changes of `copies` independent pairs in mid-window, in pulses; the same x and d for each sample."""
    law = law or ConstantStep(pulses=1000)
    # each pair is a group of its own: no two share a line
    g = np.full((2, copies, 1), (G_MIN + G_MAX) / 2, np.float32)
    xs, ds = (np.broadcast_to(np.float32(v), (batch, copies)).copy() for v in (x, d))
    pairs = ops.Pairs(g, law=law, seed=seed, **WINDOW)
    w = ops.pulse_update(
        pairs, xs, ds, rate=rate, train=train, w_max=np.ones(copies, np.float32), groups=copies
    )
    return w.ravel().astype(np.float64) * law.pulses / (2 if law.sides == "both" else 1)


@pytest.mark.parametrize("train", [t for t in TRAINS if "implicit" not in t])
def test_mean_and_variance_of_an_update(train):
    """Counts are binomial: mean L p q = rate x d / step a sample, variance L p q (1 - p q)."""
    train, x, d, batch = TRAINS[train], 0.7, -0.4, 3
    wanted = 0.01 * 0.7 * 0.4 * 1000 / 2  # pulses a sample
    length = np.ceil(wanted) if train.bound_management else train.length
    n, variance = 4000, batch * wanted * (1 - wanted / length)
    found = changes(train, x, d, batch=batch)
    assert found.mean() == pytest.approx(batch * wanted, abs=4 * np.sqrt(variance / n))
    assert found.var() == pytest.approx(variance, rel=5 * np.sqrt(3 / n))
    assert np.abs(found - np.rint(found)).max() < 1e-2


def test_implicit_coincidences_are_the_rounded_product():
    train = PulseTrain(
        length=20, scheme="deterministic_implicit", update_management=False, bound_management=False
    )
    # p = 0.8 sqrt(5 / 20) = 0.4 and q = 0.6 sqrt(5 / 20) = 0.3: 8 and 6 slots of 20, so 2.4 coincidences
    np.testing.assert_allclose(changes(train, 0.8, -0.6, copies=3), 2, rtol=1e-4)
    np.testing.assert_allclose(changes(train, -0.8, -0.6, copies=3, batch=4), -8, rtol=1e-4)


def test_noise_of_a_pulse():
    """Cycle noise of 50 %: its variance adds to that of the count, a quarter of the mean."""
    wanted, n = 0.01 * 0.28 * 500, 20000
    law = ConstantStep(pulses=1000, cycle=0.5, sides="reference")
    train = PulseTrain(bound_management=False)
    found = changes(train, 0.7, -0.2, law=law, copies=n)
    wanted = 0.01 * 0.7 * 0.2 * 1000
    variance = wanted * (1 - wanted / 31) + 0.25 * wanted
    assert found.mean() == pytest.approx(wanted, abs=4 * np.sqrt(variance / n))
    assert found.var() == pytest.approx(variance, rel=5 * np.sqrt(3 / n))


def test_counted_is_the_sequence_without_noise():
    """The same trains, counted: away from the bounds, constant steps add up to the same, and one-sided flows too."""
    g, x, d, w_max = case(40, 1, 30, 50)
    g[:] = np.random.default_rng(1).uniform(5e-6, 6e-6, g.shape)
    for law in (
        ConstantStep(pulses=1000, step_spread=0.3, asymmetry=0.2),
        SoftBounds(pulses=1000, spread=0.2, sides="one_sided"),
        PiecewiseStep(up=(1.5, 0.3), pulses=1000, sides="one_sided"),
    ):
        results = []
        for mode in ("exact", "aggregated"):
            pairs = ops.Pairs(g.copy(), law=law, seed=SEED, **WINDOW)
            ops.pulse_update(pairs, x, d, rate=0.05, train=PulseTrain(mode=mode), w_max=w_max)
            results.append(pairs.g)
        assert np.abs(results[0] - g).max() > 0.01 * (G_MAX - G_MIN)
        # float32 rounding of 40 conductances
        np.testing.assert_allclose(results[0], results[1], rtol=0, atol=40 * 1e-7 * (G_MAX - G_MIN))


@pytest.mark.parametrize("cycle_of", ["step", "nominal"])
def test_counted_is_distributed_as_the_sequence_with_noise(cycle_of):
    """Two-sample Kolmogorov-Smirnov of 4,000 pairs, independent draws."""
    law = ConstantStep(pulses=1000, cycle=0.6, cycle_of=cycle_of, step_spread=0.3, asymmetry=0.2)
    exact = changes(PulseTrain(), 0.7, -0.5, law=law, batch=4, seed=1)
    counted = changes(PulseTrain(mode="aggregated"), 0.7, -0.5, law=law, batch=4, seed=2)
    points = np.sort(np.concatenate([exact, counted]))
    cdf = [np.searchsorted(np.sort(sample), points, "right") / sample.size for sample in (exact, counted)]
    assert np.abs(cdf[0] - cdf[1]).max() < 1.95 * np.sqrt(2 / 4000)  # one in a thousand


def test_soft_bounds_do_not_commute():
    """Why counting is refused there: up then down is not down then up."""
    law, train = SoftBounds(pulses=20, up=2.0, down=2.0, sides="reference"), PulseTrain(length=1)
    ends = []
    for signs in ((1, -1), (-1, 1)):
        g = np.full((2, 1, 1), G_MIN + 0.4 * (G_MAX - G_MIN), np.float32)
        x, d = np.ones((2, 1), np.float32), np.array(signs, np.float32)[:, None]
        pairs = ops.Pairs(g, law=law, **WINDOW)
        ops.pulse_update(pairs, x, d, rate=1.0, train=train, w_max=np.ones(1, np.float32))
        ends.append(float(g[0, 0, 0]))
    assert abs(ends[0] - ends[1]) > 1e-3 * (G_MAX - G_MIN)


@pytest.mark.parametrize("train", TRAINS)
def test_zeros_fire_no_pulses(train):
    g, x, d, w_max = case(4, 1, 20, 30)
    before, pairs = g.copy(), ops.Pairs(g, law=CONSTANT, **WINDOW)
    s = {"rate": 10.0, "train": TRAINS[train], "w_max": w_max}
    for inputs, errors in ((x * 0, d), (x, d * 0)):
        ops.pulse_update(pairs, inputs, errors, **s)
        np.testing.assert_array_equal(g, before)
    x[:, 3], d[:, 5] = 0, 0
    ops.pulse_update(pairs, x, d, **s)
    np.testing.assert_array_equal(g[:, 3], before[:, 3])
    np.testing.assert_array_equal(g[:, :, 5], before[:, :, 5])
    assert (g != before).any()


@pytest.mark.parametrize("shape", [(0, 1, 4, 4), (2, 1, 0, 4), (2, 1, 4, 0)])
def test_nothing_to_pulse(shape):
    g, x, d, w_max = case(*shape)
    before = g.copy()
    pairs = ops.Pairs(g, law=CONSTANT, **WINDOW)
    read = ops.pulse_update(pairs, x, d, rate=0.1, train=PulseTrain(), w_max=w_max)
    assert read.shape == (1, shape[3], shape[2])
    np.testing.assert_array_equal(g, before)
    if read.size:
        pair = (g[0] - g[1]) / (G_MAX - G_MIN)
        np.testing.assert_allclose(read[0], pair.T * w_max[:, None], atol=1e-6)


GOOD = {
    "x": np.ones((2, 3), np.float32), "d": np.ones((2, 4), np.float32), "rate": 0.1, "train": PulseTrain(),
    "w_max": np.ones(4, np.float32),
}  # fmt: skip
TABLE = LookupTable(
    up=(1.0, 1.0), down=(1.0, 1.0), scatter_up=((0.0,) * 17,) * 2, scatter_down=((0.0,) * 17,) * 2
)
BAD = {
    "dtype": ({"x": np.ones((2, 3))}, TypeError, "`x` must be an array of float32, got float64"),
    "shape": ({"d": np.ones((3, 4), np.float32)}, ValueError, r"`d` must have shape \(2, 4\)"),
    "groups": ({"groups": 2}, ValueError, "`groups` must divide the inputs and the outputs, got 2 for 3"),
    "rate": ({"rate": 0.0}, ValueError, "`rate` must be above 0, got 0; give the learning rate"),
    "signs": ({"sign": np.ones(4, np.float32)}, ValueError, r"`sign` must have shape \(3,\) for this `g`, got \(4,\); give one for each"),
    "factors": ({"sign": np.float32([1, -1, 0.5])}, ValueError, "`sign` must be 1 or -1, got 0.5; multiply the inputs by other"),
    "images": (
        {"conv": ConvGeometry(1, 2, 2, (1, 3), padding=(0, 1)), "x": np.ones((2, 1, 2, 3), np.float32),
         "d": np.ones((2, 4, 2, 2), np.float32)}, ValueError,
        r"`x` must have shape \(2, 1, 2, 2\) for x \(2, 1, 2, 3\) in 1 groups, got \(2, 1, 2, 3\); check",
    ),
    "image-errors": (
        {"conv": ConvGeometry(1, 2, 2, (1, 3), padding=(0, 1)), "x": np.ones((2, 1, 2, 2), np.float32),
         "d": np.ones((2, 4, 2, 3), np.float32)}, ValueError, r"`d` must have shape \(2, 4, 2, 2\)",
    ),
    "axes": ({"conv": ConvGeometry(3, 1, 1, (1, 1))}, ValueError, r"`x` must have 4 axes, got 2"),
    "nan": ({"d": np.full((2, 4), np.nan, np.float32)}, ValueError, "`d` must be finite, got 8 NaN"),
    "infinity": ({"x": np.full((2, 3), np.inf, np.float32)}, ValueError, "`x` must be finite, got 6 NaN or inf"),
    "ideal": ({"law": Ideal()}, ValueError, "`law` must be one with pulses to follow a pulse train, got ideal"),
    "table": (
        {"law": TABLE, "train": PulseTrain(mode="aggregated")}, ValueError,
        "`mode` must be exact for law='lookup_table', whose steps depend on the order of pulses, got 'aggregated'",
    ),
    "order": (
        {"law": SoftBounds(), "train": PulseTrain(mode="aggregated")}, ValueError,
        "`mode` must be exact for law='soft_bounds', whose steps depend on the order of pulses, got 'aggregated'",
    ),
    "order-noise": (
        {"law": SoftBounds(cycle=0.1, sides="one_sided"), "train": PulseTrain(mode="aggregated")}, ValueError,
        "sides='one_sided' without noise of the cycle",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_changes_nothing(name):
    change, error, text = BAD[name]
    values = {**GOOD, **change}
    law, held = values.pop("law", CONSTANT), values.pop("g_held", None)
    pairs = ops.Pairs(np.full((2, 3, 4), 5e-6, np.float32), law=law, g_held=held, **WINDOW)
    with pytest.raises(error, match=f"^pulse_update: .*{text}"):
        ops.pulse_update(pairs, **values)
    assert (pairs.g == np.float32(5e-6)).all()


def test_more_samples_than_draws_tell_apart_are_refused():
    x, d = (np.zeros((2**23 + 1, lines), np.float32) for lines in (3, 4))
    pairs = ops.Pairs(np.full((2, 3, 4), 5e-6, np.float32), law=CONSTANT, **WINDOW)
    with pytest.raises(
        ValueError,
        match=r"^pulse_update: `x` must hold at most 8388608 samples, got 8388609; split the batch",
    ):
        ops.pulse_update(pairs, **{**GOOD, "x": x, "d": d})


def pulsed(layer, spec, name="layer"):
    torch.manual_seed(0)
    model, _ = convert(layer, spec)
    return model, InSituSGD(model.parameters(), lr=0.05)


PULSED = {"update": {"law": "constant_step", "pulses": 2000}, "pulses": {"length": 31}, "seed": 5}


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Sequential(nn.Linear(12, 7)), (6, 12)),
        (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)), (3, 4, 9, 8)),
    ],
    ids=["linear", "conv"],
)
def test_a_layer_is_pulsed_by_its_inputs_and_errors(layer, shape):
    """Averaged over draws, the step is -lr times the gradient; no weight gradient is made."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    steps, n = [], 60
    for seed in range(n):
        torch.manual_seed(0)
        plain = layer()
        model, _ = convert(plain, CrossbarSpec(**PULSED | {"seed": seed}))
        optimiser = InSituSGD(model.parameters(), lr=0.05)
        before = model[0].weight.detach().clone()
        model(x).square().mean().backward()
        assert model[0].weight.grad is None
        optimiser.step()
        steps.append(model[0].weight.detach() - before)
        assert model[0].streams.pairs == []
    plain(x).square().mean().backward()
    steps = torch.stack(steps)
    error = (steps.mean(0) + 0.05 * plain[0].weight.grad) / (steps.std(0) / n**0.5 + 1e-6)
    assert error.abs().max() < 5
    assert (0.05 * plain[0].weight.grad / steps.std(0).mean() * n**0.5).abs().max() > 10


def test_images_of_several_sizes_add_up():
    """A layer that reads images of two sizes in a step is pulsed as by all their patches."""
    conv = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, bias=False))
    model, optimiser = pulsed(conv, CrossbarSpec(**PULSED))
    layer = model[0]
    generator = torch.Generator().manual_seed(3)
    for size in (5, 4):
        model(torch.randn(2, 2, size, size, generator=generator)).square().mean().backward()
    lines = [layer.as_lines(x, d) for x, d in layer.streams.pairs]
    x, d = (torch.cat(parts).numpy() for parts in zip(*lines, strict=True))
    assert x.shape == (2 * (25 + 16), 18)
    cells, spec = layer.g_cells.numpy().copy(), layer.spec
    pairs = ops.Pairs(
        cells, law=spec.update, g_min=spec.device.g_min, g_max=spec.device.g_max, seed=layer.plan.seed
    )  # fmt: skip
    ops.pulse_update(
        pairs, x, d, rate=0.05, train=spec.pulses, w_max=layer.w_max.numpy(), step=layer.update_step.item()
    )
    before = layer.g_cells.clone()
    optimiser.step()
    np.testing.assert_array_equal(layer.g_cells.numpy(), cells)
    assert not torch.equal(layer.g_cells, before)


@pytest.mark.parametrize("train", [None, {"length": 31}])
def test_the_reference_backend_resumes(train, monkeypatch):
    """Weights are what the float32 cells read, not the float64 ones that they were rounded from."""
    monkeypatch.setattr("gpuxbar.launch.host.WANTED", "reference")
    spec = CrossbarSpec(update={"law": "soft_bounds"}, pulses=train)
    model, optimiser = pulsed(nn.Sequential(nn.Linear(5, 4)), spec)
    model(torch.ones(3, 5)).square().sum().backward()
    optimiser.step()
    again, _ = pulsed(nn.Sequential(nn.Linear(5, 4)), spec)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(torch.ones(3, 5)), model(torch.ones(3, 5)))


def test_streams_are_kept_until_a_step_and_forgotten_by_zero_grad():
    model, optimiser = pulsed(nn.Sequential(nn.Linear(3, 2)), CrossbarSpec(**PULSED))
    for _ in range(2):
        model(torch.ones(4, 3)).sum().backward()
    assert len(model[0].streams.pairs) == 2
    optimiser.zero_grad()
    before = model[0].weight.detach().clone()
    optimiser.step()
    torch.testing.assert_close(model[0].weight.detach(), before, rtol=0, atol=0)
    with torch.no_grad():
        model(torch.ones(4, 3))
    assert model[0].streams.pairs == []


def test_a_gradient_of_the_input_alone_pulses_nothing():
    """As autograd makes no gradient of the weight then; a later one of all does, from the same graph."""
    model, _ = pulsed(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), CrossbarSpec(**PULSED))
    x = torch.ones(4, 3, requires_grad=True)
    y = model(x).sum()
    (grad,) = torch.autograd.grad(y, x, retain_graph=True)
    assert [layer.streams.pairs for layer in model] == [[], []]
    y.backward(torch.tensor(2.0))
    assert torch.equal(2 * grad, x.grad)
    assert [len(layer.streams.pairs) for layer in model] == [1, 1]
    assert torch.equal(model[0].streams.pairs[0][0], x)
    assert torch.equal(model[1].streams.pairs[0][1], torch.full((4, 2), 2.0))


# torch's compiler does both itself where graphs break
@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated", "ignore:The .grad attribute of a Tensor that is not a leaf"
)
@pytest.mark.parametrize("asked", [0, 1])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gradient_of_one_weight_alone_keeps_the_operands_of_its_layer(compiled, asked):
    """As autograd asks for no other; there is none of the weight itself."""
    model, _ = pulsed(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), CrossbarSpec(**PULSED))
    y = (torch.compile(model, backend="aot_eager") if compiled else model)(torch.ones(4, 3)).sum()
    assert torch.autograd.grad(y, model[asked].weight, allow_unused=True) == (None,)
    assert [len(layer.streams.pairs) for layer in model] == [asked == 0, asked == 1]


@pytest.mark.parametrize("use", ["tied", "penalty"])
def test_gradients_of_other_uses_of_a_pulsed_weight_are_refused(use):
    embedding = nn.Embedding(5, 3)
    model = nn.ModuleList([embedding, nn.Linear(3, 5)])
    model[1].weight = embedding.weight
    model, optimiser = pulsed(model, CrossbarSpec(**PULSED))
    x = model[0](torch.tensor([1, 2])) if use == "tied" else torch.ones(2, 3)
    loss = model[1](x).sum()
    (loss if use == "tied" else loss + model[1].weight.square().sum()).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="InSituSGD: `weight` of 1 must have no gradient with pulse trains"):
        optimiser.step()
    assert str(model.state_dict()) == str(before)
    optimiser.zero_grad()
    model[1](torch.ones(2, 3)).sum().backward()
    optimiser.step()


def test_calibration_pulses_nothing():
    model, _ = pulsed(nn.Sequential(nn.Linear(3, 2)), CrossbarSpec(**PULSED, adc={"bits": 8}))
    calibrate(model, [torch.ones(4, 3)])
    model(torch.ones(4, 3)).sum().backward()
    calibrate(model, [torch.ones(4, 3)])
    assert len(model[0].streams.pairs) == 1


def test_a_frozen_layer_is_not_pulsed():
    model, optimiser = pulsed(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)), CrossbarSpec(**PULSED)
    )
    model[1].weight.requires_grad_(False)
    before = [layer.weight.detach().clone() for layer in model]
    for _ in range(3):
        optimiser.zero_grad()
        model(torch.randn(5, 8)).square().mean().backward()
        optimiser.step()
    same = [torch.equal(layer.weight, weight) for layer, weight in zip(model, before, strict=True)]
    assert same == [False, True, False]


def test_a_scaled_loss_pulses_alike():
    """By a power of two, so to the bit; an overflow skips the step and forgets its errors."""
    results, x = [], torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    for scaled in (False, True):
        torch.manual_seed(0)
        model, optimiser = pulsed(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), CrossbarSpec(**PULSED))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=scaled)
        for _ in range(3):
            optimiser.zero_grad()
            scaler.scale(model(x).square().mean()).backward()
            scaler.step(optimiser)
            scaler.update()
        results.append(copy.deepcopy(model.state_dict()))
    for a, b in zip(*(state.values() for state in results), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    scaler.scale(model(x).sum()).backward()
    model[0].bias.grad[0] = torch.inf
    scaler.step(optimiser)
    scaler.update()
    assert model[0].streams.pairs == []
    assert scaler.get_scale() == 2.0**7
    torch.testing.assert_close(model[0].weight, results[1]["0.weight"], rtol=0, atol=0)
    scaler.scale(model(x).sum()).backward()
    scaler.unscale_(optimiser)
    with pytest.raises(ValueError, match=r"`scaler\.unscale_` must not be called with pulse trains"):
        scaler.step(optimiser)


def test_errors_are_looked_at_whatever_the_default_device():
    streams = Streams()
    streams.pairs = [(torch.zeros(2, 3), torch.full((2, 4), torch.inf))]
    weight = torch.zeros(4, 3)
    with torch.device("meta"):  # which holds no values
        looked_at = streams.finite(weight)
    assert looked_at.device == weight.device
    assert looked_at.to_dense().isnan().any()


def test_an_error_that_is_not_finite_is_seen_among_others():
    x, weight = torch.zeros(2, 3), torch.zeros(4, 3)
    for pairs, finite in (([1.0, 2.0], True), ([torch.inf, 1.0], False), ([1.0, torch.nan], False)):
        streams = Streams()
        streams.pairs = [(x, torch.full((2, 4), value)) for value in pairs]
        assert streams.finite(weight).to_dense().isfinite().all() == finite


def test_a_scaled_loss_trains_networks_without_any_gradient():
    """Errors that are not finite skip the step, as gradients do, though a layer before them has none."""
    results, x = [], torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    for scaled in (False, True):
        torch.manual_seed(0)
        layers = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)
        model, optimiser = pulsed(nn.Sequential(*layers), CrossbarSpec(**PULSED))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=scaled)
        for bad in (1.0, torch.inf, 1.0):  # as on a GPU, which does not look at each error
            if bad == 1.0 or scaled:
                optimiser.zero_grad()
                scaler.scale(model(x).square().mean()).backward()
                model[0].streams.pairs[0][1][2, 1] *= bad
                scaler.step(optimiser)
                scaler.update()
        results.append(copy.deepcopy(model.state_dict()))
    assert scaler.get_scale() == 2.0**7
    assert model[0].weight.grad is None
    for key in ("0.g_cells", "1.weight"):
        torch.testing.assert_close(results[1][key], results[0][key], rtol=0, atol=0)


def test_momentum_is_refused_with_pulses():
    model, _ = convert(nn.Sequential(nn.Linear(3, 2)), CrossbarSpec(**PULSED))
    with pytest.raises(
        ValueError, match=r"`momentum` must be 0 for layers with pulse trains, got 0\.9 for 0"
    ):
        InSituSGD(model.parameters(), lr=0.1, momentum=0.9)


def test_a_copied_layer_is_of_no_group_of_processes():
    layer = AnalogLinear(3, 2, spec=CrossbarSpec(**PULSED))
    layer.streams.group = threading.Lock()  # which cannot be copied, as a group of processes
    layer.streams.pairs = [(torch.ones(1, 3), torch.ones(1, 2))]
    copied = copy.deepcopy(layer).streams
    assert copied.group is None
    assert torch.equal(copied.pairs[0][0], torch.ones(1, 3))


def test_a_weight_set_by_others_is_refused_before_ranks_share_operands():
    model, optimiser = pulsed(nn.Sequential(nn.Linear(3, 2)), CrossbarSpec(**PULSED))
    model(torch.ones(4, 3)).sum().backward()
    model[0].streams.group = threading.Lock()  # of which no rank is asked
    with torch.no_grad():
        model[0].weight += 1
    with pytest.raises(ValueError, match="0: `weight` must be what the cells read once trained in situ"):
        optimiser.step()
    assert len(model[0].streams.pairs) == 1


def test_a_rate_of_numpy_is_as_one_of_python():
    g, x, d, w_max = case(3, 1, 9, 7)
    made = {"law": LAWS["constant"], **WINDOW, "seed": SEED}
    s = {"train": PulseTrain(), "w_max": w_max}
    read = [
        ops.pulse_update(ops.Pairs(g.copy(), **made), x, d, rate=rate, **s)
        for rate in (0.03, np.float64(0.03), np.array(0.03))
    ]
    for weights in read[1:]:
        np.testing.assert_array_equal(weights, read[0])


def test_an_error_of_nothing_is_kept_as_zeros():
    """As of a function that gives no gradient; the ranks of a model share as many operands each."""

    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    model, _ = pulsed(nn.Sequential(nn.Linear(3, 2)), CrossbarSpec(**PULSED))
    x = torch.ones(4, 3, requires_grad=True)
    Cut.apply(model(x)).sum().backward()
    ((kept, error),) = model[0].streams.pairs
    assert not kept.requires_grad
    assert torch.equal(error, torch.zeros(4, 2))


OFTEN_READ_OUT = {
    "pulses": {},
    "counted": {"update": {"law": "constant_step", "pulses": 100, "cycle": 0.3}, "pulses": {"mode": "aggregated"}},
    "endurance": {"endurance": {"pulses": 5, "failed": "g_min"}},
    "write noise": {"update": {"law": "soft_bounds", "pulses": 100, "write_noise": 1e-7}},
    "counted write noise": {
        "update": {"law": "constant_step", "pulses": 100, "write_noise": 1e-7}, "pulses": {"mode": "aggregated"},
    },
    "carry": {
        "mapping": {"scheme": "subtracted", "slices": 2, "slice_bits": 2},
        "carry": {"scheme": "periodic", "interval": 2, "headroom_bits": 2},
    },
    "refresh": {"update": {"law": "soft_bounds", "pulses": 50, "sides": "one_sided"}, "refresh": {"interval": 2}},
    "retention": {"retention": {"tau": 20.0}},
}  # fmt: skip


@pytest.mark.parametrize("lines", [5, 60], ids=["few lines", "many lines"])
@pytest.mark.parametrize("name", OFTEN_READ_OUT)
def test_the_weight_is_what_the_cells_read_after_every_sample(name, lines):
    """Also of wordlines that are not driven, whose weights need not be written."""
    spec = {
        "update": {"law": "soft_bounds", "pulses": 100, "cycle": 0.3, "spread": 0.1},
        "pulses": {},
        "seed": 3,
    }
    model, optimiser = pulsed(
        nn.Sequential(nn.Linear(130, 70)), CrossbarSpec.model_validate(spec | OFTEN_READ_OUT[name])
    )
    layer, generator, moved = model[0], torch.Generator().manual_seed(4), 0
    for _ in range(5):
        x = torch.zeros(1, 130)
        x[:, torch.randperm(130, generator=generator)[:lines]] = 1
        before = layer.weight.detach().clone()
        model(x).square().sum().backward()
        optimiser.step()
        shown = layer.weight.detach().clone()
        moved += int((shown != before).sum())
        layer.read_out()
        assert torch.equal(shown, layer.weight)
    assert moved > 100
