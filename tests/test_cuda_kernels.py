"""The CUDA kernels without a GPU: declarations, compilation for every architecture, and runs on the CPU."""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cuda_shim import FORWARD, REVERSE, ShimDevice
from test_tile_mvm import (
    G_MAX,
    MODES,
    SEED,
    SHAPES,
    assert_convolution_matches,
    assert_matches,
    assert_reads,
    case,
    convolution,
    drivers,
)

from gpuxbar import ops, reference
from gpuxbar.bench.gpu.ceilings import KERNELS as CEILINGS
from gpuxbar.launch import CudaDevice, In, Kernel, Out, Scalar, nvrtc
from gpuxbar.launch import device as device_module
from gpuxbar.launch.cubin import closure, cubin, options, resources
from gpuxbar.launch.kernel import Array
from gpuxbar.launch.nvrtc import CompileError, nvrtc_version
from gpuxbar.launch.sources import kernel_dir
from gpuxbar.ops import ConvGeometry, tile_mvm_cuda
from gpuxbar.ops.anchored_conductance_cuda import KERNELS as ANCHOR
from gpuxbar.ops.carry import KERNEL as CARRY
from gpuxbar.ops.chop import KERNEL as CHOP
from gpuxbar.ops.dac_quantize import KERNEL as DAC_QUANTIZE
from gpuxbar.ops.device_update import KERNEL as DEVICE_UPDATE
from gpuxbar.ops.drift import KERNELS as DRIFT
from gpuxbar.ops.effective_conductance_cuda import KERNELS as EFFECTIVE_CONDUCTANCE
from gpuxbar.ops.effective_conductance_gradient_cuda import KERNELS as CONDUCTANCE_GRADIENT
from gpuxbar.ops.fused_layout import (
    SHARED,
    STATIC_SHARED,
    WGMMA_STATIC_SHARED,
    pipeline,
    stage_bytes,
    wgmma_bytes,
)
from gpuxbar.ops.fused_tile_mvm import KERNELS as FUSED
from gpuxbar.ops.fused_tile_mvm_sm90 import KERNELS as WGMMA
from gpuxbar.ops.laws import LAWS
from gpuxbar.ops.program_cuda import KERNELS as PROGRAM
from gpuxbar.ops.pulse_update import KERNELS as PULSES
from gpuxbar.ops.relax import KERNEL as RELAX
from gpuxbar.ops.solve_for_inputs_cuda import KERNELS as WIRE_CURRENTS
from gpuxbar.ops.solve_for_inputs_cuda import STATIC_SHARED as SOLVER_SHARED
from gpuxbar.ops.solve_for_inputs_cuda import Work
from gpuxbar.ops.streamed_update import KERNELS as STREAMED
from gpuxbar.ops.tile_mvm_cuda import KERNELS as TILE_MVM
from gpuxbar.ops.tile_mvm_cuda import chunks, split_value

