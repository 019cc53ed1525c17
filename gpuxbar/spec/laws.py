"""How devices follow the pulses of an update: the laws, each with its source.

In shares of a device's window, y = (g - g_low) / (g_high - g_low), a law is a flow: n pulses of one direction move the
device as long as dv/dt = f(v) does in a time t = n / pulses, where v is the share already gone that way (v = y upwards,
v = 1 - y downwards) and f = 1 is the nominal step, range / pulses. Closed forms make n pulses one step, for any n.

A wanted change dG becomes n = pulses |dG| / range nominal pulses. Devices differ in the size of their steps, in their
asymmetry, in the ends of their windows and in their law's own parameter; each is drawn once per device from the seed,
and nothing is stored; devices that were measured one by one can take the place of drawn ones (`ops.device_map`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from gpuxbar.spec.part import Part

__all__ = [
    "Agarwal",
    "AgarwalSymmetric",
    "ConstantStep",
    "ExponentialStep",
    "Ideal",
    "Law",
    "LinearStep",
    "LookupTable",
    "NeuroSim",
    "PiecewiseStep",
    "PowerStep",
    "SoftBounds",
    "UpdateLaw",
]


class Law(Part):
    """What all laws share; ideal by default.

    `asymmetry`: potentiating steps are 1 + asymmetry of the nominal one, depressing steps 1 - asymmetry.
    `integer_pulses`: wanted changes are rounded to whole pulses, half to even.
    `write_noise`: standard deviation, S, of what a touched device shows around what it holds, redrawn at each touch.

    Between devices: `step_spread` (relative standard deviation of the step; of its logarithm if
    `lognormal_steps`), `asymmetry_spread` (standard deviation of the asymmetry), `low_spread` and `high_spread` (of
    the ends of the window, in shares of the nominal one; no end is below 0 S, and no window narrower than a hundredth of the
    nominal one). A device outside its own window enters it when touched. Laws go by the share of a device's own window;
    `SoftBounds` and `ExponentialStep` say how they differ.

    `sides`: which devices of a pair take a wanted change of its weight: "both" (half each, up and down), "reference"
    (all on the first; the second is a reference that never moves, so that a weight has half the range), "one_sided" (gains on the
    first, losses on the second, both by potentiation).
    `reference_at`: share of the window at which all references lie, so that the first device holds the whole weight (with
    sides="reference"). Where up and down steps are alike, opposite pulses lead weights to 0. None: a pair begins with half of its
    weight above the middle of the window and half below, and the reference keeps that half.
    """

    asymmetry: float = Field(0.0, gt=-1, lt=1)
    integer_pulses: bool = False
    write_noise: float = Field(0.0, ge=0)
    step_spread: float = Field(0.0, ge=0, le=2)
    lognormal_steps: bool = False
    asymmetry_spread: float = Field(0.0, ge=0, le=1)
    low_spread: float = Field(0.0, ge=0, le=0.5)
    high_spread: float = Field(0.0, ge=0, le=0.5)
    sides: Literal["both", "reference", "one_sided"] = "both"
    reference_at: float | None = Field(None, ge=0, le=1)

    @model_validator(mode="after")
    def _referred(self) -> Law:
        if self.reference_at is not None and self.sides != "reference":
            raise ValueError(
                f"{type(self).__name__}: `sides` must be reference with reference_at, got {self.sides!r}; choose it, or leave reference_at None"
            )
        return self

    @property
    def nominal_pulses(self) -> float | None:
        """Nominal pulses over the window; None for a law without steps."""
        return getattr(self, "pulses", None)


class Stepping(Law):
    """Laws of devices with a step: `pulses` nominal ones span the window.

    `cycle`: standard deviation of one pulse, relative to the "step" it makes where the device is or to the
    "nominal" one (`cycle_of`); n pulses have sqrt(n) of it.
    """

    pulses: float = Field(1000.0, ge=1, le=1e7)
    cycle: float = Field(0.0, ge=0)
    cycle_of: Literal["step", "nominal"] = "step"


class Ideal(Law):
    """f = 1: the device does what is wanted, inside its window."""

    law: Literal["ideal"] = "ideal"

    @model_validator(mode="after")
    def _without_pulses(self) -> Ideal:
        if self.integer_pulses:
            raise ValueError(
                "Ideal: `integer_pulses` must be false, got true; its devices take any change and know no pulses: choose "
                "law='constant_step', or leave it out"
            )
        return self


class ConstantStep(Stepping):
    """f = 1: equal steps up to hard bounds.

    Source: Gokmen and Vlasov, Frontiers in Neuroscience 2016.
    """

    law: Literal["constant_step"] = "constant_step"


class LinearStep(Stepping):
    """f = 1 + slope - 2 slope v: steps shrink linearly on their way; nominal in mid-window.

    `slope_up`, `slope_down`: 0 is a constant step, 1 a soft bound, where the last step is 0. `spread`: standard
    deviation of each between devices. Slopes are over a device's own window, where aihwkit's are over the nominal one.
    Source: Rasch et al., aihwkit, AICAS 2021; Tang et al., IEDM 2018 (ECRAM); Li et al., VLSI 2018 (capacitor).
    """

    law: Literal["linear_step"] = "linear_step"
    slope_up: float = Field(0.0, ge=-1, le=1)
    slope_down: float = Field(0.0, ge=-1, le=1)
    spread: float = Field(0.0, ge=0)


class SoftBounds(Stepping):
    """Steps that shrink linearly to 0 at the bound they lead to: f = up (1 - v), f = down (1 - v).

    dG > 0:  g' = g_max - (g_max - g) exp(-up |dG| / range)
    dG < 0:  g' = g_min + (g - g_min) exp(-down |dG| / range)
    `up`: size of a small step at g_min relative to the wanted one; `down`: the same at g_max. Steps are half of that
    in mid-range, so up = down = 2 is right there, and up and down steps are alike at up / (up + down) of the window.
    Devices with ends of their own make steps as large as others at that place, so that ends do not move it, and of 0 at their
    own ends.
    `spread`: device-to-device relative standard deviation of `up` and of `down`, drawn for each.
    Source: Fusi and Abbott, Nature Neuroscience 2007; Rasch et al., aihwkit, AICAS 2021.
    """

    law: Literal["soft_bounds"] = "soft_bounds"
    up: float = Field(1.0, gt=0)
    down: float = Field(1.0, gt=0)
    spread: float = Field(0.0, ge=0)


class ExponentialStep(Stepping):
    """f = max(1 - amplitude exp(rate z), 0) upwards, max(1 - amplitude exp(-rate z), 0) downwards, z = a (2y - 1) + b.

    Steps fall (amplitude > 0) or rise (amplitude < 0) exponentially as the device nears a bound. For devices with ends of
    their own, 2y - 1 is the distance from the middle of the nominal window, over half of their width.
    `spread`: relative standard deviation of each amplitude between devices.
    Source: Rasch et al., aihwkit, AICAS 2021, fit to Gong et al., Nature Communications 2018 (ReRAM).
    """

    law: Literal["exponential_step"] = "exponential_step"
    amplitude_up: float = Field(0.00081, lt=1e3, gt=-1e3)
    amplitude_down: float = Field(0.36833, lt=1e3, gt=-1e3)
    rate_up: float = Field(12.44625, gt=0, le=100)
    rate_down: float = Field(12.78785, gt=0, le=100)
    a: float = Field(0.244, ge=-2, le=2)
    b: float = Field(0.2425, ge=-2, le=2)
    spread: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _curved(self) -> ExponentialStep:
        if abs(self.a) < 1e-3:
            raise ValueError(
                f"ExponentialStep: `a` must be at least 0.001 in size, got {self.a:g}; steps that do not depend on "
                "the conductance are law='constant_step'"
            )
        return self


class PowerStep(Stepping):
    """f = (1 - v)^exponent.

    `exponent_up`, `exponent_down`: 0 is a constant step, 1 a soft bound. `spread`: standard deviation of each
    between devices, drawn for each (in aihwkit a part is common to both).
    Source: Rasch et al., aihwkit, AICAS 2021.
    """

    law: Literal["power_step"] = "power_step"
    exponent_up: float = Field(1.0, ge=0, le=10)
    exponent_down: float = Field(1.0, ge=0, le=10)
    spread: float = Field(0.0, ge=0)


class PiecewiseStep(Stepping):
    """f is linear between measured values, evenly spaced over the window.

    `up`, `down`: f at y = 0 .. 1, in order of conductance, for each direction; 2, 3, 5 or 9 values of at least 0.
    `spread`: relative standard deviation of each direction's values between devices.
    Source: Rasch et al., aihwkit, AICAS 2021.
    """

    law: Literal["piecewise_step"] = "piecewise_step"
    up: tuple[float, ...] = (1.0, 1.0)
    down: tuple[float, ...] = (1.0, 1.0)
    spread: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _nodes(self) -> PiecewiseStep:
        for name, values in (("up", self.up), ("down", self.down)):
            if len(values) not in (2, 3, 5, 9):
                raise ValueError(
                    f"PiecewiseStep: `{name}` must hold 2, 3, 5 or 9 values, got {len(values)}; "
                    "interpolate the measurement at evenly spaced conductances"
                )
            if not all(0 <= value <= 1000 for value in values):
                raise ValueError(
                    f"PiecewiseStep: `{name}` must hold steps of 0 to 1000 nominal ones, got {list(values)}; "
                    "depressing steps are positive too"
                )
        return self


class LookupTable(Law):
    """A measured device: mean steps and their scatter, tabulated over the conductance.

    Mean steps flow as `PiecewiseStep`; to that, n pulses add sqrt(n) times the scatter found where the device is.
    `gpuxbar.experiments.fit_table` makes one from a CSV of pulses.
    `pulses`: nominal ones over the window. `up`, `down`: mean step at y = 0 .. 1 in nominal ones, positive.
    `scatter_up`, `scatter_down`: a row for each of those places: what a pulse's change differs from its mean, in nominal
    steps and signed as the conductance is, at the normal scores -4, -3.5 .. 4 (its quantiles at their probabilities).
    A scatter with a mean of its own adds to the steps.
    Source: Agarwal et al., IJCNN 2016 (tables of measured changes).
    """

    law: Literal["lookup_table"] = "lookup_table"
    pulses: float = Field(1000.0, ge=1, le=1e7)
    up: tuple[float, ...]
    down: tuple[float, ...]
    scatter_up: tuple[tuple[float, ...], ...]
    scatter_down: tuple[tuple[float, ...], ...]
    spread: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _tables(self) -> LookupTable:
        for name, values, rows in (
            ("up", self.up, self.scatter_up), ("down", self.down, self.scatter_down),
        ):  # fmt: skip
            if len(values) not in (2, 3, 5, 9) or not all(0 <= value <= 1000 for value in values):
                raise ValueError(
                    f"LookupTable: `{name}` must hold 2, 3, 5 or 9 mean steps of 0 to 1000 nominal ones, got "
                    f"{list(values)}; fit with as many bins, and give depressing steps as positive"
                )
            if len(rows) != len(values) or any(len(row) != 17 for row in rows):
                raise ValueError(
                    f"LookupTable: `scatter_{name}` must hold {len(values)} rows of 17 values, one for each mean step, got "
                    f"{len(rows)} of {sorted({len(row) for row in rows})}; give quantiles at the normal scores -4, -3.5 .. 4"
                )
            falling = [list(row) for row in rows if list(row) != sorted(row)]
            if falling:
                raise ValueError(
                    f"LookupTable: `scatter_{name}` must not fall along a row, got {falling[0]}; "
                    "these are quantiles: sort them"
                )
        return self


class Agarwal(Law):
    """Asymmetric non-linear update with write noise (the laws of TxSim and CrossSim).

    With range = g_max - g_min and G1 = range / (1 - exp(-nu)):
    dG > 0:  dG' = (G1 + g_min - g) (1 - exp(-nu dG / range))
    dG < 0:  dG' = (g_max - G1 - g) (1 - exp(+nu dG / range))
    g <- clip(g + dG' + gamma sqrt(|dG'| range) z),  noise only where dG is not 0.

    Many small steps in one direction add up to one large step exactly, so pulses need no loop; nu = 0 is linear.
    `nu`: asymmetric non-linearity. `gamma`: write noise, the plain multiplier of the formula. The literature also
    quotes it in percent: a "gamma of 5" read as percent is gamma=0.05 here; read raw it is gamma=5, sixteen
    percent of the range for an update of a thousandth of it.
    `spread`: device-to-device relative standard deviation of nu, drawn for each direction. `cycle`: relative
    standard deviation of dG', beside gamma's. `pulses`: over the range, for pulse trains.
    Source: Agarwal et al., IJCNN 2016; Roy et al., TxSim, IEEE TVLSI 2021.
    """

    law: Literal["agarwal"] = "agarwal"
    nu: float = Field(0.0, ge=0, le=20)
    gamma: float = Field(0.0, ge=0)
    spread: float = Field(0.0, ge=0)
    cycle: float = Field(0.0, ge=0)
    pulses: float = Field(1000.0, ge=1, le=1e7)


class AgarwalSymmetric(Law):
    """Symmetric non-linear update with write noise: steps are largest in mid-window, and alike both ways.

    With A = range (e^alpha + 1) / (e^alpha - 1), B = g_min - range / (e^alpha - 1) and d = dG / range:
    dG' = A / (1 + exp(-2 alpha d) (A / (g - B) - 1)) - g + B
    `alpha`: non-linearity; 0 is linear. The rest as for `Agarwal`.
    Source: Agarwal et al., IJCNN 2016.
    """

    law: Literal["agarwal_symmetric"] = "agarwal_symmetric"
    alpha: float = Field(0.0, ge=0, le=20)
    gamma: float = Field(0.0, ge=0)
    spread: float = Field(0.0, ge=0)
    cycle: float = Field(0.0, ge=0)
    pulses: float = Field(1000.0, ge=1, le=1e7)


class NeuroSim(Law):
    """Exponential LTP and LTD staircases of NeuroSim.

    Potentiation by n = levels dG / range pulses (rounded if `integer_pulses`), with A = A_norm levels and
    B = range / (1 - exp(-levels / A)):
    P0 = -A ln(1 - (g - g_min) / B),  g' = g_min + B (1 - exp(-(P0 + n) / A)).
    Depression is the mirror image, from g_max downwards. `levels` pulses from the far bound just span the window.
    `nonlinearity_ltp`, `nonlinearity_ltd`: NeuroSim's labels, -9 to 9; the staircase deviates from a line by at most
    label / 10.1 of the range, which fixes A_norm. A positive label makes the first steps from the far bound the
    largest, in both directions; NeuroSim writes such an LTD label with a minus, and one with a plus where steps down are
    largest at g_min as steps up are: change its sign. 0 is linear.
    `spread`: device-to-device standard deviation of the labels, drawn for each direction and kept within +-9.5.
    `cycle`: standard deviation of one pulse as a share of the range, growing with sqrt(|n|), as in MLP+NeuroSim (DNN+NeuroSim:
    of an update of any size).
    Source: Chen, Peng and Yu, NeuroSim, IEEE TCAD 2018; Peng et al., DNN+NeuroSim V2.0, IEEE TCAD 2021.
    """

    law: Literal["neurosim"] = "neurosim"
    nonlinearity_ltp: float = Field(0.0, ge=-9, le=9)
    nonlinearity_ltd: float = Field(0.0, ge=-9, le=9)
    levels: int = Field(97, ge=2, le=65536)
    spread: float = Field(0.0, ge=0)
    cycle: float = Field(0.0, ge=0)

    @property
    def nominal_pulses(self) -> float:
        return self.levels


UpdateLaw = Annotated[
    Agarwal
    | AgarwalSymmetric
    | ConstantStep
    | ExponentialStep
    | Ideal
    | LinearStep
    | LookupTable
    | NeuroSim
    | PiecewiseStep
    | PowerStep
    | SoftBounds,
    Field(discriminator="law"),
]
