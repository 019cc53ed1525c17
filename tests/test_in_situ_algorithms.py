"""Algorithms of in-situ training: one step against float64, asymmetric devices, checkpoints, errors."""

from __future__ import annotations

import copy
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import gpuxbar as gx
from gpuxbar import reference
from gpuxbar.launch import set_threads
from gpuxbar.nn import AnalogConv2d, AnalogLinear
from gpuxbar.nn.analog_layer import AnalogLayer
from gpuxbar.optim import OPTIMIZERS, build_optimizer
from gpuxbar.reference import Purpose


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Layers of a few hundred weights gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    set_threads(1)
    yield
    torch.set_num_threads(before)
    set_threads(before)


LAW = {"law": "soft_bounds", "up": 1.5, "down": 2.2, "pulses": 200, "spread": 0.1, "cycle": 0.3}
FAST = {"lr": 0.01, "fast_lr": 0.3, "lines": 3}
SETTINGS = {
    "sgd": {"lr": 0.01, "momentum": 0.5},
    "tiki-taka": FAST,
    "tiki-taka-v2": {**FAST, "max_pulses": 4},
    "chopped-tiki-taka-v2": {**FAST, "flip": 0.4},
    "agad": {**FAST, "lines": 5, "period": 2, "transfer_every": 2},
    "mixed-precision": {"lr": 0.01, "momentum": 0.5, "transfer_every": 2},
}
FAST_ARRAYS = [name for name in OPTIMIZERS if "tiki-taka" in name or name == "agad"]


def spec(**parts):
    return gx.CrossbarSpec.model_validate({"mapping": {"scheme": "subtracted"}, "update": LAW, **parts})