KERNELS = {
    k.name: k
    for k in (
        *TILE_MVM,
        *FUSED,
        *WGMMA,
        DAC_QUANTIZE,
        *PROGRAM,
        DEVICE_UPDATE,
        *DRIFT,
        RELAX,
        CARRY,
        CHOP,
        *EFFECTIVE_CONDUCTANCE,
        *CONDUCTANCE_GRADIENT,
        *WIRE_CURRENTS,
        *ANCHOR,
        *PULSES,
        *STREAMED,
        *CEILINGS,
    )
}
FILES = sorted({k.file for k in KERNELS.values()})
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_120")
C_NAMES = {
    "float32": "float", "float16": "u16", "int16": "i16", "int32": "int", "int64": "i64", "uint64": "u64",
    "uint32": "u32", "float32|float16": "Operand", "int16|float32": "Source",
    "float16|int8": "Operand", "float16|int16|int8": "Operand", "float32|float16|int8": "Operand",
    "float32|float16|int16": "Operand", "float32|float16|int16|int8": "Operand",
}  # fmt: skip
REGISTERS = Path(__file__).with_name("registers.tsv")
SEALS = Path(__file__).with_name("registers.seals")
VARIANTS = {
    "adc_accumulate.cu": [
        {"NOISE": noise, "VARIANCE": variance, "GATE": gate, "IMAGES": images, "VECTOR": vector}
        for noise, variance, gate, images, vector in
        [(0, 0, 0, 0, 1), (1, 0, 0, 0, 1), (2, 0, 0, 0, 1), (1, 0, 1, 1, 1), (2, 1, 1, 0, 0)]
    ] + [{"NOISE": 2, "VARIANCE": 1, "GATE": 1, "ERRORS": 1, "INL": 1, "IMAGES": 0, "VECTOR": 0}],
    "pack_inputs.cu": [{"CODES": 1, "HALF": 1, "CONV": 0}, {"CODES": 1, "HALF": 1, "CONV": 1, "PANELS": 1}, {"CODES": 0, "HALF": 0, "CONV": 2}, {"INT8": 1, "CONV": 1}, {"BFLOAT": 1, "CONV": 0}, {"CODES": 1, "HALF": 1, "CONV": 0, "DAC": 1}, {"CODES": 1, "HALF": 1, "CONV": 2, "DAC": 1, "PANELS": 1}, {"CODES": 1, "HALF": 1, "CONV": 1, "DRIVERS": 1}, {"CODES": 0, "HALF": 0, "CONV": 0, "DRIVERS": 2}, {"CODES": 1, "HALF": 0, "CONV": 2, "DAC": 1, "DRIVERS": 3}],
    "pack_images.cu": [{"DAC": 0}, {"DAC": 1}],
    "ceilings.cu": [{"UNIT": unit} for unit in range(5)],
    "wire_currents.cu": [{"ON_CHIP": 0}, {"ON_CHIP": 1}],
    "wire_currents_gradient.cu": [{"ON_CHIP": 0}, {"ON_CHIP": 1}],
    "ladder.cu": [{"FIRST_ORDER": 0}, {"FIRST_ORDER": 1}],
    "gauss_jordan.cu": [{"SIZE": 16}, {"SIZE": 32}],
    "device_update.cu": [*({"LAW": law, "COUNTED": 0} for law in sorted(set(LAWS.values()))), {"LAW": 0, "COUNTED": 1}, *({"LAW": law, "COUNTED": 0, "SLICED": 1} for law in (0, 2, 7)), *({"LAW": law, "COUNTED": 1, "SLICED": 1} for law in (0, 7)), {"LAW": 2, "COUNTED": 0, "SLICED": 1, "DIGITS": 1}, *({"LAW": 1, "TRAITS": 319, "MAPPED": mapped} for mapped in (0, 1)), {"LAW": 8, "COUNTED": 1, "SLICED": 1, "DIGITS": 1}],
    "fused_tile_mvm_sm90.cu": [
        *({"IMPLICIT": 1, "BLOCK_N": 128, "TERMS": terms, "NOISE": noise, "CONVERTERS": converters, "GATE": gate, "STAGES": 4}
          for terms, noise, converters, gate in [(1, 2, 0, 0), (2, 2, 1, 1)]),
        *({"CLUSTER": cluster, "BLOCK_N": block_n, "TERMS": terms, "NOISE": noise, "VARIANCE": variance,
         "CONVERTERS": converters, "GATE": gate, "STAGES": stages}
        for cluster, block_n, terms, noise, variance, converters, gate, stages in
        [(1, 128, 1, 1, 0, 0, 1, 4), (1, 128, 2, 2, 0, 1, 1, 4), (1, 256, 1, 0, 0, 0, 0, 4), (1, 256, 1, 1, 0, 0, 0, 4),
         (1, 256, 1, 2, 0, 0, 0, 4), (1, 256, 2, 1, 0, 0, 0, 2), (1, 256, 2, 2, 0, 0, 0, 2), (1, 128, 1, 2, 1, 0, 0, 4),
         (1, 128, 1, 2, 1, 1, 1, 4), (1, 128, 2, 1, 1, 1, 1, 3), (1, 128, 2, 2, 1, 0, 0, 3), (2, 256, 1, 0, 0, 0, 0, 4),
         (2, 256, 1, 1, 0, 0, 0, 4), (2, 256, 1, 2, 0, 0, 0, 4), (2, 256, 2, 2, 0, 0, 0, 2), (2, 128, 1, 2, 1, 1, 1, 4),
         (2, 128, 2, 1, 1, 1, 1, 3)])
    ],
    "pack_sensed.cu": [{"PANELS": 0}, {"BFLOAT": 1}, {"PANELS": 1}, {"IMPLICIT": 1}, {"INT8": 1, "TRANSPOSED": 1}],
    "pulse_trains.cu": [{"CONV": 0}, {"CONV": 1}],
    "streamed_lines.cu": [{"CONV": 0}, {"CONV": 1}],
    "pulse_update.cu": [
        {"LAW": law, "AGGREGATED": aggregated, "IMPLIED": implicit, "COUNTED": counted}
        for law, aggregated, implicit, counted in
        [(0, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 1, 1, 0), *((law, 0, 0, 0) for law in range(1, 9)), (0, 0, 0, 1), (0, 1, 0, 1)]
    ] + [{"LAW": law, "AGGREGATED": aggregated, "IMPLIED": 0, "COUNTED": 0, "SLICED": 1} for law, aggregated in [(0, 0), (0, 1), (1, 0)]]
    + [{"LAW": 1, "AGGREGATED": 1, "TRAITS": 63, "MAPPED": mapped} for mapped in (0, 1)],
    "pack_conductance.cu": [{"HALF": 1, "TRANSPOSED": 1}, {"HALF": 0, "TRANSPOSED": 0}, {"BFLOAT": 1, "TRANSPOSED": 0}],
    "fused_tile_mvm.cu": [
        *({"BLOCK_N": block_n, "TERMS": 1, "INT8": int8, "NOISE": noise, "VARIANCE": 0, "CONVERTERS": converters, "GATE": gate}
          for block_n, int8, noise, converters, gate in
          [(128, 2, 1, 2, 1), (256, 1, 0, 0, 0), (256, 2, 0, 0, 0), (256, 1, 1, 0, 0), (256, 1, 2, 0, 0)]),
        {"BLOCK_N": 256, "TERMS": 1, "BFLOAT": 1, "NOISE": 1, "VARIANCE": 0, "CONVERTERS": 0, "GATE": 0},
        {"BLOCK_N": 128, "TERMS": 1, "BFLOAT": 1, "NOISE": 2, "VARIANCE": 1, "CONVERTERS": 2, "GATE": 1},
        *({"BLOCK_N": block_n, "TERMS": terms, "NOISE": noise, "VARIANCE": variance, "STREAMS": streams,
         "CONVERTERS": converters, "GATE": gate, "IMPLICIT": implicit}
        for block_n, terms, noise, variance, streams, converters, gate, implicit in
        [(128, 1, 1, 0, 0, 0, 1, 0), (128, 2, 2, 0, 1, 2, 1, 0), (128, 2, 1, 1, 2, 1, 1, 0), (256, 1, 0, 0, 0, 0, 0, 0),
         (256, 1, 1, 0, 0, 0, 0, 0), (256, 1, 2, 0, 0, 0, 0, 0), (256, 1, 1, 0, 2, 0, 0, 0),
         (128, 2, 2, 0, 1, 2, 1, 1), (128, 2, 1, 1, 2, 1, 1, 1), (256, 1, 1, 0, 0, 0, 0, 1),
         (128, 2, 2, 0, 1, 2, 1, 2), (256, 1, 2, 0, 0, 0, 0, 2)])
    ],
}  # fmt: skip


