"""The fused tensor-core read without a GPU: against the oracle, against the epilogue path, and under seeded bugs."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from cuda_shim import FORWARD, REVERSE, ShimDevice
from test_tile_mvm import (
    G_MAX,
    MODES,
    SEED,
    assert_convolution_matches,
    assert_matches,
    assert_reads,
    case,
    convolution,
)

from gpuxbar import ops, reference
from gpuxbar.ops import ConvGeometry, tile_mvm_plan
from gpuxbar.ops.tile_mvm_case import Case
from gpuxbar.ops.tile_mvm_plan import plan_tile_mvm
from gpuxbar.ops.tile_mvm_times import rates

SHAPES = [
    pytest.param((1, 1, 1, None), id="one-cell"),
    pytest.param((7, 37, 11, 16), id="prime"),
    pytest.param((131, 150, 141, 70), id="past-one-block"),
]


def fused(codes, g, device=None, **s):
    more = {"precision": "fp16x2", "g_range": G_MAX, "strategy": "fused", **s}
    return ops.tile_mvm(codes, g, device=device or ShimDevice(), **more)


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize(
    "mode", [m for m in MODES if "adc_bits" in MODES[m] and not {"inl", "drivers"} & set(MODES[m])]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_matches_oracle(shape, mode, transposed):
    device = ShimDevice(order=(FORWARD, REVERSE, 11, 12)[(shape[0] + transposed) % 4], eager=transposed)
    assert_reads(partial(fused, device=device), shape, mode, transposed=transposed, bf16=True)
    assert "fused_tile_mvm" in device.launches


def integers(batch, rows, cols, planes=1, groups=1):
    """Codes, and conductances of 1 nS a level, so that every partial sum is an integer number of steps over 2^n."""
    rng = np.random.default_rng(5)
    codes = rng.integers(-127, 128, (batch, groups * rows)).astype(np.int16)
    levels = rng.integers(-15, 16, (planes, groups * rows, cols))
    return codes, (levels * 2.0**-20).astype(np.float32)


INTEGER = {
    "v_lsb": 2.0**-10,
    "adc_bits": 8,
    "adc_lsb": 2.0**-23,
    "g_range": 2.0**-16,
    "seed": SEED,
    "step": 3,
}
WAYS = {  # columns of the block that the planner takes, settings
    "adc": (256, {}),
    "exact": (256, {"read_noise": 2.0**-22}),
    "exact-gate": (128, {"read_noise": 2.0**-22, "want_gate": True}),
    "fast-split": (128, {"read_noise": 2.0**-22, "generator": "fast", "precision": "fp16x2"}),
    "signed-streams": (256, {"stream_bits": 3, "streams": 3, "read_noise": 2.0**-22, "generator": "fast"}),
    "two-phase-gate": (128, {"stream_bits": 7, "phases": 2, "adc_signed": False, "want_gate": True}),
    "columns": (
        128,
        {"adc_lsb": np.exp2(-np.linspace(19, 23, 250)).astype(np.float32), "read_noise": 2.0**-22},
    ),
    "wide-codes": (128, {"adc_bits": 16, "adc_lsb": 2.0**-27}),
}


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_fused_is_the_epilogue_bit_for_bit(way, planes):
    """Where partial sums are integers both ways round alike, draw alike and add alike."""
    block_n, settings = WAYS[way]
    codes, g = integers(150, 200, 250, planes)
    s = {
        "precision": "fp16", "tile_rows": 64, **INTEGER, **settings, "row_scale": np.linspace(1, 2, 150, dtype=np.float32),
        "bias": np.arange(250, dtype=np.float32) * 2.0**-22, "col_scale": np.linspace(3, 4, 250, dtype=np.float32),
        "slice_scale": np.array([0.5, -3.0], np.float32)[:planes],
    }  # fmt: skip
    one, other = ShimDevice(multiprocessors=1), ShimDevice()
    mine = ops.tile_mvm(codes, g, device=one, strategy="fused", **s)
    theirs = ops.tile_mvm(codes, g, device=other, strategy="epilogue", **s)
    assert [macros["BLOCK_N"] for macros in one.macros if "BLOCK_N" in macros] == [block_n]
    assert "adc_accumulate" in other.launches
    np.testing.assert_array_equal(np.stack(mine), np.stack(theirs))
    y = mine[0] if s.get("want_gate") else mine
    assert np.unique(y).size > y.size / 4  # not all clipped, nor all zero


ENDS = {  # bits of the ADC, whether signed, tiles, code, level, levels of a step: currents at the ends of the range
    "32766": (15, True, 2, 127, 129, 1),  # and as much below 0: the largest sums of two columns in a register
    "65535": (16, False, 1, 255, 257, 1),
    "half a step beyond": (8, True, 1, 255, 1, 2),  # is inside
    "half a step above": (8, False, 1, 73, 7, 2),
    "2^24 steps": (8, True, 1, 127, 129, 2.0**-10),
}


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("name", ENDS)
def test_codes_at_the_ends_of_the_range(name, gate):
    bits, signed, tiles, code, level, step = ENDS[name]
    codes = np.array([[code], [-code], [code - 1], [code + 1]], np.int16).repeat(tiles, 1)
    g = (np.array([level, -level, 0, 2 * level]) * 2.0**-26).astype(np.float32)
    g = np.tile(g, (1, tiles, 63))
    s = {
        "v_lsb": 2.0**-10,
        "adc_bits": bits,
        "adc_signed": signed,
        "adc_lsb": step * 2.0**-36,
        "want_gate": gate,
    }
    expected = np.stack(reference.tile_mvm(codes, g, tile=1, **s))
    for strategy in ("fused", "epilogue"):
        device = ShimDevice(multiprocessors=1)
        y = fused(codes, g, device, precision="fp16", g_range=2.0**-16, tile_rows=1, strategy=strategy, **s)
        np.testing.assert_array_equal(np.stack(y), expected.astype(np.float32))
        assert strategy == "epilogue" or device.macros[-1]["BLOCK_N"] == (128 if gate else 256)
    for count in (1, 13):  # the host has a loop for few rows, and one for many
        y = np.stack(ops.tile_mvm(np.tile(codes, (count, 1)), g, tile_rows=1, **s))
        np.testing.assert_array_equal(y, np.concatenate([expected.astype(np.float32)] * count, axis=-2))


@pytest.mark.parametrize("planes", [1, 2])
def test_a_gate_without_any_weight_is_0(planes):
    """As written by every kernel: the fused one, shift_add behind it, adc_accumulate and the host's; never NaN."""
    codes, g = case(9, 40, 12, planes)
    s = {
        "adc_bits": 8,
        "adc_lsb": 2e-7,
        "v_lsb": 1e-3,
        "slice_scale": np.zeros(planes, np.float32),
        "want_gate": True,
    }
    reads = [reference.tile_mvm(codes, g, tile=20, **s), ops.tile_mvm(codes, g, tile_rows=20, **s)]
    for strategy, multiprocessors in (
        ("fused", 1),
        ("fused", 9),
        ("wgmma", 1),
        ("cluster", 1),
        ("epilogue", 1),
    ):
        device = ShimDevice(multiprocessors=multiprocessors)
        reads.append(fused(codes, g, device, tile_rows=20, strategy=strategy, **s))
        assert ("shift_add" in device.launches) == (
            strategy != "epilogue" and (planes, multiprocessors) != (1, 1)
        )
    for y, gate in reads:
        assert not y.any()
        assert not gate.any()  # NaN would count


