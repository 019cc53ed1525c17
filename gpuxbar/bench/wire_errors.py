"""`python -m gpuxbar.bench.wire_errors`: how far every method of `effective_conductance` is from the nodal solution.

Pairs of tiles are solved node by node in float64 and by every method in float32. `--record` appends a row for each pair;
`--readme` puts the table of recorded rows in a README; `--picture` draws it. Tiles of 256 take half a minute each.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from gpuxbar import ops, reference
from gpuxbar.bench.record import append, environment, markdown, put_table, rows_of
from gpuxbar.experiments.messages import ended_by

__all__ = ["CASES", "MARKERS", "Pair", "draw", "errors", "table"]

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "examples" / "results" / "wire-errors.jsonl"
INPUTS = 64  # random ones, for the error of a difference of two arrays
MARKERS = (
    "<!-- gpuxbar.bench.wire_errors: generated, see `python -m gpuxbar.bench.wire_errors --readme` -->",
    "<!-- /gpuxbar.bench.wire_errors -->",
)


@dataclass(frozen=True)
class Pair:
    """The two tiles of a pair, size x size cells up to 1 / `r_on`: of Gaussian weights, one of two cells at its lowest
    conductance, or uniform; `r_wire` a segment, `r_end` at both ends, ohm."""

    cells: str
    size: int
    r_on: float
    r_wire: float
    r_end: float

    @property
    def name(self) -> str:
        return f"{self.cells}-{self.size}-{self.r_on:g}-{self.r_wire:g}-{self.r_end:g}"

    @property
    def wires(self) -> dict[str, float]:
        return {
            "r_wordline": self.r_wire,
            "r_bitline": self.r_wire,
            "r_source": self.r_end,
            "r_sink": self.r_end,
        }

    def tiles(self) -> np.ndarray:
        """float32 [2, size, size], S; the lowest conductance is a hundredth of the highest."""
        rng = np.random.default_rng(self.size)
        shape = (self.size, self.size)
        if self.cells == "uniform":
            share = rng.uniform(0, 1, (2, *shape))
        else:
            w = np.clip(rng.normal(size=shape) / 3, -1, 1)
            share = np.stack([np.maximum(w, 0), np.maximum(-w, 0)])
        return ((0.01 + 0.99 * share) / self.r_on).astype(np.float32)


WIRES = ((10e3, 1.0, 0.0), (10e3, 2.5, 100.0), (10e3, 2.5, 1000.0), (1e3, 1.0, 100.0))
CASES = tuple(
    Pair(cells, size, *wires)
    for cells in ("gaussian", "uniform")
    for size in (32, 64, 128, 256)
    for wires in WIRES
)


def errors(pair: Pair) -> dict[str, tuple[float, float]]:
    """Of every method: relative error of a tile, and of the difference of the pair's currents.

    |G - G_nodal| / |G_nodal| in Frobenius norms; the same of v @ (G+ - G-) for random v, uniform from 0 to 1.
    """
    g = pair.tiles()
    exact = np.stack([reference.nodal_conductance(tile, **pair.wires) for tile in g])
    v = np.random.default_rng(0).uniform(size=(INPUTS, pair.size))
    current = v @ (exact[0] - exact[1])
    found = {}
    for method in reference.METHODS:
        off = ops.effective_conductance(g, method=method, **pair.wires) - exact  # type: ignore[arg-type]
        single = np.linalg.norm(off) / np.linalg.norm(exact)
        double = np.linalg.norm(v @ (off[0] - off[1])) / np.linalg.norm(current)
        found[method] = float(single), float(double)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown of recorded rows."""
    cells = []
    for row in rows:
        pair = Pair(**row["pair"])
        of_methods = (row["errors"][method] for method in reference.METHODS)
        cells.append((
            f"{pair.cells}, {pair.size} x {pair.size}", f"{pair.r_on / 1e3:g} kohm", f"{pair.r_wire:g}, {pair.r_end:g} ohm",
            *(f"{single:.1e} ({double:.1e})" for single, double in of_methods),
        ))  # fmt: skip
    return markdown(("cells", "R_on", "wires", *reference.METHODS), cells)


def draw(rows: list[dict[str, Any]]) -> Any:
    """The errors of a tile as a heat map, a `matplotlib.figure.Figure`."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    names = [row["case"] for row in rows]
    values = np.array([[row["errors"][method][0] for method in reference.METHODS] for row in rows])
    figure = Figure(figsize=(7, 1 + 0.25 * len(rows)), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(values, cmap="viridis_r", norm=LogNorm(1e-7, 1e2), aspect="auto")
    axis.set_xticks(range(len(reference.METHODS)), reference.METHODS)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    for (row, column), value in np.ndenumerate(values):
        axis.text(column, row, f"{value:.0e}", ha="center", va="center", fontsize=6)
    figure.colorbar(image, ax=axis, label="relative error of a tile")
    return figure


app = typer.Typer(add_completion=False)


@app.command()
def main(
    sizes: Annotated[list[int] | None, typer.Argument(help="Sizes to solve; all if none is given.")] = None,
    record: Annotated[Path, typer.Option(help="JSON-lines file to append to, or to read.")] = RECORDED,
    readme: Annotated[
        Path | None, typer.Option(help="Rewrite the table in this README from the recorded rows.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the recorded rows to this file; solves nothing.")
    ] = None,
) -> None:
    """Solve pairs of tiles and record the errors of every method, or show what is recorded."""
    console = Console()
    with ended_by(ValueError, OSError):
        if readme is None and picture is None:
            for pair in CASES:
                if not sizes or pair.size in sizes:
                    row = {"case": pair.name, "threads": 1, "pair": vars(pair), "errors": errors(pair)}
                    append(record, row | environment(ROOT))
                    console.print(table([row]).splitlines()[-1], highlight=False, soft_wrap=True)
            return
        order = {pair.name: i for i, pair in enumerate(CASES)}
        rows = sorted(rows_of(record), key=lambda row: order[row["case"]])
        if readme is not None:
            put_table(readme, table(rows), *MARKERS)
        if picture is not None:
            draw(rows).savefig(picture, dpi=120)


if __name__ == "__main__":
    app()
