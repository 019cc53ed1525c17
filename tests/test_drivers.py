"""DACs with errors and devices that are not ohmic: the array operation against closed forms, layers against their settings."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from tape import gpu_path
from torch import nn
from torch.utils.checkpoint import checkpoint

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
    "array": (
        {"error": np.ones((3, 4), np.float32)},
        r"`drivers.error` must have shape \(3, 5\).*, got \(3, 4\)",
    ),
    "steep": (
        {"v_sinh": 0.009},
        r"`drivers.v_sinh` must be finite and at least v_read / 20 = 0.01 V, got 0.009",
    ),
    "endless": ({"v_sinh": np.inf}, r"`drivers.v_sinh` must be finite"),
    "v_read": (
        {"v_read": 0.0},
        r"`drivers.v_read` must be above 0 V, got 0 V; it is the voltage of the largest digit",
    ),
}


def test_drivers_are_an_object():
    with pytest.raises(TypeError, match=r"`drivers` must be an ops.Drivers, got dict; None drives lines"):
        ops.tile_mvm(np.zeros((2, 5), np.int16), np.ones((5, 3), np.float32), drivers={"v_read": V_READ})


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    change, text = REFUSED[name]
    with pytest.raises(ValueError, match=text):
        ops.tile_mvm(
            np.zeros((2, 5), np.int16),
            np.ones((5, 3), np.float32),
            drivers=ops.Drivers(**{"v_read": V_READ, **change}),
        )


class Cupy(np.ndarray):
    """An array that says it is on a GPU."""

    __module__ = "cupy"


@pytest.mark.parametrize("name", ["drivers.error", "adc_gain", "g"])
def test_what_is_not_on_the_gpu_is_named_as_the_caller_names_it(name):
    error, gain, g = (np.ones(shape, np.float32).view(Cupy) for shape in ((3, 5), (1, 1, 3), (5, 3)))
    here = {"drivers.error": error, "adc_gain": gain, "g": g}
    here[name] = here[name].view(np.ndarray)
    with pytest.raises(
        TypeError, match=rf"tile_mvm: `{name}` must be a CuPy array, as `v` is, got ndarray; move it by cupy"
    ):
        ops.tile_mvm(
            np.zeros((2, 5), np.int16).view(Cupy),
            here["g"],
            adc_bits=8,
            adc_lsb=1e-6,
            adc_gain=here["adc_gain"],
            drivers=ops.Drivers(V_READ, here["drivers.error"]),
        )


ERRORS = {"gain_std": 0.05, "offset_std": 0.004, "inl": 0.2, "inl_std": 0.2}
WAYS = {
    "whole": {"dac": {**ERRORS, "inl": -6.0, "inl_std": 2.0}},
    "ohmic": {"dac": {**ERRORS, "range": "sample"}, "device": {"v_sinh": None}},
    "sinh": {"dac": {}},
    "no-dac": {"dac": {"bits": None}},
    "1-bit": {"dac": {**ERRORS, "inl": 0.1, "inl_std": 0.1, "stream_bits": 1}},
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


def layer_of(shape, spec, stride=1):
    torch.manual_seed(0)
    if shape == "conv":
        return AnalogConv2d(4, 6, 3, stride, padding=1, groups=2, bias=False, spec=spec)
    return AnalogLinear(20, 6, bias=False, spec=spec)


def driven_volts(layer, digits, backward):
    """What devices see of digits [n, lines], V: by the settings alone."""
    spec = layer.spec
    dac = spec.backward_dac if backward else spec.dac
    rows = np.arange(3) + (7 if backward else 4)
    z = reference.normals(rows, digits.shape[1], slot=0, purpose=Purpose.ADC_GAIN, seed=layer.plan.seed)
    most = (
        1
        if dac.bits is None
        else 2**dac.stream_bits - 1
        if dac.stream_bits
        else 2 ** (dac.bits - dac.signed) - 1
    )
    u = digits / most
    inl = np.clip(dac.inl + dac.inl_std * z[2], -most / 6, most / 6)  # no curve turns back
    bent = digits + np.sqrt(27 / 4) * inl * (u - u**3)
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


@pytest.mark.parametrize("batch", [1, 70], ids=["few", "block"])
@pytest.mark.parametrize("shape", ["linear", "conv"])
@pytest.mark.parametrize("converted", [{}, CONVERTED], ids=["as-they-are", "converted"])
@pytest.mark.parametrize("way", WAYS)
def test_layers_read_as_their_settings_say(way, converted, shape, batch, backend):
    """Against a simulation of those; ADCs are fine enough, and their range holds all."""
    if backend == "reference" and batch > 1 and shape == "conv":
        batch = 2
    layer = layer_of(shape, spec_of(WAYS[way], converted))
    x, grad_y = inputs_of(shape, batch, layer.spec.dac.signed)
    close = 3e-3 if converted or way == "noise" else 2e-6
    for found, wanted in zip(run(layer, x, grad_y), expected(layer, x, grad_y), strict=True):
        assert np.abs(found.numpy() - wanted).max() < 10 * close * np.abs(wanted).max()
        assert np.square(found.numpy() - wanted).mean() < np.square(close * np.abs(wanted).max())


@pytest.mark.parametrize("way", ["whole", "sinh", "2-bits"])
def test_images_of_whole_vectors_are_driven_as_others(way):
    """Their lines drive arrays from where they lie, but by DACs with errors, where every line of an array has its own."""
    layer = layer_of("conv", spec_of(WAYS[way]))
    x, grad_y = torch.randn(2, 4, 8, 16), torch.randn(2, 6, 8, 16)
    for found, wanted in zip(run(layer, x, grad_y), expected(layer, x, grad_y), strict=True):
        np.testing.assert_allclose(found.numpy(), wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("way", ["whole", "sinh", "2-bits"])
def test_strided_patches_are_driven_as_others(way):
    every, some = (layer_of("conv", spec_of(WAYS[way]), stride) for stride in (1, 2))
    x = torch.randn(2, 4, 16, 64)  # outputs of whole vectors
    torch.testing.assert_close(some(x), every(x)[..., ::2, ::2])


@pytest.mark.parametrize("shape", ["linear", "conv"])
@pytest.mark.parametrize("way", ["whole", "sinh", "2-bits", "no-dac", "of-its-own"])
def test_layers_on_a_gpu_read_as_their_settings_say(way, shape, monkeypatch):
    layer, (x, grad_y) = layer_of(shape, spec_of(WAYS[way])), inputs_of(shape, 3)
    with gpu_path(monkeypatch, order=11):
        found = run(layer, x, grad_y)
    for each, wanted in zip(found, expected(layer, x, grad_y), strict=True):
        np.testing.assert_allclose(each.numpy(), wanted, atol=2e-5 * np.abs(wanted).max())


def test_no_two_draws_are_alike():
    """Gains, offsets and curves of the lines, forwards and backwards; ADCs have their own."""
    flawed = {"gain_std": 0.1, "offset_std": 1e-3, "inl": -3.0, "inl_std": 0.5}
    adc = {"bits": 8, "range": "worst_case", "gain_std": 0.1, "offset_std": 1e-9, "inl_std": 0.5}
    spec = spec_of({"tile": {"rows": 400, "cols": 400}, "dac": flawed, "adc": adc})
    layer = AnalogLinear(400, 400, spec=spec)
    parts = layer.dac_error, layer.back_dac_error, layer.adc_error[:, 0, 0], layer.back_adc_error[:, 0, 0]
    errors = torch.cat(parts)
    assert (torch.corrcoef(errors) - torch.eye(12)).abs().max() < 4 / 400**0.5
    assert errors.std(1)[:6] == pytest.approx([0.1, 1e-3, 0.5] * 2, rel=0.2)
    assert errors.mean(1)[[0, 2, 3, 5]] == pytest.approx([1, -3, 1, -3], abs=0.1)
    other = AnalogLinear(400, 400, spec=spec, name="other")
    assert not torch.isclose(other.dac_error, layer.dac_error).any(1).all()


def test_a_line_has_one_dac_in_all_column_tiles_planes_and_passes():
    """Equal weights make equal products, whichever tile they lie on."""
    parts = {"dac": {**ERRORS, "stream_bits": 2}, "mapping": {"slices": 2, "slice_bits": 2}}
    layer = AnalogLinear(20, 8, bias=False, spec=spec_of(parts))
    nn.init.uniform_(layer.weight[:1])
    with torch.no_grad():
        layer.weight[1:] = layer.weight[:1]
    y = layer(torch.randn(3, 20))
    torch.testing.assert_close(y, y[:, :1].expand(-1, 8))


def test_gradients_are_straight_through_and_weights_follow_the_codes():
    """Zero where a value clips; the weight's is that of ideal drivers, bit for bit."""
    fixed = {"bits": 8, "range": "fixed", "max": 1.0}
    x, grad_y = inputs_of("linear", 30)
    grads = []
    for parts in ({"dac": {**fixed, **ERRORS, "inl": -6.0}}, {"dac": fixed, "device": {"v_sinh": None}}):
        layer = layer_of("linear", spec_of(parts, {"backward": {"mode": "ideal"}}))
        y, grad_x = run(layer, x, grad_y)
        assert (grad_x[x.abs() > 1] == 0).all()
        torch.testing.assert_close(grad_x, (grad_y @ layer.weight.detach()) * (x.abs() <= 1))
        grads.append(layer.weight.grad)
    assert torch.equal(*grads)
    assert layer.back_dac_error is None


