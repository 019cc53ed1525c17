"""The host kernels on tensors of the CPU, by address.

The ops look at arrays anew in every call, which costs several times what small layers compute. Here shapes and settings are
looked at once, by the same rules, and of a tensor only what keeps a kernel inside its memory.
"""

from __future__ import annotations

from ctypes import Array, addressof, c_float, sizeof
from functools import cache, lru_cache
from math import inf, prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpuxbar import ops
from gpuxbar.bridge.operator import plan_of, spec_of
from gpuxbar.bridge.pairs import made_of
from gpuxbar.launch import Device, host_call, host_library
from gpuxbar.ops import ConvGeometry, NotFiniteError
from gpuxbar.ops.dac_clip import clip_gradient_on_host
from gpuxbar.ops.device_map import spread_names
from gpuxbar.ops.device_update import Update, update_on_host
from gpuxbar.ops.images import Conv
from gpuxbar.ops.layer_read import LayerGradient, LayerRead
from gpuxbar.ops.outer_product import outer_product_on_host
from gpuxbar.ops.program import Writing, reprogram_on_host
from gpuxbar.ops.pulse_update import Update as Pulses
from gpuxbar.ops.pulse_update import check_pulses, check_sign, pulse_on_host, pulses_of
from gpuxbar.ops.tile_read import tile_read

__all__ = [
    "ADC_ERRORS",
    "Held",
    "checksum",
    "dac_clip_gradient",
    "device_update",
    "layer_gradient",
    "layer_read",
    "not_finite",
    "outer_product",
    "pulse_update",
    "reprogram",
    "serves",
]


ADC_ERRORS = "adc_gain", "adc_offset", "adc_inl"  # arguments of `ops.tile_mvm`, in the order of `adc_error`


def serves(device: Device | None) -> bool:
    """Whether the host kernels run what no other device does: the reference may."""
    return device is None and host_library() is not None


def address(name: str, t: Tensor, count: int, dtype: torch.dtype = torch.float32) -> int:
    """Where the values of a tensor lie; refused unless it holds so many of a type, one after the other."""
    at: int = t.data_ptr()  # 0 of a tensor of zeros that are nowhere
    if (
        t.dtype is not dtype
        or t.numel() != count
        or not t.is_contiguous()
        or not t.is_cpu
        or t.is_neg()
        or (count and not at)
    ):
        raise ValueError(
            f"gpuxbar: `{name}` must be a contiguous tensor of {count} values of {dtype} in the CPU's memory, got shape {tuple(t.shape)} "
            f"and strides {t.stride()} of {t.dtype} on {t.device}; pass its clone().contiguous()"
        )
    return at


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


def outer_product(d: Tensor, x: Tensor, scale: Tensor, gate: Tensor | None) -> Tensor:
    """The gradient of a matrix of weights: see `ops.outer_product`."""
    d, x, scale = d.contiguous(), x.contiguous(), scale.contiguous()
    gate = None if gate is None else gate.contiguous()
    (batch, outputs), inputs, units = d.shape, x.shape[1], scale.numel()
    if len(x) != batch or units not in (1, batch):
        raise ValueError(
            f"gpuxbar: `x` and `scale` must have {batch} rows and 1 or {batch} values, got {len(x)} and {units}; give those of d"
        )
    dw, is_code = d.new_empty((outputs, inputs)), x.dtype is torch.int16
    outer_product_on_host(
        address("d", d, d.numel()), None if gate is None else address("gate", gate, d.numel()),
        address("x", x, x.numel(), torch.int16 if is_code else torch.float32), address("scale", scale, units), dw.data_ptr(),
        (batch, outputs, inputs), is_code, units,
    )  # fmt: skip
    return dw


def reprogram(
    writes: Writing, weight: Tensor, g: Tensor, noise_var: Tensor | None, w_max: Tensor, state: Tensor, write_step: Tensor,
    scale: str, full_weight: float | None,
) -> None:  # fmt: skip
    """Program weights again if they have changed: see `ops.reprogram`."""
    cells = writes.cells
    reprogram_on_host(
        writes.at(int(write_step)), address("weight", weight, writes.weights), address("w_max", w_max, writes.values["scale_count"]),
        address("g", g, cells), None if noise_var is None else address("noise_var", noise_var, cells),
        address("state", state, 2, torch.int64), scale, full_weight,
    )  # fmt: skip


def checksum(x: Tensor) -> int:
    """See `ops.program.checksum`."""
    count = x.numel()
    return host_call(host_library(), "gpuxbar_checksum", address("x", x, count), count)


