"""Pairs of devices that hold weights trained in situ: their arrays and what they are made of, as operators change them."""

from __future__ import annotations

import ctypes
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any

from gpuxbar import reference
from gpuxbar.ops.checks import (
    check_array,
    check_integers,
    check_kind,
    check_shape,
    check_window,
    check_written,
)
from gpuxbar.ops.device_map import spread_names
from gpuxbar.ops.laws import parameters
from gpuxbar.ops.program import IDEAL
from gpuxbar.ops.round_keys import RoundKeys
from gpuxbar.spec import Carry, Endurance, Law, Programming, UpdateLaw

__all__ = ["Pairs", "Slices", "Wear"]

OP = "Pairs"


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of devices, whose differences are weights, as `device_update`, `pulse_update`, `streamed_update`, `carry` and
    `relax` change them in place.

    One pair holds a weight, or several hold the digits of it, its slices: a number of base 2**slice_bits. Arrays are all
    NumPy or all CuPy, C-contiguous, and lie alike: the positive devices, least significant slice first, then the negative
    ones, by wordline and bitline of G arrays side by side, [2 slices, G * I, O].

    Args:
        g: Conductances, float32, S; finite, updated in place.
        law: How devices answer pulses: an update law of the spec.
        g_min, g_max: Conductance window, S.
        slice_bits, carry: Bits of a slice, and how slices share a change; for several pairs a weight, and only for them.
        g_held: Conductances that devices with write noise hold where `g` is what they show, like `g` and updated in place;
            given with a law of write noise and only with it.
        endurance: How many pulses devices bear; those that have failed never move again. None: any number.
        pulse_count: Pulses that devices have taken, int32 like `g` and updated in place, zeros at first; given with a limit
            of `endurance.pulses` and only with it. A device that failed has minus its count.
        device_map: Normals of the devices, float16 [K, 2 slices, G * I, O], in place of those that the seed draws; see
            `ops.device_map`. None: drawn.
        programming: What a write leaves, as by `program` with this seed: the stuck cells, which never move, and the spread
            and noise of the writes of a carry.
        seed: Of all draws.

    Raises:
        TypeError: An array has another dtype, or a part of the spec is another.
        ValueError: Shapes disagree, an array is not contiguous or must not be written to, or a setting is out of range or
            does not go with another.
    """

    g: Any
    _: KW_ONLY
    law: UpdateLaw
    g_min: float
    g_max: float
    slice_bits: int | None = None
    carry: Carry | None = None
    g_held: Any = None
    endurance: Endurance | None = None
    pulse_count: Any = None
    device_map: Any = None
    programming: Programming = IDEAL
    seed: int = 0

    def __post_init__(self) -> None:
        check_array(OP, "g", self.g, "float32", 3)
        check_window(OP, self.g_min, self.g_max)
        check_integers(OP, slice_bits=self.slice_bits, seed=self.seed)
        if not isinstance(self.law, Law):
            raise TypeError(
                f"{OP}: `law` must be an update law of the spec, got {self.law!r}; build one, such as SoftBounds()"
            )
        for name, kind in (("carry", Carry), ("endurance", Endurance), ("programming", Programming)):
            part = getattr(self, name)
            if part is not None or name == "programming":
                check_kind(OP, name, part, kind)
        planes, bits, sliced = len(self.g), self.slice_bits, self.carry is not None
        if sliced != (bits is not None) or (planes < 4 or planes % 2 if sliced else planes != 2):
            raise ValueError(
                f"{OP}: `g` must have 2 planes, or 4 and more by twos with slice_bits and a carry, got {planes} with "
                f"slice_bits={bits} and {'a' if sliced else 'no'} carry; pass both or neither"
            )
        if bits is not None and not 1 <= bits <= min(8, 32 // self.slices):
            raise ValueError(
                f"{OP}: `slice_bits` must be 1 to {min(8, 32 // self.slices)} for {self.slices} slices, got {bits}; a float32 "
                "weight holds 32 bits at most"
            )
        noise, limit = self.law.write_noise, None if self.endurance is None else self.endurance.pulses
        if (self.g_held is not None) != (noise > 0):
            raise ValueError(
                f"{OP}: `g_held` must go with a law of write noise and only with it, got "
                f"{'none' if self.g_held is None else 'one'} for write_noise={noise:g} S; pass the conductances that the "
                "devices hold"
            )
        if (self.pulse_count is not None) != (limit is not None):
            raise ValueError(
                f"{OP}: `pulse_count` must go with an endurance and only with it, got "
                f"{'none' if self.pulse_count is None else 'one'} for endurance.pulses={limit}; pass both or neither"
            )
        if limit is not None and self.law.nominal_pulses is None:
            raise ValueError(
                f"{OP}: `law` must have pulses to count them, got {self.law.law!r}; choose law='constant_step', say"
            )
        for name, array, dtype in (
            ("g_held", self.g_held, "float32"),
            ("pulse_count", self.pulse_count, "int32"),
        ):
            if array is not None:
                check_array(OP, name, array, dtype, 3)
                check_shape(OP, name, array, self.g.shape, "check the axes", "this `g`")
        if self.device_map is not None:
            check_array(OP, "device_map", self.device_map, "float16", 4)
            names = spread_names(self.law)
            check_shape(
                OP, "device_map", self.device_map, (len(names), *self.g.shape), "make it by ops.device_map for that law",
                f"a law that spreads in {', '.join(names) or 'nothing'}",
            )  # fmt: skip
        check_written(OP, g=self.g, g_held=self.g_held, pulse_count=self.pulse_count)

    @property
    def slices(self) -> int:
        """Pairs of a weight."""
        return len(self.g) // 2

    @property
    def balanced(self) -> bool:
        """Whether pairs are written around the middle of the window, or with one device at its lower end."""
        return self.law.sides != "one_sided"

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What they are made of as the kernels of updates take it, by the names of their arguments."""
        return {
            "law": parameters(self.law, self.g_min, self.g_max), "endurance": Wear.of(self.endurance),
            "slices": Slices.of(self.slices, self.slice_bits, self.carry), "seed": self.seed, "g_min": self.g_min,
            "range": self.g_max - self.g_min, "stuck_low": self.programming.stuck_at_g_min,
            "stuck_high": self.programming.stuck_at_g_max,
        }  # fmt: skip

    @cached_property
    def on_device(self) -> dict[str, Any]:
        """The same for CUDA kernels, which take the keys that the seed makes."""
        return {
            **{name: value for name, value in self.settings.items() if name != "seed"},
            "keys": RoundKeys.of(self.seed),
        }

    @cached_property
    def macros(self) -> dict[str, int]:
        """What these kernels are compiled for."""
        counted, sliced = self.pulse_count is not None, self.carry is not None
        law, mapped = self.settings["law"], self.device_map is not None
        return {
            "LAW": law.law, "SIDES": law.sides, "TRAITS": law.traits, "MAPPED": int(mapped), "COUNTED": int(counted),
            "SLICED": int(sliced),
        }  # fmt: skip

    @property
    def plain(self) -> dict[str, Any]:
        """All but `g` and `g_held` as the reference's updates take it; they change the count of pulses in place."""
        devices = self.device_map
        planes = None if devices is None else dict(zip(spread_names(self.law), devices, strict=True))
        return {
            "law": self.law.model_dump(),
            "endurance": None if self.endurance is None else self.endurance.model_dump(),
            "pulse_count": self.pulse_count,
            "device_map": planes,
            "stuck_at_g_min": self.programming.stuck_at_g_min,
            "stuck_at_g_max": self.programming.stuck_at_g_max,
            "seed": self.seed,
            **self._read,
        }

    @property
    def _read(self) -> dict[str, Any]:
        carry = None if self.carry is None else self.carry.model_dump()
        lie = {"slices": self.slices, "slice_bits": self.slice_bits, "carry": carry}
        return {"g_min": self.g_min, "g_max": self.g_max, **lie}

    def read_out(self, w_max: Any, groups: int) -> Any:
        """The weights that `g` stands for, [G, O, I], in float64; of NumPy arrays alone."""
        return reference.read_out(self.g, w_max=w_max, groups=groups, **self._read)