@pytest.mark.parametrize("strategy", ["fused", "implicit", "wgmma", "implicit-wgmma", "epilogue"])
def test_a_gate_of_images_is_a_share_of_the_weight(strategy):
    conv = ConvGeometry(8, 5, 4, (2, 2), line_order="position_channel")
    codes, g = case(2 * 20, conv.inputs, 12)
    s = {"conv": conv, "adc_bits": 6, "adc_lsb": 2e-8, "v_lsb": 1e-3, "slice_scale": np.full(1, -3.0, np.float32), "want_gate": True}  # fmt: skip
    images = np.ascontiguousarray(codes[:, :8].reshape(2, 20, 8).transpose(0, 2, 1)).reshape(2, 8, 5, 4)
    _, expected = reference.tile_mvm(images, g, tile=16, **s)
    _, gate = fused(
        images, g, ShimDevice(arch="sm_90", multiprocessors=1), tile_rows=16, strategy=strategy, **s
    )
    np.testing.assert_allclose(gate, expected, rtol=0, atol=1e-6)
    assert 0.0 < expected.mean() < 1.0


@pytest.mark.parametrize("phases", [1, 2])
@pytest.mark.parametrize("images", [False, True], ids=["vectors", "images"])
def test_bits_above_the_streams_drive_nothing(images, phases):
    """Codes of more bits than the streams have, as of any read."""
    rng = np.random.default_rng(4)
    conv = ConvGeometry(5, 4, 6, (2, 3)) if images else None
    codes = rng.integers(-(2**15), 2**15, (3, 5, 4, 6) if images else (20, 30)).astype(np.int16)
    g = (rng.integers(-15, 16, (1, 30, 9)) * 2.0**-20).astype(np.float32)
    s = {
        "conv": conv,
        "v_lsb": 2.0**-10,
        "stream_bits": 3,
        "streams": 2,
        "phases": phases,
        "adc_bits": 8,
        "adc_lsb": 2.0**-25,
    }
    expected = reference.tile_mvm(codes, g, tile=16, **s)
    for strategy in ("implicit", "fused") if images else ("fused", "wgmma"):
        y = fused(codes, g, tile_rows=16, strategy=strategy, **s)
        np.testing.assert_array_equal(y, expected.astype(np.float32))
    assert np.unique(y).size > 30


