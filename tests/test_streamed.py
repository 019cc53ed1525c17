"""Outer products streamed into sliced weights: bits of inputs by digits of errors, and layers that are trained so.

Most inputs, errors and full weights here are such that float32 holds every product and sum: then no digit lies on an edge
where backends may cut it otherwise.
"""

from __future__ import annotations

import sys
from functools import partial

import numpy as np
import pytest
import torch
from cuda_shim import REVERSE, ShimDevice
from test_carry import (
    RANGE,
    SEED,
    STUCK,
    cells,
    digits_of,
    from_digits,
    lie,
    pairs_of,
    units_of,
)
from test_in_situ_devices import trained_and_resumed
from test_pulse_slices import PULSED, layer_on
from torch import nn

import gpuxbar as gx
from gpuxbar import ops, reference
from gpuxbar.nn import AnalogConv2d
from gpuxbar.ops import ConvGeometry
from gpuxbar.spec import Agarwal, ConstantStep, Endurance, Ideal, SoftBounds

DEVICES = [
    None,
    ShimDevice(order=REVERSE),
    ShimDevice(order=11, workspace=1500),
]  # the last in chunks of few samples
IDS = ["host", "kernel", "kernel-shuffled"]
# slices, bits, bits of headroom; bits of an input, of which a full input divides a full weight
CASES = [
    pytest.param((3, 2, 2), 3, id="three-of-2"),
    pytest.param((8, 1, 3), 4, id="binary"),
    pytest.param((2, 8, 1), 8, id="two-of-8"),
]
LAWS = {
    "agarwal": Agarwal(nu=2.0, gamma=0.02),
    "one-sided": SoftBounds(spread=0.2, write_noise=1e-7, sides="one_sided"),
    "reference": ConstantStep(pulses=100, cycle=0.2, sides="reference"),
}
LIMIT = Endurance(pulses=10, spread=0.5, failed="g_max")


def streamed(shape, input_bits, **rule):
    return lie(*shape, scheme="streamed", input_bits=input_bits, **rule)


def exact(s, slices, batch, groups, inputs, outputs, seed=0):
    """Inputs of whole codes, a sixteenth each, half of it but in the first group, and errors and full weights that ask for powers
    of two of units.

    At a rate of 1/2 a stream asks for a full weight at most, and of some outputs for digits of every slice.
    """
    rng = np.random.default_rng(seed)
    bits, most = slices * s["slice_bits"], 2 ** s["carry"].input_bits - 1
    x = rng.integers(-most, most + 1, (batch, groups * inputs)).astype(np.float32) / 16
    by_group = x.reshape(batch, groups, inputs)
    by_group[0, :, 0] = most / 16
    by_group[:, 1:] /= 2
    d = rng.uniform(-0.98, 0.98, (batch, groups * outputs))
    d *= 2.0 ** (bits - s["carry"].input_bits + rng.integers(0, 7, groups * outputs))
    d[:, 0] = 0.98 * 2.0 ** (bits - s["carry"].input_bits + 6)
    w_max = ((2**bits - 1) * 2.0 ** rng.integers(0, 2, groups * outputs)).astype(np.float32)
    w_max[0] = 2**bits - 1
    return x, (np.rint(d * 64) / 64).astype(np.float32), w_max


