"""Gradients of weights as PyTorch operators."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from gpuxbar import ops
from gpuxbar.bridge.arrays import array, tensor
from gpuxbar.bridge.operator import operator
from gpuxbar.mapping import ReadPlan
from gpuxbar.ops import ConvGeometry

__all__ = ["conv_outer_product", "conv_weight_gradient", "outer_product", "weight_gradient"]

_geometry = lru_cache(maxsize=4096)(ConvGeometry)
WORTH_PACKING = 1 << 22  # products; fewer are done sooner by PyTorch, which needs no operator


@operator(lambda d, x: d.new_empty(d.shape[1], x.shape[1]))
def outer_product(d: Tensor, x: Tensor) -> Tensor:
    """Sum of the outer products of a batch, [O, I], of float32 [B, O] and [B, I] of the CPU: see `ops.outer_product`."""
    return tensor(ops.outer_product(array(d), array(x)))


def weight_gradient(d: Tensor, x: Tensor) -> Tensor:
    """Gradient of weights [O, I] of which inputs x [B, I] made outputs, for gradients d [B, O] of these."""
    if not _on_cpu(d) or d.numel() * x.shape[1] < WORTH_PACKING:
        return d.t() @ x
    found: Tensor = outer_product(d, x)
    return found


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
    if _on_cpu(d):
        found: Tensor = conv_outer_product(d, x, scale, shape, way.stride, way.padding, way.dilation)
        return found
    x = x.to(d.dtype, copy=True).mul_(scale.reshape(-1, 1, 1, 1))
    return conv2d_weight(x, shape, d, way.stride, way.padding, way.dilation, way.groups)


def _on_cpu(d: Tensor) -> bool:
    return d.device.type == "cpu"
