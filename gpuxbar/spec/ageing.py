"""What happens to conductances as time passes and as devices are used; ideal by default."""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise
from math import inf, log1p
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from gpuxbar.spec.part import Part

__all__ = ["MOST_SHARES", "Drift", "DriftLaw", "Endurance", "MeasuredDrift", "Retention"]

MOST_SHARES = 32  # that a kernel takes


class Drift(Part):
    """Drift and low-frequency noise of conductances after programming, at `gpuxbar.age`.

    With t = t_0 + age, r = g / g_max of what the write left, and z1, z2 standard normals of a device:
    g(t) = g (t / t_0)**-|nu + std z1| (1 + share z2), not below 0
    nu    = clip(nu - nu_slope ln r, nu_min, nu_max)
    std   = clip(nu_std - nu_std_slope ln r, nu_std_min, nu_std_max)
    share = min(flicker r**-flicker_exponent, flicker_max) sqrt(ln((t + t_read) / (2 t_read)))

    `law`: "power"; see `MeasuredDrift` for another.
    `t_0`: s after programming at which conductances are what was programmed. `t_read`: duration of a read, s.
    `flicker`: relative fluctuation of a device at `g_max` in units of the root of the accumulated 1/f spectrum. It is
    slow against a read, so it is drawn once for an age, and is there at age 0 too, but for measured devices
    (`layer.set_conductances`), which have their own; `read_noise` is the fast part.
    Exponents are drawn at every programming. The published fit of nu takes r of the conductance aimed at, which differs
    by the noise of the write; devices trained in situ have no other than the one they hold.

    Source: Joshi et al., Nature Communications 2020; Nandakumar et al., ICECS 2019 (fit to an array of PCM devices).
    `presets.pcm()` has the values.
    """

    law: Literal["power"] = "power"
    nu: float = Field(0.0, ge=-1, le=1)
    nu_slope: float = Field(0.0, ge=-1, le=1)
    nu_min: float = Field(0.0, ge=0, le=1)
    nu_max: float = Field(1.0, ge=0, le=1)
    nu_std: float = Field(0.0, ge=-1, le=1)
    nu_std_slope: float = Field(0.0, ge=-1, le=1)
    nu_std_min: float = Field(0.0, ge=0, le=1)
    nu_std_max: float = Field(1.0, ge=0, le=1)
    t_0: float = Field(20.0, gt=0)
    flicker: float = Field(0.0, ge=0, le=1)
    flicker_exponent: float = Field(0.65, ge=0, le=4)
    flicker_max: float = Field(1.0, ge=0, le=1)
    t_read: float = Field(250e-9, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Drift:
        for name, low, high in (
            ("nu", self.nu_min, self.nu_max), ("nu_std", self.nu_std_min, self.nu_std_max),
        ):  # fmt: skip
            if low > high:
                raise ValueError(
                    f"Drift: `{name}_min` must be at most {name}_max, got {low:g} and {high:g}; swap them"
                )
        if self.t_read > self.t_0:
            raise ValueError(
                f"Drift: `t_read` must be at most t_0, got {self.t_read:g} s and {self.t_0:g} s; a read is short"
            )
        return self

    @property
    def last(self) -> float:
        """The greatest age that it is known for, s."""
        return inf

    @property
    def moves(self) -> bool:
        """Whether any device changes."""
        return any((self.nu, self.nu_slope, self.nu_min, self.draws))

    @property
    def draws(self) -> bool:
        """Whether anything of it is random."""
        return any((self.nu_std, self.nu_std_slope, self.nu_std_min, self.flicker))


class MeasuredDrift(Part):
    """How conductances change after programming, as it was measured on many devices at some ages, at `gpuxbar.age`.

    With r = g / g_max of what the write left, and z a standard normal of a device:
    g(age) = g + shift(r, age) + std(r, age) z, not below 0

    `ages`: s since programming, from the first to the last. `shares`: 2 to 32 values of r within 0 to 1, more than 1e-4 apart.
    `shift`, `std`: mean and standard deviation of what g has changed by since it was programmed, S: a row for each age, of a value
    for each share.
    Between shares values lie on lines, and outside them they stay; between ages they lie on lines in ln(1 + age / t_0), from 0 at
    age 0; a greater age than the last is refused. A device has one z for all ages, drawn at every programming, since the table does
    not say how its changes at several ages go together. `std` is of the change: where deviations were measured around what was
    aimed at, it is the root of their variance less that of `programming.write_noise`.

    `presets.reram()` is an example.
    """

    law: Literal["measured"] = "measured"
    ages: tuple[float, ...]
    shares: tuple[float, ...]
    shift: tuple[tuple[float, ...], ...]
    std: tuple[tuple[float, ...], ...]
    t_0: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _table(self) -> MeasuredDrift:
        if not self.ages or not _rising((0.0, *self.ages)):
            raise ValueError(
                f"MeasuredDrift: `ages` must be one or more that rise from above 0 s, got {self.ages}; sort them with their rows"
            )
        shares = self.shares
        if (
            not 2 <= len(shares) <= MOST_SHARES
            or not _rising(shares, 1e-4)
            or shares[0] < 0
            or shares[-1] > 1
        ):
            raise ValueError(
                f"MeasuredDrift: `shares` must be 2 to {MOST_SHARES} that rise by more than 1e-4 within 0 to 1, got {shares}; sort "
                "them with their columns, or leave some out"
            )
        for name in ("shift", "std"):
            sizes = [len(row) for row in getattr(self, name)]
            if sizes != [len(shares)] * len(self.ages):
                raise ValueError(
                    f"MeasuredDrift: `{name}` must have {len(self.ages)} rows of {len(shares)}, for each age a value for each share, "
                    f"got rows of {sizes}; give all"
                )
        if min(map(min, self.std)) < 0:
            raise ValueError(
                f"MeasuredDrift: `std` must be at least 0, got {min(map(min, self.std)):g} S; it is a standard deviation"
            )
        return self

    @property
    def last(self) -> float:
        """The greatest age that it is known for, s."""
        return self.ages[-1]

    @property
    def moves(self) -> bool:
        """Whether any device changes."""
        return any(map(any, self.shift)) or self.draws

    @property
    def draws(self) -> bool:
        """Whether anything of it is random."""
        return any(map(any, self.std))

    def at(self, age: float) -> tuple[list[float], list[float]]:
        """Mean and standard deviation at an age of at most the last, S, for each of the shares."""
        times = [log1p(t / self.t_0) for t in (0.0, *self.ages)]
        now = log1p(age / self.t_0)
        after = bisect_left(times, now, lo=1)
        part = (now - times[after - 1]) / (times[after] - times[after - 1])
        still = (0.0,) * len(self.shares)
        shift, std = (
            [a + part * (b - a) for a, b in zip((still, *rows)[after - 1], rows[after - 1], strict=True)]
            for rows in (self.shift, self.std)
        )
        return shift, std


def _rising(values: tuple[float, ...], by: float = 0.0) -> bool:
    return all(b - a > by for a, b in pairwise(values))


def _named(value: Any) -> Any:
    return {"law": "power", **value} if isinstance(value, dict) else value


DriftLaw = Annotated[Drift | MeasuredDrift, Field(discriminator="law"), BeforeValidator(_named)]


class Endurance(Part):
    """How many pulses devices trained in situ bear; every device counts its own.

    A device fails when it has taken more than pulses exp(spread z), z a standard normal of the device.

    `pulses`: their median; None: any number, and nothing is counted. `spread`: standard deviation of the logarithm between
    devices. `failed`: what a device then is for ever: "held", where its last update left it; "g_max", a filament that no
    pulse opens any more; "g_min", a filament or cell that no pulse closes. Which of them depends on the material and on how
    it is pulsed, so none is a default of physics: "held" is the mildest.

    Pulses are those of trains, or of an expected update its size in nominal steps, rounded at random to a whole number
    that is right in the mean. Programming, refreshing and carries are not counted. Counts take 4 bytes a device, and end at 2**31.

    Source: Chen et al., "Physical mechanisms of endurance degradation in TMO-RRAM", IEDM 2011 (failure to either state);
    Rasch et al., aihwkit, AICAS 2021 (counted pulses).
    """

    pulses: float | None = Field(None, gt=0, le=1e9)
    spread: float = Field(0.0, ge=0, le=3)
    failed: Literal["held", "g_min", "g_max"] = "held"


class Retention(Part):
    """What devices trained in situ lose between updates; once in every step of an in-situ optimiser.

    g <- g_rest + (g - g_rest) exp(-step_time / (tau exp(spread z))),  z a standard normal of the device

    `tau`: median time constant, s; None: nothing is lost. `step_time`: from one step to the next, s, at least a millionth of
    tau: float32 conductances resolve no less. `spread`: standard deviation of ln tau between devices. `g_rest`: where devices
    settle, S, at most `g_max`; None: at `g_min`. Both sides of a pair settle there, so that weights decay to 0. Stuck devices stay.

    Source: Rasch et al., aihwkit, AICAS 2021 (its `lifetime` is tau / step_time); Li et al., VLSI 2018 (leaking capacitors).
    """

    tau: float | None = Field(None, gt=0)
    step_time: float = Field(1.0, gt=0)
    spread: float = Field(0.0, ge=0, le=3)
    g_rest: float | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _resolved(self) -> Retention:
        if self.tau is not None and self.step_time < 1e-6 * self.tau:
            raise ValueError(
                f"Retention: `step_time` must be at least a millionth of tau, got {self.step_time:g} s for {self.tau:g} s; "
                "leave tau out: so slow a loss does not show in float32"
            )
        return self
