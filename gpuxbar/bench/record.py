"""Recorded rows: one JSON line a measured case, and the tables of the READMEs made of them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gpuxbar

__all__ = [
    "append",
    "avx2_table",
    "environment",
    "lines_of",
    "markdown",
    "markers",
    "other_ratios",
    "put_table",
    "readme_tables",
    "rewrite_readmes",
    "rows_of",
    "summary_table",
    "training_table",
    "wires_table",
]

START, END = (
    "<!-- gpuxbar.bench: generated, see `gpuxbar bench --readme` -->",
    "<!-- /gpuxbar.bench -->",
)
READS = "reads on tiles of 128 x 128 both ways, 8-bit DAC and ADC, noise"
SUMMARY = {  # case: training step, what is computed as on crossbars
    "lenet5-step": ("LeNet-5, batch 64", READS),
    "resnet20-step": ("ResNet-20, batch 32", READS),
    "resnet50-step": ("ResNet-50, 224 x 224, batch 4", READS),
    "transformer-step": ("transformer layer of 256, 8 x 64 tokens", READS),
    "lstm-step": ("LSTM of 256, 35 tokens, batch 32", READS),
    "resnet20-in-situ-step": ("ResNet-20, batch 32", "the same reads, updates by pulse trains"),
    "txsim-resnet20-in-situ-step": (
        "ResNet-20, batch 32", "TxSim's devices, law and tiles in situ, wires solved for a tenth of the tiles a step",
    ),
    "txsim-resnet50-in-situ-step": ("ResNet-50, 224 x 224, batch 4", "the same"),
    "txsim-sliced-resnet20-in-situ-step": ("ResNet-20, batch 32", "the same, each weight in 16 slices of 2 bits"),
}  # fmt: skip
PAGES = {  # where the tables stand
    "wires-training": "README.md", "reads": "examples/README.md", "updates": "examples/README.md", "wires": "examples/README.md",
}  # fmt: skip


def environment(root: Path) -> dict[str, Any]:
    """Machine, versions, commit and time of a row."""
    return {
        "cpu": _cpu(), "cores": os.cpu_count(), "torch": torch.__version__, "numpy": np.__version__,
        "gpuxbar": gpuxbar.__version__, "commit": _commit(root),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip


def _cpu() -> str:
    """Name of the processor, with its widest vectors: they decide the speed."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    found = {key.strip(): value.strip() for key, value in fields.items()}
    flags = found.get("flags", "").split()
    vectors = next((name for name in ("avx512f", "avx2") if name in flags), platform.machine())
    family = ", ".join(f"{key} {found[key]}" for key in ("cpu family", "model") if key in found)
    return f"{found.get('model name', platform.machine())} ({family}, {vectors})"


