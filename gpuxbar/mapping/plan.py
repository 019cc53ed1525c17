"""Everything static about reading a layer forwards and backwards, and which exact collapses it takes.

Without an ADC a read is linear: planes, streams and tiles merge into one product, and their independent Gaussian noises
into one draw of the summed variance. With one, every conversion is computed, unless all are exact: where every current is
a whole number of ADC steps inside the range, codes are the currents. Two things keep their place without an ADC:
the streams of a read whose noise depends on what each of them drives, or whose digits are not driven in proportion (DACs with
errors, devices that are not ohmic; a CPU sums what they drive before its one product), and the reference lines of an offset
mapping, whose noise all outputs of a tile share.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from math import ceil, nan, sqrt

from gpuxbar.mapping.planes import Planes
from gpuxbar.spec import ADC, DAC, CrossbarSpec

__all__ = ["IDEAL", "Read", "ReadPlan", "full_current", "plan_reads", "worst_current"]

WHOLE = 1e-6  # relative rounding of a count of ADC steps


@dataclass(frozen=True)
class Read:
    """One direction of reading.

    Attributes:
        tile: Driven lines of a tile; 0: all.
        code_max: Largest DAC code; 0: nothing is quantised.
        v_lsb: Voltage of one code (or of the largest input without a DAC), V.
        noise: Standard deviation of the current of one conversion, A.
        per_sample: Whether each sample has a DAC range of its own.
        full: Digital value of the largest code where the range is fixed; 0: it follows the data.
        ideal: Whether it is the exact product with the conductances, without the noise of cells too.
        dac_flawed: Whether DACs have errors.
        v_sinh: Voltage over which devices bend currents, V; None: they are ohmic, or know 0 and `v_read` alone.
    """

    tile: int
    code_max: int
    signed: bool
    stream_bits: int
    streams: int
    phases: int
    v_lsb: float
    adc_bits: int
    adc_signed: bool
    noise: float
    per_sample: bool = False
    full: float = 0.0
    ideal: bool = False
    dac_flawed: bool = False
    v_sinh: float | None = None

    @property
    def straight(self) -> bool:
        """Whether what drives the lines is proportional to the digits."""
        return not self.dac_flawed and self.v_sinh is None

    @property
    def adc_code_max(self) -> int:
        """Largest code of the ADC, where there is one."""
        return 2 ** (self.adc_bits - 1) - 1 if self.adc_signed else 2**self.adc_bits - 1

    @property
    def v_max(self) -> float:
        """Voltage of the largest digit, V."""
        return self.v_lsb * (2**self.stream_bits - 1 if self.stream_bits else max(self.code_max, 1))


IDEAL = Read(0, 0, True, 0, 1, 1, 1.0, 0, True, 0.0, ideal=True)


@dataclass(frozen=True)
class ReadPlan:
    """The static half of `bridge.analog_mvm`; JSON, so that a compiled graph sees a constant.

    Attributes:
        inputs, outputs: Wordlines and bitlines of one group, without reference lines.
        precision, g_range: Arithmetic of the products on a GPU, and the largest magnitude of a cell, S.
        g_step, g_offset: Conductance between levels, and of level 0, S, where levels are multiplied (int8).
        reference: (rows, columns) of a tile with a reference line each way; (0, 0): no reference lines.
        stride, padding, dilation: Of the convolution; unused by a linear layer, as is
        line_order: Of its channels and positions on the wordlines of a group; see `spec.Mapping`.
        rank: Which part of a batch that several processes share; it draws the noise of its own rows.
        why: Which collapses were taken, in words.
    """

    forward: Read
    backward: Read
    groups: int
    inputs: int
    outputs: int
    unit: float
    slice_scale: tuple[float, ...]
    generator: str
    seed: int
    name: str
    precision: str = "fp32"
    g_range: float = 0.0
    g_step: float | None = None
    g_offset: float = 0.0
    reference: tuple[int, int] = (0, 0)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    line_order: str = "channel_position"
    rank: int = 0
    why: tuple[str, ...] = ()

    @property
    def reference_lines(self) -> tuple[int, int]:
        """Reference wordlines and bitlines of a group: one for every tile along the axis."""
        rows, cols = self.reference
        return (ceil(self.inputs / rows), ceil(self.outputs / cols)) if rows else (0, 0)

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> ReadPlan:
        data = json.loads(text)
        lists = {key: tuple(value) for key, value in data.items() if isinstance(value, list)}
        reads = {key: Read(**data[key]) for key in ("forward", "backward")}
        return cls(**{**data, **lists, **reads})


def plan_reads(
    spec: CrossbarSpec, *, inputs: int, outputs: int, groups: int, seed: int, name: str = ""
) -> tuple[ReadPlan, Planes]:
    """Plan both directions of a layer with `inputs` wordlines and `outputs` bitlines a group."""
    forward = _read(spec, spec.dac, spec.adc, spec.tile.rows)
    backward = _read(spec, spec.backward_dac, spec.backward_adc, spec.tile.cols)
    converted = [(forward, spec.adc, inputs)] if forward.adc_bits else []
    if backward.adc_bits and spec.backward.mode == "analog":
        converted.append((backward, spec.backward_adc, outputs))
    linear = all(_exact(read, spec, adc, lines) for read, adc, lines in converted)
    planes = Planes.of(spec, collapse=linear)
    if linear:
        uncollapsed = Planes.of(spec, collapse=False)
        forward = _merged(forward, spec, uncollapsed, inputs)
        backward = _merged(backward, spec, uncollapsed, outputs)
        why = "tiles and planes merge: no ADC quantises in either direction"
        if converted:
            why = "tiles, planes and streams merge: every current is a whole number of ADC steps, and none is cut off"
        if forward.stream_bits and not forward.straight:
            why += "; streams are driven apart, since digits are not driven in proportion"
        elif forward.streams > 1:
            why += "; streams do not: the noise depends on what each drives"
        if planes.merge == "offset":
            why += "; reference lines do not: all outputs of a tile share their noise"
    else:
        why = "every plane, stream and tile is converted on its own: an ADC quantises"
    if spec.backward.mode == "ideal":
        backward = IDEAL
    reference = (spec.tile.rows, spec.tile.cols) if planes.merge == "offset" else (0, 0)
    g_step, g_offset = planes.levels(spec) if spec.precision == "int8" else (None, 0.0)
    plan = ReadPlan(
        forward, backward, groups, inputs, outputs, planes.unit, planes.slice_scale, spec.generator, seed, name,
        spec.precision, planes.largest(spec), g_step, g_offset, reference=reference,
        line_order=spec.mapping.line_order, why=(why,),
    )  # fmt: skip
    return plan, planes


def _read(spec: CrossbarSpec, dac: DAC, adc: ADC, tile: int) -> Read:
    two_voltages = dac.bits is not None and dac.digit_max == 1 and not dac.flawed
    bits = 0
    if dac.bits is not None:
        # two phases drive magnitudes even when all their bits go at once
        bits = dac.stream_bits or (dac.code_max.bit_length() if dac.phases == 2 else 0)
    return Read(
        tile=tile,
        code_max=dac.code_max,
        signed=dac.signed,
        stream_bits=bits,
        streams=dac.streams,
        phases=dac.phases if bits else 1,
        v_lsb=dac.v_read / dac.digit_max,
        adc_bits=adc.bits or 0,
        adc_signed=spec.both_signs(dac),
        noise=spec.read_noise.sigma,
        per_sample=dac.range == "sample",
        full=(dac.max or 0.0) if dac.range == "fixed" else 0.0,
        dac_flawed=dac.flawed,
        v_sinh=None if two_voltages else spec.device.v_sinh,
    )


def full_current(adc: ADC, worst: float) -> float:
    """Current of the largest ADC code, A, of `worst_current`; NaN where it is calibrated."""
    return nan if adc.range == "calibrated" else adc.i_max or worst


def worst_current(read: Read, spec: CrossbarSpec, lines: int) -> float:
    """Current of a line with every cell at `g_max` and every input at `v_read`, A, of a read that drives `lines`."""
    return read.v_max * spec.device.g_max * min(read.tile, lines)


def _exact(read: Read, spec: CrossbarSpec, adc: ADC, lines: int) -> bool:
    """Whether conversions leave the currents of a read as they are: whole ADC steps in its range, and nothing beside them.

    Only of float32 products: lower precisions hold the levels of a slice, but not of all slices merged.
    """
    noise, offset = spec.read_noise, spec.mapping.scheme == "offset"
    if noise.sigma or noise.sigma_g or adc.flawed or not read.straight or adc.range == "calibrated":
        return False
    if not read.code_max or spec.levels is None or spec.off_levels or offset or spec.precision != "fp32":
        return False
    lowest = 0.0 if spec.mapping.scheme == "subtracted" else spec.device.g_min
    window = spec.device.g_max - spec.device.g_min
    full = full_current(adc, worst_current(read, spec, lines))
    steps = [read.v_lsb * g * read.adc_code_max / full for g in (lowest, window / (spec.levels - 1))]
    whole = all(abs(count - round(count)) <= WHOLE * count for count in steps)
    return whole and read.v_max * (lowest + window) * min(read.tile, lines) <= (1 + WHOLE) * full


def _merged(read: Read, spec: CrossbarSpec, planes: Planes, lines: int) -> Read:
    """The read as one product over all driven lines, with the summed variance of what it merges."""
    slices = sum(s * s for s in planes.slice_scale)
    noise = read.noise * sqrt(slices * ceil(lines / read.tile))
    read = replace(read, tile=0, noise=noise, adc_bits=0)
    if (spec.read_noise.sigma_g and read.streams > 1) or (read.stream_bits and not read.straight):
        return read
    passes = sum(4.0 ** (read.stream_bits * k) for k in range(read.streams)) * read.phases
    return replace(read, stream_bits=0, streams=1, phases=1, noise=noise * sqrt(passes))
