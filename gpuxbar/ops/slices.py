"""How a weight lies on slices, as the kernels that train them take it."""

from __future__ import annotations

import ctypes

from gpuxbar.ops.checks import check_integers
from gpuxbar.spec import Carry

__all__ = ["Slices", "check_slices"]


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


def check_slices(op: str, slices: int, slice_bits: int | None, carry: Carry | None) -> None:
    """Refuse slices without bits or without a carry, and a carry without slices."""
    check_integers(op, slices=slices, slice_bits=slice_bits)
    if slices < 1 or (slices > 1) != (carry is not None) or (slices > 1) != (slice_bits is not None):
        raise ValueError(
            f"{op}: `slices` must be 1, or at least 2 with slice_bits and a carry, got {slices} with slice_bits={slice_bits} "
            f"and {'no carry' if carry is None else 'a carry'}; pass all three or none"
        )
    if slice_bits is not None and not 1 <= slice_bits <= min(8, 32 // slices):
        raise ValueError(
            f"{op}: `slice_bits` must be 1 to {min(8, 32 // slices)} for {slices} slices, got {slice_bits}; a float32 weight "
            "holds 32 bits at most"
        )
