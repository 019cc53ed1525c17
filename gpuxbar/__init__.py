"""Train neural networks as if every matrix product ran on analog resistive crossbars."""

from gpuxbar import nn, ops, spec
from gpuxbar.nn import calibrate, convert
from gpuxbar.spec import CrossbarSpec

__version__ = "0.1.0"
__all__ = ["CrossbarSpec", "__version__", "calibrate", "convert", "nn", "ops", "spec"]
