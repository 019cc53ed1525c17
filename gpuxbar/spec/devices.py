"""Published devices as update laws in SI units, each with its source and the range it was fitted in.

Papers give steps in normalised weights; the conductance window they lie in is often not given with the fit, and is then
chosen here (`window_source`). Only ratios to the window enter a law, so another window changes no training but where ends of
windows spread, none of which is below 0 S.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log1p
from typing import Any

from gpuxbar.spec.array import Device
from gpuxbar.spec.errors import SpecError, nearest
from gpuxbar.spec.laws import (
    Agarwal,
    ConstantStep,
    ExponentialStep,
    LinearStep,
    NeuroSim,
    SoftBounds,
    UpdateLaw,
)
from gpuxbar.spec.model import CrossbarSpec

__all__ = ["DEVICES", "PublishedDevice", "published_device"]


@dataclass(frozen=True)
class PublishedDevice:
    """A device of the literature.

    Attributes:
        law: Its update law; write noise is in S of `window`.
        window: Its conductance window.
        source: Where the parameters are from.
        window_source: Where the window is from.
        valid: What the fit covers.
        reference_at: Share of the window where weight 0 lies, of a source in which a device holds a whole weight beside a
            reference: a setting of the update law, for `sides="reference"`. None: the source knows no such weights, or moves one
            way.
    """

    name: str
    law: UpdateLaw
    window: Device
    source: str
    window_source: str
    valid: str
    reference_at: float | None = None

    def spec(self, **overrides: Any) -> CrossbarSpec:
        """An otherwise ideal crossbar of these devices, with a nested dictionary laid over it."""
        return CrossbarSpec(device=self.window, update=self.law).with_overrides(overrides)


AIHWKIT = "parameters of aihwkit's presets (Rasch et al., AICAS 2021)"
WINDOW = Device(g_min=1e-6, g_max=10e-6)  # where the source gives none
SHIFTED = "window shifted so that the symmetry point is at weight 0"
ARRAY = (
    "about {} steps over the window; symmetry point at weight 0, without the 5 % by which its reference errs; {} % failed cells of "
    "the array are not in it: set programming.stuck_at_*"
)


@dataclass(frozen=True)
class Steps:
    """A fit in normalised weights: `low` .. `high` is the window, `size` a potentiating step at weight 0.

    `up_down`: depressing steps are 1 - up_down of potentiating ones. Spreads are standard deviations between devices:
    `size_spread` relative, `up_down_spread` of either step over `size`, `low_spread` and `high_spread` relative to the bounds.
    `write_noise`: in steps.
    """

    size: float
    low: float
    high: float
    up_down: float = 0.0
    size_spread: float = 0.0
    up_down_spread: float = 0.0
    low_spread: float = 0.0
    high_spread: float = 0.0
    write_noise: float = 0.0

    def law(self, up: float = 1.0, down: float = 1.0, window: Device = WINDOW) -> dict[str, Any]:
        """Settings that all laws share; `up` and `down` are the law's steps where it is nominal, over those at weight 0."""
        width = self.high - self.low
        down *= 1 - self.up_down
        mean = (up + down) / 2
        return {
            "pulses": width / (self.size * mean),
            "asymmetry": (up - down) / (2 * mean),
            "step_spread": self.size_spread / mean,
            "asymmetry_spread": self.up_down_spread / mean,
            "low_spread": self.low_spread * -self.low / width,
            "high_spread": self.high_spread * self.high / width,
            "write_noise": self.write_noise * self.size / width * (window.g_max - window.g_min),
        }


def _of_steps(name: str, steps: Steps, law: UpdateLaw, source: str, valid: str) -> PublishedDevice:
    zero = -steps.low / (steps.high - steps.low)
    return PublishedDevice(name, law, WINDOW, f"{source}; {AIHWKIT}", "chosen here", valid, zero)


def _linear(steps: Steps, slopes: tuple[float, float], cycle: float, of: str, spread: float) -> LinearStep:
    """Steps 1 - slope w / high upwards and 1 + slope w / low downwards; the law is nominal in mid-window."""
    width, middle = steps.high - steps.low, (steps.high + steps.low) / 2
    up, down = 1 - slopes[0] * middle / steps.high, 1 - slopes[1] * middle / steps.low
    return LinearStep.model_validate(
        {
            **steps.law(up, down),
            "slope_up": slopes[0] * width / (2 * steps.high * up),
            "slope_down": slopes[1] * width / (-2 * steps.low * down),
            "spread": spread, "cycle": cycle, "cycle_of": of,
        }
    )  # fmt: skip


def _soft(steps: Steps, cycle: float, lognormal: bool = False) -> SoftBounds:
    """Steps size (1 - w / high) upwards and size (1 - w / low) downwards, in the law each what a whole pulse makes of its flow."""
    pulses = (steps.high - steps.low) / steps.size
    up, down = -pulses * log1p(-steps.size / steps.high), -pulses * log1p(steps.size / steps.low)
    shape = {"up": up, "down": down, "cycle": cycle, "cycle_of": "nominal", "lognormal_steps": lognormal}
    return SoftBounds.model_validate({**steps.law(), **shape})


