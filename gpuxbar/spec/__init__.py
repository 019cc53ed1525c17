"""Frozen, validated descriptions of crossbar layers, in SI units."""

from gpuxbar.spec import presets
from gpuxbar.spec.errors import SpecError
from gpuxbar.spec.io import load_spec, parse_value, save_spec
from gpuxbar.spec.model import (
    ADC,
    DAC,
    Agarwal,
    Backward,
    CrossbarSpec,
    Device,
    Mapping,
    NeuroSim,
    Parasitics,
    Programming,
    ReadNoise,
    SoftBounds,
    Tile,
    UpdateLaw,
)

__all__ = [
    "ADC",
    "DAC",
    "Agarwal",
    "Backward",
    "CrossbarSpec",
    "Device",
    "Mapping",
    "NeuroSim",
    "Parasitics",
    "Programming",
    "ReadNoise",
    "SoftBounds",
    "SpecError",
    "Tile",
    "UpdateLaw",
    "load_spec",
    "parse_value",
    "presets",
    "save_spec",
]
