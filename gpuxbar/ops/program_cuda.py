"""`program` and `reprogram` on a CUDA device; whether anything is written is decided there, from device memory."""

from __future__ import annotations

import ctypes
from typing import Any

from gpuxbar.launch import Device, In, InOut, Kernel, Out, Scalar, Struct

__all__ = ["KERNELS", "Deviation", "program_cuda", "reprogram_cuda"]


class Deviation(ctypes.Structure):
    """Twin of `struct Deviation` in kernels/include/gpuxbar/programming.cuh."""

    _fields_ = [("terms", ctypes.c_float * 5)]

    @classmethod
    def of(cls, write_noise: float | tuple[float, ...]) -> Deviation:
        """Of `spec.Programming.write_noise`."""
        terms = write_noise if isinstance(write_noise, tuple) else (write_noise,)
        return cls((ctypes.c_float * 5)(*terms))


_INT, _LONG, _FLOAT = Scalar("int32"), Scalar("int64"), Scalar("float32")

PROGRAM = Kernel(
    "program.cu",
    weight=In("float32", "G O I"), w_max=In("float32", "L"), g=Out("float32", "P M O"),
    noise_var=Out("float32", "P M O", optional=True), state=In("int64", "two", optional=True),
    step=In("int64", "one", optional=True), step_value=_LONG, seed=Scalar("uint64"), groups=_INT, inputs=_INT,
    outputs=_INT, slices=_INT, slice_bits=_INT, merge=_INT, scale_count=_INT, balanced=_INT, digit_max=_FLOAT, steps=_FLOAT, g_min=_FLOAT, g_max=_FLOAT,
    spread=_FLOAT, noise=Struct("Deviation", Deviation), stuck_low=_FLOAT, stuck_high=_FLOAT, read_var=_FLOAT, read_power=_FLOAT,
)  # fmt: skip
BEGIN_FINGERPRINT = Kernel(
    "fingerprint.cu", name="begin_fingerprint",
    w_max=Out("float32", "L"), state=InOut("int64", "two"), write_step=In("int64", "one"), least=_FLOAT, count=_LONG,
)  # fmt: skip
FINGERPRINT = Kernel(
    "fingerprint.cu",
    weight=In("float32", "G O I"), w_max=InOut("float32", "L"), state=InOut("int64", "two"), measure=_INT, rows=_LONG,
    inputs=_LONG,
)  # fmt: skip
COMMIT_FINGERPRINT = Kernel(
    "fingerprint.cu", name="commit_fingerprint",
    w_max=InOut("float32", "L"), state=InOut("int64", "two"), measure=_INT, count=_LONG,
)  # fmt: skip
KERNELS = (PROGRAM, BEGIN_FINGERPRINT, FINGERPRINT, COMMIT_FINGERPRINT)

_MEASURES = {"tensor": 1, "column": 2}  # enum Measure in programming.cuh; 0: nothing


def program_cuda(
    device: Device, weight: Any, w_max: Any, g: Any, noise_var: Any, values: dict[str, Any], *,
    state: Any = None, step: Any = None,
) -> None:  # fmt: skip
    """Fill `g` and `noise_var` on checked arguments; `values` are the fields of `struct Programming`.

    `step` is an array, or None for the step among the values; with `state`, see program.cu.
    """
    groups, outputs, inputs = weight.shape
    values = {name: value for name, value in values.items() if name != "step"} | {
        "step_value": values["step"]
    }
    device.launch(
        PROGRAM, (groups * -(-inputs // 32) * -(-outputs // 32),), (256,),
        {"weight": weight, "w_max": w_max, "g": g, "noise_var": noise_var, "state": state, "step": step, **values},
    )  # fmt: skip


def reprogram_cuda(
    device: Device, weight: Any, g: Any, w_max: Any, state: Any, noise_var: Any, write_step: Any,
    values: dict[str, Any], scale: str, full_weight: float | None,
) -> None:  # fmt: skip
    """Four launches, whether the weights have changed or not."""
    groups, outputs, inputs = weight.shape
    rows = groups * outputs
    measure = 0 if full_weight else _MEASURES[scale]
    per_output = (min(max(-(-rows // 256), 1), 1024),)
    device.launch(
        BEGIN_FINGERPRINT, per_output, (256,),
        {"w_max": w_max, "state": state, "write_step": write_step, "least": full_weight or 1e-30, "count": rows},
    )  # fmt: skip
    device.launch(
        FINGERPRINT, (min(-(-rows * -(-inputs // 1024) // 8), 2048),), (256,),
        {"weight": weight, "w_max": w_max, "state": state, "measure": measure, "rows": rows, "inputs": inputs},
    )  # fmt: skip
    one_scale = w_max[:1] if measure == _MEASURES["tensor"] else w_max
    program_cuda(
        device, weight, one_scale, g, noise_var, values | {"scale_count": one_scale.size}, state=state
    )
    device.launch(
        COMMIT_FINGERPRINT, per_output, (256,), {"w_max": w_max, "state": state, "measure": measure, "count": rows}
    )  # fmt: skip
