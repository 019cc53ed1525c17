"""In-situ training on published devices: write noise, one-sided pairs with refresh."""

from __future__ import annotations

import copy
import re
from functools import partial

import pytest
import torch
from torch import nn

import gpuxbar as gx
from gpuxbar.nn import AnalogLinear
from gpuxbar.spec.devices import DEVICES, published_device


def layer_on(name, **overrides):
    torch.manual_seed(0)
    return AnalogLinear(12, 7, spec=published_device(name).spec(**overrides))


def train(layer, optimiser, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(16, 12, generator=generator)
        optimiser.zero_grad()
        (layer(x) - x[:, :7]).square().mean().backward()
        optimiser.step()


def run(layer, steps, seed=0):
    train(layer, gx.optim.InSituSGD(layer.parameters(), lr=0.05), steps, seed)


def trained_and_resumed(make, first=5, then=5):
    """A layer that was trained twice; one that was saved and loaded in between is the same."""
    whole, saved, loaded = (make() for _ in range(3))
    run(whole, first)
    run(whole, then, seed=1)
    run(saved, first)
    loaded.load_state_dict(saved.state_dict())
    run(loaded, then, seed=1)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key
    return whole


@pytest.mark.parametrize("name", DEVICES)
def test_layers_train_on_every_published_device(name):
    layer = layer_on(name)
    optimiser = gx.optim.InSituSGD(layer.parameters(), lr=0.05)
    train(layer, optimiser, 3)
    assert layer.weight.isfinite().all()
    assert (layer.g_held is not None) == (layer.spec.update.write_noise > 0)


@pytest.mark.parametrize("pulses", [None, {"length": 31}])
def test_a_step_takes_its_gradients_of_a_closure(pulses):
    """As after a backward pass of its own, whose loss it returns; with pulse trains, of operands kept meanwhile."""
    settings = {} if pulses is None else {"pulses": pulses}
    layers = [layer_on("capacitor", **settings) for _ in range(2)]
    x = torch.randn(16, 12)
    losses = []
    for layer, closed in zip(layers, (False, True), strict=True):
        optimiser = gx.optim.InSituSGD(layer.parameters(), lr=0.05)

        def backward(layer=layer, optimiser=optimiser):
            optimiser.zero_grad()
            loss = (layer(x) - x[:, :7]).square().mean()
            loss.backward()
            return loss

        before = layer.weight.detach().clone()
        if closed:
            losses.append(optimiser.step(backward))
        else:
            losses.append(backward())
            assert optimiser.step() is None
        assert not torch.equal(layer.weight, before)
    assert torch.equal(*losses)
    for key, value in layers[0].state_dict().items():
        assert torch.equal(value, layers[1].state_dict()[key]), key


def test_weights_lie_in_memory_as_they_like():
    layers = [layer_on("reram-sb") for _ in range(2)]
    layers[1].weight = nn.Parameter(layers[1].weight.detach().t().contiguous().t())
    for layer in layers:
        run(layer, 2)
        with torch.no_grad():
            layer.weight.mul_(1.0)  # another version, so that the next read looks whether the cells read it
        layer(torch.zeros(1, 12))
    assert not layers[1].weight.is_contiguous()
    torch.testing.assert_close(layers[1].weight, layers[0].weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("settings", "more"), [
    ({}, 0),
    ({"update": {"law": "soft_bounds", "step_spread": 0.1, "low_spread": 0.1, "high_spread": 0.1, "spread": 0.1}}, 0),
    ({"update": {"law": "soft_bounds", "write_noise": 1e-7}}, 8),
    ({"endurance": {"pulses": 1e6}}, 8),
    ({"retention": {"tau": 100.0, "spread": 0.1}}, 0),
], ids=["plain", "spread", "write noise", "endurance", "retention"])  # fmt: skip
def test_devices_take_the_memory_that_is_documented(settings, more):
    """Bytes a weight, in a checkpoint too; of measured devices 4 for each parameter."""
    spec = {"update": {"law": "soft_bounds", "step_spread": 0.1}, **settings}
    sliced = {"mapping": {"slices": 3, "slice_bits": 2}, "carry": {}}
    for parts, slices in ((spec, 1), (spec | sliced, 3)):
        layer = AnalogLinear(128, 128, bias=False, spec=gx.CrossbarSpec.model_validate(parts))
        digital = bytes_of(layer)
        gx.optim.InSituSGD(layer.parameters(), lr=0.1)
        assert (bytes_of(layer) - digital) / 128**2 == pytest.approx((8 + more) * slices, abs=0.1)
        before, law = bytes_of(layer), layer.spec.update
        if gx.ops.spread_names(law):
            layer.set_device_map(gx.ops.draw_device_map(law, tuple(layer.g_cells.shape), seed=0))
            measured = 4 * len(gx.ops.spread_names(law)) * slices
            assert (bytes_of(layer) - before) / 128**2 == measured


def bytes_of(layer):
    return sum(kept.nbytes for kept in layer.state_dict().values() if isinstance(kept, torch.Tensor))


def test_devices_with_write_noise_hold_what_they_do_not_show():
    layer = layer_on("reram-sb")
    optimiser = gx.optim.InSituSGD(layer.parameters(), lr=0.05)
    assert torch.equal(layer.g_held, layer.g_cells)
    assert layer.g_held.data_ptr() != layer.g_cells.data_ptr()
    train(layer, optimiser, 2)
    window, noise = layer.spec.device, layer.spec.update.write_noise
    off = layer.g_cells - layer.g_held
    assert off.std().item() == pytest.approx(noise, rel=0.2)
    pair = (layer.g_cells[0] - layer.g_cells[1]) / (window.g_max - window.g_min)
    torch.testing.assert_close(layer.weight, (pair * layer.w_max).T)


def test_reads_are_as_noisy_as_what_devices_show():
    noise = {"sigma_g": 1e-7, "exponent": 1.0}
    layer = layer_on("reram-sb", read_noise=noise)
    layer.begin_in_situ()
    layer.update_cells(torch.full((7, 12), 0.1))
    assert (layer.g_held - layer.g_cells).abs().max() > 1e-7
    expected = (1e-7 * layer.g_cells / layer.spec.device.g_max).square().sum(0, keepdim=True)
    torch.testing.assert_close(layer.conductances().noise_var, expected, rtol=1e-5, atol=0)


def test_stuck_devices_stay_at_both_ends_of_the_window():
    stuck = {"stuck_at_g_min": 0.2, "stuck_at_g_max": 0.3}
    spec = gx.CrossbarSpec(update={"law": "constant_step"}, mapping={"headroom": 2.0}, programming=stuck)
    layer, window = AnalogLinear(40, 30, spec=spec), spec.device
    layer.begin_in_situ()
    low, high = (torch.isclose(layer.g_cells, torch.tensor(end)) for end in (window.g_min, window.g_max))
    assert low.float().mean().item() == pytest.approx(0.2, abs=0.035)
    assert high.float().mean().item() == pytest.approx(0.3, abs=0.04)
    for change in (0.3, -0.6):
        before = layer.g_cells.clone()
        layer.update_cells(torch.full((30, 40), change) * layer.w_max[:, None])
        assert torch.equal(layer.g_cells == before, low | high)


def test_weights_at_the_bounds_of_their_cells_are_counted():
    spec = gx.CrossbarSpec(update={"law": "constant_step"}, mapping={"headroom": 2.0})
    layer = AnalogLinear(12, 8, spec=spec)
    layer.begin_in_situ()
    assert layer.clip_rate() == 0
    wanted = torch.full((8, 12), 0.8)
    wanted[:, ::4] = -2
    layer.update_cells(wanted * layer.w_max[:, None] - layer.weight)
    assert layer.clip_rate() == 0.25


@pytest.mark.parametrize("place", [{"reference_at": 0.25}, {}], ids=["placed", "balanced"])
def test_weights_beside_references_are_counted_where_their_devices_can_go_no_further(place):
    law = {"law": "constant_step", "sides": "reference", **place}
    layer = AnalogLinear(12, 8, spec=gx.CrossbarSpec(update=law, mapping={"w_max": 2.0}))
    layer.begin_in_situ()
    assert layer.clip_rate() == 0
    change = torch.zeros(8, 12)
    change[:, ::4], change[:2, 1] = -2, 2
    layer.update_cells(change)
    assert layer.clip_rate() == pytest.approx((24 + 2) / 96)


def test_a_column_of_zeros_has_room_to_train():
    spec = gx.CrossbarSpec(
        update={"law": "agarwal"}, mapping={"scheme": "subtracted", "scale": "column", "headroom": 2.0}
    )
    layer = AnalogLinear(3, 3, bias=False, spec=spec)
    weight = torch.tensor([[0.1, -0.4, 0.2], [0.0, 0.0, 0.0], [-0.04, 0.02, 0.03]])
    with torch.no_grad():
        layer.weight.copy_(weight)
    layer.begin_in_situ()
    torch.testing.assert_close(layer.w_max, torch.tensor([0.8, 0.8, 0.08]))
    torch.testing.assert_close(layer.weight.detach(), weight, rtol=1e-5, atol=1e-7)
    layer.update_cells(torch.full((3, 3), 0.1))
    torch.testing.assert_close(layer.weight[1], torch.full((3,), 0.1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", ["tensor", "column"])
def test_the_weight_of_a_full_pair_is_the_specs_where_it_says_one(scale):
    mapping = {"scheme": "subtracted", "scale": scale, "w_max": 0.5}
    spec = gx.CrossbarSpec.model_validate({"update": {"law": "ideal"}, "mapping": mapping})
    layer = AnalogLinear(3, 2, bias=False, spec=spec)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.1, -0.7, 0.2], [0.0, 0.0, 0.0]]))
    layer.begin_in_situ()
    assert layer.w_max.tolist() == [0.5, 0.5]
    assert layer.weight[0, 1].item() == pytest.approx(-0.5)
    layer.update_cells(torch.full((2, 3), 10.0))
    torch.testing.assert_close(layer.weight.detach(), torch.full((2, 3), 0.5), rtol=1e-5, atol=0)


