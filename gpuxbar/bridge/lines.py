"""A convolution's weights and patches on the wordlines of its array: the one place where `mapping.line_order` permutes.

Torch's layout of a weight, flattened, is the order "channel_position": then everything here is a view. Of a weight in
torch's memory format channels_last, "position_channel" is one.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

from gpuxbar.mapping import ReadPlan

__all__ = [
    "by_line",
    "fold_lines",
    "image_shape",
    "in_order",
    "largest_on_lines",
    "of_lines",
    "some_lines",
    "unfold_lines",
    "written",
]


def by_line(weight: Tensor, groups: int, line_order: str) -> Tensor:
    """A weight [G * O, I] or [G * O, channels, *kernel] by the lines of its array, [G, O, I]."""
    return in_order(weight, line_order).reshape(groups, len(weight) // groups, -1)


def in_order(weight: Tensor, line_order: str) -> Tensor:
    """A view of a weight whose values follow each other as those of `by_line`."""
    return weight.movedim(1, -1) if _permuted(weight.shape, line_order) else weight


def written(weight: Tensor, way: ReadPlan) -> Tensor:
    """Weights of a layer as they are written, float32 with the values of [G, O, I] in this order: with those of the reference lines
    of an offset mapping, which are 0."""
    weight = weight.detach().float()
    if way.reference == (0, 0) and not _permuted(weight.shape, way.line_order):
        return weight.contiguous()  # in the shape that it has
    lines, (rows, cols) = by_line(weight, way.groups, way.line_order), way.reference_lines
    return (functional.pad(lines, (0, rows, 0, cols)) if rows else lines).contiguous()


def of_lines(lines: Tensor, shape: tuple[int, ...], line_order: str) -> Tensor:
    """The inverse of `by_line`: [G, O, I] with the shape of a weight."""
    if _permuted(shape, line_order):
        outputs, channels, *kernel = shape
        return lines.reshape(outputs, *kernel, channels).movedim(-1, 1)
    return lines.reshape(shape)


def image_shape(weight: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a weight as reads have it: of a convolution of sequences, as of one of images of height 1."""
    return (*weight[:2], 1, weight[2]) if len(weight) == 3 else weight


def unfold_lines(x: Tensor, weight: tuple[int, ...], way: ReadPlan) -> Tensor:
    """Patches [N * pixels, G * I] of images [N, G * channels, height, width], for a weight of a shape."""
    patches = functional.unfold(x, image_shape(weight)[2:], way.dilation, way.padding, way.stride)
    if _permuted(weight, way.line_order):
        patches = patches.unflatten(1, (way.groups, weight[1], -1)).transpose(2, 3).flatten(1, 3)
    return patches.transpose(1, 2).flatten(0, 1)


def largest_on_lines(x: Tensor, groups: int, patch: list[int] | None = None) -> Tensor:
    """Largest magnitude of each sample on the lines of each group, float32 [B, G]; of images [N, G * channels, height, width] it is
    [N, G, *out], of every pixel, or with a `patch` of `InSitu` of every patch."""
    top = x.abs().unflatten(1, (groups, -1)).amax(2).float()
    if patch is None:
        return top
    down, along = patch[4:6]
    top = functional.pad(top, (along, along, down, down))
    for axis in (0, 1):  # the largest of a rectangle is that of its columns' largest
        size, stride, _, dilation = patch[axis::2]
        top = top.unfold(2 + axis, dilation * (size - 1) + 1, stride)[..., ::dilation].amax(-1)
    return top


def some_lines(x: Tensor, rows: Tensor, weight: tuple[int, ...], way: ReadPlan) -> Tensor:
    """These rows of `unfold_lines`, of which no others are made."""
    top, side = way.padding
    x = functional.pad(x, (side, side, top, top))
    reach = [
        dilation * (size - 1) for dilation, size in zip(way.dilation, image_shape(weight)[2:], strict=True)
    ]
    height, width = (
        (size - far - 1) // stride + 1
        for size, far, stride in zip(x.shape[2:], reach, way.stride, strict=True)
    )
    image, pixel = rows // (height * width), rows % (height * width)
    down, along = pixel // width * way.stride[0], pixel % width * way.stride[1]
    taps = product(*(range(0, far + 1, step) for far, step in zip(reach, way.dilation, strict=True)))
    patches = torch.stack([x[image, :, down + y, along + z] for y, z in taps], -1)
    if _permuted(weight, way.line_order):
        patches = patches.unflatten(1, (way.groups, -1)).transpose(2, 3)
    return patches.flatten(1)


def fold_lines(patches: Tensor, image: tuple[int, ...], weight: tuple[int, ...], way: ReadPlan) -> Tensor:
    """The adjoint of `unfold_lines`: images of shape `image`."""
    patches = patches.unflatten(0, (image[0], -1)).transpose(1, 2)
    if _permuted(weight, way.line_order):
        patches = patches.unflatten(1, (way.groups, -1, weight[1])).transpose(2, 3).flatten(1, 3)
    return functional.fold(patches, image[2:], weight[2:], way.dilation, way.padding, way.stride)


def _permuted(weight: tuple[int, ...], line_order: str) -> bool:
    return line_order == "position_channel" and len(weight) > 2
