"""The command line: parse, call, print."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import gpuxbar
from gpuxbar import ops, reference
from gpuxbar.bridge.arrays import array, explain_gpu, on_device, tensor
from gpuxbar.experiments import Run
from gpuxbar.experiments import train as run_training
from gpuxbar.launch import explain
from gpuxbar.launch.host import compiler
from gpuxbar.launch.nvrtc import CompileError, nvrtc_version
from gpuxbar.launch.sources import cache_dir
from gpuxbar.spec import CrossbarSpec, SpecError, load_spec, parse_value
from gpuxbar.spec.presets import PRESETS, preset

app = typer.Typer(add_completion=False, help="Train networks on simulated analog crossbars.")


@app.command()
def train(
    spec: Annotated[Path | None, typer.Option(help="YAML file of a CrossbarSpec.")] = None,
    preset_: Annotated[
        str | None,
        typer.Option("--preset", help=f"A spec by name: {', '.join(PRESETS)} (demo if none is given)."),
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override, such as adc.bits=6.")] = None,
    modes: Annotated[
        str | None,
        typer.Option(
            help="ideal, hardware-aware, in-situ, comma-separated; all that the spec allows if not given."
        ),
    ] = None,
    data: Annotated[str, typer.Option(help="digits, mnist5k or torchvision:<Name>.")] = "digits",
    data_dir: Annotated[Path, typer.Option(help="Folder of torchvision's files.")] = Path("data"),
    download: Annotated[bool, typer.Option(help="Download what is missing there.")] = False,
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    batch: Annotated[int, typer.Option(min=1)] = 64,
    lr: Annotated[float, typer.Option(min=1e-12, help="Learning rate of AdamW.")] = 3e-3,
    in_situ_lr: Annotated[float, typer.Option(min=1e-12, help="Learning rate in situ.")] = 0.05,
    momentum: Annotated[float, typer.Option(min=0, help="Momentum in situ, below 1.")] = 0.9,
    seed: int = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all if not given.")] = None,
    name: Annotated[
        str | None, typer.Option(help="Folder in runs/; the name of the data if not given.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on after an interruption.")] = False,
) -> None:
    """Train a network on labelled images: ideally, hardware-aware on crossbars, in situ; write runs/NAME."""
    console = Console()
    try:
        run = Run(
            folder=Path("runs") / (name or data.replace(":", "-")), spec=_settings(spec, preset_, set_ or []),
            modes=None if modes is None else tuple(modes.split(",")), epochs=epochs, batch=batch, lr=lr, in_situ_lr=in_situ_lr,
            momentum=momentum, seed=seed, resume=resume, data=data,
            data_dir=data_dir, download=download, device=device, threads=threads,
        )  # fmt: skip
        records = run_training(run)
    except (ValueError, OSError, CompileError) as error:
        console.print(f"[red]error[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    table = Table("mode", "test accuracy", "seconds per epoch", title=str(run.folder))
    for mode in dict.fromkeys(r["mode"] for r in records):
        rows = [r for r in records if r["mode"] == mode]
        table.add_row(
            mode, f"{rows[-1]['accuracy']:.3f}", f"{sum(r['seconds'] for r in rows) / len(rows):.2f}"
        )
    console.print(table)


def _settings(path: Path | None, name: str | None, overrides: list[str]) -> CrossbarSpec:
    if path is not None and name is not None:
        raise SpecError(
            f"train: `--spec` and `--preset` must not go together, got {path} and {name}; leave one out"
        )
    settings = load_spec(path) if path is not None else preset(name or "demo")
    changes: dict[str, Any] = {}
    for item in overrides:
        key, equals, value = item.partition("=")
        *groups, last = key.split(".")
        place: Any = changes
        for group in groups:
            place = place.setdefault(group, {}) if isinstance(place, dict) else None
        if not equals or not isinstance(place, dict):
            raise SpecError(f"train: `--set` must be KEY=VALUE, got {item!r}; for instance adc.bits=6")
        place[last] = parse_value(value)
    return settings.with_overrides(changes)


@app.command()
def doctor() -> None:
    """Print versions and backends, and test the read kernel of each; status 1 if one is wrong."""
    try:
        backend, errors = ": ".join(explain()), _self_test()
    except CompileError as failure:
        backend, errors = f"none, {failure}", {}
    table = Table("what", "is", title="gpuxbar doctor")
    for row in (
        ("gpuxbar", gpuxbar.__version__),
        ("python", platform.python_version()),
        ("numpy", np.__version__),
        ("torch", torch.__version__),
        ("cupy", _version("cupy-cuda13x", "cupy-cuda12x", "cupy")),
        ("C++ compiler", _compiler()),
        ("NVRTC", _nvrtc()),
        ("GPU", ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))) or "none found"),
        ("build cache", str(cache_dir())),
        ("backend of CPU tensors", escape(backend)),
        ("backend of GPU tensors", "{}: {}".format(*explain_gpu())),
    ):
        table.add_row(*row)
    for name, error in errors.items():
        outcome = f"{'passed' if error < 1e-5 else 'FAILED'}, relative error {error:.1e}"
        table.add_row(f"self-test, {name}", outcome)
    Console().print(table)
    raise typer.Exit(0 if errors and max(errors.values()) < 1e-5 else 1)


def _self_test() -> dict[str, float]:
    """Largest relative error of a noisy read by each backend at hand, in float64 terms."""
    rng = np.random.default_rng(0)
    v = rng.uniform(-0.2, 0.2, (64, 100)).astype(np.float32)
    g = rng.uniform(1e-6, 1e-5, (100, 40)).astype(np.float32)
    exact = v.astype(np.float64) @ g
    oracle = reference.tile_mvm(v, g[None], tile=32, read_noise=1e-7, seed=1)
    found = {"reference": reference.tile_mvm(v, g[None], tile=32) - exact}
    if explain()[0] == "host":
        found["host"] = ops.tile_mvm(v, g, tile_rows=32, read_noise=1e-7, seed=1) - oracle
    if explain_gpu()[0] == "cuda":
        tensors = torch.from_numpy(v).cuda(), torch.from_numpy(g).cuda()
        with on_device(tensors[0], "doctor") as device:
            y = ops.tile_mvm(*map(array, tensors), tile_rows=32, read_noise=1e-7, seed=1, device=device)
            found["cuda"] = tensor(y).cpu().numpy() - oracle
    return {name: float(np.abs(error).max() / np.abs(exact).max()) for name, error in found.items()}


def _version(*packages: str) -> str:
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            return f"{metadata.version(package)} ({package})"
    return "not installed"


def _compiler() -> str:
    try:
        return compiler() or "none found: set CXX"
    except CompileError:
        return "not found, though CXX is set"


def _nvrtc() -> str:
    try:
        return ".".join(map(str, nvrtc_version()))
    except CompileError:
        return "not installed"
