"""Every noise source through the public ops: moments, tails, independence, and what must not change a bit.

Seeds are fixed and bounds are standard errors of the draws at hand, so a test passes or fails for good.
"""

from __future__ import annotations

from math import erf, erfc, sqrt

import numpy as np
import pytest
import torch

from gpuxbar import CrossbarSpec, ops
from gpuxbar.mapping import Planes, plan_reads
from gpuxbar.nn import AnalogLinear
from gpuxbar.ops import ConvGeometry
from gpuxbar.spec import Agarwal, NeuroSim, Programming, SoftBounds

SEED = 2**40 + 99  # above 2**32 on purpose
ERRORS = 4.5  # standard errors allowed: one in 150,000 a bound
ROWS, COLS = 4000, 67  # 67: the last panel and the last counter of a row are short
WINDOW = {"g_min": 1e-6, "g_max": 10e-6}  # S


def read(seed=SEED, step=0, transposed=False, **settings):
    """Read noise of a row of zero volts, in its standard deviations."""
    v, g = np.zeros((ROWS, 5), np.float32), np.zeros((5, COLS), np.float32)
    if transposed:
        g = np.ascontiguousarray(g.T)
    return ops.tile_mvm(v, g, read_noise=1.0, seed=seed, step=step, transposed=transposed, **settings)


def state_dependent(seed=SEED, step=0):
    """Noise of sqrt(sum v^2 s(g)), over that."""
    rng = np.random.default_rng(0)
    v = rng.uniform(0.1, 0.2, (ROWS, 9)).astype(np.float32)
    s = rng.uniform(1, 4, (9, COLS)).astype(np.float32)
    y = ops.tile_mvm(v, np.zeros((9, COLS), np.float32), noise_var=s, seed=seed, step=step)
    return y / np.sqrt(v.astype(np.float64) ** 2 @ s)


def programmed(seed=SEED, step=0, plane=0, **settings):
    """Conductances of one side of a pair after writing the smallest weight, over g_min, less 1."""
    weight, w_max = np.zeros((1, COLS, ROWS), np.float32), np.ones(1, np.float32)
    g = ops.program(weight, w_max=w_max, **WINDOW, programming=Programming(**settings), seed=seed, step=step)
    return g[plane] / WINDOW["g_min"] - 1


def write(seed=SEED, step=0, plane=0):
    return programmed(seed, step, plane, write_noise=0.1 * WINDOW["g_min"]) / 0.1


def spread(seed=SEED, step=0, plane=0):
    return programmed(seed, step, plane, device_spread=0.1) / 0.1


def cycle(seed=SEED, step=0, plane=0, law=None, deviation=0.1**0.5 / 100):
    """Noise of an update by a tenth of the window from its middle; the two sides of a pair move apart."""
    g = np.full((2, ROWS, COLS), 5.5e-6, np.float32)
    dw = np.full((1, COLS, ROWS), 0.2, np.float32)
    pairs = ops.Pairs(g, law=law or Agarwal(gamma=0.01), seed=seed, **WINDOW)
    ops.device_update(pairs, dw, w_max=np.ones(COLS, np.float32), step=step)
    share = (g[plane].astype(np.float64) - WINDOW["g_min"]) / 9e-6
    return (share - (0.4 if plane else 0.6)) / deviation


SOURCES = {
    "read": read,
    "read-fast": lambda **where: read(generator="fast", **where),
    "transposed": lambda **where: read(transposed=True, **where),
    "transposed-fast": lambda **where: read(transposed=True, generator="fast", **where),
    "state-dependent": state_dependent,
    "write": write,
    "spread": spread,
    "cycle-agarwal": cycle,
    "cycle-neurosim": lambda **where: cycle(law=NeuroSim(cycle=0.003), deviation=0.003 * sqrt(9.7), **where),
}


def tail(z):
    """P(|normal| > z)"""
    return erfc(z / sqrt(2))


def assert_standard_normal(z):
    n = z.size
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(np.mean(z.astype(np.float64) ** power) - mean) < ERRORS * sqrt(variance / n), power
    for limit in (1, 2, 3, 4):
        share = tail(limit)
        assert abs(np.mean(np.abs(z) > limit) - share) < ERRORS * sqrt(share / n), limit


