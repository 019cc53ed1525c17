"""Endurance: counts and failures against the oracle, log-normal limits, and layers whose devices wear out."""

from __future__ import annotations

from math import erf, log

import numpy as np
import pytest
import torch
from cuda_shim import ShimDevice
from test_in_situ_devices import train

import gpuxbar as gx
from gpuxbar import ops, reference
from gpuxbar.spec import ConstantStep, Endurance, Programming, PulseTrain, SoftBounds

WINDOW = {"g_min": 1e-6, "g_max": 10e-6}  # S
RANGE = 9e-6
SEED = 2**40 + 7
STUCK = Programming(stuck_at_g_min=0.05, stuck_at_g_max=0.03)
LIMIT = Endurance(pulses=100, spread=0.5)
LAWS = {
    "held": (ConstantStep(pulses=50, cycle=0.1), LIMIT),
    "g_max": (SoftBounds(pulses=50, integer_pulses=True), LIMIT.model_copy(update={"failed": "g_max"})),
    "write-noise": (SoftBounds(pulses=50, write_noise=1e-7), LIMIT.model_copy(update={"failed": "g_min"})),
    "one-sided": (ConstantStep(pulses=50, sides="one_sided"), LIMIT.model_copy(update={"spread": 0.0})),
}


def case(groups, outputs, inputs, seed=0):
    rng = np.random.default_rng(seed)
    g = rng.uniform(1e-6, 10e-6, (2, groups * inputs, outputs)).astype(np.float32)
    count = rng.integers(0, 100, g.shape).astype(np.int32)
    count[rng.random(g.shape) < 0.1] *= -1
    w_max = rng.uniform(0.5, 2.0, groups * outputs).astype(np.float32)
    return rng, g, count, w_max


def worn(g, count, law, endurance, g_held=None):
    """Pairs of copies of these arrays, some of them stuck."""
    held = None if g_held is None else g_held.copy()
    return ops.Pairs(
        g.copy(), law=law, endurance=endurance, pulse_count=count.copy(), g_held=held, programming=STUCK, seed=SEED, **WINDOW
    )  # fmt: skip


def assert_alike(found, expected, was):
    """(conductances, counts): equal counts but for parts of a pulse on a rounding edge."""
    (cells, count), (wanted, wanted_count) = found, expected
    off = count != wanted_count
    assert off.mean() < 2e-3
    np.testing.assert_allclose(cells[~off], wanted[~off], rtol=0, atol=5e-6 * RANGE)
    np.testing.assert_array_equal(cells[was[1] < 0], was[0][was[1] < 0])
    np.testing.assert_array_equal(count[was[1] < 0], was[1][was[1] < 0])
    assert 0.02 < ((count < 0) & (was[1] >= 0)).mean() < 0.5 or count.size < 1000


@pytest.mark.parametrize("kernel", [False, True], ids=["host", "kernel"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 37, 35), (1, 64, 40)])
@pytest.mark.parametrize("name", LAWS)
def test_expected_updates_match_the_oracle(name, shape, kernel):
    if kernel and name != "write-noise":
        return  # the same lines of the kernel, compiled for another law
    law, endurance = LAWS[name]
    rng, g, count, w_max = case(*shape)
    dw = rng.normal(0, 0.6, shape).astype(np.float32)
    dw[rng.random(shape) < 0.2] = 0.0
    g_held = g + np.float32(5e-8) if law.write_noise else None
    pairs, how = worn(g, count, law, endurance, g_held), {"w_max": w_max, "step": 3}
    oracle = {**pairs.plain, "pulse_count": count.copy()}
    wanted, _, _ = reference.device_update(g, dw, g_held=g_held, **oracle, **how)
    ops.device_update(pairs, dw, device=ShimDevice(order=11) if kernel else None, **how)
    assert_alike((pairs.g, pairs.pulse_count), (wanted, oracle["pulse_count"]), (g, count))