@pytest.mark.parametrize("way", ["whole", "two-phase", "2-bits", "unsigned", "differential", "no-dac"])
def test_the_worst_case_is_that_of_the_drivers(way):
    """With every cell at `g_max` and lines driven with what each makes most of, nothing clips, and nothing is to spare."""
    spec = spec_of(WAYS[way], {"adc": {"bits": 16, "range": "worst_case"}, "tile": {"rows": 64, "cols": 64}})
    for seed in range(3):
        layer = AnalogLinear(20, 6, bias=False, spec=spec.with_overrides({"seed": seed}))
        for backward, lines in ((False, 20), (True, 6)):
            dac = spec.backward_dac if backward else spec.dac
            most = 1 if dac.bits is None else dac.digit_max
            digits = np.arange(-most, most + 1)[:, None].repeat(lines, 1)
            one_sided = dac.phases == 2 or not dac.signed
            seen = np.abs(driven_volts(layer, digits[most:] if one_sided else digits, backward)).max(0).sum()
            full = (layer.back_adc_range if backward else layer.adc_range).item()
            assert full == pytest.approx(seen * dac.v_read / most * spec.device.g_max, rel=1e-5)
    assert full != pytest.approx(6 * 0.2 * spec.device.g_max, rel=1e-3) or way == "no-dac"


