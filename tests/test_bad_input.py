"""What must be refused, in words that name the argument, the rule, the value and the way out."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch
from torch import nn

import gpuxbar as gx
from gpuxbar import ops, spec
from gpuxbar.launch import host_call, host_library
from gpuxbar.nn import AnalogConv1d, AnalogConv2d, AnalogLinear
from gpuxbar.ops import ConvGeometry


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def with_value(array, value):
    array.flat[1] = value
    return array


CODES = {"v": zeros(2, 3, dtype=np.int16)}
READS = {
    "nan": ({"v": with_value(zeros(2, 3), np.nan)}, "`v` must be finite, got 1 NaN or infinite values; look"),
    "inf": ({"v": with_value(zeros(2, 3), -np.inf)}, "`v` must be finite, got 1 NaN or infinite values; look"),
    "no-rows": ({"v": zeros(2, 0), "g": zeros(0, 4)}, r"`g` must hold at least one cell, got shape \(1, 0, 4\)"),
    "no-columns": ({"g": zeros(3, 0)}, r"`g` must hold at least one cell, got shape \(1, 3, 0\)"),
    "no-planes": ({"g": zeros(0, 3, 4)}, r"`g` must hold at least one cell, got shape \(0, 3, 4\)"),
    "no-bits": ({"adc_bits": 0, "adc_lsb": 1.0}, "`adc_bits` must be 1 to 16, got 0; None switches the ADC off"),
    "half-bits": ({"adc_bits": 8.5, "adc_lsb": 1.0}, "`adc_bits` must be 1 to 16, got 8.5"),
    "lsb-nan": ({"adc_bits": 8, "adc_lsb": float("nan")}, "`adc_lsb` must be finite, got nan A"),
    "lsb-sign": ({"adc_bits": 8, "adc_lsb": with_value(zeros(4) + 1, -2)}, "`adc_lsb` must be above 0 A, got -2 A"),
    "lsb-scalar": ({"adc_bits": 8, "adc_lsb": np.float32(0)}, "`adc_lsb` must be above 0 A, got 0 A; use the full"),
    "lsb-count": ({"adc_bits": 8, "adc_lsb": zeros(3) + 1}, "`adc_lsb` must have 1 or 4 values, got 3"),
    "sigma": ({"read_noise": -1e-9}, "`read_noise` must be at least 0 A, got -1e-09 A; it is a standard deviation"),
    "sigma-nan": ({"read_noise": float("nan")}, "`read_noise` must be finite, got nan A"),
    "sigmas": ({"read_noise": zeros(2) + 1}, "`read_noise` must be one value, got 2; noise_var takes one for each"),
    "sigma-square": ({"read_noise": 1e19}, "`read_noise` must be at most 1e\\+18 A for its v_lsb and conductances, got 1e\\+19 A; float32"),
    "sigma-array": ({"v_lsb": 1e-3, "read_noise": zeros(1) + 2e15}, "`read_noise` must be at most 1e\\+15 A for its v_lsb"),
    "sigma-half": ({**CODES, "precision": "fp16", "g_range": 1e-6, "read_noise": 1e9}, "`read_noise` must be at most 1.16415e\\+08 A"),
    "sigma-levels": ({**CODES, "precision": "int8", "g_step": 1e-6, "read_noise": 1e13}, "`read_noise` must be at most 1e\\+12 A"),
    "volts": ({"v_lsb": 0}, "`v_lsb` must be above 0 V, got 0 V"),
    "precision": ({"precision": "fp8"}, "`precision` must be one of fp32, tf32, fp16, fp16x2, bf16, int8, got 'fp8'"),
    "range": ({**CODES, "precision": "fp16"}, "`g_range` must be a normal number of float32 above 0 S with precision='fp16', got None"),
    "range-inf": ({**CODES, "precision": "fp16", "g_range": float("inf")}, "`g_range` must be a normal number .* got inf; give"),
    "range-tiny": ({**CODES, "precision": "fp16x2", "g_range": 1e-310}, "`g_range` must be a normal number .* got 1e-310; give"),
    "range-nan": ({**CODES, "precision": "fp16x2", "g_range": float("nan")}, "`g_range` must be a normal number of float32 above 0 S with precision='fp16x2', got nan"),
    "int8-drivers": ({**CODES, "precision": "int8", "g_range": 1.0, "g_step": 1.0, "drivers": ops.Drivers(0.2, zeros(3, 3))},
                     "`precision` must be another with drivers, got 'int8', which multiplies whole digits"),
    "patches": ({"v": zeros(1, 1, 3, 3), "conv": ConvGeometry(1, 3, 3, (2, 2))}, "`conv` must have 3 inputs a group, the rows of `g`, got 4"),
    "folded-gate": ({"v": zeros(1, 4, 2, 2), "g": zeros(4, 4), "conv": ConvGeometry(1, 3, 3, (2, 2)), "transposed": True, "want_gate": True},
                    "`want_gate` and `bias` must not be given with a transposed convolution"),
    "step": ({"step": 1.5}, "`step` must be one integer, got 1.5; count the reads"),
    "groups": ({"groups": 0}, "`groups` must divide the 3 rows of `g`, got 0"),
    "variance-axes": ({"noise_var": zeros(1, 3, 4)}, "`noise_var` must have 2 axes, got 3"),
    "variance-shape": ({"noise_var": zeros(4, 3)}, r"`noise_var` must have shape \(1, 3, 4\), got \(1, 4, 3\)"),
    "row-scale": ({"row_scale": zeros(3)}, "`row_scale` must have a length that divides the 2 rows, got 3"),
    "no-row-scale": ({"row_scale": zeros(0)}, "`row_scale` must have a length that divides the 2 rows, got 0"),
    "stream-bits": ({**CODES, "stream_bits": 16}, "`stream_bits` must be 0 to 15, got 16; 0 drives the whole value"),
    "no-streams": ({**CODES, "stream_bits": 2, "streams": 0}, "`streams` must cover up to 15 bits of a code, got 0"),
    "streams": ({**CODES, "stream_bits": 8, "streams": 3}, "`streams` must cover up to 15 bits of a code, got 3 of 8"),
    "one-stream": ({**CODES, "streams": 2}, "`streams` must cover up to 15 bits of a code, got 2 of 0 bits"),
    "phases": ({**CODES, "stream_bits": 7, "phases": 3}, "`phases` must be 1, or 2 with stream_bits, got 3"),
    "axes": ({"v": zeros(3)}, "`v` must have 2 axes, got 1"),
    "shape": ({"v": zeros(2, 4)}, r"`v` must have shape \(2, 3\)"),
    "bits": ({"adc_bits": 17, "adc_lsb": 1.0}, "`adc_bits` must be 1 to 16, got 17"),
    "sign": ({"adc_bits": 1, "adc_lsb": 1.0}, "`adc_bits` must be 2 to 16 for signed currents, got 1"),
    "lsb": ({"adc_bits": 8, "adc_lsb": 0.0}, "`adc_lsb` must be above 0 A, got 0 A"),
    "no-lsb": ({"adc_bits": 8}, "`adc_lsb` must be given with adc_bits=8"),
    "lsb-without-bits": ({"adc_lsb": 1e-7}, "`adc_lsb` must go with adc_bits"),
    "gain-without-bits": ({"adc_gain": zeros(1, 1, 3) + 1}, "`adc_gain` must go with adc_bits"),
    "tile": ({"tile_rows": 0}, "`tile_rows` must be at least 1, got 0"),
    "conversions": ({"v": zeros(1, 2**20, dtype=np.int16), "g": zeros(2**20, 1), "tile_rows": 1, "stream_bits": 1, "streams": 15, "phases": 2},
                    r"`tile_rows` must make at most 2\^24 conversions of a result, got 1 planes x 1048576 tiles x 30 passes"),
    "odd-groups": ({"groups": 2}, "`groups` must divide the 3 rows"),
    "bias": ({"bias": zeros(3)}, r"`bias` must have shape \(4,\), got \(3,\)"),
    "generator": ({"generator": "quick"}, "`generator` must be 'exact' or 'fast', got 'quick'"),
    "one-phase": ({**CODES, "phases": 2}, "`phases` must be 1, or 2 with stream_bits, got 2"),
}  # fmt: skip
DTYPES = {
    "int64": ({"v": zeros(2, 3, dtype=np.int64)}, "`v` must be an array of float32 or int16, got int64"),
    "swapped": ({"v": zeros(2, 3, dtype=">f4")}, "`v` must be an array of float32 or int16, got byte-swapped"),
    "values": ({"v": [[1.0]]}, "`v` must be an array of float32 or int16, got list"),
    "list": ({"noise_var": [1.0]}, "`noise_var` must be an array of float32, got list; make it one by np.array"),
    "tensor": ({"v": torch.zeros(2, 3)}, "`v` must be an array of float32 or int16, got Tensor; make it one by np.array"),
    "streams": ({"stream_bits": 2, "streams": 4}, "`v` must be int16 codes with stream_bits=2, got float32"),
}  # fmt: skip


@pytest.mark.parametrize("name", READS)
@pytest.mark.usefixtures("backend")
def test_reads(name):
    change, text = READS[name]
    with pytest.raises(ValueError, match=f"^tile_mvm: {text}"):
        ops.tile_mvm(**{"v": zeros(2, 3), "g": zeros(3, 4), **change})


@pytest.mark.parametrize("name", DTYPES)
def test_types_of_reads(name):
    change, text = DTYPES[name]
    with pytest.raises(TypeError, match=f"^tile_mvm: {text}"):
        ops.tile_mvm(**{"v": zeros(2, 3), "g": zeros(3, 4), **change})


@pytest.mark.parametrize("name", ["v", "g", "noise_var", "adc_gain", "bias", "col_scale", "slice_scale"])
def test_strided_arrays_are_refused_by_name(name):
    """A raw kernel would read them as if they were contiguous."""
    arrays = {
        "v": zeros(2, 3), "g": zeros(2, 3, 4), "noise_var": zeros(2, 3, 4), "adc_gain": zeros(2, 1, 4), "bias": zeros(4),
        "col_scale": zeros(4), "slice_scale": zeros(2),
    }  # fmt: skip
    ops.tile_mvm(**arrays, adc_bits=8, adc_lsb=1.0)
    wide = np.repeat(arrays[name], 2, axis=-1)
    arrays[name] = wide[..., ::2]
    with pytest.raises(ValueError, match=f"^tile_mvm: `{name}` must be C-contiguous, got strides"):
        ops.tile_mvm(**arrays, adc_bits=8, adc_lsb=1.0)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kernel": (4, 2)}, r"`kernel` must fit into the padded image, got \(4, 2\) for 3 x 3 with padding \(0, 0\)"),
        ({"kernel": (2, 2), "dilation": (1, 3)}, "`kernel` must fit into the padded image"),
        ({"stride": (0, 1)}, r"`stride` must be at least 1, got \(0, 1\)"),
        ({"padding": (0, -1)}, r"`padding` must be at least 0, got \(0, -1\)"),
        ({"dilation": (0, 1)}, r"`dilation` must be at least 1, got \(0, 1\)"),
    ],
)  # fmt: skip
def test_impossible_convolutions(change, text):
    with pytest.raises(ValueError, match=f"^ConvGeometry: {text}"):
        ConvGeometry(**{"channels": 1, "height": 3, "width": 3, "kernel": (2, 2), **change})


DACS = {
    "lsb": ({"lsb": 0.0}, "`lsb` must be above 0, got 0; it is the value of one code"),
    "sign": ({"lsb": -0.5}, "`lsb` must be above 0, got -0.5"),
    "inf": ({"lsb": float("inf")}, "`lsb` must be finite, got inf"),
    "nan": ({"lsb": with_value(zeros(3) + 1, np.nan)}, "`lsb` must be finite, got nan"),
    "count": ({"lsb": [0.1, 0.2]}, "`lsb` must have 1 or 3 values, got 2"),
    "codes": ({"code_max": 0}, "`code_max` must be 1 to 32767, got 0"),
    **{f"x-{bad}": ({"x": with_value(zeros(3, 2), bad)}, "`x` must be finite, got 1 NaN or infinite") for bad in (np.nan, np.inf, -np.inf)},
}  # fmt: skip


@pytest.mark.parametrize("name", DACS)
@pytest.mark.usefixtures("backend")
def test_dacs(name):
    change, text = DACS[name]
    with pytest.raises(ValueError, match=f"^dac_quantize: {text}"):
        ops.dac_quantize(**{"x": zeros(3, 2), "lsb": 1.0, "code_max": 7, **change})


@pytest.mark.usefixtures("backend")
def test_empty_batches_are_empty():
    g = zeros(8, 4)
    noisy = {"adc_bits": 8, "adc_lsb": 1.0, "read_noise": zeros(1) + 1}
    for scales in (0, 1):
        assert ops.tile_mvm(zeros(0, 8), g, row_scale=zeros(scales), **noisy).shape == (0, 4)
    assert ops.tile_mvm(zeros(0, 4), g, transposed=True, **noisy).shape == (0, 8)
    for order in ("channel_position", "position_channel"):
        conv = ConvGeometry(2, 3, 3, (2, 2), line_order=order)
        assert ops.tile_mvm(zeros(0, 2, 3, 3), g, conv=conv, **noisy).shape == (0, 4, 2, 2)
        assert ops.tile_mvm(zeros(0, 4, 2, 2), g, conv=conv, transposed=True, **noisy).shape == (0, 2, 3, 3)
    assert [a.shape for a in ops.tile_mvm(zeros(0, 8), g, want_gate=True)] == [(0, 4), (0, 4)]
    for shape in ((0, 3), (3, 0), (0,)):
        assert ops.dac_quantize(zeros(*shape), lsb=1.0, code_max=7).shape == shape


@pytest.mark.parametrize("parasitics", [{}, {"r_wordline": 1.0}])
def test_weights_that_diverged_are_refused_by_the_name_of_their_layer(parasitics):
    model, _ = gx.convert(nn.Sequential(nn.Linear(4, 3)), gx.CrossbarSpec(parasitics=parasitics))
    with torch.no_grad():
        model[0].weight[1, :2] = float("nan")
    for act in (lambda: model(torch.ones(2, 4)), lambda: gx.program(model)):
        with pytest.raises(
            gx.ops.NotFiniteError,
            match=r"^0: `weight` must be finite, got 2 NaN or infinite values; look for .* lower the rate",
        ):
            act()
    assert not model[0].programmed


@pytest.mark.parametrize("dac", [None, 8], ids=["no-dac", "dac"])
@pytest.mark.parametrize("adc", [{}, {"bits": 8, "range": "worst_case"}], ids=["no-adc", "adc"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_or_is_refused(value, adc, dac):
    """An ADC would make an ordinary code of it."""
    layer = AnalogLinear(4, 3, spec=gx.CrossbarSpec.model_validate({"dac": {"bits": dac}, "adc": adc}))
    x = torch.ones(2, 4, requires_grad=True)
    with pytest.raises(
        gx.ops.NotFiniteError, match=r"^linear: `x` must be finite, got 2 NaN or infinite values; look for"
    ):
        layer(x * torch.tensor([1.0, value, 1.0, 1.0]))
    y = layer(x)
    y.backward(torch.full_like(y, value))
    assert x.grad.isnan().all()
    assert not layer.weight.grad.isfinite().any()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("kind", ["tensor", "sample", "fixed", "ema", "learned"])
def test_no_range_of_a_dac_hides_that_inputs_are_not_finite(kind, signed):
    """In training or not; one is refused that would be clipped, and leaves no trace."""
    most = {"max": 0.5} if kind in ("fixed", "learned") else {}
    dac = {"bits": 8, "signed": signed, "range": kind, **most}
    layer = AnalogLinear(4, 3, spec=gx.CrossbarSpec(dac=dac))
    layer(torch.ones(2, 4))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    for training, value in itertools.product((True, False), (float("inf"), -float("inf"), float("nan"))):
        x = torch.ones(2, 4)
        x[1, 2] = value
        with pytest.raises(
            gx.ops.NotFiniteError, match=r"^linear: `x` must be finite, got \d NaN or infinite values; look"
        ):
            layer.train(training)(x)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


CUT = {"r_wordline": 1.0, "r_bitline": 1.0, "gradient": "exact"}
OVERFLOWS = {
    "hardware-aware": ({}, None),
    "offset": ({"mapping": {"scheme": "offset"}}, None),
    "wires": ({"parasitics": CUT}, None),
    "sgd": ({"update": spec.ConstantStep()}, "sgd"),
    "agad": ({"update": spec.ConstantStep()}, "agad"),
    "pulses": ({"update": spec.ConstantStep(), "pulses": {"length": 31}}, "sgd"),
}


@pytest.mark.parametrize("kind", OVERFLOWS)
def test_a_grad_scaler_skips_a_step_of_a_loss_that_it_scaled_too_far(kind):
    change, algorithm = OVERFLOWS[kind]
    crossbars = gx.CrossbarSpec(dac={"bits": 8}, adc={"bits": 8, "range": "worst_case"}, **change)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 5), nn.Linear(5, 3))
    model, _ = gx.convert(model, crossbars)
    optimiser = (
        gx.optim.build_optimizer(algorithm, model, lr=0.1)
        if algorithm
        else torch.optim.SGD(model.parameters(), lr=0.1)
    )
    scaler, x = torch.amp.GradScaler("cpu", init_scale=2.0**127), torch.randn(4, 1, 4, 4)
    moved = []
    for _ in range(2):
        before = [p.detach().clone() for p in model.parameters()]
        scaler.scale(64 * model(x).square().sum()).backward()
        scaler.step(optimiser)
        scaler.update(1.0)
        optimiser.zero_grad()
        moved.append(not all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)))
    assert moved == [False, True]


def test_a_loss_that_is_not_finite_calibrates_nothing():
    model, _ = gx.convert(nn.Sequential(nn.Linear(4, 3)), gx.presets.demo())
    with pytest.raises(
        gx.ops.NotFiniteError, match=r"^0: the gradient of the output must be finite, got 6 NaN"
    ):
        gx.calibrate(model, [torch.ones(2, 4)], step=lambda x: model(x).sum() * float("nan"))


@pytest.mark.parametrize(
    "make", [lambda spec: AnalogLinear(5, 3, spec=spec), lambda spec: AnalogConv2d(2, 3, 3, spec=spec)]
)
def test_gradients_of_a_loss_scaled_too_far_go_back_as_such(make):
    """To every input, also where the transposed read refuses them."""
    x = torch.ones(4, 2, 5, 5, requires_grad=True)
    make(gx.CrossbarSpec(dac={"bits": 8}))(x).sum().mul(float("inf")).backward()
    assert x.grad.isnan().all()


@pytest.mark.parametrize("bits", [8, None])
@pytest.mark.parametrize("scheme", ["subtracted", "offset"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_fixed_range_does_not_hide_that_gradients_are_not_finite(kind, scheme, bits):
    """A clipped one would be taken for a large one by layers before it."""
    settings = {
        "mapping": {"scheme": scheme},
        "backward": {"dac": {"bits": bits, "range": "fixed", "max": 0.5}},
    }
    layer = (
        AnalogLinear(5, 3, spec=gx.CrossbarSpec(**settings))
        if kind == "linear"
        else AnalogConv2d(2, 3, 3, spec=gx.CrossbarSpec(**settings))
    )
    x = torch.ones((4, 5) if kind == "linear" else (4, 2, 5, 5), requires_grad=True)
    for wrong in (float("inf"), -float("inf"), float("nan"), 1e30):
        y, x.grad = layer(x), None
        grad_y = torch.ones_like(y)
        grad_y.view(-1)[1] = wrong
        y.backward(grad_y)
        assert x.grad.isnan().all() if wrong != 1e30 else x.grad.isfinite().all()


def test_layers_refuse_wrong_shapes():
    """By name: of a converted model it may be any."""
    ideal = gx.CrossbarSpec()
    linear, conv = AnalogLinear(4, 3, spec=ideal, name="head"), AnalogConv2d(2, 3, 3, spec=ideal, name="stem")
    sequence = AnalogConv1d(2, 3, 3, spec=ideal, name="text")
    wide, images = r"\[..., 4\] for", r"\[N, 2, height, width\], or without N, for"
    for layer, x, text in (
        (linear, torch.zeros(2, 5), rf"^head: `x` must have shape {wide} the layer's weights, got \(2, 5\); look at the layer before"),
        (linear, torch.zeros(0, 5), rf"^head: `x` must have shape {wide} .* got \(0, 5\)"),
        (linear, torch.tensor(1.0), rf"^head: `x` must have shape {wide} .* got \(\)"),
        (conv, torch.zeros(1, 3, 5, 5), rf"^stem: `x` must have shape {images} .* got \(1, 3, 5, 5\)"),
        (conv, torch.zeros(2, 5), rf"^stem: `x` must have shape {images} .* got \(2, 5\)"),
        (sequence, torch.zeros(1, 2, 5, 5), r"^text: `x` must have shape \[N, 2, width\], or .* got \(1, 2, 5, 5\)"),
        (conv, torch.zeros(1, 2, 2, 2), r"^stem: `kernel` must fit into the padded image, got \(3, 3\) for 2 x 2"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            layer(x)
    assert conv(torch.zeros(2, 5, 5)).shape == (3, 3, 3)
    for layer, x in ((linear, zeros(2, 4)), (conv, zeros(1, 2, 5, 5)), (linear, [1.0])):
        with pytest.raises(
            TypeError,
            match=f"^{layer.name}: `x` must be a tensor, got {type(x).__name__}; convert it by torch",
        ):
            layer(x)
    lstm, _ = gx.convert(nn.LSTM(4, 3), ideal)
    with pytest.raises(TypeError, match=r"^LSTM: `input` must be a tensor or a PackedSequence, got ndarray"):
        lstm(zeros(5, 2, 4))
    with pytest.raises(TypeError, match=r"head: `x` must be real, got torch\.complex64"):
        linear(torch.zeros(2, 4, dtype=torch.complex64))
    with pytest.raises(
        ValueError,
        match=r"head: `x` must be on the layer's device, cpu, got meta; move the batch or the model",
    ):
        linear(torch.zeros(2, 4, device="meta"))


OF_LAYERS: dict[str, tuple[nn.Module, list[tuple[int, ...]], str]] = {
    "lines, channels": (nn.ConvTranspose1d(4, 6, 3), [(2, 5, 7)], "`input` must have shape [4, width] or [N, 4, width], got (2, 5, 7)"),
    "lines, axes": (nn.ConvTranspose1d(4, 6, 3), [(7,)], "`input` must have shape [4, width] or [N, 4, width], got (7,)"),
    "lines of one more axis": (
        nn.ConvTranspose1d(4, 6, 3), [(1, 2, 4, 7)], "`input` must have shape [4, width] or [N, 4, width], got (1, 2, 4, 7)",
    ),
    "images, channels": (
        nn.ConvTranspose2d(4, 6, 3, groups=2), [(2, 5, 7, 7)],
        "`input` must have shape [4, height, width] or [N, 4, height, width], got (2, 5, 7, 7)",
    ),
    "images, axes": (
        nn.ConvTranspose2d(4, 6, 3), [(4, 7)], "`input` must have shape [4, height, width] or [N, 4, height, width], got (4, 7)",
    ),
    "volumes, channels": (
        nn.Conv3d(4, 6, 3), [(2, 5, 7, 7, 7)],
        "`input` must have shape [4, depth, height, width] or [N, 4, depth, height, width], got (2, 5, 7, 7, 7)",
    ),
    "volumes, axes": (
        nn.Conv3d(4, 6, 3), [(4, 7, 7)], "`input` must have shape [4, depth, height, width] or [N, 4, depth, height, width], got (4, 7, 7)",
    ),
    "queries, axes": (
        nn.MultiheadAttention(8, 2), [(8,)] * 3, "`query` must have shape [T, 8] or [T, N, 8], got (8,)",
    ),
    "keys, size": (
        nn.MultiheadAttention(8, 2, kdim=6), [(5, 2, 8)] * 3, "`key` must have shape [T, N, 6], got (5, 2, 8)",
    ),
    "values, axes": (
        nn.MultiheadAttention(8, 2, batch_first=True), [(2, 5, 8), (2, 5, 8), (5, 8)], "`value` must have shape [N, T, 8], got (5, 8)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_LAYERS)
def test_modules_made_of_layers_refuse_wrong_shapes(name):
    """By their own names and shapes, not those of the products inside."""
    module, shapes, text = OF_LAYERS[name]
    model, _ = gx.convert(nn.ModuleDict({"up": module}), gx.CrossbarSpec())
    with pytest.raises(
        ValueError, match=re.escape(f"up ({type(module).__name__}): {text}; look at the layer")
    ):
        model["up"](*map(torch.zeros, shapes))


INPUTS = {
    "Linear": (nn.Linear(4, 3), (2, 4), "x"),
    "Conv2d": (nn.Conv2d(2, 3, 3), (1, 2, 5, 5), "x"),
    "LSTM": (nn.LSTM(4, 3), (5, 2, 4), "input"),
    "MultiheadAttention": (nn.MultiheadAttention(4, 2), (5, 2, 4), "query"),
    "ConvTranspose2d": (nn.ConvTranspose2d(2, 3, 3), (1, 2, 5, 5), "input"),
    "Conv3d": (nn.Conv3d(2, 3, 3), (1, 2, 5, 5, 5), "input"),
}


@pytest.mark.filterwarnings(
    "ignore:Sparse CSR tensor support is in beta", "ignore:The PyTorch API of nested tensors"
)
@pytest.mark.parametrize("name", INPUTS)
def test_sparse_and_nested_inputs_and_symbolic_traces_are_refused(name):
    module, shape, argument = INPUTS[name]
    model, _ = gx.convert(module, gx.CrossbarSpec())
    x = torch.ones(shape)
    times = 3 if name == "MultiheadAttention" else 1
    nested = r"dense, got a nested tensor; pass .*padded_tensor\(x, 0\.0\)"
    for given, text in (
        (x.to_sparse(), r"dense, got torch\.sparse_coo; pass x\.to_dense\(\)"),
        (torch.ones(2, 4).to_sparse_csr(), r"dense, got torch\.sparse_csr; pass x"),
        (torch.nested.nested_tensor([x[0], x[0]], layout=torch.jagged), nested),
        (torch.nested.nested_tensor([x[0], x[0]]), nested),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=f": `{argument}` must be {text}"):
            model(*[given] * times)
    with pytest.raises(
        TypeError, match=f"`{argument}` must be .*, got a Proxy of torch.fx; trace the model before gpuxbar"
    ):
        torch.fx.symbolic_trace(model)


@pytest.mark.parametrize("argument", ["query", "key", "value"])
def test_attention_names_the_input_that_is_sparse(argument):
    model, _ = gx.convert(nn.MultiheadAttention(4, 2), gx.CrossbarSpec())
    x = torch.ones(5, 2, 4)
    given = {name: x.to_sparse() if name == argument else x for name in ("query", "key", "value")}
    with pytest.raises(
        TypeError, match=f"^MultiheadAttention: `{argument}` must be dense, got torch.sparse_coo"
    ):
        model(**given)


def test_models_are_traced_before_they_are_converted():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.LSTM(3, 2)), torch.randn(5, 2, 4)
    of_trace, report = gx.convert(torch.fx.symbolic_trace(model), gx.presets.demo())
    assert [row.runs for row in report.rows] == ["analog"] * 3
    as_it_is, _ = gx.convert(model, gx.presets.demo())
    for both in (of_trace, as_it_is):
        gx.calibrate(both, [x], step=lambda x, both=both: both(x)[0].sum())
    assert torch.equal(of_trace(x)[0], as_it_is(x)[0])


@pytest.mark.parametrize("dac", [{}, {"bits": 8, "range": "fixed", "max": 1.0}], ids=["fitted", "fixed"])
def test_layers_refuse_weights_of_another_size_and_transforms(dac):
    layer = AnalogLinear(4, 3, spec=gx.CrossbarSpec(dac=dac))
    x = torch.randn(2, 4)
    with pytest.raises(TypeError, match=r"got those of a transform of torch.func"):
        torch.func.grad(lambda x: layer(x).sum())(x)
    layer(x)
    for size in ((5, 4), (3, 5)):
        layer.weight = nn.Parameter(torch.randn(size))
        with pytest.raises(
            ValueError, match=rf"fit the arrays of 4 x 3 .* got shape {re.escape(str(size))}; change its size"
        ):
            layer(x)


def test_layers_take_any_strides_and_float_types():
    layer = AnalogLinear(4, 3, spec=gx.CrossbarSpec())
    torch.manual_seed(0)
    x = torch.randn(2, 4)
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    for form in (x, x.t().contiguous().t(), torch.stack([x, x], 2)[..., 0], x.double()):
        torch.testing.assert_close(layer(form), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer(x.half()), expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(layer(x[0]), expected[0], rtol=1e-5, atol=1e-6)


WINDOW = {"g_min": 1e-6, "g_max": 1e-5}
ONES = {"w_max": zeros(4) + 1, **WINDOW}
STEPPING, PERIODIC = spec.ConstantStep(pulses=100), spec.Carry(scheme="periodic", interval=2, headroom_bits=1)
STREAMED = spec.Carry(scheme="streamed", interval=2, headroom_bits=1, input_bits=4)


def conductances(pairs=1):
    return np.full((2 * pairs, 3, 4), 2e-6, np.float32)


def writes():
    """Arguments of every op that writes to arrays it is given."""
    lines = {"x": zeros(2, 3) + 1, "d": zeros(2, 4) + 1, "rate": 0.1, "w_max": zeros(4) + 1}
    anchor = ops.Anchor.new((2, 3, 4))
    one = ops.Pairs(conductances(), law=STEPPING, **WINDOW)
    two = {"slice_bits": 2, "law": STEPPING, **WINDOW}
    return {
        "reprogram": {"weight": zeros(1, 4, 3) + 1, "g": conductances(), "w_max": zeros(4), "state": zeros(2, dtype=np.int64),
                      "noise_var": zeros(2, 3, 4), "sigma_g": 1e-8, "write_step": zeros(1, dtype=np.int64), **WINDOW},
        "device_update": {"pairs": one, "dw": zeros(1, 4, 3) + 1, "out": zeros(1, 4, 3), "w_max": zeros(4) + 1},
        "pulse_update": {"pairs": one, "train": spec.PulseTrain(length=7), **lines},
        "streamed_update": {"pairs": ops.Pairs(conductances(2), carry=STREAMED, **two), **lines},
        "carry": {"pairs": ops.Pairs(conductances(2), carry=PERIODIC, **two), "updates": 2},
        "chop": {"sign": zeros(2, 3) + 1, "lines": np.arange(2), "flip": 1.0, "step": 1},
        "anchored_conductance": {"g": conductances(), "anchor": anchor, "r_wordline": 1.0, "r_bitline": 1.0},
        "tile_mvm": {"v": zeros(2, 3), "g": zeros(3, 4), "dac": ops.Dac(1.0, 7, codes=zeros(2, 3, dtype=np.int16))},
    }  # fmt: skip


def call(op, arguments, **change):
    return getattr(ops, op)(**{**arguments, **change})


WRITTEN = {
    "reprogram": ("g", "w_max", "state", "noise_var"), "device_update": ("out",), "chop": ("sign",),
    "anchored_conductance": ("anchor.age",), "tile_mvm": ("dac.codes",),
}  # fmt: skip


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, names in WRITTEN.items() for name in names])
@pytest.mark.usefixtures("backend")
def test_what_must_not_be_written_is_not(op, name):
    """A kernel takes an address, and would write there."""
    arguments = writes()[op]
    call(op, arguments)
    arguments = writes()[op]
    head, _, part = name.partition(".")
    array = getattr(arguments[head], part) if part else arguments[head]
    array.setflags(write=False)
    before = {key: value.copy() for key, value in arguments.items() if isinstance(value, np.ndarray)}
    with pytest.raises(ValueError, match=f"`{name}` must be writable, got a read-only array; pass a copy"):
        call(op, arguments)
    for key, value in before.items():
        np.testing.assert_array_equal(arguments[key], value)


NUMBERS = [
    *((op, {"step": 1.5}, "`step` must be one integer, got 1.5; count") for op in ("device_update", "pulse_update", "streamed_update", "chop")),
    *((op, {"step": zeros(2, dtype=np.int64)}, "`step` must be one integer") for op in ("device_update", "pulse_update")),
    *((op, {"w_max": zeros(4)}, "`w_max` must be above 0, got 0; use the largest weight") for op in ("device_update", "pulse_update", "streamed_update")),
    ("reprogram", {"g_max": float("inf")}, "`g_max` must be finite, got inf S"),
    ("carry", {"updates": 0.5}, "`updates` must be one integer, got 0.5"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "change", "text"), NUMBERS)
@pytest.mark.usefixtures("backend")
def test_settings_of_writes(op, change, text):
    with pytest.raises(ValueError, match=f"^[a-z_]+: {text}"):
        call(op, writes()[op], **change)


COUNTS = [
    *(
        ("tile_mvm", {name: 2.5})
        for name in ("tile_rows", "tile_cols", "groups", "streams", "seed", "row_offset")
    ),
    ("program", {"headroom_bits": 1.5, "slices": 2, "slice_bits": 2}),
    ("program", {"levels": 4.5}),
    ("chop", {"seed": 1.0}),
    ("dac_quantize", {"code_max": 7.5}),
    ("anchored_conductance", {"refresh_interval": 2.5}),
]


@pytest.mark.parametrize(("op", "change"), COUNTS)
def test_counts_are_whole(op, change):
    arguments = {
        "program": {"weight": zeros(1, 4, 3), **ONES}, "dac_quantize": {"x": zeros(2, 3), "lsb": 1.0}, **writes(),
    }[op]  # fmt: skip
    name, value = next(iter(change.items()))
    with pytest.raises(
        TypeError, match=f"^{op}: `{name}` must be an integer, got {value}; give a whole number"
    ):
        call(op, arguments, **change)


def test_arguments_no_kernel_may_see():
    with pytest.raises(
        TypeError, match=r"^tile_mvm: `conv` must be a ConvGeometry, got int; None reads vectors"
    ):
        ops.tile_mvm(zeros(2, 2, 3, 3), zeros(8, 4), conv=3)
    with pytest.raises(TypeError, match=r"^reprogram: `g` must be an array of float32, got NoneType"):
        call("reprogram", writes()["reprogram"], g=None)
    v, g = zeros(2, 3) + 1, zeros(3, 4) + 1
    np.testing.assert_array_equal(ops.tile_mvm(v, g, tile_rows=2**70), ops.tile_mvm(v, g))


@pytest.mark.usefixtures("backend")
def test_empty_batches_and_arrays_change_nothing():
    two = writes()
    conv = ConvGeometry(2, 3, 3, (2, 2))
    assert not ops.conv_outer_product(zeros(0, 6, 2, 2), zeros(0, 4, 3, 3), zeros(1), conv, groups=2).any()
    for op in ("pulse_update", "streamed_update"):
        before = two[op]["pairs"].g.copy()
        weights = call(op, two[op], x=zeros(0, 3), d=zeros(0, 4))
        np.testing.assert_array_equal(two[op]["pairs"].g, before)
        assert weights.shape == (1, 4, 3)
    pairs, how = ops.Pairs(zeros(2, 6, 0), law=STEPPING, **WINDOW), {"w_max": zeros(0)}
    slices = ops.Pairs(zeros(4, 8, 0), law=STEPPING, slice_bits=2, carry=STREAMED, **WINDOW)
    images = zeros(1, 2, 3, 3) + 1, zeros(1, 0, 2, 2)
    assert ops.streamed_update(slices, *images, rate=0.1, conv=conv, **how).shape == (1, 0, 8)
    assert ops.device_update(pairs, zeros(2, 0, 3), **how).shape == (2, 0, 3)
    train, x, d = spec.PulseTrain(length=7), zeros(5, 6), zeros(5, 0)
    assert ops.pulse_update(pairs, x, d, rate=0.1, train=train, groups=2, **how).shape == (2, 0, 3)


class DeviceArray(np.ndarray):
    """An array of CuPy's, as far as `launch.is_cupy` looks."""


