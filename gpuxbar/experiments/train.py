"""Train a network ideally, hardware-aware and in situ on the same batches; record, plot, resume bit for bit."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from math import inf, isfinite
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import nn

from gpuxbar.experiments.data import Data, load_data
from gpuxbar.experiments.networks import network
from gpuxbar.launch import explain, set_threads
from gpuxbar.nn import calibrate, convert, telemetry
from gpuxbar.ops import NotFiniteError
from gpuxbar.optim import OPTIMIZERS, build_optimizer
from gpuxbar.optim.base import Rule
from gpuxbar.spec import CrossbarSpec, save_spec
from gpuxbar.spec.errors import nearest

__all__ = ["STYLES", "Run", "modes_of", "prepare", "train"]

FORMAT = "gpuxbar-run-3"
# of Python, whose numbers checkpoints hold
COUNT = Rule("an int of at least 1", lambda value: type(value) is int and value >= 1, "10")
RATE = Rule(
    "a finite float of at least 0", lambda value: type(value) in (int, float) and 0 <= value < inf, "0.01"
)
NUMBERS = {
    "epochs": COUNT,
    "batch": COUNT,
    "seed": Rule("an int of 64 bits", lambda value: type(value) is int and -(2**63) <= value < 2**63, "0"),
    "lr": RATE,
    "in_situ_lr": RATE,
    "momentum": Rule("a float", lambda value: value is None or type(value) in (int, float), "0.9"),
}
STYLES = {"ideal": "k--", "hardware-aware": "C0-o", "in-situ": "C1-s"}


@dataclass(frozen=True)
class Run:
    """What to train, on what, and where to record it.

    `modes`: among "ideal", "hardware-aware" and "in-situ"; None: all, in-situ only if the spec has an update law.
    `lr`: of AdamW, for the first two modes; `in_situ_lr`, `momentum`: of the in-situ `optimizer`, a name of
    `optim.build_optimizer`; None: 0.9, and 0 of sgd where arrays multiply inputs and errors by pulse trains or bit streams.
    `data`, `data_dir`, `download`: see `load_data`. `network`: a name of `networks.NETWORKS`; None: what is usual for
    the size of the images. `threads`: of the CPU; None leaves them as they are.
    """

    folder: Path
    spec: CrossbarSpec
    modes: tuple[str, ...] | None = None
    epochs: int = 10
    batch: int = 64
    lr: float = 3e-3
    in_situ_lr: float = 0.05
    momentum: float | None = None
    optimizer: str = "sgd"
    seed: int = 0
    resume: bool = False
    data: str = "digits"
    data_dir: Path = Path("data")
    download: bool = False
    network: str | None = None
    device: str = "cpu"
    threads: int | None = None


def train(run: Run, data: Data | None = None) -> list[dict[str, Any]]:
    """Run or resume; returns one record per mode and epoch, as written to metrics.jsonl, with `telemetry` of crossbar layers.

    A mode that diverges, to values that are not finite, ends with that epoch, whose `accuracy` is None and mostly also its `loss`.

    Args:
        run: What to train.
        data: Of the run, which `prepare` has looked at; None: do that first.
    """
    modes, data = modes_of(run), data or prepare(run)
    saved = _open(run, data)
    _write(
        run, saved
    )  # so that a first epoch can be interrupted, and the metrics are those of the checkpoint
    records: list[dict[str, Any]] = saved["records"]
    with Progress() as progress:
        for mode in modes:
            before = [record for record in records if record["mode"] == mode]
            done = len(before)
            bar = progress.add_task(mode, total=run.epochs, completed=done)
            if done >= run.epochs or (before and before[-1]["accuracy"] is None):
                continue
            model, optimiser = _begin(run, mode, data)
            if done:
                model.load_state_dict(saved["states"][mode]["model"])
                optimiser.load_state_dict(saved["states"][mode]["optimiser"])
            for epoch in range(done, run.epochs):
                started = time.perf_counter()
                loss = _epoch(mode, model, optimiser, data, run, epoch, partial(progress.advance, bar))
                seconds = time.perf_counter() - started
                accuracy = None if loss is None else _accuracy(model, data, run.device)
                record = {
                    "mode": mode,
                    "epoch": epoch,
                    "loss": loss,
                    "accuracy": accuracy,
                    "seconds": seconds,
                }
                records.append(record)
                if accuracy is None:
                    _write(run, saved)
                    break
                if mode != "ideal":
                    record["layers"] = [asdict(layer) for layer in telemetry(model).layers]
                saved["states"][mode] = {"model": model.state_dict(), "optimiser": optimiser.state_dict()}
                _write(run, saved)
                progress.update(bar, completed=epoch + 1)
    _plot(records, run.folder / "curves.png")
    return records


def prepare(run: Run, data: Data | None = None) -> Data:
    """The data of a run, loaded unless given; refuses what cannot be trained, and writes nothing."""
    modes = modes_of(run)
    _check_numbers(run)
    _check_device(run.device)
    if run.threads is not None:
        torch.set_num_threads(run.threads)
        set_threads(run.threads)
    if run.device == "cpu" and modes != ("ideal",):
        with Progress(transient=True) as progress:  # now, so that it is no epoch's time
            progress.add_task("building kernels", total=None)
            explain()
    data = data or load_data(run.data, run.data_dir, run.download)
    for mode in modes:
        _begin(run, mode, data)  # refuses settings that do not go together
    return data


def modes_of(run: Run) -> tuple[str, ...]:
    """The modes that a run trains."""
    if run.optimizer not in OPTIMIZERS:
        raise ValueError(
            f"train: `optimizer` must be an in-situ algorithm, got {run.optimizer!r}; {nearest(run.optimizer, OPTIMIZERS)}"
        )
    can_update = run.spec.update is not None
    if run.modes is None:
        return tuple(STYLES) if can_update else ("ideal", "hardware-aware")
    for mode in run.modes:
        if mode not in STYLES:
            raise ValueError(
                f"train: `modes` must be among {', '.join(STYLES)}, got {mode!r}; choose from these"
            )
    if "in-situ" in run.modes and not can_update:
        raise ValueError(
            "train: `update` of the spec must be an update law for the mode in-situ, got null; for instance "
            "--set update.law=agarwal"
        )
    return run.modes


def _begin(run: Run, mode: str, data: Data) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The network of a mode before its first epoch, and its optimiser."""
    torch.manual_seed(run.seed)
    model = network(data.shape, data.classes, run.network)[1].to(run.device)
    if mode != "ideal":
        model, _ = convert(model, run.spec)
    if mode == "in-situ":
        return model, build_optimizer(run.optimizer, model, lr=run.in_situ_lr, momentum=_momentum(run))
    return model, torch.optim.AdamW(model.parameters(), lr=run.lr)


