"""The converters around a crossbar layer's arrays: their errors and ranges, and what these clip."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gpuxbar.bridge.analog_mvm import abs_max
from gpuxbar.bridge.dac_clip import as_finite, dac_clip
from gpuxbar.bridge.operator import call
from gpuxbar.mapping import full_current, worst_current
from gpuxbar.mapping.plan import Read
from gpuxbar.nn.measured import Measured
from gpuxbar.nn.wires import settings_checksum
from gpuxbar.reference import SMALLEST_RANGE, Drivers, Purpose, normals
from gpuxbar.spec import ADC, DAC, CrossbarSpec
from gpuxbar.spec.converters import ERRORS

__all__ = ["CONVERTERS", "Converter", "Converters"]

# buffers
CONVERTERS = "adc_range", "back_adc_range", "adc_error", "back_adc_error", "dac_error", "back_dac_error"
OUTGROWN = 0.2  # of a layer's conversions clip, beside those that its calibration left outside
SETTLED = 64  # reads after which that is looked at: some clip while training begins, and soon no more
BOUNDED = "fixed", "ema", "learned"  # DAC ranges that values may exceed
DRIVEN = {"signed", "stream_bits", "polarity", "v_read"}  # what currents follow from, of a DAC,
WINDOW = {"g_min", "g_max", "levels"}  # of devices,
CARRYING: Any = {"tile": True, "device": WINDOW, "mapping": True, "carry": {"headroom_bits"}}  # and of a spec


class Converter(NamedTuple):
    """The ADCs of one direction: current of the largest code, the read they convert, their settings, and the largest current, A."""

    full: Tensor
    read: Read
    adc: ADC
    worst: float

    @property
    def calibrated(self) -> bool:
        """Whether its range is that of `calibrate`, not the spec's."""
        return bool(self.read.adc_bits) and self.adc.range == "calibrated"