@pytest.mark.parametrize("device", DEVICES, ids=IDS)
@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize(("shape", "input_bits"), CASES)
def test_updates_match_the_oracle(shape, input_bits, name, device):
    s, law = streamed(shape, input_bits), LAWS[name]
    groups, outputs, inputs = 2, 37 if device is None else 10, 5
    x, d, w_max = exact(s, shape[0], 7, groups, inputs, outputs)
    g = cells(2 * shape[0], groups * inputs, outputs)
    g_held = g + np.float32(1e-7) if law.write_noise else None
    count, limit = None, None
    if name == "reference":
        count, limit = np.where(cells(*g.shape, seed=3) < 1.5e-6, -5, 4).astype(np.int32), LIMIT
    before, taken = g.copy(), None if count is None else count.copy()
    pairs = pairs_of(g, s, law, g_held=g_held, endurance=limit, pulse_count=count, seed=SEED, **STUCK)
    how = {"rate": 0.5, "w_max": w_max, "groups": groups}
    oracle = {**pairs.plain, "pulse_count": taken}
    expected, held, weights = reference.streamed_update(g, x, d, g_held=g_held, step=9, **oracle, **how)
    read = ops.streamed_update(pairs, x, d, step=np.full(1, 9), device=device, **how)
    np.testing.assert_allclose(g, expected, rtol=0, atol=3e-6 * RANGE)
    if g_held is not None:
        np.testing.assert_allclose(g_held, held, rtol=0, atol=3e-6 * RANGE)
    if count is not None:
        assert (count != taken).mean() < 2e-3  # parts of a pulse on a rounding edge
    top = s["carry"].window(shape[1]) / 2.0 ** shape[1]  # in full weights, of the highest slice
    np.testing.assert_allclose(read, weights, rtol=0, atol=4e-6 * top * w_max.max())
    moved = (g != before).reshape(2, shape[0], -1).mean(2)
    assert (moved[0] > 0).all()  # every slice
    assert (moved[1] > 0).all() == (law.sides != "reference")


@pytest.mark.parametrize("device", DEVICES, ids=IDS)
@pytest.mark.parametrize(("shape", "input_bits"), CASES)
def test_digits_add_up_to_the_change(shape, input_bits, device):
    """Digit by digit as the oracle has them, and together the product of the rounded inputs, exactly."""
    s = streamed((*shape[:2], 8), input_bits)
    x, d, w_max = exact(s, shape[0], 3, 1, 5, 6)
    x += np.random.default_rng(1).uniform(-0.02, 0.02, x.shape).astype(np.float32)  # a third of a code
    x[0, 0] = (2**input_bits - 1) / 16
    codes = np.rint(x.astype(np.float64).clip(-x[0, 0], x[0, 0]) * 16)
    x = x.clip(-x[0, 0], x[0, 0])
    way = {"slices": shape[0], "slice_bits": shape[1]}
    digits = reference.streamed_digits(x, d, rate=0.5, w_max=w_max, input_bits=input_bits, **way)
    full = 2.0 ** (shape[0] * shape[1]) - 1
    units = np.tensordot(2.0 ** (shape[1] * np.arange(shape[0])), digits, axes=1)[0]
    np.testing.assert_array_equal(units, -0.5 * full * (codes / 16).T @ d.astype(np.float64) / w_max)
    assert (np.abs(digits[1:]).max((1, 2, 3)) >= 1).all()
    np.testing.assert_array_equal(digits[1:], np.rint(digits[1:]))
    g = from_digits(np.zeros((shape[0], 5, 6)), s)
    read = ops.streamed_update(pairs_of(g, s, Ideal()), x, d, rate=0.5, w_max=w_max, device=device)
    window = s["carry"].window(shape[1])
    assert np.abs(digits).max() < window
    np.testing.assert_allclose(digits_of(g, s), digits[:, 0], atol=3e-7 * window)
    top = window * 2.0 ** (shape[1] * (shape[0] - 1))
    np.testing.assert_allclose(read[0].T, units * w_max / full, atol=3e-7 * top / full * w_max.max())


def test_one_bit_of_one_sample_is_accumulation():
    """The digits of one product, off the edges, whatever the law makes of them."""
    s = streamed((4, 2, 2), 1)
    x, d, w_max = exact(s, 4, 1, 1, 9, 7)
    x, d = np.sign(x), d + np.float32(1 / 128)  # of one size or 0; odd
    one, other = cells(8, 9, 7), cells(8, 9, 7)
    first, second = (pairs_of(g, s, Agarwal(nu=1, gamma=0.1), seed=SEED) for g in (one, other))
    read = ops.streamed_update(first, x, d, rate=0.5, w_max=w_max)
    whole = ops.device_update(second, np.float32(-0.5) * (d.T @ x)[None], w_max=w_max)
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 * RANGE)
    np.testing.assert_allclose(read, whole, rtol=0, atol=1e-5 * w_max.max())
    assert (one != cells(8, 9, 7)).reshape(8, -1).mean(1).min() > 0.2