def referred(mapping=None, **more):
    """A layer whose references lie at 0.25 of the window, and shares of full weights -0.5 .. 0.5 that it began with."""
    law = {
        "law": "soft_bounds",
        "up": 4 / 3,
        "down": 4.0,
        "pulses": 200,
        "sides": "reference",
        "reference_at": 0.25,
    }
    spec = gx.CrossbarSpec(update=law, mapping={"scheme": "subtracted", "w_max": 2.0}, **more)
    layer = AnalogLinear(40, 30, bias=False, spec=spec)
    share = torch.linspace(-0.5, 0.5, 1200).view(30, 40)
    with torch.no_grad():
        layer.weight.copy_(2 * share)
    layer.begin_in_situ()
    return layer, share


def test_devices_hold_whole_weights_beside_references_at_their_place():
    layer, share = referred()
    held, reference = ((cells - 1e-6) / 9e-6 for cells in layer.g_cells)
    torch.testing.assert_close(reference, torch.full_like(reference, 0.25), rtol=0, atol=1e-6)
    torch.testing.assert_close(held, (0.25 + share.T).clamp(min=0), rtol=0, atol=1e-6)
    torch.testing.assert_close(layer.weight.detach(), 2 * share.clamp(min=-0.25), rtol=0, atol=4e-6)
    first = layer.g_cells.clone()
    layer.update_cells(torch.full((30, 40), 0.1))
    assert torch.equal(layer.g_cells[1], first[1])
    assert (layer.g_cells[0] > first[0]).all()


