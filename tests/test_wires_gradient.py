"""Gradients through the wires: the host kernel against the oracle, tensors and layers against differences, messages."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from cuda_shim import FORWARD, REVERSE, ShimDevice
from tape import gpu_path
from test_effective_conductance import RON, WIRES, error, of_lines, tiles
from torch import nn

import gpuxbar as gx
from gpuxbar import bridge, ops, reference
from gpuxbar.bridge.wires import weight_through_wires, weight_through_wires_gradient
from gpuxbar.nn import AnalogConv2d, AnalogLinear

# one cell, one line, one leaf, open cells at both ends, groups of leaves cut both ways
SHAPES = [(1, 1), (1, 9), (9, 1), (8, 8), (12, 7), (33, 40)]
DEVICE = {"g_min": 1e-6, "g_max": 1e-4}


def case(rows, cols, ron=RON):
    grad = np.random.default_rng(rows).normal(size=(2, rows, cols))
    return tiles(2, rows, cols, ron=ron), grad.astype(np.float32)


@pytest.mark.parametrize("name", WIRES)
@pytest.mark.parametrize("shape", SHAPES)
def test_host_matches_oracle(shape, name):
    g, grad = case(*shape)
    got = ops.effective_conductance_gradient(g, grad, **WIRES[name])
    assert got.dtype == np.float32
    # sums of as many terms as the tile has cells, float32
    assert error(got, reference.effective_conductance_gradient(g, grad, **WIRES[name])) < 4e-6


def test_lines_of_their_own_and_strong_wires():
    g, grad = case(20, 30, ron=1e3)
    wires = {name: ohm.astype(float) for name, ohm in of_lines(20, 30, 10, 1000).items()}
    got = ops.effective_conductance_gradient(g, grad, **wires)
    assert error(got, reference.effective_conductance_gradient(g, grad, **wires)) < 2e-5


@pytest.mark.parametrize("name", WIRES)
def test_oracle_is_the_derivative(name):
    """Of the merged blocks, which share nothing with the nodal solution behind the gradient."""
    g, grad = (x[0].astype(np.float64) for x in case(5, 4))
    g += 1e-6
    got = reference.effective_conductance_gradient(g, grad, **WIRES[name])
    for at in np.ndindex(g.shape):
        up, down = g.copy(), g.copy()
        up[at] += 1e-8
        down[at] -= 1e-8
        change = reference.effective_conductance(up, **WIRES[name]) - reference.effective_conductance(
            down, **WIRES[name]
        )
        slope = (grad * change).sum() / 2e-8
        # truncation, (step / g)^2 of the drop
        assert slope == pytest.approx(got[at], rel=2e-6, abs=1e-6 * np.abs(got).max())


def test_same_bits_for_threads(same_on_threads):
    g, grad = case(24, 40)
    same_on_threads(lambda: ops.effective_conductance_gradient(g, grad, **WIRES["strong"]))


# one cell, one line, one leaf, leaves along a line only, of both ways
@pytest.mark.parametrize(
    ("shape", "name", "order"),
    [((1, 1), "mild", FORWARD), ((9, 1), "ends", REVERSE), ((16, 13), "strong", 11), ((5, 50), "rows", 12),
     ((33, 7), "none", 13), ((20, 39), "strong", REVERSE)],
)  # fmt: skip
def test_cuda_matches_oracle(shape, name, order):
    g, grad = case(*shape)
    device = ShimDevice(order)
    got = ops.effective_conductance_gradient(g, grad, device=device, **WIRES[name])
    assert error(got, reference.effective_conductance_gradient(g, grad, **WIRES[name])) < 4e-6


def test_cuda_lines_of_their_own_and_chunks():
    g, grad = case(20, 30, ron=1e3)
    wires = of_lines(20, 30, 10, 1000)
    whole, device = ShimDevice(FORWARD), ShimDevice(11, workspace=1)
    got = ops.effective_conductance_gradient(g, grad, device=whole, **wires)
    assert error(got, reference.effective_conductance_gradient(g, grad, **wires)) < 2e-5
    np.testing.assert_array_equal(got, ops.effective_conductance_gradient(g, grad, device=device, **wires))
    assert len(device.launches) == 2 * len(whole.launches)
    one = {**WIRES["strong"], "r_sink": np.full(1, 30, np.float32)}
    np.testing.assert_array_equal(
        ops.effective_conductance_gradient(g, grad, device=whole, **one),
        ops.effective_conductance_gradient(g, grad, device=whole, **WIRES["strong"]),
    )


class Counted(ShimDevice):
    """Adds up the multiplications of cuBLAS products since each merge of blocks began to be undone."""

    def __init__(self):
        super().__init__()
        self.work = []

    def launch(self, kernel, *arguments, **more):
        if kernel.name == "conductance_gradient_parts":
            self.work.append(0)
        super().launch(kernel, *arguments, **more)

    def matmul(self, a, b, c, shape, *more):
        if self.work:
            self.work[-1] += int(np.prod(shape))
        super().matmul(a, b, c, shape, *more)


def test_cuda_leaves_out_what_is_zero():
    """A whole tile's gradients lie between left and lower ports: 20 n^3 of 46 n^3, to undo its own merge; else all."""
    g, grad = case(32, 32)  # two tiles
    device = Counted()
    ops.effective_conductance_gradient(g, grad, device=device, **WIRES["mild"])
    k, e = 16, 48  # joined and other ports of leaves
    every = 2 * k**3 + 4 * e * e * k + 4 * k * k * e + 8 * k**3 + 4 * (e * k * k + k**3)
    assert device.work == [
        2 * (20 + 1) * 32**3,
        4 * every,
    ]  # 1: of its joined sides, which no merge needed before


