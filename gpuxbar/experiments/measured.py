"""Single pulses measured on devices, from a CSV.

The file has a header and a line a pulse; lines that begin with # are comments. Columns, in any order and case, others are ignored:

    g_before [uS]   conductance before the pulse; the unit in brackets is S, mS, uS (or µS) or nS
    dg [uS]         its change by the pulse, signed
    direction       +1 potentiation, -1 depression
    device          optional: a name, for the spread between devices

Commas part the columns, or what the header has between them: semicolons or tabs, and then numbers may have decimal commas.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Pulses", "read_pulses"]

UNITS = {"S": 1.0, "mS": 1e-3, "uS": 1e-6, "nS": 1e-9}
MICRO = str.maketrans("\N{MICRO SIGN}\N{GREEK SMALL LETTER MU}", "uu")


@dataclass(frozen=True)
class Pulses:
    """Measured single pulses: conductance before and change, S; direction; index of the device."""

    g_before: np.ndarray
    dg: np.ndarray
    rising: np.ndarray
    device: np.ndarray

    def __len__(self) -> int:
        return len(self.dg)

    def __getitem__(self, which: np.ndarray) -> Pulses:
        return Pulses(self.g_before[which], self.dg[which], self.rising[which], self.device[which])


def read_pulses(path: str | Path) -> Pulses:
    """Read a CSV of single pulses; a wrong file raises a ValueError that names column, unit or line."""
    try:
        content = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        way_out = "save it as UTF-8" if isinstance(error, UnicodeDecodeError) else "check it"
        raise ValueError(
            f"read_pulses: `{path}` must be a readable text file, got {error}; {way_out}"
        ) from error
    with StringIO(content, newline="") as file:
        lines = _cells(file)
        _, header = next(lines, (0, []))
        columns = {name: _column(path, header, name) for name in ("g_before", "dg")}
        names = [_name(title) for title in header]
        if "direction" not in names:
            raise ValueError(
                f"read_pulses: `{path}` must have a column 'direction' (+1 or -1), got {header}; the sign of a noisy change "
                "does not tell the pulse's"
            )
        direction, device = names.index("direction"), names.index("device") if "device" in names else None
        found: dict[str, list[Any]] = {"g_before": [], "dg": [], "direction": [], "device": []}
        for number, row in lines:
            for name, (at, scale) in columns.items():
                found[name].append(scale * _number(path, number, header[at], row, at))
            text, way = _cell(row, direction)
            if way not in (1.0, -1.0):
                raise ValueError(
                    f"read_pulses: column 'direction' must be +1 or -1, got {text!r} in line {number} of {path}; write +1 for "
                    "potentiation, -1 for depression, and a line for each pulse of a train"
                )
            found["direction"].append(way)
            found["device"].append("" if device is None or device >= len(row) else row[device])
    if not found["dg"]:
        raise ValueError(f"read_pulses: `{path}` must hold a line a pulse, got none; measure first")
    _, index = np.unique(found["device"], return_inverse=True)
    return Pulses(np.array(found["g_before"]), np.array(found["dg"]), np.array(found["direction"]) > 0, index)


def _cells(file: StringIO) -> Iterator[tuple[int, list[str]]]:
    """Number and cells of every line but comments and empty ones, numbers with decimal points."""
    lines = [
        (n, line) for n, line in enumerate(file, 1) if line.strip() and not line.lstrip().startswith("#")
    ]
    head = lines[0][1] if lines else ""
    apart = next((mark for mark in ";\t" if mark in head), ",")
    rows = csv.reader((line for _, line in lines), delimiter=apart)
    for row in rows:
        cells = [cell.strip() for cell in row]
        yield (
            lines[rows.line_num - 1][0],
            cells if apart == "," else [cell.replace(",", ".") for cell in cells],
        )


def _name(title: str) -> str:
    """Of a column, without its unit."""
    return title.partition("[")[0].strip().lower()


def _column(path: str | Path, header: list[str], name: str) -> tuple[int, float]:
    """Place of a column and its unit in S."""
    for at, title in enumerate(header):
        if _name(title) != name:
            continue
        unit = title.partition("[")[2].rstrip("] ").strip().translate(MICRO)
        if unit not in UNITS:
            raise ValueError(
                f"read_pulses: column '{name}' of {path} must name its unit, one of {', '.join(UNITS)}, got "
                f"{unit or 'none'!r}; write '{name} [uS]'"
            )
        return at, UNITS[unit]
    raise ValueError(
        f"read_pulses: `{path}` must have a column '{name} [unit]', got {header}; rename the column, for instance "
        f"'{name} [uS]'"
    )


def _cell(row: list[str], at: int) -> tuple[str, float]:
    """Text and number in a column; NaN where there is none."""
    text = row[at] if at < len(row) else ""
    try:
        return text, float(text)
    except ValueError:
        return text, float("nan")


def _number(path: str | Path, line: int, column: str, row: list[str], at: int) -> float:
    text, value = _cell(row, at)
    if not np.isfinite(value):
        raise ValueError(
            f"read_pulses: column '{column}' must hold finite numbers, got {text!r} in line {line} of {path}; remove or "
            "mend the line"
        )
    return value