def test_ranges_are_calibrated_by_the_currents_of_the_drivers():
    x, ranges = torch.randn(200, 20), []
    for gain_std in (0.0, 0.5):
        parts = {
            "dac": {"gain_std": gain_std},
            "device": {"v_sinh": None},
            "adc": {"bits": 8, "percentile": 100},
        }
        layer = layer_of("linear", spec_of(parts, {"tile": {"rows": 32}}))
        gx.calibrate(layer, [x])
        ranges.append(layer.adc_range.item())
        codes = torch.round(x / x.abs().max() * 127).numpy()
        currents = driven_volts(layer, codes, False) * 0.2 / 127 @ layer.cells[0].numpy()
        assert ranges[-1] == pytest.approx(np.abs(currents).max(), rel=1e-5)
    assert ranges[0] != pytest.approx(ranges[1], rel=0.02)


def test_offsets_alone_calibrate_nothing():
    """Where a loss does not depend on a layer yet, the range of its gradients is that of the worst case."""
    parts = {"dac": {"offset_std": 1e-3}, "device": {"v_sinh": None}, "adc": {"bits": 8}}
    layer = layer_of("linear", spec_of(parts))
    with pytest.warns(RuntimeWarning, match="got none of linear backwards"):
        gx.calibrate(layer, [torch.randn(9, 20)], loss=lambda y, _: (0 * y).sum())
    worst = layer_of("linear", spec_of(parts, CONVERTED))
    assert torch.equal(layer.back_adc_range, worst.back_adc_range)
    assert not torch.equal(layer.adc_range, worst.adc_range)


