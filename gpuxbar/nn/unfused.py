"""What modules made of layers share: the name by which errors call them, and the shapes that they take."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gpuxbar.nn.analog_layer import AnalogLayer

__all__ = ["Called", "require_shape"]


class Called:
    """What errors call a module: by the name that its layers on crossbars begin with, and the kind of torch's that it is. Looked for
    when an error says it, not at every pass."""

    def __init__(self, module: nn.Module, kind: str):
        self.module, self.kind = module, kind

    def __str__(self) -> str:
        names = (layer.name for layer in self.module.children() if isinstance(layer, AnalogLayer))
        name = next(names, "").rpartition(".")[0]
        return f"{name} ({self.kind})" if name else self.kind


def require_shape(called: Called, argument: str, x: Tensor, *shapes: tuple[Any, ...]) -> None:
    """Refuse an argument of none of these shapes, whose axes are sizes, or names of those that may have any."""
    for shape in shapes:
        if x.dim() == len(shape) and all(
            isinstance(size, str) or n == size for n, size in zip(x.shape, shape, strict=True)
        ):
            return
    wanted = " or ".join(f"[{', '.join(map(str, shape))}]" for shape in shapes)
    raise ValueError(
        f"{called}: `{argument}` must have shape {wanted}, got {tuple(x.shape)}; look at the layer before it"
    )
