"""The array of a layer: its tiles, devices, wires, how weights lie on them and how they are written."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from gpuxbar.spec.part import Part

__all__ = ["Device", "Mapping", "Parasitics", "Programming", "Tile"]

STEEPEST = 20  # v_read over v_sinh
SHARES = [i / 100 for i in range(101)]  # of g_max, at which polynomials are looked at


class Tile(Part):
    """One physical array: `rows` wordlines by `cols` bitlines; larger layers take several."""

    rows: int = Field(128, ge=1, le=65536)
    cols: int = Field(128, ge=1, le=65536)


class Device(Part):
    """A cell's conductance window, S, and its number of programmable levels (`None`: continuous).

    `v_sinh`: of devices that are not ohmic, V (`None`: ohmic): at v volts they carry g v_read sinh(v / v_sinh) /
    sinh(v_read / v_sinh), with g their conductance at `dac.v_read`. So values between 0 and the largest weigh less than they
    should, unless they are driven by streams of 1 bit. All devices have the one curve. Gradients are straight-through: those of
    inputs are read by such devices too, and those of weights, and pulses, follow the digital values. Not with `parasitics`.

    Source of the curve: Guan, Yu, Wong, IEEE Electron Device Letters 33, 1405 (2012), doi:10.1109/LED.2012.2210856; Jiang, Wong,
    Stanford University RRAM Verilog-A model (2014), doi:10.4231/D37H1DN48, whose parameters have it at 0.25 V.
    """

    g_min: float = Field(1e-6, ge=0)
    g_max: float = Field(10e-6, gt=0)
    levels: int | None = Field(None, ge=2, le=65536)
    v_sinh: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Device:
        if not self.g_min < self.g_max:
            raise ValueError(
                f"Device: `g_min` must be below `g_max`, got {self.g_min:g} S and {self.g_max:g} S; "
                "swap them or widen the window"
            )
        return self


class Mapping(Part):
    """How a signed weight becomes conductances.

    `scheme`: "differential" (two arrays, a conversion each, subtracted digitally), "subtracted" (two devices
    whose currents are subtracted before one conversion), "offset" (one array around the middle conductance
    and a reference column per column tile, subtracted digitally).
    `slices`, `slice_bits`: the weight magnitude spread over `slices` devices of `slice_bits` each, joined by
    shift-and-add; one slice with `slice_bits=None` is an unsliced, continuous weight.
    `scale`: one weight scale per "tensor", or per output "column": its largest weight is a full pair. `w_max`: the
    weight of a full pair instead; larger ones are clipped.
    `headroom`: in-situ training begins with a weight scale of this times the largest weight, unless `w_max` is given, and weights
    stay inside it. A layer that begins with zeros (LoRA's B, the last one of a residual branch, some heads) has no largest weight
    and needs `w_max`: what its weights are to stay inside; torch's own initialisation would make it headroom / sqrt(inputs).
    `line_order`: of a convolution's weights on the wordlines of a group: "channel_position" (all positions of the kernel for
    one channel, then for the next: torch's own layout, flattened) or "position_channel" (all channels at one position, then
    at the next, as accelerators of channels-last images do). It decides which weights share a tile: 128 rows of a 3 x 3
    kernel hold 14.2 channels, or two whole blocks of 64 channels of a position, which a GPU gathers from the images without
    waste. Weights and their gradients keep torch's layout.
    """

    scheme: Literal["differential", "subtracted", "offset"] = "differential"
    slices: int = Field(1, ge=1, le=32)
    slice_bits: int | None = Field(None, ge=1, le=8)
    scale: Literal["tensor", "column"] = "tensor"
    w_max: float | None = Field(None, gt=0)
    headroom: float = Field(4.0, ge=1, le=1000)
    line_order: Literal["channel_position", "position_channel"] = "channel_position"

    @model_validator(mode="after")
    def _sliced(self) -> Mapping:
        if self.slices > 1 and self.slice_bits is None:
            raise ValueError(
                f"Mapping: `slice_bits` must be set for {self.slices} slices, got None; "
                "give the bits of one device, for instance 2"
            )
        if self.slice_bits is not None and self.scheme == "offset":
            raise ValueError(
                "Mapping: `scheme` must be differential or subtracted for sliced weights, got offset; "
                "choose one of these, or slices=1 and slice_bits=None"
            )
        if self.slices * (self.slice_bits or 1) > 32:
            raise ValueError(
                f"Mapping: slices * slice_bits must be at most 32, got {self.slices} * {self.slice_bits}; "
                "a float32 weight holds no more"
            )
        return self


class Programming(Part):
    """What a write-verify leaves: drawn once per weight version, the spread and stuck cells once per device.

    `write_noise`: standard deviation of the conductance, S; or up to five terms of a polynomial, of r**0, r**1, ... with
    r = g / g_max of the conductance aimed at. `device_spread`: relative standard deviation between devices.
    `stuck_at_g_min`, `stuck_at_g_max`: rates of stuck cells.
    """

    write_noise: float | tuple[float, ...] = 0.0
    device_spread: float = Field(0.0, ge=0)
    stuck_at_g_min: float = Field(0.0, ge=0, le=1)
    stuck_at_g_max: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _deviation(self) -> Programming:
        count = len(self.write_terms)
        if not 1 <= count <= 5:
            raise ValueError(
                f"Programming: `write_noise` must be a number or have 1 to 5 terms, got {count}; a polynomial of the fourth degree has 5"
            )
        r = min(self.write_shares, key=self.write_deviation)
        if self.write_deviation(r) < 0:
            raise ValueError(
                f"Programming: `write_noise` must be at least 0 for every r of 0 to 1, got {self.write_deviation(r):g} S at r = {r:g}; "
                "it is a standard deviation"
            )
        return self

    @model_validator(mode="after")
    def _rates(self) -> Programming:
        if self.stuck_at_g_min + self.stuck_at_g_max > 1:
            raise ValueError(
                "Programming: stuck_at_g_min + stuck_at_g_max must be at most 1, got "
                f"{self.stuck_at_g_min:g} + {self.stuck_at_g_max:g}; they are shares of the cells"
            )
        return self

    @property
    def write_terms(self) -> tuple[float, ...]:
        """The terms of `write_noise`, S."""
        return self.write_noise if isinstance(self.write_noise, tuple) else (self.write_noise,)

    @property
    def write_shares(self) -> list[float]:
        """The shares of g_max at which `write_deviation` is looked at; one where it is the same for all."""
        return SHARES if len(self.write_terms) > 1 else SHARES[:1]

    def write_deviation(self, r: float) -> float:
        """Standard deviation of a write to a share r of g_max, S."""
        return sum(term * r**power for power, term in enumerate(self.write_terms))


class Parasitics(Part):
    """Resistances of the wires of a tile, and how they are solved; 0 everywhere is ideal.

    Wordlines are driven at their first column and bitlines sensed at their last row; the other ends are open. What fills no whole
    tile lies in the corner by its drivers and sense amplifiers, without devices on the rest of its lines.
    `r_wordline`, `r_bitline`: of a wire segment between two cells, at most 1 / `device.g_max`, ohm. `r_source`: total before the
    first cell of a wordline, driver and wire, ohm; `r_sink`: total after the last cell of a bitline, ohm.
    `method`: "exact", or an approximation of `gpuxbar.ops.effective_conductance`.
    `terminations`: what a transposed read finds at the ends. "line": every line keeps its resistance, so bitlines are
    driven through `r_sink` and the array is exactly the transpose; "role": drivers keep `r_source` and sense amplifiers
    `r_sink`, whichever lines they serve, and the array is solved once more. Must be chosen where the two differ.
    `arithmetic`: of the exact solution on a GPU, as in `gpuxbar.ops.effective_conductance`; no effect on a CPU.
    `shared_drivers`: column tiles of a layer share the drivers of their wordlines, one `r_source` for all ("exact" only).
    `anchor`: between exact solutions, this approximation plus what it lacked at the last one; None: every tile is solved
    whenever the weights change. `refresh_interval`: changes after which a tile is solved again, in turn; `tolerance`:
    relative error of a tile, as estimated, beyond which it is solved earlier. At every change at most 1 / refresh_interval
    of a layer's tiles are solved, the most urgent first, so a layer that jumps is followed over several changes; a
    layer's `wire_error()` is the largest estimate, and `restart_wires()` solves all at the next read.
    `gradient`: of the weights. "straight_through": that of the conductances as reads see them, as if wires took nothing
    on the way to the devices; "exact": brought through the wires to the devices by the adjoint network, at three
    to four times the cost of an exact solution at every backward pass (method "exact", with or without anchor).
    """

    r_wordline: float = Field(0.0, ge=0)
    r_bitline: float = Field(0.0, ge=0)
    r_source: float = Field(0.0, ge=0)
    r_sink: float = Field(0.0, ge=0)
    method: Literal["none", "first_order", "ladder", "mean_field", "exact"] = "exact"
    arithmetic: Literal["fp32", "3xtf32", "tf32"] = "fp32"
    terminations: Literal["line", "role"] | None = None
    shared_drivers: bool = False
    anchor: Literal["ladder", "mean_field"] | None = None
    refresh_interval: int = Field(1, ge=1)
    tolerance: float = Field(1e-2, gt=0)
    gradient: Literal["straight_through", "exact"] = "straight_through"

    @model_validator(mode="after")
    def _chosen(self) -> Parasitics:
        if self.r_source != self.r_sink and self.terminations is None:
            raise ValueError(
                f"Parasitics: `terminations` must be chosen where r_source and r_sink differ, got {self.r_source:g} and "
                f"{self.r_sink:g} ohm; 'line' keeps each line's resistance in the transposed read, 'role' moves it with "
                "the driver"
            )
        if self.shared_drivers and (self.method != "exact" or self.terminations == "role"):
            raise ValueError(
                "Parasitics: `shared_drivers` must go with method='exact' and terminations 'line', got "
                f"{self.method!r} and {self.terminations!r}; choose these or shared_drivers=False"
            )
        if self.anchor is None and self.refresh_interval > 1:
            raise ValueError(
                f"Parasitics: `anchor` must be ladder or mean_field with refresh_interval {self.refresh_interval}, got "
                "None; it carries a tile from one exact solution to the next"
            )
        if self.anchor is not None and (self.method != "exact" or self.shared_drivers):
            raise ValueError(
                "Parasitics: `anchor` must go with method='exact' and shared_drivers=False, got "
                f"{self.method!r} and {self.shared_drivers}; choose these or anchor=None"
            )
        if self.gradient == "exact" and (self.method != "exact" or self.shared_drivers):
            raise ValueError(
                "Parasitics: `gradient` must be straight_through unless method='exact' and shared_drivers=False, got "
                f"'exact' with {self.method!r} and {self.shared_drivers}; choose these or gradient='straight_through'"
            )
        return self

    @property
    def active(self) -> bool:
        """Whether any wire has a resistance that is solved for."""
        ohms = (self.r_wordline, self.r_bitline, self.r_source, self.r_sink)
        return self.method != "none" and any(ohms)

    @property
    def exact_gradient(self) -> bool:
        """Whether gradients of weights go through wires."""
        return self.active and self.gradient == "exact"

    @property
    def swapped(self) -> bool:
        """Whether the transposed read sees another matrix than the transpose."""
        return self.active and self.terminations == "role" and self.r_source != self.r_sink
