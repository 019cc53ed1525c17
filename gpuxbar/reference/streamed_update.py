"""Outer products streamed into sliced weights bit by bit, in NumPy float64: the oracle of `ops.streamed_update`."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuxbar.reference.device_update import device_update, digits_of
from gpuxbar.reference.tile_mvm import ConvGeometry, by_group, unfold

__all__ = ["streamed_digits", "streamed_update"]


def streamed_digits(
    x: np.ndarray, d: np.ndarray, *, rate: float, w_max: np.ndarray, input_bits: int, slices: int, slice_bits: int,
    groups: int = 1, conv: ConvGeometry | None = None,
) -> np.ndarray:  # fmt: skip
    """Units that every digit gathers of a batch, [slices, G, I, O]: sample by sample, bit by bit."""
    x, d = np.asarray(x, np.float64), np.asarray(d, np.float64)
    largest = np.abs(by_group(x, groups)).max((0, *range(2, x.ndim + 1)), initial=0.0)
    if conv is not None:
        x = unfold(x, conv)
        d = d.transpose(0, 2, 3, 1).reshape(len(x), d.shape[1])
    base, most = 2**slice_bits, 2**input_bits - 1
    inputs, errors = (by_group(a, groups) for a in (x, d))
    full = np.asarray(w_max, np.float64).reshape(groups, -1)
    total = np.zeros((slices, groups, inputs.shape[2], errors.shape[2]))
    for group in range(groups):
        if largest[group] == 0:
            continue
        lsb = largest[group] / most
        for x_b, d_b in zip(inputs[:, group], errors[:, group], strict=True):
            code = np.rint(np.abs(x_b) / lsb).astype(np.int64)
            units = -rate * d_b * lsb / full[group] * (base**slices - 1)
            for stream in range(input_bits):
                bit = np.sign(x_b) * (code >> stream & 1)
                for k, digit in enumerate(digits_of(units * 2**stream, slices, base)):
                    total[k, group] += np.outer(bit, digit)
    return total


def streamed_update(
    g: np.ndarray, x: np.ndarray, d: np.ndarray, *, rate: float, w_max: np.ndarray, slices: int, slice_bits: int,
    carry: dict[str, Any], groups: int = 1, conv: ConvGeometry | None = None, **settings: Any,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """(conductances shown and held, [2 slices, G * I, O] each, weights read out [G, O, I]); settings as for `device_update`."""
    lie: dict[str, Any] = {"slices": slices, "slice_bits": slice_bits}
    digits = streamed_digits(
        x, d, rate=rate, w_max=w_max, input_bits=carry["input_bits"], groups=groups, conv=conv, **lie
    )
    return device_update(g, None, digits=digits, w_max=w_max, carry=carry, **lie, **settings)
