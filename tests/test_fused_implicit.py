"""Convolutions whose patches the fused read gathers from the images: the unfolded read, and seeded bugs."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from cuda_shim import FORWARD, REVERSE, ShimDevice
from cuda_shim.ptx import PtxDevice
from test_tile_mvm import SEED, assert_matches

from gpuxbar import ops, reference
from gpuxbar.ops import ConvGeometry
from gpuxbar.ops.tile_mvm_case import Case
from gpuxbar.ops.tile_mvm_plan import plan_tile_mvm

LSB = 2.0**-23


def convolution(conv, groups, images, outputs, planes=1):
    """Integer codes, and conductances of 2^-20 S a level: every partial sum is an integer number of steps over 2^n."""
    rng = np.random.default_rng(5)
    codes = rng.integers(-127, 128, (images, groups * conv.channels, conv.height, conv.width))
    levels = rng.integers(-15, 16, (planes, groups * conv.inputs, outputs))
    return codes.astype(np.int16), (levels * 2.0**-20).astype(np.float32)


def read(codes, g, conv, tile, strategy, device, **s):
    more = {
        "v_lsb": 2.0**-10,
        "adc_bits": 8,
        "adc_lsb": LSB,
        "g_range": 2.0**-16,
        "precision": "fp16",
        "seed": SEED,
        "step": 3,
    }
    return ops.tile_mvm(codes, g, conv=conv, tile_rows=tile, strategy=strategy, device=device, **{**more, **s})  # fmt: skip


NOISY = {"read_noise": 2.0**-22, "want_gate": True}
READS = {  # geometry, groups, images, rows of a tile, planes, settings, device
    "one-block": (ConvGeometry(11, 5, 7, (3, 2), (2, 1), (1, 2), (1, 2)), 1, 3, 7, 1, NOISY, {}),
    "groups": (ConvGeometry(16, 5, 6, (3, 3), (1, 1), (1, 1)), 2, 3, 40, 1, NOISY, {"eager": True}),
    "whole-chunks": (ConvGeometry(16, 9, 8, (1, 1), (2, 3)), 1, 5, 8, 2, NOISY, {}),
    "chunks-of-rows": (ConvGeometry(9, 7, 7, (3, 3), (1, 1), (1, 1)), 1, 4, 33, 2, NOISY, {"workspace": 1}),
    "splits": (ConvGeometry(20, 5, 5, (3, 3), (1, 1), (1, 1)), 1, 2, 50, 1, NOISY, {"multiprocessors": 4}),
    "by-position": (ConvGeometry(16, 5, 6, (3, 3), (1, 1), (1, 1), (1, 2), "position_channel"), 2, 3, 40, 1, NOISY, {"eager": True}),
    "whole-tiles": (ConvGeometry(64, 4, 3, (2, 3), (2, 1), (0, 1), (1, 1), "position_channel"), 1, 4, 128, 2, NOISY, {"multiprocessors": 4, "workspace": 1}),
    "one-tile-by-position": (ConvGeometry(8, 3, 4, (3, 1), (1, 1), (1, 0), (1, 1), "position_channel"), 1, 2, 500, 1, NOISY, {}),
    "two-phase": (ConvGeometry(9, 5, 5, (2, 2)), 1, 3, 16, 1,
                  {"stream_bits": 4, "streams": 2, "phases": 2, "adc_signed": False}, {"order": 12}),
}  # fmt: skip


BY_POSITION = [name for name, read in READS.items() if read[0].line_order == "position_channel"]


@pytest.mark.parametrize(
    ("name", "strategy"),
    [*((n, "implicit") for n in READS), *((n, "implicit-wgmma") for n in BY_POSITION)],
)
def test_gathered_patches_are_the_unfolded_read_bit_for_bit(name, strategy):
    """The same lines share a tile, whatever their order: partial sums, counters and codes are those of cuBLAS's way."""
    conv, groups, images, tile, planes, s, how = READS[name]
    codes, g = convolution(conv, groups, images, 8, planes)
    s = {**s, "groups": groups, "row_scale": np.linspace(1, 2, images, dtype=np.float32)}
    device = ShimDevice(**{"multiprocessors": 1, **how})
    mine = read(codes, g, conv, tile, strategy, device, **s)
    theirs = read(codes, g, conv, tile, "epilogue", ShimDevice(), **s)
    assert "pack_images" in device.launches
    assert "pack_inputs" not in device.launches
    assert ("fused_tile_mvm_sm90" in device.launches) == (strategy == "implicit-wgmma")
    np.testing.assert_array_equal(np.stack(mine), np.stack(theirs))
    assert np.unique(mine).size > 50  # not all clipped, nor all zero


