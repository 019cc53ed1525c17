"""A layer whose devices are programmed once and then only age."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpuxbar.bridge.drift import drift
from gpuxbar.bridge.reprogram import checksum
from gpuxbar.bridge.wires import merged
from gpuxbar.mapping import ReadPlan
from gpuxbar.nn.cells import Cells
from gpuxbar.nn.wires import Wires
from gpuxbar.reference.tile_mvm import LINE_ORDERS

__all__ = ["Mark", "Programmed"]

HELD = (
    "g_programmed",
    "w_programmed",
    "written_as",
    "device_seed",
    "chip",
    "measured",
    "age",
    "gain",
    "ageings",
)  # buffers of the state dict
WRITTEN_AS = (
    "g_min",
    "g_max",
    "slice_bits",
    "headroom_bits",
    "line_order",
)  # what conductances mean by a weight
TIME = "age", "gain", "ageings", "read_step", "eval_step"  # buffers that ageing and its test reads change
APART = 1 << 16  # reads, by which the counts of neighbouring chips are apart


class Mark(NamedTuple):
    """Which weight a layer had, which is held so that no other takes its place in memory, how often it was changed in place, where
    it lay, since a parameter gets another `data` without a count, and a checksum of its values, since these change without a
    count too: through `data`, or by a fused optimiser. On a GPU, which would have to be waited for, that is None. Tensors of inference
    mode, as copies made there are, count no changes: 0."""

    weight: Tensor
    version: int
    place: int
    checksum: int | None

    @classmethod
    def of(cls, weight: Tensor) -> Mark:
        """That of a weight as it is now."""
        return cls(weight, _version(weight), weight.data_ptr(), checksum(weight))

    def is_of(self, weight: Tensor) -> bool:
        """Whether this is that weight, unchanged."""
        return (
            self.weight is weight
            and self.version == _version(weight)
            and self.place == weight.data_ptr()
            and (self.checksum is None or self.checksum == checksum(weight))
        )


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


class Programmed(Wires):
    """The part of a crossbar layer that holds what `gpuxbar.program` wrote, and lets it age.

    Buffers, None unless programmed, then part of the state dict:
    `g_programmed`: conductances of all devices as written, float32 [2 slices, G * I, O], S, or of an offset mapping one plane with
    its reference lines.
    `w_programmed`: weight of a full pair, float32 [G * O].
    `written_as`: the settings by which they hold weights, float32 [5]: window of a device, S, bits of a slice and of its room for
    carries (0 without), and place of the line order among those known (0 where all are one). A checkpoint of others is refused.
    `measured`: whether they were measured in the place of what was written, bool [1]; at age 0 such are read as they are.
    `age`: time since, s, float64 [1]; `ageings`: how often the devices were looked at, int64 [1].
    `gain`: factor that compensates for drift, float32 [1]; 1 without compensation.
    `device_seed`: the seed of the layer that was programmed, int64 [1]; its devices age alike in a layer of another seed or name.
    With `write_step` they fix the aged devices, which are made anew when a checkpoint is loaded.
    `chip`: its number, int64 [1]; reads in eval mode are counted so many times 65536 further down while it is read, so that chips
    that are judged from the same state, as by several processes, have read noise of their own.
    """

    weight: Tensor
    plan: ReadPlan
    name: str
    eval_step: Tensor
    write_step: Tensor
    g_programmed: Tensor | None
    w_programmed: Tensor | None
    age: Tensor | None
    gain: Tensor | None
    ageings: Tensor | None
    written_as: Tensor | None
    device_seed: Tensor | None
    chip: Tensor | None
    measured: Tensor | None
    aged: Tensor | None
    aged_variance: Tensor | None

    def setup_programmed(self) -> None:
        for name in HELD:
            self.register_buffer(name, None)
        for name in ("aged", "aged_variance"):  # what reads find, or what the wires are solved for
            self.register_buffer(name, None, persistent=False)
        self._held: Mark | None = None  # of the weight that was programmed
        self._loaded: Tensor | None = None  # that weight, from a checkpoint until it is looked at

    def is_held(self) -> bool:
        """Whether the weight is the one that was programmed."""
        if self._loaded is not None:  # a module that shares the weight may have loaded it again
            same = self._held is not None and self._held.weight is self.weight
            self._held = self.mark() if same and torch.equal(self._loaded, self.weight) else None
            self._loaded = None
        return self._held is not None and self._held.is_of(self.weight)

    def mark(self) -> Mark:
        """The layer's weight as it is now."""
        return Mark.of(self.weight)

    @property
    def programmed(self) -> bool:
        return self._buffers["g_programmed"] is not None

    def require_unprogrammed(self, act: str) -> None:
        """Refuse to write devices that only age."""
        if self.programmed:
            raise ValueError(
                f"{self.name}: `{act}` must wait until the layer is free, got one that is programmed; call "
                "gpuxbar.unprogram(model) first"
            )

    def require_own_weight(self, act: str) -> None:
        """Refuse a weight that is computed of other parameters, as pruned and normalised ones are."""
        if "weight" not in self._parameters:
            raise ValueError(
                f"{self.name}: `weight` must be a parameter for {act}, got one that is computed anew at every pass; make it one, "
                "as torch.nn.utils.prune.remove and torch.nn.utils.parametrize.remove_parametrizations do"
            )

    def hold(self, g: Tensor, w_max: Tensor, seed: int, chip: int) -> None:
        """Read these devices of a chip from now on, which the seed draws, and start their time."""
        self.write_step += 1
        self.eval_step += self.counted_apart()
        self.chip = torch.tensor([chip], device=g.device)
        self.eval_step -= self.counted_apart()
        self.g_programmed, self.w_programmed = g, w_max
        self.written_as = self._written_as().to(g.device)
        self.device_seed = torch.tensor([seed], device=g.device)
        self.measured = torch.zeros(1, dtype=torch.bool, device=g.device)
        self.age = torch.zeros(1, dtype=torch.float64, device=g.device)
        self.gain = torch.ones(1, dtype=torch.float32, device=g.device)
        self.ageings = torch.zeros(1, dtype=torch.int64, device=g.device)
        self._held, self._loaded = self.mark(), None
        self.look_after(0.0)

    def hold_on(self) -> None:
        """Read the devices as the buffers say now, which were set from outside together with the weight."""
        self._held, self._loaded = self.mark(), None
        self._make_aged()

    def _written_as(self) -> Tensor:
        device, mapping = self.spec.device, self.spec.mapping
        order = LINE_ORDERS.index(self.plan.line_order) if self.weight.dim() > 2 else 0
        settings = device.g_min, device.g_max, mapping.slice_bits or 0, self.spec.headroom_bits, order
        return torch.tensor(settings, dtype=torch.float32, device="cpu")

    def counted_apart(self) -> int:
        """Reads by which `eval_step` is further down than they were, since a chip's are counted apart."""
        return 0 if self.chip is None else APART * int(self.chip)

    def release(self) -> None:
        """Read the layer's own weights again."""
        self.leave_cells()
        self.eval_step += self.counted_apart()
        for name in (*HELD, "aged", "aged_variance"):
            setattr(self, name, None)
        self.restart_wires()

    def time(self) -> dict[str, Tensor]:
        """The layer's age and the counts of its reads, to `go_back` to."""
        return {name: self.get_buffer(name).clone() for name in TIME}

    def go_back(self, time: dict[str, Tensor]) -> None:
        """Be as at a `time`."""
        self.leave_cells()
        for name, value in time.items():
            self.get_buffer(name).copy_(value)
        self._make_aged()
        self.restart_wires()

    @torch.no_grad()
    def look_after(self, seconds: float) -> None:
        """Read the devices as they are that long after programming, uncompensated."""
        assert self.age is not None
        assert self.gain is not None
        assert self.ageings is not None
        self.leave_cells()
        self.age.fill_(seconds)
        self.gain.fill_(1.0)
        self.ageings += 1
        self._make_aged()
        self.restart_wires()

    def _make_aged(self) -> None:
        assert self.g_programmed is not None
        assert self.device_seed is not None
        assert self.measured is not None
        assert self.age is not None
        step, seed, age = int(self.write_step.item()), int(self.device_seed.item()), self.age.item()
        if self.measured.item() and age == 0:  # with the 1/f noise of that moment
            devices = self.g_programmed.clone()
        else:
            devices = drift(self.g_programmed, age, step, self.static[1], seed)
        variance = self.device_variance(devices)
        if self.seen is None and self.planes.merge != "offset":
            base = 2 ** (self.spec.mapping.slice_bits or 0)
            devices = merged(devices, self.planes.merge, base)
            variance = None if variance is None else merged(variance, self.planes.merge, base, power=2)
        self.aged, self.aged_variance = devices, variance

    def device_variance(self, devices: Tensor) -> Tensor | None:
        """Variance of state-dependent read noise of devices, A**2/V**2; None without such noise."""
        noise = self.spec.read_noise
        if not noise.sigma_g:
            return None
        return (noise.sigma_g * (devices / self.spec.device.g_max) ** noise.exponent) ** 2

    def aged_cells(self) -> Cells:
        """What reads find: the aged devices, through the wires."""
        assert self.aged is not None
        assert self.w_programmed is not None
        assert self.gain is not None
        assert self.ageings is not None
        if not torch.compiler.is_compiling() and not self.is_held():
            raise ValueError(
                f"{self.name}: `weight` must stay as it was programmed, got another; call gpuxbar.program(model) to write "
                "it, or gpuxbar.unprogram(model) to go on training"
            )
        lines = self.w_programmed.view(self.groups_, -1)[:, : self.plan.outputs]
        w_max = (lines * self.gain).reshape(-1)
        if self.seen is None:
            return Cells(self.aged, None, self.aged_variance, w_max, self.ageings)
        return self.through_wires(self.aged, self.aged_variance, w_max, self.ageings)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": self.is_held()}  # a copied weight has marks of its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._held = self.mark() if state["_held"] else None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        saved = {name: state_dict[f"{prefix}{name}"] for name in HELD if f"{prefix}{name}" in state_dict}
        errors: list[str] = more[-1]
        known = len(errors)
        if "written_as" in saved:
            self._require_written_as(saved["written_as"])
        # of before measured devices were told apart, and reads of chips counted so
        for name, dtype in (("measured", torch.bool), ("chip", torch.int64)):
            if saved and name not in saved:
                state_dict[f"{prefix}{name}"] = saved[name] = torch.zeros(
                    1, dtype=dtype, device=self.weight.device
                )
        lacking = sorted({*HELD} - {*saved, "device_seed"}) if saved and not self.programmed else []
        if lacking:
            raise ValueError(
                f"{self.name}: `state_dict` must hold all of a programmed layer, got one that lacks {', '.join(lacking)}; save the whole "
                "of model.state_dict()"
            )
        counted = f"{prefix}eval_step"
        if not saved and counted in state_dict:  # of no chip, while the layer stays on its own
            state_dict[counted] = state_dict[counted] - self.counted_apart()
        if saved and not self.programmed:
            self.device_seed = torch.tensor([self.plan.seed], device=self.weight.device)
            shapes = self._shapes()
            for name, value in saved.items():
                shape = shapes.get(name, (1,))  # not that of the state dict, of which torch refuses another
                setattr(self, name, torch.empty(shape, dtype=value.dtype, device=self.weight.device))
        super()._load_from_state_dict(state_dict, prefix, *more)
        if saved and len(errors) == known:
            self._held, self._loaded = self.mark(), self.weight.detach().clone()
            self._make_aged()
        self.forget_wires()

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of buffers that hold more than one number."""
        plan, mapping = self.plan, self.spec.mapping
        rows, cols = plan.inputs + plan.reference_lines[0], plan.outputs + plan.reference_lines[1]
        planes = 1 if mapping.scheme == "offset" else 2 * mapping.slices
        return {
            "g_programmed": (planes, plan.groups * rows, cols),
            "w_programmed": (plan.groups * cols,),
            "written_as": (len(WRITTEN_AS),),
        }

    def _require_written_as(self, saved: Tensor) -> None:
        """Refuse programmed devices that would mean other weights here."""
        settings = zip(WRITTEN_AS, saved.tolist(), self._written_as().tolist(), strict=True)
        others = [f"{name} {theirs:g} (here {ours:g})" for name, theirs, ours in settings if theirs != ours]
        if others:
            raise ValueError(
                f"{self.name}: `state_dict` must be of devices that hold weights as here, got {', '.join(others)}; convert with "
                "the spec that they were programmed with, or load the model as it was before gpuxbar.program"
            )
