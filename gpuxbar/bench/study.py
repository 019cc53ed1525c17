"""Trainings that are compared in a table, each made once: a study that is interrupted goes on where it stopped."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from gpuxbar.bench.record import append, environment, lines_of
from gpuxbar.experiments.data import Data

__all__ = ["Study", "learn"]


class Study:
    """The lines of a file, one a training; those that are there, with the same key, are not made again.

    Args:
        path: The file, JSON lines; made at the first training.
        root: The folder whose commit the lines name.
        progress: Shows a bar for the training being made.
    """

    def __init__(self, path: Path, root: Path, progress: Progress):
        self.path, self.root, self.progress = path, root, progress
        self.rows = lines_of(path)

    def curve(
        self, key: dict[str, Any], label: str, total: int, run: Callable[[Callable[[int], None]], list[float]]
    ) -> list[float]:
        """Accuracies of the training that `key` describes, which `run` makes where no line has it.

        `run` takes what counts its images, of which there are `total` in all.
        """
        for row in self.rows:
            if row["training"] == key:
                found: list[float] = row["curve"]
                return found
        bar = self.progress.add_task(label, total=total)
        started, of_processors = time.perf_counter(), time.process_time()
        curve = run(lambda count: self.progress.advance(bar, count))
        taken = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - of_processors}
        self.progress.remove_task(bar)
        row = {"training": key, "curve": curve, **taken, **environment(self.root)}
        append(self.path, row)
        self.rows.append(row)
        return curve

    def where(self) -> str:
        """The machines and commits of all lines."""
        commits: dict[str, set[str]] = {}
        for row in self.rows:
            commits.setdefault(f"{row['cpu']}; gpuxbar {row['gpuxbar']}", set()).add(row["commit"])
        return "; ".join(f"{place} at {', '.join(sorted(commits[place]))}" for place in sorted(commits))


def learn(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    data: Data,
    images: Tensor,
    judge: tuple[Tensor, Tensor],
    *,
    epochs: int,
    batch: int,
    advance: Callable[[int], None],
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
) -> list[float]:
    """Train on some images of `data`, by index; returns the accuracy on `judge` after every epoch.

    `loss` is of outputs and classes.
    """
    curve = []
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        for part in images[order].split(batch):
            x, t = data.batch(part)
            optimiser.zero_grad()
            loss(model(x), t).backward()
            optimiser.step()
            advance(len(part))
        with torch.no_grad():
            x, t = judge
            curve.append((model(x).argmax(1) == t).double().mean().item())
    return curve