DeviceArray.__module__ = "cupy"
ON_HOSTS = {
    "conv_outer_product": ("d", (zeros(1, 4, 2, 2), zeros(1, 2, 3, 3), zeros(1), ConvGeometry(2, 3, 3, (2, 2))), {}),
    "dac_clip_gradient": ("x", (zeros(2, 3), zeros(2, 3)), {"top": 1.0, "code_max": 7}),
    "lstm_gates": ("c", (zeros(2, 12), zeros(2, 12), zeros(2, 3)), {}),
    "outer_product": ("d", (zeros(2, 3), zeros(2, 4)), {}),
}  # fmt: skip


@pytest.mark.parametrize("op", ON_HOSTS)
def test_arrays_of_a_gpu_are_refused_where_only_a_host_has_a_kernel(op):
    name, arrays, how = ON_HOSTS[op]
    arrays = [a.view(DeviceArray) if isinstance(a, np.ndarray) else a for a in arrays]
    text = rf"^{op}: `{name}` must be a NumPy array, got CuPy's; on a GPU, \w"
    with pytest.raises(TypeError, match=text):
        getattr(ops, op)(*arrays, **how)


TAKE_MODELS = {
    "age": lambda model: gx.age(model, "1h"),
    "calibrate": lambda model: gx.calibrate(model, [torch.ones(2, 4)]),
    "program": gx.program,
    "unprogram": gx.unprogram,
}
TAKE_MODULES = {
    **TAKE_MODELS,
    "build_optimizer": lambda model: gx.optim.build_optimizer("sgd", model, lr=0.1),
    "capture_step": lambda model: gx.capture_step(model, None, None, None),
    "conversion_errors": lambda model: gx.conversion_errors(model, [torch.ones(2, 4)]),
    "convert": lambda model: gx.convert(model, gx.CrossbarSpec()),
    "distribute": gx.distribute,
    "same_reads": gx.same_reads,
    "telemetry": gx.telemetry,
}


