"""PyTorch operators over the array operations; the only layer that knows both."""

from gpuxbar.bridge.analog_mvm import analog_mvm
from gpuxbar.bridge.device_update import device_update
from gpuxbar.bridge.effective_conductance import effective_conductance
from gpuxbar.bridge.pulse_update import pulse_update
from gpuxbar.bridge.reprogram import reprogram

__all__ = ["analog_mvm", "device_update", "effective_conductance", "pulse_update", "reprogram"]
