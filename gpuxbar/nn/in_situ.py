"""In-situ training of a layer: conductances are the truth, the weight is what they read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gpuxbar import ops
from gpuxbar.bridge.carry import carry
from gpuxbar.bridge.device_update import device_update
from gpuxbar.bridge.lines import by_line, image_shape, in_order, of_lines, unfold_lines
from gpuxbar.bridge.operator import call
from gpuxbar.bridge.pulse_update import pulse_update
from gpuxbar.bridge.relax import relax
from gpuxbar.bridge.reprogram import program_pairs
from gpuxbar.bridge.streamed_update import streamed_update
from gpuxbar.mapping import ReadPlan
from gpuxbar.nn.cells import Cells
from gpuxbar.nn.owners import Owner
from gpuxbar.nn.programmed import Mark, Programmed
from gpuxbar.nn.streams import Streams

__all__ = ["InSitu"]

CELLS = "g_cells", "g_held", "pulse_count", "device_map"  # buffers, as operators of `bridge` take them
ROUNDING = 16  # units in the last place of a full weight, by which one read-out may differ from another


class InSitu(Programmed):
    """The in-situ half of a crossbar layer.

    Buffers, None until in-situ training begins, then part of the state dict:
    `g_cells`: conductances of the positive and the negative devices, float32 [2 slices, G * I, O], S.
    `g_held`: what devices of a law with write noise hold where `g_cells` is what they show; None without it.
    `pulse_count`: pulses that each device has taken, int32 like `g_cells`, below 0 where it has failed; None without
    `spec.endurance`.
    `device_map`: normals of the devices, float16 [K, 2 slices, G * I, O]; None unless set by `set_device_map`.
    `w_max`: weight of a full pair, float32 [G * O]; weights live in +-w_max, sliced ones after a carry.
    `cell_seed`: the seed of the layer in which the cells began, int64 [1]; their spread and the noise of their updates stay what
    they are in a layer of another seed or name. `seed_of_cells` is the same on the host.
    `update_step`: number of updates (and of refreshes and steps of `spec.retention`), int64 [1]; with that seed it fixes the noise
    of an update.
    `carry_step`: number of updates, which carries between slices follow, int64 [1]; None without `spec.carry`.
    `refresh_step`: number of updates, which refreshes follow, int64 [1]; None without `spec.refresh.interval`.

    `patch`: kernel, stride, padding and dilation, two numbers each, by which images drive the wordlines.
    """

    weight: Tensor
    plan: ReadPlan
    patch: list[int]
    name: str
    inputs: int
    outputs: int
    g_cells: Tensor | None
    g_held: Tensor | None
    pulse_count: Tensor | None
    device_map: Tensor | None
    w_max: Tensor | None
    cell_seed: Tensor | None
    update_step: Tensor | None
    carry_step: Tensor | None
    refresh_step: Tensor | None

    def setup_in_situ(self) -> None:
        for name in (
            "g_cells", "g_held", "pulse_count", "device_map", "w_max", "cell_seed", "update_step", "carry_step", "refresh_step",
        ):  # fmt: skip
            self.register_buffer(name, None)
        self.seed_of_cells = self.plan.seed
        way = self.plan
        self.patch = [*image_shape(self.weight.shape)[2:], *way.stride, *way.padding, *way.dilation]
        self.streams = Streams()
        self._read: Mark | None = None  # of the weight when it was last what the cells read

    @property
    def in_situ(self) -> bool:
        return self._buffers["g_cells"] is not None

    def by_line(self, weight: Tensor) -> Tensor:
        """Weights (or their changes), shape of `weight`, as the array holds them: [G, O, I], in its order of wordlines."""
        return by_line(weight, self.groups_, self.plan.line_order)

    def of_lines(self, lines: Tensor) -> Tensor:
        """The inverse of `by_line`."""
        return of_lines(lines, self.weight.shape, self.plan.line_order)

    @property
    def keeps_operands(self) -> bool:
        """Trained in situ by products in the array: a backward pass keeps inputs and errors, and makes no weight gradient."""
        return self.in_situ and self.spec.updates_in_array

    def require_law(self) -> None:
        """Refuse to train in situ without an update law."""
        if self.spec.update is None:
            raise ValueError(
                f"{self.name}: `spec.update` must be an update law to train in situ, got None; convert with "
                'update={"law": "agarwal"}, or keep the layer digital by a rule'
            )

    @torch.inference_mode(False)  # whose tensors nothing could train elsewhere
    def begin_in_situ(self) -> None:
        """Program the present weights onto pairs once, and train the pairs from now on.

        The two devices of a pair lie half of w / w_max of the window above and below its middle, so that both
        have room both ways; with a one-sided law one of them lies at its lower end, so that both have room upwards; and where
        references have their place (`update.reference_at`), the first holds the whole weight. Pairs of a sliced weight lie so for
        their digits. `w_max` see `full_weights`. The weight becomes what the array holds after clipping at `w_max`, and where the
        window of the device that holds it ends, write noise and stuck cells.
        """
        w_max = self.full_weights()
        self.start_cells(self.by_line(self.weight.detach().float()), w_max)

    def full_weights(self) -> Tensor:
        """Weights of full pairs with which in-situ training of the present weights begins, float32 [G * O]: `mapping.w_max`, or the
        largest weight (of the layer, or of each column) times `mapping.headroom`. Refuses what cannot begin."""
        self.require_law()
        self.require_unprogrammed("begin_in_situ")
        self.require_own_weight("begin_in_situ")
        mapping = self.spec.mapping
        rows = self.by_line(self.weight.detach().float()).abs().amax(2).reshape(-1)
        top = rows.amax()
        if not top < torch.inf:
            raise ValueError(
                f"{self.name}: `weight` must be finite to train in situ, got a largest magnitude of {top:g}; initialise it"
            )
        if mapping.w_max is not None:
            return torch.full_like(rows, mapping.w_max)
        if not top > 0:
            raise ValueError(
                f"{self.name}: `mapping.w_max` must be set to train a layer in situ that begins with zeros, got None; give the largest "
                f"weight that it should hold by a rule of gpuxbar.convert ({mapping.headroom * self.inputs**-0.5:.2g} would follow from torch's "
                "own initialisation), or keep the layer digital by one"
            )
        # a column of zeros takes the layer's scale
        rows = torch.where(rows > 0, rows, top) if mapping.scale == "column" else top.expand_as(rows)
        return mapping.headroom * rows

    def start_cells(self, weight: Tensor, w_max: Tensor) -> None:
        """Program weights [G, O, I] onto pairs; `w_max`, float32 [G * O]: weight of a full pair."""
        self.w_max = w_max.contiguous()
        self._start_counting()
        self._program(weight)

    def _start_counting(self) -> None:
        self.seed_of_cells = self.plan.seed
        self.cell_seed = torch.tensor([self.seed_of_cells], device=self.weight.device)
        self.update_step = torch.zeros(1, dtype=torch.int64, device=self.weight.device)
        self.carry_step = None if self.spec.carry is None else torch.zeros_like(self.update_step)
        self.refresh_step = None if self.spec.refresh.interval is None else torch.zeros_like(self.update_step)

    def refresh(self, above: float | None = None) -> None:
        """Write the present weights onto the pairs anew, as a one-sided law needs before its devices saturate.

        Both devices of a pair are reset and programmed; write noise and spread of `spec.programming` apply. `spec.refresh` does
        it every so many updates.

        Args:
            above: Write only weights of which a device shows more than this share of the window, where it will not any more, and no
                device has failed; None: all.
        """
        if self.g_cells is None:
            raise ValueError(
                f"{self.name}: `refresh` must follow begin_in_situ(), got a layer that is not trained in situ; build "
                "InSituSGD first"
            )
        if above is not None and not 0 < above <= 1:
            raise ValueError(
                f"{self.name}: `above` must be above 0 and at most 1, got {above}; it is a share of the window"
            )
        self._program(self.by_line(self.weight.detach().float()), above)

    def worn(self) -> float:
        """Share of the layer's devices that have failed."""
        return 0.0 if self.pulse_count is None else (self.pulse_count < 0).float().mean().item()

    def saturation(self) -> float:
        """Largest share of the window that a device of the layer shows; `refresh` a one-sided pair as it nears 1. More than 1 where a
        device's own window ends higher (`update.high_spread`)."""
        if self.g_cells is None:
            return 0.0
        window = self.spec.device
        return ((self.g_cells.max() - window.g_min) / (window.g_max - window.g_min)).item()

    def at_window_ends(self) -> float:
        """Share of the positive devices of unsliced pairs that hold an end of the nominal window, where those beside references can
        go no further, whatever their weight, unless their own window is another (`low_spread`, `high_spread`)."""
        held = self.g_cells if self.g_held is None else self.g_held
        assert held is not None
        window = self.spec.device
        near = ROUNDING * torch.finfo(torch.float32).eps * window.g_max
        ends = (held[0] <= window.g_min + near) | (held[0] >= window.g_max - near)
        return ends.float().mean().item()

    def _program(self, weight: Tensor, above: float | None = None) -> None:
        """Program pairs with weights [G, O, I]; `above`: as of `refresh`."""
        self.require_unprogrammed("weight")
        assert self.spec.update is not None
        assert self.w_max is not None
        assert self.update_step is not None
        cells = self._pairs_of(weight / self.w_max.reshape(self.groups_, -1, 1), self.update_step)
        if self.g_cells is None:
            self.g_cells = cells
            self.g_held = cells.clone() if self.spec.update.write_noise else None
            if self.spec.endurance.pulses is not None:
                self.pulse_count = torch.zeros_like(cells, dtype=torch.int32)
        else:  # in place: a captured step knows these arrays
            keep = torch.zeros_like(cells, dtype=torch.bool)
            if self.pulse_count is not None:  # failed devices cannot be written
                keep |= self.pulse_count < 0
            if above is not None:
                window = self.spec.device
                limit = window.g_min + above * (window.g_max - window.g_min)
                full, still_full = ((each > limit).any(0) for each in (self.g_cells, cells))
                keep = keep.any(0) | ~full | still_full
            for held in (self.g_cells, self.g_held):
                if held is not None:
                    held.copy_(torch.where(keep, held, cells))
        if above is None:
            self.restart_wires()
        with torch.no_grad():
            self._move(torch.zeros_like(self.weight))

    def _pairs_of(self, share: Tensor, step: Tensor) -> Tensor:
        """Conductances that hold shares of full weights [G, O, I], written when the layer counted so many updates."""
        return program_pairs(share.contiguous(), step, self.static[1], self.seed_of_cells)

    def holds_weights(self) -> Tensor:
        """Whether the layer holds other weights than zeros, bool []: in situ, other cells than zeros were written to at first, with
        their noise, since the weight is what these read. Measured devices, which no weight tells of, do."""
        if self.g_cells is None or self.update_step is None:
            written = self.weight.detach().any()
            return written if self.measured is None else written | self.measured.any()
        zeros = self.g_cells.new_zeros(self.groups_, self.outputs, self.inputs)
        moved = self.g_cells - self._pairs_of(zeros, torch.zeros_like(self.update_step))
        return moved.abs().amax() > ROUNDING * torch.finfo(torch.float32).eps * self.spec.device.g_max

    @torch.no_grad()
    def update_cells(self, change: Tensor) -> None:
        """Move the cells by `change`, of the shape of `weight`; the weight becomes what they read.

        Before that, slices carry and pairs are refreshed where it is time (see `spec.Carry`, `spec.Refresh`).
        """
        self.require_unprogrammed("weight")
        self.require_read_out()
        self.change_cells(change)

    def change_cells(self, change: Tensor, factor: float = 1.0) -> None:
        """`update_cells` by factor * change for an optimiser's step, which records no gradients and has just looked whether the
        weight is what the cells read."""
        self._make_room()
        self._move(change, factor)

    def _make_room(self) -> None:
        """Carry and refresh where the updates so far say so, and count the one to come."""
        held = self._buffers
        carries, refreshes = held["carry_step"], held["refresh_step"]
        if carries is not None:
            call(carry, *self._pairs(), carries)
            carries += 1
        if refreshes is not None:
            refresh, so_far = self.spec.refresh, int(refreshes)
            if so_far and so_far % (refresh.interval or 1) == 0:
                self.refresh(refresh.above)
            refreshes += 1

    def take_operands(self) -> tuple[Tensor, Tensor]:
        """Inputs and errors of the backward passes since they were last taken, at least of one, one after another.

        They are [B, G * I] and [B, G * O], or of a convolution images [N, G * channels, height, width] and [N, G * O, height,
        width], but where these were of several sizes.
        """
        seen = self.streams.take()
        if len(seen) == 1:
            return seen[0]
        if len({x.shape[1:] for x, _ in seen}) > 1:  # images of several sizes have lines alone in common
            seen = [self.as_lines(x, d) for x, d in seen]
        x, d = map(torch.cat, zip(*seen, strict=True))
        return x, d

    @torch.no_grad()
    def update_in_array(self, x: Tensor, d: Tensor, rate: float, sign: Tensor | None = None) -> None:
        """Move the cells by -rate d^T x, multiplied in the array; the weight becomes what they read.

        By pulse trains (`spec.pulses`) or bit streams (`spec.carry.scheme`); a rate of 0, as at the start of a warm-up, moves
        nothing. Before that, slices carry and pairs are refreshed where it is time (see `spec.Carry`, `spec.Refresh`).

        Args:
            x, d: Inputs and errors, as `take_operands` gives them.
            rate: Learning rate, at least 0.
            sign: Of pulse trains, what the driver of each wordline multiplies its inputs by, 1 or -1, float32 [G * I]; None: 1.
        """
        self.require_unprogrammed("weight")
        self.require_read_out()
        self.change_in_array(x, d, rate, sign)

    def change_in_array(self, x: Tensor, d: Tensor, rate: float, sign: Tensor | None = None) -> None:
        """`update_in_array` for an optimiser's step, which records no gradients and has just looked whether the weight is what the
        cells read."""
        if sign is not None and self.spec.pulses is None:
            raise ValueError(
                f"{self.name}: `sign` must be None with bit streams, got one; multiply the inputs by it"
            )
        self._make_room()
        if rate == 0:
            self._move(torch.zeros_like(self.weight))
            return
        x, d = (operand.float().contiguous() for operand in (x, d))
        patch = self.patch if x.dim() == 4 else None
        held: Any = self._buffers  # whose values nn.Module finds slowly
        settings = held["w_max"], held["update_step"], rate, self.groups_, patch
        if self.spec.pulses is None:
            self._show(self.of_lines(call(streamed_update, *self._pairs(), x, d, *settings)))
            return
        read, own = self._read_out()
        as_read = (
            own and held["carry_step"] is None and held["refresh_step"] is None
        )  # which move cells first
        call(pulse_update, *self._pairs(), x, d, read, *settings, sign, as_read)
        self._show(None if own else self.of_lines(read))

    def relax(self) -> None:
        """Let the cells decay for one step of `spec.retention`; the weight becomes what they read then."""
        if self.spec.retention.tau is None:
            return
        self.require_unprogrammed("weight")
        self.require_read_out()
        with torch.no_grad():
            call(relax, *self._pairs())
            self._move(torch.zeros_like(self.weight))

    def _show(self, read: Tensor | None) -> None:
        """Count an update, after which the cells read as this weight; None: it has been written into the layer's."""
        held: Any = self._buffers
        held["update_step"] += 1
        if read is None:
            torch.autograd.graph.increment_version(self.weight)
        else:
            self.weight.copy_(read)
        self._mark_read()

    def as_lines(self, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and errors as the lines of the array see them: [B, G * I] and [B, G * O]."""
        if x.dim() == 2:
            return x, d
        return unfold_lines(x, self.weight.shape, self.plan), d.flatten(2).transpose(1, 2).flatten(0, 1)

    def trained_cells(self) -> Cells:
        """What reads find: both planes, or their analog difference, through the wires."""
        self.require_read_out()
        held: Any = self._buffers
        variance = self.device_variance(held["g_cells"])
        return self.through_wires(held["g_cells"], variance, held["w_max"], held["update_step"])

    def require_read_out(self) -> None:
        """Refuse a weight that something else than the cells has set, such as another optimiser."""
        if not torch.compiler.is_compiling() and not self.is_read_out():
            self._compare_read_out()

    def is_read_out(self) -> bool:
        """Whether the weight is still what it was when the cells read so."""
        return self._read is not None and self._read.is_of(self.weight)

    @torch.no_grad()
    def read_out(self) -> None:
        """Set the weight to what the cells read, in its precision."""
        self.weight.copy_(self.of_lines(self._cells_read()))
        self._mark_read()

    @torch.no_grad()
    def _cells_read(self) -> Tensor:
        """The weight that the cells are, float32 [G, O, I]."""
        read = self._blank()
        self._update(torch.zeros_like(self.weight), 1.0, read)
        return read

    def _compare_read_out(self) -> None:
        assert self.w_max is not None
        read = self._cells_read()
        with torch.no_grad():
            # other machines round sums otherwise, and weights of a lower precision hold less
            last = ROUNDING * torch.finfo(torch.float32).eps * self.w_max.view(self.groups_, -1, 1)
            off = (self.by_line(self.weight.float()) - read).abs()
            off = ~(off <= last + torch.finfo(self.weight.dtype).eps * read.abs())  # NaN is off
        if off.any():
            raise ValueError(
                f"{self.name}: `weight` must be what the cells read once trained in situ, got {int(off.sum())} other "
                "values; update it by an in-situ optimiser alone, set the cells by the layer's set_conductances(), or write it to them anew by "
                "its begin_in_situ(), as averages of weights must be"
            )
        self._mark_read()

    def _mark_read(self) -> None:
        """Know that the weight of now is what the cells read."""
        vars(self)["_read"] = self.mark()  # nn.Module sets attributes slowly

    def _move(self, change: Tensor, factor: float = 1.0) -> None:
        """Move the cells by factor * change; the weight becomes what they read. A change of 0 moves nothing."""
        read, own = self._read_out()
        self._update(change, factor, read)
        self._show(None if own else self.of_lines(read))

    def _read_out(self) -> tuple[Tensor, bool]:
        """Where the cells are to be read out, float32 with the values of [G, O, I] in this order, and whether it is the memory of the
        weight itself."""
        weight = in_order(self.weight.detach(), self.plan.line_order)
        own = weight.dtype is torch.float32 and weight.is_contiguous()
        return (weight if own else self._blank()), own

    def _blank(self) -> Tensor:
        """Room for a weight as the array reads it, float32 [G, O, I]."""
        shape = self.groups_, self.outputs, self.inputs
        return torch.empty(shape, dtype=torch.float32, device=self.weight.device)

    def _update(self, change: Tensor, factor: float, read: Tensor) -> None:
        """Move the cells by factor * change, and put what they read into `read`, as of `_read_out`."""
        held: Any = self._buffers
        lines = self.by_line(change.float()).contiguous()
        call(device_update, *self._pairs(), lines, factor, read, held["w_max"], held["update_step"])

    def _pairs(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, str, int]:
        """The cells as the operators of `bridge` take them: see `bridge.pairs`."""
        return *map(self._buffers.get, CELLS), self.static[1], self.seed_of_cells  # type: ignore[return-value]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        self._own_weight()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_read": self.is_read_out()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._read = self.mark() if state["_read"] else None
        self._own_weight()

    def look_at_weight(self) -> Tensor:
        """The weight for one read; where it is computed of other parameters, in-situ optimisers will refuse these."""
        if not torch.compiler.is_compiling() and "weight" not in self._parameters:
            for name, parameter in self.named_parameters():
                if name not in ("bias", "dac_max") and not hasattr(parameter, "analog"):
                    parameter.analog = Owner(self)  # type: ignore[attr-defined]
        return self.weight

    def _own_weight(self) -> None:
        weight = self._parameters.get("weight")
        if weight is not None:
            weight.analog = Owner(self, *self._others(weight))  # type: ignore[attr-defined]

    def _others(self, weight: nn.Parameter) -> list[InSitu]:
        """Other layers that hold a weight, too."""
        owner = getattr(weight, "analog", Owner())
        return [
            layer
            for layer in owner.layers()
            if layer is not self and layer._parameters.get("weight") is weight
        ]

    def release_weight(self) -> nn.Parameter:
        """The weight, for a layer of torch; this one is left without."""
        weight = self.get_parameter("weight")
        self._parameters["weight"] = None
        others = self._others(weight)
        if others:
            weight.analog = Owner(*others)  # type: ignore[attr-defined]
        else:
            del weight.analog  # type: ignore[attr-defined]
        return weight

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        if f"{prefix}g_cells" in state_dict:
            self._require_trained_as(state_dict, prefix)
        devices = state_dict.get(f"{prefix}device_map")
        if devices is not None:
            self._require_map(devices)
        if self.g_cells is None and f"{prefix}g_cells" in state_dict:
            device = self.weight.device
            planes = 2 * self.spec.mapping.slices
            shape = planes, self.groups_ * self.inputs, self.outputs
            self.g_cells = torch.empty(shape, dtype=torch.float32, device=device)
            held = f"{prefix}g_held" in state_dict
            self.g_held = torch.empty_like(self.g_cells) if held else None
            if f"{prefix}pulse_count" in state_dict:
                self.pulse_count = torch.zeros_like(self.g_cells, dtype=torch.int32)
            self.w_max = torch.empty(self.groups_ * self.outputs, dtype=torch.float32, device=device)
            self._start_counting()
        if devices is not None and self.device_map is None:
            self.device_map = torch.empty_like(devices, device=self.weight.device)
        super()._load_from_state_dict(state_dict, prefix, *more)
        self.look_at_seed()

    def look_at_seed(self) -> None:
        """Know the seed of the cells, which were set from outside."""
        if self.cell_seed is not None:
            self.seed_of_cells = int(self.cell_seed)

    def map_shape(self) -> tuple[int, ...]:
        """Of a map of the layer's devices, whose law says by what they differ."""
        law, planes = self.spec.update, 2 * self.spec.mapping.slices
        names = () if law is None else ops.spread_names(law)
        return len(names), planes, self.groups_ * self.inputs, self.outputs

    def _require_map(self, devices: Tensor) -> None:
        """Refuse a saved map of devices that differ by other parameters, or are others."""
        if devices.shape != self.map_shape():
            raise ValueError(
                f"{self.name}: `state_dict` must hold a device_map of {self.map_shape()} for this layer and the spreads of its law, got "
                f"{tuple(devices.shape)}; convert with the spec that they were trained with"
            )

    def _require_trained_as(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Refuse cells that were trained by what the layer's spec has not, or without what it has."""
        law, way = self.spec.update, "convert with the spec that they were trained with"
        if law is None:
            raise ValueError(
                f"{self.name}: `spec.update` must be an update law to load cells trained in situ, got None; {way}"
            )
        if self.w_max is None and f"{prefix}w_max" not in state_dict:
            raise ValueError(
                f"{self.name}: `state_dict` must hold all of a layer trained in situ, got one that lacks w_max; save the whole of "
                "model.state_dict()"
            )
        for buffer, setting, here in (
            ("g_held", "update.write_noise", law.write_noise > 0),
            ("pulse_count", "endurance.pulses", self.spec.endurance.pulses is not None),
            ("carry_step", "carry", self.spec.carry is not None),
            ("refresh_step", "refresh.interval", self.spec.refresh.interval is not None),
        ):
            if (f"{prefix}{buffer}" in state_dict) != here:
                raise ValueError(
                    f"{self.name}: `state_dict` must be of cells trained {'with' if here else 'without'} `spec.{setting}` as here, got "
                    f"one that {'lacks' if here else 'has'} {buffer}; {way}"
                )
