"""Trainings at every combination of settings of a spec: a table and a picture; an interrupted sweep goes on where it stopped."""

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
from gpuxbar.spec.errors import nearest

__all__ = ["shown", "sweep"]

OPTION = "train."  # before keys of options of a training
TIE = "+"  # between keys that take the same values
OPTIONS = ("network", "epochs", "batch", "lr", "in_situ_lr", "momentum", "optimizer", "seed")
# those that change the mode "ideal" too
OF_IDEAL = [OPTION + name for name in ("network", "epochs", "batch", "lr", "seed")]
REPEATED = {"seed", OPTION + "seed"}  # whose values repeat a point
RESULTS = "loss", "accuracy"
LINES = "-", "--", ":", "-."
LEGEND = 8  # lines that one inside the axes has room for


def sweep(
    run: Run, vary: dict[str, list[Any]], announce: Callable[[str], None] = lambda text: None
) -> list[dict[str, Any]]:
    """Train at every combination of values of settings; returns a row for each and every mode, with the last `loss` and `accuracy`.

    Each combination is a run of its own, in the folder `key=value,...` of `run.folder`; the mode "ideal", which no setting of a
    spec changes, is one in the folder `ideal`, or one for each combination of what changes it. After each, `sweep.csv` and
    `sweep.png` are written anew: accuracies over the values of the first setting, a line for every combination of the others,
    through the means over values of `seed` and `train.seed` that did not diverge.

    Args:
        run: What all runs have in common. `run.resume` goes on with those that were begun, and begins those that are new; rows
            of others stay in `sweep.csv`.
        vary: Values by keys of the spec, {"adc.bits": [6, 8], "seed": [0, 1]}, or of options of the training behind `train.`:
            `train.network`, `train.epochs`, `train.batch`, `train.lr`, `train.in_situ_lr`, `train.momentum`, `train.optimizer` and
            `train.seed`. Keys joined by `+` take each value together: {"tile.rows+tile.cols": [64, 128]}.
        announce: Hears of every run before it begins.

    Raises:
        ValueError: A combination cannot be trained, which is found before any is, or as `train`.
    """
    for key, values in vary.items():
        if not values or any(value in values[:place] for place, value in enumerate(values)):
            raise ValueError(
                f"sweep: `vary` must hold values that differ, got {values} for {key}; for instance adc.bits=6,8"
            )
    keys = [one for key in vary for one in key.split(TIE)]
    for place, key in enumerate(keys):
        if key in keys[:place]:
            raise ValueError(
                f"sweep: `vary` must name a key once, got {key} in {', '.join(vary)}; leave one out"
            )
        if key.startswith(OPTION) and key.removeprefix(OPTION) not in OPTIONS:
            known = [OPTION + name for name in OPTIONS]
            raise ValueError(
                f"sweep: `vary` must hold options of a training behind {OPTION}, got {key}; {nearest(key, known)}"
            )
    if run.folder.exists() != run.resume:
        found = "a folder; use --resume or another --name" if not run.resume else "none; leave out --resume"
        raise ValueError(
            f"sweep: `{run.folder}` must {'' if run.resume else 'not '}exist {'to resume' if run.resume else 'yet'}, got {found}"
        )
    rows: list[dict[str, Any]] = []
    runs, data = _runs(run, vary), None
    for _, each in runs:
        data = prepare(each, data)
    table = run.folder / "sweep.csv"
    others = _others(table, runs)
    for number, (point, each) in enumerate(runs):
        announce(f"{each.folder.name} ({number + 1} of {len(runs)})")
        records = train(replace(each, resume=each.folder.exists()), data)
        for mode in modes_of(each):
            last = [record for record in records if record["mode"] == mode][-1]
            rows.append({**point, "mode": mode, "loss": last["loss"], "accuracy": last["accuracy"]})
        _write([*others, *rows], list(vary), table)
        _plot(rows, vary, run.folder / "sweep.png")
    return rows


