"""What devices lose between updates."""

from __future__ import annotations

import ctypes

import numpy as np

from gpuxbar import reference
from gpuxbar.launch import Device, In, InOut, Kernel, Scalar, Struct, backend, cuda_device, host_call, library
from gpuxbar.ops.checks import check_kind, check_numbers, require_finite
from gpuxbar.ops.pairs import Pairs
from gpuxbar.spec import Retention

__all__ = ["KERNEL", "relax"]

OP = "relax"


def relax(pairs: Pairs, law: Retention, *, time: float | None = None, device: Device | None = None) -> None:
    """Let devices decay towards their rest for a time, in place.

    g <- g_rest + (g - g_rest) exp(-time / (tau exp(spread z))), see `spec.Retention`; nothing without a `tau`.
    Stuck and failed devices keep what they hold.

    Args:
        pairs: The devices; `g` and `g_held` decay alike, by time constants that are the same at every call.
        law: How they decay.
        time: How long, s, above 0; None: one step of the law.
        device: Where CuPy arrays are run; None: CuPy's current device.

    Raises:
        TypeError: `pairs` are no `ops.Pairs`, or `law` is no `spec.Retention`.
        ValueError: A conductance is not finite (checked on the CPU; on a GPU no value is read back), or `time` is out of
            range; pairs are unchanged.

    Source:
        Rasch et al., aihwkit, AICAS 2021.
    """
    check_kind(OP, "pairs", pairs, Pairs)
    check_kind(OP, "law", law, Retention)
    if time is not None:
        check_numbers(OP, "time", time, "s", "give the time that passes")
    if law.tau is None:
        return
    decay: dict[str, float] = {
        "g_rest": pairs.g_min if law.g_rest is None else law.g_rest,
        "rate": (law.step_time if time is None else time) / law.tau,
        "spread": law.spread,
        "stuck_low": pairs.programming.stuck_at_g_min,
        "stuck_high": pairs.programming.stuck_at_g_max,
    }
    arrays = {"g": pairs.g} if pairs.g_held is None else {"g": pairs.g, "g_held": pairs.g_held}
    planes, rows, cols = pairs.g.shape
    if device is not None or backend(pairs.g) == "cuda":
        size = planes * rows * -(-cols // 4)
        for g in arrays.values():
            (device or cuda_device()).launch(
                KERNEL, (min(-(-size // 256), 1 << 16),), (256,),
                {"g": g, "pulse_count": pairs.pulse_count, "law": Settings(**decay), "seed": pairs.seed, "rows": rows,
                 "cols": cols, "size": size},
            )  # fmt: skip
        return
    for name, g in arrays.items():
        require_finite(OP, name, int((~np.isfinite(g)).sum()), "bad data")
    for g in arrays.values():
        if backend(g) == "reference":
            later = reference.relax(g, seed=pairs.seed, **decay)
            g[...] = later if pairs.pulse_count is None else np.where(pairs.pulse_count < 0, g, later)
        else:
            host_call(
                library(), "gpuxbar_relax", Settings(**decay), g, pairs.pulse_count, planes, rows, cols, pairs.seed
            )  # fmt: skip


class Settings(ctypes.Structure):
    """Twin of `struct Retention` in kernels/include/gpuxbar/ageing.cuh."""

    _fields_ = [(name, ctypes.c_float) for name in ("g_rest", "rate", "spread", "stuck_low", "stuck_high")]


KERNEL = Kernel(
    "relax.cu",
    g=InOut("float32", "P R C"), pulse_count=In("int32", "P R C", optional=True), law=Struct("Retention", Settings), seed=Scalar("uint64"), rows=Scalar("int64"),
    cols=Scalar("int32"), size=Scalar("int64"),
)  # fmt: skip