class Array:
    """Pairs of devices in float64; of sliced weights with a dumped carry, which comes before an update; with a dumped train, to
    pulse them."""

    def __init__(self, g, w_max, law, seed, carry=None, train=None):
        self.g, self.w_max, self.seed, self.law, self.carry = g.astype(np.float64), w_max, seed, law, carry
        self.lie = {} if carry is None else {"slices": len(g) // 2, "slice_bits": 2}
        self.train = train
        self.step = 1  # beginning to train in situ counts as one update
        self.w = None

    def write(self, change):
        how = self._make_room()
        self.g, _, self.w = reference.device_update(self.g, change, **how)

    def pulse(self, x, d, rate):
        """By inputs [B, G, I] and errors [B, G, O]."""
        how, groups = self._make_room(), x.shape[1]
        lines = x.reshape(len(x), -1), d.reshape(len(x), -1)
        self.g, _, self.w = reference.pulse_update(
            self.g, *lines, rate=rate, train=self.train, groups=groups, **how
        )

    def _make_room(self):
        window = {"g_min": 1e-6, "g_max": 1e-5, "seed": self.seed}
        if self.carry is not None:
            self.g, _ = reference.carry(self.g, rule=self.carry, updates=self.step - 1, **self.lie, **window)
        self.step += 1
        return {
            "law": self.law,
            "w_max": self.w_max,
            "step": self.step - 1,
            "carry": self.carry,
            **self.lie,
            **window,
        }


def recursion(name, slow, fast, grads, settings, sides):
    """Weights of the slow array after every gradient, by the equations, one wordline at a time.

    `grads`: [G, O, I], or inputs [B, G, I] and errors [B, G, O] that make them by pulse trains. `sides`: nominal steps of a device,
    200 to a full weight, that a pulse makes.
    """
    pulsed = isinstance(grads[0], tuple)
    groups, outputs, inputs = (*grads[0][1].shape[1:], grads[0][0].shape[2]) if pulsed else grads[0].shape
    shape = groups, outputs, inputs
    lr, every = settings["lr"], settings.get("transfer_every", 1)
    full = slow.w_max.reshape(groups, -1, 1).astype(np.float64)
    pulse = full * sides / 200
    velocity, chi, waiting, mean, offset = (np.zeros(shape) for _ in range(5))
    sign, scale, reads, transfers, out = np.ones((groups, inputs)), 0.0, 0, 0, []
    for step, grad in enumerate(grads, 1):
        change, written = np.zeros(shape), []
        if not pulsed:
            velocity = settings.get("momentum", 0.0) * velocity + grad
        if name == "sgd":
            change = -lr * velocity
        elif name == "mixed-precision":
            chi -= lr * velocity / pulse
            if step % every == 0:
                change = np.trunc(chi) * pulse
                chi -= np.trunc(chi)
        else:
            if pulsed:
                largest = [np.abs(lines).max(2) for lines in grad]
                top = (largest[0] * largest[1]).mean(0).max() * np.sqrt(len(grad[0]))
            else:
                top = np.abs(grad).max()
            scale = top if step == 1 else 0.99 * scale + 0.01 * top
            unit = settings["fast_lr"] * full / scale
            if pulsed:
                share = unit[..., 0] / unit.max()
                fast.pulse(grad[0] * sign, grad[1] * share, unit.max())
            else:
                fast.write(-grad * sign[:, None] * unit)
            if step % every == 0:
                transfers += 1
                for line in [(reads + k) % inputs for k in range(min(settings["lines"], inputs))]:
                    sweep = reads // inputs
                    reads += 1
                    v = fast.w[..., line] / unit[..., 0]
                    if name == "tiki-taka":
                        change[..., line] = lr * v
                        written.append((np.arange(inputs) == line, -v))
                        continue
                    if name == "agad":
                        now = fast.w[..., line]
                        v = (now - offset[..., line]) / unit[..., 0] * (sweep >= settings["period"])
                        mean[..., line] += min(5 / settings["period"], 1) * (now - mean[..., line])
                    waiting[..., line] += lr * v * sign[:, None, line] / pulse[..., 0]
                    n = np.clip(
                        np.trunc(waiting[..., line]),
                        -settings.get("max_pulses", 31),
                        settings.get("max_pulses", 31),
                    )
                    waiting[..., line] -= n
                    change[..., line] = n * pulse[..., 0]
                    if name == "chopped-tiki-taka-v2":
                        for group in range(groups):
                            u = reference.uniforms(
                                np.array([group * inputs + line]),
                                1,
                                purpose=Purpose.CHOPPER,
                                step=transfers,
                                seed=fast.seed,
                            )
                            sign[group, line] *= -1 if u < settings["flip"] else 1
                    if name == "agad" and (sweep + 1) % settings["period"] == 0:
                        offset[..., line] = mean[..., line]
                        sign[:, line] *= -1
        if pulsed and name == "tiki-taka":
            x, d = (np.array(part) for part in zip(*written, strict=True))
            slow.pulse(np.repeat(x[:, None], groups, 1), d, lr)
        elif step % every == 0 or name == "sgd":
            slow.write(change)
        out.append(slow.w)
    return out, waiting if "v2" in name or name == "agad" else chi


@pytest.mark.parametrize(("sides", "carry", "zeros"), [
    ("both", None, False), ("reference", None, False), ("both", {"scheme": "accumulate", "interval": 3}, False),
    ("both", {"scheme": "periodic", "interval": 1, "headroom_bits": 3}, False),
    ("both", None, True),
], ids=["both", "reference", "accumulate", "periodic", "zeros"])  # fmt: skip
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_the_equations(name, sides, carry, zeros):
    torch.manual_seed(1)
    law, mapping = {**LAW, "sides": sides}, {"scheme": "subtracted", "scale": "column"}
    if carry:
        mapping |= {"slices": 3, "slice_bits": 2}
    if zeros:
        mapping |= {"w_max": 0.7}
    layer = AnalogConv2d(4, 6, (2, 2), groups=2, spec=spec(update=law, mapping=mapping, carry=carry))
    if zeros:
        nn.init.zeros_(layer.weight)
    opt = build_optimizer(name, layer, **SETTINGS[name])
    assert not zeros or (layer.w_max == np.float32(0.7)).all()
    dumped = layer.spec.update.model_dump()
    w_max = layer.w_max.numpy()
    rule = layer.spec.carry and layer.spec.carry.model_dump()
    slow, fast = Array(layer.g_cells.numpy(), w_max, dumped, layer.plan.seed, rule), None
    part = opt.parts.get(layer.weight)
    if hasattr(part, "array"):
        assert part.array.plan.seed != layer.plan.seed
        fast = Array(np.full((2, *layer.g_cells.shape[1:]), 5.5e-6), w_max, dumped, part.array.plan.seed)
    rng = np.random.default_rng(2)
    bias = rng.normal(size=(2, 3, 8))
    grads = [bias + 0.5 * rng.normal(size=(2, 3, 8)) for _ in range(24)]
    steps = (2 if sides == "both" else 1) * (layer.spec.carry.window(2) / 63 if carry else 1)
    expected, waiting = recursion(name, slow, fast, grads, SETTINGS[name], steps)
    moved = 0
    before = layer.weight.detach().clone()
    for step, (grad, want) in enumerate(zip(grads, expected, strict=True), 1):
        layer.weight.grad = torch.from_numpy(grad).float().view_as(layer.weight)
        opt.step()
        if want is not None:
            # a float32 conductance in each of some tens of updates
            off = (layer.weight.detach().view(2, 3, 8).numpy() - want) / w_max.reshape(2, 3, 1)
            assert np.abs(off).max() < 2e-5, f"step {step}"
            moved += not torch.equal(before, layer.weight)
            before = layer.weight.detach().clone()
    assert moved > 5
    if hasattr(part, "waiting") and part.waiting.numel():
        np.testing.assert_allclose(part.waiting.numpy(), waiting, rtol=0, atol=2e-3)


TRAINS = {
    "stochastic": {},
    "plain": {"length": 10, "update_management": False, "bound_management": False},
    "implicit": {"scheme": "deterministic_implicit"},
    "counted": {"mode": "aggregated"},
}


@pytest.mark.parametrize(("train", "sliced"), [
    ("stochastic", False), ("plain", False), ("implicit", True), ("counted", False),
], ids=["stochastic", "plain", "implicit, sliced", "counted"])  # fmt: skip
@pytest.mark.parametrize("name", FAST_ARRAYS)
def test_steps_by_pulse_trains_are_those_of_the_equations(name, train, sliced):
    torch.manual_seed(1)
    law = (
        {"law": "constant_step", "pulses": 200, "step_spread": 0.1, "cycle": 0.3}
        if train == "counted"
        else LAW
    )
    # without update management a group's largest step splits a product, and columns of one range make the same of it
    mapping = {"scheme": "subtracted", "scale": "tensor" if train == "plain" else "column"}
    carry = None
    if sliced:
        mapping |= {"slices": 3, "slice_bits": 2}
        carry = {"scheme": "periodic", "interval": 1, "headroom_bits": 3}
    layer = AnalogConv2d(
        4,
        6,
        (2, 2),
        groups=2,
        bias=False,
        spec=spec(update=law, mapping=mapping, carry=carry, pulses=TRAINS[train]),
    )
    opt = build_optimizer(name, layer, **SETTINGS[name] | {"lr": 0.05, "transfer_every": 1})
    array, w_max, dumped = opt.parts[layer.weight].array, layer.w_max.numpy(), layer.spec.update.model_dump()
    how = {"train": layer.spec.pulses.model_dump()}
    rule = layer.spec.carry and layer.spec.carry.model_dump()
    slow = Array(layer.g_cells.numpy(), w_max, dumped, layer.plan.seed, rule, **how)
    fast = Array(np.full((2, 16, 3), 5.5e-6), w_max, dumped, array.plan.seed, **how)
    rng = np.random.default_rng(2)
    steps = []
    for _ in range(16):
        x = np.maximum(rng.normal(size=(2, 4, 3, 2)), 0).astype(np.float32)
        d = (0.1 * rng.normal(0.5, 1, (2, 6, 2, 1))).astype(np.float32)
        patches = [x[:, :, top : top + 2].reshape(2, 2, 8) for top in (0, 1)]
        errors = d[..., 0].reshape(2, 2, 3, 2).transpose(0, 3, 1, 2).reshape(4, 2, 3)
        steps.append((x, d, np.stack(patches, 1).reshape(4, 2, 8), errors))
    sides = 2 * (layer.spec.carry.window(2) / 63 if carry else 1)
    expected, _ = recursion(
        name,
        slow,
        fast,
        [(x, d) for *_, x, d in steps],
        SETTINGS[name] | {"lr": 0.05, "transfer_every": 1},
        sides,
    )
    moved, before = 0, layer.weight.detach().clone()
    for step, ((x, d, *_), want) in enumerate(zip(steps, expected, strict=True), 1):
        layer.streams.pairs = [(torch.from_numpy(x), torch.from_numpy(d))]
        opt.step()
        off = (layer.weight.detach().view(2, 3, 8).numpy() - want) / w_max.reshape(2, 3, 1)
        assert np.abs(off).max() < 2e-5, f"step {step}"
        moved += not torch.equal(before, layer.weight)
        before = layer.weight.detach().clone()
    assert moved > 5
    np.testing.assert_allclose(array.weight.view(2, 3, 8).numpy(), fast.w, rtol=0, atol=2e-5 * w_max.max())
    assert np.abs(fast.w).max() > 0.05 * w_max.max()


def distance(name, pulses=None, **settings):
    """Error left after learning a noisy linear map on devices that are symmetric far from a weight of 0."""
    law = {
        "law": "soft_bounds",
        "up": 1.6,
        "down": 2.4,
        "sides": "reference",
        "pulses": 500,
        "spread": 0.1,
        "cycle": 0.3,
    }
    torch.manual_seed(0)
    goal = 0.3 * torch.randn(8, 12)
    layer = AnalogLinear(12, 8, bias=False, spec=spec(update=law, pulses=pulses))
    opt = build_optimizer(name, layer, **settings)
    draw = torch.Generator().manual_seed(1)
    errors = []
    for step in range(500):
        x = torch.randn(4, 12, generator=draw)
        t = x @ goal.T + 0.5 * torch.randn(4, 8, generator=draw)
        opt.zero_grad()
        (0.5 * (layer(x) - t).square().sum(1).mean()).backward()
        opt.step()
        if step >= 350:
            errors.append(((layer.weight - goal).square().sum() / goal.square().sum()).sqrt().item())
    return sum(errors) / len(errors)


@pytest.mark.parametrize(("pulses", "chopped", "bounds"), [
    (None, {"fast_lr": 0.3}, (0.4, 0.35)), ({}, {"fast_lr": 0.3}, (0.5, 0.45)),
], ids=["changes", "pulses"])  # fmt: skip
def test_asymmetric_devices_defeat_sgd_and_not_tiki_taka(pulses, chopped, bounds):
    """Every write pulls a device to its symmetry point: SGD settles between it and the solution at any rate."""
    sgd = [distance("sgd", pulses, lr=lr) for lr in (0.003, 0.01)]
    others = {
        "tiki-taka-v2": distance("tiki-taka-v2", pulses, lr=0.003, zero_shift=20),
        "chopped-tiki-taka-v2": distance("chopped-tiki-taka-v2", pulses, lr=0.003, **chopped),
        "agad": distance("agad", pulses, lr=0.003, fast_lr=0.3),
    }
    assert min(sgd) > bounds[0]
    assert max(others.values()) < bounds[1]


NOISY = {
    "tile": {"rows": 16, "cols": 16},
    "dac": {"bits": 8},
    "adc": {"bits": 9, "range": "worst_case", "offset_std": 1e-8},
    "read_noise": {"sigma": 1e-8, "sigma_g": 1e-8},
    "programming": {"write_noise": 1e-8, "stuck_at_g_min": 0.01},
    "parasitics": {"r_wordline": 1.0, "r_bitline": 1.0},
}


SLICED = {
    **NOISY, "mapping": {"slices": 3, "slice_bits": 2}, "carry": {"interval": 2}, "endurance": {"pulses": 500},
    "retention": {"tau": 500.0},
}  # fmt: skip
PULSED_SLICES = {**SLICED, "carry": {"scheme": "periodic", "interval": 2, "headroom_bits": 3}, "pulses": {}}


def build(name, seed=0, parts=NOISY, **settings):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    model, _ = gx.convert(model, spec(**parts))
    return model, build_optimizer(name, model, **{**SETTINGS[name], "lr": 0.02, "momentum": 0.5, **settings})


def advance(model, opt, steps, first=0):
    for step in range(first, first + steps):
        draw = torch.Generator().manual_seed(step)
        x, t = torch.randn(16, 1, 8, 8, generator=draw), torch.randint(10, (16,), generator=draw)
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), t).backward()
        opt.step()


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        *((name, NOISY) for name in OPTIMIZERS), ("agad", SLICED), ("mixed-precision", SLICED), ("tiki-taka", PULSED_SLICES),
        *((name, {**NOISY, "pulses": {}}) for name in FAST_ARRAYS),
    ],
    ids=[*OPTIMIZERS, "agad-sliced", "mixed-precision-sliced", "tiki-taka-pulsed-slices", *(f"{name}-pulsed" for name in FAST_ARRAYS)],
)  # fmt: skip
def test_a_resumed_run_continues_bit_for_bit(name, parts):
    model, opt = build(name, parts=parts)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 2, 0.5)
    advance(model, opt, 4)
    scheduler.step()
    file = io.BytesIO()
    torch.save([model.state_dict(), opt.state_dict(), scheduler.state_dict()], file)
    advance(model, opt, 5, first=4)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, opt2 = build(
        name, seed=3, parts=parts
    )  # other weights, other ranges: all of it comes from the checkpoint
    again.load_state_dict(saved[0])
    opt2.load_state_dict(saved[1])
    torch.optim.lr_scheduler.StepLR(opt2, 2, 0.5).load_state_dict(saved[2])
    advance(again, opt2, 5, first=4)
    for a, b in ((model.state_dict(), again.state_dict()), (opt.state_dict(), opt2.state_dict())):
        assert_same(a, b)


