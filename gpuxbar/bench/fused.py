"""`python -m gpuxbar.bench.fused`: proof and speed of the reads, updates, wires and a whole training step, on a GPU.

A section for each fused kernel that the device has: checks of it, against the float64 oracle and against cuBLAS + epilogue,
on new memory that holds NaN; where one fails, no number of its reads is given. Then ceilings of the device (what bounds a
read, each alone), and reads as replays of CUDA graphs over inputs that do not fit its cache together, beside their ideal
products and convolutions. Two more sections are steps of ResNet-18, and updates and wires, each after a check of its own: of a
captured step against the same without capture, and of small ones against the oracle. At most 370 s.

What is found is printed and recorded as it comes. A section is a process of its own, of so many seconds at most: an
illegal address, after which CUDA refuses everything in a process, or a kernel that never ends takes nothing with it but
the rest of its section. `compute-sanitizer --tool racecheck python -m gpuxbar.bench.fused --checks` (and memcheck,
initcheck, synccheck) looks at the same small cases, in one process. Not yet run on a GPU; the checks run on the CPU build
of the kernels in the tests.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from math import isqrt, prod
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from gpuxbar import ops, reference
from gpuxbar.bench import ceilings, device_ops
from gpuxbar.bench.cases import OracleMismatch
from gpuxbar.bench.convolution import ideal_convolution_us
from gpuxbar.bench.record import append, environment
from gpuxbar.bench.steps import IDEAL, STEP_SIZE, STEP_TARGET, STEPS, check_steps, time_step
from gpuxbar.bridge.arrays import explain_gpu
from gpuxbar.experiments.messages import show_error
from gpuxbar.launch import CudaDevice, Device, Kernel
from gpuxbar.ops import ConvGeometry
from gpuxbar.ops.tile_mvm_plan import HOPPER, INT8_RATE, Case, Plan, plan_tile_mvm

__all__ = ["CHECKS", "CONVOLUTIONS", "READS", "Read", "Recorder", "Subject", "Target", "check"]

ROOT = Path(__file__).parents[2]
LSB, G_STEP = 2.0**-27, 2.0**-31  # A, S
CACHE_BYTES = 128 << 20  # more than any L2 cache holds
REPLAYS = 20
PRODUCTS = ("fused_tile_mvm", "fused_tile_mvm_sm90", "matmul", "adc_accumulate", "shift_add")
FROM_CODES = (*PRODUCTS, "pack_inputs", "pack_images")
# Strategies of one kernel for any codes; all but the first are Hopper's.
FUSED = ("fused", "wgmma", "cluster")
# What is measured, most wanted first: reads by a fused kernel, training steps, updates and wires; seconds each may take.
SECTIONS = {"fused": 90, "wgmma": 90, "steps": 80, "updates": 50, "cluster": 60}
COMMAND = (sys.executable, "-m", "gpuxbar.bench.fused")
FAILURES = (
    OracleMismatch,
    RuntimeError,
    MemoryError,
)  # wrong results, and what CUDA, cuBLAS or PyTorch refuse
IDEAL_PRODUCT = "ideal"  # among the times of a read: by cuBLAS or cuDNN


@dataclass(frozen=True)
class Target:
    """What a read, its operands packed, is to reach on an H200: us at most, and at least so many times the speed of
    cuBLAS + epilogue."""

    us: float
    speedup: float = 1.0


@dataclass(frozen=True)
class Read:
    """A read to time by every fused kernel that can compute it; `targets` of the kernels that have one.

    `images`: above 0, the rows are the pixels of so many square images, convolved by 3 x 3, whose channels and positions lie
    on the lines in `line_order`. Of bytes ("int8") cuBLAS + epilogue reads the same codes and levels as halves.
    """

    name: str
    rows: int
    inputs: int
    outputs: int
    tile: int = 128
    noise: str = "fast"
    precision: str = "fp16"
    variance: bool = False
    images: int = 0
    line_order: str = "channel_position"
    targets: Mapping[str, Target] = field(default_factory=dict)

    @property
    def conv(self) -> ConvGeometry | None:
        if not self.images:
            return None
        side = isqrt(self.rows // self.images)
        return ConvGeometry(self.inputs // 9, side, side, (3, 3), (1, 1), (1, 1), line_order=self.line_order)

    @property
    def size(self) -> str:
        size = f"{self.rows} x {self.inputs} x {self.outputs}"
        if self.conv is not None:
            side, channels = self.conv.height, self.conv.channels
            size = f"{self.images} images of {side} x {side}, {channels} channels, {self.line_order}"
        return f"{size}, {self.tile}-row tiles, {self.precision}"

    @property
    def case(self) -> Case:
        """What the planner sees."""
        images = None if self.conv is None else (self.images, self.conv.height + 2, self.conv.width + 2, 9)
        return Case(self.rows, 1, self.inputs, self.outputs, 1, self.tile, noise=self.noise, variance=self.variance,
                    precision=self.precision, images=images, line_order=self.line_order)  # fmt: skip

    def plan(self, arch: str, multiprocessors: int, strategy: str = "auto") -> Plan:
        """What the planner chooses, or makes of a strategy."""
        return plan_tile_mvm(self.case, arch, multiprocessors, strategy)

    def kernels(self, of_device: Sequence[str]) -> tuple[str, ...]:
        """The strategies to time, of those that a device has."""
        if self.case.int8:
            return tuple(kernel for kernel in of_device if kernel == FUSED[0])
        return (*of_device, *(_gathering(of_device, self.line_order) if self.images else ()))

    @property
    def top(self) -> int:
        """The largest level: 11 bits of a half, 8 of a byte."""
        return 127 if self.case.int8 else 2047

    def settings(self, strategy: str = "auto") -> dict[str, Any]:
        """Of `ops.tile_mvm`."""
        precision = "fp16" if self.case.int8 and strategy == "epilogue" else self.precision
        noise = {"read_noise": 0.0 if self.noise == "none" else LSB / 2, "generator": self.noise}
        if self.noise == "none":
            noise["generator"] = "exact"
        return {**COMMON, **noise, "tile_rows": self.tile, "precision": precision, "conv": self.conv}

    @property
    def codes_shape(self) -> tuple[int, ...]:
        """Of the DAC codes: a matrix, or images."""
        conv = self.conv
        if conv is None:
            return self.rows, self.inputs
        return self.images, conv.channels, conv.height, conv.width

    def floors(self, rates: Mapping[str, float], kernel: str) -> dict[str, float]:
        """Microseconds that the products, the noise and the memory alone take at the ceilings of a device."""
        conversions = self.rows * self.case.tiles * self.outputs
        products = self.case.terms + self.variance
        operands = prod(self.codes_shape) + self.inputs * self.outputs * products
        multiply = rates["wgmma TFLOP/s" if kernel in HOPPER else "mma.sync TFLOP/s"]
        multiply *= INT8_RATE if self.case.int8 else 1.0
        size = 1 if self.case.int8 else 2
        floors = {
            "products": 2e-6 * self.rows * self.inputs * self.outputs * products / multiply,
            "memory": 1e-3 * (size * operands + 4 * self.rows * self.outputs) / rates["copy GB/s"],
        }
        if self.noise != "none":
            floors["noise"] = 1e-3 * conversions / rates[f"{self.noise} Gnormal/s"]
        return floors


def _gathering(of_device: Sequence[str], line_order: str) -> tuple[str, ...]:
    """The strategies that gather patches in one of these fused kernels."""
    ways = {"implicit": "fused"}
    if line_order == "position_channel":
        ways["implicit-wgmma"] = "wgmma"
    return tuple(way for way, kernel in ways.items() if kernel in of_device)


COMMON: dict[str, Any] = {
    "v_lsb": 2.0**-10, "adc_bits": 8, "adc_lsb": LSB, "g_range": 2.0**-20, "g_step": G_STEP, "g_offset": 130 * G_STEP,
    "seed": 2**40 + 1, "step": 3,
}  # fmt: skip
CUBE = (4096, 4096, 4096)
READS = (
    Read("fast", *CUBE, targets={"fused": Target(430, 2.6), "wgmma": Target(340)}),
    Read("exact", *CUBE, noise="exact", targets={"fused": Target(520, 2.2), "wgmma": Target(390)}),
    Read("adc-only", *CUBE, noise="none"),
    Read("fast-64", *CUBE, 64, targets={"wgmma": Target(640)}),
    Read("fast-256", *CUBE, 256, targets={"wgmma": Target(260)}),
    Read("fast-512", *CUBE, 512, targets={"wgmma": Target(245)}),
    Read("exact-64", *CUBE, 64, noise="exact"),
    Read("exact-256", *CUBE, 256, noise="exact"),
    Read("exact-512", *CUBE, 512, noise="exact"),
    Read("adc-only-64", *CUBE, 64, noise="none"),
    Read("adc-only-256", *CUBE, 256, noise="none", targets={"wgmma": Target(240)}),
    Read("adc-only-512", *CUBE, 512, noise="none"),
    Read("adc-only-512-bytes", *CUBE, 512, noise="none", precision="int8"),
    Read("fast-two-halves", *CUBE, precision="fp16x2", targets={"fused": Target(620), "wgmma": Target(620)}),
    Read("transformer", 8192, 1024, 4096, targets={"wgmma": Target(175)}),
    Read("small-batch", 128, 4096, 4096),
    Read("fast-variance", *CUBE, variance=True, targets={"fused": Target(700, 3.0)}),
)
CONVOLUTIONS = (
    Read("resnet18-layer1", 128 * 32 * 32, 576, 64, images=128),
    Read("resnet18-layer3", 128 * 8 * 8, 2304, 256, images=128),
    Read("resnet50-layer3", 32 * 14 * 14, 2304, 256, images=32),
    Read(
        "resnet50-layer3-by-position",
        32 * 14 * 14,
        2304,
        256,
        images=32,
        line_order="position_channel",
        targets={"implicit-wgmma": Target(28, 2.2)},
    ),
)


@dataclass(frozen=True)
class Subject:
    """A device, how arrays get there and back, and the only fused kernel that is asked for (None: all)."""

    device: Device
    there: Callable[[np.ndarray], Any]
    back: Callable[[Any], np.ndarray]
    only: str | None = None

    @property
    def kernels(self) -> tuple[str, ...]:
        """The fused strategies that are asked for, of those that the device has."""
        return tuple(kernel for kernel in _kernels_of(self.device.arch) if self.only in (None, kernel))

    @property
    def units(self) -> tuple[str, ...]:
        """What bounds them."""
        hopper = any(kernel in HOPPER for kernel in self.kernels)
        return tuple(
            unit for unit in ceilings.units_of(self.device.arch) if hopper or unit != "wgmma TFLOP/s"
        )

    def read(self, codes: np.ndarray, g: np.ndarray, strategy: str, **s: Any) -> np.ndarray:
        moved = {k: self.there(v) if isinstance(v, np.ndarray) else v for k, v in s.items()}
        try:
            y = ops.tile_mvm(self.there(codes), self.there(g), device=self.device, strategy=strategy, **moved)
            return self.back(y)  # waits, so that what a kernel does wrong shows here
        except RuntimeError as error:
            raise RuntimeError(f"{strategy} fails: {error}") from error


def _kernels_of(arch: str) -> tuple[str, ...]:
    return FUSED if arch == "sm_90" else FUSED[:1]


@dataclass
class Recorder:
    """A device that keeps each step, so that it can run again alone, and each array, which a graph needs."""

    inner: Device
    steps: list[tuple[str, Callable[[], None]]] = field(default_factory=list)
    arrays: list[Any] = field(default_factory=list)
    unused: list[Any] = field(default_factory=list)  # zeros that no kernel has taken yet

    def __post_init__(self) -> None:
        self.workspace, self.arch = self.inner.workspace, self.inner.arch
        self.multiprocessors = self.inner.multiprocessors

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        self.arrays.append(self.inner.empty(shape, dtype))
        return self.arrays[-1]

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        self.unused.append(self.inner.zeros(shape, dtype))
        self.arrays.append(self.unused[-1])
        return self.unused[-1]

    def launch(
        self, kernel: Kernel, grid: tuple[int, ...], block: tuple[int, ...], values: Mapping[str, Any],
        macros: Mapping[str, int] | None = None, shared: int = 0,
    ) -> None:  # fmt: skip
        for zeros in [array for array in self.unused if any(array is value for value in values.values())]:
            self._run(kernel.name, partial(zeros.fill, 0))  # a kernel that adds to zeros needs them again
            self.unused = [array for array in self.unused if array is not zeros]
        self._run(kernel.name, partial(self.inner.launch, kernel, grid, block, values, macros, shared))

    def matmul(self, *operands: Any) -> None:
        self._run("matmul", partial(self.inner.matmul, *operands))

    def _run(self, name: str, step: Callable[[], None]) -> None:
        self.steps.append((name, step))
        step()

    def replay(self, names: Sequence[str] = PRODUCTS) -> None:
        """Some steps once more, by default what multiplies and converts; what others packed stays as it is."""
        for name, step in self.steps:
            if name in names:
                step()


# ---- checks


def _operands(rows: int, inputs: int, outputs: int, top: int = 2047) -> tuple[np.ndarray, np.ndarray]:
    """Codes, and conductances that fp16 holds exactly."""
    rng = np.random.default_rng(rows + inputs + outputs)
    codes = rng.integers(-127, 128, (rows, inputs)).astype(np.int16)
    return codes, (rng.integers(-top, top + 1, (1, inputs, outputs)) * G_STEP).astype(np.float32)


def _variance(codes: np.ndarray, g: np.ndarray, s: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    """Codes and noise variances whose products bf16 holds, where settings ask for a variance."""
    if "noise_var" not in s:
        return codes, s
    levels = np.rint(127 / np.abs(g).max() * np.abs(g)).astype(np.float32)
    return codes % 16, {**s, "noise_var": levels * np.float32(s["noise_var"])}


ODD_SHAPES = ((1, 1, 1, 64), (3, 70, 9, 64), (131, 333, 257, 100), (257, 640, 130, 512))
WAYS: dict[str, dict[str, Any]] = {
    "adc": {},
    "exact": {"read_noise": LSB / 3},
    "fast": {"read_noise": LSB / 3, "generator": "fast"},
    "two halves": {"precision": "fp16x2"},
    "streams": {"stream_bits": 4, "streams": 2, "read_noise": LSB / 3},
    "variance": {"read_noise": LSB / 3, "noise_var": 2.0**-52},
}
ODD_CONVOLUTIONS = (  # geometry, images, outputs, lines of a tile; the last ones as timed
    (ConvGeometry(5, 9, 7, (3, 2), (2, 1), (1, 1)), 3, 9, 20),
    (ConvGeometry(8, 6, 5, (3, 2), (2, 1), (1, 1), (1, 2), "position_channel"), 3, 9, 24),
    (ConvGeometry(16, 6, 5, (3, 3), (1, 1), (1, 1), (1, 2)), 2, 70, 64),
    (ConvGeometry(256, 14, 14, (3, 3), (1, 1), (1, 1)), 2, 256, 128),
    (ConvGeometry(256, 14, 14, (3, 3), (1, 1), (1, 1), line_order="position_channel"), 2, 256, 128),
)


def _matches_the_oracle(subject: Subject) -> str:
    worst = 0.0
    for rows, inputs, outputs, tile in ODD_SHAPES:
        codes, g = _operands(rows, inputs, outputs)
        for way, changes in WAYS.items():
            driven, s = _variance(codes, g, {**COMMON, **changes})
            weight = 2 ** (s.get("stream_bits", 0) * (s.get("streams", 1) - 1))
            name = f"{way}, {rows} x {inputs} x {outputs}"
            worst = max(
                worst, _against_the_oracle(subject, subject.kernels, driven, g, tile, weight, name, s)
            )
    return f"at most {worst:.1e} of the codes fell to the other side of a rounding edge"


def _convolutions_match_the_oracle(subject: Subject) -> str:
    worst = 0.0
    for conv, images, outputs, tile in ODD_CONVOLUTIONS:
        _, g = _operands(1, conv.inputs, outputs)
        codes, _ = _operands(images * conv.channels, conv.height * conv.width, 1)
        codes = codes.reshape(images, conv.channels, conv.height, conv.width)
        for way in ("exact", "fast"):
            s = {**COMMON, **WAYS[way], "conv": conv}
            name = f"{way}, {conv.channels} channels of {conv.height} x {conv.width}, {conv.line_order}"
            kernels = (*subject.kernels, *_gathering(subject.kernels, conv.line_order))
            worst = max(worst, _against_the_oracle(subject, kernels, codes, g, tile, 1, name, s))
    return f"at most {worst:.1e} of the codes fell to the other side of a rounding edge"


def _bytes_match_the_oracle(subject: Subject) -> str:
    """Of whole levels around an offset, which only the first fused kernel multiplies as bytes."""
    if FUSED[0] not in subject.kernels:
        return f"{FUSED[0]} alone multiplies them"
    worst = 0.0
    for rows, inputs, outputs, tile in ODD_SHAPES:
        codes, g = _operands(rows, inputs, outputs, top=127)
        g += np.float32(COMMON["g_offset"])
        for way in ("adc", "fast"):
            s = {**COMMON, **WAYS[way], "precision": "int8"}
            name = f"{way}, bytes, {rows} x {inputs} x {outputs}"
            worst = max(worst, _against_the_oracle(subject, FUSED[:1], codes, g, tile, 1, name, s))
    return f"at most {worst:.1e} of the codes fell to the other side of a rounding edge"


def _against_the_oracle(
    subject: Subject, kernels: Sequence[str], codes: np.ndarray, g: np.ndarray, tile: int, weight: int, name: str,
    s: dict[str, Any],
) -> float:  # fmt: skip
    """The largest share of results of a kernel that differ."""
    oracle = {
        key: value for key, value in s.items() if key not in ("precision", "g_range", "g_step", "g_offset")
    }
    expected = reference.tile_mvm(codes, g, tile=tile, **oracle)
    s = {"precision": "fp16", **s}
    return max(
        _edges(subject.read(codes, g, kernel, tile_rows=tile, **s), expected, weight, f"{kernel}, {name}")
        for kernel in kernels
    )


def _edges(y: np.ndarray, expected: np.ndarray, weight: int, name: str) -> float:
    """Share of the results that differ: by one code, on a rounding edge."""
    off = np.abs(y - expected) / LSB
    differ = off > 0.01
    parts = differ & ((np.abs(off - np.rint(off)) > 0.01) | (off > weight + 0.01))
    if not np.isfinite(y).all() or parts.any() or differ.sum() > max(1, 2e-3 * y.size):
        raise OracleMismatch(
            f"{differ.sum()} of {y.size} results are off ({name}), {parts.sum()} of them by more than a code or by "
            f"parts of one; the largest by {off.max():.2g} codes"
        )
    return float(differ.mean()) if y.size > 1000 else 0.0


def _repeats(subject: Subject) -> str:
    codes, g = _operands(131, 333, 257)
    s = {**COMMON, **WAYS["exact"], "precision": "fp16", "tile_rows": 64}
    for kernel in subject.kernels:
        first, second = (subject.read(codes, g, kernel, **s) for _ in range(2))
        _same_bits(first, second, f"a second run of {kernel}")
    return "same bits"


def _equals_the_epilogue(subject: Subject) -> str:
    """Where partial sums are integers, sums are exact in any order."""
    codes, g = _operands(150, 320, 250, top=15)
    for way, changes in WAYS.items():
        s = {
            **COMMON,
            "precision": "fp16",
            **changes,
            "tile_rows": 64,
            "g_range": 2.0**-27,
            "adc_lsb": 2.0**-33,
        }
        if "read_noise" in s:
            s["read_noise"] = 2.0**-33
        if "noise_var" in s:
            s["noise_var"] *= 2.0**-12
        driven, s = _variance(codes, g, s)
        expected = subject.read(driven, g, "epilogue", **s)
        for kernel in subject.kernels:
            _same_bits(subject.read(driven, g, kernel, **s), expected, f"cuBLAS + epilogue ({kernel}, {way})")
    return "same bits"


def _same_bits(y: np.ndarray, other: np.ndarray, name: str) -> None:
    off = np.count_nonzero(y != other)
    if off or not np.isfinite(y).all() or np.unique(y).size < 8:
        raise OracleMismatch(f"{off} of {y.size} results are not those of {name}")


def _noise_is_normal(subject: Subject) -> str:
    """Without inputs a read is its noise: five standard errors of mean, variance, kurtosis and neighbours."""
    codes, g = np.zeros((512, 64), np.int16), np.zeros((1, 64, 256), np.float32)
    sigma, worst = 20.0, 0.0  # steps
    for kernel, generator in product(subject.kernels, ("exact", "fast")):
        s = {**COMMON, "adc_bits": 16, "read_noise": sigma * LSB, "generator": generator, "precision": "fp16"}
        draws = [subject.read(codes, g, kernel, **{**s, "step": step}) / LSB for step in (3, 4)]
        z = draws[0] / np.sqrt(sigma**2 + 1 / 12)
        root = np.sqrt(z.size)
        scores = {
            "mean": z.mean() * root,
            "variance": ((z**2).mean() - 1) * root / np.sqrt(2),
            "kurtosis": ((z**4).mean() - 3) * root / np.sqrt(96),
            "columns": (z[:, 1:] * z[:, :-1]).mean() * root,
            "rows": (z[1:] * z[:-1]).mean() * root,
            "steps": (z * draws[1] / sigma).mean() * root,
        }
        name = max(scores, key=lambda key: abs(scores[key]))
        if not abs(scores[name]) < 5:
            raise OracleMismatch(
                f"{generator} noise of {kernel}: its {name} lies {scores[name]:.1f} standard errors off"
            )
        worst = max(worst, abs(scores[name]))
    return f"within {worst:.1f} standard errors"


def _ceilings_compute(subject: Subject) -> str:
    return ceilings.check(subject.device, subject.there, subject.back, subject.units)


CHECKS: dict[str, Callable[[Subject], str]] = {
    "matches the float64 oracle": _matches_the_oracle,
    "convolutions": _convolutions_match_the_oracle,
    "bytes": _bytes_match_the_oracle,
    "two runs": _repeats,
    "fused and cuBLAS + epilogue": _equals_the_epilogue,
    "noise": _noise_is_normal,
    "ceilings": _ceilings_compute,
}


def check(subject: Subject, say: Callable[[str], object] = lambda line: None) -> dict[str, str]:
    """What every check found; each is said as it comes.

    Raises:
        OracleMismatch: One failed; the message names all that did.
    """
    found, red = {}, []
    for name, run in CHECKS.items():
        try:
            found[name] = run(subject)
        except FAILURES as error:
            red.append(f"{name}: {error}")
        say(f"{name}: {found.get(name, 'FAILED')}")
    if red:
        raise OracleMismatch("; ".join(red))
    return found


# ---- timing


def _gpu(only: str | None = None, exact: bool = False) -> Subject:
    """CuPy's current device; new memory holds NaN, or what it held (`exact`), and is then no larger than asked for."""
    import cupy

    if exact:
        cupy.cuda.set_allocator(None)  # not from a pool, whose blocks a sanitizer takes for one

    def empty(shape: tuple[int, ...], dtype: str) -> Any:
        array = cupy.empty(shape, dtype)
        if array.nbytes and not exact:
            array.data.memset_async(0xFF, array.nbytes)
        return array

    return Subject(CudaDevice(empty), cupy.asarray, cupy.asnumpy, only)


