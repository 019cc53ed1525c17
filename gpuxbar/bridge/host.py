"""The host kernels on tensors of the CPU, by address.

The ops look at arrays anew in every call, which costs several times what small layers compute. Here shapes and settings are
looked at once, by the same rules, and of a tensor only what keeps a kernel inside its memory.
"""

from __future__ import annotations

from ctypes import Array, addressof, c_float, c_int64
from functools import cache, lru_cache
from math import prod

import torch
from torch import Tensor

from gpuxbar.launch import Device, host_call, host_library, library
from gpuxbar.mapping.plan import Read, ReadPlan
from gpuxbar.ops import ConvGeometry
from gpuxbar.ops.checks import require_finite_values
from gpuxbar.ops.images import Conv
from gpuxbar.ops.program import LOWER, Writing
from gpuxbar.ops.tile_mvm import TileRead, tile_read
from gpuxbar.reference import SMALLEST_RANGE

__all__ = ["dac_fit", "dac_quantize", "plan_of", "reprogram", "serves", "tile_mvm"]

plan_of = lru_cache(maxsize=4096)(ReadPlan.loads)


def serves(device: Device | None) -> bool:
    """Whether the host kernels run what no other device does: the reference may."""
    return device is None and host_library() is not None


def address(name: str, t: Tensor, count: int, dtype: torch.dtype = torch.float32) -> int:
    """Where the values of a tensor lie; refused unless it holds so many of a type, one after the other."""
    if t.dtype is not dtype or t.numel() != count or not t.is_contiguous() or not t.is_cpu:
        raise ValueError(
            f"gpuxbar: `{name}` must be a contiguous tensor of {count} values of {dtype} on the CPU, got shape {tuple(t.shape)} and "
            f"strides {t.stride()} of {t.dtype} on {t.device}; give what the layer holds"
        )
    return t.data_ptr()


def dac_quantize(x: Tensor, lsb: Tensor, read: Read, what: str) -> Tensor:
    """The codes of x, int16: see `ops.dac_quantize`."""
    codes = x.new_empty(x.shape, dtype=torch.int16)
    size, count = x.numel(), lsb.numel()
    if size:
        bad = c_int64()
        host_call(
            library(), "gpuxbar_dac_quantize", address("x", x, size), address("dac_lsb", lsb, 1 if count == 1 else len(x)),
            codes.data_ptr(), len(x), size // len(x), count, read.code_max, read.signed, bad,
        )  # fmt: skip
        require_finite_values(what, bad.value, "bad data")
    return codes


def dac_fit(x: Tensor, scale: Tensor, read: Read, what: str) -> tuple[Tensor, Tensor]:
    """The codes of x times `scale` and the value of one, float32 [1] or [len(x)]: see `ops.dac_fit`."""
    rows, channels = x.shape[:2]
    size, bad = x.numel(), c_int64()
    codes, lsb = x.new_empty(x.shape, dtype=torch.int16), x.new_empty(rows if read.per_sample else 1)
    host_call(
        library(), "gpuxbar_dac_fit", address("x", x, size), address("w_max", scale, channels), codes.data_ptr(),
        lsb.data_ptr(), rows, channels, size // max(1, rows * channels), lsb.numel(), read.code_max, read.signed,
        SMALLEST_RANGE, bad,
    )  # fmt: skip
    require_finite_values(what, bad.value, "bad data")
    return codes, lsb


def reprogram(
    writing: Writing, weight: Tensor, g: Tensor, noise_var: Tensor | None, w_max: Tensor, state: Tensor, write_step: Tensor,
    scale: str, full_weight: float | None,
) -> None:  # fmt: skip
    """Program weights again if they have changed: see `ops.reprogram`."""
    cells, bad = prod(writing.shape), c_int64()
    host_call(
        library(), "gpuxbar_reprogram", writing.at(int(write_step)), address("weight", weight, weight.numel()),
        address("w_max", w_max, weight.shape[0] * weight.shape[1]), address("g", g, cells),
        None if noise_var is None else address("noise_var", noise_var, cells), address("state", state, 2, torch.int64),
        scale == "column", full_weight or 0.0, bad,
    )  # fmt: skip
    require_finite_values("reprogram: `weight`", bad.value, LOWER)


def tile_mvm(
    plan: str, v: Tensor, g: Tensor, noise_var: Tensor | None, row_scale: Tensor, adc_lsb: Tensor, adc_error: Tensor | None,
    step: Tensor, *, transposed: bool, conv: ConvGeometry | None, want_gate: bool, col_scale: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """A read by a `mapping.ReadPlan`, and the gate if it is wanted: see `ops.tile_mvm`."""
    read = _read(
        plan, transposed, v.shape, v.dtype, g.shape, conv, want_gate, row_scale.numel(), adc_lsb.numel()
    )
    outputs, converters = read.outputs, prod(read.shapes["adc_gain"])
    y = v.new_empty(read.y_shape, dtype=torch.float32)
    gate = torch.empty_like(y) if want_gate else None
    fields = {
        "v": address("v", v, v.numel(), v.dtype), "g": address("g", g, g.numel()), "y": y.data_ptr(),
        "row_scale": address("row_scale", row_scale, row_scale.numel()), "step": address("step", step, 1, torch.int64),
        "adc_lsb": address("adc_lsb", adc_lsb, adc_lsb.numel()),
    }  # fmt: skip
    if adc_error is not None:
        fields["adc_gain"] = address("adc_error", adc_error, 2 * converters)
        fields["adc_offset"] = fields["adc_gain"] + converters * adc_error.element_size()
    for name, t, count in (
        ("noise_var", noise_var, g.numel()),
        ("col_scale", col_scale, outputs),
        ("bias", bias, outputs),
    ):
        if t is not None:
            fields[name] = address(name, t, count)
    if gate is not None:
        fields["gate"] = gate.data_ptr()
    if y.numel():
        read.run(**fields)
    return y, gate


@lru_cache(maxsize=4096)
def _read(
    plan: str, transposed: bool, v: torch.Size, dtype: torch.dtype, g: torch.Size, conv: ConvGeometry | None, want_gate: bool,
    row_scales: int, adc_lsbs: int,
) -> TileRead:  # fmt: skip
    """What shapes and settings say of a read."""
    way = plan_of(plan)
    read = way.backward if transposed else way.forward
    tile = read.tile or None
    found = tile_read(
        tuple(v), dtype is torch.int16, tuple(g), None if transposed else tile, tile if transposed else None, transposed, way.groups,
        read.v_lsb, read.stream_bits, read.streams, read.phases, read.adc_bits or None, read.adc_signed, way.generator, conv,
        want_gate, "fp32", None, None, 0.0,
    )  # fmt: skip
    if found.batch % row_scales or adc_lsbs not in (1, found.outputs):
        raise ValueError(
            f"gpuxbar: `dac_lsb` and `adc_lsb` must have a length that divides {found.batch}, and 1 or {found.outputs} values, got "
            f"{row_scales} and {adc_lsbs}; give what the layer holds"
        )
    return found.having(
        slice_scale=addressof(_floats(way.slice_scale)), read_noise=addressof(_floats((read.noise,))),
        seed=way.seed & 0xFFFFFFFFFFFFFFFF, row_offset=way.rank * found.batch, rows_per_scale=found.batch // row_scales,
        adc_per_column=adc_lsbs > 1, conv=None if conv is None else addressof(Conv.of(conv)),
    )  # fmt: skip


@cache
def _floats(values: tuple[float, ...]) -> Array[c_float]:
    """In memory, for good."""
    return (c_float * len(values))(*values)
