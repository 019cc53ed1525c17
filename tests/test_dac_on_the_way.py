"""Reads that make DAC codes on the way to their products: the bits of reads of codes, without the pass that made them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cuda_shim import REVERSE, ShimDevice
from tape import bridge_to

import gpuxbar as gx
from gpuxbar import ops
from gpuxbar.nn import AnalogLinear
from gpuxbar.ops import ConvGeometry, Dac

CODE_MAX = 127
CONV = ConvGeometry(8, 5, 4, (2, 3), (1, 1), (1, 1), (1, 1), line_order="position_channel")


class Traffic(ShimDevice):
    """Adds up the bytes of arrays that kernels before the products are given."""

    bytes = 0

    def launch(self, kernel, grid, block, values, *more, **named):
        if kernel.name in ("dac_quantize", "pack_inputs", "pack_images"):
            self.bytes += sum(
                x.nbytes for name, x in values.items() if isinstance(x, np.ndarray) and name != "lsb"
            )
        super().launch(kernel, grid, block, values, *more, **named)


# strategy, convolution, transposed, settings
WAYS = {
    "fused": ("fused", None, False, {}),
    "fused streams": ("fused", None, False, {"stream_bits": 2, "streams": 4, "phases": 2}),
    "fused bytes": ("fused", None, False, {"precision": "int8", "g_step": 1.0}),
    "fused backwards": ("fused", None, True, {}),
    "fused images backwards": ("fused", CONV, True, {}),
    "wgmma": ("wgmma", None, False, {}),
    "implicit": ("implicit", CONV, False, {}),
    "implicit-wgmma": ("implicit-wgmma", CONV, False, {}),
    "epilogue": ("epilogue", None, False, {"stream_bits": 4, "streams": 2, "noise_var": True}),
    "unfolded": ("fused", CONV, False, {}),
}  # fmt: skip


@pytest.mark.parametrize("each", [False, True], ids=["one step", "a step a sample"])
@pytest.mark.parametrize("name", WAYS)
def test_bits_are_those_of_codes(name, each):
    strategy, conv, transposed, s = WAYS[name]
    rng = np.random.default_rng(3)
    inputs, outputs = (128, 40) if conv is None else (conv.inputs, 40)
    shape = (70, inputs) if conv is None else (3, conv.channels, conv.height, conv.width)
    if transposed:
        shape = (70, outputs) if conv is None else (3, outputs, *conv.out)
    x = rng.normal(size=shape).astype(np.float32)
    g = rng.integers(-8, 9, (1, inputs, outputs)).astype(np.float32)
    lsb = rng.uniform(0.01, 0.03, len(x) if each else 1).astype(np.float32)
    s = {
        "precision": "fp16", "g_range": 8.0, "adc_bits": 8, "adc_lsb": 40.0, "tile_rows": 64, "tile_cols": 20, "conv": conv,
        "transposed": transposed, "strategy": strategy, **s,
    }  # fmt: skip
    if "noise_var" in s:
        s["noise_var"] = np.ones_like(g)
    apart, device = Traffic(REVERSE), Traffic(REVERSE)
    expected = ops.tile_mvm(
        ops.dac_quantize(x, lsb=lsb, code_max=CODE_MAX, signed=True, device=apart), g, device=apart, **s
    )
    codes = np.full(shape, -999, np.int16)
    for kept in (codes, None):
        device.bytes = 0
        got = ops.tile_mvm(x, g, dac=Dac(lsb, CODE_MAX, codes=kept), device=device, **s)
        np.testing.assert_array_equal(got, expected)
        # bytes of a value, which nothing reads again, or even writes
        saved = 0 if name == "unfolded" else 2 if kept is not None else 4
        assert apart.bytes - device.bytes == saved * x.size
    assert ("dac_quantize" in device.launches) == (name == "unfolded")
    np.testing.assert_array_equal(codes, ops.dac_quantize(x, lsb=lsb, code_max=CODE_MAX))
    if name in ("epilogue", "fused images backwards"):
        device, again = ShimDevice(workspace=1 << 12), np.full(shape, -999, np.int16)
        got = ops.tile_mvm(x, g, dac=Dac(lsb, CODE_MAX, codes=again), device=device, **s)
        np.testing.assert_array_equal(got, expected)
        np.testing.assert_array_equal(again, codes)
        assert device.launches.count("pack_inputs") > 1


@pytest.mark.parametrize("signed", [False, True])
def test_a_host_reads_the_same(signed):
    x = np.random.default_rng(0).normal(size=(5, 9)).astype(np.float32)
    g, codes = np.ones((9, 3), np.float32), np.empty((5, 9), np.int16)
    expected = ops.dac_quantize(x, lsb=0.01, code_max=CODE_MAX, signed=signed)
    dac = Dac(0.01, CODE_MAX, signed, codes)
    for device in (None, ShimDevice()):
        codes[:] = -999
        np.testing.assert_array_equal(ops.tile_mvm(x, g, dac=dac, device=device), ops.tile_mvm(expected, g))
        np.testing.assert_array_equal(codes, expected)


def test_a_layer_makes_no_codes_that_nobody_reads(monkeypatch):
    """A pass over what drives its lines less in each direction, and codes only where backward needs them."""
    spec = gx.CrossbarSpec.model_validate(
        {"tile": {"rows": 64, "cols": 64}, "dac": {"bits": 8}, "adc": {"bits": 8}}
    )
    layer, x = AnalogLinear(128, 64, spec=spec), torch.randn(20, 128, requires_grad=True)
    gx.calibrate(layer, [x.detach()])
    layer(x).square().sum().backward()
    expected = x.grad.clone(), layer.weight.grad.clone()
    x.grad = layer.weight.grad = None
    device = Traffic()
    bridge_to(monkeypatch, device, lambda t: t.detach().contiguous().numpy(), torch.from_numpy)
    y = layer(x)
    values = x.numel()
    assert device.bytes == (4 + 2 + 4) * values  # values, codes to keep, operands of float32 products
    y.square().sum().backward()
    assert device.bytes == (4 + 2 + 4) * values + (4 + 4) * y.numel()
    for found, wanted in zip((x.grad, layer.weight.grad), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    device.bytes = 0
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y)
    assert device.bytes == (4 + 4) * values
    assert "dac_quantize" not in device.launches


BAD = {
    "values": ({"v": np.zeros((2, 3), np.int16)}, {}, TypeError, "`v` must be an array of float32, got int16"),
    "code_max": ({}, {"code_max": 0}, ValueError, "`code_max` must be 1 to 32767, got 0; int16 holds the codes"),
    "lsb": ({}, {"lsb": np.ones(3, np.float32)}, ValueError, "`dac.lsb` must have 1 or 2 values, got 3; give one, or"),
    "lsb dtype": ({}, {"lsb": np.ones(2)}, TypeError, "`dac.lsb` must be an array of float32, got float64"),
    "codes": ({}, {"codes": np.zeros((2, 3))}, TypeError, "`dac.codes` must be an array of int16, got float64"),
    "shape": ({}, {"codes": np.zeros((3, 2), np.int16)}, ValueError, r"`dac.codes` must have the shape of `v`, \(2, 3\), got"),
}  # fmt: skip


@pytest.mark.parametrize("device", [None, ShimDevice()], ids=["host", "kernel"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name, device):
    change, dac, error, text = BAD[name]
    values = {"v": np.zeros((2, 3), np.float32), **change}
    with pytest.raises(error, match=f"^tile_mvm: {text}"):
        ops.tile_mvm(
            values["v"],
            np.ones((3, 2), np.float32),
            dac=Dac(**{"lsb": 0.1, "code_max": 7, **dac}),
            device=device,
        )
