"""DAC ranges that are parameters of their layers."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gpuxbar as gx
from gpuxbar import reference
from gpuxbar.nn import AnalogConv2d, AnalogLinear

LEARNED = {"bits": 4, "range": "learned"}
TILES = {"tile": {"rows": 16, "cols": 16}, "mapping": {"scheme": "subtracted"}}
READS = {**TILES, "dac": LEARNED, "adc": {"bits": 8}, "read_noise": {"sigma": 1e-8}}


def layer_of(x, **dac):
    spec = gx.CrossbarSpec(**TILES, dac={**LEARNED, **dac}, backward={"mode": "ideal"})
    return AnalogLinear(20, 6, spec=spec) if x.dim() == 2 else AnalogConv2d(3, 6, 3, padding=1, spec=spec)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))


def converted(**parts):
    return gx.convert(network(), gx.CrossbarSpec(**{**READS, **parts}))[0]


def images(count=12):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def step(model, optimiser, x):
    optimiser.zero_grad()
    model(x).square().mean().backward()
    optimiser.step()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(9, 20), (4, 3, 6, 5)])
def test_a_layer_passes_its_range_the_gradient_of_the_reference(shape, signed):
    """Of ideal transposed reads: the product of the output's gradient with the weights."""
    x = torch.randn(shape)
    layer = layer_of(x, max=1.0, signed=signed)
    grad = torch.randn(layer(x).shape)
    layer(x).backward(grad)
    if len(shape) == 2:
        of_driven = grad @ layer.weight.detach()
    else:
        of_driven = nn.grad.conv2d_input(shape, layer.weight.detach(), grad, padding=1)
    code_max = layer.spec.dac.code_max
    _, slope = reference.dac_clip_gradient(
        of_driven.numpy(), x.numpy(), top=1.0, code_max=code_max, signed=signed
    )
    expected = slope * code_max**1.5 / x[0].numel() ** 0.5
    assert layer.dac_max.grad.item() == pytest.approx(expected, rel=1e-4)
    layer.dac_max.grad = None
    with torch.no_grad():
        layer.dac_max.neg_()  # the magnitude counts
    layer(x).backward(grad)
    assert layer.dac_max.grad.item() == pytest.approx(-expected, rel=1e-4)
    layer.dac_max.grad = None
    layer.dac_max.requires_grad_(False)
    layer(x).backward(grad)
    assert layer.dac_max.grad is None


@pytest.mark.parametrize("begin", [0.05, 30.0])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_a_range_begun_far_off_learns_to_a_smaller_loss(make, begin):
    x = torch.randn(256, 20)
    layer = layer_of(x, max=begin)
    target = nn.functional.linear(x, layer.weight, layer.bias).detach()

    def loss():
        return (layer(x) - target).square().mean()

    first = loss().item()
    optimiser = make([layer.dac_max], lr=3.0 if make is torch.optim.SGD else 0.1)
    for _ in range(500):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
    assert loss() < 0.1 * first
    assert 2.3 < layer.dac_max.item() < 2.9  # of 15 codes for normal values


@pytest.mark.parametrize("signed", [True, False])
def test_a_range_begins_where_it_makes_the_least_squared_error(signed):
    x = torch.randn(500, 20) ** 3
    layer = layer_of(x, signed=signed)
    gx.calibrate(layer, [x[:250], x[250:]])
    seen = x if signed else x.clamp_min(0)

    def error(top):
        code_max = layer.spec.dac.code_max
        return (
            ((seen / top * code_max).round().clamp(-code_max, code_max) * top / code_max - seen)
            .square()
            .sum()
        )

    found, most = layer.dac_max.item(), seen.abs().max().item()
    assert found < 0.8 * most
    assert all(error(found) <= error(most * k / 50) * (1 + 1e-6) for k in range(1, 51))
    gx.calibrate(layer, [100 * x])
    assert layer.dac_max.item() == found


