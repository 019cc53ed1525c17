"""Carries between the slices of weights that are trained in situ."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuxbar import reference
from gpuxbar.launch import Device, In, InOut, Kernel, Scalar, Struct, backend, cuda_device, host_call, library
from gpuxbar.ops.checks import (
    check_array,
    check_integers,
    check_window,
    check_written,
    integer,
    require_finite,
)
from gpuxbar.ops.endurance import check_counts
from gpuxbar.ops.program import Programming, write_values
from gpuxbar.ops.slices import Slices, check_slices
from gpuxbar.spec import Carry
from gpuxbar.spec import Programming as Writes

__all__ = ["KERNEL", "carry"]

OP = "carry"


def carry(
    g: Any,
    *,
    rule: Carry,
    slices: int,
    slice_bits: int,
    updates: Any,
    g_min: float,
    g_max: float,
    balanced: bool = True,
    hidden: Any = None,
    pulse_count: Any = None,
    programming: Writes | None = None,
    seed: int = 0,
    device: Device | None = None,
) -> None:
    """Move the excess of digits up to the next slice, in place, where it is time.

    With base b = 2**slice_bits and window = 2**(slice_bits + headroom_bits) - 1, from the lowest slice k up:
    d_k = window (g_pos - g_neg) / (g_max - g_min),  c = trunc(d_k / b),  d_k <- d_k - b c,  d_(k+1) <- d_(k+1) + c
    and last, where the highest digit is b or more in size, all digits <- +-(b - 1). See `spec.Carry`.

    The sum of all d_k b**k stays as it was, but for what a window cannot hold and the noise of the writes. Only pairs whose
    digit changes are written. Without `balanced`, those too of which both devices lie a unit or more above `g_min`. Pairs with a stuck
    or failed device are left to updates.

    Args:
        g: Conductances of the positive devices, least significant slice first, then of the negative ones, float32
            [2 slices, R, C], S; finite, updated in place.
        rule: How slices carry.
        slices, slice_bits: Pairs of a weight, at least 2, and bits of each.
        updates: Updates so far, an integer or an int64 array of one element: a slice is carried after every `rule.interval`
            of them (see there), and never at 0. It also fixes the noise of the writes, with the seed.
        g_min, g_max: Conductance window, S.
        balanced: Whether pairs are written around the middle of the window, or with one device at `g_min`.
        hidden: Conductances that devices with write noise of their law hold, like `g`; a written one holds what it shows.
        pulse_count: Pulses that devices have taken, int32 like `g`; those below 0 have failed, and stay as they are.
        programming: What a write leaves; `program` draws the same spread and stuck cells. None: what is aimed at.
        seed: Of the draws.
        device: Where CuPy arrays are run; None: CuPy's current device.

    Raises:
        TypeError: An array has another dtype.
        ValueError: Shapes disagree, an array is not contiguous, a setting is out of range, or `g` is not finite (checked on
            the CPU; on a GPU no value is read back); `g` is unchanged.

    Source:
        Ankit et al., "PANTHER", IEEE Transactions on Computers 2020; Agarwal et al., VLSI Technology 2017 (periodic carry).
    """
    check_array(OP, "g", g, "float32", 3)
    check_slices(OP, slices, slice_bits, rule)
    if hidden is not None:
        check_array(OP, "hidden", hidden, "float32", 3)
    for name, array, shape in (("g", g, (2 * slices, *g.shape[1:])), ("hidden", hidden, g.shape)):
        if array is not None and tuple(array.shape) != tuple(shape):
            raise ValueError(
                f"{OP}: `{name}` must have shape {tuple(shape)} for {slices} slices, got {tuple(array.shape)}; check the axes"
            )
    if pulse_count is not None:
        check_counts(OP, pulse_count, g.shape)
    check_window(OP, g_min, g_max)
    check_integers(OP, seed=seed)
    check_written(OP, g=g, hidden=hidden)
    settings: dict[str, Any] = {"g_min": g_min, "g_max": g_max, "balanced": balanced, "seed": seed}
    settings |= (programming or Writes()).model_dump()
    writes = write_values({"slice_bits": slice_bits, "headroom_bits": rule.headroom_bits, **settings})
    lie = Slices.of(slices, slice_bits, rule)
    _, rows, cols = g.shape
    if device is not None or backend(g) == "cuda":
        by_value = isinstance(updates, int)
        size = rows * -(-cols // 4)
        (device or cuda_device()).launch(
            KERNEL, (min(-(-size // 256), 1 << 16),), (256,),
            {"g": g, "hidden": hidden, "pulse_count": pulse_count, "updates": None if by_value else updates.reshape(-1),
             "p": Programming(**writes), "slices": lie, "updates_value": updates if by_value else 0,
             "interval": rule.interval, "rows": rows, "cols": cols, "size": size},
        )  # fmt: skip
        return
    count = integer(OP, "updates", updates)
    if backend(g) == "reference":
        require_finite(OP, "g", int((~np.isfinite(g)).sum()), "bad data")
        after, written = reference.carry(
            g, rule=rule.model_dump(), slices=slices, slice_bits=slice_bits, updates=count, pulse_count=pulse_count,
            **settings,
        )  # fmt: skip
        g[written] = after[written]
        if hidden is not None:
            hidden[written] = g[written]
        return
    bad = np.zeros(1, np.int64)
    host_call(
        library(), "gpuxbar_carry", np.frombuffer(bytes(Programming(**writes, step=count)), np.uint8),
        np.frombuffer(bytes(lie), np.uint8), g, hidden, pulse_count, rule.interval, rows, cols, bad,
    )  # fmt: skip
    require_finite(OP, "g", int(bad[0]), "bad data")


KERNEL = Kernel(
    "carry.cu",
    g=InOut("float32", "P R C"), hidden=InOut("float32", "P R C", optional=True),
    pulse_count=In("int32", "P R C", optional=True), updates=In("int64", "one", optional=True),
    p=Struct("Programming", Programming), slices=Struct("Slices", Slices), updates_value=Scalar("int64"),
    interval=Scalar("int64"), rows=Scalar("int64"), cols=Scalar("int32"), size=Scalar("int64"),
)  # fmt: skip
