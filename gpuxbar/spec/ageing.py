"""What happens to conductances as time passes and as devices are used; ideal by default."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from gpuxbar.spec.part import Part

__all__ = ["Drift", "Endurance", "Retention"]


class Drift(Part):
    """Drift and low-frequency noise of conductances after programming, at `gpuxbar.age`.

    With t = t_0 + age, r = g / g_max of what the write left, and z1, z2 standard normals of a device:
    g(t) = g (t / t_0)**-|nu + std z1| (1 + share z2), not below 0
    nu    = clip(nu - nu_slope ln r, nu_min, nu_max)
    std   = clip(nu_std - nu_std_slope ln r, nu_std_min, nu_std_max)
    share = min(flicker r**-flicker_exponent, flicker_max) sqrt(ln((t + t_read) / (2 t_read)))

    `t_0`: s after programming at which conductances are what was programmed. `t_read`: duration of a read, s.
    `flicker`: relative fluctuation of a device at `g_max` in units of the root of the accumulated 1/f spectrum. It is
    slow against a read, so it is drawn once for an age, and is there at age 0 too, but for measured devices
    (`layer.set_conductances`), which have their own; `read_noise` is the fast part.
    Exponents are drawn at every programming. The published fit of nu takes r of the conductance aimed at, which differs
    by the noise of the write; devices trained in situ have no other than the one they hold.

    Source: Joshi et al., Nature Communications 2020; Nandakumar et al., ICECS 2019 (fit to an array of PCM devices).
    `presets.pcm()` has the values.
    """

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
    settle, S; None: at `g_min`. Both sides of a pair settle there, so that weights decay to 0. Stuck devices stay.

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
