"""Recorded rows: one JSON line a measured case, and the README tables made of them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gpuxbar

__all__ = ["GPU_ROWS", "append", "environment", "readme_tables", "rewrite_readme", "rows_of"]

START, END = (
    "<!-- gpuxbar.bench: generated, see `python -m gpuxbar.bench --readme` -->",
    "<!-- /gpuxbar.bench -->",
)
NOT_RUN = "not yet run on a GPU"
# what a GPU is to show, per case: H200, 4096 x 4096 x 4096, 128-row tiles
GPU_ROWS = (
    ("noise and ADC behind the product", ">= 85 % of the copy bandwidth"),
    ("product with noise and ADC", "<= 1.2 ms"),
)


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
        dirty = git("status", "--porcelain", "--", ".", ":!examples/results", ":!README.md")
        return git("rev-parse", "--short=12", "HEAD") + ("+dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def append(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The last recorded row of every case, in the order of their first appearance."""
    if not path.exists():
        raise FileNotFoundError(
            f"bench: `--record` must name a file of recorded rows, got {path}; measure first"
        )
    last: dict[tuple[str, int], dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        last[row["case"], row["threads"]] = row
    return list(last.values())


def readme_tables(rows: list[dict[str, Any]]) -> str:
    """Markdown of the rows: times and ratios, memory, what has not been run."""
    out = [
        "| case | ideal, ms | gpuxbar / ideal | target | plain PyTorch / ideal | error |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "ideal" in row["ms"]:
            out.append(
                f"| {row['case']}: {row['size']} | {row['ms']['ideal'][1]:.1f} | {_verdict(row)} | <= {row['target']:g} "
                f"| {row['ratio']['plain torch']:.2f} | {row['error']:.0e} |"
            )
    speedups = [row for row in rows if "ideal" not in row["ms"]]
    for row in speedups:
        out.append(
            f"| {row['case']}: {row['size']} | | {_verdict(row, low=False)} | >= {row['target']:g} | | {row['error']:.0e} |"
        )
    out.extend(
        f"| H200, 4096 x 4096 x 4096: {what} | | {NOT_RUN} | {target} | | |" for what, target in GPU_ROWS
    )
    memory = [row for row in rows if row["extra_mb"]]
    if memory:
        out += [
            "",
            "| extra memory of one call, MB | ideal | gpuxbar | target | plain PyTorch |",
            "|---|---|---|---|---|",
        ]
        for row in memory:
            mb = {
                name: "not measured" if value is None else f"{value:.1f}"
                for name, value in row["extra_mb"].items()
            }
            out.append(
                f"| {row['case']} | {mb['ideal']} | {mb['gpuxbar']} | <= {row['target_mb']:g} | {mb['plain torch']} |"
            )
    out += ["", *_machines(rows)]
    return "\n".join(out)


def _verdict(row: dict[str, Any], low: bool = True) -> str:
    ratio, target = row["ratio"]["gpuxbar"], row["target"]
    met = ratio <= target if low else ratio >= target
    return f"{ratio:.2f}" if met else f"{ratio:.2f} (missed)"


def _machines(rows: list[dict[str, Any]]) -> list[str]:
    """Where the rows come from, one line a machine and state of the code."""
    lines = {
        f"{row['cpu']}, {row['cores']} cores; torch {row['torch']}, numpy {row['numpy']}, gpuxbar {row['gpuxbar']} "
        f"at {row['commit']}, {row['date'][:10]}."
        for row in rows
    }
    return sorted(lines)


def rewrite_readme(readme: Path, rows: list[dict[str, Any]]) -> None:
    """Put the tables of the rows between the markers of a README."""
    text = readme.read_text()
    if START not in text or END not in text:
        raise ValueError(
            f"bench: `--readme` must have the lines {START!r} and {END!r} in {readme}, got neither or one; add them"
        )
    head, rest = text.split(START, 1)
    readme.write_text(f"{head}{START}\n\n{readme_tables(rows)}\n\n{END}{rest.split(END, 1)[1]}")
