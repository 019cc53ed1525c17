"""program and reprogram: host and CUDA kernels against the float64 oracle, draws, fingerprints, and the messages."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_shim import FORWARD, REVERSE, ShimDevice
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from gpuxbar import ops, reference
from gpuxbar.launch import host_call, library
from gpuxbar.ops.program import checksum
from gpuxbar.spec import Programming

G_MIN, G_MAX = 1e-6, 10e-6  # S
RANGE = G_MAX - G_MIN
WINDOW = {"g_min": G_MIN, "g_max": G_MAX}
SEED = 2**40 + 5  # above 2**32 on purpose
SHAPES = [
    pytest.param((1, 1, 1), id="one-weight"),
    pytest.param((1, 37, 11), id="prime"),
    pytest.param((3, 19, 71), id="grouped"),
    pytest.param((2, 128, 33), id="wide"),
    pytest.param((1, 0, 5), id="no-output"),
    pytest.param((2, 5, 0), id="no-input"),
]
NOISE = {"write_noise": 0.1e-6, "device_spread": 0.1, "stuck_at_g_min": 0.05, "stuck_at_g_max": 0.03}
MAPPINGS = {
    "pair": {},
    "levels": {"levels": 16},
    "subtract": {"merge": "subtract"},
    "collapsed": {"merge": "all"},
    "slices": {"slices": 4, "slice_bits": 2},
    "slices-subtract": {"slices": 3, "slice_bits": 3, "levels": 8, "merge": "subtract"},
    "slices-all": {"slices": 4, "slice_bits": 2, "merge": "all"},
    "one-slice": {"slices": 1, "slice_bits": 5},
    "32-bits": {"slices": 16, "slice_bits": 2},
    "offset": {"merge": "offset"},
    "offset-levels": {"merge": "offset", "levels": 15},
    "offset-even": {"merge": "offset", "levels": 16},
}
ORDERS = [FORWARD, REVERSE, 11, 12]
CURVE = {"write_noise": (0.05e-6, 0.4e-6, -0.3e-6, 0.2e-6, -0.1e-6)}
DEVICES = {"ideal": {}, "write": {"write_noise": 0.2e-6}, "curve": CURVE, "all": NOISE}


def weights(shape, seed=0, columns=True):
    """Weights, some of them 0 or above w_max, and w_max."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(0, 0.5, shape).astype(np.float32)
    weight[rng.random(shape) < 0.1] = 0.0
    count = shape[0] * shape[1] if columns else 1
    return weight, rng.uniform(0.5, 1.5, count).astype(np.float32)


def told(s):
    """Settings of the oracle as `program` takes them."""
    writes = {name: value for name, value in s.items() if name in Programming.model_fields}
    rest = {name: value for name, value in s.items() if name not in writes}
    return {"programming": Programming(**writes), **rest}


def assert_programmed(g, expected, settings, share=5e-3):
    """Float32 arithmetic of about five operations; a share or a uniform on a rounding edge may fall either way."""
    digits = 2.0 ** (settings.get("slice_bits", 0) * (settings.get("slices", 1) - 1))
    whole = RANGE * (digits if settings.get("merge") == "all" else 1.0)
    assert g.dtype == np.float32
    assert g.shape == expected.shape
    off = np.abs(g.astype(np.float64) - expected)
    assert (off <= 2e-6 * whole).mean() >= 1 - share if off.size else True, off.max() / whole