class Converters(Measured):
    """The part of a crossbar layer that drives its lines and converts their currents.

    Buffers of the state dict: `adc_range` and `back_adc_range` are the currents of an ADC's largest code forwards and backwards, A,
    NaN until calibrated, 0 where nothing is converted; `range_settings`, int64 [1], is a checksum of the settings by which lines
    carry currents: calibrated ranges of a checkpoint of others are forgotten. `dac_max` is the DAC's range where it is fixed,
    running or learned: a parameter where learned, NaN until it begins, whose magnitude counts.
    """

    adc_range: Tensor
    back_adc_range: Tensor
    range_settings: Tensor
    dac_max: Tensor
    adc_error: Tensor | None
    back_adc_error: Tensor | None
    dac_error: Tensor | None
    back_dac_error: Tensor | None

    def setup_converters(self, sensed: tuple[int, int]) -> None:
        """Draw their errors and begin their ranges; `sensed`: lines that a read forwards and one backwards convert."""
        spec, device = self.spec, self.weight.device
        ways = (
            ("", spec.dac, spec.adc, self.plan.forward, self.inputs, sensed[0]),
            ("back_", spec.backward_dac, spec.backward_adc, self.plan.backward, self.outputs, sensed[1]),
        )
        self.worst: tuple[float, ...] = ()  # currents of both, A
        for way, dac, adc, read, lines, size in ways:
            dac_error = self._dac_errors(way, dac, lines) if read.dac_flawed else None
            adc_error = self._converter_errors(way, adc, read, lines, size) if adc.flawed else None
            for name, error in (("dac_error", dac_error), ("adc_error", adc_error)):
                self.register_buffer(
                    f"{way}{name}", None if error is None else error.to(device), persistent=False
                )
            self.worst += (self._worst_current(read, lines, dac_error),)
            full = full_current(adc, self.worst[-1]) if read.adc_bits else 0.0
            count = size if adc.per == "column" else 1
            self.register_buffer(
                f"{way}adc_range", torch.full((count,), full, dtype=torch.float32, device=device)
            )
        settings = torch.tensor([_carrying(spec)], device=device)
        self.register_buffer("range_settings", settings)
        dac_max = torch.full((1,), spec.dac.max or 0.0, dtype=torch.float32, device=device)
        if spec.dac.range == "learned":
            self.dac_max = nn.Parameter(dac_max if spec.dac.max else dac_max.fill_(torch.nan))
        else:
            self.register_buffer("dac_max", dac_max)
        # of training with the ranges of now; in a list, for nn.Module sets attributes slowly
        self._reads = [0]
        self.look_at_ranges()

    def _converter_errors(self, way: str, adc: ADC, read: Read, lines: int, sensed: int) -> Tensor:
        """Gain, offset in A and, where there is any, non-linearity in steps of every converter, float32 [2 or 3, S, tiles, sensed];
        drawn once per seed."""
        planes, tiles = len(self.plan.slice_scale), -(-lines // (read.tile or lines))
        back = int(way == "back_")

        def drawn(purpose: Purpose, row: int, mean: float, std: float) -> Tensor:
            where: dict[str, Any] = {"purpose": purpose, "seed": self.plan.seed}
            z = [normals(np.array([row]), sensed, slot=slot, **where) for slot in range(planes * tiles)]
            return mean + std * torch.from_numpy(np.concatenate(z)).float().view(planes, tiles, sensed)

        errors = [
            drawn(Purpose.ADC_GAIN, back, 1.0, adc.gain_std),
            drawn(Purpose.ADC_OFFSET, back, 0.0, adc.offset_std),
        ]
        if adc.inl or adc.inl_std:
            inl = drawn(Purpose.ADC_GAIN, 2 + back, adc.inl, adc.inl_std)
            errors.append(inl.clamp(-adc.inl_most, adc.inl_most))
        return torch.stack(errors)

    def _dac_errors(self, way: str, dac: DAC, lines: int) -> Tensor:
        """Gain, offset in V and non-linearity in steps of the DAC of every line, float32 [3, lines]; drawn once per seed."""
        rows = np.arange(4, 7) + (3 if way == "back_" else 0)
        z = normals(rows, self.groups_ * lines, slot=0, purpose=Purpose.ADC_GAIN, seed=self.plan.seed)
        std = np.array([[dac.gain_std], [dac.offset_std], [dac.inl_std]])
        error = np.array([[1.0], [0.0], [dac.inl]]) + std * z
        error[2] = error[2].clip(-dac.inl_most, dac.inl_most)
        return torch.from_numpy(error).float()

    def _worst_current(self, read: Read, lines: int, error: Tensor | None) -> float:
        """Current of a line with every cell at `g_max` and every input what its DAC drives most with, A."""
        if error is None:
            return worst_current(read, self.spec, lines)
        most = round(read.v_max / read.v_lsb)
        least = 0 if read.phases == 2 or not read.signed else -most
        digits = torch.arange(least, most + 1, dtype=error.dtype, device=error.device)
        drivers = Drivers(read.v_max, error.unsqueeze(1), read.v_sinh)
        volts = drivers.driven(digits[:, None], read.v_lsb).abs().amax(0).view(self.groups_, lines)
        of_tiles = [part.sum(1).max() for part in volts.split(read.tile or lines, 1)]
        return float(max(of_tiles)) * self.spec.device.g_max

    def drivers(self, backward: bool) -> Drivers | None:
        """What lines are driven with; None: the digits."""
        read = self.plan.backward if backward else self.plan.forward
        error = self.back_dac_error if backward else self.dac_error
        return None if read.straight else Drivers(read.v_max, error, read.v_sinh)

    def look_at_ranges(self) -> None:
        """Remember which direction's ADC ranges are set, and whether a learned DAC range has begun, so that reads never wait for a
        GPU to know it."""
        ready = []
        for full, read, *_ in self.converters():
            if read.adc_bits and full.is_meta:
                raise ValueError(
                    f"{self.name}: a layer with ADCs must be on a device that holds values, got meta; load or initialise the model "
                    "before gpuxbar.convert"
                )
            ready.append(not read.adc_bits or _is_set(full))
        learned = self.spec.dac.range == "learned"
        if learned and self.dac_max.is_meta:
            raise ValueError(
                f"{self.name}: a layer that learns its DAC range must be on a device that holds values, got meta; load or "
                "initialise the model before gpuxbar.convert"
            )
        self.dac_begun = not learned or _is_set(self.dac_max.abs())
        self.calibrated, self.back_calibrated = ready[0] and self.dac_begun, ready[1]
        self._reads[0] = 0

    def converters(self) -> tuple[Converter, Converter]:
        """Those of the forward and of the transposed read."""
        return (
            Converter(self.adc_range, self.plan.forward, self.spec.adc, self.worst[0]),
            Converter(self.back_adc_range, self.plan.backward, self.spec.backward_adc, self.worst[1]),
        )

    def begin_in_situ(self) -> None:
        """See `InSitu.begin_in_situ`; ranges calibrated before do not fit the currents of such pairs, and are forgotten."""
        super().begin_in_situ()
        self.forget_ranges()
        self.look_at_ranges()

    def forget_ranges(self) -> None:
        """Ask for calibration anew."""
        for converter in self.converters():
            if converter.calibrated:
                converter.full.fill_(torch.nan)

    @property
    def fits_inputs(self) -> bool:
        """Whether the DAC's range is that of what it drives, whatever the sign, which reads then look at themselves."""
        return self.spec.dac.signed and self.spec.dac.range in ("tensor", "sample")

    def dac_top(self, x: Tensor) -> Tensor:
        """Digital value of the DAC's largest code where it drives x, [1] or [len(x)]."""
        dac = self.spec.dac
        if dac.range == "fixed":
            return self.dac_max
        if dac.range == "learned" and self.dac_begun:
            learned = self.dac_max.float()
            # not abs(), whose slope at 0 is 0, so that a range would never leave it
            return torch.where(learned < 0, -learned, learned) + SMALLEST_RANGE
        seen = abs_max(x.detach(), dac.range == "sample")
        if dac.range != "ema":
            return seen
        old = torch.where(self.dac_max > 0, self.dac_max, seen)
        return dac.momentum * old + (1 - dac.momentum) * seen if self.training else old

    def dac_inputs(self, x: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
        """The input inside the DAC's range, and the value of one code, [1] or [len(x)]."""
        dac = self.spec.dac
        if dac.range in BOUNDED:
            x = call(dac_clip, x, top, dac.code_max, dac.signed)
        elif not dac.signed:
            x = as_finite(x.clamp_min(0), x)
        return x, top.detach() / max(dac.code_max, 1)

    @torch.no_grad()
    def begin_dac(self, top: Tensor) -> None:
        """Begin a learned DAC range."""
        self.dac_max.copy_(top)
        self.dac_begun = True

    def require_calibrated(self) -> None:
        """Refuse to read without an ADC range."""
        if not self.calibrated and not torch.compiler.is_compiling():
            self.look_at_ranges()  # others may have been copied to the layer, as averages of models do
        if not self.calibrated and not self.dac_begun:
            raise ValueError(
                f"{self.name}: a DAC range that is learned must begin before use, got {self.dac_max.item():g}; call "
                "gpuxbar.calibrate(model, loader), or set `dac.max` of its spec"
            )
        if not self.calibrated:
            raise ValueError(
                f"{self.name}: the ADC range must be calibrated before use, and anew once an in-situ optimiser has begun; call "
                "gpuxbar.calibrate(model, loader) on batches that reach the layer, with a step that calls model.train() if it runs in training "
                "alone"
            )

    def _follows_inputs(self) -> bool:
        """Whether reads move the DAC's range."""
        return self.spec.dac.range == "ema" and self.training

    def await_gradient(self, y: Tensor) -> None:
        """Refuse the gradient of an output, if one comes, where the transposed read has no ADC range."""
        if self.back_calibrated or not y.requires_grad:
            return
        if torch.compiler.is_compiling():
            self._refuse_gradient()
        y.register_hook(self._require_back_calibrated)

    def _require_back_calibrated(self, _: Tensor) -> None:
        self.look_at_ranges()
        if not self.back_calibrated:
            self._refuse_gradient()

    def _refuse_gradient(self) -> None:
        raise ValueError(
            f"{self.name}: the ADC range of the transposed read must be calibrated before gradients pass the layer, and none passed it "
            "in gpuxbar.calibrate; give that a loss which depends on the layer, or a rule of gpuxbar.convert {'backward': {'adc': "
            f"{{'bits': {self.spec.backward_adc.bits}, 'range': 'worst_case'}}}}}} if it is to be left out, as a compiled graph does not know"
        )

    def _looks_at_clipping(self) -> bool:
        """Whether to look at what a read clips: at the 64th, 128th, 256th, ... of training with the ranges of a calibration. Looked at
        sooner, ranges that are to follow in a few steps would be told of though training bears it."""
        if not (self.training and torch.is_grad_enabled()):
            return False
        self._reads[0] += 1
        return (
            self._reads[0] >= SETTLED and self._reads[0].bit_count() == 1 and self.converters()[0].calibrated
        )

    def _warn_of_clipping(self, gate: Tensor) -> None:
        """Warn where a read clips far more than its calibration left outside; `gate` as `analog_mvm` returns it."""
        if gate.is_cuda and torch.cuda.is_current_stream_capturing():
            return  # nothing is computed yet
        clipped = 1 - gate.mean().item()
        if clipped > 1 - self.spec.adc.percentile / 100 + OUTGROWN:
            # without the layer's name and share, so that a model of many layers says it once
            warnings.warn(
                "gpuxbar: calibrated ADC ranges must follow currents as weights learn, got a layer of which more than "
                f"{OUTGROWN:.0%} of the conversions clip, where no gradient passes; call gpuxbar.calibrate anew after 1, 2, 4, 8, ... "
                "steps of training, or oftener. gpuxbar.conversion_errors tells what clips in each layer",
                RuntimeWarning,
                stacklevel=2,
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        saved, here = state_dict.get(f"{prefix}range_settings"), _carrying(self.spec)
        programmed = self.in_situ and f"{prefix}g_cells" not in state_dict  # there, and with other currents
        others = saved is not None and (programmed or saved.item() != here)
        # of the spec, whatever was saved
        kept = {"range_settings": torch.full_like(self.range_settings, here)}
        for name, converter in zip(("adc_range", "back_adc_range"), self.converters(), strict=True):
            if not converter.calibrated:
                kept[name] = converter.full.clone()
            elif others:
                kept[name] = torch.full_like(converter.full, torch.nan)
        if self.spec.dac.range == "fixed":
            kept["dac_max"] = self.dac_max.clone()
        begun, dac = state_dict.get(f"{prefix}dac_max"), self.spec.dac
        # 0: of another kind of range
        if dac.range == "learned" and dac.max and begun is not None and not begun.any():
            state_dict[f"{prefix}dac_max"] = torch.full_like(begun, dac.max)
        buffers = {name: self._buffers[name] for name in kept}
        super()._load_from_state_dict(state_dict, prefix, *more)
        self._buffers.update(buffers)  # with assign=True, those of the state dict are there
        for name, value in kept.items():
            self.get_buffer(name).copy_(value)
        self.look_at_ranges()


def _is_set(full: Tensor) -> bool:
    """Whether ranges are such."""
    return bool(((full > 0) & (full < torch.inf)).all())


def _carrying(spec: CrossbarSpec) -> int:
    dacs = spec.dac, spec.backward_dac
    # said only where there is any, so that others keep the checksums that checkpoints have
    bending = [
        f"{way}{dac.model_dump_json(include=set(ERRORS))}" for way, dac in enumerate(dacs) if dac.flawed
    ]
    if spec.device.v_sinh is not None:
        bending.append(f"{spec.device.v_sinh}")
    return settings_checksum(
        spec.model_dump_json(include=CARRYING),
        *(dac.model_dump_json(include=DRIVEN) for dac in dacs),
        *bending,
    )
