"""Signs of wordlines that flip at random, in place."""

from __future__ import annotations

from torch import Tensor

from gpuxbar import ops
from gpuxbar.bridge.arrays import array, on_device
from gpuxbar.bridge.operator import operator

__all__ = ["chop"]


@operator(lambda *_: None, mutates_args=("sign",))
def chop(sign: Tensor, lines: Tensor, step: Tensor, flip: float, seed: int) -> None:
    """Flip the signs of some wordlines, each in every group on its own, with a probability.

    Args:
        sign: float32 [G, I]; changed in place.
        lines: Wordlines, int64 [n], each at most once.
        step: Fixes the draws, with the seed; int64 [1], looked at where it lies.
        flip: Probability of a flip.
        seed: The array's seed.
    """
    with on_device(sign, "chop") as device:
        ops.chop(array(sign), array(lines), flip=flip, step=array(step), seed=seed, device=device)
