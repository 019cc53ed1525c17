"""The arguments that describe a circuit, checked once for all of gpuxbar.circuit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpuxbar.ops.effective_conductance import check_conductance, per_line
from gpuxbar.reference.nodal import Wires

__all__ = ["Tile"]


@dataclass(frozen=True)
class Tile:
    """A tile and its inputs, float64: conductances `g` [R, C], S; voltages `v` [..., R], V; `wires`, ohm."""

    g: np.ndarray
    v: np.ndarray
    wires: Wires

    @classmethod
    def of(cls, op: str, v: Any, g: Any, *resistances: Any, batch: bool) -> Tile:
        """`resistances` in the order of `Wires`; without `batch`, v must be one input."""
        g, v = np.asarray(g, np.float64), np.asarray(v, np.float64)
        if g.ndim != 2 or not g.size:
            raise ValueError(
                f"{op}: `g` must have the axes [R, C] of one tile with a cell, got shape {g.shape}; pass one tile of a stack"
            )
        check_conductance(op, g)
        rows, cols = g.shape
        axes = "[..., R]" if batch else "[R]"
        if not v.ndim or v.shape[-1] != rows or (v.ndim > 1 and not batch):
            raise ValueError(
                f"{op}: `v` must have the axes {axes} with R = {rows}, got shape {v.shape}; give every wordline a voltage"
            )
        if not np.isfinite(v).all():
            raise ValueError(
                f"{op}: `v` must be finite, got {v[~np.isfinite(v)].flat[0]:g} V; look at what computed it"
            )
        names = ("r_wordline", "r_bitline", "r_source", "r_sink")
        for name, value in zip(names, resistances, strict=True):
            per_line(op, name, value, rows, cols)
        return cls(g, v, Wires.of(rows, cols, *resistances))
