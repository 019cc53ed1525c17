"""`python -m gpuxbar.bench.gpu`: proof and speed of the reads, updates, wires and a whole training step, on a GPU.

A section for each fused kernel that the device has: checks of it, against the float64 oracle and against cuBLAS + epilogue,
on new memory that holds NaN; where one fails, no number of its reads is given. Then ceilings of the device (what bounds a
read, each alone), and reads as replays of CUDA graphs over inputs that do not fit its cache together, beside their ideal
products and convolutions. Two more sections are steps of ResNet-18, and updates and wires, each after a check of its own: of a
captured step against the same without capture, and of small ones against the oracle. At most 370 s.

What is found is recorded and printed as it comes, a line each, below 12,000 characters in all. A section is a process of its
own, of so many seconds at most: an illegal address, after which CUDA refuses everything in a process, or a kernel that never
ends takes nothing with it but the rest of its section. `compute-sanitizer --tool racecheck python -m gpuxbar.bench.gpu
--checks` (and memcheck, initcheck, synccheck) looks at the same small cases, in one process. Not yet run on a GPU; the checks
run on the CPU build of the kernels in the tests.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from gpuxbar.bench.cases import OracleMismatch
from gpuxbar.bench.gpu import device_ops
from gpuxbar.bench.gpu.checks import FAILURES, Subject, check
from gpuxbar.bench.gpu.reads import CONVOLUTIONS, FUSED, READS, Read, kernels_of
from gpuxbar.bench.gpu.steps import IDEAL, STEP_SIZE, STEP_TARGET, STEPS, check_steps, time_step
from gpuxbar.bench.gpu.times import IDEAL_PRODUCT, conversions_us, measure_ceilings, replays_us, time_read
from gpuxbar.bench.record import append, environment
from gpuxbar.bridge.arrays import explain_gpu
from gpuxbar.experiments.messages import ended_by, show_error
from gpuxbar.launch import CudaDevice
from gpuxbar.launch.nvrtc import nvrtc_version

ROOT = Path(__file__).parents[3]
# What is measured, most wanted first: reads by a fused kernel, training steps, updates and wires; seconds each may take.
SECTIONS = {"fused": 90, "wgmma": 90, "steps": 80, "updates": 50, "cluster": 60}
COMMAND = (sys.executable, "-m", "gpuxbar.bench.gpu")

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
    with ended_by(OSError, ValueError):
        arch = _arch()
        names = _sections(section or [], arch, checks)
        report.about = {**_machine(), **environment(ROOT)}
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
    there = [name for name in SECTIONS if name not in FUSED or name in kernels_of(arch)]
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


def _machine() -> dict[str, str]:
    """The GPU at hand, the newest CUDA that its driver runs, and what compiles and launches kernels."""
    import cupy

    runtime = cupy.cuda.runtime
    name: bytes = runtime.getDeviceProperties(cupy.cuda.Device().id)["name"]
    driver = runtime.driverGetVersion()
    return {
        "gpu": name.decode(), "driver": f"{driver // 1000}.{driver % 1000 // 10}", "cupy": cupy.__version__,
        "nvrtc": ".".join(map(str, nvrtc_version())),
    }  # fmt: skip


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
    limits = measure_ceilings(subject.units)
    report.about["ceilings"] = limits
    report.say("ceilings: " + ", ".join(f"{name} {rate:.0f}" for name, rate in limits.items()))
    device = subject.device
    for read in (*READS, *CONVOLUTIONS):
        kernels = read.kernels(subject.kernels)
        if not kernels:
            continue
        us = report.attempt(read.name, partial(time_read, read, kernels))
        if us is None:
            continue
        plan = read.plan(device.arch, device.multiprocessors)
        floors = {kernel: read.floors(limits, kernel) for kernel in kernels}
        targets = {kernel: vars(target) for kernel, target in read.targets.items()}
        report.add(
            {"case": read.name, "size": read.size, "us": us, "floors": floors, "targets": targets, "plan": plan.strategy}
        )  # fmt: skip
        for kernel in kernels:
            report.say(_read_line(read, us, kernel, floors[kernel], plan.strategy))


def _time_others(report: Report, subject: Subject) -> None:
    """Print and record what noise and ADC behind cuBLAS's product, updates and wires take."""
    timed: list[tuple[str, str, float | None, Callable[[], float]]]
    timed = [("noise and ADC behind the product", READS[0].size, None, partial(conversions_us, READS[0]))]
    timed += [(op.name, op.size, op.target_us, partial(_op_us, op, subject)) for op in device_ops.TIMED]
    for name, size, target, run in timed:
        us = report.attempt(name, run)
        if us is not None:
            report.add({"case": name, "size": size, "us": us, "target": target})
            goal = "" if target is None else _goal(f"<= {target:g}", us > target)
            report.say(f"{name}: {us:.0f} us{goal}")


def _op_us(op: device_ops.Timed, subject: Subject) -> float:
    return replays_us([op.build(CudaDevice(), subject.there)])


def _time_steps(report: Report) -> None:
    """Print and record every step of ResNet-18."""
    found: dict[str, float] = {}
    for kind in STEPS:
        ms = report.attempt(kind, partial(time_step, kind))
        if ms is None:
            continue
        found[kind] = ms
        report.add({"case": f"resnet18-step, {kind}", "size": STEP_SIZE, "ms": ms, "target": STEP_TARGET})
        beside = ""
        if kind != IDEAL and IDEAL in found:
            times = ms / found[IDEAL]
            beside = f", {times:.2f} x ideal{_goal(f'<= {STEP_TARGET:g}', times > STEP_TARGET)}"
        report.say(f"{kind}: {ms:.2f} ms{beside}")


def _goal(goal: str, missed: bool) -> str:
    """The target on an H200, after what was measured."""
    return f" ({'missed ' * missed}{goal})"


def _read_line(
    read: Read, us: dict[str, dict[str, float]], kernel: str, floors: dict[str, float], plan: str
) -> str:
    """Time, target, share of the highest floor, speed relative to cuBLAS + epilogue and to the ideal product, and times
    with codes and with conductances packed too."""
    mine, bound, target = (
        us[kernel]["read"],
        max(floors, key=lambda name: floors[name]),
        read.targets.get(kernel),
    )
    speedup, share, goal = us["epilogue"]["read"] / mine, us[IDEAL_PRODUCT]["read"] / mine, ""
    if target is not None:
        missed = mine > target.us or speedup < target.speedup
        goal = _goal(f"<= {target.us:g}" + f", {target.speedup:g} x" * (target.speedup > 1), missed)
    return (
        f"{read.name}, {kernel}: {mine:.0f} us{goal}, {floors[bound] / mine:.0%} of {bound}, {speedup:.2f} x epilogue, "
        f"{share:.2f} x ideal; from codes {us[kernel]['from codes']:.0f}, call {us[kernel]['call']:.0f}; planned {plan}"
    )


if __name__ == "__main__":
    app()