def assert_independent(a, b):
    """Neither values nor sizes of two arrays of standard normals are correlated."""
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    assert abs(np.mean(a * b)) < ERRORS / sqrt(a.size)
    assert abs(np.mean((a**2 - 1) * (b**2 - 1))) < ERRORS * 2 / sqrt(a.size)


def assert_same_distribution(a, b):
    """Two-sample Kolmogorov-Smirnov test of every column at one in a million, and the variance of all of them."""
    n = len(a)
    for left, right in zip(np.sort(a, 0).T, np.sort(b, 0).T, strict=True):
        both = np.concatenate([left, right])
        gap = np.searchsorted(left, both, "right") - np.searchsorted(right, both, "right")
        assert np.abs(gap).max() / n < sqrt(-np.log(5e-7) / n)
    ratio = np.mean(a.var(0) / b.var(0))
    assert abs(ratio - 1) < ERRORS * sqrt(4 / a.size)


@pytest.mark.parametrize("source", SOURCES)
def test_moments_tails_and_neighbours(source):
    z = SOURCES[source]()
    assert z.shape == (ROWS, COLS)
    assert_standard_normal(z)
    for lag in (1, 2, 3, 4, 8, 16):
        assert_independent(z[:, lag:], z[:, :-lag])
        assert_independent(z[lag:], z[:-lag])
    assert_independent(z[1:, 1:], z[:-1, :-1])
    assert_independent(z, z[::-1])


@pytest.mark.parametrize("source", SOURCES)
def test_seeds_steps_and_planes_are_independent(source):
    z = SOURCES[source]()
    np.testing.assert_array_equal(z, SOURCES[source]())
    for seed in (SEED + 1, SEED ^ 2**33):  # the low and the high word of the key
        assert_independent(z, SOURCES[source](seed=seed))
    if source == "spread":  # of the device: drawn once
        np.testing.assert_array_equal(z, spread(step=1))
    else:
        assert_independent(z, SOURCES[source](step=1))
    if source in ("write", "spread", "cycle-agarwal"):
        assert_independent(z, SOURCES[source](plane=1))


def test_purposes_are_independent():
    draws = [read(), np.ascontiguousarray(read(transposed=True)), write(), spread(), cycle()]
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert_independent(a, b)


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize("generator", ["exact", "fast"])
def test_planes_and_tiles_are_independent(generator, transposed):
    """Converters with gain 0 everywhere but at one place show the noise of that place."""
    g = np.zeros((2, 6, COLS), np.float32)
    if transposed:
        g = np.ascontiguousarray(g.transpose(0, 2, 1))
    found = []
    for plane in (0, 1):
        for tile in (0, 1, 2):
            gain = np.zeros((2, 3, COLS), np.float32)
            gain[plane, tile] = 1
            z = ops.tile_mvm(
                np.zeros((1000, 6), np.float32), g, tile_rows=2, tile_cols=2, adc_bits=16, adc_lsb=2e-4, adc_gain=gain,
                read_noise=1.0, generator=generator, transposed=transposed, seed=SEED,
            )  # fmt: skip
            assert_standard_normal(z)
            for other in found:
                assert_independent(z, other)
            found.append(z)


@pytest.mark.parametrize("generator", ["exact", "fast"])
@pytest.mark.parametrize(
    ("settings", "variance"),
    [
        ({"tile_rows": 5}, 4),
        ({"tile_rows": 7}, 3),
        ({"slice_scale": [1, -4, 16]}, 1 + 16 + 256),
        ({"stream_bits": 2, "streams": 3}, 1 + 16 + 256),
        ({"stream_bits": 1, "streams": 3, "phases": 2}, 2 * (1 + 4 + 16)),
        ({"tile_rows": 10, "slice_scale": [1, -2], "stream_bits": 3, "streams": 2}, 2 * 5 * 65),
    ],
)
def test_variance_of_summed_noise(settings, variance, generator):
    """Independent conversions add variances: weights squared, not sums squared."""
    scale = np.array(settings.get("slice_scale", [1]), np.float32)
    v, g = np.zeros((ROWS, 20), np.int16), np.zeros((scale.size, 20, COLS), np.float32)
    more = {**settings, "slice_scale": scale, "generator": generator}
    y = ops.tile_mvm(v, g, read_noise=1.0, seed=SEED, **more)
    assert_standard_normal(y / sqrt(variance))


