"""Pulsed updates against aihwkit: same devices, same inputs and errors, the same distribution of changes.

Runs where aihwkit is installed (`pip install aihwkit`), which the library and its other tests do not need.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp

from gpuxbar import ops
from gpuxbar.nn import AnalogConv2d
from gpuxbar.optim import build_optimizer
from gpuxbar.spec import (
    ConstantStep,
    CrossbarSpec,
    ExponentialStep,
    LinearStep,
    PowerStep,
    PulseTrain,
    SoftBounds,
)
from gpuxbar.spec import presets as spec_presets
from gpuxbar.spec.devices import published_device

pytest.importorskip("aihwkit", reason="aihwkit is not installed")
from aihwkit.inference.noise.reram import ReRamWan2022NoiseModel
from aihwkit.simulator import configs, tiles
from aihwkit.simulator.presets import devices as presets

pytestmark = pytest.mark.aihwkit

REPEATS = 3000
STEP = 0.002  # weight of a pulse; weights span -1 to 1, so a full pair, twice that, is 2
X = np.array([[1.0, -0.6, 0.25, 0.0], [0.5, 0.7, -0.1, 0.3]], np.float32)
D = np.array([[0.2, -0.9, 0.55], [1.0, 0.3, -0.05]], np.float32)
W = np.linspace(-0.6, 0.6, 12, dtype=np.float32).reshape(3, 4)
OURS = {"pulses": 2 / STEP, "sides": "reference", "cycle": 0.3}
THEIRS = {
    "dw_min": STEP, "dw_min_std": 0.3, "dw_min_dtod": 0.0, "up_down_dtod": 0.0, "w_max_dtod": 0.0, "w_min_dtod": 0.0,
    "w_max": 1.0, "w_min": -1.0,
}  # fmt: skip
SLOPES = {"gamma_up": 0.4, "gamma_down": 0.4, "gamma_up_dtod": 0.0, "gamma_down_dtod": 0.0}
DEVICES = {
    "constant step": (ConstantStep(**OURS), configs.ConstantStepDevice(**THEIRS)),
    # their step is the larger one, ours the mean of both
    "asymmetric constant step": (
        ConstantStep(asymmetry=0.25, **(OURS | {"pulses": 2 / (0.8 * STEP)})),
        configs.ConstantStepDevice(up_down=0.4, **THEIRS),
    ),
    "soft bounds": (
        SoftBounds(up=2, down=2, cycle_of="step", **OURS),
        configs.SoftBoundsDevice(**THEIRS, mult_noise=True),
    ),
    "linear step": (
        LinearStep(slope_up=0.4, slope_down=0.4, cycle_of="step", **OURS),
        configs.LinearStepDevice(**THEIRS, **SLOPES, mult_noise=True),
    ),
}
TRAINS = {
    "managed": {},
    "plain": {"update_management": False, "bound_management": False},
    "implicit": {"scheme": "deterministic_implicit", "bound_management": False},
}


def their_step(law):
    """A nominal step of ours in theirs: as many pulses are wanted for that share of a change."""
    return round(2 / law.pulses / STEP, 6)


def their_changes(device, train, rate, samples=2):
    """Weight changes [REPEATS, O, I] of aihwkit's tile after the samples in sequence."""
    implicit = train.scheme == "deterministic_implicit"
    pulse_type = "DETERMINISTIC_IMPLICIT" if implicit else "STOCHASTIC_COMPRESSED"
    slot = 1 / train.length if implicit else 0.0  # theirs are continuous unless told
    update = configs.UpdateParameters(
        desired_bl=train.length, update_management=train.update_management, x_res_implicit=slot, d_res_implicit=slot,
        update_bl_management=train.bound_management, pulse_type=configs.PulseType[pulse_type],
    )  # fmt: skip
    torch.manual_seed(1)
    tile = tiles.AnalogTile(3, 4, configs.SingleRPUConfig(device=device, update=update))
    tile.set_learning_rate(rate)
    x, d, found = torch.from_numpy(X[:samples]), torch.from_numpy(D[:samples]), []
    for _ in range(REPEATS):
        tile.set_weights(torch.from_numpy(W), realistic=False)
        tile.update(x, d)
        found.append(tile.get_weights(realistic=False)[0].numpy() - W)
    return np.array(found)


