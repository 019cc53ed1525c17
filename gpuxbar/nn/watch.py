"""Passes of a few batches through a model, which stays as it was, while what drives its arrays is watched."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from math import ceil, prod
from numbers import Integral
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from gpuxbar.bridge.analog_mvm import driven_gradient, gradient_values
from gpuxbar.bridge.device_update import require_finite_gradient
from gpuxbar.bridge.internals import _BatchNorm, _DisableAutocast, _NormBase
from gpuxbar.bridge.lines import some_lines
from gpuxbar.mapping.plan import Read
from gpuxbar.nn.analog_layer import COUNTED, AnalogLayer
from gpuxbar.nn.cells import Cells
from gpuxbar.nn.layers import AnalogConv
from gpuxbar.nn.models import holders, known_name

__all__ = [
    "Lines",
    "TileSums",
    "passes",
    "require_batches",
    "tile_sums",
    "undisturbed",
    "watch",
    "without_adcs",
]

ROWS = 64  # of a batch are looked at for a layer, and more while these make fewer partial sums than
SUMS = 1 << 18


class Lines(NamedTuple):
    """Some rows of what drives a layer's arrays with one batch.

    Attributes:
        values: As they came, in digital units along the driven lines, float32 [rows, lines].
        driven: The same inside the DAC's range.
        lsb: Value of one code (of the largest, without a DAC), float32 [rows, 1].
        clipped, total: How many values of the whole batch lay outside that range, int64 [], of how many.
    """

    values: Tensor
    driven: Tensor
    lsb: Tensor
    clipped: Tensor
    total: int


class TileSums(NamedTuple):
    """The partial sums of a tile, A, and the variance of their noise, A**2, float32 [passes, planes, rows, sensed lines]."""

    current: Tensor
    variance: Tensor | float


@torch.inference_mode(False)  # which makes tensors that no gradient passes
def watch(
    op: str,
    model: nn.Module,
    layers: list[AnalogLayer],
    loader: Iterable[Any],
    batches: int,
    loss: Callable[[Tensor, Any], Tensor] | None,
    step: Callable[[Any], Tensor] | None,
    look: Callable[[AnalogLayer, bool, Lines], None],
) -> None:
    """Call `look(layer, backward, lines)` at the reads of some batches. Other arguments and errors, which name `op`, are those of
    `gpuxbar.calibrate`.

    To be called where the model is `undisturbed`; norms that know no data yet take the statistics of the batch.
    """
    fresh = {name: module for name, module in model.named_modules() if _knows_no_data(module)}
    for norm in fresh.values():
        norm.train()
    called: set[AnalogLayer] = set()
    reached = False
    # of the batches that had one, with their losses: gradients of what layers hold that are not called
    grads_of: dict[Tensor, list[tuple[Tensor, float]]] = {}

    def hook(
        layer: AnalogLayer, args: tuple[Tensor, ...], named: dict[str, Tensor], y: Tensor
    ) -> Tensor | None:
        nonlocal reached
        called.add(layer)
        if not y.numel():
            return None
        reached = True
        x = args[0] if args else named["input"]
        with torch.no_grad():
            look(layer, False, _lines(layer, x.detach(), y))
        if not y.requires_grad:
            return None
        y.register_hook(lambda grad: look(layer, True, _back_lines(layer, grad)))
        # what follows may work in place, which takes a view out of the graph and its hooks with it
        return y.clone()

    hooks = [layer.register_forward_hook(hook, with_kwargs=True) for layer in layers]
    for name, norm in fresh.items():
        if isinstance(norm, _BatchNorm):
            hooks.append(
                norm.register_forward_pre_hook(partial(_require_several, f"{op}: {known_name(model, name)}"))
            )
    try:
        for batch in islice(loader, batches):
            followed: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
            with torch.enable_grad():
                if step is not None:
                    y = step(batch)
                else:
                    x, target = (_of_autograd(part) for part in _pair(op, batch))
                    if x.is_floating_point():  # so that gradients reach the layers of a frozen model too
                        followed.append(x.detach().requires_grad_())
                        x = followed[-1].clone()  # which the model may change in place
                    y = model(x) if loss is None else loss(model(x), target)
                value = _scalar(op, y)
            if followed and value.requires_grad:
                grads = torch.autograd.grad(value, followed, allow_unused=True)
                unread = {p for layer in layers if layer not in called for p in layer.parameters()}
                for p, grad in zip(followed, grads, strict=True):
                    if p in unread and grad is not None:
                        grads_of.setdefault(p, []).append((grad, value.item()))
    finally:
        for handle in hooks:
            handle.remove()
    used = {p for p, each in grads_of.items() if not _is_penalty(*zip(*each, strict=True))}
    held = holders(model.modules())
    alone = {p for p in used if held[p] == 1}  # which no other module holds, as an embedding may
    passed_by = [
        layer for layer in layers if layer not in called and alone & {*layer.parameters(recurse=False)}
    ]
    if passed_by:
        raise ValueError(
            f"{op}: layers must be called for their arrays to be read, got a model that computes with the weights of "
            f"{', '.join(layer.name for layer in passed_by)} itself; keep them digital by rules of gpuxbar.convert, or give several "
            "batches if the loss has penalties of weights"
        )
    if not reached:
        raise ValueError(
            f"{op}: `loader` must give at least one batch that reaches a layer, got none; look at the loader"
        )


def require_batches(op: str, loader: Any, batches: Any, loss: object, step: object) -> None:
    """Refuse a loss beside a step that returns one, one batch in place of batches, and what is no count of them."""
    if not isinstance(batches, Integral):
        raise TypeError(f"{op}: `batches` must be a whole number, got {type(batches).__name__}; give a count")
    if batches < 1:
        raise ValueError(f"{op}: `batches` must be at least 1, got {batches}; give more")
    if not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
        raise TypeError(f"{op}: `loader` must give batches, got {type(loader).__name__}; pass a list of them")
    if loss is not None and step is not None:
        raise ValueError(f"{op}: `loss` must be None with `step`, got both; let `step` return the loss")
    if isinstance(loader, Mapping):
        raise TypeError(f"{op}: `loader` must give batches, got one: a {type(loader).__name__}; pass [batch]")
    if isinstance(loader, Tensor):
        raise TypeError(
            f"{op}: `loader` must give batches, got a tensor of shape {tuple(loader.shape)}; pass [tensor], or tensor.split(...)"
        )
    if step is None and _is_batch(loader):
        raise TypeError(
            f"{op}: `loader` must give batches, got one: tensors of shapes {tuple(loader[0].shape)} and {tuple(loader[1].shape)}; "
            "pass [(batch, target)]"
        )


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


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """The model evaluates: not compiled, since graphs have no place for looks, and by reads counted from 0, so that their noise is
    the same whatever was evaluated before. Afterwards modes and buffers are what they were, but for what reads found of the weights.
    """
    layers = [m for m in model.modules() if isinstance(m, AnalogLayer)]
    modes = {module: module.training for module in model.modules()}
    buffers = {
        buffer: buffer.clone()
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name in COUNTED or not isinstance(module, AnalogLayer)
    }
    pairs = {layer: list(layer.streams.pairs) for layer in layers}
    model.eval()
    for layer in layers:
        layer.eval_step.zero_()
    try:
        with _uncompiled():
            yield
    finally:
        for layer in layers:
            layer.streams.pairs = pairs[layer]
        for buffer, value in buffers.items():
            buffer.copy_(value)
        for module, mode in modes.items():
            module.training = mode


def _uncompiled() -> AbstractContextManager[Any]:
    """Models run without what `torch.compile` made of them. Where torch._dynamo is not imported, which takes seconds, it made none."""
    compiling = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if compiling else nullcontext()


def _knows_no_data(module: nn.Module) -> bool:
    """Whether a norm has the running statistics that it began with: where it evaluates, values pass it as they come. Not of those
    that other processes would have to run too."""
    return (
        isinstance(module, _NormBase)
        and not isinstance(module, nn.SyncBatchNorm)
        and module.running_mean is not None
        and module.running_var is not None
        and not module.running_mean.is_meta
        and bool((module.running_mean == 0).all() & (module.running_var == 1).all())
    )


def _require_several(what: str, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Refuse a batch of which a norm would subtract every value from itself."""
    shape = tuple(args[0].shape) if args else ()
    if shape and prod(shape[:1] + shape[2:]) == 1:
        raise ValueError(
            f"{what}, a batch norm with the statistics that it began with, must get several values a channel, got an input of shape "
            f"{shape}; give larger batches, or train the model a little first"
        )


