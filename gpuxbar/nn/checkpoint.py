"""Activation checkpointing: a pass that is computed again reads what it read the first time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

from gpuxbar.bridge.passes import repeated
from gpuxbar.nn.analog_layer import COUNTED, AnalogLayer
from gpuxbar.nn.models import require_module

__all__ = ["same_reads"]


def same_reads(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts for `torch.utils.checkpoint`, within which the layers of a module read the same twice.

    Without them a recomputed pass would draw noise of its own, and a gradient belong to another read than the loss does: it is
    refused. What is compiled may be checkpointed so, but checkpoints may not be compiled.

        checkpoint(block, x, use_reentrant=False, context_fn=lambda: gx.same_reads(block))

    and where a library makes the checkpoints, as transformers does,

        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": lambda: gx.same_reads(model)})

    Args:
        module: What is checkpointed, or any module that holds it.

    Returns:
        The context of the first pass and that of the second.

    Raises:
        TypeError: `module` is no module.
    """
    require_module("same_reads", module, "module")
    layers = [layer for layer in module.modules() if isinstance(layer, AnalogLayer)]
    counters = [buffer for layer in layers for name, buffer in layer.named_buffers() if name in COUNTED]
    before = [counter.clone() for counter in counters]

    @contextmanager
    def first() -> Iterator[None]:
        for counter, value in zip(counters, before, strict=True):
            value.copy_(counter)
        yield

    @contextmanager
    def second() -> Iterator[None]:
        after = [counter.clone() for counter in counters]
        for counter, value in zip(counters, before, strict=True):
            counter.copy_(value)
        try:
            with repeated():
                yield
        finally:
            for counter, value in zip(counters, after, strict=True):
                counter.copy_(value)

    return first(), _Anew(second)


class _Anew(AbstractContextManager[None]):
    """A context made at every entry: a graph that is retained is computed again in each of its backward passes."""

    def __init__(self, make: Callable[[], AbstractContextManager[None]]):
        self.make = make

    def __enter__(self) -> None:
        self.entered = self.make()
        self.entered.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self.entered.__exit__(*error)