@pytest.mark.parametrize("op", TAKE_MODULES)
@pytest.mark.parametrize(
    ("model", "what"),
    [
        (None, "NoneType"),
        ("model", "str"),
        (lambda x: x, "function"),
        (nn.Linear, "the class Linear"),
        ((nn.Linear(4, 3), "a report"), "tuple"),
    ],
)
def test_functions_of_models_take_modules(op, model, what):
    """A tuple is what `convert` returns as a whole."""
    name = "module" if op == "same_reads" else "model"
    with pytest.raises(
        TypeError,
        match=f"^{op}: `{name}` must be a torch.nn.Module, got {what}; pass the model itself, which gpuxbar.convert returns beside",
    ):
        TAKE_MODULES[op](model)


@pytest.mark.parametrize("op", TAKE_MODELS)
@pytest.mark.parametrize("digital", [False, True])
def test_functions_of_crossbars_refuse_models_without(op, digital):
    """As one whose converted copy was not kept."""
    model = nn.Sequential(nn.Linear(4, 3))
    if digital:
        model, _ = gx.convert(model, gx.CrossbarSpec(), rules={"*": None})
    with pytest.raises(
        ValueError,
        match=rf"^{op}: `model` must have crossbar layers, got none; pass the copy .* gpuxbar\.convert",
    ):
        TAKE_MODELS[op](model)