def not_finite(x: Tensor) -> int:
    """How many values of x are NaN or infinite."""
    return host_call(host_library(), "gpuxbar_not_finite", address("x", x, x.numel()), x.numel())


def device_update(
    g: Tensor, g_held: Tensor | None, pulse_count: Tensor | None, device_map: Tensor | None, spec: str, seed: int, dw: Tensor,
    factor: float, weight: Tensor, w_max: Tensor, step: Tensor,
) -> None:  # fmt: skip
    """Move pairs of devices, and read the weights out: see `ops.device_update`."""
    given = tuple(part is not None for part in (g_held, pulse_count, device_map))
    update, maps = _update(spec, seed, g.shape, dw.shape, given)
    lowest, highest = map(float, torch.aminmax(w_max))
    if not 0 < lowest <= highest < inf:
        raise ValueError(
            f"device_update: `w_max` must be finite and above 0, got {lowest:g} to {highest:g}; use the largest weight"
        )
    now = Update.from_buffer_copy(update)
    now.step, now.factor = int(step), factor
    devices = _devices(g, g_held, pulse_count, device_map, maps)
    update_on_host(
        now, devices, address("dw", dw, dw.numel()), None, address("weight", weight, dw.numel()),
        address("w_max", w_max, dw.shape[0] * dw.shape[1]),
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _update(
    spec: str, seed: int, g: torch.Size, dw: torch.Size, given: tuple[bool, bool, bool]
) -> tuple[bytes, int]:
    """What shapes and settings say of an update, and how many planes a map of the devices has."""
    pairs, maps = _like_pairs(spec, seed, g, given)
    shape = pairs.g.shape
    groups, outputs, inputs = dw
    if shape != (2 * pairs.slices, groups * inputs, outputs):
        raise ValueError(
            f"device_update: `g` must have shape {(2 * pairs.slices, groups * inputs, outputs)} for dw {tuple(dw)}, got {shape}; check "
            "the axes"
        )
    return bytes(Update(**pairs.settings, groups=groups, inputs=inputs, outputs=outputs)), maps


def pulse_update(
    g: Tensor, g_held: Tensor | None, pulse_count: Tensor | None, device_map: Tensor | None, spec: str, seed: int, x: Tensor,
    d: Tensor, weight: Tensor, w_max: Tensor, step: Tensor, rate: float, groups: int, conv: ConvGeometry | None,
    sign: Tensor | None, weight_held: bool,
) -> None:  # fmt: skip
    """Pulse pairs of devices, and read the weights out: see `ops.pulse_update`."""
    given = g_held is not None, pulse_count is not None, device_map is not None
    update, maps = _pulses(spec, seed, g.shape, x.shape, d.shape, groups, conv, given)
    now = Pulses.from_buffer_copy(update)
    now.step, now.pulses = int(step), pulses_of(made_of(spec)["law"], now.slices, rate)
    now.weights_held = weight_held
    if sign is not None:
        check_sign(sign.numpy(), groups * now.inputs)
    devices = _devices(g, g_held, pulse_count, device_map, maps)
    pulse_on_host(
        now, devices, address("x", x, x.numel()), address("d", d, d.numel()),
        None if sign is None else address("sign", sign, groups * now.inputs),
        address("weight", weight, groups * now.outputs * now.inputs), address("w_max", w_max, groups * now.outputs),
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _pulses(
    spec: str, seed: int, g: torch.Size, x: torch.Size, d: torch.Size, groups: int, conv: ConvGeometry | None,
    given: tuple[bool, bool, bool],
) -> tuple[bytes, int]:  # fmt: skip
    """What shapes and settings say of pulses, and how many planes a map of the devices has."""
    pairs, maps = _like_pairs(spec, seed, g, given)
    train = spec_of(spec).pulses
    assert train is not None
    inputs, errors = np.empty(x, np.float32), np.empty(d, np.float32)
    size = check_pulses(pairs, inputs, errors, train, np.ones(d[1], np.float32), groups, conv)
    return bytes(Pulses.of(pairs, train, conv, size)), maps


def _devices(
    g: Tensor, g_held: Tensor | None, pulse_count: Tensor | None, device_map: Tensor | None, maps: int
) -> tuple[int, int | None, int | None, int | None]:
    """Where the arrays of pairs lie; `maps`: planes of a map of them."""
    cells = g.numel()
    return (
        address("g", g, cells),
        None if g_held is None else address("g_held", g_held, cells),
        None if pulse_count is None else address("pulse_count", pulse_count, cells, torch.int32),
        None if device_map is None else address("device_map", device_map, maps * cells, torch.float16),
    )


def _like_pairs(spec: str, seed: int, g: torch.Size, given: tuple[bool, bool, bool]) -> tuple[ops.Pairs, int]:
    """Pairs of a shape, with `g_held`, `pulse_count` and `device_map` or without, and how many planes the last has."""
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
    return ops.Pairs(np.empty(shape, np.float32), **parts, seed=seed, **made_of(spec)), maps


class Held(NamedTuple):
    """What a layer holds for its reads in one direction, as the arguments of `bridge.analog_mvm` say.

    `w_max`: the weights of full pairs, by which results are scaled, and backwards what is driven; None: nothing is.
    """

    g: Tensor
    noise_var: Tensor | None
    w_max: Tensor | None
    adc_range: Tensor
    adc_error: Tensor | None
    dac_error: Tensor | None


def layer_read(
    plan: str, x: Tensor, dac_lsb: Tensor | None, held: Held, bias: Tensor | None, counter: Tensor, count: int, what: str, *,
    transposed: bool, conv: ConvGeometry | None, keep: bool, want_gate: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """A read of digital values by a `mapping.ReadPlan`, through the DAC: see `ops.dac_quantize` and `ops.tile_mvm`.

    Args:
        dac_lsb: Value of one code, float32 [1] or [len(x)]; None: that of a DAC whose range fits x, or, driven backwards, x times
            the weights of full pairs.
        counter: Reads so far, int64 [1], which become `count` more: the number of this read.
        what: What the error about values that are not finite calls x.

    Returns:
        y, the gate if it is wanted, and if they are to `keep` what drives the lines, the value of one code and the read's number.
    """
    steps = None if dac_lsb is None else dac_lsb.numel()
    kept = _layer_read(
        LayerRead, plan, transposed, x.shape, held.g.shape, conv, want_gate, steps, held.adc_range.numel()
    )
    read: LayerRead = LayerRead.from_buffer_copy(kept.struct)
    alive = _hold(read, kept, held, counter)
    x = x.contiguous()
    read.x, read.count = address("x", x, kept.values), count
    if bias is not None:
        bias = bias.contiguous()
        read.bias = address("bias", bias, kept.outputs)
    if dac_lsb is not None:
        dac_lsb = dac_lsb.contiguous()
        read.dac_lsb = address("dac_lsb", dac_lsb, kept.steps)
    y = x.new_empty(kept.y_shape)
    driven, gate, lsb, number = None, None, dac_lsb, None
    read.y = y.data_ptr()
    if want_gate:
        gate = torch.empty_like(y)
        read.gate = gate.data_ptr()
    if keep:
        driven = torch.empty_like(x, dtype=torch.int16) if read.is_code else torch.empty_like(x)
        number = torch.empty_like(counter)
        read.driven, read.number = driven.data_ptr(), number.data_ptr()
    if keep and dac_lsb is None:
        lsb = x.new_empty(kept.steps)
        read.dac_lsb = lsb.data_ptr()
    read.run(what)
    del alive
    return y, gate, driven, lsb, number


def layer_gradient(
    plan: str, d: Tensor, passed: Tensor | None, v: Tensor, v_unit: Tensor, held: Held, number: Tensor, what: str,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of the inputs, the weights and the bias of a layer's read of a matrix, where they are wanted.

    The first is a transposed read by a DAC whose range fits what it drives; the others see `outer_product`.

    Args:
        d: Gradients of the outputs, float32 [B, O]; in the first, where they are not finite, all is NaN.
        passed: The gate of the read, like d, or None.
        v: What drove its lines, int16 codes or float32 [B, I], in units of `v_unit`, [1] or [B].
        number: Its number, int64 [1].
        what: What an error calls d.
    """
    kept = _layer_read(
        LayerGradient, plan, True, d.shape, held.g.shape, None, False, None, held.adc_range.numel()
    )
    d, v, v_unit = d.contiguous(), v.contiguous(), v_unit.contiguous()
    read: LayerGradient = LayerGradient.from_buffer_copy(kept.struct)
    alive = _hold(read, kept, held, number)
    is_code, units = v.dtype is torch.int16, v_unit.numel()
    if units not in (1, len(d)):
        raise ValueError(f"gpuxbar: `v_unit` must have 1 or {len(d)} values, got {units}; give those of `v`")
    read.d, read.v_is_code, read.v_units = address("d", d, kept.values), is_code, units
    read.v = address("v", v, len(d) * kept.outputs, torch.int16 if is_code else torch.float32)
    read.v_unit = address("v_unit", v_unit, units)
    if passed is not None:
        passed = passed.contiguous()
        read.passed = address("passed", passed, kept.values)
    dx = dw = dbias = None
    if wanted[0]:
        dx = d.new_empty(kept.y_shape)
        read.y = dx.data_ptr()
    if wanted[1]:
        dw = d.new_empty((d.shape[1], kept.outputs))
        read.dw = dw.data_ptr()
    if wanted[2]:
        dbias = d.new_empty(d.shape[1])
        read.dbias = dbias.data_ptr()
    try:
        read.run(what)
    except NotFiniteError:
        # as of a loss that was scaled too far: left to be found as a GradScaler finds it
        assert dx is not None
        dx.fill_(torch.nan)
    del alive
    return dx, dw, dbias


def _hold(read: LayerRead, kept: Kept, held: Held, counter: Tensor) -> list[Tensor]:
    """Tell a read where that lies which a layer holds; returns what must live until then."""
    alive = []
    for name, values, count in (
        ("g", held.g, kept.cells), ("adc_range", held.adc_range, kept.ranges), ("w_max", held.w_max, kept.weights),
        ("noise_var", held.noise_var, kept.cells), ("dac_error", held.dac_error, 3 * kept.lines),
    ):  # fmt: skip
        if values is not None:
            values = values.contiguous()
            setattr(read, name, address(name, values, count))
            alive.append(values)
    read.counter = address("counter", counter, 1, torch.int64)
    if held.adc_error is not None:
        adc_error = held.adc_error.contiguous()
        kinds = ADC_ERRORS[: len(adc_error)]
        first = address("adc_error", adc_error, len(kinds) * kept.converters)
        for n, kind in enumerate(kinds):
            setattr(read, kind, first + n * kept.converters * adc_error.element_size())
        alive.append(adc_error)
    return alive


class Kept(NamedTuple):
    """What shapes and settings say of a layer's read: its struct as bytes, the convolution that this points to, and counts."""

    struct: bytes
    patches: Conv | None
    y_shape: tuple[int, ...]
    values: int
    steps: int
    cells: int
    weights: int
    outputs: int
    lines: int
    converters: int
    ranges: int


@lru_cache(maxsize=4096)
def _layer_read(
    kind: type[LayerRead], plan: str, transposed: bool, x: torch.Size, g: torch.Size, conv: ConvGeometry | None, want_gate: bool,
    steps: int | None, ranges: int,
) -> Kept:  # fmt: skip
    way = plan_of(plan)
    read = way.backward if transposed else way.forward
    tile = read.tile or None
    found = tile_read(
        tuple(x), read.code_max > 0, tuple(g), None if transposed else tile, tile if transposed else None, transposed, way.groups,
        read.v_lsb, read.stream_bits, read.streams, read.phases, read.adc_bits or None, read.adc_signed, way.generator, conv,
        want_gate, "fp32", None, None, 0.0,
    )  # fmt: skip
    lsbs = (x[0] if read.per_sample else 1) if steps is None else steps
    if lsbs not in (1, x[0]) or ranges not in (1, found.outputs) or len(way.slice_scale) != g[0]:
        raise ValueError(
            f"gpuxbar: `dac_lsb`, `adc_range` and `g` must have 1 or {x[0]} values, 1 or {found.outputs} values, and "
            f"{len(way.slice_scale)} planes, got {lsbs}, {ranges} and {g[0]}; give what the layer holds"
        )
    patches = None if conv is None else Conv.of(conv)
    struct = kind.from_buffer_copy(found.params.ljust(sizeof(kind), b"\0"))
    for name, value in {
        "slice_scale": addressof(_floats(way.slice_scale)), "read_noise": addressof(_floats((read.noise,))),
        "seed": way.seed & 0xFFFFFFFFFFFFFFFF, "row_offset": way.rank * found.batch, "rows_per_scale": found.batch // max(1, lsbs),
        "adc_per_column": ranges > 1, "conv": None if patches is None else addressof(patches), "unit": way.unit, "rows": x[0],
        "channels": x[1], "each": prod(x[2:]), "lsb_count": lsbs, "fits": steps is None, "dac_code_max": read.code_max,
        "dac_signed": read.signed, "v_read": read.v_max, "v_sinh": read.v_sinh or 0.0,
    }.items():  # fmt: skip
        setattr(struct, name, value)
    converters = prod(found.shapes["adc_gain"])
    return Kept(
        bytes(struct), patches, found.y_shape, prod(x), lsbs, prod(g), way.groups * g[2], found.outputs,
        found.shapes["drivers.error"][1], converters, ranges,
    )  # fmt: skip


@cache
def _floats(values: tuple[float, ...]) -> Array[c_float]:
    """In memory, for good."""
    return (c_float * len(values))(*values)
