"""A layer's pairs of devices, as operators of PyTorch are given them: tensors, and the layer's spec and seed.

The first arguments of `device_update`, `pulse_update`, `streamed_update`, `carry` and `relax`:

g: Conductances of the positive and the negative devices, float32 [2 slices, G * I, O], S; changed in place.
g_held: What devices with write noise hold, where `g` is what they show: like `g`; None without write noise.
pulse_count: Pulses that devices have taken, int32 like `g`, below 0 where they have failed; None: none can.
device_map: Normals of the devices, float16 [K, 2 slices, G * I, O], in place of those that the seed draws, or None.
spec: The layer's `CrossbarSpec` as JSON, with an update law.
seed: The layer's seed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor

from gpuxbar import ops
from gpuxbar.bridge.arrays import array
from gpuxbar.bridge.operator import spec_of

__all__ = ["made_of", "pairs_of"]


def pairs_of(
    g: Tensor,
    g_held: Tensor | None,
    pulse_count: Tensor | None,
    device_map: Tensor | None,
    spec: str,
    seed: int,
) -> ops.Pairs:
    """The pairs; of CUDA tensors in `on_device` alone."""
    return ops.Pairs(
        array(g),
        g_held=None if g_held is None else array(g_held),
        pulse_count=None if pulse_count is None else array(pulse_count),
        device_map=None if device_map is None else array(device_map),
        seed=seed,
        **made_of(spec),
    )


@lru_cache(maxsize=4096)
def made_of(spec: str) -> dict[str, Any]:
    """What a spec says of pairs."""
    crossbar = spec_of(spec)
    return {
        "law": crossbar.update,
        "g_min": crossbar.device.g_min,
        "g_max": crossbar.device.g_max,
        "slice_bits": None if crossbar.carry is None else crossbar.mapping.slice_bits,
        "carry": crossbar.carry,
        "endurance": crossbar.endurance,
        "programming": crossbar.programming,
    }