def test_every_kernel_file_is_declared():
    assert {path.name for path in kernel_dir().glob("*.cu")} == set(FILES)


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_declaration_is_the_parameter_list(name):
    kernel = KERNELS[name]
    text = re.sub(r"//[^\n]*", "", (kernel_dir() / kernel.file).read_text())
    found = re.search(
        rf'extern "C" __global__ void __launch_bounds__\([^)]*\)\s*(?:CLUSTERED\s*)?{kernel.name}\((.*?)\)\s*{{',
        text,
        re.S,
    )
    assert found
    parameters, kind = [], ""
    for item in found.group(1).split(","):
        words = item.replace("*", " * ").replace("__restrict__", "").split()
        kind = " ".join(words[:-1]) or kind
        declared = kernel.arguments.get(words[-1])
        if isinstance(declared, Array) and declared.dtype == "float16":
            kind = kind.replace("Operand", "u16")
        parameters.append((words[-1], kind))
    expected = []
    for name, argument in kernel.arguments.items():
        c_name = C_NAMES.get(argument.dtype, argument.dtype)
        if isinstance(argument, Array):
            c_name = f"{'' if argument.written else 'const '}{c_name} *"
        expected.append((name, c_name))
    assert parameters == expected


def variants(file, arch):
    """The macros to compile a file with; the fused kernel as deep a pipeline as the architecture's memory holds."""
    hopper = arch == "sm_90a"  # what has to be built for it alone; all else runs there as built for sm_90
    for macros in VARIANTS.get(file, [{}]):
        if file == "fused_tile_mvm_sm90.cu":
            if hopper:
                yield macros
        elif file == "ceilings.cu":  # of tensor cores where there are any that can
            if hopper == (macros["UNIT"] > 3) and not (macros["UNIT"] == 3 and arch == "sm_75"):
                yield macros
        elif hopper:
            return
        elif file != "fused_tile_mvm.cu":
            yield macros
        elif stages := pipeline(arch, macros["BLOCK_N"], macros["TERMS"] + macros["VARIANCE"]):
            yield {**macros, "STAGES": stages}


def cases(arch):
    """Every kernel of an architecture with every set of macros it is compiled with, and the start of its line in the record."""
    for name, kernel in sorted(KERNELS.items()):
        for macros in variants(kernel.file, arch):
            variant = " ".join(f"{k}={v}" for k, v in macros.items()) or "-"
            yield kernel, macros, f"{arch}\t{name}\t{variant}\t"


def complaints(log):
    """What a compiler warns of: its own warnings, and what ptxas says of products that run one after the other, or of
    registers that a warpgroup cannot claim."""
    return [line for line in log.splitlines() if re.search("warning|Performance|wgmma|setmaxnreg", line)]


def test_a_compiler_is_heard_out():
    """By the words of ptxas."""
    serialized = "ptxas info    : (C7514) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..."
    ignored = "ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored to maintain minimum register ..."
    quiet = [
        "ptxas info    : Used 168 registers, used 1 barriers, 1024 bytes smem",
        "ptxas info    : 4 bytes gmem",
    ]
    assert complaints("\n".join([*quiet, serialized, ignored])) == [serialized, ignored]


