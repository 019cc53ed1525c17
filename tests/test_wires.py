"""Layers whose tiles have wires: both reads against the oracle, tile by tile; training in situ; messages."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
import torch
from cuda_shim import ShimDevice
from tape import bridge_to
from torch import nn

import gpuxbar as gx
from gpuxbar import reference
from gpuxbar.nn import AnalogConv2d, AnalogLinear

OHMS = {"r_wordline": 5.0, "r_bitline": 8.0}
TILE = {"rows": 16, "cols": 12}
DEVICE = {"g_min": 1e-6, "g_max": 1e-4}


def spec(**parts):
    return gx.CrossbarSpec.model_validate({"tile": TILE, "device": DEVICE, **parts})


def by_tile(g, swap=False, source=0.0, sink=0.0, method="exact"):
    """The oracle: every tile solved on its own; lines of an edge tile end where the array ends."""
    out = np.empty_like(g)
    source, sink = (sink, source) if swap else (source, sink)
    for r in range(0, g.shape[0], TILE["rows"]):
        for c in range(0, g.shape[1], TILE["cols"]):
            part = np.s_[r : r + TILE["rows"], c : c + TILE["cols"]]
            out[part] = reference.effective_conductance(
                g[part], **OHMS, r_source=source, r_sink=sink, method=method
            )
    return out


def pairs(weight, w_max):
    """Ideal conductances of the positive and negative devices, [2, I, O]."""
    w = weight.detach().numpy().astype(np.float64).T / w_max
    span = DEVICE["g_max"] - DEVICE["g_min"]
    return DEVICE["g_min"] + np.stack([np.maximum(w, 0), np.maximum(-w, 0)]) * span


@pytest.mark.parametrize("scheme", ["differential", "subtracted"])
@pytest.mark.parametrize("ends", [(20.0, 20.0, None), (50.0, 10.0, "line"), (50.0, 10.0, "role")])
@pytest.mark.parametrize("method", ["ladder", "exact"])
def test_both_reads_see_the_wires(method, ends, scheme):
    source, sink, terminations = ends
    wires = {**OHMS, "r_source": source, "r_sink": sink, "terminations": terminations, "method": method}
    layer = AnalogLinear(37, 29, bias=False, spec=spec(parasitics=wires, mapping={"scheme": scheme}))
    w_max = layer.weight.detach().abs().max().item()
    unit = w_max / (DEVICE["g_max"] - DEVICE["g_min"])
    g = pairs(layer.weight, w_max)
    seen = [by_tile(plane, source=source, sink=sink, method=method) for plane in g]
    x = torch.randn(5, 37, requires_grad=True)
    y = layer(x)
    expected = x.detach().numpy() @ (seen[0] - seen[1]) * unit
    np.testing.assert_allclose(y.detach(), expected, atol=2e-5 * np.abs(expected).max())
    assert np.abs(expected - (x @ layer.weight.T).detach().numpy()).max() > 0.02 * np.abs(expected).max()

    grad = torch.randn(5, 29)
    y.backward(grad)
    swap = terminations == "role"
    back = [by_tile(plane, swap, source, sink, method) for plane in g]
    expected = grad.numpy() @ (back[0] - back[1]).T * unit
    np.testing.assert_allclose(x.grad, expected, atol=2e-5 * np.abs(expected).max())
    wrong = grad.numpy() @ (seen[0] - seen[1]).T * unit
    assert (np.abs(expected - wrong).max() > 1e-3 * np.abs(expected).max()) == swap


def test_grouped_convolutions_and_slices():
    """Groups have arrays, and so tiles, of their own; slices are solved before shift-and-add."""
    wires = {**OHMS, "r_source": 10.0, "r_sink": 10.0}
    slices = {"slices": 4, "slice_bits": 2, "scheme": "subtracted"}
    layer = AnalogConv2d(4, 6, 3, groups=2, bias=False, spec=spec(parasitics=wires, mapping=slices))
    plain = AnalogConv2d(4, 6, 3, groups=2, bias=False, spec=spec(mapping=slices))
    plain.weight = layer.weight
    seen, devices = layer.conductances().g, layer.cells
    span = np.array([4.0**k for k in range(4)])
    for group in range(2):
        rows = np.s_[group * 18 : (group + 1) * 18]
        solved = np.stack(
            [by_tile(plane[rows].numpy().astype(np.float64), False, 10.0, 10.0) for plane in devices]
        )
        merged = np.tensordot(span, solved[:4] - solved[4:], 1)
        np.testing.assert_allclose(seen[0, rows], merged, atol=2e-5 * np.abs(merged).max())
    x = torch.randn(2, 4, 7, 7)
    assert 0.01 < (layer(x) - plain(x)).norm() / plain(x).norm() < 0.5


@pytest.mark.parametrize("wires", [{"method": "ladder"}, {"anchor": "ladder", "refresh_interval": 3}])
def test_a_layer_may_be_read_again_before_its_backward_pass(monkeypatch, wires):
    """As a recurrent one is. A GPU solves the wires at every read, to what they were."""

    def gradient():
        torch.manual_seed(0)
        layer = AnalogLinear(37, 29, spec=spec(parasitics={**OHMS, **wires}))
        x = torch.randn(5, 37, requires_grad=True)
        (layer(x) + layer(2 * x)).square().sum().backward()
        return x.grad

    expected = gradient()
    bridge_to(monkeypatch, ShimDevice(), lambda t: t.detach().contiguous().numpy(), torch.from_numpy)
    torch.testing.assert_close(gradient(), expected, rtol=1e-4, atol=1e-5)


def test_wires_are_solved_once_for_a_weight_version(monkeypatch):
    from gpuxbar import ops

    solved, real = [], ops.effective_conductance
    monkeypatch.setattr(ops, "effective_conductance", lambda *a, **k: solved.append(1) or real(*a, **k))
    layer = AnalogLinear(20, 10, spec=spec(parasitics=OHMS))
    x = torch.randn(3, 20)
    layer(x), layer(x).sum().backward()
    assert len(solved) == 1
    with torch.no_grad():
        layer.weight[0, 0] += 0.01
    layer(x)
    assert len(solved) == 2


@pytest.mark.parametrize(("compiled", "anchor"), [(False, None), (True, None), (True, "ladder")])
def test_in_situ_training_sees_the_wires(compiled, anchor):
    """Cells move, so what reads see moves; a loaded state is solved anew."""
    law = {"law": "agarwal"}
    wires = OHMS | {"anchor": anchor}  # every tile is due at every update
    model, _ = gx.convert(nn.Sequential(nn.Linear(20, 10)), spec(parasitics=wires, update=law))
    optimiser = gx.optim.InSituSGD(model.parameters(), lr=0.5)
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    x, t = torch.randn(30, 20), torch.randint(10, (30,))
    losses, states = [], []
    for _ in range(6):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(run(x), t)
        loss.backward()
        states.append({k: v.clone() for k, v in model.state_dict().items()})
        losses.append(loss.item())
        optimiser.step()
    assert losses[-1] < losses[0]
    layer, w_max = model[0], model[0].w_max[0].item()
    g = layer.g_cells.numpy().astype(np.float64)
    seen = [by_tile(plane) for plane in g]
    expected = x.numpy() @ (seen[0] - seen[1]) * w_max / (DEVICE["g_max"] - DEVICE["g_min"])
    with torch.no_grad():
        np.testing.assert_allclose(run(x) - layer.bias, expected, atol=5e-5 * np.abs(expected).max())
    model.load_state_dict(states[1])
    assert nn.functional.cross_entropy(run(x), t).item() == losses[1]


def test_column_tiles_can_share_their_drivers():
    wires = {**OHMS, "r_source": 40.0, "r_sink": 40.0, "shared_drivers": True}
    layer = AnalogLinear(16, 36, bias=False, spec=spec(parasitics=wires))
    g = pairs(layer.weight, layer.weight.detach().abs().max().item())
    ends = {"r_source": 40.0, "r_sink": 40.0}
    solved = [
        reference.effective_conductance(
            np.stack(np.split(plane, 3, axis=1)), **OHMS, **ends, shared_drivers=True
        )
        for plane in g
    ]
    expected = np.concatenate(list(solved[0] - solved[1]), axis=1)
    np.testing.assert_allclose(layer.conductances().g[0], expected, atol=2e-5 * np.abs(expected).max())


ANCHORED = {**OHMS, "r_source": 20.0, "r_sink": 10.0, "anchor": "ladder", "refresh_interval": 4}
EVERY_UPDATE = {**ANCHORED, "anchor": None, "refresh_interval": 1}


def small_network(wires, in_situ):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(20, 15), nn.ReLU(), nn.Linear(15, 10))
    law = {"update": {"law": "agarwal"}, "mapping": {"scheme": "subtracted"}} if in_situ else {}
    model, _ = gx.convert(layers, spec(parasitics=wires, read_noise={"sigma": 1e-7}, **law))
    optimiser = gx.optim.InSituSGD if in_situ else torch.optim.SGD
    return model, optimiser(model.parameters(), lr=0.05)


def steps(model, optimiser, which):
    errors = []
    for step in which:
        rng = torch.Generator().manual_seed(step)
        x, t = torch.randn(30, 20, generator=rng), torch.randint(10, (30,), generator=rng)
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), t).backward()
        errors.append(max(model[0].wire_error(), model[2].wire_error()))
        optimiser.step()
    return errors


def look(model):
    """A read between two updates; it changes nothing but the count of reads."""
    with torch.no_grad():
        model(torch.zeros(1, 20))
    for layer in (model[0], model[2]):
        layer.read_step -= 1


@pytest.mark.parametrize("in_situ", [False, True])
@pytest.mark.parametrize("terminations", ["line", "role"])
def test_an_anchored_run_resumes_bit_for_bit(terminations, in_situ):
    wires = {**ANCHORED, "terminations": terminations}
    whole, optimiser = small_network(wires, in_situ)
    steps(whole, optimiser, range(3))
    look(whole)
    kept = {k: v.clone() for k, v in whole.state_dict().items()}
    steps(whole, optimiser, range(3, 9))

    resumed, optimiser = small_network(wires, in_situ)
    steps(resumed, optimiser, [100])
    resumed.load_state_dict(kept)
    look(resumed)
    steps(resumed, optimiser, range(3, 9))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_an_anchored_layer_stays_near_the_exact_one_and_says_how_near():
    model, optimiser = small_network({**ANCHORED, "terminations": "role"}, False)
    exact, _ = small_network({**EVERY_UPDATE, "terminations": "role"}, False)
    errors = steps(model, optimiser, range(14))
    assert errors[0] == 0
    assert all(0 < e < 2e-2 for e in errors[1:])  # the drift itself, until a tile was solved again
    assert all(e < 1e-3 for e in errors[4:])
    ages = torch.cat([model[k].wire_age.flatten() for k in (0, 2)])
    assert ages.max() < 4
    for layer, twin in ((model[0], exact[0]), (model[2], exact[2])):
        twin.weight = layer.weight
        found, expected = layer.conductances(), twin.conductances()
        for a, b in ((found.g, expected.g), (found.back_g, expected.back_g)):
            off = ((a - b).norm() / b.norm()).item()
            assert 0 < off < 20 * layer.wire_error()
    assert errors[-1] < 3e-3
    assert exact[0].wire_error() == 0


def test_only_due_tiles_are_solved(monkeypatch):
    """8 tiles of 2 arrays, one in 4 an update; all at once only where that is asked for."""
    anchored = import_module("gpuxbar.ops.anchored_conductance")
    real, solved = anchored.effective_conductance, []

    def count(g, method, **wires):
        if method == "exact":
            solved.append(len(g))
        return real(g, method=method, **wires)

    monkeypatch.setattr(anchored, "effective_conductance", count)
    wires = {**OHMS, "anchor": "ladder", "refresh_interval": 4, "tolerance": 1.0}
    layer = AnalogLinear(32, 24, spec=spec(parasitics=wires))
    x = torch.randn(3, 32)
    for _ in range(9):
        layer(x), layer(x)
        with torch.no_grad():
            layer.weight *= 1 - 0.01 * torch.rand(layer.weight.shape)
    assert solved == [8] + [2] * 8
    with torch.no_grad():
        layer.weight.normal_()
    layer(x)
    assert solved[-1] == 2
    layer.restart_wires()
    layer(x)
    assert solved[-1] == 8


def test_calibration_solves_every_tile_as_the_first_read_would():
    wires = {**ANCHORED, "terminations": "line"}
    model, _ = gx.convert(nn.Sequential(nn.Linear(40, 30)), spec(parasitics=wires, adc={"bits": 8}))
    gx.calibrate(model, [torch.randn(20, 40)])
    assert (model[0].wire_age >= 0).all()
    with torch.no_grad():
        model(torch.randn(3, 40))
    assert model[0].wire_error() == 0


def test_the_error_of_wires_is_that_of_the_worst_tile():
    wires = {**ANCHORED, "terminations": "line", "refresh_interval": 1000, "tolerance": 1.0}
    layer = AnalogLinear(20, 15, spec=spec(parasitics=wires, mapping={"scheme": "subtracted", "w_max": 1.0}))
    with torch.no_grad():
        layer.weight.fill_(0.5)
        layer.conductances()
        layer.weight[0, 0] = 0.6  # of positive devices alone
        layer.conductances()
    (one,) = layer.wire_error_[layer.wire_error_ > 0]
    assert layer.wire_error_.numel() > 1
    assert layer.wire_error() == one.item()


def test_in_situ_training_begins_with_anchors_of_its_own():
    model, _ = small_network({**ANCHORED, "terminations": "line"}, True)
    layer, x = model[0], torch.randn(3, 20)
    for _ in range(2):  # the second time, the number of updates is that of the first
        with torch.no_grad():
            model(x)
            layer.weight.copy_(torch.randn(layer.weight.shape))
        layer.begin_in_situ()
        with torch.no_grad():
            model(x)
        assert layer.wire_error() == 0
        g = layer.g_cells.numpy().astype(np.float64)
        expected = np.subtract(*(by_tile(plane, source=20.0, sink=10.0) for plane in g))
        np.testing.assert_allclose(layer.conductances().g[0], expected, atol=2e-5 * np.abs(expected).max())
