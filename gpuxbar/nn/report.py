"""What became of every module of a converted model: where it runs, why, and what a sample costs there."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from gpuxbar.mapping import Planes
from gpuxbar.nn.analog_layer import AnalogLayer
from gpuxbar.nn.forms import is_layer
from gpuxbar.nn.table import columns
from gpuxbar.nn.watch import without_adcs

__all__ = ["Report", "Row", "counts", "macs", "positions_of"]


@dataclass(frozen=True)
class Row:
    """What became of one module that holds parameters.

    Attributes:
        module, type: Its name (names, where a model holds it in several places) and class.
        runs: "analog" or "digital".
        why: Why so.
        tiles: Tiles, all planes counted.
        macs: Multiply-accumulates of a sample (one place on the first axis of the example), or of one output position where no
            example was given; None, printed as unknown, of modules that may compute with their parameters in any way.
        conversions: Of currents by ADCs (or what stands for them, where the spec has none) for these, forwards: one a tile, plane,
            stream, phase and bitline.
        clipped: Share of the weights beyond `mapping.w_max`.
    """

    module: str
    type: str
    runs: str
    why: str
    tiles: int = 0
    macs: int | None = 0
    conversions: int = 0
    clipped: float = 0.0


@dataclass(frozen=True)
class Report:
    """Every module that holds parameters; printed as a table.

    `rows`: a `Row` each, with tiles, multiply-accumulates and conversions: those of a sample, if `convert` had an example.
    """

    rows: tuple[Row, ...]

    def __repr__(self) -> str:
        cells = [
            {
                **asdict(row),
                "macs": "unknown" if row.macs is None else row.macs,
                "clipped": f"{row.clipped:.2%}",
            }
            for row in self.rows
        ]
        return columns(
            [field.name for field in fields(Row)], [tuple(map(str, row.values())) for row in cells]
        )


def positions_of(
    model: nn.Module, example: Tensor | tuple[Any, ...] | dict[str, Any] | None
) -> dict[str, Fraction] | None:
    """Output positions of every layer that an example calls, for one sample, by module name; None without an example."""
    if example is None:
        return None
    watched = copy.deepcopy(model).eval()
    found: dict[str, Fraction] = {}
    args = () if isinstance(example, dict) else example if isinstance(example, tuple) else (example,)
    options = example if isinstance(example, dict) else {}
    samples = next((len(x) for x in (*args, *options.values()) if isinstance(x, Tensor) and x.dim()), 1)

    def count(name: str, layer: nn.Module, y: Tensor) -> None:
        found[name] = found.get(name, Fraction(0)) + Fraction(y.numel() // len(_weight(layer)), samples)

    for name, module in watched.named_modules():
        if is_layer(module) or isinstance(module, AnalogLayer):
            module.register_forward_hook(lambda layer, _, y, name=name: count(name, layer, y))
    with torch.no_grad(), without_adcs(watched):  # of layers that stay, ranges may not be calibrated yet
        watched(*args, **options)
    return found


def counts(
    layer: AnalogLayer, names: list[str], positions: dict[str, Fraction] | None
) -> tuple[int, int, int]:
    """Tiles, multiply-accumulates and conversions: see `Row`."""
    spec = layer.spec
    arrays = layer.groups_ * len(Planes.of(spec, collapse=False).slice_scale)
    rows = ceil(layer.inputs / spec.tile.rows)
    bitlines = layer.outputs + layer.plan.reference_lines[1]
    conversions = arrays * rows * bitlines * spec.dac.streams * spec.dac.phases
    return (
        arrays * rows * ceil(layer.outputs / spec.tile.cols), macs(layer, names, positions),
        round(conversions * _called(names, positions)),
    )  # fmt: skip


def macs(layer: nn.Module, names: list[str], positions: dict[str, Fraction] | None) -> int:
    return round(_weight(layer).numel() * _called(names, positions))


def _called(names: list[str], positions: dict[str, Fraction] | None) -> Fraction:
    return Fraction(1) if positions is None else positions.get(names[0], Fraction(0))


def _weight(layer: nn.Module) -> Tensor:
    """A layer's weight: of an analog one perhaps no parameter, but pruned."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight
