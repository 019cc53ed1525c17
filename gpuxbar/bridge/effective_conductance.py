"""Effective conductances of tiles as a PyTorch operator, with the true gradient through the wires."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from gpuxbar import ops
from gpuxbar.bridge.arrays import array, on_device, tensor
from gpuxbar.bridge.operator import gradient, operator

__all__ = ["effective_conductance"]

OHMS = ("r_wordline", "r_bitline", "r_source", "r_sink")


def effective_conductance(
    g: Tensor,
    *,
    r_wordline: Tensor | float,
    r_bitline: Tensor | float,
    r_source: Tensor | float = 0.0,
    r_sink: Tensor | float = 0.0,
    method: ops.Method = "exact",
    shared_drivers: bool = False,
) -> Tensor:
    """`ops.effective_conductance` of a tensor.

    Args:
        g: Conductance, float32 [..., R, C], S.
        r_wordline, r_bitline, r_source, r_sink: Ohm; numbers, or tensors of one or one per line.
        method, shared_drivers: As there.

    Returns:
        Effective conductance, float32, shape of `g`, S.

    Gradient:
        Of `g`: the true one, by the adjoint network, for method "exact" without shared drivers. None of the resistances.

    Raises:
        As there; ValueError also where a gradient is wanted that does not exist.
    """
    given = (r_wordline, r_bitline, r_source, r_sink)
    for name, value in zip(OHMS, given, strict=True):
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(
                f"effective_conductance: `{name}` must not require a gradient, got one that does; detach it"
            )
    if torch.is_grad_enabled() and g.requires_grad and (method != "exact" or shared_drivers):
        raise ValueError(
            "effective_conductance: `method` must be 'exact' without shared_drivers for a gradient, got "
            f"{method!r} and {shared_drivers}; choose these, or pass g.detach()"
        )
    lines = (torch.as_tensor(value, dtype=torch.float32, device=g.device) for value in given)
    found: Tensor = conductance_through_wires(g.contiguous(), *lines, method, shared_drivers)
    return found


@operator(lambda g, *_: torch.empty_like(g))
def conductance_through_wires(
    g: Tensor,
    r_wordline: Tensor,
    r_bitline: Tensor,
    r_source: Tensor,
    r_sink: Tensor,
    method: str,
    shared_drivers: bool,
) -> Tensor:
    """`ops.effective_conductance` of a contiguous tensor; resistances [] or [lines]."""
    with on_device(g, "wires") as device:
        wires = _wires(r_wordline, r_bitline, r_source, r_sink)
        known = cast(ops.Method, method)
        return tensor(
            ops.effective_conductance(
                array(g), **wires, method=known, shared_drivers=shared_drivers, device=device
            )
        )


@operator(lambda grad, g, *_: torch.empty_like(g))
def conductance_through_wires_gradient(
    grad: Tensor, g: Tensor, r_wordline: Tensor, r_bitline: Tensor, r_source: Tensor, r_sink: Tensor
) -> Tensor:
    """Gradient of `g` from that of its exact effective conductance."""
    with on_device(g, "wires backward") as device:
        wires = _wires(r_wordline, r_bitline, r_source, r_sink)
        return tensor(ops.effective_conductance_gradient(array(g), array(grad), **wires, device=device))


def _wires(*ohms: Tensor) -> dict[str, Any]:
    return {name: array(value) for name, value in zip(OHMS, ohms, strict=True)}


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])


def _backward(ctx: Any, grad: Tensor) -> Any:
    return conductance_through_wires_gradient(grad.contiguous(), *ctx.saved_tensors)


gradient(conductance_through_wires, _backward, _setup, wrt=(0,))
