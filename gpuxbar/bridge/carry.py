"""Carries between the slices of a layer's weights; its conductances change in place."""

from __future__ import annotations

from torch import Tensor

from gpuxbar import ops
from gpuxbar.bridge.arrays import array, on_device
from gpuxbar.bridge.operator import operator
from gpuxbar.bridge.pairs import pairs_of

__all__ = ["carry"]


@operator(lambda *_: None, mutates_args=("g", "g_held"))
def carry(
    g: Tensor,
    g_held: Tensor | None,
    pulse_count: Tensor | None,
    device_map: Tensor | None,
    spec: str,
    seed: int,
    updates: Tensor,
) -> None:
    """Move the excess of digits to the next slice, if the spec's carry says that it is time.

    Args:
        g, ..., seed: The pairs, as `bridge.pairs` says; `g` and `g_held` are changed in place.
        updates: Updates so far, int64 [1]; looked at where it lies.
    """
    with on_device(g, "carry") as device:
        pairs = pairs_of(g, g_held, pulse_count, device_map, spec, seed)
        ops.carry(pairs, updates=array(updates), device=device)