def _replays_us(calls: Sequence[Callable[[], object]]) -> float:
    """Median time of one call, in a CUDA graph of all of them."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    with stream:
        for call in calls:
            call()
        stream.begin_capture()
        for call in calls:
            call()
        graph = stream.end_capture()
        graph.launch(stream)
        times = []
        for _ in range(REPLAYS):
            start.record(stream)
            graph.launch(stream)
            stop.record(stream)
            stop.synchronize()
            times.append(cupy.cuda.get_elapsed_time(start, stop))
    return 1e3 * median(times) / len(calls)


def _ceilings(units: Sequence[str]) -> dict[str, float]:
    """What the device sustains: a copy, GB/s, a half-precision product by cuBLAS, TFLOP/s, and what bounds a read."""
    import cupy

    words = cupy.zeros(1 << 28, "int32")
    half = words.size // 2
    copy = _replays_us([lambda: words[half:].data.copy_from_device_async(words.data, 4 * half)])
    n, device = 4096, CudaDevice()
    a, c = cupy.zeros((4, n, n), "float16"), cupy.zeros((n, n), "float32")
    shape, strides, lds = (1, n, n, n), (0, 0, 0), (n, n, n)
    products = [
        partial(device.matmul, a[i], a[i - 1], c, shape, strides, lds, 1.0, 0.0, "fp16") for i in range(4)
    ]
    limits = {"copy GB/s": 8e-3 * half / copy, "cuBLAS TFLOP/s": 2e-6 * n**3 / _replays_us(products)}
    return limits | ceilings.measure(device, cupy.asarray, _replays_us, units)


def _time(read: Read, kernels: Sequence[str]) -> dict[str, dict[str, float]]:
    """Microseconds of a read by every fused kernel, and by cuBLAS + epilogue: with its operands packed ("read"), with
    its codes packed or unfolded too ("from codes") and, fused, of a whole call ("call"); and of the ideal product."""
    import cupy

    # every call packs operands of its own: together they do not fit the cache
    size = 1 if read.case.int8 else 2
    count = max(2, -(-CACHE_BYTES // (size * (prod(read.codes_shape) + read.inputs * read.outputs))))
    rng = np.random.default_rng(0)
    inputs = [cupy.asarray(rng.integers(-127, 128, read.codes_shape).astype(np.int16)) for _ in range(count)]
    levels = rng.integers(-read.top, read.top + 1, (read.inputs, read.outputs))
    g = cupy.asarray((levels * G_STEP + (COMMON["g_offset"] if read.case.int8 else 0.0)).astype(np.float32))
    variance = {"noise_var": cupy.abs(g) * 2.0**-30} if read.variance else {}
    times = {}
    for strategy in (*kernels, "epilogue"):
        recorders = [Recorder(CudaDevice()) for _ in inputs]
        settings = read.settings(strategy) | variance
        call = partial(_call, g, strategy, settings)

        for codes, recorder in zip(inputs, recorders, strict=True):
            call(codes, recorder)
        times[strategy] = {
            "read": _replays_us([recorder.replay for recorder in recorders]),
            "from codes": _replays_us([partial(recorder.replay, FROM_CODES) for recorder in recorders]),
        }
        if strategy in kernels:
            kept = Recorder(CudaDevice())
            times[strategy]["call"] = _replays_us([partial(call, codes, kept) for codes in inputs])
    if read.conv is None:
        us = _ideal_product_us(read, inputs, g)
    else:
        us = ideal_convolution_us(
            read.conv, cupy.asnumpy(inputs[0]), cupy.asnumpy(g) / G_STEP, count, REPLAYS
        )
    times[IDEAL_PRODUCT] = {"read": us}
    return times


def _call(g: Any, strategy: str, settings: dict[str, Any], codes: Any, device: Device) -> Any:
    return ops.tile_mvm(codes, g, device=device, strategy=strategy, **settings)


def _ideal_product_us(read: Read, inputs: Sequence[Any], g: Any) -> float:
    """The bare product by cuBLAS."""
    import cupy

    sums = cupy.empty((read.rows, read.outputs), "float32")
    shape, lds = (1, read.rows, read.outputs, read.inputs), (read.inputs, read.outputs, read.outputs)
    right = [g.astype("float16") for _ in inputs]
    return _replays_us([
        partial(CudaDevice().matmul, codes.astype("float16"), b, sums, shape, (0, 0, 0), lds, 1.0, 0.0, "fp16")
        for codes, b in zip(inputs, right, strict=True)
    ])  # fmt: skip


app = typer.Typer(add_completion=False)


@app.command()
def main(
    record: Annotated[Path | None, typer.Option(help="JSON-lines file to append the rows to.")] = None,
    checks: Annotated[
        bool,
        typer.Option("--checks", help="Check only, in memory of exact size: for compute-sanitizer."),
    ] = False,
    section: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help=f"One of {', '.join(SECTIONS)}, in this process; by default each in one of its own.",
        ),
    ] = None,
) -> None:
    """Prove and time the fused reads, updates, wires and a training step on this machine's GPU."""
    report = Report(Console(), record)
    try:
        arch = _arch()
        names = _sections(section or [], arch, checks)
        report.about = {"gpu": _gpu_name(), **environment(ROOT)}
    except (OSError, ValueError) as error:
        show_error(error)
        raise typer.Exit(2) from error
    if checks:
        for only in [name for name in names if name in FUSED] if section else [None]:
            _reads(report, only, checks=True)
        if "updates" in names:
            _updates(report, checks=True)
    else:
        for name in names:
            if not section:
                report.attempt(name, partial(_in_its_own_process, name, record))
            elif name in FUSED:
                _reads(report, name)
            else:
                {"steps": _steps, "updates": _updates}[name](report)
    if report.failed:
        raise typer.Exit(2)


