"""What shapes and settings alone say of a read of tiles."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from math import inf
from types import NoneType

import numpy as np

from gpuxbar.ops.checks import check_integers, check_numbers, kept
from gpuxbar.ops.tile_mvm_cuda import amperes_of_one, conductance_scale
from gpuxbar.reference.tile_mvm import ConvGeometry

__all__ = ["OP", "TileMvm", "TileRead", "tile_read"]

OP = "tile_mvm"
LOUDEST = 1e18  # partial sums of 1, of which float32 holds the square, and that of what is drawn


class TileMvm(ctypes.Structure):
    """Twin of `struct TileMvm` in kernels/host/read.hpp."""

    _fields_ = [
        *[
            (name, ctypes.c_void_p)
            for name in ["v", "g", "noise_var", "slice_scale", "adc_lsb", "adc_gain", "adc_offset", "adc_inl", "dac_error", "read_noise", "step", "row_scale", "col_scale", "bias", "y", "gate", "conv"]
        ],
        *[
            (name, ctypes.c_int64)
            for name in ["batch", "groups", "inputs", "cols", "planes", "tile", "rows_per_scale", "row_offset", "is_code", "transposed", "stream_bits", "streams", "phases", "adc_bits", "adc_signed", "adc_per_column", "fast"]
        ],
        ("seed", ctypes.c_uint64),
        *[(name, ctypes.c_double) for name in ["v_lsb", "v_read", "v_sinh"]],
    ]  # fmt: skip


@dataclass(frozen=True)
class TileRead:
    """What shapes and settings alone say of a read: it is looked at once for all reads alike.

    Attributes:
        shapes: Of the vectors, by name.
        y_shape: Of the result.
        loudest: Standard deviation of read noise that a GPU holds the square of, A.
        params: `struct TileMvm` with all but addresses, random numbers and counts of values, as bytes.
    """

    batch: int
    inputs: int
    outputs: int
    tile: int
    shapes: dict[str, tuple[int, ...]]
    y_shape: tuple[int, ...]
    loudest: float
    params: bytes


@kept
def tile_read(
    v: tuple[int, ...], codes: bool, g: tuple[int, int, int], tile_rows: int | None, tile_cols: int | None, transposed: bool,
    groups: int, v_lsb: float, stream_bits: int, streams: int, phases: int, adc_bits: int | None, adc_signed: bool,
    generator: str, conv: ConvGeometry | None, want_gate: bool, precision: str, g_range: float | None, g_step: float | None,
    g_offset: float,
) -> TileRead:  # fmt: skip
    """Check shapes and settings, for arrays of shape `v` and `g`."""
    check_numbers(OP, "v_lsb", v_lsb, "V", "it is the voltage of one code")
    amperes_of_one(v_lsb)
    check_integers(
        OP, tile_rows=tile_rows, tile_cols=tile_cols, groups=groups, stream_bits=stream_bits, streams=streams, phases=phases
    )  # fmt: skip
    if not isinstance(conv, (ConvGeometry, NoneType)):
        raise TypeError(f"{OP}: `conv` must be a ConvGeometry, got {type(conv).__name__}; None reads vectors")
    _check_adc(adc_bits, adc_signed)
    if generator not in ("exact", "fast"):
        raise ValueError(f"{OP}: `generator` must be 'exact' or 'fast', got {generator!r}; choose one")
    for name, size in (("tile_rows", tile_rows), ("tile_cols", tile_cols)):
        if size is not None and size < 1:
            raise ValueError(f"{OP}: `{name}` must be at least 1, got {size}; None reads the whole line")
    if stream_bits and not codes:
        raise TypeError(
            f"{OP}: `v` must be int16 codes with stream_bits={stream_bits}, got float32; quantise it with dac_quantize"
        )
    _check_streams(stream_bits, streams, phases)
    planes, rows, cols = g
    if groups < 1 or rows % groups:
        raise ValueError(
            f"{OP}: `groups` must divide the {rows} rows of `g`, got {groups}; stack equal arrays"
        )
    inputs = rows // groups
    drive, sense = (cols, inputs) if transposed else (inputs, cols)
    _check_drive(v, conv, groups, drive, transposed)
    _check_precision(precision, g_range, codes)
    if precision == "bf16" and stream_bits > 8:
        raise ValueError(
            f"{OP}: `stream_bits` must be at most 8 with precision='bf16', which holds no more, got {stream_bits}; take more streams"
        )
    if precision == "int8":
        _check_levels(g_step, g_offset)
    scale = conductance_scale(precision, g_range, g_step)
    outputs = groups * sense
    batch = v[0] * (1 if conv is None else conv.pixels)
    whole = max(drive, 1)
    tile = min((tile_cols if transposed else tile_rows) or whole, whole)
    tiles = -(-drive // tile)
    if planes * tiles * streams * phases > 2**24:
        raise ValueError(
            f"{OP}: `tile_{'cols' if transposed else 'rows'}` must make at most 2^24 conversions of a result, got {planes} planes x "
            f"{tiles} tiles x {streams * phases} passes; take longer tiles"
        )
    converters = (planes, tiles, outputs)
    shapes: dict[str, tuple[int, ...]] = {
        "col_scale": (outputs,), "bias": (outputs,), "slice_scale": (planes,), "adc_gain": converters,
        "adc_offset": converters, "adc_inl": converters, "noise_var": g, "drivers.error": (3, groups * drive),
    }  # fmt: skip
    if conv is None:
        y_shape: tuple[int, ...] = (batch, outputs)
    elif transposed:
        y_shape = (v[0], groups * conv.channels, conv.height, conv.width)
    else:
        y_shape = (v[0], outputs, *conv.out)
    params = TileMvm(
        batch=batch, groups=groups, inputs=inputs, cols=cols, planes=planes, tile=tile, rows_per_scale=1,
        is_code=codes, transposed=transposed, stream_bits=stream_bits, streams=streams, phases=phases,
        adc_bits=adc_bits or 0, adc_signed=adc_signed, fast=generator == "fast", v_lsb=v_lsb,
    )  # fmt: skip
    loudest = LOUDEST * amperes_of_one(v_lsb, scale)
    return TileRead(batch, inputs, outputs, tile, shapes, y_shape, loudest, bytes(params))


def _check_adc(bits: int | None, signed: bool) -> None:
    if bits is None:
        return
    if not isinstance(bits, (int, np.integer)) or not 1 <= bits <= 16:
        raise ValueError(f"{OP}: `adc_bits` must be 1 to 16, got {bits}; None switches the ADC off")
    if signed and bits == 1:
        raise ValueError(
            f"{OP}: `adc_bits` must be 2 to 16 for signed currents, got 1; set adc_signed=False or add a bit"
        )


def _check_streams(bits: int, streams: int, phases: int) -> None:
    if not 0 <= bits <= 15:
        raise ValueError(f"{OP}: `stream_bits` must be 0 to 15, got {bits}; 0 drives the whole value at once")
    if not 1 <= streams <= (-(-15 // bits) if bits else 1):
        raise ValueError(
            f"{OP}: `streams` must cover up to 15 bits of a code, got {streams} of {bits} bits; give 1 or more"
        )
    if phases not in ((1, 2) if bits else (1,)):
        raise ValueError(
            f"{OP}: `phases` must be 1, or 2 with stream_bits, got {phases}; drive all bits at once by stream_bits=15"
        )


def _check_precision(precision: str, g_range: float | None, codes: bool) -> None:
    known = ("fp32", "tf32", "fp16", "fp16x2", "bf16", "int8")
    if precision not in known:
        raise ValueError(
            f"{OP}: `precision` must be one of {', '.join(known)}, got {precision!r}; choose one"
        )
    if precision in ("fp32", "tf32"):
        return
    if precision in ("fp16", "fp16x2") and (g_range is None or not 2.0**-126 <= g_range < inf):
        raise ValueError(
            f"{OP}: `g_range` must be a normal number of float32 above 0 S with precision={precision!r}, got {g_range}; give the largest "
            "conductance"
        )
    if not codes:
        raise TypeError(
            f"{OP}: `v` must be int16 codes with precision={precision!r}, got float32; quantise it with dac_quantize"
        )


def _check_levels(g_step: float | None, g_offset: float) -> None:
    if g_step is None or not 0 < g_step < inf:
        raise ValueError(
            f"{OP}: `g_step` must be above 0 S with precision='int8', got {g_step}; give the conductance between levels"
        )
    if not -inf < g_offset < inf:
        raise ValueError(
            f"{OP}: `g_offset` must be finite, got {g_offset} S; give the conductance of level 0"
        )


def _check_drive(
    v: tuple[int, ...], conv: ConvGeometry | None, groups: int, drive: int, transposed: bool
) -> None:
    side = "columns" if transposed else "rows"
    if conv is None:
        want: tuple[int, ...] = (v[0], groups * drive)
    elif transposed:
        want = (v[0], groups * drive, *conv.out)
    else:
        if conv.inputs != drive:
            raise ValueError(
                f"{OP}: `conv` must have {drive} inputs a group, the {side} of `g`, got {conv.inputs}; check its kernel and channels"
            )
        want = (v[0], groups * conv.channels, conv.height, conv.width)
    if v != want:
        raise ValueError(
            f"{OP}: `v` must have shape {want} to drive the {side} of `g`, got {v}; check the axes"
        )