def test_writes_leave_noise_on_devices_and_references_alike():
    noise, (quiet, _) = 2e-7, referred()
    layer, _ = referred(programming={"write_noise": noise})
    held, reference = (layer.g_cells - quiet.g_cells)[:, quiet.g_cells[0] > 2e-6].double()
    assert held.std().item() == pytest.approx(noise, rel=0.1)
    assert reference.std().item() == pytest.approx(noise, rel=0.1)
    assert abs(torch.corrcoef(torch.stack([held, reference]))[0, 1]) < 0.15


def test_opposite_pulses_lead_weights_to_0_where_references_lie_at_the_symmetry_point():
    """Of these soft bounds: down / up is 3, so steps are alike at a quarter of the window."""
    layer, _ = referred()
    for _ in range(300):
        for way in (1, -1):
            layer.update_cells(torch.full((30, 40), way * 2 / 200))
    assert layer.weight.abs().max() < 0.02


@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize("scheme", ["differential", "subtracted"])
def test_the_read_noise_of_both_devices_of_a_pair_adds_up(scheme, slices):
    """Variance of a product: sum over wordlines and slices k of x^2 16^k (s(g_pos) + s(g_neg)), s(g) = sigma_g^2 (g / g_max)^3."""
    mapping, noise = {"scheme": scheme}, {"sigma_g": 2e-8, "exponent": 1.5}
    parts = {"mapping": mapping, "read_noise": noise, "update": {"law": "agarwal"}}
    if slices > 1:
        mapping |= {"slices": slices, "slice_bits": 2}
        parts["carry"] = {"scheme": "accumulate"}
    spec = gx.CrossbarSpec.model_validate(parts)
    layer = AnalogLinear(20, 3, bias=False, spec=spec)
    layer.begin_in_situ()
    x, window = torch.randn(20), spec.device
    with torch.no_grad():
        y = layer(x.expand(4000, 20))
    of_pairs = (2e-8**2 * (layer.g_cells / window.g_max) ** 3).unflatten(0, (2, slices)).sum(0)
    variance = x.square() @ sum(16**k * pair for k, pair in enumerate(of_pairs))
    expected = variance.sqrt() * layer.w_max * layer.planes.unit
    torch.testing.assert_close(y.std(0), expected, rtol=0.05, atol=0)


