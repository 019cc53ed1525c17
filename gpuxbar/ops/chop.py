"""Signs that gradients of a wordline are written and read with, and that flip at random."""

from __future__ import annotations

from math import ceil
from typing import Any

import numpy as np

from gpuxbar import reference
from gpuxbar.launch import Device, In, InOut, Kernel, Scalar, backend, cuda_device
from gpuxbar.ops.checks import check_array, check_integers, check_written, counter, integer

__all__ = ["KERNEL", "chop"]

OP = "chop"


def chop(
    sign: Any, lines: Any, *, flip: float, step: Any, seed: int = 0, device: Device | None = None
) -> None:
    """Flip the signs of some wordlines, each in every group on its own, with a probability, in place.

    Args:
        sign: Signs, float32 [G, I], updated in place.
        lines: Wordlines, int64 [n], each at most once.
        flip: Probability of a flip, 0 to 1, in steps of 2**-24.
        step: An integer, or an int64 array of one element, that fixes the draws, with the seed.
        seed: Of the draws.
        device: Where CuPy arrays are run; None: CuPy's current device. NumPy serves the few signs of a host.

    Raises:
        TypeError: An array has another dtype.
        ValueError: An array is not contiguous, `flip` is out of range, or `lines` are no wordlines of `sign`, or some twice
            (checked on the CPU; on a GPU no value is read back); `sign` is unchanged.

    Source:
        Rasch et al., "Fast and robust analog in-memory deep neural network training", Nature Communications 2024.
    """
    check_array(OP, "sign", sign, "float32", 2)
    check_array(OP, "lines", lines, "int64", 1)
    if not 0 <= flip <= 1:
        raise ValueError(f"{OP}: `flip` must be 0 to 1, got {flip:g}; it is a probability")
    check_integers(OP, seed=seed)
    check_written(OP, sign=sign)
    groups, inputs = sign.shape
    if device is not None or backend(sign) == "cuda":
        size = groups * lines.size
        (device or cuda_device()).launch(
            KERNEL, (min(-(-size // 256), 1 << 16),), (256,),
            {"sign": sign, "lines": lines, **counter("step", step),
             "seed": seed, "flips": ceil(flip * 2**24 - 0.5), "inputs": inputs, "count": lines.size, "size": size},
        )  # fmt: skip
        return
    given, count = np.unique(lines, return_counts=True)
    if given.size and not (given[0] >= 0 and given[-1] < inputs and (count == 1).all()):
        got = lines if lines.size < 9 else f"{lines.size} of {given[0]} to {given[-1]}"
        raise ValueError(
            f"{OP}: `lines` must be different ones of {inputs} wordlines, got {got}; check the axes"
        )
    sign[...] = reference.chop(sign, lines, flip=flip, step=integer(OP, "step", step), seed=seed)


KERNEL = Kernel(
    "chop.cu",
    sign=InOut("float32", "G I"), lines=In("int64", "n"), step=In("int64", "one", optional=True), step_value=Scalar("int64"),
    seed=Scalar("uint64"), flips=Scalar("uint32"), inputs=Scalar("int64"), count=Scalar("int64"), size=Scalar("int64"),
)  # fmt: skip
