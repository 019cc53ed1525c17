"""Setting ADC ranges from the partial sums that data makes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gpuxbar.nn.layers import AnalogLayer

__all__ = ["calibrate"]


def calibrate(model: nn.Module, loader: Iterable[Any], batches: int = 4) -> None:
    """Set every "calibrated" forward ADC range to the percentile of the partial sums of some batches.

    Layers are run with an ideal product while their inputs are watched; up to 64 rows of a batch are looked at.
    The transposed read starts from the forward range.

    Args:
        model: A converted model.
        loader: Batches, or (batch, target) pairs.
        batches: How many of them to use, at least 1.
    """
    seen: dict[AnalogLayer, list[Tensor]] = {}

    def watch(layer: AnalogLayer, args: tuple[Tensor, ...]) -> None:
        seen.setdefault(layer, []).append(_partial_sums(layer, args[0].detach()))

    layers = [m for m in model.modules() if isinstance(m, AnalogLayer) and m.plan.forward.adc_bits]
    hooks = [layer.register_forward_pre_hook(watch) for layer in layers]
    saved = {layer: layer.adc_lsb.clone() for layer in layers}
    was_training = model.training
    try:
        for layer in layers:  # a range that clips nothing while watching
            read = layer.plan.forward
            layer.adc_lsb.fill_(
                layer.spec.dac.v_read * layer.spec.device.g_max * layer.inputs / (2**read.adc_bits / 2)
            )
        model.eval()
        with torch.no_grad():
            for index, batch in enumerate(loader):
                if index == batches:
                    break
                model(batch[0] if isinstance(batch, (tuple, list)) else batch)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
        for layer, lsb in saved.items():
            layer.adc_lsb.copy_(lsb)
    for layer, sums in seen.items():
        if layer.spec.adc.range == "calibrated":
            read = layer.plan.forward
            code_max = 2 ** (read.adc_bits - 1) - 1 if read.adc_signed else 2**read.adc_bits - 1
            sample = torch.cat(sums)
            rank = max(1, round(sample.numel() * layer.spec.adc.percentile / 100))
            layer.adc_lsb.fill_(float(sample.kthvalue(rank).values) / code_max)


def _partial_sums(layer: AnalogLayer, x: Tensor) -> Tensor:
    """Magnitudes of the partial sums of a few rows, A, driven at full resolution."""
    g, _ = layer.conductances()
    if x.dim() == 4 and isinstance(layer, nn.Conv2d):
        pad = layer.padding if isinstance(layer.padding, tuple) else 0
        x = nn.functional.unfold(x[:16], layer.kernel_size, layer.dilation, pad, layer.stride)
        x = x.transpose(1, 2).flatten(0, 1)
    x = x.reshape(-1, x.shape[-1])
    x = x[torch.linspace(0, len(x) - 1, min(64, len(x))).long()]
    volts = x / x.abs().amax().clamp_min(1e-30) * layer.spec.dac.v_read
    tile, out = layer.plan.forward.tile or layer.inputs, []
    for k in range(layer.groups_):
        for start in range(0, layer.inputs, tile):
            rows = slice(k * layer.inputs + start, k * layer.inputs + min(start + tile, layer.inputs))
            out.append(torch.einsum("br,sro->sbo", volts[:, rows], g[:, rows]).abs().flatten())
    return torch.cat(out)