@contextmanager
def without_adcs(model: nn.Module) -> Iterator[None]:
    """The same with every layer read without ADCs."""
    plans = {m: m.plan for m in model.modules() if isinstance(m, AnalogLayer)}
    with undisturbed(model):
        try:
            for layer, plan in plans.items():
                forward, backward = (replace(read, adc_bits=0) for read in (plan.forward, plan.backward))
                # no kernel sums bytes that nothing converts; two halves hold their levels
                precision = "fp16x2" if plan.precision == "int8" else plan.precision
                layer.set_plan(replace(plan, forward=forward, backward=backward, precision=precision))
                layer.calibrated = layer.back_calibrated = True
            yield
        finally:
            for layer, plan in plans.items():
                layer.set_plan(plan)
                layer.look_at_ranges()


def tile_sums(
    layer: AnalogLayer, cells: Cells, read: Read, codes: Tensor, transposed: bool
) -> Iterator[TileSums]:
    """What every tile sums of rows of `codes`, which need not be whole; relative to the largest value without a DAC."""
    g = layer.lines(cells.back_g if transposed and cells.back_g is not None else cells.g, transposed)
    noise = None if cells.noise_var is None or read.ideal else layer.lines(cells.noise_var, transposed)
    digits, drivers = torch.stack(passes(codes, read)), None if read.straight else layer.drivers(transposed)
    volts = digits * read.v_lsb if drivers is None else drivers.driven(digits, read.v_lsb)
    volts = volts.unflatten(2, (layer.groups_, -1))
    tile = read.tile or volts.shape[3]
    for start in range(0, volts.shape[3], tile):
        part = slice(start, start + tile)
        current = _products(volts[..., part], _by_group(layer, g, transposed)[:, :, part])
        variance: Tensor | float = read.noise**2
        if noise is not None:
            variance = variance + _products(
                volts[..., part] ** 2, _by_group(layer, noise, transposed)[:, :, part]
            )
        yield TileSums(current, variance)


