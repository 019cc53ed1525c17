"""The update of sliced weights by streamed outer products as a PyTorch operator; it changes the conductances in place."""

from __future__ import annotations

from torch import Tensor

from gpuxbar import ops
from gpuxbar.bridge.arrays import array, on_device, tensor
from gpuxbar.bridge.operator import conv_of, operator, spec_of
from gpuxbar.bridge.pairs import pairs_of

__all__ = ["streamed_update"]


def _shape(g, g_held, pulse_count, device_map, spec, seed, x, d, w_max, step, rate, groups, patch=None):
    return g.new_empty((groups, g.shape[2], g.shape[1] // groups))


@operator(_shape, mutates_args=("g", "g_held", "pulse_count"))
def streamed_update(
    g: Tensor,
    g_held: Tensor | None,
    pulse_count: Tensor | None,
    device_map: Tensor | None,
    spec: str,
    seed: int,
    x: Tensor,
    d: Tensor,
    w_max: Tensor,
    step: Tensor,
    rate: float,
    groups: int,
    patch: list[int] | None = None,
) -> Tensor:
    """Stream a batch of inputs and errors into sliced pairs of devices; returns the weights read out, [G, O, I].

    Args:
        g, ..., seed: The pairs, as `bridge.pairs` says; of a spec with a carry of scheme "streamed"; `g`, `g_held` and
            `pulse_count` are changed in place.
        x: Inputs, float32 [B, G * I], or images [N, G * channels, height, width] with `patch`; finite.
        d: Gradient of the outputs, float32 [B, G * O] or images [N, G * O, height, width]; finite.
        w_max: Weight of a full pair, float32 [G * O].
        step: Update counter, int64 [1]; same value, same noise.
        rate: Learning rate.
        groups: Arrays side by side, G.
        patch: Kernel, stride, padding and dilation, two numbers each, of a convolution; None for a matrix.
    """
    crossbar = spec_of(spec)
    conv = conv_of(patch, x, groups, crossbar)
    with on_device(g, "streams") as device:
        pairs = pairs_of(g, g_held, pulse_count, device_map, spec, seed)
        weights = ops.streamed_update(
            pairs, array(x), array(d), rate=rate, w_max=array(w_max), groups=groups, conv=conv,
            step=array(step), device=device,
        )  # fmt: skip
        return tensor(weights)