@pytest.mark.parametrize("device", DEVICES[:2], ids=IDS[:2])
def test_streams_of_one_sample_change_what_accumulation_changes(device):
    """On ideal devices with room: other slices may take it, and a carry settles that."""
    s = streamed((4, 2, 4), 8)
    x, d, w_max = exact(s, 4, 1, 1, 9, 7)
    d /= 2.0 ** np.ceil(np.log2(np.abs(d).max()))
    one, other = (from_digits(np.zeros((4, 9, 7)), s) for _ in range(2))
    first, second = (pairs_of(g, s, Ideal()) for g in (one, other))
    read = ops.streamed_update(first, x, d, rate=4.0, w_max=w_max, device=device)
    whole = ops.device_update(second, np.float32(-4.0) * (d.T @ x)[None], w_max=w_max, device=device)
    np.testing.assert_allclose(units_of(one, s), units_of(other, s), rtol=0, atol=1e-3)
    np.testing.assert_allclose(read, whole, rtol=0, atol=1e-5 * w_max.max())
    assert np.abs(digits_of(one, s)).max() > 4 > np.abs(digits_of(other, s)).max()
    ops.carry(first, updates=64)
    np.testing.assert_allclose(units_of(one, s), units_of(other, s), rtol=0, atol=1e-3)
    assert np.abs(digits_of(one, s)).max() < 4


def test_slices_saturate_sooner_than_by_accumulation():
    """Eight samples of 3 units each: 24 units in the lowest digit, whose window has 15; accumulated, 0 + 2 * 4 + 1 * 16."""
    x, d, w_max = np.ones((8, 1), np.float32), np.full((8, 1), -3.0, np.float32), np.full(1, 63.0, np.float32)
    change = np.full((1, 1, 1), 24.0, np.float32)
    ends = {}
    for headroom, scheme in ((2, "streamed"), (3, "streamed"), (2, "accumulate")):
        s = lie(3, 2, headroom, scheme=scheme)
        if scheme == "streamed":
            s = streamed((3, 2, headroom), 1)
        g = from_digits(np.zeros((3, 1, 1)), s)
        pairs = pairs_of(g, s, Ideal())
        for updates in range(2):
            if scheme == "streamed":
                ops.streamed_update(pairs, x, d, rate=1.0, w_max=w_max)
            else:
                ops.device_update(pairs, change, w_max=w_max)
            ends[headroom, scheme, updates] = digits_of(g, s).ravel()
    np.testing.assert_allclose(ends[2, "streamed", 0], [15, 0, 0], atol=1e-4)
    np.testing.assert_allclose(ends[3, "streamed", 0], [24, 0, 0], atol=1e-4)
    np.testing.assert_allclose(ends[3, "streamed", 1], [31, 0, 0], atol=1e-4)  # no carry between
    np.testing.assert_allclose(ends[2, "accumulate", 1], [0, 4, 2], atol=1e-4)


def test_results_do_not_depend_on_threads_or_chunks(same_on_threads, monkeypatch):
    """To the bit where sums are exact, in the lowest digit to their rounding."""
    s = streamed((4, 2, 2), 4)
    x, d, w_max = exact(s, 4, 300, 3, 33, 40)
    rough = np.random.default_rng(0).normal(0, 0.1, d.shape).astype(np.float32)
    how = {"rate": 0.125, "w_max": w_max, "groups": 3}

    def updated(errors):
        pairs = pairs_of(cells(8, 99, 40), s, LAWS["agarwal"], seed=SEED)
        return ops.streamed_update(pairs, x, errors, **how), pairs.g

    whole, other = (same_on_threads(lambda errors=errors: updated(errors)) for errors in (d, rough))
    assert not np.array_equal(whole[1], other[1])
    monkeypatch.setattr(sys.modules["gpuxbar.ops.streamed_update"], "WORKSPACE", 40000)
    np.testing.assert_equal(updated(d), whole)


