"""drift: closed forms, the host kernel and the CUDA kernel (on the CPU) against the float64 oracle, and the messages."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_shim import FORWARD, REVERSE, ShimDevice

from gpuxbar import ops, reference
from gpuxbar.ops.drift import _flicker_step
from gpuxbar.spec import Drift, MeasuredDrift, presets

G_MAX = 25e-6  # S
YEAR = 3.15e7  # s
MEASURED = MeasuredDrift(
    ages=(100.0, 1e4, 4e7),
    shares=(0.1, 0.2, 0.7),
    shift=((0, 1e-7, -1e-7), (1e-7, 4e-7, -3e-7), (2e-7, 9e-7, -6e-7)),
    std=((1e-8, 1e-7, 3e-7), (0, 5e-7, 1e-6), (1e-7, 1e-6, 2e-6)),
    t_0=10.0,
)
SEED = 2**40 + 7
LAWS = {
    "ideal": Drift(),
    "exponent": Drift(nu=0.05, nu_slope=0.01, nu_max=0.08),
    "spread": Drift(nu=0.05, nu_std=0.02),
    "flicker": Drift(flicker=0.01, flicker_max=0.2),
    "pcm": presets.pcm().drift,
    "measured": MEASURED,
}


def case(shape, seed=0):
    g = np.random.default_rng(seed).uniform(0, 1.1 * G_MAX, shape).astype(np.float32)
    g[g < 0.1 * G_MAX] = 0.0
    return g


def oracle(g, age, law, step=9):
    where = {"seed": SEED, "step": step, "flicker_step": _flicker_step(step, age)}
    return reference.drift(g, age, law=law.model_dump(), g_max=G_MAX, **where)


def aged(g, age, law, device=None, step=9):
    return ops.drift(g, age, law=law, g_max=G_MAX, seed=SEED, step=step, device=device)


@pytest.mark.parametrize("where", ["host", "kernel", "reference"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 67), (3, 4, 72), (0, 3, 3), (1, 0, 4), (1, 4, 0)])
@pytest.mark.parametrize("name", LAWS)
def test_backends_match_the_oracle(name, shape, where, monkeypatch):
    """Bitlines not a multiple of 4, and a multiple (16-byte accesses)."""
    if where == "reference":
        monkeypatch.setattr("gpuxbar.launch.host.WANTED", where)
    g = case(shape)
    for age in (0.0, 3600.0, YEAR):
        found = aged(g, age, LAWS[name], ShimDevice(order=11) if where == "kernel" else None)
        # float32: about five operations, and an exponent of up to 14 times an exponent of up to 0.3
        np.testing.assert_allclose(found, oracle(g, age, LAWS[name]), rtol=0, atol=2e-6 * G_MAX)


@pytest.mark.parametrize("order", [REVERSE, 12])
@pytest.mark.parametrize("name", ["pcm", "measured"])
def test_kernel_gives_the_bits_of_any_thread_order(name, order):
    g = case((2, 70, 65))
    bits = [aged(g, YEAR, LAWS[name], ShimDevice(order=o)) for o in (FORWARD, order)]
    np.testing.assert_array_equal(*bits)


def test_an_ideal_device_keeps_its_bits():
    g = case((2, 9, 70))
    np.testing.assert_array_equal(aged(g, YEAR, Drift()), g)


def test_one_exponent_is_a_power_law():
    g = case((1, 20, 20))
    for age in (0.0, 1.0, 1e4, YEAR):
        found = aged(g, age, Drift(nu=0.06, t_0=2.0))
        np.testing.assert_allclose(found, g * (1 + age / 2.0) ** -0.06, rtol=3e-6, atol=0)


@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
def test_exponents_have_the_published_mean_and_spread(share):
    """Of 40,000 devices of one conductance: log g falls by nu ln(t / t_0)."""
    law = LAWS["pcm"].model_copy(update={"flicker": 0.0})
    g = np.full((4, 100, 100), share * G_MAX, np.float32)
    nu = -np.log(aged(g, YEAR, law) / g.astype(np.float64)) / np.log1p(YEAR / 20)
    mean = np.clip(-0.0155 * np.log(share) + 0.0244, 0.049, 0.1)
    std = np.clip(-0.0125 * np.log(share) - 0.0059, 0.008, 0.045)
    normal = np.random.default_rng(0).normal(mean, std, 10**6)
    assert nu.min() >= 0
    assert nu.mean() == pytest.approx(np.abs(normal).mean(), abs=4 * std / 200)
    assert nu.std() == pytest.approx(np.abs(normal).std(), rel=0.02)


@pytest.mark.parametrize(("share", "relative"), [(1.0, 0.0088), (0.5, 0.0088 / 0.5**0.65), (1e-4, 0.2)])
def test_low_frequency_noise_grows_with_the_root_of_log_time(share, relative):
    law = Drift(flicker=0.0088, flicker_exponent=0.65, flicker_max=0.2)
    g = np.full((4, 100, 100), share * G_MAX, np.float32)
    for age in (0.0, 1e6):
        wanted = relative * np.sqrt(np.log((20 + age + 250e-9) / 500e-9))
        noise = aged(g, age, law) / g.astype(np.float64) - 1
        clipped = np.maximum(
            wanted * np.random.default_rng(0).normal(size=10**6), -1
        )  # no conductance below 0
        assert noise.std() == pytest.approx(clipped.std(), rel=0.02)
        assert noise.mean() == pytest.approx(clipped.mean(), abs=4 * wanted / 200)


def test_an_age_is_one_draw_and_exponents_are_the_writes():
    g, law = case((1, 40, 40)), LAWS["flicker"]
    np.testing.assert_array_equal(aged(g, 60.0, law), aged(g, 60.0, law))
    device = g > 0
    noise = [
        aged(g, age, law, step=step)[device] / g[device] - 1 for age, step in ((60, 9), (61, 9), (60, 10))
    ]
    assert np.abs(np.corrcoef(noise) - np.eye(3)).max() < 4 / device.sum() ** 0.5
    nu = [np.log(aged(g, age, LAWS["spread"], step=step)[device]) - np.log(g[device]) for age, step in ((60, 9), (YEAR, 9), (60, 10))]  # fmt: skip
    assert np.corrcoef(nu[0], nu[1])[0, 1] > 0.999
    assert abs(np.corrcoef(nu[0], nu[2])[0, 1]) < 4 / device.sum() ** 0.5


@pytest.mark.parametrize(
    ("age", "share", "shift", "std"),
    [
        (0.0, 0.2, 0.0, 0.0),
        (100.0, 0.04, 0.0, 1e-8),  # below all shares
        (100.0, 0.2, 1e-7, 1e-7),
        (100.0, 0.45, 0.0, 2e-7),  # between shares
        (1e4, 0.9, -3e-7, 1e-6),  # above them
        (10 * (np.sqrt(11 * 1001) - 1), 0.2, 2.5e-7, 3e-7),  # half way between ages, by the logarithm
        (10 * (np.sqrt(11) - 1), 0.2, 5e-8, 5e-8),  # and before the first
        (4e7, 0.7, -6e-7, 2e-6),
    ],
)
def test_measured_changes_have_the_mean_and_spread_of_the_table(age, share, shift, std):
    g = np.full((4, 100, 100), share * G_MAX, np.float32)
    change = aged(g, age, MEASURED).astype(np.float64) - g
    assert change.mean() == pytest.approx(shift, abs=4 * std / 200 + 1e-11)
    assert change.std() == pytest.approx(std, rel=0.02, abs=1e-11)


def test_a_device_changes_one_way_at_all_ages_and_another_after_another_write():
    g = np.full((1, 50, 50), 0.5 * G_MAX, np.float32)
    found = [aged(g, age, MEASURED, step=step).ravel() for age, step in ((1e3, 9), (YEAR, 9), (1e3, 10))]
    together = np.corrcoef(found)
    assert together[0, 1] > 0.99999
    assert abs(together[0, 2]) < 4 / g.size**0.5


def test_the_preset_of_reram_has_the_measured_spread_around_what_was_aimed_at():
    """aihwkit's polynomials, in uS, of 40,000 devices of one conductance; none falls below 0 S from these."""
    spec = presets.reram()
    for share in (0.4, 0.6, 0.9):
        target = share * spec.device.g_max
        weight = np.full((1, 200, 200), (target - 1e-6) / (spec.device.g_max - 1e-6), np.float32)
        g = ops.program(
            weight,
            w_max=np.ones(1, np.float32),
            g_min=1e-6,
            g_max=spec.device.g_max,
            programming=spec.programming,
        )[:1]
        for age, terms in (
            (0.0, (0.348, 16.030, -43.853, 45.393, -16.815)),
            (86400.0, (0.701, 22.086, -50.773, 47.095, -16.458)),
            (172800.0, (0.782, 20.274, -43.507, 37.062, -11.934)),
        ):
            found = ops.drift(g, age, law=spec.drift, g_max=spec.device.g_max)
            wanted = 1e-6 * np.polynomial.polynomial.polyval(share, terms)
            # a device's change follows from what the write left, not from what it aimed at
            assert found.std() == pytest.approx(wanted, rel=0.03)
            assert found.mean() == pytest.approx(target, abs=4 * wanted / 200)