@pytest.mark.parametrize("columns", [False, True], ids=["tensor", "column"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_host_matches_oracle(shape, mapping, device, columns):
    weight, w_max = weights(shape, columns=columns)
    s = {"w_max": w_max, **WINDOW, **MAPPINGS[mapping], **DEVICES[device], "seed": SEED, "step": 2**33 + 9}
    assert_programmed(ops.program(weight, **told(s)), reference.program(weight, **s), s)


@pytest.mark.parametrize("device", [None, ShimDevice()], ids=["host", "kernel"])
@pytest.mark.parametrize("power", range(5))
def test_every_term_of_write_noise_is_noise(power, device):
    weight, w_max = weights((1, 37, 11))
    s = {"w_max": w_max, **WINDOW, "write_noise": (0.0,) * power + (0.3e-6,), "seed": SEED, "step": 3}
    assert_programmed(ops.program(weight, device=device, **told(s)), reference.program(weight, **s), s)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_cuda_kernel_is_the_host_kernel(shape, mapping, order):
    """In every thread order; the same headers, so the same bits but for contracted sums of joined planes."""
    weight, w_max = weights(shape, columns=order != REVERSE)
    s = {"w_max": w_max, **WINDOW, **MAPPINGS[mapping], **NOISE, "seed": SEED, "step": 2**33 + 9}
    s |= {"sigma_g": 0.3e-6, "exponent": 0.7}
    g, variance = ops.program(weight, device=ShimDevice(order), **told(s))
    host_g, host_variance = ops.program(weight, **told(s))
    np.testing.assert_allclose(g, host_g, rtol=3e-7, atol=1e-6 * RANGE)
    np.testing.assert_allclose(variance, host_variance, rtol=1e-6)
    assert_programmed(g, reference.program(weight, **s)[0], s)


def test_cuda_step_may_live_on_the_device():
    weight, w_max = weights((1, 37, 11))
    s = told({"w_max": w_max, **WINDOW, "write_noise": 1e-7, "seed": SEED, "device": ShimDevice()})
    by_value = ops.program(weight, step=7, **s)
    np.testing.assert_array_equal(by_value, ops.program(weight, step=np.full(1, 7), **s))
    assert not np.array_equal(by_value, ops.program(weight, step=np.full(1, 8), **s))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("mapping", ["pair", "slices-all", "offset-levels"])
def test_cuda_weights_that_are_not_finite_poison_their_cells(mapping, value):
    weight, w_max = weights((2, 9, 7))
    weight[1, 5, 2] = value
    s = {"w_max": w_max, **WINDOW, **MAPPINGS[mapping], **NOISE, "sigma_g": 1e-7}
    for array in ops.program(weight, device=ShimDevice(), **told(s)):
        where = np.zeros(array.shape[1:], bool)
        where[7 + 2, 5] = True
        assert np.isnan(array[:, where]).all()
        assert np.isfinite(array[:, ~where]).all()


@pytest.mark.parametrize("exponent", [0.0, 0.5, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_variance_of_a_read_matches_oracle(mapping, exponent):
    weight, w_max = weights((2, 19, 41))
    s = {"w_max": w_max, **WINDOW, "g_min": 0.0, **MAPPINGS[mapping], **NOISE, "seed": SEED}
    s |= {"sigma_g": 0.3e-6, "exponent": exponent}
    g, variance = ops.program(weight, **told(s))
    expected, expected_variance = reference.program(weight, **s)
    assert_programmed(g, expected, s)
    scale = expected_variance.max()
    off = np.abs(variance - expected_variance)
    assert (off <= 1e-5 * scale).mean() >= 1 - 5e-3, off.max() / scale
    assert variance.min() >= 0


def test_variance_adds_devices_with_the_squares_of_their_weights():
    """By hand: w = 0.8 of w_max is the digits 1, 2, 1 (base 3 plus 1); the devices of the other side lie at g_min."""
    weight = np.full((1, 1, 1), 51 / 63, np.float32)  # 51 = 3 + 0 * 4 + 3 * 16
    s = {"w_max": np.ones(1, np.float32), **WINDOW, "slices": 3, "slice_bits": 2, "sigma_g": 1e-7}
    at_max, at_min = 1e-14, 1e-14 * 0.1  # the square-root law: variance in proportion to g
    _, planes = ops.program(weight, **s)
    np.testing.assert_allclose(planes.ravel(), [at_max, at_min, at_max, at_min, at_min, at_min], rtol=1e-5)
    _, pairs = ops.program(weight, merge="subtract", **s)
    np.testing.assert_allclose(pairs.ravel(), [at_max + at_min, 2 * at_min, at_max + at_min], rtol=1e-5)
    _, whole = ops.program(weight, merge="all", **s)
    np.testing.assert_allclose(whole, (1 + 256) * (at_max + at_min) + 16 * 2 * at_min, rtol=1e-5)


def test_targets_by_hand():
    weight = np.array([[[-2.0, -0.5, 0.0, 0.24, 1.0]]], np.float32)
    one = np.ones(1, np.float32)

    def shares(**s):
        return ((ops.program(weight, w_max=one, **WINDOW, **s) - G_MIN) / RANGE)[:, :, 0]

    np.testing.assert_allclose(shares(), [[0, 0, 0, 0.24, 1], [1, 0.5, 0, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(shares(levels=5), [[0, 0, 0, 0.25, 1], [1, 0.5, 0, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(shares(merge="offset"), [[0, 0.25, 0.5, 0.62, 1]], atol=1e-6)
    np.testing.assert_allclose(shares(merge="offset", levels=5), [[0, 0.25, 0.5, 0.5, 1]], atol=1e-6)
    # six levels: the middle is the third, two steps to each side, and the last is unused
    np.testing.assert_allclose(shares(merge="offset", levels=6), [[0, 0.2, 0.4, 0.4, 0.8]], atol=1e-6)
    digits = shares(slices=2, slice_bits=1)  # 0, 1.5 -> 2, 0, 0.72 -> 1, 3 as binary digits, halves to even
    np.testing.assert_allclose(digits, [[0, 0, 0, 1, 1], [0, 0, 0, 0, 1], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]], atol=1e-6)  # fmt: skip
    g = ops.program(weight, w_max=one, merge="all", slices=2, slice_bits=1, **WINDOW)
    np.testing.assert_allclose(g[0, :, 0] / RANGE, [-3, -2, 0, 1, 3], atol=1e-6)


def test_results_do_not_depend_on_threads(same_on_threads):
    weight, w_max = weights((3, 70, 130))
    s = {"w_max": w_max, "sigma_g": 1e-7, "programming": Programming(**NOISE), "seed": SEED, **WINDOW}
    same_on_threads(lambda: ops.program(weight, **s))


def test_moments_of_the_draws():
    """40,000 devices a side: means, deviations and rates within four standard errors; draws are independent."""
    n = 200
    weight = np.full((1, n, n), 0.5, np.float32)
    s = {"w_max": np.ones(1, np.float32), **WINDOW, "seed": SEED}
    target = G_MIN + 0.5 * RANGE
    write = ops.program(weight, programming=Programming(write_noise=2e-7), **s)[0].astype(np.float64) - target
    spread = (
        ops.program(weight, programming=Programming(device_spread=0.1), **s)[0].astype(np.float64) / target
        - 1
    )
    for z, deviation in ((write, 2e-7), (spread, 0.1)):
        assert z.mean() == pytest.approx(0, abs=4 * deviation / n)
        assert z.std() == pytest.approx(deviation, rel=4 / np.sqrt(2) / n)
        assert ((z / deviation) ** 4).mean() == pytest.approx(3, abs=4 * np.sqrt(96) / n)
        for shifted in (np.roll(z, 1, 0), np.roll(z, 1, 1), np.roll(z, 4, 1)):
            assert abs(np.corrcoef(z.ravel(), shifted.ravel())[0, 1]) < 4 / n
    assert abs(np.corrcoef(write.ravel(), spread.ravel())[0, 1]) < 4 / n
    stuck = ops.program(weight, programming=Programming(stuck_at_g_min=0.1, stuck_at_g_max=0.2), **s)
    for value, rate in ((G_MIN, 0.1), (G_MAX, 0.2)):
        found = (stuck[0] == np.float32(value)).mean()
        assert found == pytest.approx(rate, abs=4 * np.sqrt(rate * (1 - rate)) / n)
    both = ((stuck[0] == np.float32(G_MAX)) & (stuck[1] == np.float32(G_MAX))).mean()
    assert both == pytest.approx(0.04, abs=4 * np.sqrt(0.04) / n)  # the sides of a pair are other devices


def test_spread_and_stuck_cells_are_of_the_device_and_noise_of_the_step():
    weight, w_max = weights((1, 20, 30))
    s = {"w_max": w_max, **WINDOW}
    device = {"device_spread": 0.1, "stuck_at_g_min": 0.1}

    def same(a, b):
        return np.array_equal(*(ops.program(weight, **s, **told(each)) for each in (a, b)))

    assert same({**device, "step": 1}, {**device, "step": 2})
    assert not same({**device, "seed": 1}, {**device, "seed": 2})
    assert not same({"write_noise": 1e-7, "step": 1}, {"write_noise": 1e-7, "step": 2})
    assert same({"write_noise": 1e-7, "step": 1}, {"write_noise": 1e-7, "step": np.array([2**32 + 1])})


# ---- fingerprints and checksums


def fingerprint(weight):
    out = np.zeros(1, np.int64)
    host_call(library(), "gpuxbar_fingerprint", weight, weight.size, out)
    return int(out[0])


@pytest.mark.parametrize("size", [0, 1, 17, 16384 * 3 + 5])
def test_fingerprint_matches_oracle_on_any_threads(size, same_on_threads):
    weight = np.random.default_rng(size).normal(size=size).astype(np.float32)
    assert same_on_threads(lambda: fingerprint(weight)) == reference.fingerprint(weight)


def test_fingerprint_of_single_weights_by_hand():
    """Place 0 has the factor 1; the sum wraps and is signed."""
    assert fingerprint(np.array([1.0], np.float32)) == 0x3F800000
    assert fingerprint(np.array([-0.0], np.float32)) == 0x80000000
    assert fingerprint(np.array([2.0, 0.0, 0.0], np.float32)) == 0x40000000
    assert fingerprint(np.zeros(5, np.float32)) == 0


@pytest.mark.parametrize("size", [17, 4096 * 4 + 5])
def test_every_weight_that_is_not_finite_is_counted(size, same_on_threads):
    """To the last one of the last piece that a thread looks at."""
    weight = np.ones((1, 1, size), np.float32)
    weight.flat[[0, size // 2, -1]] = np.nan, np.inf, -np.inf

    def refused():
        with pytest.raises(ValueError, match="`weight` must be finite, got 3 NaN or infinite values"):
            ops.program(weight, w_max=np.ones(1, np.float32), **WINDOW)

    same_on_threads(refused)


@pytest.mark.parametrize("size", [0, 1, 63, 64, 16384 * 3 + 5])
def test_checksum_is_one_on_any_threads(size, same_on_threads):
    weight = np.random.default_rng(size).normal(size=size).astype(np.float32)
    same_on_threads(lambda: checksum(weight))
    assert checksum(np.zeros(size, np.float32)) == 0


def test_round_weights_that_change_places_change_the_checksum():
    """Of powers of two, whose lower bits are zeros, every pair of places in three chunks that lie a power of two apart."""
    for a, b in ((1.0, 2.0), (0.0, 1.0), (-1.0, 1.0), (0.5, -2.0)):
        weight = np.full(3 * 16384, a, np.float32)
        weight[0] = b
        found = set()
        for place in (0, *(1 << k for k in range(16))):
            weight[[0, place]] = weight[[place, 0]]
            found.add(checksum(weight))
            weight[[0, place]] = weight[[place, 0]]
        assert len(found) == 17 - (weight.size <= 1 << 15)


@pytest.mark.parametrize("of", [fingerprint, checksum])
@given(data=st.data())
@hypothesis_settings(max_examples=200, deadline=None)
def test_any_single_change_changes_it(of, data):
    """Also the last bit of one weight, and two weights that change places."""
    size = data.draw(st.integers(2, 3000))
    weight = np.random.default_rng(size).normal(size=size).astype(np.float32)
    before = of(weight)
    place = data.draw(st.integers(0, size - 1))
    changed = weight.copy()
    changed.view(np.uint32)[place] ^= np.uint32(1 << data.draw(st.integers(0, 31)))
    assert of(changed) != before
    other = data.draw(st.integers(0, size - 1))
    swapped = weight.copy()
    swapped[[place, other]] = weight[[other, place]]
    assert (of(swapped) != before) == (weight[place] != weight[other])


def test_factors_of_places_are_odd_and_distinct():
    """So a single change cannot cancel: an odd factor is invertible mod 2**64."""
    one = np.zeros(4096, np.float32)
    factors = set()
    for place in range(one.size):
        one.view(np.uint32)[place] = 1
        factors.add(fingerprint(one) & (2**64 - 1))
        one.view(np.uint32)[place] = 0
    assert len(factors) == one.size
    assert all(factor % 2 for factor in factors)


# ---- reprogram


class Array:
    """A layer's arrays, poisoned, and a call that says whether it wrote."""

    def __init__(self, shape, planes=2, variance=False):
        groups, outputs, inputs = shape
        self.g = np.full((planes, groups * inputs, outputs), np.nan, np.float32)
        self.noise_var = self.g.copy() if variance else None
        self.w_max = np.full(groups * outputs, np.nan, np.float32)
        self.state = np.zeros(2, np.int64)
        self.write_step = np.zeros(1, np.int64)

    def wrote(self, weight, **s):
        """Call `reprogram`; whether it filled `g`, which is kept if not."""
        before = self.g.copy()
        self.g[...] = np.nan
        s = {**WINDOW, "write_noise": 1e-7, "seed": SEED, "write_step": self.write_step} | s
        ops.reprogram(weight, self.g, self.w_max, self.state, self.noise_var, **told(s))
        if not np.isnan(self.g).any():
            return True
        assert np.isnan(self.g).all()
        self.g[...] = before
        return False


@pytest.fixture(params=["host", "reference", "cuda-forward", "cuda-random"])
def device(request, monkeypatch):
    """None for the CPU's backends; the CUDA kernels on the CPU."""
    if request.param.startswith("cuda"):
        return ShimDevice(FORWARD if request.param == "cuda-forward" else 11)
    monkeypatch.setattr("gpuxbar.launch.host.WANTED", request.param)
    return None


@pytest.mark.parametrize("variance", [False, True])
@pytest.mark.parametrize(
    ("scale", "full_weight"), [("tensor", None), ("column", None), ("tensor", 0.7), ("column", 0.7)]
)
def test_reprogram_is_program_of_the_largest_weights(scale, full_weight, variance, device):
    weight, _ = weights((3, 19, 41))
    weight[1, 3] = 0.0  # a column of zeros
    array = Array(weight.shape, variance=variance)
    array.write_step[0] = 3
    s = {**NOISE, **({"sigma_g": 1e-7} if variance else {})}
    assert array.wrote(weight, scale=scale, full_weight=full_weight, device=device, **s)
    top = np.abs(weight).max(axis=2).ravel() if scale == "column" else np.full(57, np.abs(weight).max())
    w_max = np.full(57, full_weight, np.float32) if full_weight else np.maximum(top, np.float32(1e-30))
    np.testing.assert_array_equal(array.w_max, w_max)
    version = reference.fingerprint(weight) + 3
    np.testing.assert_array_equal(array.state, version)
    expected = ops.program(weight, w_max=w_max, **WINDOW, **told(s), seed=SEED, step=version & 0xFFFFFFFF)
    if variance:
        np.testing.assert_array_equal(array.noise_var, expected[1])
    np.testing.assert_array_equal(array.g, expected[0] if variance else expected)


def test_reprogram_writes_only_what_changed(device):
    weight, _ = weights((1, 37, 11))
    array = Array(weight.shape)
    assert array.wrote(weight, device=device)
    first, state = array.g.copy(), array.state.copy()
    assert not array.wrote(weight, device=device)
    assert not array.wrote(weight.copy(), device=device)
    np.testing.assert_array_equal(array.state, state)
    changed = weight.copy()
    changed[0, 36, 10] = np.nextafter(weight[0, 36, 10], np.float32(9))
    assert array.wrote(changed, device=device)
    assert (array.g != first).mean() > 0.9  # other weights, other noise of the write
    assert array.wrote(weight, device=device)  # back again: a pure function of the weights
    np.testing.assert_array_equal(array.g, first)
    array.write_step += 1
    assert array.wrote(weight, device=device)
    assert (array.g != first).mean() > 0.9
    array.state[...] = 0
    assert array.wrote(weight, device=device)


def test_a_version_of_zero_is_never_taken_for_programmed(device):
    """All weights 0 and write step 0 make version 0, which a fresh state also holds."""
    weight = np.zeros((1, 5, 3), np.float32)
    array = Array(weight.shape)
    assert array.wrote(weight, device=device)
    np.testing.assert_array_equal(array.w_max, np.float32(1e-30))
    assert array.wrote(weight, device=device)
    array.write_step[0] = 1
    assert array.wrote(weight, device=device)
    assert not array.wrote(weight, device=device)


@pytest.mark.parametrize("shape", [(1, 0, 5), (2, 5, 0), (0, 3, 3)])
def test_reprogram_of_nothing(shape, device):
    array = Array(shape)
    array.wrote(np.zeros(shape, np.float32), device=device)
    np.testing.assert_array_equal(array.w_max, np.full(shape[0] * shape[1], 1e-30, np.float32))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(3, 5, 9), (2, 17, 2500), (1, 300, 70)])
def test_cuda_reprogram_in_every_order(shape, order):
    """Many warps and blocks: the fingerprint and the largest weights are exact."""
    weight, _ = weights(shape)
    for scale in ("tensor", "column"):
        array, host = Array(shape), Array(shape)
        assert array.wrote(weight, scale=scale, device=ShimDevice(order))
        assert host.wrote(weight, scale=scale)
        for ours, theirs in ((array.state, host.state), (array.w_max, host.w_max), (array.g, host.g)):
            np.testing.assert_array_equal(ours, theirs)


def test_cuda_launches_do_not_depend_on_the_decision():
    weight, _ = weights((1, 37, 11))
    array, device = Array(weight.shape), ShimDevice()
    assert array.wrote(weight, device=device)
    first = list(device.launches)
    assert not array.wrote(weight, device=device)
    assert (
        device.launches
        == first * 2
        == ["begin_fingerprint", "fingerprint", "program", "commit_fingerprint"] * 2
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("full_weight", [None, 1.0])
@pytest.mark.usefixtures("backend")
def test_weights_that_are_not_finite_change_nothing(value, full_weight):
    weight, _ = weights((2, 19, 7))
    array = Array(weight.shape)
    assert array.wrote(weight)
    kept = [a.copy() for a in (array.g, array.w_max, array.state)]
    bad = weight.copy()
    bad[1, 5, 2:5] = value
    with pytest.raises(
        ValueError, match="reprogram: `weight` must be finite, got 3 NaN or infinite values; look"
    ):
        ops.reprogram(
            bad,
            array.g,
            array.w_max,
            array.state,
            **WINDOW,
            write_step=array.write_step,
            full_weight=full_weight,
        )
    for was, now in zip(kept, (array.g, array.w_max, array.state), strict=True):
        np.testing.assert_array_equal(was, now)


# ---- messages

ONES = np.ones(4, np.float32)
BAD = {
    "dtype": ({"weight": np.zeros((1, 4, 3))}, TypeError, "`weight` must be an array of float32, got float64"),
    "rank": ({"weight": np.zeros((4, 3), np.float32)}, ValueError, "`weight` must have 3 axes, got 2"),
    "stride": ({"weight": np.zeros((1, 3, 4), np.float32).transpose(0, 2, 1)}, ValueError, "`weight` must be C-contiguous"),
    "window": ({"g_max": 1e-7}, ValueError, "need 0 <= g_min < g_max, got 1e-06 S and 1e-07 S; widen or swap"),
    "merge": ({"merge": "some"}, ValueError, "`merge` must be one of none, subtract, all, offset, got 'some'; choose one"),
    "slices": ({"slices": 2}, ValueError, r"`slices` must be at least 1 and `slice_bits` 1 to 32 // slices .*got 2 of None"),
    "bits": ({"slices": 5, "slice_bits": 7}, ValueError, "got 5 of 7 bits; a float32 weight holds no more"),
    "offset": ({"slice_bits": 2, "merge": "offset"}, ValueError, "`slice_bits` must be None with merge='offset', got 2; sliced"),
    "levels": ({"levels": 1}, ValueError, "`levels` must be 2 to 65536 with merge='none', got 1; None is continuous"),
    "middle": ({"levels": 2, "merge": "offset"}, ValueError, "`levels` must be 3 to 65536 with merge='offset', got 2; None"),
    "digits": ({"levels": 5, "slice_bits": 2}, ValueError, r"`levels` must be 2\*\*slice_bits = 4 for sliced weights, got 5; leave"),
    "programming": ({"programming": {"write_noise": 1e-8}}, TypeError, r"`programming` must be a gpuxbar\.spec\.Programming, got dict"),
    "sigma": ({"sigma_g": float("inf")}, ValueError, "`sigma_g` must be at least 0, got inf S; 0 switches it off"),
    "exponent": ({"exponent": 5.0}, ValueError, "`exponent` must be 0 to 4, got 5; 0.5 is the square-root law"),
}  # fmt: skip
BAD_PROGRAM = {
    **BAD,
    "w_max": ({"w_max": np.ones(3, np.float32)}, ValueError, "`w_max` must have 1 or 4 values, got 3; give one, or one per output"),
    "zero": ({"w_max": ONES * 0}, ValueError, "`w_max` must be finite and above 0, got 0 to 0; use the largest weight"),
    "nan": ({"weight": np.full((1, 4, 3), np.nan, np.float32)}, ValueError, "`weight` must be finite, got 12 NaN or infinite"),
}  # fmt: skip
GOOD_REPROGRAM = {
    "g": np.zeros((2, 3, 4), np.float32), "w_max": ONES, "state": np.zeros(2, np.int64), "noise_var": None,
    "write_step": np.zeros(1, np.int64),
}  # fmt: skip
BAD_REPROGRAM = {
    **{name: case for name, case in BAD.items() if name not in ("levels", "digits")},
    "g": ({"g": np.zeros((2, 4, 3), np.float32)}, ValueError, r"`g` must have shape \(2, 3, 4\) for weight \(1, 4, 3\), got \(2, 4, 3\)"),
    "w_max": ({"w_max": np.ones(1, np.float32)}, ValueError, r"`w_max` must have shape \(4,\)"),
    "state": ({"state": np.zeros(2)}, TypeError, "`state` must be an array of int64, got float64"),
    "step": ({"write_step": np.zeros(2, np.int64)}, ValueError, r"`write_step` must have shape \(1,\)"),
    "scale": ({"scale": "row"}, ValueError, "`scale` must be 'tensor' or 'column', got 'row'; choose one"),
    "full": ({"full_weight": 0.0}, ValueError, "`full_weight` must be finite and above 0, got 0; None takes the largest weight"),
    "variance": ({"noise_var": np.zeros((2, 3, 4), np.float32)}, ValueError, "`noise_var` must be given with sigma_g above 0 and only then, got sigma_g=0 S and an array"),
    "no-variance": ({"sigma_g": 1e-7}, ValueError, "got sigma_g=1e-07 S and none; pass both or neither"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_PROGRAM)
def test_program_names_bad_input(name):
    change, error, text = BAD_PROGRAM[name]
    values = {"weight": np.zeros((1, 4, 3), np.float32), "w_max": ONES, **WINDOW, **change}
    with pytest.raises(error, match="program: .*" + text):
        ops.program(values.pop("weight"), **values)


@pytest.mark.parametrize("name", BAD_REPROGRAM)
def test_reprogram_names_bad_input_and_changes_nothing(name):
    change, error, text = BAD_REPROGRAM[name]
    values = {"weight": np.ones((1, 4, 3), np.float32), **GOOD_REPROGRAM, **WINDOW, **change}
    before = {key: values[key].copy() for key in ("g", "w_max", "state")}
    with pytest.raises(error, match="reprogram: .*" + text):
        ops.reprogram(**values)
    for key, kept in before.items():
        np.testing.assert_array_equal({**GOOD_REPROGRAM, **change}[key], kept)