def test_writes_of_one_direction_are_those_of_a_sequence():
    """And opposite ones are not: they cancel before a non-linear law sees them."""
    s, law = streamed((3, 2, 4), 4), Agarwal(nu=3.0)
    x, d, w_max = exact(s, 3, 6, 1, 5, 7)
    x, d = np.abs(x), np.abs(d) / 8
    x[:, 0] = 15 / 16  # so that codes are the same one by one
    off = []
    for signs in (np.ones((6, 1)), np.array([1, -1, 1, -1, 1, -1]).reshape(6, 1)):
        together, one_by_one = (pairs_of(from_digits(np.zeros((3, 5, 7)), s), s, law) for _ in range(2))
        errors = (signs * d).astype(np.float32)
        ops.streamed_update(together, x, errors, rate=0.5, w_max=w_max)
        for b in range(6):
            ops.streamed_update(one_by_one, x[b : b + 1], errors[b : b + 1], rate=0.5, w_max=w_max)
        off.append(np.abs(together.g - one_by_one.g).max() / RANGE)
    assert off[0] < 1e-5
    assert off[1] > 0.01


@pytest.mark.parametrize("device", DEVICES, ids=IDS)
@pytest.mark.parametrize("order", ["channel_position", "position_channel"])
def test_a_convolution_is_its_patches(order, device, monkeypatch):
    """In chunks that begin within an image, too."""
    s = streamed((3, 2, 2), 6)
    conv = ConvGeometry(2, 6, 7, (3, 2), (2, 1), (1, 1), (1, 2), order)
    rng, groups, outputs = np.random.default_rng(0), 2, 5
    x = rng.integers(-63, 64, (3, groups * 2, 6, 7)).astype(np.float32)
    x[0, :, 1, 1] = 63  # which a patch has
    d = (rng.integers(-4000, 4001, (3, groups * outputs, *conv.out)) / 64).astype(np.float32)
    how = {"rate": 0.125, "w_max": np.full(10, 63.0, np.float32), "groups": groups, "device": device}
    patches = reference.unfold(x, conv).astype(np.float32)
    pixels = np.ascontiguousarray(d.transpose(0, 2, 3, 1).reshape(-1, groups * outputs))
    one, other = (cells(6, groups * conv.inputs, outputs) for _ in range(2))
    before = one.copy()
    first, second = (pairs_of(g, s, LAWS["agarwal"]) for g in (one, other))
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["gpuxbar.ops.streamed_update"], "WORKSPACE", 5000)
        read = ops.streamed_update(first, x, d, conv=conv, **how)
    whole = ops.streamed_update(second, patches, pixels, **how)
    np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(read, whole)
    assert (one != before).mean() > 0.5


@pytest.mark.parametrize("device", DEVICES[:2], ids=IDS[:2])
@pytest.mark.parametrize("size", [(0, 5, 7), (4, 0, 7), (4, 5, 0), (1, 1, 1)], ids=str)
def test_little_to_stream(size, device):
    batch, inputs, outputs = size
    s = streamed((3, 2, 2), 8)
    g, before = cells(6, inputs, outputs), cells(6, inputs, outputs)
    x, d = np.zeros((batch, inputs), np.float32), np.ones((batch, outputs), np.float32)
    w_max = np.ones(outputs, np.float32)
    read = ops.streamed_update(pairs_of(g, s, LAWS["agarwal"]), x, d, rate=1.0, w_max=w_max, device=device)
    assert read.shape == (1, outputs, inputs)
    np.testing.assert_array_equal(g, before)  # inputs of 0 ask for nothing


