"""What devices lose between updates."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from gpuxbar import reference
from gpuxbar.launch import Device, In, InOut, Kernel, Scalar, Struct, backend, cuda_device, host_call, library
from gpuxbar.ops.checks import (
    check_array,
    check_integers,
    check_numbers,
    check_stuck,
    check_window,
    check_written,
    require_finite,
)
from gpuxbar.ops.endurance import check_counts
from gpuxbar.spec import Retention

__all__ = ["KERNEL", "relax"]

OP = "relax"


def relax(
    g: Any,
    *,
    law: Retention,
    g_min: float,
    g_max: float,
    time: float | None = None,
    pulse_count: Any = None,
    stuck_at_g_min: float = 0.0,
    stuck_at_g_max: float = 0.0,
    seed: int = 0,
    device: Device | None = None,
) -> None:
    """Let devices decay towards their rest for a time, in place.

    g <- g_rest + (g - g_rest) exp(-time / (tau exp(spread z))), see `spec.Retention`; nothing without a `tau`.

    Args:
        g: Conductances, float32 [P, R, C], S; finite, updated in place.
        law: How they decay.
        g_min, g_max: Conductance window, S; it sets the rest if the law has none.
        time: How long, s, above 0; None: one step of the law.
        pulse_count: Pulses that devices have taken, int32 [P, R, C]; those below 0 have failed and keep what they hold.
        stuck_at_g_min, stuck_at_g_max: Rates of stuck cells, which keep what they hold; the same cells as `program` draws
            for this seed.
        seed: Of the time constants, which are the same at every call.
        device: Where CuPy arrays are run; None: CuPy's current device.

    Raises:
        TypeError: `g` has another dtype.
        ValueError: `g` is not contiguous or not finite (checked on the CPU; on a GPU no value is read back), or `time` is out
            of range; `g` is unchanged.

    Source:
        Rasch et al., aihwkit, AICAS 2021.
    """
    check_array(OP, "g", g, "float32", 3)
    check_window(OP, g_min, g_max)
    check_stuck(OP, stuck_at_g_min, stuck_at_g_max)
    check_integers(OP, seed=seed)
    check_written(OP, g=g)
    if pulse_count is not None:
        check_counts(OP, pulse_count, g.shape)
    if time is not None:
        check_numbers(OP, "time", time, "s", "give the time that passes")
    if law.tau is None:
        return
    rest = g_min if law.g_rest is None else law.g_rest
    rate = (law.step_time if time is None else time) / law.tau
    stuck = {"stuck_low": stuck_at_g_min, "stuck_high": stuck_at_g_max}
    settings = Settings(g_rest=rest, rate=rate, spread=law.spread, **stuck)
    planes, rows, cols = g.shape
    if device is not None or backend(g) == "cuda":
        size = planes * rows * -(-cols // 4)
        (device or cuda_device()).launch(
            KERNEL, (min(-(-size // 256), 1 << 16),), (256,),
            {"g": g, "pulse_count": pulse_count, "law": settings, "seed": seed, "rows": rows, "cols": cols, "size": size},
        )  # fmt: skip
        return
    require_finite(OP, "g", int((~np.isfinite(g)).sum()), "bad data")
    if backend(g) == "reference":
        later = reference.relax(g, g_rest=rest, rate=rate, spread=law.spread, seed=seed, **stuck)
        g[...] = later if pulse_count is None else np.where(pulse_count < 0, g, later)
        return
    host_call(
        library(),
        "gpuxbar_relax",
        np.frombuffer(bytes(settings), np.uint8),
        g,
        pulse_count,
        planes,
        rows,
        cols,
        seed,
    )


class Settings(ctypes.Structure):
    """Twin of `struct Retention` in kernels/include/gpuxbar/ageing.cuh."""

    _fields_ = [(name, ctypes.c_float) for name in ("g_rest", "rate", "spread", "stuck_low", "stuck_high")]


KERNEL = Kernel(
    "relax.cu",
    g=InOut("float32", "P R C"), pulse_count=In("int32", "P R C", optional=True), law=Struct("Retention", Settings), seed=Scalar("uint64"), rows=Scalar("int64"),
    cols=Scalar("int32"), size=Scalar("int64"),
)  # fmt: skip
