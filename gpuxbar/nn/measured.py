"""Measured devices in the place of those that a layer's seed draws or its weight was written to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpuxbar.bridge.wires import merged
from gpuxbar.nn.in_situ import InSitu

__all__ = ["Measured"]

LARGEST = 10  # times g_max, which no measured device exceeds but in another unit
HALVES = 3  # times the largest conductance that a plane is meant to hold, which half precisions hold without overflow


class Measured(InSitu):
    """What puts measured devices into a crossbar layer."""

    @torch.inference_mode(False)  # whose tensors nothing could train elsewhere
    def set_device_map(self, devices: Any) -> None:
        """Train measured devices in place of those that the seed draws, from the next update on; `set_conductances` gives them
        measured conductances. The fast array of Tiki-Taka and AGAD, `optimizer.parts[layer.weight].array`, has both for its own.

        Args:
            devices: A map for the layer's law, float16 [K, 2 slices, G * I, O], NumPy array or tensor: see `ops.device_map`;
                wordlines in the order of `mapping.line_order`. It joins the state dict. None: the seed's devices again. A
                captured step keeps the map it was captured with.
        """
        self.require_law()
        shape = self.map_shape()
        found = None if devices is None else self._tensor_of("devices", devices)
        if found is not None and (found.dtype != torch.float16 or found.shape != shape):
            raise ValueError(
                f"{self.name}: `devices` must be float16 {shape} for this layer and its law, got {found.dtype} "
                f"{tuple(found.shape)}; make it by ops.device_map, positive devices first"
            )
        self.device_map = None if found is None else found.to(self.weight.device).contiguous()

    @torch.inference_mode(False)  # whose tensors nothing could train elsewhere
    @torch.no_grad()
    def set_conductances(self, g: Any) -> None:
        """Read measured devices from now on, in place of those that were written.

        Cells trained in situ go on from them, and the weight becomes what they read. A layer that `gpuxbar.program` has written
        keeps its weight, and reads them as they are at age 0; later with the drift and 1/f noise of `spec.drift`. A pair weighs
        (g_pos - g_neg) / (g_max - g_min) of `w_max`, in situ, or of `w_programmed`; `mapping.w_max` sets both. ADC ranges stay:
        calibrate anew where currents are others.

        Args:
            g: Conductances of the devices alone, without wires, [2 slices, G * I, O], S; NumPy array or tensor; positive devices
                first, least significant slice first, wordlines in the order of `mapping.line_order`. Of an offset mapping one
                plane, with reference lines behind those of each group: a wordline for every row tile, a bitline for every column
                tile. They may lie outside the window, but not below 0.

        Raises:
            TypeError: `g` is no array of real numbers.
            ValueError: The layer reads its weight, is trained in situ and programmed, or has a precision of "int8"; its levels fit
                an ADC's steps, so that it was converted without one (any `programming.write_noise` keeps it); its weight is
                computed of other parameters; `g` has another shape, is below 0, above 10 times `device.g_max` or not finite, or
                overflows "fp16" or "fp16x2".
        """
        if self.in_situ:
            self.require_unprogrammed("g")
            self.require_own_weight("set_conductances")
        here = self.g_cells if self.in_situ else self.g_programmed
        if here is None:
            raise ValueError(
                f"{self.name}: `set_conductances` must follow gpuxbar.program or begin_in_situ(), got a layer that reads its weight; program "
                "the model, or build its in-situ optimiser, first"
            )
        if self.spec.precision == "int8":
            raise ValueError(
                f"{self.name}: `precision` must hold conductances between levels for measured ones, got 'int8'; choose fp16 or fp16x2"
            )
        ways = (self.spec.adc, self.plan.forward), (self.spec.backward_adc, self.plan.backward)
        if any(adc.bits and not (read.adc_bits or read.ideal) for adc, read in ways):
            raise ValueError(
                f"{self.name}: `programming.write_noise` must be above 0 S for measured conductances, got 0, with which an ADC whose "
                "steps the levels fit is left out; give some before gpuxbar.convert, of which 1e-15 S are enough"
            )
        found = self._tensor_of("g", g).to(here.device, torch.float32)
        if found.shape != here.shape:
            raise ValueError(
                f"{self.name}: `g` must be {tuple(here.shape)} for this layer, got {tuple(found.shape)}; give all planes, positive devices "
                "first, by wordline and bitline"
            )
        most = LARGEST * self.spec.device.g_max
        if not bool(((found >= 0) & (found <= most)).all()):
            raise ValueError(
                f"{self.name}: `g` must be 0 to {most:g} S, {LARGEST} times device.g_max, got {found.min():g} to "
                f"{found.max():g} S; give it in S"
            )
        base = 2 ** (self.spec.mapping.slice_bits or 0)
        plane = found if self.planes.merge == "offset" else merged(found, self.planes.merge, base)
        if self.spec.precision in ("fp16", "fp16x2") and plane.abs().max() > HALVES * self.plan.g_range:
            raise ValueError(
                f"{self.name}: `precision` must hold the measured conductances, got {self.spec.precision!r}, which holds up to "
                f"{HALVES * self.plan.g_range:g} S in a plane, for {plane.abs().max():g} S; choose fp32, tf32 or bf16"
            )
        here.copy_(found)
        if not self.in_situ:
            assert self.measured is not None
            self.measured.fill_(True)
            self.look_after(0.0)
            return
        if self.g_held is not None:
            self.g_held.copy_(found)
        self.restart_wires()
        self._move(torch.zeros_like(self.weight))

    def _tensor_of(self, argument: str, values: Any) -> Tensor:
        """A tensor of measured values."""
        try:
            found = torch.as_tensor(values, device=None if isinstance(values, Tensor) else self.weight.device)
        except (TypeError, ValueError, RuntimeError):  # of text, say, or rows of several lengths
            got = type(values).__name__
        else:
            if found.layout is torch.strided and not (found.is_complex() or found.is_meta):
                return found
            got = f"one of {found.dtype}, {found.layout}, on {found.device}"
        raise TypeError(
            f"{self.name}: `{argument}` must be a NumPy array or a dense tensor of real numbers, got {got}; convert it"
        )
