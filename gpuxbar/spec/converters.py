"""What drives the lines of a tile and what digitises their currents, with the noise of these."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from gpuxbar.spec.part import Part

__all__ = ["ADC", "DAC", "ReadNoise"]

ERRORS = "gain_std", "offset_std", "inl", "inl_std"


class _Converter(Part):
    @property
    def flawed(self) -> bool:
        """Whether converters have errors of their own."""
        return any(getattr(self, name) for name in ERRORS)


class DAC(_Converter):
    """Digital input to wordline voltage.

    `bits`: resolution with the sign bit if `signed` (`None`: no quantisation). Without `signed`, inputs below 0 are
    driven as 0. `stream_bits`: magnitude bits driven at a time (`None`: all at once); every stream is a read of its own,
    joined by shift-and-add.
    `polarity`: signed inputs driven as one "bipolar" voltage or in "two_phase" (positive, then negative).
    `range`: the digital value of the largest code: "sample" (abs-max of each row of a linear layer, each
    image of a convolution), "tensor" (abs-max of the call; of gradients see `Backward`), "ema" (running mean of abs-max over
    training calls, factor `momentum`; before the first, that of the call), "fixed" (`max`), "learned" (the layer's parameter
    `dac_max`, which begins at `max`, or without it at what `gpuxbar.calibrate` finds to round and clip with the least squared error,
    and which any optimiser trains by the gradient of Learned Step Size Quantization: Esser et al., ICLR 2020; that of the
    range is scaled by code_max**1.5 / sqrt(values of a sample), which is that paper's scale for a step). That gradient sees how
    inputs are rounded and clipped, not ADCs and noise; calibrate ADC ranges anew when it has moved.
    `v_read`: voltage of the largest digit, V.
    `gain_std`, `offset_std`, `inl`, `inl_std`: errors as those of an `ADC`, of what a digit is driven as: relative spread of the
    gain, spread of the offset, V, and mean and spread of the integral non-linearity, in steps of a digit. Every line of a layer
    has one DAC, drawn once, which drives it in all column tiles, planes and passes (`parasitics.shared_drivers` is of the
    resistance behind it). What has nothing to drive is driven with the offset: zeros, padding of images, digits of 0 in every
    stream; two phases on ohmic devices subtract it again. Gradients are straight-through inside the range, and those of weights,
    and pulses, follow the codes.
    """

    bits: int | None = Field(None, ge=1, le=8)
    stream_bits: int | None = Field(None, ge=1, le=8)
    signed: bool = True
    polarity: Literal["bipolar", "two_phase"] = "bipolar"
    range: Literal["sample", "tensor", "ema", "fixed", "learned"] = "tensor"
    max: float | None = Field(None, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    v_read: float = Field(0.2, gt=0)
    gain_std: float = Field(0.0, ge=0)
    offset_std: float = Field(0.0, ge=0)
    inl: float = 0.0
    inl_std: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> DAC:
        if self.signed and self.bits == 1:
            raise ValueError(
                "DAC: `bits` must be 2 to 8 for signed inputs, got 1; one bit holds no sign: "
                "set signed=False, or bits=2 with stream_bits=1"
            )
        if self.stream_bits is not None and self.bits is None:
            raise ValueError(
                f"DAC: `bits` must be set with `stream_bits`, got None; streams of {self.stream_bits} bits "
                "cut a quantised code"
            )
        if self.signed and self.polarity == "two_phase" and self.bits is None:
            raise ValueError(
                "DAC: `bits` must be set with polarity='two_phase', got None; phases drive the positive and the negative part of a "
                "quantised code: set it, or polarity='bipolar'"
            )
        if self.range != "learned" and (self.range == "fixed") != (self.max is not None):
            raise ValueError(
                f"DAC: `max` goes with range='fixed', which needs it, or 'learned', got range={self.range!r} and max={self.max}; "
                "set both or neither"
            )
        if self.range == "learned" and self.bits is None:
            raise ValueError(
                "DAC: `bits` must be set with range='learned', got None; without rounding, the wider a range the better: set it, "
                "or range='tensor'"
            )
        _check_errors(self, "a sixth of the largest digit")
        return self

    @property
    def inl_most(self) -> float:
        """Largest magnitude of an integral non-linearity with which no curve turns back, in steps."""
        return self.digit_max / 6

    @property
    def digit_max(self) -> int:
        """Largest digit, driven with `v_read`; 1 when nothing is quantised."""
        return 2**self.stream_bits - 1 if self.stream_bits else max(self.code_max, 1)

    @property
    def code_max(self) -> int:
        """Largest code; 0 when nothing is quantised."""
        if self.bits is None:
            return 0
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1

    @property
    def streams(self) -> int:
        """Number of bit streams of one phase."""
        if self.bits is None or self.stream_bits is None:
            return 1
        return -(-self.code_max.bit_length() // self.stream_bits)

    @property
    def phases(self) -> int:
        return 2 if self.polarity == "two_phase" and self.signed else 1


class ADC(_Converter):
    """Bitline current to code, once per tile, plane, stream and column.

    `bits`: resolution (`None`: no conversion). `range`: the current of the largest code: "calibrated" (the
    `percentile` of partial sums seen by `gpuxbar.calibrate`), "fixed" (`i_max`, A), "worst_case" (every cell
    of a line at `g_max`, every input at `v_read`, or at the most that the errors of its DAC make of a digit).
    `gpuxbar.conversion_errors` tells what clips, and whether clipping or rounding costs more. Codes are signed, unless currents
    have one sign: of voltages of one sign (of unsigned or two-phase DACs without offsets) on devices that are not subtracted
    before. `per`: one range per "layer" or per output "column".
    `gain_std`: relative spread of the converters' gain; `offset_std`: spread of their offset, A; `inl`, `inl_std`: mean and
    spread of their integral non-linearity, in steps: by how much the curve of a converter is off at most, at 58 % of the range
    (outwards above 0; below 0 of signed codes it is as far off the other way, and right at 0 and at both ends). Errors are drawn
    once per converter; a curve that would turn back is bent as far as none does.
    """

    bits: int | None = Field(None, ge=1, le=16)
    range: Literal["calibrated", "fixed", "worst_case"] = "calibrated"
    i_max: float | None = Field(None, gt=0)
    percentile: float = Field(99.99, gt=0, le=100)
    per: Literal["layer", "column"] = "layer"
    gain_std: float = Field(0.0, ge=0)
    offset_std: float = Field(0.0, ge=0)
    inl: float = 0.0
    inl_std: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> ADC:
        if (self.range == "fixed") != (self.i_max is not None):
            raise ValueError(
                f"ADC: `i_max` goes with range='fixed' and only with it, got range={self.range!r} and "
                f"i_max={self.i_max}; set both or neither"
            )
        _check_errors(self, f"a twelfth of the codes of {self.bits} bits")
        return self

    @property
    def inl_most(self) -> float:
        """Largest magnitude of an integral non-linearity with which no curve turns back, in steps."""
        return 2 ** ((self.bits or 1) - 1) / 6


class ReadNoise(Part):
    """Gaussian noise of the bitline current, redrawn every conversion.

    Standard deviation sqrt(sigma**2 + sum_r v_r**2 s(g_r)), with s(g) = (sigma_g (g / g_max)**exponent)**2.
    `sigma`: A. `sigma_g`: conductance fluctuation of a cell at `g_max`, S; exponent 0.5 is the square-root
    law of PCM reads, 1 a constant relative fluctuation.
    """

    sigma: float = Field(0.0, ge=0)
    sigma_g: float = Field(0.0, ge=0)
    exponent: float = Field(0.5, ge=0, le=4)


def _check_errors(converter: DAC | ADC, share: str) -> None:
    """Refuse errors of a converter without codes, and curves that turn back; `share`: what the bound of these is of the codes."""
    kind, most = type(converter).__name__, converter.inl_most
    if converter.bits is None and converter.flawed:
        errors = ", ".join(f"{name}={getattr(converter, name):g}" for name in ERRORS)
        raise ValueError(
            f"{kind}: `bits` must be set with converter errors, got None with {errors}; set the resolution"
        )
    for name in ("inl", "inl_std"):
        inl = getattr(converter, name)
        if abs(inl) > most:
            raise ValueError(
                f"{kind}: `{name}` must be within +-{most:g} steps, {share}, got {inl:g}; a curve that bends more turns back"
            )
