"""The gradient of a matrix of weights against float64, of inputs as values and as codes, and as a layer takes it."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from gpuxbar import ops, reference
from gpuxbar.bridge.outer_product import weight_gradient
from gpuxbar.nn import AnalogLinear
from gpuxbar.spec import CrossbarSpec

SHAPES = [
    pytest.param(1, 1, 1, id="one"),
    pytest.param(7, 5, 3, id="less-than-a-tile"),
    pytest.param(257, 49, 65, id="a-line-more-than-panels-and-pieces"),
    pytest.param(600, 96, 128, id="whole-panels-in-pieces"),
    pytest.param(0, 4, 6, id="no-sample"),
    pytest.param(0, 24, 64, id="no-sample-of-a-whole-panel"),
    pytest.param(9, 0, 6, id="no-output"),
]


ONE = np.ones(1, np.float32)


def case(batch, outputs, inputs):
    rng = np.random.default_rng(batch + outputs)
    return rng.normal(size=(batch, outputs)).astype(np.float32), rng.normal(size=(batch, inputs)).astype(
        np.float32
    )


@pytest.mark.parametrize(("batch", "outputs", "inputs"), SHAPES)
def test_sums_match_the_oracle(batch, outputs, inputs):
    d, x = case(batch, outputs, inputs)
    found, expected = ops.outer_product(d, x), reference.outer_product(d, x, ONE)
    # no worse than twice what float32 NumPy makes of it
    plain = np.abs(d.T @ x - expected).max(initial=0)
    assert found.shape == (outputs, inputs)
    assert np.abs(found - expected).max(initial=0) <= max(2 * plain, 1e-6)


def test_a_gate_is_a_factor():
    d, x = case(257, 49, 65)
    gate = np.random.default_rng(0).integers(0, 3, d.shape).astype(np.float32) / 2
    np.testing.assert_array_equal(ops.outer_product(d, x, gate), ops.outer_product(d * gate, x))


@pytest.mark.parametrize("kind", [np.int16, np.float32])
@pytest.mark.parametrize("each", [False, True], ids=["one-unit", "a-unit-of-each-sample"])
def test_inputs_come_in_units(kind, each):
    d, x = case(257, 49, 65)
    codes = (100 * x).astype(kind)
    scale = np.linspace(0.1, 0.3, 257 if each else 1, dtype=np.float32)
    found = ops.outer_product(d, codes, scale=scale)
    np.testing.assert_array_equal(found, ops.outer_product(d, codes * scale[:, None]))
    np.testing.assert_allclose(found, reference.outer_product(d, codes, scale), atol=5e-3)


def test_bits_do_not_depend_on_threads(same_on_threads):
    same_on_threads(partial(ops.outer_product, *case(300, 100, 200)))


def test_without_a_compiler_the_reference_serves(monkeypatch):
    d, x = case(7, 5, 3)
    monkeypatch.setattr("gpuxbar.launch.host.WANTED", "reference")
    np.testing.assert_array_equal(
        ops.outer_product(d, x), reference.outer_product(d, x, ONE).astype(np.float32)
    )


@pytest.mark.parametrize(
    ("d", "x", "message"),
    [
        (np.ones((3, 2)), np.ones((3, 2), np.float32), "`d` must be an array of float32, got float64"),
        (np.ones((3, 2), np.float32), np.ones(3, np.float32), "`x` must have 2 axes, got 1"),
        (np.ones((3, 2), np.float32), np.ones((4, 2), np.float32), "`x` must have the batch of d, 3, got 4"),
    ],
)
def test_bad_input_is_named(d, x, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ops.outer_product(d, x)


def test_a_gate_of_another_shape_is_named():
    d, x = case(7, 5, 3)
    with pytest.raises(ValueError, match=r"`gate` must have shape \(7, 5\) for this `d`, got \(7, 3\)"):
        ops.outer_product(d, x, x)


def test_units_of_another_number_are_named():
    d, x = case(7, 5, 3)
    with pytest.raises(ValueError, match="`scale` must have 1 or 7 values, got 2; give one for each sample"):
        ops.outer_product(d, x, scale=np.ones(2, np.float32))


@pytest.mark.usefixtures("backend")
def test_operator_is_sound():
    d, x = (torch.from_numpy(a) for a in case(7, 5, 3))
    codes, units, gate = (100 * x).short(), torch.rand(7), torch.rand(d.shape)
    outer_product = torch.ops.gpuxbar.outer_product.default
    torch.library.opcheck(outer_product, (d, x, units[:1]))
    torch.library.opcheck(outer_product, (d, codes, units, gate))
    expected = torch.from_numpy(ops.outer_product(*(t.numpy() for t in (d, codes, gate, units))))
    # memory that is not as the kernel takes it
    columns, every_other = (
        (d.t().contiguous().t(), codes.t().contiguous().t()),
        torch.stack([units] * 2, 1)[:, 0],
    )
    found = outer_product(*columns, every_other, gate.t().contiguous().t())
    assert torch.equal(found, expected)


def test_memory_beyond_the_samples_is_not_read():
    d, x = (torch.from_numpy(a) for a in case(7, 5, 3))
    for inputs, units in ((x[:6], torch.ones(1)), (x, torch.ones(2))):
        with pytest.raises(ValueError, match="`x` and `scale` must have 7 rows and 1 or 7 values, got"):
            torch.ops.gpuxbar.outer_product(d, inputs, units)


@pytest.mark.parametrize("adc", [{}, {"bits": 4, "range": "fixed", "i_max": 5e-7}], ids=["open", "clipping"])
def test_a_layer_takes_its_gradient_from_it(adc):
    """And the same whether its input needs one or not: the gates of the ADCs then meet the gradient elsewhere."""
    layer = AnalogLinear(9, 7, bias=False, spec=CrossbarSpec(adc=adc))
    x, d = torch.randn(5, 9), torch.randn(5, 7)
    layer(x).backward(d)
    alone, layer.weight.grad = layer.weight.grad, None
    layer(x.requires_grad_()).backward(d)
    torch.testing.assert_close(layer.weight.grad, alone)
    assert torch.allclose(alone, d.T @ x, atol=1e-5) == (not adc)


def test_a_gpu_takes_the_product_of_torch_in_the_same_units(monkeypatch):
    d, x = (torch.from_numpy(each) for each in case(9, 4, 6))
    codes, gate = (10 * x).to(torch.int16), (d > 0).float()
    for scale in (torch.tensor([0.1]), torch.linspace(0.1, 0.9, 9)):
        on_cpu = weight_gradient(d, codes, scale, gate)
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr("gpuxbar.bridge.outer_product.on_cpu", lambda _: False)
            found = weight_gradient(d, codes, scale, gate)
        torch.testing.assert_close(found, on_cpu)
