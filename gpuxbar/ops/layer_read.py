"""A layer's read on the CPU in one call: DAC, tiles and converters, by what the layer holds."""

from __future__ import annotations

from ctypes import c_double, c_int64, c_void_p
from typing import ClassVar

from gpuxbar.launch import host_call, library
from gpuxbar.ops.checks import require_finite_values
from gpuxbar.ops.tile_mvm import TileMvm
from gpuxbar.reference import SMALLEST_RANGE

__all__ = ["LayerRead"]


class LayerRead(TileMvm):
    """Twin of `struct LayerRead` in kernels/host/layer_read.cpp: what `dac_quantize` or `dac_fit`, then `tile_mvm`, are told."""

    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("x", "driven", "dac_lsb", "w_max", "adc_range")),
        ("unit", c_double),
        *((name, c_int64) for name in (
            "rows", "channels", "each", "lsb_count", "fits", "dac_code_max", "dac_signed",
        )),
    ]  # fmt: skip

    def run(self, what: str) -> None:
        """Read; the error about values that are not finite calls them `what`."""
        bad = c_int64()
        host_call(library(), "gpuxbar_layer_read", self, SMALLEST_RANGE, bad)
        require_finite_values(what, bad.value, "bad data")
