"""Setting ADC ranges from the partial sums that data makes, forwards and backwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import ceil
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from gpuxbar.bridge.analog_mvm import driven_gradient
from gpuxbar.bridge.lines import some_lines
from gpuxbar.mapping import worst_current
from gpuxbar.mapping.plan import Read
from gpuxbar.nn.cells import Cells
from gpuxbar.nn.layers import AnalogConv, AnalogLayer, require_apart, require_whole

__all__ = ["calibrate", "without_adcs"]

ROWS = 64  # of a batch are looked at for a layer, and more while these make fewer partial sums than
SUMS = 1 << 18
COUNTED = "read_step", "eval_step", "dac_max"  # buffers of a layer that change with each of its reads


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
    lines of a tile. Layers of zeros, whatever noise wrote of these, and lines that carry no current, as where a loss does not depend
    on a layer yet, get the range of the worst case: calibrate anew once training has begun.

    Args:
        model: A converted model; its weights, statistics, gradients and random numbers stay as they are.
        loader: Batches, or (batch, target) pairs.
        batches: How many of them to use, at least 1.
        loss: Called as loss(output, target) for the gradients; None: a fixed random gradient of the output.
        step: For batches of other forms: called as step(batch), passes one through the model and returns the loss, or a
            tensor of outputs to take a fixed random gradient of. The model evaluates; a step may call `model.train()`, as layers
            need that run in training alone.

    Raises:
        TypeError: `loader` is a tensor or one batch with its target, or a batch is not of these forms.
        ValueError: `loader` gave no batch, both `loss` and `step` are given, the model is sharded, or it computes with the weight of a
            layer that it does not call, as some fused attentions do. One batch alone does not tell that from a penalty.
    """
    if loss is not None and step is not None:
        raise ValueError("calibrate: `loss` must be None with `step`, got both; let `step` return the loss")
    if isinstance(loader, Tensor):
        raise TypeError(
            f"calibrate: `loader` must give batches, got a tensor of shape {tuple(loader.shape)}; pass [tensor], or tensor.split(...)"
        )
    if step is None and _is_batch(loader):
        raise TypeError(
            f"calibrate: `loader` must give batches, got one: tensors of shapes {tuple(loader[0].shape)} and {tuple(loader[1].shape)}; "
            "pass [(batch, target)]"
        )
    found = [m for m in model.modules() if isinstance(m, AnalogLayer)]
    require_apart("calibrate", found)
    layers = [layer for layer in found if _wanted(layer)]
    if not layers:
        return
    require_whole("calibrate", model)
    seen: dict[tuple[AnalogLayer, bool], list[Tensor]] = {}
    called: set[AnalogLayer] = set()
    # of the batches that had one, with their losses: gradients of what layers hold that are not called
    grads_of: dict[Tensor, list[tuple[Tensor, float]]] = {}

    def watch(
        layer: AnalogLayer, args: tuple[Tensor, ...], named: dict[str, Tensor], y: Tensor
    ) -> Tensor | None:
        called.add(layer)
        if not y.numel():
            return None
        x = args[0] if args else named["input"]
        seen.setdefault((layer, False), []).append(_currents(layer, x.detach(), y))
        if not y.requires_grad:
            return None
        y.register_hook(lambda grad: seen.setdefault((layer, True), []).append(_back_currents(layer, grad)))
        # what follows may work in place, which takes a view out of the graph and its hooks with it
        return y.clone()

    with without_adcs(model):
        hooks = [layer.register_forward_hook(watch, with_kwargs=True) for layer in layers]
        try:
            for index, batch in enumerate(loader):
                if index == batches:
                    break
                followed: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
                with torch.enable_grad():
                    if step is not None:
                        y = step(batch)
                    else:
                        x, target = _pair(batch)
                        if x.is_floating_point():  # so that gradients reach the layers of a frozen model too
                            followed.append(x.detach().requires_grad_())
                            x = followed[-1].clone()  # which the model may change in place
                        y = model(x) if loss is None else loss(model(x), target)
                    value = _scalar(y)
                if followed and value.requires_grad:
                    grads = torch.autograd.grad(value, followed, allow_unused=True)
                    unread = {p for layer in layers if layer not in called for p in layer.parameters()}
                    for p, grad in zip(followed, grads, strict=True):
                        if p in unread and grad is not None:
                            grads_of.setdefault(p, []).append((grad, value.item()))
        finally:
            for hook in hooks:
                hook.remove()
    used = {p for p, each in grads_of.items() if not _is_penalty(*zip(*each, strict=True))}
    passed_by = [layer for layer in layers if layer not in called and _owned(layer, model) & used]
    if passed_by:
        raise ValueError(
            f"calibrate: layers must be called for their arrays to be read, got a model that computes with the weights of "
            f"{', '.join(layer.name for layer in passed_by)} itself; keep them digital by rules of gpuxbar.convert, or give several batches if the loss has penalties of weights"
        )
    if not seen:
        raise ValueError(
            "calibrate: `loader` must give at least one batch that reaches a layer, got none; look at the loader"
        )
    for (layer, backward), currents in seen.items():
        converter = layer.converters()[backward]
        if converter.calibrated:
            adc, lines = converter.adc, layer.outputs if backward else layer.inputs
            full = _range(torch.cat(currents), adc.percentile, adc.per == "column")
            worst = worst_current(converter.read, layer.spec, lines)
            telling = (full > 0) & layer.holds_weights()
            converter.full.copy_(torch.where(telling, full, worst))
        layer.look_at_ranges()


