"""Programmed models: written once, aged, compensated, saved and freed again."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn

import gpuxbar as gx
from gpuxbar import ops, reference

CONVERTERS = {"dac": {"bits": 8}, "adc": {"bits": 8}}
SPECS = {
    "pcm": {},
    "converters": CONVERTERS,
    "subtracted": {**CONVERTERS, "mapping": {"scheme": "subtracted", "slices": 2, "slice_bits": 3}},
    "offset": {**CONVERTERS, "mapping": {"scheme": "offset"}, "read_noise": {"sigma": 1e-9, "sigma_g": 1e-8}},
    "wires": {**CONVERTERS, "read_noise": {"sigma_g": 1e-8}, "parasitics": {"r_wordline": 1.0, "r_bitline": 1.0}},
    "anchored": {**CONVERTERS, "parasitics": {"r_wordline": 1.0, "refresh_interval": 3, "anchor": "ladder"}},
}  # fmt: skip


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, dilation=2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)
    )


def images(count=16):
    return torch.randn(count, 2, 5, 5, generator=torch.Generator().manual_seed(1))


def converted(name="pcm", **overrides):
    model, _ = gx.convert(network(), gx.presets.pcm().with_overrides({**SPECS[name], **overrides}))
    gx.calibrate(model, [images()])
    return model.eval()


def error(model):
    with torch.no_grad():
        ideal = network()(images())
        return ((model(images()) - ideal).norm() / ideal.norm()).item()


@pytest.mark.parametrize("name", SPECS)
def test_a_model_ages_and_compensation_helps(name):
    model = converted(name)
    fresh = error(model)
    gx.program(model)
    assert error(model) < 3 * fresh + 0.05
    errors = {}
    for compensate in (False, True):
        gx.age(model, "1y", compensate)
        errors[compensate] = error(model)
    assert errors[False] > 0.5
    assert errors[True] < (0.75 if name == "offset" else 0.5) * errors[False]
    gx.unprogram(model)
    for layer in (model[0], model[3]):
        layer.write_step.zero_()  # writes as before, with the same noise
    assert error(model) == pytest.approx(fresh, rel=0.05)


@pytest.mark.parametrize("name", SPECS)
def test_a_saved_model_is_evaluated_alike(name):
    model = converted(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0)  # weights count their changes, and their copies begin anew
    gx.program(model)
    gx.age(model, "2d", compensate=True)
    resumed, copied = converted(name), copy.deepcopy(model)
    resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    for other in (resumed, copied):
        state = copy.deepcopy(model.state_dict())
        assert torch.equal(other(images()), model(images()))
        gx.age(other, "1y")
        gx.age(model, "1y")
        assert torch.equal(other(images()), model(images()))
        model.load_state_dict(state)
    assert resumed[0].age.item() == 365.25 * 86400


def test_devices_are_what_the_oracle_says():
    model = converted("subtracted")
    layer = model[3]
    gx.program(model)
    gx.age(model, "1h")
    s, w = layer.spec, layer.weight.detach().numpy()[None]
    seed, step = layer.plan.seed, (reference.fingerprint(w[0]) + 1) & 0xFFFFFFFF
    written = reference.program(
        w, w_max=np.abs(w).max().reshape(1), g_min=0.0, g_max=25e-6, slices=2, slice_bits=3, seed=seed, step=step,
        **s.programming.model_dump(),
    )  # fmt: skip
    np.testing.assert_allclose(layer.g_programmed.numpy(), written, rtol=0, atol=2e-6 * 25e-6)
    law = s.drift.model_copy(update={"flicker": 0.0})
    aged = reference.drift(written, 3600.0, law=law.model_dump(), g_max=25e-6, seed=seed, step=1)
    pairs = aged[:2] - aged[2:]
    off = layer.aged.numpy() - pairs
    # what remains is the low-frequency noise of both devices: Q of 0.0088 to 0.2, times 4.7
    assert 0.005 < off.std() / 25e-6 < 0.1
    np.testing.assert_allclose(layer.g_programmed.numpy(), written, rtol=0, atol=2e-6 * 25e-6)


def test_one_exponent_is_compensated_exactly():
    """All devices of a layer fall by one factor, which a test read finds."""
    spec = gx.CrossbarSpec(device={"g_min": 0.0}, drift={"nu": 0.1})
    layer = gx.nn.AnalogLinear(20, 7, spec=spec)
    x = torch.randn(4, 20, requires_grad=True)
    y = layer(x)
    grads = torch.autograd.grad(y.sum(), [x, *layer.parameters()])
    gx.program(layer)
    gx.age(layer, 180.0)  # t / t_0 = 10
    torch.testing.assert_close(layer(x) - layer.bias, (y - layer.bias) * 10**-0.1, rtol=1e-5, atol=1e-6)
    gx.age(layer, 180.0, compensate=True)
    assert layer.gain.item() == pytest.approx(10**0.1, rel=1e-5)
    found = layer(x)
    torch.testing.assert_close(found, y, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), [x, *layer.parameters()]), grads, rtol=1e-5, atol=1e-6
    )


def test_devices_age_by_their_place_in_the_window_from_zero_on():
    drift = {"nu": 0.05, "nu_slope": 0.03, "flicker": 0.01}
    spec = gx.CrossbarSpec(
        device={"g_min": 5e-6, "g_max": 2e-5}, adc={"bits": 8, "range": "worst_case"}, drift=drift
    )
    layer = gx.nn.AnalogLinear(20, 7, spec=spec)
    gx.program(layer)
    gx.age(layer, "1h")
    how = {"g_max": 2e-5, "seed": layer.plan.seed, "step": layer.write_step.item()}
    expected = ops.drift(layer.g_programmed.numpy(), 3600.0, law=spec.drift, **how)
    np.testing.assert_array_equal(layer.conductances().g, expected)


@pytest.mark.parametrize(
    ("of_sequences", "of_images"),
    [
        ({"stride": 2, "padding": 1}, {"stride": (1, 2), "padding": (0, 1)}),
        ({"groups": 2, "dilation": 2}, {"groups": 2, "dilation": (1, 2)}),
        ({"padding": "same", "padding_mode": "circular"}, {"padding": "same", "padding_mode": "circular"}),
    ],
)
def test_convolutions_of_sequences_are_compensated_as_of_images_of_height_1(of_sequences, of_images):
    spec, x = gx.presets.pcm().with_overrides(CONVERTERS), torch.randn(6, 4, 9)
    sequences = gx.nn.AnalogConv1d(4, 6, 3, spec=spec, name="conv", **of_sequences)
    images = gx.nn.AnalogConv2d(4, 6, (1, 3), spec=spec, name="conv", **of_images)
    ideal = nn.Conv1d(4, 6, 3, **of_sequences)
    ideal.load_state_dict({"weight": sequences.weight, "bias": sequences.bias})
    images.load_state_dict(sequences.state_dict() | {"weight": sequences.weight.detach().unsqueeze(2)})
    errors = {}
    for compensate in (False, True):
        found = []
        for layer, inputs in ((sequences, x), (images, x.unsqueeze(2))):
            gx.calibrate(layer.eval(), [inputs])
            gx.program(layer)
            gx.age(layer, "1y", compensate)
            found.append(layer(inputs).reshape(6, 6, -1).detach())
            gx.unprogram(layer)
        assert torch.equal(*found)
        errors[compensate] = (found[0] - ideal(x)).norm()
    assert errors[True] < 0.5 * errors[False]


def test_a_compensation_is_of_its_age_alone():
    model = converted()
    gx.program(model)
    gx.age(model, "1d", compensate=True)
    gains = [model[0].gain.item(), model[3].gain.item()]
    assert min(gains) > 1.2
    gx.age(model, "1y", compensate=True)
    gx.age(model, "1d", compensate=True)
    assert [model[0].gain.item(), model[3].gain.item()] == pytest.approx(gains, rel=1e-6)
    gx.age(model, "1d")
    assert [model[0].gain.item(), model[3].gain.item()] == [1, 1]


def test_a_compensated_age_solves_wires_for_its_two_test_reads_alone(monkeypatch):
    model, solved = converted("wires"), []
    gx.program(model)
    whole = ops.effective_conductance
    monkeypatch.setattr(
        ops, "effective_conductance", lambda *args, **options: solved.append(args) or whole(*args, **options)
    )
    gx.age(model, "1d", compensate=True)
    model(images())
    assert len(solved) == 2 * len(gx.telemetry(model).layers)


def test_anchors_of_wires_are_of_the_age_that_is_read():
    wires = {"r_wordline": 20.0, "anchor": "ladder", "refresh_interval": 10, "tolerance": 1.0}
    spec = gx.CrossbarSpec(tile={"rows": 8, "cols": 8}, drift={"nu": 0.1}, parasitics=wires)
    layer = gx.nn.AnalogLinear(20, 30, spec=spec)
    exact = gx.nn.AnalogLinear(
        20, 30, spec=spec.with_overrides({"parasitics": {"anchor": None, "refresh_interval": 1}})
    )
    exact.load_state_dict(layer.state_dict(), strict=False)
    for each in (layer, exact):
        gx.program(each)
        each.conductances()
        gx.age(each, "1d")
    torch.testing.assert_close(layer.conductances().g, exact.conductances().g, rtol=0, atol=1e-10)
    assert layer.wire_error() == 0


def test_all_aged_devices_of_a_weight_add_up_and_so_does_their_noise():
    parts = {"mapping": {"slices": 2, "slice_bits": 2}, "read_noise": {"sigma_g": 1e-7, "exponent": 1.0}}
    layer = gx.nn.AnalogLinear(20, 7, spec=gx.CrossbarSpec(**parts, drift={"nu": 0.1}))
    gx.program(layer)
    gx.age(layer, "1h")
    aged = layer.g_programmed * (1 + 3600 / layer.spec.drift.t_0) ** -0.1
    low, high = torch.sub(*aged.unflatten(0, (2, 2)))
    cells = layer.conductances()
    torch.testing.assert_close(cells.g[0], low + 4 * high, rtol=0, atol=1e-5 * cells.g.abs().max().item())
    low, high = (1e-7 * aged / layer.spec.device.g_max).square().unflatten(0, (2, 2)).sum(0)
    torch.testing.assert_close(cells.noise_var[0], low + 16 * high, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "dac", [{"range": "fixed", "max": 0.1}, {"range": "ema"}, {"range": "sample", "signed": False}]
)
def test_test_reads_fill_the_range_of_the_dac(dac):
    spec = gx.presets.pcm().with_overrides({"dac": {"bits": 8, **dac}, "backward": {"mode": "ideal"}})
    layer = gx.nn.AnalogLinear(200, 30, spec=spec)
    gx.program(layer)
    gx.age(layer, "1d", compensate=True)
    assert layer.gain.item() == pytest.approx((1 + 86400 / 20) ** 0.06, rel=0.15)


def test_nothing_is_not_compensated():
    """A layer of zeros reads what it did; one whose drifted currents are below a step of its ADC cannot be helped."""
    spec = gx.CrossbarSpec(
        device={"g_min": 0.0}, drift={"nu": 0.3}, adc={"bits": 4, "range": "fixed", "i_max": 2e-5}
    )
    layer = gx.nn.AnalogLinear(20, 7, bias=False, spec=spec)
    gx.program(layer)
    gx.age(layer, "1y")
    with pytest.raises(
        ValueError, match="`compensate` must be False where a test read finds nothing, got codes of 0"
    ):
        gx.age(layer, "1y", compensate=True)
    assert layer.gain == 1
    gx.unprogram(layer)
    torch.nn.init.zeros_(layer.weight)
    gx.program(layer)
    gx.age(layer, "1y", compensate=True)
    assert layer.gain == 1


def test_writing_again_draws_anew_and_times_come_in_any_order():
    model = converted()
    gx.program(model)
    gx.age(model, "1h")
    first = model(images())
    gx.age(model, "1y")
    gx.age(model, 3600)
    assert torch.equal(model(images()), first)
    gx.program(model)
    assert model[0].age.item() == 0
    assert model[0].write_step.item() == 2
    gx.age(model, "1h")
    assert not torch.equal(model(images()), first)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30s", 30),
        ("1.5 h", 5400),
        ("2d", 172800),
        ("1e3min", 6e4),
        (".5H", 1800),
        ("1w", 604800),
        ("1y", 31557600),
    ],
)
def test_times(text, seconds):
    layer = gx.nn.AnalogLinear(3, 2, spec=gx.presets.pcm())
    gx.program(layer)
    gx.age(layer, text)
    assert layer.age.item() == seconds


def test_devices_trained_in_situ_age_as_they_stand():
    model = converted(update={"law": "soft_bounds"})
    optimiser = gx.optim.InSituSGD(model.parameters(), lr=0.01)
    model(images()).square().mean().backward()
    optimiser.step()
    cells, weight = model[3].g_cells.clone(), model[3].weight.detach().clone()
    gx.program(model)
    assert torch.equal(model[3].g_programmed, cells)
    gx.age(model, "1y", compensate=True)
    model(images()).square().mean().backward()
    for write in (optimiser.step, model[3].refresh, lambda: model[0].begin_in_situ()):
        with pytest.raises(
            ValueError, match=r"`\w+` must wait until the layer is free, got one that is programmed"
        ):
            write()
    gx.unprogram(model)
    assert torch.equal(model[3].g_cells, cells)
    assert torch.equal(model[3].weight, weight)
    optimiser.step()


def test_what_is_digital_may_still_learn():
    model = converted("converters")
    gx.program(model)
    gx.age(model, "1y")
    bias = [layer.bias for layer in (model[0], model[3])]
    optimiser = torch.optim.SGD(bias, lr=0.1)
    before = error(model)
    for _ in range(20):
        optimiser.zero_grad()
        (model(images()) - network()(images()).detach()).square().mean().backward()
        optimiser.step()
    assert error(model) < before


def devices(model):
    return [layer.g_programmed for layer in (model[0], model[3])]


@pytest.mark.parametrize("name", SPECS)
def test_a_chip_has_devices_of_its_own(name):
    """Those of a conversion with the other seed."""
    scatter = {"programming": {"stuck_at_g_min": 0.1, "stuck_at_g_max": 0.1, "device_spread": 0.2}}
    model = converted(name, **scatter)
    found = []
    for chip in range(4):
        gx.program(model, chip)
        found.append(devices(model))
    for chip in range(4):
        other = converted(name, **scatter, seed=chip)
        for _ in range(chip + 1):  # as often as the model by then
            gx.program(other)
        assert all(torch.equal(a, b) for a, b in zip(found[chip], devices(other), strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    gx.unprogram(model)


def test_spread_and_stuck_cells_are_a_chips_and_write_noise_is_a_writings():
    quiet = {
        "device_spread": 0.2,
        "stuck_at_g_min": 0.1,
    }
    for noise, same in ((0.0, True), (1e-7, False)):
        model = converted(programming={**quiet, "write_noise": noise})
        found = []
        for _ in range(2):
            gx.program(model, 3)
            found.append(devices(model))
        assert all(torch.equal(a, b) is same for a, b in zip(*found, strict=True))


def test_a_chip_ages_as_such_in_another_model(tmp_path):
    model = converted()
    gx.program(model, 2)
    gx.age(model, "1d")
    other = converted()
    other.load_state_dict(model.state_dict())
    assert all(torch.equal(a.aged, b.aged) for a, b in ((model[k], other[k]) for k in (0, 3)))
    gx.age(model, "1y")
    gx.age(other, "1y")
    assert torch.equal(model(images()), other(images()))


def test_copies_of_a_model_read_their_chips_with_noise_of_their_own():
    """As forked processes have them."""
    model = converted(read_noise={"sigma": 1e-6})
    for _ in range(2):
        model.eval()(images())
    found = {}
    for chip in (0, 1, 65535):
        copied = copy.deepcopy(model)
        gx.program(copied, chip)
        found[chip] = [copied(images()) for _ in range(2)]
        assert [row.reads for row in gx.telemetry(copied).layers] == [4, 4]
        assert copied[0].eval_step.item() == -4 - 65536 * chip
        resumed = converted(read_noise={"sigma": 1e-6}).eval()
        resumed.load_state_dict(copied.state_dict())
        assert torch.equal(resumed(images()), copied(images()))
        gx.program(copied, chip)  # which goes on where it was
        assert [row.reads for row in gx.telemetry(copied).layers] == [5, 5]
        gx.unprogram(copied)
        assert [layer.eval_step.item() for layer in (copied[0], copied[3])] == [-5, -5]
    noise = torch.stack([(each[0] - each[1]).flatten() for each in found.values()])
    assert (torch.corrcoef(noise) - torch.eye(len(noise))).abs().max() < 5 * noise.shape[1] ** -0.5


def test_what_is_no_chip_is_refused():
    model = converted()
    for chip in (-1, 65536):
        with pytest.raises(
            ValueError,
            match=f"program: `chip` must be at least 0 and below 65536, got {chip}; more of them have a spec",
        ):
            gx.program(model, chip)
    with pytest.raises(TypeError, match="program: `chip` must be a whole number, got str; give one"):
        gx.program(model, "3")
    trained, _ = gx.convert(network(), gx.CrossbarSpec(update={"law": "soft_bounds"}))
    gx.optim.InSituSGD(trained.parameters(), lr=0.1)
    with pytest.raises(
        ValueError,
        match=r"`chip` must be 0 for layers trained in situ, .* got 4 for 0, 3; gpuxbar\.convert\(.*'seed': 4",
    ):
        gx.program(trained, 4)
    gx.program(trained)


def test_times_are_numbers_or_text():
    with pytest.raises(
        TypeError, match=r'^age: `time` must be a number of seconds or text, got NoneType; write 3600 or "1h"'
    ):
        gx.age(programmed(), None)


def programmed():
    model = converted()
    gx.program(model)
    return model


def changed():
    model = programmed()
    with torch.no_grad():
        model[3].weight.mul_(0.5)
    model(images())


def uncalibrated():
    model, _ = gx.convert(network(), gx.presets.pcm().with_overrides(CONVERTERS))
    gx.program(model)
    gx.age(model, 1.0, compensate=True)


ERRORS = {
    "order": (lambda: gx.age(converted(), "1h"), "age: `model` must be programmed, got layers that are not: 0, 3; call gpuxbar.program(model) first"),
    "negative": (lambda: gx.age(programmed(), -1), "age: `time` must be finite and at least 0, got -1 s; it counts from"),
    "infinite": (lambda: gx.age(programmed(), float("inf")), "age: `time` must be finite and at least 0, got inf s"),
    "text": (lambda: gx.age(programmed(), "soon"), "age: `time` must be a number with a unit of s, min, h, d, w, y, got 'soon'; write \"1h\" or 3600"),
    "unit": (lambda: gx.age(programmed(), "3 months"), "age: `time` must be a number with a unit of s, min, h"),
    "sign": (lambda: gx.age(programmed(), "-3h"), "age: `time` must be a number with a unit"),
    "digital": (lambda: gx.program(network()), "program: `model` must have crossbar layers, got none; pass the copy that has"),
    "digital-free": (lambda: gx.unprogram(network()), "unprogram: `model` must have crossbar layers, got none"),
    "weight": (changed, "3: `weight` must stay as it was programmed, got another; call gpuxbar.program(model) to write"),
    "rewrite": (lambda: programmed()[3].rewrite(), "3: `rewrite` must wait until the layer is free"),
    "ranges": (uncalibrated, "0: the ADC range must be calibrated before use, and anew once an in-situ optimiser has begun; call gpuxbar.calibrate"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_named(name):
    act, text = ERRORS[name]
    with pytest.raises(ValueError, match="^" + re.escape(text)):
        act()


def test_the_pcm_preset_is_the_published_fit():
    """Programming noise at 0 and at g_max, in uS of a window of 25 uS."""
    spec = gx.presets.pcm()
    p = spec.programming
    assert p.write_deviation(0) == pytest.approx(0.26348e-6)
    assert p.write_deviation(1) == pytest.approx(1.05538e-6)
    layer = gx.nn.AnalogLinear(200, 200, bias=False, spec=spec)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    gx.program(layer)
    full, empty = layer.g_programmed
    assert full.std().item() == pytest.approx(1.05538e-6, rel=0.02)
    # half of the writes to 0 end there: E max(0, z) is 1 / sqrt(2 pi)
    assert empty.mean().item() == pytest.approx(0.26348e-6 / (2 * np.pi) ** 0.5, rel=0.03)


def test_models_on_measured_devices_age_as_far_as_these_were_measured(tmp_path):
    spec = gx.presets.reram().with_overrides(CONVERTERS)
    model, resumed = (gx.convert(network(), spec)[0].eval() for _ in range(2))
    gx.calibrate(model, [images()])
    gx.program(model)
    written, found = model[3].g_programmed, {}
    for time in ("1h", "2d"):
        gx.age(model, time, compensate=True)
        found[time] = model(images())
        how = {
            "law": spec.drift,
            "g_max": 40e-6,
            "seed": model[3].plan.seed,
            "step": model[3].write_step.item(),
        }
        aged = ops.drift(written.numpy(), model[3].age.item(), **how)
        assert torch.equal(model[3].aged, torch.from_numpy(aged))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    resumed.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert torch.equal(resumed[3].aged, model[3].aged)
    with pytest.raises(
        ValueError,
        match=r"^age: `time` must be at most 172800 s, the last of the ages in `drift`, got 3\.1\d*e\+07 s; measure longer",
    ):
        gx.age(model, "1y")
    gx.age(model, "1h", compensate=True)
    assert torch.equal(model(images()), found["1h"])
    assert not torch.equal(found["2d"], found["1h"])


@pytest.mark.parametrize("last", [0.1, 1e-3, 33333333.3])
def test_devices_age_until_the_moment_of_the_last_measurement(last):
    one = {"law": "measured", "ages": [last], "shares": [0, 1], "shift": [[1e-6, -1e-6]], "std": [[0, 0]]}
    spec = gx.CrossbarSpec.model_validate({"drift": one})
    model, resumed = (gx.nn.AnalogLinear(3, 2, bias=False, spec=spec) for _ in range(2))
    gx.program(model)
    gx.age(model, last)
    aged = model.g_programmed + 1e-6 * (1 - 2 * model.g_programmed / spec.device.g_max)
    torch.testing.assert_close(model.aged[0], aged[0] - aged[1], rtol=1e-4, atol=1e-11)
    resumed.load_state_dict(model.state_dict())
    assert torch.equal(resumed.aged, model.aged)


def test_counts_of_no_chip_are_loaded_beside_one():
    """Which a layer may be on that takes weights to program next, or a state of before chips were counted apart."""
    model = converted(read_noise={"sigma": 1e-6}).eval()
    model(images())
    plain = copy.deepcopy(model.state_dict())
    gx.program(model, 5)
    before = copy.deepcopy(model.state_dict())
    model.load_state_dict(plain, strict=False)
    assert [row.reads for row in gx.telemetry(model).layers] == [1, 1]
    gx.program(model, 6)
    gx.unprogram(model)
    assert [layer.eval_step.item() for layer in (model[0], model[3])] == [-1, -1]
    older = {name: value for name, value in before.items() if not name.endswith("chip")}
    for name in older:
        if name.endswith("eval_step"):
            older[name] = torch.tensor([-1])
    gx.program(model, 7)
    model.load_state_dict(older)
    assert [row.reads for row in gx.telemetry(model).layers] == [1, 1]