class Wear(ctypes.Structure):
    """Twin of `struct Endurance` in kernels/include/gpuxbar/endurance.cuh."""

    _fields_ = [("pulses", ctypes.c_float), ("spread", ctypes.c_float), ("failed", ctypes.c_int32)]

    @classmethod
    def of(cls, endurance: Endurance | None) -> Wear:
        """What is not set is not looked at: there are no counts then."""
        if endurance is None or endurance.pulses is None:
            return cls()
        return cls(endurance.pulses, endurance.spread, FAILED[endurance.failed])


FAILED = {"held": 0, "g_min": 1, "g_max": 2}  # enum Failed in endurance.cuh


class Slices(ctypes.Structure):
    """Twin of `struct Slices` in kernels/include/gpuxbar/slices.cuh."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("count", "bits", "lowest")),
        *((name, ctypes.c_float) for name in ("full", "window")),
    ]  # fmt: skip

    @classmethod
    def of(cls, slices: int, slice_bits: int | None, carry: Carry | None) -> Slices:
        """Checked settings; one slice is a pair of one unit, which takes all of a change."""
        if carry is None or slice_bits is None:
            return cls(1, 0, 1, 1.0, 1.0)
        lowest = carry.scheme == "periodic"
        return cls(slices, slice_bits, lowest, 2.0 ** (slices * slice_bits) - 1, carry.window(slice_bits))

    @property
    def lowest_share(self) -> float:
        """Share of a full weight of the whole window of the lowest slice."""
        return float(self.window / self.full)
