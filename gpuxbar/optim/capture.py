"""A whole training step as one CUDA graph: forward, backward with transposed reads, update."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gpuxbar.nn.analog_layer import AnalogLayer
from gpuxbar.nn.models import require_module
from gpuxbar.optim.base import InSituOptimizer
from gpuxbar.optim.in_situ import InSituSGD
from gpuxbar.optim.mixed_precision import MixedPrecision
from gpuxbar.optim.tiki_taka import AGAD, ChoppedTikiTakaV2, TikiTaka, TikiTakaV2

__all__ = ["CapturedStep", "capture_step"]

OP = "capture_step"
IN_SITU = (InSituSGD, MixedPrecision, TikiTaka, TikiTakaV2, ChoppedTikiTakaV2, AGAD)
DIGITAL = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
WARM_UPS = 3  # compile and load kernels, choose algorithms, make the optimiser's state


class CapturedStep:
    """A training step that was captured: call it with the next batch; returns the loss, a tensor of one number.

    The model and its optimiser change as by an ordinary step, and stay usable between calls.
    """

    def __init__(
        self,
        batch: tuple[Tensor, Tensor],
        loss: Tensor,
        replay: Callable[[], None],
        optimizer: torch.optim.Optimizer,
    ):
        self._batch, self._loss, self._replay = batch, loss, replay
        self._optimizer, self._settings = optimizer, _settings(optimizer)

    def __call__(self, x: Tensor, target: Tensor) -> Tensor:
        for name, given, held in zip(("x", "target"), (x, target), self._batch, strict=True):
            if (given.shape, given.dtype) != (held.shape, held.dtype):
                raise ValueError(
                    f"{OP}: `{name}` must be {held.dtype} {tuple(held.shape)} as captured, got {given.dtype} "
                    f"{tuple(given.shape)}; capture a step of that batch too"
                )
        if _settings(self._optimizer) != self._settings:
            raise ValueError(
                f"{OP}: `optimizer` must have the settings it was captured with, {self._settings}, got "
                f"{_settings(self._optimizer)}; capture the step anew, or give SGD or Adam a rate in a CUDA tensor"
            )
        for given, held in zip((x, target), self._batch, strict=True):
            held.copy_(given, non_blocking=True)
        self._replay()
        return self._loss.clone()


def capture_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    batch: tuple[Tensor, Tensor],
) -> CapturedStep:
    """Capture a training step in a CUDA graph; one launch then runs all of it, with fresh noise at every call.

    zero_grad;  loss_fn(model(x), target).backward();  optimizer.step()

    Read, write and update counters lie in device memory and count on in the graph, so a replay draws what the same step
    would without a graph. Three steps warm up; model and optimiser are as before afterwards. What Python decides is decided
    once: train or eval mode, layers' settings, rates of the optimiser, calibrated or not. Ranges may be calibrated, or copied in
    place, between calls.

    Args:
        model: On one CUDA device; any model of PyTorch, with or without crossbar layers.
        optimizer: `InSituSGD`; `MixedPrecision`, `TikiTaka`, `TikiTakaV2`, `ChoppedTikiTakaV2` or `AGAD` with transfer_every=1;
            or torch's SGD without dampening, Adam or AdamW with capturable=True.
        loss_fn: Of the model's output and the target, to one number.
        batch: (x, target) on that device; the shapes and dtypes of every later batch.

    Raises:
        TypeError: `model` is no module, or the optimiser keeps counts on the host.
        ValueError: The model is not on a GPU, or an optimiser's setting cannot be captured.
    """
    require_module(OP, model)
    _check_place(model)
    _check_kind(model, optimizer)
    x, target = (part.clone() for part in batch)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_fn(model(x), target)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    with torch.cuda.device_of(x):
        loss, replay = _captured(step, _keeper(model, optimizer))
    return CapturedStep((x, target), loss, replay, optimizer)


def _captured(step: Callable[[], Tensor], restore: Callable[[], None]) -> tuple[Tensor, Callable[[], None]]:
    """The result of a step, and what runs it again into the same memory."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with (
        torch.cuda.stream(stream),
        torch.random.fork_rng(devices=[torch.cuda.current_device()]),
        warnings.catch_warnings(),
    ):
        # PyTorch would have Adam's steps in a graph alone
        warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
        for _ in range(WARM_UPS):
            step()
        restore()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        loss = step()
    return loss, graph.replay


def _keeper(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """What puts model and optimiser back in place; state that the optimiser makes in between becomes 0, its beginning."""
    parts = list(optimizer.parts.values()) if isinstance(optimizer, InSituOptimizer) else []
    layers = [layer for root in (model, *parts) for layer in root.modules() if isinstance(layer, AnalogLayer)]
    for layer in layers:
        if layer.solve_all:  # all tiles at once, as no step of the graph should
            layer.conductances()
    kept = {t: t.detach().clone() for root in (model, *parts) for t in (*root.parameters(), *root.buffers())}
    kept |= {t: t.clone() for t in _state(optimizer)}
    counts = [part.get_extra_state() for part in parts]

    @torch.no_grad()
    def restore() -> None:
        for t in _state(optimizer):
            if t not in kept:
                t.zero_()
        for t, value in kept.items():
            t.copy_(value)
        for part, count in zip(parts, counts, strict=True):
            part.set_extra_state(count)
        for layer in layers:
            if layer.in_situ:
                layer.conductances()  # looks at the restored weight, for which a capture must not wait

    return restore


def _state(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def _settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What a graph keeps of the parameter groups: their numbers, not their tensors."""
    return [
        {key: value for key, value in group.items() if key != "params" and not isinstance(value, Tensor)}
        for group in optimizer.param_groups
    ]


def _check_place(model: nn.Module) -> None:
    places = {str(p.device) for p in model.parameters()}
    if len(places) != 1 or not next(iter(places)).startswith("cuda"):
        raise ValueError(
            f"{OP}: `model` must be on one CUDA device, got {', '.join(sorted(places)) or 'no parameters'}; call "
            "model.cuda(), or train without a graph"
        )


def _check_kind(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse what counts, or looks at values, on the host."""
    name = type(optimizer).__name__
    if type(optimizer) not in (*IN_SITU, *DIGITAL):
        known = ", ".join(kind.__name__ for kind in (*IN_SITU, *DIGITAL))
        raise TypeError(
            f"{OP}: `optimizer` must be one of {known}, got {name}, which may count on the host; train without a graph"
        )
    for layer in model.modules():
        if isinstance(layer, AnalogLayer) and layer.spec.refresh.interval is not None:
            raise ValueError(
                f"{OP}: `refresh.interval` must be None, got {layer.spec.refresh.interval} for {layer.name}: a graph does the same "
                "at every step; call `refresh` between steps, or train without a graph"
            )
    for group in optimizer.param_groups:
        if group.get("transfer_every", 1) != 1:
            raise ValueError(
                f"{OP}: `transfer_every` must be 1, got {group['transfer_every']} for {name}: a graph does the same at every "
                "step; leave it 1, or train without a graph"
            )
        if group.get("dampening"):
            raise ValueError(
                f"{OP}: `dampening` must be 0, got {group['dampening']:g}: {name} leaves it out of the first step; leave it out"
            )
        if not group.get("capturable", True):
            raise ValueError(
                f"{OP}: `capturable` must be True, got False for {name}; build it with capturable=True"
            )
