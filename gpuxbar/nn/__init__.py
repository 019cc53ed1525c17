"""Layers on crossbars, conversion of models, calibration of converters, and a look at what became of their arrays."""

from gpuxbar.nn.ageing import age, program, unprogram
from gpuxbar.nn.calibrate import calibrate
from gpuxbar.nn.checkpoint import same_reads
from gpuxbar.nn.conversion_errors import ConversionErrors, conversion_errors
from gpuxbar.nn.convert import convert
from gpuxbar.nn.distribute import distribute
from gpuxbar.nn.layers import AnalogConv1d, AnalogConv2d, AnalogLinear
from gpuxbar.nn.report import Report
from gpuxbar.nn.telemetry import Telemetry, telemetry

__all__ = [
    "AnalogConv1d",
    "AnalogConv2d",
    "AnalogLinear",
    "ConversionErrors",
    "Report",
    "Telemetry",
    "age",
    "calibrate",
    "conversion_errors",
    "convert",
    "distribute",
    "program",
    "same_reads",
    "telemetry",
    "unprogram",
]
