"""The host kernels on tensors of the CPU, by address.

The ops look at arrays anew in every call, which costs several times what small layers compute. Here shapes and settings are
looked at once, by the same rules, and of a tensor only what keeps a kernel inside its memory.
"""

from __future__ import annotations

from ctypes import Array, addressof, c_float
from functools import cache, lru_cache
from math import inf, prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpuxbar import ops
from gpuxbar.bridge.operator import plan_of
from gpuxbar.bridge.pairs import made_of
from gpuxbar.launch import Device, host_library
from gpuxbar.mapping.plan import Read
from gpuxbar.ops import ConvGeometry
from gpuxbar.ops.dac_clip import clip_gradient_on_host
from gpuxbar.ops.dac_quantize import fit_on_host, quantize_on_host
from gpuxbar.ops.device_map import spread_names
from gpuxbar.ops.device_update import Update, update_on_host
from gpuxbar.ops.images import Conv
from gpuxbar.ops.program import Writing, checksum_on_host, reprogram_on_host
from gpuxbar.ops.tile_mvm import TileRead, tile_read

__all__ = [
    "checksum",
    "dac_clip_gradient",
    "dac_fit",
    "dac_quantize",
    "device_update",
    "reprogram",
    "serves",
    "tile_mvm",
]


def serves(device: Device | None) -> bool:
    """Whether the host kernels run what no other device does: the reference may."""
    return device is None and host_library() is not None


def address(name: str, t: Tensor, count: int, dtype: torch.dtype = torch.float32) -> int:
    """Where the values of a tensor lie; refused unless it holds so many of a type, one after the other."""
    if (
        t.dtype is not dtype
        or t.numel() != count
        or not t.is_contiguous()
        or not t.is_cpu
        or t.is_neg()
        or t._is_zerotensor()
    ):
        raise ValueError(
            f"gpuxbar: `{name}` must be a contiguous tensor of {count} values of {dtype} in the CPU's memory, got shape {tuple(t.shape)} "
            f"and strides {t.stride()} of {t.dtype} on {t.device}; pass its clone().contiguous()"
        )
    return t.data_ptr()


