"""Evaluating leaves training as it is: reads of `eval` mode draw noise of their own."""

from __future__ import annotations

import copy

import pytest
import torch
from tape import gpu_path, taped
from test_capture import Run, capture
from torch import nn
from torch.utils.checkpoint import checkpoint

import gpuxbar as gx
from gpuxbar.nn import AnalogLinear

NOISE = {"sigma": 1e-7}
SETTINGS = {
    "ideal devices": {"dac": {"bits": 8, "range": "ema"}, "read_noise": {**NOISE, "sigma_g": 1e-7}},
    "wires": {
        "read_noise": NOISE,
        "parasitics": {"r_wordline": 5.0, "anchor": "ladder", "refresh_interval": 3},
    },
    "in situ": {"read_noise": NOISE, "update": {"law": "agarwal", "gamma": 0.01}},
}


class Sequences(nn.Module):
    """An LSTM, whose steps on the CPU are one function, and a head."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 6)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


def made(kind):
    torch.manual_seed(0)
    model, _ = gx.convert(
        Sequences(), gx.CrossbarSpec.model_validate({"tile": {"rows": 4, "cols": 4}, **SETTINGS[kind]})
    )
    algorithm = "agad" if kind == "in situ" else None
    parameters = model.parameters()
    return model, gx.optim.build_optimizer(algorithm, model, lr=0.05) if algorithm else torch.optim.SGD(
        parameters, lr=0.05
    )


def evaluate(model):
    model.eval()
    with torch.no_grad():
        y = model(torch.ones(2, 3, 6))
    model.train()
    return y


def train(model, optimiser, steps, between=lambda model: None):
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(4, 3, 6, generator=draw)
        optimiser.zero_grad()
        (model(x) - x).square().mean().backward()
        optimiser.step()
        between(model)


@pytest.mark.parametrize("kind", SETTINGS)
def test_training_is_the_same_however_often_a_model_is_evaluated(kind):
    (alone, first), (watched, second) = made(kind), made(kind)
    seen = []
    train(alone, first, 4)
    train(watched, second, 4, lambda model: seen.extend([evaluate(model), evaluate(model)]))
    evaluate(alone)  # which solves wires
    for (name, one), other in zip(alone.state_dict().items(), watched.state_dict().values(), strict=True):
        assert torch.equal(one, other) != name.endswith("eval_step"), name
    assert all(not torch.equal(seen[i], seen[i + 1]) for i in range(0, len(seen), 2))  # fresh noise
    reads = [row.reads for row in gx.telemetry(watched).layers]
    assert reads == [row.reads // 5 * 12 for row in gx.telemetry(alone).layers]
    resumed, optimiser = made(kind)
    train(resumed, optimiser, 1)
    resumed.load_state_dict(watched.state_dict())
    assert torch.equal(evaluate(resumed), evaluate(watched))


def test_ranges_are_calibrated_alike_however_often_a_model_was_evaluated():
    spec = gx.CrossbarSpec(
        tile={"rows": 4, "cols": 4}, dac={"bits": 8}, adc={"bits": 6}, read_noise={"sigma": 1e-6}
    )
    model, _ = gx.convert(Sequences(), spec)
    batches = [*torch.randn(2, 4, 3, 6, generator=torch.Generator().manual_seed(1))]

    def found():
        gx.calibrate(model, batches)
        ranges = [buffer.clone() for name, buffer in model.named_buffers() if name.endswith("adc_range")]
        return ranges, str(gx.conversion_errors(model, batches))

    def counts():
        return [buffer.item() for name, buffer in model.named_buffers() if name.endswith("eval_step")]

    ranges, errors = found()
    evaluate(model)
    before = counts()
    again, same = found()
    assert all(torch.equal(one, other) for one, other in zip(ranges, again, strict=True))
    assert errors == same
    assert counts() == before == [-1, -3, -1]


def test_reads_of_evaluation_are_numbered_from_0_downwards():
    layer = AnalogLinear(6, 4, spec=gx.CrossbarSpec(read_noise=NOISE))
    x = torch.randn(3, 6)
    found = [layer.eval()(x), layer(x)]
    layer.train().read_step.fill_(-3)
    assert [torch.equal(layer(x), y) for y in reversed(found)] == [True, True]


def test_a_frozen_network_in_eval_mode_gets_gradients_of_fresh_reads_which_checkpoints_repeat():
    layer = AnalogLinear(6, 4, bias=False, spec=gx.CrossbarSpec(read_noise=NOISE, dac={"bits": 8}))
    twin = copy.deepcopy(layer).eval()
    layer.eval()
    x = torch.randn(3, 6, requires_grad=True)
    grads = []
    for _ in range(2):
        y = layer(x)
        grads.append(torch.autograd.grad(y.sum(), x)[0])
        again = checkpoint(twin, x, use_reentrant=False, context_fn=lambda: gx.same_reads(twin))
        assert torch.equal(again, y)
        assert torch.equal(torch.autograd.grad(again.sum(), x)[0], grads[-1])
    assert not torch.equal(*grads)
    assert torch.equal(twin.eval_step, layer.eval_step)


def test_compiled_models_evaluate_with_noise_of_their_own():
    layer = AnalogLinear(6, 4, spec=gx.CrossbarSpec(read_noise=NOISE))
    twin, x = copy.deepcopy(layer), torch.randn(3, 6)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for training in (True, False, False, True):
        layer.train(training)
        assert torch.equal(compiled(x), twin.train(training)(x))
    assert (layer.read_step.item(), layer.eval_step.item()) == (2, -2)


def test_a_captured_step_goes_on_as_it_would_without_evaluations(monkeypatch):
    with gpu_path(monkeypatch, order=11) as tape:
        monkeypatch.setattr(capture, "_captured", taped(tape))
        monkeypatch.setattr(capture, "_check_place", lambda model: None)
        alone, watched = Run("digital"), Run("digital")
        step = watched.captured()
        for _ in range(2):
            assert step(*watched.batch) == alone.eager(*alone.batch)
            with torch.no_grad():
                watched.model.eval()(watched.batch[0])
            watched.model.train()


@pytest.mark.parametrize("assign", [False, True])
def test_states_of_before_evaluations_were_counted_load(assign):
    def older(state):
        return {key: value for key, value in copy.deepcopy(state).items() if not key.endswith("eval_step")}

    model, optimiser = made("in situ")
    train(model, optimiser, 2, evaluate)
    state = optimiser.state_dict()
    loaded, _ = made("in situ")
    loaded.load_state_dict(older(model.state_dict()), assign=assign)
    assert loaded.head.eval_step == 0
    again = gx.optim.build_optimizer("agad", loaded, lr=0.05)
    again.load_state_dict({**state, "parts": {i: older(part) for i, part in state["parts"].items()}})
    train(model, optimiser, 2)
    train(loaded, again, 2)
    assert torch.equal(loaded.head.weight, model.head.weight)