@pytest.mark.parametrize("polarity", ["bipolar", "two_phase"])
def test_offsets_are_not_cut_off(polarity):
    """Currents of unsigned inputs, and of phases, have both signs then, and so have codes."""
    dac = {"signed": polarity == "two_phase", "polarity": polarity, "offset_std": 2e-3}
    parts = {"dac": dac, "mapping": {"scheme": "differential"}, "device": {"v_sinh": None}}
    layer = layer_of("linear", spec_of(parts, CONVERTED, {"adc": {"bits": 12}}))
    assert layer.plan.forward.adc_signed
    without = layer_of("linear", layer.spec.with_overrides({"dac": {"offset_std": 0.0, "gain_std": 0.1}}))
    assert not without.plan.forward.adc_signed
    x, grad_y = torch.zeros(2, 20), torch.ones(2, 6)
    x[0, 0] = 1.0  # nothing but offsets besides
    y, _ = run(layer, x, grad_y)
    wanted, _ = expected(layer, x, grad_y)
    np.testing.assert_allclose(y.numpy(), wanted, atol=0.02 * np.abs(wanted).max())


def test_what_knows_two_voltages_is_read_exactly():
    """TxSim's streams of one bit drive 0 or `v_read`: its conversions stay one product on devices that are not ohmic. Errors of
    DACs are no whole steps."""
    sinh = gx.presets.txsim(16).with_overrides({"device": {"v_sinh": 0.05}})
    x, grad_y = inputs_of("linear", 5)
    found = [run(layer_of("linear", spec), x, grad_y) for spec in (sinh, gx.presets.txsim(16))]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert layer_of("linear", sinh).plan.forward.adc_bits == 0
    flawed = sinh.with_overrides({"dac": {"gain_std": 0.01}})
    assert layer_of("linear", flawed).plan.forward.adc_bits > 0
    (why,) = layer_of(
        "linear", flawed.with_overrides({"adc": {"bits": None, "range": "calibrated", "i_max": None}})
    ).plan.why
    assert why.endswith("; streams are driven apart, since digits are not driven in proportion")


EVERYTHING = spec_of(
    {
        "dac": {**ERRORS, "stream_bits": 2, "polarity": "two_phase"},
        "read_noise": {"sigma": 1e-8, "sigma_g": 1e-8},
    },
    {"adc": {"bits": 10, "range": "worst_case", "gain_std": 0.01}},
)


@pytest.mark.parametrize("shape", ["linear", "conv"])
def test_copies_states_and_compiled_graphs_drive_alike(shape):
    layer, (x, grad_y) = layer_of(shape, EVERYTHING), inputs_of(shape, 3)
    copied, loaded = copy.deepcopy(layer), layer_of(shape, EVERYTHING)
    assert not [name for name in layer.state_dict() if "dac_error" in name]
    loaded.load_state_dict(layer.state_dict())
    compiled = copy.deepcopy(layer)
    wanted = run(layer, x, grad_y)
    others = [run(other, x, grad_y) for other in (copied, loaded)]
    graph = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    again = x.clone().requires_grad_()
    y = graph(again)
    y.backward(grad_y)
    others.append((y.detach(), again.grad))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(wanted, other, strict=True))


