"""The equations in NumPy float64: oracle of the other backends, and fallback without a compiler."""

from gpuxbar.reference.dac_quantize import dac_quantize
from gpuxbar.reference.device_update import device_update
from gpuxbar.reference.laws import symmetry_point
from gpuxbar.reference.program import program
from gpuxbar.reference.random import Purpose, normals, philox, uniforms
from gpuxbar.reference.tile_mvm import ConvGeometry, fold, tile_mvm, unfold

__all__ = [
    "ConvGeometry",
    "Purpose",
    "dac_quantize",
    "device_update",
    "fold",
    "normals",
    "philox",
    "program",
    "symmetry_point",
    "tile_mvm",
    "unfold",
    "uniforms",
]
