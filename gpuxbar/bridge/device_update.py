"""The weight update of an array as a PyTorch operator; it changes the conductances in place."""

from __future__ import annotations

import torch
from torch import Tensor

from gpuxbar import ops
from gpuxbar.bridge import host
from gpuxbar.bridge.arrays import array, on_device
from gpuxbar.bridge.operator import operator
from gpuxbar.bridge.pairs import pairs_of
from gpuxbar.ops.checks import require_finite_values

__all__ = ["device_update", "require_finite_gradient"]


def require_finite_gradient(grad: Tensor, what: str) -> None:
    """Refuse a gradient that is not finite, on a CPU; on a GPU, looking would wait for the device."""
    with on_device(grad, "update") as device:
        if host.serves(device):
            require_finite_values(what, host.not_finite(grad.float().contiguous()), "bad data")
        elif device is None:
            require_finite_values(what, int((~torch.isfinite(grad)).sum()), "bad data")


@operator(lambda *_: None, mutates_args=("g", "g_held", "pulse_count", "weight"))
def device_update(
    g: Tensor,
    g_held: Tensor | None,
    pulse_count: Tensor | None,
    device_map: Tensor | None,
    spec: str,
    seed: int,
    dw: Tensor,
    factor: float,
    weight: Tensor,
    w_max: Tensor,
    step: Tensor,
) -> None:
    """Move pairs of devices by wanted weight changes through the device's law, and read the weights out.

    Args:
        g, ..., seed: The pairs, as `bridge.pairs` says; `g`, `g_held` and `pulse_count` are changed in place.
        dw: Wanted weight changes over `factor`, float32 [G, O, I]; finite.
        factor: What `dw` is multiplied by.
        weight: What the pairs read as afterwards, float32 with the values of [G, O, I] in this order; set in place.
        w_max: Weight of a full pair, float32 [G * O].
        step: Update counter, int64 [1]; same value, same noise.
    """
    with on_device(g, "update") as device:
        if host.serves(device):
            host.device_update(
                g, g_held, pulse_count, device_map, spec, seed, dw, factor, weight, w_max, step
            )
            return
        pairs = pairs_of(g, g_held, pulse_count, device_map, spec, seed)
        ops.device_update(
            pairs, array(dw), factor=factor, out=array(weight.view(dw.shape)), w_max=array(w_max), step=array(step), device=device
        )  # fmt: skip
