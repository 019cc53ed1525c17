"""Optimisers that write to the devices themselves."""

from gpuxbar.optim.base import InSituOptimizer, Rule
from gpuxbar.optim.build import OPTIMIZERS, build_optimizer
from gpuxbar.optim.capture import CapturedStep, capture_step
from gpuxbar.optim.in_situ import InSituSGD
from gpuxbar.optim.mixed_precision import MixedPrecision
from gpuxbar.optim.tiki_taka import AGAD, ChoppedTikiTakaV2, TikiTaka, TikiTakaV2

__all__ = [
    "AGAD",
    "OPTIMIZERS",
    "CapturedStep",
    "ChoppedTikiTakaV2",
    "InSituOptimizer",
    "InSituSGD",
    "MixedPrecision",
    "Rule",
    "TikiTaka",
    "TikiTakaV2",
    "build_optimizer",
    "capture_step",
]
