"""Named spans on a profiler's timeline (NVTX), where the package nvtx is there; opened only around work on a GPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

__all__ = ["span"]


def span(name: str) -> AbstractContextManager[Any]:
    """A span of the domain "gpuxbar"."""
    nvtx = _nvtx()
    return nullcontext() if nvtx is None else nvtx.annotate(name, domain="gpuxbar")


@lru_cache(maxsize=1)
def _nvtx() -> Any:
    try:
        import nvtx
    except ImportError:
        return None
    return nvtx
