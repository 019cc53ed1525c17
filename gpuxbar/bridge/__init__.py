"""PyTorch operators over the array operations; the only layer that knows both."""

from gpuxbar.bridge.effective_conductance import effective_conductance

__all__ = ["effective_conductance"]
