"""The PTX of the kernels, run on the CPU: against their C++ build, against the oracle, and under seeded bugs.

All is compiled for sm_90, and what is for Hopper alone for sm_90a, but for what says otherwise.
"""

from __future__ import annotations

import re
import struct
import sys
from functools import partial

import cuda_shim.ptx
import every_kernel
import numpy as np
import pytest
import test_cuda_kernels
import test_device_update
import test_effective_conductance
import test_fused
import test_fused_implicit
import test_fused_int8
import test_fused_sm90
import test_pulse_update
import test_solve_for_inputs
import test_wires_gradient
from cuda_shim import FORWARD, REVERSE, ShimDevice
from cuda_shim.ptx import Program, PtxDevice

from gpuxbar import reference
from gpuxbar.launch.kernel import Array
from gpuxbar.launch.sources import kernel_dir

plan = test_fused_sm90.plan  # a fixture


class BothDevice(ShimDevice):
    """Launches the PTX and then, from the same arrays, the C++ build, which must leave them alike."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.ptx = PtxDevice(*args, **settings)

    def launch(self, kernel, grid, block, values, macros=None, shared=0):
        written = {
            name: values[name]
            for name, declared in kernel.arguments.items()
            if isinstance(declared, Array) and declared.written and values[name] is not None
        }
        before = {name: array.copy() for name, array in written.items()}
        self.ptx.launch(kernel, grid, block, values, macros, shared)
        after = {name: array.copy() for name, array in written.items()}
        for name, array in written.items():
            array[...] = before[name]
        super().launch(kernel, grid, block, values, macros, shared)
        approximate = self.ptx.programs[-1].approximate
        for name, array in written.items():
            assert_alike(after[name], array, approximate, (kernel.name, name, macros))


def assert_alike(got, wanted, approximate, what):
    """The same bits; where instructions are approximate, within some of their errors, but for codes on a rounding edge."""
    if not approximate:
        assert got.tobytes() == wanted.tobytes(), what
        return
    differs = (got != wanted) & ~((got != got) & (wanted != wanted))
    with np.errstate(invalid="ignore"):  # infinity less itself
        far = ~(np.abs(got.astype(np.float64) - wanted) <= 4e-6 * np.nanmax(np.abs(wanted), initial=0))
    assert (differs & far).mean() <= 2e-3, what


def streams(device):
    """Whether `fused_tile_mvm` reads digits of two phases, with state-dependent noise, as the oracle does."""
    rng = np.random.default_rng(5)
    codes = rng.integers(-15, 16, (70, 300)).astype(np.int16)
    g = rng.integers(-8, 9, (1, 300, 100)).astype(np.float32)
    s = {"adc_bits": 8, "adc_lsb": 16.0, "stream_bits": 2, "streams": 2, "phases": 2}
    s["noise_var"] = rng.integers(0, 4, g.shape).astype(np.float32)
    expected = reference.tile_mvm(codes, g, tile=150, **s)
    y = test_fused.fused(codes, g, device, tile_rows=150, g_range=8.0, **s)
    return np.array_equal(y, expected)


def levels(device):
    """The same of bytes."""
    codes, g = test_fused_int8.operands(20, 100, 30)
    y = test_fused_int8.int8(codes, g, device, tile_rows=70, **test_fused_int8.BASE)
    return np.array_equal(y, reference.tile_mvm(codes, g, tile=70, **test_fused_int8.BASE).astype(np.float32))


def clusters(device, fix):
    """The same of `fused_tile_mvm_sm90` in clusters."""
    fix(128, 2, cluster=2)
    rng = np.random.default_rng(5)
    codes = rng.integers(-15, 16, (150, 300)).astype(np.int16)
    g = rng.integers(-8, 9, (1, 300, 100)).astype(np.float32)
    s = {"adc_bits": 8, "adc_lsb": 16.0, "noise_var": rng.integers(0, 4, g.shape).astype(np.float32)}
    expected = reference.tile_mvm(codes, g, tile=150, **s)
    return np.array_equal(test_fused_sm90.read(codes, g, device, g_range=8.0, tile_rows=150, **s), expected)


@pytest.mark.slow
def test_every_kernel_and_all_inline_assembly(plan):
    """One launch after the other by both builds; then what that leaves out of the inline assembly."""
    device, more = BothDevice(order=5, workspace=1 << 16), PtxDevice(order=11)
    every_kernel.run(device)
    assert set(device.ptx.launches) == set(test_cuda_kernels.KERNELS)
    exact = {program.name for program in device.ptx.programs if not program.approximate}
    assert len(exact) >= 20
    assert streams(more)
    assert levels(more)
    assert clusters(more, plan)
    ran = {
        text
        for program in {*device.ptx.programs, *more.programs}
        for text, has_run in program.inlined()
        if has_run
    }
    patterns = inline_assembly()
    assert len(patterns) > 35
    assert [text for text, pattern in patterns.items() if not any(map(pattern.fullmatch, ran))] == []


def inline_assembly():
    """Text -> pattern of what the compiler makes of it, for all that stands in the kernels."""
    patterns = {}
    for path in (*kernel_dir().glob("*.cu"), *kernel_dir().glob("include/gpuxbar/*.cuh")):
        text = re.sub(r"//[^\n]*", "", path.read_text()).replace("\\\n", "")
        for name, value in re.findall(r'#define (\w+)\s+(".*")', text):
            text = re.sub(rf"\b{name}\b", lambda _, value=value: value, text)
        for found in re.finditer(r'\basm\s*(?:volatile)?\s*\(((?:\s*"(?:[^"\\]|\\.)*")+)', text):
            joined = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', found.group(1))).replace("\\n", "\n")
            parts = re.split(r"%\d+", joined.replace("%%", "%"))
            patterns[joined] = re.compile(r"[^\s,]+".join(map(re.escape, parts)))
    return patterns


CASES = {  # tests of other modules
    "convolution": (test_cuda_kernels.test_convolution_matches_oracle,
                    {"kernel": (2, 3), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2), "groups": 2, "transposed": True, "driven": True}),
    "wide": (test_cuda_kernels.test_wide_columns_in_every_thread_order, {"order": REVERSE, "generator": "exact"}),
    "streams": (test_fused.test_fused_is_the_epilogue_bit_for_bit, {"way": "signed-streams", "planes": 1}),
    "implicit": (test_fused_implicit.test_gathered_patches_are_the_unfolded_read_bit_for_bit,
                 {"name": "by-position", "strategy": "implicit-wgmma"}),
    "device-update": (test_device_update.test_kernel_matches_oracle, {"name": "neurosim-pulses", "shape": (3, 71, 19)}),
    "pulses": (test_pulse_update.test_kernel_matches_oracle, {"law": "soft", "train": "managed", "shape": (5, 2, 37, 71)}),
    "signed-pulses": (test_pulse_update.test_signs_of_wordlines_are_those_of_their_inputs, {"geometry": "strided", "train": "managed"}),
    "wires": (test_effective_conductance.test_cuda_kernels_match_oracle, {"shape": (16, 20), "order": 11, "method": "exact"}),
    "wires-approximated": (test_effective_conductance.test_cuda_kernels_match_oracle, {"shape": (37, 50), "order": 11, "method": "mean_field"}),
    "wires-inputs": (test_solve_for_inputs.test_cuda_matches_oracle, {"shape": (1, 140, 3), "name": "strong", "order": 11}),
    "wires-gradient": (test_wires_gradient.test_cuda_matches_oracle, {"shape": (16, 13), "name": "strong", "order": 11}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_holds_of_the_ptx_too(name, monkeypatch):
    test, settings = CASES[name]
    monkeypatch.setattr(sys.modules[test.__module__], "ShimDevice", PtxDevice)
    test(**settings)


@pytest.mark.slow
def test_every_kernel_of_another_architecture():
    device = BothDevice(order=5, workspace=1 << 16, arch="sm_100")
    every_kernel.run(device)
    assert set(test_cuda_kernels.KERNELS) - set(device.ptx.launches) == {"fused_tile_mvm_sm90"}


@pytest.mark.parametrize("arch", ["sm_80", "sm_120"])  # of the two compilers that NVRTC holds
def test_reads_the_ptx_of_every_compiler(arch, monkeypatch):
    assert levels(PtxDevice(arch=arch))
    monkeypatch.setattr(test_fused, "ShimDevice", partial(PtxDevice, arch=arch))
    for name in test_fused.ENDS:
        for gate in (False, True):
            test_fused.test_codes_at_the_ends_of_the_range(name, gate)


@pytest.mark.parametrize("strategy", ["fused", "wgmma"])
def test_no_scale_is_read_of_columns_that_are_not(strategy):
    """Of a block with fewer lines than columns; the PTX reads no word beyond an array."""
    codes, g = np.full((3, 64), 5, np.int16), np.full((1, 64, 20), 2.0**-20, np.float32)
    ends = np.linspace(1, 2, 20, dtype=np.float32)
    s = {
        "v_lsb": 2.0**-10,
        "adc_bits": 8,
        "adc_lsb": 2.0**-26 * ends,
        "col_scale": ends.copy(),
        "bias": 2.0**-24 * ends,
    }
    y = test_fused.fused(codes, g, PtxDevice(multiprocessors=1), strategy=strategy, tile_rows=64, **s)
    np.testing.assert_allclose(y, reference.tile_mvm(codes, g, tile=64, **s), rtol=1e-6)


MMA, WGMMA = "include/gpuxbar/mma.cuh", "include/gpuxbar/wgmma.cuh"
MUTANTS = {  # the first is a race whatever the order of threads; the others are in no build for a CPU
    "a barrier left out": ("fused_tile_mvm.cu", "  __syncthreads();\n  const u32 biases", "  const u32 biases", streams),
    "sums only written": (MMA, '"+f"(c[3])', '"=f"(c[3])', streams),
    "another byte's sign": (MMA, "0xBB99", "0xB9B9", streams),
    "halves swapped": (MMA, '"f"(high * high), "f"(low * low)', '"f"(low * low), "f"(high * high)', streams),
    "descriptors swapped": (WGMMA, "%64, %65, p", "%65, %64, p", clusters),
    "half a mask": (WGMMA, '"h"((u16)blocks)', '"h"((u16)(blocks >> 1))', clusters),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_seeded_bug_shows(name, plan, seeded):
    file, old, new, read = MUTANTS[name]
    seeded(file, old, new)
    assert not is_right(read, PtxDevice(), *((plan,) if read is clusters else ()))


def is_right(read, *how):
    try:
        return read(*how)
    except RuntimeError as error:
        if not str(error).startswith("fused_tile_mvm"):  # not in that kernel: it was not compiled
            raise
        return False


@pytest.mark.parametrize(("option", "instruction"), [("-fmad=false", "add.f32"), ("-ftz=false", "ftz.f32")])
def test_other_arithmetic_is_refused(option, instruction, monkeypatch):
    """Products and sums that may be contracted, denormals flushed."""
    options = cuda_shim.ptx.options
    monkeypatch.setattr(
        cuda_shim.ptx,
        "options",
        lambda *args: [o for o in options(*args) if o != option] + [option.replace("false", "true")],
    )
    monkeypatch.setattr(cuda_shim.ptx, "_ptx", cuda_shim.ptx._ptx.__wrapped__)
    with pytest.raises(RuntimeError, match=rf"relax: unknown instruction: \S*{instruction}"):
        Program(cuda_shim.ptx.ptx("relax.cu", "sm_90", {}), "relax")


# ---- the tool itself

ONES = 0xFFFFFFFF
INSTRUCTIONS = {  # what they leave in the 32 bits of %r1, %f1 or %p1; by PTX ISA
    "shl.b32 %r1, 1, 32": 0,
    "shr.u32 %r1, 0x80000000, 32": 0,
    "shr.s32 %r1, -2147483648, 99": ONES,
    "add.s32 %r1, 2147483647, 1": 0x80000000,
    "mul.lo.s32 %r1, 65536, 65537": 65536,
    "mul.hi.s32 %r1, -3, 5": ONES,
    "mul.hi.u32 %r1, -3, 5": 4,
    "div.s32 %r1, -7, 2": ONES - 2,
    "rem.s32 %r1, -7, 2": ONES,
    "div.s32 %r1, -2147483648, -1": 0x80000000,
    "min.s32 %r1, -1, 1": ONES,
    "min.u32 %r1, -1, 1": 1,
    "abs.s32 %r1, -5": 5,
    "popc.b32 %r1, 0xF0F1": 9,
    "bfi.b32 %r1, 0xFF, 0x12345678, 8, 4": 0x12345F78,
    "bfi.b32 %r1, 0xFF, 0, 28, 8": 0xF0000000,
    "bfi.b32 %r1, 0xFF, 7, 32, 8": 7,
    "prmt.b32 %r1, 0x33221100, 0x77665544, 0x7340": 0x77334400,
    "prmt.b32 %r1, 0x00FF8001, 0, 0xBB99": 0x0000FFFF,
    "selp.b32 %r1, 3, 4, %p2": 4,
    "min.f32 %f1, 0f7FC00000, 0f3F800000": 0x3F800000,
    "max.f32 %f1, 0f80000000, 0f00000000": 0,
    "min.f32 %f1, 0f00000000, 0f80000000": 0x80000000,
    "mul.rn.f32 %f1, 0f00800000, 0f3F000000": 0x00400000,  # a denormal
    "fma.rn.f32 %f1, 0f3F800001, 0f3F800001, 0fBF800002": 0x28800000,  # 2^-46
    "fma.rm.f32 %f1, 0f3F800001, 0f3F800001, 0f00000000": 0x3F800002,
    "fma.rm.f32 %f1, 0fBF800001, 0f3F800001, 0f00000000": 0xBF800003,
    "cvt.rzi.s32.f32 %r1, 0f7FC00000": 0,
    "cvt.rzi.s32.f32 %r1, 0fBFFFFFFF": ONES,
    "cvt.rzi.s32.f32 %r1, 0f4F800000": 0x7FFFFFFF,
    "cvt.rzi.s32.f32 %r1, 0fFF800000": 0x80000000,
    "cvt.rni.f32.f32 %f1, 0f40200000": 0x40000000,  # 2.5
    "cvt.rmi.f32.f32 %f1, 0fBF000000": 0xBF800000,  # -0.5
    "cvt.sat.f32.f32 %f1, 0f7FC00000": 0,
    "add.rn.sat.f32 %f1, 0f7FC00000, 0f3F400000": 0,
    "add.rn.sat.f32 %f1, 0fBF800000, 0f3F400000": 0,
    "add.rn.sat.f32 %f1, 0f3F800000, 0f3F400000": 0x3F800000,
    "add.rn.sat.f32 %f1, 0f33C00000, 0f3F400000": 0x3F400002,  # half to even
    "min.relu.s32 %r1, -1, 1": 0,
    "min.relu.s32 %r1, 3, 2": 2,
    "cvt.rn.f32.s32 %f1, 16777217": 0x4B800000,
    "cvt.rn.f32.u32 %f1, -1": 0x4F800000,
    "cvt.rn.bf16x2.f32 %r1, 0f3F800000, 0f40000000": 0x3F804000,
    "cvt.u32.u64 %r1, 0x1234567890ABCDEF": 0x90ABCDEF,
    "cvt.s32.s16 %r1, 0x8000": 0xFFFF8000,
    "cvt.u16.u32 %r1, 0x12345678": 0x5678,
    "add.rn.f16x2 %r1, 0x3C00C000, 0x3C004000": 0x40000000,
    "copysign.f32 %f1, 0f80000000, 0f40000000": 0xC0000000,  # -2
    "setp.gtu.f32 %p1, 0f7FC00000, 0f3F800000": 1,
    "setp.gt.f32 %p1, 0f7FC00000, 0f3F800000": 0,
    "setp.ne.f32 %p1, 0f7FC00000, 0f7FC00000": 0,
    "setp.neu.f32 %p1, 0f7FC00000, 0f7FC00000": 1,
    "setp.lt.s32 %p1, -1, 1": 1,
    "setp.lt.u32 %p1, -1, 1": 0,
    "sqrt.approx.ftz.f32 %f1, 0f00000001": 0,
    "ex2.approx.ftz.f32 %f1, 0fC3800000": 0,  # 2^-256
}


def snippet(body):
    """A kernel of one array to write and one to read."""
    return f""".version 9.0
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 gx_smem[];

