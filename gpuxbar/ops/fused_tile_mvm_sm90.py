"""`tile_mvm` on Hopper in one kernel: as `fused_tile_mvm`, with products of whole warpgroups fed by bulk copies.

Codes and conductances are packed in panels of 128 rows by 64 driven lines, as the tensor cores read them; the digits of
every pass are packed apart. Same counters and same integer codes as the other ways of a read.
"""

from __future__ import annotations

from typing import Any

from gpuxbar.launch import Device, In, InOut, Kernel, Out, Scalar
from gpuxbar.ops.fused_tile_mvm import PACK_SENSED, SHIFT_ADD, Padded, RightOperand
from gpuxbar.ops.tile_mvm_cuda import (
    chunks,
    code_range,
    conductance_scale,
    fold_patches,
    generator_of,
    pack_inputs,
    split_value,
)
from gpuxbar.ops.tile_mvm_plan import BLOCK_M, Plan, wgmma_bytes
from gpuxbar.reference.random import Purpose

__all__ = ["KERNELS", "fused_tile_mvm_sm90"]

_INT, _LONG, _FLOAT = Scalar("int32"), Scalar("int64"), Scalar("float32")
PANEL_ROWS = 128  # kernels/include/gpuxbar/panels.cuh

FUSED_TILE_MVM_SM90 = Kernel(
    "fused_tile_mvm_sm90.cu", arch="sm_90a",
    a=In("float16", "P M G T K"), b=In("float16", "S G N T K"), low=In("float16", "S G N T K", optional=True),
    slice_scale=In("float32", "S", optional=True), adc_lsb=In("float32", "L", optional=True),
    read_noise=In("float32", "one", optional=True), step=In("int64", "one", optional=True),
    row_scale=In("float32", "R", optional=True), col_scale=In("float32", "C", optional=True),
    bias=In("float32", "C", optional=True), words=InOut("int32", "P S rows C", optional=True),
    y=Out("float32", optional=True), gate=Out("float32", optional=True), volts=_FLOAT, adc_lsb_value=_FLOAT,
    read_noise_value=_FLOAT, step_value=_LONG, seed=Scalar("uint64"), row0=_LONG, y_row0=_LONG, noise_row0=_LONG,
    rows=_INT, groups=_INT, sense=_INT, tiles=_INT, planes=_INT, k=_INT, adc_per_column=_INT, code_min=_FLOAT,
    code_max=_FLOAT, rows_per_scale=_INT, pixels=_INT, purpose=Scalar("uint32"),
)  # fmt: skip
KERNELS = (FUSED_TILE_MVM_SM90,)


