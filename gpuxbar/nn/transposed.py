"""`nn.ConvTranspose1d` and `nn.ConvTranspose2d` with the product a layer of its own, so that it can run on crossbars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from gpuxbar.nn.dense import require_dense
from gpuxbar.nn.unfused import Called, require_shape

__all__ = ["UnfusedConvTranspose"]


class UnfusedConvTranspose(nn.Module):
    """A transposed convolution as a layer `product`, of one pixel at a time, whose results are added up where they overlap.

    It computes the same, and loads its state dicts. The array holds the input channels as wordlines, and every output channel at
    every place of the kernel as bitlines.

    Args:
        conv: The module to take parameters and options from.
    """

    def __init__(self, conv: nn.ConvTranspose1d | nn.ConvTranspose2d):
        super().__init__()
        self.out_channels, self.flat = conv.out_channels, isinstance(conv, nn.ConvTranspose1d)
        self.kernel_size, self.stride = self._pair(conv.kernel_size, 1), self._pair(conv.stride, 1)
        assert not isinstance(conv.padding, str)
        self.padding, self.dilation = self._pair(conv.padding, 0), self._pair(conv.dilation, 1)
        self.output_padding, self.groups = self._pair(conv.output_padding, 0), conv.groups
        weight = conv.weight
        places = self.kernel_size[0] * self.kernel_size[1]
        self.product = nn.Conv2d(
            conv.in_channels, conv.out_channels * places, 1, groups=conv.groups, bias=False, device=weight.device,
            dtype=weight.dtype,
        )  # fmt: skip
        self.product.weight = nn.Parameter(self._by_output(weight.detach()), weight.requires_grad)
        self.register_parameter("bias", dict(conv.named_parameters()).get("bias"))
        self.train(conv.training)

    def _called(self) -> Called:
        return Called(self, "ConvTranspose1d" if self.flat else "ConvTranspose2d")

    def fused(self) -> nn.ConvTranspose1d | nn.ConvTranspose2d:
        """The module of torch with these parameters."""
        kind: Any = nn.ConvTranspose1d if self.flat else nn.ConvTranspose2d
        kernel, stride, padding, output_padding, dilation = (
            option[self.flat :]
            for option in (self.kernel_size, self.stride, self.padding, self.output_padding, self.dilation)
        )
        conv: nn.ConvTranspose1d | nn.ConvTranspose2d = kind(
            self.product.in_channels, self.out_channels, kernel, stride, padding, output_padding, self.groups, False, dilation,
            device="meta",
        )  # fmt: skip
        by_group = self.product.weight.detach().flatten(1).unflatten(0, (self.groups, -1))
        weight = by_group.transpose(1, 2).reshape(conv.weight.shape).contiguous()
        conv.weight = nn.Parameter(weight, self.product.weight.requires_grad)
        conv.register_parameter("bias", self._parameters["bias"])
        return conv.train(self.training)

    def _pair(self, value: tuple[int, ...], height: int) -> tuple[int, int]:
        return (height, value[0]) if self.flat else (value[0], value[1])

    def _by_output(self, weight: Tensor) -> Tensor:
        """Weights [inputs, outputs / groups, *kernel] as those of `product`."""
        by_group = weight.flatten(1).unflatten(
            0, (self.groups, -1)
        )  # [groups, inputs / groups, outputs * places]
        return by_group.transpose(1, 2).flatten(0, 1)[..., None, None].contiguous()

    def _whole(self, image: Sequence[int]) -> tuple[int, ...]:
        """Height and width of all patches where they lie."""
        options = zip(image, self.stride, self.dilation, self.kernel_size, strict=True)
        return tuple((n - 1) * s + d * (k - 1) + 1 for n, s, d, k in options)

    def _size(self, image: Sequence[int], wanted: Sequence[int] | None) -> tuple[int, ...]:
        """Height and width of the output."""
        least = [n - 2 * p for n, p in zip(self._whole(image), self.padding, strict=True)]
        if wanted is None:
            return tuple(n + more for n, more in zip(least, self.output_padding, strict=True))
        size = (1, wanted[-1]) if self.flat else tuple(wanted[-2:])
        most = [n + max(s, d) - 1 for n, s, d in zip(least, self.stride, self.dilation, strict=True)]
        if not all(low <= n <= high for low, n, high in zip(least, size, most, strict=True)):
            raise ValueError(
                f"{self._called()}: `output_size` must be from {least[self.flat :]} to {most[self.flat :]}, got "
                f"{list(wanted)}; stride and dilation set the range"
            )
        return size

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """As the module's."""
        name = self._called()
        require_dense(name, "input", input)
        image = self.product.in_channels, *("height", "width")[self.flat :]
        require_shape(name, "input", input, image, ("N", *image))
        x = input.unsqueeze(-2) if self.flat else input
        x = x if x.dim() == 4 else x[None]
        size = self._size(x.shape[2:], output_size)
        patches = self.product(x).flatten(2)
        y = functional.fold(
            patches, self._whole(x.shape[2:]), self.kernel_size, self.dilation, 0, self.stride
        )
        # what padding cuts off; an output may end beyond all patches
        y = functional.pad(
            y, [n for i in (1, 0) for n in (-self.padding[i], size[i] + self.padding[i] - y.shape[2 + i])]
        )
        bias: Tensor | None = self._parameters["bias"]
        y = y if bias is None else y + bias.view(-1, 1, 1)
        y = y.squeeze(-2) if self.flat else y
        return y if input.dim() == (3 if self.flat else 4) else y[0]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        weight = state_dict.pop(f"{prefix}weight", None)
        if weight is not None:
            state_dict[f"{prefix}product.weight"] = self._by_output(weight)
        super()._load_from_state_dict(state_dict, prefix, *more)
