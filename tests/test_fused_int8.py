"""Fused reads that multiply digits by levels as bytes: the oracle bit for bit, seeded bugs, and what is refused."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from cuda_shim import FORWARD, REVERSE, ShimDevice
from tape import gpu_path
from test_tile_mvm import SEED, assert_matches

import gpuxbar as gx
from gpuxbar import ops, reference
from gpuxbar.nn import AnalogConv2d, AnalogLinear
from gpuxbar.ops import ConvGeometry
from gpuxbar.ops.tile_mvm_case import Case
from gpuxbar.ops.tile_mvm_plan import plan_tile_mvm

STEP = 2.0**-24  # S between levels: every product and sum below is a whole number of 2^-34 A
OFFSET = 133 * STEP  # S of level 0, whole too, though nothing but the tests needs that
LSB = 2.0**-21
BASE = {"v_lsb": 2.0**-10, "adc_bits": 8, "adc_lsb": LSB, "seed": SEED, "step": 3}


def operands(rows, inputs, outputs, planes=1, groups=1, offset=0.0):
    rng = np.random.default_rng(rows + inputs)
    codes = rng.integers(-127, 128, (rows, groups * inputs)).astype(np.int16)
    levels = rng.integers(-128, 128, (planes, groups * inputs, outputs))
    return codes, (offset + levels * STEP).astype(np.float32)


def int8(codes, g, device=None, offset=0.0, **s):
    more = {"precision": "int8", "g_step": STEP, "g_offset": offset}
    return ops.tile_mvm(codes, g, device=device or ShimDevice(), **{**more, **s})


READS = {  # rows, inputs, outputs, tile, planes, groups, conductance of level 0, settings
    "one-cell": (1, 1, 1, 1, 1, 1, OFFSET, {}),
    "past-one-block": (131, 100, 141, 70, 1, 1, OFFSET, {"want_gate": True}),
    "wide": (20, 130, 250, 128, 1, 1, 0.0, {}),
    "long-tile": (9, 700, 20, 300, 1, 1, OFFSET, {}),  # sums beyond 2^22
    "planes": (9, 150, 30, 64, 2, 1, OFFSET, {"slice_scale": np.array([0.5, -4.0], np.float32)}),
    "groups": (9, 70, 24, 64, 1, 3, OFFSET, {"want_gate": True, "adc_lsb": LSB / 8}),
    "streams": (20, 150, 30, 64, 1, 2, OFFSET, {"stream_bits": 3, "streams": 3, "adc_lsb": 2.0**-23}),
    "two-phase": (20, 150, 30, 64, 1, 1, OFFSET, {"stream_bits": 4, "streams": 2, "phases": 2, "want_gate": True}),
    "columns": (9, 150, 30, 64, 1, 1, OFFSET, {"adc_lsb": np.exp2(-np.arange(20, 23, 0.1)).astype(np.float32)}),
    "errors": (9, 150, 30, 64, 1, 1, OFFSET, {"adc_gain": np.full((1, 3, 30), 0.75, np.float32), "adc_offset": np.full((1, 3, 30), 3 * LSB, np.float32)}),
}  # fmt: skip


@pytest.mark.parametrize("name", READS)
def test_int8_is_the_oracle_bit_for_bit(name):
    rows, inputs, outputs, tile, planes, groups, offset, s = READS[name]
    codes, g = operands(rows, inputs, outputs, planes, groups, offset)
    s = {**BASE, "groups": groups, **s}
    device = ShimDevice(order=(FORWARD, REVERSE, 11)[rows % 3], eager=rows % 2 == 0, multiprocessors=3)
    mine = int8(codes, g, device, offset, tile_rows=tile, **s)
    theirs = reference.tile_mvm(codes, g, tile=tile, **s)
    mine, theirs = (r if s.get("want_gate") else (r,) for r in (mine, theirs))
    assert [m["INT8"] for m in device.macros if "STAGES" in m] == [2 if name == "long-tile" else 1]
    np.testing.assert_array_equal(mine[0], theirs[0].astype(np.float32))
    if s.get("want_gate"):
        np.testing.assert_allclose(mine[1], theirs[1], atol=1e-6)
        assert (theirs[1].min() < 1) == (name == "groups")
    assert np.unique(mine[0]).size > min(mine[0].size, 60) / 3  # not all clipped, nor all zero


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
def test_convolutions_and_transposed_reads(transposed):
    """Patches are unfolded; groups and chunks of rows are as in any read."""
    conv = ConvGeometry(5, 6, 7, (3, 2), (2, 1), (1, 0), (1, 2))
    rng = np.random.default_rng(1)
    shape = (15, 2 * 9, *conv.out) if transposed else (15, 2 * 5, 6, 7)
    codes = rng.integers(-127, 128, shape).astype(np.int16)
    g = (OFFSET + rng.integers(-128, 128, (1, 2 * conv.inputs, 9)) * STEP).astype(np.float32)
    s = {**BASE, "groups": 2, "conv": conv, "transposed": transposed}
    device = ShimDevice(workspace=1)
    y = int8(codes, g, device, OFFSET, tile_rows=13, tile_cols=4, **s)
    assert np.array_equal(
        y, reference.tile_mvm(codes, g, tile=4 if transposed else 13, **s).astype(np.float32)
    )
    assert device.launches.count("pack_sensed") == 1


@pytest.mark.parametrize("generator", ["exact", "fast"])
def test_noise_is_that_of_other_precisions(generator):
    """Levels that fp16 holds too: the same sums, counters and codes, whatever block, split or chunk."""
    codes, g = operands(20, 130, 250)
    s = {**BASE, "tile_rows": 64, "read_noise": 2 * LSB, "generator": generator}
    expected = ops.tile_mvm(codes, g, precision="fp16", g_range=2.0**-17, device=ShimDevice(), strategy="epilogue", **s)  # fmt: skip
    blocks = set()
    for arch, multiprocessors, workspace in (("sm_90", 1, 1 << 26), ("sm_86", 40, 1 << 26), ("sm_80", 9, 1)):
        device = ShimDevice(12, eager=arch == "sm_80", arch=arch, multiprocessors=multiprocessors, workspace=workspace)  # fmt: skip
        np.testing.assert_array_equal(int8(codes, g, device, **s), expected)
        blocks |= {m["BLOCK_N"] for m in device.macros if "STAGES" in m}
    assert blocks == {128, 256}


def test_what_does_not_fit_is_read_as_said():
    """Levels between whole ones and beyond the ends, and codes beyond +-127."""
    codes = np.array([[300, -200, 5]], np.int16)
    g = np.array([[3.4, 200.0], [-2.6, -300.0], [0.0, 1.0]], np.float32) * np.float32(STEP) + np.float32(
        OFFSET
    )
    whole = np.array([[3, 127], [-3, -128], [0, 1]]) * STEP + OFFSET
    s = {**BASE, "adc_bits": 16, "adc_lsb": 2.0**-32}
    expected = reference.tile_mvm(np.clip(codes, -127, 127), whole[None], **s)
    np.testing.assert_array_equal(int8(codes, g, offset=OFFSET, **s), expected.astype(np.float32))


MUTANTS = {
    "chunk-of-halves": ("fused_tile_mvm.cu", "CHUNK * chunk", "8 * chunk"),
    "sums-start-at-zero": ("fused_tile_mvm.cu", "INT8 == 1 ? 0x4B400000 : 0;", "0;"),
    "pass-of-another": ("fused_tile_mvm.cu", "INT8 || BFLOAT ? block.pass * rows : 0", "0"),
    "sums-in-one-tile": ("pack_inputs.cu", "groups * tiles + (line0 + part) / k", "groups * tiles"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_seeded_bugs_are_found(name, seeded):
    seeded(*MUTANTS[name])
    with pytest.raises((AssertionError, RuntimeError)):
        test_int8_is_the_oracle_bit_for_bit("streams")


def test_kept_levels_are_bytes():
    codes, g = operands(9, 150, 30, offset=OFFSET)
    size = ops.PackedConductance.size(g.shape, tile=64, precision="int8")
    assert size == 3 * 128 * 128
    packed = ops.PackedConductance(np.zeros(size, np.uint8), np.zeros(2, np.int64), np.ones(1, np.int64))
    fresh = int8(codes, g, offset=OFFSET, tile_rows=64, **BASE)
    for changed in (g, -g):  # the second is not looked at
        np.testing.assert_array_equal(
            int8(codes, changed, offset=OFFSET, tile_rows=64, packed=packed, **BASE), fresh
        )
    other = int8(
        codes, g, offset=OFFSET + STEP, tile_rows=64, packed=packed, **BASE
    )  # other levels of the same array
    np.testing.assert_array_equal(other, int8(codes, g, offset=OFFSET + STEP, tile_rows=64, **BASE))


# ---- what is refused, and why

BIG = Case(4096, 1, 4096, 4096, 1, 512, precision="int8")
OBSTACLES = {
    "turing": (BIG, "sm_75", "auto", "sm_75 has no mma.sync"),
    "no-adc": (replace(BIG, adc_bits=0), "sm_90", "auto", r"nothing is converted \(adc_bits=None\)"),
    "floats": (replace(BIG, codes=False), "sm_90", "auto", "driven by floats"),
    "variance": (replace(BIG, variance=True), "sm_90", "auto", "the noise depends on the state"),
    "digits": (replace(BIG, stream_bits=8), "sm_90", "auto", "digits of 8 bits do not fit 8 with a sign"),
    "sums": (replace(BIG, gate=True, adc_bits=14), "sm_90", "auto", "sums of 8 codes of 14 bits take more than 16"),
    "indices": (replace(BIG, stream_bits=1, streams=7, groups=1024), "sm_90", "auto", "operands are too large"),
    "cublas": (BIG, "sm_90", "epilogue", r"strategy='epilogue' \(fused multiplies bytes\)"),
    "hopper": (BIG, "sm_90", "wgmma", "strategy='wgmma'"),
}  # fmt: skip


@pytest.mark.parametrize("name", OBSTACLES)
def test_the_planner_says_why_not(name):
    case, arch, strategy, reason = OBSTACLES[name]
    text = rf"`precision` must be possible, got 'int8' where .*{reason}.*; choose 'fp16' or 'fp16x2'"
    with pytest.raises(ValueError, match=text):
        plan_tile_mvm(case, arch, 132, strategy)


def test_the_planner_takes_bytes_only_where_asked():
    plan = plan_tile_mvm(BIG, "sm_90", 132)
    assert plan.strategy == "fused"
    assert "cuBLAS + epilogue: multiplies no bytes" in plan.explain()
    times = [
        float(re.search(r"fused: (\d+) us", plan_tile_mvm(replace(BIG, precision=p), "sm_90", 132).explain()).group(1))
        for p in ("int8", "fp16")
    ]  # fmt: skip
    assert times[0] < 0.7 * times[1]
    short = replace(BIG, tile=64)  # padded to 128 lines, it multiplies as many bytes as halves
    assert plan_tile_mvm(short, "sm_90", 132).strategy == "fused"


@pytest.mark.parametrize(
    ("change", "text"),
    [({"g_step": None}, "`g_step` must be above 0 S with precision='int8', got None"),
     ({"g_offset": np.inf}, "`g_offset` must be finite, got inf S"),
     ({"v": np.zeros((1, 1), np.float32)}, "`v` must be int16 codes with precision='int8', got float32")],
)  # fmt: skip
def test_messages(change, text):
    codes, g = operands(1, 1, 1)
    with pytest.raises((ValueError, TypeError), match=re.escape(text)):
        int8(**{"codes": codes, "g": g, **{{"v": "codes"}.get(k, k): v for k, v in change.items()}}, **BASE)


LAYER = {
    "tile": {"rows": 16, "cols": 16}, "device": {"levels": 16}, "dac": {"bits": 8}, "adc": {"bits": 8, "range": "worst_case"},
    "precision": "int8",
}  # fmt: skip
REFUSED = {
    "continuous": ({"device": {"levels": None}}, r"devices are continuous \(device.levels=None\)"),
    "levels": ({"device": {"levels": 257}}, r"devices have 257 levels \(256 fit 8 bits\)"),
    "subtracted": ({"device": {"levels": 129}, "mapping": {"scheme": "subtracted"}}, r"129 levels \(128 fit 8 bits\)"),
    "noise": ({"programming": {"write_noise": 1e-9}}, "writes leave noise or spread"),
    "spread": ({"programming": {"device_spread": 0.1}}, "writes leave noise or spread"),
    "wires": ({"parasitics": {"r_wordline": 1.0}}, "wires take from levels"),
    "drift": ({"drift": {"nu": 0.05}}, "devices drift off their levels"),
    "in-situ": ({"update": {"law": "agarwal"}}, "in-situ updates end between levels"),
    "sigma_g": ({"read_noise": {"sigma_g": 1e-7}}, "the noise of a read depends on the cell"),
    "inl": ({"backward": {"adc": {"bits": 8, "range": "worst_case", "inl_std": 0.1}}}, r"converters are non-linear \(adc\.inl\)"),
    "adc": ({"adc": {"bits": None}}, "an ADC or DAC is missing"),
    "digits": ({"dac": {"signed": False}}, r"digits up to 255 are driven \(127 fit 8 bits\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_specs_that_are_not_whole_are_refused(name):
    change, why = REFUSED[name]
    spec = gx.CrossbarSpec.model_validate(LAYER)
    with pytest.raises(
        ValueError, match=f"`precision` must be fp16 or fp16x2 where .*{why}.*, got 'int8'; choose"
    ):
        spec.with_overrides(change)


MAPPINGS = {
    "pairs": {},
    "many-levels": {"device": {"levels": 256}},
    "subtracted": {"mapping": {"scheme": "subtracted"}, "keep_packed": True},
    "offset": {"mapping": {"scheme": "offset"}},
    "sliced": {"mapping": {"slices": 2, "slice_bits": 3}, "device": {"levels": None}},
    "stuck": {"programming": {"stuck_at_g_min": 0.1, "stuck_at_g_max": 0.1}},
    "unsigned-streams": {"dac": {"signed": False, "stream_bits": 4}, "backward": {"dac": {"bits": 7}}},
    "ideal-backward": {"backward": {"mode": "ideal"}},
}  # fmt: skip


@pytest.mark.parametrize("name", MAPPINGS)
def test_layers_read_their_levels(name, monkeypatch):
    """Both directions of a layer are what they are on the CPU, but for codes on a rounding edge."""
    spec = gx.CrossbarSpec.model_validate(LAYER).with_overrides(MAPPINGS[name])
    layer = AnalogConv2d(3, 6, 3, spec=spec) if name == "stuck" else AnalogLinear(20, 11, spec=spec)
    x = torch.randn(2, 3, 4, 4) if name == "stuck" else torch.randn(3, 20)

    def both():
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
        return y.detach().numpy(), inputs.grad.numpy()

    expected = both()
    with gpu_path(monkeypatch):
        found = both()
    for mine, theirs in zip(found, expected, strict=True):
        step = np.abs(theirs).max() / 20
        assert_matches(mine, theirs, step, share=0.1)
        assert np.unique(mine).size > mine.size / 4


@pytest.mark.parametrize("channels", [(16, 12), (12, 16)], ids=["forward", "backward"])
def test_layers_that_no_kernel_reads_are_refused_by_name(channels, monkeypatch):
    """Of a model they may be any; the CPU reads them."""
    noisy = gx.CrossbarSpec.model_validate(LAYER).with_overrides({"read_noise": {"sigma": 1e-8}})
    layer = AnalogConv2d(*channels, 1, groups=2, spec=noisy, name="stage.2")
    x = torch.randn(1, channels[0], 2, 2, requires_grad=True)
    layer(x).sum().backward()
    with (
        gpu_path(monkeypatch),
        pytest.raises(
            ValueError,
            match=r"^stage\.2: `precision` must be possible, got 'int8' where the 6 sensed lines of a group are no multiple of 8, .*; choose",
        ),
    ):
        layer(x).sum().backward()


def test_layers_of_bytes_are_calibrated(monkeypatch):
    """To the ranges that the CPU finds, by reads without ADCs, of which no kernel multiplies bytes."""
    spec = gx.CrossbarSpec.model_validate(LAYER).with_overrides({"adc": {"range": "calibrated"}})
    x, ranges = torch.randn(3, 20), []
    for path in (nullcontext(), gpu_path(monkeypatch)):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            AnalogLinear(20, 11, spec=spec), torch.nn.ReLU(), AnalogLinear(11, 7, spec=spec)
        )
        with path:
            gx.calibrate(model, [x])
        ranges.append([converter.full for layer in (model[0], model[2]) for converter in layer.converters()])
        assert model[0].plan.precision == "int8"
    for mine, theirs in zip(*ranges, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=0.0)
