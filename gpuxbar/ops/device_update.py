"""The weight update of an array: wanted changes through the device's own law, and the weights read out."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from gpuxbar import reference
from gpuxbar.launch import backend, host_call, library
from gpuxbar.ops.checks import check_array
from gpuxbar.reference.device_update import neurosim_rate
from gpuxbar.spec import Agarwal, NeuroSim, SoftBounds, UpdateLaw

__all__ = ["device_update"]

OP = "device_update"


def device_update(
    g: Any,
    dw: Any,
    *,
    law: UpdateLaw,
    w_max: Any,
    g_min: float,
    g_max: float,
    stuck_at_g_min: float = 0.0,
    stuck_at_g_max: float = 0.0,
    seed: int = 0,
    step: Any = 0,
) -> Any:
    """Apply wanted weight changes to pairs of devices, in place, and read the weights out.

    Half of a change goes to each side of a pair, as dx = +-dw / (2 w_max) of the window, through the law:
    x' = x + (T - x) (1 - exp(-rate dx)) and its mirror image (see `spec.Agarwal`, `spec.NeuroSim`,
    `spec.SoftBounds`). A change of 0 moves nothing and draws no noise; stuck cells never move; results are kept
    inside the window.

    Args:
        g: Conductances of the positive and the negative devices, float32 [2, G * I, O], S; updated in place.
        dw: Wanted weight changes, float32 [G, O, I]; finite.
        law: An update law of the spec.
        w_max: Weight of a full pair, float32 [G * O], above 0.
        g_min, g_max: Conductance window, S.
        stuck_at_g_min, stuck_at_g_max: Rates of stuck cells, the same cells as `program` draws for this seed.
        seed, step: Device spread depends on the seed, the noise of an update on both; `step` is an integer or an
            int64 array of one element.

    Returns:
        Weights after the update, float32 [G, O, I]: w_max (g_pos - g_neg) / (g_max - g_min).

    Raises:
        TypeError: An array has another dtype.
        ValueError: Shapes disagree, an array is not contiguous, or `dw` holds NaN or infinity; `g` is unchanged.

    Source:
        Agarwal et al., IJCNN 2016; Peng et al., IEEE TCAD 2021; Fusi and Abbott, Nature Neuroscience 2007.
    """
    check_array(OP, "g", g, "float32", 3)
    check_array(OP, "dw", dw, "float32", 3)
    check_array(OP, "w_max", w_max, "float32", 1)
    groups, outputs, inputs = dw.shape
    for name, array, shape in (
        ("g", g, (2, groups * inputs, outputs)),
        ("w_max", w_max, (groups * outputs,)),
    ):
        if tuple(array.shape) != shape:
            raise ValueError(
                f"{OP}: `{name}` must have shape {shape} for dw {tuple(dw.shape)}, got {tuple(array.shape)}; check the axes"
            )
    if not 0 <= g_min < g_max:
        raise ValueError(
            f"{OP}: need 0 <= g_min < g_max, got {g_min:g} S and {g_max:g} S; widen or swap the window"
        )
    where = backend(g)
    if where == "cuda":
        raise NotImplementedError(f"{OP}: CuPy arrays have no kernel in this version; pass NumPy arrays")
    step = int(np.asarray(step).reshape(-1)[0])
    window: dict[str, Any] = {
        "g_min": g_min, "g_max": g_max, "stuck_at_g_min": stuck_at_g_min, "stuck_at_g_max": stuck_at_g_max,
    }  # fmt: skip
    if where == "reference":
        if not np.isfinite(dw).all():
            raise _not_finite(int((~np.isfinite(dw)).sum()))
        cells, weights = reference.device_update(
            g, dw, law=law.model_dump(), w_max=w_max, seed=seed, step=step, **window
        )
        g[...] = cells
        return weights.astype(np.float32)
    weights = np.empty(dw.shape, np.float32)
    bad = np.zeros(1, np.int64)
    if dw.size:
        host_call(
            library(), "gpuxbar_device_update", g, dw, weights, w_max, np.frombuffer(bytes(parameters(law)), np.uint8),
            groups, inputs, outputs, step, seed, float(g_min), float(g_max), float(stuck_at_g_min),
            float(stuck_at_g_max), bad,
        )  # fmt: skip
    if bad[0]:
        raise _not_finite(int(bad[0]))
    return weights


class Parameters(ctypes.Structure):
    """Twin of `struct UpdateLaw` in kernels/include/gpuxbar/update.cuh."""

    _fields_ = [
        *((name, ctypes.c_float) for name in (
            "rate_up", "rate_down", "label_up", "label_down", "spread", "pulses", "gamma2", "cycle2", "pulse_cycle2",
            "range_cycle2")),
        ("law", ctypes.c_int32), ("integer_pulses", ctypes.c_int32),
    ]  # fmt: skip


def parameters(law: UpdateLaw) -> Parameters:
    """What the kernels need of a law."""
    if isinstance(law, Agarwal):
        return Parameters(
            rate_up=law.nu,
            rate_down=law.nu,
            spread=law.spread,
            pulses=1,
            gamma2=law.gamma**2,
            cycle2=law.cycle**2,
            law=0,
        )
    if isinstance(law, NeuroSim):
        labels = (law.nonlinearity_ltp, law.nonlinearity_ltd)
        up, down = neurosim_rate(np.array(labels))
        return Parameters(
            rate_up=up, rate_down=down, label_up=labels[0], label_down=labels[1], spread=law.spread,
            pulses=law.levels, range_cycle2=law.cycle**2, law=1, integer_pulses=law.integer_pulses,
        )  # fmt: skip
    assert isinstance(law, SoftBounds)
    return Parameters(
        rate_up=law.up,
        rate_down=law.down,
        spread=law.spread,
        pulses=law.pulses,
        pulse_cycle2=law.cycle**2,
        law=2,
    )


def _not_finite(count: int) -> ValueError:
    return ValueError(
        f"{OP}: `dw` must be finite, got {count} NaN or infinite values; look for a diverging loss or lower the rate"
    )
