"""Output currents of tiles with resistive wires for given inputs, and their gradients."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuxbar import reference
from gpuxbar.launch import Device, backend, cuda_device, host_call, library
from gpuxbar.ops.checks import check_array, check_shape
from gpuxbar.ops.effective_conductance import check_conductance, device_lines, per_lines, tile_name
from gpuxbar.ops.solve_for_inputs_cuda import solve_for_inputs_cuda, solve_for_inputs_gradient_cuda

__all__ = ["solve_for_inputs", "solve_for_inputs_gradient"]

OP = "solve_for_inputs"
ITERATIONS = 200


def solve_for_inputs(
    v: Any,
    g: Any,
    *,
    r_wordline: Any,
    r_bitline: Any,
    r_source: Any = 0.0,
    r_sink: Any = 0.0,
    tolerance: float = 1e-6,
    device: Device | None = None,
) -> Any:
    """Read tiles through their wires without forming `effective_conductance`: i = v @ G_eff for a few inputs.

    Conjugate gradients on whole lines: an iteration costs about 26 operations a cell and input, and two to ten suffice.
    For 128 x 128 tiles that is less than `effective_conductance` for up to four inputs a tile on a CPU, and by an estimate for up
    to six on a GPU, where it has not yet run.

    Args:
        v: Wordline voltages, float32 [..., B, R], V; finite.
        g: Conductance, float32 [..., R, C], S; 0 or above, finite.
        r_wordline, r_bitline, r_source, r_sink, device: As in `effective_conductance`, ohm.
        tolerance: Relative error, in the norm of the power, at which an input's iteration stops; 1e-7 to 0.1.

    Returns:
        Bitline currents, float32 [..., B, C], A. On a GPU, where values are not read back, those of an input whose
        iteration did not converge in 200 steps, or met a NaN or infinity, are NaN.

    Raises:
        TypeError: An array is not float32.
        ValueError: Shapes disagree, an array is not contiguous, or a value is out of its range.
        ArithmeticError: The iteration did not converge, on a CPU.

    Source:
        Hestenes and Stiefel, J. Res. NBS 49 (1952); proofs in gpuxbar/reference/wire_currents.py.
    """
    given = {"r_wordline": r_wordline, "r_bitline": r_bitline, "r_source": r_source, "r_sink": r_sink}
    _check_shapes(OP, v, g, tolerance)
    if device is not None or backend(g) == "cuda":
        place = device or cuda_device()
        lines = device_lines(OP, place, given, *g.shape[-2:])
        if not (v.size and g.size):
            return place.zeros((*v.shape[:-1], g.shape[-1]), "float32")
        found = solve_for_inputs_cuda(place, _tiles(v), _tiles(g), lines, tolerance, ITERATIONS)
        return found.reshape(*v.shape[:-1], g.shape[-1])
    wires = _check_values(OP, v, g, given)
    out = np.zeros((*v.shape[:-1], g.shape[-1]), np.float32)
    if not (v.size and g.size):
        return out
    if backend(g) == "reference":
        return reference.solve_for_inputs(v, g, **wires).astype(np.float32)
    batch, (rows, cols) = v.shape[-2], g.shape[-2:]
    bad = np.zeros(1, np.int64)
    host_call(
        library(), "gpuxbar_wire_currents", v, g, *wires.values(), out,
        g.size // (rows * cols), batch, rows, cols, float(tolerance), ITERATIONS, bad,
    )  # fmt: skip
    _converged(OP, g, tolerance, int(bad[0]))
    return out


def solve_for_inputs_gradient(
    v: Any,
    g: Any,
    grad_i: Any,
    *,
    r_wordline: Any,
    r_bitline: Any,
    r_source: Any = 0.0,
    r_sink: Any = 0.0,
    tolerance: float = 1e-6,
    device: Device | None = None,
) -> tuple[Any, Any]:
    """The true gradient of `solve_for_inputs` through the wires, by one more solution: that of the adjoint network.

    For all inputs of a tile at once, `effective_conductance_gradient` costs less.

    Args:
        v, g, r_wordline, r_bitline, r_source, r_sink, tolerance, device: As in `solve_for_inputs`.
        grad_i: Gradient of the currents, float32 [..., B, C], in 1/A.

    Returns:
        grad_v, float32, shape of `v`, 1/V; grad_g, float32, shape of `g`, summed over the inputs, 1/S. On a GPU both hold
        NaN where an iteration did not converge: grad_v of the input, grad_g of its tile.

    Raises:
        As `solve_for_inputs`.

    Source:
        Director and Rohrer, IEEE Trans. Circuit Theory 16 (1969).
    """
    op = "solve_for_inputs_gradient"
    given = {"r_wordline": r_wordline, "r_bitline": r_bitline, "r_source": r_source, "r_sink": r_sink}
    _check_shapes(op, v, g, tolerance)
    check_array(op, "grad_i", grad_i, "float32", v.ndim)
    check_shape(
        op, "grad_i", grad_i, (*v.shape[:-1], g.shape[-1]), "give every current a gradient", f"`v` {v.shape}"
    )
    if device is not None or backend(g) == "cuda":
        place = device or cuda_device()
        lines = device_lines(op, place, given, *g.shape[-2:])
        if not (v.size and g.size):
            return place.zeros(v.shape, "float32"), place.zeros(g.shape, "float32")
        grads = solve_for_inputs_gradient_cuda(
            place, _tiles(v), _tiles(g), _tiles(grad_i), lines, tolerance, ITERATIONS
        )
        return grads[0].reshape(v.shape), grads[1].reshape(g.shape)
    wires = _check_values(op, v, g, given)
    _check_finite(op, "grad_i", grad_i, "1/A")
    grad_v, grad_g = np.zeros_like(v), np.zeros_like(g)
    if not (v.size and g.size):
        return grad_v, grad_g
    if backend(g) == "reference":
        exact = reference.solve_for_inputs_gradient(v, g, grad_i, **wires)
        return exact[0].astype(np.float32), exact[1].astype(np.float32)
    batch, (rows, cols) = v.shape[-2], g.shape[-2:]
    bad = np.zeros(1, np.int64)
    host_call(
        library(), "gpuxbar_wire_currents_gradient", v, g, grad_i, *wires.values(), grad_v, grad_g,
        g.size // (rows * cols), batch, rows, cols, float(tolerance), ITERATIONS, bad,
    )  # fmt: skip
    _converged(op, g, tolerance, int(bad[0]))
    return grad_v, grad_g


def _check_shapes(op: str, v: Any, g: Any, tolerance: float) -> None:
    check_array(op, "g", g, "float32", range(2, 9))
    check_array(op, "v", v, "float32", g.ndim)
    rows = g.shape[-2]
    if v.shape[:-2] != g.shape[:-2] or v.shape[-1] != rows:
        raise ValueError(
            f"{op}: `v` must have the axes {[*g.shape[:-2], 'B', rows]} of the tiles, got shape {v.shape}; "
            "give every tile its inputs"
        )
    if not 1e-7 <= tolerance <= 0.1:
        raise ValueError(
            f"{op}: `tolerance` must be from 1e-7 to 0.1, got {tolerance:g}; float32 allows no less"
        )


def _check_values(op: str, v: np.ndarray, g: np.ndarray, given: dict[str, Any]) -> dict[str, np.ndarray]:
    """Of arrays on a CPU; the resistances of every line."""
    check_conductance(op, g)
    _check_finite(op, "v", v, "V")
    return per_lines(op, given, *g.shape[-2:])


def _tiles(array: Any) -> Any:
    """With one axis for all tiles."""
    return array.reshape(-1, *array.shape[-2:])


def _check_finite(op: str, name: str, x: np.ndarray, unit: str) -> None:
    wrong = ~np.isfinite(x)
    if wrong.any():
        raise ValueError(
            f"{op}: `{name}` must be finite, got {x[wrong].flat[0]:g} {unit}; look at what computed it"
        )


def _converged(op: str, g: np.ndarray, tolerance: float, tile: int) -> None:
    if tile >= 0:
        raise ArithmeticError(
            f"{op}: `tolerance` must be reached in {ITERATIONS} iterations, got more than {tolerance:g} in tile "
            f"{tile_name(g, tile)}; use a larger one, or `effective_conductance`"
        )
