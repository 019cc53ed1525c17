"""Activation checkpointing reads twice what it read."""

from __future__ import annotations

import pytest
import torch
from test_layers import NOISY, small_network, spec, step_of
from torch import nn
from torch.utils.checkpoint import checkpoint

import gpuxbar as gx


def model_of_lstm():
    return nn.Sequential(nn.LSTM(5, 4, batch_first=True))


@pytest.mark.parametrize("create_graph", [False, True])
def test_checkpointed_layers_read_the_same_twice(create_graph):
    model, _ = gx.convert(small_network(), spec(**{**NOISY, "dac": {"bits": 8, "range": "ema"}}))
    x, t = torch.randn(16, 1, 8, 8), torch.randint(10, (16,))
    gx.calibrate(model, [x])
    state = {k: v.clone() for k, v in model.state_dict().items()}
    loss, grads = step_of(model, x, t)
    after = {k: v.clone() for k, v in model.state_dict().items()}

    def again(x):
        return checkpoint(model, x, use_reentrant=False, context_fn=lambda: gx.same_reads(model))

    model.load_state_dict(state)
    model.zero_grad()
    found = nn.functional.cross_entropy(again(x), t)
    again_grads = torch.autograd.grad(found, list(model.parameters()), create_graph=create_graph)
    assert torch.equal(found, loss)
    assert all(torch.equal(g, grad) for g, grad in zip(again_grads, grads, strict=True))
    assert all(torch.equal(v, after[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "draws",
    [
        {"read_noise": {"sigma": 1e-8}},
        {"read_noise": {"sigma_g": 1e-7}},
        {"dac": {"bits": 8, "range": "ema"}},
    ],
)
def test_checkpoints_whose_second_reads_would_be_others_are_refused(draws, reentrant):
    model, _ = gx.convert(model_of_lstm(), spec(**draws))
    x = torch.randn(2, 3, 5, requires_grad=True)
    y, _ = checkpoint(model, x, use_reentrant=reentrant)
    with pytest.raises(
        ValueError, match=r"ih_l0: .* must find what the first one found.*gpuxbar\.same_reads"
    ):
        y.sum().backward()
    # the layer of the state alone, which one function steps through
    model, _ = gx.convert(model_of_lstm(), spec(**draws), rules={"0.ih_l0": None})
    y, _ = checkpoint(model, x, use_reentrant=reentrant)
    with pytest.raises(ValueError, match=r"hh_l0: .* must find what the first one found"):
        y.sum().backward()


class WithoutGradient(nn.Module):
    """A layer that no gradient passes, before one that it does."""

    def __init__(self):
        super().__init__()
        self.below, self.above = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        with torch.no_grad():
            y = self.below(x)
        return self.above(x + y)


def test_checkpoints_of_layers_that_no_gradient_passes_are_refused():
    model, _ = gx.convert(
        WithoutGradient(), spec(read_noise={"sigma": 1e-8}), rules={"above": {"read_noise": {"sigma": 0}}}
    )
    y = checkpoint(model, torch.randn(3, 6, requires_grad=True), use_reentrant=False)
    with pytest.raises(ValueError, match=r"below: .* must find what the first one found"):
        y.sum().backward()


def test_compiled_blocks_are_checkpointed_like_others():
    model, _ = gx.convert(
        nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), spec(read_noise={"sigma": 1e-8})
    )
    x = torch.randn(3, 6, requires_grad=True)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    model.load_state_dict(state)
    block = torch.compile(model, backend="aot_eager")
    y = checkpoint(block, x, use_reentrant=False, context_fn=lambda: gx.same_reads(model))
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], expected)
    y = checkpoint(block, x, use_reentrant=False)  # contexts end with their pass
    with pytest.raises(ValueError, match=r"must find what the first one found"):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_that_read_the_same_by_themselves_need_no_context(reentrant):
    model, _ = gx.convert(
        nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), spec(adc={"bits": 8}, dac={"bits": 8})
    )
    x = torch.randn(3, 6, requires_grad=True)
    gx.calibrate(model, [x])
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(x.grad, expected)


def test_a_retained_graph_is_computed_again_by_each_backward_pass():
    model, _ = gx.convert(
        nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), spec(read_noise={"sigma": 1e-8})
    )
    x = torch.randn(3, 6, requires_grad=True)
    y = checkpoint(model, x, use_reentrant=False, context_fn=lambda: gx.same_reads(model)).square().sum()
    first, second = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
