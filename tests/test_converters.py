"""Converters of a layer's reads: their errors, noise, phases and clipping."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_layers import spec
from torch import nn

import gpuxbar as gx
from gpuxbar import reference
from gpuxbar.nn import AnalogLinear


@pytest.mark.parametrize(
    "mapping", [{"slices": 4, "slice_bits": 2}, {"slices": 12, "slice_bits": 2, "scheme": "subtracted"}]
)
def test_sliced_weights_with_a_fine_adc_approach_the_ideal(mapping):
    parts = {
        "mapping": mapping,
        "dac": {"bits": 8, "stream_bits": 1},
        "adc": {"bits": 16, "range": "worst_case"},
    }
    layer = AnalogLinear(40, 9, spec=spec(tile={"rows": 16}, **parts))
    x = torch.randn(5, 40)
    ideal = nn.functional.linear(x, layer.weight, layer.bias)
    assert (layer(x) - ideal).abs().max() < 0.02 * ideal.abs().max()


def test_a_clipped_adc_passes_no_gradient():
    layer = AnalogLinear(8, 3, spec=spec(adc={"bits": 4, "range": "fixed", "i_max": 1e-12}))
    x = torch.randn(2, 8, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() == 0
    assert layer.weight.grad.abs().max() == 0


@pytest.mark.parametrize("scheme", ["differential", "subtracted"])
def test_two_phases_read_what_one_does(scheme):
    """Of inputs of one sign too, which one of the phases drives alone."""
    parts = {"tile": {"rows": 16}, "mapping": {"scheme": scheme}, "adc": {"bits": 10, "percentile": 100}}
    layer = AnalogLinear(30, 20, spec=spec(dac={"bits": 8, "polarity": "two_phase"}, **parts))
    x, ranges = torch.randn(40, 30), []
    for inputs in (x, x.abs(), -x.abs()):
        gx.calibrate(layer, [inputs])
        ranges.append(layer.adc_range.item())
        ideal = nn.functional.linear(inputs, layer.weight, layer.bias)
        assert (layer(inputs) - ideal).abs().max() < 0.02 * ideal.abs().max()
    assert ranges[1] == ranges[2]


def test_converter_errors_are_of_the_converter():
    """Gain and offset are drawn once: two reads without noise agree; they bias each column by its own."""
    adc = {"bits": 14, "range": "worst_case", "gain_std": 0.05}
    layer = AnalogLinear(40, 300, bias=False, spec=spec(mapping={"scheme": "subtracted"}, adc=adc))
    x = torch.randn(6, 40)
    y, ideal = layer(x).detach(), nn.functional.linear(x, layer.weight).detach()
    assert torch.equal(y, layer(x))
    gain = (y * ideal).sum(0) / ideal.square().sum(0)
    assert gain.std() == pytest.approx(0.05, rel=0.2)
    same = AnalogLinear(40, 300, bias=False, spec=layer.spec)
    same.load_state_dict(layer.state_dict())
    assert torch.equal(same(x), y)
    other = AnalogLinear(40, 300, bias=False, spec=layer.spec, name="other")
    other.load_state_dict(layer.state_dict())
    assert not torch.equal(other(x), y)


def test_converters_err_apart():
    """Gains, offsets and curves, forwards and backwards: no two are alike."""
    adc = {"bits": 8, "range": "worst_case", "gain_std": 0.1, "offset_std": 1e-9, "inl": -3.0, "inl_std": 0.5}
    layer = AnalogLinear(
        400, 400, spec=spec(mapping={"scheme": "subtracted"}, tile={"rows": 512, "cols": 512}, adc=adc)
    )
    errors = torch.cat([layer.adc_error, layer.back_adc_error]).flatten(1)
    apart = torch.corrcoef(errors) - torch.eye(6)
    assert apart.abs().max() < 4 / 400**0.5
    assert errors.std(1) == pytest.approx([0.1, 1e-9, 0.5, 0.1, 1e-9, 0.5], rel=0.2)
    assert errors.mean(1)[[2, 5]] == pytest.approx([-3.0, -3.0], abs=0.1)


@pytest.mark.parametrize("batch", [1, 70], ids=["few", "block"])
def test_bent_converters_read_as_the_oracle_has_it(batch):
    """Both ways, by the curve of each."""
    adc = {"bits": 8, "range": "worst_case", "inl": 8.0, "inl_std": 4.0}
    layer = AnalogLinear(
        40, 12, bias=False, spec=spec(tile={"rows": 16, "cols": 8}, mapping={"scheme": "subtracted"}, adc=adc)
    )
    x = torch.randn(batch, 40, requires_grad=True)
    y, grad_y = layer(x), torch.randn(batch, 12)
    y.backward(grad_y)
    volts, w_max = layer.spec.dac.v_read, layer.weight.abs().max()
    for found, driven, full, tile, errors, transposed in (
        (y, x, layer.adc_range, 16, layer.adc_error, False),
        (x.grad, grad_y, layer.back_adc_range, 8, layer.back_adc_error, True),
    ):
        top = driven.detach().abs().max()
        gain, offset, inl = errors.numpy()
        expected = reference.tile_mvm(
            (driven.detach() / top * volts).numpy(), layer.cells.numpy(), tile=tile, transposed=transposed, adc_bits=8,
            adc_lsb=full.item() / 127, adc_gain=gain, adc_offset=offset, adc_inl=inl,
        ) * (top / volts * layer.planes.unit * w_max).item()  # fmt: skip
        step = full.item() / 127 * (top / volts * layer.planes.unit * w_max).item()
        off = np.abs(found.detach().numpy() - expected)
        assert (off < 1e-4 * step).mean() > 0.98  # others are on a rounding edge
        assert off.max() < 1.01 * step


def test_no_curve_of_a_converter_turns_back():
    adc = {"bits": 6, "range": "worst_case", "inl": 3.0, "inl_std": 5.0}
    layer = AnalogLinear(40, 200, spec=spec(adc=adc))
    inl, most = layer.adc_error[2], 32 / 6
    assert inl.abs().max() == pytest.approx(most)
    assert 0.1 < (inl == inl.max()).float().mean() < 0.6  # others are as they were drawn
    steps = np.linspace(-31, 31, 201)
    assert all((np.diff(reference.bent(steps, each, 31)) >= 0).all() for each in (-most, most))


def test_converters_add_their_offsets_to_nothing():
    """Where nothing is driven, products are what the offsets of their tiles' converters stand for, both ways."""
    fixed = {"bits": 8, "range": "fixed", "max": 0.5}
    parts = {
        "tile": {"rows": 8, "cols": 4}, "mapping": {"scheme": "subtracted"}, "dac": fixed, "backward": {"dac": fixed},
        "adc": {"bits": 12, "range": "worst_case", "offset_std": 1e-7},
    }  # fmt: skip
    layer = AnalogLinear(20, 6, bias=False, spec=spec(**parts))
    x = torch.zeros(2, 20, requires_grad=True)
    y = layer(x)
    y.backward(torch.zeros(2, 6))
    scale = 0.5 / layer.spec.dac.v_read * layer.planes.unit * layer.weight.abs().max().item()
    for found, offset, lsb in (
        (y, layer.adc_error[1, 0], layer.adc_range / 2047),
        (x.grad, layer.back_adc_error[1, 0], layer.back_adc_range / 2047),
    ):
        expected = ((offset / lsb).round() * lsb).sum(0) * scale
        assert expected.abs().min() > 0
        torch.testing.assert_close(found, expected.expand(2, -1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_read_noise_is_as_large_as_its_settings_say(direction):
    """Variance of a current: sigma^2 of each plane and tile, and v^2 sigma_g^2 (g / g_max)^3 of each device."""
    sigma, sigma_g = 3e-8, 1e-7
    noise = {"sigma": sigma, "sigma_g": sigma_g, "exponent": 1.5}
    layer = AnalogLinear(20, 15, bias=False, spec=spec(tile={"rows": 8, "cols": 8}, read_noise=noise))
    forward, device, w_max = direction == "forward", layer.spec.device, layer.weight.detach().abs().max()
    w = layer.weight.detach() / w_max
    sides = (device.g_min + w.mul(sign).clamp_min(0) * (device.g_max - device.g_min) for sign in (1, -1))
    of_pairs = sum(sigma_g**2 * (g / device.g_max) ** 3 for g in sides)
    value = torch.linspace(-1, 0.5, 20 if forward else 15)
    rows = value.expand(4000, -1).clone()
    if forward:
        with torch.no_grad():
            found, tiles, of_volts = layer(rows), 3, of_pairs.T
    else:
        x = torch.zeros(4000, 20, requires_grad=True)
        layer(x).backward(rows)
        found, tiles, of_volts = x.grad, 2, of_pairs
    volt = layer.spec.dac.v_read  # of the largest value, 1
    variance = 2 * tiles * sigma**2 + (volt * value).square() @ of_volts
    torch.testing.assert_close(
        found.std(0), variance.sqrt() / volt * w_max * layer.planes.unit, rtol=0.05, atol=0
    )


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize(
    "mapping",
    [
        {"scheme": "differential"},
        {"scheme": "subtracted"},
        {"scheme": "offset"},
        {"slices": 3, "slice_bits": 2},
    ],
    ids=str,
)
def test_a_plan_knows_the_largest_of_its_conductances(mapping, bits):
    """By which halves scale them, so that none overflows and few bits are lost."""
    adc = {"bits": bits, "range": "worst_case"}
    layer = AnalogLinear(6, 4, spec=spec(mapping=mapping, device={"g_min": 2e-6}, adc=adc))
    nn.init.constant_(layer.weight, 0.5)
    assert layer.conductances().g.abs().max().item() == pytest.approx(layer.plan.g_range, rel=1e-5)


def test_every_tile_has_reference_lines_of_its_own():
    parts = {"tile": {"rows": 4, "cols": 3}, "programming": {"device_spread": 0.05}}
    layer = AnalogLinear(11, 8, bias=False, spec=spec(mapping={"scheme": "offset"}, **parts))
    x, grad = torch.randn(5, 11, requires_grad=True), torch.randn(5, 8)
    y = layer(x)
    y.backward(grad)
    (g,), scale = layer.conductances().g, layer.planes.unit * layer.weight.abs().max().item()
    own, column, row = g[:11, :8], g[:11, 8 + torch.arange(8) // 3], g[11 + torch.arange(11) // 4, :8]
    for found, expected in (
        (y, x.detach() @ (own - column) * scale),
        (x.grad, grad @ (own - row).T * scale),
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_an_ideal_transposed_read_has_no_noise_of_cells():
    layer = AnalogLinear(20, 6, spec=spec(read_noise={"sigma_g": 1e-6}, backward={"mode": "ideal"}))
    x, grad = torch.randn(5, 20, requires_grad=True), torch.randn(5, 6)
    layer(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ layer.weight.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("bits", "rounding"), [(8, 0.01), (None, 1e-6)])
def test_a_fixed_range_clips_gradients(bits, rounding):
    fixed = {"dac": {"bits": bits, "range": "fixed", "max": 0.5}}
    layer = AnalogLinear(4, 3, spec=spec(mapping={"scheme": "subtracted", "w_max": 1.0}, backward=fixed))
    x, grad = torch.randn(2, 4, requires_grad=True), torch.tensor([[9.0, -0.2, 0.1], [0.3, -7.0, 0.0]])
    layer(x).backward(grad)
    expected = grad.clamp(-0.5, 0.5) @ layer.weight.detach()
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=rounding * expected.abs().max().item())


@pytest.mark.parametrize("fitted", ["tensor", "sample"])
def test_what_an_unsigned_dac_cannot_drive_gets_no_gradient(fitted):
    layer = AnalogLinear(6, 4, spec=spec(dac={"bits": 8, "signed": False, "range": fitted}))
    x = torch.randn(5, 6, requires_grad=True)
    layer(x).sum().backward()
    assert torch.equal(x.grad != 0, x > 0)


def test_noise_about_no_current_shuts_no_gate():
    """Inputs of one sign leave the phase of the other undriven: its conversions are noise around 0, the end of the range."""
    x, gradients = torch.rand(16, 30), []
    for sigma in (0.0, 1e-9):
        spec = gx.presets.isaac().with_overrides({"tile": {"rows": 8}, "read_noise": {"sigma": sigma}})
        layer = AnalogLinear(30, 5, spec=spec)
        nn.init.constant_(layer.weight, 0.5)
        rows = x.clone().requires_grad_()
        layer(rows).sum().backward()
        gradients.append(rows.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
