"""Conductances some time after they were programmed."""

from __future__ import annotations

import ctypes
from math import inf, log, sqrt
from typing import Any

import numpy as np

from gpuxbar import reference
from gpuxbar.launch import Device, In, Kernel, Out, Scalar, Struct, backend, cuda_device, host_call, library
from gpuxbar.ops.checks import NUMBER, check_array, check_integers, check_kind, require_finite
from gpuxbar.spec import MOST_SHARES, Drift, DriftLaw, MeasuredDrift

__all__ = ["KERNELS", "drift"]

OP = "drift"


def drift(
    g: Any, age: float, *, law: DriftLaw, g_max: float, seed: int = 0, step: int = 0, device: Device | None = None
) -> Any:  # fmt: skip
    """Let conductances drift for a time, with the low-frequency noise that a read then finds.

    With t = law.t_0 + age:  g(t) = max(0, g (t / t_0)**-|nu + std z1| (1 + share z2)), see `spec.Drift`, or
    g(age) = max(0, g + shift + std z1), see `spec.MeasuredDrift`.

    Args:
        g: Conductances as programmed, float32 [P, R, C], S; finite.
        age: Time since programming, s, at least 0; of a table at most its last.
        law: How they drift, a `spec.Drift` or `spec.MeasuredDrift`.
        g_max: Upper end of the conductance window, S, above 0.
        seed, step: Of the write; same pair, same exponents z1. The noise z2 depends on them and on `age`, so another age
            is another draw, and the same age the same one.
        device: Where CuPy arrays are allocated and run; None: CuPy's current device and memory pool.

    Returns:
        Conductances at that age, float32 [P, R, C], S.

    Raises:
        TypeError: `g` has another dtype, `law` is neither of these, or `age` no number.
        ValueError: `g` is not contiguous or not finite (checked on the CPU; on a GPU no value is read back), or a setting is
            out of range.

    Source:
        Joshi et al., Nature Communications 2020.
    """
    check_array(OP, "g", g, "float32", 3)
    check_kind(OP, "law", law, Drift, MeasuredDrift)
    if not isinstance(age, NUMBER):
        raise TypeError(f"{OP}: `age` must be a number of seconds, got {age!r}; gpuxbar.age takes text")
    if not 0 <= age < inf:
        raise ValueError(f"{OP}: `age` must be finite and at least 0, got {age:g} s; count from programming")
    if age > law.last:
        raise ValueError(
            f"{OP}: `age` must be at most {law.last:g} s, the last of `law.ages`, got {age:g} s; measure longer"
        )
    if not 0 < g_max < inf:
        raise ValueError(f"{OP}: `g_max` must be finite and above 0, got {g_max:g} S; give the window's end")
    check_integers(OP, seed=seed, step=step)
    number, flicker_step = step & 0xFFFFFFFF, _flicker_step(step, age)
    where = "cuda" if device is not None else backend(g)
    if where != "cuda":
        require_finite(OP, "g", int((~np.isfinite(g)).sum()), "bad data")
    if where == "reference":
        found = reference.drift(
            g, age, law=law.model_dump(), g_max=g_max, seed=seed, step=number, flicker_step=flicker_step
        )
        return found.astype(np.float32)
    settings: Settings | Table
    if isinstance(law, MeasuredDrift):
        kernel, settings, flicker = MEASURED_DRIFT, Table.of(law, age, g_max), {}
    else:
        kernel, settings, flicker = DRIFT, Settings.of(law, age, g_max), {"flicker_step": flicker_step}
    planes, rows, cols = g.shape
    if where == "cuda":
        device = device or cuda_device()
        aged = device.empty(g.shape, "float32")
        size = planes * rows * -(-cols // 4)
        device.launch(
            kernel, (min(-(-size // 256), 1 << 16),), (256,),
            {"g": g, "aged": aged, "law": settings, "step": number, **flicker, "seed": seed, "rows": rows, "cols": cols,
             "size": size},
        )  # fmt: skip
        return aged
    aged = np.empty_like(g)
    host_call(
        library(), f"gpuxbar_{kernel.name}", settings, g, aged, planes, rows, cols, seed, number, *flicker.values()
    )  # fmt: skip
    return aged


def _flicker_step(step: int, age: float) -> int:
    """A step for every write and age; two of a write differ unless the ages are one float32."""
    return (step * 0x9E3779B1 ^ int(np.float32(age).view(np.uint32))) & 0xFFFFFFFF


class Settings(ctypes.Structure):
    """Twin of `struct Drift` in kernels/include/gpuxbar/ageing.cuh."""

    _fields_ = [(name, ctypes.c_float) for name in (
        "inverse_g_max", "nu", "nu_slope", "nu_min", "nu_max", "std", "std_slope", "std_min", "std_max", "log_time",
        "flicker", "flicker_exponent", "flicker_max", "growth")]  # fmt: skip

    @classmethod
    def of(cls, law: Drift, age: float, g_max: float) -> Settings:
        t = law.t_0 + age
        alike = law.nu_std <= 0 and law.nu_std_slope == 0 and law.nu_std_min == 0  # draws nothing
        return cls(
            inverse_g_max=1 / g_max, nu=law.nu, nu_slope=law.nu_slope, nu_min=law.nu_min, nu_max=law.nu_max, std=law.nu_std,
            std_slope=law.nu_std_slope, std_min=law.nu_std_min, std_max=0.0 if alike else law.nu_std_max,
            log_time=log(t / law.t_0), flicker=law.flicker, flicker_exponent=law.flicker_exponent,
            flicker_max=law.flicker_max, growth=sqrt(log((t + law.t_read) / (2 * law.t_read))),
        )  # fmt: skip


class Table(ctypes.Structure):
    """Twin of `struct MeasuredDrift` in kernels/include/gpuxbar/ageing.cuh."""

    _fields_ = [
        ("count", ctypes.c_int32), ("inverse_g_max", ctypes.c_float),
        *((name, ctypes.c_float * MOST_SHARES) for name in ("share", "shift", "std")),
    ]  # fmt: skip

    @classmethod
    def of(cls, law: MeasuredDrift, age: float, g_max: float) -> Table:
        columns = ((ctypes.c_float * MOST_SHARES)(*values) for values in (law.shares, *law.at(age)))
        return cls(len(law.shares), 1 / g_max, *columns)


_CELLS: dict[str, Any] = {"g": In("float32", "P R C"), "aged": Out("float32", "P R C")}
_PLACE: dict[str, Any] = {
    "seed": Scalar("uint64"),
    "rows": Scalar("int64"),
    "cols": Scalar("int32"),
    "size": Scalar("int64"),
}
DRIFT = Kernel(
    "drift.cu", **_CELLS, law=Struct("Drift", Settings), step=Scalar("uint32"), flicker_step=Scalar("uint32"), **_PLACE
)  # fmt: skip
MEASURED_DRIFT = Kernel(
    "measured_drift.cu", **_CELLS, law=Struct("MeasuredDrift", Table), step=Scalar("uint32"), **_PLACE
)
KERNELS = DRIFT, MEASURED_DRIFT
