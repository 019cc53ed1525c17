"""What reads find in a layer's arrays, and share until these change."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Cells", "Steady"]


class Cells(NamedTuple):
    """Arrays of a layer as its reads see them, after programming (or in-situ training) and wires.

    Attributes:
        g: Conductances, float32 [S, G * I, O], S.
        back_g: The same for a transposed read, where wires make it another matrix; None: `g`.
        noise_var: Variance of state-dependent read noise, shape of `g`, A**2/V**2, or None.
        w_max: Weight of a full pair, float32 [G * O].
        version: Number of the state of the conductances, the first value of an int64 tensor: another one whenever they change.
    """

    g: Tensor
    back_g: Tensor | None
    noise_var: Tensor | None
    w_max: Tensor
    version: Tensor


class Steady(NamedTuple):
    """What many reads share before anything changes the layer.

    Attributes:
        cells: What they find.
        weight: What their gradients go to: the layer's weight, which gets one gradient of all.
    """

    cells: Cells
    weight: Tensor
