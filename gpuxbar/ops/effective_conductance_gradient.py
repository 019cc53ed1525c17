"""The gradient of effective conductances in the conductances of the cells, through the wires."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuxbar import reference
from gpuxbar.launch import Device, backend, cuda_device, host_call, library
from gpuxbar.ops.checks import NotFiniteError, check_array, check_shape
from gpuxbar.ops.effective_conductance import check_conductance, device_lines, per_lines
from gpuxbar.ops.effective_conductance_gradient_cuda import effective_conductance_gradient_cuda

__all__ = ["effective_conductance_gradient"]

OP = "effective_conductance_gradient"


def effective_conductance_gradient(
    g: Any,
    grad: Any,
    *,
    r_wordline: Any,
    r_bitline: Any,
    r_source: Any = 0.0,
    r_sink: Any = 0.0,
    device: Device | None = None,
) -> Any:
    """What a gradient of `effective_conductance` (method "exact") is as a gradient of `g`.

    grad_g[r, c] = sum_kl grad[k, l] e_k[r, c] e'_l[r, c]

    with e_k the voltage over a cell for 1 V at wordline k alone, e'_l the negative one for 1 V at the end of bitline l
    alone. The block merge is undone for it, about 200 n^3 operations for an n x n tile; fields are not formed.

    Args:
        g, r_wordline, r_bitline, r_source, r_sink, device: As in `effective_conductance`.
        grad: Gradient of G_eff, float32 [..., R, C], 1/S; finite. On a GPU its values are not read back: a NaN stays
            in its tile.

    Returns:
        Gradient of `g`, float32, shape of `g`, 1/S; that of an open cell (0 S) too.

    Raises:
        TypeError: An array is not float32.
        ValueError: Shapes disagree, an array is not contiguous, or a value is out of its range.

    Source:
        Director and Rohrer, IEEE Trans. Circuit Theory 16 (1969) (adjoint network).
    """
    check_array(OP, "g", g, "float32", range(2, 9))
    check_array(OP, "grad", grad, "float32", g.ndim)
    check_shape(OP, "grad", grad, g.shape, "give every cell one", "this `g`")
    rows, cols = g.shape[-2:]
    given = {"r_wordline": r_wordline, "r_bitline": r_bitline, "r_source": r_source, "r_sink": r_sink}
    if device is not None or backend(g) == "cuda":
        place = device or cuda_device()
        lines = device_lines(OP, place, given, rows, cols)
        if not g.size:
            return place.empty(g.shape, "float32")
        tiles, grads = g.reshape(-1, rows, cols), grad.reshape(-1, rows, cols)
        return effective_conductance_gradient_cuda(place, tiles, grads, lines).reshape(g.shape)
    wires = per_lines(OP, given, rows, cols)
    check_conductance(OP, g)
    if not np.isfinite(grad).all():
        wrong = grad[~np.isfinite(grad)].flat[0]
        raise NotFiniteError(f"{OP}: `grad` must be finite, got {wrong:g} 1/S; look for a diverging loss")
    if not g.size:
        return np.zeros_like(g)
    if backend(g) == "reference":
        return reference.effective_conductance_gradient(g, grad, **wires).astype(np.float32)
    out = np.empty_like(g)
    host_call(
        library(), "gpuxbar_effective_conductance_gradient", g, grad, *wires.values(), out, g.size // (rows * cols), rows, cols,
    )  # fmt: skip
    return out
