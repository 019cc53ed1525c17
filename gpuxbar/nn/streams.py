"""What a layer pulsed in situ keeps of a step: inputs and errors, instead of a weight gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["Streams"]


class Streams:
    """Pairs of what a layer read and the gradient of what it gave, one for each backward pass, until its update."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def watch(self, y: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        """`y`, whose gradient will be kept beside `x`; `weight` gets no gradient but makes `y` need one."""
        watched: Tensor = _Watch.apply(y, weight, x.detach(), self)  # type: ignore[no-untyped-call]
        return watched

    def take(self) -> list[tuple[Tensor, Tensor]]:
        """All pairs so far, which are forgotten."""
        pairs, self.pairs = self.pairs, []
        return pairs


class _Watch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, x: Tensor, streams: Streams) -> Tensor:
        ctx.save_for_backward(x)
        ctx.streams = streams
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,), (grad_y,) = ctx.saved_tensors, grads
        ctx.streams.pairs.append((x, grad_y))
        return grad_y, None, None, None
