"""The fused tensor-core read without a GPU: against the oracle, against the epilogue path, and under seeded bugs."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_shim import FORWARD, REVERSE, ShimDevice
from test_tile_mvm import G_MAX, MODES, assert_matches, case, settings

from gpuxbar import ops, reference

SHAPES = [
    pytest.param((1, 1, 1, None), id="one-cell"),
    pytest.param((7, 37, 11, 16), id="prime"),
    pytest.param((131, 150, 141, 70), id="past-one-block"),
]


def fused(codes, g, device=None, **s):
    more = {"precision": "fp16x2", "g_range": G_MAX, "strategy": "fused", **s}
    return ops.tile_mvm(codes, g, device=device or ShimDevice(), **more)


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize("mode", [m for m in MODES if "adc_bits" in MODES[m]])
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_matches_oracle(shape, mode, transposed):
    batch, rows, cols, tile = shape
    codes, g = case(batch, rows, cols, planes=2)
    if transposed:
        codes = np.random.default_rng(2).integers(-127, 128, (batch, cols)).astype(np.int16)
    s, length = settings(mode, shape, g, 1, transposed)
    s["slice_scale"] = np.array([1.0, -4.0], np.float32)
    if mode == "variance":  # numbers that bf16 holds
        codes %= 16
        s["noise_var"] = (s["noise_var"].view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    expected, gate = reference.tile_mvm(codes, g, tile=length, want_gate=True, **s)
    device = ShimDevice(order=(FORWARD, REVERSE, 11, 12)[(batch + transposed) % 4], eager=transposed)
    y, shim_gate = fused(codes, g, device, tile_rows=length, tile_cols=length, want_gate=True, **s)
    assert "fused_tile_mvm" in device.launches
    weight = 4 * 2 ** (s.get("stream_bits", 0) * (s.get("streams", 1) - 1))
    assert_matches(y, expected, s["adc_lsb"], weight)
    assert (np.abs(shim_gate - gate) > 1e-5).mean() < 2e-3
