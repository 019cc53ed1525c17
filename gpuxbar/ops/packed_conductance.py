"""Conductances in the layout of the fused kernels' right operand: packed for one read, or kept between reads.

Whether kept ones are still those of the array is decided on the device, from a number that tells its states apart: nothing
waits for the host, and a captured CUDA graph packs anew exactly when the array has changed.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np

from gpuxbar.launch import Device, In, InOut, Kernel, Out, Scalar
from gpuxbar.ops.checks import check_array, check_shape
from gpuxbar.ops.fused_layout import STEP, gathered_chunks, step_lines
from gpuxbar.ops.tile_mvm_cuda import Shape, conductance_scale

__all__ = [
    "PACK_SENSED",
    "PANEL_ROWS",
    "PackedConductance",
    "Padded",
    "RightOperand",
    "check_packed",
    "right_operand",
]

_INT, _LONG, _FLOAT = Scalar("int32"), Scalar("int64"), Scalar("float32")
PANEL_ROWS = 128  # kernels/include/gpuxbar/panels.cuh
BLOCKS = 8  # of the packing kernel on a multiprocessor

PACK_SENSED = Kernel(
    "pack_sensed.cu",
    g=In("float32", "S I O"), b=Out("float16|int16|int8", "S G N T K"), low=Out("float16", "S G N T K", optional=True),
    version=In("int64", "one", optional=True), state=InOut("int64", "two", optional=True), layout=_LONG, commit=_INT,
    scale=_FLOAT, offset=_FLOAT, planes=_INT, groups=_INT, inputs=_INT, cols=_INT, tiles=_INT, tile=_INT, k=_INT,
    stored=_INT, positions=_INT, chunks=_INT,
)  # fmt: skip


class PackedConductance(NamedTuple):
    """What a read packs of an array, kept for the next one; the caller keeps the arrays, and one of these a direction.

    A read that finds another number in `version` than the one it packed at, or needs another layout, packs anew. Only the
    fused kernels pack like this; other reads leave it alone.

    Attributes:
        memory: uint8 [at least `size(...)`]; what it holds is the reads' own.
        state: int64 [2], zeros at first; zeros again say that nothing is packed.
        version: Number of the state of the conductances (and of `noise_var`), int64 [1]: another one whenever they
            change. 0 says nothing: they are packed at every read.
    """

    memory: Any
    state: Any
    version: Any

    @staticmethod
    def size(
        shape: tuple[int, int, int], *, tile: int | None, transposed: bool = False, groups: int = 1,
        positions: int = 0, precision: str = "fp16", noise_var: bool = False,
    ) -> int:  # fmt: skip
        """Bytes that hold conductances [S, G * I, O] in every layout that a read of these settings may take.

        2 bytes a cell (fp16, bf16), 4 with two halves (fp16x2), 1 of levels (int8), and 2 more with `noise_var`; lines that are
        driven are padded to 64 a tile (int8: 128) and lines that are sensed to 128, or eight channels are gathered at every
        position of a kernel.
        `positions`: of the kernel of a convolution read forwards in the line order channel_position; 0: another read.
        """
        planes, rows, cols = shape
        inputs = rows // groups
        drive = max(cols if transposed else inputs, 1)
        s = {
            "transposed": transposed, "tile": tile or drive, "groups": groups, "streams": 1, "phases": 1,
            "precision": precision,
        }  # fmt: skip
        gathered = (
            8 * positions * gathered_chunks(inputs, tile or drive, positions)
            if positions and precision != "int8"
            else 0
        )
        shapes = [Padded.of(shape, 1, inputs, s, lines) for lines in (0, gathered)]
        lines = max(padded.tiles * padded.k for padded in shapes)
        sensed = -(-shapes[0].sense // PANEL_ROWS) * PANEL_ROWS
        return planes * groups * sensed * lines * (_cell_bytes(precision) + 2 * noise_var)


@dataclass(frozen=True)
class Padded(Shape):
    """Sizes of one call; the driven lines of a tile are padded to whole steps of the pipeline.

    `gathered`: lines of a tile that gathers patches (patches.cuh); 0: no tile does. `step`: driven lines of a step.
    """

    gathered: int = 0
    step: int = STEP

    @property
    def k(self) -> int:
        return -(-(self.gathered or self.tile) // self.step) * self.step

    @classmethod
    def of(
        cls, cells: tuple[int, int, int], rows: int, inputs: int, s: dict[str, Any], gathered: int = 0
    ) -> Padded:
        """Of a read of conductances [S, G * I, O]."""
        planes, _, cols = cells
        drive, sense = (cols, inputs) if s["transposed"] else (inputs, cols)
        tile = min(s["tile"], max(drive, 1))
        passes, step = s["streams"] * s["phases"], step_lines(s["precision"])
        return cls(s["groups"], drive, sense, planes, tile, passes, rows, gathered, step)


@dataclass(frozen=True)
class RightOperand:
    """Packed conductances (times `scale`, high and low part; or levels, `scale` of them a siemens) and noise variances
    (times its square, bf16)."""

    high: Any
    low: Any
    spread: Any
    scale: float


def check_packed(op: str, packed: PackedConductance) -> None:
    """Refuse arrays of another dtype or shape."""
    for name, dtype, shape in (
        ("memory", "uint8", None),
        ("state", "int64", (2,)),
        ("version", "int64", (1,)),
    ):
        array = getattr(packed, name)
        check_array(op, f"packed.{name}", array, dtype, 1 if shape is None else len(shape))
        if shape is not None:
            check_shape(op, f"packed.{name}", array, shape, "see PackedConductance")


def right_operand(
    device: Device, g: Any, shape: Padded, inputs: int, s: dict[str, Any], *, positions: int = 1, chunks: int = 1,
    panels: bool = False,
) -> RightOperand:  # fmt: skip
    """Pack an array for a read, unless `s["packed"]` holds it already.

    `positions`, `chunks`: of a patch (patches.cuh). `panels`: in panels of 128 sensed lines (panels.cuh).
    """
    kept: PackedConductance | None = s["packed"]
    int8, variance = s["precision"] == "int8", s["noise_var"] is not None
    scale = conductance_scale(s["precision"], s["g_range"], s["g_step"])
    stored = -(-shape.sense // PANEL_ROWS) * PANEL_ROWS if panels else shape.sense
    size = (shape.planes, shape.groups, stored, shape.tiles, shape.k)
    dtypes = {"int8": ["int8"], "bf16": ["int16"], "fp16x2": ["float16"] * 2}.get(s["precision"], ["float16"])
    arrays = _memory(device, size, [*dtypes, *["int16"] * variance], kept)
    look = (
        size, shape.tile, s["transposed"], scale, s["g_offset"], dtypes, variance, positions, chunks, panels,
    )  # fmt: skip
    layout = zlib.crc32(repr(look).encode()) << 31
    blocks = shape.planes * shape.groups * -(-stored // 32) * -(-shape.tiles * shape.k // 32)

    def pack(source: Any, to: Any, low: Any = None, *, bfloat: bool, last: bool) -> None:
        device.launch(
            PACK_SENSED, (min(blocks, BLOCKS * device.multiprocessors),), (256,),
            {"g": source, "b": to, "low": low, "version": kept and kept.version, "state": kept and kept.state,
             "layout": layout, "commit": int(kept is not None and last), "scale": scale,
             "offset": s["g_offset"] if int8 else 0.0, "planes": shape.planes, "groups": shape.groups,
             "inputs": inputs, "cols": g.shape[2], "tiles": shape.tiles, "tile": shape.tile, "k": shape.k,
             "stored": stored, "positions": positions, "chunks": chunks},
            {"BFLOAT": int(bfloat), "INT8": int(int8), "TRANSPOSED": int(s["transposed"]), "PANELS": int(panels),
             "IMPLICIT": int(shape.gathered > 0)},
        )  # fmt: skip

    spread = arrays[-1] if variance else None
    if variance:
        pack(s["noise_var"], spread, bfloat=True, last=False)
    low = arrays[1] if len(dtypes) == 2 else None
    # the last one says that all of this version is packed
    pack(g, arrays[0], low, bfloat=s["precision"] == "bf16", last=True)
    return RightOperand(arrays[0], low, spread, scale)


def _memory(
    device: Device, size: tuple[int, ...], dtypes: list[str], kept: PackedConductance | None
) -> list[Any]:
    """Arrays of one shape, new or of what is kept."""
    if kept is None:
        return [device.empty(size, dtype) for dtype in dtypes]
    each = prod(size) * np.dtype(dtypes[0]).itemsize
    if kept.memory.size < len(dtypes) * each:
        raise ValueError(
            f"tile_mvm: `packed.memory` must have {len(dtypes) * each} bytes for this read, got {kept.memory.size}; take "
            "PackedConductance.size of its settings"
        )
    return [
        kept.memory[i * each : (i + 1) * each].view(dtype).reshape(*size) for i, dtype in enumerate(dtypes)
    ]


def _cell_bytes(precision: str) -> int:
    return {"int8": 1, "fp16x2": 4}.get(precision, 2)
