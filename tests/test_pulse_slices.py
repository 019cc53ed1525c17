"""Pulse trains on sliced weights: they move the lowest slice, and carries move up what it gathers."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from cuda_shim import REVERSE, ShimDevice
from test_carry import LIES, RANGE, SEED, STUCK, cells, from_digits, lie, pairs_of, units_of
from test_in_situ_devices import trained_and_resumed

import gpuxbar as gx
from gpuxbar import ops, reference
from gpuxbar.nn import AnalogLinear
from gpuxbar.spec import Agarwal, ConstantStep, Endurance, PulseTrain, SoftBounds

DEVICES = [None, ShimDevice(order=REVERSE)]
IDS = ["host", "kernel"]
MODES = ("exact", "aggregated")
CONSTANT = ConstantStep(pulses=200, cycle=0.3, step_spread=0.3, asymmetry=0.1, low_spread=0.05)
# law, mode, whether devices wear out
CASES = [
    pytest.param(CONSTANT, "exact", False, id="constant"),
    pytest.param(CONSTANT, "aggregated", True, id="counted-worn"),
    pytest.param(SoftBounds(pulses=100, spread=0.2, cycle=0.3), "exact", True, id="soft-worn"),
    pytest.param(Agarwal(nu=2, spread=0.2, pulses=90, sides="one_sided"), "aggregated", False, id="one-sided"),
    pytest.param(ConstantStep(pulses=100, sides="reference", cycle=0.2), "exact", False, id="reference"),
]  # fmt: skip


def periodic(shape, **rule):
    return lie(*shape, scheme="periodic", **rule)


def lines(batch, groups, inputs, outputs, seed=0):
    rng = np.random.default_rng(seed)
    x = np.maximum(rng.normal(0.3, 1, (batch, groups * inputs)), 0).astype(np.float32)
    return x, rng.normal(0, 0.1, (batch, groups * outputs)).astype(np.float32)


def small(s, slices, pulses, wanted):
    """The rate at which an input and an error of 1 want so many pulses of both sides of a lowest pair of w_max = 1."""
    return wanted * 2 / pulses * s["carry"].window(s["slice_bits"]) / (2.0 ** (slices * s["slice_bits"]) - 1)


@pytest.mark.parametrize("device", DEVICES, ids=IDS)
@pytest.mark.parametrize(("law", "mode", "worn"), CASES)
@pytest.mark.parametrize("shape", LIES)
def test_updates_match_the_oracle(shape, law, mode, worn, device):
    s, groups, inputs, outputs = periodic(shape), 2, 5, 37 if device is None else 20
    x, d = lines(9, groups, inputs, outputs)
    w_max = np.random.default_rng(1).uniform(0.5, 2.0, groups * outputs).astype(np.float32)
    how = {"rate": small(s, shape[0], law.nominal_pulses, 5.0), "groups": groups}
    g, train = cells(2 * shape[0], groups * inputs, outputs), PulseTrain(mode=mode)
    count = np.where(cells(*g.shape, seed=3) < 1.5e-6, -5, 4).astype(np.int32) if worn else None
    limit = Endurance(pulses=10, spread=0.5, failed="g_max") if worn else None
    before, taken = g.copy(), None if count is None else count.copy()
    pairs = pairs_of(g, s, law, endurance=limit, pulse_count=taken, seed=SEED, **STUCK)
    at, plain = {"w_max": w_max, "step": 9}, {**pairs.plain, "pulse_count": count}
    expected, _, weights = reference.pulse_update(g, x, d, train=train.model_dump(), **plain, **how, **at)
    read = ops.pulse_update(pairs, x, d, train=train, device=device, **how, **at)
    np.testing.assert_allclose(g, expected, rtol=0, atol=3e-6 * RANGE)
    if worn:
        np.testing.assert_array_equal(taken, count)
    top = s["carry"].window(shape[1]) / 2.0 ** shape[1]  # in w_max, of the highest slice
    np.testing.assert_allclose(read, weights, rtol=0, atol=2e-6 * 2 * top)
    moved = (g != before).reshape(2, shape[0], -1).mean(2)
    assert moved[0, 0] > 0.3
    assert (moved[1, 0] > 0.3) == (law.sides != "reference")
    assert not moved[:, 1:].any()
    # and as the other update reads them
    still = np.zeros((groups, outputs, inputs), np.float32)
    again = ops.device_update(pairs, still, device=device, **at)
    np.testing.assert_array_equal(again, read)


@pytest.mark.parametrize("mode", MODES)
def test_a_map_says_which_devices_they_are(mode):
    s, law = periodic((3, 2, 2)), ConstantStep(pulses=200, step_spread=0.3, high_spread=0.1)
    g, (x, d) = cells(6, 5, 7), lines(9, 1, 5, 7)
    devices = ops.draw_device_map(law, g.shape, seed=SEED)
    how = {"rate": small(s, 3, 200, 5.0), "train": PulseTrain(mode=mode), "w_max": np.ones(7, np.float32)}
    drawn, mapped, kernel = g.copy(), g.copy(), g.copy()
    for each, known, device in (
        (drawn, None, None),
        (mapped, devices, None),
        (kernel, devices, DEVICES[1]),
    ):
        pairs = pairs_of(each, s, law, device_map=known, seed=SEED)
        ops.pulse_update(pairs, x, d, device=device, **how)
    np.testing.assert_allclose(mapped, drawn, rtol=0, atol=1e-3 * RANGE)  # halves
    np.testing.assert_allclose(kernel, mapped, rtol=0, atol=1e-6 * RANGE)
    assert np.abs(drawn - g).max() > 0.02 * RANGE


@pytest.mark.parametrize("device", DEVICES, ids=IDS)
@pytest.mark.parametrize("mode", MODES)
def test_the_lowest_pair_moves_as_a_pair_alone(mode, device):
    """To the bit, noise of the cycle included, at a rate that wants as many pulses."""
    s, slices, law = periodic((3, 2, 2)), 3, ConstantStep(pulses=200, cycle=0.3, asymmetry=0.1)
    g, (x, d) = cells(6, 5, 7), lines(9, 1, 5, 7)
    how = {"train": PulseTrain(mode=mode), "w_max": np.ones(7, np.float32), "device": device}
    pair, sliced, rate = g[::slices].copy(), g.copy(), small(s, 3, 200, 5.0)
    alone = ops.pulse_update(pairs_of(pair, {}, law, seed=SEED), x, d, rate=rate * 63 / 15, **how)
    read = ops.pulse_update(pairs_of(sliced, s, law, seed=SEED), x, d, rate=rate, **how)
    np.testing.assert_array_equal(sliced[::slices], pair)
    # a weight of 1 is 63 units, a pair alone 15 of them
    others = units_of(np.where(np.isin(np.arange(6), (0, 3))[:, None, None], 0, g), s)
    np.testing.assert_allclose(63 * read[0], 15 * alone[0] + others.T, atol=63 * 1e-6)


def test_a_pulse_is_a_part_of_a_unit_and_a_carry_keeps_it():
    """Six coincidences a sample, for certain; both sides of a pair move by one pulse each, 15 units in 300."""
    s = periodic((3, 2, 2))
    train = PulseTrain(length=6, scheme="deterministic_implicit", bound_management=False)
    law, w_max = ConstantStep(pulses=300), np.ones(7, np.float32)
    g = from_digits(np.zeros((3, 5, 7)), s)
    x, d = np.ones((4, 5), np.float32), np.ones((4, 7), np.float32)
    d[:, 0], d[:, 1] = -1, 0
    pairs, how = pairs_of(g, s, law), {"rate": small(s, 3, 300, 6.0), "train": train, "w_max": w_max}
    total = np.broadcast_to([1.0, 0, -1, -1, -1, -1, -1], (5, 7)) * 2 * 24 * 15 / 300
    read = ops.pulse_update(pairs, x, d, **how)
    np.testing.assert_allclose(units_of(g, s), total, atol=1e-4)
    np.testing.assert_allclose(read[0].T, total / 63, atol=2e-6)
    for updates in range(1, 8):
        before = units_of(g, s)
        ops.carry(pairs, updates=64 * updates)
        np.testing.assert_allclose(units_of(g, s), before, atol=2e-4)
        ops.pulse_update(pairs, x, d, **how)
    np.testing.assert_allclose(units_of(g, s), 8 * total, atol=2e-3)
    assert np.abs(8 * total).max() > 15  # more than the lowest slice holds


def changes(mode, seed, copies=3000):
    """Pulses of independent pairs in mid-window."""
    s, law = periodic((3, 2, 2)), ConstantStep(pulses=1000, cycle=0.6, step_spread=0.3, asymmetry=0.2)
    g = from_digits(np.zeros((3, copies, 1)), s)
    x, d = (np.full((4, copies), value, np.float32) for value in (0.7, -0.5))
    w = ops.pulse_update(
        pairs_of(g, s, law, seed=seed), x, d, rate=small(s, 3, 1000, 5.0), train=PulseTrain(mode=mode),
        w_max=np.ones(copies, np.float32), groups=copies,
    )  # fmt: skip
    return 63 * w.ravel().astype(np.float64) * 1000 / 15 / 2


def test_counted_is_distributed_as_the_sequence():
    """Two-sample Kolmogorov-Smirnov of 3,000 pairs; the mean is that of the product."""
    samples = [changes(mode, seed) for seed, mode in enumerate(MODES)]
    points = np.sort(np.concatenate(samples))
    cdf = [np.searchsorted(np.sort(sample), points, "right") / sample.size for sample in samples]
    assert np.abs(cdf[0] - cdf[1]).max() < 1.95 * np.sqrt(2 / 3000)  # one in a thousand
    for sample in samples:
        assert sample.mean() == pytest.approx(4 * 5 * 0.35, abs=4 * sample.std() / np.sqrt(3000))


PULSED = {
    "mapping": {"slices": 4, "slice_bits": 2, "headroom": 2.0},
    "update": {"law": "soft_bounds", "up": 2.0, "down": 2.0, "pulses": 500, "cycle": 0.3},
    "carry": {"scheme": "periodic", "interval": 1, "headroom_bits": 6}, "pulses": {}, "seed": 5,
}  # fmt: skip
EVERYTHING = {
    "programming": {"write_noise": 5e-8, "stuck_at_g_min": 0.02}, "endurance": {"pulses": 300, "spread": 0.5},
    "retention": {"tau": 500.0}, "carry": {"interval": 3},
}  # fmt: skip


def layer_on(spec, **overrides):
    torch.manual_seed(0)
    return AnalogLinear(
        12, 7, spec=gx.CrossbarSpec.model_validate(spec).with_overrides(overrides), name="layer"
    )


layer_of = partial(layer_on, PULSED)


@pytest.mark.parametrize("overrides", [{}, EVERYTHING], ids=["plain", "everything"])
def test_a_resumed_run_equals_an_uninterrupted_one(overrides):
    whole = trained_and_resumed(partial(layer_of, **overrides))
    assert whole.carry_step.item() == 10
    if overrides:
        used = (whole.pulse_count != 0).reshape(2, 4, -1).any(2)
        assert used.tolist() == [[True, False, False, False]] * 2


def test_carries_come_between_updates_by_pulses():
    """The lowest slice holds 7 units of 255; a layer without carries moves no further."""
    ends = []
    for interval in (1, 10**6):
        layer = layer_of(
            update={"law": "constant_step", "pulses": 500}, carry={"interval": interval, "headroom_bits": 1}
        )
        layer.begin_in_situ()
        before = layer.weight.detach().clone()
        for _ in range(40):
            layer.update_in_array(torch.ones(4, 12), torch.ones(4, 7), 0.01)
        ends.append((layer.weight - before).abs().mean().item() / layer.w_max[0].item())
    assert ends[1] < 14 / 255
    assert ends[0] > 0.5


def test_opcheck():
    spec = layer_of(**EVERYTHING).spec.model_dump_json()
    g = torch.from_numpy(cells(8, 5, 6))
    count = torch.zeros(8, 5, 6, dtype=torch.int32)
    step, weight = torch.ones(1, dtype=torch.int64), torch.empty(1, 6, 5)
    lines = (torch.randn(4, 5), torch.randn(4, 6), weight, torch.ones(6), step, 0.1, 1)
    args = (g, None, count, None, spec, 3, *lines)
    torch.library.opcheck(torch.ops.gpuxbar.pulse_update.default, args)


def test_what_trains_cannot_do_is_named():
    how = {"rate": 0.1, "train": PulseTrain(), "w_max": np.ones(4, np.float32)}
    x, d = np.ones((2, 3), np.float32), np.ones((2, 4), np.float32)
    pairs = pairs_of(np.full((6, 3, 4), 5e-6, np.float32), lie(3, 2, 2), CONSTANT)
    text = r"`carry\.scheme` must be periodic with pulse trains, got 'accumulate': coincidences count a product out"
    with pytest.raises(ValueError, match="^pulse_update: " + text):
        ops.pulse_update(pairs, x, d, **how)
    assert (pairs.g == np.float32(5e-6)).all()
    pairs = pairs_of(np.full((6, 4, 3), 5e-6, np.float32), periodic((3, 2, 2)), CONSTANT)
    with pytest.raises(
        ValueError, match=r"^pulse_update: `g` must have shape \(6, 3, 4\) for x .* got \(6, 4, 3\)"
    ):
        ops.pulse_update(pairs, x, d, **how)
    assert (pairs.g == np.float32(5e-6)).all()
