"""Carries between the slices of weights that are trained in situ."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuxbar import reference
from gpuxbar.launch import Device, In, InOut, Kernel, Scalar, Struct, backend, cuda_device, host_call, library
from gpuxbar.ops.checks import check_kind, counter, integer, require_finite
from gpuxbar.ops.pairs import Pairs, Slices
from gpuxbar.ops.program import Write, write_values

__all__ = ["KERNEL", "carry"]

OP = "carry"


def carry(pairs: Pairs, *, updates: Any, device: Device | None = None) -> None:
    """Move the excess of digits up to the next slice, in place, where it is time.

    With base b = 2**slice_bits and window = 2**(slice_bits + headroom_bits) - 1, from the lowest slice k up:
    d_k = window (g_pos - g_neg) / (g_max - g_min),  c = trunc(d_k / b),  d_k <- d_k - b c,  d_(k+1) <- d_(k+1) + c
    and last, where the highest digit is b or more in size, all digits <- +-(b - 1). See `spec.Carry`.

    The sum of all d_k b**k stays as it was, but for what a window cannot hold and the noise of the writes, which is that of
    `programming`. Only pairs whose digit changes are written; where devices are one-sided, those too of which both lie a
    unit or more above `g_min`. A written device holds what it shows; pairs with a stuck or failed one are left to updates.

    Args:
        pairs: The devices, several slices; changed in place.
        updates: Updates so far, an integer or an int64 array of one element: a slice is carried after every `carry.interval`
            of them (see there), and never at 0. It also fixes the noise of the writes, with the seed.
        device: Where CuPy arrays are run; None: CuPy's current device.

    Raises:
        TypeError: `pairs` are no `ops.Pairs`.
        ValueError: Pairs have one slice, `updates` is not one integer, or `g` is not finite (checked on the CPU; on a GPU no
            value is read back); pairs are unchanged.

    Source:
        Ankit et al., "PANTHER", IEEE Transactions on Computers 2020; Agarwal et al., VLSI Technology 2017 (periodic carry).
    """
    check_kind(OP, "pairs", pairs, Pairs)
    g, rule, bits = pairs.g, pairs.carry, pairs.slice_bits
    if rule is None or bits is None:
        raise ValueError(
            f"{OP}: `pairs` must be slices, got one pair; build them with slice_bits and a carry"
        )
    settings: dict[str, Any] = {
        "g_min": pairs.g_min, "g_max": pairs.g_max, "balanced": pairs.balanced, "seed": pairs.seed,
        **pairs.programming.model_dump(),
    }  # fmt: skip
    writes = write_values({"slice_bits": bits, "headroom_bits": rule.headroom_bits, **settings})
    lie = pairs.settings["slices"]
    _, rows, cols = g.shape
    if device is not None or backend(g) == "cuda":
        size = rows * -(-cols // 4)
        (device or cuda_device()).launch(
            KERNEL, (min(-(-size // 256), 1 << 16),), (256,),
            {"g": g, "g_held": pairs.g_held, "pulse_count": pairs.pulse_count, **counter("updates", updates),
             "p": Write(**writes), "slices": lie, "interval": rule.interval, "rows": rows, "cols": cols, "size": size},
        )  # fmt: skip
        return
    count = integer(OP, "updates", updates)
    if backend(g) == "reference":
        require_finite(OP, "g", int((~np.isfinite(g)).sum()), "bad data")
        after, written = reference.carry(
            g, rule=rule.model_dump(), slices=pairs.slices, slice_bits=bits, updates=count, pulse_count=pairs.pulse_count,
            **settings,
        )  # fmt: skip
        g[written] = after[written]
        if pairs.g_held is not None:
            pairs.g_held[written] = g[written]
        return
    bad = np.zeros(1, np.int64)
    host_call(
        library(), "gpuxbar_carry", Write(**writes, step=count), lie, g, pairs.g_held, pairs.pulse_count, rule.interval, rows,
        cols, bad,
    )  # fmt: skip
    require_finite(OP, "g", int(bad[0]), "bad data")


KERNEL = Kernel(
    "carry.cu",
    g=InOut("float32", "P R C"), g_held=InOut("float32", "P R C", optional=True),
    pulse_count=In("int32", "P R C", optional=True), updates=In("int64", "one", optional=True),
    p=Struct("Programming", Write), slices=Struct("Slices", Slices), updates_value=Scalar("int64"),
    interval=Scalar("int64"), rows=Scalar("int64"), cols=Scalar("int32"), size=Scalar("int64"),
)  # fmt: skip