def test_compiled_steps_are_those_of_python():
    x, t = torch.randn(16, 1, 8, 8), torch.randint(10, (16,))
    states = []
    for compiled in (False, True):
        model, opt = build("sgd")

        def step(model=model, opt=opt):
            opt.zero_grad()
            nn.functional.cross_entropy(model(x), t).backward()
            opt.step()

        run = torch.compile(step, backend="aot_eager") if compiled else step
        for _ in range(3):
            run()
        states.append([model.state_dict(), opt.state_dict()])
    assert_same(*states)


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        for left, right in zip(a, b, strict=True):
            assert_same(left, right)
    else:
        assert a == b


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_may_be_accumulated_and_scaled(name):
    """Two half batches, scaled by a power of two, are the whole one: same noise, same writes."""
    results = []
    for halves in (False, True):
        model, opt = build(name)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=halves)
        grads = [torch.randn(p.shape, generator=torch.Generator().manual_seed(7)) for p in model.parameters()]
        for _ in range(3):
            opt.zero_grad()
            for part in (grads,) if not halves else (grads, grads):
                weight = 0.5 if halves else 1.0
                loss = sum((p * g).sum() for p, g in zip(model.parameters(), part, strict=True)) * weight
                scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
        results.append(model.state_dict())
    assert_same(*results)


