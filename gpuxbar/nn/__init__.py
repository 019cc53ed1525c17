"""Layers on crossbars, conversion of models, calibration of converters."""

from gpuxbar.nn.ageing import age, program, unprogram
from gpuxbar.nn.calibrate import calibrate
from gpuxbar.nn.checkpoint import same_reads
from gpuxbar.nn.convert import Report, convert
from gpuxbar.nn.distribute import distribute
from gpuxbar.nn.layers import AnalogConv1d, AnalogConv2d, AnalogLinear

__all__ = [
    "AnalogConv1d",
    "AnalogConv2d",
    "AnalogLinear",
    "Report",
    "age",
    "calibrate",
    "convert",
    "distribute",
    "program",
    "same_reads",
    "unprogram",
]
