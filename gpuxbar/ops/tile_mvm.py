"""Reading a stack of tiles: drive the lines, sum the currents, digitise per tile, shift and add."""

from __future__ import annotations

import ctypes
from math import inf
from typing import Any

import numpy as np

from gpuxbar import reference
from gpuxbar.launch import Device, address, backend, cuda_device, host_call, is_cupy, library
from gpuxbar.ops.checks import (
    check_array,
    check_integers,
    check_numbers,
    check_place,
    check_shape,
    require_finite,
    scalar_array,
)
from gpuxbar.ops.dac_quantize import Dac, check_dac
from gpuxbar.ops.fused_tile_mvm import fused_tile_mvm
from gpuxbar.ops.fused_tile_mvm_sm90 import fused_tile_mvm_sm90
from gpuxbar.ops.images import Conv
from gpuxbar.ops.packed_conductance import PackedConductance, check_packed
from gpuxbar.ops.tile_mvm_case import GATHERING, HOPPER, Case
from gpuxbar.ops.tile_mvm_cuda import generator_of, tile_mvm_cuda
from gpuxbar.ops.tile_mvm_plan import plan_tile_mvm
from gpuxbar.ops.tile_read import OP, TileMvm, TileRead, tile_read
from gpuxbar.reference.tile_mvm import ConvGeometry, Drivers
from gpuxbar.spec.array import STEEPEST

__all__ = ["tile_mvm"]

INT16 = np.dtype("int16")
ONE = np.ones(1, np.float32)
BFLOAT_CODES = 256  # up to which bf16 holds all integers