@pytest.mark.parametrize("name", FAST_ARRAYS)
def test_samples_may_be_accumulated_and_scaled_by_pulse_trains(name):
    """In two parts, of a loss scaled by a power of two, they make the pulses of the whole batch; an overflow leaves a step out."""
    results = []
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    for parts in (1, 2):
        torch.manual_seed(0)
        layers = nn.Linear(5, 4, bias=False), nn.Linear(4, 3, bias=False)
        model, _ = gx.convert(nn.Sequential(*layers), spec(pulses={}))
        opt = build_optimizer(name, model, **SETTINGS[name] | {"lr": 0.1, "transfer_every": 1})
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=parts > 1)
        for _ in range(6):
            opt.zero_grad()
            scaler.scale(model(x).square().sum()).backward()
            for layer in model:
                assert layer.weight.grad is None
                ((inputs, errors),) = layer.streams.pairs
                layer.streams.pairs = list(zip(inputs.chunk(parts), errors.chunk(parts), strict=True))
            scaler.step(opt)
            scaler.update()
        results.append(copy.deepcopy([model.state_dict(), opt.state_dict()["parts"]]))
    assert_same(*results)
    scaler.scale(model(x).sum()).backward()
    model[0].streams.pairs[0][1][2, 1] = torch.inf  # as on a GPU, which does not look at each error
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == 2.0**7
    assert model[0].streams.pairs == []
    assert_same(opt.state_dict()["parts"], results[1][1])