def test_bfloat_layers_and_recomputed_passes():
    layer, (x, grad_y) = layer_of("linear", EVERYTHING), inputs_of("linear", 3)
    half, again = copy.deepcopy(layer).bfloat16(), copy.deepcopy(layer)
    y, _ = run(layer, x, grad_y)
    assert torch.equal(half.dac_error, layer.dac_error)
    low, _ = run(half, x.bfloat16(), grad_y.bfloat16())
    assert low.dtype is torch.bfloat16
    assert (low.float() - y).abs().max() < 0.1 * y.abs().max()
    given = x.clone().requires_grad_()
    recomputed = checkpoint(again, given, use_reentrant=False, context_fn=lambda: gx.same_reads(again))
    recomputed.backward(grad_y)
    assert torch.equal(recomputed.detach(), y)
    assert torch.equal(again.weight.grad, layer.weight.grad)


def test_other_drivers_forget_calibrated_ranges():
    model = layer_of("linear", spec_of({"adc": {"bits": 8}}))
    gx.calibrate(model, [torch.randn(9, 20)])
    for parts in (
        {"device": {"v_sinh": 0.2}},
        {"dac": {"gain_std": 0.1}},
        {"backward": {"dac": {"bits": 8, "inl": 1.0}}},
    ):
        other = layer_of("linear", model.spec.with_overrides(parts))
        other.load_state_dict(model.state_dict())
        assert not other.calibrated
    same = layer_of("linear", model.spec.with_overrides({"read_noise": {"sigma": 1e-9}}))
    same.load_state_dict(model.state_dict())
    assert same.calibrated


def test_programmed_and_trained_arrays_are_driven_alike():
    """Which devices they are does not matter to drivers; a step in situ moves them by the codes."""
    x, grad_y = inputs_of("linear", 30)
    parts = {"dac": ERRORS, "update": {"law": "soft_bounds", "up": 2, "down": 2}}
    trained = [
        layer_of("linear", spec_of(each, {"backward": {"mode": "ideal"}}))
        for each in (parts, {**parts, "dac": {}, "device": {"v_sinh": None}})
    ]
    for layer in trained:
        optimiser = gx.optim.InSituSGD(layer.parameters(), lr=0.01)
        run(layer, x, grad_y)
        optimiser.step()
    assert torch.equal(trained[0].g_cells, trained[1].g_cells)
    y, _ = run(trained[0], x, grad_y)
    np.testing.assert_allclose(y.numpy(), expected(trained[0], x, grad_y)[0], atol=1e-4)
    layer = layer_of("linear", spec_of({"dac": ERRORS, "drift": {"nu": 0.05}}))
    gx.program(layer)
    y, _ = run(layer, x, grad_y)
    np.testing.assert_allclose(y.numpy(), expected(layer, x, grad_y)[0], atol=1e-4)
    gx.age(layer, "1y", compensate=True)
    aged, _ = run(layer, x, grad_y)
    torch.testing.assert_close(aged, y, rtol=0, atol=1e-4)


