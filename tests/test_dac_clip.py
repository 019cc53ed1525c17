"""Gradients through the edges of a DAC's range: backends against the reference, and that against what the paper says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gpuxbar import ops, reference
from gpuxbar.bridge.dac_clip import dac_clip, slopes

SHAPES = [(0, 3), (1, 1), (7, 13), (3, 5, 4, 2), (1, 100_003)]


def case(shape, top=1.1):
    rng = np.random.default_rng(0)
    x, grad = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    if x.size > 2:
        x.flat[:3] = top, -top, 0.0  # bounds are inside
    return grad, x


def torch_of(*arrays):
    return (torch.from_numpy(a) for a in arrays)


def both(grad, x, *, top, code_max, signed):
    """By NumPy arrays and by PyTorch's functions, as on a GPU."""
    yield ops.dac_clip_gradient(grad, x, top=top, code_max=code_max, signed=signed)
    grad_x, grad_top = slopes(*torch_of(grad, x), torch.tensor([top]), code_max, signed)
    assert grad_top.shape == (1,)
    yield grad_x.numpy(), grad_top.item()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("code_max", [0, 1, 7, 255])
@pytest.mark.parametrize("shape", SHAPES)
def test_backends_match_the_reference(shape, code_max, signed):
    top = float(np.float32(1.1))
    grad, x = case(shape, top)
    how = {"top": top, "code_max": code_max, "signed": signed}
    expected, expected_top = reference.dac_clip_gradient(grad, x, **how)
    # float32 rounding of x / lsb, and of sums of blocks of 4096
    tolerance = 1e-6 * (np.abs(grad) * (1 + np.abs(x))).sum() + 1e-12
    for grad_x, grad_top in both(grad, x, **how):
        assert grad_x.dtype == np.float32
        np.testing.assert_array_equal(grad_x, expected)
        assert abs(grad_top - expected_top) <= tolerance
    if not code_max:
        assert expected_top == 0


@pytest.mark.parametrize("signed", [True, False])
def test_the_gradient_is_that_of_learned_step_size_quantization(signed):
    """Equations 1 and 2 of the paper, with gradients passed straight through the rounding, by PyTorch in float64."""
    grad, x = case((40, 30))
    code_max = 7
    lsb = torch.tensor(1.1 / code_max, dtype=torch.float64, requires_grad=True)
    values = torch.from_numpy(x).double().requires_grad_()
    steps = (values / lsb).clamp(-code_max if signed else 0, code_max)
    ((steps + (steps.round() - steps).detach()) * lsb * torch.from_numpy(grad)).sum().backward()
    found, found_top = reference.dac_clip_gradient(grad, x, top=1.1, code_max=code_max, signed=signed)
    np.testing.assert_allclose(found[1:], values.grad[1:], atol=1e-12)
    assert found_top == pytest.approx(lsb.grad.item() / code_max, rel=1e-9)


def test_the_gradient_is_the_slope_of_the_squared_error():
    """By differences: of many values, the error of rounding and clipping changes as the gradient says."""
    x = np.random.default_rng(0).normal(size=400_000).astype(np.float32)

    def driven(top):
        return reference.dac_quantize(x, lsb=np.array([top / 7]), code_max=7) * top / 7

    for top in (1.0, 2.0, 4.0):
        error = driven(top) - x
        _, found = reference.dac_clip_gradient(error, x, top=top, code_max=7)
        above, below = (np.square(driven(top * s) - x).sum() / 2 for s in (1.02, 0.98))
        assert found == pytest.approx((above - below) / (0.04 * top), rel=0.03)


def test_threads_change_nothing(same_on_threads):
    grad, x = case((3, 50_001))
    same_on_threads(lambda: ops.dac_clip_gradient(grad, x, top=1.1, code_max=7))


def test_the_gradient_of_the_range_is_scaled_as_the_paper_scales_it():
    grad, x = case((6, 3, 5))
    top = torch.tensor([0.9], requires_grad=True)
    values, errors = torch_of(x, grad)
    values.requires_grad_()
    y = dac_clip(values, top, 7, True)
    torch.testing.assert_close(y, values.detach().clamp(-0.9, 0.9))
    y.backward(errors)
    expected, slope = reference.dac_clip_gradient(grad, x, top=top.item(), code_max=7)
    # of a step it is d loss / d lsb / sqrt(15 * 7), and the range moves as 7 times the step
    assert top.grad.item() == pytest.approx(7 * 7 * slope / (15 * 7) ** 0.5, rel=1e-5)
    np.testing.assert_array_equal(values.grad, expected)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("signed", [True, False])
def test_what_is_not_finite_is_nan_inside_a_range(signed, device, monkeypatch):
    if device == "gpu":
        monkeypatch.setattr("gpuxbar.bridge.dac_clip.on_cpu", lambda x: False)
    x = torch.tensor([-2.0, -0.25, 0.5, 2.0, torch.inf, -torch.inf, torch.nan])
    inside = torch.tensor([-1.0 if signed else 0.0, -0.25 if signed else 0.0, 0.5, 1.0, *[torch.nan] * 3])
    torch.testing.assert_close(dac_clip(x, torch.ones(1), 7, signed), inside, rtol=0, atol=0, equal_nan=True)


def test_opcheck():
    grad, x = torch_of(*case((4, 6)))
    top = torch.tensor([0.9])
    operators = torch.ops.gpuxbar
    torch.library.opcheck(operators.dac_clip.default, (x, top, 7, False))
    both = x.clone().requires_grad_(), top.clone().requires_grad_()
    torch.library.opcheck(operators.dac_clip.default, (*both, 7, True))
    torch.library.opcheck(operators.dac_clip_gradient.default, (grad, x, top, 7, True))


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"x": np.zeros((2, 3))}, TypeError, "`x` must be .*float32"),
        ({"grad": np.zeros((2, 4), np.float32)}, ValueError, r"`grad` must have shape \(2, 3\) for this `x`, got \(2, 4\)"),
        ({"top": 0.0}, ValueError, "`top` must be finite and above 0, got 0"),
        ({"top": float("nan")}, ValueError, "`top` must be finite and above 0, got nan"),
        ({"code_max": -1}, ValueError, "`code_max` must be 0 to 32767, got -1"),
        ({"code_max": 1.5}, TypeError, "`code_max` must be an integer"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(change, kind, text):
    good = {
        "grad": np.zeros((2, 3), np.float32),
        "x": np.zeros((2, 3), np.float32),
        "top": 1.0,
        "code_max": 7,
    }
    ops.dac_clip_gradient(**good)
    with pytest.raises(kind, match=f"dac_clip_gradient: {text}"):
        ops.dac_clip_gradient(**{**good, **change})