@pytest.mark.parametrize("op", ["calibrate", "conversion_errors"])
@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((None,), TypeError, "`loader` must give batches, got NoneType; pass a list of them"),
        (([torch.ones(2, 4)], 0), ValueError, "`batches` must be at least 1, got 0; give more"),
        (([torch.ones(2, 4)], 1.5), TypeError, "`batches` must be a whole number, got float; give a count"),
    ],
)
def test_what_gives_no_batches_is_refused(op, arguments, error, text):
    model = AnalogLinear(4, 3, spec=gx.presets.demo())
    with pytest.raises(error, match=f"^{op}: {text}"):
        getattr(gx, op)(model, *arguments)


def test_samples_by_index_give_batches():
    """As a dataset does."""

    class Batches:
        def __getitem__(self, index):
            return [torch.ones(2, 4)][index]

    layer = AnalogLinear(4, 3, spec=gx.presets.demo())
    gx.calibrate(layer, Batches())
    assert layer.calibrated


def test_specs_are_saved_to_paths(tmp_path):
    spec, path = gx.CrossbarSpec(), tmp_path / "spec.yaml"
    for arguments, text in (
        ((path, spec), "save_spec: `spec` must be a CrossbarSpec, got PosixPath; call save_spec"),
        ((spec, None), "save_spec: `path` must be text or a pathlib.Path, got NoneType; for instance"),
    ):
        with pytest.raises(TypeError, match=text):
            gx.save_spec(*arguments)
    with pytest.raises(TypeError, match=r"load_spec: `path` must be text or a pathlib\.Path, got Cross"):
        gx.load_spec(spec)