def _arch() -> str:
    """Of the GPU, which this asks for."""
    kind, why = explain_gpu()
    if kind != "cuda":
        raise OSError(f"bench: `device` must be an NVIDIA GPU, got none ({why}); run on a machine with one")
    return CudaDevice().arch


def _sections(wanted: Sequence[str], arch: str, checks: bool) -> list[str]:
    """Those wanted, or all that a device has; of checks alone, all but the steps, which have none in exact memory."""
    there = [name for name in SECTIONS if name not in FUSED or name in _kernels_of(arch)]
    way = ""
    if checks:
        there.remove("steps")
        way = " with --checks"
    for name in wanted:
        if name not in there:
            raise ValueError(
                f"bench: `section` must be one of {', '.join(there)} on {arch}{way}, got {name!r}; leave it out to run all"
            )
    return list(wanted) or there


def _in_its_own_process(name: str, record: Path | None) -> None:
    rows = [] if record is None else ["--record", str(record)]
    try:
        done = subprocess.run([*COMMAND, "--section", name, *rows], timeout=SECTIONS[name], check=False)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(
            f"ended after {SECTIONS[name]} s, unfinished; what it found before is recorded"
        ) from error
    if done.returncode:
        raise RuntimeError(
            f"its process ended with status {done.returncode}; the first error of it is the one to see"
        )


