"""Stochastic gradient descent on the conductances themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpuxbar.nn.in_situ import layer_of

__all__ = ["InSituSGD"]


class InSituSGD(torch.optim.Optimizer):
    """SGD whose steps of crossbar weights go through the device's law.

    A weight of a crossbar layer changes by what `spec.update` makes of the wanted change -lr * step, and is then
    read out of its conductances; biases and parameters of digital layers change by -lr * step. Momentum is kept
    digitally for both: step = momentum * step + grad.

    Layers begin in-situ training here unless they have begun (see `InSitu.begin_in_situ`). Currents grow with the
    weights from then on: ADC ranges calibrated before leave room for `mapping.headroom`, ranges calibrated from time
    to time (each epoch, say) give better resolution.

    A layer whose spec has `pulses` is pulsed for the inputs and errors of its backward passes since the last step; its
    weight gets no gradient, and the loss must not be scaled. `zero_grad` of this optimiser forgets them.

    Args:
        params: Parameters or groups, as for any torch optimiser.
        lr: Learning rate, above 0.
        momentum: At least 0, below 1.

    Raises:
        ValueError: A crossbar layer's spec has no update law, or a setting is out of range.

    Source:
        Agarwal et al., IJCNN 2016.
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if not group["lr"] > 0:
            raise ValueError(f"InSituSGD: `lr` must be above 0, got {group['lr']}; try 0.05")
        if not 0 <= group["momentum"] < 1:
            raise ValueError(
                f"InSituSGD: `momentum` must be at least 0 and below 1, got {group['momentum']}; try 0.9"
            )
        layers = [layer for layer in map(layer_of, group["params"]) if layer is not None]
        for layer in layers:
            layer.require_law()
            if layer.spec.pulses is not None and group["momentum"]:
                raise ValueError(
                    f"InSituSGD: `momentum` must be 0 for layers with pulse trains, got {group['momentum']} for {layer.name}; "
                    "leave it out, or set pulses=None"
                )
        for layer in layers:
            if not layer.in_situ:
                layer.begin_in_situ()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns the loss of `closure`, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                layer = layer_of(parameter)
                if layer is not None and layer.pulsed:
                    layer.update_pulses(group["lr"])
                elif parameter.grad is not None:
                    change = self._step_of(parameter, group["momentum"]) * -group["lr"]
                    if layer is None:
                        parameter += change
                    else:
                        layer.update_cells(change)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            for layer in map(layer_of, group["params"]):
                if layer is not None:
                    layer.streams.take()

    def _step_of(self, parameter: Tensor, momentum: float) -> Tensor:
        assert parameter.grad is not None
        if not momentum:
            return parameter.grad
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = parameter.grad.clone()
        else:
            state["momentum"].mul_(momentum).add_(parameter.grad)
        velocity: Tensor = state["momentum"]
        return velocity
