"""The description of a crossbar layer: frozen, validated, serialisable, in SI units.

Every default is ideal: an untouched `CrossbarSpec()` computes what `torch.nn` computes, on tiles.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from gpuxbar.spec.ageing import Drift, DriftLaw, Endurance, MeasuredDrift, Retention
from gpuxbar.spec.carry import Carry
from gpuxbar.spec.errors import SpecError
from gpuxbar.spec.laws import UpdateLaw
from gpuxbar.spec.part import Part
from gpuxbar.spec.pulses import PulseTrain, check_train
from gpuxbar.spec.refresh import Refresh

__all__ = [
    "ADC",
    "DAC",
    "Backward",
    "CrossbarSpec",
    "Device",
    "Mapping",
    "Parasitics",
    "Programming",
    "ReadNoise",
    "Tile",
]

ERRORS = "gain_std", "offset_std", "inl", "inl_std"  # of converters
STEEPEST = 20  # v_read over v_sinh
SHARES = [i / 100 for i in range(101)]  # of g_max, at which polynomials are looked at
HELD = 1 + 1e-6  # of a range, by which rounding may leave currents beyond it


class Tile(Part):
    """One physical array: `rows` wordlines by `cols` bitlines; larger layers take several."""

    rows: int = Field(128, ge=1, le=65536)
    cols: int = Field(128, ge=1, le=65536)


class Device(Part):
    """A cell's conductance window, S, and its number of programmable levels (`None`: continuous).

    `v_sinh`: of devices that are not ohmic, V (`None`: ohmic): at v volts they carry g v_read sinh(v / v_sinh) /
    sinh(v_read / v_sinh), with g their conductance at `dac.v_read`. So values between 0 and the largest weigh less than they
    should, unless they are driven by streams of 1 bit. All devices have the one curve. Gradients are straight-through: those of
    inputs are read by such devices too, and those of weights, and pulses, follow the digital values. Not with `parasitics`.

    Source of the curve: Guan, Yu, Wong, IEEE Electron Device Letters 33, 1405 (2012), doi:10.1109/LED.2012.2210856; Jiang, Wong,
    Stanford University RRAM Verilog-A model (2014), doi:10.4231/D37H1DN48, whose parameters have it at 0.25 V.
    """

    g_min: float = Field(1e-6, ge=0)
    g_max: float = Field(10e-6, gt=0)
    levels: int | None = Field(None, ge=2, le=65536)
    v_sinh: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Device:
        if not self.g_min < self.g_max:
            raise ValueError(
                f"Device: `g_min` must be below `g_max`, got {self.g_min:g} S and {self.g_max:g} S; "
                "swap them or widen the window"
            )
        return self


class Mapping(Part):
    """How a signed weight becomes conductances.

    `scheme`: "differential" (two arrays, a conversion each, subtracted digitally), "subtracted" (two devices
    whose currents are subtracted before one conversion), "offset" (one array around the middle conductance
    and a reference column per column tile, subtracted digitally).
    `slices`, `slice_bits`: the weight magnitude spread over `slices` devices of `slice_bits` each, joined by
    shift-and-add; one slice with `slice_bits=None` is an unsliced, continuous weight.
    `scale`: one weight scale per "tensor", or per output "column": its largest weight is a full pair. `w_max`: the
    weight of a full pair instead; larger ones are clipped.
    `headroom`: in-situ training begins with a weight scale of this times the largest weight, unless `w_max` is given, and weights
    stay inside it. A layer that begins with zeros (LoRA's B, the last one of a residual branch, some heads) has no largest weight
    and needs `w_max`: what its weights are to stay inside; torch's own initialisation would make it headroom / sqrt(inputs).
    `line_order`: of a convolution's weights on the wordlines of a group: "channel_position" (all positions of the kernel for
    one channel, then for the next: torch's own layout, flattened) or "position_channel" (all channels at one position, then
    at the next, as accelerators of channels-last images do). It decides which weights share a tile: 128 rows of a 3 x 3
    kernel hold 14.2 channels, or two whole blocks of 64 channels of a position, which a GPU gathers from the images without
    waste. Weights and their gradients keep torch's layout.
    """

    scheme: Literal["differential", "subtracted", "offset"] = "differential"
    slices: int = Field(1, ge=1, le=32)
    slice_bits: int | None = Field(None, ge=1, le=8)
    scale: Literal["tensor", "column"] = "tensor"
    w_max: float | None = Field(None, gt=0)
    headroom: float = Field(4.0, ge=1, le=1000)
    line_order: Literal["channel_position", "position_channel"] = "channel_position"

    @model_validator(mode="after")
    def _sliced(self) -> Mapping:
        if self.slices > 1 and self.slice_bits is None:
            raise ValueError(
                f"Mapping: `slice_bits` must be set for {self.slices} slices, got None; "
                "give the bits of one device, for instance 2"
            )
        if self.slice_bits is not None and self.scheme == "offset":
            raise ValueError(
                "Mapping: `scheme` must be differential or subtracted for sliced weights, got offset; "
                "choose one of these, or slices=1 and slice_bits=None"
            )
        if self.slices * (self.slice_bits or 1) > 32:
            raise ValueError(
                f"Mapping: slices * slice_bits must be at most 32, got {self.slices} * {self.slice_bits}; "
                "a float32 weight holds no more"
            )
        return self


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


class DAC(Part):
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
    def flawed(self) -> bool:
        """Whether DACs have errors of their own."""
        return any(getattr(self, name) for name in ERRORS)

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


class ADC(Part):
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

    @property
    def flawed(self) -> bool:
        """Whether converters have errors of their own."""
        return any(getattr(self, name) for name in ERRORS)


class ReadNoise(Part):
    """Gaussian noise of the bitline current, redrawn every conversion.

    Standard deviation sqrt(sigma**2 + sum_r v_r**2 s(g_r)), with s(g) = (sigma_g (g / g_max)**exponent)**2.
    `sigma`: A. `sigma_g`: conductance fluctuation of a cell at `g_max`, S; exponent 0.5 is the square-root
    law of PCM reads, 1 a constant relative fluctuation.
    """

    sigma: float = Field(0.0, ge=0)
    sigma_g: float = Field(0.0, ge=0)
    exponent: float = Field(0.5, ge=0, le=4)


class Parasitics(Part):
    """Resistances of the wires of a tile, and how they are solved; 0 everywhere is ideal.

    Wordlines are driven at their first column and bitlines sensed at their last row; the other ends are open. What fills no whole
    tile lies in the corner by its drivers and sense amplifiers, without devices on the rest of its lines.
    `r_wordline`, `r_bitline`: of a wire segment between two cells, ohm. `r_source`: total before the first cell of a
    wordline, driver and wire, ohm; `r_sink`: total after the last cell of a bitline, ohm.
    `method`: "exact", or an approximation of `gpuxbar.ops.effective_conductance`.
    `terminations`: what a transposed read finds at the ends. "line": every line keeps its resistance, so bitlines are
    driven through `r_sink` and the array is exactly the transpose; "role": drivers keep `r_source` and sense amplifiers
    `r_sink`, whichever lines they serve, and the array is solved once more. Must be chosen where the two differ.
    `arithmetic`: of the exact solution on a GPU, as in `gpuxbar.ops.effective_conductance`; no effect on a CPU.
    `shared_drivers`: column tiles of a layer share the drivers of their wordlines, one `r_source` for all ("exact" only).
    `anchor`: between exact solutions, this approximation plus what it lacked at the last one; None: every tile is solved
    whenever the weights change. `refresh_interval`: changes after which a tile is solved again, in turn; `tolerance`:
    relative error of a tile, as estimated, beyond which it is solved earlier. At every change at most 1 / refresh_interval
    of a layer's tiles are solved, the most urgent first, so a layer that jumps is followed over several changes; a
    layer's `wire_error()` is the largest estimate, and `restart_wires()` solves all at the next read.
    `gradient`: of the weights. "straight_through": that of the conductances as reads see them, as if wires took nothing
    on the way to the devices; "exact": brought through the wires to the devices by the adjoint network, at three
    to four times the cost of an exact solution at every backward pass (method "exact", with or without anchor).
    """

    r_wordline: float = Field(0.0, ge=0)
    r_bitline: float = Field(0.0, ge=0)
    r_source: float = Field(0.0, ge=0)
    r_sink: float = Field(0.0, ge=0)
    method: Literal["none", "first_order", "ladder", "mean_field", "exact"] = "exact"
    arithmetic: Literal["fp32", "3xtf32", "tf32"] = "fp32"
    terminations: Literal["line", "role"] | None = None
    shared_drivers: bool = False
    anchor: Literal["ladder", "mean_field"] | None = None
    refresh_interval: int = Field(1, ge=1)
    tolerance: float = Field(1e-2, gt=0)
    gradient: Literal["straight_through", "exact"] = "straight_through"

    @model_validator(mode="after")
    def _chosen(self) -> Parasitics:
        if self.r_source != self.r_sink and self.terminations is None:
            raise ValueError(
                f"Parasitics: `terminations` must be chosen where r_source and r_sink differ, got {self.r_source:g} and "
                f"{self.r_sink:g} ohm; 'line' keeps each line's resistance in the transposed read, 'role' moves it with "
                "the driver"
            )
        if self.shared_drivers and (self.method != "exact" or self.terminations == "role"):
            raise ValueError(
                "Parasitics: `shared_drivers` must go with method='exact' and terminations 'line', got "
                f"{self.method!r} and {self.terminations!r}; choose these or shared_drivers=False"
            )
        if self.anchor is None and self.refresh_interval > 1:
            raise ValueError(
                f"Parasitics: `anchor` must be ladder or mean_field with refresh_interval {self.refresh_interval}, got "
                "None; it carries a tile from one exact solution to the next"
            )
        if self.anchor is not None and (self.method != "exact" or self.shared_drivers):
            raise ValueError(
                "Parasitics: `anchor` must go with method='exact' and shared_drivers=False, got "
                f"{self.method!r} and {self.shared_drivers}; choose these or anchor=None"
            )
        if self.gradient == "exact" and (self.method != "exact" or self.shared_drivers):
            raise ValueError(
                "Parasitics: `gradient` must be straight_through unless method='exact' and shared_drivers=False, got "
                f"'exact' with {self.method!r} and {self.shared_drivers}; choose these or gradient='straight_through'"
            )
        return self

    @property
    def active(self) -> bool:
        """Whether any wire has a resistance that is solved for."""
        ohms = (self.r_wordline, self.r_bitline, self.r_source, self.r_sink)
        return self.method != "none" and any(ohms)

    @property
    def exact_gradient(self) -> bool:
        """Whether gradients of weights go through wires."""
        return self.active and self.gradient == "exact"

    @property
    def swapped(self) -> bool:
        """Whether the transposed read sees another matrix than the transpose."""
        return self.active and self.terminations == "role" and self.r_source != self.r_sink


class Programming(Part):
    """What a write-verify leaves: drawn once per weight version, the spread and stuck cells once per device.

    `write_noise`: standard deviation of the conductance, S; or up to five terms of a polynomial, of r**0, r**1, ... with
    r = g / g_max of the conductance aimed at. `device_spread`: relative standard deviation between devices.
    `stuck_at_g_min`, `stuck_at_g_max`: rates of stuck cells.
    """

    write_noise: float | tuple[float, ...] = 0.0
    device_spread: float = Field(0.0, ge=0)
    stuck_at_g_min: float = Field(0.0, ge=0, le=1)
    stuck_at_g_max: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _deviation(self) -> Programming:
        count = len(self.write_terms)
        if not 1 <= count <= 5:
            raise ValueError(
                f"Programming: `write_noise` must be a number or have 1 to 5 terms, got {count}; a polynomial of the fourth degree has 5"
            )
        r = min(self.write_shares, key=self.write_deviation)
        if self.write_deviation(r) < 0:
            raise ValueError(
                f"Programming: `write_noise` must be at least 0 for every r of 0 to 1, got {self.write_deviation(r):g} S at r = {r:g}; "
                "it is a standard deviation"
            )
        return self

    @model_validator(mode="after")
    def _rates(self) -> Programming:
        if self.stuck_at_g_min + self.stuck_at_g_max > 1:
            raise ValueError(
                "Programming: stuck_at_g_min + stuck_at_g_max must be at most 1, got "
                f"{self.stuck_at_g_min:g} + {self.stuck_at_g_max:g}; they are shares of the cells"
            )
        return self

    @property
    def write_terms(self) -> tuple[float, ...]:
        """The terms of `write_noise`, S."""
        return self.write_noise if isinstance(self.write_noise, tuple) else (self.write_noise,)

    @property
    def write_shares(self) -> list[float]:
        """The shares of g_max at which `write_deviation` is looked at; one where it is the same for all."""
        return SHARES if len(self.write_terms) > 1 else SHARES[:1]

    def write_deviation(self, r: float) -> float:
        """Standard deviation of a write to a share r of g_max, S."""
        return sum(term * r**power for power, term in enumerate(self.write_terms))


class Backward(Part):
    """The transposed read that carries gradients back.

    `mode`: "analog" (the same array read backwards, with converters of its own) or "ideal" (the exact product
    with the programmed conductances). `dac`, `adc`: all settings of that read, bits too; `None`: those of the forward read
    (inputs signed, since gradients are). A fixed DAC range is that of the gradient of the output whose weights are largest.
    A range of "tensor", which one that is fixed, learned or a running mean forwards becomes here, is set by the largest gradient
    of a batch: once most samples are learnt, those of the others lie in the read noise and between the steps of the converters.
    With "sample" each image or row has its own, for the same work: {"dac": {"bits": 8, "range": "sample"}}.
    """

    mode: Literal["analog", "ideal"] = "analog"
    dac: DAC | None = None
    adc: ADC | None = None


class CrossbarSpec(Part):
    """Everything about a layer on crossbars. Defaults are ideal.

    `seed`: of every random number, with the layer's name: two layers of a model that `gpuxbar.convert` made never share draws, but
    another model's layers of the same names do, unless it has a seed of its own. `generator`: "exact" or "fast"
    normals (kernels/README.md, "Random numbers"). `precision`: arithmetic of the tile products on a GPU, "fp32", "tf32",
    "fp16", "fp16x2" (conductances as a high and a low half, 22 bits), "bf16" (8 bits: the coarsest, no faster than fp16) or "int8"
    (levels, exact); half precisions need a DAC, whose codes they hold exactly (what errors of DACs or devices make of these,
    rounded), and int8 also an ADC, devices that hold their levels and digits up to 127; on a CPU every product is float32.
    `keep_packed`: keep conductances on a GPU in the layout of its tensor cores, and pack them anew only when they change:
    micro-batches, evaluation and repeated reads save that pass over all cells, for 2 bytes a cell and direction (4 with fp16x2, 1
    with int8, 2 more with `read_noise.sigma_g`); not with fp32 and tf32. `update`: the device's own law, by which
    `gpuxbar.optim` trains in situ; needs pairs. `carry`: how sliced ones are
    trained by it. `pulses`: how its steps are pulsed, None: as one step of the wanted size. `drift`: of conductances after
    `gpuxbar.program`, `Drift` or `MeasuredDrift`. `retention`: what
    devices trained in situ lose between updates. `endurance`: pulses that they bear. `refresh`: when pairs of one-sided ones
    are written anew.
    """

    another = "by spec.with_overrides({})"

    tile: Tile = Tile()
    device: Device = Device()
    mapping: Mapping = Mapping()
    dac: DAC = DAC()
    adc: ADC = ADC()
    read_noise: ReadNoise = ReadNoise()
    programming: Programming = Programming()
    parasitics: Parasitics = Parasitics()
    backward: Backward = Backward()
    update: UpdateLaw | None = None
    carry: Carry | None = None
    pulses: PulseTrain | None = None
    seed: int = Field(0, ge=0, lt=2**63)
    generator: Literal["exact", "fast"] = "exact"
    precision: Literal["fp32", "tf32", "fp16", "fp16x2", "bf16", "int8"] = "fp32"
    keep_packed: bool = False
    drift: DriftLaw = Drift()
    retention: Retention = Retention()
    endurance: Endurance = Endurance()
    refresh: Refresh = Refresh()

    @model_validator(mode="after")
    def _precise(self) -> CrossbarSpec:
        half = self.precision in ("fp16", "fp16x2", "bf16")
        if half and (self.dac.bits is None or self.backward_dac.bits is None):
            raise ValueError(
                f"CrossbarSpec: `precision` must be fp32 or tf32 without a DAC in both directions, got {self.precision!r}; "
                "half precision holds codes, not values: set dac.bits"
            )
        if self.keep_packed and self.precision in ("fp32", "tf32"):
            raise ValueError(
                f"CrossbarSpec: `keep_packed` must go with precision fp16, fp16x2, bf16 or int8, got {self.precision!r}; only "
                "these are packed for tensor cores: choose one, or keep_packed=False"
            )
        return self

    @model_validator(mode="after")
    def _whole(self) -> CrossbarSpec:
        """Products of bytes are exact, or refused."""
        if self.precision != "int8":
            return self
        mapping = self.mapping
        levels = self.levels or 2
        most = 128 if mapping.scheme == "subtracted" else 256
        directions = [(self.dac, self.adc)]
        if self.backward.mode == "analog":
            directions.append((self.backward_dac, self.backward_adc))
        digits = [dac.digit_max for dac, _ in directions]
        obstacles = {
            self.off_levels: self.off_levels is not None,
            f"devices have {levels} levels ({most} fit 8 bits)": levels > most,
            "the noise of a read depends on the cell (read_noise.sigma_g)": self.read_noise.sigma_g > 0,
            "converters are non-linear (adc.inl)": any(adc.inl or adc.inl_std for _, adc in directions),
            "DACs have errors (dac.gain_std, offset_std, inl)": any(dac.flawed for dac, _ in directions),
            "devices are not ohmic (device.v_sinh)": self.device.v_sinh is not None and max(digits) > 1,
            "an ADC or DAC is missing": any(dac.bits is None or adc.bits is None for dac, adc in directions),
            f"digits up to {max(digits)} are driven (127 fit 8 bits)": max(digits) > 127,
        }
        for why, found in obstacles.items():
            if found:
                raise ValueError(
                    f"CrossbarSpec: `precision` must be fp16 or fp16x2 where {why}, got 'int8'; choose one of these"
                )
        return self

    @model_validator(mode="after")
    def _given(self) -> CrossbarSpec:
        """A converter of the transposed read with settings of its own has no bits by default, and so would be left out unsaid."""
        for name, own, forward in (
            ("dac", self.backward.dac, self.dac),
            ("adc", self.backward.adc, self.adc),
        ):
            silent = own is not None and "bits" not in own.model_fields_set
            if silent and forward.bits is not None and self.backward.mode == "analog":
                raise ValueError(
                    f"CrossbarSpec: `backward.{name}.bits` must be given with other settings of that converter, got none; give "
                    f"{forward.bits}, as forwards, or null to leave it out"
                )
        return self

    @model_validator(mode="after")
    def _converted(self) -> CrossbarSpec:
        """One bit holds no sign."""
        if self.adc.bits == 1 and self.both_signs(self.dac):
            raise ValueError(
                "CrossbarSpec: `adc.bits` must be at least 2 where currents have both signs, got 1; add a bit, or drive arrays that are not "
                "subtracted by an unsigned or two-phase DAC"
            )
        analog = self.backward.mode == "analog"
        if analog and self.backward_adc.bits == 1 and self.both_signs(self.backward_dac):
            raise ValueError(
                "CrossbarSpec: `backward.adc.bits` must be at least 2 where currents have both signs, as gradients make them, got 1; give "
                "it, or backward.mode='ideal'"
            )
        return self

    @model_validator(mode="after")
    def _measured(self) -> CrossbarSpec:
        """Noise in S, A and V, not in shares of a window or a range: it is no larger than what it is around."""
        g_max, drift, programming = self.device.g_max, self.drift, self.programming
        bitline = self.tile.rows * g_max * self.dac.v_read
        shift, std = (drift.shift, drift.std) if isinstance(drift, MeasuredDrift) else ((), ())
        for key, noise, most, unit, what in (
            ("read_noise.sigma", self.read_noise.sigma, bitline, "A", "what all cells of a bitline carry"),
            ("dac.offset_std", self.dac.offset_std, self.dac.v_read, "V", "the dac.v_read"),
            ("backward.dac.offset_std", self.backward_dac.offset_std, self.backward_dac.v_read, "V", "the v_read there"),
            ("read_noise.sigma_g", self.read_noise.sigma_g, g_max, "S", "the device.g_max"),
            ("programming.write_noise", max(map(programming.write_deviation, programming.write_shares)), g_max, "S", "the device.g_max"),
            ("update.write_noise", self.update.write_noise if self.update else 0.0, g_max, "S", "the device.g_max"),
            ("drift.shift", max((abs(change) for row in shift for change in row), default=0.0), g_max, "S", "the device.g_max"),
            ("drift.std", max((change for row in std for change in row), default=0.0), g_max, "S", "the device.g_max"),
        ):  # fmt: skip
            if noise > most:
                raise ValueError(
                    f"CrossbarSpec: `{key}` must be at most {most:g} {unit}, {what}, got {noise:g} {unit}; give it in {unit}, not "
                    "as a share"
                )
        return self

    @model_validator(mode="after")
    def _wired(self) -> CrossbarSpec:
        if self.parasitics.active and self.mapping.scheme == "offset":
            raise ValueError(
                "CrossbarSpec: `mapping.scheme` must be differential or subtracted with parasitics, got 'offset'; the wires "
                "of its reference lines are not modelled: choose one of these"
            )
        return self

    @model_validator(mode="after")
    def _conducting(self) -> CrossbarSpec:
        v_sinh = self.device.v_sinh
        if v_sinh is None:
            return self
        v_read, back = self.dac.v_read, self.backward_dac.v_read
        if back != v_read:
            raise ValueError(
                f"CrossbarSpec: `backward.dac.v_read` must be that of `dac` with device.v_sinh, {v_read:g} V, got {back:g} V; conductances "
                "are those at one voltage: leave it out"
            )
        least = v_read / STEEPEST
        if v_sinh < least:
            raise ValueError(
                f"CrossbarSpec: `device.v_sinh` must be at least v_read / {STEEPEST} = {least:g} V, got {v_sinh:g} V; such devices are "
                "switches: None is ohmic"
            )
        if self.parasitics.active:
            raise ValueError(
                f"CrossbarSpec: `device.v_sinh` must be None with parasitics, got {v_sinh:g} V; wires are solved as a network of linear "
                "resistors: leave it out, or all r_* of the wires"
            )
        return self

    @model_validator(mode="after")
    def _transposed(self) -> CrossbarSpec:
        if not self.backward_dac.signed:
            raise ValueError(
                "CrossbarSpec: `backward.dac.signed` must be true, got false; gradients have both signs, and one of them would be "
                "lost: leave it out"
            )
        if self.backward_dac.range in ("ema", "learned"):
            raise ValueError(
                f"CrossbarSpec: `backward.dac.range` must be sample, tensor or fixed, got {self.backward_dac.range!r}; gradients "
                "shrink as training goes on: choose one of these"
            )
        return self

    @model_validator(mode="after")
    def _centred(self) -> CrossbarSpec:
        if self.mapping.scheme == "offset" and self.device.levels == 2:
            raise ValueError(
                "CrossbarSpec: `device.levels` must be at least 3 with mapping.scheme='offset', got 2; one of them is the weight "
                "0: choose more levels, or a pair"
            )
        return self

    @model_validator(mode="after")
    def _updatable(self) -> CrossbarSpec:
        if self.update is not None and self.mapping.scheme == "offset":
            raise ValueError(
                "CrossbarSpec: `update` must go with pairs, got scheme='offset'; "
                "use mapping.scheme='differential' or 'subtracted', or update=None"
            )
        if (
            self.mapping.slice_bits is not None
            and self.device.levels is not None
            and self.device.levels != 2**self.mapping.slice_bits
        ):
            raise ValueError(
                f"CrossbarSpec: `device.levels` must be 2**slice_bits = {2**self.mapping.slice_bits} for "
                f"sliced weights, got {self.device.levels}; leave it None"
            )
        if self.updates_in_array and self.parasitics.exact_gradient:
            by, without = (
                ("pulses", "pulses=None")
                if self.pulses is not None
                else ("carry.scheme='streamed'", "carry.scheme='accumulate'")
            )
            raise ValueError(
                f"CrossbarSpec: `parasitics.gradient` must be straight_through with {by}, got 'exact'; inputs and errors are "
                f"multiplied in the array and make no gradient: choose it, or {without}"
            )
        if self.endurance.pulses is not None and (self.update is None or self.update.nominal_pulses is None):
            got = "None" if self.update is None else repr(self.update.law)
            raise ValueError(
                f"CrossbarSpec: `update` must be a law with pulses where endurance counts them, got {got}; choose "
                "law='constant_step', say, or leave endurance.pulses out"
            )
        if self.pulses is not None:
            check_train("CrossbarSpec", self.pulses, self.update, self.carry)
        return self

    @model_validator(mode="after")
    def _referred(self) -> CrossbarSpec:
        if (
            self.mapping.slice_bits is not None
            and self.update is not None
            and self.update.reference_at is not None
        ):
            raise ValueError(
                f"CrossbarSpec: `update.reference_at` must be None for sliced weights, got {self.update.reference_at:g}; their digits "
                "lie half on either device: leave it out, or use mapping.slices=1 and slice_bits=None"
            )
        return self

    @model_validator(mode="after")
    def _refreshed(self) -> CrossbarSpec:
        if self.refresh.interval is None:
            return self
        if self.update is None or self.update.sides != "one_sided":
            got = "no law" if self.update is None else repr(self.update.sides)
            raise ValueError(
                f"CrossbarSpec: `update.sides` must be one_sided with refresh.interval, got {got}; only such pairs fill up: choose "
                "it, or refresh.interval=None"
            )
        if self.mapping.slices > 1:
            raise ValueError(
                f"CrossbarSpec: `refresh.interval` must be None for {self.mapping.slices} slices, got {self.refresh.interval}; "
                "carries write pairs anew of which both devices have gained a unit"
            )
        return self

    @model_validator(mode="after")
    def _carried(self) -> CrossbarSpec:
        slices = self.mapping.slices
        if self.update is not None and slices > 1 and self.carry is None:
            raise ValueError(
                f"CrossbarSpec: `carry` must say how {slices} slices are updated, got None; set "
                "carry={'scheme': 'accumulate'}, or use mapping.slices=1 or update=None"
            )
        if self.carry is not None and (self.update is None or slices == 1):
            raise ValueError(
                f"CrossbarSpec: `carry` must go with an update law and sliced weights, got update="
                f"{None if self.update is None else self.update.law!r} with {slices} "
                f"slice{'s' if slices > 1 else ''}; set both, or carry=None"
            )
        if self.update is not None and self.mapping.slice_bits is not None and self.device.levels is not None:
            raise ValueError(
                f"CrossbarSpec: `device.levels` must be None for sliced weights that are trained in situ, got "
                f"{self.device.levels}; updates leave devices between levels"
            )
        return self

    def both_signs(self, dac: DAC) -> bool:
        """Whether lines carry currents of both signs where this DAC drives the others."""
        return self.mapping.scheme == "subtracted" or (dac.signed and dac.phases == 1) or dac.offset_std > 0

    def with_overrides(self, overrides: dict[str, Any]) -> CrossbarSpec:
        """A copy with a nested dictionary laid over it: `{"adc": {"bits": 6}}`; validated anew.

        A fixed ADC range that holds every current is to be given with tiles, windows or voltages by which it would not any more.
        """
        changed = CrossbarSpec.model_validate(_merged(self.model_dump(), overrides))
        for (key, adc, most, converts), (_, old, before, _) in zip(
            changed._conversions(), self._conversions(), strict=True
        ):
            full = adc.i_max
            if full is None or not converts or full != old.i_max or _gives(overrides, key):
                continue
            if before <= HELD * full < most:
                raise SpecError(
                    f"CrossbarSpec: `{'.'.join(key)}` must be given where currents grow, got {full:.3g} A, which holds those of up to "
                    f"{before:.3g} A of before, but not {most:.3g} A; give it, and `bits` for the steps that you want, or "
                    "range='worst_case' and i_max=None"
                )
        return changed

    def _conversions(self) -> list[tuple[tuple[str, ...], ADC, float, bool]]:
        """Of the forward and of the transposed read: the key of the ADC's range, the ADC, the largest current of a tile, A, and
        whether it is converted."""
        back = ("backward", "adc", "i_max") if self.backward.adc is not None else ("adc", "i_max")
        volts, back_volts, g_max = self.dac.v_read, self.backward_dac.v_read, self.device.g_max
        analog = self.backward.mode == "analog"
        return [
            (("adc", "i_max"), self.adc, volts * g_max * self.tile.rows, self.adc.bits is not None),
            (
                back,
                self.backward_adc,
                back_volts * g_max * self.tile.cols,
                analog and self.backward_adc.bits is not None,
            ),
        ]

    @property
    def levels(self) -> int | None:
        """Conductances that a write aims at; None: any in the window."""
        return 2**self.mapping.slice_bits if self.mapping.slice_bits else self.device.levels

    @property
    def off_levels(self) -> str | None:
        """Why a read finds conductances between levels; None where it finds levels alone (stuck cells are such)."""
        programming, drift = self.programming, self.drift
        left = (*programming.write_terms, programming.device_spread)
        reasons = {
            "devices are continuous (device.levels=None)": self.levels is None,
            "writes leave noise or spread between levels": any(left),
            "wires take from levels": self.parasitics.active,
            "devices drift off their levels": drift.moves,
            "in-situ updates end between levels": self.update is not None,
        }
        return next((reason for reason, found in reasons.items() if found), None)

    @property
    def draws(self) -> bool:
        """Whether anything about a layer is random: its devices, converters, reads or updates."""
        programming, drift, noise = self.programming, self.drift, self.read_noise
        return self.update is not None or drift.draws or any(
            (
                noise.sigma, noise.sigma_g, *programming.write_terms, programming.device_spread,
                programming.stuck_at_g_min, programming.stuck_at_g_max,
                *(error for part in (self.dac, self.backward_dac, self.adc, self.backward_adc)
                  for error in (part.gain_std, part.offset_std, part.inl_std)),
            )
        )  # fmt: skip

    @property
    def headroom_bits(self) -> int:
        """Bits by which a device's window exceeds a digit; see `Carry`."""
        return 0 if self.carry is None else self.carry.headroom_bits

    @property
    def updates_in_array(self) -> bool:
        """Whether updates multiply inputs and errors in the array, by pulse trains or bit streams, and need no gradient."""
        return self.pulses is not None or (self.carry is not None and self.carry.scheme == "streamed")

    @property
    def backward_dac(self) -> DAC:
        """DAC of the transposed read; derived from the forward one when not given."""
        if self.backward.dac is not None:
            return self.backward.dac
        bits = None if self.dac.bits is None else max(self.dac.bits, 2)
        dynamic = "tensor" if self.dac.range in ("fixed", "ema", "learned") else self.dac.range
        polarity = "bipolar" if bits is None else self.dac.polarity
        return self.dac.model_copy(
            update={"signed": True, "bits": bits, "range": dynamic, "max": None, "polarity": polarity}
        )

    @property
    def backward_adc(self) -> ADC:
        return self.backward.adc or self.adc


def _gives(overrides: Any, key: tuple[str, ...]) -> bool:
    """Whether a nested dictionary has a value for a key."""
    for name in key:
        if not isinstance(overrides, dict) or name not in overrides:
            return False
        overrides = overrides[name]
    return True


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        old: Any = out.get(key)
        # another update law replaces the old one: their keys differ
        both = isinstance(value, dict) and isinstance(old, dict)
        if both and value.get("law", old.get("law")) == old.get("law"):
            out[key] = _merged(old, value)
        else:
            out[key] = value
    return out
