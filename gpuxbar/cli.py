"""The command line: parse, call, print."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import gpuxbar
from gpuxbar import ops, reference
from gpuxbar.bench.__main__ import bench
from gpuxbar.bridge.arrays import array, explain_gpu, on_device, tensor
from gpuxbar.experiments import Run, sweep
from gpuxbar.experiments import train as run_training
from gpuxbar.experiments.messages import ended_by
from gpuxbar.experiments.networks import NETWORKS
from gpuxbar.experiments.staircase import plot_staircases
from gpuxbar.experiments.sweep import shown
from gpuxbar.launch import explain
from gpuxbar.launch.host import compiler
from gpuxbar.launch.nvrtc import CompileError, nvrtc_version
from gpuxbar.launch.sources import cache_dir
from gpuxbar.optim import OPTIMIZERS
from gpuxbar.spec import CrossbarSpec, Device, SpecError, load_spec, nested, parse_value, save_spec
from gpuxbar.spec.devices import DEVICES, published_device
from gpuxbar.spec.presets import PRESETS, preset

app = typer.Typer(add_completion=False, help="Train networks on simulated analog crossbars.")


@app.command()
def train(
    spec: Annotated[
        Path | None,
        typer.Option(help="YAML file of a CrossbarSpec, such as --out of fit and devices writes."),
    ] = None,
    preset_: Annotated[
        str | None,
        typer.Option("--preset", help=f"A spec by name: {', '.join(PRESETS)} (demo if none is given)."),
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override, such as adc.bits=6.")] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            help="Train once for each value, such as adc.bits=4,6,8; given again, for every combination; seed=0,1,2 repeats with other "
            "devices and noise, train.seed=0,1,2 with other first weights; train.lr, train.batch and so on vary options of this command; "
            "tile.rows+tile.cols=64,128 varies two settings together."
        ),
    ] = None,
    modes: Annotated[
        str | None,
        typer.Option(
            help="ideal, hardware-aware, in-situ, comma-separated; all that the spec allows if not given."
        ),
    ] = None,
    data: Annotated[str, typer.Option(help="digits, mnist5k or torchvision:<Name>.")] = "digits",
    data_dir: Annotated[Path, typer.Option(help="Folder of torchvision's files.")] = Path("data"),
    download: Annotated[bool, typer.Option(help="Download what is missing there.")] = False,
    network: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(NETWORKS)}; what is usual for the size of the images if not given."),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    batch: Annotated[int, typer.Option(min=1)] = 64,
    lr: Annotated[float, typer.Option(min=1e-12, help="Learning rate of AdamW.")] = 3e-3,
    in_situ_lr: Annotated[float, typer.Option(min=1e-12, help="Learning rate in situ.")] = 0.05,
    momentum: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Momentum in situ, below 1; 0.9 if not given, and 0 of sgd by pulse trains or bit streams.",
        ),
    ] = None,
    optimizer: Annotated[str, typer.Option(help=f"Algorithm in situ: {', '.join(OPTIMIZERS)}.")] = "sgd",
    seed: Annotated[
        int,
        typer.Option(
            help="Of the first weights and the order of images; --set seed=1: of devices and noise."
        ),
    ] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all if not given.")] = None,
    name: Annotated[
        str | None, typer.Option(help="Folder in runs/; the name of the data if not given.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on after an interruption.")] = False,
) -> None:
    """Train a network on labelled images: ideally, hardware-aware on crossbars, in situ; write runs/NAME."""
    console = Console()
    with ended_by(ValueError, OSError, CompileError):
        run = Run(
            folder=Path("runs") / (name or data.replace(":", "-")), spec=_settings(spec, preset_, set_ or []),
            modes=None if modes is None else tuple(modes.split(",")), epochs=epochs, batch=batch, lr=lr, in_situ_lr=in_situ_lr,
            momentum=momentum, optimizer=optimizer, seed=seed, resume=resume, data=data,
            data_dir=data_dir, download=download, network=network, device=device, threads=threads,
        )  # fmt: skip
        if vary:
            return _sweep(run, vary, console)
        records = run_training(run)
    table = Table("mode", "test accuracy", "seconds per epoch", title=str(run.folder))
    for mode in dict.fromkeys(r["mode"] for r in records):
        rows = [r for r in records if r["mode"] == mode]
        last, rate = rows[-1], "--in-situ-lr" if mode == "in-situ" else "--lr"
        if last["accuracy"] is None:
            reached = f"diverged in epoch {last['epoch'] + 1}; lower {rate}"
        else:
            reached = f"{last['accuracy']:.3f}"
            if last["loss"] > rows[0]["loss"]:
                reached += f", loss rose; lower {rate}"
        table.add_row(mode, reached, f"{median(r['seconds'] for r in rows):.2f}")
    console.print(table)


def _sweep(run: Run, vary: list[str], console: Console) -> None:
    values: dict[str, list[Any]] = {}
    for key, text in _pairs("--vary", "VALUES", vary, "adc.bits=4,6,8"):
        listed = parse_value(f"[{text}]")
        if key in values or not isinstance(listed, list):
            raise SpecError(
                f"train: `--vary` must be values separated by commas, all of a key at once, got {f'{key}={text}'!r}; for instance "
                "adc.bits=4,6,8"
            )
        values[key] = [parse_value(part) if isinstance(part, str) else part for part in listed]
    rows = sweep(run, values, lambda name: console.print(f"[bold]{escape(name)}[/bold]"))
    table = Table(*values, "mode", "test accuracy", title=str(run.folder))
    for row in rows:
        reached = "diverged" if row["accuracy"] is None else f"{row['accuracy']:.3f}"
        table.add_row(
            *(escape(shown(row[key])) if key in row else "" for key in values), row["mode"], reached
        )
    console.print(table)


def _settings(path: Path | None, name: str | None, overrides: list[str]) -> CrossbarSpec:
    if path is not None and name is not None:
        raise SpecError(
            f"train: `--spec` and `--preset` must not go together, got {path} and {name}; leave one out"
        )
    settings = load_spec(path) if path is not None else preset(name or "demo")
    changes = {key: parse_value(value) for key, value in _pairs("--set", "VALUE", overrides, "adc.bits=6")}
    return settings.with_overrides(nested(changes))


def _pairs(option: str, what: str, items: list[str], example: str) -> list[tuple[str, str]]:
    """Keys and texts of options such as adc.bits=6."""
    found = []
    for item in items:
        key, equals, value = item.partition("=")
        if not equals:
            raise SpecError(f"train: `{option}` must be KEY={what}, got {item!r}; for instance {example}")
        found.append((key, value))
    return found


@app.command()
def devices(
    name: Annotated[str | None, typer.Argument(help="A device; all are listed if none is given.")] = None,
    spec: Annotated[
        Path | None, typer.Option(help="YAML file of a CrossbarSpec, whose device is shown instead.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG of its staircases, or of those of all.")] = None,
    out: Annotated[Path | None, typer.Option(help="YAML of an otherwise ideal spec of it.")] = None,
) -> None:
    """List devices of the literature, or show one, or your own: its law, sources and staircase."""
    console = Console()
    with ended_by(ValueError, OSError):
        if spec is not None:
            return _own_device(spec, name, plot, out, console)
        chosen = [published_device(each) for each in (DEVICES if name is None else [name])]
        if plot is not None:
            plot_staircases({each.name: (each.law, each.window) for each in chosen}, plot)
        if out is not None:
            if name is None:
                raise ValueError(f"devices: `name` must be a device with --out, got none and {out}; name one")
            save_spec(chosen[0].spec(), out)
    if name is None:
        table = Table("device", "law", "window (uS)", "source", title="gpuxbar devices")
        for each in chosen:
            window = f"{each.window.g_min * 1e6:.3g} to {each.window.g_max * 1e6:.3g}"
            table.add_row(each.name, each.law.law, window, each.source.partition(";")[0])
        console.print(table)
        return
    [device] = chosen
    window = f"{_window(device.window)} ({device.window_source})"
    zero = "" if device.reference_at is None else f"at {device.reference_at:g} of the window"
    _print_facts(
        console,
        {"source": device.source, "window": window, "valid": device.valid, "weight 0": zero, "law": repr(device.law)},
    )  # fmt: skip


def _own_device(path: Path, name: str | None, plot: Path | None, out: Path | None, console: Console) -> None:
    """Show the device of a spec."""
    for what, other in (("name", name), ("--out", out)):
        if other is not None:
            raise SpecError(
                f"devices: `{what}` must be left out with --spec, got {other} and {path}; leave one out"
            )
    settings = load_spec(path)
    if settings.update is None:
        raise SpecError(
            f"devices: `update` must be a law to show a device, got None in {path}; give it one, as gpuxbar fit does"
        )
    if plot is not None:
        plot_staircases({path.stem: (settings.update, settings.device)}, plot)
    _print_facts(console, {"window": _window(settings.device), "law": repr(settings.update)})


def _window(device: Device) -> str:
    return f"{device.g_min:g} to {device.g_max:g} S"


def _print_facts(console: Console, facts: dict[str, str]) -> None:
    for what, is_ in facts.items():
        if is_:
            console.print(f"[bold]{what}[/bold] {escape(is_)}", highlight=False, soft_wrap=True)


@app.command()
def fit(
    csv: Annotated[
        Path,
        typer.Argument(
            help=r"A line a pulse: columns g_before \[uS], dg \[uS], direction (+1 or -1), and device if several; or of trains g \[uS], the "
            "conductance after each pulse, empty where not read, direction, device, and cycle where trains begin anew; units S to nS; "
            "parted by commas, semicolons or tabs, comments behind #."
        ),
    ],
    law: Annotated[str, typer.Option(help="table, or a parametric law such as soft_bounds.")] = "table",
    bins: Annotated[int, typer.Option(help="Conductances of a table or piecewise_step: 2, 3, 5 or 9.")] = 9,
    g_min: Annotated[
        float | None,
        typer.Option(
            help="Window, S; the smallest g_before if not given. Pulses that begin outside it, or end far from it, are left out."
        ),
    ] = None,
    g_max: Annotated[
        float | None,
        typer.Option(help="Window, S; the largest g_before if not given; of soft bounds, where steps end."),
    ] = None,
    misread: Annotated[
        float | None,
        typer.Option(
            help="Leave out conductances that depart from those before and after by more than this many median changes, such as 10."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="YAML of an otherwise ideal spec of it.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG of the fit.")] = None,
) -> None:
    """Fit a device law to measured pulses, and judge it by pulses that were held out."""
    from gpuxbar.experiments.fit import fit_law, fit_table  # SciPy is slow to start
    from gpuxbar.experiments.fit_check import plot_fit
    from gpuxbar.experiments.measured import read_pulses

    console = Console()
    with ended_by(ValueError, OSError):
        pulses = read_pulses(csv)
        window: dict[str, Any] = {"g_min": g_min, "g_max": g_max, "misread": misread}
        found = (
            fit_table(pulses, bins=bins, **window)
            if law == "table"
            else fit_law(pulses, law, bins=bins, **window)
        )
        if plot is not None:
            plot_fit(found, plot)
        if out is not None:
            save_spec(CrossbarSpec(device=found.window, update=found.law), out)
    table = Table(
        "hold-out",
        "pulses",
        "variance explained",
        "distance, worst third",
        "limit",
        title=f"{csv.name}: {found.law.law}, devices: {pulses.device.max() + 1}",
    )
    for k, way in enumerate(("potentiation", "depression")):
        count = int((found.held_out.rising == (k == 0)).sum())
        table.add_row(
            way, str(count), f"{found.explained[k]:.3f}", f"{found.distance[k]:.3f}", f"{found.limit[k]:.3f}"
        )
    if found.law.law != "lookup_table":
        console.print(f"[bold]law[/bold] {escape(repr(found.law))}", highlight=False, soft_wrap=True)
    console.print(table)
    if found.left_out:
        console.print(
            f"{found.left_out} pulses that were misread or outside the window are left out", highlight=False
        )
    outcome = "passes" if found.passed else "fails"
    hint = (
        ""
        if found.passed or misread
        else "; try another --law, or --misread 10 where some conductances were misread"
    )
    console.print(
        f"the law's distribution {outcome} the hold-out check at 1 %{hint}", highlight=False, soft_wrap=True
    )
    if found.read_share:
        console.print(
            f"{100 * found.read_share:.0f} % of the scatter of changes is read noise, of about {found.read_noise:.2g} S; the law takes "
            "it for noise of its pulses: measure the mean of several reads",
            highlight=False,
        )


app.command()(bench)


@app.command()
def doctor() -> None:
    """Print versions and backends, and test the read kernel of each; status 1 if one is wrong."""
    try:
        backend, errors = ": ".join(explain()), _self_test()
    except (CompileError, ValueError) as failure:
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
    passed = [isinstance(error, float) and error < 1e-5 for error in errors.values()]
    for (name, error), good in zip(errors.items(), passed, strict=True):
        what = f"relative error {error:.1e}" if isinstance(error, float) else escape(str(error))
        table.add_row(f"self-test, {name}", f"{'passed' if good else 'FAILED'}, {what}")
    Console().print(table)
    raise typer.Exit(0 if passed and all(passed) else 1)


def _self_test() -> dict[str, float | RuntimeError]:
    """Largest relative error of a noisy read by each backend at hand, in float64 terms, or what a GPU's libraries raise."""
    rng = np.random.default_rng(0)
    v = rng.uniform(-0.2, 0.2, (64, 100)).astype(np.float32)
    g = rng.uniform(1e-6, 1e-5, (100, 40)).astype(np.float32)
    exact = v.astype(np.float64) @ g
    oracle = reference.tile_mvm(v, g[None], tile=32, read_noise=1e-7, seed=1)
    found = {"reference": reference.tile_mvm(v, g[None], tile=32) - exact}
    if explain()[0] == "host":
        found["host"] = ops.tile_mvm(v, g, tile_rows=32, read_noise=1e-7, seed=1) - oracle
    refused: dict[str, float | RuntimeError] = {}
    if explain_gpu()[0] == "cuda":
        try:
            found["cuda"] = _read_on_gpu(v, g) - oracle
        except RuntimeError as error:  # of NVRTC, the driver, cuBLAS: to be seen beside their versions
            refused["cuda"] = error
    return {name: float(np.abs(error).max() / np.abs(exact).max()) for name, error in found.items()} | refused


def _read_on_gpu(v: np.ndarray, g: np.ndarray) -> np.ndarray:
    tensors = torch.from_numpy(v).cuda(), torch.from_numpy(g).cuda()
    with on_device(tensors[0], "doctor") as device:
        y = ops.tile_mvm(*map(array, tensors), tile_rows=32, read_noise=1e-7, seed=1, device=device)
        return tensor(y).cpu().numpy()


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
