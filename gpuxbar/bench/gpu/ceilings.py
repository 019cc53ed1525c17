"""What bounds a fused read, each measured alone: generators of noise, and products of tensor cores (kernels/ceilings.cu).

`measure` gives rates; `check` holds what was computed against NumPy, so that a rate is that of the work it names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from gpuxbar.bench.cases import OracleMismatch
from gpuxbar.launch import Device, In, Kernel, Out, Scalar
from gpuxbar.reference.random import normals, philox

__all__ = ["KERNELS", "UNITS", "Unit", "check", "measure", "units_of"]

THREADS, ROUNDS, SEED = 256, 4096, 2**40 + 1
BLOCKS = 8  # a multiprocessor: more than it holds at a time
CHAINS = 8  # products of a warp in a round of mma.sync
PANEL = (128, 64)  # kernels/include/gpuxbar/panels.cuh

_ARGUMENTS: dict[str, Any] = {
    "a": In("float16", optional=True),
    "out": Out("uint32"),
    "seed": Scalar("uint64"),
    "rounds": Scalar("int32"),
}
CEILINGS = Kernel("ceilings.cu", **_ARGUMENTS)
CEILINGS_SM90 = Kernel("ceilings.cu", arch="sm_90a", **_ARGUMENTS)
KERNELS = (CEILINGS,)


@dataclass(frozen=True)
class Unit:
    """Something that bounds a read.

    Attributes:
        number: The macro UNIT of kernels/ceilings.cu.
        operations: Of a thread in a round.
        scale: Operations in one of the rate's unit.
        operand: Shape of what is multiplied by its own transpose; None: nothing is.
        error: Of a round of a thread, in float32.
    """

    number: int
    operations: int
    scale: float = 1e9
    operand: tuple[int, int] | None = None
    error: float = 0.0

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory."""
        return 1024 + 2 * PANEL[0] * PANEL[1] + 8 if self.operand == PANEL else 0


UNITS = {
    "Philox-10 Gword/s": Unit(0, 4),
    "exact Gnormal/s": Unit(1, 4, error=1e-5),
    "fast Gnormal/s": Unit(2, 8, error=1e-5),
    "mma.sync TFLOP/s": Unit(3, CHAINS * 2 * 16 * 8 * 16 // 32, 1e12, (16, 16)),
    "wgmma TFLOP/s": Unit(4, 2 * 64 * 128 * 64 // 128, 1e12, PANEL),
}


def units_of(arch: str) -> list[str]:
    """The units that an architecture has."""
    lacking = set() if arch == "sm_90" else {"wgmma TFLOP/s"}
    if int(arch.removeprefix("sm_")) < 80:
        lacking.add("mma.sync TFLOP/s")
    return [name for name in UNITS if name not in lacking]


def measure(
    device: Device, there: Callable[[np.ndarray], Any], time_us: Callable[[Sequence[Callable[[], object]]], float],
    units: Sequence[str],
) -> dict[str, float]:  # fmt: skip
    """The rates of some units that the device has; `time_us` times calls on the device."""
    found = {}
    for name in units:
        unit, blocks = UNITS[name], BLOCKS * device.multiprocessors
        operand = None if unit.operand is None else there(_packed(_operand(unit.operand)))
        out = device.empty((blocks * THREADS,), "uint32")
        us = time_us([partial(_launch, device, unit, operand, out, ROUNDS)])
        found[name] = blocks * THREADS * ROUNDS * unit.operations / (1e-6 * us * unit.scale)
    return found


def check(
    device: Device, there: Callable[[np.ndarray], Any], back: Callable[[Any], np.ndarray], units: Sequence[str],
    blocks: int = 2, rounds: int = 5,
) -> str:  # fmt: skip
    """What some units compute that the device has.

    Raises:
        OracleMismatch: It is not what NumPy computes.
    """
    worst = 0.0
    for name in units:
        unit = UNITS[name]
        operand = None if unit.operand is None else _operand(unit.operand)
        out = device.empty((blocks * THREADS,), "uint32")
        _launch(device, unit, None if operand is None else there(_packed(operand)), out, rounds)
        got, expected = back(out), _expected(unit, operand, blocks, rounds)
        if unit.number:
            got = got.view(np.float32)
        off = np.abs(got.astype(np.float64) - expected).max()
        if not off <= unit.error * rounds:
            raise OracleMismatch(f"{name}: off by {off:.2g} from NumPy")
        worst = max(worst, float(off))
    return f"off by {worst:.1g} at most"


def _launch(device: Device, unit: Unit, operand: Any, out: Any, rounds: int) -> None:
    kernel = CEILINGS_SM90 if unit.operand == PANEL else CEILINGS
    values = {"a": operand, "out": out, "seed": SEED, "rounds": rounds}
    grid = (out.size // THREADS,)
    device.launch(kernel, grid, (THREADS,), values, {"UNIT": unit.number}, shared=unit.shared)


def _operand(shape: tuple[int, int]) -> np.ndarray:
    """Eighths up to 1: sums of their products are exact."""
    return (np.random.default_rng(0).integers(-8, 9, shape) / 8).astype(np.float16)


def _packed(operand: np.ndarray) -> np.ndarray:
    """The matrix as it lies in memory: a panel has the chunks of its rows in the order of the swizzle."""
    if operand.shape != PANEL:
        return operand
    rows = np.arange(PANEL[0])[:, None]
    panel = np.empty((PANEL[0], 8, 8), np.float16)
    panel[rows, np.arange(8) ^ rows % 8] = operand.reshape(panel.shape)
    return panel.reshape(PANEL)


def _expected(unit: Unit, operand: np.ndarray | None, blocks: int, rounds: int) -> np.ndarray:
    """What every thread finds."""
    threads = blocks * THREADS
    if operand is None:
        if unit.number == 0:
            c = np.zeros((threads, 4), np.uint32)
            c[:, 0] = np.arange(threads)
            for _ in range(rounds):
                c = philox(c, SEED)
            return np.bitwise_xor.reduce(c, axis=1).astype(np.float64)
        generator, each = ("exact", "fast")[unit.number - 1], unit.operations
        z = normals(np.arange(rounds), each * threads, purpose=0, seed=SEED, generator=generator)
        return z.reshape(rounds, threads, each).sum((0, 2))
    v = operand.astype(np.float64)
    if operand.shape == PANEL:  # warpgroup, warp, half, row, part, pair, column: see wgmma.cuh
        sums = (v @ v.T).reshape(2, 4, 2, 8, 16, 4, 2).sum((2, 4, 6)).ravel()
    else:  # half, row, pair, column: see mma.cuh
        sums = CHAINS * (v @ v[:8].T).reshape(2, 8, 4, 2).sum((0, 3)).ravel()
    return rounds * np.tile(sums, threads // sums.size)
