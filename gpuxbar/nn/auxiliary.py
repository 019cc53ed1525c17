"""A second array beside a layer's own, which in-situ algorithms write gradients to, or pulse, and read line by line."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpuxbar.bridge.passes import repeated
from gpuxbar.nn.analog_layer import AnalogLayer
from gpuxbar.nn.in_situ import InSitu
from gpuxbar.ops.pairs import Slices
from gpuxbar.spec import CrossbarSpec

__all__ = ["AuxiliaryArray", "pulse_weight"]

WITHOUT_STEPS = 1000  # pulses over the window of a device whose law has no steps


class AuxiliaryArray(AnalogLayer):
    """Pairs of devices of a layer's spec, one for each of its weights, sliced ones too; they start in mid-window, or where
    references lie, and so read 0, and a full one weighs as much as a full weight of the layer.

    Devices, wires and converters are those of the layer's spec, drawn from a seed of their own. A read drives one
    wordline fully, so the range of the ADC, unless it is fixed, is the current of one cell at g_max; offsets of DACs drive the
    others, and are to be small beside it.

    Buffers beside those of a layer in situ: `reference`, float32 [G * O, I], subtracted from what is read.
    """

    reference: Tensor

    def __init__(self, layer: AnalogLayer, part: str):
        super().__init__()
        assert layer.w_max is not None
        self.weight = nn.Parameter(
            torch.zeros(
                layer.groups_ * layer.outputs, layer.inputs, dtype=torch.float32, device=layer.weight.device
            ),
            requires_grad=False,
        )
        self.bias = None
        self.setup(_line_read(layer.spec), f"{layer.name}.{part}", layer.groups_)
        self.patch = layer.patch  # it is driven by the layer's images, and read line by line
        self.start_cells(
            torch.zeros_like(self.weight).view(self.groups_, self.outputs, -1), layer.w_max.clone()
        )
        self.register_buffer("reference", torch.zeros_like(self.weight.detach()))

    @torch.no_grad()
    def shift_zero(self, pairs: int) -> None:
        """Lead every device to its symmetry point by `pairs` of up and down trains, of 64, 16, 4 and 1 pulses each.

        What the array reads there is its zero from now on.

        Source: Kim et al., "Zero-shifting technique for deep neural network training on resistive cross-point arrays", 2019.
        """
        pulse = pulse_weight(self).expand(-1, -1, self.inputs).reshape(self.weight.shape)
        for pulses in (64, 16, 4, 1):
            for _ in range(pairs):
                self.update_cells(pulses * pulse)
                self.update_cells(-pulses * pulse)
        self.reference.copy_(self.weight)

    def driven(self, lines: Tensor) -> Tensor:
        """Inputs that drive some wordlines, one after the other, in every group at once: int64 [n] to float32 [n, G * I]."""
        driven = torch.arange(self.inputs, device=lines.device) == lines[:, None]
        return driven.float().repeat(1, self.groups_)

    @torch.no_grad()
    def read_lines(self, lines: Tensor) -> Tensor:
        """Weights of some wordlines, read as `driven`: int64 [n] to float32 [G, O, n]."""
        with repeated():  # of an optimiser that may step within a backward pass
            y = self.read(self.driven(lines)).view(len(lines), self.groups_, self.outputs).permute(1, 2, 0)
        return y - self.reference.view(self.groups_, self.outputs, -1)[..., lines]


def pulse_weight(layer: InSitu) -> Tensor:
    """Weight change of one nominal pulse on a pair, of a sliced weight on its lowest one, float32 [G, O, 1].

    A law without steps counts 1,000 to the window.
    """
    assert layer.w_max is not None
    law = layer.spec.update
    assert law is not None
    pulses = law.nominal_pulses or WITHOUT_STEPS
    sides = 2 if law.sides == "both" else 1
    mapping = layer.spec.mapping
    lowest = Slices.of(mapping.slices, mapping.slice_bits, layer.spec.carry).lowest_share
    return (layer.w_max * (lowest * sides / pulses)).view(layer.groups_, -1, 1)


def _line_read(spec: CrossbarSpec) -> CrossbarSpec:
    adc = spec.adc.model_dump()
    if spec.adc.range != "fixed":
        adc |= {"range": "fixed", "i_max": spec.dac.v_read * spec.device.g_max}
    return spec.with_overrides(
        {
            "dac": {"range": "tensor", "max": None},
            "adc": adc,
            "mapping": {"slices": 1, "slice_bits": None},
            "carry": None,
            "backward": {"mode": "ideal", "dac": None, "adc": None},
        }
    )
