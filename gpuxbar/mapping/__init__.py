"""Weights to conductance planes, and what a read of them means; plain arithmetic, the only change of units."""

from gpuxbar.mapping.plan import ReadPlan, plan_reads
from gpuxbar.mapping.planes import Planes

__all__ = ["Planes", "ReadPlan", "plan_reads"]