def _is_penalty(grads: Sequence[Tensor], losses: Sequence[float]) -> bool:
    """Whether gradients of a parameter are those of a penalty of weights: the same for batches of other losses."""
    return len(set(losses)) > 1 and bool(grads[0].any()) and all(torch.equal(g, grads[0]) for g in grads)


def _owned(layer: AnalogLayer, model: nn.Module) -> set[nn.Parameter]:
    """The parameters of a layer that no other module holds, as an embedding may."""
    others = (module for module in model.modules() if module is not layer)
    return set(layer.parameters()) - {p for module in others for p in module.parameters(recurse=False)}


def _wanted(layer: AnalogLayer) -> bool:
    return any(converter.calibrated for converter in layer.converters())


@contextmanager
def without_adcs(model: nn.Module) -> Any:
    """Every layer read without ADCs; afterwards modes are what they were, and buffers but for what reads found of the weights."""
    layers = [m for m in model.modules() if isinstance(m, AnalogLayer)]
    modes = {module: module.training for module in model.modules()}
    buffers = {
        buffer: buffer.clone()
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name in COUNTED or not isinstance(module, AnalogLayer)
    }
    plans = {layer: layer.plan for layer in layers}
    pairs = {layer: list(layer.streams.pairs) for layer in layers}
    model.eval()
    try:
        for layer in layers:
            forward, backward = layer.plan.forward, layer.plan.backward
            layer.set_plan(
                replace(
                    layer.plan, forward=replace(forward, adc_bits=0), backward=replace(backward, adc_bits=0)
                )
            )
            layer.calibrated = layer.back_calibrated = True
        yield
    finally:
        for layer, plan in plans.items():
            layer.set_plan(plan)
            layer.streams.pairs = pairs[layer]
            layer.look_at_ranges()
        for buffer, value in buffers.items():
            buffer.copy_(value)
        for module, mode in modes.items():
            module.training = mode


def _is_batch(loader: Any) -> TypeGuard[Sequence[Tensor]]:
    """Whether a loader is a batch with its target, as two tensors are that no model takes both."""
    if not isinstance(loader, (tuple, list)) or len(loader) != 2:
        return False
    x, target = loader
    return (
        isinstance(x, Tensor)
        and isinstance(target, Tensor)
        and (x.dim(), x.dtype) != (target.dim(), target.dtype)
    )


def _pair(batch: Any) -> tuple[Tensor, Any]:
    """What goes into the model, and the target."""
    x, target = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)
    if not isinstance(x, Tensor):
        what = (
            f"{type(batch).__name__} of {len(batch)}"
            if isinstance(batch, (tuple, list))
            else type(x).__name__
        )
        raise TypeError(
            f"calibrate: a batch of `loader` must be a tensor or a pair of a tensor and its target, got {what}; pass "
            "step=lambda batch: ..., which runs the model on it"
        )
    return x, target


def _scalar(y: Any) -> Tensor:
    """What gradients are taken of."""
    if not isinstance(y, Tensor):
        raise TypeError(
            f"calibrate: what gradients are taken of must be a tensor, got {type(y).__name__}; pass loss=lambda output, target: ..., "
            "or a step, which returns one"
        )
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
    return y if y.dim() == 0 else (y * noise).sum()