@pytest.mark.parametrize("name", ["reram-sb", "pcm"])
def test_a_resumed_run_equals_an_uninterrupted_one(name):
    trained_and_resumed(partial(layer_on, name))


def test_one_sided_pairs_start_low_and_are_refreshed_before_they_saturate():
    layer = layer_on("pcm")
    before = layer.weight.detach().clone()
    optimiser = gx.optim.InSituSGD(layer.parameters(), lr=0.05)
    torch.testing.assert_close(layer.weight.detach(), before, rtol=1e-5, atol=1e-6)
    # one device of each pair at its lower end
    assert layer.g_cells.min(0).values.max().item() == pytest.approx(layer.spec.device.g_min, abs=1e-12)
    train(layer, optimiser, 10)
    assert layer.g_cells.min(0).values.median() > 1e-6  # up by now
    weight, cells = layer.weight.detach().clone(), layer.g_cells.clone()
    layer.refresh()
    torch.testing.assert_close(layer.weight.detach(), weight, rtol=1e-5, atol=1e-6)
    # both devices of a pair go down by as much, so far that one is at its lower end
    lowered = cells - (cells.min(0).values - layer.spec.device.g_min)
    torch.testing.assert_close(layer.g_cells, lowered, rtol=1e-5, atol=1e-11)
    assert layer.g_cells.min(0).values.max().item() == pytest.approx(layer.spec.device.g_min, abs=1e-12)


def test_refresh_lets_saturated_pairs_move_again():
    layer = layer_on(
        "pcm", update={"step_spread": 0.0, "asymmetry_spread": 0.0, "high_spread": 0.0, "cycle": 0.0}
    )
    layer.begin_in_situ()
    change = 0.2 * layer.w_max.max() * torch.ones_like(layer.weight)
    for step in range(30):
        layer.update_cells(change if step % 2 else -change)
    assert layer.saturation() == pytest.approx(1, abs=1e-5)
    answers = []
    for _ in range(2):
        before = layer.weight.detach().clone()
        layer.update_cells(0.01 * change)
        answers.append((layer.weight.detach() - before).mean() / (0.01 * change.mean()))
        layer.refresh()
    assert answers[0] < 0.01
    assert answers[1] > 1  # far from its bound this device makes more than nominal steps


