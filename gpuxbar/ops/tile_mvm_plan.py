"""Which of seven ways a read takes on a GPU, and why: plain numbers in, a plan and its reasons out.

collapsed   nothing is converted per tile: planes and tiles merge into one product by cuBLAS
fused       one kernel multiplies on tensor cores and converts in registers (kernels/fused_tile_mvm.cu)
implicit    the same for a convolution read forwards, whose patches the kernel gathers from the images
wgmma       the same as fused on Hopper, by products of whole warpgroups (kernels/fused_tile_mvm_sm90.cu)
implicit-wgmma  the same as implicit on Hopper, by the products of wgmma
cluster     the same as wgmma, two blocks sharing conductances; never chosen by "auto" before it has been timed
epilogue    cuBLAS writes the partial sums of every tile, one kernel converts them (kernels/adc_accumulate.cu)

All draw the same noise and add codes as integers, so they agree: in every bit where the partial sums are
integers, else but for codes on a rounding edge. The choice rests on `tuning.tsv`; its rows say whether they are
measured or estimated.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from functools import lru_cache
from math import inf
from pathlib import Path

from gpuxbar.ops.checks import kept

__all__ = [
    "GATHERING",
    "HOPPER",
    "STRATEGIES",
    "Case",
    "Plan",
    "Rates",
    "gathered_chunks",
    "padded_channels",
    "pipeline",
    "plan_tile_mvm",
    "rates",
    "shared_memory",
    "stage_bytes",
    "step_lines",
    "wgmma_bytes",
]

STRATEGIES = ("auto", "collapsed", "fused", "implicit", "wgmma", "implicit-wgmma", "cluster", "epilogue")
GATHERING, HOPPER = ("implicit", "implicit-wgmma"), ("wgmma", "implicit-wgmma", "cluster")
BLOCK_M, STEP = 128, 64  # rows of a block, driven lines of a stage (of bytes 128): kernels/fused_tile_mvm.cu
# Of products of bytes, to those of fp16: the least by the data sheets of the architectures in the table.
INT8_RATE = 2.0
BLOCKS_N = (256, 128)  # columns of a block
# Bytes of shared memory a block may take; architectures that are absent run the next lower one listed.
SHARED = {
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
}
STATIC_SHARED, WGMMA_STATIC_SHARED = 2048, 4096  # constants of a block of both kernels, rounded up
BLOCK_US = 2.0  # an estimate: to start, to fill the pipeline, and to write results
# Instructions of a lane for a value that is packed, as tests/test_accesses.py counts them in PTX: of a matrix, of patches, and of
# images that patches are gathered from; and for one that a DAC makes a code of.
PACK, UNFOLD, PACK_IMAGES, QUANTIZE = 40, 53, 45, 27


@dataclass(frozen=True)
class Case:
    """What the choice depends on: sizes as in `ops.tile_mvm`, and which settings are in use.

    Attributes:
        noise: "none", "exact" or "fast".
        variance: Whether the noise depends on the state (`noise_var`).
        converters: 0 one LSB for all columns, 1 an LSB a column, 2 also gain or offset of every converter, 3 also its
            non-linearity.
        codes: Whether int16 codes drive the lines.
        dac: Whether these are made on the way, which takes a pass of its own where patches are unfolded.
        drivers: Whether DACs have errors or devices are not ohmic (`reference.Drivers`).
        images: Of a convolution read forwards: images, their height and width with padding, and the
            positions of the kernel; else None.
        line_order: Of these positions and the channels on the driven lines (`ConvGeometry`).
    """

    rows: int
    groups: int
    drive: int
    sense: int
    planes: int
    tile: int
    streams: int = 1
    phases: int = 1
    stream_bits: int = 0
    adc_bits: int = 8
    adc_signed: bool = True
    noise: str = "none"
    variance: bool = False
    converters: int = 0
    gate: bool = False
    precision: str = "fp16"
    codes: bool = True
    dac: bool = False
    drivers: bool = False
    images: tuple[int, int, int, int] | None = None
    line_order: str = "channel_position"

    @property
    def tiles(self) -> int:
        return -(-self.drive // self.tile)

    @property
    def passes(self) -> int:
        return self.streams * self.phases

    @property
    def terms(self) -> int:
        """Products a partial sum takes."""
        return 2 if self.precision == "fp16x2" else 1

    @property
    def int8(self) -> bool:
        """Whether digits and levels are multiplied as bytes."""
        return self.precision == "int8"

    @property
    def bf16(self) -> bool:
        """Whether digits and conductances are multiplied as bf16."""
        return self.precision == "bf16"

    @property
    def code_max(self) -> int:
        return 2 ** (self.adc_bits - 1) - 1 if self.adc_signed else 2**self.adc_bits - 1

    @property
    def positions(self) -> int:
        """Of the kernel of a convolution read forwards; 0: another read."""
        return self.images[3] if self.images else 0

    @property
    def chunks(self) -> int:
        """Chunks of eight channels at each position that hold every tile's share of a patch; 0 where the lines of a tile are
        such chunks themselves."""
        if self.line_order == "position_channel":
            return 0
        return gathered_chunks(self.drive, self.tile, self.positions)

    @property
    def image_size(self) -> int:
        """At most the codes of all images, the channels of a group padded to whole chunks."""
        count, height, width, positions = self.images or (0, 0, 0, 1)
        return count * height * width * self.groups * padded_channels(self.drive // positions)

    @property
    def fits_16_bits(self) -> bool:
        """Whether every sum of codes does, so that two share a register."""
        return self.tiles * self.code_max < (2**15 if self.adc_signed else 2**16)


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


def step_lines(precision: str) -> int:
    """Driven lines of a stage: 128 bytes of every row."""
    return 2 * STEP if precision == "int8" else STEP


def padded_channels(channels: int) -> int:
    """Channels of a group where eight lie in 16 bytes."""
    return -(-channels // 8) * 8


@lru_cache(maxsize=4096)
def gathered_chunks(drive: int, tile: int, positions: int) -> int:
    """The most chunks of eight channels that a tile of `drive` lines, a channel each `positions`, touches."""
    size = 8 * positions
    return max((min(at + tile, drive) - 1) // size - at // size + 1 for at in range(0, drive, tile))


@lru_cache(maxsize=1)
def _table() -> dict[str, Rates]:
    with Path(__file__).with_name("tuning.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    table = {}
    for row in rows:
        numbers = {key: float(value) for key, value in row.items() if key not in ("architecture", "source")}
        table[row["architecture"]] = Rates(row["architecture"], row["source"], **numbers)
    return table


def _number(arch: str) -> int:
    return int("".join(c for c in arch if c.isdigit()))


def _at_or_below(arch: str, known: list[str]) -> str | None:
    lower = [name for name in known if _number(name) <= _number(arch)]
    return max(lower, key=_number, default=None)


def shared_memory(arch: str) -> int:
    """Bytes that a block may have, as of the next lower architecture in the table; 0 below all of them."""
    known = _at_or_below(arch, list(SHARED))
    return SHARED[known] if known else 0


def rates(arch: str) -> Rates:
    """The rates of an architecture, or of the next lower one in the table (the lowest for older ones)."""
    table = _table()
    return table[_at_or_below(arch, list(table)) or min(table, key=_number)]


@dataclass(frozen=True)
class Plan:
    """A choice with its reasons; `block_n`, `stages` and `splits` shape the fused kernels.

    `chunks`: of eight channels that a tile gathers at every position (implicit, in the line order channel_position); else 0.
    `cluster`: blocks that share panels.
    """

    strategy: str
    why: tuple[str, ...]
    block_n: int = 128
    stages: int = 0
    splits: int = 1
    chunks: int = 0
    cluster: int = 1

    def blocks(self, rows: int, sense: int) -> int:
        """Of a plane, pass, group and split of the tiles: whole clusters."""
        high = BLOCK_M * self.cluster
        return -(-rows // high) * self.cluster * -(-sense // self.block_n)

    def explain(self) -> str:
        """The choice and its reasons, a line each."""
        return "\n".join([f"strategy: {self.strategy}", *(f"  {line}" for line in self.why)])


@kept
def plan_tile_mvm(case: Case, arch: str, multiprocessors: int, strategy: str = "auto") -> Plan:
    """The fastest way by the table, or the wanted one; raises where that is impossible.

    Raises:
        ValueError: `strategy` is unknown or cannot compute this case.
    """
    if strategy not in STRATEGIES:
        raise ValueError(
            f"tile_mvm: `strategy` must be one of {', '.join(STRATEGIES)}, got {strategy!r}; choose one"
        )
    per_output = case.tiles * case.planes * case.passes
    merges = case.adc_bits == 0 and (case.noise == "none" or per_output == 1)
    if strategy == "collapsed" and not merges:
        reason = "an ADC converts every tile" if case.adc_bits else "every tile draws noise of its own"
        raise ValueError(
            f"tile_mvm: `strategy` must be possible, got 'collapsed' where {reason}; choose 'auto'"
        )
    if case.int8 and (obstacle := _int8_obstacle(case, arch, strategy)):
        raise ValueError(
            f"tile_mvm: `precision` must be possible, got 'int8' where {obstacle}; choose 'fp16' or 'fp16x2'"
        )
    if case.bf16 and _at_or_below(arch, list(SHARED)) is None:
        raise ValueError(
            f"tile_mvm: `precision` must be possible, got 'bf16' where {arch} multiplies no bf16 (sm_80 and later do); choose "
            "'fp16' or 'fp16x2'"
        )
    obstacles = {
        "fused": _obstacle(case, arch),
        "implicit": _implicit_obstacle(case, arch),
        "wgmma": _wgmma_obstacle(case, arch),
        "implicit-wgmma": _implicit_wgmma_obstacle(case, arch),
        "cluster": _wgmma_obstacle(case, arch),
    }
    if obstacle := obstacles.get(strategy):
        raise ValueError(
            f"tile_mvm: `strategy` must be possible, got {strategy!r} where {obstacle}; choose 'auto'"
        )
    if merges and strategy in ("auto", "collapsed"):
        return Plan("collapsed", ("no ADC quantises: planes and tiles merge into one product",))
    table = rates(arch)
    epilogue_us = _epilogue_us(case, table, multiprocessors)
    epilogue = Plan("epilogue", (_line("cuBLAS + epilogue", epilogue_us, table),))
    if strategy == "epilogue":
        return epilogue
    if case.int8:
        epilogue_us = inf
        epilogue = Plan("epilogue", ("cuBLAS + epilogue: multiplies no bytes",))
    if all(obstacles.values()):
        return replace(epilogue, why=(f"fused is impossible: {obstacles['fused']}", *epilogue.why))
    times = {}
    # the first of equals is chosen
    shapes = {"fused": _fused, "implicit": _implicit, "wgmma": _wgmma, "implicit-wgmma": _implicit_wgmma}
    if strategy == "cluster":
        shapes["cluster"] = _cluster
    for name, shape in shapes.items():
        if not obstacles[name]:
            whole = [shape(case, arch, block_n) for block_n in BLOCKS_N]
            plans = [_split(case, table, multiprocessors, plan) for plan in whole if plan is not None]
            timed = [(_fused_us(case, table, multiprocessors, plan), plan) for plan in plans]
            times[name] = min(timed, key=lambda pair: pair[0])
    chosen = min(times, key=lambda name: times[name][0]) if strategy == "auto" else strategy
    best, plan = times[chosen]
    why = (
        *(_line(name, us, table) for name, (us, _) in times.items()),
        *epilogue.why,
        *_lines(case, obstacles["implicit"]),
        f"rates of {table.architecture}: {table.source}",
        f"{chosen}: blocks of {BLOCK_M} x {plan.block_n}, {plan.stages} stages, tiles split {plan.splits} ways",
    )
    if strategy == "auto" and best > epilogue_us:
        return replace(epilogue, why=why)
    return replace(plan, why=why)


def _lines(case: Case, obstacle: str | None) -> list[str]:
    """How many lines a tile drives where patches are gathered, if they can be."""
    if obstacle:
        return []
    lines = min(case.tile, case.drive)
    return [
        f"implicit drives {_padded(case, True)} lines for a tile of {lines}, in the order {case.line_order}"
    ]


def _line(name: str, us: float, table: Rates) -> str:
    origin = "estimated, not timed" if table.source == "estimate" else "by measured rates"
    return f"{name}: {us:.0f} us, {origin}"


def _obstacle(case: Case, arch: str, implicit: bool = False) -> str | None:
    """Why the fused kernel cannot compute a case; None if it can."""
    lines = case.tiles * _padded(case, implicit)
    left = case.image_size if implicit else case.groups * lines * BLOCK_M
    if not shared_memory(arch):
        return f"{arch} has no mma.sync of 16-bit operands (sm_80 and later do)"
    if not case.adc_bits:
        return "nothing is converted (adc_bits=None)"
    if case.converters > 2:
        return "converters are non-linear"
    if not case.codes:
        return "the lines are driven by floats, not int16 codes"
    if case.drivers:
        return "no codes drive the lines: DACs have errors, or devices are not ohmic"
    if case.precision not in ("fp16", "fp16x2", "bf16", "int8"):
        return f"precision={case.precision!r} (fp16, fp16x2, bf16 and int8 run on tensor cores)"
    if case.passes > 1 and not case.stream_bits:
        return "several passes drive whole codes"
    if case.streams * case.stream_bits > 10 and not case.bf16:  # which has digits alone
        return f"streams * stream_bits = {case.streams * case.stream_bits} bits (10 fit an fp16 code)"
    if case.noise != "none" and case.groups > 1 and case.sense % 8:
        return (
            f"the {case.sense} sensed lines of a group are no multiple of 8, so groups share noise counters"
        )
    if case.gate and not case.fits_16_bits:
        return f"sums of {case.tiles} codes of {case.adc_bits} bits take more than 16 bits"
    if case.bf16:
        if implicit:
            return "codes are gathered from images as fp16"
        left *= case.passes
    if case.int8:
        if implicit:
            return "codes are gathered from images"
        if case.variance:
            return "the noise depends on the state (noise_var)"
        if case.stream_bits > 7:
            return f"digits of {case.stream_bits} bits do not fit 8 with a sign"
        left *= case.passes
    if case.planes * case.passes * case.groups > 65535 or left >= 2**32:
        return "the operands are too large for its indices"
    if case.planes * case.groups * case.sense * lines >= 2**32:
        return "the operands are too large for its indices"
    if _fused(case, arch, 128) is None:
        return f"its operands do not fit the shared memory of {arch}"
    return None


def _int8_obstacle(case: Case, arch: str, strategy: str) -> str | None:
    """Why bytes cannot be multiplied; None if they can. No other precision takes their place unasked."""
    if strategy not in ("auto", "fused"):
        return f"strategy={strategy!r} (fused multiplies bytes)"
    return _obstacle(case, arch)


def _implicit_obstacle(case: Case, arch: str) -> str | None:
    """Why the fused kernel cannot gather patches; None if it can."""
    if case.images is None:
        return "no patches drive the lines (those of a convolution read forwards do)"
    if max(case.images[1:3]) >= 2**14:
        return f"images of {case.images[1]} x {case.images[2]} are too large for its indices"
    if case.images[0] > 65535:
        return f"{case.images[0]} images are too many for its indices"
    channels = case.drive // case.positions
    if case.line_order == "position_channel" and (channels % 8 or (case.tiles > 1 and case.tile % 8)):
        return (
            f"{channels} channels in tiles of {case.tile} lines are no chunks of eight channels of a position"
        )
    return _obstacle(case, arch, implicit=True)


def _wgmma_obstacle(case: Case, arch: str) -> str | None:
    """Why the Hopper kernel cannot compute a case; None if it can."""
    if arch != "sm_90":
        return f"{arch} has no wgmma (sm_90 does)"
    if case.converters == 2:
        return "converters have a gain or offset of their own"
    if case.int8 or case.bf16:
        return f"it multiplies no {'bytes' if case.int8 else 'bf16'}"
    return _obstacle(case, arch)


def _implicit_wgmma_obstacle(case: Case, arch: str) -> str | None:
    """Why the Hopper kernel cannot gather patches; None if it can."""
    if obstacle := _wgmma_obstacle(case, arch) or _implicit_obstacle(case, arch):
        return obstacle
    if case.line_order != "position_channel":
        return f"the lines are in the order {case.line_order} (of position_channel, eight are 16 bytes of an image)"
    if case.stream_bits:
        return "digits are cut out of the codes that are gathered"
    if case.variance:
        return "the noise depends on the state (noise_var)"
    return None


def _padded(case: Case, implicit: bool = False) -> int:
    """Driven lines of a tile as the fused kernel sees them."""
    lines = (implicit and 8 * case.chunks * case.positions) or case.tile
    step = step_lines(case.precision)
    return -(-lines // step) * step


def _blocks(case: Case, plan: Plan) -> int:
    return plan.blocks(case.rows, case.sense) * case.planes * case.passes * case.groups


def _split(case: Case, table: Rates, multiprocessors: int, plan: Plan) -> Plan:
    """The tiles split so that the kernel takes the least time: blocks fill the multiprocessors, in one wave or in several."""
    plans = [replace(plan, splits=splits) for splits in range(1, case.tiles + 1)]
    return min(plans, key=lambda plan: _kernel_us(case, table, multiprocessors, plan))


def _fused(case: Case, arch: str, block_n: int) -> Plan | None:
    """The pipeline of one block size, or None if it does not fit."""
    wide = case.terms == 1 and not (case.gate or case.variance or case.converters) and case.fits_16_bits
    if block_n == 256 and not wide:  # its registers hold no more
        return None
    stages = pipeline(arch, block_n, case.terms + case.variance)
    if stages is None:
        return None
    return Plan("fused", (), block_n, stages)


def _implicit(case: Case, arch: str, block_n: int) -> Plan | None:
    """As `_fused`, with patches gathered inside."""
    plan = _fused(case, arch, block_n)
    return None if plan is None else replace(plan, strategy="implicit", chunks=case.chunks)


def _wgmma(case: Case, arch: str, block_n: int) -> Plan | None:
    """The pipeline of one block size of the Hopper kernel, or None if its registers do not hold the sums."""
    if block_n == 256 and (case.gate or case.converters or case.variance or not case.fits_16_bits):
        return None
    free, panels = SHARED[arch] - WGMMA_STATIC_SHARED, case.terms + case.variance
    stages = next(count for count in (4, 3, 2) if wgmma_bytes(block_n, panels, count) <= free)
    return Plan("wgmma", (), block_n, stages)


def _implicit_wgmma(case: Case, arch: str, block_n: int) -> Plan | None:
    """As `_wgmma`, with patches gathered inside, which leaves registers for 128 columns."""
    plan = None if block_n == 256 else _wgmma(case, arch, block_n)
    return plan and replace(plan, strategy="implicit-wgmma")


def _cluster(case: Case, arch: str, block_n: int) -> Plan | None:
    """As `_wgmma`, two blocks a cluster."""
    plan = _wgmma(case, arch, block_n)
    return plan and replace(plan, strategy="cluster", cluster=2)


def wgmma_bytes(block_n: int, panels: int, stages: int) -> int:
    """Shared memory of a block of the Hopper kernel: aligned stages, two barriers each."""
    return 1024 + stages * (stage_bytes(block_n, panels) + 16)


def stage_bytes(block_n: int, panels: int) -> int:
    """Shared memory of one stage: a step of the left operand and of `panels` right ones."""
    return 2 * STEP * (BLOCK_M + block_n * panels)


def pipeline(arch: str, block_n: int, panels: int) -> int | None:
    """Stages of the fused kernel's pipeline on an architecture, at most 4; None if too few fit."""
    stage = stage_bytes(block_n, panels)
    stages = min(4, (shared_memory(arch) - STATIC_SHARED) // stage)
    results = 4 * BLOCK_M * 132  # the block of results takes the place of the stages
    return stages if stages >= 2 and stages * stage >= results else None


def _kernel_us(case: Case, table: Rates, multiprocessors: int, plan: Plan) -> float:
    """Of a fused kernel, and of the words that it writes and `shift_add` reads, one for each split. Products and conversions
    overlap, half (fused) or all but a quarter (wgmma), in whole waves of one block a multiprocessor, each as long as its block
    of most tiles."""
    waves = -(-_blocks(case, plan) * plan.splits // multiprocessors)
    turns = waves * -(-case.tiles // plan.splits)
    outputs = BLOCK_M * plan.block_n * multiprocessors  # of a tile in turn
    tflops, alone = (table.wgmma_tflops, 0.25) if plan.strategy in HOPPER else (table.mma_tflops, 0.5)
    tflops *= INT8_RATE if case.int8 else 1.0
    lines = _padded(case, plan.strategy in GATHERING)
    product = 2e-6 * outputs * lines * (case.terms + case.variance) / tflops
    convert = 1e-3 * outputs / getattr(table, f"{case.noise}_gs")
    words = _words(case, plan) * case.rows * case.groups * case.sense
    work = max(product, convert) + min(product, convert) * alone
    return turns * work + waves * BLOCK_US + 8e-3 * words / table.memory_gbs


def _words(case: Case, plan: Plan) -> int:
    """Of a result; 0 where a block can finish it."""
    words = case.planes * case.passes * plan.splits
    return words if words > 1 else 0


def _fused_us(case: Case, table: Rates, multiprocessors: int, plan: Plan) -> float:
    """The kernel, and what is packed for it."""
    gathers = plan.strategy in GATHERING
    packed = case.image_size if gathers else case.rows * case.groups * case.tiles * _padded(case)
    packed *= case.passes if plan.strategy in HOPPER or case.int8 or case.bf16 else 1
    pack = _pack_us(case, table, multiprocessors, packed, 1 if case.int8 else 2, gathers)
    launches = 3 + (_words(case, plan) > 0)
    return _kernel_us(case, table, multiprocessors, plan) + pack + launches * table.launch_us


def _epilogue_us(case: Case, table: Rates, multiprocessors: int) -> float:
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
