"""What an LSTM makes of the products at its gates on the CPU; on a GPU, PyTorch's functions do."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuxbar import reference
from gpuxbar.launch import host_call, library
from gpuxbar.ops.checks import check_array, check_shape, host_backend

__all__ = ["lstm_gates", "lstm_gates_gradient"]

OP = "lstm_gates"


def lstm_gates(x: Any, y: Any, c: Any) -> tuple[Any, Any, Any]:
    """Step an LSTM: [i, f, g, o] = x + y, c' = sigmoid(f) c + sigmoid(i) tanh(g), h = sigmoid(o) tanh(c').

    Args:
        x, y: Products of the inputs and of the state h, with biases, NumPy float32 [B, 4 H].
        c: Cell state, NumPy float32 [B, H].

    Returns:
        (h, c', gates), float32 [B, H], [B, H] and [B, 5 H]: sigmoid(i), sigmoid(f), tanh(g), sigmoid(o) and tanh(c'), which
        the gradient needs. The same bits on any number of threads; NaN stays NaN.

    Raises:
        TypeError: An array has another dtype, or is not NumPy's.
        ValueError: Shapes disagree, or an array is not contiguous.

    Source:
        Hochreiter and Schmidhuber, Neural Computation 9 (1997), with the forget gate of Gers et al., ibid. 12 (2000).
    """
    where, batch, width = _state(c)
    for name, array in (("x", x), ("y", y)):
        _check(name, array, (batch, 4 * width))
    if where == "reference":
        h, after, gates = (a.astype(np.float32) for a in reference.lstm_gates(x, y, c))
        return h, after, gates
    h, after, gates = np.empty_like(c), np.empty_like(c), np.empty((batch, 5 * width), np.float32)
    host_call(library(), "gpuxbar_lstm_gates", x, y, c, h, after, gates, batch, width)
    return h, after, gates


def lstm_gates_gradient(grad_h: Any, grad_c: Any, gates: Any, c: Any) -> tuple[Any, Any]:
    """Gradients of a step from those of the state after it.

    Args:
        grad_h, grad_c: Gradients of h and c', NumPy float32 [B, H].
        gates: As `lstm_gates` gave them, NumPy float32 [B, 5 H].
        c: The cell state before the step, NumPy float32 [B, H].

    Returns:
        Gradients of x, which is y's too, float32 [B, 4 H], and of c, [B, H].

    Raises:
        TypeError, ValueError: As `lstm_gates`.
    """
    where, batch, width = _state(c)
    for name, array in (("grad_h", grad_h), ("grad_c", grad_c)):
        _check(name, array, (batch, width))
    _check("gates", gates, (batch, 5 * width))
    if where == "reference":
        grad_x, before = (
            a.astype(np.float32) for a in reference.lstm_gates_gradient(grad_h, grad_c, gates, c)
        )
        return grad_x, before
    grad_x, before = np.empty((batch, 4 * width), np.float32), np.empty_like(c)
    host_call(
        library(), "gpuxbar_lstm_gates_gradient", grad_h, grad_c, gates, c, grad_x, before, batch, width
    )
    return grad_x, before


def _state(c: Any) -> tuple[str, int, int]:
    """The backend of a cell state, and its shape."""
    check_array(OP, "c", c, "float32", 2)
    return host_backend(OP, "c", c, "step by PyTorch's functions"), *c.shape


def _check(name: str, array: Any, shape: tuple[int, int]) -> None:
    check_array(OP, name, array, "float32", 2)
    check_shape(OP, name, array, shape, "check the axes", "this cell state")
