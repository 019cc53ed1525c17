"""A captured training step without a GPU: it is taped on the CPU (tape.py) and played again."""

from __future__ import annotations

import sys

import pytest
import torch
from tape import Refused, gpu_path, taped
from torch import nn
from torch.nn import functional

import gpuxbar as gx
from gpuxbar.bench import OracleMismatch
from gpuxbar.bench.gpu import steps
from gpuxbar.nn.analog_layer import AnalogLayer
from gpuxbar.ops import tile_mvm_plan

capture = sys.modules["gpuxbar.optim.capture"]
AGARWAL = {"law": "agarwal", "nu": 1.0, "gamma": 0.01, "cycle": 0.01}
BASE = {
    "tile": {"rows": 8, "cols": 8}, "dac": {"bits": 8}, "adc": {"bits": 8}, "read_noise": {"sigma": 1e-7},
    "programming": {"write_noise": 1e-7},
}  # fmt: skip
SETTINGS = {
    "digital": BASE,
    "half-precision": {**BASE, "precision": "fp16x2", "mapping": {"scheme": "subtracted"}, "read_noise": {"sigma": 1e-7, "sigma_g": 1e-7}},
    "kept": {**BASE, "precision": "fp16x2", "keep_packed": True},
    "kept in-situ": {**BASE, "precision": "fp16x2", "keep_packed": True, "update": AGARWAL},
    "learned": {**BASE, "dac": {"bits": 8, "range": "learned"}},
    "drivers": {**BASE, "dac": {"bits": 8, "stream_bits": 2, "gain_std": 0.1, "offset_std": 0.01}, "device": {"v_sinh": 0.1}},
    "offset": {**BASE, "mapping": {"scheme": "offset"}},
    "wires": {**BASE, "parasitics": {"r_wordline": 1.0, "r_bitline": 1.0, "method": "ladder"}},
    "anchored wires": {**BASE, "parasitics": {"r_wordline": 1.0, "r_bitline": 1.0, "anchor": "ladder", "refresh_interval": 3}},
    "wires' gradient": {**BASE, "parasitics": {"r_wordline": 1.0, "r_bitline": 1.0, "gradient": "exact"}},
    "in-situ": {**BASE, "update": AGARWAL},
    "in-situ forgetting": {**BASE, "update": AGARWAL, "retention": {"tau": 20.0, "spread": 0.3}, "endurance": {"pulses": 30.0}},
    "in-situ held": {**BASE, "update": {"law": "soft_bounds", "cycle": 0.1, "write_noise": 1e-7}},
    "slices": {**BASE, "update": AGARWAL, "mapping": {"slices": 3, "slice_bits": 2}, "carry": {"interval": 2}},
    "pulses": {**BASE, "update": {"law": "soft_bounds", "cycle": 0.1}, "pulses": {}},
    "sliced pulses": {
        **BASE, "update": {"law": "soft_bounds", "cycle": 0.1}, "pulses": {}, "mapping": {"slices": 3, "slice_bits": 2},
        "carry": {"scheme": "periodic", "interval": 1},
    },
    "streamed": {
        **BASE, "update": {"law": "soft_bounds", "write_noise": 1e-7}, "mapping": {"slices": 3, "slice_bits": 2},
        "carry": {"scheme": "streamed", "interval": 2},
    },
}  # fmt: skip
FAST = {"fast_lr": 0.5, "lines": 7}  # so that lines come round within a few steps
ALGORITHMS = {
    "mixed-precision": {}, "tiki-taka": FAST, "tiki-taka-v2": FAST, "agad": {**FAST, "period": 1}, "chopped-tiki-taka-v2": {**FAST, "flip": 0.4},
}  # fmt: skip
SETTINGS |= {name: {**BASE, "update": AGARWAL} for name in ALGORITHMS}
BY_PULSES = {f"{name} by pulses": name for name in ("tiki-taka", "agad")}
SETTINGS |= dict.fromkeys(BY_PULSES, SETTINGS["pulses"])