def tile_mvm(
    v: Any,
    g: Any,
    *,
    tile_rows: int | None = None,
    tile_cols: int | None = None,
    transposed: bool = False,
    groups: int = 1,
    v_lsb: float = 1.0,
    drivers: Drivers | None = None,
    stream_bits: int = 0,
    streams: int = 1,
    phases: int = 1,
    slice_scale: Any = None,
    adc_bits: int | None = None,
    adc_signed: bool = True,
    adc_lsb: Any = None,
    adc_gain: Any = None,
    adc_offset: Any = None,
    adc_inl: Any = None,
    read_noise: Any = 0.0,
    noise_var: Any = None,
    generator: str = "exact",
    seed: int = 0,
    step: Any = 0,
    row_offset: int = 0,
    row_scale: Any = None,
    col_scale: Any = None,
    bias: Any = None,
    conv: ConvGeometry | None = None,
    want_gate: bool = False,
    precision: str = "fp32",
    g_range: float | None = None,
    g_step: float | None = None,
    g_offset: float = 0.0,
    packed: PackedConductance | None = None,
    dac: Dac | None = None,
    device: Device | None = None,
    strategy: str = "auto",
) -> Any:
    """Read every tile of an array: drive the wordlines, sum on the bitlines, digitise, shift and add.

    i[p, s, t, b, o] = sum_{r in tile t} v[p, b, r] g[s, r, o] + noise, v of digits as `Drivers` has it
    n                = (i gain + offset) / adc_lsb,  u = n / code_max within +-1
    code             = clip(round(n + 3 sqrt(3) / 2 inl (u - u**3)))
    y[b, o]          = row_scale[b] col_scale[o] sum_{p, s} 2**(p stream_bits) slice_scale[s] adc_lsb sum_t code
                       + bias[o]

    Args:
        v: What drives the lines: float32 [B, I] in units of `v_lsb` (so in V by default), finite; or int16 DAC codes.
            With `conv` the images [N, channels, height, width] of a convolution (or, `transposed`, the
            gradient of its output).
        g: Conductance, float32 [I, O] or [S, I, O], S; finite, which is for the caller to see to: looking would take as long as
            the read of a vector, and an ADC makes a code of a NaN. `groups` stacked arrays share the first axis.
        tile_rows: Wordlines of a tile; None: all. Counts when the wordlines are driven.
        tile_cols: Bitlines of a tile; None: all. Counts when `transposed` drives the bitlines.
        transposed: Read the same array backwards: v [B, O] on the bitlines, result [B, I].
        groups: Independent arrays side by side (grouped convolution).
        v_lsb: Voltage of one unit of `v`, V.
        drivers: Errors of the lines' DACs, and how devices bend currents (`ops.Drivers`); None: DACs are exact, devices ohmic. On a
            GPU what drives the lines is rounded to `precision`, which holds digits alone exactly; not for "int8".
        stream_bits, streams, phases: Bits of a code driven at a time, number of such streams, and 2 to drive
            positive and negative codes one after the other; 0 bits drive the whole value at once. Bits above those of the
            streams drive nothing.
        slice_scale: Digital weight of each plane, float32 [S]; 1 by default.
        adc_bits: ADC resolution, 1 to 16; None: currents are summed as they are. Signed codes span
            +-(2**(adc_bits - 1) - 1), unsigned ones 0 .. 2**adc_bits - 1.
        adc_signed: Whether currents can be negative; needs 2 bits.
        adc_lsb: Current of one ADC step, A, above 0: a number or float32 [outputs].
        adc_gain, adc_offset, adc_inl: Gain, offset in A, and integral non-linearity in steps of every converter: by how much its
            curve is off at most, at 58 % of the range, and the other way below 0; float32 [S, tiles, outputs].
        read_noise: Standard deviation of the current of one conversion, A; at most about 1e18 times what a digit of 1 drives through
            the unit in which conductances are computed with (1 S of fp32, a level of int8).
        noise_var: Added variance per squared volt, float32 shape of `g`, A**2/V**2.
        generator: "exact" or "fast" normals.
        seed, step: Same pair, same noise; `step` is an integer or an int64 array of one element.
        row_offset: Index of the first row, so that parts of a batch draw what the whole would.
        row_scale: Factor of each row (or run of rows), float32 [B'], B a multiple of B'.
        col_scale, bias: Factor of, and value added to, each output, float32 [outputs].
        conv: Shape of the convolution whose patches are read; no patch matrix is made on the CPU.
        want_gate: Also return the share of each output's conversions (by digital weight) that are inside the ADC range, to half
            a step; only its top counts for unsigned ones, whose currents noise alone brings below 0. 0 without any weight.
        precision: Arithmetic of the tile products on a GPU: "fp32", "tf32", "fp16" or "fp16x2" (conductances as
            a high and a low half, 22 bits; codes up to 2048 are exact), "bf16" (conductances of 8 bits, the coarsest and no faster
            than "fp16": to compare with hardware of that arithmetic; codes or digits within +-256), or "int8": exact products
            of codes (or digits) within +-127 by levels, by data sheets at twice the rate of halves. On the CPU every product is
            float32, of conductances as they are given.
        g_range: Largest magnitude in `g`, S; products of fp16 scale by it.
        g_step, g_offset: For "int8": g = g_offset + level * g_step with whole levels from -128 to 127, S. On a GPU what lies
            between levels is read as the nearest, and codes beyond +-127 as these.
        dac: Makes DAC codes of float32 `v`, digital values then, on the way: on a GPU in the kernel that puts them in order
            for the products, but for the patches of a convolution that are unfolded, which look at a value many times.
        packed: On a GPU, `g` (and `noise_var`) as the last read packed them, kept for the next one; None: packed anew.
        device: Where CuPy arrays are allocated and run; None: CuPy's current device and memory pool.
        strategy: On a GPU, "collapsed", "fused", "implicit", "wgmma", "implicit-wgmma", "cluster" or "epilogue" (see
            `ops.tile_mvm_plan`); "auto" takes the fastest by `ops/tuning.tsv`, but never "cluster".

    Returns:
        float32 [B, O], A unless scaled; transposed: [B, I]; with `conv` the images. With `want_gate`, (y, gate).

    Raises:
        TypeError: An array has another dtype.
        ValueError: Shapes disagree, an array is not contiguous, a setting is out of range, or `v` holds NaN or
            infinity (checked on the CPU, as the values of arrays of settings are; nothing is read back from a GPU).

    Source:
        Shafiee et al., ISAAC, ISCA 2016.
    """
    check_array(OP, "v", v, ("float32", "int16"), 2 if conv is None else 4)
    check_array(OP, "g", g, "float32", (2, 3))
    if noise_var is not None:
        check_array(OP, "noise_var", noise_var, "float32", g.ndim)
    if g.ndim == 2:
        g = g[None]
        noise_var = None if noise_var is None else noise_var[None]
    if g.size == 0:
        raise ValueError(
            f"{OP}: `g` must hold at least one cell, got shape {tuple(g.shape)}; only a batch may be empty"
        )
    where = "cuda" if device is not None else backend(v)
    if dac is not None:
        check_dac(OP, dac, v)
    if precision == "bf16" and not stream_bits:
        _check_bfloat(v, dac)
    if dac is not None and where != "cuda":
        v, dac = dac.quantize(v), None
    read = tile_read(
        v.shape, dac is not None or v.dtype == INT16, g.shape, tile_rows, tile_cols, transposed, groups, v_lsb, stream_bits,
        streams, phases, adc_bits, adc_signed, generator, conv, want_gate, precision, g_range, g_step, g_offset,
    )  # fmt: skip
    if conv is not None and transposed and (want_gate or bias is not None):
        raise ValueError(
            f"{OP}: `want_gate` and `bias` must not be given with a transposed convolution, whose results are sums of "
            "patches; add the bias to the result"
        )
    if adc_bits is None:
        _refuse_converters(adc_lsb=adc_lsb, adc_gain=adc_gain, adc_offset=adc_offset, adc_inl=adc_inl)
    else:
        _check_adc_lsb(adc_bits, adc_lsb, read.outputs)
    _check_noise(read_noise, step, read)
    check_integers(OP, seed=seed, row_offset=row_offset)
    vectors = {
        "col_scale": col_scale, "bias": bias, "slice_scale": slice_scale, "adc_gain": adc_gain, "adc_offset": adc_offset,
        "adc_inl": adc_inl, "noise_var": noise_var,
    }  # fmt: skip
    for name, array in vectors.items():
        if array is None:
            continue
        shape = read.shapes[name]
        check_array(OP, name, array, "float32", len(shape))
        check_shape(OP, name, array, shape, "see the axes of `g`")
    _check_row_scale(row_scale, read.batch)
    if drivers is not None:
        _check_drivers(drivers, read.shapes["drivers.error"], precision)
    if where == "cuda" and device is None:
        error = None if drivers is None else drivers.error
        check_place(OP, "v", {"g": g, **vectors, "drivers.error": error})
    if packed is not None:
        check_packed(OP, packed)
    settings = {
        "groups": groups, "tile": read.tile, "transposed": transposed, "v_lsb": v_lsb, "drivers": drivers, "stream_bits": stream_bits,
        "streams": streams, "phases": phases, "slice_scale": slice_scale, "adc_bits": adc_bits or 0,
        "adc_signed": adc_signed, "adc_lsb": adc_lsb, "adc_gain": adc_gain, "adc_offset": adc_offset, "adc_inl": adc_inl,
        "read_noise": read_noise, "noise_var": noise_var, "generator": generator, "seed": seed, "step": step,
        "row_offset": row_offset, "row_scale": row_scale if read.batch else None, "col_scale": col_scale, "bias": bias, "conv": conv,
        "want_gate": want_gate,
    }  # fmt: skip
    if where != "cuda" and v.dtype != INT16 and not np.isfinite(v).all():
        require_finite(OP, "v", int((~np.isfinite(v)).sum()), "bad data")
    if where == "cuda":
        more = {
            "precision": precision,
            "g_range": g_range,
            "g_step": g_step,
            "g_offset": g_offset,
            "packed": packed,
            "dac": dac,
            "strategy": strategy,
        }
        return _cuda(device or cuda_device(), v, g, read.batch, read.inputs, {**settings, **more})
    if where == "reference":
        numbers = {"step": np.asarray(step).item(), "read_noise": np.asarray(read_noise).item()}
        out = reference.tile_mvm(v, g, **{**settings, **numbers})
        return tuple(a.astype(np.float32) for a in out) if want_gate else out.astype(np.float32)
    return _host(read, v, g, settings)