def _momentum(run: Run) -> float:
    if run.momentum is not None:
        return run.momentum
    return 0.0 if run.spec.updates_in_array and run.optimizer == "sgd" else 0.9


def _check_numbers(run: Run) -> None:
    for name, rule in NUMBERS.items():
        value = getattr(run, name)
        if not rule.holds(value):
            raise ValueError(f"train: `{name}` must be {rule.text}, got {value!r}; try {rule.example}")


def _check_device(device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise ValueError(f"train: `device` must be cpu or cuda, got {device!r}; choose one")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("train: `device` must be there, got cuda and no usable GPU; train on cpu")


def _epoch(
    mode: str,
    model: nn.Module,
    optimiser: Any,
    data: Data,
    run: Run,
    epoch: int,
    advance: Callable[[float], None],
) -> float | None:
    """One pass over the training part in an order of its own, whose share done `advance` hears; returns the mean loss, None where
    values are not finite."""
    order = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(run.seed + epoch))
    parts = order.split(run.batch)
    total = torch.zeros((), dtype=torch.float64, device=run.device)
    model.train()
    try:
        for step, part in enumerate(parts, epoch * len(parts)):
            # converter ranges follow the weights: before every epoch, and after 1, 2, 4, 8, ... steps, as first ones change most
            if mode != "ideal" and (step % len(parts) == 0 or step.bit_count() == 1):
                sample = data.sample(256, device=run.device)
                calibrate(model, [sample], loss=nn.functional.cross_entropy)
            x, t = data.batch(part, device=run.device)
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(model(x), t)
            loss.backward()
            optimiser.step()
            total += loss.detach() * len(part)
            advance(len(part) / len(data.x))
    except NotFiniteError:
        return None
    mean = total.item() / len(data.x)
    return mean if isfinite(mean) else None


