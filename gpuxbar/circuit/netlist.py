"""A tile as a netlist for ngspice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpuxbar.circuit.tile import Tile

__all__ = ["netlist"]

OP = "netlist"


def netlist(
    v: Any,
    g: Any,
    *,
    r_wordline: Any,
    r_bitline: Any,
    r_source: Any = 0.0,
    r_sink: Any = 0.0,
    title: str = "crossbar tile",
) -> str:
    """The circuit of one tile and one input, as text that `ngspice -b` solves and that a user can go on editing.

    Nodes: `in{r}` a driver, `w{r}_{c}` and `b{r}_{c}` wordline and bitline at a cell, `out{c}` a virtual ground.
    Elements: `rd{r}_{c}` a device, `rw{r}_{c}` and `rb{r}_{c}` the wire segments before it and below it, `vin{r}` a
    driver, `vout{c}` a sense amplifier (0 V), whose current is the output, A. A segment of 0 ohm is a source of 0 V, an
    ideal conductor; a cell of 0 S is left out.

    Args:
        v: Wordline voltage, [R], V.
        g: Conductance, [R, C], S; of weights, a cut of a plane that `ops.program` returns.
        r_wordline, r_bitline, r_source, r_sink: As in `ops.effective_conductance`, ohm.
        title: First line of the netlist.

    Returns:
        The netlist; ngspice prints `i(vout0)` to `i(vout{C-1})` with 16 digits.

    Raises:
        ValueError: An argument has another shape, is negative or is not finite, or `title` has more than one line.
    """
    if not title or len(title.splitlines()) > 1:
        raise ValueError(
            f"{OP}: `title` must be one line, got {title!r}; ngspice reads the second line as an element"
        )
    tile = Tile.of(OP, v, g, r_wordline, r_bitline, r_source, r_sink, batch=False)
    return "\n".join([f"* {title}", *_elements(tile), *_analysis(tile.g.shape[1]), ""])


def _elements(tile: Tile) -> Iterator[str]:
    rows, cols = tile.g.shape
    left, below = tile.wires.segments()
    for r in range(rows):
        yield f"vin{r} in{r} 0 dc {_number(tile.v[r])}"
        for c in range(cols):
            yield _segment(f"w{r}_{c}", f"w{r}_{c - 1}" if c else f"in{r}", f"w{r}_{c}", left[r, c])
            if tile.g[r, c] > 0:
                yield f"rd{r}_{c} w{r}_{c} b{r}_{c} {_number(1 / tile.g[r, c])}"
            after = f"b{r + 1}_{c}" if r + 1 < rows else f"out{c}"
            yield _segment(f"b{r}_{c}", f"b{r}_{c}", after, below[r, c])
    for c in range(cols):
        yield f"vout{c} out{c} 0 dc 0"


def _segment(name: str, start: str, end: str, resistance: float) -> str:
    return f"r{name} {start} {end} {_number(resistance)}" if resistance else f"v{name} {start} {end} dc 0"


def _number(value: float) -> str:
    """A value that reads back as the same double."""
    return repr(float(value))


def _analysis(cols: int) -> Iterator[str]:
    yield ".options gmin=1e-30 reltol=1e-9"
    yield ".control"
    yield "set numdgt=16"
    yield "op"
    for c in range(cols):
        yield f"print i(vout{c})"
    yield "quit"
    yield ".endc"
    yield ".end"
