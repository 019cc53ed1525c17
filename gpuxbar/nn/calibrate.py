"""Setting ADC ranges from the partial sums that data makes, forwards and backwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gpuxbar.mapping import worst_current
from gpuxbar.nn.cells import Cells
from gpuxbar.nn.in_situ import ROUNDING
from gpuxbar.nn.layers import AnalogLayer, require_apart
from gpuxbar.nn.watch import Lines, require_one, tile_sums, watch, without_adcs

__all__ = ["calibrate"]


def calibrate(
    model: nn.Module,
    loader: Iterable[Any],
    batches: int = 4,
    loss: Callable[[Tensor, Any], Tensor] | None = None,
    step: Callable[[Any], Tensor] | None = None,
) -> None:
    """Set every "calibrated" ADC range to a percentile of the partial sums of some batches.

    Layers run without ADCs while what drives them, as their DACs do, is watched; of a batch and layer at least 64 rows are
    looked at, and more where these make few partial sums. The range of the transposed read comes from gradients; DACs, unless
    their range is fixed, scale them to their own range, so that their size does not matter, only their distribution over the
    lines of a tile. Layers of zeros, and lines that carry no current, as where a loss does not depend on a layer yet, get the range
    of the worst case: calibrate anew once training has begun.

    Args:
        model: A converted model; its weights, statistics, gradients and random numbers stay as they are.
        loader: Batches, or (batch, target) pairs.
        batches: How many of them to use, at least 1.
        loss: Called as loss(output, target) for the gradients; None: a fixed random gradient of the output.
        step: For batches of other forms: called as step(batch), passes one through the model and returns the loss, or a
            tensor of outputs to take a fixed random gradient of. The model evaluates; a step may call `model.train()`, as layers
            need that run in training alone.

    Raises:
        TypeError: `loader` is a tensor, or a batch is not of these forms.
        ValueError: `loader` gave no batch, both `loss` and `step` are given, or the model computes with the weight of a layer that
            it does not call, as some fused attentions do. One batch alone does not tell that from a penalty.
    """
    require_one("calibrate", loss, step)
    found = [m for m in model.modules() if isinstance(m, AnalogLayer)]
    require_apart("calibrate", found)
    layers = [layer for layer in found if _wanted(layer)]
    if not layers:
        return
    seen: dict[tuple[AnalogLayer, bool], list[Tensor]] = {}

    def look(layer: AnalogLayer, backward: bool, lines: Lines) -> None:
        seen.setdefault((layer, backward), []).append(_currents(layer, backward, lines))

    with without_adcs(model):
        watch("calibrate", model, layers, loader, batches, loss, step, look)
    for (layer, backward), currents in seen.items():
        converter = layer.converters()[backward]
        if converter.calibrated:
            adc, lines = converter.adc, layer.outputs if backward else layer.inputs
            full = _range(torch.cat(currents), adc.percentile, adc.per == "column")
            worst = worst_current(converter.read, layer.spec, lines)
            converter.full.copy_(torch.where(full > 0, full, worst))
        layer.look_at_ranges()


def _wanted(layer: AnalogLayer) -> bool:
    return any(converter.calibrated for converter in layer.converters())


def _range(currents: Tensor, percentile: float, per_column: bool) -> Tensor:
    """Full-scale current, A, [1] or one per sensed line, of magnitudes [n, lines]."""
    sample = currents if per_column else currents.reshape(-1, 1)
    rank = max(1, round(len(sample) * percentile / 100))
    # of the largest, which are few, sooner found than kthvalue finds it
    return sample.topk(len(sample) - rank + 1, dim=0).values[-1]


def _currents(layer: AnalogLayer, backward: bool, lines: Lines) -> Tensor:
    """Magnitudes of the partial sums of some rows, A: [conversions * rows, sensed lines]. 0 of a layer of zeros, which tells nothing
    of currents to come."""
    cells, read = layer.conductances(), layer.plan.backward if backward else layer.plan.forward
    sums = tile_sums(layer, cells, read, lines.driven / lines.lsb, backward)
    currents = torch.cat([tile.current.abs().flatten(0, 2) for tile in sums])
    return currents * _holds_weights(layer, cells)


def _holds_weights(layer: AnalogLayer, cells: Cells) -> Tensor:
    """Whether a layer holds other weights than zeros, but for the rounding of what cells read."""
    least = ROUNDING * torch.finfo(torch.float32).eps * cells.w_max.amax()
    return layer.weight.detach().abs().amax() > least
