"""`nn.Linear`, `nn.Conv1d` and `nn.Conv2d` read from crossbar tiles."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from gpuxbar.bridge.internals import _ConvNd
from gpuxbar.nn.analog_layer import AnalogLayer
from gpuxbar.nn.cells import Steady
from gpuxbar.nn.dense import require_dense
from gpuxbar.spec import CrossbarSpec

__all__ = ["AnalogConv", "AnalogConv1d", "AnalogConv2d", "AnalogLinear"]


class AnalogLinear(nn.Linear, AnalogLayer):
    """`nn.Linear` read from crossbar tiles, which `spec` describes.

    `name` and the spec's seed key the layer's random numbers: give each layer of a model a name of its own.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        spec: CrossbarSpec,
        name: str = "linear",
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.setup(spec, name, 1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.crossbars()}"

    def forward(self, input: Tensor, steady: Steady | None = None) -> Tensor:
        """As `nn.Linear`'s; `steady` see `read`."""
        require_dense(self.name, "x", input)
        if not input.dim() or input.shape[-1] != self.in_features:
            self.refuse_input(input, f"[..., {self.in_features}]")
        if input.dim() == 2:
            return self.read(input, steady)
        flat = self.read(input.reshape(-1, input.shape[-1]), steady)
        return flat.reshape(*input.shape[:-1], self.out_features)


class AnalogConv(_ConvNd, AnalogLayer):
    """What the convolutions share. Those of sequences are read as of images of height 1."""

    def __init__(self, *args: Any, spec: CrossbarSpec, name: str = "conv", **options: Any):
        super().__init__(*args, **options)
        # what torch pads by name or by other than zeros is padded before the read
        own = () if isinstance(self.padding, str) or self.padding_mode != "zeros" else self.padding
        self._pads = not own
        padding = own or (0,) * len(self.kernel_size)

        def of_images(value: tuple[int, ...], height: int) -> tuple[int, ...]:
            return value if len(value) == 2 else (height, *value)

        self.setup(
            spec, name, self.groups, stride=of_images(self.stride, 1), padding=of_images(padding, 0),
            dilation=of_images(self.dilation, 1),
        )  # fmt: skip
        self._planned = self._geometry()

    def _geometry(self) -> dict[str, Any]:
        return {
            key: getattr(self, key) for key in ("stride", "padding", "dilation", "padding_mode", "groups")
        }

    def padded(self, x: Tensor) -> Tensor:
        """Images [N, channels, height, width] as the array reads them, but for padding with zeros."""
        for key, value in self._geometry().items():
            if value != self._planned[key]:
                raise ValueError(
                    f"{self.name}: `{key}` must stay {self._planned[key]!r}, as the layer was made, got {value!r}; change it before "
                    "gpuxbar.convert"
                )
        require_dense(self.name, "x", x)
        axes = len(self.kernel_size)
        if x.dim() not in (1 + axes, 2 + axes) or x.shape[-1 - axes] != self.in_channels:
            size = ("height", "width")[-axes:]
            self.refuse_input(x, f"[N, {self.in_channels}, {', '.join(size)}], or without N,")
        x = self.batched(x)
        if self._pads:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = functional.pad(x, self._reversed_padding_repeated_twice, mode=mode)
        return x.unsqueeze(2) if x.dim() == 3 else x

    def batched(self, x: Tensor) -> Tensor:
        """Samples of an input or output, which may be one without a batch."""
        return x if x.dim() == 2 + len(self.kernel_size) else x[None]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.crossbars()}"

    def forward(self, input: Tensor) -> Tensor:
        y = self.read(self.padded(input))
        y = y.squeeze(2) if len(self.kernel_size) == 1 else y
        return y if input.dim() == y.dim() else y[0]


class AnalogConv1d(AnalogConv, nn.Conv1d):
    """`nn.Conv1d`, with every option of it, read from crossbar tiles; `spec` and `name` as of `AnalogLinear`."""


class AnalogConv2d(AnalogConv, nn.Conv2d):
    """`nn.Conv2d`, with every option of it, read from crossbar tiles; `spec` and `name` as of `AnalogLinear`."""