def test_cuda_of_no_tile():
    empty = np.zeros((3, 0, 4), np.float32)
    got = ops.effective_conductance_gradient(empty, empty, device=ShimDevice(), **WIRES["mild"])
    assert got.shape == (3, 0, 4)


GOOD = dict(zip(("g", "grad"), case(3, 5), strict=True))
BAD = {
    "dtype": ({"grad": np.zeros((2, 3, 5))}, TypeError, "`grad` must be an array of float32, got float64"),
    "shape": ({"grad": np.zeros((2, 5, 3), np.float32)}, ValueError, r"`grad` must have shape \(2, 3, 5\) for this `g`, got \(2, 5, 3\)"),
    "nan": ({"grad": np.full((2, 3, 5), np.nan, np.float32)}, ValueError, "`grad` must be finite, got nan 1/S"),
    "cell": ({"g": np.full((2, 3, 5), -1, np.float32)}, ValueError, r"`g` must be 0 or above and finite, got -1 S in tile \(0,\)"),
    "wire": ({"r_sink": -1.0}, ValueError, "`r_sink` must be 0 or above and finite, got -1 ohm"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    change, kind, text = BAD[name]
    with pytest.raises(kind, match=f"effective_conductance_gradient: {text}"):
        ops.effective_conductance_gradient(**{**GOOD, **WIRES["mild"], **change})


def test_nothing_to_do_and_the_fallback(monkeypatch):
    empty = np.zeros((3, 0, 4), np.float32)
    assert ops.effective_conductance_gradient(empty, empty, **WIRES["mild"]).shape == (3, 0, 4)
    host = ops.effective_conductance_gradient(**GOOD, **WIRES["strong"])
    monkeypatch.setattr("gpuxbar.launch.host.WANTED", "reference")
    assert error(host, ops.effective_conductance_gradient(**GOOD, **WIRES["strong"])) < 4e-6


# ---------------------------------------------------------------- tensors


def test_tensors_match_arrays_and_have_the_gradient():
    g, grad = case(6, 9)
    x = torch.from_numpy(g).requires_grad_()
    lines = {**WIRES["strong"], "r_source": torch.linspace(0, 200, 6)}
    y = bridge.effective_conductance(x, **lines)
    y.backward(torch.from_numpy(grad))
    arrays = {**lines, "r_source": lines["r_source"].numpy()}
    np.testing.assert_array_equal(y.detach(), ops.effective_conductance(g, **arrays))
    np.testing.assert_array_equal(x.grad, ops.effective_conductance_gradient(g, grad, **arrays))
    ladder = bridge.effective_conductance(x.detach(), method="ladder", **WIRES["strong"])
    np.testing.assert_array_equal(ladder, ops.effective_conductance(g, method="ladder", **WIRES["strong"]))
    compiled = torch.compile(bridge.effective_conductance, backend="aot_eager", fullgraph=True)
    again = torch.autograd.grad(compiled(x, **lines), x, torch.from_numpy(grad))[0]
    assert torch.equal(again, x.grad)
    with pytest.raises(RuntimeError, match="functorch"):  # and no gradient of another function
        torch.func.grad(lambda of: bridge.effective_conductance(of, **lines).sum())(x.detach())


def test_tensors_on_a_gpu_have_it_too(monkeypatch):
    """By the CUDA path over the CPU build of its kernels: resistances as numbers, of one and of all lines."""
    g, grad = case(6, 9)
    lines = {**WIRES["strong"], "r_source": torch.linspace(0, 200, 6), "r_sink": torch.full((1,), 30.0)}
    grads = []
    for path in (nullcontext(), gpu_path(monkeypatch)):
        x = torch.from_numpy(g).requires_grad_()
        with path:
            bridge.effective_conductance(x, **lines).backward(torch.from_numpy(grad))
        grads.append(x.grad.numpy())
    assert 0 < error(grads[1], grads[0]) < 4e-6


def test_opcheck():
    g, _ = case(5, 4)
    ohms = [torch.tensor(value) for value in (2.0, 1.0, 50.0, 0.0)]
    x = torch.from_numpy(g)
    op = torch.ops.gpuxbar.conductance_through_wires.default
    torch.library.opcheck(op, (x.clone().requires_grad_(), *ohms, "exact", False), rtol=1e-6, atol=0)
    torch.library.opcheck(
        torch.ops.gpuxbar.conductance_through_wires_gradient.default, (x, x, *ohms), rtol=1e-6, atol=0
    )
    layer = AnalogLinear(5, 4, spec=spec(WIRES["strong"]))
    w_max = layer.conductances().w_max
    more = (layer.cells, w_max, 1, False, layer.static[1])
    torch.library.opcheck(weight_through_wires, (layer.weight, *more))
    torch.library.opcheck(weight_through_wires_gradient, (torch.randn(4, 5), layer.weight.detach(), *more))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"method": "ladder"}, "`method` must be 'exact' without shared_drivers for a gradient, got 'ladder' and False"),
        ({"shared_drivers": True}, "got 'exact' and True; choose these, or pass g.detach()"),
        ({"r_sink": torch.ones(1, requires_grad=True)}, "`r_sink` must not require a gradient"),
    ],
)  # fmt: skip
def test_gradients_that_do_not_exist_are_refused(change, text):
    g = torch.full((2, 3, 4), 1e-5, requires_grad=True)
    with pytest.raises(ValueError, match=text):
        bridge.effective_conductance(g, **{**WIRES["mild"], **change})