def fused_tile_mvm_sm90(
    device: Device, v: Any, g: Any, rows: int, inputs: int, s: dict[str, Any], plan: Plan
) -> Any:
    """`ops.tile_mvm` on checked arguments that `plan_tile_mvm` found possible."""
    planes, _, cols = g.shape
    transposed, conv = s["transposed"], s["conv"]
    drive, sense = (cols, inputs) if transposed else (inputs, cols)
    passes = s["streams"] * s["phases"]
    shape = Padded(s["groups"], drive, sense, planes, min(s["tile"], max(drive, 1)), passes, rows)
    outputs = shape.groups * sense
    operand = _right_operand(device, g, shape, inputs, cols, s)
    by_words = plan.splits * passes * planes > 1
    per_row = 2 * passes * shape.batch * shape.k + (4 * passes * planes * outputs if by_words else 0)

    def read(y: Any, gate: Any, row0: int, y_row0: int, count: int) -> None:
        digits = pack_inputs(device, v, shape, row0, count, s, "float16", digits=True, panel_rows=PANEL_ROWS)
        _read(device, digits, operand, y, gate, shape, row0, y_row0, count, by_words, s, plan)

    if conv is not None and transposed:
        return fold_patches(device, v, shape, device.workspace // max(per_row + 4 * outputs, 1), s, read)
    y = device.empty((rows, outputs) if conv is None else (v.shape[0], outputs, *conv.out), "float32")
    gate = device.empty(y.shape, "float32") if s["want_gate"] else None
    for row0, count in chunks(rows, max(device.workspace // max(per_row, 1), BLOCK_M), BLOCK_M):
        read(y, gate, row0, row0, count)
    return y if gate is None else (y, gate)


def _right_operand(
    device: Device, g: Any, shape: Padded, inputs: int, cols: int, s: dict[str, Any]
) -> RightOperand:
    scale = conductance_scale(s["g_range"])
    columns = -(-shape.sense // PANEL_ROWS) * PANEL_ROWS
    size = (shape.planes, shape.groups, columns, shape.tiles, shape.k)
    high = device.empty(size, "float16")
    low = device.empty(size, "float16") if s["precision"] == "fp16x2" else None
    grid = (-(-shape.tiles * shape.k // 32), columns // 32, shape.planes * shape.groups)
    device.launch(
        PACK_SENSED, grid, (256,),
        {"g": g, "b": high, "low": low, "scale": scale, "inputs": inputs, "cols": cols, "tiles": shape.tiles,
         "tile": shape.tile, "k": shape.k},
        {"BFLOAT": 0, "TRANSPOSED": int(s["transposed"]), "PANELS": 1},
    )  # fmt: skip
    return RightOperand(high, low, None, scale)


def _read(
    device: Device, digits: Any, operand: RightOperand, y: Any, gate: Any, shape: Padded, row0: int, y_row0: int,
    rows: int, by_words: bool, s: dict[str, Any], plan: Plan,
) -> None:  # fmt: skip
    outputs = shape.groups * shape.sense
    code_min, code_max = code_range(s)
    lsb, lsb_value = split_value(s["adc_lsb"])
    sigma, sigma_value = split_value(s["read_noise"])
    step, step_value = split_value(s["step"])
    row_scale, conv = s["row_scale"], s["conv"]
    words = None
    if by_words:
        words = device.empty((shape.passes, shape.planes, rows, outputs), "int32")
        if plan.splits > 1:
            words.fill(0)
    shared = {
        "slice_scale": s["slice_scale"], "adc_lsb": lsb, "row_scale": row_scale, "col_scale": s["col_scale"],
        "bias": s["bias"], "words": words, "adc_lsb_value": lsb_value, "row0": row0, "y_row0": y_row0, "rows": rows,
        "tiles": shape.tiles, "planes": shape.planes, "adc_per_column": int(lsb is not None and lsb.size > 1),
        "code_min": code_min, "rows_per_scale": 1 if row_scale is None else shape.rows // row_scale.size,
        "pixels": 0 if conv is None or s["transposed"] else conv.pixels,
    }  # fmt: skip
    terms = 1 if operand.low is None else 2
    blocks = -(-rows // BLOCK_M) * -(-shape.sense // plan.block_n)
    device.launch(
        FUSED_TILE_MVM_SM90, (blocks, plan.splits, shape.passes * shape.planes * shape.groups), (384,),
        {**shared, "a": digits, "b": operand.high, "low": operand.low, "read_noise": sigma, "step": step,
         "y": None if by_words else y, "gate": None if by_words else gate, "volts": s["v_lsb"] / operand.scale,
         "read_noise_value": sigma_value, "step_value": step_value, "seed": s["seed"] & 0xFFFFFFFFFFFFFFFF,
         "noise_row0": s["row_offset"] + row0, "groups": shape.groups, "sense": shape.sense, "k": shape.k,
         "code_max": code_max, "purpose": int(Purpose.READ_TRANSPOSED if s["transposed"] else Purpose.READ)},
        {"BLOCK_N": plan.block_n, "STAGES": plan.stages, "TERMS": terms, "NOISE": generator_of(s),
         "CONVERTERS": shared["adc_per_column"], "GATE": int(gate is not None)},
        shared=wgmma_bytes(plan.block_n, terms, plan.stages),
    )  # fmt: skip
    if by_words:
        device.launch(
            SHIFT_ADD, (-(-outputs // 32), -(-rows // 32)), (256,),
            {**shared, "y": y, "gate": gate, "outputs": outputs, "phases": s["phases"], "streams": s["streams"],
             "stream_bits": s["stream_bits"]},
            {"GATE": int(gate is not None)},
        )  # fmt: skip
