"""What kernels ask of a GPU's memory and of its schedulers, counted in their PTX warp by warp (tests/cuda_shim/counts.hpp)."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from cuda_shim import FORWARD
from cuda_shim.ptx import Program, PtxDevice
from test_ptx import snippet

from gpuxbar import ops
from gpuxbar.bench.updates import COUNTED_SOFT, LAW, WINDOW
from gpuxbar.ops import ConvGeometry
from gpuxbar.spec import Programming, PulseTrain

# ---- by hand


def counted(body, threads=32, shared=0):
    """The instructions of a snippet that touch memory; %rd1 and %rd2 are arrays of 2048 words."""
    arrays = [np.zeros(2048, np.uint32) for _ in range(2)]
    program = Program(snippet(body), "snippet")
    program.counting(True)
    program.launch(
        (1,), (threads,), shared, 0, [a.ctypes.data.to_bytes(8, "little") for a in arrays],
        [(a.ctypes.data, a.nbytes, 4, True) for a in arrays], FORWARD, False,
    )  # fmt: skip
    found = program.counted()
    program.counting(False)
    return [c for c in found if c.fewest_sectors or c.fewest_waves]


@pytest.mark.parametrize(
    ("step", "width", "sectors", "fewest"),
    [(0, 1, 1, 1), (1, 1, 4, 4), (2, 1, 8, 4), (8, 1, 32, 4), (4, 4, 16, 16), (8, 4, 32, 16), (3, 1, 12, 4)],
)
def test_sectors(step, width, sectors, fewest):
    """Of 32 lanes, words `step` apart."""
    registers = "%r1" if width == 1 else "{%r1, %r2, %r3, %r4}"
    kind = "u32" if width == 1 else f"v{width}.u32"
    (load,) = counted(
        f"mul.wide.u32 %rd3, %r5, {4 * step}; add.s64 %rd3, %rd3, %rd2; ld.global.{kind} {registers}, [%rd3];"
    )
    assert (load.warps, load.lanes, load.array) == (1, 32, 1)
    assert (load.sectors, load.fewest_sectors) == (sectors, fewest)


@pytest.mark.parametrize(
    ("step", "width", "waves", "fewest"),
    [(0, 1, 1, 1), (1, 1, 1, 1), (2, 1, 2, 1), (32, 1, 32, 1), (33, 1, 1, 1), (2, 2, 2, 2), (34, 2, 2, 2), (32, 2, 32, 2),
     (4, 4, 4, 4), (36, 4, 4, 4), (32, 4, 32, 4)],
)  # fmt: skip
def test_wavefronts(step, width, waves, fewest):
    registers = {1: "%r1", 2: "{%r1, %r2}", 4: "{%r1, %r2, %r3, %r4}"}[width]
    kind = "u32" if width == 1 else f"v{width}.u32"
    (load,) = counted(
        f"mov.u64 %rd5, gx_smem; mul.wide.u32 %rd3, %r5, {4 * step}; add.s64 %rd3, %rd3, %rd5; ld.shared.{kind} {registers}, [%rd3];",
        shared=8192,
    )
    assert (load.waves, load.fewest_waves) == (waves, fewest)


def test_lanes_that_part_meet_again():
    """One takes another branch and a loop of three rounds; what lies behind is one execution of all."""
    first, other, behind = counted(
        """@%p4 bra $L_2; st.global.u32 [%rd1], 1; bra $L_3;
	$L_2: mov.u32 %r6, 0;
	$L_1: st.global.u32 [%rd1+4], 1; add.u32 %r6, %r6, 1; setp.lt.u32 %p5, %r6, 3; @%p5 bra $L_1;
	$L_3: st.global.u32 [%rd1+8], 1;"""
    )
    assert [(c.warps, c.lanes) for c in (first, other, behind)] == [(1, 31), (3, 3), (1, 32)]


# ---- of the kernels

MOST_SECTORS, MOST_WAVES = 1.3, 1.1  # over the fewest
EXCEPT = {  # and why
    ("adc_accumulate", "psum"): "eight columns a thread are two accesses, one behind the other, that share sectors",
    ("adc_accumulate", "y"): "the same",
    ("adc_accumulate", "on chip"): "results that are turned to images, once for all tiles",
    ("conductance_leaf", "g"): "neighbouring cells of a thread are two accesses, one behind the other, that share sectors",
    ("conductance_leaf", "on chip"): "squares of ports go to rows a multiple of 32 words apart; see MOST_LEAF_WAVES for all",
    ("fold", "patches"): "channels lie as far apart as the kernel has positions; the other positions are read next, from L1",
    ("fused_tile_mvm", "a"): "chunks of eight channels of neighbouring pixels, half a sector each",
    ("fused_tile_mvm", "on chip"): "sums that are turned to images, once",
    ("pack_inputs", "on chip"): "where lines lie, 16 bytes each written by two accesses, once a block",
    ("mean_field_coarsen", "parts"): "sums of neighbouring bitlines, an eighth of the cells; the others are read next, from L1",
    ("program", "on chip"): "scales in float64, once",
    ("pulse_update", "w_max"): "once, after hundreds of operations a cell",
    ("pulse_trains", "x"): "eight lines a thread; the generator takes ten times as long",
    ("pulse_trains", "d"): "the same",
    ("pulse_trains", "input_words"): "the same",
    ("pulse_trains", "error_words"): "the same",
}  # fmt: skip
MOST_INSTRUCTIONS = {  # of a value, in PTX: kernel, macro, how many values the launch below has
    ("dac_quantize", "", 64 * 256): 30,
    ("pack_conductance", "", 256 * 128): 55,
    ("pack_inputs", "CONV=0", 128 * 256): 41,
    ("pack_inputs", "CONV=1", 256 * 384): 54,
    ("pack_inputs", "CONV=2", 256 * 64): 60,
    ("pack_images", "", 32 * 256): 50,
    ("pack_sensed", "TRANSPOSED=1", 64 * 288): 62,
    ("fold", "", 32 * 256): 360,
    ("device_update", "MAPPED=0", 2 * 128 * 128): 340,
    ("device_update", "MAPPED=1", 2 * 128 * 128): 260,
    ("adc_accumulate", "NOISE=0", 16 * 32 * 128): 14.5,  # a difference and its clamp are one of machine code
    ("fused_tile_mvm_sm90", "IMPLICIT=1", 256 * 128 * 3): 44,
    ("ladder", "", 128 * 128): 64,
    ("mean_field_coarsen", "", 128 * 128): 44,
    ("mean_field", "", 128 * 128): 36,
    ("conductance_leaf", "", 32 * 32): 3300,
    ("conductance_merge", "", 2 * 96 * 96): 17,
}
MOST_LEAF_WAVES = 9800  # for 16 x 16 cells
# of global memory, a cell of a tile of 128 x 128
MOST_BYTES = {"ladder": 18, "mean_field_coarsen": 18, "mean_field": 11}
CONV = ConvGeometry(32, 16, 16, (3, 3), (1, 1), (1, 1))
READ = {"adc_bits": 8, "adc_lsb": 2.0**-27, "g_range": 2.0**-20, "read_noise": 2.0**-28, "generator": "fast",
        "precision": "fp16", "seed": 1, "step": 3}  # fmt: skip


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def codes(*shape):
    return np.random.default_rng(0).integers(-127, 128, shape).astype(np.int16)


def reads(device):
    ops.dac_quantize(normal(64, 256), lsb=0.02, code_max=127, device=device)
    read = partial(ops.tile_mvm, device=device, **READ)
    read(codes(128, 256), 2e-7 * normal(1, 256, 128), tile_rows=128, strategy="epilogue")
    read(codes(32, 1024), 2e-7 * normal(1, 1024, 128), tile_rows=64, strategy="epilogue", read_noise=0.0)
    g = 2e-7 * normal(1, 288, 64)
    read(codes(1, 32, 16, 16), g, tile_rows=128, conv=CONV, strategy="implicit")
    by_position = replace(CONV, line_order="position_channel")
    read(codes(1, 32, 16, 16), g, tile_rows=128, conv=by_position, strategy="implicit-wgmma")
    read(codes(1, 32, 16, 16), g, tile_rows=128, conv=CONV, strategy="epilogue")
    read(codes(1, 64, 16, 16), g, tile_cols=128, conv=CONV, strategy="fused", transposed=True)


def updates(device):
    cells = 1e-6 + np.abs(normal(2, 128, 128)) * 1e-6
    how = {"w_max": np.ones(128, np.float32), "device": device}
    for devices in (None, ops.draw_device_map(LAW, (2, 128, 128), seed=1)):
        pairs = ops.Pairs(cells, law=LAW, device_map=devices, **WINDOW)
        ops.device_update(pairs, 1e-3 * normal(1, 128, 128), **how)
    pairs = ops.Pairs(cells, law=COUNTED_SOFT, **WINDOW)
    train = PulseTrain(mode="aggregated")
    ops.pulse_update(pairs, normal(16, 128), normal(16, 128), rate=0.1, train=train, **how)
    ops.reprogram(
        normal(1, 128, 128), cells[:1], np.empty(128, np.float32), np.zeros(2, np.int64), None, merge="all", scale="column",
        write_step=np.ones(1, np.int64), g_min=1e-6, g_max=1e-5, programming=Programming(write_noise=1e-7), device=device,
    )  # fmt: skip


def wires(device):
    for method, cells in ("exact", 32), ("mean_field", 128):  # which begins with the ladder
        ops.effective_conductance(
            np.full((1, cells, cells), 1e-4, np.float32), method=method, r_wordline=2.0, r_bitline=3.0, r_source=1.0, r_sink=0.5,
            device=device,
        )  # fmt: skip


@pytest.fixture(scope="module")
def launches():
    device = PtxDevice(counts=True)
    for run in (reads, updates, wires):
        run(device)
    return device.counted


def test_no_access_takes_many_more_sectors_or_wavefronts_than_it_must(launches):
    """Of a kernel's array or shared memory, over all launches; what is excepted does."""
    worst = {}
    for kernel, _, instructions, names in launches:
        for c in instructions:
            if c.fewest_sectors > 16:  # not once a block
                place = kernel, names[c.array]
                worst[place] = max(worst.get(place, 0), c.sectors / c.fewest_sectors / MOST_SECTORS)
            if c.fewest_waves > 16:
                place = kernel, "on chip"
                worst[place] = max(worst.get(place, 0), c.waves / c.fewest_waves / MOST_WAVES)
    assert len(worst) > 40
    assert {place: by for place, by in worst.items() if by > 1 and place not in EXCEPT} == {}
    assert {place for place in EXCEPT if not worst.get(place, 0) > 1} == set()


