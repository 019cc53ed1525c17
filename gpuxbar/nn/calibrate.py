"""Setting ADC ranges from the partial sums that data makes, forwards and backwards, and the beginning of learned DAC ranges."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gpuxbar.nn.analog_layer import AnalogLayer
from gpuxbar.nn.models import converted_layers, require_apart, require_whole
from gpuxbar.nn.watch import Lines, require_batches, tile_sums, watch, without_adcs

__all__ = ["calibrate"]

RANGES = 100  # that a learned DAC range begins at one of, up to the largest of
SAMPLE = 1 << 16  # values
NAMED = 4  # layers that a warning names


def calibrate(
    model: nn.Module,
    loader: Iterable[Any],
    batches: int = 4,
    loss: Callable[[Tensor, Any], Tensor] | None = None,
    step: Callable[[Any], Tensor] | None = None,
) -> None:
    """Set every "calibrated" ADC range to a percentile of the partial sums of some batches, and begin "learned" DAC ranges.

    Layers run without ADCs while what drives them, as their DACs do, is watched; of a batch and layer at least 64 rows are
    looked at, and more where these make few partial sums. The range of the transposed read comes from gradients; DACs, unless
    their range is fixed, scale them to their own range, so that their size does not matter, only their distribution over the
    lines of a tile. Layers of zeros, whatever noise wrote of these, and lines that carry no current, as where a loss does not
    depend on a layer yet, get the range of the worst case, which is coarse; a RuntimeWarning names layers that got nothing else:
    calibrate anew once training has begun. A learned DAC range that has not begun yet begins at the one with which rounding and
    clipping these inputs makes the least squared error; others stay. Layers that no batch reaches, as experts that are rarely
    chosen, keep what range they have, and refuse reads without one: give more batches, or a rule with
    `adc={"range": "worst_case"}`.

    Currents change as weights learn, most of all from the first ones, and what an ADC clips gets no gradient: calibrate before
    the first step of training and anew after 1, 2, 4, 8, ... steps, each time from one batch:

        if step.bit_count() < 2:  # of `step` steps so far
            gx.calibrate(model, [(x, target)], loss=loss)

    In training, layers look at their 64th, 128th, 256th, ... read since, and warn where more than a fifth of the conversions clip
    beyond what the percentile leaves outside; not in compiled or captured graphs, nor within an LSTM's steps that run at once.
    `conversion_errors` tells what clips in each layer.

    Args:
        model: A converted model, compiled or not; its weights, statistics, gradients and random numbers stay as they are.
        loader: Batches, or (batch, target) pairs.
        batches: How many of them to use, at least 1.
        loss: Called as loss(output, target) for the gradients; None: a fixed random gradient of the output.
        step: For batches of other forms: called as step(batch), passes one through the model and returns the loss, or a
            tensor of outputs to take a fixed random gradient of. The model evaluates, but for batch norms with the statistics that
            they began with, frozen or not, which take those of the batch; a step may call `model.train()`, as layers need that run
            in training alone.

    Raises:
        TypeError: `model` is no module, `loader` is one batch, as a tensor, a dict or a pair with its target, or a batch is not of
            these forms.
        ValueError: The model has no crossbar layers, `batches` is below 1, `loader` gave no batch, a learned DAC range is to begin
            on inputs of zeros, both `loss` and `step` are given, the model is sharded, a batch norm with the statistics that it
            began with gets one value a channel, or the model computes with the weight of a layer that it does not call, as some
            fused attentions do. One batch alone does not tell that from a penalty.
    """
    require_batches("calibrate", loader, batches, loss, step)
    found = converted_layers("calibrate", model)
    require_apart("calibrate", found)
    layers = [layer for layer in found if _wanted(layer)]
    if not layers:
        return
    require_whole("calibrate", model)
    seen: dict[tuple[AnalogLayer, bool], list[Tensor]] = {}
    to_begin: dict[AnalogLayer, list[Lines]] = {layer: [] for layer in layers if not layer.dac_begun}

    def look(layer: AnalogLayer, backward: bool, lines: Lines) -> None:
        if layer in to_begin and not backward:
            to_begin[layer].append(lines)  # whose currents are those of the range to come
        else:
            seen.setdefault((layer, backward), []).append(_currents(layer, backward, lines))

    with without_adcs(model):
        watch("calibrate", model, layers, loader, batches, loss, step, look)
        tops = {layer: _beginning(layer, each) for layer, each in to_begin.items() if each}
        for layer, top in tops.items():  # of all, once none is refused
            layer.begin_dac(top)
            driven = (_driven_anew(layer, lines) for lines in to_begin[layer])
            seen[layer, False] = [_currents(layer, False, lines) for lines in driven]
    coarse: list[str] = []
    for (layer, backward), currents in seen.items():
        converter = layer.converters()[backward]
        if converter.calibrated:
            adc = converter.adc
            full = _range(torch.cat(currents), adc.percentile, adc.per == "column")
            telling = (full > 0) & layer.holds_weights()
            converter.full.copy_(torch.where(telling, full, converter.worst))
            if not telling.any():
                coarse.append(f"{layer.name} {'backwards' if backward else 'forwards'}")
        layer.look_at_ranges()
    if coarse:
        named = ", ".join(coarse[:NAMED]) + (
            f" and {len(coarse) - NAMED} more" if len(coarse) > NAMED else ""
        )
        warnings.warn(
            f"calibrate: ADC ranges must follow currents, got none of {named}, whose weights or inputs are zeros or on which the loss does "
            "not depend yet; they have the range of the worst case: calibrate anew when that has changed, as when training has begun",
            RuntimeWarning,
            stacklevel=2,
        )


def _wanted(layer: AnalogLayer) -> bool:
    return not layer.dac_begun or any(converter.calibrated for converter in layer.converters())


@torch.no_grad()
def _beginning(layer: AnalogLayer, each: list[Lines]) -> Tensor:
    """The learned DAC range that rounds and clips these inputs with the least squared error.

    Source: Bhalgat et al., LSQ+, CVPR Workshops 2020 (the beginning of learned ranges).
    """
    dac = layer.spec.dac
    values = torch.cat([lines.values.flatten() for lines in each])
    values = values if dac.signed else values.clamp_min(0)
    at = torch.linspace(
        0, len(values) - 1, min(len(values), SAMPLE), dtype=torch.float64, device=values.device
    )
    values = values[at.long()]
    most = values.abs().amax()
    if not most > 0:
        raise ValueError(
            f"{layer.name}: a DAC range that is learned must begin on inputs that are not all zeros, got zeros; set `dac.max` of "
            "its spec, or calibrate on other data"
        )
    tops = most * torch.arange(1, RANGES + 1, device=values.device) / RANGES
    errors = [(_rounded(values, top / dac.code_max, dac.code_max) - values).square().sum() for top in tops]
    return tops[torch.stack(errors).argmin()]


def _rounded(values: Tensor, lsb: Tensor, code_max: int) -> Tensor:
    return (values / lsb).round().clamp(-code_max, code_max) * lsb


@torch.no_grad()
def _driven_anew(layer: AnalogLayer, lines: Lines) -> Lines:
    """The same values, driven in the range of now."""
    driven, lsb = layer.dac_inputs(lines.values, layer.dac_top(lines.values))
    return lines._replace(driven=driven, lsb=lsb)


def _range(currents: Tensor, percentile: float, per_column: bool) -> Tensor:
    """Full-scale current, A, [1] or one per sensed line, of magnitudes [n, lines]."""
    sample = currents if per_column else currents.reshape(-1, 1)
    rank = max(1, round(len(sample) * percentile / 100))
    # of the largest, which are few, sooner found than kthvalue finds it
    return sample.topk(len(sample) - rank + 1, dim=0).values[-1]


def _currents(layer: AnalogLayer, backward: bool, lines: Lines) -> Tensor:
    """Magnitudes of some rows' partial sums, A: [conversions * rows, sensed lines]; 0 where offsets of DACs alone drive all."""
    read = layer.plan.backward if backward else layer.plan.forward
    sums = tile_sums(layer, layer.conductances(), read, lines.driven / lines.lsb, backward)
    return torch.cat([tile.current.abs().flatten(0, 2) for tile in sums]) * lines.driven.any()
