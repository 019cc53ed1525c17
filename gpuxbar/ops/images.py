"""The convolution whose patches drive an array, as the kernels take it."""

from __future__ import annotations

import ctypes
from functools import lru_cache

from gpuxbar.ops.fused_layout import padded_channels
from gpuxbar.reference.tile_mvm import ConvGeometry

__all__ = ["Conv", "Images", "line_steps"]


class Conv(ctypes.Structure):
    """Twin of `struct Conv` in kernels/include/gpuxbar/images.cuh."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "channels", "height", "width", "kernel_h", "kernel_w", "stride_h", "stride_w", "pad_h", "pad_w", "dilation_h",
            "dilation_w", "out_h", "out_w", "channel_step", "position_step",
        )
    ]  # fmt: skip

    @classmethod
    @lru_cache(maxsize=4096)
    def of(cls, conv: ConvGeometry | None) -> Conv:
        """Made once, not to be changed. Without a convolution, one without outputs."""
        if conv is None:
            return cls()
        return cls(
            conv.channels, conv.height, conv.width, *conv.kernel, *conv.stride, *conv.padding, *conv.dilation, *conv.out,
            *line_steps(conv),
        )  # fmt: skip


class Images(ctypes.Structure):
    """Twin of `struct Images` in kernels/include/gpuxbar/patches.cuh."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in (
            "channels", "height", "width", "positions", "kernel_w", "stride_h", "stride_w", "pad_h", "pad_w", "dilation_h",
            "dilation_w", "out_w", "pixels",
        )),
        ("pixel_size", ctypes.c_uint32),
    ]  # fmt: skip

    @classmethod
    def of(cls, conv: ConvGeometry, groups: int) -> Images:
        channels = padded_channels(conv.channels)
        return cls(
            channels, conv.height, conv.width, conv.kernel[0] * conv.kernel[1], conv.kernel[1], *conv.stride, *conv.padding,
            *conv.dilation, conv.out[1], conv.pixels, groups * channels,
        )  # fmt: skip


def line_steps(conv: ConvGeometry) -> tuple[int, int]:
    """Driven lines of a patch from one channel to the next, and from one position of the kernel to the next."""
    if conv.line_order == "position_channel":
        return 1, conv.channels
    return conv.kernel[0] * conv.kernel[1], 1