# ---------------------------------------------------------------- layers


def spec(wires, **parts):
    wires = {"terminations": "line", "gradient": "exact", **wires}
    return gx.CrossbarSpec.model_validate(
        {"tile": {"rows": 5, "cols": 4}, "device": DEVICE, "parasitics": wires, **parts}
    )


def read(weight, wires, w_max):
    """What a layer's arrays weigh, float64 [O, I]: pairs of the weight, tile by tile through the wires."""
    span = DEVICE["g_max"] - DEVICE["g_min"]
    out = np.zeros_like(weight.T)
    for sign in (1, -1):
        g = DEVICE["g_min"] + np.maximum(sign * weight.T / w_max, 0) * span
        for r in range(0, g.shape[0], 5):
            for c in range(0, g.shape[1], 4):
                part = np.s_[r : r + 5, c : c + 4]
                out[part] += sign * reference.effective_conductance(g[part], **wires)
    return (out * w_max / span).T


@pytest.mark.parametrize(
    ("name", "merge"), [("strong", {"scheme": "subtracted"}), ("rows", {}), ("strong", {"scale": "column"})]
)
def test_a_layer_has_the_derivative_of_its_arrays(name, merge):
    """By differences of the float64 reference; several tiles, cut short at both edges."""
    wires = {key: 20 * value for key, value in WIRES[name].items()}
    layer = AnalogLinear(7, 6, bias=False, spec=spec(wires, mapping=merge))
    x, grad = torch.randn(3, 7), torch.randn(3, 6)
    layer(x).backward(grad)
    w = layer.weight.detach().numpy().astype(np.float64)
    w_max = np.abs(w).max(1, keepdims=True).T if merge.get("scale") else np.abs(w).max()
    outer = (grad.T @ x).numpy().astype(np.float64)

    def loss(weight):
        return (outer * read(weight, wires, w_max)).sum()

    expected = np.zeros_like(w)
    for at in np.ndindex(w.shape):
        step = 1e-3 * abs(w[at])  # stays on its side of 0
        up, down = w.copy(), w.copy()
        up[at] += step
        down[at] -= step
        expected[at] = (loss(up) - loss(down)) / (2 * step)
    assert error(layer.weight.grad.numpy(), expected) < 2e-5
    assert error(outer, expected) > 0.02


