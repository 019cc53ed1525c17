"""In-situ optimisers by name."""

from __future__ import annotations

from typing import Any

from torch import nn

from gpuxbar.nn.models import require_module
from gpuxbar.optim.base import InSituOptimizer
from gpuxbar.optim.in_situ import InSituSGD
from gpuxbar.optim.mixed_precision import MixedPrecision
from gpuxbar.optim.tiki_taka import AGAD, ChoppedTikiTakaV2, TikiTaka, TikiTakaV2
from gpuxbar.spec.errors import nearest

__all__ = ["OPTIMIZERS", "build_optimizer"]

OPTIMIZERS: dict[str, type[InSituOptimizer]] = {
    "sgd": InSituSGD,
    "tiki-taka": TikiTaka,
    "tiki-taka-v2": TikiTakaV2,
    "chopped-tiki-taka-v2": ChoppedTikiTakaV2,
    "agad": AGAD,
    "mixed-precision": MixedPrecision,
}


def build_optimizer(name: str, model: nn.Module, **settings: Any) -> InSituOptimizer:
    """The optimiser of a name over all parameters of a model with crossbar layers; examples/README.md compares them.

    Args:
        name: sgd, tiki-taka, tiki-taka-v2, chopped-tiki-taka-v2, agad or mixed-precision. All train single pairs and sliced
            weights, by the expected-value update; all but mixed-precision also by pulse trains (`spec.pulses`), sgd by bit streams
            (`Carry`).
        model: A converted model; its crossbar layers begin in-situ training unless they have begun.
        settings: Of the optimiser's class; `lr` at least.

    Raises:
        ValueError: The name is unknown, a setting is out of range, no layer is on a crossbar, or one has no update law, or pulse
            trains that the algorithm does not follow.
        TypeError: `model` is no module, or a setting is not one of the optimiser's.
    """
    require_module("build_optimizer", model)
    if name not in OPTIMIZERS:
        raise ValueError(
            f"build_optimizer: `name` must be an algorithm, got {name!r}; {nearest(name, OPTIMIZERS)}"
        )
    return OPTIMIZERS[name](model.parameters(), **settings)