def _range(currents: Tensor, percentile: float, per_column: bool) -> Tensor:
    """Full-scale current, A, [1] or one per sensed line, of magnitudes [n, lines]."""
    sample = currents if per_column else currents.reshape(-1, 1)
    rank = max(1, round(len(sample) * percentile / 100))
    # of the largest, which are few, sooner found than kthvalue finds it
    return sample.topk(len(sample) - rank + 1, dim=0).values[-1]


def _currents(layer: AnalogLayer, x: Tensor, y: Tensor) -> Tensor:
    """Magnitudes of the partial sums of some rows of an input, which gave y, A: [conversions * rows, sensed lines]."""
    x = (layer.padded(x) if isinstance(layer, AnalogConv) else x.reshape(-1, x.shape[-1])).float()
    x, lsb = layer.dac_inputs(x, layer.dac_top(x))
    pixels = y.numel() // (len(x) * len(layer.weight))
    rows = _spread(layer, len(x) * pixels, x, transposed=False)
    driven = x[rows] if x.dim() == 2 else some_lines(x, rows, layer.weight.shape, layer.plan)
    codes = driven / lsb.expand(len(x))[rows // pixels, None]
    return _partial_sums(layer, layer.conductances(), layer.plan.forward, codes, transposed=False)


def _back_currents(layer: AnalogLayer, grad_y: Tensor) -> Tensor:
    """The same of a gradient of the output."""
    grad_y = layer.batched(grad_y) if isinstance(layer, AnalogConv) else grad_y.reshape(-1, grad_y.shape[-1])
    cells = layer.conductances()
    driven, lsb = driven_gradient(grad_y.float(), cells.w_max, layer.plan)
    driven = driven.reshape(*driven.shape[:2], -1)
    pixels = driven.shape[2]
    rows = _spread(layer, len(driven) * pixels, driven, transposed=True)
    codes = driven[rows // pixels, :, rows % pixels] / lsb.expand(len(driven))[rows // pixels, None]
    return _partial_sums(layer, cells, layer.plan.backward, codes, transposed=True)


def _partial_sums(layer: AnalogLayer, cells: Cells, read: Read, codes: Tensor, transposed: bool) -> Tensor:
    """Of rows of `codes`, which need not be whole; relative to the largest value without a DAC."""
    g = cells.back_g if transposed and cells.back_g is not None else cells.g
    g = layer.lines(g, transposed)
    planes, groups = len(g), layer.groups_
    volts = torch.stack(_passes(codes, read)) * read.v_lsb
    by_group = g.view(planes, groups, -1, g.shape[-1])
    if transposed:
        by_group = by_group.transpose(2, 3)
    driven = volts.unflatten(2, (groups, -1))
    tile = read.tile or driven.shape[3]
    out = []
    for start in range(0, driven.shape[3], tile):
        part = slice(start, start + tile)
        current = torch.einsum("pbgr,sgro->psbgo", driven[..., part], by_group[:, :, part])
        out.append(current.abs().flatten(0, 2).flatten(1))
    return torch.cat(out)


def _spread(layer: AnalogLayer, count: int, like: Tensor, transposed: bool) -> Tensor:
    """The rows of a batch of `count` that are looked at, from the first to the last; all, where it has few."""
    read = layer.plan.backward if transposed else layer.plan.forward
    driven, sensed = (layer.outputs, layer.inputs) if transposed else (layer.inputs, layer.outputs)
    passes, tiles = read.streams * read.phases, ceil(driven / (read.tile or driven))
    rows = max(ROWS, SUMS // (passes * len(layer.plan.slice_scale) * tiles * layer.groups_ * sensed))
    return torch.linspace(0, count - 1, min(rows, count), dtype=torch.float64, device=like.device).long()


def _passes(codes: Tensor, read: Read) -> list[Tensor]:
    """What the DAC drives in every pass, in codes (or relative to the largest value without a DAC)."""
    if read.code_max:
        codes = codes.round().clamp(-read.code_max if read.signed else 0, read.code_max)
    if not read.stream_bits:
        return [codes]
    magnitude = codes.abs().int()
    mask = 2**read.stream_bits - 1
    digits = [(magnitude >> (k * read.stream_bits) & mask).float() for k in range(read.streams)]
    if read.phases == 1:
        return [d * codes.sign() for d in digits]
    return [d * (codes > 0) for d in digits] + [d * (codes < 0) for d in digits]
