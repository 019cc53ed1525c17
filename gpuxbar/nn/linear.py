"""Linear layers of parameters that other modules held."""

from __future__ import annotations

from torch import nn

__all__ = ["linear_of"]


def linear_of(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """A layer that holds these parameters: weight [O, I], bias [O]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, weight.device, weight.dtype)
    layer.weight = weight
    layer.register_parameter("bias", bias)
    return layer
