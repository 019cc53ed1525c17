"""Output currents of tiles with wires for given inputs, and their gradients, in NumPy float64.

Wordlines u and bitlines w, each line solved exactly while the lines across are held: u = X (t_v + g w) and
w = Y (t_d + g u), with X and Y the symmetric, positive semidefinite answers of ladders to currents into their nodes and
t the drives. Eliminating w leaves (X^-1 - g Y g) u = X^-1 u_0 + g w_0, which conjugate gradients with the preconditioner X
solve; X^-1 is never formed, for a step p is always X times a known s. That is the host kernel. The oracle here takes
the nodal solution instead.

The gradient is Tellegen's theorem: with e the voltages over the cells and e' those of the same network, drivers at 0
and bitline ends at -dL/di, dL/dg = e e', summed over inputs, and dL/dv is the current into the drivers' ends.

Source: Director and Rohrer, IEEE Trans. Circuit Theory 16 (1969) (adjoint network); Hestenes and Stiefel, J. Res. NBS 49
(1952).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuxbar.reference.nodal import node_voltages

__all__ = ["effective_conductance_gradient", "solve_for_inputs", "solve_for_inputs_gradient"]


def solve_for_inputs(v: np.ndarray, g: np.ndarray, **wires: Any) -> np.ndarray:
    """Currents [..., B, C], A, of inputs v [..., B, R] of tiles g [..., R, C]."""
    out = np.zeros((*v.shape[:-1], g.shape[-1]))
    for tile in np.ndindex(g.shape[:-2]):
        out[tile] = node_voltages(v[tile], g[tile], **wires).current
    return out


def solve_for_inputs_gradient(
    v: np.ndarray, g: np.ndarray, grad_i: np.ndarray, **wires: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients (grad_v [..., B, R], grad_g [..., R, C]) of sum(grad_i * i)."""
    grad_v, grad_g = np.zeros(v.shape), np.zeros(g.shape)
    for tile in np.ndindex(g.shape[:-2]):
        forward = node_voltages(v[tile], g[tile], **wires)
        adjoint = node_voltages(np.zeros_like(v[tile]), g[tile], drive=-grad_i[tile], **wires)
        over = adjoint.wordline - adjoint.bitline
        grad_g[tile] = ((forward.wordline - forward.bitline) * over).sum(0)
        grad_v[tile] = (g[tile] * over).sum(-1)
    return grad_v, grad_g


def effective_conductance_gradient(g: np.ndarray, grad: np.ndarray, **wires: Any) -> np.ndarray:
    """Gradient of g [..., R, C] from that of its effective conductance: every wordline alone is an input."""
    rows = g.shape[-2]
    alone = np.broadcast_to(np.eye(rows), (*g.shape[:-1], rows))
    return solve_for_inputs_gradient(alone, g, grad, **wires)[1]