@dataclass
class Report:
    """What was found, printed and recorded as it comes."""

    console: Console
    record: Path | None
    about: dict[str, Any] = field(default_factory=dict)
    failed: bool = False

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    def attempt(self, name: str, run: Callable[[], Any], say: bool = False) -> Any:
        """What it gives, said if asked for; None, and its error on the screen, if it fails.

        Of an error that is no device's, a mistake in Python, the trace is shown too; what comes after it may still be right.
        """
        try:
            found = run()
        except Exception as error:
            self.failed = True
            show_error(OracleMismatch(f"{name}: {error}"))
            if not isinstance(error, FAILURES):
                self.console.print_exception()
            return None
        if say:
            self.say(f"{name}: {found}")
        return found

    def add(self, row: dict[str, Any]) -> None:
        if self.record is not None:
            append(self.record, row | self.about)


def _gpu_name() -> str:
    import cupy

    name: bytes = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"]
    return name.decode()


def _reads(report: Report, only: str | None, checks: bool = False) -> None:
    """Of a fused kernel, or of all."""
    name, subject = f"reads by {only or 'all kernels'}", _gpu(only, exact=checks)
    if report.attempt(name, lambda: check(subject, report.say)) and not checks:
        report.attempt(f"{name}: ceilings", lambda: _time_reads(report, subject))