def test_without_wires_it_is_the_outer_product():
    """And near it, the nearer the smaller the resistance."""
    x, grad = torch.randn(3, 12), torch.randn(3, 7)
    weight = torch.randn(7, 12)
    off = []
    for ohm in (1e-1, 1e1):
        layer = AnalogLinear(12, 7, bias=False, spec=spec({"r_wordline": ohm, "r_bitline": ohm}))
        layer.weight.data.copy_(weight)
        layer(x).backward(grad)
        off.append(error(layer.weight.grad.numpy(), (grad.T @ x).numpy()))
    assert off[0] < 1e-4
    assert 20 < off[1] / off[0] < 200
    layer = AnalogLinear(12, 7, bias=False, spec=spec({}))
    layer(x).backward(grad)
    torch.testing.assert_close(layer.weight.grad, grad.T @ x)


@pytest.mark.parametrize("carry", [None, {"headroom_bits": 3}])
def test_slices_groups_and_images(carry):
    """Slices move together, so that with little wire the gradient is still the outer product; groups keep apart.

    Room for carries changes what a digit is worth of a window, and no gradient.
    """
    grads = {}
    for gradient in ("exact", "straight_through"):
        wires = {"r_wordline": 1e-2, "r_bitline": 1e-2, "gradient": gradient}
        slices = {"slices": 3, "slice_bits": 2, "scheme": "subtracted"}
        torch.manual_seed(0)
        law = {"update": {"law": "ideal"}, "carry": carry} if carry else {}
        layer = AnalogConv2d(4, 6, 3, groups=2, spec=spec(wires, mapping=slices, **law))
        if carry:
            layer.begin_in_situ()
        layer(torch.randn(2, 4, 6, 6)).square().sum().backward()
        grads[gradient] = layer.weight.grad.numpy()
    assert 0 < error(grads["exact"], grads["straight_through"]) < 1e-4


