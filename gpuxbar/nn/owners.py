"""Which crossbar layers hold a weight, as an in-situ optimiser asks that is given parameters."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gpuxbar.nn.in_situ import InSitu

__all__ = ["Owner", "layer_of"]


class Owner:
    """Weak links from a weight to its layers. A copied or pickled one is empty: copied layers link their weights anew."""

    def __init__(self, *layers: InSitu):
        self.links = [weakref.ref(layer) for layer in layers]

    def layers(self) -> list[InSitu]:
        """Those that live."""
        return [layer for layer in (link() for link in self.links) if layer is not None]

    def __reduce__(self) -> Any:
        return Owner, ()


torch.serialization.add_safe_globals([Owner])


def layer_of(parameter: Tensor) -> InSitu | None:
    """The crossbar layer whose weight a parameter is; None for any other parameter."""
    owner = getattr(parameter, "analog", None)
    if owner is None:
        return None
    layers = [
        layer
        for link in owner.links
        if (layer := link()) is not None and layer._parameters.get("weight") is parameter
    ]
    if not layers:
        raise ValueError(
            f"in-situ optimiser: `params` must be weights of living layers, got one of shape {tuple(parameter.shape)} whose "
            "crossbar layer is gone, or computes its weight from it; build the optimiser from model.parameters(), without pruning or "
            "parametrisations"
        )
    if len(layers) > 1:
        raise ValueError(
            f"in-situ optimiser: `params` must each be one layer's weight, got one that {' and '.join(layer.name for layer in layers)} "
            "hold on arrays of their own; use one layer in all these places, or untie them"
        )
    return layers[0]
