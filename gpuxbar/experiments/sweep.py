"""Trainings at every combination of some settings of a spec: a table and a picture; an interrupted sweep goes on where it stopped."""

from __future__ import annotations

import csv
import itertools
import json
import os
from collections.abc import Callable
from dataclasses import replace
from math import nan
from pathlib import Path
from statistics import mean
from typing import Any

from gpuxbar.experiments.train import STYLES, Run, modes_of, prepare, train
from gpuxbar.spec import nested

__all__ = ["shown", "sweep"]

REPEATED = "seed"  # the setting whose values repeat a point


def sweep(
    run: Run, vary: dict[str, list[Any]], announce: Callable[[str], None] = lambda text: None
) -> list[dict[str, Any]]:
    """Train at every combination of values of settings; returns a row for each and every mode, with the last `loss` and `accuracy`.

    Each combination is a run of its own, in the folder `key=value,...` of `run.folder`; the mode "ideal", which no setting
    changes, is one in the folder `ideal`. After each, `sweep.csv` and `sweep.png` are written anew: accuracies over the values of
    the first setting, a line for every combination of the others, through the means over values of `seed` that did not diverge.

    Args:
        run: What all runs have in common. `run.resume` goes on with those that were begun, and begins those that are new.
        vary: Values by keys of the spec: {"adc.bits": [6, 8], "seed": [0, 1]}.
        announce: Hears of every run before it begins.

    Raises:
        ValueError: A combination cannot be trained, which is found before any is, or as `train`.
    """
    for key, values in vary.items():
        if not values or any(value in values[:place] for place, value in enumerate(values)):
            raise ValueError(
                f"sweep: `vary` must hold values that differ, got {values} for {key}; for instance adc.bits=6,8"
            )
    if run.folder.exists() != run.resume:
        found = "a folder; use --resume or another --name" if not run.resume else "none; leave out --resume"
        raise ValueError(
            f"sweep: `{run.folder}` must {'' if run.resume else 'not '}exist {'to resume' if run.resume else 'yet'}, got {found}"
        )
    rows: list[dict[str, Any]] = []
    runs = _runs(run, vary)
    for number, (point, each) in enumerate(runs):
        announce(f"{each.folder.name} ({number + 1} of {len(runs)})")
        records = train(replace(each, resume=each.folder.exists()))
        for mode in modes_of(each):
            last = [record for record in records if record["mode"] == mode][-1]
            rows.append({**point, "mode": mode, "loss": last["loss"], "accuracy": last["accuracy"]})
        _write(rows, list(vary), run.folder / "sweep.csv")
        _plot(rows, vary, run.folder / "sweep.png")
    return rows


def _runs(run: Run, vary: dict[str, list[Any]]) -> list[tuple[dict[str, Any], Run]]:
    """The values of every run, none of the ideal one, and the run."""
    runs: list[tuple[dict[str, Any], Run]] = []
    for values in itertools.product(*vary.values()):
        point = dict(zip(vary, values, strict=True))
        each = replace(run, spec=run.spec.with_overrides(nested(point)))
        modes = modes_of(each)
        if "ideal" in modes and not runs:
            runs.append(({}, replace(run, folder=run.folder / "ideal", modes=("ideal",))))
        modes = tuple(mode for mode in modes if mode != "ideal")
        if modes:
            name = ",".join(f"{key}={shown(value)}" for key, value in point.items()).replace(os.sep, "-")
            runs.append((point, replace(each, folder=run.folder / name, modes=modes)))
    for _, each in runs:
        prepare(each)
    return runs


def shown(value: Any) -> str:
    """A value of a setting as a command line has it: null, true, 1e-07, soft_bounds."""
    return value if isinstance(value, str) else json.dumps(value)


def _write(rows: list[dict[str, Any]], keys: list[str], path: Path) -> None:
    scratch = path.with_name(f".{path.name}.part")
    with scratch.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [*keys, "mode", "loss", "accuracy"])
        table.writeheader()
        table.writerows([{key: shown(value) for key, value in row.items()} for row in rows])
    scratch.replace(path)


def _plot(rows: list[dict[str, Any]], vary: dict[str, list[Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    along, *others = [key for key in vary if key != REPEATED] or [REPEATED]
    lines: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row["accuracy"] is None:
            continue
        label = ", ".join([row["mode"], *(f"{key}={shown(row[key])}" for key in others if key in row)])
        places = [vary[along].index(row[along])] if along in row else range(len(vary[along]))
        for place in places:
            lines.setdefault(label, {}).setdefault(place, []).append(row["accuracy"])
    for label, points in lines.items():
        means = [mean(points.get(place, [nan])) for place in range(len(vary[along]))]
        if label == "ideal":
            axis.plot(means, STYLES[label], label=label)
            continue
        (line,) = axis.plot(means, label=label)
        for place, found in points.items():
            axis.plot([place] * len(found), found, "o", color=line.get_color(), markersize=3)
    axis.set_xticks(range(len(vary[along])), [shown(value) for value in vary[along]])
    axis.set(xlabel=along, ylabel="test accuracy")
    axis.grid(alpha=0.3)
    if lines:
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
