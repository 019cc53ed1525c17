"""What a layer's devices lose between updates; their conductances change in place."""

from __future__ import annotations

from torch import Tensor

from gpuxbar import ops
from gpuxbar.bridge.arrays import on_device
from gpuxbar.bridge.operator import operator, spec_of
from gpuxbar.bridge.pairs import pairs_of

__all__ = ["relax"]


@operator(lambda *_: None, mutates_args=("g", "g_held"))
def relax(
    g: Tensor,
    g_held: Tensor | None,
    pulse_count: Tensor | None,
    device_map: Tensor | None,
    spec: str,
    seed: int,
) -> None:
    """Let devices decay for one step of the spec's retention.

    Args:
        g, ..., seed: The pairs, as `bridge.pairs` says; `g` and `g_held` are changed in place.
    """
    with on_device(g, "relax") as device:
        pairs = pairs_of(g, g_held, pulse_count, device_map, spec, seed)
        ops.relax(pairs, spec_of(spec).retention, device=device)
