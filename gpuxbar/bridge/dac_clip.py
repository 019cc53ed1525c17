"""What a DAC of a given range drives of digital values as a PyTorch operator, with the gradient of a range that is learned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpuxbar import ops
from gpuxbar.bridge import host
from gpuxbar.bridge.arrays import array, on_cpu, tensor
from gpuxbar.bridge.operator import call, gradient, operator

__all__ = ["as_finite", "dac_clip", "dac_clip_gradient", "slopes"]


@operator(lambda x, top, code_max, signed: x.new_empty(x.shape))
def dac_clip(x: Tensor, top: Tensor, code_max: int, signed: bool) -> Tensor:
    """Values inside the range of a DAC: clip(x, -top if signed else 0, top); NaN where x is NaN or infinite.

    Gradient: straight-through inside the range and 0 beyond. That of `top` is `ops.dac_clip_gradient`'s, which is that of Learned
    Step Size Quantization (Esser et al., ICLR 2020), times code_max**1.5 / sqrt(values of a sample): a range moves as
    code_max times a step that is learned with the gradient scale of that paper.

    Args:
        x: Digital values, float32 [n, ...].
        top: Value of the largest code, above 0, float32 [1].
        code_max: Largest code; 0: none, and the range has no gradient.
        signed: Whether negative values are driven.
    """
    if on_cpu(x):  # numbers are several times as fast there; on a GPU they would be waited for
        most = top.item()
        clipped = x.clamp(-most if signed else 0.0, most)
    else:
        clipped = x.clamp(-top if signed else torch.zeros_like(top), top)
    return as_finite(clipped, x)


def as_finite(clipped: Tensor, x: Tensor) -> Tensor:
    """What is left of x inside a range; NaN where x is NaN or infinite, which a range would hide."""
    return clipped.add_(x.detach(), alpha=0)  # times 0 it is NaN


@operator(lambda grad, x, top, code_max, signed: (x.new_empty(x.shape), x.new_empty(1)))
def dac_clip_gradient(
    grad: Tensor, x: Tensor, top: Tensor, code_max: int, signed: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `x` and `top`: see `ops.dac_clip_gradient`."""
    if not on_cpu(x):
        return slopes(grad, x, top, code_max, signed)
    if host.serves(None):
        return host.dac_clip_gradient(grad, x, top.item(), code_max, signed)
    grad_x, grad_top = ops.dac_clip_gradient(
        array(grad), array(x), top=top.item(), code_max=code_max, signed=signed
    )
    return tensor(grad_x), x.new_full((1,), grad_top)


def slopes(grad: Tensor, x: Tensor, top: Tensor, code_max: int, signed: bool) -> tuple[Tensor, Tensor]:
    """The same by PyTorch's functions, on any device and without waiting for it."""
    steps = x * (code_max / top)
    codes = steps.clamp(-code_max if signed else 0, code_max)
    inside = dac_clip.plain(x, top, code_max, signed) == x
    grad_x = grad * inside
    slope = (grad * (codes.round() - steps * inside)).sum() / max(code_max, 1)
    return grad_x, slope.reshape(1)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, top, ctx.code_max, ctx.signed = inputs
    ctx.save_for_backward(x, top)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, top = ctx.saved_tensors
    grad_x, grad_top = call(dac_clip_gradient, grad.contiguous(), x, top, ctx.code_max, ctx.signed)
    if not ctx.needs_input_grad[1]:
        return grad_x, None
    values = x.numel() // max(len(x), 1)
    return grad_x, grad_top * (ctx.code_max**1.5 / max(values, 1) ** 0.5)


gradient(dac_clip, _backward, _setup, wrt=(0, 1))
