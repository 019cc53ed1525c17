"""The weight update of an array as a PyTorch operator; it changes the conductances in place."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gpuxbar import ops
from gpuxbar.bridge.arrays import array, on_device
from gpuxbar.bridge.operator import operator, slices_of, spec_of

__all__ = ["device_update", "require_finite_gradient"]


def require_finite_gradient(grad: Tensor, what: str) -> None:
    """Refuse a gradient that is not finite, on a CPU; on a GPU, looking would wait for the device."""
    with on_device(grad, "update") as device:
        if device is None and not np.isfinite(array(grad.sum().float())):
            bad = int((~torch.isfinite(grad)).sum())
            if bad:  # a sum of finite values may overflow
                raise ValueError(
                    f"{what} must be finite, got {bad} NaN or infinite values; look for a diverging loss or bad data"
                )


@operator(lambda *_: None, mutates_args=("g", "hidden", "weight", "pulse_count"))
def device_update(
    g: Tensor,
    hidden: Tensor | None,
    dw: Tensor,
    factor: float,
    weight: Tensor,
    w_max: Tensor,
    step: Tensor,
    spec: str,
    seed: int,
    pulse_count: Tensor | None = None,
    device_map: Tensor | None = None,
) -> None:
    """Move pairs of devices by wanted weight changes through the device's law, and read the weights out.

    Args:
        g: Conductances of the positive and the negative devices, float32 [2 slices, G * I, O], S; changed in place.
        hidden: What devices with write noise hold, where `g` is what they show: like `g`; None without write noise.
        dw: Wanted weight changes over `factor`, float32 [G, O, I]; finite.
        factor: What `dw` is multiplied by.
        weight: What the pairs read as afterwards, like `dw`; set in place.
        w_max: Weight of a full pair, float32 [G * O].
        step: Update counter, int64 [1]; same value, same noise.
        spec: The layer's `CrossbarSpec` as JSON, with an update law.
        seed: The layer's seed.
        pulse_count: Pulses that devices have taken, int32 like `g`; changed in place; given with an endurance.
        device_map: Normals of the devices, float16 [K, 2 slices, G * I, O], in place of those that the seed draws.
    """
    crossbar = spec_of(spec)
    assert crossbar.update is not None
    window, stuck = crossbar.device, crossbar.programming
    with on_device(g, "update") as device:
        ops.device_update(
            array(g), array(dw), factor=factor, out=array(weight), hidden=None if hidden is None else array(hidden), law=crossbar.update, w_max=array(w_max), g_min=window.g_min, g_max=window.g_max,
            stuck_at_g_min=stuck.stuck_at_g_min, stuck_at_g_max=stuck.stuck_at_g_max, seed=seed, step=array(step),
            endurance=crossbar.endurance, pulse_count=None if pulse_count is None else array(pulse_count),
            device_map=None if device_map is None else array(device_map),
            device=device, **slices_of(crossbar),
        )  # fmt: skip
