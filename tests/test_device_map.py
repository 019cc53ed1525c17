"""Measured devices in place of drawn ones: kernels against the oracle, measured parameters against what devices do."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from cuda_shim import REVERSE, ShimDevice
from torch.nn.utils import prune

import gpuxbar as gx
from gpuxbar import ops, reference
from gpuxbar.nn import AnalogLinear
from gpuxbar.nn.measured import HALVES
from gpuxbar.optim import InSituSGD
from gpuxbar.spec import (
    Agarwal,
    AgarwalSymmetric,
    Carry,
    ConstantStep,
    CrossbarSpec,
    ExponentialStep,
    LinearStep,
    NeuroSim,
    PiecewiseStep,
    PowerStep,
    PulseTrain,
    SoftBounds,
)

G_MIN, G_MAX = 1e-6, 10e-6  # S
SPAN = G_MAX - G_MIN
WINDOW = {"g_min": G_MIN, "g_max": G_MAX}
GROUPS, OUTPUTS, INPUTS = 2, 71, 37
SHAPE = (2, GROUPS * INPUTS, OUTPUTS)
ALL = {"step_spread": 0.3, "asymmetry_spread": 0.1, "low_spread": 0.1, "high_spread": 0.05, "spread": 0.2}
LAWS = {
    "all": LinearStep(slope_up=0.5, slope_down=0.3, pulses=60, cycle=0.2, **ALL),
    "steps": ConstantStep(pulses=60, step_spread=0.3, lognormal_steps=True),
    "top-and-shape": SoftBounds(pulses=60, high_spread=0.1, spread=0.3),
    "one-way": NeuroSim(nonlinearity_ltp=2.0, levels=60, spread=0.5, asymmetry_spread=0.2),
}
MADE = {**WINDOW, "seed": 5}
HOW = {"w_max": np.full(GROUPS * OUTPUTS, 0.7, np.float32), "step": 3}
DEVICES = {"host": None, "kernel": ShimDevice(order=REVERSE)}


def random_map(law, rng):
    return rng.normal(0, 1, (len(ops.spread_names(law)), *SHAPE)).astype(np.float16)


def cells(rng):
    return rng.uniform(G_MIN, G_MAX, SHAPE).astype(np.float32)


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("name", LAWS)
def test_update_matches_oracle(name, where):
    law, rng = LAWS[name], np.random.default_rng(1)
    g, devices = cells(rng), random_map(law, rng)
    dw = rng.normal(0, 0.2, (GROUPS, OUTPUTS, INPUTS)).astype(np.float32)
    planes = dict(zip(ops.spread_names(law), devices, strict=True))
    _, held, weights = reference.device_update(g, dw, law=law.model_dump(), device_map=planes, **MADE, **HOW)
    new, drawn = (ops.Pairs(g.copy(), law=law, device_map=known, **MADE) for known in (devices, None))
    read = ops.device_update(new, dw, device=DEVICES[where], **HOW)
    np.testing.assert_allclose(new.g, held, rtol=0, atol=1e-5 * SPAN)
    np.testing.assert_allclose(read, weights, rtol=0, atol=2e-5)
    ops.device_update(drawn, dw, device=DEVICES[where], **HOW)
    assert np.abs(new.g - drawn.g).max() > 1e-3 * SPAN


@pytest.mark.parametrize("where", DEVICES)
def test_slices_have_devices_of_their_own(where):
    law, rng, rule = LAWS["all"], np.random.default_rng(6), Carry()
    g = np.concatenate([cells(rng) for _ in range(3)])
    devices = rng.normal(0, 1, (len(ops.spread_names(law)), *g.shape)).astype(np.float16)
    dw = rng.normal(0, 0.2, (GROUPS, OUTPUTS, INPUTS)).astype(np.float32)
    planes = dict(zip(ops.spread_names(law), devices, strict=True))
    _, held, _ = reference.device_update(
        g, dw, law=law.model_dump(), device_map=planes, carry=rule.model_dump(), slices=3, slice_bits=2, **MADE, **HOW
    )  # fmt: skip
    pairs = ops.Pairs(g, law=law, device_map=devices, carry=rule, slice_bits=2, **MADE)
    ops.device_update(pairs, dw, device=DEVICES[where], **HOW)
    np.testing.assert_allclose(g, held, rtol=0, atol=1e-5 * SPAN)


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("mode", ["exact", "aggregated"])
def test_pulses_match_oracle(mode, where):
    law, rng = LAWS["all"] if mode == "exact" else LAWS["steps"], np.random.default_rng(2)
    g, devices, train = cells(rng), random_map(law, rng), PulseTrain(length=7, mode=mode)
    x = rng.normal(0, 1, (3, GROUPS * INPUTS)).astype(np.float32)
    d = rng.normal(0, 1, (3, GROUPS * OUTPUTS)).astype(np.float32)
    how = {**HOW, "rate": 0.02, "groups": GROUPS}
    planes = dict(zip(ops.spread_names(law), devices, strict=True))
    expected, *_ = reference.pulse_update(
        g, x, d, law=law.model_dump(), device_map=planes, train=train.model_dump(), **MADE, **how
    )
    new = ops.Pairs(g.copy(), law=law, device_map=devices, **MADE)
    ops.pulse_update(new, x, d, train=train, device=DEVICES[where], **how)
    np.testing.assert_allclose(new.g, expected, rtol=0, atol=1e-5 * SPAN)
    assert np.abs(new.g - g).max() > 1e-2 * SPAN


@pytest.mark.parametrize("where", DEVICES)
def test_a_drawn_map_is_what_the_seed_draws(where):
    law, rng = LAWS["all"], np.random.default_rng(3)
    drawn = cells(rng)
    stored = drawn.copy()
    dw = rng.normal(0, 0.2, (GROUPS, OUTPUTS, INPUTS)).astype(np.float32)
    devices = ops.draw_device_map(law, SHAPE, seed=MADE["seed"])
    for g, more in ((drawn, {}), (stored, {"device_map": devices})):
        ops.device_update(ops.Pairs(g, law=law, **MADE, **more), dw, device=DEVICES[where], **HOW)
    assert (drawn != stored).any()
    np.testing.assert_allclose(stored, drawn, rtol=0, atol=1e-3 * SPAN)  # 11 bits of at most 5 spreads of 0.3


def pulse(g, devices, law, pulses):
    """Shares of the window that every first device moves by nominal pulses."""
    new = ops.Pairs(g.copy(), law=law, device_map=devices, **WINDOW)
    dw = np.full((1, OUTPUTS, INPUTS), pulses / law.nominal_pulses, np.float32)
    ops.device_update(new, dw, w_max=np.ones(OUTPUTS, np.float32))
    return (new.g[0] - g[0]) / SPAN


def test_devices_do_what_was_measured():
    """Steps, windows and bounds of measured devices come out of the update."""
    rng, shape = np.random.default_rng(4), (2, INPUTS, OUTPUTS)
    law = ConstantStep(
        pulses=1000, sides="reference", step_spread=0.2, asymmetry_spread=0.1, low_spread=0.1, high_spread=0.1
    )
    up, down = (rng.uniform(0.7, 1.5, shape) for _ in range(2))
    low, high = G_MIN + SPAN * rng.uniform(0, 0.2, shape), G_MAX - SPAN * rng.uniform(-0.1, 0.2, shape)
    devices = ops.device_map(law, **WINDOW, step_up=up, step_down=down, g_low=low, g_high=high)
    assert devices.shape == (4, *shape)
    middle = np.full(shape, (G_MIN + G_MAX) / 2, np.float32)
    np.testing.assert_allclose(pulse(middle, devices, law, 1) * 1000, up[0], atol=3e-3)
    np.testing.assert_allclose(-pulse(middle, devices, law, -1) * 1000, down[0], atol=3e-3)
    for pulses, end in ((1000, high), (-1000, low)):
        np.testing.assert_allclose(
            middle[0] + SPAN * pulse(middle, devices, law, pulses), end[0], atol=1e-3 * SPAN
        )


SHAPES = {
    "slope": (LinearStep(slope_up=0.5, slope_down=-0.2, spread=0.1), "slope_up", "slope_down"),
    "bound": (SoftBounds(up=1.5, down=0.8, spread=0.1), "up", "down"),
    "exponent": (PowerStep(exponent_up=0.5, exponent_down=1.5, spread=0.1), "exponent_up", "exponent_down"),
    "factor": (PiecewiseStep(up=(1.0, 0.5), down=(0.5, 1.0), spread=0.1), "up", "down"),
    "amplitude": (ExponentialStep(amplitude_up=-0.2, amplitude_down=0.1, rate_up=2, rate_down=2, a=0.5, spread=0.1), "amplitude_up", "amplitude_down"),
    "label": (NeuroSim(nonlinearity_ltp=2.0, nonlinearity_ltd=-1.0, levels=1000, spread=0.1), "nonlinearity_ltp", "nonlinearity_ltd"),
    "nu": (Agarwal(nu=2.0, spread=0.1), "nu", "nu"),
    "alpha": (AgarwalSymmetric(alpha=2.0, spread=0.1), "alpha", "alpha"),
}  # fmt: skip


@pytest.mark.parametrize("pulses", [100, -100])
@pytest.mark.parametrize("name", SHAPES)
def test_a_device_with_a_measured_shape_follows_the_law_with_it(name, pulses):
    law, *fields = SHAPES[name]
    law = law.model_copy(update={"sides": "reference"})
    factors, shape = (1.2, 0.7), (2, INPUTS, OUTPUTS)
    nominal = [1.0 if name == "factor" else getattr(law, field) for field in fields]
    up, down = (np.full(shape, value * factor) for value, factor in zip(nominal, factors, strict=True))
    devices = ops.device_map(law, **WINDOW, shape_up=up, shape_down=down)
    g = np.random.default_rng(5).uniform(G_MIN, G_MAX, shape).astype(np.float32)
    field, factor = (fields[0], factors[0]) if pulses > 0 else (fields[1], factors[1])
    value = getattr(law, field)
    changed = tuple(factor * v for v in value) if name == "factor" else factor * value
    own = law.model_copy(update={field: changed, "spread": 0.0})
    np.testing.assert_allclose(pulse(g, devices, law, pulses), pulse(g, None, own, pulses), rtol=0, atol=1e-4)
    assert (
        np.abs(
            pulse(g, None, own, pulses) - pulse(g, None, law.model_copy(update={"spread": 0.0}), pulses)
        ).max()
        > 1e-3
    )


SMALL = (2, 3, 4)
STEP = ConstantStep(step_spread=0.1)
ENDS = ConstantStep(low_spread=0.1, high_spread=0.1)
ERRORS = {
    "missing": (STEP, {"step_up": np.ones(SMALL)}, "`step_down` must be given for a law that spreads in step, got none"),
    "more": (STEP, {"step_up": np.ones(SMALL), "step_down": np.ones(SMALL), "g_low": np.ones(SMALL)}, "`g_low` must not be given .* got one; give the law the spread of it"),
    "alike": (ConstantStep(), {}, "`law` must have a spread, got 'constant_step' without"),
    "shape": (STEP, {"step_up": np.ones((3, 4)), "step_down": np.ones((3, 4))}, r"`step_up` must have shape \[2 slices, G \* I, O\], .* got \(3, 4\)"),
    "finite": (STEP, {"step_up": np.full(SMALL, np.nan), "step_down": np.ones(SMALL)}, "`step_up` must be finite, got nan"),
    "sign": (STEP, {"step_up": np.ones(SMALL), "step_down": -np.ones(SMALL)}, "must be at least 0, got -1; both are sizes"),
    "asymmetry": (STEP, {"step_up": np.ones(SMALL), "step_down": np.full(SMALL, 0.8)}, "asymmetry_spread=0 and a deviation of 0.1; set asymmetry_spread"),
    "unit": (ENDS, {"g_low": np.full(SMALL, G_MIN), "g_high": np.full(SMALL, 11.0)}, "`g_high` must be 0 to 0.0001 S, 10 times g_max, got 11 to 11; give it in S"),
    "crossed": (ENDS, {"g_low": np.full(SMALL, 6e-6), "g_high": np.linspace(4e-6, 9e-6, 24).reshape(SMALL)}, "`g_low` must be below `g_high` .* got 10 of .* swap them"),
    "above": (ConstantStep(low_spread=0.1), {"g_low": np.full(SMALL, G_MAX)}, "`g_low` must be below `g_high` .* got 24 of"),
    "far": (ConstantStep(low_spread=1e-7), {"g_low": np.full(SMALL, 1e-6)}, "within 65504 spreads of the nominal one, got .*; set the"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_bad_measurements_say_what_is_wrong(name):
    law, arrays, text = ERRORS[name]
    with pytest.raises(ValueError, match=f"device_map: .*{text}"):
        ops.device_map(law, g_min=0.0, g_max=G_MAX, **arrays)


@pytest.mark.parametrize("bad", [np.zeros((2, *SHAPE), np.float16), np.zeros((1, 2, 3, 4), np.float16)])
def test_a_map_of_other_devices_is_refused(bad):
    with pytest.raises(
        ValueError,
        match=r"^Pairs: `device_map` must have shape \(1, 2, 74, 71\) for a law that spreads in step, got",
    ):
        ops.Pairs(np.full(SHAPE, G_MIN, np.float32), law=LAWS["steps"], device_map=bad, **MADE)


def layer(seed=0):
    torch.manual_seed(seed)
    spec = CrossbarSpec(update={"law": "constant_step", "pulses": 500, "step_spread": 0.3}, seed=3)
    return AnalogLinear(5, 4, spec=spec, bias=False)


def train(model, steps):
    optimizer = InSituSGD(model.parameters(), lr=0.05)
    for k in range(steps):
        optimizer.zero_grad()
        model(torch.full((3, 5), 0.1 * (k + 1))).square().sum().backward()
        optimizer.step()


def test_a_layer_trains_its_measured_devices_and_saves_them():
    drawn, measured = layer(), layer()
    train(drawn, 1)
    train(measured, 1)
    step = np.full((2, 5, 4), 0.25)
    devices = ops.device_map(measured.spec.update, g_min=0.0, g_max=1.0, step_up=step, step_down=step)
    measured.set_device_map(devices)
    before = measured.weight.detach().clone()
    measured.update_cells(torch.full_like(before, 0.01))
    np.testing.assert_allclose((measured.weight - before).detach(), 0.0025, atol=1e-5)
    drawn.update_cells(torch.full_like(before, 0.01))
    assert not torch.equal(drawn.weight, measured.weight)
    loaded = layer(1)
    loaded.load_state_dict(measured.state_dict())
    for model in (measured, loaded):
        train(model, 2)
    assert torch.equal(loaded.weight, measured.weight)
    other = AnalogLinear(5, 4, spec=CrossbarSpec(update={"law": "constant_step"}), bias=False)
    with pytest.raises(
        ValueError, match=r"`state_dict` must hold a device_map of \(0, 2, 5, 4\) .* got \(1, 2, 5, 4\)"
    ):
        other.load_state_dict(measured.state_dict())
    assert not other.in_situ
    measured.set_device_map(None)
    assert "device_map" not in measured.state_dict()
    with pytest.raises(
        ValueError, match=r"`devices` must be float16 \(1, 2, 5, 4\) for this layer and its law, got"
    ):
        measured.set_device_map(devices[:, :, :3])
    with pytest.raises(ValueError, match=r"`devices` must be float16 .* got torch.float32"):
        measured.set_device_map(devices.astype(np.float32))


@pytest.mark.parametrize("name", ["tiki-taka", "tiki-taka-v2", "chopped-tiki-taka-v2", "agad"])
def test_a_fast_array_trains_its_own_measured_devices_and_saves_them(name):
    def begin(seed=0):
        slow = layer(seed)
        return slow, gx.optim.build_optimizer(name, slow, lr=0.05, lines=1)

    def gather(slow, optimiser):
        """What the fast array, and it alone, makes of a gradient."""
        slow.weight.grad = torch.ones_like(slow.weight)
        optimiser.step()
        return optimiser.parts[slow.weight].array.weight.detach().clone()

    slow, optimiser = begin()
    step = np.full((2, 5, 4), 0.25)
    devices = ops.device_map(slow.spec.update, g_min=0.0, g_max=1.0, step_up=step, step_down=step)
    optimiser.parts[slow.weight].array.set_device_map(devices)
    drawn, measured = gather(*begin()), gather(slow, optimiser)
    # all devices alike move alike
    torch.testing.assert_close(measured, measured[:1, :1].expand_as(measured), rtol=0, atol=1e-5)
    assert drawn.std() > 0.05 * drawn.abs().mean()
    assert slow.device_map is None
    again, resumed = begin(1)
    again.load_state_dict(slow.state_dict())
    resumed.load_state_dict(optimiser.state_dict())
    assert torch.equal(gather(again, resumed), gather(slow, optimiser))


def measured_conductances(*shape):
    """Some beyond the nominal window, as devices are."""
    return np.random.default_rng(1).uniform(0.5e-6, 1.1e-5, shape)


def pair_weights(g, w_max=2.0):
    return (w_max * (g[0] - g[1]) / SPAN).T


def test_measured_conductances_go_where_the_layer_is():
    model = AnalogLinear(5, 4, spec=CrossbarSpec(device=WINDOW, update={"law": "ideal"}), bias=False)
    g = measured_conductances(2, 5, 4)
    model.begin_in_situ()
    with torch.device("meta"):  # which holds no values
        model.set_conductances(g)
    np.testing.assert_allclose(model.g_cells, g, rtol=1e-6)


@pytest.mark.parametrize("law", [{"law": "ideal"}, {"law": "constant_step", "write_noise": 1e-8}])
@pytest.mark.parametrize(
    "wires", [{}, {"r_wordline": 900.0, "r_bitline": 900.0, "anchor": "ladder", "refresh_interval": 8}]
)
def test_training_goes_on_from_measured_conductances(law, wires):
    spec = CrossbarSpec.model_validate(
        {"tile": {"cols": 2}, "device": WINDOW, "update": law, "mapping": {"w_max": 2.0}, "parasitics": wires}
    )
    model = AnalogLinear(5, 4, spec=spec, bias=False)
    g = measured_conductances(2, 5, 4)
    train(model, 1)
    before = model(torch.eye(5))
    model.set_conductances(g)
    np.testing.assert_allclose(model.g_cells, g, rtol=1e-6)
    np.testing.assert_allclose(model.weight.detach(), pair_weights(g), atol=1e-6)
    seen = g
    if wires:
        tiles = np.ascontiguousarray(g.reshape(2, 5, 2, 2).swapaxes(1, 2), np.float32)
        seen = (
            ops.effective_conductance(tiles, r_wordline=900.0, r_bitline=900.0)
            .swapaxes(1, 2)
            .reshape(g.shape)
        )
    np.testing.assert_allclose(model(torch.eye(5)).detach().T, pair_weights(seen), atol=1e-5)
    assert not torch.allclose(model(torch.eye(5)), before)
    model.update_cells(torch.full_like(model.weight, 0.01).detach())
    inside = (g > G_MIN).all(0) & (g < 0.99 * G_MAX).all(0)
    moved = (model.weight.detach().numpy() - pair_weights(g))[inside.T]
    np.testing.assert_allclose(moved, 0.01, atol=0.02 if law.get("write_noise") else 1e-5)
    train(model, 2)


@pytest.mark.parametrize("scheme", ["differential", "offset"])
def test_programmed_layers_read_and_age_measured_conductances(scheme):
    spec = CrossbarSpec.model_validate(
        {"device": WINDOW, "mapping": {"scheme": scheme, "w_max": 2.0}, "drift": {"nu": 0.05}}
    )
    model = AnalogLinear(5, 4, spec=spec, bias=False)
    weight = model.weight.detach().clone()
    gx.program(model)
    if scheme == "differential":
        g = measured_conductances(2, 5, 4)
        held = pair_weights(g)
    else:  # behind the devices lie those of a reference wordline and bitline
        g = measured_conductances(1, 6, 5)
        g[:, 5] = g[:, :, 4] = 0.4 * G_MAX
        held = 2 * pair_weights(np.stack([g[0], np.full((6, 5), 0.4 * G_MAX)]))[:4, :5]
    gx.age(model, "1y")
    model.set_conductances(torch.as_tensor(g))
    np.testing.assert_allclose(model(torch.eye(5)).detach().T, held, atol=1e-5)
    if scheme == "differential":
        gx.age(model, "1d")
        np.testing.assert_allclose(model(torch.eye(5)).detach().T, held * (86420 / 20) ** -0.05, atol=1e-5)
    assert torch.equal(model.weight, weight)
    loaded = AnalogLinear(5, 4, spec=spec, bias=False)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded(torch.eye(5)), model(torch.eye(5)))


def test_measured_devices_have_the_1_f_noise_of_the_model_later_alone():
    spec = CrossbarSpec.model_validate(
        {"device": WINDOW, "mapping": {"w_max": 2.0}, "drift": {"flicker": 0.1}}
    )
    model, g = AnalogLinear(5, 4, spec=spec, bias=False), measured_conductances(2, 5, 4)
    gx.program(model)
    model.set_conductances(g)
    for restored in (model, copy.deepcopy(model), AnalogLinear(5, 4, spec=spec, bias=False)):
        restored.load_state_dict(model.state_dict())
        np.testing.assert_allclose(restored(torch.eye(5)).detach().T, pair_weights(g), atol=1e-5)
    gx.age(model, "1h")
    off = model(torch.eye(5)).detach().numpy().T - pair_weights(g)
    assert np.abs(off).mean() > 0.1
    gx.age(model, 0)
    np.testing.assert_allclose(model(torch.eye(5)).detach().T, pair_weights(g), atol=1e-5)
    gx.program(model)  # what is written has it from the beginning
    gx.age(model, 0)
    off = model(torch.eye(5)).detach().T - model.weight.detach()
    assert off.abs().mean() > 0.1


@pytest.mark.parametrize("programmed", [False, True])
def test_checkpoints_of_before_measured_devices_were_told_apart_hold_written_ones(programmed):
    spec = CrossbarSpec.model_validate({"device": WINDOW, "drift": {"flicker": 0.1}})
    model, restored = (AnalogLinear(5, 4, spec=spec, bias=False) for _ in range(2))
    gx.program(model)
    state = {name: value for name, value in model.state_dict().items() if name != "measured"}
    if programmed:
        gx.program(restored)
        restored.set_conductances(measured_conductances(2, 5, 4))
    restored.load_state_dict(state)
    assert torch.equal(restored(torch.eye(5)), model(torch.eye(5)))


def test_a_backward_pass_reads_what_was_measured_before():
    spec = CrossbarSpec.model_validate({"device": WINDOW, "mapping": {"scheme": "offset"}})
    model, g = AnalogLinear(5, 4, spec=spec, bias=False), measured_conductances(1, 6, 5)
    g[:, 5] = g[:, :, 4] = 0.4 * G_MAX
    x = torch.eye(5).requires_grad_()
    gx.program(model)
    model.set_conductances(g)
    y = model(x)
    model.set_conductances(0.5 * g)
    y.sum().backward()
    np.testing.assert_allclose(x.grad[0], y.detach().sum(1), rtol=1e-5, atol=1e-6)


def test_measured_devices_of_a_layer_of_zeros_carry_currents_to_calibrate_by():
    adc = {"adc": {"bits": 8}, "mapping": {"w_max": 2.0}}
    model = AnalogLinear(5, 4, spec=CrossbarSpec.model_validate({"device": WINDOW} | adc), bias=False)
    torch.nn.init.zeros_(model.weight)
    gx.program(model)
    with pytest.warns(RuntimeWarning, match="got none of linear forwards"):
        gx.calibrate(model, [torch.eye(5)])
    model.set_conductances(measured_conductances(2, 5, 4))
    gx.calibrate(model, [torch.eye(5)])
    assert model.adc_range < 0.5 * model.converters()[0].worst


@pytest.mark.parametrize(
    "wrong",
    [None, "g", [[1.0], [1.0, 2.0]], np.ones((2, 5, 4), complex), torch.ones(2, 5, 4, device="meta"), torch.ones(2, 5, 4).to_sparse()],
    ids=["none", "text", "ragged", "complex", "meta", "sparse"],
)  # fmt: skip
def test_what_is_no_array_of_real_numbers_was_not_measured(wrong):
    model = layer()
    gx.program(model)
    said = r"must be a NumPy array or a dense tensor of real numbers, got .*; convert it"
    with pytest.raises(TypeError, match=rf"linear: `g` {said}"):
        model.set_conductances(wrong)
    if wrong is not None:  # which takes a map away
        with pytest.raises(TypeError, match=rf"linear: `devices` {said}"):
            model.set_device_map(wrong)


def test_measured_conductances_that_no_layer_holds_are_refused():
    model = layer()
    g = measured_conductances(2, 5, 4)
    with pytest.raises(
        ValueError, match=r"linear: `set_conductances` must follow gpuxbar.program or begin_in_situ\(\), got"
    ):
        model.set_conductances(g)
    gx.program(model)
    with pytest.raises(
        ValueError, match=r"`g` must be \(2, 5, 4\) for this layer, got \(2, 4, 5\); give all planes"
    ):
        model.set_conductances(g.transpose(0, 2, 1))
    for wrong in (1e6 * g, -g, np.full_like(g, np.nan)):
        with pytest.raises(
            ValueError, match=r"`g` must be 0 to 0.0001 S, 10 times device.g_max, got .*; give it in S"
        ):
            model.set_conductances(wrong)
    gx.unprogram(model)
    model.begin_in_situ()
    gx.program(model)
    with pytest.raises(
        ValueError, match=r"`g` must wait until the layer is free, got one that is programmed"
    ):
        model.set_conductances(g)
    pruned = layer()
    pruned.begin_in_situ()
    prune.identity(pruned, "weight")
    with pytest.raises(
        ValueError, match=r"`weight` must be a parameter for set_conductances, got one that is"
    ):
        pruned.set_conductances(g)
    exact = {
        "precision": "int8",
        "device": {"levels": 16},
        "dac": {"bits": 8},
        "adc": {"bits": 8, "range": "worst_case"},
    }
    whole = AnalogLinear(5, 4, spec=CrossbarSpec.model_validate(exact))
    gx.program(whole)
    with pytest.raises(
        ValueError, match=r"`precision` must hold conductances between levels for measured ones, got 'int8'"
    ):
        whole.set_conductances(g)


def test_measured_conductances_are_converted_where_levels_need_not_be():
    binary = {
        "tile": {"rows": 15},
        "device": {"g_min": 0.0, "g_max": G_MAX, "levels": 2},
        "dac": {"bits": 4, "stream_bits": 1, "signed": False},
        "adc": {"bits": 4, "range": "worst_case"},
        "backward": {"mode": "ideal"},
    }
    g, x = np.zeros((2, 15, 4)), torch.zeros(1, 15)
    g[0], x[0, 0] = 0.53 * G_MAX, 1.0
    exact = AnalogLinear(15, 4, spec=CrossbarSpec.model_validate(binary), bias=False)
    gx.program(exact)
    with pytest.raises(
        ValueError, match=r"`programming.write_noise` must be above 0 S for measured .* 1e-15 S are enough"
    ):
        exact.set_conductances(g)
    noise = {"programming": {"write_noise": 1e-15}, "mapping": {"w_max": 1.0}}
    model = AnalogLinear(15, 4, spec=CrossbarSpec.model_validate(binary | noise), bias=False)
    gx.program(model)
    model.set_conductances(g)
    np.testing.assert_allclose(model(x).detach(), 1.0, rtol=1e-6)  # a step of the ADC


@pytest.mark.parametrize(
    "merge", [{"scheme": "differential"}, {"scheme": "subtracted"}, {"scheme": "offset"}]
)
@pytest.mark.parametrize("precision", ["fp16", "fp16x2", "bf16"])
def test_half_precisions_refuse_measured_conductances_that_overflow_them(precision, merge):
    converters = {"dac": {"bits": 8}, "adc": {"bits": 8, "range": "worst_case"}, "precision": precision}
    spec = CrossbarSpec.model_validate({"device": WINDOW, "mapping": merge | {"w_max": 2.0}} | converters)
    model = AnalogLinear(5, 4, spec=spec, bias=False)
    gx.program(model)
    inside = 1.4 * np.maximum(model.g_programmed.numpy(), 2 * SPAN)
    inside[1:] = 0.0
    model.set_conductances(inside)
    if precision == "bf16":
        model.set_conductances(3 * inside)
        return
    held = model.g_programmed.clone()
    with pytest.raises(
        ValueError, match=rf"`precision` must hold the measured conductances, got '{precision}'"
    ):
        model.set_conductances(3 * inside)
    assert torch.equal(model.g_programmed, held)


@pytest.mark.parametrize("precision", ["fp16", "fp16x2"])
def test_half_precisions_hold_the_measured_conductances_they_take(precision):
    g_range = 2.0**-17 * (1 - 2.0**-12)  # just below a power of 2: the largest that its scale makes
    g = np.full((1, 5, 4), HALVES * g_range, np.float32)
    device = {"precision": precision, "g_range": g_range, "device": ShimDevice()}
    read = ops.tile_mvm(np.ones((1, 5), np.int16), g, v_lsb=0.1, slice_scale=np.ones(1, np.float32), **device)
    np.testing.assert_allclose(read, 0.5 * g[:, 0], rtol=1e-3)
