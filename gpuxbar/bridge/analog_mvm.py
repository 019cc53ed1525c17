"""The crossbar product as a PyTorch operator: non-ideal read forwards, non-ideal transposed read backwards.

Gradient: the input's is the transposed read of the output's gradient; the weight's is the digital outer product of that
gradient with the input's codes, whatever DACs and devices make of them. Straight-through inside the ADC range: the output
gradient is multiplied by the share (by digital weight) of the output's conversions inside the range, so it is zero where all of
them clipped. Clipping of inputs is the caller's `clamp`. Reference lines of an offset mapping count as constant.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpuxbar import ops
from gpuxbar.bridge import host
from gpuxbar.bridge.arrays import array, on_cpu, on_device, tensor
from gpuxbar.bridge.dac_clip import as_finite
from gpuxbar.bridge.internals import _will_engine_execute_node
from gpuxbar.bridge.lines import fold_lines
from gpuxbar.bridge.operator import call, gradient, operator, plan_of
from gpuxbar.bridge.outer_product import Samples, conv_weight_gradient, weight_gradient
from gpuxbar.bridge.passes import require_first_pass
from gpuxbar.launch import Device
from gpuxbar.mapping.plan import Read, ReadPlan
from gpuxbar.ops import ConvGeometry, NotFiniteError
from gpuxbar.ops.checks import require_finite_values
from gpuxbar.reference import SMALLEST_RANGE

__all__ = [
    "NOT_PACKED",
    "abs_max",
    "analog_mvm",
    "driven_gradient",
    "driven_lines",
    "gradient_values",
    "less_reference",
]

NOT_PACKED: tuple[Tensor | None, ...] = (None,) * 4  # in place of memory for packed conductances


def _read_shapes(x, weight, g, back_g, noise_var, w_max, bias, dac_lsb, *more):
    counter, plan, want_gate = more[6], *more[-2:]
    way = plan_of(plan)
    conv = _geometry(way, weight.shape, x.shape)
    shape = (x.shape[0], w_max.shape[0]) if conv is None else (x.shape[0], w_max.shape[0], *conv.out)
    y = x.new_empty(shape, dtype=torch.float32)
    v = x.new_empty(x.shape if want_gate else 0, dtype=torch.int16 if way.forward.code_max else x.dtype)
    gate = x.new_empty(shape if want_gate and way.forward.adc_bits else 0, dtype=torch.float32)
    steps = x.shape[0] if way.forward.per_sample else 1
    unit = x.new_empty(steps if want_gate and dac_lsb is None else 0, dtype=torch.float32)
    return y, v, gate, unit, counter.new_empty(int(want_gate))


@operator(_read_shapes, mutates_args=("counter", "packed", "packed_state"))
def analog_mvm(
    x: Tensor,
    weight: Tensor,
    g: Tensor,
    back_g: Tensor | None,
    noise_var: Tensor | None,
    w_max: Tensor,
    bias: Tensor | None,
    dac_lsb: Tensor | None,
    adc_range: Tensor,
    back_adc_range: Tensor,
    adc_error: Tensor | None,
    back_adc_error: Tensor | None,
    dac_error: Tensor | None,
    back_dac_error: Tensor | None,
    counter: Tensor,
    count: int,
    packed: Tensor | None,
    back_packed: Tensor | None,
    packed_state: Tensor | None,
    version: Tensor | None,
    plan: str,
    want_gate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Read a layer's tiles: y float32, with what backward needs: the driven codes, the ADC gate, the value of a code and the read's
    number.

    Args:
        x: Inputs inside the DAC range, float32 [B, G * I] or images [N, channels, height, width].
        weight: The layer's weight; receives the gradient, its values are not used. Where it has an attribute `operands`, that is
            left x and the gradient of y instead (`leave`), by backward passes that go on to the weight.
        g: Programmed conductances, float32 [S, G * I, O], S, with the reference lines of an offset mapping; the wordlines of a
            convolution in the order of its plan.
        back_g: The same where the transposed read sees another matrix, or None.
        noise_var: Variance of state-dependent read noise, shape of `g`, A**2/V**2, or None.
        w_max: Weight of a full pair, float32 [G * O].
        bias: Added digitally, float32 [G * O], or None.
        dac_lsb: Digital value of one DAC code, float32 [1] or [B or N]; None: that of a range which fits the inputs, all of them or
            each sample as the plan says.
        adc_range, back_adc_range: Current of the ADC's largest code forwards and backwards, A, float32 [1] or one per sensed line.
        adc_error, back_adc_error: Gain, offset in A and, where there is any, integral non-linearity in steps of every converter,
            float32 [2 or 3, S, tiles, sensed], or None.
        dac_error, back_dac_error: Gain, offset in V and non-linearity in steps of every driven line's DAC, float32 [3, lines], or
            None.
        counter: Reads so far, int64 [1], which become `count` more: the number of this read; same number, same noise. A read that
            is refused leaves no trace.
        packed, back_packed: Memory for packed conductances forwards and backwards, uint8 [bytes], or None; see
            `ops.PackedConductance`, whose states are `packed_state`, int64 [2, 2], and whose number is `version`, int64 [1].
        plan: `mapping.ReadPlan` as JSON.
        want_gate: Whether backward will follow; without, all but y is empty, and where it is given the value of a code, too.
    """
    way = plan_of(plan)
    read, plain = way.forward, way.reference == (0, 0)
    if read.noise or noise_var is not None:
        require_first_pass(way.name)
    with on_device(x, way.name) as device:
        held = host.Held(g, noise_var, w_max if plain else None, adc_range, adc_error, dac_error)
        y, gate, codes, lsb, number = _read(
            x, dac_lsb, held, bias if plain else None, counter, count, plan, device, f"{way.name}: `x`",
            conv=_kept_geometry(plan, weight.shape, x.shape), keep=want_gate, want_gate=want_gate and read.adc_bits > 0,
            packed=_packed(packed, packed_state, version, 0, device),
        )  # fmt: skip
        if not plain:
            along = [-1, *[1] * (y.dim() - 2)]
            y = less_reference(y, way, transposed=False) * (w_max * way.unit).view(along)
            y = y if bias is None else y + bias.detach().view(along)
            gate = None if gate is None else _own_lines(gate, way, transposed=False)[0].contiguous()
    if codes is None or not want_gate:
        codes = x.new_empty(0, dtype=torch.int16 if read.code_max else x.dtype)
    if lsb is None or dac_lsb is not None or not want_gate:
        lsb = x.new_empty(0)
    number = counter.new_empty(0) if number is None or not want_gate else number
    return y, codes, x.new_empty(0) if gate is None else gate, lsb, number