def test_errors_of_any_scale_move_a_fast_array_alike():
    """By a power of two, to the bit."""
    arrays = []
    for scale in (1.0, 2.0**-80):
        torch.manual_seed(0)
        layer = AnalogLinear(5, 3, spec=spec(pulses={}))
        opt = build_optimizer("tiki-taka", layer, lr=0.1)
        layer.streams.pairs = [(torch.randn(4, 5), scale * torch.randn(4, 3))]
        opt.step()
        arrays.append(opt.parts[layer.weight].array.g_cells)
    assert torch.equal(*arrays)
    assert arrays[0].unique().numel() > 10


def test_one_transfer_by_trains_is_that_of_the_rate_in_the_mean():
    """Over draws of the trains, of what a fast array holds, on one of its lines."""
    changes, values = [], torch.linspace(-0.4, 0.4, 6).view(3, 2)
    law = {"law": "constant_step", "pulses": 400}
    for seed in range(150):
        torch.manual_seed(0)
        layer = AnalogLinear(2, 3, spec=spec(update=law, pulses={}, seed=seed))
        opt = build_optimizer("tiki-taka", layer, lr=0.05, lines=1, fast_lr=0.5)
        part, before = opt.parts[layer.weight], layer.weight.detach().clone()
        part.array.update_cells(values * layer.w_max[0])
        part.scale += 1.0
        held = (
            part.array.weight.detach() / (0.5 * layer.w_max[0]) * 0.99
        )  # which an error of 0 leaves, but for the scale's mean
        layer.streams.pairs = [(torch.ones(1, 2), torch.zeros(1, 3))]
        opt.step()
        changes.append(layer.weight.detach() - before)
    changes = torch.stack(changes)
    assert (changes[..., 1] == 0).all()
    error = (changes.mean(0) - 0.05 * held)[:, 0] / (changes.std(0)[:, 0] / 150**0.5)
    assert error.abs().max() < 4
    assert (changes.std(0)[:, 0] > 0).all()


@pytest.mark.parametrize("kind", ["lstm", "attention", "transposed", "sizes"])
def test_a_fast_array_takes_all_samples_of_a_step(kind):
    """Its scale is of the mean of their largest products, whatever reads the layer, and however often."""
    model, x = {
        "lstm": lambda: (nn.LSTM(4, 3), torch.randn(5, 2, 4)),
        "attention": lambda: (nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0), torch.randn(5, 2, 4)),
        "transposed": lambda: (nn.Sequential(nn.ConvTranspose2d(2, 3, 2)), torch.randn(2, 2, 4, 4)),
        "sizes": lambda: (nn.Sequential(nn.Conv2d(2, 3, 3)), torch.randn(2, 2, 5, 5)),
    }[kind]()
    model, _ = gx.convert(model, spec(pulses={}))
    opt = build_optimizer("agad", model, lr=0.1, fast_lr=0.3)
    for part in (x, x[..., :4]) if kind == "sizes" else (x,):
        y = model(part)
        (y[0] if kind == "lstm" else y).square().sum().backward()
    layers = [layer for layer in model.modules() if isinstance(layer, AnalogLayer)]
    found = {}
    for layer in layers:
        lines = [layer.as_lines(x, d) for x, d in layer.streams.pairs]
        tops = torch.cat([x.abs().amax(1) * d.abs().amax(1) for x, d in lines])
        found[layer] = tops.mean() * len(tops) ** 0.5
    opt.step()
    assert len(layers) == {"lstm": 2, "attention": 6}.get(kind, 1)
    for layer in layers:
        part = opt.parts[layer.weight]
        torch.testing.assert_close(part.scale[0], found[layer])
        assert (part.array.weight != 0).float().mean() > 0.2


@pytest.mark.parametrize("order", ["channel_position", "position_channel"])
def test_a_fast_array_is_pulsed_by_images_as_by_their_patches(order, monkeypatch):
    """To the bit, signs of lines included, and without unfolding them."""
    torch.manual_seed(0)
    mapping = {"scheme": "subtracted", "line_order": order}
    geometry = {"stride": (2, 1), "padding": (2, 3), "dilation": (1, 2), "groups": 2}
    made = spec(mapping=mapping, pulses={"update_management": False})
    layers = [AnalogConv2d(4, 6, (2, 3), bias=False, spec=made, **geometry) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    opts = [build_optimizer("agad", layer, lr=0.05, period=1, fast_lr=0.3, lines=5) for layer in layers]
    for _ in range(6):
        x, d = torch.randn(3, 4, 7, 5), torch.randn(3, 6, 5, 7)
        layers[0].streams.pairs, layers[1].streams.pairs = [(x, d)], [layers[0].as_lines(x, d)]
        with monkeypatch.context() as patched:
            patched.setattr("torch.nn.functional.unfold", None)
            for opt in opts:
                opt.step()
    parts = [opt.parts[layer.weight] for opt, layer in zip(opts, layers, strict=True)]
    assert parts[0].sign.unique().tolist() == [-1, 1]
    torch.testing.assert_close(parts[0].scale, parts[1].scale, rtol=1e-6, atol=0)
    assert torch.equal(parts[0].array.weight, parts[1].array.weight)
    assert parts[0].array.weight.std() > 0.02 * layers[0].w_max.max()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_digits_are_learnt(name, learn):
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10)
    )
    model, _ = gx.convert(model, spec(**NOISY | {"parasitics": {}, "update": {**LAW, "pulses": 1000}}))
    settings = {
        "sgd": {"lr": 0.05},
        "mixed-precision": {"lr": 0.05},
        "tiki-taka": {"lr": 0.01},
        "tiki-taka-v2": {"lr": 0.01},
        "chopped-tiki-taka-v2": {"lr": 0.01, "fast_lr": 0.3, "lines": 128},
        "agad": {"lr": 0.05},
    }[name]
    optimiser = build_optimizer(name, model, momentum=0.9, **settings)
    assert learn(model, optimiser, epochs=3, batch=20)[-1] > 0.85