REFRESH = {"interval": 3, "above": 0.4}


def test_pairs_that_fill_up_are_refreshed_as_the_spec_says():
    """Just before every third update, and these alone; else a layer moves as one without refresh."""
    quiet = {"step_spread": 0.0, "asymmetry_spread": 0.0, "high_spread": 0.0, "cycle": 0.0}
    layer, other = (layer_on("pcm", update=quiet, refresh=refresh) for refresh in (REFRESH, {}))
    for one in (layer, other):
        one.begin_in_situ()
    window = layer.spec.device
    top = window.g_min + REFRESH["above"] * (window.g_max - window.g_min)
    change = torch.zeros_like(layer.weight)
    change[:, :5] = 0.02 * layer.w_max.max()
    for step in range(6):
        due = step == 3
        assert torch.equal(layer.g_cells, other.g_cells) == (step < 4)
        before, weight = layer.g_cells.clone(), layer.weight.detach().clone()
        full = (before.amax(0) > top) & ((before[0] - before[1]).abs() <= top - window.g_min)
        for one in (layer, other):
            one.update_cells(change if step % 2 else -change)
        if due:
            assert 0 < full.sum() < full.numel()
            assert (layer.g_cells[:, full].amin(0) < before[:, full].amin(0)).all()
            assert torch.equal(layer.g_cells[:, ~full], other.g_cells[:, ~full])
            layer.refresh()
            other.refresh()
            torch.testing.assert_close(layer.weight[:, 5:], weight[:, 5:], rtol=1e-5, atol=1e-6)
    assert layer.refresh_step.item() == 6


def test_a_refresh_counts_shares_from_the_lower_end_and_writes_what_is_held():
    layer = layer_on("reram-sb", update={"sides": "one_sided"}, refresh={"interval": 1, "above": 0.2})
    layer.begin_in_situ()
    window = layer.spec.device
    span = window.g_max - window.g_min
    share = (layer.g_cells.amax(0) - window.g_min) / span
    full = (share > 0.1) & (share <= 0.2)  # those above would stay above
    assert 0 < full.sum() < (share > 0.1).sum() < full.numel()
    for cells in (layer.g_cells, layer.g_held):
        cells += 0.1 * span  # of both devices: the weights stay
    before = layer.g_cells.clone()
    layer.update_cells(torch.zeros_like(layer.weight))
    assert torch.equal(layer.g_cells, before)  # the first update follows none
    layer.update_cells(torch.zeros_like(layer.weight))
    assert torch.equal(layer.g_cells[:, ~full], before[:, ~full])
    lowered = (before - 0.1 * span)[:, full]
    torch.testing.assert_close(layer.g_cells[:, full], lowered, rtol=1e-4, atol=0)
    assert torch.equal(layer.g_held, layer.g_cells)


def test_a_refresh_leaves_pairs_that_cannot_be_written_to_training():
    """Of a device stuck at the upper end, or failed there, the other one makes up; to reset that one would undo it."""
    settings = {
        "update": {"law": "constant_step", "sides": "one_sided", "pulses": 100, "asymmetry": 0.0},
        "programming": {"stuck_at_g_max": 0.1}, "endurance": {"pulses": 1e9}, "refresh": {"interval": 1},
    }  # fmt: skip
    layer = AnalogLinear(12, 7, spec=gx.CrossbarSpec.model_validate(settings | {"device": {"g_max": 1e-5}}))
    layer.begin_in_situ()
    stuck = layer.g_cells >= 0.999 * layer.spec.device.g_max
    layer.pulse_count[:, 0, 0] = torch.tensor([-1, 0])
    layer.g_cells[0, 0, 0] = layer.spec.device.g_max
    stuck[0, 0, 0] = True
    layer.begin_in_situ()
    for _ in range(12):
        layer.update_cells(-0.3 * layer.weight.detach())
    either = stuck.any(0).t()
    assert 3 < either.sum() < 40
    assert layer.g_cells[0, 0, 0] == layer.spec.device.g_max
    assert (layer.weight.abs() < 0.05 * layer.w_max.max()).all()