def _transposed_shape(
    grad_y, weight, g, noise_var, w_max, adc_range, adc_error, dac_error, step, image, plan, *packing
):
    shape = tuple(image) or (grad_y.shape[0], plan_of(plan).groups * plan_of(plan).inputs)
    return grad_y.new_empty(shape, dtype=torch.float32)


@operator(_transposed_shape)
def analog_mvm_transposed(
    grad_y: Tensor,
    weight: Tensor,
    g: Tensor,
    noise_var: Tensor | None,
    w_max: Tensor,
    adc_range: Tensor,
    adc_error: Tensor | None,
    dac_error: Tensor | None,
    step: Tensor,
    image: list[int],
    plan: str,
) -> Tensor:
    """The same array read backwards: gradient of the input, [B, G * I] or images of shape `image`."""
    held = host.Held(g, noise_var, w_max, adc_range, adc_error, dac_error)
    return _transposed(grad_y, weight, held, step, image, plan)


# apart from the one above: torch's inductor fails on an operator of one result that changes optional arguments, all None
@operator(_transposed_shape, mutates_args=("packed", "packed_state"))
def analog_mvm_transposed_packed(
    grad_y: Tensor,
    weight: Tensor,
    g: Tensor,
    noise_var: Tensor | None,
    w_max: Tensor,
    adc_range: Tensor,
    adc_error: Tensor | None,
    dac_error: Tensor | None,
    step: Tensor,
    image: list[int],
    plan: str,
    packed: Tensor,
    packed_state: Tensor,
    version: Tensor,
) -> Tensor:
    """`analog_mvm_transposed` that keeps packed conductances in `packed`."""
    held = host.Held(g, noise_var, w_max, adc_range, adc_error, dac_error)
    return _transposed(grad_y, weight, held, step, image, plan, (packed, packed_state, version))


