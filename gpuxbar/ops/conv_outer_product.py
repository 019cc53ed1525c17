"""The gradient of a convolution's weights on the CPU; a GPU's is a product of cuDNN."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuxbar import reference
from gpuxbar.launch import host_call, library
from gpuxbar.ops.checks import check_array, check_integers, check_shape, host_backend
from gpuxbar.ops.images import Conv
from gpuxbar.reference.tile_mvm import ConvGeometry

__all__ = ["conv_outer_product"]

OP = "conv_outer_product"


def conv_outer_product(d: Any, x: Any, scale: Any, conv: ConvGeometry, *, groups: int = 1) -> Any:
    """Sum the outer products of a batch of patches, of which no matrix is made.

    dw[o, c, ky, kx] = sum_{n, pixel} d[n, o, pixel] scale[n] x[n, c, pixel at tap ky, kx]

    Args:
        d: Gradients of the outputs, NumPy float32 [N, groups * O, out_h, out_w].
        x: Inputs in units of `scale`, NumPy int16 or finite float32 [N, groups * channels, height, width].
        scale: Value of one unit of `x`, float32 [1] or [N].
        conv: Shape of the convolution; weights are in torch's layout whatever its `line_order`.
        groups: Of channels and outputs, side by side.

    Returns:
        Gradient of the weights, float32 [groups * O, channels, kernel_h, kernel_w]; the same bits on any number of threads.

    Raises:
        TypeError: An array has another dtype, or is not NumPy's.
        ValueError: Shapes disagree, or an array is not contiguous.
    """
    check_array(OP, "d", d, "float32", 4)
    check_array(OP, "x", x, ("float32", "int16"), 4)
    check_array(OP, "scale", scale, "float32", 1)
    check_integers(OP, groups=groups)
    if groups < 1 or d.shape[1] % groups:
        raise ValueError(
            f"{OP}: `groups` must divide the {d.shape[1]} outputs of `d`, got {groups}; check its axes"
        )
    for name, array, want in (
        ("x", x, (len(x), groups * conv.channels, conv.height, conv.width)),
        ("d", d, (len(x), d.shape[1], *conv.out)),
    ):
        check_shape(OP, name, array, want, "check the convolution")
    if len(scale) not in (1, len(x)):
        raise ValueError(
            f"{OP}: `scale` must have 1 or {len(x)} values, got {len(scale)}; give one for each image"
        )
    if host_backend(OP, "d", d, "call torch.nn.grad.conv2d_weight") == "reference":
        return reference.conv_outer_product(d, x, scale, conv, groups).astype(np.float32)
    dw = np.empty((d.shape[1], conv.channels, *conv.kernel), np.float32)
    host_call(
        library(), "gpuxbar_conv_outer_product", d, x, scale, Conv.of(conv), dw, len(x), groups, d.shape[1] // groups,
        x.dtype == np.int16, len(scale),
    )  # fmt: skip
    return dw
