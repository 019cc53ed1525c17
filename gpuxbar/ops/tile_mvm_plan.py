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

from dataclasses import replace
from math import inf

from gpuxbar.ops.checks import kept
from gpuxbar.ops.fused_layout import BLOCK_M, BLOCKS_N, pipeline, shared_memory, wgmma_stages
from gpuxbar.ops.tile_mvm_case import Case, Plan
from gpuxbar.ops.tile_mvm_limits import int8_obstacle, obstacles
from gpuxbar.ops.tile_mvm_times import Rates, epilogue_us, fused_us, kernel_us, rates

__all__ = ["STRATEGIES", "plan_tile_mvm"]

STRATEGIES = ("auto", "collapsed", "fused", "implicit", "wgmma", "implicit-wgmma", "cluster", "epilogue")


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
    if case.int8 and (obstacle := int8_obstacle(case, arch, strategy)):
        raise ValueError(
            f"tile_mvm: `precision` must be possible, got 'int8' where {obstacle}; choose 'fp16' or 'fp16x2'"
        )
    if case.bf16 and not shared_memory(arch):
        raise ValueError(
            f"tile_mvm: `precision` must be possible, got 'bf16' where {arch} multiplies no bf16 (sm_80 and later do); choose "
            "'fp16' or 'fp16x2'"
        )
    impossible = obstacles(case, arch)
    if obstacle := impossible.get(strategy):
        raise ValueError(
            f"tile_mvm: `strategy` must be possible, got {strategy!r} where {obstacle}; choose 'auto'"
        )
    if merges and strategy in ("auto", "collapsed"):
        return Plan("collapsed", ("no ADC quantises: planes and tiles merge into one product",))
    table = rates(arch)
    by_cublas = epilogue_us(case, table, multiprocessors)
    epilogue = Plan("epilogue", (_line("cuBLAS + epilogue", by_cublas, table),))
    if strategy == "epilogue":
        return epilogue
    if case.int8:
        by_cublas = inf
        epilogue = Plan("epilogue", ("cuBLAS + epilogue: multiplies no bytes",))
    if all(impossible.values()):
        return replace(epilogue, why=(f"fused is impossible: {impossible['fused']}", *epilogue.why))
    times = {}
    # the first of equals is chosen
    shapes = {"fused": _fused, "implicit": _implicit, "wgmma": _wgmma, "implicit-wgmma": _implicit_wgmma}
    if strategy == "cluster":
        shapes["cluster"] = _cluster
    for name, shape in shapes.items():
        if not impossible[name]:
            whole = [shape(case, arch, block_n) for block_n in BLOCKS_N]
            plans = [_split(case, table, multiprocessors, plan) for plan in whole if plan is not None]
            timed = [(fused_us(case, table, multiprocessors, plan), plan) for plan in plans]
            times[name] = min(timed, key=lambda pair: pair[0])
    chosen = min(times, key=lambda name: times[name][0]) if strategy == "auto" else strategy
    best, plan = times[chosen]
    why = (
        *(_line(name, us, table) for name, (us, _) in times.items()),
        *epilogue.why,
        *_lines(case, impossible["implicit"]),
        f"rates of {table.architecture}: {table.source}",
        f"{chosen}: blocks of {BLOCK_M} x {plan.block_n}, {plan.stages} stages, tiles split {plan.splits} ways",
    )
    if strategy == "auto" and best > by_cublas:
        return replace(epilogue, why=why)
    return replace(plan, why=why)


def _lines(case: Case, obstacle: str | None) -> list[str]:
    """How many lines a tile drives where patches are gathered, if they can be."""
    if obstacle:
        return []
    lines = min(case.tile, case.drive)
    return [
        f"implicit drives {case.padded_tile(True)} lines for a tile of {lines}, in the order {case.line_order}"
    ]


def _line(name: str, us: float, table: Rates) -> str:
    origin = "estimated, not timed" if table.source == "estimate" else "by measured rates"
    return f"{name}: {us:.0f} us, {origin}"


def _split(case: Case, table: Rates, multiprocessors: int, plan: Plan) -> Plan:
    """The tiles split so that the kernel takes the least time: blocks fill the multiprocessors, in one wave or in several."""
    plans = [replace(plan, splits=splits) for splits in range(1, case.tiles + 1)]
    return min(plans, key=lambda plan: kernel_us(case, table, multiprocessors, plan))


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
    stages = wgmma_stages(arch, block_n, case.terms + case.variance)
    return Plan("wgmma", (), block_n, stages)


def _implicit_wgmma(case: Case, arch: str, block_n: int) -> Plan | None:
    """As `_wgmma`, with patches gathered inside, which leaves registers for 128 columns."""
    plan = None if block_n == 256 else _wgmma(case, arch, block_n)
    return plan and replace(plan, strategy="implicit-wgmma")


def _cluster(case: Case, arch: str, block_n: int) -> Plan | None:
    """As `_wgmma`, two blocks a cluster."""
    plan = _wgmma(case, arch, block_n)
    return plan and replace(plan, strategy="cluster", cluster=2)
