"""Devices some time after they were programmed."""

from __future__ import annotations

from torch import Tensor

from gpuxbar import ops
from gpuxbar.bridge.arrays import array, on_device, tensor
from gpuxbar.bridge.operator import spec_of

__all__ = ["drift"]


def drift(g: Tensor, age: float, step: int, spec: str, seed: int) -> Tensor:
    """Conductances `age` seconds after they were programmed, of the shape of `g`.

    Args:
        g: As programmed, float32 [P, G * I, O], S.
        age: Time since, s.
        step: Number of the writing.
        spec: The layer's `CrossbarSpec` as JSON.
        seed: The layer's seed.
    """
    crossbar = spec_of(spec)
    with on_device(g, "drift") as device:
        found = ops.drift(
            array(g),
            age,
            law=crossbar.drift,
            g_max=crossbar.device.g_max,
            seed=seed,
            step=step,
            device=device,
        )
        return tensor(found)
