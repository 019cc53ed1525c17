"""The voltages inside a tile, and a picture of what its wires take."""

from __future__ import annotations

from typing import Any

from gpuxbar import reference
from gpuxbar.circuit.tile import Tile
from gpuxbar.reference.nodal import Nodes as NodeVoltages

__all__ = ["NodeVoltages", "draw_ir_drop", "node_voltages"]


def node_voltages(
    v: Any, g: Any, *, r_wordline: Any, r_bitline: Any, r_source: Any = 0.0, r_sink: Any = 0.0
) -> NodeVoltages:
    """Solve one tile node by node (sparse, float64): for looking into a tile, not for training.

    Args:
        v: Wordline voltages, [..., R], V.
        g: Conductance, [R, C], S.
        r_wordline, r_bitline, r_source, r_sink: As in `ops.effective_conductance`, ohm.

    Returns:
        `wordline`, `bitline`: voltages at every cell, float64 [..., R, C], V; `current`: what the sense amplifiers
        see, [..., C], A.

    Raises:
        ValueError: An argument has another shape, is negative or is not finite.

    Source:
        Ho, Ruehli and Brennan, IEEE Trans. Circuits Syst. 22 (1975) (modified nodal analysis).
    """
    tile = Tile.of("node_voltages", v, g, r_wordline, r_bitline, r_source, r_sink, batch=True)
    return _solve(tile)


def draw_ir_drop(
    v: Any, g: Any, *, r_wordline: Any, r_bitline: Any, r_source: Any = 0.0, r_sink: Any = 0.0
) -> Any:
    """Three maps of a tile under one input: what its wordlines lose, what its bitlines rise to, what its cells see.

    Args:
        v: Wordline voltages, [R], V; other arguments as in `node_voltages`.

    Returns:
        A `matplotlib.figure.Figure`; `figure.savefig("ir_drop.png")` writes it.

    Raises:
        ValueError: As `node_voltages`.
    """
    from matplotlib.figure import Figure

    tile = Tile.of("draw_ir_drop", v, g, r_wordline, r_bitline, r_source, r_sink, batch=False)
    nodes = _solve(tile)
    maps = {
        "lost along the wordlines": tile.v[:, None] - nodes.wordline,
        "rise of the bitlines": nodes.bitline,
        "left across the cells": nodes.wordline - nodes.bitline,
    }
    figure = Figure(figsize=(10.5, 3.4), layout="constrained")
    for axis, (title, volts) in zip(figure.subplots(1, 3), maps.items(), strict=True):
        image = axis.imshow(volts * 1e3, cmap="viridis", aspect="auto", interpolation="nearest")
        axis.set(title=title, xlabel="bitline", ylabel="wordline")
        figure.colorbar(image, ax=axis, label="mV")
    return figure


def _solve(tile: Tile) -> NodeVoltages:
    wires = tile.wires
    return reference.node_voltages(
        tile.v, tile.g, r_wordline=wires.wordline, r_bitline=wires.bitline,
        r_source=wires.source, r_sink=wires.sink,
    )  # fmt: skip