def test_adc_ranges_are_those_of_the_range_that_begins():
    x = images()
    model = converted()
    gx.calibrate(model, [x])
    for layer in (model[0], model[3]):
        assert 0 < layer.dac_max.item() < x.abs().max()
    after = [layer.adc_range.clone() for layer in (model[0], model[3])]
    gx.calibrate(model, [x])
    # the second layer's inputs were those of ranges that followed the data the first time
    torch.testing.assert_close(model[0].adc_range, after[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(model[3].adc_range, after[1], rtol=0.1, atol=0)


def test_a_range_that_has_not_begun_is_refused():
    model, x = converted(), images()
    assert torch.isnan(model[0].dac_max)
    with pytest.raises(
        ValueError,
        match=r"0: a DAC range that is learned must begin before use, got nan; call gpuxbar\.calibrate",
    ):
        model(x)
    with pytest.raises(
        ValueError, match="0: a DAC range that is learned must begin on inputs that are not all zeros"
    ):
        gx.calibrate(model, [torch.zeros_like(x)])
    gx.calibrate(model, [x])
    model(x)
    model[3].load_state_dict(
        {**model[3].state_dict(), "dac_max": torch.zeros(1)}
    )  # of a range of another kind
    with pytest.raises(ValueError, match="3: a DAC range that is learned must begin before use, got 0"):
        model(x)
    with torch.no_grad():
        model[3].dac_max.fill_(2.0)
    model(x)
    with pytest.raises(
        ValueError,
        match="linear: a layer that learns its DAC range must be on a device that holds values, got meta",
    ):
        AnalogLinear(4, 3, device="meta", spec=gx.CrossbarSpec(dac=LEARNED))


def test_a_range_that_falls_to_zero_drives_next_to_nothing():
    x = torch.randn(9, 20).relu()  # zeros too, which are inside any range
    layer = layer_of(x, max=1.0)
    with torch.no_grad():
        layer.dac_max.zero_()
    y = layer(x)
    torch.testing.assert_close(y, layer.bias.expand(9, 6))
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("at", [0.0, -0.0, 1e-35, -1e-35])
def test_a_range_that_fell_to_zero_learns_to_be_one_again(at):
    x = torch.randn(256, 20)
    layer = layer_of(x, max=1.0)
    target = nn.functional.linear(x, layer.weight, layer.bias).detach()
    with torch.no_grad():
        layer.dac_max.fill_(at)
    optimiser = torch.optim.Adam([layer.dac_max], lr=0.1)
    for _ in range(300):
        optimiser.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimiser.step()
    assert 2.3 < abs(layer.dac_max.item()) < 2.9


def test_a_range_learns_by_the_transposed_read_of_a_first_layer_too():
    layer, x = AnalogLinear(20, 6, spec=gx.CrossbarSpec(**READS)), torch.randn(9, 20)
    gx.calibrate(layer, [x], step=lambda x: layer(x).detach())
    with pytest.raises(
        ValueError, match="the ADC range of the transposed read must be calibrated before gradients"
    ):
        layer(x).sum().backward()
    layer.dac_max.requires_grad_(False)
    layer(x).sum().backward()


def test_a_resumed_run_goes_on_bit_for_bit():
    x = images()

    def begin():
        model = converted()
        return model, torch.optim.AdamW(model.parameters(), lr=0.05)

    model, optimiser = begin()
    gx.calibrate(model, [x])
    start = model[3].dac_max.item()
    for count in range(6):
        if count == 3:
            file = io.BytesIO()
            torch.save((model.state_dict(), optimiser.state_dict()), file)
        step(model, optimiser, x)
    assert abs(model[3].dac_max.item() - start) > 0.01
    again, other = begin()
    file.seek(0)
    states = torch.load(file)
    again.load_state_dict(states[0])
    other.load_state_dict(states[1])
    for _ in range(3):
        step(again, other, x)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def grads_of(model, run, x):
    model.zero_grad()
    run(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def quiet(**more):
    """Without noise, which differs from read to read."""
    model = converted(read_noise={}, backward={"mode": "ideal"}, adc={}, **more)
    gx.calibrate(model, [images()])
    return model


def test_micro_batches_add_up():
    model, x = quiet(), images()
    whole = grads_of(model, model, x)
    model.zero_grad()
    for part in x.split(5):
        model(part).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], rtol=1e-4, atol=1e-4 * whole[name].abs().max().item())


def test_a_compiled_model_and_a_checkpointed_one_learn_the_same():
    x = images()
    model = converted()
    gx.calibrate(model, [x])
    start = copy.deepcopy(model.state_dict())
    expected = grads_of(model, model, x)
    runs = {
        "compiled": torch.compile(model, backend="aot_eager", fullgraph=True),
        "checkpointed": lambda x: checkpoint(model, x, use_reentrant=False, context_fn=lambda: gx.same_reads(model)),
    }  # fmt: skip
    for run in runs.values():
        model.load_state_dict(start)
        found = grads_of(model, run, x)
        assert expected["0.dac_max"].abs() > 0
        for name, grad in expected.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-6 * grad.abs().max().item())


