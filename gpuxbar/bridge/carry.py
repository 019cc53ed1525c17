"""Carries between the slices of a layer's weights; its conductances change in place."""

from __future__ import annotations

from torch import Tensor

from gpuxbar import ops
from gpuxbar.bridge.arrays import array, on_device
from gpuxbar.bridge.operator import operator, spec_of

__all__ = ["carry"]


@operator(lambda *_: None, mutates_args=("g", "hidden"))
def carry(
    g: Tensor, hidden: Tensor | None, pulse_count: Tensor | None, updates: Tensor, spec: str, seed: int
) -> None:
    """Move the excess of digits to the next slice, if the spec's carry says that it is time.

    Args:
        g: Conductances of the positive and the negative devices, float32 [2 slices, G * I, O], S; changed in place.
        hidden: What devices with write noise hold, where `g` is what they show: like `g`; None without write noise.
        pulse_count: Pulses that devices have taken, int32 like `g`; those below 0 have failed and stay. None: none can.
        updates: Updates so far, int64 [1]; looked at where it lies.
        spec: The layer's `CrossbarSpec` as JSON, with a carry.
        seed: The layer's seed.
    """
    crossbar = spec_of(spec)
    window, mapping = crossbar.device, crossbar.mapping
    assert crossbar.carry is not None
    assert crossbar.update is not None
    assert mapping.slice_bits is not None
    with on_device(g, "carry") as device:
        ops.carry(
            array(g), rule=crossbar.carry, slices=mapping.slices, slice_bits=mapping.slice_bits, updates=array(updates),
            g_min=window.g_min, g_max=window.g_max, balanced=crossbar.update.sides != "one_sided",
            hidden=None if hidden is None else array(hidden), pulse_count=None if pulse_count is None else array(pulse_count),
            programming=crossbar.programming, seed=seed, device=device,
        )  # fmt: skip
