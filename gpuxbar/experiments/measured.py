"""Single pulses measured on devices, from a CSV.

The file has a header and a line a pulse; lines that begin with # are comments. Columns, in any order and case, others are ignored:

    g_before [uS]   conductance before the pulse; the unit in brackets is S, mS, uS (or µS) or nS
    dg [uS]         its change by the pulse, signed
    direction       +1 potentiation, -1 depression
    device          optional: a name, for the spread between devices

or, of trains of pulses, in the order in which they were given:

    g [uS]          conductance after the pulse; empty where it was not read
    direction       as above
    device          as above; trains of several devices may alternate
    cycle           optional: where it changes, the device was brought elsewhere before the pulse, by other means

There a change is counted from the line before of the same device and cycle; a pulse without a read before or after it tells none.

Commas part the columns, or what the header has between them: semicolons or tabs, and then numbers may have decimal commas.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

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
        names = [_name(title) for title in header]
        train = "g" in names and not {"g_before", "dg"} & set(names)
        columns = {name: _column(path, header, name) for name in (("g",) if train else ("g_before", "dg"))}
        if "direction" not in names:
            raise ValueError(
                f"read_pulses: `{path}` must have a column 'direction' (+1 or -1), got {header}; the sign of a noisy change "
                "does not tell the pulse's"
            )
        rows = list(lines)
    if not rows:
        raise ValueError(f"read_pulses: `{path}` must hold a line a pulse, got none; measure first")
    rising = _directions(path, rows, names.index("direction"))
    values = [scale * _numbers(path, rows, header[at], at, train) for at, scale in columns.values()]
    device = _texts(rows, names, "device")
    if train:
        return _changes(path, values[0], rising, device, _texts(rows, names, "cycle"))
    return Pulses(values[0], values[1], rising, np.unique(device, return_inverse=True)[1])


def _changes(
    path: str | Path, g: np.ndarray, rising: np.ndarray, device: np.ndarray, cycle: np.ndarray
) -> Pulses:
    """Of conductances after each pulse, NaN where not read."""
    order = np.argsort(device, kind="stable")  # device by device, each in its order
    before, after = order[:-1], order[1:]
    known = np.isfinite(g[before]) & np.isfinite(g[after])
    known &= (device[before] == device[after]) & (cycle[before] == cycle[after])
    before, after = before[known], after[known]
    if not len(after):
        raise ValueError(
            f"read_pulses: `{path}` must hold pulses of a device one after another, each with its 'g' read, got none such; sort "
            "the lines by time, and see that 'cycle' does not change at every pulse"
        )
    return Pulses(
        g[before], g[after] - g[before], rising[after], np.unique(device[after], return_inverse=True)[1]
    )


def _texts(rows: list[tuple[int, list[str]]], names: list[str], name: str) -> np.ndarray:
    """The cells of an optional column; empty ones where there is none."""
    at = names.index(name) if name in names else None
    return np.array(["" if at is None or at >= len(row) else row[at] for _, row in rows])


def _directions(path: str | Path, rows: list[tuple[int, list[str]]], at: int) -> np.ndarray:
    cells = [_cell(row, at) for _, row in rows]
    for (text, way), (number, _) in zip(cells, rows, strict=True):
        if way not in (1.0, -1.0):
            raise ValueError(
                f"read_pulses: column 'direction' must be +1 or -1, got {text!r} in line {number} of {path}; write +1 for "
                "potentiation, -1 for depression, and a line for each pulse of a train"
            )
    return np.array([way > 0 for _, way in cells])


def _numbers(
    path: str | Path, rows: list[tuple[int, list[str]]], title: str, at: int, may_be_empty: bool
) -> np.ndarray:
    """A column of finite numbers; NaN where a cell is empty, if it may be."""
    cells = [_cell(row, at) for _, row in rows]
    wrong = [
        (number, text)
        for (number, _), (text, value) in zip(rows, cells, strict=True)
        if not (np.isfinite(value) or (may_be_empty and not text))
    ]
    if wrong:
        number, text = wrong[0]
        more = f", and {len(wrong) - 1} more of such lines" if len(wrong) > 1 else ""
        way_out = "empty the cell" if may_be_empty else "remove or mend the line"
        raise ValueError(
            f"read_pulses: column '{title}' must hold finite numbers, got {text!r} in line {number} of {path}{more}; {way_out}"
        )
    return np.array([value for _, value in cells])


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
        f"'{name} [uS]', or of trains have one 'g [uS]', the conductance after each pulse"
    )


def _cell(row: list[str], at: int) -> tuple[str, float]:
    """Text and number in a column; NaN where there is none."""
    text = row[at] if at < len(row) else ""
    try:
        return text, float(text)
    except ValueError:
        return text, float("nan")
