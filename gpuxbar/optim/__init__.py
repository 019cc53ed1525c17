"""Optimisers that write to the devices themselves."""

from gpuxbar.optim.in_situ import InSituSGD

__all__ = ["InSituSGD"]
