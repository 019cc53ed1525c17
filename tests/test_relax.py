"""relax: closed forms, both kernels against the float64 oracle, and layers that lose weight while they are trained."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from cuda_shim import REVERSE, ShimDevice
from test_in_situ_devices import trained_and_resumed

import gpuxbar as gx
from gpuxbar import ops, reference
from gpuxbar.spec import Carry, ConstantStep, Endurance, Programming, Retention

WINDOW = {"g_min": 1e-6, "g_max": 10e-6}  # S
SEED = 2**40 + 7
STUCK = {"stuck_at_g_min": 0.1, "stuck_at_g_max": 0.05}


def case(shape, seed=0):
    return np.random.default_rng(seed).uniform(1e-6, 10e-6, shape).astype(np.float32)


def pairs_of(g, **more):
    return ops.Pairs(g, **{"law": ConstantStep(), "seed": SEED, **WINDOW, **more})


def relaxed(g, law, device=None, time=None, **rates):
    """Conductances some time later, of pairs whose stuck cells have these rates."""
    pairs = pairs_of(g.copy(), programming=Programming(**rates))
    ops.relax(pairs, law, time=time, device=device)
    return pairs.g


@pytest.mark.parametrize("kernel", [False, True], ids=["host", "kernel"])
@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 5, 67), (2, 4, 72), (2, 0, 4), (2, 4, 0)])
def test_backends_match_the_oracle(shape, kernel):
    g = case(shape)
    for spread, rest, time in ((0.0, None, 1.0), (0.7, 4e-6, 30.0), (2.0, 0.0, 1e4)):
        law = Retention(tau=100.0, spread=spread, g_rest=rest)
        device = ShimDevice(order=REVERSE) if kernel else None
        found = relaxed(g, law, device, time=time, **STUCK)
        expected = reference.relax(
            g, g_rest=1e-6 if rest is None else rest, rate=time / 100, spread=spread, seed=SEED,
            stuck_low=STUCK["stuck_at_g_min"], stuck_high=STUCK["stuck_at_g_max"],
        )  # fmt: skip
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * 9e-6)


@pytest.mark.parametrize("where", ["host", "kernel", "reference"])
def test_what_noisy_devices_hold_decays_as_what_they_show(where, monkeypatch):
    """Of slices too; failed devices keep both."""
    if where == "reference":
        monkeypatch.setattr("gpuxbar.launch.host.WANTED", where)
    shown, held = case((6, 5, 7)), case((6, 5, 7), seed=1)
    count = np.random.default_rng(2).integers(-1, 2, shown.shape).astype(np.int32)
    pairs = pairs_of(
        shown.copy(), law=ConstantStep(write_noise=1e-7), g_held=held.copy(), slice_bits=2, carry=Carry(),
        endurance=Endurance(pulses=9), pulse_count=count,
    )  # fmt: skip
    ops.relax(
        pairs, Retention(tau=3.0, spread=0.5), device=ShimDevice(order=REVERSE) if where == "kernel" else None
    )
    for found, before in ((pairs.g, shown), (pairs.g_held, held)):
        later = reference.relax(before, g_rest=1e-6, rate=1 / 3, spread=0.5, seed=SEED)
        np.testing.assert_allclose(found, np.where(count < 0, before, later), rtol=0, atol=2e-6 * 9e-6)


@pytest.mark.parametrize("rate", [1e-6, 1e-3, 1.0, 20.0])
def test_decay_is_exponential_and_steps_add_up(rate):
    """To 1 % of the change at a millionth a step, where it is ten steps of float32."""
    g = case((2, 50, 60))
    law = Retention(tau=1.0, step_time=rate, g_rest=0.0)
    lost = g.astype(np.float64) - relaxed(g, law)
    assert lost.sum() / (g.sum(dtype=np.float64) * -np.expm1(-rate)) == pytest.approx(1, abs=0.01)
    twice = relaxed(relaxed(g, law), law)
    np.testing.assert_allclose(twice, relaxed(g, law, time=2 * rate), rtol=5e-7, atol=1e-14)


def test_time_constants_are_log_normal_and_stay():
    g = np.full((2, 100, 100), 5e-6, np.float32)
    law = Retention(tau=50.0, spread=0.4, g_rest=1e-6)
    taus = [-t / np.log((relaxed(g, law, time=t) - 1e-6) / 4e-6) for t in (5.0, 20.0)]
    np.testing.assert_allclose(*taus, rtol=1e-3)
    assert np.log(taus[0]).mean() == pytest.approx(np.log(50), abs=4 * 0.4 / 141)
    assert np.log(taus[0]).std() == pytest.approx(0.4, rel=0.03)


def test_stuck_cells_are_those_that_programming_draws():
    weight = np.ones((1, 30, 40), np.float32)
    g = ops.program(
        weight, w_max=np.ones(1, np.float32), programming=Programming(**STUCK), seed=SEED, **WINDOW
    )
    stuck = np.stack([g[0] == np.float32(1e-6), g[1] == np.float32(10e-6)])
    kept = relaxed(np.full_like(g, 5e-6), Retention(tau=1.0), **STUCK) == np.float32(5e-6)
    assert kept.mean() == pytest.approx(0.15, abs=0.03)
    assert (kept | ~stuck).all()


def test_without_a_time_constant_nothing_is_lost():
    g = case((2, 7, 9))
    np.testing.assert_array_equal(relaxed(g, Retention()), g)


def layer_on(**overrides):
    torch.manual_seed(0)
    spec = {"update": {"law": "soft_bounds", "cycle": 0.1}, "retention": {"tau": 50.0, "step_time": 5.0}}
    return gx.nn.AnalogLinear(12, 7, bias=False, spec=gx.CrossbarSpec.model_validate({**spec, **overrides}))


def test_weights_decay_in_every_step_whether_they_are_written_or_not():
    layer = layer_on()
    optimiser = gx.optim.InSituSGD(layer.parameters(), lr=0.1)
    before = layer.weight.detach().clone()
    for step in range(1, 4):
        optimiser.step()  # no gradient
        torch.testing.assert_close(layer.weight.detach(), before * np.exp(-0.1 * step), rtol=1e-5, atol=1e-6)
    x = torch.randn(5, 12)
    torch.testing.assert_close(layer(x), x @ layer.weight.T, rtol=1e-4, atol=1e-5)


def test_arrays_beside_a_layer_decay_too():
    layer = layer_on()
    optimiser = gx.optim.build_optimizer("tiki-taka-v2", layer, lr=0.01, transfer_every=100)
    layer(torch.randn(5, 12)).square().sum().backward()
    optimiser.step()
    fast = optimiser.parts[layer.weight].array
    before = fast.weight.clone()
    layer.weight.grad = None
    optimiser.step()
    assert before.abs().max() > 0
    torch.testing.assert_close(fast.weight.detach(), before.detach() * np.exp(-0.1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("pulses", "write_noise"), [(None, 0.0), (None, 1e-8), ({"length": 15}, 0.0), ({}, 1e-8)]
)
def test_a_resumed_run_equals_an_uninterrupted_one(pulses, write_noise):
    overrides = {
        "update": {"law": "soft_bounds", "cycle": 0.1, "write_noise": write_noise}, "pulses": pulses,
        "retention": {"tau": 50.0, "spread": 0.3, "g_rest": 3e-6}, "programming": {"stuck_at_g_min": 0.1},
    }  # fmt: skip
    trained_and_resumed(partial(layer_on, **overrides))


def test_opcheck():
    spec = layer_on().spec.model_dump_json()
    pairs = (torch.rand(2, 5, 6) * 1e-5, None, None, None, spec, 3)
    torch.library.opcheck(torch.ops.gpuxbar.relax.default, pairs)


@pytest.mark.parametrize(
    ("value", "time", "text"),
    [
        (5e-6, 0.0, "`time` must be above 0 s, got 0 s; give the time that passes"),
        (np.nan, None, "`g` must be finite, got 12 NaN or infinite"),
    ],
    ids=["time", "nan"],
)
def test_bad_input_is_named_and_changes_nothing(value, time, text):
    pairs = pairs_of(np.full((2, 2, 3), value, np.float32))
    before = pairs.g.copy()
    with pytest.raises(ValueError, match=f"^relax: {text}"):
        ops.relax(pairs, Retention(tau=1.0), time=time)
    np.testing.assert_array_equal(pairs.g, before)


def test_what_noisy_devices_hold_must_be_finite():
    g = case((2, 2, 3))
    pairs = pairs_of(g.copy(), law=ConstantStep(write_noise=1e-7), g_held=np.full_like(g, np.inf))
    with pytest.raises(ValueError, match=r"^relax: `g_held` must be finite, got 12 NaN or infinite"):
        ops.relax(pairs, Retention(tau=1.0))
    np.testing.assert_array_equal(pairs.g, g)
