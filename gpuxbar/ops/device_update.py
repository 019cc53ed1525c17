"""The weight update of an array: wanted changes through the device's own law, and the weights read out."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from gpuxbar import reference
from gpuxbar.launch import (
    Device,
    In,
    InOut,
    Kernel,
    Out,
    Scalar,
    Struct,
    backend,
    cuda_device,
    host_call,
    library,
)
from gpuxbar.ops.checks import check_array
from gpuxbar.reference.device_update import neurosim_rate
from gpuxbar.spec import Agarwal, NeuroSim, SoftBounds, UpdateLaw

__all__ = ["KERNEL", "device_update"]

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
    device: Device | None = None,
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
        device: Where CuPy arrays are allocated and run; None: CuPy's current device and memory pool.

    Returns:
        Weights after the update, float32 [G, O, I]: w_max (g_pos - g_neg) / (g_max - g_min).

    Raises:
        TypeError: An array has another dtype.
        ValueError: Shapes disagree, an array is not contiguous, or `dw` holds NaN or infinity (checked on the CPU; on a GPU
            no value is read back, and such a change moves its cells to a bound); `g` is unchanged.

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
    window: dict[str, Any] = {
        "g_min": g_min, "g_max": g_max, "stuck_at_g_min": stuck_at_g_min, "stuck_at_g_max": stuck_at_g_max,
    }  # fmt: skip
    where = "cuda" if device is not None else backend(g)
    if where == "cuda":
        return _cuda(device or cuda_device(), g, dw, law, w_max, step, seed, window)
    step = int(np.asarray(step).reshape(-1)[0])
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


def _cuda(
    device: Device, g: Any, dw: Any, law: UpdateLaw, w_max: Any, step: Any, seed: int, window: dict[str, Any]
) -> Any:
    groups, outputs, inputs = dw.shape
    weights = device.empty(dw.shape, "float32")
    by_value = isinstance(step, int)
    device.launch(
        KERNEL, (-(-outputs // 32), -(-inputs // 32), groups), (256,),
        {"g": g, "dw": dw, "w": weights, "w_max": w_max, "step": None if by_value else step.reshape(-1),
         "law": parameters(law), "step_value": step if by_value else 0, "seed": seed, "g_min": window["g_min"],
         "range": window["g_max"] - window["g_min"], "stuck_low": window["stuck_at_g_min"],
         "stuck_high": window["stuck_at_g_max"], "groups": groups, "inputs": inputs, "outputs": outputs},
    )  # fmt: skip
    return weights


KERNEL = Kernel(
    "device_update.cu",
    g=InOut("float32", "S R O"), dw=In("float32", "G O I"), w=Out("float32", "G O I"), w_max=In("float32", "C"),
    step=In("int64", "one", optional=True), law=Struct("UpdateLaw", Parameters), step_value=Scalar("int64"),
    seed=Scalar("uint64"), g_min=Scalar("float32"), range=Scalar("float32"), stuck_low=Scalar("float32"),
    stuck_high=Scalar("float32"), groups=Scalar("int32"), inputs=Scalar("int32"), outputs=Scalar("int32"),
)  # fmt: skip


def _not_finite(count: int) -> ValueError:
    return ValueError(
        f"{OP}: `dw` must be finite, got {count} NaN or infinite values; look for a diverging loss or lower the rate"
    )
