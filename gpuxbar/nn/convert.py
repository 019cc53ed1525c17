"""Replacing the layers of a model by crossbar layers, by rules, with a report of every module."""

from __future__ import annotations

import copy
from dataclasses import astuple, dataclass, fields
from fnmatch import fnmatchcase
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from gpuxbar.mapping import Planes
from gpuxbar.nn.layers import AnalogConv2d, AnalogLinear
from gpuxbar.spec import CrossbarSpec
from gpuxbar.spec.errors import nearest

__all__ = ["Report", "Row", "convert"]


@dataclass(frozen=True)
class Row:
    """What became of one module that holds parameters.

    Attributes:
        module, type: Its name (names, where a model holds it in several places) and class.
        runs: "analog" or "digital".
        why: Why so.
        tiles: Tiles, all planes counted.
        macs: Multiply-accumulates of a sample, or of one output position where no example was given; 0 of modules
            whose products are not known.
        clipped: Share of the weights beyond `mapping.w_max`.
    """

    module: str
    type: str
    runs: str
    why: str
    tiles: int = 0
    macs: int = 0
    clipped: float = 0.0


@dataclass(frozen=True)
class Report:
    """Every module that holds parameters; printed as a table."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        head = tuple(field.name for field in fields(Row))
        cells = [(*astuple(row)[:-1], f"{row.clipped:.2%}") for row in self.rows]
        table = [head, *(tuple(map(str, row)) for row in cells)]
        widths = [max(len(row[i]) for row in table) for i in range(len(head))]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table
        )


def convert(
    model: nn.Module,
    spec: CrossbarSpec,
    rules: dict[str, dict[str, Any] | None] | None = None,
    example: Tensor | None = None,
) -> tuple[nn.Module, Report]:
    """A copy of a model with its Linear and Conv2d layers on crossbars, and the report.

    Args:
        model: Any model; it is not changed.
        spec: The crossbars of every layer.
        rules: Glob patterns of module names to overrides of the spec, or to None: stay digital. Later rules win.
        example: A batch; one pass of it through `model` counts the multiply-accumulates of a sample.

    Returns:
        The model and the report. Layers of other types, subclasses of Linear and Conv2d among them, stay digital and are
        named there, as are products that are no layer's own (attention projections held as plain parameters).

    Raises:
        ValueError: A rule matches no layer.
    """
    rules = rules or {}
    positions = _positions(model, example)
    model = copy.deepcopy(model)
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if any(True for _ in module.parameters(recurse=False)):
            places.setdefault(module, []).append(name)
    used: set[str] = set()
    rows = []
    for module, names in places.items():
        label, kind = ", ".join(names), type(module)
        if kind not in (nn.Linear, nn.Conv2d):
            rows.append(Row(label, kind.__name__, "digital", "no crossbar form of this type"))
            continue
        overrides: dict[str, Any] | None = {}
        why = "default"
        for pattern, change in rules.items():
            if any(fnmatchcase(name, pattern) for name in names):
                used.add(pattern)
                overrides, why = change, f"rule {pattern}"
        assert isinstance(module, (nn.Linear, nn.Conv2d))
        macs = module.weight.numel() * positions.get(names[0], 1)
        if overrides is None:
            rows.append(Row(label, kind.__name__, "digital", why, macs=macs))
            continue
        layer = _analog(module, spec.with_overrides(overrides), names[0])
        for name in names:
            parent, _, leaf = name.rpartition(".")
            if name:
                setattr(model.get_submodule(parent), leaf, layer)
            else:
                model = layer
        tile = layer.spec.tile
        tiles = layer.groups_ * ceil(layer.inputs / tile.rows) * ceil(layer.outputs / tile.cols)
        count = tiles * len(Planes.of(layer.spec, collapse=False).slice_scale)
        rows.append(Row(label, kind.__name__, "analog", why, count, macs, layer.clip_rate()))
    unused = [pattern for pattern in rules if pattern not in used]
    if unused:
        layers = [row.module for row in rows if row.type in ("Linear", "Conv2d")]
        raise ValueError(
            f"convert: `rules` must each match a layer, got no match for {unused}; {nearest(unused[0], layers)}"
        )
    return model, Report(tuple(rows))


def _positions(model: nn.Module, example: Tensor | None) -> dict[str, int]:
    """Output positions of every layer for one sample, by module name."""
    if example is None:
        return {}
    watched = copy.deepcopy(model).eval()
    found: dict[str, int] = {}

    def count(name: str, layer: nn.Linear | nn.Conv2d, y: Tensor) -> None:
        found[name] = found.get(name, 0) + y.numel() // len(layer.weight) // len(example)

    for name, module in watched.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_hook(lambda layer, _, y, name=name: count(name, layer, y))
    with torch.no_grad():
        watched(example)
    return found


def _analog(module: nn.Linear | nn.Conv2d, spec: CrossbarSpec, name: str) -> AnalogLinear | AnalogConv2d:
    layer: AnalogLinear | AnalogConv2d
    where: dict[str, Any] = {"device": module.weight.device, "dtype": module.weight.dtype}
    if isinstance(module, nn.Linear):
        layer = AnalogLinear(
            module.in_features, module.out_features, module.bias is not None, spec=spec, name=name, **where
        )
    else:
        layer = AnalogConv2d(
            module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding, module.dilation,
            module.groups, module.bias is not None, module.padding_mode, spec=spec, name=name, **where,
        )  # fmt: skip
    # the same Parameter objects, so that weights shared with other modules stay shared
    layer.weight, layer.bias = module.weight, module.bias
    layer.train(module.training)
    return layer