def test_one_cell():
    """i = v g + sigma z, and the share of each code is the normal's mass within half a step of it."""
    v, g, sigma = np.full((20000, 1), 0.2, np.float32), np.full((1, 1), 5e-6, np.float32), 1e-7
    y = ops.tile_mvm(v, g, read_noise=sigma, seed=SEED)
    assert_standard_normal((y - 1e-6) / sigma)
    codes = ops.tile_mvm(v, g, read_noise=sigma, seed=SEED, adc_bits=8, adc_lsb=2e-7) / 2e-7
    for code in (3, 4, 5, 6, 7):
        low, high = ((code + side - 5) * 2 for side in (-0.5, 0.5))
        share = (erf(high / sqrt(2)) - erf(low / sqrt(2))) / 2
        assert abs(np.mean(np.abs(codes - code) < 0.01) - share) < ERRORS * sqrt(share * (1 - share) / 20000)


@pytest.mark.parametrize("generator", ["exact", "fast"])
@pytest.mark.parametrize("mean", [-2.0, -0.5, 0.0, 1.0, 2.5])
def test_one_bit_adc(mean, generator):
    """P(code = 1) = Phi(mean / sigma), mean counted from the threshold of half a step."""
    v, g = np.ones((4000, 1), np.float32), np.full((1, 64), 0.5 + 0.1 * mean, np.float32)
    y = ops.tile_mvm(v, g, adc_bits=1, adc_signed=False, adc_lsb=1.0, read_noise=0.1, seed=SEED, generator=generator)  # fmt: skip
    share = tail(-mean) / 2 if mean <= 0 else 1 - tail(mean) / 2
    assert set(np.unique(y)) == {0.0, 1.0}
    assert abs(y.mean() - share) < ERRORS * sqrt(share * (1 - share) / y.size)


@pytest.mark.parametrize("converter", ["dac", "adc", "dac-reference", "adc-reference"])
def test_converters_round_half_to_even_and_clip(converter, monkeypatch):
    """Ties go to even codes, so rounding has no bias; otherwise its error is uniform over a step."""
    if converter.endswith("reference"):
        monkeypatch.setattr("gpuxbar.launch.host.WANTED", "reference")

    def codes(steps):
        steps = np.asarray(steps, np.float32).reshape(1, -1)
        if converter.startswith("dac"):
            return ops.dac_quantize(steps * 0.25, lsb=0.25, code_max=127)[0]
        return ops.tile_mvm(np.ones((1, 1), np.float32), steps * 0.25, adc_bits=8, adc_lsb=0.25)[0] * 4

    np.testing.assert_array_equal(codes([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5]), [-2, -2, 0, 0, 2, 2, 4])
    np.testing.assert_array_equal(codes([126.4, 126.6, 127.5, 1e6, -126.6, -1e6]), [126, 127, 127, 127, -127, -127])  # fmt: skip
    steps = np.random.default_rng(0).uniform(-120, 120, 200_000).astype(np.float32)
    error = codes(steps) - steps.astype(np.float64)
    assert np.abs(error).max() <= 0.5
    assert abs(error.mean()) < ERRORS * sqrt(1 / 12 / error.size)
    assert abs(error.var() - 1 / 12) < ERRORS * sqrt(1 / 180 / error.size)
    assert abs(np.mean(error[1:] * error[:-1])) < ERRORS / 12 / sqrt(error.size)


@pytest.mark.parametrize(
    ("low", "high"), [(0.1, 0.0), (0.0, 0.1), (0.02, 0.3), (0.5, 0.5), (1.0, 0.0), (0.0, 1.0)]
)
def test_rates_of_stuck_cells(low, high):
    planes = [programmed(plane=p, write_noise=1e-8, stuck_at_g_min=low, stuck_at_g_max=high) for p in (0, 1)]
    n = planes[0].size
    for plane in planes:
        for state, rate in ((0.0, low), (9.0, high)):
            stuck = np.isclose(plane, state, atol=1e-6)
            # a free cell, with write noise of 1 %, comes as near as that to g_min once in 12,000
            assert abs(stuck.mean() - rate) < ERRORS * sqrt(rate * (1 - rate) / n) + 2e-4
            assert abs(np.mean(stuck[1:] & stuck[:-1]) - rate**2) < ERRORS * rate / sqrt(n) + 4e-4
            assert abs(np.mean(stuck[:, 1:] & stuck[:, :-1]) - rate**2) < ERRORS * rate / sqrt(n) + 4e-4
    both = [np.isclose(plane, 9.0, atol=1e-6) for plane in planes]
    assert abs(np.mean(both[0] & both[1]) - high**2) < ERRORS * high / sqrt(n) + 4e-4
    again = programmed(step=1, write_noise=1e-8, stuck_at_g_min=low, stuck_at_g_max=high)
    np.testing.assert_array_equal(np.isclose(again, 9.0, atol=1e-6), both[0])


@pytest.mark.parametrize("law", [Agarwal(nu=1, spread=0.1), SoftBounds(spread=0.1), NeuroSim(spread=0.2)])
def test_spread_of_the_update_is_of_the_device_and_direction(law):
    """Devices differ alike at every step; up and down, and the sides of a pair, draw apart."""

    def moved(sign, step=0):
        g = np.full((2, 500, COLS), 5.5e-6, np.float32)
        dw = np.full((1, COLS, 500), 0.4 * sign, np.float32)
        pairs = ops.Pairs(g, law=law, seed=SEED, **WINDOW)
        ops.device_update(pairs, dw, w_max=np.ones(COLS, np.float32), step=step)
        change = g.astype(np.float64) - 5.5e-6
        return [(plane - plane.mean()) / plane.std() for plane in change]

    up, down = moved(1), moved(-1)
    np.testing.assert_array_equal(up, moved(1, step=5))
    for a, b in ((up[0], up[1]), (up[0], down[0]), (up[0][1:], up[0][:-1]), (up[0][:, 1:], up[0][:, :-1])):
        assert abs(np.mean(a * b)) < ERRORS / sqrt(a.size)


CONV = ConvGeometry(2, 9, 8, (3, 2), (2, 1), (1, 0), (1, 2))
NOISY = {"adc_bits": 7, "adc_lsb": 0.5, "read_noise": 0.7, "noise_var": True, "seed": SEED, "step": 3}


def case(transposed, conv):
    """(driven values, conductances, settings) of a read of 7 images or 101 rows."""
    rng = np.random.default_rng(1)
    g = rng.normal(0, 1, (2, 2 * CONV.inputs, 37)).astype(np.float32)
    if conv:
        shape = (7, 2 * 37, *CONV.out) if transposed else (7, 4, 9, 8)
    else:
        shape = (101, 2 * 37 if transposed else 2 * CONV.inputs)
    s = {
        "groups": 2,
        "tile_rows": 5,
        "tile_cols": 16,
        "transposed": transposed,
        "conv": CONV if conv else None,
    }
    return rng.normal(0, 1, shape).astype(np.float32), g, {**NOISY, **s, "noise_var": np.abs(g)}


