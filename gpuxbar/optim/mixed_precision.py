"""Gradients accumulated digitally, and written as whole pulses."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gpuxbar.nn.analog_layer import AnalogLayer
from gpuxbar.nn.auxiliary import pulse_weight
from gpuxbar.optim.base import COUNT, LR, MOMENTUM, InSituOptimizer, Rule

__all__ = ["MixedPrecision"]


class Accumulator(nn.Module):
    """Changes that wait to be written, in pulses, float32 [G, O, I]; `steps` since the start."""

    waiting: Tensor

    def __init__(self, layer: AnalogLayer):
        super().__init__()
        shape = (layer.groups_, layer.outputs, layer.inputs)
        self.register_buffer("waiting", torch.zeros(shape, dtype=torch.float32, device=layer.weight.device))
        self.steps = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"steps": self.steps}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]


class MixedPrecision(InSituOptimizer):
    """SGD whose changes of crossbar weights add up in a digital accumulator, which is written in whole pulses.

    chi <- chi - lr step / pulse,  n = trunc(chi) every `transfer_every` steps,  chi <- chi - n,  write n pulses

    with step = momentum * step + grad as in `InSituSGD`. Opposite changes cancel before they are written, so the
    devices see few pulses, and asymmetric or coarse steps do little harm; the price is a digital memory of the size of the
    weights. A pulse counts as a nominal step (f = 1 of `spec.laws`), and 1,000 to the window for a law without steps. Of a
    sliced weight, pulses are those of its lowest slice, the least change that it can make; what is written goes to the slices as
    `spec.Carry` says. A layer with pulse trains, which make no gradient that could be added up, is refused.

    Args:
        params, lr, momentum: As for `InSituSGD`.
        transfer_every: Steps between writes, at least 1.

    Source:
        Nandakumar et al., "Mixed-precision deep learning based on computational memory", Frontiers in Neuroscience 2020.
    """

    rules: ClassVar[dict[str, Rule]] = {
        "lr": LR,
        "momentum": MOMENTUM,
        "transfer_every": COUNT,
    }

    def __init__(self, params: Any, lr: float, momentum: float = 0.0, transfer_every: int = 1):
        super().__init__(params, lr=lr, momentum=momentum, transfer_every=transfer_every)

    def _begin(self, layer: AnalogLayer, group: dict[str, Any]) -> nn.Module:
        return Accumulator(layer)

    def _write(self, layer: AnalogLayer, weight: Tensor, group: dict[str, Any]) -> None:
        part = self.parts[weight]
        assert isinstance(part, Accumulator)
        pulse = pulse_weight(layer)
        velocity = layer.by_line(self._velocity(weight, group["momentum"]))
        part.waiting -= group["lr"] * velocity / pulse
        part.steps += 1
        if part.steps % group["transfer_every"] == 0:
            pulses = part.waiting.trunc()
            part.waiting -= pulses
            layer.change_cells(layer.of_lines(pulses * pulse))
