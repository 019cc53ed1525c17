"""Weights to conductance planes, and what a read of them means; plain arithmetic, the only change of units."""

from gpuxbar.mapping.plan import ReadPlan, full_current, plan_reads, worst_current
from gpuxbar.mapping.planes import Planes

__all__ = ["Planes", "ReadPlan", "full_current", "plan_reads", "worst_current"]