@pytest.mark.parametrize("strategy", ["implicit", "implicit-wgmma"])
def test_nothing_is_read_beyond_the_images(strategy):
    """Neither for rows and lines that pad a block, nor where positions beyond the kernel reach 2^16 pixels down."""
    conv = ConvGeometry(8, 9364, 1, (2, 1), (1, 1), (0, 0), (9363, 1), line_order="position_channel")
    codes, g = convolution(conv, 1, 2, 8)
    y = read(codes, g, conv, 16, strategy, PtxDevice(multiprocessors=1))
    np.testing.assert_array_equal(y, read(codes, g, conv, 16, "epilogue", ShimDevice()))


def test_state_dependent_noise_and_two_terms_match_the_oracle():
    """Variances that bf16 holds, conductances that fp16 does not."""
    conv = ConvGeometry(11, 5, 6, (3, 3), (1, 1), (1, 1))
    codes, g = convolution(conv, 1, 3, 8)
    codes %= 16
    g *= np.float32(1.0001)
    spread = np.abs(g).astype(np.float32) * 1e-9
    s = {
        "noise_var": (spread.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32),
        "read_noise": 2.0**-22,
    }
    device = ShimDevice()
    y = read(codes, g, conv, 20, "implicit", device, precision="fp16x2", **s)
    more = {"v_lsb": 2.0**-10, "adc_bits": 8, "adc_lsb": LSB, "seed": SEED, "step": 3}
    assert_matches(y, reference.tile_mvm(codes, g, conv=conv, tile=20, **more, **s), LSB)


MUTANTS = {  # file, text, what to put in its place
    "none": ("fused_tile_mvm.cu", "copy_commit", "copy_commit"),
    "the-first-channels-alone": (
        "fused_tile_mvm.cu",
        "position % images.kernel_w, channel)",
        "position % images.kernel_w, 0)",
    ),
    "no-zeros-over-an-edge": (
        "fused_tile_mvm.cu",
        "+ tap.offset : 0), real)",
        "+ tap.offset : 0), driven)",
    ),
    "stage-freed-early": ("fused_tile_mvm.cu", "fill(stage == 0 ? STAGES - 1 : stage - 1", "fill(stage"),
    "wait-too-weak": ("fused_tile_mvm.cu", "copy_wait<STAGES - 2>()", "copy_wait<STAGES - 1>()"),
    "lines-of-the-tile-before": ("pack_sensed.cu", "d >= first && ", ""),
    "channels-of-the-first-tile": (
        "fused_tile_mvm.cu",
        "channel = (first + place) % images.channels",
        "channel = place % images.channels",
    ),
}


HOPPER_MUTANTS = {  # of fused_tile_mvm_sm90.cu; the CPU twins report them
    "gathered-but-not-fenced": ("async_fence();", ""),
    "a-step-delivered-before-it-landed": ("copy_wait<UNDER_WAY>()", "copy_wait<UNDER_WAY + 1>()"),
}


@pytest.mark.parametrize("name", HOPPER_MUTANTS)
def test_seeded_bugs_of_the_gathering_warps_are_found(name, seeded):
    """By late copies alone: an early one hides that nobody waited for it."""
    seeded("fused_tile_mvm_sm90.cu", *HOPPER_MUTANTS[name])
    conv = ConvGeometry(64, 3, 4, (3, 3), (1, 1), (1, 1), line_order="position_channel")
    codes, g = convolution(conv, 1, 3, 8)
    with pytest.raises(RuntimeError, match=r"^fused_tile_mvm_sm90: .*operand not landed, or not fenced"):
        read(codes, g, conv, 128, "implicit-wgmma", ShimDevice(REVERSE, multiprocessors=1))


@pytest.mark.parametrize("name", MUTANTS)
def test_seeded_bugs_are_found(name, seeded):
    """Red in at least one of early and late copies; the unchanged kernel is green in both."""
    seeded(*MUTANTS[name])
    conv, tile = ConvGeometry(20, 5, 6, (3, 3), (1, 1), (1, 2)), 50
    if name == "channels-of-the-first-tile":
        conv, tile = replace(conv, channels=16, line_order="position_channel"), 40
    codes, g = convolution(conv, 1, 3, 8)
    expected = read(codes, g, conv, tile, "epilogue", ShimDevice())
    found = False
    for eager, order in ((False, FORWARD), (True, REVERSE)):
        device = ShimDevice(order, eager=eager, multiprocessors=1)
        found |= not np.array_equal(read(codes, g, conv, tile, "implicit", device), expected)
    assert found == (name != "none")


LAYER = Case(131072, 1, 576, 64, 1, 128, noise="fast", images=(128, 32, 32, 9))


