"""The wires of tiles: exact solutions against sparse LU, badcrossbar and each other, approximations against a copy."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch

from gpuxbar import ops, reference
from gpuxbar.bench.cases import Case, Contenders, OracleMismatch

__all__ = ["PARASITICS", "by_sparse_lu"]

R_ON = 10e3  # ohm
WIRES: dict[str, Any] = {"r_wordline": 2.5, "r_bitline": 2.5, "r_source": 100.0, "r_sink": 100.0}  # ohm


def exact(size: int, count: int, bound: float, others: bool = True) -> Contenders:
    """All inputs of square tiles at once, by tile; the others solve one tile for all its inputs.

    badcrossbar has no resistances of its own at the ends, so it gets segments there; its network is of the same size.
    """
    g = tiles(count, size)
    run: dict[str, Callable[[], object]] = {}
    if others:
        run["sparse LU"] = lambda: by_sparse_lu(g[0], **WIRES)
        if find_spec("badcrossbar") is not None:
            badcrossbar = import_module("badcrossbar")
            logging.getLogger("badcrossbar").setLevel(logging.WARNING)  # it reports on every solution
            inputs, ohms = np.eye(size), 1.0 / g[0].astype(np.float64)
            run["badcrossbar"] = lambda: badcrossbar.compute(
                inputs, ohms, r_i=WIRES["r_wordline"], node_voltages=False, all_currents=False
            )
    run["gpuxbar"] = ours = partial(ops.effective_conductance, g, **WIRES)
    oracle: Any = by_sparse_lu if size <= 128 else reference.effective_conductance
    return Contenders(run, lambda: checked(ours()[0], oracle(g[0], **WIRES), bound), {"gpuxbar": count})


def gradient(size: int, count: int) -> Contenders:
    """The gradient through the wires of every tile, against their exact solution."""
    g = tiles(count, size)
    grad = np.random.default_rng(1).normal(size=g.shape).astype(np.float32)
    return _beside(
        "exact", partial(ops.effective_conductance, g, **WIRES),
        partial(ops.effective_conductance_gradient, g, grad, **WIRES), count,
        lambda: reference.effective_conductance_gradient(g[:1], grad[:1], **WIRES), 2e-5,
    )  # fmt: skip


def inputs(size: int, count: int, batch: int) -> Contenders:
    """A few inputs of every tile, against forming their effective conductances and multiplying by these."""
    g = tiles(count, size)
    v = np.random.default_rng(1).uniform(-1, 1, (count, batch, size)).astype(np.float32)
    return _beside(
        "exact", lambda: v @ ops.effective_conductance(g, **WIRES), partial(ops.solve_for_inputs, v, g, **WIRES), count,
        lambda: v[:2] @ reference.effective_conductance(g[:2], **WIRES), 5e-6,
    )  # fmt: skip


def approximate(method: Literal["ladder", "mean_field"], size: int = 128, count: int = 400) -> Contenders:
    """An approximation against a copy of the tiles, both into new memory and on all threads."""
    g = tiles(count, size)
    return _beside(
        "copy", torch.from_numpy(g).clone, partial(ops.effective_conductance, g, method=method, **WIRES), count,
        lambda: reference.effective_conductance(g[:2], method=method, **WIRES), 5e-6,
    )  # fmt: skip


def anchored(size: int = 128, count: int = 100, drift: float = 1e-3) -> Contenders:
    """An update of the anchored solution, with a tenth of the tiles due, against solving all."""
    g = tiles(count, size)
    moved = np.clip(g + drift / R_ON * np.random.default_rng(1).normal(size=g.shape), 0, 1 / R_ON)
    moved = moved.astype(np.float32)
    anchor = ops.Anchor.new(g.shape)

    def update(g: np.ndarray, solve_all: bool = False) -> np.ndarray:
        found: np.ndarray = ops.anchored_conductance(g, anchor, tolerance=1.0, solve_all=solve_all, **WIRES)
        return found

    update(g, solve_all=True)
    turns = [moved, g]

    def ours() -> np.ndarray:
        turns.reverse()
        return update(turns[0])

    return _beside(
        "exact", partial(ops.effective_conductance, g, **WIRES), ours, count,
        lambda: reference.effective_conductance(turns[0][:2], **WIRES), 1e-2,
    )  # fmt: skip


def _beside(
    unit: str, other: Callable[[], object], ours: Callable[[], Any], count: int, expected: Callable[[], np.ndarray], bound: float
) -> Contenders:  # fmt: skip
    """What is done with `count` tiles beside another way, by tile; `expected`: what the oracle makes of the first ones then."""

    def check() -> float:
        found, first = ours(), expected()
        return checked(found[: len(first)], first, bound)

    return Contenders({unit: other, "gpuxbar": ours}, check, {unit: count, "gpuxbar": count})


def tiles(count: int, size: int) -> np.ndarray:
    """Conductances uniform up to 1 / R_ON, none of them 0."""
    g = np.random.default_rng(0).uniform(0.01, 1, (count, size, size)) / R_ON
    return g.astype(np.float32)


def checked(found: np.ndarray, expected: np.ndarray, bound: float) -> float:
    """Largest error relative to the largest conductance."""
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not error <= bound:
        raise OracleMismatch(f"results are off by {error:.1e} of the largest; {bound:g} is allowed")
    return error


def by_sparse_lu(
    g: np.ndarray, *, r_wordline: float, r_bitline: float, r_source: float, r_sink: float
) -> np.ndarray:
    """G_eff of one tile from the admittance matrix of its 2 R C nodes: one LU, then all inputs; resistances above 0.

    In SuperLU's ordering that fills least: for 128 x 128 cells, minimum degree of A' + A leaves 1.87 million entries,
    as nested dissection of the grid does (1.87), and COLAMD 2.40.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.linalg import splu

    rows, cols = g.shape
    cell = np.arange(g.size).reshape(rows, cols)
    u, w = cell, g.size + cell  # nodes of the wordlines and of the bitlines
    ohms = {r: np.full(1, 1.0 / r) for r in (r_wordline, r_bitline)}
    branches = [
        (u, w, g.astype(np.float64)), (u[:, :-1], u[:, 1:], ohms[r_wordline]), (w[:-1], w[1:], ohms[r_bitline]),
    ]  # fmt: skip
    entries = []
    for a, b, siemens in branches:
        a, b, y = a.ravel(), b.ravel(), np.broadcast_to(siemens, a.shape).ravel()
        entries += [(a, a, y), (b, b, y), (a, b, -y), (b, a, -y)]
    for ends, ohm in ((u[:, 0], r_source), (w[-1], r_sink)):
        entries.append((ends, ends, np.full(len(ends), 1.0 / ohm)))
    at_row, at_col, values = (np.concatenate(part) for part in zip(*entries, strict=True))
    matrix = coo_array((values, (at_row, at_col)), (2 * g.size, 2 * g.size)).tocsc()
    solver = splu(matrix, "MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
    drive = np.zeros((2 * g.size, rows))
    drive[u[:, 0], np.arange(rows)] = 1.0 / r_source  # one volt at one wordline a column
    result: np.ndarray = solver.solve(drive)[w[-1]].T / r_sink
    return result


TILES = "R_on 10 kohm, 2.5 ohm a segment, 100 ohm at the ends"
PARASITICS = (
    Case("wires-exact-64", f"100 tiles of 64 x 64, {TILES}", None, partial(exact, 64, 100, 5e-6), target_ms=1.0),
    Case("wires-exact-128", f"16 tiles of 128 x 128, {TILES}", None, partial(exact, 128, 16, 5e-6), memory_mb=16, target_ms=6.0),
    Case("wires-exact-256", f"2 tiles of 256 x 256, {TILES}", None, partial(exact, 256, 2, 2e-5, others=False)),
    Case("wires-gradient", f"16 tiles of 128 x 128, {TILES}: gradient", None, partial(gradient, 128, 16)),
    Case("wires-inputs", f"16 tiles of 128 x 128, {TILES}, 4 inputs each", None, partial(inputs, 128, 16, 4)),
    Case("wires-ladder", f"400 tiles of 128 x 128, {TILES}", 3.0, partial(approximate, "ladder"), memory_mb=32),
    Case("wires-mean-field", f"400 tiles of 128 x 128, {TILES}", None, partial(approximate, "mean_field")),
    Case("wires-anchored", f"100 tiles of 128 x 128, {TILES}, a tenth due", None, anchored),
)  # fmt: skip