def dac_quantize(x: Tensor, lsb: Tensor, read: Read, what: str) -> Tensor:
    """The codes of x, int16: see `ops.dac_quantize`."""
    x, lsb = x.contiguous(), lsb.contiguous()
    codes = x.new_empty(x.shape, dtype=torch.int16)
    size, count = x.numel(), lsb.numel()
    if size:
        quantize_on_host(
            address("x", x, size), address("dac_lsb", lsb, 1 if count == 1 else len(x)), codes.data_ptr(),
            (len(x), size // len(x), count), read.code_max, read.signed, what,
        )  # fmt: skip
    return codes


def dac_fit(x: Tensor, scale: Tensor, read: Read, what: str) -> tuple[Tensor, Tensor]:
    """The codes of x times `scale` and the value of one, float32 [1] or [len(x)]: see `ops.dac_fit`."""
    x, scale = x.contiguous(), scale.contiguous()
    rows, channels = x.shape[:2]
    size = x.numel()
    codes, lsb = x.new_empty(x.shape, dtype=torch.int16), x.new_empty(rows if read.per_sample else 1)
    fit_on_host(
        address("x", x, size), address("w_max", scale, channels), codes.data_ptr(), lsb.data_ptr(),
        (rows, channels, size // max(1, rows * channels), lsb.numel()), read.code_max, read.signed, what,
    )  # fmt: skip
    return codes, lsb


def dac_clip_gradient(
    grad: Tensor, x: Tensor, top: float, code_max: int, signed: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of a DAC's range: see `ops.dac_clip_gradient`."""
    grad, x = grad.contiguous(), x.contiguous()
    grad_x, size = torch.empty_like(x), x.numel()
    slope = clip_gradient_on_host(
        address("grad", grad, size), address("x", x, size), top, grad_x.data_ptr(), size, code_max, signed
    )
    return grad_x, x.new_full((1,), slope)


def reprogram(
    writing: Writing, weight: Tensor, g: Tensor, noise_var: Tensor | None, w_max: Tensor, state: Tensor, write_step: Tensor,
    scale: str, full_weight: float | None,
) -> None:  # fmt: skip
    """Program weights again if they have changed: see `ops.reprogram`."""
    weight = weight.contiguous()
    cells = prod(writing.shape)
    reprogram_on_host(
        writing.at(int(write_step)), address("weight", weight, weight.numel()),
        address("w_max", w_max, weight.shape[0] * weight.shape[1]), address("g", g, cells),
        None if noise_var is None else address("noise_var", noise_var, cells), address("state", state, 2, torch.int64),
        scale, full_weight,
    )  # fmt: skip


def checksum(x: Tensor) -> int:
    """See `ops.program.checksum`."""
    return checksum_on_host(address("x", x, x.numel()), x.numel())


def device_update(
    g: Tensor, g_held: Tensor | None, pulse_count: Tensor | None, device_map: Tensor | None, spec: str, seed: int, dw: Tensor,
    factor: float, weight: Tensor, w_max: Tensor, step: Tensor,
) -> None:  # fmt: skip
    """Move pairs of devices, and read the weights out: see `ops.device_update`."""
    given = tuple(part is not None for part in (g_held, pulse_count, device_map))
    update, maps = _update(spec, seed, g.shape, dw.shape, given)
    lowest, highest = w_max.min().item(), w_max.max().item()
    if not 0 < lowest <= highest < inf:
        raise ValueError(
            f"device_update: `w_max` must be finite and above 0, got {lowest:g} to {highest:g}; use the largest weight"
        )
    now = Update.from_buffer_copy(update)
    now.step, now.factor = int(step), factor
    cells = g.numel()
    devices = (
        address("g", g, cells),
        None if g_held is None else address("g_held", g_held, cells),
        None if pulse_count is None else address("pulse_count", pulse_count, cells, torch.int32),
        None if device_map is None else address("device_map", device_map, maps * cells, torch.float16),
    )
    update_on_host(
        now, devices, address("dw", dw, dw.numel()), None, address("weight", weight, dw.numel()),
        address("w_max", w_max, dw.shape[0] * dw.shape[1]),
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _update(
    spec: str, seed: int, g: torch.Size, dw: torch.Size, given: tuple[bool, bool, bool]
) -> tuple[bytes, int]:
    """What shapes and settings say of an update, and how many planes a map of the devices has."""
    shape, maps = tuple(g), len(spread_names(made_of(spec)["law"]))
    kinds = {
        "g_held": ("float32", shape),
        "pulse_count": ("int32", shape),
        "device_map": ("float16", (maps, *shape)),
    }
    parts: dict[str, Any] = {
        name: np.empty(of, kind)
        for there, (name, (kind, of)) in zip(given, kinds.items(), strict=True)
        if there
    }
    pairs = ops.Pairs(np.empty(shape, np.float32), **parts, seed=seed, **made_of(spec))
    groups, outputs, inputs = dw
    if shape != (2 * pairs.slices, groups * inputs, outputs):
        raise ValueError(
            f"device_update: `g` must have shape {(2 * pairs.slices, groups * inputs, outputs)} for dw {tuple(dw)}, got {shape}; check "
            "the axes"
        )
    return bytes(Update(**pairs.settings, groups=groups, inputs=inputs, outputs=outputs)), maps


def tile_mvm(
    plan: str, v: Tensor, g: Tensor, noise_var: Tensor | None, row_scale: Tensor, adc_lsb: Tensor, adc_error: Tensor | None,
    step: Tensor, *, transposed: bool, conv: ConvGeometry | None, want_gate: bool, col_scale: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """A read by a `mapping.ReadPlan`, and the gate if it is wanted: see `ops.tile_mvm`."""
    v, g, row_scale, adc_lsb = v.contiguous(), g.contiguous(), row_scale.contiguous(), adc_lsb.contiguous()
    read, _ = _read(
        plan, transposed, v.shape, v.dtype, g.shape, conv, want_gate, row_scale.numel(), adc_lsb.numel()
    )
    outputs, converters = read.outputs, prod(read.shapes["adc_gain"])
    y = v.new_empty(read.y_shape, dtype=torch.float32)
    gate = torch.empty_like(y) if want_gate else None
    cells = g.numel()
    given = [
        (name, t.contiguous(), count)
        for name, t, count in (
            ("noise_var", noise_var, cells), ("col_scale", col_scale, outputs), ("bias", bias, outputs),
            ("adc_gain", adc_error, 2 * converters),
        )
        if t is not None
    ]  # fmt: skip
    fields = {name: address(name, t, count) for name, t, count in given}
    if adc_error is not None:
        fields["adc_offset"] = fields["adc_gain"] + converters * adc_error.element_size()
    if gate is not None:
        fields["gate"] = gate.data_ptr()
    if y.numel():
        read.run(
            v=address("v", v, v.numel(), v.dtype), g=address("g", g, cells), y=y.data_ptr(),
            row_scale=address("row_scale", row_scale, row_scale.numel()), step=address("step", step, 1, torch.int64),
            adc_lsb=address("adc_lsb", adc_lsb, adc_lsb.numel()), **fields,
        )  # fmt: skip
    return y, gate


@lru_cache(maxsize=4096)
def _read(
    plan: str, transposed: bool, v: torch.Size, dtype: torch.dtype, g: torch.Size, conv: ConvGeometry | None, want_gate: bool,
    row_scales: int, adc_lsbs: int,
) -> tuple[TileRead, Conv | None]:  # fmt: skip
    """What shapes and settings say of a read, and the struct that it points to."""
    way = plan_of(plan)
    read = way.backward if transposed else way.forward
    tile = read.tile or None
    found = tile_read(
        tuple(v), dtype is torch.int16, tuple(g), None if transposed else tile, tile if transposed else None, transposed, way.groups,
        read.v_lsb, read.stream_bits, read.streams, read.phases, read.adc_bits or None, read.adc_signed, way.generator, conv,
        want_gate, "fp32", None, None, 0.0,
    )  # fmt: skip
    if found.batch % row_scales or adc_lsbs not in (1, found.outputs) or len(way.slice_scale) != g[0]:
        raise ValueError(
            f"gpuxbar: `dac_lsb`, `adc_lsb` and `g` must have a length that divides {found.batch}, 1 or {found.outputs} values, and "
            f"{len(way.slice_scale)} planes, got {row_scales}, {adc_lsbs} and {g[0]}; give what the layer holds"
        )
    patches = None if conv is None else Conv.of(conv)
    held = found.having(
        slice_scale=addressof(_floats(way.slice_scale)), read_noise=addressof(_floats((read.noise,))),
        seed=way.seed & 0xFFFFFFFFFFFFFFFF, row_offset=way.rank * found.batch, rows_per_scale=found.batch // row_scales,
        adc_per_column=adc_lsbs > 1, conv=None if patches is None else addressof(patches),
    )  # fmt: skip
    return held, patches


@cache
def _floats(values: tuple[float, ...]) -> Array[c_float]:
    """In memory, for good."""
    return (c_float * len(values))(*values)
