"""Times of reads, and of what bounds them, on this machine's GPU: replays of CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from statistics import median
from typing import Any

import numpy as np

from gpuxbar import ops
from gpuxbar.bench.gpu import ceilings
from gpuxbar.bench.gpu.convolution import ideal_convolution_us
from gpuxbar.bench.gpu.reads import COMMON, G_STEP, Read
from gpuxbar.launch import CudaDevice, Device, Kernel

__all__ = [
    "FROM_CODES",
    "IDEAL_PRODUCT",
    "PRODUCTS",
    "Recorder",
    "conversions_us",
    "measure_ceilings",
    "median_us",
    "replays_us",
    "time_read",
]

CACHE_BYTES = 128 << 20  # more than any L2 cache holds
REPLAYS = 20
PRODUCTS = ("fused_tile_mvm", "fused_tile_mvm_sm90", "matmul", "adc_accumulate", "shift_add")
FROM_CODES = (*PRODUCTS, "pack_inputs", "pack_images")
IDEAL_PRODUCT = "ideal"  # among the times of a read: by cuBLAS or cuDNN


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


def median_us(run: Callable[[], object]) -> float:
    """Median time of a call, by events on the current stream, once it has been called."""
    import cupy

    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    run()
    times = []
    for _ in range(REPLAYS):
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, stop))
    return 1e3 * median(times)


def replays_us(calls: Sequence[Callable[[], object]]) -> float:
    """Median time of one call, in a CUDA graph of all of them."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        for call in calls:
            call()
        stream.begin_capture()
        for call in calls:
            call()
        return median_us(partial(stream.end_capture().launch, stream)) / len(calls)


def measure_ceilings(units: Sequence[str]) -> dict[str, float]:
    """What the device sustains: a copy, GB/s, a half-precision product by cuBLAS, TFLOP/s, and what bounds a read."""
    import cupy

    words = cupy.zeros(1 << 28, "int32")
    half = words.size // 2
    copy = replays_us([lambda: words[half:].data.copy_from_device_async(words.data, 4 * half)])
    n, device = 4096, CudaDevice()
    a, c = cupy.zeros((4, n, n), "float16"), cupy.zeros((n, n), "float32")
    shape, strides, lds = (1, n, n, n), (0, 0, 0), (n, n, n)
    products = [
        partial(device.matmul, a[i], a[i - 1], c, shape, strides, lds, 1.0, 0.0, "fp16") for i in range(4)
    ]
    limits = {"copy GB/s": 8e-3 * half / copy, "cuBLAS TFLOP/s": 2e-6 * n**3 / replays_us(products)}
    return limits | ceilings.measure(device, cupy.asarray, replays_us, units)


def time_read(read: Read, kernels: Sequence[str]) -> dict[str, dict[str, float]]:
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
            "read": replays_us([recorder.replay for recorder in recorders]),
            "from codes": replays_us([partial(recorder.replay, FROM_CODES) for recorder in recorders]),
        }
        if strategy in kernels:
            kept = Recorder(CudaDevice())
            times[strategy]["call"] = replays_us([partial(call, codes, kept) for codes in inputs])
    if read.conv is None:
        us = _ideal_product_us(read, inputs, g)
    else:
        us = ideal_convolution_us(
            read.conv, cupy.asnumpy(inputs[0]), cupy.asnumpy(g) / G_STEP, count, median_us
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
    return replays_us([
        partial(CudaDevice().matmul, codes.astype("float16"), b, sums, shape, (0, 0, 0), lds, 1.0, 0.0, "fp16")
        for codes, b in zip(inputs, right, strict=True)
    ])  # fmt: skip


def conversions_us(read: Read) -> float:
    """Of what follows cuBLAS's product: every partial sum is read once, and converted."""
    import cupy

    rng, recorder = np.random.default_rng(0), Recorder(CudaDevice())
    codes = cupy.asarray(rng.integers(-127, 128, read.codes_shape).astype(np.int16))
    g = cupy.asarray(
        (rng.integers(-read.top, read.top + 1, (read.inputs, read.outputs)) * G_STEP).astype(np.float32)
    )
    _call(g, "epilogue", read.settings("epilogue"), codes, recorder)
    return replays_us([partial(recorder.replay, ("adc_accumulate",))])
