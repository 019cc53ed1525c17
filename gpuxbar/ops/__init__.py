"""Array operations on NumPy and CuPy arrays, one a module."""

from gpuxbar.ops.anchored_conductance import Anchor, anchored_conductance
from gpuxbar.ops.carry import carry
from gpuxbar.ops.checks import NotFiniteError
from gpuxbar.ops.chop import chop
from gpuxbar.ops.conv_outer_product import conv_outer_product
from gpuxbar.ops.dac_clip import dac_clip_gradient
from gpuxbar.ops.dac_quantize import Dac, dac_fit, dac_quantize
from gpuxbar.ops.device_map import device_map, draw_device_map, spread_names
from gpuxbar.ops.device_update import device_update
from gpuxbar.ops.drift import drift
from gpuxbar.ops.effective_conductance import Method, effective_conductance
from gpuxbar.ops.effective_conductance_gradient import effective_conductance_gradient
from gpuxbar.ops.lstm_gates import lstm_gates, lstm_gates_gradient
from gpuxbar.ops.outer_product import outer_product
from gpuxbar.ops.packed_conductance import PackedConductance
from gpuxbar.ops.pairs import Pairs
from gpuxbar.ops.program import program, reprogram
from gpuxbar.ops.pulse_update import pulse_update
from gpuxbar.ops.relax import relax
from gpuxbar.ops.solve_for_inputs import solve_for_inputs, solve_for_inputs_gradient
from gpuxbar.ops.streamed_update import streamed_update
from gpuxbar.ops.tile_mvm import tile_mvm
from gpuxbar.reference.tile_mvm import ConvGeometry, Drivers

__all__ = [
    "Anchor",
    "ConvGeometry",
    "Dac",
    "Drivers",
    "Method",
    "NotFiniteError",
    "PackedConductance",
    "Pairs",
    "anchored_conductance",
    "carry",
    "chop",
    "conv_outer_product",
    "dac_clip_gradient",
    "dac_fit",
    "dac_quantize",
    "device_map",
    "device_update",
    "draw_device_map",
    "drift",
    "effective_conductance",
    "effective_conductance_gradient",
    "lstm_gates",
    "lstm_gates_gradient",
    "outer_product",
    "program",
    "pulse_update",
    "relax",
    "reprogram",
    "solve_for_inputs",
    "solve_for_inputs_gradient",
    "spread_names",
    "streamed_update",
    "tile_mvm",
]
