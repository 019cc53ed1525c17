"""Gradients through the edges of a DAC's range on the CPU; on a GPU, PyTorch's functions make them."""

from __future__ import annotations

from ctypes import c_double
from math import inf
from typing import Any

import numpy as np

from gpuxbar import reference
from gpuxbar.launch import host_call, library
from gpuxbar.ops.checks import check_array, check_integers, check_shape, host_backend

__all__ = ["clip_gradient_on_host", "dac_clip_gradient"]

OP = "dac_clip_gradient"


def dac_clip_gradient(
    grad: Any, x: Any, *, top: float, code_max: int, signed: bool = True
) -> tuple[Any, float]:
    """Gradients of values that a DAC drives, and of its range, from that of what it drives.

    grad_x   = grad where x is inside [-top if signed else 0, top], else 0
    grad_top = sum(grad * (round(x / lsb) - x / lsb)) / code_max inside, with lsb = top / code_max,
               and sum(+-grad) of the values that are driven as the largest or least code

    Straight-through: x / lsb counts as if rounding it had the slope 1.

    Args:
        grad: Gradient of the driven values, NumPy float32, shape of `x`.
        x: Digital values, NumPy float32 [n, ...], C-contiguous.
        top: Value of the largest code, finite and above 0.
        code_max: Largest code, 0 to 32767; 0: nothing is rounded, and grad_top is 0.
        signed: Whether negative codes exist.

    Returns:
        (grad_x, grad_top): float32, shape of `x`, and a number; the same bits on any number of threads.

    Raises:
        TypeError: An array is not float32, or is not NumPy's.
        ValueError: Shapes differ, an array is not contiguous, or `top` or `code_max` is out of range.

    Source:
        Esser et al., Learned Step Size Quantization, ICLR 2020, equations 3 and 5.
    """
    for name, array in (("grad", grad), ("x", x)):
        check_array(OP, name, array, "float32", range(1, 8))
    check_integers(OP, code_max=code_max)
    if not 0 <= code_max <= 32767:
        raise ValueError(f"{OP}: `code_max` must be 0 to 32767, got {code_max}; int16 holds the codes")
    check_shape(OP, "grad", grad, x.shape, "pass that of what was driven", "this `x`")
    if not 0 < top < inf:
        raise ValueError(
            f"{OP}: `top` must be finite and above 0, got {top:g}; it is the value of the largest code"
        )
    if host_backend(OP, "x", x, "use PyTorch's functions") == "reference":
        grad_x, grad_top = reference.dac_clip_gradient(grad, x, top=top, code_max=code_max, signed=signed)
        return grad_x.astype(np.float32), grad_top
    grad_x = np.empty_like(x)
    return grad_x, clip_gradient_on_host(grad, x, top, grad_x, x.size, code_max, signed)


def clip_gradient_on_host(
    grad: Any, x: Any, top: float, grad_x: Any, size: int, code_max: int, signed: bool
) -> float:
    """`dac_clip_gradient` of arrays or addresses, but for what it puts into `grad_x`."""
    slope = c_double()
    host_call(
        library(), "gpuxbar_dac_clip_gradient", grad, x, float(top), grad_x, size, code_max, signed, slope
    )  # fmt: skip
    return slope.value / max(code_max, 1)
