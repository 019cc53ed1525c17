"""Trainings that are compared in a table, each made once: a study that is interrupted goes on where it stopped."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from gpuxbar.bench.record import append, environment, lines_of
from gpuxbar.experiments.data import Data
from gpuxbar.launch import set_threads

__all__ = ["Study", "choose", "count_from", "learn", "of_count"]


class Study:
    """Trainings, which a file keeps, a line each; those that are there, with the same key, are not made again.

    `rows` are the lines of the trainings that were asked for, once each, whatever else the file has.

    Args:
        path: The file, JSON lines; made at the first training.
        root: The folder whose commit the lines name.
        progress: Shows a bar for the training being made.
    """

    def __init__(self, path: Path, root: Path, progress: Progress):
        self.path, self.root, self.progress = path, root, progress
        self.kept, self.rows = lines_of(path), list[dict[str, Any]]()

    def curve(
        self,
        key: dict[str, Any],
        label: str,
        total: Callable[[], int],
        run: Callable[[Callable[[int], None]], list[float]],
        begun: bool = False,
    ) -> list[float]:
        """Accuracies of the training that `key` describes, which `run` makes where no line has it.

        `run` takes what counts its images, of which there are `total()` in all; neither is called where a line has it, so that no
        data need be there. Where it goes on with a training that has `begun` before, the line does not tell how long that took.
        """
        row = next((row for row in self.kept if row["training"] == key), None)
        if row is None:
            row = self._made(key, label, total, run, begun)
        if row not in self.rows:
            self.rows.append(row)
        curve: list[float] = row["curve"]
        return curve

    def _made(
        self,
        key: dict[str, Any],
        label: str,
        total: Callable[[], int],
        run: Callable[[Callable[[int], None]], list[float]],
        begun: bool,
    ) -> dict[str, Any]:
        """The line of a training, written to the file."""
        bar = self.progress.add_task(label, total=total())
        started, of_processors = time.perf_counter(), time.process_time()
        curve = run(lambda count: self.progress.advance(bar, count))
        taken = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - of_processors}
        self.progress.remove_task(bar)
        row = {"training": key, "curve": curve, **({} if begun else taken), **environment(self.root)}
        append(self.path, row)
        self.kept.append(row)
        return row

    def where(self) -> str:
        """The machines and commits of `rows`."""
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


def of_count(data: Data, count: int) -> Data:
    """Data that has as many images to train on as a record says of it, whose table is made where no data is."""
    if len(data.x) != count:
        raise ValueError(
            f"study: `data` must be the {count} images of {data.name} to train on, got {len(data.x)}; where files of it were cut short, "
            "delete them and load it again"
        )
    return data


def count_from(least: int) -> Callable[[str], int]:
    """What reads an option of argparse that is a whole number of at least `least`."""

    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number, at least {least}, got {text}")
        return int(text)

    return count


def choose(options: argparse.ArgumentParser, record: Path) -> argparse.Namespace:
    """What the command line of a study says, of its own options and of those that all have; one thread computes from then on, since
    layers this small gain nothing from more.

    Args:
        options: Of the study.
        record: Where its trainings are kept unless it is said.
    """
    options.add_argument("--record", type=Path, default=record)
    options.add_argument("--readme", type=Path, help="README whose table is rewritten")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    set_threads(1)
    return chosen
