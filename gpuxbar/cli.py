"""The command line: parse, call, print."""

from __future__ import annotations

import platform
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import yaml
from rich.console import Console
from rich.table import Table

import gpuxbar
from gpuxbar import ops, reference
from gpuxbar.experiments import Run
from gpuxbar.experiments import train as run_training
from gpuxbar.launch import explain
from gpuxbar.launch.sources import cache_dir
from gpuxbar.spec import CrossbarSpec

app = typer.Typer(add_completion=False, help="Train networks on simulated analog crossbars.")

# 8-bit converters, noise of about one ADC step
DEMO: dict[str, Any] = {
    "mapping": {"scheme": "subtracted"},
    "dac": {"bits": 8},
    "adc": {"bits": 8, "percentile": 100},
    "read_noise": {"sigma": 2e-8},
}


@app.command()
def train(
    spec: Annotated[Path | None, typer.Option(help="YAML file of a CrossbarSpec.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override, such as adc.bits=6.")] = None,
    modes: Annotated[str, typer.Option(help="Comma-separated.")] = "ideal,hardware-aware",
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    batch: Annotated[int, typer.Option(min=1)] = 64,
    seed: int = 0,
    name: str = "digits",
    resume: bool = False,
) -> None:
    """Train a small CNN on scikit-learn's digits; write runs/NAME."""
    console = Console()
    try:
        settings = CrossbarSpec.model_validate(yaml.safe_load(spec.read_text()) if spec else DEMO)
        for item in set_ or []:
            key, _, value = item.partition("=")
            override: Any = yaml.safe_load(value)
            if isinstance(override, str):
                with suppress(ValueError):
                    override = float(override)  # YAML reads 1e-6 as text
            for part in reversed(key.split(".")):
                override = {part: override}
            settings = settings.with_overrides(override)
        run = Run(
            Path("runs") / name, settings, tuple(modes.split(",")), epochs, batch, seed=seed, resume=resume
        )
        records = run_training(run)
    except (ValueError, OSError) as error:
        console.print(f"[red]error[/red] {error}", markup=True, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    table = Table("mode", "test accuracy", "seconds per epoch", title=str(run.folder))
    for mode in run.modes:
        rows = [r for r in records if r["mode"] == mode]
        table.add_row(
            mode, f"{rows[-1]['accuracy']:.3f}", f"{sum(r['seconds'] for r in rows) / len(rows):.2f}"
        )
    console.print(table)


@app.command()
def doctor() -> None:
    """Print versions, the backend and why, and test its read kernel; status 1 if it is wrong."""
    where, why = explain()
    rng = np.random.default_rng(0)
    v = rng.uniform(-0.2, 0.2, (64, 100)).astype(np.float32)
    g = rng.uniform(1e-6, 1e-5, (100, 40)).astype(np.float32)
    expected = reference.tile_mvm(v, g[None], tile=32, read_noise=1e-7, seed=1)
    error = float(
        np.abs(ops.tile_mvm(v, g, tile_rows=32, read_noise=1e-7, seed=1) - expected).max()
        / np.abs(expected).max()
    )
    passed = error < 1e-5
    table = Table("what", "is", title="gpuxbar doctor")
    for row in (
        ("gpuxbar", gpuxbar.__version__),
        ("python", platform.python_version()),
        ("numpy", np.__version__),
        ("torch", torch.__version__),
        ("backend", f"{where}: {why}"),
        ("build cache", str(cache_dir())),
        ("GPU", "not used by this version"),
        ("self-test", f"{'passed' if passed else 'FAILED'}, error {error:.1e}"),
    ):
        table.add_row(*row)
    Console().print(table)
    raise typer.Exit(0 if passed else 1)