@pytest.mark.parametrize("kernel", [False, True], ids=["host", "kernel"])
@pytest.mark.parametrize("mode", ["exact", "aggregated"])
@pytest.mark.parametrize("name", LAWS)
def test_pulse_trains_match_the_oracle(name, mode, kernel):
    law, endurance = LAWS[name]
    if (kernel and name == "g_max") or (mode == "aggregated" and law.law == "soft_bounds"):
        return  # another law of the same lines; no aggregate of one whose pulses do not commute
    rng, g, count, w_max = case(2, 37, 35)
    x, d = (rng.normal(0, 1, (6, n)).astype(np.float32) for n in (70, 74))
    train = PulseTrain(length=31, mode=mode)
    g_held = g + np.float32(5e-8) if law.write_noise else None
    pairs, how = worn(g, count, law, endurance, g_held), {"rate": 0.3, "w_max": w_max, "groups": 2, "step": 3}
    oracle = {**pairs.plain, "pulse_count": count.copy()}
    wanted, held, _ = reference.pulse_update(
        g, x, d, train=train.model_dump(), g_held=g_held, **oracle, **how
    )
    ops.pulse_update(pairs, x, d, train=train, device=ShimDevice(order=12) if kernel else None, **how)
    assert_alike((pairs.g, pairs.pulse_count), (wanted, oracle["pulse_count"]), (g, count))
    if g_held is not None:
        assert_alike((pairs.g_held, pairs.pulse_count), (held, oracle["pulse_count"]), (g_held, count))


def drive(change, updates, law, endurance, shape=(1, 100, 100)):
    """Counts after updates that ask every pair for +-change of its weight in turns, and the cells."""
    g = np.full((2, shape[2], shape[1]), 5.5e-6, np.float32)
    count, path = np.zeros(g.shape, np.int32), []
    pairs = ops.Pairs(g, law=law, endurance=endurance, pulse_count=count, seed=SEED, **WINDOW)
    for step in range(updates):
        dw = np.full(shape, change if step % 2 else -change, np.float32)
        ops.device_update(pairs, dw, w_max=np.ones(shape[1], np.float32), step=step)
        path.append((g.copy(), count.copy()))
    return path


def test_limits_are_log_normal():
    law, median, spread = ConstantStep(pulses=1000, integer_pulses=True), 40, 0.6
    path = drive(2 * 5 / 1000, 30, law, Endurance(pulses=median, spread=spread))
    for update, (_, count) in enumerate(path, 1):
        failed = (1 + erf(log(5 * update / median) / spread / 2**0.5)) / 2
        assert (count < 0).mean() == pytest.approx(
            failed, abs=4 * (max(failed * (1 - failed), 5e-5) / 20000) ** 0.5
        )
        assert (count[count >= 0] == 5 * update).all()


def test_parts_of_a_pulse_count_in_the_mean():
    law = ConstantStep(pulses=1000)
    _, count = drive(2 * 0.3 / 1000, 200, law, Endurance(pulses=1e6))[-1]
    assert count.mean() == pytest.approx(60, abs=4 * (200 * 0.21) ** 0.5 / 141)
    assert count.std() == pytest.approx((200 * 0.21) ** 0.5, rel=0.03)


@pytest.mark.parametrize("failed", ["held", "g_min", "g_max"])
def test_failed_devices_stay_where_they_failed(failed):
    path = drive(0.05, 12, ConstantStep(pulses=100), Endurance(pulses=15, spread=0.3, failed=failed))
    (before, count), (after, _) = path[6], path[-1]
    dead = count < 0
    assert 0.1 < dead.mean() < 1
    np.testing.assert_array_equal(after[dead], before[dead])
    if failed != "held":
        np.testing.assert_allclose(after[dead], WINDOW[failed], rtol=1e-6)