def test_reference_serves_without_a_compiler(monkeypatch):
    s = streamed((3, 2, 2), 6)
    x, d, w_max = exact(s, 3, 5, 1, 5, 7)
    results = []
    for name in ("host", "reference"):
        monkeypatch.setattr("gpuxbar.launch.host.WANTED", name)
        g, g_held = cells(6, 5, 7), cells(6, 5, 7)
        pairs = pairs_of(g, s, SoftBounds(write_noise=1e-7), g_held=g_held)
        read = ops.streamed_update(pairs, x, d, rate=0.5, w_max=w_max)
        results.append((g, g_held, read))
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-6 * np.abs(theirs).max())


def test_a_map_says_which_devices_they_are():
    s, law = streamed((3, 2, 2), 6), ConstantStep(pulses=200, step_spread=0.3, high_spread=0.1)
    x, d, w_max = exact(s, 3, 5, 1, 5, 7)
    g = cells(6, 5, 7)
    devices = ops.draw_device_map(law, g.shape, seed=SEED)
    drawn, mapped, kernel = g.copy(), g.copy(), g.copy()
    for each, made, device in (
        (drawn, {"seed": SEED}, None), (mapped, {"device_map": devices}, None), (kernel, {"device_map": devices}, DEVICES[1]),
    ):  # fmt: skip
        ops.streamed_update(pairs_of(each, s, law, **made), x, d, rate=0.25, w_max=w_max, device=device)
    np.testing.assert_allclose(mapped, drawn, rtol=0, atol=2e-3 * RANGE)  # halves
    np.testing.assert_allclose(kernel, mapped, rtol=0, atol=1e-6 * RANGE)
    assert np.abs(drawn - g).max() > 0.02 * RANGE


X, D = np.ones((2, 3), np.float32), np.ones((2, 4), np.float32)
CONV = ConvGeometry(1, 4, 4, (2, 2))
BAD = {
    "rate": ({"rate": 0.0}, ValueError, "`rate` must be above 0, got 0; give the learning rate"),
    "rate-nan": ({"rate": np.nan}, ValueError, "`rate` must be finite, got nan"),
    "dtype": ({"x": X.astype(float)}, TypeError, "`x` must be an array of float32, got float64"),
    "batch": ({"d": D[:1]}, ValueError, r"`d` must have shape \(2, 4\) for x \(2, 3\) in 1 groups, got \(1, 4\)"),
    "groups": ({"groups": 2}, ValueError, "`groups` must divide the inputs and the outputs, got 2 for 3 inputs and 4 outputs"),
    "images": ({"conv": CONV}, ValueError, r"`x` must have 4 axes, got 2 \(shape \(2, 3\)\)"),
    "stride": ({"d": np.ones((4, 2), np.float32).T}, ValueError, "`d` must be C-contiguous"),
    "nan": ({"x": np.full_like(X, np.nan)}, ValueError, "`x` must be finite, got 6 NaN or infinite values"),
    "infinite": ({"d": np.full_like(D, np.inf)}, ValueError, "`d` must be finite, got 8 NaN or infinite values"),
    "w_max": ({"w_max": np.ones(3, np.float32)}, ValueError, r"`w_max` must have shape \(4,\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_changes_nothing(name):
    change, error, text = BAD[name]
    pairs = pairs_of(np.full((6, 3, 4), 5e-6, np.float32), streamed((3, 2, 2), 8), LAWS["agarwal"])
    values = {"x": X, "d": D, "rate": 0.1, "w_max": np.ones(4, np.float32), **change}
    with pytest.raises(error, match=f"^streamed_update: {text}"):
        ops.streamed_update(pairs, **values)
    assert (pairs.g == np.float32(5e-6)).all()


@pytest.mark.parametrize(
    ("planes", "s", "text"),
    [
        (6, lie(3, 2, 2), "got 'accumulate'; choose it, or update by device_update"),
        (2, {}, "got one pair; choose it"),
    ],
)
def test_other_carries_are_refused(planes, s, text):
    pairs = pairs_of(np.full((planes, 3, 4), 5e-6, np.float32), s)
    with pytest.raises(
        ValueError,
        match=r"^streamed_update: `carry\.scheme` must be streamed, on two slices or more, " + text,
    ):
        ops.streamed_update(pairs, X, D, rate=0.1, w_max=np.ones(4, np.float32))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dw": np.zeros((1, 4, 3), np.float32)}, "device_update: `digits` must be those of slices, in place of dw, got 3 for 3 slices with dw; pass one"),
        ({"digits": np.zeros((2, 1, 3, 4), np.float32)}, "got 2 for 3 slices without dw"),
        ({"digits": np.zeros((3, 1, 2, 4), np.float32)}, r"`g` must have shape \(6, 2, 4\) for digits \(3, 1, 2, 4\), got \(6, 3, 4\)"),
        ({"digits": np.full((3, 1, 3, 4), np.nan, np.float32)}, "`digits` must be finite, got 36 NaN"),
    ],
)  # fmt: skip
def test_bad_digits_are_named(change, text):
    pairs = pairs_of(np.full((6, 3, 4), 5e-6, np.float32), lie(3, 2, 2), Ideal())
    values = {"dw": None, "digits": np.zeros((3, 1, 3, 4), np.float32), **change}
    with pytest.raises(ValueError, match=text):
        ops.device_update(pairs, w_max=np.ones(4, np.float32), **values)
    assert (pairs.g == np.float32(5e-6)).all()


