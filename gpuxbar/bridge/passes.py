"""Reads within a backward pass: those that activation checkpoints repeat must find what the first ones found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from gpuxbar.bridge.internals import _current_graph_task_id

__all__ = ["repeated", "require_first_pass"]

_AGAIN = ContextVar("again", default=False)


@contextmanager
def repeated() -> Iterator[None]:
    """Reads in here may be within a backward pass: they are known to find what they should."""
    token = _AGAIN.set(True)
    try:
        yield
    finally:
        _AGAIN.reset(token)


def require_first_pass(name: str) -> None:
    """Refuse a layer's read within a backward pass that would find new noise or another DAC range than the first time."""
    if _current_graph_task_id() != -1 and not _AGAIN.get():
        raise ValueError(
            f"{name}: a read within a backward pass, as checkpoints make, must find what the first one found, got new noise or a new DAC "
            "range; give torch's checkpoint use_reentrant=False and context_fn=lambda: gpuxbar.same_reads(model), outside "
            "of torch.compile"
        )