def _updates(report: Report, checks: bool = False) -> None:
    subject = _gpu(exact=checks)
    arrays = subject.device, subject.there, subject.back
    if report.attempt("updates and wires", lambda: device_ops.check(*arrays), say=True) and not checks:
        _time_others(report, subject)


def _steps(report: Report) -> None:
    if report.attempt("captured steps", check_steps, say=True):
        _time_steps(report)


def _time_reads(report: Report, subject: Subject) -> None:
    """Print and record the ceilings, and every read beside them."""
    limits = _ceilings(subject.units)
    report.about["ceilings"] = limits
    bounds = Table("ceiling", "rate", title=f"{report.about['gpu']}: each alone")
    for name, rate in limits.items():
        bounds.add_row(name, f"{rate:.0f}")
    report.console.print(bounds)
    reads = Table(
        "read", "size", "kernel", "us", "target (H200)", "of its ceiling", "x cuBLAS + epilogue", "x ideal", "from codes",
        "call", "plan", title="reads, us",
    )  # fmt: skip
    device = subject.device
    for read in (*READS, *CONVOLUTIONS):
        kernels = read.kernels(subject.kernels)
        if not kernels:
            continue
        us = report.attempt(read.name, partial(_time, read, kernels))
        if us is None:
            continue
        report.say(f"{read.name}: " + ", ".join(f"{way} {times['read']:.0f} us" for way, times in us.items()))
        plan = read.plan(device.arch, device.multiprocessors)
        floors = {kernel: read.floors(limits, kernel) for kernel in kernels}
        for kernel in kernels:
            cells = _cells(us, kernel, read.targets.get(kernel), floors[kernel])
            reads.add_row(read.name, read.size, kernel, *cells, plan.strategy)
        targets = {kernel: vars(target) for kernel, target in read.targets.items()}
        report.add(
            {"case": read.name, "size": read.size, "us": us, "floors": floors, "targets": targets, "plan": plan.strategy}
        )  # fmt: skip
    report.console.print(reads)


