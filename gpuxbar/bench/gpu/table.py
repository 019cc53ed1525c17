"""What a GPU is to show, and what it showed: a table of the targets of `python -m gpuxbar.bench.gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpuxbar.bench.gpu import device_ops
from gpuxbar.bench.gpu.reads import CONVOLUTIONS, READS, Target
from gpuxbar.bench.gpu.steps import IDEAL, STEP_SIZE, STEP_TARGET, STEPS
from gpuxbar.bench.record import markdown

__all__ = ["gpu_table"]

NOT_RUN = "not yet run on a GPU"
BEHIND = Target(1200.0)  # of cuBLAS's product and what follows it


def gpu_table(rows: list[dict[str, Any]]) -> str:
    """Markdown of every target on an H200, beside what `rows` recorded of it."""
    found: dict[str, Any] = {}
    for row in rows:  # a read has one of every section, with the times of its kernels
        before = found.get(row["case"], {}).get("us")
        found[row["case"]] = row | ({"us": before | row["us"]} if isinstance(before, dict) else {})
    cells = (*_reads(found), *_others(found), *_steps(found))
    machines = dict.fromkeys(row["gpu"] for row in rows if "gpu" in row)
    table = markdown(("what", "kernel", "target on an H200", "measured"), cells)
    return "\n\n".join([table, *(f"{machine}." for machine in machines)])


def _reads(found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for read in (*READS, *CONVOLUTIONS):
        targets = {**({"epilogue": BEHIND} if read is READS[0] else {}), **read.targets}
        for kernel, target in targets.items():
            us = found.get(read.name, {}).get("us", {}).get(kernel, {}).get("read")
            goal = f"<= {target.us:g} us" + f", {target.speedup:g} x cuBLAS + epilogue" * (target.speedup > 1)
            name = "cuBLAS + epilogue" if kernel == "epilogue" else kernel
            yield f"read, {read.name}: {read.size}, noise {read.noise}", name, goal, _us(us)


def _others(found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    behind = "noise and ADC behind the product"
    goal = ">= 85 % of the copy bandwidth"
    yield f"{behind}: {READS[0].size}", "", goal, _us(found.get(behind, {}).get("us"))
    for op in device_ops.TIMED:
        if op.target_us is not None:
            us = found.get(op.name, {}).get("us")
            yield f"{op.name}: {op.size}", "", f"<= {op.target_us:g} us", _us(us)


def _steps(found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    ms = {kind: found.get(f"resnet18-step, {kind}", {}).get("ms") for kind in STEPS}
    for kind in STEPS[1:]:
        known = ms[kind] is not None and ms[IDEAL] is not None
        ratio = f"{ms[kind] / ms[IDEAL]:.2f}" if known else NOT_RUN
        yield f"ResNet-18, {kind}: {STEP_SIZE}", "", f"<= {STEP_TARGET:g} of the ideal step in bf16", ratio


def _us(time: float | None) -> str:
    return NOT_RUN if time is None else f"{time:.0f} us"