class Run:
    """A small converted network with its optimiser and batch."""

    def __init__(self, kind, lr=0.05, layer=None, device="cpu", solved=True):
        torch.manual_seed(0)
        self.batch = torch.randn(3, 2, 4, 4).to(device), torch.randint(5, (3,)).to(device)
        model = nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), layer or nn.ReLU(), nn.Flatten(), nn.Linear(12, 5)
        )
        self.model, _ = gx.convert(model, gx.CrossbarSpec.model_validate(SETTINGS[kind]))
        self.model.to(device)
        name = BY_PULSES.get(kind, kind)
        if name in ALGORITHMS:
            more = {"lr": 10 * lr, "momentum": 0.9, **ALGORITHMS[name]}
            self.optimizer = gx.optim.build_optimizer(name, self.model, **more)
        elif "update" in SETTINGS[kind]:
            momentum = 0.0 if kind == "streamed" or "pulses" in SETTINGS[kind] else 0.9
            self.optimizer = gx.optim.InSituSGD(self.model.parameters(), lr=lr, momentum=momentum)
        else:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=0.9)
        gx.calibrate(self.model, [self.batch[0]])
        if kind == "anchored wires" and solved:
            self.eager(*self.batch)  # solves all tiles

    def eager(self, x, target):
        self.optimizer.zero_grad()
        loss = functional.cross_entropy(self.model(x), target)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def captured(self):
        return gx.capture_step(self.model, self.optimizer, functional.cross_entropy, self.batch)

    def state(self):
        more = [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        parts = nn.ModuleList(getattr(self.optimizer, "parts", {}).values())
        held = (t for root in (self.model, parts) for t in (*root.parameters(), *root.buffers()))
        return [t.detach().clone() for t in (*held, *more)]


@pytest.fixture
def tape(monkeypatch):
    with gpu_path(monkeypatch, order=11) as tape:
        monkeypatch.setattr(capture, "_captured", taped(tape))
        monkeypatch.setattr(capture, "_check_place", lambda model: None)
        yield tape


def fuse(monkeypatch):
    """Have the planner take fused kernels for small layers too: cuBLAS, faster for these, keeps nothing packed."""
    monkeypatch.setattr(tile_mvm_plan, "epilogue_us", lambda *_: 1e9)


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_replay_is_the_step(tape, kind, monkeypatch):
    """Losses and every state, bit for bit, on batches that change; nothing waits for the device."""
    if "keep_packed" in SETTINGS[kind]:
        fuse(monkeypatch)
    eager, other = Run(kind), Run(kind)
    before = other.state()
    step = other.captured()
    assert same(other.state()[: len(before)], before)
    batches = [tuple(part.roll(i, 0) for part in eager.batch) for i in (0, 1)]
    for i, batch in enumerate(batches):
        assert step(*batch) == eager.eager(*batch), i
        assert same(other.state(), eager.state()), i
    for layer in (other.model[0], other.model[4]):
        assert layer.packed_state is None or layer.packed_state[:, 0].any()
    # and goes on without the graph
    assert other.eager(*batches[0]) == eager.eager(*batches[0])


def test_a_capture_looks_at_no_clipping(tape, monkeypatch):
    """Not even at a read that would be looked at, for which the host would wait."""
    monkeypatch.setattr(AnalogLayer, "_looks_at_clipping", lambda layer: True)
    eager, other = Run("digital"), Run("digital")
    step = other.captured()
    assert step(*eager.batch) == eager.eager(*eager.batch)
    assert same(other.state(), eager.state())


def test_anchored_wires_are_solved_before_a_capture(tape):
    """All of them, as the first eager step does, though a step of the graph solves a few."""
    eager, other = Run("anchored wires", solved=False), Run("anchored wires", solved=False)
    step = other.captured()
    for _ in range(2):
        assert step(*eager.batch) == eager.eager(*eager.batch)
    assert same(other.state(), eager.state())


def test_ranges_that_change_between_replays_are_read(tape):
    eager, other = Run("digital"), Run("digital")
    step = other.captured()
    for run in (eager, other):
        for layer in (run.model[0], run.model[4]):
            layer.adc_range.mul_(0.3)
            layer.back_adc_range.mul_(0.3)
    assert step(*eager.batch) == eager.eager(*eager.batch)
    assert same(other.state(), eager.state())


def test_every_replay_draws_its_noise(tape):
    """Weights that a rate of next to nothing leaves alone: what differs is noise, and the counter says which."""
    run = Run("digital", lr=1e-30)
    step = run.captured()
    losses = [step(*run.batch).item() for _ in range(3)]
    assert len(set(losses)) == 3
    for layer in (run.model[0], run.model[4]):
        layer.read_step.zero_()
    assert [step(*run.batch).item() for _ in range(3)] == losses


class Bad(nn.Module):
    """A layer that does something to its input which no graph can hold."""

    def __init__(self, what):
        super().__init__()
        self.what, self.calls = what, 0

    def forward(self, x):
        self.calls += 1
        return self.what(self, x)


WAITS = {
    "item": lambda layer, x: x * x.detach().abs().max().item(),
    "branch": lambda layer, x: x if (x > 0).any() else -x,
    "float": lambda layer, x: x * float(x.detach().sum()),
    "nonzero": lambda layer, x: x + (x > 0).nonzero().shape[0],
    "mask": lambda layer, x: x + x[x > 0].mean(),
    "equal": lambda layer, x: x if torch.equal(x, x) else -x,
    "constant": lambda layer, x: x * torch.tensor([2.0]),
}  # fmt: skip


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_for_the_device_is_refused(tape, name):
    """The tape can fail: what a capture would refuse it refuses."""
    with pytest.raises(Refused, match=r"waits for the device|copies from the host"):
        Run("digital", layer=Bad(WAITS[name])).captured()


def test_a_counter_of_the_host_would_show(tape):
    eager, other = (Run("digital", layer=Bad(lambda layer, x: x * (1 + 0.1 * layer.calls))) for _ in range(2))
    step = other.captured()
    eager.model[2].calls = other.model[2].calls - 1
    assert step(*eager.batch) == eager.eager(*eager.batch)
    assert step(*eager.batch) != eager.eager(*eager.batch)


def test_a_step_by_value_would_show(tape, monkeypatch):
    """Read counters that the host keeps, in place of those of the device."""
    module = sys.modules["gpuxbar.bridge.analog_mvm"]
    read, count = module._read, iter(range(99))

    def baked(x, lsb, held, bias, step, *more, **settings):
        return read(x, lsb, held, bias, torch.full_like(step, next(count)), *more, **settings)

    monkeypatch.setattr(module, "_read", baked)
    run = Run("digital", lr=1e-30)
    step = run.captured()
    assert step(*run.batch) == step(*run.batch)


def test_the_check_of_the_bench(tape, monkeypatch):
    """The same that runs on a GPU before ResNet-18 is timed, and that it can fail."""
    assert steps.check_steps("cpu", steps=2, widths=(4,)) == "same bits as without capture"
    captured = steps.Step.captured

    def late(self):
        step = captured(self)
        next(m for m in self.model.modules() if hasattr(m, "read_step")).read_step += 1
        return step

    monkeypatch.setattr(steps.Step, "captured", late)
    with pytest.raises(OracleMismatch, match=r"^captured steps: \d+ of \d+ losses and weights are not those"):
        steps.check_steps("cpu", steps=1, widths=(4,))


# ---- what is refused before anything is computed


def plain(**changes):
    model = nn.Linear(3, 2)
    return model, changes.pop("optimizer", torch.optim.SGD)(model.parameters(), lr=0.1, **changes)


def test_a_model_must_be_on_a_gpu():
    with pytest.raises(
        ValueError, match=r"capture_step: `model` must be on one CUDA device, got cpu; call model.cuda\(\)"
    ):
        gx.capture_step(*plain(), functional.mse_loss, (torch.zeros(1, 3), torch.zeros(1, 2)))


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [({"optimizer": torch.optim.RMSprop}, TypeError, "`optimizer` must be one of InSituSGD, MixedPrecision, .* AdamW, got RMSprop"),
     ({"dampening": 0.5, "momentum": 0.9}, ValueError, "`dampening` must be 0, got 0.5"),
     ({"optimizer": torch.optim.AdamW}, ValueError, "`capturable` must be True, got False for AdamW")],
)  # fmt: skip
def test_an_optimiser_must_keep_its_counts_on_the_device(tape, changes, error, text):
    with pytest.raises(error, match=f"capture_step: {text}"):
        gx.capture_step(*plain(**changes), functional.mse_loss, (torch.zeros(1, 3), torch.zeros(1, 2)))


