"""`nn.Conv3d` with the product a convolution of images, so that it can run on crossbars."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gpuxbar.nn.dense import require_dense
from gpuxbar.nn.unfused import Called, require_shape

__all__ = ["UnfusedConv3d"]


class UnfusedConv3d(nn.Module):
    """A convolution of volumes as a layer `product`, of images whose channels are those of all planes under a kernel.

    It computes the same, and loads its state dicts. The array holds a channel's planes one after the other, in torch's order.

    Args:
        conv: The module to take parameters and options from.
    """

    def __init__(self, conv: nn.Conv3d):
        super().__init__()
        self.depth, height, width = conv.kernel_size
        self.stride, self.dilation = conv.stride[0], conv.dilation[0]
        # (left, right, top, bottom, front, back), as functional.pad takes them
        self.padding, self.padding_mode = tuple(conv._reversed_padding_repeated_twice), conv.padding_mode
        weight = conv.weight
        self.product = nn.Conv2d(
            conv.in_channels * self.depth, conv.out_channels, (height, width), (conv.stride[1], conv.stride[2]), 0,
            (conv.dilation[1], conv.dilation[2]), conv.groups, False, device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        self.product.weight = nn.Parameter(weight.detach().flatten(1, 2), weight.requires_grad)
        self.product.register_parameter("bias", dict(conv.named_parameters()).get("bias"))
        self.geometry: Any = conv.stride, conv.padding, conv.dilation
        self.train(conv.training)

    def fused(self) -> nn.Conv3d:
        """The module of torch with these parameters."""
        product, depth = self.product, self.depth
        kernel: Any = depth, *product.kernel_size
        stride, padding, dilation = self.geometry
        conv = nn.Conv3d(
            product.in_channels // depth, product.out_channels, kernel, stride, padding, dilation, product.groups, False,
            self.padding_mode, device="meta",
        )  # fmt: skip
        conv.weight = nn.Parameter(
            product.weight.detach().unflatten(1, (-1, depth)), product.weight.requires_grad
        )
        conv.register_parameter("bias", product._parameters["bias"])
        return conv.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """As the module's."""
        name = Called(self, "Conv3d")
        require_dense(name, "input", input)
        volume = self.product.in_channels // self.depth, "depth", "height", "width"
        require_shape(name, "input", input, volume, ("N", *volume))
        x = input if input.dim() == 5 else input[None]
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        x = functional.pad(x, self.padding, mode=mode)
        reach = self.dilation * (self.depth - 1)
        if x.shape[2] <= reach:
            raise ValueError(
                f"{name}: `input` must be at least {reach + 1} planes deep with its padding, got {x.shape[2]}; pad "
                "it, or use a smaller kernel"
            )
        last = x.shape[2] - reach
        planes = [x[:, :, at : at + last : self.stride] for at in range(0, reach + 1, self.dilation)]
        # [N, depths, channels, planes, height, width]
        under = torch.stack(planes, 2).permute(0, 3, 1, 2, 4, 5)
        y = self.product(under.flatten(2, 3).flatten(0, 1))
        y = y.unflatten(0, under.shape[:2]).transpose(1, 2)
        return y if input.dim() == 5 else y[0]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        weight = state_dict.pop(f"{prefix}weight", None)
        if weight is not None:
            state_dict[f"{prefix}product.weight"] = weight.flatten(1, 2)
            if f"{prefix}bias" in state_dict:
                state_dict[f"{prefix}product.bias"] = state_dict.pop(f"{prefix}bias")
        super()._load_from_state_dict(state_dict, prefix, *more)
