"""How long a read takes on a GPU, by the rates of `tuning.tsv`, whose rows say whether they are measured or estimated."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from gpuxbar.ops.fused_layout import BLOCK_M, at_or_below
from gpuxbar.ops.tile_mvm_case import GATHERING, HOPPER, Case, Plan

__all__ = ["INT8_RATE", "Rates", "epilogue_us", "fused_us", "kernel_us", "rates"]

# Of products of bytes, to those of fp16: the least by the data sheets of the architectures in the table.
INT8_RATE = 2.0
BLOCK_US = 2.0  # an estimate: to start, to fill the pipeline, and to write results
# Instructions of a lane for a value that is packed, as tests/test_accesses.py counts them in PTX: of a matrix, of patches, and of
# images that patches are gathered from; and for one that a DAC makes a code of.
PACK, UNFOLD, PACK_IMAGES, QUANTIZE = 40, 53, 45, 27


@dataclass(frozen=True)
class Rates:
    """One row of `tuning.tsv`: what a GPU of an architecture sustains.

    Attributes:
        source: "measured" or "estimate".
        memory_gbs: Device memory, GB/s.
        cublas_tflops, mma_tflops, wgmma_tflops: Half-precision products by cuBLAS, and by the fused kernels without
            conversions; 0 where there is no such instruction.
        none_gs, exact_gs, fast_gs: Conversions of the fused kernels by generator, 1e9/s.
        launch_us: One kernel launch.
        clock_ghz: At which each multiprocessor issues four instructions of a warp a cycle.
    """

    architecture: str
    source: str
    memory_gbs: float
    cublas_tflops: float
    mma_tflops: float
    wgmma_tflops: float
    none_gs: float
    exact_gs: float
    fast_gs: float
    launch_us: float
    clock_ghz: float


@lru_cache(maxsize=1)
def _table() -> dict[str, Rates]:
    with Path(__file__).with_name("tuning.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    table = {}
    for row in rows:
        numbers = {key: float(value) for key, value in row.items() if key not in ("architecture", "source")}
        table[row["architecture"]] = Rates(row["architecture"], row["source"], **numbers)
    return table


def rates(arch: str) -> Rates:
    """The rates of an architecture, or of the next lower one in the table (the first, which is the lowest, for older ones)."""
    table = _table()
    return table[at_or_below(arch, list(table)) or next(iter(table))]


def kernel_us(case: Case, table: Rates, multiprocessors: int, plan: Plan) -> float:
    """Of a fused kernel, and of the words that it writes and `shift_add` reads, one for each split. Products and conversions
    overlap, half (fused) or all but a quarter (wgmma), in whole waves of one block a multiprocessor, each as long as its block
    of most tiles."""
    blocks = plan.blocks(case.rows, case.sense) * case.planes * case.passes * case.groups
    waves = -(-blocks * plan.splits // multiprocessors)
    turns = waves * -(-case.tiles // plan.splits)
    outputs = BLOCK_M * plan.block_n * multiprocessors  # of a tile in turn
    tflops, alone = (table.wgmma_tflops, 0.25) if plan.strategy in HOPPER else (table.mma_tflops, 0.5)
    tflops *= INT8_RATE if case.int8 else 1.0
    lines = case.padded_tile(plan.strategy in GATHERING)
    product = 2e-6 * outputs * lines * (case.terms + case.variance) / tflops
    convert = 1e-3 * outputs / getattr(table, f"{case.noise}_gs")
    words = _words(case, plan) * case.rows * case.groups * case.sense
    work = max(product, convert) + min(product, convert) * alone
    return turns * work + waves * BLOCK_US + 8e-3 * words / table.memory_gbs


def _words(case: Case, plan: Plan) -> int:
    """Of a result; 0 where a block can finish it."""
    words = case.planes * case.passes * plan.splits
    return words if words > 1 else 0


def fused_us(case: Case, table: Rates, multiprocessors: int, plan: Plan) -> float:
    """The kernel, and what is packed for it."""
    gathers = plan.strategy in GATHERING
    packed = case.image_size if gathers else case.rows * case.groups * case.tiles * case.padded_tile(False)
    packed *= case.passes if plan.strategy in HOPPER or case.int8 or case.bf16 else 1
    pack = _pack_us(case, table, multiprocessors, packed, 1 if case.int8 else 2, gathers)
    launches = 3 + (_words(case, plan) > 0)
    return kernel_us(case, table, multiprocessors, plan) + pack + launches * table.launch_us


def epilogue_us(case: Case, table: Rates, multiprocessors: int) -> float:
    """Products, then the partial sums written and read, and the packed inputs too."""
    rows, lines = case.rows * case.passes * case.groups, case.tiles * case.tile
    slow = {"tf32": 2.0, "fp32": 12.0}.get(case.precision, 1.0)
    product = 2e-6 * rows * lines * case.planes * case.sense * case.terms * slow / table.cublas_tflops
    psums = 4 * rows * case.tiles * case.planes * case.sense * (2 * case.terms)
    if case.variance:
        product += 2e-6 * rows * lines * case.planes * case.sense * 12.0 / table.cublas_tflops
        psums *= 2
    pack = _pack_us(case, table, multiprocessors, rows * lines, 4 if slow > 1 else 2)
    return product + pack + 1e-3 * psums / table.memory_gbs + 4 * table.launch_us


def _pack_us(
    case: Case, table: Rates, multiprocessors: int, packed: int, size: int, gathers: bool = False
) -> float:
    """Codes packed, `packed` values of `size` bytes in all: what memory or the schedulers take, whichever is longer. Before patches
    are unfolded a DAC takes a pass of its own."""
    issued = multiprocessors * 128e3 * table.clock_ghz  # instructions of a lane in a microsecond

    def us(values: int, moved: int, instructions: int) -> float:
        return max(1e-3 * values * moved / table.memory_gbs, values * instructions / issued)

    unfolds = case.images is not None and not gathers
    time = us(packed, 2 + size, PACK_IMAGES if gathers else UNFOLD if unfolds else PACK)
    if case.dac and unfolds:
        time += us(case.image_size, 6, QUANTIZE) + table.launch_us
    return time
