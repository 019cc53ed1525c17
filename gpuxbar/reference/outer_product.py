"""Gradients of weights, in NumPy float64: the oracles of `ops.outer_product` and `ops.conv_outer_product`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gpuxbar.reference.tile_mvm import ConvGeometry, by_group, unfold

__all__ = ["conv_outer_product", "outer_product"]


def outer_product(d: np.ndarray, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """sum_b d[b, o] scale[b] x[b, i]"""
    return d.astype(np.float64).T @ (scale.astype(np.float64)[:, None] * x)


def conv_outer_product(
    d: np.ndarray, x: np.ndarray, scale: np.ndarray, conv: ConvGeometry, groups: int
) -> np.ndarray:
    """sum_{n, pixel} d[n, o, pixel] patch[n, pixel, k], the lines k of a patch in the order of a weight"""
    patches = unfold(
        x * scale.astype(np.float64)[:, None, None, None], replace(conv, line_order="channel_position")
    )
    errors = d.astype(np.float64).transpose(0, 2, 3, 1).reshape(len(patches), d.shape[1])
    inputs, errors = (by_group(a, groups) for a in (patches, errors))
    return np.einsum("bgo,bgi->goi", errors, inputs).reshape(d.shape[1], conv.channels, *conv.kernel)