def _runs(run: Run, vary: dict[str, list[Any]]) -> list[tuple[dict[str, Any], Run]]:
    """The values of every run, of the ideal ones those that change them, and the run."""
    runs: list[tuple[dict[str, Any], Run]] = []
    for values in itertools.product(*vary.values()):
        point = dict(zip(vary, values, strict=True))
        modes = modes_of(_at(run, point, run.modes))
        own = {key: value for key, value in point.items() if set(key.split(TIE)) & set(OF_IDEAL)}
        ideal = own, _at(run, own, ("ideal",))
        if "ideal" in modes and ideal not in runs:
            runs.append(ideal)
        modes = tuple(mode for mode in modes if mode != "ideal")
        if modes:
            runs.append((point, _at(run, point, modes)))
    return runs


def _at(run: Run, point: dict[str, Any], modes: tuple[str, ...] | None) -> Run:
    """The run of some modes at a point."""
    each = {one: value for key, value in point.items() for one in key.split(TIE)}
    options = {key.removeprefix(OPTION): value for key, value in each.items() if key.startswith(OPTION)}
    settings = {key: value for key, value in each.items() if not key.startswith(OPTION)}
    spec = run.spec.with_overrides(nested(settings))
    names = ["ideal"] * (modes == ("ideal",)) + [f"{key}={shown(value)}" for key, value in point.items()]
    folder = run.folder / ",".join(names).replace(os.sep, "-")
    return replace(run, spec=spec, folder=folder, modes=modes, **options)


def _others(path: Path, runs: list[tuple[dict[str, Any], Run]]) -> list[dict[str, str]]:
    """The rows of a table but for those of these runs."""
    if not path.exists():
        return []
    here = [
        {key: shown(value) for key, value in {**point, "mode": mode}.items()}
        for point, run in runs
        for mode in modes_of(run)
    ]
    with path.open(newline="", encoding="utf-8") as file:
        rows = [{key: text for key, text in row.items() if text} for row in csv.DictReader(file)]
    return [row for row in rows if {k: v for k, v in row.items() if k not in RESULTS} not in here]


def shown(value: Any) -> str:
    """A value of a setting as a command line has it: null, true, 1e-07, soft_bounds."""
    return value if isinstance(value, str) else json.dumps(value)


def _write(rows: list[dict[str, Any]], keys: list[str], path: Path) -> None:
    scratch = path.with_name(f".{path.name}.part")
    with scratch.open("w", newline="", encoding="utf-8") as file:
        known = [*keys, "mode", *RESULTS]
        more = dict.fromkeys(key for row in rows for key in row if key not in known)  # of an earlier sweep
        table = csv.DictWriter(file, [*keys, *more, "mode", *RESULTS])
        table.writeheader()
        table.writerows([{key: shown(value) for key, value in row.items()} for row in rows])
    scratch.replace(path)


def _plot(rows: list[dict[str, Any]], vary: dict[str, list[Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    along, *others = [key for key in vary if not set(key.split(TIE)) <= REPEATED] or vary
    lines: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row["accuracy"] is None:
            continue
        label = ", ".join([row["mode"], *(f"{key}={shown(row[key])}" for key in others if key in row)])
        places = [vary[along].index(row[along])] if along in row else range(len(vary[along]))
        for place in places:
            lines.setdefault(label, {}).setdefault(place, []).append(row["accuracy"])
    many = len(lines) > LEGEND
    figure = Figure(figsize=(9 if many else 6, max(4, 0.2 * len(lines))), layout="constrained")
    axis = figure.subplots()
    for number, (label, points) in enumerate(lines.items()):
        means = [mean(points.get(place, [nan])) for place in range(len(vary[along]))]
        if label == "ideal":
            axis.plot(means, STYLES[label], label=label)
            continue
        # in another style where the ten colours are used up
        (line,) = axis.plot(means, LINES[number // 10 % len(LINES)], label=label)
        for place, found in points.items():
            axis.plot([place] * len(found), found, "o", color=line.get_color(), markersize=3)
    axis.set_xticks(range(len(vary[along])), [shown(value) for value in vary[along]])
    axis.set(xlabel=along, ylabel="test accuracy")
    axis.grid(alpha=0.3)
    if many:
        figure.legend(loc="outside right upper", fontsize=8)
    elif lines:
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