def our_changes(law, train, rate, w=W):
    """The same of as many arrays side by side."""
    shares = np.tile((w.T + 1) / 2, (REPEATS, 1))
    g = np.stack([1 + shares, np.full_like(shares, 1.5)]) * np.float32(5e-6)  # windows may begin below
    x, d = np.tile(X, REPEATS), np.tile(D, REPEATS)
    w_max = np.full(REPEATS * 3, 2, np.float32)
    rate *= their_step(law)
    pairs = ops.Pairs(g, law=law, g_min=5e-6, g_max=10e-6, seed=3)
    read = ops.pulse_update(pairs, x, d, rate=rate, train=train, w_max=w_max, groups=REPEATS)
    change = read - w
    return np.where(np.abs(change) < 1e-6, 0, change)  # less is rounding of the window, not a pulse


@pytest.mark.parametrize("train", TRAINS)
@pytest.mark.parametrize("device", DEVICES)
def test_changes_have_the_same_distribution(device, train):
    law, theirs = DEVICES[device]
    train = PulseTrain(**TRAINS[train])
    a, b = our_changes(law, train, 0.03), their_changes(theirs, train, 0.03)
    for moment in (lambda v: v, lambda v: (v - v.mean(0)) ** 2):
        first, second = moment(a), moment(b)
        off = first.mean(0) - second.mean(0)
        error = np.sqrt((first.var(0) + second.var(0)) / REPEATS)
        assert (np.abs(off) < 4.5 * error + 1e-9).all(), (off / (error + 1e-9)).round(1)
    for o in range(3):
        for i in range(4):
            assert ks_2samp(a[:, o, i], b[:, o, i]).pvalue > 1e-5, (o, i)


@pytest.mark.parametrize("device", DEVICES)
def test_the_expected_update_is_the_mean_of_their_pulses(device):
    """Of one sample, to second order in a change that moves a device by little of its window."""
    law, theirs = DEVICES[device]
    b = their_changes(theirs, PulseTrain(), 0.03, samples=1)
    change = (-0.03 * their_step(law) * np.outer(D[0], X[0]))[None].astype(np.float32)
    shares = np.ascontiguousarray((W.T + 1) / 2)
    g = np.stack([shares, np.full_like(shares, 0.5)]).astype(np.float32) * np.float32(10e-6)
    quiet = law.model_copy(update={"cycle": 0.0})
    pairs = ops.Pairs(g, law=quiet, g_min=0.0, g_max=10e-6, seed=3)
    read = ops.device_update(pairs, change, w_max=np.full(3, 2, np.float32))
    off = read[0] - W - b.mean(0)
    assert (np.abs(off) < 4.5 * b.std(0) / np.sqrt(REPEATS) + 2e-4).all(), off