ERRORS = {
    "text": ({"age": "1h"}, TypeError, "`age` must be a number of seconds, got '1h'; gpuxbar.age takes text"),
    "law": ({"law": {"nu": 0.1}}, TypeError, r"`law` must be a gpuxbar\.spec\.Drift or MeasuredDrift, got dict; build one by Drift\(\.\.\.\)"),
    "age": ({"age": -1.0}, ValueError, "`age` must be finite and at least 0, got -1 s; count from programming"),
    "age-nan": ({"age": float("nan")}, ValueError, "`age` must be finite and at least 0, got nan s"),
    "late": ({"law": MEASURED, "age": 5e7}, ValueError, r"`age` must be at most 4e\+07 s, the last of `law.ages`, got 5e\+07 s; measure longer"),
    "window": ({"g_max": 0.0}, ValueError, "`g_max` must be finite and above 0, got 0 S; give"),
    "axes": ({"g": np.zeros((2, 3), np.float32)}, ValueError, "`g` must have 3 axes, got 2"),
    "dtype": ({"g": np.zeros((1, 2, 3))}, TypeError, "`g` must be an array of float32, got float64"),
    "nan": ({"g": np.full((1, 2, 3), np.nan, np.float32)}, ValueError, "`g` must be finite, got 6 NaN or infinite"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_named(name):
    change, kind, text = ERRORS[name]
    with pytest.raises(kind, match=f"^drift: {text}"):
        ops.drift(**{"g": case((1, 2, 3)), "age": 1.0, "law": Drift(), "g_max": G_MAX, **change})
