"""The ideal convolution by cuDNN, in fp16 with channels last, beside which convolutions on crossbars are timed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from gpuxbar.bridge.lines import of_lines
from gpuxbar.ops import ConvGeometry

__all__ = ["ideal_convolution_us", "weights"]


def ideal_convolution_us(
    conv: ConvGeometry, images: np.ndarray, kernels: np.ndarray, copies: int,
    time_us: Callable[[Callable[[], object]], float],
) -> float:  # fmt: skip
    """Microseconds of one convolution, in a CUDA graph of one for each of several copies of the images.

    Args:
        conv: Its geometry.
        images: Codes [N, channels, height, width].
        kernels: Weights [inputs, outputs], the inputs in the order of `reference.unfold`.
        copies: Convolutions of a graph.
        time_us: Times a call on the current stream.
    """
    weight = weights(conv, kernels).to("cuda", torch.float16, memory_format=torch.channels_last)
    one = torch.from_numpy(images).to("cuda", torch.float16, memory_format=torch.channels_last)
    inputs = [one.clone() for _ in range(copies)]

    def run() -> None:
        for x in inputs:
            functional.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation)

    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        with torch.cuda.stream(stream):
            run()  # cuDNN chooses
        stream.synchronize()
        with torch.cuda.graph(graph):
            run()
    return time_us(graph.replay) / copies


def weights(conv: ConvGeometry, kernels: np.ndarray) -> Tensor:
    """What `torch.nn.functional.conv2d` takes, of [inputs, outputs]."""
    lines = torch.from_numpy(kernels.T.copy())
    return of_lines(lines, (len(lines), conv.channels, *conv.kernel), conv.line_order)