@pytest.mark.parametrize(
    ("device", "settings"),
    [
        ("pcm", {}),
        ("gokmen-vlasov", {"update": {"sides": "one_sided"}, "pulses": {"length": 31}}),
        ("reram-sb", {"update": {"sides": "one_sided"}}),  # with write noise: what is held is written too
    ],
)
def test_refreshes_go_on_where_a_run_is_resumed(device, settings):
    whole = trained_and_resumed(partial(layer_on, device, refresh=REFRESH, **settings), 2, 3)
    never = layer_on(device, **settings)
    run(never, 2)
    run(never, 3, seed=1)
    assert not torch.equal(whole.weight, never.weight)


def test_each_refresh_writes_with_its_own_noise():
    layer = layer_on("reram-sb", programming={"write_noise": 2e-7})
    layer.begin_in_situ()
    noise = []
    for _ in range(2):
        window, share = layer.spec.device, (layer.weight.detach() / layer.w_max.view(-1, 1)).T
        layer.refresh()
        noise.append(layer.g_cells[0] - window.g_min - (share + 1) / 2 * (window.g_max - window.g_min))
    assert torch.corrcoef(torch.stack([n.flatten() for n in noise]))[0, 1].abs() < 0.4
    assert noise[0].std().item() == pytest.approx(2e-7, rel=0.3)


def test_only_layers_trained_in_situ_are_refreshed():
    with pytest.raises(
        ValueError, match=re.escape("linear: `refresh` must follow begin_in_situ(), got a layer that")
    ):
        layer_on("pcm").refresh()
    layer = layer_on("pcm")
    layer.begin_in_situ()
    with pytest.raises(
        ValueError, match="linear: `above` must be above 0 and at most 1, got 75; it is a share"
    ):
        layer.refresh(above=75)
    assert layer_on("pcm").saturation() == 0


def test_a_step_sets_the_weight_where_it_lies_and_autograd_knows():
    layer = layer_on("reram-sb")
    optimiser = gx.optim.InSituSGD(layer.parameters(), lr=0.5)
    x = torch.randn(3, layer.weight.shape[1], requires_grad=True)
    y = x @ layer.weight.T  # its gradient needs the weight as it was
    layer.weight.grad = torch.ones_like(layer.weight)
    place, before = layer.weight.data_ptr(), layer.weight.detach().clone()
    optimiser.step()
    assert layer.weight.data_ptr() == place
    assert (layer.weight < before).float().mean() > 0.7
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_opcheck():
    spec = published_device("reram-sb").spec().model_dump_json()
    g = torch.rand(2, 5, 6) * 9e-6 + 1e-6
    change = (
        torch.randn(1, 6, 5),
        -0.1,
        torch.empty(1, 6, 5),
        torch.ones(6),
        torch.ones(1, dtype=torch.int64),
    )
    update = torch.ops.gpuxbar.device_update.default
    torch.library.opcheck(update, (g, g.clone(), None, None, spec, 3, *change))
    quiet = published_device("ecram").spec().model_dump_json()
    torch.library.opcheck(update, (g, None, None, None, quiet, 3, *change))


def test_a_weight_whose_layer_is_gone_is_refused():
    weight = layer_on("ecram").weight
    with pytest.raises(
        ValueError, match=r"`params` must be weights of living layers, got one of shape \(7, 12\)"
    ):
        gx.optim.InSituSGD([weight], lr=0.05)


def test_a_weight_on_two_arrays_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    tied, _ = gx.convert(model, gx.CrossbarSpec(update={"law": "ideal"}))
    for copied in (tied, copy.deepcopy(tied)):
        with pytest.raises(ValueError, match=r"must each be one layer's weight, got one that . and . hold"):
            gx.optim.InSituSGD(copied.parameters(), lr=0.1)
    copied[1].weight = nn.Parameter(copied[1].weight.detach().clone())
    gx.optim.InSituSGD(copied.parameters(), lr=0.1)