def reram_es() -> PublishedDevice:
    steps = Steps(0.00135, -1, 1, 0.259359, 0.2, 0.05, 0.3, 0.3, write_noise=75)
    shape = {
        "amplitude_up": -1.18445,
        "amplitude_down": -0.081404,
        "rate_up": 5,
        "rate_down": 5,
        "a": -0.5,
        "b": -0.5,
    }
    law = ExponentialStep.model_validate({**steps.law(), **shape, "cycle": 5.0})
    source = "Gong et al., Nature Communications 2018 (ReRAM)"
    return _of_steps("reram-es", steps, law, source, "single pulses over the whole window")


def reram_sb() -> PublishedDevice:
    steps = Steps(0.002, -0.75, 1.25, 0, 0.3, 0.01, 0.3 / 0.75, 0.3 / 1.25, write_noise=56)
    source = "Gong et al., Nature Communications 2018 (ReRAM), a loose fit"
    valid = "symmetry point at weight 0, as after subtraction of a calibrated reference"
    return _of_steps("reram-sb", steps, _soft(steps, 3.75), source, valid)


def reram_array_om() -> PublishedDevice:
    steps = Steps(0.0949, -1, 1, 0, 0.7829, 0.01, 0.5695, 0.3499, write_noise=1.4113)
    source = "Gong, Rasch et al., IEDM 2022 (array, optimized material)"
    law = _soft(steps, 0.4158, lognormal=True)
    return _of_steps("reram-array-om", steps, law, source, ARRAY.format(20, 13.5))


def reram_array_hfo2() -> PublishedDevice:
    steps = Steps(0.4622, -1, 1, 0, 0.7125, 0.01, 0.5990, 0.4295, write_noise=0.5841)
    source = "Gong, Rasch et al., IEDM 2022 (array, baseline HfO2)"
    law = _soft(steps, 0.2174, lognormal=True)
    return _of_steps("reram-array-hfo2", steps, law, source, ARRAY.format(4, 10))


def capacitor() -> PublishedDevice:
    steps = Steps(0.005, -1, 1, 0, 0.1, 0.06, 0.07, 0.07)
    law = _linear(steps, (0.05, 0.05), 0.3, "nominal", 0.01)
    source = "Li et al., VLSI 2018 (capacitor)"
    return _of_steps("capacitor", steps, law, source, "single pulses; leakage is not in it")


def ecram() -> PublishedDevice:
    steps = Steps(0.002, -0.8276, 1.1724, 0, 0.1, 0.01, 0.05, 0.05)
    law = _linear(steps, (0.1153, 0.5085), 0.3, "step", 0.05)
    return _of_steps("ecram", steps, law, "Tang et al., IEDM 2018 (Li ECRAM)", SHIFTED)


def ecram_mo() -> PublishedDevice:
    steps = Steps(2.8214e-4, -0.8286, 1.1714, 0, 0.1, 0.01, 0.05, 0.05)
    law = _linear(steps, (0.4152, 0.7342), 2.0, "step", 0.05)
    return _of_steps("ecram-mo", steps, law, "Kim et al., IEDM 2019 (metal-oxide ECRAM)", SHIFTED)


def gokmen_vlasov() -> PublishedDevice:
    steps = Steps(0.0016, -1, 1, 0, 0.3, 0.01, 0.3, 0.3)
    law = ConstantStep(**steps.law(), cycle=0.3)
    source = "Gokmen and Vlasov, Frontiers in Neuroscience 2016 (specification, window scaled)"
    return _of_steps("gokmen-vlasov", steps, law, source, "a specification, not a measurement")


def idealized() -> PublishedDevice:
    steps = Steps(0.0002, -1, 1, 0, 0.3, 0, 0.3, 0.3)
    law = ConstantStep(**steps.law(), cycle=0.3)
    source = "Rasch, Gokmen and Haensch, IEEE Design & Test 2019"
    return _of_steps("idealized", steps, law, source, "a specification of 10,000 steps, not a measurement")


def pcm() -> PublishedDevice:
    window = Device(g_min=0.0, g_max=25e-6)
    steps = Steps(0.01, 0, 2, 0, 0.2, 0.05, 0, 0.1)
    # the fit's exponent is rate a w with w = 0 .. 2, which is rate (a (2y - 1) + a)
    shape = {
        "amplitude_up": -27.235,
        "amplitude_down": -2.235,
        "rate_up": 2.5,
        "rate_down": 2.5,
        "a": -1,
        "b": -1,
    }
    law = ExponentialStep.model_validate(
        {**steps.law(window=window), **shape, "cycle": 0.6, "sides": "one_sided"}
    )
    return PublishedDevice(
        "pcm", law, window, f"Nandakumar et al., Frontiers in Neuroscience 2020 (GST phase change memory); {AIHWKIT}",
        "Joshi et al., Nature Communications 2020",
        "crystallising pulses only, whose first one, as a flow, is 0.75 of the fit's: pairs saturate unless the spec's `refresh` writes "
        "them anew; the part of the cycle noise that does not scale with the step, from mid-window on several times the other, is not "
        "in it",
    )  # fmt: skip