.visible .entry snippet(
	.param .u64 snippet_param_0,
	.param .u64 snippet_param_1
)
.maxntid 64, 1, 1
{{
	.reg .pred %p<9>;
	.reg .f32 %f<9>;
	.reg .b16 %rs<9>;
	.reg .b32 %r<9>;
	.reg .b64 %rd<9>;
	.shared .align 4 .b8 own[20];

	ld.param.u64 %rd1, [snippet_param_0];
	ld.param.u64 %rd2, [snippet_param_1];
	mov.u32 %r5, %tid.x;
	setp.eq.s32 %p2, %r5, 99;
	setp.eq.s32 %p3, %r5, 0;
	setp.eq.s32 %p4, %r5, 1;
	{body}
	ret;
}}
"""


def run_snippet(body, threads=1, shared=0, values=None, blocks=1):
    out, given = np.zeros(8, np.uint32), np.arange(8, dtype=np.uint32)
    addresses = [array.ctypes.data.to_bytes(8, "little") for array in (out, given)]
    arrays = [(out.ctypes.data, out.nbytes, 4, True), (given.ctypes.data, given.nbytes, 4, False)]
    Program(snippet(body), "snippet").launch(
        (blocks,), (threads,), shared, 0, values or addresses, arrays, FORWARD, False
    )
    return out


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
def test_an_instruction_does_as_the_manual_says(instruction):
    store = (
        "selp.u32 %r1, 1, 0, %p1; st.global.u32 [%rd1], %r1;"
        if "%p1" in instruction
        else "st.global.u32 [%rd1], %r1;"
    )
    store = store.replace("%r1", "%f1") if "%f1" in instruction else store
    assert run_snippet(f"{instruction}; {store}")[0] == INSTRUCTIONS[instruction]


def test_widths_and_vectors():
    """Values are extended as their types say, in registers and from memory; dynamic memory follows the static array."""
    body = """mul.wide.s32 %rd3, -3, 5; shr.s64 %rd3, %rd3, 32; st.global.u32 [%rd1], %rd3;
	ld.global.v2.u32 {%r1, %r2}, [%rd2+8]; st.global.v2.u32 [%rd1+8], {%r2, %r1};
	mov.b64 %rd4, {%r1, %r2}; mov.b64 {%r3, %r4}, %rd4; st.global.u32 [%rd1+4], %r4;
	cvt.u16.u32 %rs1, %r1; cvt.u16.u32 %rs2, 7; mov.b32 %r7, {%rs1, %rs2}; mov.b32 {%rs1, %rs2}, %r7; st.global.u32 [%rd1+28], %r7;
	mov.u64 %rd5, gx_smem; st.global.u32 [%rd1+16], %rd5;
	st.shared.u8 [own+3], -2; ld.shared.s8 %r6, [own+3]; st.global.u32 [%rd1+20], %r6; ld.shared.u8 %r6, [own+3];
	st.global.u32 [%rd1+24], %r6;"""
    assert run_snippet(body, shared=16).tolist() == [ONES, 3, 3, 2, 32, ONES - 1, 254, 7 << 16 | 2]


def test_lanes_hear_each_other():
    """Of a lane by its place in the warp, or in a segment of eight (0x18 keeps the upper bits), or by a bit-wise difference."""
    body = """setp.eq.s32 %p7, %r5, 12;
	shfl.sync.idx.b32 %r1|%p6, %r5, 19, 0x1f, -1; @%p7 st.global.u32 [%rd1], %r1;
	shfl.sync.idx.b32 %r1|%p6, %r5, 21, 0x181f, -1; @%p7 st.global.u32 [%rd1+4], %r1;
	shfl.sync.bfly.b32 %r1|%p6, %r5, 25, 0x1f, -1; @%p7 st.global.u32 [%rd1+8], %r1;
	shfl.sync.idx.b32 %r1|%p6, %r5, 21, 7, -1; @%p7 st.global.u32 [%rd1+12], %r1;"""
    own = 12  # where the lane is past the end
    assert run_snippet(body, threads=32)[:4].tolist() == [19, 8 + 21 % 8, 12 ^ 25, own]


def test_roots_are_of_magnitudes():
    """By the error that is assumed, a logarithm of nearly 1 may have the wrong sign, and noise would be NaN."""
    text = cuda_shim.ptx.ptx("adc_accumulate.cu", "sm_90", {"NOISE": 1})
    roots = re.findall(r"sqrt\.approx\.ftz\.f32 %f\d+, (%f\d+);", text)
    assert roots
    assert {f"abs.f32 \t{root}," in text for root in roots} == {True}


@pytest.mark.parametrize(("noise", "variance", "each"), [(1, 0, 2), (2, 0, 2), (2, 1, 2.5)])
def test_noise_takes_few_special_functions(noise, variance, each):
    """A conversion, of the 64 of a thread: what binds fast noise. State-dependent deviations have no root of their own."""
    text = cuda_shim.ptx.ptx("fused_tile_mvm_sm90.cu", "sm_90a", {"NOISE": noise, "VARIANCE": variance})
    assert len(re.findall(r"\b(?:lg2|sqrt|cos|sin)\.approx", text)) == 64 * each


FAULTS = {
    "misaligned": ("ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd2+4];", "misaligned address", {}),
    "outside": ("ld.global.u32 %r1, [%rd2+32];", "outside every array", {}),
    "across an end": ("ld.global.v2.u64 {%rd3, %rd4}, [%rd1+24];", "(misaligned address|outside every array)", {}),
    "not to be written": ("st.global.u32 [%rd2], 1;", "declared as only read", {}),
    "written and cached": ("ld.global.nc.u32 %r1, [%rd1];", "array that the launch writes", {}),
    "outside shared memory": ("ld.shared.u32 %r1, [own+48];", "outside the 48 bytes", {"shared": 16}),
    "division": ("div.u32 %r1, 1, %r5;", "division by zero", {}),
    "contracted": ("add.f32 %f1, %f2, %f3;", "unknown instruction: add.f32", {}),
    "operands": ("add.s32 %r1, %r2;", "not the operands", {}),
    "register": ("mov.u32 %r1, %r9;", "no register %r9", {}),
    "label": ("bra $L_1;", "no label", {}),
    "two barriers": ("@%p3 bra $L_1; bar.sync 0; bra $L_2; $L_1: bar.sync 0; $L_2: mov.u32 %r1, 0;", "different barriers", {"threads": 64}),
    "not all lanes at one product": ("@%p3 bra $L_1; wgmma.fence.sync.aligned; bra $L_2; $L_1: wgmma.fence.sync.aligned; $L_2: mov.u32 %r1, 0;",
                                     "warp op divergence", {"threads": 32}),
    "two writers": ("st.shared.u32 [own], %r5;", "race for shared address 0", {"threads": 2}),
    "a reader after its writer": ("@%p3 st.shared.u32 [own], 1; ld.shared.u32 %r1, [own];", "race for shared", {"threads": 2}),
    "a writer after its readers": ("ld.shared.u32 %r1, [own]; @%p4 st.shared.u32 [own], 1;", "race for shared", {"threads": 64}),
    "a warp's barrier for two": ("@%p3 st.shared.u32 [own], 1; bar.warp.sync -1; ld.shared.u32 %r1, [own];", "race for shared", {"threads": 64}),
    "two blocks": ("st.global.u32 [%rd1], 1;", "race of blocks for item 0", {"blocks": 2}),
    "a block that reads another's": ("mov.u32 %r6, %ctaid.x; setp.eq.s32 %p5, %r6, 0; ld.global.u32 %r1, [%rd1]; @%p5 st.global.u32 [%rd1], 1;",
                                     "race of blocks", {"blocks": 9}),
    "threads": ("mov.u32 %r1, 0;", "more threads than .maxntid", {"threads": 96}),
    "memory": ("mov.u32 %r1, 0;", "more shared memory", {"shared": 48 << 10}),
    "parameters": ("mov.u32 %r1, 0;", "takes 2 parameters", {"values": [b"12345678"]}),
    "a parameter's size": ("mov.u32 %r1, 0;", "parameter 1 takes 8 bytes", {"values": [b"12345678", struct.pack("f", 1.0)]}),
}  # fmt: skip


def test_atomic_instructions_of_blocks_add_up():
    assert (
        run_snippet("atom.global.add.u32 %r1, [%rd1], 2; st.global.u32 [%rd1+4], 1;", 64, blocks=5)[0] == 640
    )


@pytest.mark.parametrize(("barrier", "threads"), [("bar.sync 0", 64), ("bar.warp.sync -1", 32)])
def test_a_barrier_orders(barrier, threads):
    body = f"@%p3 st.shared.u32 [own], 7; {barrier}; ld.shared.u32 %r1, [own]; st.global.u32 [%rd1], %r1; {barrier};"
    assert run_snippet(f"{body} @%p4 st.shared.u32 [own], 8;", threads)[0] == 7


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_an_error(name):
    body, text, settings = FAULTS[name]
    with pytest.raises(RuntimeError, match=f"snippet: .*{text}"):
        run_snippet(body, **settings)
