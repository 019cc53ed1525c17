"""The reads that are timed on a GPU, and what they are to reach there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isqrt, prod
from typing import Any

from gpuxbar.ops import ConvGeometry
from gpuxbar.ops.tile_mvm_case import HOPPER, Case, Plan
from gpuxbar.ops.tile_mvm_plan import plan_tile_mvm
from gpuxbar.ops.tile_mvm_times import INT8_RATE

__all__ = [
    "COMMON",
    "CONVOLUTIONS",
    "FUSED",
    "G_STEP",
    "LSB",
    "READS",
    "Read",
    "Target",
    "gathering",
    "kernels_of",
]

LSB, G_STEP = 2.0**-27, 2.0**-31  # A, S
# Strategies of one kernel for any codes; all but the first are Hopper's.
FUSED = ("fused", "wgmma", "cluster")


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
        if self.case.int8 or self.case.bf16:
            return tuple(kernel for kernel in of_device if kernel == FUSED[0])
        return (*of_device, *(gathering(of_device, self.line_order) if self.images else ()))

    @property
    def top(self) -> int:
        """The largest level: 11 bits of a half, 8 of a byte or of bf16."""
        return 127 if self.case.int8 or self.case.bf16 else 2047

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


def gathering(of_device: Sequence[str], line_order: str) -> tuple[str, ...]:
    """The strategies that gather patches in one of these fused kernels."""
    ways = {"implicit": "fused"}
    if line_order == "position_channel":
        ways["implicit-wgmma"] = "wgmma"
    return tuple(way for way, kernel in ways.items() if kernel in of_device)


def kernels_of(arch: str) -> tuple[str, ...]:
    return FUSED if arch == "sm_90" else FUSED[:1]


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
    Read("fast-bf16", *CUBE, precision="bf16"),
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
