"""Frozen, validated descriptions of crossbar layers, in SI units."""

from gpuxbar.spec.model import (
    ADC,
    DAC,
    Agarwal,
    Backward,
    CrossbarSpec,
    Device,
    Mapping,
    NeuroSim,
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
    "Programming",
    "ReadNoise",
    "SoftBounds",
    "Tile",
    "UpdateLaw",
]
