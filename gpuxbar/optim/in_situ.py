"""Stochastic gradient descent on the conductances themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpuxbar.nn.in_situ import InSitu, layer_of
from gpuxbar.nn.layers import AnalogLayer
from gpuxbar.optim.base import InSituOptimizer

__all__ = ["InSituSGD"]


class InSituSGD(InSituOptimizer):
    """SGD whose steps of crossbar weights go through the device's law.

    A weight of a crossbar layer changes by what `spec.update` makes of the wanted change -lr * step, and is then
    read out of its conductances; biases and parameters of digital layers change by -lr * step. Momentum is kept
    digitally for both: step = momentum * step + grad.

    Layers begin in-situ training here unless they have begun (see `InSitu.begin_in_situ`): their weights are programmed onto
    pairs of other conductances, so "calibrated" ADC ranges must be calibrated afterwards. Currents grow with the weights from
    then on; calibrate from time to time, each epoch, say. A layer that begins with zeros needs `mapping.w_max`, and its currents
    grow from nothing: a rule `{"lora_B": {"mapping": {"w_max": 0.1}, "adc": {"range": "worst_case"}}}` gives it both.

    A layer whose spec has `pulses`, or a carry of scheme "streamed", is updated by products in its array of the inputs and
    errors of its backward passes since the last step, of those that reach its weight. The weight gets no gradient, and one of
    another use of it, as in a tied embedding or a penalty, is refused. `zero_grad` of this optimiser forgets the operands; that of a
    module does not, nor does clipping gradients reach them. A `GradScaler` may scale the loss; its `unscale_`, which reaches
    gradients alone, is refused.

    Args:
        params: Parameters or groups, as for any torch optimiser.
        lr: Learning rate, above 0.
        momentum: At least 0, below 1.

    Raises:
        ValueError: No parameter is a crossbar layer's, the spec of one has no update law, or a setting is out of range.

    Source:
        Agarwal et al., IJCNN 2016.
    """

    grad_scale: Any  # of a `GradScaler`, and there only while it steps; so is found_inf
    found_inf: Any

    def __init__(self, params: Any, lr: float, momentum: float = 0.0):
        super().__init__(params, lr=lr, momentum=momentum)

    def _check(self, layer: InSitu, group: dict[str, Any]) -> None:
        layer.require_law()
        if layer.spec.updates_in_array and group["momentum"]:
            by, without = (
                ("pulse trains", "set pulses=None")
                if layer.spec.pulses is not None
                else ("bit streams", "set carry.scheme='accumulate'")
            )
            raise ValueError(
                f"InSituSGD: `momentum` must be 0 for layers with {by}, got {group['momentum']} for {layer.name}; "
                f"leave it out, or {without}"
            )

    def _write(self, layer: AnalogLayer, weight: Tensor, group: dict[str, Any]) -> None:
        if layer.keeps_operands:
            layer.update_in_array(group["lr"] / getattr(self, "grad_scale", 1.0))
        else:
            layer.change_cells(self._velocity(weight, group["momentum"]), -group["lr"])

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether `step` itself undoes what a `GradScaler` did, which asks before it looks for gradients that are not finite: it
        finds the errors of layers that make none."""
        layers = [layer for layer in self._layers() if layer.keeps_operands]
        for layer in layers:
            if not layer.streams.pairs:
                continue
            looked_at = layer.streams.finite(layer.weight)
            if layer.weight.grad is None:
                layer.weight.grad = looked_at
            else:  # of zeros, as `DistributedDataParallel` makes them, or one that `step` will refuse
                layer.weight.grad += looked_at
        return bool(layers)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update what has a gradient, or whose layer kept inputs and errors; returns the loss of `closure`, if given."""
        for layer in self._layers():
            grad = layer.weight.grad
            if layer.keeps_operands and grad is not None and grad.is_sparse and not grad.dense_dim():
                layer.weight.grad = None  # of `Streams.finite`; those of an embedding are dense in rows
        if hasattr(self, "found_inf"):
            if self.grad_scale is None:
                raise ValueError(
                    "InSituSGD: `scaler.unscale_` must not be called with pulse trains or bit streams, whose errors it does not "
                    "reach; leave it out, `scaler.step` unscales"
                )
            if self.found_inf:
                self._forget_streams()
                return None
            self.grad_scale = float(self.grad_scale)
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad /= self.grad_scale
        return super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._forget_streams()

    def _layers(self) -> list[InSitu]:
        found = (layer_of(parameter) for group in self.param_groups for parameter in group["params"])
        return [layer for layer in found if layer is not None]

    def _forget_streams(self) -> None:
        for layer in self._layers():
            layer.streams.forget()
