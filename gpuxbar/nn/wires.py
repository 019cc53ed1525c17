"""The wires of a layer's tiles, between its devices and its reads."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor, nn

from gpuxbar import ops
from gpuxbar.bridge.operator import call
from gpuxbar.bridge.wires import merged, refresh_wires, tiles_shape
from gpuxbar.mapping import Planes, ReadPlan
from gpuxbar.nn.cells import Cells
from gpuxbar.spec import CrossbarSpec

__all__ = ["Wires", "settings_checksum"]

ANCHOR = (
    "wire_offset",
    "wire_start",
    "wire_age",
    "wire_slope",
    "wire_error_",
)  # buffers, in the order of ops.Anchor
FOLLOWED = {"tile", "device", "mapping", "programming", "parasitics", "update", "carry"}


class Wires(nn.Module):
    """The part of a crossbar layer that solves its wires whenever its devices changed.

    Buffers outside the state dict: `seen` and `seen_back`, what reads see through the wires, shape of the read's planes
    (None without wires); `solved`, the state of the devices they belong to, int64 [1].
    Buffers of the state dict, None without `parasitics.anchor`: `wire_offset`, `wire_start`, `wire_age`, `wire_slope` and
    `wire_error_`, an `ops.Anchor` for each matrix that reads see, and `wire_state`, the state of the devices that
    they belong to, int64 [1]; `wire_settings`, a checksum of the settings of the spec and the layer's seed, which devices and
    wires follow from, int64 [1]. With them a checkpoint resumes bit for bit; one of other settings makes every tile be solved anew.
    `solve_all`: whether the next read must solve every tile, since some never were; kept on the host, so that a read on a
    GPU does not wait to know it.
    """

    name: str
    plan: ReadPlan
    planes: Planes
    groups_: int
    static: tuple[str, str]  # the plan and the spec as JSON
    seen: Tensor | None
    seen_back: Tensor | None
    solved: Tensor
    wire_offset: Tensor | None
    wire_start: Tensor | None
    wire_age: Tensor | None
    wire_slope: Tensor | None
    wire_error_: Tensor | None
    wire_state: Tensor | None
    wire_settings: Tensor | None
    solve_all: bool

    @property
    def spec(self) -> CrossbarSpec:
        """What the layer was made by, which stays so: its arrays and reads follow from it."""
        return self._spec

    @spec.setter
    def spec(self, spec: CrossbarSpec) -> None:
        if "_spec" in vars(self):
            raise ValueError(
                f"{self.name}: `spec` must stay what the layer was made by, got another; convert the model again with it"
            )
        self._spec = spec

    def setup_wires(self, devices: tuple[int, ...], planes: int, device: torch.device) -> None:
        """For devices [2 slices, G * I, O], read as `planes` planes."""
        wires = self.spec.parasitics
        shape = (planes, *devices[1:])
        for name, needed in (("seen", wires.active), ("seen_back", wires.swapped)):
            self.register_buffer(
                name,
                torch.zeros(shape, dtype=torch.float32, device=device) if needed else None,
                persistent=False,
            )
        self.register_buffer("solved", torch.zeros(1, dtype=torch.int64, device=device), persistent=False)
        anchored = wires.active and wires.anchor is not None
        start = ops.Anchor.new(tiles_shape(devices, self.groups_, self.spec) if anchored else (0, 0, 0))
        for name, part in zip(ANCHOR, start, strict=True):
            both = torch.from_numpy(part).expand(1 + wires.swapped, *part.shape).clone().to(device)
            self.register_buffer(name, both if anchored else None)
        state = torch.zeros(1, dtype=torch.int64, device=device) if anchored else None
        self.register_buffer("wire_state", state)
        settings = torch.tensor([_followed(self.spec, self.plan.seed)], device=device) if anchored else None
        self.register_buffer("wire_settings", settings)
        self.solve_all = anchored

    def through_wires(self, devices: Tensor, variance: Tensor | None, w_max: Tensor, state: Tensor) -> Cells:
        """What reads find of all devices [2 slices, G * I, O], whose state is the number `state`, int64 [1], not 0."""
        base = 2 ** (self.spec.mapping.slice_bits or 0)
        if variance is not None:
            variance = merged(variance, self.planes.merge, base, power=2)
        if self.seen is None:
            return Cells(merged(devices, self.planes.merge, base), None, variance, w_max, state)
        call(
            refresh_wires,
            devices,
            self.seen,
            self.seen_back,
            self.solved,
            state,
            self.wire_offset,
            self.wire_start,
            self.wire_age,
            self.wire_slope,
            self.wire_error_,
            self.wire_state,
            self.solve_all,
            self.groups_,
            self.planes.merge,
            self.static[1],
        )
        self.solve_all = False
        return Cells(self.seen, self.seen_back, variance, w_max, state)

    def wire_error(self) -> float:
        """Estimated relative error of the worst tile's conductances at the last read; 0 without an anchor.

        That of a difference of two arrays is 3 to 10 times larger.
        """
        return 0.0 if self.wire_error_ is None else self.wire_error_.max().item()

    def leave_cells(self) -> None:
        """Leave the arrays that reads found to their backward passes: what is written next goes to copies."""
        self.renew("seen", "seen_back", "solved")

    def renew(self, *buffers: str) -> None:
        """Copy buffers, where there are such."""
        with torch.inference_mode(False):  # training could not read copies that were made there
            for name in buffers:
                buffer = self._buffers[name]
                self._buffers[name] = None if buffer is None else buffer.clone()

    def forget_wires(self) -> None:
        """Look at the wires at the next read, whatever the state of the devices says: buffers were set from outside."""
        self.solved.zero_()
        self.solve_all = self.wire_age is not None and bool((self.wire_age < 0).any())

    def restart_wires(self) -> None:
        """Solve every tile anew at the next read: other devices than before, or all of them written over."""
        if self.wire_age is not None and self.wire_state is not None:
            self.wire_age.fill_(-1)
            self.wire_state.zero_()
        self.forget_wires()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        own = self.wire_settings
        saved = state_dict.get(f"{prefix}wire_settings")
        if own is not None and saved is not None:
            state_dict[f"{prefix}wire_settings"] = own
        super()._load_from_state_dict(state_dict, prefix, *more)
        if own is not None and saved is not None and saved.item() != own.item():
            self.restart_wires()


def _followed(spec: CrossbarSpec, seed: int) -> int:
    return settings_checksum(f"{seed} ", spec.model_dump_json(include=FOLLOWED))


def settings_checksum(*settings: str) -> int:
    """What a state dict keeps of settings, to know those that it is of."""
    return zlib.crc32("".join(settings).encode())