def test_models_of_other_precision_learn():
    model = converted()
    gx.calibrate(model, [images()])
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images()).square().mean()
    loss.backward()
    half = copy.deepcopy(model).bfloat16()
    half.zero_grad()
    half(images().bfloat16()).square().mean().backward()
    for each in (model, half):
        assert all(p.grad.abs().max() > 0 and p.grad.dtype == p.dtype for p in each.parameters())


def test_layers_of_sequences_and_of_no_sample_learn():
    lstm, _ = gx.convert(nn.LSTM(5, 4), gx.CrossbarSpec(**{**READS, "dac": {**LEARNED, "max": 1.0}}))
    gx.calibrate(lstm, [torch.randn(3, 2, 5)], step=lambda x: lstm(x)[0])
    lstm(torch.randn(3, 2, 5))[0].sum().backward()
    assert all(layer.dac_max.grad.abs() > 0 for layer in (lstm.ih_l0, lstm.hh_l0))
    layer = lstm.ih_l0
    layer.zero_grad()
    layer(torch.zeros(0, 5)).sum().backward()
    assert layer.dac_max.grad == 0


def test_layers_that_move_take_their_ranges_along():
    model = converted()
    gx.calibrate(model, [images()])
    with torch.no_grad():
        model[0].dac_max.fill_(1.25)
    other = gx.CrossbarSpec(
        **{**READS, "adc": {}, "tile": {"rows": 8}, "dac": {**LEARNED, "bits": 6, "max": 9.0}}
    )
    moved, _ = gx.convert(model, other, rules={"3": {"dac": {"range": "tensor", "max": None}}})
    assert moved[0].dac_max.item() == 1.25
    assert moved[0].dac_begun
    assert model[0].dac_max is not moved[0].dac_max
    assert isinstance(moved[0].dac_max, nn.Parameter)
    assert "dac_max" not in dict(moved[3].named_parameters())
    fresh, _ = gx.convert(converted(), other)
    assert fresh[0].dac_max.item() == 9.0
    kept, _ = gx.convert(model, gx.CrossbarSpec(**{**READS, "tile": {"rows": 8}}))
    gx.calibrate(kept, [100 * images()])
    assert kept[0].dac_max.item() == 1.25
    digital, _ = gx.convert(model, other, rules={"*": None})
    assert [name for name, _ in digital[0].named_parameters()] == ["weight", "bias"]


def test_layers_in_situ_learn_ranges_as_they_do_biases():
    x = images()
    model = converted(update={"law": "soft_bounds"}, pulses={})
    optimiser = gx.optim.InSituSGD(model.parameters(), lr=0.05)
    gx.calibrate(model, [x])
    before = [layer.dac_max.item() for layer in (model[0], model[3])]
    model(x).square().mean().backward()
    grads = [layer.dac_max.grad.item() for layer in (model[0], model[3])]
    optimiser.step()
    for layer, start, grad in zip((model[0], model[3]), before, grads, strict=True):
        assert grad != 0
        assert layer.dac_max.item() == pytest.approx(start - 0.05 * grad, rel=1e-6)


def test_drift_is_compensated_through_a_learned_range():
    spec = gx.presets.pcm().with_overrides(
        {"dac": {**LEARNED, "bits": 8, "max": 0.1}, "backward": {"mode": "ideal"}}
    )
    layer = AnalogLinear(200, 30, spec=spec)
    gx.program(layer)
    gx.age(layer, "1d", compensate=True)
    assert layer.gain.item() == pytest.approx((1 + 86400 / 20) ** 0.06, rel=0.15)


def test_what_clips_in_a_learned_range_is_told():
    model = converted()
    gx.calibrate(model, [images()])
    with torch.no_grad():
        model[0].dac_max.fill_(1.0)
    row = gx.conversion_errors(model, [images()]).reads[0]
    assert row.dac_clipped == pytest.approx((images().abs() > 1).float().mean().item())
    assert row.largest == "DAC clipping"
