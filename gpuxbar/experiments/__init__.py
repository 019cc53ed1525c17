"""The main job: a network trained ideally and on crossbars, recorded and resumable."""

from gpuxbar.experiments.sweep import sweep
from gpuxbar.experiments.train import Run, train

__all__ = ["Run", "sweep", "train"]
