"""`tile_mvm` on a CUDA device in one kernel: tensor-core products with noise, conversion and integer sums in registers.

Codes are packed once (fp16), conductances once or whenever they change; passes are cut out of the codes inside the kernel, so
neither passes nor partial sums are ever written. A block that sees all tiles of its only pass and plane writes results; else it
writes sums of codes, which `shift_add` adds up, exactly, to end the read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpuxbar.launch import Device, In, Kernel, Out, Scalar, Struct
from gpuxbar.ops.dac_quantize import NO_DAC
from gpuxbar.ops.fused_layout import BLOCK_M, padded_channels, stage_bytes
from gpuxbar.ops.images import Images
from gpuxbar.ops.packed_conductance import PACK_SENSED, Padded, RightOperand, right_operand
from gpuxbar.ops.round_keys import RoundKeys
from gpuxbar.ops.tile_mvm_case import Plan
from gpuxbar.ops.tile_mvm_cuda import (
    amperes_of_one,
    chunks,
    code_range,
    fold_patches,
    generator_of,
    pack_inputs,
    split_value,
)
from gpuxbar.reference.random import Purpose

__all__ = ["KERNELS", "fused_tile_mvm", "packed_images", "read_fused"]

_INT, _LONG, _FLOAT = Scalar("int32"), Scalar("int64"), Scalar("float32")

PACK_IMAGES = Kernel(
    "pack_images.cu",
    v=In("int16|float32", "N C H W"), a=Out("float16", "N H W G C8"), lsb=In("float32", "L", optional=True),
    codes=Out("int16", "N C H W", optional=True), code_min=_FLOAT, code_max=_FLOAT, lsb_count=_LONG, code_bits=_INT, groups=_INT, channels=_INT, padded=_INT, pixels=_LONG,
)  # fmt: skip
FUSED_TILE_MVM = Kernel(
    "fused_tile_mvm.cu",
    a=In("float16|int16|int8"), b=In("float16|int16|int8", "S G N T K"), low=In("float16", "S G N T K", optional=True),
    spread=In("int16", "S G N T K", optional=True), code_sums=In("int32", "P M G T", optional=True), slice_scale=In("float32", "S", optional=True),
    adc_lsb=In("float32", "L", optional=True), adc_gain=In("float32", "S T C", optional=True),
    adc_offset=In("float32", "S T C", optional=True), read_noise=In("float32", "one", optional=True),
    step=In("int64", "one", optional=True), row_scale=In("float32", "R", optional=True),
    col_scale=In("float32", "C", optional=True), bias=In("float32", "C", optional=True),
    words=Out("int32", "P S X M C", optional=True), y=Out("float32", optional=True),
    gate=Out("float32", optional=True), amperes=_FLOAT, level_0=_FLOAT, adc_lsb_value=_FLOAT,
    read_noise_value=_FLOAT, step_value=_LONG, keys=Struct("RoundKeys", RoundKeys), row0=_LONG, y_row0=_LONG,
    noise_row0=_LONG,
    rows=_INT, groups=_INT, sense=_INT, tiles=_INT, planes=_INT, k=_INT, streams=_INT, stream_bits=_INT,
    adc_per_column=_INT, code_min=_FLOAT, code_max=_FLOAT, rows_per_scale=_INT, tile_lines=_INT, images=Struct("Images", Images), chunks=_INT, pixels=_INT,
    purpose=Scalar("uint32"),
)  # fmt: skip
SHIFT_ADD = Kernel(
    "shift_add.cu",
    words=In("int32", "P S X M C"), slice_scale=In("float32", "S", optional=True),
    adc_lsb=In("float32", "L", optional=True), row_scale=In("float32", "R", optional=True),
    col_scale=In("float32", "C", optional=True), bias=In("float32", "C", optional=True), y=Out("float32"),
    gate=Out("float32", optional=True), adc_lsb_value=_FLOAT, row0=_LONG, y_row0=_LONG, rows=_INT, outputs=_INT,
    tiles=_INT, planes=_INT, splits=_INT, streams=_INT, phases=_INT, stream_bits=_INT, adc_per_column=_INT,
    code_min=_FLOAT, rows_per_scale=_INT, pixels=_INT,
)  # fmt: skip
KERNELS = (PACK_SENSED, PACK_IMAGES, FUSED_TILE_MVM, SHIFT_ADD)


def fused_tile_mvm(
    device: Device, v: Any, g: Any, rows: int, inputs: int, s: dict[str, Any], plan: Plan
) -> Any:
    """`ops.tile_mvm` on checked arguments that `plan_tile_mvm` found possible."""
    conv, images = s["conv"], None
    if plan.strategy == "implicit":
        images = packed_images(device, v, padded_channels(conv.channels), s)
    positions = conv.kernel[0] * conv.kernel[1] if plan.chunks else 1
    shape = Padded.of(g.shape, rows, inputs, s, 8 * plan.chunks * positions)
    operand = right_operand(device, g, shape, inputs, s, positions=positions, chunks=max(plan.chunks, 1))
    int8, bfloat = s["precision"] == "int8", s["precision"] == "bf16"
    converters = s["adc_gain"] is not None or s["adc_offset"] is not None
    macros = {
        "BLOCK_N": plan.block_n, "STAGES": plan.stages, "TERMS": 1 if operand.low is None else 2,
        "NOISE": generator_of(s), "VARIANCE": int(operand.spread is not None),
        "STREAMS": 0 if int8 or bfloat or not s["stream_bits"] else s["phases"], "IMPLICIT": 0 if images is None else 1 if plan.chunks else 2,
        "INT8": (1 if shape.tile * 127 * 128 < 2**22 else 2) if int8 else 0, "BFLOAT": int(bfloat),
    }  # fmt: skip
    more = {
        "spread": operand.spread, "adc_gain": s["adc_gain"], "adc_offset": s["adc_offset"],
        "level_0": s["g_offset"] / s["g_step"] if int8 else 0.0, "streams": s["streams"], "stream_bits": s["stream_bits"],
        "tile_lines": shape.tile, "images": Images() if images is None else Images.of(conv, s["groups"]), "chunks": plan.chunks,
        "keys": RoundKeys.of(s["seed"]),
    }  # fmt: skip
    stage = stage_bytes(plan.block_n, macros["TERMS"] + macros["VARIANCE"])

    def launch(grid: tuple[int, ...], arguments: dict[str, Any], gate: bool) -> None:
        ways = {"CONVERTERS": 2 if converters else arguments["adc_per_column"], "GATE": int(gate)}
        device.launch(
            FUSED_TILE_MVM,
            grid,
            (256,),
            {"code_sums": None, **arguments, **more},
            {**macros, **ways},
            shared=plan.stages * stage,
        )

    return read_fused(device, v, operand, shape, s, plan, launch, images=images)


def read_fused(
    device: Device, v: Any, operand: RightOperand, shape: Padded, s: dict[str, Any], plan: Plan,
    launch: Callable[[tuple[int, ...], dict[str, Any], bool], None], panel_rows: int = 0,
    images: Any = None,
) -> Any:  # fmt: skip
    """A read by a fused kernel, some rows at a time.

    `launch`: of the kernel, given its grid, the arguments that all fused kernels have, and whether there is a gate.
    `panel_rows`: 0 packs codes as they are (as bytes or bf16 the digits of every pass); else those, in panels of that many rows.
    `images`: packed codes, if the kernel gathers its rows from them.
    """
    conv, row_scale = s["conv"], s["row_scale"]
    outputs, conversions = shape.groups * shape.sense, shape.passes * shape.planes
    by_words = plan.splits * conversions > 1
    int8 = s["precision"] == "int8"
    dtype = {"int8": "int8", "bf16": "int16"}.get(s["precision"], "float16")
    digits = dtype != "float16" or panel_rows > 0
    packed = 0 if images is not None else shape.passes if digits else 1
    per_row = (1 if int8 else 2) * packed * shape.batch * shape.k + (
        4 * conversions * plan.splits * outputs if by_words else 0
    )
    code_min, code_max = code_range(s)
    lsb, lsb_value = split_value(s["adc_lsb"])
    sigma, sigma_value = split_value(s["read_noise"])
    step, step_value = split_value(s["step"])
    amperes = amperes_of_one(s["v_lsb"], operand.scale)

    def read(y: Any, gate: Any, row0: int, y_row0: int, rows: int) -> None:
        inputs, more = images, dict[str, Any]()
        if int8 and s["g_offset"]:  # level 0 conducts too
            more["code_sums"] = device.zeros((shape.passes, rows, shape.groups, shape.tiles), "int32")
        if inputs is None:
            inputs = pack_inputs(
                device, v, shape, row0, rows, s, dtype, digits=digits, panel_rows=panel_rows,
                **more,
            )  # fmt: skip
        words = None
        if by_words:
            words = device.empty((shape.passes, shape.planes, plan.splits, rows, outputs), "int32")
        shared = {
            "slice_scale": s["slice_scale"], "adc_lsb": lsb, "row_scale": row_scale, "col_scale": s["col_scale"],
            "bias": s["bias"], "words": words, "adc_lsb_value": lsb_value, "row0": row0, "y_row0": y_row0,
            "rows": rows, "tiles": shape.tiles, "planes": shape.planes,
            "adc_per_column": int(lsb is not None and lsb.size > 1), "code_min": code_min,
            "rows_per_scale": 1 if row_scale is None else shape.rows // row_scale.size,
            "pixels": 0 if conv is None or s["transposed"] else conv.pixels,
        }  # fmt: skip
        launch(
            (plan.blocks(rows, shape.sense), plan.splits, conversions * shape.groups),
            {**shared, **more, "a": inputs, "b": operand.high, "low": operand.low, "read_noise": sigma, "step": step,
             "y": None if by_words else y, "gate": None if by_words else gate, "amperes": amperes,
             "read_noise_value": sigma_value, "step_value": step_value, "noise_row0": s["row_offset"] + row0,
             "groups": shape.groups, "sense": shape.sense, "k": shape.k, "code_max": code_max,
             "purpose": int(Purpose.READ_TRANSPOSED if s["transposed"] else Purpose.READ)},
            gate is not None,
        )  # fmt: skip
        if by_words:
            device.launch(
                SHIFT_ADD, (-(-outputs // 32), -(-rows // 32)), (256,),
                {**shared, "y": y, "gate": gate, "outputs": outputs, "splits": plan.splits, "phases": s["phases"],
                 "streams": s["streams"], "stream_bits": s["stream_bits"]},
                {"GATE": int(gate is not None)},
            )  # fmt: skip

    if conv is not None and s["transposed"]:
        affordable = device.workspace // max(per_row + 4 * outputs, 1)
        return fold_patches(device, v, shape, affordable, BLOCK_M, s, read)
    y = device.empty((shape.rows, outputs) if conv is None else (v.shape[0], outputs, *conv.out), "float32")
    gate = device.empty(y.shape, "float32") if s["want_gate"] else None
    for row0, count in chunks(shape.rows, max(device.workspace // max(per_row, 1), BLOCK_M), BLOCK_M):
        read(y, gate, row0, row0, count)
    return y if gate is None else (y, gate)


def packed_images(device: Device, v: Any, padded: int, s: dict[str, Any]) -> Any:
    """Codes [N, G * channels, height, width] as fp16 [N, height, width, G, padded]: as large as the codes, all at once."""
    groups, dac = s["groups"], s["dac"]
    count, lines, height, width = v.shape
    a = device.empty((count, height, width, groups, padded), "float16")
    device.launch(
        PACK_IMAGES, (-(-height * width // 32), -(-groups * padded // 32), count), (256,),
        {"v": v, "a": a, "groups": groups, "channels": lines // groups, "padded": padded, "pixels": height * width,
         "code_bits": s["streams"] * s["stream_bits"] or 16, **(dac.arguments() if dac else NO_DAC)},
        {"DAC": int(dac is not None)},
    )  # fmt: skip
    return a