@pytest.mark.parametrize("generator", ["exact", "fast"])
@pytest.mark.parametrize("conv", [False, True], ids=["matrix", "conv"])
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
def test_same_bits_for_any_threads_and_split_of_the_batch(transposed, conv, generator, same_on_threads):
    v, g, s = case(transposed, conv)
    s["generator"] = generator
    whole = same_on_threads(lambda: ops.tile_mvm(v, g, **s), (2, 3, 5))
    rows = CONV.pixels if conv else 1
    for size in (1, 3) if conv else (1, 13, 49):
        parts = [ops.tile_mvm(v[i : i + size], g, row_offset=i * rows, **s) for i in range(0, len(v), size)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("generator", ["exact", "fast"])
@pytest.mark.parametrize("cols", [1, 4, 15, 16, 17, 30])
def test_a_column_draws_by_its_place(cols, generator):
    """The first columns of an array read as they do in the whole, whatever lies to their right."""
    v, g, s = case(False, False)
    s |= {"groups": 1, "noise_var": None, "generator": generator}
    part = ops.tile_mvm(v, np.ascontiguousarray(g[:, :, :cols]), **s)
    np.testing.assert_array_equal(part, ops.tile_mvm(v, g, **s)[:, :cols])


def test_columns_without_noise_may_stand_in_any_order():
    v, g, s = case(False, False)
    s |= {"groups": 1, "noise_var": None, "read_noise": 0.0}
    order = np.random.default_rng(2).permutation(37)
    part = ops.tile_mvm(v, np.ascontiguousarray(g[:, :, order]), **s)
    np.testing.assert_array_equal(part, ops.tile_mvm(v, g, **s)[:, order])


COLLAPSES = {
    "tiles": {},
    "subtracted": {"mapping": {"scheme": "subtracted"}},
    "slices": {"mapping": {"slices": 3, "slice_bits": 2}},
    "streams": {"dac": {"bits": 8, "stream_bits": 2}},
    "phases": {"dac": {"bits": 6, "stream_bits": 3, "polarity": "two_phase"}},
    "all": {
        "mapping": {"slices": 2, "slice_bits": 3, "scheme": "subtracted"},
        "dac": {"bits": 5, "stream_bits": 1, "polarity": "two_phase"},
    },
}
INPUTS, OUTPUTS = 40, 22


@pytest.mark.parametrize("noise", [0.0, 1e-7], ids=["quiet", "noisy"])
@pytest.mark.parametrize("name", COLLAPSES)
def test_collapsed_reads_equal_those_of_every_conversion(name, noise):
    """Without an ADC, planes, streams and tiles merge: the same values, and noise of the same distribution."""
    spec = CrossbarSpec.model_validate({"tile": {"rows": 9, "cols": 7}, "read_noise": {"sigma": noise}, **COLLAPSES[name]})  # fmt: skip
    fine = spec.with_overrides({"adc": {"bits": 16}})
    rng = np.random.default_rng(0)
    weight = rng.uniform(-1, 1, (1, OUTPUTS, INPUTS)).astype(np.float32)
    results = {True: [], False: []}
    for collapse in (True, False):
        plan, planes = plan_reads(spec if collapse else fine, inputs=INPUTS, outputs=OUTPUTS, groups=1, seed=collapse)  # fmt: skip
        assert planes == Planes.of(spec, collapse=collapse)
        mapping = spec.mapping
        g = ops.program(
            weight, w_max=np.ones(1, np.float32), **WINDOW, slices=mapping.slices, slice_bits=mapping.slice_bits, merge=planes.merge,
        )  # fmt: skip
        for way, transposed in ((plan.forward, False), (plan.backward, True)):
            x = np.random.default_rng(3).uniform(-1, 1, (1, OUTPUTS if transposed else INPUTS))
            top = way.code_max or 1
            v = np.rint(x * way.code_max).astype(np.int16) if way.code_max else x.astype(np.float32)
            y = ops.tile_mvm(
                np.repeat(v, 1000 if noise else 1, axis=0), g, tile_rows=way.tile or None, tile_cols=way.tile or None,
                transposed=transposed, v_lsb=way.v_lsb, stream_bits=way.stream_bits, streams=way.streams,
                phases=way.phases, slice_scale=np.array(planes.slice_scale, np.float32), read_noise=way.noise, seed=SEED + collapse,
            )  # fmt: skip
            results[collapse].append(planes.unit / (top * way.v_lsb) * y)
            expected = (v / top) @ (weight[0] if transposed else weight[0].T)
            if not noise and mapping.slice_bits is None:
                np.testing.assert_allclose(results[collapse][-1], expected, rtol=0, atol=2e-5)
    for merged, every in zip(results[True], results[False], strict=True):
        if noise:
            assert_same_distribution(merged, every)
        else:
            np.testing.assert_allclose(merged, every, atol=1e-5 * np.abs(every).max())


@pytest.mark.parametrize("name", ["tiles", "subtracted", "slices", "streams"])
def test_a_fine_adc_reads_as_none_in_distribution(name):
    """A layer with ADCs of 16 bits converts everything; one without merges: outputs and gradients agree."""
    spec = CrossbarSpec.model_validate({"tile": {"rows": 9, "cols": 7}, "read_noise": {"sigma": 1e-7}, **COLLAPSES[name]})  # fmt: skip
    fine = spec.with_overrides({"adc": {"bits": 16, "range": "worst_case"}, "seed": 1})
    weight, x, grad = torch.randn(OUTPUTS, INPUTS), torch.randn(INPUTS), torch.randn(OUTPUTS)
    found = []
    for each in (spec, fine):
        layer = AnalogLinear(INPUTS, OUTPUTS, bias=False, spec=each)
        with torch.no_grad():
            layer.weight.copy_(weight)
        rows = x.repeat(1000, 1).requires_grad_()
        y = layer(rows)
        y.backward(grad.repeat(1000, 1))
        found.append((y.detach().numpy(), rows.grad.numpy()))
    for merged, every in zip(*found, strict=True):
        assert_same_distribution(merged, every)
