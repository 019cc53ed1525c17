"""DACs with errors and devices that are not ohmic: the array operation against closed forms, layers against their settings."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

import gpuxbar as gx
from gpuxbar import ops, reference
from gpuxbar.nn import AnalogConv2d, AnalogLinear
from gpuxbar.reference import ConvGeometry, Purpose

READS = {"host": ops.tile_mvm, "oracle": reference.tile_mvm}
V_READ = 0.2  # V


def currents(read, batch, codes, drivers, g=1.0, **settings):
    """Of one device a line, A: lines [n] driven by codes [n] in `batch` rows."""
    n = len(codes)
    given = {"v_lsb": V_READ / 127, "drivers": drivers, **settings}
    y = read(np.tile(np.int16(codes), (batch, 1)), g * np.eye(n, dtype=np.float32)[None], **given)
    np.testing.assert_array_equal(y, np.tile(y[:1], (batch, 1)))
    return y[0]


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("batch", [1, 60], ids=["few", "block"])
@pytest.mark.parametrize("steep", [0.01, 1.0, 5.0, 20.0])
def test_devices_conduct_by_a_hyperbolic_sine(read, batch, steep):
    """A conductance is that at `v_read`, of either sign; at low voltages it is the slope of the curve there."""
    codes = np.arange(-127, 128)
    found = currents(read, batch, codes, ops.Drivers(V_READ, v_sinh=V_READ / steep), g=3e-6)
    expected = 3e-6 * V_READ * np.sinh(steep * codes / 127) / np.sinh(steep)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("batch", [1, 60], ids=["few", "block"])
def test_a_dac_errs_as_it_says(read, batch):
    """A gain and an offset, which 0 is driven as too; a curve that is off at most at 1 / sqrt(3) of the range."""
    codes = np.arange(-127, 128)
    ones = np.ones(codes.size)
    for gain, offset, inl in ((1.1, 0, 0), (1, 0.003, 0), (1, 0, 9), (0.9, -0.002, -12)):
        error = np.float32([gain * ones, offset * ones, inl * ones])
        found = currents(read, batch, codes, ops.Drivers(V_READ, error)) / (V_READ / 127)
        steps = (found - offset * 127 / V_READ) / gain  # of the curve alone
        off = steps - codes
        assert np.abs(off).max() == pytest.approx(abs(inl), rel=1e-3, abs=3e-5)
        if inl:
            assert abs(codes[off.argmax()]) == pytest.approx(127 / np.sqrt(3), abs=1)
        np.testing.assert_allclose(off[[0, 127, -1]], 0, atol=3e-5)
        np.testing.assert_allclose(off, -off[::-1], atol=6e-5)


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("batch", [1, 60], ids=["few", "block"])
def test_streams_of_one_bit_know_two_voltages(read, batch):
    """0 and `v_read`: how devices and DACs bend between them has no effect."""
    codes = np.arange(-127, 128)
    streams = {"stream_bits": 1, "streams": 7, "v_lsb": V_READ}
    bent = ops.Drivers(V_READ, np.float32([[1], [0], [0.1]]) * np.ones(255, np.float32), v_sinh=0.02)
    np.testing.assert_allclose(currents(read, batch, codes, bent, **streams), codes * V_READ, rtol=1e-6)
    wider = {"stream_bits": 2, "streams": 4, "v_lsb": V_READ / 3}
    assert np.abs(currents(read, batch, codes, bent, **wider) - codes * V_READ / 3).max() > 1


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("batch", [1, 60], ids=["few", "block"])
def test_lines_with_nothing_to_drive_drive_their_offset(read, batch):
    """In every pass: streams add it up by their weights, and two phases subtract it again."""
    offset = np.float32([0.004, -0.003, 0.0])
    drivers = ops.Drivers(V_READ, np.stack([np.ones(3, np.float32), offset, np.zeros(3, np.float32)]))
    codes = np.zeros(3)
    np.testing.assert_allclose(currents(read, batch, codes, drivers), offset, rtol=1e-6)
    streams = {"stream_bits": 2, "streams": 4, "v_lsb": V_READ / 3}
    np.testing.assert_allclose(currents(read, batch, codes, drivers, **streams), offset * 85, rtol=1e-6)
    np.testing.assert_allclose(currents(read, batch, codes, drivers, phases=2, **streams), 0, atol=1e-7)


REFUSED = {
    "array": ({"error": np.ones((3, 4), np.float32)}, r"`drivers.error` must have shape \(3, 5\).*, got \(3, 4\)"),
    "steep": ({"v_sinh": 0.009}, r"`drivers.v_sinh` must be finite and at least v_read / 20 = 0.01 V, got 0.009"),
    "endless": ({"v_sinh": np.inf}, r"`drivers.v_sinh` must be finite"),
    "v_read": ({"v_read": 0.0}, r"`drivers.v_read` must be above 0 V, got 0 V; it is the voltage of the largest digit"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    change, text = REFUSED[name]
    with pytest.raises(ValueError, match=text):
        ops.tile_mvm(np.zeros((2, 5), np.int16), np.ones((5, 3), np.float32), drivers=ops.Drivers(**{"v_read": V_READ, **change}))


ERRORS = {"gain_std": 0.05, "offset_std": 0.004, "inl": 0.2, "inl_std": 0.2}
WAYS = {
    "whole": {"dac": {**ERRORS, "inl": -6.0, "inl_std": 2.0}},
    "ohmic": {"dac": {**ERRORS, "range": "sample"}, "device": {"v_sinh": None}},
    "sinh": {"dac": {}},
    "no-dac": {"dac": {"bits": None}},
    "1-bit": {"dac": {**ERRORS, "inl": 0.1, "stream_bits": 1}},
    "2-bits": {"dac": {**ERRORS, "stream_bits": 2}},
    "two-phase": {"dac": {**ERRORS, "polarity": "two_phase"}},
    "streams-of-phases": {"dac": {**ERRORS, "polarity": "two_phase", "stream_bits": 2, "offset_std": 0.0}},
    "unsigned": {"dac": {**ERRORS, "signed": False}},
    "differential": {"dac": ERRORS, "mapping": {"scheme": "differential"}},
    "offset": {"dac": ERRORS, "mapping": {"scheme": "offset"}},
    "of-its-own": {"backward": {"dac": {"bits": 5, "gain_std": 0.2, "range": "sample"}}},
    "noise": {"dac": ERRORS, "read_noise": {"sigma": 1e-9, "sigma_g": 1e-9}},
}
BASE = {
    "tile": {"rows": 8, "cols": 4}, "mapping": {"scheme": "subtracted"}, "dac": {"bits": 8}, "device": {"v_sinh": 0.1},
    "adc": {"bits": None},
}  # fmt: skip
CONVERTED = {"adc": {"bits": 16, "range": "worst_case"}}


def spec_of(*parts):
    spec = gx.CrossbarSpec(**BASE)
    for part in parts:
        spec = spec.with_overrides(part)
    return spec


def layer_of(shape, spec):
    torch.manual_seed(0)
    if shape == "conv":
        return AnalogConv2d(4, 6, 3, padding=1, groups=2, bias=False, spec=spec)
    return AnalogLinear(20, 6, bias=False, spec=spec)


def driven_volts(layer, digits, backward):
    """What devices see of digits [n, lines], V: by the settings alone."""
    spec = layer.spec
    dac = spec.backward_dac if backward else spec.dac
    rows = np.arange(3) + (3 if backward else 0)
    z = reference.normals(rows, digits.shape[1], slot=0, purpose=Purpose.DAC_ERROR, seed=layer.plan.seed)
    most = 1 if dac.bits is None else 2**dac.stream_bits - 1 if dac.stream_bits else 2 ** (dac.bits - dac.signed) - 1
    u = digits / most
    bent = digits + np.sqrt(27 / 4) * (dac.inl + dac.inl_std * z[2]) * (u - u**3)
    volts = bent * dac.v_read / most * (1 + dac.gain_std * z[0]) + dac.offset_std * z[1]
    v_sinh = spec.device.v_sinh
    seen = volts if v_sinh is None else dac.v_read * np.sinh(volts / v_sinh) / np.sinh(dac.v_read / v_sinh)
    return seen / (dac.v_read / most)


def seen_values(layer, values, samples, backward):
    """Digital values [n, lines] of some samples with what DACs and devices make of them."""
    dac = layer.spec.backward_dac if backward else layer.spec.dac
    top = np.abs(values).max()
    if dac.range == "sample":
        top = np.abs(values).reshape(samples, -1).max(1).repeat(len(values) // samples)[:, None]
    if dac.bits is None:
        return driven_volts(layer, values / top, backward) * top
    code_max = 2 ** (dac.bits - dac.signed) - 1
    codes = np.rint(values / top * code_max).astype(int)
    bits = dac.stream_bits or 15
    signs = [1, -1] if dac.polarity == "two_phase" else [0]
    seen = 0.0
    for sign, k in itertools.product(signs, range(-(-code_max.bit_length() // bits))):
        part = codes if not sign else np.maximum(sign * codes, 0)
        digits = np.sign(part) * (np.abs(part) >> (k * bits) & (2**bits - 1))
        seen = seen + (sign or 1) * 2.0 ** (k * bits) * driven_volts(layer, digits, backward)
    return seen * top / code_max


def expected(layer, x, grad_y):
    """Output and gradients of a layer whose ADCs are exact."""
    weight = layer.weight.detach().double().numpy()
    x, grad_y = (part.detach().double().numpy() for part in (x, grad_y))
    if x.ndim == 2:
        seen, back = (seen_values(layer, part, len(x), k) for k, part in enumerate((x, grad_y)))
        return seen @ weight.T, back @ weight
    conv = ConvGeometry(2, *x.shape[2:], (3, 3), padding=(1, 1))
    n, groups = len(x), 2
    seen = seen_values(layer, reference.unfold(x, conv), n, False).reshape(-1, groups, conv.inputs)
    rows = grad_y.transpose(0, 2, 3, 1).reshape(-1, 6)
    back = seen_values(layer, rows, n, True).reshape(-1, groups, 3)
    kernels = weight.reshape(groups, 3, conv.inputs)
    y = np.einsum("bgi,goi->bgo", seen, kernels).reshape(n, *x.shape[2:], 6).transpose(0, 3, 1, 2)
    patches = np.einsum("bgo,goi->bgi", back, kernels).reshape(-1, groups * conv.inputs)
    return y, reference.fold(patches, n, conv)


def run(layer, x, grad_y):
    x = x.clone().requires_grad_()
    y = layer(x)
    layer.weight.grad = None
    y.backward(grad_y)
    return y.detach(), x.grad


def inputs_of(shape, batch, signed=True):
    torch.manual_seed(1)
    x, grad_y = ((batch, 4, 5, 7), (batch, 6, 5, 7)) if shape == "conv" else ((batch, 20), (batch, 6))
    x = torch.randn(x)
    return x if signed else x.abs(), torch.randn(grad_y)


@pytest.mark.parametrize("backend", ["host", "reference"])
@pytest.mark.parametrize("batch", [1, 70], ids=["few", "block"])
@pytest.mark.parametrize("shape", ["linear", "conv"])
@pytest.mark.parametrize("converted", [{}, CONVERTED], ids=["as-they-are", "converted"])
@pytest.mark.parametrize("way", WAYS)
def test_layers_read_as_their_settings_say(way, converted, shape, batch, backend, monkeypatch):
    """Against a simulation of those; ADCs are fine enough, and their range holds all."""
    if backend == "reference" and batch > 1 and shape == "conv":
        batch = 2
    monkeypatch.setattr("gpuxbar.launch.host.WANTED", backend)
    layer = layer_of(shape, spec_of(WAYS[way], converted))
    x, grad_y = inputs_of(shape, batch, layer.spec.dac.signed)
    close = 3e-3 if converted or way == "noise" else 2e-6
    for found, wanted in zip(run(layer, x, grad_y), expected(layer, x, grad_y), strict=True):
        assert np.abs(found.numpy() - wanted).max() < 10 * close * np.abs(wanted).max()
        assert np.square(found.numpy() - wanted).mean() < np.square(close * np.abs(wanted).max())