@pytest.mark.parametrize("eager", [False, True], ids=["late", "early"])
def test_same_bits_for_any_schedule(eager):
    """Thread orders, block sizes, stages of the pipeline, splits of the tiles and chunks of the rows."""
    codes, g = case(140, 330, 250)
    s = {"tile_rows": 40, "adc_bits": 7, "adc_lsb": 2e-7, "v_lsb": 1e-3, "read_noise": 2e-7, "generator": "fast",
         "seed": SEED, "precision": "fp16"}  # fmt: skip
    results, shapes = [], []
    for order, arch, multiprocessors, workspace in [
        (FORWARD, "sm_90", 1, 1 << 26), (REVERSE, "sm_80", 9, 1 << 26), (11, "sm_86", 40, 1 << 26), (12, "sm_90", 12, 1),
    ]:  # fmt: skip
        device = ShimDevice(
            order, eager=eager, arch=arch, multiprocessors=multiprocessors, workspace=workspace
        )
        results.append(fused(codes, g, device, **s))
        launched = [(m, grid) for m, grid in zip(device.macros, device.grids, strict=True) if "STAGES" in m]
        shapes += [(m["BLOCK_N"], m["STAGES"], grid[1]) for m, grid in launched]
    assert len(set(shapes)) == 4, shapes
    assert {128, 256} == {shape[0] for shape in shapes}
    assert {1, 9} <= {shape[2] for shape in shapes}
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)
    oracle = {key: value for key, value in s.items() if key not in ("precision", "tile_rows")}
    assert_matches(results[0], reference.tile_mvm(codes, half(g), tile=40, **oracle), 2e-7)


def half(g):
    """What fp16 keeps of conductances."""
    scale = np.float32(2.0**30)
    return (g * scale).astype(np.float16).astype(np.float32) / scale


