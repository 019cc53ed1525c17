"""Replacing the layers of a model by crossbar layers, by rules, with a report of every module."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import ceil
from typing import Any

from torch import nn

from gpuxbar.nn.layers import AnalogConv2d, AnalogLinear
from gpuxbar.spec import CrossbarSpec

__all__ = ["Report", "convert"]


@dataclass(frozen=True)
class Report:
    """What became of every module that holds parameters: (name, type, "analog" or "digital", why, tiles)."""

    rows: tuple[tuple[str, str, str, str, int], ...]

    def __str__(self) -> str:
        head = ("module", "type", "runs", "why", "tiles")
        table = [head, *(tuple(map(str, row)) for row in self.rows)]
        widths = [max(len(row[i]) for row in table) for i in range(5)]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table
        )


def convert(
    model: nn.Module, spec: CrossbarSpec, rules: dict[str, dict[str, Any] | None] | None = None
) -> tuple[nn.Module, Report]:
    """A copy of a model with its Linear and Conv2d layers on crossbars, and the report.

    Args:
        model: Any model; it is not changed.
        spec: The crossbars of every layer.
        rules: Glob patterns of module names to overrides of the spec, or to None: stay digital. Later rules win.

    Raises:
        ValueError: A rule matches no layer.
    """
    rules = rules or {}
    model = copy.deepcopy(model)
    used: set[str] = set()
    rows = []
    for name, module in list(model.named_modules()):
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        kind = type(module)
        if kind not in (nn.Linear, nn.Conv2d):
            rows.append((name, kind.__name__, "digital", "no crossbar form of this type", 0))
            continue
        overrides: dict[str, Any] | None = {}
        why = "default"
        for pattern, change in rules.items():
            if fnmatchcase(name, pattern):
                used.add(pattern)
                overrides, why = change, f"rule {pattern}"
        if overrides is None:
            rows.append((name, kind.__name__, "digital", why, 0))
            continue
        layer = _analog(module, spec.with_overrides(overrides), name)
        parent, _, leaf = name.rpartition(".")
        if name:
            setattr(model.get_submodule(parent), leaf, layer)
        else:
            model = layer
        tile = layer.spec.tile
        tiles = layer.groups_ * ceil(layer.inputs / tile.rows) * ceil(layer.outputs / tile.cols)
        rows.append((name, kind.__name__, "analog", why, tiles * len(layer.planes.slice_scale)))
    unused = [pattern for pattern in rules if pattern not in used]
    if unused:
        raise ValueError(
            f"convert: `rules` must each match a layer, got no match for {unused}; layers: {[r[0] for r in rows]}"
        )
    return model, Report(tuple(rows))


def _analog(module: nn.Module, spec: CrossbarSpec, name: str) -> AnalogLinear | AnalogConv2d:
    layer: AnalogLinear | AnalogConv2d
    if isinstance(module, nn.Linear):
        layer = AnalogLinear(
            module.in_features, module.out_features, module.bias is not None, spec=spec, name=name
        )
    else:
        assert isinstance(module, nn.Conv2d)
        layer = AnalogConv2d(
            module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding, module.dilation,
            module.groups, module.bias is not None, module.padding_mode, spec=spec, name=name,
        )  # fmt: skip
    layer.load_state_dict(module.state_dict(), strict=False)
    layer.train(module.training)
    return layer