SHAPE = {"rate_up": 5, "rate_down": 5, "a": -0.5, "b": -0.5}
ENDS = {"low_spread": 0.1, "high_spread": 0.1}  # of a window of 2
THEIR_ENDS = THEIRS | {"w_max_dtod": 0.2, "w_min_dtod": 0.2}
WITH_ENDS = {  # laws, and the step at weight 0 by which they count pulses
    "constant step": (ConstantStep(**OURS, **ENDS), configs.ConstantStepDevice(**THEIR_ENDS), 1),
    "soft bounds": (SoftBounds(up=2, down=2, **OURS, **ENDS), configs.SoftBoundsDevice(**THEIR_ENDS, mult_noise=True), 1),
    "exponential step": (
        ExponentialStep(amplitude_up=-1.18445, amplitude_down=-0.081404, **SHAPE, **OURS, **ENDS),
        configs.ExpStepDevice(
            A_up=-1.18445, A_down=-0.081404, gamma_up=5, gamma_down=5, a=-0.5, b=-0.5, **THEIR_ENDS
        ),
        1 + 0.081404 * np.exp(2.5),
    ),
    "power step": (
        PowerStep(exponent_up=1.5, exponent_down=1.5, **OURS, **ENDS),
        configs.PowStepDevice(pow_gamma=1.5, pow_gamma_dtod=0.0, **THEIR_ENDS),
        0.5**1.5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("device", WITH_ENDS)
def test_devices_with_windows_of_their_own_have_the_same_distribution(device):
    """Of changes over many devices whose bounds differ, near the middle of the window, by as many pulses."""
    law, theirs, size = WITH_ENDS[device]
    w, train = W / 2, PulseTrain(**TRAINS["implicit"])
    update = configs.UpdateParameters(
        pulse_type=configs.PulseType.DETERMINISTIC_IMPLICIT, desired_bl=31, update_bl_management=False,
        x_res_implicit=1 / 31, d_res_implicit=1 / 31,
    )  # fmt: skip
    torch.manual_seed(1)
    tile = tiles.AnalogTile(3 * REPEATS, 4, configs.SingleRPUConfig(device=theirs, update=update))
    tile.set_learning_rate(0.03)
    tile.set_weights(torch.from_numpy(np.tile(w, (REPEATS, 1))), realistic=False)
    tile.update(torch.from_numpy(X), torch.from_numpy(np.tile(D, REPEATS)))
    b = tile.get_weights(realistic=False)[0].numpy().reshape(REPEATS, 3, 4) - w
    a = our_changes(law, train, 0.03 / size, w)
    for o in range(3):
        for i in range(4):
            assert ks_2samp(a[:, o, i], b[:, o, i], method="asymp").pvalue > 1e-6, (o, i)


PRESETS = {
    "capacitor": "Capacitor", "ecram": "EcRam", "ecram-mo": "EcRamMO", "gokmen-vlasov": "GokmenVlasov",
    "idealized": "Idealized", "pcm": "PCM", "reram-array-hfo2": "ReRamArrayHfO2", "reram-array-om": "ReRamArrayOM",
    "reram-es": "ReRamES", "reram-sb": "ReRamSB",
}  # fmt: skip


FEW = {"pcm": 0.03, "reram-array-hfo2": 0.04, "reram-array-om": 0.02}


SHOW_NOISE = "reram-array-hfo2", "reram-array-om", "reram-es", "reram-sb"


@pytest.mark.parametrize(
    ("name", "by"), [*((name, "changes") for name in PRESETS), *((name, "trains") for name in SHOW_NOISE)]
)
def test_published_devices_are_the_presets(name, by):
    """Weights shown by many devices, from weight 0, after pulses up and as many down: their median and spread."""
    theirs = getattr(presets, PRESETS[name] + "PresetDevice")()
    left_out = {
        "reference_std": 0.0,
        "subtract_symmetry_point": False,
        "lifetime": 0.0,
        "dw_min_std_add": 0.0,
        "dw_min_std_slope": 0.0,
    }
    for key, value in left_out.items():
        if hasattr(theirs, key):
            setattr(theirs, key, value)
    pulse = theirs.dw_min
    if hasattr(theirs, "A_down"):  # what they count pulses by
        pulse *= (1 - max(theirs.up_down, 0)) * (1 - theirs.A_down * np.exp(-theirs.gamma_down * theirs.b))
    one = configs.UpdateParameters(desired_bl=1, update_bl_management=False, update_management=False)
    torch.manual_seed(1)
    tile = tiles.AnalogTile(REPEATS, 1, configs.SingleRPUConfig(device=theirs, update=one))
    tile.set_learning_rate(1.001 * pulse)  # one pulse for an input and an error of 1
    tile.set_weights(torch.zeros(REPEATS, 1), realistic=False)
    low, width = theirs.w_min, theirs.w_max - theirs.w_min
    span = 9e-6
    g_min = span if low else 0.0  # ends of windows may lie below
    device = published_device(name)
    assert device.reference_at == (-low / width if low else None)  # their one-sided devices make pairs
    scale = span / (device.window.g_max - device.window.g_min)
    law = device.law.model_copy(update={"sides": "reference", "write_noise": device.law.write_noise * scale})
    g = np.full((2, 1, REPEATS), g_min - low / width * span, np.float32)
    pairs = ops.Pairs(
        g, law=law, g_min=g_min, g_max=g_min + span, g_held=g.copy() if law.write_noise else None, seed=5
    )
    change = np.full((1, REPEATS, 1), 1 / law.pulses, np.float32)
    count, step = int(np.clip(0.4 * law.pulses, 2, 60)), 0
    for way in (1, -1) if low else (1,):  # their one-sided devices only rise
        for _ in range(count):
            step += 1
            how = {"w_max": np.ones(REPEATS, np.float32), "step": step}
            if by == "changes":
                ops.device_update(pairs, way * change, **how)
            else:
                one_slot = PulseTrain(length=1, update_management=False, bound_management=False)
                x, d = np.ones((1, 1), np.float32), np.full((1, REPEATS), -way, np.float32)
                ops.pulse_update(pairs, x, d, rate=1.001 / law.pulses, train=one_slot, **how)
            tile.update(torch.ones(1, 1), torch.full((1, REPEATS), -float(way)))
        a = (g[0, 0].astype(float) - g_min) / span * width + low
        b = tile.get_weights(realistic=False)[0].numpy()[:, 0]
        found, expected = (np.percentile(x, (16, 50, 84)) for x in (a, b))
        sampling = 5 * 1.6 * (expected[2] - expected[0]) / 2 / np.sqrt(REPEATS)
        # a pulse is a flow here, a jump there, which tells where there are few
        np.testing.assert_allclose(found, expected, rtol=0, atol=sampling + FEW.get(name, 0.003) * width)


BUFFER = {  # which keeps what was not written, in whole pulses; more of them than 1 are drawn there
    "momentum": 0.0, "forget_buffer": False,
    "transfer_update": configs.UpdateParameters(desired_bl=1, update_management=False, update_bl_management=False),
}  # fmt: skip
ALGORITHMS = {  # theirs with its settings, and those of ours
    "tiki-taka": (configs.TransferCompound, {"transfer_update": configs.UpdateParameters()}, {}),
    "tiki-taka-v2": (configs.BufferedTransferCompound, BUFFER, {"max_pulses": 1}),
    "chopped-tiki-taka-v2": (
        configs.ChoppedTransferCompound, BUFFER | {"auto_scale": False, "in_chop_prob": 0.3, "in_chop_random": True},
        {"max_pulses": 1, "flip": 0.3},
    ),
    "agad": (
        configs.DynamicTransferCompound, BUFFER | {"auto_scale": False, "in_chop_prob": 1 / 6},
        {"max_pulses": 1, "period": 6},
    ),
}  # fmt: skip
# as large in every sample, so that both scale the updates of the fast array alike at every step
SAMPLES = 6
XS = np.random.default_rng(1).uniform(-1, 1, (SAMPLES, 4)).astype(np.float32)
XS /= np.abs(XS).max(1, keepdims=True)
DS = np.random.default_rng(2).uniform(-1, 1, (SAMPLES, 3)).astype(np.float32) - 0.4
DS /= np.abs(DS).max(1, keepdims=True)
FAST_RATE, TRANSFER_RATE = 0.03, 0.4  # of the fast array's weights by x d; of the slow one's by what is read


@pytest.mark.parametrize("name", ALGORITHMS)
def test_fast_and_slow_arrays_have_the_same_distribution(name):
    """After a few samples, each followed by the transfer of a line, over arrays side by side and tiles one after another."""
    kind, settings, more = ALGORITHMS[name]
    steps = [(XS[i : i + 1], DS[i : i + 1]) for i in range(SAMPLES)]
    if (
        name == "agad"
    ):  # nothing to accumulate in the period and a sweep in which they write nothing; then across a flip
        nothing = np.zeros((1, 4), np.float32), np.zeros((1, 3), np.float32)
        steps = [nothing] * 4 * 7 + steps * 5
    theirs = their_arrays(kind, settings | {"fast_lr": FAST_RATE, "transfer_lr": TRANSFER_RATE}, steps)
    # of what is read in units of the gradient
    settings = {"lr": TRANSFER_RATE * FAST_RATE, "fast_lr": FAST_RATE / 2, **more}
    assert_same_distribution(our_arrays(name, settings, steps), theirs)


def test_fast_rates_scaled_by_themselves_are_theirs_converted():
    """As the table of examples/README.md does, by errors of any size, with two samples a step."""
    settings = {
        "auto_scale": True, "correct_gradient_magnitudes": True, "in_chop_prob": 0.3, "in_chop_random": True, "fast_lr": 0.5,
        "transfer_lr": TRANSFER_RATE,
    }  # fmt: skip
    size = np.float32([2, 0.5, 0.1])[:, None, None]
    steps = list(zip(XS.reshape(3, 2, 4), size * DS.reshape(3, 2, 3), strict=True))
    theirs = their_arrays(configs.ChoppedTransferCompound, BUFFER | settings, steps)
    fast = 0.5 * 31 * STEP / 2 * 2**0.5
    ours = {"lr": TRANSFER_RATE, "fast_lr": fast, "max_pulses": 1, "flip": 0.3}
    assert_same_distribution(our_arrays("chopped-tiki-taka-v2", ours, steps), theirs)


def their_arrays(kind, settings, steps, repeats=1000):
    """Slow and fast weights [repeats, 2, O, I] of their tiles after steps, each followed by the transfer of a line."""
    device = configs.SoftBoundsDevice(**THEIRS, mult_noise=True)
    compound = kind(
        unit_cell_devices=[device, device], gamma=0.0, scale_transfer_lr=False, transfer_every=float(len(steps[0][0])),
        units_in_mbatch=False, transfer_forward=configs.IOParameters(is_perfect=True), **settings,
    )  # fmt: skip
    torch.manual_seed(1)
    theirs = []
    for _ in range(repeats):
        tile = tiles.AnalogTile(3, 4, configs.UnitCellRPUConfig(device=compound))
        tile.set_learning_rate(1.0)
        tile.set_weights(torch.zeros(3, 4), realistic=False)
        for x, d in steps:
            tile.update(torch.from_numpy(x), torch.from_numpy(d))
        hidden = next(v for k, v in tile.get_hidden_parameters().items() if k.startswith("hidden_weights_0"))
        theirs.append(np.stack([tile.get_weights(realistic=False)[0].numpy(), hidden.numpy()]))
    return np.array(theirs)


def our_arrays(name, settings, steps, repeats=1000):
    """The same of groups of a layer."""
    law = SoftBounds(up=2, down=2, cycle_of="step", **OURS)
    spec = CrossbarSpec(mapping={"scheme": "subtracted", "w_max": 2.0}, update=law, pulses={}, seed=3)
    layer = AnalogConv2d(4 * repeats, 3 * repeats, 1, groups=repeats, bias=False, spec=spec)
    torch.nn.init.zeros_(layer.weight)
    optimiser = build_optimizer(name, layer, lines=1, **settings)
    for operands in steps:
        layer.streams.pairs = [
            tuple(torch.from_numpy(np.tile(part, repeats))[..., None, None] for part in operands)
        ]
        optimiser.step()
    arrays = layer.weight.detach(), optimiser.parts[layer.weight].array.weight
    return np.stack([part.reshape(repeats, 3, 4).numpy() for part in arrays], 1)


def assert_same_distribution(ours, theirs):
    """Of every weight of both arrays, within what the repeats tell."""
    repeats = len(ours)
    ours, theirs = ours.round(5), theirs.round(5)  # less is rounding of the window, not a pulse
    assert np.abs(theirs).mean((0, 2, 3)).min() > STEP / 2
    for moment in (lambda v: v, lambda v: (v - v.mean(0)) ** 2):
        first, second = moment(ours), moment(theirs)
        off = first.mean(0) - second.mean(0)
        error = np.sqrt((first.var(0) + second.var(0)) / repeats)
        assert (np.abs(off) < 4.5 * error + 1e-6).all(), (off / (error + 1e-9)).round(1)
    for array, o, i in np.ndindex(2, 3, 4):
        assert ks_2samp(ours[:, array, o, i], theirs[:, array, o, i]).pvalue > 1e-5, (array, o, i)


def test_the_preset_of_reram_has_aihwkits_deviations():
    """Of its write at 1 s, and of that with what drift adds at 1 and 2 days, at the shares of the preset's table."""
    spec = spec_presets.reram()
    for time, terms in ReRamWan2022NoiseModel(g_max=40.0).coeff_dic.items():
        gained = spec.drift.at(0.0 if time == 1.0 else time)[1]
        found = [
            np.hypot(spec.programming.write_deviation(r), std)
            for r, std in zip(spec.drift.shares, gained, strict=True)
        ]
        np.testing.assert_allclose(
            found, 1e-6 * np.polynomial.polynomial.polyval(spec.drift.shares, terms), rtol=1e-6
        )
