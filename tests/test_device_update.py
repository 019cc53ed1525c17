"""device_update: the laws against their sources, the host kernel against the float64 oracle, and the messages."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from cuda_shim import FORWARD, REVERSE, ShimDevice

from gpuxbar import ops, reference
from gpuxbar.ops.laws import TRAITS
from gpuxbar.reference.device_update import Cells
from gpuxbar.reference.laws import neurosim_rate, nonlinearity_label
from gpuxbar.spec import (
    Agarwal,
    AgarwalSymmetric,
    ConstantStep,
    ExponentialStep,
    Ideal,
    LinearStep,
    LookupTable,
    NeuroSim,
    PiecewiseStep,
    PowerStep,
    Programming,
    SoftBounds,
)

HEADERS = Path(__file__).parent.parent / "kernels" / "include" / "gpuxbar"
G_MIN, G_MAX = 1e-6, 10e-6  # S
WINDOW = {"g_min": G_MIN, "g_max": G_MAX}
SEED = 2**40 + 7
SCORES = np.linspace(-4, 4, 17)
SCATTER = {
    "scatter_up": tuple(tuple((s * SCORES + q * (SCORES**2 - 1)).tolist()) for s, q in ((0.5, 0.0), (0.9, 0.05), (0.4, 0.04))),
    "scatter_down": tuple(tuple((s * SCORES).tolist()) for s in (0.2, 0.6)),
}  # fmt: skip
LAWS = {
    "linear": Agarwal(),
    "agarwal": Agarwal(nu=2.0),
    "agarwal-noise": Agarwal(nu=0.5, gamma=0.05, cycle=0.3),
    "agarwal-spread": Agarwal(nu=1.0, spread=0.3, gamma=0.01),
    "neurosim": NeuroSim(nonlinearity_ltp=1.75, nonlinearity_ltd=-4.88),
    "neurosim-pulses": NeuroSim(nonlinearity_ltp=1.75, nonlinearity_ltd=1.46, levels=32, integer_pulses=True),
    "neurosim-noise": NeuroSim(nonlinearity_ltp=2.4, cycle=0.01, spread=0.5),
    "soft": SoftBounds(up=1.5, down=0.7),
    "soft-apart": SoftBounds(up=0.004, down=1.0),
    "soft-noise": SoftBounds(pulses=200, cycle=0.3, spread=0.2),
    "soft-ends": SoftBounds(up=1.6, down=2.7, spread=0.1, low_spread=0.15, high_spread=0.2),
    "soft-top": SoftBounds(up=1.6, down=2.7, high_spread=0.2),
    "exponential-bottom": ExponentialStep(low_spread=0.2),
    "ideal": Ideal(),
    "constant": ConstantStep(pulses=500, cycle=0.3, step_spread=0.3, asymmetry=0.2, asymmetry_spread=0.1, sides="reference"),
    "constant-bounds": ConstantStep(low_spread=0.15, high_spread=0.1, lognormal_steps=True, step_spread=0.7),
    "linear-step": LinearStep(slope_up=0.4, slope_down=-0.7, spread=0.1, step_spread=0.1, cycle=0.5, cycle_of="nominal"),
    "linear-write": LinearStep(slope_up=1.0, slope_down=0.5, write_noise=1e-7, cycle=0.1),
    "symmetric": AgarwalSymmetric(alpha=3.0, gamma=0.02, spread=0.2),
    "symmetric-mild": AgarwalSymmetric(alpha=0.01, cycle=0.2),
    "exponential": ExponentialStep(),
    "exponential-reram": ExponentialStep(amplitude_up=-1.18445, amplitude_down=-0.081404, rate_up=5, rate_down=5, a=-0.5, b=-0.5, spread=0.1, low_spread=0.1, high_spread=0.1),
    "exponential-pcm": ExponentialStep(amplitude_up=0.3, amplitude_down=0.2, rate_up=2, rate_down=1, a=0.5, b=0.1, sides="one_sided"),
    "power": PowerStep(exponent_up=0.6, exponent_down=2.3, spread=0.2, cycle=0.3),
    "power-soft": PowerStep(),
    "piecewise": PiecewiseStep(up=(1.5, 1.2, 0.8, 0.9, 0.3), down=(0.2, 1.0, 1.7), spread=0.1, cycle=0.2),
    "lookup": LookupTable(pulses=50, up=(1.5, 1.2, 0.3), down=(0.2, 1.7), spread=0.1, step_spread=0.1, **SCATTER),
    "piecewise-zero": PiecewiseStep(up=(2.0, 0.0), down=(0.0, 1.0, 1.0)),
}  # fmt: skip
# of the window; NeuroSim's labels go through a fit of 1e-5
ATOL = {
    "neurosim": 1e-5,
    "neurosim-pulses": 1e-5,
    "neurosim-noise": 1e-5,
}


def case(groups, outputs, inputs, seed=0, size=0.2):
    rng = np.random.default_rng(seed)
    g = rng.uniform(G_MIN, G_MAX, (2, groups * inputs, outputs)).astype(np.float32)
    dw = rng.normal(0, size, (groups, outputs, inputs)).astype(np.float32)
    dw[rng.random(dw.shape) < 0.2] = 0.0
    w_max = rng.uniform(0.5, 2.0, groups * outputs).astype(np.float32)
    return g, dw, w_max


def assert_matches_oracle(name, shape, device=None):
    g, dw, w_max = case(*shape)
    law, stuck = LAWS[name], Programming(stuck_at_g_min=0.05, stuck_at_g_max=0.03)
    # what devices with write noise hold is near to what they show
    g_held = g + np.float32(1e-7) if law.write_noise else None
    new, new_held = g.copy(), None if g_held is None else g_held.copy()
    pairs = ops.Pairs(new, law=law, g_held=new_held, programming=stuck, seed=SEED, **WINDOW)
    shown, held, weights = reference.device_update(g, dw, g_held=g_held, w_max=w_max, step=9, **pairs.plain)
    read = ops.device_update(pairs, dw, w_max=w_max, step=9, device=device)
    # float32 arithmetic of about ten operations
    atol = ATOL.get(name, 3e-6) * (G_MAX - G_MIN)
    off = ~(np.abs(new - shown) <= atol)
    # a pulse count on a rounding edge may differ by one
    assert off.mean() <= (2e-3 if name == "neurosim-pulses" else 0), np.abs(new - shown).max() / (
        G_MAX - G_MIN
    )
    if g_held is not None:
        np.testing.assert_allclose(new_held, held, rtol=0, atol=atol)
        assert not np.allclose(new, new_held, rtol=0, atol=atol)
    fine = ~off.any(0).T.reshape(shape[1], shape[0], shape[2]).transpose(1, 0, 2)
    np.testing.assert_allclose(read[fine], weights[fine], rtol=0, atol=2 * w_max.max() * ATOL.get(name, 3e-6))
    still = np.broadcast_to(dw.transpose(0, 2, 1).reshape(g.shape[1:]) == 0, g.shape)
    np.testing.assert_array_equal(new[still], g[still])


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 37), (3, 71, 19), (2, 128, 33)])
@pytest.mark.parametrize("name", LAWS)
def test_host_matches_oracle(name, shape):
    assert_matches_oracle(name, shape)


ORDERS = [FORWARD, REVERSE, 11, 12]


@pytest.mark.parametrize("where", ["host", "kernel", "reference"])
def test_a_factor_of_the_change_and_a_place_for_the_weights(where, monkeypatch):
    """A rate of a gradient is as a scaled gradient, and the weights land where they are wanted."""
    if where == "reference":
        monkeypatch.setattr("gpuxbar.launch.host.library", lambda: None)
    g, dw, w_max = case(2, 19, 21)
    device, cells, place = ShimDevice() if where == "kernel" else None, g.copy(), np.full_like(dw, np.nan)
    pairs, scaled = (ops.Pairs(a, law=LAWS["soft-noise"], seed=SEED, **WINDOW) for a in (cells, g.copy()))
    settings = {"w_max": w_max, "step": 3}
    read = ops.device_update(pairs, dw, factor=-0.5, out=place, device=device, **settings)
    assert read is place
    # by a power of 2: the same bits
    np.testing.assert_array_equal(
        ops.device_update(scaled, np.float32(-0.5) * dw, device=device, **settings), place
    )
    np.testing.assert_array_equal(scaled.g, cells)
    expected, _, weights = reference.device_update(g, dw, factor=-0.5, **pairs.plain, **settings)
    np.testing.assert_allclose(cells, expected, rtol=0, atol=3e-6 * (G_MAX - G_MIN))
    np.testing.assert_allclose(place, weights, rtol=0, atol=6e-6 * w_max.max())


@pytest.mark.parametrize("shape", [(1, 7, 37), (3, 71, 19), (2, 128, 33)])
@pytest.mark.parametrize("name", LAWS)
def test_kernel_matches_oracle(name, shape):
    """The CUDA kernel on the CPU; bitlines not a multiple of 4, and a multiple (16-byte accesses)."""
    assert_matches_oracle(name, shape, ShimDevice(order=ORDERS[(shape[0] + len(name)) % 4]))


def test_traits_are_the_same_in_python_and_cuda():
    body = re.search(r"enum Trait : u32 \{(.*?)\};", (HEADERS / "update.cuh").read_text(), re.DOTALL)
    pairs = re.findall(r"^\s*(\w+) = (\d+),", body[1], re.MULTILINE)
    assert [(name.lower(), int(value)) for name, value in pairs] == [
        (t, 1 << k) for k, t in enumerate(TRAITS)
    ]


def test_a_kernel_is_compiled_for_what_its_law_has():
    law = ConstantStep(pulses=60, lognormal_steps=True, low_spread=0.1, write_noise=1e-8)
    pairs = ops.Pairs(
        np.zeros((2, 3, 4), np.float32),
        law=law,
        g_held=np.zeros((2, 3, 4), np.float32),
        g_min=1e-6,
        g_max=1e-5,
    )
    traits = {name for bit, name in enumerate(TRAITS) if pairs.macros["TRAITS"] >> bit & 1}
    assert traits == {"low_spread", "write_noise", "lognormal"}
    assert (pairs.macros["MAPPED"], pairs.macros["SIDES"]) == (0, 0)


@pytest.mark.parametrize("order", ORDERS)
def test_kernel_gives_the_same_bits_in_every_thread_order(order):
    g, dw, w_max = case(2, 68, 45)
    law = Agarwal(nu=2, gamma=0.05, spread=0.2)
    results = []
    for device in (ShimDevice(), ShimDevice(order, workspace=1)):
        pairs = ops.Pairs(g.copy(), law=law, **WINDOW)
        step = np.full(1, 9) if device.order else 9  # by value, or from memory
        results.append((pairs.g, ops.device_update(pairs, dw, w_max=w_max, step=step, device=device)))
        assert device.launches == ["device_update"]
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])


@pytest.mark.parametrize("device", [None, ShimDevice()], ids=["host", "kernel"])
@pytest.mark.parametrize("shape", [(0, 4, 4), (1, 0, 4), (1, 4, 0)])
def test_nothing_to_update(shape, device):
    g, dw, w_max = case(*shape)
    read = ops.device_update(ops.Pairs(g, law=Agarwal(), **WINDOW), dw, w_max=w_max, device=device)
    assert read.shape == shape


def drive(law, x, changes):
    """x of one positive device after successive wanted changes (shares of the window)."""
    pairs = ops.Pairs(np.full((2, 1, 1), G_MIN + x * (G_MAX - G_MIN), np.float32), law=law, **WINDOW)
    path = [x]
    for step, change in enumerate(changes):
        dw = np.full((1, 1, 1), 2 * change, np.float32)
        ops.device_update(pairs, dw, w_max=np.ones(1, np.float32), step=step)
        path.append((pairs.g[0, 0, 0] - G_MIN) / (G_MAX - G_MIN))
    return np.array(path)


@pytest.mark.parametrize("label", [0.0, 1.75, -2.4, 5.0])
def test_neurosim_staircase_is_the_manuals(label):
    """G(P) = B (1 - exp(-P / A)) up, and its mirror image down; A of opposite sign for a negative label."""
    levels = 32
    law = NeuroSim(nonlinearity_ltp=label, nonlinearity_ltd=label, levels=levels)
    pulses = np.arange(levels + 1)
    if label:
        a = levels / float(neurosim_rate(label))
        curve = -np.expm1(-pulses / a) / -np.expm1(-levels / a)
    else:
        curve = pulses / levels
    up = drive(law, 0.0, [1 / levels] * levels)
    np.testing.assert_allclose(up, curve, atol=2e-5)
    np.testing.assert_allclose(drive(law, 1.0, [-1 / levels] * levels), 1 - curve, atol=2e-5)


def test_neurosim_labels_are_the_published_table():
    table = {0.01: 126.269, 0.1: 12.626, 0.5: 2.520, 1: 1.2517, 1.46: 0.8487, 1.75: 0.7021, 2: 0.6090, 2.4: 0.4992,
             3: 0.3868, 4: 0.2691, 4.88: 0.2003, 5: 0.1924, 6: 0.1356, 7: 0.0901, 8: 0.0528, 9: 0.0228}  # fmt: skip
    for label, a in table.items():
        assert 1 / neurosim_rate(label) == pytest.approx(a, rel=2e-3)
        assert nonlinearity_label(1 / neurosim_rate(label)) == pytest.approx(label, rel=1e-6)
        assert neurosim_rate(-label) == -neurosim_rate(label)
    assert neurosim_rate(0.0) == 0


@pytest.mark.parametrize(
    ("nu", "label"), [(0.1, 0.126), (0.5, 0.63), (1, 1.25), (2, 2.40), (3, 3.39), (5, 4.88)]
)
def test_agarwal_is_neurosim_of_another_scale(nu, label):
    """Both staircases approach exponentially: nu = 1 / A_norm."""
    assert nonlinearity_label(1 / nu) == pytest.approx(label, abs=0.005)
    changes = [0.3, 0.2, -0.4, 0.1]
    neurosim = NeuroSim(
        nonlinearity_ltp=nonlinearity_label(1 / nu), nonlinearity_ltd=nonlinearity_label(1 / nu)
    )
    np.testing.assert_allclose(drive(Agarwal(nu=nu), 0.2, changes), drive(neurosim, 0.2, changes), atol=1e-5)


@pytest.mark.parametrize(
    "law",
    [Agarwal(nu=3.0), NeuroSim(nonlinearity_ltp=2.4, nonlinearity_ltd=-4.88), SoftBounds(up=1.7, down=0.6)],
    ids=lambda law: law.law,
)
@pytest.mark.parametrize("change", [0.3, -0.3])
def test_small_steps_one_way_add_up_to_a_large_one(law, change):
    whole = drive(law, 0.45, [change])[-1]
    parts = drive(law, 0.45, [change / 16] * 16)[-1]
    assert parts == pytest.approx(whole, abs=16 * 1e-6)  # float32 rounding of 16 conductances
    assert abs(whole - 0.45) > 0.05


@pytest.mark.parametrize("device", [None, ShimDevice()], ids=["host", "kernel"])
@pytest.mark.parametrize("alpha", [8.0, 14.0, 20.0])
def test_a_steep_device_leaves_the_ends_of_its_window(alpha, device):
    """Where it hardly moves at first: shares of 1e-9 of the window decide where a large change leads."""
    g_min, g_max = 2.0**-20, 2.0**-20 + 2.0**-17  # exact in float32
    changes = np.array([[[0.2, 0.3, 0.5, 0.7, 1.0]]], np.float32)
    g, one = np.stack([np.full((5, 1), end, np.float32) for end in (g_min, g_max)]), np.ones(1, np.float32)
    pairs = ops.Pairs(g.copy(), law=AgarwalSymmetric(alpha=alpha), g_min=g_min, g_max=g_max)
    expected, *_ = reference.device_update(g, 2 * changes, w_max=one, **pairs.plain)
    ops.device_update(pairs, 2 * changes, w_max=one, device=device)
    np.testing.assert_allclose(pairs.g, expected, rtol=0, atol=1e-5 * (g_max - g_min))
    assert (pairs.g != g).mean() > 0.5


def test_agarwal_is_its_formula():
    nu, x, d = 1.3, 0.3, 0.25
    g1 = 1 / (1 - np.exp(-nu))
    up = drive(Agarwal(nu=nu), x, [d])[-1]
    assert up == pytest.approx(x + (g1 - x) * (1 - np.exp(-nu * d)), abs=1e-6)
    down = drive(Agarwal(nu=nu), x, [-d])[-1]
    assert down == pytest.approx(x + (1 - g1 - x) * (1 - np.exp(-nu * d)), abs=1e-6)


def test_soft_bounds_shrink_towards_the_bound():
    path = drive(SoftBounds(up=2.0), 0.0, [0.1] * 30)
    np.testing.assert_allclose(path, 1 - np.exp(-2.0 * 0.1 * np.arange(31)), atol=1e-5)


def test_symmetry_point():
    """Alternate up and down steps of an asymmetric device settle where both are equal: down x = up (1 - x)."""
    path = drive(SoftBounds(up=1.0, down=3.0), 0.9, [0.01, -0.01] * 400)
    assert path[-1] == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize(
    ("law", "deviation"),
    [
        (Agarwal(gamma=0.05), 0.05 * np.sqrt(0.1)),
        (Agarwal(cycle=0.3), 0.3 * 0.1),
        (NeuroSim(levels=100, cycle=0.01), 0.01 * np.sqrt(10)),
        (SoftBounds(pulses=100, cycle=0.3), (1 - np.exp(-0.1)) * 0.5 * 0.3 / np.sqrt(10)),
    ],
)
def test_noise_of_an_update(law, deviation):
    """Mean and standard deviation over 40,000 cells within four standard errors."""
    n = 200
    g = np.full((2, n, n), G_MIN + 0.5 * (G_MAX - G_MIN), np.float32)
    quiet = g.copy()
    dw = np.full((1, n, n), 0.2, np.float32)
    without = law.model_copy(update={"gamma": 0.0, "cycle": 0.0})
    for cells, each in ((g, law), (quiet, without)):
        ops.device_update(ops.Pairs(cells, law=each, seed=3, **WINDOW), dw, w_max=np.ones(n, np.float32))
    noise = (g - quiet)[0].astype(np.float64) / (G_MAX - G_MIN)
    assert noise.mean() == pytest.approx(0, abs=4 * deviation / n)
    assert noise.std() == pytest.approx(deviation, rel=4 / np.sqrt(2) / n)
    assert abs(np.corrcoef(noise.ravel(), np.roll(noise, 1, 1).ravel())[0, 1]) < 4 / n
    pair = (g - quiet)[1].astype(np.float64).ravel()
    assert abs(np.corrcoef(noise.ravel(), pair)[0, 1]) < 4 / n


def test_agarwal_write_noise_grows_with_the_root_of_the_change():
    """gamma = 0.05 (5 read in percent) leaves 0.16 % of the range after an update of a thousandth of it."""
    n = 100
    for change in (1e-3, 4e-3, 0.1):
        g = np.full((2, n, n), G_MIN + 0.5 * (G_MAX - G_MIN), np.float32)
        dw = np.full((1, n, n), 2 * change, np.float32)
        pairs = ops.Pairs(g, law=Agarwal(gamma=0.05), seed=4, **WINDOW)
        ops.device_update(pairs, dw, w_max=np.ones(n, np.float32))
        noise = ((g[0] - G_MIN) / (G_MAX - G_MIN)).std()
        assert noise == pytest.approx(0.05 * np.sqrt(change), rel=4 / np.sqrt(2) / n)
        if change == 1e-3:
            assert noise == pytest.approx(0.0016, abs=1e-4)


def test_spread_is_of_the_device_and_noise_of_the_step():
    g, dw, w_max = case(1, 20, 30)
    outcome = {}
    for name, law, step in (
        ("spread-1", Agarwal(nu=1, spread=0.3), 1), ("spread-2", Agarwal(nu=1, spread=0.3), 2),
        ("noise-1", Agarwal(gamma=0.1), 1), ("noise-2", Agarwal(gamma=0.1), 2),
    ):  # fmt: skip
        outcome[name] = g.copy()
        ops.device_update(ops.Pairs(outcome[name], law=law, seed=1, **WINDOW), dw, w_max=w_max, step=step)
    np.testing.assert_array_equal(outcome["spread-1"], outcome["spread-2"])
    moved = dw[0].T != 0
    assert (outcome["noise-1"] != outcome["noise-2"])[0][moved].mean() > 0.9


def test_parameters_of_a_device_are_independent_normals():
    """Two of them come from one word."""
    law = SoftBounds(step_spread=0.1, asymmetry_spread=0.1, low_spread=0.1, high_spread=0.1, spread=0.1)
    devices = Cells.draw(law.model_dump(), np.arange(200), 100, 0, SEED, -np.inf)
    z = np.stack(
        [
            (devices.gain_up + devices.gain_down - 2) / 0.2, (devices.gain_up - devices.gain_down) / 0.2,
            devices.low / 0.1, (devices.high - 1) / 0.1, devices.z_up, devices.z_down,
        ]
    ).reshape(6, -1)  # fmt: skip
    covariance = z @ z.T / z.shape[1]
    np.testing.assert_allclose(covariance, np.eye(6), atol=5 * np.sqrt(2 / z.shape[1]))
    np.testing.assert_allclose(np.cov(z**2) / 2, np.eye(6), atol=0.15)  # nor do their sizes go together


def test_stuck_cells_are_those_of_programming():
    w_max = np.ones(40, np.float32)
    rates = {"stuck_at_g_min": 0.1, "stuck_at_g_max": 0.2}
    # half of the window on the positive plane; the negative one holds g_min, where its stuck-low cells do not show
    g = reference.program(np.full((1, 40, 50), 0.5), w_max=w_max, **WINDOW, **rates, seed=5).astype(
        np.float32
    )[:1]
    g = np.concatenate([g, np.full_like(g, 5e-6)])
    before = g.copy()
    pairs = ops.Pairs(g, law=Agarwal(), programming=Programming(**rates), seed=5, **WINDOW)
    ops.device_update(pairs, np.full((1, 40, 50), 0.1, np.float32), w_max=w_max)
    stuck = (before[0] == np.float32(G_MAX)) | (before[0] == np.float32(G_MIN))
    assert stuck.mean() == pytest.approx(0.3, abs=4 * np.sqrt(0.3 * 0.7 / stuck.size))
    np.testing.assert_array_equal(g[0] == before[0], stuck)


def test_results_stay_inside_the_window_and_do_not_depend_on_threads(same_on_threads):
    start, dw, w_max = case(2, 90, 65, size=3.0)

    def updated():
        pairs = ops.Pairs(start.copy(), law=Agarwal(nu=3, gamma=0.5), seed=2, **WINDOW)
        return pairs.g, ops.device_update(pairs, dw, w_max=w_max)

    g, _ = same_on_threads(updated)
    assert g.min() >= np.float32(G_MIN) * (1 - 1e-6)
    assert g.max() <= np.float32(G_MAX) * (1 + 1e-6)


@pytest.mark.parametrize("g_max", [9.0313e-6, 1.1e-5, 9.5857e-5])
def test_no_conductance_is_negative(g_max):
    """Of devices whose own windows would begin below 0."""
    g, dw, w_max = case(2, 90, 65, size=3.0)
    law = ConstantStep(low_spread=0.5, sides="reference")
    ops.device_update(ops.Pairs(g, law=law, g_min=G_MIN, g_max=g_max), -np.abs(dw), w_max=w_max)
    assert g.min() == pytest.approx(0.0, abs=1e-12)
    assert g.min() >= 0


BAD = {
    "dtype": ({"dw": np.zeros((1, 4, 3))}, TypeError, "`dw` must be an array of float32, got float64"),
    "shape": ({"dw": np.zeros((1, 3, 4), np.float32)}, ValueError, r"`g` must have shape \(2, 4, 3\) for dw \(1, 3, 4\), got \(2, 3, 4\)"),
    "w_max": ({"w_max": np.ones(3, np.float32)}, ValueError, r"`w_max` must have shape \(4,\)"),
    "nan": ({"dw": np.full((1, 4, 3), np.nan, np.float32)}, ValueError, "`dw` must be finite, got 12 NaN"),
    "factor": ({"factor": -math.inf}, ValueError, "`factor` must be finite, got -inf; lower the rate"),
    "out": ({"out": np.empty((1, 3, 4), np.float32)}, ValueError, r"`out` must have shape \(1, 4, 3\) for dw"),
    "out-dtype": ({"out": np.empty((1, 4, 3))}, TypeError, "`out` must be an array of float32, got float64"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_changes_nothing(name):
    change, error, text = BAD[name]
    pairs = ops.Pairs(np.full((2, 3, 4), 5e-6, np.float32), law=Agarwal(nu=1), **WINDOW)
    values = {"dw": np.zeros((1, 4, 3), np.float32), "w_max": np.ones(4, np.float32), **change}
    with pytest.raises(error, match=f"^device_update: {text}"):
        ops.device_update(pairs, **values)
    assert (pairs.g == np.float32(5e-6)).all()