def _commit(root: Path) -> str:
    """Short hash, with "+dirty" when anything but recorded rows differs from it."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        pages = (f":!{page}" for page in {*PAGES.values()})
        dirty = git("status", "--porcelain", "--", ".", ":!examples/results", *pages)
        return git("rev-parse", "--short=12", "HEAD") + ("+dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def append(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def lines_of(path: Path) -> list[dict[str, Any]]:
    """All recorded rows, in order; none where there is no file yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The last recorded row of every case, in the order of their first appearance."""
    if not path.exists():
        raise FileNotFoundError(
            f"bench: `--record` must name a file of recorded rows, got {path}; measure first"
        )
    last: dict[tuple[str, int], dict[str, Any]] = {}
    for row in lines_of(path):
        last[row["case"], row["threads"]] = row
    return list(last.values())


def readme_tables(rows: list[dict[str, Any]]) -> str:
    """Markdown of the rows: times and ratios, speed-ups last, and memory."""
    times = []
    for row in sorted(rows, key=_is_cost, reverse=True):
        ideal = _ms(row["ms"]["ideal"][1]) if _is_cost(row) else ""
        case, error = f"{row['case']}: {row['size']}", f"{row['error']:.0e}"
        times.append((case, ideal, _verdict(row), _target(row), other_ratios(row), error))
    memory = []
    for row in (row for row in rows if row["extra_mb"]):
        ideal, ours, plain = (_mb(row["extra_mb"][name]) for name in ("ideal", "gpuxbar", "plain torch"))
        memory.append((row["case"], ideal, ours, f"<= {row['target_mb']:g}", plain))
    parts = [markdown(("case", "ideal, ms", "gpuxbar / ideal", "target", "others / ideal", "error"), times)]
    if memory:
        parts.append(
            markdown(("extra memory of one call, MB", "ideal", "gpuxbar", "target", "plain PyTorch"), memory)
        )
    return "\n\n".join([*parts, _machines(rows)])


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    first, *others = (f"| {' | '.join(cells)} |" for cells in (head, *rows))
    return "\n".join([first, f"|{'---|' * len(head)}", *others])


def other_ratios(row: dict[str, Any]) -> str:
    """How many times the ideal all other contenders take."""
    ratios = {name: ratio for name, ratio in row["ratio"].items() if name != "gpuxbar"}
    return ", ".join(f"{name} {ratio:.3g}" for name, ratio in ratios.items())


def _ms(time: float) -> str:
    return f"{time:.1f}" if time >= 1 else f"{time:.2g}"


def _mb(memory: float | None) -> str:
    return "not measured" if memory is None else f"{memory:.1f}"


def _verdict(row: dict[str, Any]) -> str:
    ratio, target = row["ratio"]["gpuxbar"], row["target"]
    met = target is None or (ratio <= target if _is_cost(row) else ratio >= target)
    return f"{ratio:.2f}" if met else f"{ratio:.2f} (missed)"


def _target(row: dict[str, Any]) -> str:
    return "" if row["target"] is None else f"{'<=' if _is_cost(row) else '>='} {row['target']:g}"


def _is_cost(row: dict[str, Any]) -> bool:
    """Whether its ratio is to an ideal, and not a speed-up."""
    return "ideal" in row["ms"]


def _machines(rows: list[dict[str, Any]]) -> str:
    """Where the rows come from, one line a machine and state of the code."""
    lines = {
        f"{row['cpu']}, {row['cores']} cores; torch {row['torch']}, numpy {row['numpy']}, gpuxbar {row['gpuxbar']} "
        f"at {row['commit']}, {row['date'][:10]}."
        for row in rows
    }
    return "\n".join(sorted(lines))


def wires_table(rows: list[dict[str, Any]]) -> str:
    """Markdown of the rows about wires: milliseconds a tile, and how much longer the others take."""
    cells = []
    for row in rows:
        ms = row["ms"]["gpuxbar"][1]
        others = {name: t[1] / ms for name, t in row["ms"].items() if name != "gpuxbar"}
        text = ", ".join(f"{name} {float(f'{ratio:.2g}'):g}" for name, ratio in others.items())
        memory = row["extra_mb"].get("gpuxbar")
        cells.append((
            f"{row['case']}: {row['size']}", _wires_verdict(row), _wires_target(row), text,
            "" if memory is None else f"{memory:.1f}", f"{row['error']:.0e}",
        ))  # fmt: skip
    head = "case", "gpuxbar, ms a tile", "target", "others, times as long", "extra MB", "error"
    return f"{markdown(head, cells)}\n\n{_machines(rows)}"


def _wires_target(row: dict[str, Any]) -> str:
    if row["target_ms"] is not None:
        return f"<= {row['target_ms']:g} ms"
    return "" if row["target"] is None else f"<= {row['target']:g} of a {next(iter(row['ms']))}"


def _wires_verdict(row: dict[str, Any]) -> str:
    ms = row["ms"]["gpuxbar"][1]
    if row["target_ms"] is not None:
        missed = ms > row["target_ms"]
    else:  # the ratio of a single contender to itself is not recorded
        missed = row["target"] is not None and row["ratio"]["gpuxbar"] > row["target"]
    return f"{ms:.3g}{' (missed)' * missed}"


def avx2_table(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> str:
    """Markdown of the rows of a CPU without AVX-512 beside those of one that has it."""
    cells = []
    wide = {(row["case"], row["threads"]): row for row in others}
    for row in rows:
        other = wide.get((row["case"], row["threads"]))
        wires = _kind(row["case"]) == "wires"
        verdict, target = (_wires_verdict, _wires_target) if wires else (_verdict, _target)
        beside = "" if other is None else verdict(other)
        cells.append((row["case"], verdict(row), beside, target(row), "" if wires else other_ratios(row)))
    head = "case", "gpuxbar / ideal, or ms a tile of wires", "with AVX-512", "target", "others / ideal"
    return f"{markdown(head, cells)}\n\n{_machines(rows)}"


def training_table(rows: list[dict[str, Any]]) -> str:
    """Markdown of the runs of examples/06_train_through_wires.py."""
    cells = []
    for row in rows:
        found = row["on_exact_wires"]
        error = f"{row['estimated_error']:.0e}" if row["estimated_error"] else ""
        exact = f"{sum(found) / len(found):.3f} ({min(found):.3f}, {max(found):.3f})"
        cells.append((row["trained"], f"{row['accuracy']:.3f}", exact, f"{row['ms_a_step']:.0f}", error))
    head = (
        "trained with",
        "accuracy there",
        "on exact wires (lowest, highest)",
        "ms a step",
        "estimated error of a tile",
    )
    first = rows[0]
    runs = f"{first['epochs']} epochs of digits on {first['threads']} CPU threads, {len(first['on_exact_wires'])} networks each."
    return f"{markdown(head, cells)}\n\n{runs}\n{_machines(rows)}"


def summary_table(rows: list[dict[str, Any]]) -> str:
    """Markdown of what training steps cost, of the rows of all cases of `SUMMARY`."""
    found = {row["case"]: row for row in rows}
    cells = [
        (step, what, f"{found[case]['ratio']['gpuxbar']:.2f}", other_ratios(found[case]))
        for case, (step, what) in SUMMARY.items()
    ]
    head = "training step", "as on crossbars", "times the ideal step of PyTorch", "others"
    return f"{markdown(head, cells)}\n\n{_machines([found[case] for case in SUMMARY])}"


def rewrite_readmes(root: Path, rows: list[dict[str, Any]]) -> None:
    """Put the tables of the rows between the markers of the pages under `root`: each kind of rows has a place of its own."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(_kind(row["case"]), []).append(row)
    tables = {
        "reads": readme_tables,
        "updates": readme_tables,
        "wires": wires_table,
        "wires-training": training_table,
    }
    for kind, of_kind in kinds.items():
        put_table(root / PAGES[kind], tables[kind](of_kind), *markers(kind))


def _kind(case: str) -> str:
    """The table that a case's row belongs to."""
    if case.startswith(("update", "carry", "pulse")) or case.endswith("in-situ-step"):
        return "updates"
    return next((kind for kind in ("wires-training", "wires") if case.startswith(kind)), "reads")


def markers(kind: str) -> tuple[str, str]:
    """The lines between which a kind of table stands."""
    if kind == "reads":
        return START, END
    return START.replace("gpuxbar.bench:", f"gpuxbar.bench {kind}:"), END.replace("bench", f"bench {kind}")


def put_table(readme: Path, table: str, start: str, end: str) -> None:
    """Put a table between two lines of a README, in place of what is there."""
    text = readme.read_text()
    if start not in text or end not in text:
        raise ValueError(
            f"bench: `--readme` must have the lines {start!r} and {end!r} in {readme}, got neither or one; add them"
        )
    head, rest = text.split(start, 1)
    readme.write_text(f"{head}{start}\n\n{table}\n\n{end}{rest.split(end, 1)[1]}")
