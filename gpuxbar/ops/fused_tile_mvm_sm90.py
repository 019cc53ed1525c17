"""`tile_mvm` on Hopper in one kernel: as `fused_tile_mvm`, with products of whole warpgroups fed by bulk copies.

Codes and conductances are packed in panels of 128 rows by 64 driven lines, as the tensor cores read them; the digits of
every pass are packed apart, or the patches of a convolution are gathered from its images. Same counters and same integer codes as
the other ways of a read.
"""

from __future__ import annotations

from typing import Any

from gpuxbar.launch import Device, In, Kernel, Out, Scalar, Struct
from gpuxbar.ops.fused_layout import padded_channels, wgmma_bytes
from gpuxbar.ops.fused_tile_mvm import packed_images, read_fused
from gpuxbar.ops.images import Images
from gpuxbar.ops.packed_conductance import PANEL_ROWS, Padded, right_operand
from gpuxbar.ops.round_keys import RoundKeys
from gpuxbar.ops.tile_mvm_case import Plan
from gpuxbar.ops.tile_mvm_cuda import generator_of

__all__ = ["KERNELS", "fused_tile_mvm_sm90"]

_INT, _LONG, _FLOAT = Scalar("int32"), Scalar("int64"), Scalar("float32")

FUSED_TILE_MVM_SM90 = Kernel(
    "fused_tile_mvm_sm90.cu", arch="sm_90a",
    a=In("float16"), b=In("float16", "S G N T K"), low=In("float16", "S G N T K", optional=True),
    spread=In("int16", "S G N T K", optional=True),
    slice_scale=In("float32", "S", optional=True), adc_lsb=In("float32", "L", optional=True),
    read_noise=In("float32", "one", optional=True), step=In("int64", "one", optional=True),
    row_scale=In("float32", "R", optional=True), col_scale=In("float32", "C", optional=True),
    bias=In("float32", "C", optional=True), words=Out("int32", "P S X M C", optional=True),
    y=Out("float32", optional=True), gate=Out("float32", optional=True), amperes=_FLOAT,
    adc_lsb_value=_FLOAT, read_noise_value=_FLOAT, step_value=_LONG, keys=Struct("RoundKeys", RoundKeys), row0=_LONG, y_row0=_LONG, noise_row0=_LONG,
    rows=_INT, groups=_INT, sense=_INT, tiles=_INT, planes=_INT, k=_INT, adc_per_column=_INT, code_min=_FLOAT,
    code_max=_FLOAT, rows_per_scale=_INT, tile_lines=_INT, images=Struct("Images", Images), pixels=_INT, purpose=Scalar("uint32"),
)  # fmt: skip
KERNELS = (FUSED_TILE_MVM_SM90,)


def fused_tile_mvm_sm90(
    device: Device, v: Any, g: Any, rows: int, inputs: int, s: dict[str, Any], plan: Plan
) -> Any:
    """`ops.tile_mvm` on checked arguments that `plan_tile_mvm` found possible."""
    shape = Padded.of(g.shape, rows, inputs, s)
    operand = right_operand(device, g, shape, inputs, s, panels=True)
    terms, variance = 1 if operand.low is None else 2, int(operand.spread is not None)
    conv, images = s["conv"], None
    if plan.strategy == "implicit-wgmma":
        images = packed_images(device, v, padded_channels(conv.channels), s)
    more = {
        "keys": RoundKeys.of(s["seed"]),
        "spread": operand.spread,
        "tile_lines": shape.tile,
        "images": Images() if images is None else Images.of(conv, s["groups"]),
    }

    def launch(grid: tuple[int, ...], arguments: dict[str, Any], gate: bool) -> None:
        device.launch(
            FUSED_TILE_MVM_SM90, grid, (384,), {**arguments, **more},
            {"CLUSTER": plan.cluster, "BLOCK_N": plan.block_n, "STAGES": plan.stages, "TERMS": terms, "NOISE": generator_of(s),
             "VARIANCE": variance, "CONVERTERS": arguments["adc_per_column"], "GATE": int(gate),
             "IMPLICIT": int(images is not None)},
            shared=wgmma_bytes(plan.block_n, terms + variance, plan.stages),
        )  # fmt: skip

    return read_fused(device, v, operand, shape, s, plan, launch, PANEL_ROWS, images)
