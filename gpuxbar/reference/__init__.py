"""The equations in NumPy float64: oracle of the other backends, and fallback without a compiler."""

from gpuxbar.reference.carry import carry
from gpuxbar.reference.chop import chop
from gpuxbar.reference.dac_clip import dac_clip_gradient
from gpuxbar.reference.dac_quantize import SMALLEST_RANGE, dac_fit, dac_quantize
from gpuxbar.reference.device_update import device_update, drawn_devices, read_out
from gpuxbar.reference.drift import drift
from gpuxbar.reference.effective_conductance import METHODS, effective_conductance
from gpuxbar.reference.lstm_gates import lstm_gates, lstm_gates_gradient
from gpuxbar.reference.nodal import nodal_conductance, node_voltages
from gpuxbar.reference.outer_product import conv_outer_product, outer_product
from gpuxbar.reference.program import fingerprint, program, reprogram
from gpuxbar.reference.pulse_update import pulse_trains, pulse_update
from gpuxbar.reference.random import Purpose, normals, philox, uniforms
from gpuxbar.reference.relax import relax
from gpuxbar.reference.streamed_update import streamed_digits, streamed_update
from gpuxbar.reference.tile_mvm import ConvGeometry, Drivers, bent, fold, tile_mvm, unfold
from gpuxbar.reference.wire_currents import (
    effective_conductance_gradient,
    solve_for_inputs,
    solve_for_inputs_gradient,
)

__all__ = [
    "METHODS",
    "SMALLEST_RANGE",
    "ConvGeometry",
    "Drivers",
    "Purpose",
    "bent",
    "carry",
    "chop",
    "conv_outer_product",
    "dac_clip_gradient",
    "dac_fit",
    "dac_quantize",
    "device_update",
    "drawn_devices",
    "drift",
    "effective_conductance",
    "effective_conductance_gradient",
    "fingerprint",
    "fold",
    "lstm_gates",
    "lstm_gates_gradient",
    "nodal_conductance",
    "node_voltages",
    "normals",
    "outer_product",
    "philox",
    "program",
    "pulse_trains",
    "pulse_update",
    "read_out",
    "relax",
    "reprogram",
    "solve_for_inputs",
    "solve_for_inputs_gradient",
    "streamed_digits",
    "streamed_update",
    "tile_mvm",
    "unfold",
    "uniforms",
]
