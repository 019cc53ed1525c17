"""The weight update of an array as a PyTorch operator; it changes the conductances in place."""

from __future__ import annotations

from functools import lru_cache

import torch
from pydantic import TypeAdapter
from torch import Tensor

from gpuxbar import ops
from gpuxbar.bridge.analog_mvm import _array
from gpuxbar.spec import CrossbarSpec

__all__ = ["device_update"]

_spec = lru_cache(maxsize=1024)(TypeAdapter(CrossbarSpec).validate_json)


@torch.library.custom_op("gpuxbar::device_update", mutates_args=("g",))
def device_update(g: Tensor, dw: Tensor, w_max: Tensor, step: Tensor, spec: str, seed: int) -> Tensor:
    """Move pairs of devices by wanted weight changes through the device's law; returns the weights read out.

    Args:
        g: Conductances of the positive and the negative devices, float32 [2, G * I, O], S; changed in place.
        dw: Wanted weight changes, float32 [G, O, I]; finite.
        w_max: Weight of a full pair, float32 [G * O].
        step: Update counter, int64 [1]; same value, same noise.
        spec: The layer's `CrossbarSpec` as JSON, with an update law.
        seed: The layer's seed.
    """
    crossbar = _spec(spec)
    assert crossbar.update is not None
    device, stuck = crossbar.device, crossbar.programming
    weights = ops.device_update(
        _array(g), _array(dw), law=crossbar.update, w_max=_array(w_max), g_min=device.g_min, g_max=device.g_max,
        stuck_at_g_min=stuck.stuck_at_g_min, stuck_at_g_max=stuck.stuck_at_g_max, seed=seed, step=_array(step),
    )  # fmt: skip
    return torch.from_numpy(weights)


@device_update.register_fake
def _(g, dw, w_max, step, spec, seed):
    return torch.empty_like(dw)