WRONG = {
    "bits": (
        {"dac": {"bits": None, "gain_std": 0.1}},
        "`dac`: `bits` must be set with converter errors, got None with gain_std=0.1, offset_std=0",
    ),
    "inl": (
        {"dac": {"bits": 8, "inl": 30.0}},
        r"`dac`: `inl` must be within \+-21.1667 steps, a sixth of the largest digit, got 30",
    ),
    "spread": ({"dac": {"bits": 8, "inl_std": 30.0}}, r"`dac`: `inl_std` must be within \+-21.1667 steps"),
    "inl of streams": (
        {"dac": {"bits": 8, "stream_bits": 2, "inl": 1.0}},
        r"`inl` must be within \+-0.5 steps",
    ),
    "volts": (
        {"dac": {"bits": 8, "offset_std": 0.3}},
        "`dac.offset_std` must be at most 0.2 V, the dac.v_read, got 0.3 V",
    ),
    "steep": (
        {"device": {"v_sinh": 0.009}},
        "`device.v_sinh` must be at least v_read / 20 = 0.01 V, got 0.009 V; such devices",
    ),
    "another voltage": (
        {"device": {"v_sinh": 0.1}, "backward": {"dac": {"v_read": 0.1}}},
        "`backward.dac.v_read` must be that of `dac` with device.v_sinh, 0.2 V, got 0.1 V; conductances",
    ),
    "wires": (
        {"device": {"v_sinh": 0.1}, "parasitics": {"r_source": 1.0, "terminations": "line"}},
        "`device.v_sinh` must be None with parasitics, got 0.1 V; wires are solved as a network of linear",
    ),
    "bytes": (
        {
            "precision": "int8",
            "device": {"levels": 4, "v_sinh": 0.1},
            "dac": {"bits": 8},
            "adc": {"bits": 8, "range": "worst_case"},
        },
        "must be fp16 or fp16x2 where devices are not ohmic",
    ),
    "bytes of DACs": (
        {
            "precision": "int8",
            "device": {"levels": 4},
            "dac": {"bits": 8, "gain_std": 0.1},
            "adc": {"bits": 8, "range": "worst_case"},
        },
        "must be fp16 or fp16x2 where DACs have errors",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_spec_refuses(name):
    settings, text = WRONG[name]
    with pytest.raises(ValueError, match=text):
        gx.CrossbarSpec(**settings)


def test_a_spec_takes_devices_of_a_curve():
    """Where it has no effect, too."""
    assert gx.CrossbarSpec(device={"v_sinh": 0.1}, parasitics={"method": "ladder"}).device.v_sinh == 0.1
    voltages = {"dac": {"bits": 8, "stream_bits": 1}, "adc": {"bits": 8, "range": "worst_case"}}
    assert (
        gx.CrossbarSpec(precision="int8", device={"levels": 4, "v_sinh": 0.1}, **voltages).device.v_sinh
        == 0.1
    )
    drawn = {key: gx.CrossbarSpec(dac={"bits": 8, key: 0.1}).draws for key in ERRORS}
    assert drawn == {"gain_std": True, "offset_std": True, "inl": False, "inl_std": True}


def test_errors_of_dacs_pass_wires_by_superposition():
    """A read through wires is that of the effective conductances, whatever drives them."""
    wires = {"r_wordline": 300.0, "r_bitline": 300.0, "r_source": 1000.0, "r_sink": 1000.0}
    layer = layer_of("linear", spec_of({"dac": ERRORS, "device": {"v_sinh": None}, "parasitics": wires}))
    x, grad_y = inputs_of("linear", 7)
    y, grad_x = run(layer, x, grad_y)
    seen = layer.conductances().g[0].double().numpy()  # on the far side of the wires
    scale = layer.planes.unit * layer.weight.abs().max().item()
    for found, values, g, backward in ((y, x, seen, False), (grad_x, grad_y, seen.T, True)):
        wanted = seen_values(layer, values.double().numpy(), len(values), backward) @ g * scale
        np.testing.assert_allclose(found.numpy(), wanted, atol=1e-5 * np.abs(wanted).max())
    weight = layer.weight.detach().numpy()
    assert np.abs(seen.T * scale - weight).max() > 0.01 * np.abs(weight).max()


def test_devices_that_hardly_bend_drive_tensors_as_ohmic_ones_do():
    digits = torch.arange(-127, 128, dtype=torch.float32)
    volts = ops.Drivers(v_read=0.2, v_sinh=1e6).driven(digits, 0.2 / 127)
    torch.testing.assert_close(volts, digits * (0.2 / 127), rtol=1e-6, atol=0)
