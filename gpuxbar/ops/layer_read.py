"""A layer's read on the CPU in one call, DAC, tiles and converters, and its backward pass in another, by what the layer holds."""

from __future__ import annotations

from ctypes import addressof, c_double, c_int64, c_void_p
from typing import ClassVar

from gpuxbar.launch import host_call, library
from gpuxbar.ops.checks import require_finite_values
from gpuxbar.ops.tile_read import TileMvm
from gpuxbar.reference import SMALLEST_RANGE

__all__ = ["LayerGradient", "LayerRead"]


class LayerRead(TileMvm):
    """Twin of `struct LayerRead` in kernels/host/layer_read.cpp: what `dac_quantize` or `dac_fit`, then `tile_mvm`, are told."""

    kernel = "gpuxbar_layer_read"
    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("x", "driven", "dac_lsb", "w_max", "adc_range", "counter", "number")),
        ("unit", c_double),
        *((name, c_int64) for name in (
            "rows", "channels", "each", "lsb_count", "fits", "dac_code_max", "dac_signed", "count",
        )),
    ]  # fmt: skip

    def run(self, what: str) -> None:
        """Read; the error about values that are not finite calls them `what`."""
        bad = c_int64()
        host_call(library(), self.kernel, addressof(self), SMALLEST_RANGE, addressof(bad))
        require_finite_values(what, bad.value, "bad data")


class LayerGradient(LayerRead):
    """Twin of `struct LayerGradient` there: what the transposed read, `outer_product` and the sum of a bias' gradient are told."""

    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("d", "passed", "v", "v_unit", "dw", "dbias")),
        *((name, c_int64) for name in ("v_is_code", "v_units")),
    ]
    kernel = "gpuxbar_layer_gradient"
