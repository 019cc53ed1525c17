"""The keys of Philox's rounds as a kernel takes them."""

from __future__ import annotations

import ctypes
from functools import lru_cache

from gpuxbar.reference.random import round_keys

__all__ = ["RoundKeys"]


class RoundKeys(ctypes.Structure):
    """Twin of `struct RoundKeys` in kernels/include/gpuxbar/philox.cuh."""

    _fields_ = [("low", ctypes.c_uint32 * 10), ("high", ctypes.c_uint32 * 10)]

    @classmethod
    @lru_cache(maxsize=4096)
    def of(cls, seed: int) -> RoundKeys:
        """Those of a seed; shared by all calls, so only to be read."""
        keys = cls()
        for i, key in enumerate(round_keys(seed)):
            keys.low[i], keys.high[i] = key & 0xFFFFFFFF, key >> 32
        return keys
