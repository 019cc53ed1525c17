"""`anchored_conductance` on a CUDA device: which tiles are solved is decided there, and nothing waits for it.

The number of launches depends on shapes and settings only, so that an update can be captured into a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gpuxbar.launch import Device, In, InOut, Kernel, Out, Scalar

__all__ = ["KERNELS", "apply_cuda", "update_cuda"]

_INT, _FLOAT = Scalar("int32"), Scalar("float32")

ANCHOR_DRIFT = Kernel(
    "anchor.cu", name="anchor_drift", g=In("float32", "T R C"), start=In("float32", "T R C"), slope=In("float32", "T"),
    moved=In("int32", "one", optional=True), error=Out("float32", "T"), age=InOut("int32", "T"),
    drift=Out("float32", "T"), urgency=Out("float32", "T"), cells=_INT, interval=_INT, tolerance=_FLOAT, far=_FLOAT,
    every=_INT,
)  # fmt: skip
ANCHOR_CHOOSE = Kernel(
    "anchor.cu", name="anchor_choose", urgency=In("float32", "T"), chosen=Out("int32", "B"), tiles=_INT, most=_INT
)  # fmt: skip
ANCHOR_GATHER = Kernel(
    "anchor.cu", name="anchor_gather", g=In("float32", "T R C"), chosen=In("int32", "B"),
    gathered=Out("float32", "B R C"), cells=_INT,
)  # fmt: skip
ANCHOR_COMMIT = Kernel(
    "anchor.cu", name="anchor_commit", exact=In("float32", "B R C"), g=In("float32", "T R C"),
    approximation=In("float32", "T R C"), chosen=In("int32", "B"), drift=In("float32", "T"),
    urgency=In("float32", "T"), offset=InOut("float32", "T R C"), start=Out("float32", "T R C"),
    slope=InOut("float32", "T"), error=Out("float32", "T"), age=InOut("int32", "T"), cells=_INT, interval=_INT,
    least=_FLOAT,
)  # fmt: skip
ANCHOR_APPLY = Kernel(
    "anchor.cu", name="anchor_apply", g_eff=InOut("float32", "T R C"), offset=In("float32", "T R C"),
    size=Scalar("int64"),
)  # fmt: skip
KERNELS = (ANCHOR_DRIFT, ANCHOR_CHOOSE, ANCHOR_GATHER, ANCHOR_COMMIT, ANCHOR_APPLY)


def update_cuda(
    device: Device, g: Any, approximation: Any, anchor: Sequence[Any], moved: Any, most: int, *, interval: int,
    tolerance: float, far: float, least: float, every: bool, chunk: int, solve: Callable[[Any], Any],
) -> None:  # fmt: skip
    """Solve up to `most` tiles that are due and remember them in `anchor`: the arrays of `ops.Anchor`, tiles [T, R, C].

    As many are solved as may be due, since only the device knows how many are; those that are not keep what they had.
    `moved`, int32 [1] on the device or None, is 0 where there is no update. `solve`: exact solutions, `chunk` at most.
    """
    offset, start, age, slope, error = anchor
    tiles, cells = len(g), g.shape[1] * g.shape[2]
    drift, urgency = device.empty((tiles,), "float32"), device.empty((tiles,), "float32")
    chosen = device.empty((most,), "int32")
    device.launch(
        ANCHOR_DRIFT, (tiles,), (256,),
        {"g": g, "start": start, "slope": slope, "moved": moved, "error": error, "age": age, "drift": drift,
         "urgency": urgency, "cells": cells, "interval": interval, "tolerance": tolerance, "far": far,
         "every": int(every)},
    )  # fmt: skip
    device.launch(
        ANCHOR_CHOOSE, (-(-tiles // 256),), (256,),
        {"urgency": urgency, "chosen": chosen, "tiles": tiles, "most": most},
    )  # fmt: skip
    for first in range(0, most, chunk):
        part = chosen[first : first + chunk]
        gathered = device.empty((len(part), *g.shape[1:]), "float32")
        device.launch(
            ANCHOR_GATHER, (len(part),), (256,), {"g": g, "chosen": part, "gathered": gathered, "cells": cells}
        )  # fmt: skip
        device.launch(
            ANCHOR_COMMIT, (len(part),), (256,),
            {"exact": solve(gathered), "g": g, "approximation": approximation, "chosen": part, "drift": drift,
             "urgency": urgency, "offset": offset, "start": start, "slope": slope, "error": error, "age": age,
             "cells": cells, "interval": interval, "least": least},
        )  # fmt: skip


def apply_cuda(device: Device, approximation: Any, offset: Any) -> None:
    """max(approximation + offset, 0), in place."""
    device.launch(
        ANCHOR_APPLY, (min(-(-approximation.size // 256), 65536),), (256,),
        {"g_eff": approximation, "offset": offset, "size": approximation.size},
    )  # fmt: skip
