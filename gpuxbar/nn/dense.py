"""What modules on crossbars take: tensors all of whose values lie in memory."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.fx import Proxy

__all__ = ["is_dense", "refuse_other"]


def is_dense(x: Any) -> bool:
    """Whether x is such a tensor."""
    return isinstance(x, Tensor) and x.layout is torch.strided and not x.is_nested


def refuse_other(called: str, argument: str, x: Any, also: str = "") -> NoReturn:
    """Say what an argument that is none must be; `also`: what else may be given."""
    if isinstance(x, Proxy):
        raise TypeError(
            f"{called}: `{argument}` must be a tensor{also}, got a Proxy of torch.fx; trace the model before gpuxbar.convert, "
            "which takes what torch.fx makes of it, or call torch.export.export"
        )
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{called}: `{argument}` must be a tensor{also}, got {type(x).__name__}; convert it by torch.as_tensor(x)"
        )
    nested = "a nested tensor; pass torch.nested.to_padded_tensor(x, 0.0)"
    got = nested if x.is_nested else f"{x.layout}; pass x.to_dense()"
    raise TypeError(f"{called}: `{argument}` must be dense, got {got}")