def layer_on(**overrides):
    torch.manual_seed(0)
    spec = {
        "update": {"law": "constant_step", "pulses": 200, "cycle": 0.1},
        "endurance": {"pulses": 20, "spread": 0.5, "failed": "g_max"},
        "retention": {"tau": 100.0},
    }
    return gx.nn.AnalogLinear(12, 7, bias=False, spec=gx.CrossbarSpec.model_validate({**spec, **overrides}))


TRAINED = {
    "expected": {},
    "trains": {"pulses": {"length": 15}, "endurance": {"pulses": 40, "spread": 0.5, "failed": "g_max"}},
}


@pytest.mark.parametrize("name", TRAINED)
def test_layers_wear_out_and_resume_bit_for_bit(name):
    whole, first, second = (layer_on(**TRAINED[name]) for _ in range(3))
    for layer in (whole, first):
        optimiser = gx.optim.InSituSGD(layer.parameters(), lr=0.3)
        assert layer.worn() == 0
        train(layer, optimiser, 10)
    assert 0.05 < whole.worn() < 0.95
    dead = first.pulse_count < 0
    stuck = first.g_cells[dead].clone()
    second.load_state_dict(first.state_dict())
    train(whole, gx.optim.InSituSGD(whole.parameters(), lr=0.3), 3, seed=1)
    train(second, gx.optim.InSituSGD(second.parameters(), lr=0.3), 3, seed=1)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    assert torch.equal(second.g_cells[dead], stuck)
    torch.testing.assert_close(stuck, torch.full_like(stuck, second.spec.device.g_max), rtol=1e-6, atol=0)
    second.refresh()
    assert torch.equal(second.g_cells[dead], stuck)


def test_arrays_beside_a_layer_wear_out_too():
    layer = layer_on()
    optimiser = gx.optim.build_optimizer("tiki-taka-v2", layer, lr=0.01)
    train(layer, optimiser, 5)
    assert optimiser.parts[layer.weight].array.worn() > layer.worn()


def test_pulses_that_lead_an_array_to_its_symmetry_points_count():
    layer = layer_on(endurance={"pulses": 1e6})
    optimiser = gx.optim.build_optimizer("tiki-taka-v2", layer, lr=0.01, zero_shift=2)
    count = optimiser.parts[layer.weight].array.pulse_count
    assert (count - 2 * 170).abs().max() <= 2 * 8  # each update's are rounded to whole ones
    assert not layer.pulse_count.any()


def test_without_an_endurance_nothing_is_counted():
    layer = layer_on(endurance={})
    train(layer, gx.optim.InSituSGD(layer.parameters(), lr=0.3), 3)
    assert layer.pulse_count is None
    assert layer.worn() == 0
    assert "pulse_count" not in layer.state_dict()


def test_opcheck():
    spec = layer_on(pulses={"length": 15}).spec.model_dump_json()
    g, count = torch.rand(2, 5, 6) * 9e-6 + 1e-6, torch.zeros(2, 5, 6, dtype=torch.int32)
    step = torch.ones(1, dtype=torch.int64)
    pairs = (g, None, count, None, spec, 3)
    change = (torch.randn(1, 6, 5), -0.1, torch.empty(1, 6, 5), torch.ones(6), step)
    torch.library.opcheck(torch.ops.gpuxbar.device_update.default, (*pairs, *change))
    how = (torch.ones(6), step, 0.1, 1)
    vectors, images = (
        tuple(torch.randn(n, lines, *size) for lines in (5, 6)) for n, size in ((4, ()), (2, (4, 3)))
    )
    weight = torch.empty(1, 6, 5)
    torch.library.opcheck(torch.ops.gpuxbar.pulse_update.default, (*pairs, *vectors, weight, *how))
    patch = [1, 1, 1, 1, 0, 0, 1, 1]
    torch.library.opcheck(
        torch.ops.gpuxbar.pulse_update.default, (*pairs, *images, weight, *how, patch, torch.ones(5))
    )
    torch.library.opcheck(torch.ops.gpuxbar.relax.default, pairs)
