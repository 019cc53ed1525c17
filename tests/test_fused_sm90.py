"""The Hopper read without a GPU: its packing, the oracle, the other ways of a read, and seeded bugs."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from cuda_shim import FORWARD, REVERSE, ShimDevice
from test_tile_mvm import G_MAX, SEED, assert_matches, case, settings

from gpuxbar import ops, reference
from gpuxbar.ops import ConvGeometry
from gpuxbar.ops.fused_layout import SHARED, WGMMA_STATIC_SHARED, wgmma_bytes
from gpuxbar.ops.packed_conductance import PACK_SENSED
from gpuxbar.ops.tile_mvm_case import Case, Plan
from gpuxbar.ops.tile_mvm_plan import plan_tile_mvm

ORDERS = [FORWARD, REVERSE, 11, 12]


@pytest.fixture
def plan(monkeypatch):
    """Fixes the shape of the kernel, which the planner would choose by its rates."""

    module = importlib.import_module("gpuxbar.ops.tile_mvm")  # the name in `ops` is the function

    def fix(block_n, stages, splits=1, cluster=1):
        plan = Plan("wgmma", (), block_n, stages, splits, cluster=cluster)
        monkeypatch.setattr(module, "plan_tile_mvm", lambda *_: plan)

    return fix


def read(codes, g, device=None, **s):
    return ops.tile_mvm(
        codes, g, device=device or ShimDevice(), **{"g_range": G_MAX, "precision": "fp16", **s}
    )


def test_panels_are_the_swizzle_of_128_bytes():
    """Against the definition of the swizzle: bits 7..9 of an address flip its bits 4..6."""
    sense, drive, tile, k = 150, 100, 60, 64
    g = np.arange(drive * sense, dtype=np.float32).reshape(1, drive, sense) % 2039
    packed = np.zeros((1, 1, 256, 2, k), np.float16)
    ShimDevice().launch(
        PACK_SENSED, (5,), (256,),
        {"g": g, "b": packed, "low": None, "version": None, "state": None, "layout": 0, "commit": 0, "scale": 1.0, "offset": 0.0,
         "planes": 1, "groups": 1, "inputs": drive, "cols": sense, "tiles": 2, "tile": tile, "k": k, "stored": 256,
         "positions": 1, "chunks": 1},
        {"PANELS": 1},
    )  # fmt: skip
    panels = packed.reshape(2, 2, 128 * 64)  # [block of columns, step, bytes / 2]
    for block in range(2):
        for row in range(128):
            q, j, e = (
                row % 8 // 2,
                row % 32 // 8,
                row % 2,
            )  # columns 8 j + 2 q + e of a product are a thread's j
            n = 128 * block + row // 32 * 32 + 8 * q + 2 * j + e
            for step in range(2):
                address = 128 * row + 2 * np.arange(64)
                got = panels[block, step, (address ^ (address >> 7 & 7) << 4) // 2]
                expected = np.zeros(64, np.float32)
                lines = g[0, tile * step : tile * (step + 1), n] if n < sense else []
                expected[: len(lines)] = lines
                np.testing.assert_array_equal(got, expected)


# (rows, driven lines, columns, tile): every tile 64 to 512 lines, odd edges, more rows and columns than a block
CASES = [
    ("noise", (131, 150, 141, 64), 128, 4, "fp16x2", False),
    ("fast", (131, 150, 300, 70), 256, 2, "fp16x2", False),
    ("fast", (9, 600, 130, 256), 256, 4, "fp16", True),
    ("noise", (5, 1030, 7, 512), 256, 4, "fp16", False),
    ("two-phase", (33, 130, 40, 128), 128, 4, "fp16x2", True),
    ("variance", (131, 150, 141, 70), 128, 3, "fp16x2", False),
    ("variance", (9, 300, 130, 256), 128, 4, "fp16", True),
]


@pytest.mark.parametrize(("order", "eager"), [(FORWARD, True), (REVERSE, False), (11, False), (12, True)])
@pytest.mark.parametrize(("mode", "shape", "block_n", "stages", "precision", "transposed"), CASES)
def test_matches_oracle(plan, mode, shape, block_n, stages, precision, transposed, eager, order):
    batch, rows, cols, length = shape
    codes, g = case(batch, cols if transposed else rows, rows if transposed else cols)
    if transposed:
        codes = np.random.default_rng(2).integers(-127, 128, (batch, rows)).astype(np.int16)
    if precision == "fp16":  # conductances that fp16 holds
        g = (g * 2**26).astype(np.float16).astype(np.float32) / 2**26
    s, _ = settings(mode, (*shape[:3], length), g, 1, False)
    if mode == "variance":  # numbers that bf16 holds
        codes %= 16
        s["noise_var"] = (s["noise_var"].view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    plan(block_n, stages)
    device = ShimDevice(order, eager=eager)
    y = read(
        codes,
        g,
        device,
        tile_rows=length,
        tile_cols=length,
        transposed=transposed,
        precision=precision,
        **{k: v for k, v in s.items() if k != "transposed"},
    )
    assert "fused_tile_mvm_sm90" in device.launches
    expected = reference.tile_mvm(codes, g, tile=length, **{**s, "transposed": transposed})
    assert_matches(y, expected, s["adc_lsb"], 2 ** (s.get("stream_bits", 0) * (s.get("streams", 1) - 1)))


@pytest.mark.parametrize(
    ("groups", "planes", "cols", "generator", "variance"),
    [(1, 1, 136, "fast", False), (1, 1, 131, "exact", False), (2, 2, 136, "exact", False), (2, 2, 136, "fast", True)],
)  # fmt: skip
def test_every_way_of_a_read_gives_the_same_bits(plan, groups, planes, cols, generator, variance):
    """Integer conductances: partial sums are exact, so nothing is left to rounding."""
    rng = np.random.default_rng(5)
    codes = rng.integers(-127, 128, (70, groups * 200)).astype(np.int16)
    g = rng.integers(-8, 9, (planes, groups * 200, cols)).astype(np.float32)
    s = {
        "groups": groups, "tile_rows": 64, "v_lsb": 1.0, "adc_bits": 8, "adc_lsb": np.linspace(50, 60, groups * cols, dtype=np.float32),
        "read_noise": 30.0, "generator": generator, "seed": SEED, "step": 3, "want_gate": True, "g_range": 8.0,
        "slice_scale": np.array([1.0, -4.0], np.float32)[-planes:],
        "row_scale": np.linspace(1, 2, 70).astype(np.float32), "bias": np.arange(groups * cols, dtype=np.float32),
    }  # fmt: skip
    if variance:  # squares that bf16 holds
        codes %= 16
        s["noise_var"] = rng.integers(0, 4, g.shape).astype(np.float32)
    wanted = read(codes, g, **s, strategy="epilogue")
    for splits, cluster in ((1, 1), (3, 1), (1, 2), (3, 2)):
        plan(128, 3, splits, cluster)
        for got, one in zip(read(codes, g, **s), wanted, strict=True):
            np.testing.assert_array_equal(got, one)


def test_convolution_in_chunks(plan):
    conv = ConvGeometry(3, 11, 13, (3, 3), (1, 1), (1, 1), (1, 1))
    rng = np.random.default_rng(0)
    g = rng.integers(-8, 9, (1, conv.inputs, 20)).astype(np.float32)
    codes = rng.integers(-127, 128, (3, 3, 11, 13)).astype(np.int16)
    s = {
        "conv": conv,
        "tile_rows": 16,
        "adc_bits": 8,
        "adc_lsb": 20.0,
        "read_noise": 9.0,
        "seed": SEED,
        "g_range": 8.0,
    }
    wanted = read(codes, g, **s, strategy="epilogue")
    plan(256, 4)
    device = ShimDevice(order=12, workspace=1 << 14)
    np.testing.assert_array_equal(read(codes, g, device, **s), wanted)
    assert device.launches.count("fused_tile_mvm_sm90") > 1


MUTANTS = {
    "no wait for a stage": ("wait(full + 8 * stage, at / STAGES & 1);", ""),
    "no wait for the last products": ("products_wait<0>();", ""),
    "a stage freed early": ("((at - 1) % STAGES));\n#if", "(at % STAGES));\n#if"),
    "a dropped arrival": ("if (at != first) release", "if (at != first && Place().warpgroup() == 0) release"),
    "too few bytes": ("barrier_expect(landed, BULK_BYTES)", "barrier_expect(landed, PANEL_BYTES)"),
    "the phase of a stage": ("at / STAGES & 1)", "at / STAGES & 1 ^ 1)"),
    "no fence": ("products_fence();", ""),
    "barriers unknown to copies": ("barrier_fence();", ""),
    "registers that nobody has released": ("registers_release<PRODUCER_REGISTERS>();", ""),
    "more registers than there are": ("? 232 : 240", "? 232 : 248"),
}
VARIANCE_MUTANTS = {
    "squares made while they are multiplied": ("products_wait<HALVES>();", "products_wait<HALVES + 1>();"),
    "no fence before the squares": ("products_fence();\n#pragma unroll\n      for (int part", "\n#pragma unroll\n      for (int part"),
    "digits copied over before they are known to be read": ("async_fence();  // the digits", "// the digits"),
    "the panel of the variances": ("descriptor(from + (1 + TERMS) * PANEL_BYTES)", "descriptor(from + TERMS * PANEL_BYTES)"),
    "the rows of the squares": ("(place.thread >> 5) * 16", "(place.thread >> 5 & 3) * 16"),
    "the chunks of the squares": ("panel_chunk(row, 2 * part +", "panel_chunk(row + 1, 2 * part +"),
}  # fmt: skip
CLUSTER_MUTANTS = {
    "barriers met before they are made": ("everyone();\n  block.set_factors", "__syncthreads();\n  block.set_factors"),
    "an end before the other block's": ("if (CLUSTER > 1) everyone();", ""),
    "a copy to its own block alone": ("(1 << CLUSTER) - 1", "1 << cluster_rank()"),
    "the same share by both": ("cluster_rank() * bytes", "0 * bytes"),
    "a stage freed by its own block alone": ("barrier_arrive_at(empty, Place().lane())", "barrier_arrive_at(empty, cluster_rank())"),
    "no wait for a free stage": ("wait(empty + 8 * stage, at / STAGES & 1 ^ 1);", ""),
}  # fmt: skip
HEADER_MUTANTS = {
    "a swizzle": ("panels.cuh", "^ (row & 7)", "^ (row & 3)"),
}


def survives(variance, rows):
    """Whether no order or moment of landing shows a wrong result."""
    rng = np.random.default_rng(5)
    codes = rng.integers(-127, 128, (rows, 500)).astype(np.int16)
    g = rng.integers(-8, 9, (1, 500, 100)).astype(np.float32)
    s = {"adc_bits": 8, "adc_lsb": 64.0}
    if variance:  # numbers that bf16 holds
        codes %= 16
        s["noise_var"] = rng.integers(0, 4, g.shape).astype(np.float32)
    expected = reference.tile_mvm(codes, g, tile=250, **s)
    s |= {"g_range": 8.0, "tile_rows": 250}
    for eager in (False, True):
        for order in ORDERS:
            try:
                y = read(codes, g, ShimDevice(order, eager=eager), **s)
            except RuntimeError as error:
                if not str(error).startswith(
                    "fused_tile_mvm_sm90: "
                ):  # not by the CPU twins: it did not build
                    raise
                return False
            if not np.array_equal(y, expected):
                return False
    return True


@pytest.mark.parametrize("name", ["none", *MUTANTS, *HEADER_MUTANTS, "none, with variances", *VARIANCE_MUTANTS,
                                  "none, in clusters", *CLUSTER_MUTANTS])  # fmt: skip
def test_a_seeded_bug_shows(plan, seeded, name):
    clusters = "clusters" in name or name in CLUSTER_MUTANTS
    plan(128, 2, cluster=1 + clusters)
    texts = {**MUTANTS, **VARIANCE_MUTANTS, **CLUSTER_MUTANTS}
    if name in texts:
        seeded("fused_tile_mvm_sm90.cu", *texts[name])
    if name in HEADER_MUTANTS:
        file, old, new = HEADER_MUTANTS[name]
        seeded(f"include/gpuxbar/{file}", old, new)
    variance = "variances" in name or name in VARIANCE_MUTANTS
    assert survives(variance, 150 if clusters else 70) == name.startswith("none")


CASE = Case(4096, 1, 4096, 4096, 1, 128, noise="fast")


def test_hopper_takes_it_where_it_fits():
    chosen = plan_tile_mvm(CASE, "sm_90", 132)
    assert (chosen.strategy, chosen.block_n, chosen.stages) == ("wgmma", 256, 4)
    assert "rates of sm_90: estimate" in chosen.explain()
    for arch in ("sm_80", "sm_89", "sm_100", "sm_120"):
        assert plan_tile_mvm(CASE, arch, 132).strategy == "fused"
        with pytest.raises(ValueError, match=rf"got 'wgmma' where {arch} has no wgmma"):
            plan_tile_mvm(CASE, arch, 132, "wgmma")


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"converters": 2}, "gain or offset of their own"),
     ({"converters": 3}, "converters are non-linear"),
     ({"adc_bits": 0}, "nothing is converted")],
)  # fmt: skip
@pytest.mark.parametrize("strategy", ["wgmma", "cluster"])
def test_what_it_cannot_compute(strategy, change, reason):
    with pytest.raises(
        ValueError,
        match=rf"tile_mvm: `strategy` must be possible, got '{strategy}' where .*{reason}.*; choose 'auto'",
    ):
        plan_tile_mvm(Case(**{**vars(CASE), **change}), "sm_90", 132, strategy)


@pytest.mark.parametrize(
    ("rows", "eager", "order"), [(131, True, FORWARD), (261, False, REVERSE), (300, True, 11)]
)
def test_clusters_give_the_same_bits(plan, rows, eager, order):
    """Even and odd numbers of row blocks, and two blocks of columns; blocks that have no row at all."""
    rng = np.random.default_rng(5)
    codes = rng.integers(-127, 128, (rows, 300)).astype(np.int16)
    g = rng.integers(-8, 9, (1, 300, 270)).astype(np.float32)
    s = {
        "tile_rows": 100,
        "adc_bits": 8,
        "adc_lsb": 64.0,
        "read_noise": 30.0,
        "generator": "fast",
        "seed": SEED,
        "g_range": 8.0,
    }
    wanted = read(codes, g, **s, strategy="epilogue")
    plan(256, 2, cluster=2)
    device = ShimDevice(order, eager=eager)
    np.testing.assert_array_equal(read(codes, g, device, **s), wanted)
    assert [m["CLUSTER"] for m in device.macros if "CLUSTER" in m] == [2]


def test_clusters_are_taken_only_when_asked_for():
    assert "cluster" not in plan_tile_mvm(CASE, "sm_90", 132).explain()
    asked = plan_tile_mvm(CASE, "sm_90", 132, "cluster")
    assert (asked.strategy, asked.cluster, asked.block_n, asked.stages) == ("cluster", 2, 256, 4)
    assert "cluster: blocks of 128 x 256" in asked.explain()
    assert asked.blocks(129, 257) == asked.blocks(256, 512) == 4
    assert asked.blocks(257, 257) == 8  # whole clusters


@pytest.mark.parametrize("change", [{}, {"gate": True}, {"precision": "fp16x2"}, {"adc_bits": 16}, {"variance": True},
                                    {"variance": True, "precision": "fp16x2"}])  # fmt: skip
def test_the_pipeline_fits_the_shared_memory(change):
    c = Case(**{**vars(CASE), **change})
    chosen = plan_tile_mvm(c, "sm_90", 132, "wgmma")
    assert chosen.stages >= 2
    taken = wgmma_bytes(chosen.block_n, c.terms + c.variance, chosen.stages) + WGMMA_STATIC_SHARED
    assert taken <= SHARED["sm_90"]
    assert chosen.block_n == (128 if change.keys() & {"gate", "adc_bits", "variance"} else 256)