def test_a_graph_transfers_at_every_step_or_at_none(tape):
    run = Run("tiki-taka")
    run.optimizer.param_groups[0]["transfer_every"] = 3
    with pytest.raises(
        ValueError, match=r"capture_step: `transfer_every` must be 1, got 3 for TikiTaka: a graph does"
    ):
        run.captured()


def test_refreshes_of_every_so_many_updates_are_refused(tape, monkeypatch):
    one_sided = {"law": "soft_bounds", "sides": "one_sided"}
    monkeypatch.setitem(SETTINGS, "refreshed", {**BASE, "update": one_sided, "refresh": {"interval": 5}})
    with pytest.raises(
        ValueError,
        match=r"capture_step: `refresh.interval` must be None, got 5 for \w+: a graph does the same",
    ):
        Run("refreshed").captured()


def test_batches_and_rates_must_be_those_captured(tape):
    run = Run("digital")
    step = run.captured()
    x, target = run.batch
    with pytest.raises(
        ValueError,
        match=r"capture_step: `x` must be torch.float32 \(3, 2, 4, 4\) as captured, got torch.float32 \(2,",
    ):
        step(x[:2], target)
    with pytest.raises(ValueError, match=r"`target` must be torch\.int64"):
        step(x, target.int())
    run.optimizer.param_groups[0]["lr"] = 0.01
    with pytest.raises(ValueError, match="`optimizer` must have the settings it was captured with"):
        step(x, target)