def _transposed(
    grad_y: Tensor, weight: Tensor, held: host.Held, step: Tensor, image: list[int], plan: str,
    packing: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    way, w_max = plan_of(plan), held.w_max
    assert w_max is not None
    read, plain = way.backward, way.reference == (0, 0)
    conv = _kept_geometry(plan, weight.shape, tuple(image)) if image else None
    with on_device(grad_y, f"{way.name} backward") as device:
        values, lsb = grad_y, None
        if device is not None or read.full or not read.code_max or (image and not plain):
            # what drives the lines is made here: no DAC of a layer on the CPU fits it
            values, lsb = driven_gradient(gradient_values(grad_y, w_max, way), w_max, way)
            held = held._replace(w_max=None)
            if conv is not None and not plain:
                lsb = lsb.repeat_interleave(conv.pixels) if lsb.numel() > 1 else lsb
                values, conv = values.permute(0, 2, 3, 1).reshape(-1, values.shape[1]), None
        try:
            grad_x, *_ = _read(
                values, lsb, held, None, step, 0, plan, device, f"{way.name}: the gradient of the output", transposed=True,
                conv=conv, packed=None if packing is None else _packed(*packing, 1, device),
            )  # fmt: skip
        except NotFiniteError:
            # as of a loss that was scaled too far: left to be found as a GradScaler finds it
            return grad_y.new_full(tuple(image) or (len(grad_y), way.groups * way.inputs), torch.nan)
        if plain:
            return grad_x
        grad_x = less_reference(grad_x, way, transposed=True)
        return fold_lines(grad_x, tuple(image), weight.shape, way) if image else grad_x


def _gradient_shapes(
    grad_y, gate, v, lsb, g, noise_var, w_max, adc_range, adc_error, dac_error, number, plan, *wanted
):
    (batch, outputs), inputs = grad_y.shape, v.shape[1]
    shapes = (batch, inputs), (outputs, inputs), (outputs,)
    return tuple(grad_y.new_empty(shape if asked else 0) for shape, asked in zip(shapes, wanted, strict=True))


@operator(_gradient_shapes)
def matrix_gradients(
    grad_y: Tensor,
    gate: Tensor,
    v: Tensor,
    lsb: Tensor,
    g: Tensor,
    noise_var: Tensor | None,
    w_max: Tensor,
    adc_range: Tensor,
    adc_error: Tensor | None,
    dac_error: Tensor | None,
    number: Tensor,
    plan: str,
    want_x: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """All gradients of a read of a matrix on the CPU at once, as far as they are wanted: of its inputs, weights and bias.

    What `analog_mvm` returned of the read, and what it was given for the transposed one, are `gate` to `number`.
    """
    held = host.Held(g, noise_var, w_max, adc_range, adc_error, dac_error)
    found = host.layer_gradient(
        plan, grad_y, gate if gate.numel() else None, v, lsb, held, number,
        f"{plan_of(plan).name}: the gradient of the output", (want_x, want_weight, want_bias),
    )  # fmt: skip
    grad_x, grad_w, grad_bias = (grad_y.new_empty(0) if each is None else each for each in found)
    return grad_x, grad_w, grad_bias


def _at_once(grad_y: Tensor, way: ReadPlan) -> bool:
    """Whether the gradients of a read of a matrix are `matrix_gradients`."""
    read = way.backward
    fits = read.code_max > 0 and not read.full and way.reference == (0, 0)
    return fits and on_cpu(grad_y) and host.serves(None)


def gradient_values(grad_y: Tensor, w_max: Tensor, way: ReadPlan) -> Tensor:
    """A gradient of the output in the units that a transposed read drives."""
    return grad_y * (w_max * way.unit).reshape(-1, *[1] * (grad_y.dim() - 2))


def driven_gradient(values: Tensor, w_max: Tensor, way: ReadPlan) -> tuple[Tensor, Tensor]:
    """`gradient_values` inside the range of the transposed read's DAC, and the value of one code, [1] or [len(values)]."""
    read = way.backward
    if read.full:
        full = read.full * way.unit * w_max.amax().reshape(1)
        values = as_finite(values.clamp(-full, full), values)
    else:
        full = abs_max(values, read.per_sample)
    return values, full / max(read.code_max, 1)


def abs_max(x: Tensor, per_sample: bool) -> Tensor:
    """Largest magnitude, float32 [1] or one for each leading index; never 0."""
    low, high = torch.aminmax(x.flatten(1), dim=1) if per_sample else torch.aminmax(x)
    return torch.maximum(-low, high).clamp_min(SMALLEST_RANGE).reshape(-1)


def _geometry(way: ReadPlan, weight: Any, image: Any) -> ConvGeometry | None:
    if len(weight) != 4:
        return None
    try:
        return ConvGeometry(
            weight[1], image[2], image[3], (weight[2], weight[3]), way.stride, way.padding, way.dilation, way.line_order
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{way.name}: {str(error).removeprefix('ConvGeometry: ')}") from None


@lru_cache(maxsize=4096)
def _kept_geometry(plan: str, weight: torch.Size, image: tuple[int, ...]) -> ConvGeometry | None:
    """Looked at once; its plan is JSON, whose hash is kept."""
    return _geometry(plan_of(plan), weight, image)


def _drive(
    x: Tensor, lsb: Tensor | None, scale: Tensor | None, read: Read, device: Device | None, what: str, keep: bool
) -> tuple[Tensor, ops.Dac | None, Tensor, Tensor]:  # fmt: skip
    """What drives the lines for values x, times `scale` of their channels where the DAC's range fits them (`lsb` is None): codes,
    or values relative to the largest without a DAC; the same to be kept; the value of one code.

    On a GPU the DAC works on the way to the products: what drives the lines are values then, and the codes to `keep` come with
    the read.
    """
    if device is None and read.code_max and lsb is None:
        codes, steps = ops.dac_fit(
            array(x), None if scale is None else array(scale), code_max=read.code_max, signed=read.signed,
            per_sample=read.per_sample, what=what,
        )  # fmt: skip
        return tensor(codes), None, tensor(codes), tensor(steps)
    lsb = abs_max(x, read.per_sample) / max(read.code_max, 1) if lsb is None else lsb
    if read.code_max and device is not None:
        codes = x.new_empty(x.shape if keep else 0, dtype=torch.int16)
        return x, ops.Dac(array(lsb), read.code_max, read.signed, array(codes) if keep else None), codes, lsb
    if device is None:
        extremes = [lsb, *torch.aminmax(x)]
        if not all(np.isfinite(array(value)).all() for value in extremes):
            require_finite_values(what, int((~torch.isfinite(x)).sum()), "bad data")
    if read.code_max:
        v = tensor(ops.dac_quantize(array(x), lsb=array(lsb), code_max=read.code_max, signed=read.signed))
    else:
        v = x / lsb.reshape(-1, *[1] * (x.dim() - 1))
    return v, None, v, lsb


def _read(
    x: Tensor, dac_lsb: Tensor | None, held: host.Held, bias: Tensor | None, counter: Tensor, count: int, plan: str,
    device: Device | None, what: str, *,
    conv: ConvGeometry | None, packed: ops.PackedConductance | None, transposed: bool = False, keep: bool = False,
    want_gate: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """A read of digital values x, through the DAC, in digital units along the driven side: see `host.layer_read`; what is not to
    `keep` may be None."""
    way = plan_of(plan)
    read = way.backward if transposed else way.forward
    g, noise_var, w_max, adc_range, adc_error, dac_error = held
    g = driven_lines(g, way, transposed)
    noise_var = None if noise_var is None or read.ideal else driven_lines(noise_var, way, transposed)
    if host.serves(device):
        if dac_lsb is None and not read.code_max:
            dac_lsb = abs_max(x, read.per_sample)
        return host.layer_read(
            plan, x, dac_lsb, host.Held(g, noise_var, *held[2:]), bias, counter, count, what,
            transposed=transposed, conv=conv, keep=keep, want_gate=want_gate,
        )  # fmt: skip
    number = counter + count
    scale = None if w_max is None else w_max * way.unit
    v, dac, driven, lsb = _drive(x, dac_lsb, scale if transposed else None, read, device, what, keep)
    more: dict[str, Any] = {"tile_cols" if transposed else "tile_rows": read.tile or None}
    if read.adc_bits:
        # at every read, also of a compiled or captured graph: ranges may be calibrated or copied at any time
        adc_lsb = array(adc_range / read.adc_code_max)
        more |= {"adc_bits": read.adc_bits, "adc_lsb": adc_lsb, "adc_signed": read.adc_signed}
        if adc_error is not None:
            more |= {name: array(of) for name, of in zip(host.ADC_ERRORS, adc_error, strict=False)}
    if not read.straight:
        error = None if dac_error is None else array(dac_error)
        more["drivers"] = ops.Drivers(read.v_max, error, read.v_sinh)
    vectors = {"noise_var": noise_var, "col_scale": None if transposed else scale, "bias": bias}
    more |= {name: array(vector) for name, vector in vectors.items() if vector is not None}
    try:
        found = ops.tile_mvm(
            array(v), array(g), transposed=transposed, groups=way.groups, v_lsb=read.v_lsb, stream_bits=read.stream_bits,
            streams=read.streams, phases=read.phases, slice_scale=_slice_scale(way.slice_scale, v.device),
            read_noise=read.noise, generator=way.generator, seed=way.seed, step=array(number),
            row_offset=way.rank * len(v) * (1 if conv is None else conv.pixels), row_scale=array(lsb / read.v_lsb), conv=conv,
            want_gate=want_gate, precision=way.precision if read.code_max else "fp32", g_range=way.g_range, g_step=way.g_step,
            g_offset=way.g_offset, packed=packed, dac=dac, device=device, **more,
        )  # fmt: skip
    except ValueError as error:  # as of settings that no kernel of this GPU reads
        raise type(error)(f"{way.name}: {str(error).removeprefix('tile_mvm: ')}") from None
    if count:
        counter.copy_(number)
    y, gate = found if want_gate else (found, None)
    return tensor(y), None if gate is None else tensor(gate), driven, lsb, number


def _packed(
    memory: Tensor | None,
    states: Tensor | None,
    version: Tensor | None,
    direction: int,
    device: Device | None,
) -> ops.PackedConductance | None:
    if memory is None or states is None or version is None or device is None:
        return None
    return ops.PackedConductance(array(memory), array(states[direction]), array(version))


@cache
def _slice_scale(scale: tuple[float, ...], device: torch.device) -> Any:
    """Kept for good: captured CUDA graphs read it."""
    return array(torch.tensor(scale, dtype=torch.float32, device=device))


def driven_lines(part: Tensor, way: ReadPlan, transposed: bool) -> Tensor:
    """The cells that a read drives: those of the other side's reference lines are left out."""
    if way.reference == (0, 0):
        return part
    rows, cols = way.reference_lines
    block = part.view(1, way.groups, way.inputs + rows, way.outputs + cols)
    block = block[..., : way.outputs] if transposed else block[:, :, : way.inputs]
    return block.reshape(1, -1, block.shape[-1])


def _own_lines(y: Tensor, way: ReadPlan, transposed: bool) -> tuple[Tensor, Tensor]:
    """The lines of weights [B, G * lines, ...] and the reference lines [B, G, references, ...] of what was sensed."""
    lines = way.inputs if transposed else way.outputs
    by_group = y.unflatten(1, (way.groups, -1))
    return by_group[:, :, :lines].flatten(1, 2), by_group[:, :, lines:]


def less_reference(y: Tensor, way: ReadPlan, transposed: bool) -> Tensor:
    """Every sensed line less the reference line of its tile."""
    own, reference = _own_lines(y, way, transposed)
    lines, tile = (way.inputs, way.reference[0]) if transposed else (way.outputs, way.reference[1])
    return own - reference.repeat_interleave(tile, 2)[:, :, :lines].flatten(1, 2)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (
        x, weight, g, back_g, noise_var, w_max, bias, dac_lsb, _, adc_range, _, adc_error, _, dac_error, _, _, *packing, plan, _,
    ) = inputs  # fmt: skip
    g = g if back_g is None else back_g
    _, v, gate, fitted, step = output
    lsb = fitted if dac_lsb is None else dac_lsb
    # A change of the weight, which alone changes g and w_max, is caught here.
    ctx.operands = getattr(weight, "operands", None)
    read = None if ctx.operands is None else x.detach()
    ctx.save_for_backward(
        v, gate, lsb, read, weight, g, noise_var, w_max, adc_range, adc_error, dac_error, step
    )
    ctx.packing = packing[1:]  # not saved: reads change it in place, and look at what it is
    ctx.plan, ctx.image, ctx.has_bias = plan, list(x.shape) if x.dim() == 4 else [], bias is not None
    ctx.set_materialize_grads(ctx.operands is not None)


def _backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_y is None:
        return None, None, None
    v, gate, lsb, x, weight, *held, step = ctx.saved_tensors
    way = plan_of(ctx.plan)
    want_x, want_weight, want_bias = ctx.needs_input_grad[:3]
    if ctx.operands is not None:
        if _will_engine_execute_node(ctx.next_functions[1][0]):
            ctx.operands.leave(x, grad_y)
        want_weight = False
        if not (want_x or want_bias):
            return None, None, None
    grad_y = grad_y.float()
    samples = None if ctx.image else Samples.of(weight)
    if not ctx.image and samples is None and _at_once(grad_y, way):
        wanted = want_x, want_weight, want_bias
        found = call(matrix_gradients, grad_y, gate, v, lsb, *held, step, ctx.plan, *wanted)
        # which autograd gives the precision of the weight and the bias
        return tuple(each if asked else None for each, asked in zip(found, wanted, strict=True))
    grad_bias = grad_y.sum([0, *range(2, grad_y.dim())]) if ctx.has_bias else None
    gated, of_product = grad_y.contiguous(), gate if gate.numel() else None
    if of_product is not None and (want_x or ctx.image or samples):
        gated = gated * gate
        of_product = None  # else the weight's gradient alone needs it, whose product does it on the way
    grad_x = grad_w = None
    if want_x:
        read = gated, weight, *held, step, ctx.image, ctx.plan
        packed = ctx.packing[0] is not None
        grad_x = (
            call(analog_mvm_transposed_packed, *read, *ctx.packing)
            if packed
            else call(analog_mvm_transposed, *read)
        )
    if want_weight:
        if ctx.image:
            grad_w = conv_weight_gradient(gated, v, lsb, weight.shape, way).to(weight.dtype)
        elif samples is not None:
            samples.leave(gated, v, lsb)
        else:
            grad_w = weight_gradient(gated, v, lsb, of_product).to(weight.dtype)
    return grad_x, grad_w, grad_bias


gradient(analog_mvm, _backward, _setup, wrt=(0, 1, 6), results=1)
