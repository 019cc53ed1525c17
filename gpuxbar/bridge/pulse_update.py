"""The weight update of an array by pulse trains as a PyTorch operator; it changes the conductances in place."""

from __future__ import annotations

from torch import Tensor

from gpuxbar import ops
from gpuxbar.bridge.arrays import array, on_device, tensor
from gpuxbar.bridge.operator import conv_of, operator, slices_of, spec_of

__all__ = ["pulse_update"]


def _shape(g, x, d, w_max, step, rate, groups, spec, seed, pulse_count=None, device_map=None, patch=None):
    return g.new_empty((groups, g.shape[2], g.shape[1] // groups))


@operator(_shape, mutates_args=("g", "pulse_count"))
def pulse_update(
    g: Tensor,
    x: Tensor,
    d: Tensor,
    w_max: Tensor,
    step: Tensor,
    rate: float,
    groups: int,
    spec: str,
    seed: int,
    pulse_count: Tensor | None = None,
    device_map: Tensor | None = None,
    patch: list[int] | None = None,
) -> Tensor:
    """Pulse pairs of devices for a batch of inputs and errors; returns the weights read out, [G, O, I].

    Args:
        g: Conductances of the positive and the negative devices, float32 [2 slices, G * I, O], S; changed in place.
        x: Inputs, float32 [B, G * I], or images [N, G * channels, height, width] with `patch`; finite.
        d: Gradient of the outputs, float32 [B, G * O] or images [N, G * O, height, width]; finite.
        w_max: Weight of a full pair, float32 [G * O].
        step: Update counter, int64 [1]; same value, same trains and noise.
        rate: Learning rate.
        groups: Arrays side by side, G.
        spec: The layer's `CrossbarSpec` as JSON, with an update law and pulse trains.
        seed: The layer's seed.
        pulse_count: Pulses that devices have taken, int32 like `g`; changed in place; given with an endurance.
        device_map: Normals of the devices, float16 [K, 2 slices, G * I, O], in place of those that the seed draws.
        patch: Kernel, stride, padding and dilation, two numbers each, of a convolution; None for a matrix.
    """
    crossbar = spec_of(spec)
    assert crossbar.update is not None
    assert crossbar.pulses is not None
    window, stuck = crossbar.device, crossbar.programming
    conv = conv_of(patch, x, groups, crossbar)
    with on_device(g, "pulses") as device:
        weights = ops.pulse_update(
            array(g), array(x), array(d), rate=rate, train=crossbar.pulses, law=crossbar.update, w_max=array(w_max),
            g_min=window.g_min, g_max=window.g_max, groups=groups, conv=conv, stuck_at_g_min=stuck.stuck_at_g_min,
            stuck_at_g_max=stuck.stuck_at_g_max, seed=seed, step=array(step), device=device,
            endurance=crossbar.endurance, pulse_count=None if pulse_count is None else array(pulse_count),
            device_map=None if device_map is None else array(device_map), **slices_of(crossbar),
        )  # fmt: skip
        return tensor(weights)