class ArrayElsewhere:
    """An array of CuPy's, whose values the host cannot reach."""

    def __init__(self, like):
        self.dtype, self.shape, self.ndim = like.dtype, like.shape, like.ndim
        self.size, self.flags = like.size, like.flags

    def __len__(self):
        return self.shape[0]

    def __int__(self):
        return 7  # CuPy reads a single value back


ArrayElsewhere.__module__ = "cupy"


def test_arrays_of_a_gpu_are_refused_among_those_of_the_host():
    library = host_library()
    if library is None:
        pytest.skip("no host kernels")
    text = r"arrays must be all NumPy's or all CuPy's, got NumPy's and a cupy\.ArrayElsewhere; move them by"
    with pytest.raises(TypeError, match=text):
        ops.tile_mvm(zeros(2, 3), ArrayElsewhere(zeros(1, 3, 4)))
    scale = ArrayElsewhere(zeros(1))
    for name, more in (("adc_lsb", {"adc_bits": 8}), ("read_noise", {}), ("row_scale", {})):
        with pytest.raises(TypeError, match=text):
            ops.tile_mvm(zeros(2, 3), zeros(3, 4), **{name: scale}, **more)
    with pytest.raises(TypeError, match=text):
        ops.dac_quantize(zeros(2, 3), lsb=scale, code_max=7)
    with pytest.raises(TypeError, match=text):
        ops.chop(zeros(2, 5) + 1, np.arange(3), flip=0.1, step=ArrayElsewhere(np.zeros(1, np.int64)), seed=7)
    with pytest.raises(TypeError, match=text):  # not its value for an address
        host_call(library, "gpuxbar_set_threads", ArrayElsewhere(np.zeros(1, np.int64)))
