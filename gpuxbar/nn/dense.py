"""What modules on crossbars take: tensors all of whose values lie in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

__all__ = ["require_dense"]


def require_dense(called: object, argument: str, x: Any, also: str = "") -> None:
    """Refuse an argument that is no such tensor; `called`: what errors call its module; `also`: what else may be given."""
    if isinstance(x, Tensor):
        if x.layout is torch.strided and not x.is_nested:
            return
        nested = "a nested tensor; pass torch.nested.to_padded_tensor(x, 0.0)"
        got = nested if x.is_nested else f"{x.layout}; pass x.to_dense()"
        raise TypeError(f"{called}: `{argument}` must be dense, got {got}")
    if isinstance(x, Proxy):
        raise TypeError(
            f"{called}: `{argument}` must be a tensor{also}, got a Proxy of torch.fx; trace the model before gpuxbar.convert, "
            "which takes what torch.fx makes of it, or call torch.export.export"
        )
    raise TypeError(
        f"{called}: `{argument}` must be a tensor{also}, got {type(x).__name__}; convert it by torch.as_tensor(x)"
    )