def _cuda(device: Device, v: Any, g: Any, rows: int, inputs: int, s: dict[str, Any]) -> Any:
    """The read on a GPU, the way the planner chooses."""
    planes, _, cols = g.shape
    drive, sense = (cols, inputs) if s["transposed"] else (inputs, cols)
    errors = 2 if s["adc_gain"] is not None or s["adc_offset"] is not None else int(np.size(s["adc_lsb"]) > 1)
    case = Case(
        rows, s["groups"], drive, sense, planes, s["tile"], s["streams"], s["phases"], s["stream_bits"],
        adc_bits=s["adc_bits"], adc_signed=s["adc_signed"], noise=("none", "exact", "fast")[generator_of(s)],
        variance=s["noise_var"] is not None, converters=errors if s["adc_inl"] is None else 3,
        gate=s["want_gate"], precision=s["precision"], codes=s["dac"] is not None or v.dtype.name == "int16", dac=s["dac"] is not None,
        drivers=s["drivers"] is not None, images=_images(v, s),
        line_order="channel_position" if s["conv"] is None else s["conv"].line_order,
    )  # fmt: skip
    plan = plan_tile_mvm(case, device.arch, device.multiprocessors, s["strategy"])
    if s["dac"] is not None:
        unfolds = case.images is not None and plan.strategy not in GATHERING
        v, s = (
            (s["dac"].quantize(v, device), {**s, "dac": None})
            if unfolds
            else (v, {**s, "dac": s["dac"].there(device)})
        )
    if plan.strategy in ("fused", "implicit"):
        return fused_tile_mvm(device, v, g, rows, inputs, s, plan)
    if plan.strategy in HOPPER:
        return fused_tile_mvm_sm90(device, v, g, rows, inputs, s, plan)
    if plan.strategy == "collapsed":
        s = {**s, "tile": max(drive, 1)}
    return tile_mvm_cuda(device, v, g, rows, inputs, s)