def test_transfer_reads_go_through_the_converters_noise_and_wires():
    """An ADC of few bits shows as few values; a DAC's error, noise and wires as what they do to a line."""
    found = {}
    for key, parts in {
        "exact": {},
        "adc": {"adc": {"bits": 4}},
        "dac": {"dac": {"bits": 6, "gain_std": 0.1}},
        "noise": {"read_noise": {"sigma": 1e-8}},
        "wires": {"parasitics": {"r_wordline": 2000.0, "r_bitline": 10.0}},
    }.items():
        torch.manual_seed(0)
        layer = AnalogLinear(20, 30, spec=spec(**parts))
        opt = build_optimizer("tiki-taka", layer, lr=0.1)
        array = opt.parts[layer.weight].array
        array.update_cells(torch.linspace(-1, 1, 600).view(30, 20))
        found[key] = [array.read_lines(torch.tensor([3, 11]))[0] for _ in range(2)], array.weight.detach()
    (exact, _), weight = found["exact"]
    torch.testing.assert_close(exact, weight[:, [3, 11]], rtol=0, atol=1e-6)
    # its largest code, 7, is the current of one cell at g_max, 10 uS of a window of 9
    step = 10 / 9 / 7 * layer.w_max[0]
    codes = found["adc"][0][0] / step
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    assert codes.round().unique().diff().min() == 1
    assert (found["adc"][0][0] - exact).abs().max() < 1.01 * step / 2
    gain = found["dac"][0][0] / exact
    torch.testing.assert_close(gain, gain[:1].expand_as(gain), rtol=0, atol=1e-3)  # of a line
    assert 0.01 < (gain[0] - 1).abs().min() < (gain[0] - 1).abs().max() < 0.4
    assert not torch.equal(*found["noise"][0])
    # one of 30 columns' wires and more of its line lie before the last cell than before the first
    loss = 1 - found["wires"][0][0] / exact
    assert loss[-1].min() > loss[0].max() > 0.0


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_digital_parameters_are_trained_as_by_torchs_sgd(momentum):
    ours, theirs = (nn.Parameter(torch.ones(3)) for _ in range(2))
    layer = AnalogLinear(4, 3, spec=spec())
    for parameters, kind in (([ours, layer.weight], gx.optim.InSituSGD), ([theirs], torch.optim.SGD)):
        parameter, optimiser = parameters[0], kind(parameters, lr=0.1, momentum=momentum)
        for step in range(3):
            optimiser.zero_grad()
            (parameter.square().sum() * (step + 1)).backward()
            optimiser.step()
    torch.testing.assert_close(ours, theirs)


def test_full_weights_of_a_fast_array_are_those_of_its_layer():
    layer = AnalogLinear(4, 3, spec=spec(mapping={"scheme": "subtracted", "scale": "column"}))
    optimiser = build_optimizer("tiki-taka", layer, lr=0.1)
    w_max = optimiser.parts[layer.weight].array.w_max
    assert len(w_max.unique()) == 3
    assert torch.equal(w_max, layer.w_max)


def test_zero_shift_finds_the_symmetry_point():
    """Where up = down in step: at up / (up + down) of the window, on the device that takes the changes."""
    law = {"law": "soft_bounds", "up": 1.0, "down": 3.0, "sides": "reference", "pulses": 200}
    layer = AnalogLinear(4, 3, spec=spec(update=law))
    opt = build_optimizer("tiki-taka", layer, lr=0.1, zero_shift=60)
    array = opt.parts[layer.weight].array
    share = (array.g_cells[0] - 1e-6) / 9e-6
    torch.testing.assert_close(share, torch.full_like(share, 0.25), rtol=0, atol=0.01)
    assert array.read_lines(torch.arange(4)).abs().max() < 1e-6 * layer.w_max[0]


@pytest.mark.parametrize(
    ("period", "lines", "every", "idle"), [(2, 3, 1, 4), (2, 7, 1, 2), (3, 2, 2, 20), (10, 32, 1, 10)]
)
def test_agad_writes_nothing_in_the_first_period_of_a_layer(period, lines, every, idle):
    """period * 7 wordlines / lines transfers, rounded down; a layer with fewer lines than are read is read whole."""
    layer = AnalogLinear(7, 4, spec=spec())
    optimiser = build_optimizer("agad", layer, lr=50.0, period=period, lines=lines, transfer_every=every)
    before, written = layer.weight.detach().clone(), []
    for _ in range(idle + every):
        layer.weight.grad = torch.ones_like(layer.weight)
        optimiser.step()
        written.append(not torch.equal(layer.weight, before))
    assert written == [False] * (idle + every - 1) + [True]


def test_agad_learns_less_in_periods_of_few_steps():
    """In which its fast array gathers little of what it remembers."""
    short, long = (distance("agad", {}, lr=0.003, fast_lr=0.3, lines=12, period=period) for period in (2, 40))
    assert short > 1.4 * long


