"""What a layer's devices lose between updates; their conductances change in place."""

from __future__ import annotations

from torch import Tensor

from gpuxbar import ops
from gpuxbar.bridge.arrays import array, on_device
from gpuxbar.bridge.operator import operator, spec_of

__all__ = ["relax"]


@operator(lambda *_: None, mutates_args=("g",))
def relax(g: Tensor, pulse_count: Tensor | None, spec: str, seed: int) -> None:
    """Let devices decay for one step of the spec's retention.

    Args:
        g: Conductances, float32 [2, G * I, O], S; changed in place.
        pulse_count: Pulses that devices have taken, int32 like `g`; those below 0 have failed and stay. None: none can.
        spec: The layer's `CrossbarSpec` as JSON.
        seed: The layer's seed.
    """
    crossbar = spec_of(spec)
    window, stuck = crossbar.device, crossbar.programming
    with on_device(g, "relax") as device:
        ops.relax(
            array(g), law=crossbar.retention, g_min=window.g_min, g_max=window.g_max, stuck_at_g_min=stuck.stuck_at_g_min,
            stuck_at_g_max=stuck.stuck_at_g_max, pulse_count=None if pulse_count is None else array(pulse_count), seed=seed, device=device,
        )  # fmt: skip