def register_line(arch, kernel, macros, start):
    """Registers and shared memory of a kernel, compiled; refuses spills, and whatever the compiler warns of."""
    path, log = cubin(kernel.file, arch, macros)
    used = resources(log)[kernel.name]
    assert path.read_bytes()[:4] == b"\x7fELF"
    assert used.spills == 0, (kernel.name, arch, macros, used)
    assert not complaints(log)
    assert used.shared <= 48 * 1024
    return f"{start}{used.registers}\t{used.shared}"


def test_what_a_block_takes_of_shared_memory_it_gets():
    """The stages that the planner gives a fused kernel beside what the kernel declares, as compiled."""
    fused = {"fused_tile_mvm", "fused_tile_mvm_sm90"}
    checked = set()
    for line in REGISTERS.read_text().splitlines()[1:]:
        arch, name, macros, _, declared = line.split("\t")
        if name in fused:
            m = {key: int(value) for key, value in (pair.split("=") for pair in macros.split())}
            panels = m["TERMS"] + m["VARIANCE"] if "VARIANCE" in m else m["TERMS"]
            stages, own = stage_bytes(m["BLOCK_N"], panels) * m["STAGES"], STATIC_SHARED
            if name == "fused_tile_mvm_sm90":
                stages, own = wgmma_bytes(m["BLOCK_N"], panels, m["STAGES"]), WGMMA_STATIC_SHARED
            assert int(declared) <= own, line
            assert stages + own <= SHARED[arch.removesuffix("a")], line
            checked.add((arch, name))
    assert len(checked) == 7  # one of them on Hopper alone


def test_a_solver_of_lines_has_fields_on_the_chip_where_they_fit():
    """Beside its own, three of a tile, of 128 columns at a time; 128 x 128 cells on Hopper."""
    own = [line.split("\t") for line in REGISTERS.read_text().splitlines() if "\twire_currents" in line]
    assert max(int(shared) for *_, shared in own) <= SOLVER_SHARED
    for arch, rows, fit in (("sm_75", 1, False), ("sm_86", 49, True), ("sm_86", 50, False), ("sm_90", 134, True),
                            ("sm_90", 135, False), ("sm_103", 134, True)):  # fmt: skip
        work = Work(ShimDevice(arch=arch), 9, rows, 100)
        assert work.shared == (3 * 4 * rows * 128 if fit else 0)
        assert work.macros == {"ON_CHIP": int(fit)}
        assert work.memory.size == work.blocks * (5 if fit else 8) * rows * 128


def seal(file, lines, root):
    """A digest of a kernel file and its headers, comments aside, of compiler and options, and of its lines in the record."""
    mine = {kernel.name for kernel in KERNELS.values() if kernel.file == file}
    digest = hashlib.sha256(repr((nvrtc_version(), options("", {}))).encode())
    for path in closure(root / file, root / "include"):
        text = re.sub(r'("[^"\n]*")|\s*//[^\n]*', r"\1", path.read_text())
        digest.update(f"{path.name}\n{text}\n".encode())
    digest.update("\n".join(line for line in lines if line.split("\t")[1] in mine).encode())
    return f"{digest.hexdigest()[:32]}  {file}"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile_to_the_recorded_registers(arch):
    """Another count may be right: look at it, then record it with `python tests/test_cuda_kernels.py`.

    Where the seal of a file holds, its lines were recorded from the same text by the same compiler, and only every third
    of one architecture and every tenth of the others are compiled again. Where it does not, all are.
    """
    lines = REGISTERS.read_text().splitlines()[1:]
    sealed = {file for file in FILES if seal(file, lines, kernel_dir()) in SEALS.read_text().splitlines()}
    recorded = [line for line in lines if line.startswith(arch + "\t")]
    found = []
    for number, (kernel, macros, start) in enumerate(cases(arch)):
        old = [line for line in recorded if line.startswith(start)]
        known = old and kernel.file in sealed and number % (3 if arch == "sm_90" else 10)
        found += old if known else [register_line(arch, kernel, macros, start)]
    assert found == recorded


def test_a_seal_breaks_with_what_it_vouches_for(tmp_path):
    """The code, what it includes and the record; no comment, and nothing of another file."""
    root = tmp_path / "kernels"
    shutil.copytree(kernel_dir(), root)
    lines = ["sm_90\tfold\t-\t32\t4224", "sm_90\trelax\t-\t38\t0"]
    before = seal("fold.cu", lines, root)
    assert before == seal("fold.cu", [lines[0], lines[1] + "0"], root)
    assert before != seal("fold.cu", [lines[0] + "0", lines[1]], root)
    for file, old, new, same in (
        ("fold.cu", "\n#include", "\n// a comment\n#include", True),
        ("relax.cu", "store(", "stored(", True),
        ("fold.cu", "[32][33]", "[33][33]", False),
        ("include/gpuxbar/portable.cuh", "namespace gpuxbar {", "namespace gpuxbar { // a comment", True),
        ("include/gpuxbar/portable.cuh", "namespace gpuxbar {", "namespace gpuxbar { struct X;", False),
    ):
        text = (root / file).read_text()
        assert old in text
        (root / file).write_text(text.replace(old, new, 1))
        assert (seal("fold.cu", lines, root) == before) == same, file
        (root / file).write_text(text)


