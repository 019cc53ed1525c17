"""The weight update of an array by pulse trains as a PyTorch operator; it changes the conductances in place."""

from __future__ import annotations

from torch import Tensor

from gpuxbar import ops
from gpuxbar.bridge import host
from gpuxbar.bridge.arrays import array, on_device
from gpuxbar.bridge.operator import conv_of, operator, spec_of
from gpuxbar.bridge.pairs import pairs_of

__all__ = ["pulse_update"]


@operator(lambda *_: None, mutates_args=("g", "g_held", "pulse_count", "weight"))
def pulse_update(
    g: Tensor,
    g_held: Tensor | None,
    pulse_count: Tensor | None,
    device_map: Tensor | None,
    spec: str,
    seed: int,
    x: Tensor,
    d: Tensor,
    weight: Tensor,
    w_max: Tensor,
    step: Tensor,
    rate: float,
    groups: int,
    patch: list[int] | None = None,
    sign: Tensor | None = None,
    weight_held: bool = False,
) -> None:
    """Pulse pairs of devices for a batch of inputs and errors, and read the weights out.

    Args:
        g, ..., seed: The pairs, as `bridge.pairs` says, of a spec with pulse trains; `g`, `g_held` and `pulse_count` are changed in
            place.
        x: Inputs, float32 [B, G * I], or images [N, G * channels, height, width] with `patch`; finite.
        d: Gradient of the outputs, float32 [B, G * O] or images [N, G * O, height, width]; finite.
        weight: What the pairs read as afterwards, float32 with the values of [G, O, I] in this order; set in place.
        w_max: Weight of a full pair, float32 [G * O].
        step: Update counter, int64 [1]; same value, same trains and noise.
        rate: Learning rate.
        groups: Arrays side by side, G.
        patch: Kernel, stride, padding and dilation, two numbers each, of a convolution; None for a matrix.
        sign: What the driver of each wordline multiplies its inputs by, 1 or -1, float32 [G * I]; None: 1.
        weight_held: Whether `weight` is what the pairs read as before, so that where none moves it may stay.
    """
    crossbar = spec_of(spec)
    assert crossbar.pulses is not None
    conv = conv_of(patch, x, groups, crossbar)
    with on_device(g, "pulses") as device:
        if host.serves(device):
            host.pulse_update(
                g, g_held, pulse_count, device_map, spec, seed, x, d, weight, w_max, step, rate, groups, conv, sign, weight_held
            )  # fmt: skip
            return
        pairs = pairs_of(g, g_held, pulse_count, device_map, spec, seed)
        shape = groups, g.shape[2], g.shape[1] // groups
        ops.pulse_update(
            pairs, array(x), array(d), rate=rate, train=crossbar.pulses, w_max=array(w_max), groups=groups, conv=conv,
            sign=None if sign is None else array(sign), out=array(weight.view(shape)), step=array(step), device=device,
        )  # fmt: skip