def _images(v: Any, s: dict[str, Any]) -> tuple[int, int, int, int] | None:
    """Images of a convolution read forwards, their height and width with padding, and the positions of the kernel."""
    conv = s["conv"]
    if conv is None or s["transposed"]:
        return None
    height, width = (
        size + 2 * pad for size, pad in zip((conv.height, conv.width), conv.padding, strict=True)
    )
    return v.shape[0], height, width, conv.kernel[0] * conv.kernel[1]


def _refuse_converters(**settings: Any) -> None:
    """Refuse what only converters have: without them, a read would be ideal and nobody told."""
    for name, value in settings.items():
        if value is not None:
            raise ValueError(
                f"{OP}: `{name}` must go with adc_bits, got it for currents that are summed as they are; give both or neither"
            )


def _check_adc_lsb(bits: int, lsb: Any, outputs: int) -> None:
    if lsb is None:
        raise ValueError(
            f"{OP}: `adc_lsb` must be given with adc_bits={bits}, got None; it is the current of one step, A"
        )
    check_numbers(OP, "adc_lsb", lsb, "A", "use the full-scale current over the largest code")
    count = np.size(lsb)
    if count not in (1, outputs):
        raise ValueError(
            f"{OP}: `adc_lsb` must have 1 or {outputs} values, got {count}; see the axes of the result"
        )


def _check_drivers(drivers: Drivers, shape: tuple[int, ...], precision: str) -> None:
    if not isinstance(drivers, Drivers):
        raise TypeError(
            f"{OP}: `drivers` must be an ops.Drivers, got {type(drivers).__name__}; None drives lines with the digits themselves"
        )
    check_numbers(OP, "drivers.v_read", drivers.v_read, "V", "it is the voltage of the largest digit")
    if drivers.error is not None:
        check_array(OP, "drivers.error", drivers.error, "float32", 2)
        check_shape(OP, "drivers.error", drivers.error, shape, "give three errors of every driven line")
    if drivers.v_sinh is not None and not 0 < drivers.v_read <= STEEPEST * drivers.v_sinh < inf:
        raise ValueError(
            f"{OP}: `drivers.v_sinh` must be finite and at least v_read / {STEEPEST} = {drivers.v_read / STEEPEST:g} V, got "
            f"{drivers.v_sinh:g}; None is ohmic"
        )
    if precision == "int8":
        raise ValueError(
            f"{OP}: `precision` must be another with drivers, got 'int8', which multiplies whole digits; choose 'fp16' or 'fp16x2'"
        )


