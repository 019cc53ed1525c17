"""PyTorch operators over the array operations; the only layer that knows both."""

from gpuxbar.bridge.analog_mvm import analog_mvm

__all__ = ["analog_mvm"]
