"""The networks of the main job, chosen by name or by the size of an image."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import prod

from torch import Tensor, nn
from torch.nn import functional

from gpuxbar.spec.errors import nearest

__all__ = ["NETWORKS", "inverted_residuals", "network", "resnet18", "resnet50"]

Shape = tuple[int, int, int]
SIZES = {"cnn": (8, 8), "lenet5": (28, 28)}  # of images; the other networks take any
USUAL = {(8, 8): "cnn", (28, 28): "lenet5", (32, 32): "resnet20"}


def network(shape: Shape, classes: int, name: str | None = None) -> tuple[str, nn.Module]:
    """Name and network for images of some channels, height and width; None: what is usual for that size.

    "cnn", for 8 x 8: two convolutions and two linear layers. "lenet5", for 28 x 28: LeNet-5 (LeCun et al., Proc. IEEE 1998) with
    ReLU and max-pooling. For any size, "mlp": linear layers of 256, 128 and as many as there are classes; "resnet20" and
    "resnet18" (He et al., CVPR 2016), with the first layer of networks for 32 x 32.
    """
    size = shape[1:]
    if name is None:
        name = USUAL.get(size)
    if name is not None and name not in NETWORKS:
        raise ValueError(f"network: `name` must be a network, got {name!r}; {nearest(name, NETWORKS)}")
    fitting = [each for each in NETWORKS if SIZES.get(each, size) == size]
    if name not in fitting:
        raise ValueError(
            f"network: `name` must be a network for images of {size[0]} x {size[1]}, got {name or 'none'}; choose one of "
            f"{', '.join(fitting)}, or convert a network of yours with gpuxbar.convert"
        )
    return name, NETWORKS[name](shape, classes)


def _mlp(shape: Shape, classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(prod(shape), 256),
        nn.ReLU(),
        nn.Linear(256, 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    )


def _cnn(channels: int, classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, classes),
    )  # fmt: skip


def _lenet5(channels: int, classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, classes),
    )  # fmt: skip


def resnet18(channels: int, classes: int) -> nn.Module:
    """ResNet-18 (He et al., CVPR 2016) with the first layer of networks for 32 x 32 images."""
    return ResNet(channels, classes, blocks=2, widths=(64, 128, 256, 512), projected=True)


def resnet50(classes: int) -> nn.Module:
    """ResNet-50 (He et al., CVPR 2016) for colour images of 224 x 224, strided in the middle of its blocks as torchvision's."""
    blocks, inputs = [], 64
    for width, count in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for k in range(count):
            blocks.append(Bottleneck(inputs, width, stride=2 if k == 0 and width > 64 else 1))
            inputs = 4 * width
    return nn.Sequential(
        *_normed(nn.Conv2d(3, 64, 7, 2, 3, bias=False)), nn.ReLU(), nn.MaxPool2d(3, 2, 1), *blocks,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes),
    )  # fmt: skip


class Bottleneck(nn.Module):
    """A 3 x 3 convolution between two of single pixels, around a shortcut, which is projected where its shape changes."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        outputs = 4 * width
        self.body = _between_pixels(inputs, width, outputs, stride, 1, nn.ReLU)
        projection = nn.Sequential(*_normed(nn.Conv2d(inputs, outputs, 1, stride, bias=False)))
        self.shortcut = nn.Identity() if inputs == outputs else projection

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x) + self.shortcut(x)
        return y.relu()


def inverted_residuals(classes: int) -> nn.Module:
    """Six blocks of MobileNetV2 (Sandler et al., CVPR 2018) for colour images."""
    shapes = [(16, 16, 1), (16, 24, 2), (24, 24, 1), (24, 40, 2), (40, 40, 1), (40, 40, 1)]
    return nn.Sequential(
        *_normed(nn.Conv2d(3, 16, 3, 2, padding=1, bias=False)), nn.ReLU6(), *(Inverted(*shape) for shape in shapes),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, classes),
    )  # fmt: skip


class Inverted(nn.Module):
    """A depthwise convolution six times as wide as what is around it."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        wide = 6 * inputs
        self.body = _between_pixels(inputs, wide, outputs, stride, wide, nn.ReLU6)
        self.shortcut = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.shortcut else y


def _between_pixels(
    inputs: int, width: int, outputs: int, stride: int, groups: int, activation: type[nn.Module]
) -> nn.Module:
    """A 3 x 3 convolution of some width between two of single pixels."""
    return nn.Sequential(
        *_normed(nn.Conv2d(inputs, width, 1, bias=False)), activation(),
        *_normed(nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)), activation(),
        *_normed(nn.Conv2d(width, outputs, 1, bias=False)),
    )  # fmt: skip


def _normed(layer: nn.Conv2d) -> tuple[nn.Module, nn.Module]:
    return layer, nn.BatchNorm2d(layer.out_channels)


class Block(nn.Module):
    """Two convolutions around a shortcut; where the width grows, that is strided, and zero-padded or `projected`."""

    def __init__(self, inputs: int, outputs: int, projected: bool = False):
        super().__init__()
        self.stride = 1 if inputs == outputs else 2
        self.grown = outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.projection = None
        if projected and self.grown:
            one = nn.Conv2d(inputs, outputs, 1, self.stride, bias=False)
            self.projection = nn.Sequential(one, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        if self.projection is not None:
            return (y + self.projection(x)).relu()
        shortcut = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.grown))
        return (y + shortcut).relu()


class ResNet(nn.Sequential):
    """The residual network of 2 * blocks * len(widths) + 2 layers for 32 x 32 images."""

    def __init__(
        self,
        channels: int,
        classes: int,
        blocks: int,
        widths: tuple[int, ...] = (16, 32, 64),
        projected: bool = False,
    ):
        first, last = widths[0], widths[-1]
        along = [first] + [width for width in widths for _ in range(blocks)]
        super().__init__(
            nn.Conv2d(channels, first, 3, padding=1, bias=False),
            nn.BatchNorm2d(first),
            nn.ReLU(),
            *(Block(*pair, projected=projected) for pair in pairwise(along)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(last, classes),
        )


NETWORKS: dict[str, Callable[[Shape, int], nn.Module]] = {
    "mlp": _mlp,
    "cnn": lambda shape, classes: _cnn(shape[0], classes),
    "lenet5": lambda shape, classes: _lenet5(shape[0], classes),
    "resnet20": lambda shape, classes: ResNet(shape[0], classes, blocks=3),
    "resnet18": lambda shape, classes: resnet18(shape[0], classes),
}