@pytest.mark.parametrize(
    ("installed", "driver", "chosen"),
    [
        (["cuda_nvrtc/lib/libnvrtc.so.12", "cu13/lib/libnvrtc.so.13"], None, "cu13/lib/libnvrtc.so.13"),
        (["cuda_nvrtc/lib/libnvrtc.so.12", "cu13/lib/libnvrtc.so.13"], 13020, "cu13/lib/libnvrtc.so.13"),
        (
            ["cuda_nvrtc/lib/libnvrtc.so.12", "cu13/lib/libnvrtc.so.13"],
            0,
            "cu13/lib/libnvrtc.so.13",
        ),  # it runs nothing
        (
            ["cuda_nvrtc/lib/libnvrtc.so.12", "cu13/lib/libnvrtc.so.13"],
            12090,
            "cuda_nvrtc/lib/libnvrtc.so.12",
        ),
        (["cu9/lib/libnvrtc.so.11.2", "cu13/lib/libnvrtc.so.13"], 12090, "cu9/lib/libnvrtc.so.11.2"),
        (
            ["cu13/lib/libnvrtc.so.13"],
            12090,
            "cu13/lib/libnvrtc.so.13",
        ),  # whose cubins the driver will refuse
        ([], 12090, "libnvrtc.so"),
    ],
)
def test_of_several_compilers_the_newest_that_the_driver_loads_is_taken(
    installed, driver, chosen, tmp_path, monkeypatch
):
    def load(name):
        if name != "libcuda.so.1" or driver is None:
            raise OSError
        return SimpleNamespace(cuDriverGetVersion=lambda version: setattr(version._obj, "value", driver))

    for name in installed:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    packages = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(nvrtc.importlib.util, "find_spec", lambda _: packages)
    monkeypatch.setattr(nvrtc.ctypes, "CDLL", load)
    assert nvrtc._library_path().endswith(chosen)


def test_a_header_change_is_a_new_build(tmp_path, monkeypatch):
    from gpuxbar.launch import cubin as module

    root = tmp_path / "kernels"
    shutil.copytree(kernel_dir(), root)
    monkeypatch.setattr(module, "kernel_dir", lambda: root)
    before, _ = cubin("fold.cu", "sm_90", {})
    header = root / "include/gpuxbar/portable.cuh"
    header.write_text(header.read_text() + "\n// changed\n")
    assert cubin("fold.cu", "sm_90", {})[0] != before
    with monkeypatch.context() as patch:
        patch.setattr(module, "nvrtc_version", lambda: (0, 0))  # so is another compiler
        other, _ = cubin("fold.cu", "sm_90", {})
    assert other not in (before, cubin("fold.cu", "sm_90", {})[0])
    header.write_text("not CUDA")
    with pytest.raises(CompileError, match=r"fold\.cu"):
        cubin("fold.cu", "sm_90", {})


ORDERS = [FORWARD, REVERSE, 11, 12]


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES[1:2])
def test_pipeline_matches_oracle(shape, mode, groups, transposed):
    device = ShimDevice(order=ORDERS[(shape[0] + groups) % 4])
    assert_reads(partial(ops.tile_mvm, device=device), shape, mode, groups, transposed)


@pytest.mark.parametrize("generator", ["exact", "fast"])
@pytest.mark.parametrize("order", ORDERS)
def test_wide_columns_in_every_thread_order(order, generator):
    """Columns a multiple of 8: the 16-byte loads and stores."""
    codes, g = case(70, 50, 88)
    s = {
        "v_lsb": 1e-3,
        "adc_bits": 8,
        "adc_lsb": 1e-7,
        "read_noise": 3e-7,
        "seed": SEED,
        "generator": generator,
    }
    y = ops.tile_mvm(codes, g, tile_rows=24, device=ShimDevice(order), **s)
    assert_matches(y, reference.tile_mvm(codes, g, tile=24, **s), 1e-7)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "fp16x2", "bf16"])
def test_precisions(precision):
    codes, g = case(40, 60, 24)
    expected = reference.tile_mvm(codes, g, tile=32, v_lsb=1e-3)
    y = ops.tile_mvm(
        codes, g, tile_rows=32, v_lsb=1e-3, precision=precision, g_range=G_MAX, device=ShimDevice()
    )
    bits = {"fp32": 24, "tf32": 11, "fp16": 11, "fp16x2": 22, "bf16": 8}[precision]  # the shim adds exactly
    scale = (np.abs(codes.astype(np.float64)) @ np.abs(g[0])).max() * 1e-3
    assert np.abs(y - expected).max() < 2.0**-bits * scale
    if bits <= 11:
        assert np.abs(y - expected).max() > 2.0**-18 * scale


