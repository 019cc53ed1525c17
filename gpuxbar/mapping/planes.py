"""The conductance planes of a weight: w = w_max * unit * sum_s slice_scale[s] g[s]."""

from __future__ import annotations

from dataclasses import dataclass

from gpuxbar.spec import CrossbarSpec

__all__ = ["Planes"]


@dataclass(frozen=True)
class Planes:
    """Digital weights of the planes of a mapping.

    Attributes:
        slice_scale: Weight of each plane: positive slices (least significant first), then negative ones.
        unit: Weight, relative to the largest, of one siemens in a plane of scale 1; 1/S.
        merge: "none" keeps the two arrays of a pair, "subtract" joins them into one plane a slice, "all" joins
            every plane into one; "offset" is one array, with the weight 0 at the middle conductance.
    """

    slice_scale: tuple[float, ...]
    unit: float
    merge: str

    def largest(self, spec: CrossbarSpec) -> float:
        """Largest magnitude a plane is meant to hold, S; spread and write noise may exceed it a little."""
        device, mapping = spec.device, spec.mapping
        if self.merge in ("none", "offset"):
            return device.g_max
        base = 2.0 ** (mapping.slice_bits or 0)
        weights = sum(base**k for k in range(mapping.slices)) if self.merge == "all" else 1.0
        return weights * (device.g_max - device.g_min)

    def levels(self, spec: CrossbarSpec) -> tuple[float, float]:
        """(step, conductance of level 0), S: a plane of devices with levels holds whole ones from -128 to 127."""
        device, bits = spec.device, spec.mapping.slice_bits
        count = 2**bits if bits else device.levels or 2
        step = (device.g_max - device.g_min) / (count - 1)
        if self.merge == "subtract":
            return step, 0.0
        return step, device.g_min + (128 * step if count > 128 else 0.0)

    @classmethod
    def of(cls, spec: CrossbarSpec, *, collapse: bool) -> Planes:
        mapping, device = spec.mapping, spec.device
        base = 2 ** (mapping.slice_bits or 0)
        slices = [float(base**k) for k in range(mapping.slices)]
        unit = 1.0 / (device.g_max - device.g_min)
        if mapping.scheme == "offset":
            # a full weight lies half a window off the middle; of an even number of levels, the last is not used
            steps = 2 if device.levels is None else device.levels - 1
            return cls((1.0,), unit * steps / (steps // 2), "offset")
        if mapping.slice_bits is not None:
            # digits of base - 1 make weight 1; a window holds that, and more where there is headroom
            unit *= (base * 2**spec.headroom_bits - 1) / (base**mapping.slices - 1)
        if collapse:
            return cls((1.0,), unit, "all")
        if mapping.scheme == "subtracted":
            return cls(tuple(slices), unit, "subtract")
        return cls((*slices, *(-s for s in slices)), unit, "none")