@pytest.mark.parametrize("tile", [64, 100, 256, 512])
def test_tile_lengths(tile):
    codes, g = case(30, 1100, 40)
    s = {"adc_bits": 8, "adc_lsb": 1e-6, "v_lsb": 1e-3}
    y = fused(codes, g, tile_rows=tile, **s)
    assert_matches(y, reference.tile_mvm(codes, g, tile=tile, **s), 1e-6)


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolution_matches_oracle(groups, transposed):
    codes, g, s = convolution((2, 3), (2, 1), (0, 2), (1, 2), groups, transposed, 4, 8)
    expected = reference.tile_mvm(codes, g, tile=4, **s)
    device = ShimDevice(order=12, workspace=1 << 14)  # several chunks
    y = fused(codes, g, device, tile_rows=4, tile_cols=4, **s)
    assert device.launches.count("fused_tile_mvm") > 1
    assert_convolution_matches(y, expected)


@pytest.mark.parametrize("strategy", ["fused", "wgmma", "epilogue"])
def test_an_image_too_large_for_a_chunk_is_read_in_parts(strategy):
    """Its patches are folded together, whatever they were read in; noise is that of the whole."""
    conv = ConvGeometry(3, 12, 13, (2, 2), (1, 1), (1, 1))
    codes, g = case(2 * conv.pixels, conv.inputs, 8)
    images = np.ascontiguousarray(codes[:, :8].reshape(2, 8, *conv.out))
    s = {"conv": conv, "transposed": True, "adc_bits": 8, "adc_lsb": 1e-6, "v_lsb": 1e-3, "read_noise": 1e-6, "g_range": G_MAX,
         "strategy": strategy, "precision": "fp16"}  # fmt: skip
    whole = ops.tile_mvm(images, g, device=ShimDevice(arch="sm_90"), **s)
    part = ShimDevice(arch="sm_90", workspace=1 << 13)
    np.testing.assert_array_equal(ops.tile_mvm(images, g, device=part, **s), whole)
    assert conv.pixels > 128
    assert part.launches.count("fold") == 2 < part.launches.count("pack_inputs")


