"""The gradient of a matrix of weights as a PyTorch operator."""

from __future__ import annotations

from torch import Tensor

from gpuxbar import ops
from gpuxbar.bridge.arrays import array, tensor
from gpuxbar.bridge.operator import operator

__all__ = ["outer_product", "weight_gradient"]

WORTH_PACKING = 1 << 22  # products; fewer are done sooner by PyTorch, which needs no operator


@operator(lambda d, x: d.new_empty(d.shape[1], x.shape[1]))
def outer_product(d: Tensor, x: Tensor) -> Tensor:
    """Sum of the outer products of a batch, [O, I], of float32 [B, O] and [B, I] of the CPU: see `ops.outer_product`."""
    return tensor(ops.outer_product(array(d), array(x)))


def weight_gradient(d: Tensor, x: Tensor) -> Tensor:
    """Gradient of weights [O, I] of which inputs x [B, I] made outputs, for gradients d [B, O] of these."""
    if d.device.type != "cpu" or d.numel() * x.shape[1] < WORTH_PACKING:
        return d.t() @ x
    found: Tensor = outer_product(d, x)
    return found
