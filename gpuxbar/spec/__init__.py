"""Frozen, validated descriptions of crossbar layers, in SI units."""

from gpuxbar.spec import presets
from gpuxbar.spec.ageing import MOST_SHARES, Drift, DriftLaw, Endurance, MeasuredDrift, Retention
from gpuxbar.spec.array import Device, Mapping, Parasitics, Programming, Tile
from gpuxbar.spec.carry import Carry
from gpuxbar.spec.converters import ADC, DAC, ReadNoise
from gpuxbar.spec.devices import PublishedDevice, published_device
from gpuxbar.spec.errors import SpecError
from gpuxbar.spec.io import load_spec, nested, parse_value, save_spec
from gpuxbar.spec.laws import (
    Agarwal,
    AgarwalSymmetric,
    ConstantStep,
    ExponentialStep,
    Ideal,
    Law,
    LinearStep,
    LookupTable,
    NeuroSim,
    PiecewiseStep,
    PowerStep,
    SoftBounds,
    UpdateLaw,
)
from gpuxbar.spec.model import Backward, CrossbarSpec
from gpuxbar.spec.pulses import PulseTrain, check_train
from gpuxbar.spec.refresh import Refresh

__all__ = [
    "ADC",
    "DAC",
    "MOST_SHARES",
    "Agarwal",
    "AgarwalSymmetric",
    "Backward",
    "Carry",
    "ConstantStep",
    "CrossbarSpec",
    "Device",
    "Drift",
    "DriftLaw",
    "Endurance",
    "ExponentialStep",
    "Ideal",
    "Law",
    "LinearStep",
    "LookupTable",
    "Mapping",
    "MeasuredDrift",
    "NeuroSim",
    "Parasitics",
    "PiecewiseStep",
    "PowerStep",
    "Programming",
    "PublishedDevice",
    "PulseTrain",
    "ReadNoise",
    "Refresh",
    "Retention",
    "SoftBounds",
    "SpecError",
    "Tile",
    "UpdateLaw",
    "check_train",
    "load_spec",
    "nested",
    "parse_value",
    "presets",
    "published_device",
    "save_spec",
]
