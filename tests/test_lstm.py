"""An LSTM's gates against float64, and a sequence at once against its steps, bit for bit."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import gpuxbar as gx
from gpuxbar import ops, reference
from gpuxbar.nn import recurrent

CONVERTERS = {"dac": {"bits": 8}, "adc": {"bits": 8}, "tile": {"rows": 16, "cols": 16}}
NOISE = {"read_noise": {"sigma": 1e-7}}
SHAPES = [pytest.param(1, 1, id="one"), pytest.param(7, 37, id="prime"), pytest.param(0, 5, id="no-sample"), pytest.param(300, 250, id="threads")]  # fmt: skip


def products(batch, width):
    rng = np.random.default_rng(batch + width)
    shapes = (batch, 4 * width), (batch, 4 * width), (batch, width)
    return tuple(rng.normal(scale=3, size=shape).astype(np.float32) for shape in shapes)


@pytest.mark.parametrize(("batch", "width"), SHAPES)
def test_gates_match_the_oracle(batch, width):
    x, y, c = products(batch, width)
    found, expected = ops.lstm_gates(x, y, c), reference.lstm_gates(x, y, c)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=3e-6, atol=5e-7)
    grads = products(batch, width)[2], found[1]
    for a, b in zip(
        ops.lstm_gates_gradient(*grads, found[2], c),
        reference.lstm_gates_gradient(*grads, found[2], c),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=3e-6, atol=1e-6)


def test_gates_of_any_size_and_of_nan():
    """From one end of float32 to the other; small values keep their digits, and NaN stays."""
    size = np.geomspace(1e-38, 3e38, 2003, dtype=np.float32)
    z = np.concatenate([-size[::-1], np.zeros(1, np.float32), size, np.float32([np.inf, -np.inf])])
    x, zero = np.tile(z, 4)[None], np.zeros((1, 4 * len(z)), np.float32)
    c = np.zeros((1, len(z)), np.float32)
    gates, expected = ops.lstm_gates(x, zero, c)[2], reference.lstm_gates(x, zero, c)[2]
    np.testing.assert_allclose(gates, expected, rtol=5e-7, atol=2e-38)
    for k in range(4):
        x = np.zeros((1, 4), np.float32)
        x[0, k] = np.nan
        h, c, _ = ops.lstm_gates(x, np.zeros_like(x), np.ones((1, 1), np.float32))
        assert np.isnan(h).all()
        assert np.isnan(c).all() == (k < 3)


def test_gradient_of_gates_is_autograds():
    x, y, c = (torch.from_numpy(a).requires_grad_() for a in products(5, 11))
    grads = [torch.randn(5, 11) for _ in range(2)]
    i, f, g, o = (x + y).chunk(4, 1)
    after = f.sigmoid() * c + i.sigmoid() * g.tanh()
    expected = torch.autograd.grad([o.sigmoid() * after.tanh(), after], [x, y, c], grads)
    found = torch.autograd.grad(torch.ops.gpuxbar.lstm_gates(x, y, c)[:2], [x, y, c], grads)
    torch.testing.assert_close(found, expected)
    torch.library.opcheck(torch.ops.gpuxbar.lstm_gates.default, (x.detach(), y.detach(), c.detach()))


def test_bits_of_gates_do_not_depend_on_threads(same_on_threads):
    same_on_threads(partial(ops.lstm_gates, *products(300, 250)))


def test_arrays_that_cannot_be_written_to_are_read():
    arrays = products(3, 2)
    expected = ops.lstm_gates(*arrays)
    for a in arrays:
        a.flags.writeable = False
    for a, b in zip(ops.lstm_gates(*arrays), expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_bad_input_is_named():
    x, y, c = products(3, 2)
    with pytest.raises(ValueError, match=r"`y` must have shape \(3, 8\) for this cell state, got \(3, 4\)"):
        ops.lstm_gates(x, y[:, :4].copy(), c)
    with pytest.raises(TypeError, match="`x` must be an array of float32, got float64"):
        ops.lstm_gates(x.astype(float), y, c)
    with pytest.raises(ValueError, match=r"`gates` must have shape \(3, 10\)"):
        ops.lstm_gates_gradient(c, c, x, c)


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ({}, {"num_layers": 2, "bidirectional": True}),
        ({**CONVERTERS, **NOISE}, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
        ({**CONVERTERS, "adc": {"bits": 3}, "dac": {"bits": 4, "range": "sample"}}, {"bias": False}),
        ({**CONVERTERS, "mapping": {"scheme": "offset"}, "dac": {"bits": 8, "stream_bits": 1}}, {}),
        ({**CONVERTERS, "adc": {"bits": 6, "gain_std": 0.01, "offset_std": 1e-8, "inl_std": 0.5}, "read_noise": {"sigma_g": 1e-7}}, {}),
        ({**CONVERTERS, "dac": {"bits": 8, "gain_std": 0.1, "offset_std": 0.01, "inl_std": 2.0}, "device": {"v_sinh": 0.1}}, {}),
        ({**CONVERTERS, "parasitics": {"r_wordline": 2.0, "r_bitline": 2.0, "r_source": 500.0, "terminations": "role"}}, {}),
    ],
    ids=["ideal", "noise", "clipping", "offset", "errors", "drivers", "wires"],
)  # fmt: skip
def test_a_sequence_at_once_is_its_steps(spec, options, monkeypatch):
    plain = nn.LSTM(6, 9, **options)
    model, twin = (gx.convert(plain, gx.CrossbarSpec.model_validate(spec))[0] for _ in range(2))
    x = torch.randn(3, 5, 6)
    states = torch.randn(2, len(model.suffixes), 5 if not plain.batch_first else 3, 9)
    for lstm in (model, twin):
        gx.calibrate(lstm, [x], step=lambda batch, lstm=lstm: lstm(batch)[0])
    for layer in twin.children():
        layer.register_forward_hook(lambda *_: None)  # takes every step by itself
    at_once = called(monkeypatch)
    for _ in range(2):  # the counters go on as they would
        found, expected = (results(lstm, x, states) for lstm in (model, twin))
        assert all(torch.equal(a, b) for a, b in zip(found[:6], expected[:6], strict=True))
        torch.testing.assert_close(found, expected)
    assert len(at_once) == 2 * len(model.suffixes)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))
    with torch.no_grad():
        assert torch.equal(model(x)[0], twin(x)[0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_noise_of_a_sample_does_not_depend_on_later_ones(kind):
    spec = {**NOISE, "dac": {"bits": 8, "range": "sample"}}
    plain, x = kind(6, 9), torch.randn(4, 5, 6)
    several, few = (gx.convert(plain, gx.CrossbarSpec.model_validate(spec))[0] for _ in range(2))
    torch.testing.assert_close(several(x)[0][:, :3], few(x[:, :3])[0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_weights_that_hooks_set_are_those_of_the_step(kind):
    plain, x = kind(6, 9), torch.randn(4, 5, 6)
    model = gx.convert(plain, gx.CrossbarSpec())[0]
    layer = prune.random_unstructured(model.hh_l0, "weight", amount=0.5)
    with torch.no_grad():
        layer.weight_orig.mul_(2)
        plain.weight_hh_l0.copy_(layer.weight_orig * layer.weight_mask)
    torch.testing.assert_close(model(x)[0], plain(x)[0])


def called(monkeypatch):
    """The orders of the sequences that are run at once from now on."""
    orders, function = [], recurrent.lstm_sequence
    monkeypatch.setattr(recurrent, "lstm_sequence", lambda *args: orders.append(args[-1]) or function(*args))
    return orders


def results(lstm, x, states):
    """Outputs and last states, gradients of the input and first states, then of all parameters."""
    x, h, c = (v.clone().requires_grad_() for v in (x, *states))
    y, (last_h, last_c) = lstm(x, (h, c))
    loss = y.sin().sum() + (2 * last_h).cos().sum() + last_c.square().sum()
    grads = torch.autograd.grad(loss, [x, h, c, *lstm.parameters()])
    return [v.detach() for v in (y, last_h, last_c)] + list(grads)


def lstm_of(**more):
    torch.manual_seed(0)
    model = gx.convert(nn.LSTM(6, 9), gx.CrossbarSpec.model_validate({**CONVERTERS, **more}))[0]
    gx.calibrate(model, [torch.randn(4, 3, 6)], step=lambda x: model(x)[0])
    return model


def test_gradients_in_pieces_and_again():
    model = lstm_of()
    x, weight = torch.randn(4, 3, 6), model.hh_l0.weight
    loss = model(x)[0].sin().sum()
    first = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, weight)[0], first)
    y, (h, c) = model(x)
    y.sin().sum().backward()
    y, _ = model(x, (h.detach(), c.detach()))  # truncated in time, gradients added up
    y.sin().sum().backward()
    assert weight.grad.isfinite().all()
    again = model(x)[0].sum()
    grad = torch.autograd.grad(again, weight, create_graph=True)[0]
    with pytest.raises(ValueError, match="must not be differentiated again"):
        grad.sum().backward()
    y = model(x)[0]
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_what_needs_single_steps_gets_them(monkeypatch):
    at_once, x = called(monkeypatch), torch.randn(4, 3, 6)
    lstm_of()(x)
    assert at_once == [range(4)]
    at_once.clear()
    for more in (
        {"dac": {"bits": 8, "range": "fixed", "max": 1.0}},
        {"dac": {"bits": 8, "signed": False}},
        {"update": {"law": "soft_bounds", "up": 2, "down": 2}, "pulses": {}},
    ):
        model = lstm_of(**more)
        if "pulses" in more:
            gx.optim.InSituSGD(model.parameters(), 0.1)
            gx.calibrate(model, [x], step=lambda x, model=model: model(x)[0])
        model(x)[0].sum().backward()
    model = lstm_of()
    model.hh_l0.register_forward_pre_hook(lambda *_: None)
    model(x)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    lstm_of()(x)
    handle.remove()
    model = lstm_of()
    model(nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 2, 1])))
    model = lstm_of().bfloat16()
    assert model(x.bfloat16())[0].dtype == torch.bfloat16
    assert not at_once


def test_errors_are_those_of_a_read():
    model, _ = gx.convert(nn.LSTM(6, 9), gx.CrossbarSpec.model_validate(CONVERTERS))
    with pytest.raises(ValueError, match="must be calibrated before use"):
        model(torch.randn(4, 3, 6))
    model = lstm_of()
    h = torch.full((1, 3, 9), torch.nan)
    with pytest.raises(ValueError, match=r"hh_l0.*must be finite, got 27 NaN"):
        model(torch.randn(4, 3, 6), (h, h))