def _accuracy(model: nn.Module, data: Data, device: str) -> float | None:
    """Share of the test part that is classified right; None where values are not finite."""
    model.eval()
    right = 0
    try:
        with torch.no_grad():
            for start in range(0, len(data.x_test), 256):
                x, t = data.batch(slice(start, start + 256), test=True, device=device)
                y = model(x)
                if not y.isfinite().all():
                    return None
                right += int((y.argmax(1) == t).sum())
    except NotFiniteError:
        return None
    return right / len(data.x_test)


def _identity(run: Run, data: Data) -> dict[str, Any]:
    return {
        "spec": run.spec.model_dump(),
        "data": data.identity(),
        "network": network(data.shape, data.classes, run.network)[0],
        "batch": run.batch,
        "lr": run.lr,
        "in_situ_lr": run.in_situ_lr,
        "momentum": _momentum(run),
        "optimizer": run.optimizer,
        "seed": run.seed,
    }


def _open(run: Run, data: Data) -> dict[str, Any]:
    """The state to start from: fresh, or what an interrupted run left."""
    path = run.folder / "checkpoint.pt"
    identity = _identity(run, data)
    fresh = {"format": FORMAT, "run": identity, "records": [], "states": {}}
    if not run.resume:
        if run.folder.exists():
            raise ValueError(
                f"train: `{run.folder}` must not exist yet, got a folder; use --resume or another --name"
            )
        run.folder.mkdir(parents=True)
        save_spec(run.spec, run.folder / "spec.yaml")
        return fresh
    if not path.exists():
        anew = "start the run without --resume" + ", under another --name" * run.folder.exists()
        raise ValueError(f"train: `{path}` must exist to resume, got none; {anew}")
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # an arbitrary file can fail its reader in any way
        raise ValueError(
            f"train: `{path}` must be a readable checkpoint, got a corrupt file; start anew"
        ) from error
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise ValueError(
            f"train: `{path}` must be a checkpoint of gpuxbar train, got another file; check --name"
        )
    other = _other(saved["run"], identity)
    if other is not None:
        key, was, now = other
        raise ValueError(
            f"train: `{key}` must be that of the interrupted run, {was!r}, got {now!r}; repeat its settings"
        )
    return saved


def _other(saved: dict[str, Any], here: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first setting that differs: its path and both values; None if none does."""
    for key in here | saved:
        was, now = saved.get(key), here.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            inner = _other(was, now)
            if inner is not None:
                return f"{key}.{inner[0]}", *inner[1:]
        elif was != now:
            return key, was, now
    return None


def _write(run: Run, state: dict[str, Any]) -> None:
    """Write checkpoint and metrics beside the old ones, then swap: an interruption leaves the old ones whole."""
    text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in state["records"])
    for name in ("checkpoint.pt", "metrics.jsonl"):
        scratch = run.folder / f".{name}.part"
        try:
            with scratch.open("wb") as file:
                if name == "checkpoint.pt":
                    torch.save(state, file)
                else:
                    file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, run.folder / name)
        except (OSError, RuntimeError) as error:
            scratch.unlink(missing_ok=True)
            raise OSError(
                f"train: cannot write {run.folder / name} ({error}); the previous one is intact"
            ) from error


def _plot(records: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axis, key, label in zip(
        figure.subplots(1, 2), ("loss", "accuracy"), ("training loss", "test accuracy"), strict=True
    ):
        for mode, style in STYLES.items():
            points = [(r["epoch"] + 1, r[key]) for r in records if r["mode"] == mode and r[key] is not None]
            if points:
                axis.plot(*zip(*points, strict=True), style, markersize=4, label=mode)
        axis.set(xlabel="epoch", ylabel=label)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    figure.savefig(path, dpi=120)