# What a test of layouts, pipelines and barriers must see: (text of fused_tile_mvm.cu, what to put in its place).
MUTANTS = {
    "none": ("copy_commit", "copy_commit"),
    "wait-too-weak": ("copy_wait<STAGES - 2>()", "copy_wait<STAGES - 1>()"),
    "no-wait": ("copy_wait<STAGES - 2>();", ""),
    "no-barrier-before-the-stage": ("__syncthreads();  // this stage", "// this stage"),
    "stage-freed-early": ("at + STAGES - 1 < block.steps) fill(stage == 0 ? STAGES - 1 : stage - 1", "at + STAGES - 1 < block.steps) fill(stage"),
    "group-not-closed": ("STAGES - 1);\n    copy_commit();", "STAGES - 1);"),
    "no-barrier-before-the-results": ("through shared memory, so that a warp writes neighbours\n  __syncthreads();", "\n"),
    "no-barrier-after-the-results": ("  __syncthreads();\n  const u32 biases", "  const u32 biases"),
    "no-barrier-after-the-constants": ("  }\n  __syncthreads();\n  block.set_factors", "  }\n  block.set_factors"),
    "swizzle-of-a-not-of-the-row": ("(chunk ^ (row & 7))", "(chunk ^ (row >> 1 & 7))"),
    "swizzle-of-b-as-of-a": ("((row >> 3 & 3) << 1 | (row & 1))", "(row & 7)"),
    "rows-of-b-in-plain-order": ("8 * (w.lane >> 1 & 3) + (w.lane & 1)", "(w.lane & 7)"),
    "sums-not-cleared": ("sum = ZERO;", ""),
    "one-tile-early": ("(tile + 1 - block.first_tile) * (k / STEP)", "(tile - block.first_tile) * (k / STEP) + 1"),
    "row-of-noise": ("first_row()) + 16 * i + 8 * h;", "first_row()) + 16 * i;"),
    "low-half-dropped": ("place + B_BYTES, low + from", "place + B_BYTES, b + from"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_seeded_bugs_are_found(name, seeded):
    """Red in at least one of early and late copies; the unchanged kernel is green in both."""
    seeded("fused_tile_mvm.cu", *MUTANTS[name])
    codes, g = case(131, 300, 140)
    s = {"adc_bits": 8, "adc_lsb": 2e-7, "v_lsb": 1e-3, "read_noise": 2e-7, "seed": SEED}
    expected = reference.tile_mvm(codes, g, tile=100, **s)
    found = []
    for eager, order in ((False, FORWARD), (True, REVERSE)):
        try:
            y = fused(codes, g, ShimDevice(order, eager=eager), tile_rows=100, **s)
            assert_matches(y, expected, 2e-7)
        except (AssertionError, RuntimeError) as error:
            found.append(str(error))
    assert bool(found) == (name != "none"), f"{name}: {found}"


BIG = Case(4096, 1, 4096, 4096, 1, 128, noise="fast")
CHOICES = {
    "fused-saves-the-partial-sums": (BIG, "sm_100", "fused", "fused: .* us, estimated, not timed\ncuBLAS"),
    "no-adc": (replace(BIG, adc_bits=0, noise="none"), "sm_90", "collapsed", "no ADC quantises"),
    "non-linear": (replace(BIG, converters=3), "sm_80", "epilogue", "converters are non-linear"),
    "no-adc-noise-a-tile": (replace(BIG, adc_bits=0), "sm_90", "epilogue", r"nothing is converted \(adc_bits=None\)"),
    "turing": (BIG, "sm_75", "epilogue", "sm_75 has no mma.sync of 16-bit operands"),
    "floats": (replace(BIG, codes=False, precision="fp32"), "sm_90", "epilogue", "driven by floats"),
    "fp32": (replace(BIG, precision="fp32"), "sm_90", "epilogue", "precision='fp32'"),
    "sums": (replace(BIG, gate=True, adc_bits=12), "sm_90", "epilogue", "sums of 32 codes of 12 bits take more than 16 bits"),
    "groups": (replace(BIG, groups=3, sense=7), "sm_90", "epilogue", "the 7 sensed lines of a group are no multiple of 8"),
    "streams": (replace(BIG, streams=4, stream_bits=3), "sm_90", "epilogue", r"streams \* stream_bits = 12 bits"),
    "indices": (replace(BIG, planes=512), "sm_90", "epilogue", "operands are too large"),
    "memory": (replace(BIG, precision="fp16x2", variance=True), "sm_86", "epilogue", "do not fit the shared memory of sm_86"),
    "blocks": (replace(BIG, groups=2**12, planes=16, drive=8, tile=8, sense=8), "sm_90", "epilogue", "operands are too large"),
    "little": (replace(BIG, rows=1, drive=128, sense=16), "sm_100", "fused", "tiles split 1 ways"),
    "newer": (BIG, "sm_103", "fused", "rates of sm_100: estimate"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_the_planner_says_why(name):
    case, arch, strategy, reason = CHOICES[name]
    plan = plan_tile_mvm(case, arch, 132)
    assert plan.strategy == strategy, plan.explain()
    assert plan.explain().startswith(f"strategy: {strategy}\n")
    assert re.search(reason.replace("\n", r"\n\s*"), plan.explain()), plan.explain()
    forced = "collapsed" if strategy == "collapsed" else "epilogue"
    assert plan_tile_mvm(case, arch, 132, forced).strategy == forced
    if strategy == "epilogue":
        with pytest.raises(
            ValueError, match=r"`strategy` must be possible, got 'fused' where .*; choose 'auto'"
        ):
            plan_tile_mvm(case, arch, 132, "fused")


def test_the_choice_follows_the_table():
    """A read whose partial sums are few is as well off with cuBLAS; every number is marked as estimate or measured."""
    assert plan_tile_mvm(replace(BIG, tile=4096, rows=65536), "sm_90", 132).strategy == "epilogue"
    assert {rates(arch).source for arch in ("sm_75", "sm_86", "sm_90a", "sm_120")} <= {"estimate", "measured"}
    assert rates("sm_75").architecture == "sm_80"  # older than all in the table
    few = plan_tile_mvm(replace(BIG, rows=128, sense=256), "sm_90", 132, "fused")
    assert few.splits == 32


def test_tiles_are_split_where_waves_of_blocks_would_be_half_empty():
    """133 blocks of 128 columns are two waves on 132 multiprocessors; three splits of half as many wide blocks are as many waves of
    a third of the tiles. Where a split gains no wave, it only writes more words."""
    case = replace(BIG, rows=7 * 128, sense=19 * 128)
    splits = {count: plan_tile_mvm(case, "sm_90", count).splits for count in (132, 133)}
    assert splits[132] > 1
    assert splits[133] == 1
    layer3 = Case(
        6272, 1, 2304, 256, 1, 128, noise="fast", images=(32, 16, 16, 9), line_order="position_channel"
    )
    assert (
        plan_tile_mvm(layer3, "sm_90", 132).splits == 1
    )  # 98 blocks: four splits would save 4 us, and write 51 MB of words


def test_a_wave_takes_as_long_as_its_block_of_most_tiles():
    """Of nine tiles, four splits have as many in one as three, and would write more words."""
    case = replace(BIG, rows=128, drive=9 * 128, sense=33 * 128)
    assert plan_tile_mvm(case, "sm_90", 132, "fused").splits == 3


def test_packing_takes_as_long_as_its_instructions(monkeypatch):
    """Unfolding issues 53 for 4 bytes: a clock at half the rate takes longer; where it is fast, memory binds."""

    def us(clock):
        slower = replace(rates("sm_90"), clock_ghz=clock)
        monkeypatch.setattr(tile_mvm_plan, "rates", lambda _: slower)
        layer = Case(131072, 1, 576, 64, 1, 128, noise="fast", images=(128, 32, 32, 9))
        why = plan_tile_mvm.__wrapped__(layer, "sm_90", 132).explain()
        return {name: int(time) for name, time in re.findall(r"(\S+): (\d+) us", why)}

    values, fast, usual, half = 131072 * 640, us(99.0), us(1.98), us(0.99)
    once = values * 53 / (132 * 128e3 * 1.98)  # microseconds; 576 lines are five tiles of 128
    assert half["wgmma"] - usual["wgmma"] == pytest.approx(once, abs=1.5)
    assert usual["wgmma"] - fast["wgmma"] == pytest.approx(once - 4e-3 * values / 4300, abs=1.5)
    assert half["implicit"] - usual["implicit"] < once / 3  # images are a ninth of their patches


def test_lines_that_fill_a_tile_up_are_packed_too(microseconds):
    """Of 72 lines a tile, 128."""
    padded, whole = (
        microseconds(replace(BIG, rows=2**18, drive=32 * tile, tile=tile), clock_ghz=1.0)
        for tile in (72, 128)
    )
    assert padded["fused"] == whole["fused"]


@pytest.mark.parametrize(
    ("strategy", "text"),
    [
        ("warp", "`strategy` must be one of auto, collapsed, fused, implicit, wgmma, implicit-wgmma, cluster, epilogue, got 'warp'; choose one"),
        ("collapsed", "`strategy` must be possible, got 'collapsed' where an ADC converts every tile; choose 'auto'"),
    ],
)  # fmt: skip
def test_strategy_messages(strategy, text):
    codes, g = case(2, 3, 4)
    with pytest.raises(ValueError, match=re.escape(text)):
        fused(codes, g, adc_bits=8, adc_lsb=1e-7, strategy=strategy)


def test_collapsed_is_one_product():
    codes, g = case(20, 64, 16, planes=2)
    device = ShimDevice()
    y = ops.tile_mvm(codes, g, tile_rows=8, v_lsb=1e-3, device=device)
    assert_matches(y, reference.tile_mvm(codes, g, tile=8, v_lsb=1e-3), 0.0)
    assert "fused_tile_mvm" not in device.launches
    many = ShimDevice()
    other = ops.tile_mvm(codes, g, tile_rows=8, v_lsb=1e-3, device=many, strategy="epilogue")
    np.testing.assert_allclose(y, other, rtol=1e-5, atol=1e-12)


@pytest.fixture
def microseconds(monkeypatch):
    """What the planner expects of every strategy where all is free but what is given."""

    def us(case, **cost):
        free = {name: 1e18 for name, rate in vars(rates("sm_90")).items() if isinstance(rate, float)}
        table = replace(rates("sm_90"), **{**free, "launch_us": 0.0, **cost})
        monkeypatch.setattr(tile_mvm_plan, "rates", lambda _: table)
        why = plan_tile_mvm.__wrapped__(case, "sm_90", 132).explain()
        return {name: int(time) for name, time in re.findall(r"(\S+): (\d+) us", why)}

    return us


def test_every_wave_of_blocks_has_a_start(microseconds):
    """Two microseconds, with however many tiles: 500 waves of 132 blocks of 128 x 256."""
    wide = replace(BIG, rows=500 * 128, sense=132 * 256)
    for drive in (4096, 128):
        for groups in (1, 4):
            us = microseconds(replace(wide, drive=drive, groups=groups, sense=132 * 256 // groups))
            assert us["fused"] == us["wgmma"] == 1000


def test_a_pass_of_the_dac_takes_as_long_as_its_instructions(microseconds):
    """27 for each pixel, before patches are unfolded."""
    layer = Case(2**23, 1, 576, 64, 1, 128, noise="fast", images=(2**13, 32, 32, 9))
    pixels = 2**13 * 32 * 32 * 64
    without, of_its_own = (microseconds(replace(layer, dac=dac), clock_ghz=1.0) for dac in (False, True))
    for strategy in ("fused", "wgmma"):
        assert of_its_own[strategy] - without[strategy] == pytest.approx(pixels * 27 / (132 * 128e3), abs=1.5)
    assert of_its_own["implicit"] == without["implicit"]


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_digits_are_packed_for_every_pass(microseconds, precision):
    """But where the kernel takes whole codes apart: `mma.sync` of fp16."""
    once = replace(BIG, rows=2**17, precision=precision, stream_bits=2)
    for streams, phases in ((1, 1), (4, 1), (2, 2)):
        us = microseconds(replace(once, streams=streams, phases=phases), clock_ghz=1.0)
        passes = streams * phases
        packed = 2**17 * 4096 * 40 / (132 * 128e3)  # microseconds
        starts = 2 * -(-(2**10 * 16 * passes) // 132)  # of blocks of 256 columns
        assert us["fused"] == pytest.approx(packed * (1 if precision == "fp16" else passes) + starts, abs=1.5)
        if precision == "fp16":
            assert us["wgmma"] == pytest.approx(packed * passes + starts, abs=1.5)


@pytest.mark.parametrize("strategy", ["fused", "wgmma"])
def test_the_words_of_all_splits_fit_the_workspace(strategy):
    """Beside the packed codes; nine tiles are split nine ways."""
    codes, g = case(300, 9 * 64, 16)
    row = 2 * 9 * 64 + 4 * 9 * 16  # bytes
    for workspace, launches in ((128 * row, 3), (300 * row, 1), (300 * row - 1, 2)):
        device = ShimDevice(arch="sm_90", multiprocessors=100, workspace=workspace)
        s = {"tile_rows": 64, "adc_bits": 7, "adc_lsb": 2e-7, "v_lsb": 1e-3, "precision": "fp16"}
        fused(codes, g, device, strategy=strategy, **s)
        kernel = "fused_tile_mvm" if strategy == "fused" else "fused_tile_mvm_sm90"
        grids = [grid for name, grid in zip(device.launches, device.grids, strict=True) if name == kernel]
        assert [grid[1] for grid in grids] == [9] * launches
