"""All steps of an LSTM's layer on the CPU as one function: what single steps do, without operators and a graph for each.

Gradient: that of `analog_mvm` for every step, the transposed reads one after another; the weight's is one product of all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpuxbar.bridge.analog_mvm import NOT_PACKED, analog_mvm, analog_mvm_transposed
from gpuxbar.bridge.host import Held
from gpuxbar.bridge.lstm_gates import lstm_gates, lstm_gates_gradient
from gpuxbar.bridge.operator import once
from gpuxbar.bridge.outer_product import weight_gradient

__all__ = ["lstm_sequence"]

Arrays = tuple[Tensor | None, ...]


def lstm_sequence(
    x: Tensor, h: Tensor, c: Tensor, weight: Tensor, bias: Tensor | None, cells: Arrays, converters: Arrays, steps: Tensor,
    plan: str, order: range,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Step an LSTM through a sequence; the DAC follows the values of each state.

    Args:
        x: Products of the inputs, float32 [T, N, 4 H].
        h, c: First state, float32 [N, H].
        weight: The layer's of the state; receives the gradient, its values are not used.
        bias: Added to its products, float32 [4 H], or None.
        cells: `g`, `back_g`, `noise_var` and `w_max` of `analog_mvm`.
        converters: `adc_range`, `back_adc_range`, `adc_error`, `back_adc_error`, `dac_error` and `back_dac_error` of it.
        steps: Read counters in the order of the steps, int64 [T].
        plan: The layer's reads, a `mapping.ReadPlan` as JSON.
        order: Of the inputs.

    Returns:
        Outputs, float32 [T, N, H], and the last state (h, c).
    """
    settings = cells, converters, steps, plan, order, torch.is_grad_enabled()
    found: tuple[Tensor, Tensor, Tensor] = _Sequence.apply(x, h, c, weight, bias, *settings)  # type: ignore[no-untyped-call]
    return found


class _Sequence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h: Tensor, c: Tensor, weight: Tensor, bias: Tensor | None, cells: Arrays, converters: Arrays,
        steps: Tensor, plan: str, order: range, keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        outputs, kept = x.new_empty(*x.shape[:2], h.shape[1]), []
        ctx.steps, ctx.plan, ctx.order, ctx.has_bias = steps.split(1), plan, order, bias is not None
        for t, step in zip(order, ctx.steps, strict=True):
            y, v, gate, lsb, _ = analog_mvm.plain(
                h, weight, *cells, bias, None, *converters, step, 0, *NOT_PACKED, plan, keep
            )
            before = c
            h, c, gates = lstm_gates.plain(x[t], y, before)
            outputs[t] = h
            kept += [v, lsb, gate, gates, before] if keep else []
        g, back_g, noise_var, w_max = cells
        held = g if back_g is None else back_g, noise_var, w_max, *converters[1::2]
        # A change of the weight, which alone changes g and w_max, is caught here.
        ctx.save_for_backward(weight, *held, *kept)
        return outputs, h, c

    @staticmethod
    @once
    def backward(ctx: Any, grad_outputs: Tensor, grad_h: Tensor, grad_c: Tensor) -> tuple[Any, ...]:
        weight, *saved = ctx.saved_tensors
        held, kept = saved[: len(Held._fields)], saved[len(Held._fields) :]
        codes, units, gates_of_adc, gates, cells = (kept[k::5] for k in range(5))
        grad_x = grad_outputs.new_empty(*grad_outputs.shape[:2], len(weight))
        gated = torch.empty_like(grad_x) if gates_of_adc[0].numel() else grad_x
        for k in reversed(range(len(ctx.order))):
            t = ctx.order[k]
            grad_x[t], grad_c = lstm_gates_gradient.plain(
                grad_h + grad_outputs[t], grad_c, gates[k], cells[k]
            )
            if gated is not grad_x:
                torch.mul(grad_x[t], gates_of_adc[k], out=gated[t])
            if k or ctx.needs_input_grad[1]:
                grad_h = analog_mvm_transposed.plain(gated[t], weight, *held, ctx.steps[k], [], ctx.plan)
        grad_w = None
        if ctx.needs_input_grad[3]:
            d = gated[list(ctx.order)] if ctx.order.step < 0 else gated  # in the order of the codes
            units = [unit.expand(grad_x.shape[1]) for unit in units]
            grad_w = weight_gradient(d.flatten(0, 1), torch.cat(codes), torch.cat(units))
        grad_bias = grad_x.sum((0, 1)) if ctx.has_bias else None
        return grad_x, grad_h, grad_c, grad_w, grad_bias, *(None,) * 6
