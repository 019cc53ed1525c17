"""`nn.Linear` and `nn.Conv2d` on crossbars: hardware-aware training with any torch optimiser."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gpuxbar.bridge.analog_mvm import analog_mvm
from gpuxbar.mapping import plan_reads
from gpuxbar.nn.in_situ import InSitu
from gpuxbar.reference import program
from gpuxbar.spec import CrossbarSpec

__all__ = ["AnalogConv2d", "AnalogLayer", "AnalogLinear"]


class AnalogLayer(InSitu):
    """What both layers share: programming once per weight version, counters of the draws, converter ranges.

    Buffers `read_step` and `write_step` count reads and weight versions; with the spec's seed they fix every
    random number, so a checkpoint resumes bit for bit.
    """

    weight: Tensor
    bias: Any  # Tensor or None, which nn.Linear and nn.Conv2d declare differently
    read_step: Tensor
    write_step: Tensor
    adc_lsb: Tensor
    back_adc_lsb: Tensor
    dac_max: Tensor

    def setup(self, spec: CrossbarSpec, name: str, groups: int) -> None:
        """Plan the reads and make the counters; `name` separates the draws of one model's layers."""
        if spec.mapping.scheme == "offset" or spec.read_noise.sigma_g or spec.adc.per == "column":
            raise ValueError(
                f"AnalogLayer: layer `{name}` must use a pair mapping, constant read noise and one ADC range per "
                "layer, the settings of this version; change mapping.scheme, read_noise.sigma_g or adc.per"
            )
        if spec.adc.gain_std or spec.adc.offset_std:
            raise ValueError(
                f"AnalogLayer: layer `{name}` must have adc.gain_std and adc.offset_std 0 in this version; "
                "ops.tile_mvm takes converter errors"
            )
        self.spec, self.name, self.groups_ = spec, name, groups
        self.inputs, self.outputs = self.weight[0].numel(), self.weight.shape[0] // groups
        seed = (spec.seed ^ zlib.crc32(name.encode()) << 31) & (2**63 - 1)
        self.plan, self.planes = plan_reads(
            spec, inputs=self.inputs, outputs=self.outputs, groups=groups, seed=seed
        )
        for counter in ("read_step", "write_step"):
            self.register_buffer(counter, torch.zeros(1, dtype=torch.int64))
        self.register_buffer("adc_lsb", self._adc_lsb(spec.adc, self.plan.forward))
        self.register_buffer("back_adc_lsb", self._adc_lsb(spec.backward_adc, self.plan.backward))
        self.register_buffer("dac_max", torch.full((1,), spec.dac.max or 0.0))
        self.setup_in_situ()
        self._programmed: tuple[Tensor, Tensor] | None = None
        self._programmed_version: int | None = None

    def _adc_lsb(self, adc: Any, read: Any) -> Tensor:
        """Range of the converters, A a code; NaN until calibrated."""
        if not read.adc_bits:
            return torch.ones(1)
        code_max = 2 ** (read.adc_bits - 1) - 1 if read.adc_signed else 2**read.adc_bits - 1
        full = {"fixed": adc.i_max, "calibrated": float("nan")}.get(
            adc.range, self.spec.dac.v_read * self.spec.device.g_max * (read.tile or self.inputs)
        )
        return torch.full((1,), full / code_max)

    def conductances(self) -> tuple[Tensor, Tensor]:
        """(g, w_max) of the present weights: programmed once per weight version, or trained in situ."""
        if self.in_situ:
            return self.cell_conductances()
        version = self.weight._version
        if self._programmed is None or version != self._programmed_version:
            weight = self.weight.detach().reshape(self.groups_, self.outputs, self.inputs)
            per_row = weight.reshape(self.groups_ * self.outputs, -1).abs().amax(1)
            top = per_row if self.spec.mapping.scale == "column" else per_row.amax().expand_as(per_row)
            w_max = top.clamp_min(1e-30).contiguous()
            if self._programmed_version is not None:
                self.write_step += 1
            settings, mapping, device = self.spec.programming, self.spec.mapping, self.spec.device
            g = program(
                weight.numpy(), w_max=w_max.numpy(), g_min=device.g_min, g_max=device.g_max, slices=mapping.slices,
                slice_bits=mapping.slice_bits, levels=device.levels, merge=self.planes.merge, seed=self.plan.seed,
                step=int(self.write_step), **settings.model_dump(),
            )  # fmt: skip
            self._programmed, self._programmed_version = (torch.from_numpy(g), w_max), version
        return self._programmed

    def _dac_lsb(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The input inside the DAC's range, and the value of one code, [1] or [len(x)]."""
        dac = self.spec.dac
        magnitude = x.detach().abs()
        if dac.range == "sample":
            top = magnitude.flatten(1).amax(1)
        elif dac.range == "tensor":
            top = magnitude.amax().reshape(1)
        else:
            if dac.range == "ema" and self.training:
                old = torch.where(self.dac_max > 0, self.dac_max, magnitude.amax())
                self.dac_max.copy_(dac.momentum * old + (1 - dac.momentum) * magnitude.amax())
            top = self.dac_max.clone()
            x = x.clamp(-top, top)
        if not dac.signed:
            x = x.clamp_min(0)
        return x, top.clamp_min(1e-30) / max(dac.code_max, 1)

    def read(self, x: Tensor, **geometry: Any) -> Tensor:
        if x.shape[0] == 0:
            raise ValueError(
                f"{self.name}: `x` must hold at least one sample, got shape {tuple(x.shape)}; skip empty batches"
            )
        if torch.isnan(self.adc_lsb).any():
            raise ValueError(
                f"{self.name}: the ADC range must be calibrated before use; call gpuxbar.calibrate(model, loader)"
            )
        x = x.float()
        g, w_max = self.conductances()
        x, lsb = self._dac_lsb(x)
        self.read_step += 1
        back = torch.where(torch.isnan(self.back_adc_lsb), self.adc_lsb, self.back_adc_lsb)
        plan = replace(self.plan, **geometry).dumps()
        step = self.read_step.clone()
        return analog_mvm(
            x.contiguous(), self.weight, g, w_max, self.bias, lsb, self.adc_lsb, back, step, plan
        )[0]


class AnalogLinear(nn.Linear, AnalogLayer):
    """`nn.Linear` read from crossbar tiles; `spec` describes them, `name` keys the layer's random numbers."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        spec: CrossbarSpec,
        name: str = "linear",
    ):
        super().__init__(in_features, out_features, bias)
        self.setup(spec, name, 1)

    def forward(self, input: Tensor) -> Tensor:
        flat = self.read(input.reshape(-1, input.shape[-1]))
        return flat.reshape(*input.shape[:-1], self.out_features)


class AnalogConv2d(nn.Conv2d, AnalogLayer):
    """`nn.Conv2d`, with every option of it, read from crossbar tiles."""

    def __init__(self, *args: Any, spec: CrossbarSpec, name: str = "conv", **options: Any):
        super().__init__(*args, **options)
        self.setup(spec, name, self.groups)

    def forward(self, input: Tensor) -> Tensor:
        x, padding = input, self.padding
        if self.padding_mode != "zeros":
            x, padding = (
                functional.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode),
                (0, 0),
            )
        elif isinstance(padding, str):
            x, padding = functional.pad(x, self._reversed_padding_repeated_twice), (0, 0)
        batch = x if x.dim() == 4 else x[None]
        y = self.read(batch, stride=self.stride, padding=padding, dilation=self.dilation)
        return y if x.dim() == 4 else y[0]
