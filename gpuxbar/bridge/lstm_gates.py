"""A step of an LSTM behind its products as a PyTorch operator of the CPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gpuxbar import ops
from gpuxbar.bridge.arrays import array, tensor
from gpuxbar.bridge.operator import gradient, operator

__all__ = ["lstm_gates", "lstm_gates_gradient"]


def _shapes(x: Tensor, y: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return c.new_empty(c.shape), c.new_empty(c.shape), c.new_empty(len(c), 5 * c.shape[1])


@operator(_shapes)
def lstm_gates(x: Tensor, y: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The state (h, c) after a step, and the gates, which pass no gradient on; see `ops.lstm_gates`."""
    h, after, gates = ops.lstm_gates(array(x), array(y), array(c))
    return tensor(h), tensor(after), tensor(gates)


@operator(lambda grad_h, grad_c, gates, c: (c.new_empty(len(c), 4 * c.shape[1]), c.new_empty(c.shape)))
def lstm_gates_gradient(grad_h: Tensor, grad_c: Tensor, gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the products, and of the cell state before; see `ops.lstm_gates_gradient`."""
    grad_x, before = ops.lstm_gates_gradient(array(grad_h), array(grad_c), array(gates), array(c))
    return tensor(grad_x), tensor(before)


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[2], inputs[2])


def _backward(ctx: Any, grad_h: Tensor, grad_c: Tensor, _gates: Any) -> tuple[Tensor, ...]:
    grad_x, before = lstm_gates_gradient(grad_h, grad_c, *ctx.saved_tensors)
    return grad_x, grad_x, before


gradient(lstm_gates, _backward, _setup, wrt=(0, 1, 2))
