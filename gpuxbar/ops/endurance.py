"""The endurance of devices as the kernels that write them take it."""

from __future__ import annotations

import ctypes
from typing import Any

from gpuxbar.ops.checks import check_array
from gpuxbar.spec import Endurance

__all__ = ["Wear", "check_counts", "check_endurance"]

FAILED = {"held": 0, "g_min": 1, "g_max": 2}  # enum Failed in endurance.cuh


class Wear(ctypes.Structure):
    """Twin of `struct Endurance` in kernels/include/gpuxbar/endurance.cuh."""

    _fields_ = [("pulses", ctypes.c_float), ("spread", ctypes.c_float), ("failed", ctypes.c_int32)]

    @classmethod
    def of(cls, endurance: Endurance | None) -> Wear:
        """What is not set is not looked at: there are no counts then."""
        if endurance is None or endurance.pulses is None:
            return cls()
        return cls(endurance.pulses, endurance.spread, FAILED[endurance.failed])


def check_endurance(op: str, endurance: Endurance | None, pulse_count: Any, law: Any, shape: Any) -> None:
    """Refuse counts without an endurance, or the other way round."""
    limited = endurance is not None and endurance.pulses is not None
    if limited != (pulse_count is not None):
        raise ValueError(
            f"{op}: `pulse_count` must go with an endurance and only with it, got "
            f"{'none' if pulse_count is None else 'one'} for endurance.pulses="
            f"{None if endurance is None else endurance.pulses}; pass both or neither"
        )
    if pulse_count is None:
        return
    if law.nominal_pulses is None:
        raise ValueError(
            f"{op}: `law` must have pulses to count them, got {law.law!r}; choose law='constant_step', say"
        )
    check_counts(op, pulse_count, shape)


def check_counts(op: str, pulse_count: Any, shape: Any) -> None:
    """Refuse counts of other devices than those of that shape."""
    check_array(op, "pulse_count", pulse_count, "int32", 3)
    if tuple(pulse_count.shape) != tuple(shape):
        raise ValueError(
            f"{op}: `pulse_count` must have the shape of g, {tuple(shape)}, got {tuple(pulse_count.shape)}; check the axes"
        )