@pytest.mark.parametrize("driven", [False, True], ids=["digits", "drivers"])
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [((3, 3), (1, 1), (1, 1), (1, 1)), ((2, 3), (2, 1), (0, 2), (1, 2)), ((5, 2), (2, 3), (3, 1), (2, 1))],
)
def test_convolution_matches_oracle(kernel, stride, padding, dilation, groups, transposed, driven):
    codes, g, s = convolution(kernel, stride, padding, dilation, groups, transposed)
    if driven:
        s |= drivers(True, 0.1, groups * (g.shape[2] if transposed else s["conv"].inputs))
    device = ShimDevice(order=12, workspace=1 << 14)  # several chunks
    y = ops.tile_mvm(codes, g, tile_rows=4, tile_cols=4, device=device, **s)
    expected = reference.tile_mvm(codes, g, tile=4, **s)
    assert device.launches.count("adc_accumulate") > 1
    assert_convolution_matches(y, expected)


@pytest.mark.parametrize("precision", ["fp16", "fp16x2", "bf16"])
def test_what_devices_see_of_digits_is_rounded(precision):
    """To the operands' bits, whatever the conductances have; values of one row and one line a column."""
    lines, bits = 255, {"fp16": 11, "fp16x2": 11, "bf16": 8}[precision]
    codes = np.arange(-127, 128, dtype=np.int16)[None]
    s = drivers(True, 0.1, lines) | {"tile_rows": lines, "precision": precision, "g_range": G_MAX}
    g = (np.eye(lines) * 2.0**-17).astype(np.float32)
    y = ops.tile_mvm(codes, g, device=ShimDevice(), **s)
    digits = s["drivers"].driven(codes.astype(np.float64), s["v_lsb"])
    off = np.abs(y / (digits * 2.0**-17) - 1)
    assert 2.0 ** -(bits + 2) < off.max() < 2.0**-bits


def test_digits_alone_fit_kernels_that_cut_them_out_of_codes():
    codes, g = case(40, 60, 24)
    s = drivers(True, None, 60) | {"adc_bits": 8, "adc_lsb": 1e-7, "precision": "fp16", "g_range": G_MAX}
    device = ShimDevice()
    ops.tile_mvm(codes, g, device=device, **s)
    assert "adc_accumulate" in device.launches
    with pytest.raises(
        ValueError, match="got 'fused' where no codes drive the lines: DACs have errors, or devices"
    ):
        ops.tile_mvm(codes, g, device=device, strategy="fused", **s)
    with pytest.raises(
        ValueError, match="`precision` must be another with drivers, got 'int8', which multiplies"
    ):
        ops.tile_mvm(codes, g, device=device, **{**s, "precision": "int8", "g_step": 1e-7})


def test_numbers_may_be_those_of_numpy():
    """And arrays of one element may have no axis."""
    codes, g = case(9, 40, 12)
    x = codes.astype(np.float32)
    whole = {"adc_bits": 8, "adc_lsb": 2.0**-23, "read_noise": 2.0**-22, "v_lsb": 2.0**-10, "step": 3}
    expected = ops.tile_mvm(codes, g, device=ShimDevice(), **whole)
    numbers = {"adc_lsb": np.float32(2.0**-23), "read_noise": np.float32(2.0**-22), "step": np.int64(3)}
    arrays = {name: np.array(value) for name, value in numbers.items()}
    for s in (numbers, arrays):
        y = ops.tile_mvm(x, g, device=ShimDevice(), dac=ops.Dac(np.float32(1.0), 127), **{**whole, **s})
        np.testing.assert_array_equal(y, expected)
    quantised = ops.dac_quantize(x, lsb=np.float32(1.0), code_max=127, device=ShimDevice())
    np.testing.assert_array_equal(quantised, codes)


