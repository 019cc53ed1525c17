"""Stochastic gradient descent on the conductances themselves."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from gpuxbar.nn.in_situ import InSitu, layer_of
from gpuxbar.nn.layers import AnalogLayer
from gpuxbar.optim.base import LR, MOMENTUM, InSituOptimizer, Rule

__all__ = ["InSituSGD"]


class InSituSGD(InSituOptimizer):
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

    rules: ClassVar[dict[str, Rule]] = {"lr": LR, "momentum": MOMENTUM}

    def __init__(self, params: Any, lr: float, momentum: float = 0.0):
        super().__init__(params, lr=lr, momentum=momentum)

    def _check(self, layer: InSitu, group: dict[str, Any]) -> None:
        layer.require_law()
        if layer.spec.pulses is not None and group["momentum"]:
            raise ValueError(
                f"InSituSGD: `momentum` must be 0 for layers with pulse trains, got {group['momentum']} for {layer.name}; "
                "leave it out, or set pulses=None"
            )

    def _write(self, layer: AnalogLayer, weight: Tensor, group: dict[str, Any]) -> None:
        if layer.pulsed:
            layer.update_pulses(group["lr"])
        else:
            layer.update_cells(-group["lr"] * self._velocity(weight, group["momentum"]))

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            for layer in map(layer_of, group["params"]):
                if layer is not None:
                    layer.streams.take()
