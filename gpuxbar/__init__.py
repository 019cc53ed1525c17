"""Train neural networks as if every matrix product ran on analog resistive crossbars."""

from gpuxbar import circuit, nn, ops, optim, spec
from gpuxbar.nn import (
    age,
    calibrate,
    conversion_errors,
    convert,
    distribute,
    program,
    same_reads,
    telemetry,
    unprogram,
)
from gpuxbar.optim import capture_step
from gpuxbar.spec import CrossbarSpec, SpecError, load_spec, presets, save_spec

__version__ = "0.1.0"
__all__ = [
    "CrossbarSpec",
    "SpecError",
    "__version__",
    "age",
    "calibrate",
    "capture_step",
    "circuit",
    "conversion_errors",
    "convert",
    "distribute",
    "load_spec",
    "nn",
    "ops",
    "optim",
    "presets",
    "program",
    "same_reads",
    "save_spec",
    "spec",
    "telemetry",
    "unprogram",
]