def test_images_of_any_size_stay_whole():
    """Chunks of a transposed convolution are whole images, of as many pixels as a block has rows too."""
    conv = ConvGeometry(2, 5, 9, (2, 2))
    assert conv.pixels == 32
    g = np.random.default_rng(0).uniform(0, G_MAX, (1, conv.inputs, 3)).astype(np.float32)
    codes = np.random.default_rng(1).integers(-127, 128, (3, 3, *conv.out)).astype(np.int16)
    s = {"conv": conv, "transposed": True}
    y = ops.tile_mvm(codes, g, device=ShimDevice(workspace=1), **s)
    expected = reference.tile_mvm(codes, g, **s)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_a_chunk_fits_a_grid():
    """Rows that take next to no memory, as a convolution's with a few outputs, are still no more blocks than CUDA launches."""
    parts = list(chunks(5_000_000, 1 << 40, 128))
    assert sum(count for _, count in parts) == 5_000_000
    assert all(row0 % 128 == 0 and -(-count // 128) * 4 <= 65535 for row0, count in parts)
    # whole images, the last panel not filled
    assert all(-(-count // 128) * 4 <= 65535 for _, count in chunks(5_000_000, 1 << 40, 10))


def test_same_bits_for_any_chunk():
    codes, g = case(101, 70, 36)
    s = {"tile_rows": 32, "adc_bits": 8, "adc_lsb": 1e-7, "read_noise": 1e-7, "v_lsb": 1e-3, "seed": SEED}
    whole = ops.tile_mvm(codes, g, device=ShimDevice(), **s)
    for workspace in (1, 1 << 15):
        np.testing.assert_array_equal(
            whole, ops.tile_mvm(codes, g, device=ShimDevice(workspace=workspace), **s)
        )


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
def test_partial_sums_that_32_bits_cannot_count_go_in_parts_or_are_refused(monkeypatch, transposed):
    codes, g, s = convolution((3, 3), (1, 1), (1, 1), (1, 1), 1, transposed)
    s |= {"tile_rows": 4, "tile_cols": 4, "want_gate": False, "strategy": "epilogue"}
    whole = ops.tile_mvm(codes, g, device=ShimDevice(), **s)
    drive, sense = g.shape[:0:-1] if transposed else g.shape[1:]
    sums, pixels = -(-drive // 4) * -(-len(g) * sense // 8) * 8, s["conv"].pixels
    images = 5
    for most, launches in (
        (pixels * sums, images if transposed else -(-images * pixels // (pixels // 32 * 32))),
        (33 * sums, images * -(-pixels // 33) if transposed else -(-images * pixels // 32)),
        (sums - 1, 0),
    ):
        device = ShimDevice()
        monkeypatch.setattr(tile_mvm_cuda, "MOST_SUMS", most)
        if launches:
            np.testing.assert_array_equal(ops.tile_mvm(codes, g, device=device, **s), whole)
        else:
            text = f"^tile_mvm: `g` must make fewer than 2.31 partial sums of a row, got {sums}; read it in parts"
            with pytest.raises(ValueError, match=text):
                ops.tile_mvm(codes, g, device=device, **s)
        assert device.launches.count("adc_accumulate") == launches


def test_launches_do_not_grow_with_tiles():
    counts = []
    for tile in (64, 8):
        device = ShimDevice()
        codes, g = case(20, 64, 16, planes=4)
        ops.tile_mvm(codes, g, tile_rows=tile, stream_bits=1, streams=7, device=device)
        counts.append(len(device.launches))
    assert counts[0] == counts[1] == 3


def test_scalars_may_live_on_the_device():
    codes, g = case(20, 30, 8)
    s = {"tile_rows": 16, "adc_bits": 8, "v_lsb": 1e-3, "seed": 3, "device": ShimDevice()}
    by_value = ops.tile_mvm(codes, g, adc_lsb=1e-7, read_noise=2e-7, step=5, **s)
    arrays = {
        "adc_lsb": np.full(1, 1e-7, np.float32),
        "read_noise": np.full(1, 2e-7, np.float32),
        "step": np.full(1, 5),
    }
    np.testing.assert_array_equal(by_value, ops.tile_mvm(codes, g, **arrays, **s))


@pytest.mark.parametrize("value", [5, 0.25, np.int64(5), np.float32(0.25)])
def test_a_number_of_numpy_goes_by_value(value):
    """It has the methods of an array, but lies in no device's memory."""
    assert split_value(value) == (None, value)


@pytest.mark.parametrize("seed", [-1, 2**64 + 2**40])
def test_a_seed_of_any_size_counts_by_its_64_bits(seed):
    signs = []
    for same, device in ((seed, ShimDevice()), (seed % 2**64, ShimDevice()), (seed, None)):
        signs.append(np.ones((3, 40), np.float32))
        ops.chop(signs[-1], np.arange(40), flip=0.5, step=1, seed=same, device=device)
        np.testing.assert_array_equal(signs[-1], signs[0])
    assert 0 < (signs[0] < 0).sum() < 120


@pytest.mark.parametrize("shape", [(7, 33), (8, 32), (1, 1), (9, 1), (3, 2, 5)])
def test_dac_codes(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for lsb in (0.02, np.linspace(0.01, 0.05, len(x)).astype(np.float32)):
        codes = ops.dac_quantize(x, lsb=lsb, code_max=127, device=ShimDevice())
        np.testing.assert_array_equal(codes, ops.dac_quantize(x, lsb=lsb, code_max=127))


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path):
    """Every kernel under ASan and UBSan, in a process that preloads them; a seeded overrun is found."""
    import os
    import subprocess
    import sys

    script = tmp_path / "run.py"
    script.write_text("""
import numpy as np
import every_kernel
from cuda_shim import SANITIZE, ShimDevice
from gpuxbar.ops.tile_mvm_cuda import FOLD
device = ShimDevice(order=5, flags=SANITIZE, workspace=1 << 16)
every_kernel.run(device)
print("clean", sorted(set(device.launches)), flush=True)
device.launch(FOLD, (1,), (32,), {**dict.fromkeys(FOLD.arguments, 1), "patches": np.zeros(4, np.float32),
                                  "images": np.zeros(4, np.float32), "size": 5, "planes": 1})
""")
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    here = os.path.dirname(__file__)
    environment = {
        **os.environ, "LD_PRELOAD": ":".join(libraries), "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": f"{here}:{os.path.dirname(here)}",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode != 0  # the last launch writes one element too many
    assert "heap-buffer-overflow" in done.stderr
    assert "fold.cu" in done.stderr
    assert done.stdout.strip() == f"clean {sorted(k.name for k in KERNELS.values())}"


EXAMPLE = Kernel("x.cu", a=In("float32", "N M"), b=Out("int16", "M"), n=Scalar("int32"))
GOOD = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(3, np.int16), "n": 2}
BAD = {
    "missing": ({"n": None}, TypeError, r"missing \['n'\], unknown \['m'\]"),
    "none": ({"a": None}, TypeError, "`a` must be an array of float32, got None"),
    "dtype": ({"b": np.zeros(3)}, TypeError, "`b` must be an array of int16, got float64"),
    "stride": ({"a": np.zeros((3, 2), np.float32).T}, ValueError, "`a` must be C-contiguous, got strides"),
    "rank": ({"a": np.zeros(3, np.float32)}, ValueError, r"`a` must have axes \[N M\], got shape \(3,\)"),
    "axis": ({"b": np.zeros(4, np.int16)}, ValueError, "axis M of `b` must be 3 as in `a`, got 4"),
}


@pytest.mark.parametrize("name", BAD)
def test_bind_names_the_argument(name):
    change, error, text = BAD[name]
    values = {**GOOD, **change}
    if name == "missing":
        del values["n"]
        values["m"] = 1
    with pytest.raises(error, match=text):
        EXAMPLE.bind(values)


@pytest.mark.parametrize("grid", [(1, 65536), (1, 1, 70000), (2**31,)])
def test_more_blocks_than_cuda_can_launch_are_refused(grid):
    blocks = " x ".join(map(str, grid))
    with pytest.raises(
        ValueError, match=f"x: the grid must be at most 2147483647 x 65535 x 65535 blocks, got {blocks};"
    ):
        EXAMPLE.check_grid(grid)
    EXAMPLE.check_grid((2**31 - 1, 65535, 65535))


@pytest.fixture
def stand_in(monkeypatch):
    """A `CudaDevice` without a GPU, and what its kernel was called with."""
    calls = []

    class Function:
        def __call__(self, grid, block, arguments, shared_mem):
            calls.append((grid, arguments, shared_mem, self.max_dynamic_shared_size_bytes))

    class Array(np.ndarray):
        pass

    runtime = SimpleNamespace(getDevice=lambda: 0)
    cupy = SimpleNamespace(ndarray=Array, empty=np.empty, cuda=SimpleNamespace(runtime=runtime))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(device_module, "_properties", lambda ordinal: ("sm_90", 132))
    monkeypatch.setattr(device_module, "_function", lambda *_: Function())
    return (
        CudaDevice(),
        calls,
        {k: v.view(Array) if isinstance(v, np.ndarray) else v for k, v in GOOD.items()},
    )


def test_a_kernel_takes_what_was_declared(stand_in):
    """Scalars of the declared width, null pointers, and leave to use more shared memory than a kernel gets unasked."""
    device, calls, good = stand_in
    kernel = Kernel("x.cu", **EXAMPLE.arguments, c=In("float32", "M", optional=True))
    device.launch(kernel, (3,), (32,), {**good, "c": None}, shared=50_000)
    device.launch(kernel, (0,), (32,), {**good, "c": None})
    [(grid, arguments, shared, most)] = calls
    assert (grid, shared, most) == ((3,), 50_000, 50_000)
    assert arguments[:2] == (good["a"], good["b"])
    assert [(type(x), int(x)) for x in arguments[2:]] == [(np.int32, 2), (np.uintp, 0)]


def test_a_gpu_takes_no_array_of_the_host(stand_in):
    device, calls, good = stand_in
    with pytest.raises(
        TypeError, match=r"x: `b` must be a CuPy array, got ndarray; move it by cupy\.asarray"
    ):
        device.launch(EXAMPLE, (1,), (32,), {**good, "b": np.asarray(good["b"]).view(np.ndarray)})
    with pytest.raises(ValueError, match="x: the grid must be at most"):
        device.launch(EXAMPLE, (1, 70000), (32,), good)
    assert not calls


def test_bind_casts_scalars():
    assert EXAMPLE.bind(GOOD)[2].dtype == np.int32


if __name__ == "__main__":
    record = [register_line(arch, *case) for arch in ARCHITECTURES for case in cases(arch)]
    REGISTERS.write_text("\n".join(["architecture\tkernel\tmacros\tregisters\tshared bytes", *record]) + "\n")
    SEALS.write_text("\n".join(seal(file, record, kernel_dir()) for file in FILES) + "\n")