@pytest.mark.parametrize(
    "parts",
    [{"mapping": {"slices": 2, "slice_bits": 2, "scheme": "subtracted"}}, {"update": {"law": "agarwal"}}],
)
def test_a_layer_on_a_gpu_has_it_too(monkeypatch, parts):
    """Of slices, groups and both ways that a weight moves its devices."""
    grads = []
    for path in (nullcontext(), gpu_path(monkeypatch)):
        torch.manual_seed(0)
        layer = AnalogConv2d(4, 6, 3, groups=2, spec=spec(WIRES["strong"], **parts))
        with path:
            layer(torch.randn(2, 4, 5, 5)).square().sum().backward()
        grads.append(layer.weight.grad.numpy())
    assert 0 < error(grads[1], grads[0]) < 1e-5


@pytest.mark.parametrize("compiled", [False, True])
def test_training_in_situ_moves_both_devices(compiled):
    """The weight's gradient is the mean of both devices' own; under torch.compile too."""
    wires = {key: 20 * value for key, value in WIRES["strong"].items()}
    law = {"law": "agarwal"}
    model, _ = gx.convert(nn.Sequential(nn.Linear(9, 6, bias=False)), spec(wires, update=law))
    optimiser = gx.optim.InSituSGD(model.parameters(), lr=0.1)
    layer = model[0]
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    x, grad = torch.randn(3, 9), torch.randn(3, 6)
    run(x).backward(grad)
    outer = (grad.T @ x).numpy().astype(np.float64)
    expected = np.zeros((9, 6))
    for plane in layer.g_cells.numpy().astype(np.float64):
        for r in range(0, 9, 5):
            for c in range(0, 6, 4):
                part = np.s_[r : r + 5, c : c + 4]
                expected[part] += reference.effective_conductance_gradient(
                    plane[part], outer.T[part], **wires
                )
    assert error(layer.weight.grad.numpy().T, expected / 2) < 1e-5
    optimiser.step()
    optimiser.zero_grad()
    run(x).backward(grad)


def test_an_anchored_run_resumes_bit_for_bit():
    def network():
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3))
        wires = {**WIRES["strong"], "anchor": "ladder", "refresh_interval": 3}
        model, _ = gx.convert(layers, spec(wires, read_noise={"sigma": 1e-7}))
        return model, torch.optim.SGD(model.parameters(), lr=0.05)

    def steps(model, optimiser, which):
        for step in which:
            rng = torch.Generator().manual_seed(step)
            x, t = torch.randn(8, 9, generator=rng), torch.randint(3, (8,), generator=rng)
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x), t).backward()
            optimiser.step()

    whole, optimiser = network()
    steps(whole, optimiser, range(3))
    kept = {key: value.clone() for key, value in whole.state_dict().items()}
    steps(whole, optimiser, range(3, 6))
    resumed, optimiser = network()
    resumed.load_state_dict(kept)
    steps(resumed, optimiser, range(3, 6))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_programmed_devices_have_the_gradient_of_their_own_wires():
    """Written without noise they are those of the weights; a year of drift leaves others."""
    spec = gx.CrossbarSpec(
        device=DEVICE,
        drift={"nu": 0.1},
        parasitics={**WIRES["strong"], "terminations": "line", "gradient": "exact"},
    )
    free = AnalogLinear(9, 4, spec=spec)
    programmed = copy.deepcopy(free)
    gx.program(programmed)
    grads, x = [], torch.randn(5, 9)
    for layer, age in ((free, None), (programmed, 0.0), (programmed, "1y")):
        if age is not None:
            gx.age(layer, age)
        layer.weight.grad = None
        layer(x).square().sum().backward()
        grads.append(layer.weight.grad)
    torch.testing.assert_close(grads[1], grads[0])
    assert (grads[2] - grads[0]).norm() > 0.1 * grads[0].norm()


def test_a_weight_changed_before_backward_is_caught():
    layer = AnalogLinear(9, 6, spec=spec(WIRES["strong"]))
    y = layer(torch.randn(3, 9))
    with torch.no_grad():
        layer.weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
