"""`tile_mvm` on a CUDA device: pack, batched tile products by cuBLAS, and one kernel that converts and adds.

All tiles, groups, planes and passes of a chunk of rows are one batched product: the tiles of a group are its batch,
the passes are more rows of its left operand, the planes more columns of its right one. So the launches of a call do
not grow with tiles, planes or passes; only the rows are cut, so that the partial sums stay within the workspace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import floor, log2, sinh
from typing import Any

from gpuxbar.launch import Device, In, InOut, Kernel, Out, Scalar, Struct
from gpuxbar.launch.device import Precision
from gpuxbar.ops.checks import NUMBER
from gpuxbar.ops.dac_quantize import NO_DAC
from gpuxbar.ops.images import line_steps
from gpuxbar.ops.round_keys import RoundKeys
from gpuxbar.reference.random import Purpose
from gpuxbar.reference.tile_mvm import Drivers

__all__ = [
    "KERNELS", "Shape", "amperes_of_one", "chunks", "code_range", "conductance_scale", "fold_patches", "generator_of", "pack_inputs", "split_value",
    "tile_mvm_cuda",
]  # fmt: skip

MOST_SUMS = 2**31 - 1  # partial sums of a chunk of rows, which adc_accumulate counts in 32 bits
MOST_ROWS = 128 * 16383  # of a chunk: whole panels, in blocks of 32 no more than a grid may have downwards
_INT, _LONG, _FLOAT = Scalar("int32"), Scalar("int64"), Scalar("float32")
_PLACES = ("height", "width", "kernel_h", "kernel_w", "stride_h", "stride_w", "pad_h", "pad_w",
           "dilation_h", "dilation_w", "out_h", "out_w", "channel_step", "position_step")  # fmt: skip
_PLACE_ARGUMENTS: dict[str, Any] = dict.fromkeys(_PLACES, _INT)

PACK_INPUTS = Kernel(
    "pack_inputs.cu",
    v=In("int16|float32"), a=Out("float32|float16|int16|int8", "P M G T K"),
    squares=Out("float32", "P M G T K", optional=True), code_sums=InOut("int32", "P M G T", optional=True),
    lsb=In("float32", "L", optional=True), codes=Out("int16", optional=True), dac_error=In("float32", "E N", optional=True),
    per_volt=_FLOAT, digit_max=_FLOAT, bend=_FLOAT, scale=_FLOAT, code_min=_FLOAT, code_max=_FLOAT, lsb_count=_LONG,
    row0=_LONG, rows=_INT, groups=_INT, drive=_INT, tiles=_INT, tile=_INT, k=_INT, stream_bits=_INT, streams=_INT,
    phases=_INT, channels=_INT, **_PLACE_ARGUMENTS,
)  # fmt: skip
PACK_CONDUCTANCE = Kernel(
    "pack_conductance.cu",
    g=In("float32", "S I O"), b=Out("float32|float16|int16", "Q K N"), low=Out("float16", "Q K N", optional=True),
    scale=_FLOAT, planes=_INT, groups=_INT, inputs=_INT, cols=_INT, tiles=_INT, tile=_INT, k=_INT, ld=_INT,
)  # fmt: skip
ADC_ACCUMULATE = Kernel(
    "adc_accumulate.cu",
    psum=In("float32", "Q M N"), variance=In("float32", "Q M N", optional=True),
    slice_scale=In("float32", "S", optional=True), adc_lsb=In("float32", "L", optional=True),
    adc_gain=In("float32", "S T C", optional=True), adc_offset=In("float32", "S T C", optional=True),
    adc_inl=In("float32", "S T C", optional=True),
    read_noise=In("float32", "one", optional=True), step=In("int64", "one", optional=True),
    row_scale=In("float32", "R", optional=True), col_scale=In("float32", "C", optional=True),
    bias=In("float32", "C", optional=True), y=Out("float32"), gate=Out("float32", optional=True),
    amperes=_FLOAT, adc_lsb_value=_FLOAT, read_noise_value=_FLOAT, step_value=_LONG, keys=Struct("RoundKeys", RoundKeys), row0=_LONG, y_row0=_LONG,
    noise_row0=_LONG, rows=_INT, groups=_INT, sense=_INT, tiles=_INT, planes=_INT, ld=_INT, streams=_INT, phases=_INT,
    stream_bits=_INT, adc_per_column=_INT, code_min=_FLOAT, code_max=_FLOAT, rows_per_scale=_INT, pixels=_INT,
    purpose=Scalar("uint32"),
)  # fmt: skip
FOLD = Kernel(
    "fold.cu",
    patches=In("float32"),
    images=Out("float32"),
    planes=_INT,
    channels=_INT,
    **_PLACE_ARGUMENTS,
    size=_LONG,
)
KERNELS = (PACK_INPUTS, PACK_CONDUCTANCE, ADC_ACCUMULATE, FOLD)


@dataclass(frozen=True)
class Shape:
    """Sizes of one call; the driven lines of a tile are padded to `k`, the columns of all planes to `ld`."""

    groups: int
    drive: int
    sense: int
    planes: int
    tile: int
    passes: int
    rows: int

    @property
    def tiles(self) -> int:
        return -(-self.drive // self.tile)

    @property
    def k(self) -> int:
        return -(-self.tile // 8) * 8

    @property
    def ld(self) -> int:
        return -(-self.planes * self.sense // 8) * 8

    @property
    def batch(self) -> int:
        return self.groups * self.tiles


def tile_mvm_cuda(device: Device, v: Any, g: Any, rows: int, inputs: int, s: dict[str, Any]) -> Any:
    """`ops.tile_mvm` on checked arguments; `s` are its settings, `rows` its batch (times pixels)."""
    planes, _, cols = g.shape
    transposed, conv = s["transposed"], s["conv"]
    drive, sense = (cols, inputs) if transposed else (inputs, cols)
    tile = min(s["tile"], max(drive, 1))
    shape = Shape(s["groups"], drive, sense, planes, tile, s["streams"] * s["phases"], rows)
    outputs = shape.groups * sense
    sums = max(shape.passes * shape.batch * shape.ld, 1)  # of a row
    per_row = 4 * shape.passes * shape.batch * (shape.ld + shape.k) * (2 if s["noise_var"] is not None else 1)
    if sums > MOST_SUMS:
        raise ValueError(
            f"tile_mvm: `g` must make fewer than 2^31 partial sums of a row, got {sums}; read it in parts, or by longer tiles"
        )
    patch = 4 * outputs if conv is not None and transposed else 0  # of rows that are folded
    affordable = min(device.workspace // max(per_row + patch, 1), MOST_SUMS // sums)
    operand = _right_operand(device, g, shape, inputs, cols, s)
    amperes = amperes_of_one(s["v_lsb"], operand.scale)

    def read(y: Any, gate: Any, row0: int, y_row0: int, count: int) -> None:
        psum, variance = _partial_sums(device, v, operand, shape, row0, count, s)
        _accumulate(device, psum, variance, amperes, y, gate, shape, row0, y_row0, count, s)

    if conv is not None and transposed:
        return fold_patches(device, v, shape, affordable, 1, s, read)
    y = device.empty((rows, outputs) if conv is None else (v.shape[0], outputs, *conv.out), "float32")
    gate = device.empty(y.shape, "float32") if s["want_gate"] else None
    for row0, count in chunks(rows, affordable, 32, split=True):
        read(y, gate, row0, row0, count)
    return y if gate is None else (y, gate)


def fold_patches(
    device: Device, v: Any, shape: Shape, affordable: int, unit: int, s: dict[str, Any], read: Callable[..., None]
) -> Any:  # fmt: skip
    """The transposed read of a convolution: patches of whole images at a time, folded into images. Of an image that is too
    large they are read by as many rows as are affordable, in whole units."""
    conv, outputs = s["conv"], shape.groups * shape.sense
    planes = shape.groups * conv.channels
    images = device.empty((v.shape[0], planes, conv.height, conv.width), "float32")
    for row0, count in chunks(shape.rows, affordable, conv.pixels):
        patches = device.empty((count, outputs), "float32")
        for first, some in chunks(count, affordable, unit):
            read(patches, None, row0 + first, first, some)
        part = images[row0 // conv.pixels : (row0 + count) // conv.pixels]
        squares = len(part) * -(-conv.height * conv.width // 32) * -(-planes // 32)
        device.launch(
            FOLD, (min(squares, 65536),), (256,),
            {"patches": patches, "images": part, "planes": planes, "channels": conv.channels, **_places(conv), "size": part.size},
        )  # fmt: skip
    return images


def chunks(rows: int, affordable: int, unit: int, *, split: bool = False) -> Iterator[tuple[int, int]]:
    """(first row, rows) of chunks that are affordable: all, or whole units; `split`: or parts of one where no unit is."""
    affordable = min(affordable, MOST_ROWS)
    whole = affordable // unit * unit or (max(affordable, 1) if split else unit)
    size = rows if whole < rows <= affordable else whole
    for row0 in range(0, rows, size):
        yield row0, min(size, rows - row0)


@dataclass(frozen=True)
class RightOperand:
    """Packed conductances and noise variances times `scale` (fp16: a high and a low part)."""

    high: Any
    low: Any
    variance: Any
    scale: float


def _right_operand(
    device: Device, g: Any, shape: Shape, inputs: int, cols: int, s: dict[str, Any]
) -> RightOperand:
    dtype, _ = Precision[s["precision"]]
    scale = conductance_scale(s["precision"], s["g_range"], s["g_step"])
    size = (shape.batch, shape.k, shape.ld)

    def pack(source: Any, dtype: str, low: Any, scale: float) -> Any:
        out = device.empty(size, dtype)
        macros = {
            "HALF": int(dtype == "float16"),
            "BFLOAT": int(dtype == "int16"),
            "TRANSPOSED": int(s["transposed"]),
        }
        device.launch(
            PACK_CONDUCTANCE, (-(-shape.ld // 32), -(-shape.k // 32), shape.batch), (256,),
            {"g": source, "b": out, "low": low, "scale": scale, "planes": shape.planes, "groups": shape.groups,
             "inputs": inputs, "cols": cols, "tiles": shape.tiles, "tile": shape.tile, "k": shape.k, "ld": shape.ld},
            macros,
        )  # fmt: skip
        return out

    low = device.empty(size, "float16") if s["precision"] == "fp16x2" else None
    variance = None if s["noise_var"] is None else pack(s["noise_var"], "float32", None, scale)
    return RightOperand(pack(g, dtype, low, scale), low, variance, scale)


def conductance_scale(precision: str, g_range: float | None, g_step: float | None) -> float:
    """What conductances are multiplied by: for fp16 the power of 2 that puts the largest in [2^13, 2^14), far from overflow, and
    28 binary orders above its smallest number; for int8 what makes levels of them; else 1."""
    if precision == "int8" and g_step is not None:
        return 1.0 / g_step
    return (
        2.0 ** (13 - floor(log2(g_range))) if precision in ("fp16", "fp16x2") and g_range is not None else 1.0
    )


def amperes_of_one(v_lsb: float, scale: float = 1.0) -> float:
    """The current of a partial sum of 1: of a digit 1 and a conductance of 1 times `scale`, A; refused where float32 does not
    hold it."""
    amperes = float(v_lsb) / scale
    if not 2.0**-126 <= amperes < 2.0**128:
        raise ValueError(
            f"tile_mvm: `v_lsb` must be a normal number of float32 over {scale:g}, got {v_lsb:g} V; use SI units"
        )
    return amperes


def _partial_sums(
    device: Device, v: Any, operand: RightOperand, shape: Shape, row0: int, rows: int, s: dict[str, Any]
) -> tuple[Any, Any]:
    """Sums of digits times packed conductances (and noise variances in their units) of every conversion of some rows,
    [G T, P rows, ld]."""
    dtype, _ = Precision[s["precision"]]
    size = (shape.passes, rows, shape.groups, shape.tiles, shape.k)
    squares = None if operand.variance is None else device.empty(size, "float32")
    a = pack_inputs(device, v, shape, row0, rows, s, dtype, digits=True, squares=squares)

    def product(a: Any, b: Any, c: Any, precision: str, alpha: float = 1.0, beta: float = 0.0) -> None:
        m = shape.passes * rows
        device.matmul(
            a, b, c, (shape.batch, m, shape.ld, shape.k), (shape.k, shape.k * shape.ld, m * shape.ld),
            (shape.batch * shape.k, shape.ld, shape.ld), alpha, beta, precision,
        )  # fmt: skip

    sums = (shape.batch, shape.passes * rows, shape.ld)
    psum = device.empty(sums, "float32")
    product(a, operand.high, psum, s["precision"])
    if operand.low is not None:
        product(a, operand.low, psum, s["precision"], beta=1.0)
    if operand.variance is None:
        return psum, None
    variance = device.empty(sums, "float32")
    # the square of the scale in two steps, which float32 holds
    product(squares, operand.variance, variance, "fp32", alpha=operand.scale)
    return psum, variance


def pack_inputs(
    device: Device, v: Any, shape: Shape, row0: int, rows: int, s: dict[str, Any], dtype: str, *, digits: bool,
    squares: Any = None, code_sums: Any = None, panel_rows: int = 0,
) -> Any:  # fmt: skip
    """Driven values of some rows, [P, rows, G, T, K]: the digits of every pass, or (P = 1) codes of the bits that the passes drive.

    `code_sums`: zeros, int32 [P, rows, G, T], to which the sum of every tile's digits is added.
    `panel_rows`: above 0, in panels (kernels/include/gpuxbar/panels.cuh), rows padded to a multiple of it.
    """
    conv, dac = s["conv"], s["dac"]
    stream_bits, streams, phases = s["stream_bits"], s["streams"], s["phases"]
    if not digits:
        stream_bits, streams, phases = stream_bits * streams, 1, 1
    stored = -(-rows // panel_rows) * panel_rows if panel_rows else rows
    a = device.empty((streams * phases, stored, shape.groups, shape.tiles, shape.k), dtype)
    places = dict.fromkeys(_PLACES, 1) if conv is None else _places(conv)
    device.launch(
        PACK_INPUTS, (-(-shape.batch * shape.k // 128), -(-stored // 32)), (256,),
        {"v": v, "a": a, "squares": squares, "code_sums": code_sums, "row0": row0, "rows": rows, "groups": shape.groups, "drive": shape.drive,
         "tiles": shape.tiles, "tile": shape.tile, "k": shape.k, "stream_bits": stream_bits,
         "streams": streams, "phases": phases, "channels": 1 if conv is None else conv.channels, **places, **(dac.arguments() if dac else NO_DAC), **_driving(s["drivers"], s["v_lsb"])},
        {"CODES": int(dac is not None or v.dtype.name == "int16"), "DAC": int(dac is not None), "HALF": int(dtype == "float16"), "BFLOAT": int(dtype == "int16"), "INT8": int(dtype == "int8"),
         "CONV": 0 if conv is None else 2 if s["transposed"] else 1, "PANELS": int(panel_rows > 0), "DRIVERS": _drivers_of(s["drivers"])},
    )  # fmt: skip
    return a


def _drivers_of(drivers: Drivers | None) -> int:
    """The macro DRIVERS: 0 none, 1 DACs with errors, 2 devices that are not ohmic, 3 both."""
    return 0 if drivers is None else (drivers.error is not None) + 2 * (drivers.v_sinh is not None)


def _driving(drivers: Drivers | None, v_lsb: float) -> dict[str, Any]:
    """What `pack_inputs` is told of drivers."""
    if drivers is None:
        return {"dac_error": None, "per_volt": 0, "digit_max": 0, "bend": 0, "scale": 0}
    digit_max, v_sinh = drivers.v_read / v_lsb, drivers.v_sinh
    bend, scale = (0, 0) if v_sinh is None else (v_lsb / v_sinh, digit_max / sinh(drivers.v_read / v_sinh))
    of_digits = {"per_volt": 1 / v_lsb, "digit_max": digit_max, "bend": bend, "scale": scale}
    return {"dac_error": drivers.error, **of_digits}


def _accumulate(
    device: Device, psum: Any, variance: Any, amperes: float, y: Any, gate: Any, shape: Shape, row0: int, y_row0: int, rows: int,
    s: dict[str, Any],
) -> None:  # fmt: skip
    bits = s["adc_bits"]
    code_min, code_max = code_range(s)
    noise = generator_of(s)
    width = 8 if noise == 2 else 4
    outputs = shape.groups * shape.sense
    images = s["conv"] is not None and not s["transposed"]
    lsb, lsb_value = split_value(s["adc_lsb"] if bits else 1.0)
    sigma, sigma_value = split_value(s["read_noise"])
    step, step_value = split_value(s["step"])
    row_scale = s["row_scale"]
    device.launch(
        ADC_ACCUMULATE, (-(-outputs // (8 * width)), -(-rows // 32)), (256,),
        {"psum": psum, "variance": variance, "slice_scale": s["slice_scale"], "adc_lsb": lsb, "adc_gain": s["adc_gain"],
         "adc_offset": s["adc_offset"], "adc_inl": s["adc_inl"], "read_noise": sigma, "step": step, "row_scale": row_scale,
         "col_scale": s["col_scale"], "bias": s["bias"],
         "y": y, "gate": gate, "amperes": amperes, "adc_lsb_value": lsb_value, "read_noise_value": sigma_value,
         "step_value": step_value, "keys": RoundKeys.of(s["seed"]), "row0": row0, "y_row0": y_row0,
         "noise_row0": s["row_offset"] + row0, "rows": rows, "groups": shape.groups, "sense": shape.sense,
         "tiles": shape.tiles, "planes": shape.planes, "ld": shape.ld, "streams": s["streams"], "phases": s["phases"],
         "stream_bits": s["stream_bits"], "adc_per_column": int(lsb is not None and lsb.size > 1),
         "code_min": code_min, "code_max": code_max,
         "rows_per_scale": 1 if row_scale is None else shape.rows // row_scale.size, "pixels": 1 if s["conv"] is None else s["conv"].pixels,
         "purpose": int(Purpose.READ_TRANSPOSED if s["transposed"] else Purpose.READ)},
        {"NOISE": noise, "VARIANCE": int(variance is not None), "ADC": int(bits > 0), "GATE": int(gate is not None),
         "ERRORS": int(s["adc_gain"] is not None or s["adc_offset"] is not None), "INL": int(s["adc_inl"] is not None), "IMAGES": int(images), "VECTOR": int(shape.sense % width == 0)},
    )  # fmt: skip


def code_range(s: dict[str, Any]) -> tuple[int, int]:
    """Smallest and largest ADC code; (0, 0) without an ADC."""
    bits = s["adc_bits"]
    code_max = 0 if not bits else 2 ** (bits - 1) - 1 if s["adc_signed"] else 2**bits - 1
    return -code_max if s["adc_signed"] else 0, code_max


def generator_of(s: dict[str, Any]) -> int:
    """The macro NOISE: 0 none, 1 exact, 2 fast."""
    if s["noise_var"] is None and _is_zero(s["read_noise"]):
        return 0
    return 2 if s["generator"] == "fast" else 1


def _is_zero(value: Any) -> bool:
    """Whether a setting is the plain number 0; an array on the device is not looked at."""
    return isinstance(value, NUMBER) and value == 0


def split_value(value: Any) -> tuple[Any, Any]:
    """(array, 0) of a value in device memory, (None, number) of a plain one."""
    return (None, value) if isinstance(value, NUMBER) else (value.reshape(-1), 0)


def _places(conv: Any) -> dict[str, int]:
    values = (
        conv.height, conv.width, *conv.kernel, *conv.stride, *conv.padding, *conv.dilation, *conv.out, *line_steps(conv),
    )  # fmt: skip
    return dict(zip(_PLACES, values, strict=True))
