"""The wires of a layer's tiles, between its devices and its reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpuxbar.bridge.wires import merged, refresh_wires
from gpuxbar.mapping import Planes
from gpuxbar.nn.cells import Cells
from gpuxbar.spec import CrossbarSpec

__all__ = ["Wires"]


class Wires(nn.Module):
    """The part of a crossbar layer that solves its wires whenever its devices changed.

    Buffers outside the state dict: `seen` and `seen_back`, what reads see through the wires, shape of the read's planes
    (None without wires); `solved`, the state of the devices they belong to, int64 [1].
    """

    spec: CrossbarSpec
    planes: Planes
    groups_: int
    static: tuple[str, str]  # the plan and the spec as JSON
    seen: Tensor | None
    seen_back: Tensor | None
    solved: Tensor

    def setup_wires(self, shape: tuple[int, ...], device: torch.device) -> None:
        wires = self.spec.parasitics
        for name, needed in (("seen", wires.active), ("seen_back", wires.swapped)):
            self.register_buffer(
                name, torch.zeros(shape, device=device) if needed else None, persistent=False
            )
        self.register_buffer("solved", torch.zeros(1, dtype=torch.int64, device=device), persistent=False)

    def through_wires(self, devices: Tensor, variance: Tensor | None, w_max: Tensor, state: Tensor) -> Cells:
        """What reads find of all devices [2 slices, G * I, O], whose state is the number `state`, int64 [1], not 0."""
        base = 2 ** (self.spec.mapping.slice_bits or 0)
        if variance is not None:
            variance = merged(variance, self.planes.merge, base, power=2)
        if self.seen is None:
            return Cells(merged(devices, self.planes.merge, base), None, variance, w_max)
        refresh_wires(
            devices,
            self.seen,
            self.seen_back,
            self.solved,
            state,
            self.groups_,
            self.planes.merge,
            self.static[1],
        )
        return Cells(self.seen, self.seen_back, variance, w_max)

    def forget_wires(self) -> None:
        """Solve anew at the next read, whatever the state of the devices says."""
        self.solved.zero_()
