"""Operators of the namespace "gpuxbar", for CPU and CUDA tensors.

`torch.library.custom_op` does the same with checks around every call that cost more than a small layer; these are left to
`torch.library.opcheck` in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["gradient", "operator"]

LIBRARY = torch.library.Library("gpuxbar", "DEF")


def operator(
    fake: Callable[..., Any], mutates_args: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Any]:
    """Make a function an operator of its name; its annotations are the schema.

    Args:
        fake: Shapes and dtypes of the results, for tracing.
        mutates_args: Arguments that it changes in place.
    """

    def wrap(function: Callable[..., Any]) -> Any:
        name = function.__name__
        schema = torch.library.infer_schema(function, mutates_args=mutates_args)
        LIBRARY.define(name + schema, tags=[torch.Tag.needs_exact_strides])
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(name, function, key)
        torch.library.register_fake(f"gpuxbar::{name}", fake, lib=LIBRARY)
        found = getattr(torch.ops.gpuxbar, name).default
        found.__doc__ = function.__doc__
        return found

    return wrap


def gradient(op: Any, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Give an operator its gradient; see `torch.library.register_autograd`."""
    torch.library.register_autograd(op, backward, setup_context=setup_context, lib=LIBRARY)
