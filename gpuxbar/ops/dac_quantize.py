"""Digital values to DAC codes."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuxbar import reference
from gpuxbar.launch import backend, host_call, library
from gpuxbar.ops.checks import check_array, scalar_array

__all__ = ["dac_quantize"]


def dac_quantize(x: Any, *, lsb: Any, code_max: int, signed: bool = True) -> Any:
    """Round digital values to DAC codes.

    code = clip(round(x / lsb), -code_max if signed else 0, code_max), half to even.

    Args:
        x: Digital values, float32 [n, ...], C-contiguous; finite.
        lsb: Value of one code, above 0: a number, or float32 [n], one per leading index.
        code_max: Largest code, 1 to 32767.
        signed: Whether negative codes exist.

    Returns:
        Codes, int16, shape of `x`.

    Raises:
        TypeError: `x` is not float32.
        ValueError: `x` is not contiguous or holds NaN or infinity (checked on the CPU; on a GPU a NaN becomes
            a code of the range, and no value is read back), `lsb` has another length, or `code_max` is out of
            range.
    """
    check_array("dac_quantize", "x", x, "float32", range(1, 8))
    if not 1 <= code_max <= 32767:
        raise ValueError(
            f"dac_quantize: `code_max` must be 1 to 32767, got {code_max}; int16 holds the codes"
        )
    where = backend(x)
    if where == "cuda":
        raise NotImplementedError(
            "dac_quantize: CuPy arrays have no kernels in this version; pass NumPy arrays"
        )
    lsb = scalar_array(np, lsb)
    if lsb.size not in (1, len(x)):
        raise ValueError(
            f"dac_quantize: `lsb` must have 1 or {len(x)} values, got {lsb.size}; give one, or one per leading index"
        )
    if where == "reference":
        if not np.isfinite(x).all():
            raise _not_finite(int((~np.isfinite(x)).sum()))
        return reference.dac_quantize(x, lsb=lsb, code_max=code_max, signed=signed)
    codes = np.empty(x.shape, dtype=np.int16)
    if x.size:
        bad = np.zeros(1, dtype=np.int64)
        per_row = x.size // len(x)
        host_call(
            library(),
            "gpuxbar_dac_quantize",
            x,
            lsb,
            codes,
            len(x),
            per_row,
            lsb.size,
            code_max,
            int(signed),
            bad,
        )
        if bad[0]:
            raise _not_finite(int(bad[0]))
    return codes


def _not_finite(count: int) -> ValueError:
    return ValueError(
        f"dac_quantize: `x` must be finite, got {count} NaN or infinite values; look for a diverging loss or bad data"
    )