def test_the_planner_gathers_where_unfolding_costs_more():
    plan = plan_tile_mvm(LAYER, "sm_80", 108)
    assert (plan.strategy, plan.chunks) == ("implicit", 3), plan.explain()
    assert "implicit: " in plan.explain()
    assert "implicit drives 256 lines for a tile of 128, in the order channel_position" in plan.explain()
    # of 16 lines up to 144 would be driven, for many columns
    short = Case(8192, 1, 4608, 512, 1, 16, images=(128, 8, 8, 9))
    assert plan_tile_mvm(short, "sm_80", 108).strategy == "fused"


def test_tiles_of_whole_channels_are_gathered_without_waste():
    """ResNet-50's layer3: in the order of positions 128 lines are driven as 128, else as 256."""
    by_channel = Case(6272, 1, 2304, 256, 1, 128, noise="fast", images=(32, 16, 16, 9))
    by_position = replace(by_channel, line_order="position_channel")
    assert plan_tile_mvm(by_channel, "sm_90", 132).strategy == "wgmma"
    plan = plan_tile_mvm(by_position, "sm_90", 132)
    assert (plan.strategy, plan.block_n, plan.chunks) == ("implicit-wgmma", 128, 0), plan.explain()
    assert "implicit drives 128 lines for a tile of 128, in the order position_channel" in plan.explain()
    assert plan_tile_mvm(by_position, "sm_80", 108).strategy == "implicit"
    us = {}
    for case in (by_channel, by_position):
        for line in plan_tile_mvm(case, "sm_90", 132).why:
            if found := re.match(r"([a-z-]+): (\d+) us", line):
                us[case.line_order, found[1]] = int(found[2])
    assert us["position_channel", "implicit"] < us["position_channel", "fused"]  # patches are not moved
    assert us["position_channel", "implicit-wgmma"] < us["position_channel", "wgmma"]
    assert us["channel_position", "fused"] == us["position_channel", "fused"]
    assert us["channel_position", "implicit"] > 1.3 * us["position_channel", "implicit"]


def test_unfolding_takes_a_pass_of_the_dac():
    """Gathering does not; nor does a read of what is no image."""

    def us(**change):
        lines = plan_tile_mvm(replace(LAYER, **change), "sm_80", 108).why
        return {
            line.split(":")[0]: int(re.search(r": (\d+) us", line)[1]) for line in lines if " us, " in line
        }

    without, with_dac = us(), us(dac=True)
    assert with_dac["implicit"] == without["implicit"]
    for name in ("fused", "cuBLAS + epilogue"):
        assert without[name] < with_dac[name] < 1.5 * without[name]
    assert us(images=None, dac=True) == us(images=None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"images": None}, r"no patches drive the lines \(those of a convolution read forwards do\)"),
        ({"images": (1, 20000, 3, 9)}, "images of 20000 x 3 are too large for its indices"),
        (
            {"line_order": "position_channel", "tile": 100},
            "64 channels in tiles of 100 lines are no chunks of eight channels",
        ),
        (
            {"line_order": "position_channel", "drive": 540},
            "60 channels in tiles of 128 lines are no chunks of eight channels",
        ),
        ({"images": (70000, 3, 3, 9)}, "70000 images are too many for its indices"),
        ({"images": (60000, 400, 400, 9)}, "the operands are too large for its indices"),
        ({"adc_bits": 0}, "nothing is converted"),
    ],
)
def test_what_it_cannot_gather(change, reason):
    with pytest.raises(ValueError, match=rf"got 'implicit' where {reason}.*; choose 'auto'"):
        plan_tile_mvm(replace(LAYER, **change), "sm_80", 108, "implicit")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"line_order": "channel_position"}, "the lines are in the order channel_position"),
        ({"tile": 100}, "64 channels in tiles of 100 lines are no chunks"),
        ({"stream_bits": 4, "streams": 2}, "digits are cut out of the codes"),
        ({"variance": True}, "the noise depends on the state"),
        ({"converters": 2}, "converters have a gain or offset of their own"),
        ({"images": None}, "no patches drive the lines"),
    ],
)
def test_what_hopper_cannot_gather(change, reason):
    case = replace(LAYER, line_order="position_channel")
    assert plan_tile_mvm(case, "sm_90", 132, "implicit-wgmma").block_n == 128
    with pytest.raises(ValueError, match=rf"got 'implicit-wgmma' where {reason}.*; choose 'auto'"):
        plan_tile_mvm(replace(case, **change), "sm_90", 132, "implicit-wgmma")
    with pytest.raises(ValueError, match="got 'implicit-wgmma' where sm_80 has no wgmma"):
        plan_tile_mvm(case, "sm_80", 108, "implicit-wgmma")
