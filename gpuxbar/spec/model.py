"""The description of a crossbar layer: frozen, validated, serialisable, in SI units.

Every default is ideal: an untouched `CrossbarSpec()` computes what `torch.nn` computes, on tiles.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from gpuxbar.spec.ageing import Drift, DriftLaw, Endurance, MeasuredDrift, Retention
from gpuxbar.spec.array import STEEPEST, Device, Mapping, Parasitics, Programming, Tile
from gpuxbar.spec.carry import Carry
from gpuxbar.spec.converters import ADC, DAC, ReadNoise
from gpuxbar.spec.errors import SpecError
from gpuxbar.spec.laws import UpdateLaw
from gpuxbar.spec.part import Part
from gpuxbar.spec.pulses import PulseTrain, check_train
from gpuxbar.spec.refresh import Refresh

__all__ = ["Backward", "CrossbarSpec"]

HELD = 1 + 1e-6  # of a range, by which rounding may leave currents beyond it


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
        """Noise and the like in S, A and V, not in shares of a window or a range: it is no larger than what it is around."""
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
            ("retention.g_rest", self.retention.g_rest or 0.0, g_max, "S", "the device.g_max"),
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
        wires, device = self.parasitics, 1 / self.device.g_max
        for name in ("r_wordline", "r_bitline"):
            ohms = getattr(wires, name)
            if wires.active and ohms > device:
                raise ValueError(
                    f"CrossbarSpec: `parasitics.{name}` must be at most {device:g} ohm, which a device at device.g_max has, got {ohms:g} "
                    "ohm between two cells; give wires in ohm and devices in S"
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
        if self.retention.tau is not None and self.update is None:
            raise ValueError(
                "CrossbarSpec: `update` must be a law where devices lose what they were trained to (retention.tau), got None; choose one, or "
                "leave retention.tau out: what was programmed once loses by `drift`"
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
        if not isinstance(overrides, dict):
            raise TypeError(
                f"CrossbarSpec: `overrides` must be a dict of settings by name, got {type(overrides).__name__}; for instance "
                '{"adc": {"bits": 6}}'
            )
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
