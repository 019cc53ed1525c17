"""Gradients of weights as PyTorch operators."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from gpuxbar import ops
from gpuxbar.bridge import host
from gpuxbar.bridge.arrays import array, on_cpu, tensor
from gpuxbar.bridge.internals import _current_graph_task_id
from gpuxbar.bridge.operator import call, once, operator
from gpuxbar.mapping import ReadPlan
from gpuxbar.ops import ConvGeometry

__all__ = [
    "Samples",
    "conv_outer_product",
    "conv_weight_gradient",
    "outer_product",
    "shared_weight",
    "weight_gradient",
]

_geometry = lru_cache(maxsize=4096)(ConvGeometry)


@operator(lambda d, x, scale, gate=None: d.new_empty(d.shape[1], x.shape[1]))
def outer_product(d: Tensor, x: Tensor, scale: Tensor, gate: Tensor | None = None) -> Tensor:
    """Sum of the outer products of a batch, [O, I], of tensors of the CPU: see `ops.outer_product`."""
    if host.serves(None):
        return host.outer_product(d, x, scale, gate)
    return tensor(ops.outer_product(array(d), array(x), None if gate is None else array(gate), array(scale)))


def weight_gradient(d: Tensor, x: Tensor, scale: Tensor, gate: Tensor | None = None) -> Tensor:
    """Gradient of weights [O, I] of which inputs x [B, I] in units of `scale`, [1] or [B], made outputs, for gradients d [B, O] of
    these, times `gate` if given."""
    if on_cpu(d):
        found: Tensor = call(outer_product, d, x, scale, gate)
        return found
    return (d if gate is None else d * gate).t() @ (x * scale.unsqueeze(1))


class Samples:
    """What the products with a weight leave in a backward pass, from which one gradient for all of them is made."""

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self.backward_pass = -1  # that they are of

    @staticmethod
    def of(weight: Tensor) -> Samples | None:
        """Those of a `shared_weight`; None: every product gives its own gradient."""
        return getattr(weight.grad_fn, "samples", None)

    def leave(self, d: Tensor, codes: Tensor, scale: Tensor) -> None:
        """A product's gradients [B, O] of outputs, and its inputs as codes [B, I] in units of `scale`, [1] or [B]."""
        now = _current_graph_task_id()
        if now != self.backward_pass:  # an earlier one did not go on to the weight
            self.parts, self.backward_pass = [], now
        self.parts.append((d, codes, scale.expand(len(d))))

    def gradient(self) -> Tensor | None:
        """Of the weight, [O, I], from what this backward pass has left; None: nothing."""
        parts, self.parts = self.parts, []
        if not parts or self.backward_pass != _current_graph_task_id():
            return None
        return weight_gradient(*(torch.cat(part) for part in zip(*parts, strict=True)))


def shared_weight(weight: Tensor) -> Tensor:
    """A weight for many products, which gets one gradient from the samples of all; those of a compiled graph each give theirs."""
    if torch.compiler.is_compiling():
        return weight
    shared: Tensor = _Shared.apply(weight)  # type: ignore[no-untyped-call]
    return shared


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.samples = Samples()
        ctx.save_for_backward(weight)  # for `once`
        return weight.view_as(weight)

    @staticmethod
    @once
    def backward(ctx: Any, *grads: Any) -> Tensor | None:
        """Gradient of a weight from the samples of its products, and from uses that are no products."""
        grad, found = grads[0], ctx.samples.gradient()
        return grad if found is None else found if grad is None else grad + found


@operator(lambda d, x, scale, shape, *geometry: d.new_empty(shape))
def conv_outer_product(
    d: Tensor,
    x: Tensor,
    scale: Tensor,
    shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """Gradient of a convolution's weights of a shape, on the CPU: see `ops.conv_outer_product`."""
    conv = _geometry(
        shape[1], x.shape[2], x.shape[3], (shape[2], shape[3]), (stride[0], stride[1]), (padding[0], padding[1]),
        (dilation[0], dilation[1]),
    )  # fmt: skip
    return tensor(
        ops.conv_outer_product(array(d), array(x), array(scale), conv, groups=x.shape[1] // shape[1])
    )


def conv_weight_gradient(d: Tensor, x: Tensor, scale: Tensor, shape: torch.Size, way: ReadPlan) -> Tensor:
    """Gradient of weights of a shape, of which images x in units of `scale`, [1] or [N], made others, for gradients d."""
    if on_cpu(d):
        found: Tensor = call(conv_outer_product, d, x, scale, shape, way.stride, way.padding, way.dilation)
        return found
    x = x.to(d.dtype, copy=True).mul_(scale.reshape(-1, 1, 1, 1))
    return conv2d_weight(x, shape, d, way.stride, way.padding, way.dilation, way.groups)
