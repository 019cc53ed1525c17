"""Train a small CNN ideally and hardware-aware on the same batches; record, plot, resume bit for bit."""

from __future__ import annotations

import json
import os
import pickle
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.progress import Progress
from torch import Tensor, nn

from gpuxbar.nn import calibrate, convert
from gpuxbar.spec import CrossbarSpec

__all__ = ["Run", "load_digits", "train"]

FORMAT = "gpuxbar-run-1"


@dataclass(frozen=True)
class Run:
    """What to train and where to record it."""

    folder: Path
    spec: CrossbarSpec
    modes: tuple[str, ...] = ("ideal", "hardware-aware")
    epochs: int = 10
    batch: int = 64
    lr: float = 3e-3
    seed: int = 0
    resume: bool = False


def load_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's 1,797 digits, 8 x 8, split 3 to 1: train images, test images, train and test classes."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    parts = train_test_split(images, data.target, test_size=0.25, random_state=0, stratify=data.target)
    x, x_test, t, t_test = (torch.as_tensor(part) for part in parts)
    return x, x_test, t, t_test


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def train(run: Run) -> list[dict[str, Any]]:
    """Run or resume; returns one record per mode and epoch, as written to metrics.jsonl."""
    known = ("ideal", "hardware-aware")
    for mode in run.modes:
        if mode not in known:
            raise ValueError(
                f"train: `modes` must be among {', '.join(known)}, got {mode!r}; choose from these"
            )
    saved = _open(run)
    x, x_test, t, t_test = load_digits()
    records: list[dict[str, Any]] = saved["records"]
    with Progress() as progress:
        for mode in run.modes:
            done = sum(record["mode"] == mode for record in records)
            bar = progress.add_task(mode, total=run.epochs, completed=done)
            if done >= run.epochs:
                continue
            torch.manual_seed(run.seed)
            model = network()
            if mode == "hardware-aware":
                model, _ = convert(model, run.spec)
                calibrate(model, [x[:256]])
            optimiser = torch.optim.AdamW(model.parameters(), lr=run.lr)
            if done:
                model.load_state_dict(saved["model"])
                optimiser.load_state_dict(saved["optimiser"])
            for epoch in range(done, run.epochs):
                started = time.perf_counter()
                loss = _epoch(model, optimiser, x, t, run.batch, run.seed + epoch)
                seconds = time.perf_counter() - started
                accuracy = _accuracy(model, x_test, t_test)
                records.append(
                    {"mode": mode, "epoch": epoch, "loss": loss, "accuracy": accuracy, "seconds": seconds}
                )
                state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "records": records}
                _write(run, {**saved, **state})
                progress.advance(bar)
    _plot(records, run.folder / "curves.png")
    return records


def _epoch(model: nn.Module, optimiser: Any, x: Tensor, t: Tensor, batch: int, seed: int) -> float:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    total = 0.0
    model.train()
    for part in order.split(batch):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(x[part]), t[part])
        loss.backward()
        optimiser.step()
        total += loss.item() * len(part)
    return total / len(x)


def _accuracy(model: nn.Module, x: Tensor, t: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return (model(x).argmax(1) == t).float().mean().item()


def _identity(run: Run) -> dict[str, Any]:
    return {"spec": run.spec.model_dump(), "batch": run.batch, "lr": run.lr, "seed": run.seed}


def _open(run: Run) -> dict[str, Any]:
    """The state to start from: fresh, or what an interrupted run left."""
    path = run.folder / "checkpoint.pt"
    fresh = {"format": FORMAT, "run": _identity(run), "records": []}
    if not run.resume:
        if run.folder.exists():
            raise ValueError(
                f"train: `{run.folder}` must not exist yet, got a folder; use --resume or another --name"
            )
        run.folder.mkdir(parents=True)
        (run.folder / "spec.yaml").write_text(yaml.safe_dump(run.spec.model_dump(), sort_keys=False))
        return fresh
    if not path.exists():
        raise ValueError(f"train: `{path}` must exist to resume, got none; start the run without --resume")
    try:
        saved = torch.load(path, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError, ValueError) as error:
        raise ValueError(
            f"train: `{path}` must be a readable checkpoint, got a corrupt file; start anew"
        ) from error
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise ValueError(
            f"train: `{path}` must be a checkpoint of gpuxbar train, got another file; check --name"
        )
    for key, value in _identity(run).items():
        if saved["run"][key] != value:
            raise ValueError(
                f"train: `{key}` must be that of the interrupted run, got another; repeat its settings"
            )
    return saved


def _write(run: Run, state: dict[str, Any]) -> None:
    """Write checkpoint and metrics beside the old ones, then swap: an interruption leaves the old ones whole."""
    text = "".join(json.dumps(record) + "\n" for record in state["records"])
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
        for mode, style in (("ideal", "k--"), ("hardware-aware", "C0-o")):
            points = [(r["epoch"] + 1, r[key]) for r in records if r["mode"] == mode]
            if points:
                axis.plot(*zip(*points, strict=True), style, markersize=4, label=mode)
        axis.set(xlabel="epoch", ylabel=label)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)
