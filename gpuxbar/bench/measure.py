"""Timing in turns, and the extra memory of a call."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from gpuxbar.bench.cases import CASES as READS
from gpuxbar.bench.cases import Case, Contenders, threads
from gpuxbar.bench.parasitics import PARASITICS

__all__ = ["CASES", "extra_memory", "measure"]

CASES = (*READS, *PARASITICS)


def measure(
    case: Case, *, thread_count: int = 1, rounds: int | None = None, seconds: float = 4.0,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:  # fmt: skip
    """Check a case against its oracle, then time its contenders in turns.

    Args:
        case: What to measure.
        thread_count: CPU threads of every contender.
        rounds: Times each contender runs; None: as many as `seconds` allow, at least 7.
        seconds: Time to fill without `rounds`.
        tick: Told after every round how many of how many are done.

    Returns:
        The measured part of a row: milliseconds, ratios to the first contender, error, extra memory.

    Raises:
        OracleMismatch: The result is wrong, so nothing was timed.
    """
    with threads(thread_count):
        contenders = case.build()
        error = contenders.check()
        for run in contenders.run.values():
            run()
        one_round = sum(_time(run) for run in contenders.run.values())
        total = rounds or max(7, int(seconds / one_round))
        times = _in_turns(contenders, total, tick)
    first = next(iter(times))
    ratios = {
        name: median(t / unit for t, unit in zip(times[name], times[first], strict=True))
        for name in times
        if name != first
    }
    if case.speedup:
        ratios = {name: 1 / ratio for name, ratio in ratios.items()}
    memory = {}
    if case.memory_mb is not None:
        memory = {name: extra_memory(case, name) for name in contenders.run}
    return {
        "case": case.name, "size": case.size, "threads": thread_count, "rounds": total,
        "ms": {name: _percentiles(t) for name, t in times.items()},
        "ratio": {name: round(ratio, 3) for name, ratio in ratios.items()}, "target": case.target,
        "target_ms": case.target_ms, "extra_mb": memory, "target_mb": case.memory_mb, "error": error,
    }  # fmt: skip


def _time(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _in_turns(
    contenders: Contenders, rounds: int, tick: Callable[[int, int], None]
) -> dict[str, list[float]]:
    """Every round times each contender once, so that a drift of the machine meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in contenders.run}
    gc.collect()
    gc.disable()
    try:
        for done in range(rounds):
            for name, run in contenders.run.items():
                times[name].append(_time(run) / contenders.pieces.get(name, 1))
            tick(done + 1, rounds)
    finally:
        gc.enable()
    return times


def _percentiles(times: list[float]) -> list[float]:
    """20th, 50th and 80th percentile, ms."""
    return [round(float(time) * 1e3, 5) for time in np.percentile(times, (20, 50, 80))]


def extra_memory(case: Case, contender: str) -> float | None:
    """Peak memory of one call beyond what was resident before it, its result included, MB; None off Linux.

    A fresh process runs the call once, gives freed memory back to the system, resets the kernel's high-water mark
    of resident pages (/proc/self/clear_refs) and runs it again: every page that any library touches counts.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    program = f"from gpuxbar.bench.measure import _peak; print(_peak({case.name!r}, {contender!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return float(done.stdout)


def _peak(case_name: str, contender: str) -> float:
    case = next(c for c in CASES if c.name == case_name)
    torch.set_grad_enabled(False)
    with threads(1):
        run = case.build().run[contender]
        run()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        result = run()
        peak = _status("VmHWM") - before
        del result
    return round(peak / 1e3, 2)


def _status(key: str) -> float:
    """A field of /proc/self/status, kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(key + ":")).split()[1])