@pytest.mark.parametrize("launch", MOST_INSTRUCTIONS, ids=lambda launch: "-".join(map(str, launch[:2])))
def test_a_value_takes_few_instructions(launches, launch):
    """Counted are a warp's, times its 32 lanes: what an idle lane waits for is there too. Divisions of integers are twenty."""
    name, macro, values = launch
    executed = [
        32 * sum(c.warps * (20 if re.search(r"\b(div|rem)\.[su]", c.text) else 1) for c in instructions)
        for kernel, macros, instructions, _ in launches
        if kernel == name and (not macro or macro in [f"{key}={value}" for key, value in macros.items()])
    ]
    assert 0 < executed[0] / values <= MOST_INSTRUCTIONS[launch]


def test_a_result_of_wgmma_takes_few_instructions():
    """Of a read, what twice as many tiles do not double; moves are a compiler's."""

    def executed(tiles):
        device = PtxDevice(counts=True, multiprocessors=1)
        g = 2e-7 * normal(1, 128 * tiles, 256)
        ops.tile_mvm(
            codes(128, 128 * tiles),
            g,
            tile_rows=128,
            strategy="wgmma",
            device=device,
            **READ | {"read_noise": 0.0},
        )
        ((*_, instructions, _),) = (launch for launch in device.counted if launch[0] == "fused_tile_mvm_sm90")
        return 32 * sum(c.warps for c in instructions if not c.text.lstrip().startswith("mov"))

    assert (2 * executed(1) - executed(2)) / (128 * 256) <= 12


@pytest.mark.parametrize("kernel", MOST_BYTES)
def test_a_cell_moves_few_bytes(launches, kernel):
    (instructions,) = (instructions for name, _, instructions, _ in launches if name == kernel)
    assert 0 < sum(32 * c.sectors for c in instructions) / 128**2 <= MOST_BYTES[kernel]


def test_a_leaf_takes_few_wavefronts(launches):
    leaf, _ = (instructions for kernel, _, instructions, _ in launches if kernel == "conductance_leaf")
    assert 0 < sum(c.waves for c in leaf) / 4 <= MOST_LEAF_WAVES
