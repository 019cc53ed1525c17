"""Stochastic gradient descent on the conductances themselves."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

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

    def _write(self, layer: AnalogLayer, weight: Tensor, group: dict[str, Any]) -> None:
        layer.update_cells(-group["lr"] * self._velocity(weight, group["momentum"]))
