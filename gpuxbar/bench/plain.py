"""What one would write in plain PyTorch for the same physics: a loop over tiles of matmul, noise, round and clamp."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Tiles", "on_tiles"]


@dataclass(frozen=True)
class Tiles:
    """Settings of a read in units of the digital result: `adc_lsb` and `noise` of one partial sum."""

    size: int = 128
    dac_max: float | None = None  # None: abs-max of the call
    adc_lsb: float | None = None  # None: a 1/32 of the deviation of the first partial sum of the call
    noise: float = 0.0

    def read(self, x: Tensor, w: Tensor) -> Tensor:
        """x [B, I] times w [I, O] on row tiles: 8-bit DAC, noise, 8-bit ADC of every partial sum."""
        dac_lsb = (x.abs().amax() if self.dac_max is None else self.dac_max) / 127
        x = (x / dac_lsb).round_().clamp_(-127, 127).mul_(dac_lsb)
        y, adc_lsb = torch.zeros(len(x), w.shape[1]), self.adc_lsb
        for rows, tile in zip(x.split(self.size, 1), w.split(self.size, 0), strict=True):
            partial = rows @ tile
            if adc_lsb is None:
                adc_lsb = float(partial.std()) / 32 + 1e-12
            if self.noise:
                partial += self.noise * adc_lsb * torch.randn_like(partial)
            y += partial.div_(adc_lsb).round_().clamp_(-127, 127).mul_(adc_lsb)
        return y


class TiledProduct(torch.autograd.Function):
    """x @ w.T read from tiles; the input's gradient is read from them too, the weight's is digital."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, tiles: Tiles) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.tiles = tiles
        return tiles.read(x, w.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        grad_x = ctx.tiles.read(grad, w) if ctx.needs_input_grad[0] else None
        return grad_x, grad.t() @ x, None


class PlainLinear(nn.Module):
    def __init__(self, layer: nn.Linear, tiles: Tiles):
        super().__init__()
        self.layer, self.tiles = layer, tiles

    def forward(self, x: Tensor) -> Tensor:
        y = TiledProduct.apply(x, self.layer.weight, self.tiles)
        return y if self.layer.bias is None else y + self.layer.bias


class PlainConv2d(nn.Module):
    def __init__(self, layer: nn.Conv2d, tiles: Tiles):
        super().__init__()
        self.layer, self.tiles = layer, tiles

    def forward(self, x: Tensor) -> Tensor:
        c = self.layer
        patches = functional.unfold(x, c.kernel_size, c.dilation, c.padding, c.stride)  # type: ignore[arg-type]
        n, inputs, pixels = patches.shape
        flat = patches.transpose(1, 2).reshape(n * pixels, inputs)
        y = TiledProduct.apply(flat, c.weight.flatten(1), self.tiles)
        if c.bias is not None:
            y = y + c.bias
        height = (
            x.shape[2] + 2 * int(c.padding[0]) - c.dilation[0] * (c.kernel_size[0] - 1) - 1
        ) // c.stride[0] + 1
        return y.reshape(n, pixels, -1).transpose(1, 2).reshape(n, c.out_channels, height, -1)


def on_tiles(model: nn.Module, tiles: Tiles) -> nn.Module:
    """A copy of a model with its Linear and Conv2d layers read from tiles in plain PyTorch."""
    model = copy.deepcopy(model)
    if isinstance(model, nn.Linear):
        return PlainLinear(model, tiles)
    if isinstance(model, nn.Conv2d):
        return PlainConv2d(model, tiles)
    for name, child in model.named_children():
        setattr(model, name, on_tiles(child, tiles))
    return model