def _check_row_scale(scale: Any, batch: int) -> None:
    count = 1 if scale is None else np.size(scale)
    if batch and (not count or batch % count):
        raise ValueError(
            f"{OP}: `row_scale` must have a length that divides the {batch} rows, got {count}; see the axes of the result"
        )


def _check_noise(read_noise: Any, step: Any, read: TileRead) -> None:
    check_numbers(OP, "read_noise", read_noise, "A", "it is a standard deviation", zero=True)
    if np.size(read_noise) != 1:
        raise ValueError(
            f"{OP}: `read_noise` must be one value, got {np.size(read_noise)}; noise_var takes one for each cell"
        )
    if not is_cupy(read_noise):
        sigma = read_noise if isinstance(read_noise, (int, float)) else np.asarray(read_noise).item()
        if sigma > read.loudest:
            raise ValueError(
                f"{OP}: `read_noise` must be at most {read.loudest:g} A for its v_lsb and conductances, got {sigma:g} A; float32 does "
                "not hold its square: use SI units"
            )
    if type(step) is int:
        return
    kind = step.dtype.kind if hasattr(step, "dtype") else np.asarray(step).dtype.kind
    if kind not in "iu" or np.size(step) != 1:
        raise ValueError(f"{OP}: `step` must be one integer, got {step!r}; count the reads")


def _check_bfloat(v: Any, dac: Dac | None) -> None:
    """Refuse whole codes that bf16 does not hold; those in a GPU's memory are not read back."""
    most = 0
    if dac is not None:
        most = dac.code_max
    elif isinstance(v, np.ndarray) and v.dtype == INT16 and v.size:
        most = max(int(v.max()), -int(v.min()))
    if most > BFLOAT_CODES:
        raise ValueError(
            f"{OP}: `v` must hold codes within +-{BFLOAT_CODES} with precision='bf16', got {most}; drive them by streams "
            "(stream_bits) of at most 8 bits"
        )


def _host(read: TileRead, v: np.ndarray, g: np.ndarray, s: dict[str, Any]) -> Any:
    y = np.empty(read.y_shape, dtype=np.float32)
    gate = np.empty(read.y_shape, dtype=np.float32) if s["want_gate"] else None
    row_scale = None if s["row_scale"] is None else scalar_array(s["row_scale"])
    adc_lsb = scalar_array(s["adc_lsb"]) if s["adc_bits"] else ONE
    arrays = {
        "v": v, "g": g, "noise_var": s["noise_var"], "adc_gain": s["adc_gain"], "adc_offset": s["adc_offset"],
        "adc_inl": s["adc_inl"], "adc_lsb": adc_lsb, "read_noise": scalar_array(s["read_noise"]),
        "step": scalar_array(s["step"], "int64"), "col_scale": s["col_scale"], "bias": s["bias"], "y": y, "gate": gate,
        "row_scale": row_scale,
        "slice_scale": np.ones(len(g), np.float32) if s["slice_scale"] is None else s["slice_scale"],
    }  # fmt: skip
    drivers = s["drivers"]
    if drivers is not None:
        arrays["dac_error"] = drivers.error
    fields: dict[str, Any] = {name: address(array) for name, array in arrays.items() if array is not None}
    if drivers is not None:
        fields |= {"v_read": drivers.v_read, "v_sinh": drivers.v_sinh or 0.0}
    if row_scale is not None:
        fields["rows_per_scale"] = read.batch // max(1, row_scale.size)
    if s["conv"] is not None:
        patches = Conv.of(s["conv"])
        fields["conv"] = ctypes.addressof(patches)
    seed = s["seed"] & 0xFFFFFFFFFFFFFFFF
    fields.update(seed=seed, row_offset=s["row_offset"], adc_per_column=adc_lsb.size > 1)
    if read.batch and y.size:
        struct = TileMvm.from_buffer_copy(read.params)
        for name, value in fields.items():
            setattr(struct, name, value)
        host_call(library(), "gpuxbar_tile_mvm", struct)
    return y if gate is None else (y, gate)