def test_errors():
    layer = AnalogLinear(4, 3, spec=spec())
    for name, setting, text in (
        ("agad", {"period": 0}, "AGAD: `period` must be a whole number of at least 1, got 0; try 1"),
        (
            "tiki-taka",
            {"fast_lr": 1.5},
            "TikiTaka: `fast_lr` must be above 0 and at most 1, got 1.5; try 0.1",
        ),
        (
            "chopped-tiki-taka-v2",
            {"flip": 0.6},
            "ChoppedTikiTakaV2: `flip` must be 0 to 0.5, got 0.6; try 0.02",
        ),
        (
            "tiki-taka-v2",
            {"max_pulses": 0},
            "TikiTakaV2: `max_pulses` must be a whole number of at least 1, got 0",
        ),
        (
            "mixed-precision",
            {"transfer_every": 0},
            "MixedPrecision: `transfer_every` must be a whole number of at least 1, got 0",
        ),
        ("sgd", {"momentum": 1.0}, "InSituSGD: `momentum` must be at least 0 and below 1, got 1.0; try 0.9"),
        ("agad", {"lr": 0.0}, "AGAD: `lr` must be above 0, got 0.0; try 0.05"),
    ):
        with pytest.raises(ValueError, match=text):
            build_optimizer(name, layer, **{"lr": 0.1, **setting})
    with pytest.raises(ValueError, match="`name` must be an algorithm, got 'agd'; did you mean"):
        build_optimizer("agd", layer, lr=0.1)
    with pytest.raises(
        ValueError, match=r"AGAD: `params` must hold the weight of a crossbar layer, got none; pass"
    ):
        build_optimizer("agad", nn.Linear(3, 2), lr=0.1)
    with pytest.raises(
        ValueError, match=r"InSituSGD: `params` must hold the weight of a crossbar layer, got none; pass"
    ):
        gx.optim.InSituSGD(nn.Linear(3, 2).parameters(), lr=0.1)
    computed = parametrizations.weight_norm(AnalogLinear(4, 3, spec=spec()))  # that nothing has read yet
    with pytest.raises(ValueError, match=r"got none; .*\(undo weight_norm by remove_parametrizations"):
        gx.optim.InSituSGD(computed.parameters(), lr=0.1)
    sliced = AnalogLinear(4, 3, spec=gx.CrossbarSpec(mapping={"slices": 2, "slice_bits": 2}))
    with pytest.raises(
        ValueError, match=r"linear: `spec.update` must be an update law to train in situ, got None"
    ):
        build_optimizer("agad", sliced, lr=0.1)
    pulsed = AnalogLinear(4, 3, spec=spec(pulses={}))
    with pytest.raises(
        ValueError,
        match=r"MixedPrecision: `spec\.pulses` must be None, got a pulse train for linear: this algorithm writes gradients, .*; set pulses=None",
    ):
        build_optimizer("mixed-precision", pulsed, lr=0.1)
    streamed = AnalogLinear(
        4, 3, spec=spec(mapping={"slices": 2, "slice_bits": 2}, carry={"scheme": "streamed"})
    )
    with pytest.raises(
        ValueError, match=r"AGAD: `spec\.carry\.scheme` must be accumulate or periodic, got 'streamed'"
    ):
        build_optimizer("agad", streamed, lr=0.1)
    for wrong in (None, layer.state_dict()):
        with pytest.raises(
            ValueError,
            match=r"InSituSGD: `state_dict` must be what .* got .* without param_groups; pass that, not",
        ):
            build_optimizer("sgd", AnalogLinear(4, 3, spec=spec()), lr=0.1).load_state_dict(wrong)
    saved = build_optimizer("agad", copy.deepcopy(layer), lr=0.1).state_dict()
    with pytest.raises(
        ValueError, match=r"`state_dict` must be of the same algorithm and layers, got .* \[0\] where \[\]"
    ):
        build_optimizer("sgd", AnalogLinear(4, 3, spec=spec()), lr=0.1).load_state_dict(saved)
    saved = build_optimizer("tiki-taka-v2", copy.deepcopy(layer), lr=0.1).state_dict()
    with pytest.raises(ValueError, match=r"ChoppedTikiTakaV2: `state_dict` must be .* got one without flip"):
        build_optimizer("chopped-tiki-taka-v2", copy.deepcopy(layer), lr=0.1).load_state_dict(saved)
    for other, setting in (("agad", "period"), ("chopped-tiki-taka-v2", "flip")):
        saved = build_optimizer(other, copy.deepcopy(layer), lr=0.1).state_dict()
        plain = build_optimizer("tiki-taka-v2", copy.deepcopy(layer), lr=0.1)
        before = copy.deepcopy(plain.state_dict())
        with pytest.raises(
            ValueError,
            match=rf"TikiTakaV2: `state_dict` must be of the same algorithm, got one with {setting}; build",
        ):
            plain.load_state_dict(saved)
        assert_same(plain.state_dict(), before)


class Sign(gx.optim.InSituOptimizer):
    """An algorithm of one's own, without rules or settings beside those of all."""

    def _write(self, layer, weight, group):
        layer.change_cells(weight.grad.sign(), -group["lr"])


