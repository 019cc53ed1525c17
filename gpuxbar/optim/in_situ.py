"""Stochastic gradient descent on the conductances themselves."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from gpuxbar.nn.analog_layer import AnalogLayer
from gpuxbar.nn.in_situ import InSitu
from gpuxbar.optim.base import InSituOptimizer

__all__ = ["InSituSGD"]


class InSituSGD(InSituOptimizer):
    """SGD whose steps of crossbar weights go through the device's law.

    A weight of a crossbar layer changes by what `spec.update` makes of the wanted change -lr * step, and is then
    read out of its conductances; biases and parameters of digital layers change by -lr * step. Momentum is kept
    digitally for both: step = momentum * step + grad.

    Layers begin in-situ training here unless they have begun (see `InSitu.begin_in_situ`): their weights are programmed onto
    pairs of other conductances, so "calibrated" ADC ranges must be calibrated afterwards. Currents grow with the weights from
    then on: calibrate anew as `gpuxbar.calibrate` says. A layer that begins with zeros needs `mapping.w_max`, and its currents
    grow from nothing: a rule `{"lora_B": {"mapping": {"w_max": 0.1}, "adc": {"range": "worst_case"}}}` gives it both.

    Pulse trains and bit streams (see `InSituOptimizer`) multiply in the layer's own array; they go without momentum.

    Args:
        params: Parameters or groups, as for any torch optimiser.
        lr: Learning rate, above 0.
        momentum: At least 0, below 1.

    Raises:
        ValueError: No parameter is a crossbar layer's, the spec of one has no update law, or a setting is out of range.

    Source:
        Agarwal et al., IJCNN 2016.
    """

    in_array: ClassVar[tuple[str, ...]] = ("pulses", "streamed")

    def __init__(self, params: Any, lr: float, momentum: float = 0.0):
        super().__init__(params, lr=lr, momentum=momentum)

    def _check(self, layer: InSitu, group: dict[str, Any]) -> None:
        super()._check(layer, group)
        if layer.spec.updates_in_array and group["momentum"]:
            by, without = (
                ("pulse trains", "set pulses=None")
                if layer.spec.pulses is not None
                else ("bit streams", "set carry.scheme='accumulate'")
            )
            raise ValueError(
                f"InSituSGD: `momentum` must be 0 for layers with {by}, got {group['momentum']} for {layer.name}; "
                f"set it to 0, or {without}"
            )

    def _write(self, layer: AnalogLayer, weight: Tensor, group: dict[str, Any]) -> None:
        if layer.keeps_operands:
            layer.change_in_array(*layer.take_operands(), group["lr"])
        else:
            layer.change_cells(self._velocity(weight, group["momentum"]), -group["lr"])