def _neurosim(name: str, what: str, labels: tuple[float, float], levels: int, r_on: float, on_off: float, cycle: float, valid: str) -> PublishedDevice:  # fmt: skip
    """A column of the table of analog devices in the article on NeuroSim; its LTD labels are written with a minus there."""
    law = NeuroSim(nonlinearity_ltp=labels[0], nonlinearity_ltd=labels[1], levels=levels, cycle=cycle)
    source = f"{what}; labels {labels[0]:g} and -{labels[1]:g}, {levels} levels of Chen, Peng and Yu, IEEE TCAD 2018, Table I"
    window = Device(g_min=1 / (r_on * on_off), g_max=1 / r_on)
    return PublishedDevice(name, law, window, source, "R_on and on/off ratio of the same table", valid)


def ag_asi() -> PublishedDevice:
    what = "Jo et al., Nano Letters 2010 (Ag:a-Si)"
    valid = "97 levels up, taken as 97 down (100 in MLP+NeuroSim V3)"
    return _neurosim("ag-asi", what, (2.4, 4.88), 97, 26e6, 12.5, 0.035, valid)


def alox_hfo2() -> PublishedDevice:
    what = "Woo et al., IEEE Electron Device Letters 2016 (AlOx/HfO2)"
    return _neurosim("alox-hfo2", what, (1.94, 0.61), 40, 16.9e3, 4.43, 0.05, "identical pulses")


def pcmo() -> PublishedDevice:
    what = "Park et al., IEDM 2013 (PCMO)"
    valid = "identical pulses; cycle noise, below 1 %, is taken as 1 %"
    return _neurosim("pcmo", what, (3.68, 6.76), 50, 23e6, 6.84, 0.01, valid)


def taox_tio2() -> PublishedDevice:
    what = "Gao et al., Nanotechnology 2015 (TaOx/TiO2)"
    valid = "identical pulses; cycle noise, below 1 %, is taken as 1 %"
    return _neurosim("taox-tio2", what, (1.85, 1.79), 102, 5e6, 2, 0.01, valid)


def fefet() -> PublishedDevice:
    # both of its labels are positive: steps down are largest at g_min too, which this library writes with a minus
    law = NeuroSim(nonlinearity_ltp=1.75, nonlinearity_ltd=-1.46, levels=32, cycle=0.003)
    return PublishedDevice(
        "fefet", law, Device(g_min=1 / (559.28e3 * 45), g_max=1 / 559.28e3),
        "Jerry et al., IEDM 2017 (FeFET): 32 levels, labels 1.75 and 1.46, alike both ways; cycle noise of 0.3 % as in DNN+NeuroSim V2.1, "
        "whose default device this is (Peng et al., IEEE TCAD 2021)",
        "R_on and on/off ratio of the same article (the ratio is 10 in DNN+NeuroSim)",
        "pulses of growing amplitude, taken as identical ones; the source's noise is that of an update, here that of a pulse",
    )  # fmt: skip


def txsim_ag_si() -> PublishedDevice:
    return PublishedDevice(
        "txsim-ag-si", Agarwal(nu=0.1, gamma=0.05), WINDOW,
        "Roy et al., TxSim, IEEE TVLSI 2021: the largest nu and gamma (in percent) that training bears", "the same (100 kOhm to 1 MOhm)",
        "a limit of training, not a measurement",
    )  # fmt: skip


DEVICES: dict[str, Callable[[], PublishedDevice]] = {
    make().name: make
    for make in (
        ag_asi, alox_hfo2, capacitor, ecram, ecram_mo, fefet, gokmen_vlasov, idealized, pcm, pcmo, reram_array_hfo2,
        reram_array_om, reram_es, reram_sb, taox_tio2, txsim_ag_si,
    )
}  # fmt: skip


def published_device(name: str) -> PublishedDevice:
    """A device of the literature by name, as `gpuxbar devices` lists them.

    `published_device("pcm").spec(refresh={"interval": 40})` is a crossbar of them, otherwise ideal but for what is laid over it.
    Both devices of a pair move in most; a device a weight, as the source may have it, is

        device = published_device("ecram")
        spec = device.spec(update={"sides": "reference", "reference_at": device.reference_at})

    Raises:
        SpecError: The name is unknown.
    """
    if name not in DEVICES:
        raise SpecError(f"published_device: `name` must be a device, got {name!r}; {nearest(name, DEVICES)}")
    return DEVICES[name]()