def _time_others(report: Report, subject: Subject) -> None:
    """Print and record what noise and ADC behind cuBLAS's product, updates and wires take."""
    table = Table("what", "size", "us", "target (H200)", title="conversions, updates and wires")
    timed: list[tuple[str, str, float | None, Callable[[], float]]]
    timed = [("noise and ADC behind the product", READS[0].size, None, partial(_conversions_us, READS[0]))]
    timed += [(op.name, op.size, op.target_us, partial(_op_us, op, subject)) for op in device_ops.TIMED]
    for name, size, target, run in timed:
        us = report.attempt(name, run)
        if us is not None:
            missed = target is not None and us > target
            table.add_row(
                name, size, f"{us:.0f}{' (missed)' * missed}", "" if target is None else f"<= {target:g}"
            )
            report.say(f"{name}: {us:.0f} us")
            report.add({"case": name, "size": size, "us": us, "target": target})
    report.console.print(table)


def _op_us(op: device_ops.Timed, subject: Subject) -> float:
    return _replays_us([op.build(CudaDevice(), subject.there)])


def _conversions_us(read: Read) -> float:
    """Of what follows cuBLAS's product: every partial sum is read once, and converted."""
    import cupy

    rng, recorder = np.random.default_rng(0), Recorder(CudaDevice())
    codes = cupy.asarray(rng.integers(-127, 128, read.codes_shape).astype(np.int16))
    g = cupy.asarray(
        (rng.integers(-read.top, read.top + 1, (read.inputs, read.outputs)) * G_STEP).astype(np.float32)
    )
    _call(g, "epilogue", read.settings("epilogue"), codes, recorder)
    return _replays_us([partial(recorder.replay, ("adc_accumulate",))])


