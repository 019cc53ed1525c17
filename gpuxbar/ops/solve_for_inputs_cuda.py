"""`solve_for_inputs` and its gradient on a CUDA device: one block of threads an input, from its start to its currents.

A block goes over eight fields of a tile three times for the bitlines and twice for the wordlines in an iteration. Three that
are needed most are in shared memory if there is enough, for up to 128 x 128 cells on Hopper; the other five are 320 KB then,
and those of 132 blocks 42 MB, which an H200 holds in its L2. As many blocks run as there are multiprocessors, each for one
input after the other. What that takes is estimated in kernels/README.md. Not yet run on a GPU.

Everything is decided on the device. For the gradient, products of the two solutions are kept, of some inputs at a time.
"""

from __future__ import annotations

from typing import Any

from gpuxbar.launch import Device, In, InOut, Kernel, Out, Scalar
from gpuxbar.ops.effective_conductance_cuda import LINES, VALUES, grid, wire_values
from gpuxbar.ops.fused_layout import shared_memory

__all__ = ["KERNELS", "solve_for_inputs_cuda", "solve_for_inputs_gradient_cuda"]

_INT, _LONG, _FLOAT = Scalar("int32"), Scalar("int64"), Scalar("float32")
_BOUNDS: dict[str, Any] = {"tolerance": _FLOAT, "iterations": _INT, "batch": _INT, "rows": _INT, "cols": _INT}
_V, _G = In("float32", "T B R"), In("float32", "T R C")

WIRE_CURRENTS = Kernel(
    "wire_currents.cu", v=_V, g=_G, **LINES, i=Out("float32", "T B C"), memory=Out("float32"), **VALUES, **_BOUNDS,
    items=_LONG,
)  # fmt: skip
WIRE_CURRENTS_GRADIENT = Kernel(
    "wire_currents_gradient.cu", v=_V, g=_G, grad_i=In("float32", "T B C"), **LINES,
    grad_v=Out("float32", "T B R"), products=Out("float32", "N R C"), memory=Out("float32"), **VALUES, **_BOUNDS, first=_LONG,
    items=_LONG,
)  # fmt: skip
WIRE_CURRENTS_SUM = Kernel(
    "wire_currents_sum.cu", products=In("float32", "N R C"), grad_g=InOut("float32", "T R C"),
    batch=_INT, rows=_INT, cols=_INT, first=_LONG, items=_LONG, size=_LONG,
)  # fmt: skip
KERNELS = (WIRE_CURRENTS, WIRE_CURRENTS_GRADIENT, WIRE_CURRENTS_SUM)

THREADS, WIDE, FAR, NEAR = 512, 128, 5, 3  # fields that are always in global memory, and that need not be
STATIC_SHARED = 25 * 1024  # what a block has of its own
CHUNK = 8  # workspaces of the device for the fields: 64 blocks for tiles of 512 x 512


def solve_for_inputs_cuda(
    device: Device, v: Any, g: Any, lines: dict[str, Any], tolerance: float, iterations: int
) -> Any:  # fmt: skip
    """`ops.solve_for_inputs` on v [T, B, R] and g [T, R, C], checked and not empty; `lines` as `device_lines` has them."""
    tiles, batch, rows = v.shape
    items, cols = tiles * batch, g.shape[2]
    i = device.empty((tiles, batch, cols), "float32")
    work = Work(device, items, rows, cols)
    device.launch(
        WIRE_CURRENTS, (work.blocks,), (THREADS,),
        {"v": v, "g": g, **wire_values(lines), "i": i, "memory": work.memory, "tolerance": tolerance,
         "iterations": iterations, "batch": batch, "rows": rows, "cols": cols, "items": items},
        work.macros, work.shared,
    )  # fmt: skip
    return i


def solve_for_inputs_gradient_cuda(
    device: Device, v: Any, g: Any, grad_i: Any, lines: dict[str, Any], tolerance: float, iterations: int
) -> tuple[Any, Any]:  # fmt: skip
    """`ops.solve_for_inputs_gradient` on the same and grad_i [T, B, C]."""
    tiles, batch, rows = v.shape
    cols = g.shape[2]
    grad_v, grad_g = device.empty(v.shape, "float32"), device.zeros(g.shape, "float32")
    chunk = min(max(CHUNK * device.workspace // (4 * rows * cols), 1), tiles * batch)
    products = device.empty((chunk, rows, cols), "float32")
    work = Work(device, chunk, rows, cols)
    size = {"batch": batch, "rows": rows, "cols": cols}
    wires = wire_values(lines)
    for first in range(0, tiles * batch, chunk):
        items = min(chunk, tiles * batch - first)
        part = {**size, "products": products, "first": first, "items": items}
        device.launch(
            WIRE_CURRENTS_GRADIENT, (min(work.blocks, items),), (THREADS,),
            {"v": v, "g": g, "grad_i": grad_i, **wires, "grad_v": grad_v, "memory": work.memory, "tolerance": tolerance,
             "iterations": iterations, **part},
            work.macros, work.shared,
        )  # fmt: skip
        cells = ((first + items - 1) // batch - first // batch + 1) * rows * cols
        device.launch(
            WIRE_CURRENTS_SUM, grid(cells), (256,), {"grad_g": grad_g, **part, "size": cells}
        )  # fmt: skip
    return grad_v, grad_g


class Work:
    """Where blocks work: how many at a time, and the memory of all of them and of each."""

    def __init__(self, device: Device, items: int, rows: int, cols: int):
        size = 4 * rows * -(-cols // WIDE) * WIDE
        on_chip = NEAR * size + STATIC_SHARED <= shared_memory(device.arch)
        fields = size * (FAR if on_chip else FAR + NEAR)
        self.blocks = min(items, device.multiprocessors, max(CHUNK * device.workspace // fields, 1))
        self.memory = device.empty((self.blocks * fields // 4,), "float32")
        self.macros, self.shared = {"ON_CHIP": int(on_chip)}, NEAR * size if on_chip else 0
