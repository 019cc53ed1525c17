"""The crossbar product as a PyTorch operator: non-ideal read forwards, non-ideal transposed read backwards.

Gradient: the input's is the transposed read of the output's gradient; the weight's is the digital outer product
of that gradient with the quantised input. Straight-through inside the ADC range: the output gradient is
multiplied by the share (by digital weight) of the output's conversions inside the range, so it is zero where
all of them clipped. Clipping of inputs is the caller's `clamp`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from gpuxbar import ops
from gpuxbar.mapping.plan import Read, ReadPlan
from gpuxbar.ops import ConvGeometry

__all__ = ["analog_mvm"]

_plan = lru_cache(maxsize=1024)(ReadPlan.loads)


def _array(t: Tensor) -> np.ndarray:
    if t.device.type != "cpu":
        raise NotImplementedError(
            f"gpuxbar: tensors must be on the CPU in this version, got {t.device}; call .cpu()"
        )
    return t.detach().contiguous().numpy()


def _geometry(plan: ReadPlan, weight: tuple[int, ...], image: tuple[int, ...]) -> ConvGeometry | None:
    if len(weight) != 4:
        return None
    return ConvGeometry(
        weight[1], image[2], image[3], (weight[2], weight[3]), plan.stride, plan.padding, plan.dilation
    )


def _drive(x: Tensor, lsb: Tensor, read: Read) -> Tensor:
    if read.code_max:
        codes = ops.dac_quantize(_array(x), lsb=_array(lsb), code_max=read.code_max, signed=read.signed)
        return torch.from_numpy(codes)
    return x / lsb.reshape(-1, *[1] * (x.dim() - 1))


def _read(
    v: Tensor, g: Tensor, lsb: Tensor, adc_lsb: Tensor, step: Tensor, plan: ReadPlan, read: Read, **more: Any
) -> Any:
    if read.adc_bits:
        more |= {"adc_bits": read.adc_bits, "adc_lsb": _array(adc_lsb)}
    more["tile_cols" if more.get("transposed") else "tile_rows"] = read.tile or None
    return ops.tile_mvm(
        _array(v), _array(g), groups=plan.groups, v_lsb=read.v_lsb, stream_bits=read.stream_bits,
        streams=read.streams, phases=read.phases, slice_scale=np.asarray(plan.slice_scale, np.float32),
        adc_signed=read.adc_signed, read_noise=read.noise, generator=plan.generator, seed=plan.seed,
        step=_array(step), row_scale=_array(lsb / read.v_lsb), **more,
    )  # fmt: skip


@torch.library.custom_op("gpuxbar::analog_mvm", mutates_args=())
def analog_mvm(
    x: Tensor,
    weight: Tensor,
    g: Tensor,
    w_max: Tensor,
    bias: Tensor | None,
    dac_lsb: Tensor,
    adc_lsb: Tensor,
    back_adc_lsb: Tensor,
    step: Tensor,
    plan: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Read a layer's tiles: y float32, with the driven codes and the ADC gate that backward needs.

    Args:
        x: Inputs inside the DAC range, float32 [B, I] or images [N, channels, height, width].
        weight: The layer's weight; receives the gradient, its values are not used.
        g: Programmed conductances, float32 [S, G * I, O], S.
        w_max: Weight of a full pair, float32 [G * O].
        bias: Added digitally, float32 [G * O], or None.
        dac_lsb: Digital value of one DAC code, float32 [1] or [B or N].
        adc_lsb, back_adc_lsb: Current of one ADC step forwards and backwards, A, float32 [1] or per output.
        step: Read counter, int64 [1]; same value, same noise.
        plan: `mapping.ReadPlan` as JSON.
    """
    way = _plan(plan)
    v = _drive(x, dac_lsb, way.forward)
    y, gate = _read(
        v, g, dac_lsb, adc_lsb, step, way, way.forward, col_scale=_array(w_max * way.unit),
        bias=None if bias is None else _array(bias), conv=_geometry(way, tuple(weight.shape), tuple(x.shape)), want_gate=True,
    )  # fmt: skip
    return torch.from_numpy(y), v, torch.from_numpy(gate)


@analog_mvm.register_fake
def _(x, weight, g, w_max, bias, dac_lsb, adc_lsb, back_adc_lsb, step, plan):
    way = _plan(plan)
    conv = _geometry(way, tuple(weight.shape), tuple(x.shape))
    shape = (x.shape[0], w_max.shape[0]) if conv is None else (x.shape[0], w_max.shape[0], *conv.out)
    y = x.new_empty(shape, dtype=torch.float32)
    return y, torch.empty_like(x, dtype=torch.int16 if way.forward.code_max else x.dtype), torch.empty_like(y)


@torch.library.custom_op("gpuxbar::analog_mvm_transposed", mutates_args=())
def analog_mvm_transposed(
    grad_y: Tensor,
    weight: Tensor,
    g: Tensor,
    w_max: Tensor,
    adc_lsb: Tensor,
    step: Tensor,
    image: list[int],
    plan: str,
) -> Tensor:
    """The same array read backwards: gradient of the input, [B, I] or images of shape `image`."""
    way = _plan(plan)
    driven = grad_y * (w_max * way.unit).reshape(-1, *[1] * (grad_y.dim() - 2))
    read = way.backward
    lsb = _abs_max(driven) / max(read.code_max, 1)
    conv = _geometry(way, tuple(weight.shape), tuple(image)) if image else None
    return torch.from_numpy(
        _read(_drive(driven, lsb, read), g, lsb, adc_lsb, step, way, read, transposed=True, conv=conv)
    )


@analog_mvm_transposed.register_fake
def _(grad_y, weight, g, w_max, adc_lsb, step, image, plan):
    way = _plan(plan)
    shape = tuple(image) or (grad_y.shape[0], g.shape[1])
    del way
    return grad_y.new_empty(shape, dtype=torch.float32)


def _abs_max(x: Tensor) -> Tensor:
    """Largest magnitude, float32 [1]; tiny instead of 0, so that a zero input drives code 0."""
    return x.abs().amax().clamp_min(torch.finfo(torch.float32).tiny * 2**24).reshape(1)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, g, w_max, bias, dac_lsb, _, back_adc_lsb, step, plan = inputs
    _, v, gate = output
    ctx.save_for_backward(v, gate, weight, g, w_max, dac_lsb, back_adc_lsb, step)
    ctx.plan, ctx.image, ctx.has_bias = plan, list(x.shape) if x.dim() == 4 else [], bias is not None
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, _codes: Any, _gate: Any) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 10
    v, gate, weight, g, w_max, dac_lsb, back_adc_lsb, step = ctx.saved_tensors
    way = _plan(ctx.plan)
    grad_bias = grad_y.sum([0, *range(2, grad_y.dim())]) if ctx.has_bias else None
    gated = (grad_y * gate).contiguous()
    grad_x = grad_w = None
    if ctx.needs_input_grad[0]:
        grad_x = analog_mvm_transposed(gated, weight, g, w_max, back_adc_lsb, step, ctx.image, ctx.plan)
    if ctx.needs_input_grad[1]:
        x = v.to(gated.dtype) * dac_lsb.reshape(-1, *[1] * (v.dim() - 1))
        if ctx.image:
            grad_w = conv2d_weight(x, weight.shape, gated, way.stride, way.padding, way.dilation, way.groups)
        else:
            grad_w = gated.t() @ x
    return grad_x, grad_w, None, None, grad_bias, None, None, None, None, None


analog_mvm.register_autograd(_backward, setup_context=_setup)