def _time_steps(report: Report) -> None:
    """Print and record every step of ResNet-18."""
    steps = Table(title="training steps of ResNet-18 (32 x 32) in CUDA graphs")
    for head in ("step", "ms", "of ideal", "target (H200)"):
        steps.add_column(head)
    found: dict[str, float] = {}
    for kind in STEPS:
        ms = report.attempt(kind, partial(time_step, kind))
        if ms is None:
            continue
        found[kind] = ms
        ratio, target = "", ""
        if kind != IDEAL and IDEAL in found:
            times = ms / found[IDEAL]
            ratio, target = f"{times:.2f}{' (missed)' * (times > STEP_TARGET)}", f"<= {STEP_TARGET:g}"
        steps.add_row(kind, f"{ms:.2f}", ratio, target)
        report.add({"case": f"resnet18-step, {kind}", "size": STEP_SIZE, "ms": ms, "target": STEP_TARGET})
    report.console.print(steps)


def _cells(
    us: dict[str, dict[str, float]], kernel: str, target: Target | None, floors: dict[str, float]
) -> tuple[str, ...]:
    """Time, target, share of the highest floor, speed relative to cuBLAS + epilogue and to the ideal product, and times
    with codes and with conductances packed too."""
    mine, bound = us[kernel]["read"], max(floors, key=lambda name: floors[name])
    speedup, share = us["epilogue"]["read"] / mine, us[IDEAL_PRODUCT]["read"] / mine
    goal = "" if target is None else f"<= {target.us:g}" + f", {target.speedup:g} x" * (target.speedup > 1)
    missed = target is not None and (mine > target.us or speedup < target.speedup)
    return (
        f"{mine:.0f}{' (missed)' * missed}", goal, f"{floors[bound] / mine:.0%} of {bound}", f"{speedup:.2f}",
        f"{share:.2f}", f"{us[kernel]['from codes']:.0f}", f"{us[kernel]['call']:.0f}",
    )  # fmt: skip


if __name__ == "__main__":
    app()