STREAMED = {
    "mapping": {"slices": 4, "slice_bits": 2, "headroom": 2.0}, "update": {"law": "soft_bounds", "up": 0.5, "down": 0.5, "cycle": 0.1},
    "carry": {"scheme": "streamed", "interval": 2, "headroom_bits": 4}, "seed": 5,
}  # fmt: skip
EVERYTHING = {
    "update": {"write_noise": 5e-8}, "programming": {"write_noise": 5e-8, "stuck_at_g_min": 0.02},
    "endurance": {"pulses": 3000, "spread": 0.5}, "retention": {"tau": 500.0}, "carry": {"interval": 3, "input_bits": 5},
}  # fmt: skip


layer_of = partial(layer_on, STREAMED)


@pytest.mark.parametrize("overrides", [{}, EVERYTHING], ids=["plain", "everything"])
def test_a_resumed_run_equals_an_uninterrupted_one(overrides):
    whole = trained_and_resumed(partial(layer_of, **overrides))
    assert whole.weight.grad is None
    assert whole.carry_step.item() == 10
    if overrides:
        used = (whole.pulse_count != 0).reshape(2, 4, -1).any(2)
        assert used[:, :3].all()


def test_a_step_is_an_update_of_what_the_backward_pass_saw():
    """Of the two passes since the last step together; frozen layers keep nothing."""
    layer, frozen = layer_of(), layer_of()
    layer.begin_in_situ()
    frozen.begin_in_situ()
    optimiser = gx.optim.InSituSGD(layer.parameters(), lr=0.05)
    frozen.weight.requires_grad_(False)
    g, w_max = layer.g_cells.clone().numpy(), layer.w_max.numpy()
    rng = torch.Generator().manual_seed(1)
    x, d = torch.randn(6, 12, generator=rng), torch.randn(6, 7, generator=rng)
    for part in (slice(0, 4), slice(4, 6)):
        for each in (layer, frozen):
            each(x[part]).backward(d[part])
    assert not frozen.streams.pairs
    assert layer.weight.grad is None
    step = layer.update_step.item()
    optimiser.step()
    assert not layer.streams.pairs
    spec = layer.spec
    pairs = ops.Pairs(
        g, law=spec.update, g_min=spec.device.g_min, g_max=spec.device.g_max, slice_bits=2, carry=spec.carry, seed=layer.plan.seed
    )  # fmt: skip
    read = ops.streamed_update(pairs, x.numpy(), d.numpy(), rate=0.05, w_max=w_max, step=step)
    np.testing.assert_array_equal(layer.g_cells, g)
    np.testing.assert_array_equal(layer.weight.detach(), read[0])