class Kept(Sign):
    """The same after `wait` steps, which are counted beside the layer."""

    rules = Sign.rules | {"wait": gx.optim.Rule("at least 0", lambda value: value >= 0, "2")}

    def __init__(self, params, lr, wait):
        super().__init__(params, lr, wait=wait)

    def _begin(self, layer, group):
        steps = nn.Module()
        steps.register_buffer("taken", torch.zeros(1))
        return steps

    def _write(self, layer, weight, group):
        if self.parts[weight].taken >= group["wait"]:
            super()._write(layer, weight, group)
        self.parts[weight].taken += 1


def test_algorithms_of_ones_own_write_through_the_law_and_resume():
    def step(model, optimiser):
        optimiser.zero_grad()
        model(torch.ones(1, 6)).sum().backward()
        optimiser.step()

    ideal = spec(update={"law": "ideal"})
    model, _ = gx.convert(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)), ideal, {"1": None})
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimiser = Sign(model.parameters(), 0.01)
    step(model, optimiser)
    sign = before[2].sum(0).sign()[:, None].expand(4, 6)
    torch.testing.assert_close(model[0].weight.detach(), before[0] - 0.01 * sign, atol=1e-6, rtol=0)
    torch.testing.assert_close(model[1].bias.detach(), before[3] - 0.01)
    waiting = Kept(model.parameters(), 0.01, wait=2)
    step(model, waiting)
    other = Kept(model.parameters(), 0.01, wait=2)
    other.load_state_dict(waiting.state_dict())
    held = model[0].weight.detach().clone()
    step(model, other)
    assert torch.equal(model[0].weight, held)
    step(model, other)
    assert not torch.equal(model[0].weight, held)
    with pytest.raises(ValueError, match="Kept: `wait` must be at least 0, got -1; try 2"):
        Kept(model.parameters(), 0.01, wait=-1)
    with pytest.raises(ValueError, match=r"Sign: `momentum` must be at least 0 and below 1, got 2; try 0\.9"):
        Sign(model.parameters(), 0.01, momentum=2)
    with pytest.raises(TypeError, match=r"Sign: settings must be of lr, momentum, got wait; leave that out"):
        Sign(model.parameters(), 0.01, wait=2)


class Pulsed(gx.optim.InSituOptimizer):
    """By pulse trains."""

    in_array = ("pulses",)

    def _write(self, layer, weight, group):
        layer.update_in_array(*layer.take_operands(), group["lr"])


@pytest.mark.parametrize("algorithm", [Sign, Pulsed])
def test_algorithms_of_ones_own_are_given_no_products_that_they_do_not_make(algorithm):
    """Such layers have no gradient, at which `_write` would fail."""
    slices = {"mapping": {"slices": 2, "slice_bits": 2}, "carry": {"scheme": "streamed"}}
    streamed = AnalogLinear(4, 3, spec=spec(**slices))
    with pytest.raises(ValueError, match=rf"{algorithm.__name__}: `spec\.carry\.scheme` must be accumulate"):
        algorithm(streamed.parameters(), 0.1)
    pulsed = AnalogLinear(4, 3, spec=spec(pulses={}))
    if algorithm is Pulsed:
        algorithm(pulsed.parameters(), 0.1)
        return
    with pytest.raises(ValueError, match=r"Sign: `spec\.pulses` must be None, got a pulse train for linear"):
        algorithm(pulsed.parameters(), 0.1)
    assert not pulsed.in_situ


@pytest.mark.parametrize("names", ["pulses", ("pulse",)])
def test_products_that_an_algorithm_makes_are_named_in_a_tuple(names):
    text = f'Own: `in_array` must hold names of "pulses" and "streamed", got {names!r}; write ("pulses",)'
    with pytest.raises(TypeError, match=re.escape(text)):
        type("Own", (gx.optim.InSituOptimizer,), {"in_array": names})


def test_operands_of_a_scaled_loss_are_those_of_the_loss():
    """For any algorithm, to the bit, though the scale is no power of four, of which roots would be exact."""
    cells = []
    for scale in (1.0, 2.0**9):
        torch.manual_seed(0)
        layer = AnalogLinear(6, 4, spec=spec(pulses={}))
        optimiser = Pulsed(layer.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale((layer(torch.randn(5, 6)) * torch.randn(5, 4)).sum()).backward()
        scaler.step(optimiser)
        cells.append(layer.g_cells)
    assert torch.equal(*cells)
    assert cells[0].unique().numel() > 10


def test_the_table_of_algorithms_names_all_with_what_they_keep():
    text = (Path(__file__).parent.parent / "examples" / "README.md").read_text()
    lines = text.partition("## Algorithms in situ")[2].partition("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| `")]
    assert sorted(row[0].strip("`") for row in rows) == sorted(OPTIMIZERS)
    named = {"lr", "momentum"}
    for name, _, memory, settings, _ in rows:
        layer = AnalogLinear(256, 256, bias=False, spec=spec())
        optimiser = gx.optim.build_optimizer(name.strip("`"), layer, lr=0.1)
        kept = [t for part in optimiser.parts.values() for t in (*part.parameters(), *part.buffers())]
        assert sum(t.nbytes for t in kept) / 256**2 == pytest.approx(int(memory), abs=0.1)
        named |= {word.strip("`") for word in settings.replace(",", "").split() if word != "and"}
        assert optimiser.rules.keys() <= named
