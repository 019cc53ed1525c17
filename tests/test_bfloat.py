"""Reads by bf16 conductances: the oracle of rounded ones, the epilogue path bit for bit, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from cuda_shim import FORWARD, REVERSE, ShimDevice
from tape import gpu_path
from test_fused import INTEGER, integers
from test_tile_mvm import G_MAX, assert_convolution_matches, assert_matches, case, convolution, settings

import gpuxbar as gx
from gpuxbar import ops, reference
from gpuxbar.nn import AnalogLinear
from gpuxbar.ops.tile_mvm_case import Case
from gpuxbar.ops.tile_mvm_plan import plan_tile_mvm


def rounded(g):
    """The nearest numbers of 8 significant bits, half to even."""
    mantissa, exponent = np.frexp(g.astype(np.float64))
    return np.ldexp(np.rint(mantissa * 256), exponent - 8).astype(np.float32)


def read(codes, g, device=None, **s):
    return ops.tile_mvm(codes, g, precision="bf16", device=device or ShimDevice(), **s)


@pytest.mark.parametrize("strategy", ["fused", "epilogue"])
@pytest.mark.parametrize(
    ("mode", "shape", "transposed"),
    [("noise", (131, 100, 141, 70), False), ("two-phase", (33, 130, 40, 64), True), ("variance", (9, 100, 130, 70), False)],
)  # fmt: skip
def test_reads_are_the_oracle_of_rounded_conductances(mode, shape, transposed, strategy):
    batch, rows, cols, _ = shape
    codes, g = case(batch, rows, cols, planes=2)
    if transposed:
        codes = np.random.default_rng(2).integers(-127, 128, (batch, cols)).astype(np.int16)
    s, length = settings(mode, shape, g, 1, transposed)
    s["slice_scale"] = np.array([1.0, -4.0], np.float32)
    if mode == "variance":  # squares that bf16 holds too
        codes %= 16
        s["noise_var"] = rounded(s["noise_var"])
    device = ShimDevice((FORWARD, REVERSE, 11)[batch % 3], eager=transposed)
    y, gate = read(
        codes, g, device, tile_rows=length, tile_cols=length, strategy=strategy, want_gate=True, **s
    )
    assert ("fused_tile_mvm" in device.launches) == (strategy == "fused")
    expected, open_ = reference.tile_mvm(codes, rounded(g), tile=length, want_gate=True, **s)
    assert_matches(y, expected, s["adc_lsb"], 4 * 2 ** (s.get("stream_bits", 0) * (s.get("streams", 1) - 1)))
    assert (np.abs(gate - open_) <= 1e-5).mean() > 1 - 2e-3
    other = reference.tile_mvm(codes, g, tile=length, **s)
    assert (np.abs(other - expected) > 0.5 * s["adc_lsb"]).mean() > 0.005  # rounding shows


WAYS = {  # columns of a block, settings
    "codes": (256, {}),
    "streams": (256, {"stream_bits": 8, "streams": 2}),
    "columns": (128, {"adc_lsb": np.exp2(-np.linspace(19, 23, 130)).astype(np.float32)}),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_fused_is_the_epilogue_bit_for_bit(way):
    """Integer conductances of at most 8 bits, and codes beyond 8 bits where streams drive them."""
    block_n, s = WAYS[way]
    codes, g = integers(140, 100, 130, 2)
    if "streams" in s:
        codes *= 50
    s = {
        "tile_rows": 64,
        "read_noise": 2.0**-22,
        **INTEGER,
        **s,
        "slice_scale": np.array([0.5, -3.0], np.float32),
    }
    del s["g_range"]
    device = ShimDevice(multiprocessors=1)
    mine = read(codes, g, device, strategy="fused", **s)
    assert [m["BLOCK_N"] for m in device.macros if m.get("STAGES")] == [block_n]
    np.testing.assert_array_equal(mine, read(codes, g, strategy="epilogue", **s))
    parts = ShimDevice(REVERSE, eager=True, multiprocessors=1, workspace=1)
    np.testing.assert_array_equal(mine, read(codes, g, parts, strategy="fused", **s))
    assert np.unique(mine).size > 1000


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
def test_convolutions_are_unfolded(transposed):
    codes, g, s = convolution((2, 3), (2, 1), (0, 2), (1, 2), 2, transposed, 4, 8)
    device = ShimDevice(order=12, workspace=1 << 14)
    y = read(codes, g, device, tile_rows=4, tile_cols=4, strategy="fused", **s)
    assert device.launches.count("fused_tile_mvm") > 1
    assert_convolution_matches(y, reference.tile_mvm(codes, rounded(g), tile=4, **s))


def test_without_an_adc_products_are_those_of_rounded_conductances():
    codes, g = case(40, 60, 24)
    device = ShimDevice()
    y = read(codes, g, device, tile_rows=32, v_lsb=1e-3)
    assert "fused_tile_mvm" not in device.launches
    expected = reference.tile_mvm(codes, rounded(g), tile=32, v_lsb=1e-3)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("transposed", [False, True])
def test_conductances_half_way_go_to_the_even_one(transposed):
    g = np.ldexp(np.arange(256, 512, dtype=np.float32), -28)[None]
    g = np.ascontiguousarray(g.T) if transposed else g
    y = read(np.ones((1, 1), np.int16), g, transposed=transposed)
    np.testing.assert_array_equal(y.ravel(), rounded(g).ravel())
    assert (y.ravel() != g.ravel()).sum() == 128


def test_kept_conductances_are_bf16():
    codes, g = integers(9, 150, 30)
    s = {"adc_bits": 8, "adc_lsb": 2.0**-23, "v_lsb": 2.0**-10, "tile_rows": 64, "strategy": "fused"}
    size = ops.PackedConductance.size(g.shape, tile=64, precision="bf16")
    packed = ops.PackedConductance(np.zeros(size, np.uint8), np.zeros(2, np.int64), np.ones(1, np.int64))
    fresh = read(codes, g, **s)
    for changed in (g, -g):  # the second is not looked at
        np.testing.assert_array_equal(read(codes, changed, packed=packed, **s), fresh)
    half = {"precision": "fp16", "g_range": G_MAX, "device": ShimDevice(), "packed": packed}
    np.testing.assert_array_equal(ops.tile_mvm(codes, g, **s, **half), fresh)  # another layout: packed anew


# ---- what is refused, and why

BIG = Case(4096, 1, 4096, 4096, 1, 128, precision="bf16", noise="fast")


def test_the_planner_says_why():
    plan = plan_tile_mvm(BIG, "sm_90", 132)
    assert plan.strategy == "fused"
    assert "wgmma" not in plan.explain()
    times = [
        float(re.search(r"fused: (\d+) us", plan_tile_mvm(replace(BIG, precision=p), "sm_100", 148).explain()).group(1))
        for p in ("bf16", "fp16")
    ]  # fmt: skip
    assert times[0] >= times[1]
    images = replace(BIG, images=(2, 66, 66, 9), drive=576, tile=64, line_order="position_channel")
    for case_, strategy, reason in (
        (BIG, "wgmma", "it multiplies no bf16"),
        (images, "implicit", "codes are gathered from images as fp16"),
        (
            replace(BIG, drive=2**22, sense=512, stream_bits=2, streams=4, phases=2),
            "fused",
            "the operands are too large for its indices",
        ),
    ):
        with pytest.raises(ValueError, match=f"got '{strategy}' where {reason}; choose 'auto'"):
            plan_tile_mvm(case_, "sm_90", 132, strategy)
    with pytest.raises(
        ValueError, match="`precision` must be possible, got 'bf16' where sm_75 multiplies no bf16"
    ):
        plan_tile_mvm(BIG, "sm_75", 40)
    streams = replace(BIG, streams=2, stream_bits=8)
    assert plan_tile_mvm(streams, "sm_90", 132, "fused").strategy == "fused"


CODES = "`v` must hold codes within +-256 with precision='bf16', got {}; drive them by streams"
REFUSED = {
    "codes": ({"v": np.array([[300, -5]], np.int16)}, CODES.format(300)),
    "least": ({"v": np.array([[-(2**15), 5]], np.int16)}, CODES.format(2**15)),
    "dac": ({"v": np.zeros((1, 2), np.float32), "dac": ops.Dac(1.0, 511)}, CODES.format(511)),
    "digits": ({"stream_bits": 9}, "`stream_bits` must be at most 8 with precision='bf16', which holds no more, got 9"),
    "floats": ({"v": np.zeros((1, 2), np.float32)}, "`v` must be int16 codes with precision='bf16', got float32"),
}  # fmt: skip


@pytest.mark.parametrize("device", [None, ShimDevice()], ids=["cpu", "gpu"])
@pytest.mark.parametrize("name", REFUSED)
def test_messages(name, device):
    change, text = REFUSED[name]
    good = {"v": np.array([[256, -256]], np.int16), "g": np.ones((2, 1), np.float32), "precision": "bf16"}
    assert ops.tile_mvm(**good, device=device) == 0
    with pytest.raises((ValueError, TypeError), match=f"^tile_mvm: {re.escape(text)}"):
        ops.tile_mvm(**{**good, **change}, device=device)


LAYER = {
    "tile": {"rows": 16, "cols": 16},
    "dac": {"bits": 8},
    "adc": {"bits": 8, "range": "worst_case"},
    "precision": "bf16",
}


def test_values_need_a_dac():
    spec = gx.CrossbarSpec.model_validate(LAYER)
    text = "CrossbarSpec: `precision` must be fp32 or tf32 without a DAC in both directions, got 'bf16'"
    with pytest.raises(ValueError, match=text):
        spec.with_overrides({"dac": {"bits": None}})


@pytest.mark.parametrize(
    "change", [{}, {"keep_packed": True, "read_noise": {"sigma_g": 1e-7}}], ids=["plain", "kept"]
)
def test_layers_read_both_ways(change, monkeypatch):
    spec = gx.CrossbarSpec.model_validate(LAYER).with_overrides(change)
    layer = AnalogLinear(20, 11, spec=spec)
    x = torch.randn(5, 20, requires_grad=True)

    def both():
        x.grad = None
        y = layer(x)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
        return y.detach().numpy(), x.grad.numpy().copy()

    expected = both()
    with gpu_path(monkeypatch):
        found = both()
    for mine, theirs in zip(found, expected, strict=True):
        top = np.abs(theirs).max()
        assert 0 < np.abs(mine - theirs).max() < 0.15 * top
        assert np.unique(mine).size > mine.size / 4