def test_a_scaled_loss_is_the_same_step():
    weights = []
    for scale in (None, 256.0):
        layer = layer_of()
        optimiser = gx.optim.InSituSGD(layer.parameters(), lr=0.05)
        loss = layer(torch.ones(3, 12)).square().sum()
        if scale is None:
            loss.backward()
            optimiser.step()
        else:
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            scaler.scale(loss).backward()
            scaler.step(optimiser)
        weights.append(layer.weight.detach())
    assert torch.equal(*weights)


def test_a_convolution_is_trained():
    """Images of two sizes, whose patches go together, move what a layer on their patches moves."""
    spec = gx.CrossbarSpec.model_validate(STREAMED)
    layer = AnalogConv2d(4, 6, 3, padding=1, groups=2, bias=False, spec=spec, name="layer")
    optimiser = gx.optim.InSituSGD(layer.parameters(), lr=0.5)
    target = torch.randn(6, 2, 3, 3)
    losses = []
    for _ in range(12):
        optimiser.zero_grad()
        loss = 0.0
        for size in (5, 6):
            x = torch.randn(8, 4, size, size)
            wanted = nn.functional.conv2d(x, target, padding=1, groups=2)
            loss = loss + (layer(x) - wanted).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


PULSED_PAIRS = {
    "update": {"law": "soft_bounds", "pulses": 2000, "cycle": 0.3, "up": 2.0, "down": 2.0},
    "pulses": {},
}


@pytest.mark.parametrize("spec", [STREAMED, PULSED, PULSED_PAIRS], ids=["streams", "pulses", "pairs"])
def test_products_in_the_array_learn_a_regression(spec):
    """On 10 inputs; slices as far as one pair by the same trains."""
    x = torch.randn(128, 10)
    target = torch.tanh(x @ torch.randn(10, 3))
    network = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 3))
    model, _ = gx.convert(network, gx.CrossbarSpec.model_validate(spec))
    optimiser = gx.optim.InSituSGD(model.parameters(), lr=0.2)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]


def test_opcheck():
    spec = layer_of(**EVERYTHING).spec.model_dump_json()
    g, count = torch.from_numpy(cells(8, 5, 6)), torch.zeros(8, 5, 6, dtype=torch.int32)
    lines = (torch.randn(4, 5), torch.randn(4, 6), torch.ones(6), torch.ones(1, dtype=torch.int64), 0.1, 1)
    pairs = (g, g.clone(), count, None, spec, 3)
    torch.library.opcheck(torch.ops.gpuxbar.streamed_update.default, (*pairs, *lines))


def test_signs_of_wordlines_are_refused():
    layer = layer_of()
    layer.begin_in_situ()
    before = layer.g_cells.clone()
    x, d = torch.ones(2, layer.inputs), torch.ones(2, layer.outputs)
    with pytest.raises(
        ValueError, match="`sign` must be None with bit streams, got one; multiply the inputs"
    ):
        layer.update_in_array(x, d, 0.1, torch.ones(layer.inputs))
    assert torch.equal(layer.g_cells, before)
    assert layer.carry_step == 0


def test_what_streams_cannot_do_is_named():
    layer = layer_of()
    with pytest.raises(ValueError, match=r"InSituSGD: `momentum` must be 0 for layers with bit streams, got 0\.9 for layer; set it to 0, or set carry\.scheme='accumulate'"):  # fmt: skip
        gx.optim.InSituSGD(layer.parameters(), lr=0.1, momentum=0.9)
    for name in ("mixed-precision", "tiki-taka"):
        settings = {"fast_lr": 0.1} if name == "tiki-taka" else {}
        with pytest.raises(ValueError, match=r"`spec\.carry\.scheme` must be accumulate or periodic, got 'streamed' for layer; bit streams are InSituSGD's"):  # fmt: skip
            gx.optim.build_optimizer(name, layer, lr=0.1, **settings)
