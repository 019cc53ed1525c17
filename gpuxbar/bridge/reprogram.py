"""Programming a layer's weights onto its cells, when they have changed."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gpuxbar import ops
from gpuxbar.bridge import host
from gpuxbar.bridge.arrays import array, on_device, tensor
from gpuxbar.bridge.operator import operator, spec_of
from gpuxbar.ops.program import Writing, writing
from gpuxbar.ops.program import checksum as checksum_of

__all__ = ["checksum", "program_devices", "program_pairs", "reprogram"]


@operator(lambda *_: None, mutates_args=("g", "noise_var", "w_max", "state"))
def reprogram(
    weight: Tensor,
    g: Tensor,
    noise_var: Tensor | None,
    w_max: Tensor,
    state: Tensor,
    write_step: Tensor,
    spec: str,
    merge: str,
    seed: int,
) -> None:
    """Program weights unless the cells hold them already.

    Args:
        weight: float32 [G, O, I].
        g: Conductances, float32 [S, G * I, O], S.
        noise_var: Variance of state-dependent read noise, shape of `g`, A**2/V**2; None without such noise.
        w_max: Weight of a full pair, float32 [G * O]; set from the weights.
        state: What the cells hold, int64 [2]; zeros: nothing.
        write_step: Added to the fingerprint of the weights, which is the step of the write noise, int64 [1].
        spec: The layer's `CrossbarSpec` as JSON.
        merge: How planes are joined; see `ops.program`.
        seed: The layer's seed.
    """
    with on_device(weight, "program") as device:
        if host.serves(device):
            write = _writing(spec, merge, seed, weight.shape)
            host.reprogram(write, weight, g, noise_var, w_max, state, write_step, **_scale(spec))
            return
        ops.reprogram(
            array(weight), array(g), array(w_max), array(state), None if noise_var is None else array(noise_var),
            write_step=array(write_step), seed=seed, device=device, merge=merge, **_settings(spec), **_scale(spec),
        )  # fmt: skip


def checksum(weight: Tensor) -> int | None:
    """Of the values of weights of any shape; None on a GPU, which would have to be waited for, and elsewhere."""
    if weight.device.type not in ("cpu", "cuda"):
        return None
    with on_device(weight, "checksum") as device:
        if device is not None:
            return None
        values = weight.detach().float().contiguous()
        return host.checksum(values) if host.serves(device) else checksum_of(array(values))


def program_pairs(share: Tensor, step: Tensor, spec: str, seed: int) -> Tensor:
    """Pairs to be trained in situ: shares of a full weight, float32 [G, O, I], to conductances [2 slices, G * I, O], S.

    One-sided devices begin at the lower end of the window, others around its middle. `step`, int64 [1], fixes the write
    noise, with the seed.
    """
    law = spec_of(spec).update
    assert law is not None
    settings = _settings(spec) | {"merge": "none", "sigma_g": 0.0, "balanced": law.sides != "one_sided"}
    with on_device(share, "program") as device:
        return tensor(
            ops.program(
                array(share),
                w_max=array(share.new_ones(1)),
                step=array(step),
                seed=seed,
                device=device,
                **settings,
            )
        )


def program_devices(weight: Tensor, write_step: Tensor, spec: str, seed: int) -> tuple[Tensor, Tensor]:
    """All devices that hold weights float32 [G, O, I], and the weight of a full pair, float32 [G * O].

    Conductances are float32 [2 slices, G * I, O] ([1, G * I, O] of an offset mapping), S; `write_step`, int64 [1], fixes
    the write noise, with weights and seed.
    """
    mapping = spec_of(spec).mapping
    offset = mapping.scheme == "offset"
    groups, outputs, inputs = weight.shape
    g = weight.new_zeros(1 if offset else 2 * mapping.slices, groups * inputs, outputs)
    w_max = weight.new_zeros(groups * outputs)
    state = torch.zeros(2, dtype=torch.int64, device=weight.device)
    settings = _settings(spec) | {"merge": "offset" if offset else "none", "sigma_g": 0.0}
    with on_device(weight, "program") as device:
        ops.reprogram(
            array(weight), array(g), array(w_max), array(state), write_step=array(write_step), seed=seed, device=device,
            **settings, **_scale(spec),
        )  # fmt: skip
    return g, w_max


@lru_cache(maxsize=4096)
def _settings(spec: str) -> dict[str, Any]:
    """The settings of `ops.program` for a layer."""
    crossbar = spec_of(spec)
    return {
        "g_min": crossbar.device.g_min,
        "g_max": crossbar.device.g_max,
        "levels": crossbar.device.levels,
        "slices": crossbar.mapping.slices,
        "slice_bits": crossbar.mapping.slice_bits,
        "headroom_bits": crossbar.headroom_bits,
        "sigma_g": crossbar.read_noise.sigma_g,
        "exponent": crossbar.read_noise.exponent,
        "programming": crossbar.programming,
    }


@lru_cache(maxsize=4096)
def _writing(spec: str, merge: str, seed: int, weight: torch.Size) -> Writing:
    """What settings and the shape of weights [G, O, I] say of writing them."""
    groups, outputs, _ = weight
    settings = _settings(spec) | {"merge": merge, "balanced": False, "seed": seed}
    return writing("reprogram", weight, groups * outputs, **settings)


@lru_cache(maxsize=4096)
def _scale(spec: str) -> dict[str, Any]:
    """How `ops.reprogram` finds the weight of a full pair."""
    mapping = spec_of(spec).mapping
    return {"scale": mapping.scale, "full_weight": mapping.w_max}
