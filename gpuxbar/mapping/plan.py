"""Everything static about reading a layer forwards and backwards, and which exact collapses it takes.

Without an ADC a read is linear: planes, streams and tiles merge into one product, and their independent
Gaussian noises into one draw of the summed variance. With one, every conversion is computed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from math import ceil, sqrt

from gpuxbar.mapping.planes import Planes
from gpuxbar.spec import ADC, DAC, CrossbarSpec

__all__ = ["Read", "ReadPlan", "plan_reads"]


@dataclass(frozen=True)
class Read:
    """One direction of reading.

    Attributes:
        tile: Driven lines of a tile; 0: all.
        code_max: Largest DAC code; 0: nothing is quantised.
        v_lsb: Voltage of one code (or of the largest input without a DAC), V.
        noise: Standard deviation of the current of one conversion, A.
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


@dataclass(frozen=True)
class ReadPlan:
    """The static half of `bridge.analog_mvm`; JSON, so that a compiled graph sees a constant."""

    forward: Read
    backward: Read
    groups: int
    unit: float
    slice_scale: tuple[float, ...]
    generator: str
    seed: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    why: tuple[str, ...] = ()

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> ReadPlan:
        data = json.loads(text)
        lists = {key: tuple(value) for key, value in data.items() if isinstance(value, list)}
        reads = {key: Read(**data[key]) for key in ("forward", "backward")}
        return cls(**{**data, **lists, **reads})


def plan_reads(
    spec: CrossbarSpec, *, inputs: int, outputs: int, groups: int, seed: int
) -> tuple[ReadPlan, Planes]:
    """Plan both directions of a layer with `inputs` wordlines and `outputs` bitlines a group."""
    collapse = spec.adc.bits is None and spec.backward_adc.bits is None
    planes = Planes.of(spec, collapse=collapse)
    uncollapsed = Planes.of(spec, collapse=False)
    forward = _read(spec, spec.dac, spec.adc, spec.tile.rows)
    backward = _read(spec, spec.backward_dac, spec.backward_adc, spec.tile.cols)
    if collapse:
        forward = _merged(forward, spec.dac, uncollapsed, inputs)
        backward = _merged(backward, spec.backward_dac, uncollapsed, outputs)
        why = ("planes, streams and tiles merge: no ADC quantises in either direction",)
    else:
        why = ("every plane, stream and tile is converted on its own: an ADC quantises",)
    if spec.backward.mode == "ideal":
        backward = Read(0, 0, True, 0, 1, 1, 1.0, 0, True, 0.0)
    plan = ReadPlan(forward, backward, groups, planes.unit, planes.slice_scale, spec.generator, seed, why=why)
    return plan, planes


def _read(spec: CrossbarSpec, dac: DAC, adc: ADC, tile: int) -> Read:
    one_sided = dac.phases == 2 or not dac.signed
    driven = 2**dac.stream_bits - 1 if dac.stream_bits else max(dac.code_max, 1)
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
        v_lsb=dac.v_read / driven,
        adc_bits=adc.bits or 0,
        adc_signed=not (one_sided and spec.mapping.scheme == "differential"),
        noise=spec.read_noise.sigma,
    )


def _merged(read: Read, dac: DAC, planes: Planes, lines: int) -> Read:
    streams = sum(4.0 ** (read.stream_bits * k) for k in range(read.streams)) * read.phases
    slices = sum(s * s for s in planes.slice_scale)
    noise = read.noise * sqrt(streams * slices * ceil(lines / read.tile))
    return replace(read, tile=0, stream_bits=0, streams=1, phases=1, noise=noise)
