"""The gradient of a matrix of weights on the CPU; a GPU's is a product of cuBLAS."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuxbar import reference
from gpuxbar.launch import host_call, library
from gpuxbar.ops.checks import check_array, check_shape, host_backend

__all__ = ["outer_product", "outer_product_on_host"]

OP = "outer_product"


def outer_product(d: Any, x: Any, gate: Any = None, scale: Any = None) -> Any:
    """Sum the outer products of a batch: dw[o, i] = sum_b d[b, o] gate[b, o] scale[b] x[b, i].

    Args:
        d: Gradients of the outputs, NumPy float32 [B, O].
        x: Inputs in units of `scale`, NumPy int16 or float32 [B, I].
        gate: Factors of d, NumPy float32 [B, O]; None: 1.
        scale: Value of one unit of `x`, NumPy float32 [1] or [B]; None: 1.

    Returns:
        Gradient of the weights, float32 [O, I]; the same bits on any number of threads.

    Raises:
        TypeError: An array has another dtype, or is not NumPy's.
        ValueError: The batches of d, x and scale or the shapes of d and gate differ, or an array is not contiguous.
    """
    check_array(OP, "d", d, "float32", 2)
    check_array(OP, "x", x, ("float32", "int16"), 2)
    if len(d) != len(x):
        raise ValueError(f"{OP}: `x` must have the batch of d, {len(d)}, got {len(x)}; check the axes")
    if gate is not None:
        check_array(OP, "gate", gate, "float32", 2)
        check_shape(OP, "gate", gate, d.shape, "check the axes", "this `d`")
    scale = np.ones(1, np.float32) if scale is None else scale
    check_array(OP, "scale", scale, "float32", 1)
    if len(scale) not in (1, len(x)):
        raise ValueError(
            f"{OP}: `scale` must have 1 or {len(x)} values, got {len(scale)}; give one for each sample"
        )
    if host_backend(OP, "d", d, "write d.T @ x") == "reference":
        return reference.outer_product(d if gate is None else d * gate, x, scale).astype(np.float32)
    dw = np.empty((d.shape[1], x.shape[1]), np.float32)
    outer_product_on_host(d, gate, x, scale, dw, (len(d), *dw.shape), x.dtype == np.int16, len(scale))
    return dw


def outer_product_on_host(
    d: Any,
    gate: Any,
    x: Any,
    scale: Any,
    dw: Any,
    shape: tuple[int, int, int],
    is_code: bool,
    scale_count: int,
) -> None:
    """`outer_product` of arrays or addresses, of B, O and I."""
    host_call(library(), "gpuxbar_outer_product", d, gate, x, scale, dw, *shape, is_code, scale_count)
