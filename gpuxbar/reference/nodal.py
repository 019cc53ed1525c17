"""A crossbar with resistive wires, solved node by node: the sparse oracle of everything about parasitics.

Nodes: wordline u[r, c] and bitline w[r, c], the device between them. The wordline is driven at its left end,
column 0; the bitline is sensed at its lower end, row R - 1, on a virtual ground; the other ends are open.
Branches are unknowns too (modified nodal analysis), so any resistance may be exactly 0:

    u[r, c-1] - u[r, c] = r_wordline j[r, c]     with u[r, -1] = v[r] and r_source in place of r_wordline
    w[r, c] - w[r+1, c] = r_bitline i[r, c]      with w[R, c] = drive[c] (0) and r_sink in place of r_bitline
    j[r, c] - j[r, c+1] = i[r, c] - i[r-1, c] = g[r, c] (u[r, c] - w[r, c])

Source: Ho, Ruehli and Brennan, IEEE Trans. Circuits Syst. 22 (1975).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Nodes", "Wires", "nodal_conductance", "node_voltages"]


@dataclass(frozen=True)
class Wires:
    """Resistances along the lines of an R x C tile, ohm: `wordline` [R], `bitline` [C], `source` [R], `sink` [C]."""

    wordline: np.ndarray
    bitline: np.ndarray
    source: np.ndarray
    sink: np.ndarray

    @classmethod
    def of(cls, rows: int, cols: int, r_wordline: Any, r_bitline: Any, r_source: Any, r_sink: Any) -> Wires:
        """One number for all lines, or one per line."""
        given = (r_wordline, rows), (r_bitline, cols), (r_source, rows), (r_sink, cols)
        return cls(*(np.broadcast_to(np.asarray(value, np.float64), (count,)) for value, count in given))

    def segments(self) -> tuple[np.ndarray, np.ndarray]:
        """Of every cell [R, C]: resistance of the wordline segment left of it, of the bitline segment below it."""
        left = np.repeat(self.wordline[:, None], len(self.bitline), axis=1)
        left[:, :1] = self.source[:, None]
        below = np.repeat(self.bitline[None, :], len(self.wordline), axis=0)
        below[-1:, :] = self.sink[None, :]
        return left, below


@dataclass(frozen=True)
class Nodes:
    """The solution for a stack of inputs: voltages [..., R, C], V, and currents of the bitlines' ends [..., C], A."""

    wordline: np.ndarray
    bitline: np.ndarray
    current: np.ndarray


def node_voltages(
    v: np.ndarray,
    g: np.ndarray,
    *,
    r_wordline: Any,
    r_bitline: Any,
    r_source: Any = 0.0,
    r_sink: Any = 0.0,
    drive: np.ndarray | None = None,
) -> Nodes:
    """All node voltages of one tile for inputs `v` [..., R], V, and bitline ends held at `drive` [..., C] (None: 0)."""
    from scipy.sparse import coo_array
    from scipy.sparse.linalg import splu

    g = np.asarray(g, np.float64)
    rows, cols = g.shape
    v = np.asarray(v, np.float64)
    lead = v.shape[:-1]
    left, below = Wires.of(rows, cols, r_wordline, r_bitline, r_source, r_sink).segments()
    size = rows * cols
    cell = np.arange(size).reshape(rows, cols)
    u, w, j, i = cell, cell + size, cell + 2 * size, cell + 3 * size  # unknowns; equations alike
    entries: list[tuple[np.ndarray, np.ndarray, Any]] = [
        # wordline branch of a cell: previous node - own node - r j = 0
        (u, u, -1.0), (u[:, 1:], u[:, :-1], 1.0), (u, j, -left),
        # bitline branch below a cell: own node - next node - r i = 0
        (w, w, 1.0), (w[:-1], w[1:], -1.0), (w, i, -below),
        # wordline node: j - next j - g (u - w) = 0
        (j, j, 1.0), (j[:, :-1], j[:, 1:], -1.0), (j, u, -g), (j, w, g),
        # bitline node: i - previous i - g (u - w) = 0
        (i, i, 1.0), (i[1:], i[:-1], -1.0), (i, u, -g), (i, w, g),
    ]  # fmt: skip
    at = [np.broadcast_to(e, r.shape).ravel() for r, _, e in entries]
    matrix = coo_array(
        (np.concatenate(at), (np.concatenate([r.ravel() for r, _, _ in entries]), np.concatenate([c.ravel() for _, c, _ in entries]))),
        shape=(4 * size, 4 * size),
    ).tocsc()  # fmt: skip
    right = np.zeros((4 * size, int(np.prod(lead))))
    right[u[:, 0]] = -v.reshape(-1, rows).T
    if drive is not None:
        right[w[-1]] = np.broadcast_to(drive, (*lead, cols)).reshape(-1, cols).T
    solution = splu(matrix).solve(right)
    field = solution.T.reshape(*lead, 4, rows, cols)
    return Nodes(field[..., 0, :, :], field[..., 1, :, :], field[..., 3, -1, :])


def nodal_conductance(
    g: np.ndarray, *, r_wordline: Any, r_bitline: Any, r_source: Any = 0.0, r_sink: Any = 0.0
) -> np.ndarray:
    """The effective conductance [R, C] of one tile: the currents of every input alone, at 1 V."""
    return node_voltages(
        np.eye(g.shape[0]), g, r_wordline=r_wordline, r_bitline=r_bitline, r_source=r_source, r_sink=r_sink
    ).current
