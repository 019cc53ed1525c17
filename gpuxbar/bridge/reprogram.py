"""Programming a layer's weights onto its cells, when they have changed."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gpuxbar import ops
from gpuxbar.bridge import host
from gpuxbar.bridge.arrays import array, on_cpu, on_device, tensor
from gpuxbar.bridge.lines import written
from gpuxbar.bridge.operator import operator, plan_of, spec_of
from gpuxbar.mapping import ReadPlan
from gpuxbar.ops.checks import NotFiniteError, require_finite_values
from gpuxbar.ops.program import LOWER, Writing, writing
from gpuxbar.ops.program import checksum as checksum_of

__all__ = ["checksum", "program_devices", "program_pairs", "reprogram", "require_finite_weight"]


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
    plan: str,
) -> None:
    """Program weights unless the cells hold them already.

    Args:
        weight: The layer's.
        g: Conductances, float32 [S, G * I, O], S.
        noise_var: Variance of state-dependent read noise, shape of `g`, A**2/V**2; None without such noise.
        w_max: Weight of a full pair, float32 [G * O]; set from the weights.
        state: What the cells hold, int64 [2]; zeros: nothing.
        write_step: Added to the fingerprint of the weights, which is the step of the write noise, int64 [1].
        spec: The layer's `CrossbarSpec` as JSON.
        merge: How planes are joined; see `ops.program`.
        plan: The layer's `mapping.ReadPlan` as JSON.
    """
    way = plan_of(plan)
    values = written(weight, way)
    try:
        with on_device(weight, "program") as device:
            if host.serves(device):
                writes, scale, full_weight = _writing(spec, merge, plan)
                host.reprogram(writes, values, g, noise_var, w_max, state, write_step, scale, full_weight)
                return
            ops.reprogram(
                array(values.view(_shape(way))), array(g), array(w_max), array(state), None if noise_var is None else array(noise_var),
                write_step=array(write_step), seed=way.seed, device=device, merge=merge, **_settings(spec), **_scale(spec),
            )  # fmt: skip
    except NotFiniteError:
        require_finite_weight(weight, way.name)
        raise


def checksum(weight: Tensor) -> int | None:
    """Of the values of weights of any shape; None on a GPU, which would have to be waited for, and elsewhere."""
    if not on_cpu(weight):
        return None
    values = weight.float().contiguous()
    return host.checksum(values) if host.serves(None) else checksum_of(array(values))


def program_pairs(share: Tensor, step: Tensor, spec: str, seed: int) -> Tensor:
    """Pairs to be trained in situ: shares of a full weight, float32 [G, O, I], to conductances [2 slices, G * I, O], S.

    One-sided devices begin at the lower end of the window, others around its middle, or where references lie. `step`, int64 [1],
    fixes the write noise, with the seed.
    """
    law = spec_of(spec).update
    assert law is not None
    settings = _settings(spec) | {"merge": "none", "sigma_g": 0.0, "balanced": law.sides != "one_sided"}

    def written(balanced: Tensor) -> Tensor:
        with on_device(share, "program") as device:
            return tensor(
                ops.program(
                    array(balanced),
                    w_max=array(share.new_ones(1)),
                    step=array(step),
                    seed=seed,
                    device=device,
                    **settings,
                )
            )

    if law.reference_at is None:
        return written(share)
    # a balanced pair lies at (1 + w) / 2 and (1 - w) / 2 of the window
    first = written(2 * (law.reference_at + share) - 1)[:1]
    second = written(torch.full_like(share, 1 - 2 * law.reference_at))[1:]
    return torch.cat([first, second])


def program_devices(weight: Tensor, write_step: Tensor, spec: str, plan: str) -> tuple[Tensor, Tensor]:
    """All devices that hold a layer's weights [G, O, I], and the weight of a full pair, float32 [G * O].

    Conductances are float32 [2 slices, G * I, O] ([1, G * I, O] of an offset mapping), S; `write_step`, int64 [1], fixes
    the write noise, with weights and seed.
    """
    mapping = spec_of(spec).mapping
    offset, way = mapping.scheme == "offset", plan_of(plan)
    groups, outputs, inputs = shape = _shape(way)
    weight = written(weight, way).view(shape)
    g = weight.new_zeros(1 if offset else 2 * mapping.slices, groups * inputs, outputs)
    w_max = weight.new_zeros(groups * outputs)
    state = torch.zeros(2, dtype=torch.int64, device=weight.device)
    settings = _settings(spec) | {"merge": "offset" if offset else "none", "sigma_g": 0.0}
    with on_device(weight, "program") as device:
        ops.reprogram(
            array(weight), array(g), array(w_max), array(state), write_step=array(write_step), seed=way.seed, device=device,
            **settings, **_scale(spec),
        )  # fmt: skip
    return g, w_max


def require_finite_weight(weight: Tensor, name: str) -> None:
    """Refuse weights that are not finite by the name of their layer."""
    require_finite_values(f"{name}: `weight`", int((~torch.isfinite(weight)).sum()), LOWER)


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


def _shape(way: ReadPlan) -> tuple[int, int, int]:
    """[G, O, I] of the weights that are written."""
    rows, cols = way.reference_lines
    return way.groups, way.outputs + cols, way.inputs + rows


@lru_cache(maxsize=4096)
def _writing(spec: str, merge: str, plan: str) -> tuple[Writing, str, float | None]:
    """What settings say of writing a layer's weights, and of the weight of a full pair."""
    way = plan_of(plan)
    groups, outputs, inputs = _shape(way)
    settings = _settings(spec) | {"merge": merge, "balanced": False, "seed": way.seed}
    writes = writing("reprogram", (groups, outputs, inputs), groups * outputs, **settings)
    return writes, *_scale(spec).values()


@lru_cache(maxsize=4096)
def _scale(spec: str) -> dict[str, Any]:
    """How `ops.reprogram` finds the weight of a full pair."""
    mapping = spec_of(spec).mapping
    return {"scale": mapping.scale, "full_weight": mapping.w_max}