def _by_group(layer: AnalogLayer, part: Tensor, transposed: bool) -> Tensor:
    """Cells [S, G * I, O] as [S, G, driven, sensed]."""
    part = part.view(len(part), layer.groups_, -1, part.shape[-1])
    return part.transpose(2, 3) if transposed else part


def _products(volts: Tensor, g: Tensor) -> Tensor:
    with _DisableAutocast():  # torch.autocast knows no device "meta"
        return torch.einsum("pbgr,sgro->psbgo", volts, g).flatten(3)


def passes(codes: Tensor, read: Read) -> list[Tensor]:
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


def _lines(layer: AnalogLayer, x: Tensor, y: Tensor) -> Lines:
    """Of an input, which gave y."""
    x = (layer.padded(x) if isinstance(layer, AnalogConv) else x.reshape(-1, x.shape[-1])).float()
    driven, lsb = layer.dac_inputs(x, layer.dac_top(x))
    pixels = y.numel() // (len(x) * len(layer.weight))
    rows = _spread(layer, len(x) * pixels, x, transposed=False)
    values, inside = (
        part[rows] if x.dim() == 2 else some_lines(part, rows, layer.weight.shape, layer.plan)
        for part in (x, driven)
    )
    clipped = (driven != x).sum()
    return Lines(values, inside, lsb.expand(len(x))[rows // pixels, None], clipped, x.numel())


def _back_lines(layer: AnalogLayer, grad_y: Tensor) -> Lines:
    """Of a gradient of the output."""
    require_finite_gradient(grad_y, f"{layer.name}: the gradient of the output")
    grad_y = layer.batched(grad_y) if isinstance(layer, AnalogConv) else grad_y.reshape(-1, grad_y.shape[-1])
    cells, way = layer.conductances(), layer.plan
    values = gradient_values(grad_y.float(), cells.w_max, way)
    driven, lsb = driven_gradient(values, cells.w_max, way)
    values, driven = (part.reshape(*part.shape[:2], -1) for part in (values, driven))
    pixels = driven.shape[2]
    rows = _spread(layer, len(driven) * pixels, driven, transposed=True)
    at, pixel = rows // pixels, rows % pixels
    clipped = (driven != values).sum()
    return Lines(
        values[at, :, pixel], driven[at, :, pixel], lsb.expand(len(driven))[at, None], clipped, values.numel()
    )


def _spread(layer: AnalogLayer, count: int, like: Tensor, transposed: bool) -> Tensor:
    """The rows of a batch of `count` that are looked at, from the first to the last; all, where it has few."""
    read = layer.plan.backward if transposed else layer.plan.forward
    driven, sensed = (layer.outputs, layer.inputs) if transposed else (layer.inputs, layer.outputs)
    reads, tiles = read.streams * read.phases, ceil(driven / (read.tile or driven))
    rows = max(ROWS, SUMS // (reads * len(layer.plan.slice_scale) * tiles * layer.groups_ * sensed))
    return torch.linspace(0, count - 1, min(rows, count), dtype=torch.float64, device=like.device).long()


def _is_penalty(grads: Sequence[Tensor], losses: Sequence[float]) -> bool:
    """Whether gradients of a parameter are those of a penalty of weights: the same for batches of other losses."""
    return len(set(losses)) > 1 and bool(grads[0].any()) and all(torch.equal(g, grads[0]) for g in grads)


def _pair(op: str, batch: Any) -> tuple[Tensor, Any]:
    """What goes into the model, and the target."""
    x, target = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)
    if not isinstance(x, Tensor):
        what = (
            f"{type(batch).__name__} of {len(batch)}"
            if isinstance(batch, (tuple, list))
            else type(x).__name__
        )
        raise TypeError(
            f"{op}: a batch of `loader` must be a tensor or a pair of a tensor and its target, got {what}; pass "
            "step=lambda batch: ..., which runs the model on it"
        )
    return x, target


def _of_autograd(part: Any) -> Any:
    """A part of a batch, copied where it was made in inference mode, since autograd takes no such tensor."""
    return part.clone() if isinstance(part, Tensor) and part.is_inference() else part


def _scalar(op: str, y: Any) -> Tensor:
    """What gradients are taken of."""
    if not isinstance(y, Tensor):
        raise TypeError(
            f"{op}: what gradients are taken of must be a tensor, got {type(y).__name__}; pass loss=lambda output, target: ..., "
            "or a step, which returns one"
        )
    if y.dim() == 0:
        return y
    drawn = torch.Generator("cpu").manual_seed(0)
    return (y * torch.randn(y.shape, generator=drawn, dtype=torch.float32, device="cpu").to(y)).sum()
