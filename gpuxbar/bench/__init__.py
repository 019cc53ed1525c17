"""Speed and memory against the ideal product and against plain PyTorch: `gpuxbar bench --list`."""

from gpuxbar.bench.cases import Case, Contenders, OracleMismatch
from gpuxbar.bench.measure import CASES, measure

__all__ = ["CASES", "Case", "Contenders", "OracleMismatch", "measure"]
