"""What a layer keeps of its past: checkpoints of other settings, copies, other weights, reads that were refused."""

from __future__ import annotations

import copy
import io
import re

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel

import gpuxbar as gx
from gpuxbar.bridge.device_update import require_finite_gradient
from gpuxbar.nn import AnalogConv2d, AnalogLinear
from gpuxbar.nn.programmed import Mark
from gpuxbar.nn.recurrent import UnfusedRNN

TRAINED = {"update": {"law": "constant_step"}}


def linear(**settings):
    torch.manual_seed(0)
    return AnalogLinear(20, 8, spec=gx.CrossbarSpec.model_validate(settings))


def held(programmed):
    """A layer whose devices are programmed, or trained in situ, and hold its weight."""
    layer = linear(**TRAINED)
    if programmed:
        gx.program(layer)
    else:
        layer.begin_in_situ()
    return layer


def inputs(n=32):
    return torch.randn(n, 20, generator=torch.Generator().manual_seed(1))


def state_of(layer):
    return copy.deepcopy(layer.state_dict())


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def error(y, layer):
    ideal = nn.functional.linear(inputs(), layer.weight, layer.bias)
    return ((y - ideal).abs().max() / ideal.abs().max()).item()


def test_a_running_range_that_has_seen_nothing_is_that_of_the_call():
    layer = linear(dac={"bits": 8, "range": "ema"}).eval()
    assert error(layer(inputs()), layer) < 0.02
    assert layer.dac_max == 0
    layer.train()(inputs())
    assert layer.dac_max == inputs().abs().max()
    assert torch.equal(
        layer.eval()(2 * inputs()), layer(inputs().sign() * layer.dac_max.minimum(2 * inputs().abs()))
    )


@pytest.mark.parametrize("bits", [8, None])
def test_what_a_running_range_cuts_off_has_no_gradient(bits):
    layer = linear(dac={"bits": bits, "range": "ema"})
    layer(inputs())
    top, x = layer.eval().dac_max.item(), (2 * inputs()).requires_grad_()
    y = layer(x)
    y.sum().backward()
    beyond = x.detach().abs() > top
    assert beyond.any()
    assert torch.equal(x.grad == 0, beyond)
    assert torch.equal(y, layer(x.detach().clamp(-top, top)))


@pytest.mark.parametrize(
    "dac", [{"range": "ema"}, {"range": "fixed", "max": 2.0}, {"range": "learned", "max": 2.0}]
)
def test_values_at_the_edge_of_a_range_have_all_of_their_gradient(dac):
    """As the largest of the first batch, which makes a running range."""
    layer = linear(dac={"bits": 8, **dac}, backward={"mode": "ideal"})
    x = inputs().clamp(-2, 2).requires_grad_()
    layer(x).sum().backward()
    assert (x.detach().abs() == layer.dac_max).any()
    torch.testing.assert_close(x.grad, layer.weight.detach().sum(0).expand_as(x))


@pytest.mark.parametrize("assign", [False, True])
def test_a_learned_range_begins_as_the_spec_says_where_another_kind_has_none(assign):
    layer = linear(dac={"bits": 8, "range": "learned", "max": 4.0})
    saved = linear(dac={"bits": 8, "range": "tensor"}).state_dict()
    before = copy.deepcopy(saved)
    layer.load_state_dict(saved, assign=assign)
    assert all(torch.equal(value, before[key]) for key, value in saved.items())
    layer(inputs())
    assert layer.dac_max == 4.0


def test_a_running_range_goes_on_by_its_momentum():
    layer = linear(dac={"bits": 8, "range": "ema", "momentum": 0.75})
    for factor in (1.0, 2.0):
        layer(factor * inputs())
    torch.testing.assert_close(layer.dac_max, 1.25 * inputs().abs().max().view(1))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("other", [{"range": "tensor"}, {"range": "fixed", "max": 40.0}])
def test_the_spec_says_a_fixed_range_whatever_was_saved(other, assign):
    worst = {"bits": 8, "range": "worst_case"}
    layer = linear(dac={"bits": 8, "range": "fixed", "max": 4.0}, adc=worst)
    full = layer.adc_range.clone()
    saved = linear(dac={"bits": 8, **other}, adc=worst, device={"g_max": 2e-5}).state_dict()
    before = copy.deepcopy(saved)
    layer.load_state_dict(saved, assign=assign)
    assert layer.dac_max == 4.0
    assert torch.equal(layer.adc_range, full)
    assert all(torch.equal(value, before[key]) for key, value in saved.items())


@pytest.mark.parametrize(
    "x",
    [torch.full((3, 20), torch.nan), torch.full((3, 20), torch.inf), torch.zeros(3, 19)],
)
def test_a_refused_read_leaves_no_trace(x):
    layer = linear(dac={"bits": 8, "range": "ema"})
    layer(inputs())
    before = state_of(layer)
    with pytest.raises(ValueError, match="must"):
        layer(x)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stride", (2, 2)),
        ("padding", (1, 1)),
        ("dilation", (2, 2)),
        ("padding_mode", "circular"),
        ("groups", 1),
    ],
)
def test_what_a_layer_was_made_by_stays(key, value):
    """It would not follow."""
    layer = AnalogConv2d(4, 6, 3, groups=2, spec=gx.CrossbarSpec())
    setattr(layer, key, value)
    with pytest.raises(
        ValueError,
        match=rf"conv: `{key}` must stay .* as the layer was made, got {re.escape(repr(value))}; change",
    ):
        layer(torch.zeros(2, 4, 7, 7))
    with pytest.raises(ValueError, match="conv: `spec` must stay what the layer was made by, got another"):
        layer.spec = layer.spec.with_overrides({"seed": 3})


@pytest.mark.parametrize(
    "dac", [{"range": "tensor"}, {"range": "fixed", "max": 0.1}, {"range": "fixed", "max": 40.0}]
)
def test_ranges_are_calibrated_as_the_dac_drives(dac):
    """Of every partial sum, the largest; a DAC whose range clips drives more lines fully, a wide one fewer."""
    layer = linear(tile={"rows": 8}, dac={"bits": 8, **dac}, adc={"bits": 8, "percentile": 100})
    gx.calibrate(layer, [inputs()])
    top = dac.get("max", inputs().abs().max())
    volts = (inputs().clamp(-top, top) / top * 127).round() / 127 * layer.spec.dac.v_read
    g = layer.conductances().g
    sums = [volts[:, t : t + 8] @ plane[t : t + 8] for plane in g for t in (0, 8, 16)]
    assert layer.adc_range.item() == pytest.approx(max(s.abs().max().item() for s in sums), rel=1e-5)


def test_images_are_calibrated_by_the_range_of_the_image():
    """Dim patches of images with a bright pixel, which is under no kernel, drive little."""
    spec = gx.CrossbarSpec.model_validate({"dac": {"bits": 8, "range": "sample"}, "adc": {"bits": 8}})
    layer, ranges = AnalogConv2d(1, 2, 1, stride=2, spec=spec), []
    for corner in (0.1, 1.0):
        x = torch.full((40, 1, 4, 4), 0.1)
        x[:, 0, 3, 3] = corner
        gx.calibrate(layer, [x])
        ranges.append(layer.adc_range.item())
    assert ranges[1] / ranges[0] == pytest.approx(13 / 127)


def test_images_are_calibrated_as_they_are_padded():
    """A bright pixel in the corner comes under every weight of a kernel only around the edges."""
    spec = gx.CrossbarSpec.model_validate({"adc": {"bits": 8, "percentile": 100}})
    layer, ranges = AnalogConv2d(1, 2, 3, padding=1, padding_mode="circular", spec=spec), []
    nn.init.constant_(layer.weight, 0.01)
    with torch.no_grad():
        layer.weight[:, :, 2, 2] = 1.0
    x = torch.zeros(1, 1, 4, 4)
    x[..., 0, 0] = 1.0
    for images in (x, x.roll((2, 2), (2, 3))):
        gx.calibrate(layer, [images])
        ranges.append(layer.adc_range.item())
    assert ranges[0] == pytest.approx(ranges[1], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_copies_trained_in_situ_are_read_in_any_precision(dtype):
    model, _ = gx.convert(nn.Sequential(nn.Linear(20, 8)), gx.CrossbarSpec.model_validate(TRAINED))
    model = model.to(dtype)
    optimiser = gx.optim.InSituSGD(model.parameters(), lr=0.1)
    x = inputs().to(dtype)
    model(x).square().mean().backward()
    optimiser.step()
    y = model(x)
    for other in (copy.deepcopy(model), saved(model)):
        other[0].load_state_dict(model[0].state_dict())
        assert torch.equal(other(x), y)
        with torch.no_grad():
            other[0].weight[0, 0] += 0.1
        with pytest.raises(ValueError, match="must be what the cells read"):
            other(x)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved])
@pytest.mark.parametrize("programmed", [True, False])
def test_a_copy_is_as_good_as_the_original(copied, programmed):
    """Changed weights are refused, be they changed before or after the copy, and once or as often as before."""
    layer, text = held(programmed=False), "must be what the cells read"
    if programmed:
        gx.program(layer)
        text = "must stay as it was programmed"
    twin = copied(layer)
    assert torch.equal(twin(inputs()), layer(inputs()))
    with torch.no_grad():
        twin.weight.mul_(2)
    for changed in (twin, copied(twin)):
        with pytest.raises(ValueError, match=text):
            changed(inputs())


@pytest.mark.parametrize("programmed", [True, False])
def test_other_weights_for_a_call_are_not_read_from_the_same_devices(programmed):
    layer = held(programmed)
    y = layer(inputs())
    other = torch.zeros_like(layer.weight)
    while other._version != layer.weight._version:
        other.add_(1)
    with pytest.raises(ValueError, match="`weight` must"):
        functional_call(layer, {"weight": other}, inputs())
    torch.testing.assert_close(layer(inputs()), y)


@pytest.mark.parametrize("programmed", [True, False])
def test_another_weight_in_the_place_of_a_freed_one_is_refused(programmed):
    layer = held(programmed)
    version = layer.weight._version
    place = id(layer.weight)
    for _ in range(50):
        layer.weight = nn.Parameter(torch.zeros(8, 20))
        if id(layer.weight) == place:
            break
    with torch.no_grad():
        while layer.weight._version != version:
            layer.weight.add_(1)
    with pytest.raises(ValueError, match="`weight` must"):
        layer(inputs())


@pytest.mark.parametrize("change", ["another", "values", "place"])
def test_a_mark_without_a_checksum_tells_weights_apart(change):
    """As one of a GPU, which would have to be waited for."""
    weight = nn.Parameter(torch.ones(2))
    mark = Mark.of(weight)._replace(checksum=None)
    assert mark.is_of(weight)
    if change == "values":
        weight.detach().add_(1)
    if change == "place":
        weight.data = weight.detach().clone()
    assert not mark.is_of(weight.view_as(weight) if change == "another" else weight)


def test_a_weight_of_nan_is_not_what_cells_read():
    layer = linear(**TRAINED)
    layer.begin_in_situ()
    with torch.no_grad():
        layer.weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match="must be what the cells read once trained in situ, got 1 other"):
        layer(inputs())


def halve(weight):
    with torch.no_grad():
        weight.mul_(0.5)


def put(weight):  # as torch.nn.utils.vector_to_parameters does, and autograd does not count
    weight.data = weight.data * 0.5


def scale(weight):  # as an average of weights is put into a model
    weight.data.mul_(0.5)


def exchange(weight):
    weight.data[:2] = weight.data[:2].flip(0)


def fused(weight):
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.1, fused=True).step()


CHANGES = pytest.mark.parametrize("change", [halve, put, scale, exchange, fused])


@CHANGES
def test_another_weight_than_the_programmed_is_refused(change):
    """Not one that moves with its model."""
    layer = linear()
    gx.program(layer)
    y = layer(inputs())
    torch.testing.assert_close(layer.double()(inputs()).float(), y)
    change(layer.weight)
    with pytest.raises(ValueError, match="`weight` must stay as it was programmed"):
        layer(inputs())


@CHANGES
@pytest.mark.parametrize("act", ["update", "relax", "program", "read"])
def test_a_weight_that_something_else_changed_is_not_lost(act, change):
    layer = linear(**TRAINED, retention={"tau": 10.0})
    layer.begin_in_situ()
    change(layer.weight)
    before = state_of(layer)
    acts = {
        "update": lambda: layer.update_cells(torch.ones_like(layer.weight)),
        "relax": layer.relax,
        "program": layer.program,
        "read": lambda: layer(inputs()),
    }
    with pytest.raises(ValueError, match="must be what the cells read"):
        acts[act]()
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"device": {"g_max": 2e-5}}, r"g_max 1e-05 \(here 2e-05\)"),
        ({"device": {"g_min": 2e-6}}, r"g_min 1e-06 \(here 2e-06\)"),
        (
            {**TRAINED, "carry": {"scheme": "accumulate", "headroom_bits": 2}},
            r"headroom_bits 0 \(here 2\)",
        ),
        ({"mapping": {"slices": 2, "slice_bits": 4}}, r"slice_bits 3 \(here 4\)"),
        (
            {"mapping": {"slices": 2, "slice_bits": 3, "line_order": "position_channel"}},
            r"line_order 0 \(here 1\)",
        ),
    ],
)
def test_programmed_devices_that_mean_other_weights_are_refused(change, text):
    settings = {"mapping": {"slices": 2, "slice_bits": 3}}
    layer, other = (
        AnalogConv2d(3, 4, 2, spec=gx.CrossbarSpec.model_validate({**settings, **more}))
        for more in ({}, change)
    )
    gx.program(layer)
    before = state_of(other)
    with pytest.raises(ValueError, match=f"must be of devices that hold weights as here, got {text}"):
        other.load_state_dict(layer.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize(
    ("there", "here", "text"),
    [
        ({}, {"update": None}, "`spec.update` must be an update law to load cells trained in situ, got None"),
        ({}, {"update": {"law": "constant_step", "write_noise": 1e-7}}, "with `spec.update.write_noise` as here, got one that lacks g_held"),
        ({"endurance": {"pulses": 9.0}}, {}, "without `spec.endurance.pulses` as here, got one that has pulse_count"),
        ({}, {"carry": {}, "mapping": {"slices": 2, "slice_bits": 2}}, "with `spec.carry` as here, got one that lacks carry_step"),
        ({}, {"update": {"law": "constant_step", "sides": "one_sided"}, "refresh": {"interval": 9}}, "with `spec.refresh.interval` as here, got one that lacks refresh_step"),
    ],
    ids=["no-law", "write-noise", "endurance", "carry", "refresh"],
)  # fmt: skip
def test_cells_trained_by_other_means_are_refused(there, here, text):
    trained, other = linear(**TRAINED, **there), linear(**{**TRAINED, **here})
    trained.begin_in_situ()
    before = state_of(other)
    with pytest.raises(ValueError, match=re.escape(text)):
        other.load_state_dict(trained.state_dict())
    assert str(other.state_dict()) == str(before)


class Dropped(nn.Module):
    def forward(self, weight):
        return nn.functional.dropout(weight, 0.5)


def test_a_weight_computed_at_random_is_that_of_the_read_and_of_its_gradient():
    layer = linear()
    parametrize.register_parametrization(layer, "weight", Dropped())
    x, sources = inputs(), (layer.parametrizations.weight.original, layer.bias)
    found = []
    for product in (layer, lambda x: nn.functional.linear(x, layer.weight, layer.bias)):
        torch.manual_seed(3)
        y = product(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), sources)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


WIRED = {"parasitics": {"r_wordline": 20.0, "r_bitline": 20.0, "terminations": "line"}}


def test_a_weight_that_was_read_can_be_exchanged():
    layer, other = linear(), linear().weight
    layer(inputs())
    with torch.no_grad():
        other *= 2
    torch.utils.swap_tensors(layer.weight, other)  # as modules do on conversion, where torch is asked to
    torch.testing.assert_close(layer(inputs()), nn.functional.linear(inputs(), layer.weight, layer.bias))


@pytest.mark.parametrize("settings", [{}, WIRED], ids=["ideal", "wired"])
@pytest.mark.parametrize("other", ["weight", "devices", "age", "own"])
def test_a_backward_pass_reads_the_devices_of_its_forward_pass(other, settings):
    """Though another weight, or the same once more, was written to the array in between, or time has passed, or the layer reads its
    own weights again."""
    spread = {"programming": {"write_noise": 5e-7, "device_spread": 0.1}, "drift": {"nu": 0.2}}
    layer = linear(**spread, **settings)
    if other in ("age", "own"):
        gx.program(layer)
        gx.age(layer, "1d")
    x = inputs().requires_grad_()
    y = layer(x)
    expected = torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0]
    if other == "weight":
        functional_call(layer, {"weight": 2 * layer.weight.detach().flip(0)}, (x.detach(),))
    elif other == "devices":
        layer.rewrite()
    elif other == "age":
        gx.age(layer, "1y")
    else:
        gx.unprogram(layer)
    if other != "weight":
        assert not torch.equal(layer(x), y)
    assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], expected)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("way", [prune.random_unstructured, parametrizations.weight_norm])
def test_computed_weights_of_recurrent_layers_are_those_of_now(kind, way):
    """Pruning sets them just before each call of a layer."""
    digital = UnfusedRNN(kind(3, 5))
    analog, _ = gx.convert(digital, gx.CrossbarSpec())
    for model in (digital, analog):
        torch.manual_seed(1)
        way(model.hh_l0, "weight", **({"amount": 0.5} if way is prune.random_unstructured else {}))
    x = torch.randn(4, 2, 3)
    for model in (digital, analog):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(2):
            optimiser.zero_grad()
            model(x)[0].square().mean().backward()
            optimiser.step()
    torch.testing.assert_close(analog(x)[0], digital(x)[0])


def test_computed_weights_are_not_on_devices_that_are_written_once():
    layer = linear(**TRAINED, dac={"bits": 8, "range": "learned", "max": 1.0})
    parametrizations.weight_norm(layer)
    layer(inputs()).sum().backward()
    assert gx.convert(layer, layer.spec)[1].rows[0].why == "already so"
    for act in (layer.program, layer.begin_in_situ):
        with pytest.raises(
            ValueError, match=r"`weight` must be a parameter for \w+, got one that is computed anew"
        ):
            act()
    with pytest.raises(ValueError, match="without pruning or parametrisations"):
        gx.optim.InSituSGD(layer.parameters(), lr=0.1)
    parametrize.remove_parametrizations(layer, "weight")
    gx.optim.InSituSGD(layer.parameters(), lr=0.1)  # which trains a DAC range as before
    assert layer.in_situ


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = linear()
        self.embed = nn.Embedding(8, 20)
        self.embed.weight = self.out.weight

    def forward(self, indices):
        return self.out(self.embed(indices))


def test_programmed_devices_of_a_shared_weight_are_loaded():
    """The embedding, too, loads it; a weight that changes before anything is read is still another."""
    words, models = torch.tensor([1, 5, 5]), [Tied() for _ in range(2)]
    gx.program(models[0])
    with torch.no_grad():
        models[1].out.weight += 1.0
    models[1].load_state_dict(models[0].state_dict())
    assert torch.equal(models[1](words), models[0](words))
    models[1].load_state_dict(models[0].state_dict())
    with torch.no_grad():
        models[1].embed.weight += 1.0
    with pytest.raises(ValueError, match="`weight` must stay as it was programmed"):
        models[1](words)
    models[1].load_state_dict(models[0].state_dict())
    gx.unprogram(models[1])
    with torch.no_grad():
        models[1].embed.weight += 1.0
    gx.program(models[1])
    models[1](words)


def test_programmed_devices_age_alike_in_a_model_of_another_seed_and_name():
    drift = {"drift": {"nu": 0.05, "nu_std": 0.02}}
    layer = linear(**drift)
    other = AnalogLinear(20, 8, spec=gx.CrossbarSpec.model_validate({**drift, "seed": 2**62 + 5}), name="b")
    gx.program(layer)
    gx.age(layer, "1h")
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(inputs()), layer(inputs()))
    twin = saved(other)
    for model in (layer, other, twin):
        gx.age(model, "1y")
    assert torch.equal(other(inputs()), layer(inputs()))
    assert torch.equal(twin(inputs()), layer(inputs()))
    gx.program(other)
    gx.program(layer)
    for model in (layer, other):
        gx.age(model, "1y")
    assert not torch.equal(other(inputs()), layer(inputs()))


CARRIED = {
    "mapping": {"slices": 2, "slice_bits": 3}, "carry": {"interval": 1}, "retention": {"tau": 50.0, "spread": 0.3},
}  # fmt: skip
PULSED = {"pulses": {}, "endurance": {"pulses": 90.0, "spread": 0.5}}


@pytest.mark.parametrize(
    ("algorithm", "way"), [("sgd", CARRIED), ("sgd", PULSED), ("chopped-tiki-taka-v2", CARRIED)]
)
def test_cells_are_trained_alike_in_a_model_of_another_seed_and_name(algorithm, way):
    """Their spread, what is drawn for their updates, and how they age afterwards."""
    law = {"law": "soft_bounds", "step_spread": 0.3, "cycle": 0.2}
    settings = {
        "update": law,
        "programming": {"device_spread": 0.1},
        "drift": {"nu": 0.05, "nu_std": 0.02},
        **way,
    }

    def begin(layer):
        return gx.optim.build_optimizer(algorithm, layer, lr=0.1)

    def step(layer, optimiser):
        optimiser.zero_grad()
        layer(inputs()).square().mean().backward()
        optimiser.step()

    layer = linear(**settings)
    other = AnalogLinear(
        20, 8, spec=gx.CrossbarSpec.model_validate({**settings, "seed": 2**62 + 5}), name="b"
    )
    optimisers = [begin(one) for one in (layer, other)]
    step(layer, optimisers[0])
    other.load_state_dict(layer.state_dict())
    optimisers[1].load_state_dict(optimisers[0].state_dict())
    twin = saved(other)
    for one, optimiser in ((layer, optimisers[0]), (other, optimisers[1])):
        for _ in range(2):
            step(one, optimiser)
        gx.program(one)
        gx.age(one, "1y")
    assert twin.seed_of_cells == layer.plan.seed
    for key, value in layer.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    gx.unprogram(other)
    other.begin_in_situ()
    assert other.seed_of_cells == other.plan.seed != layer.plan.seed


@pytest.mark.parametrize(
    "change",
    [
        {"parasitics": {"r_wordline": 2.0}}, {"parasitics": {"anchor": "mean_field"}}, {"parasitics": {"r_sink": 20.0}},
        {"device": {"g_max": 9e-5}}, {"seed": 1},
    ],
)  # fmt: skip
def test_anchors_of_other_wires_are_solved_anew(change):
    wires = {"r_wordline": 20.0, "terminations": "line", "anchor": "ladder", "refresh_interval": 10}
    base = gx.CrossbarSpec.model_validate(
        {"device": {"g_max": 1e-4}, "programming": {"stuck_at_g_min": 0.1}, "parasitics": wires}
    )
    layer, fresh, loaded = (linear(**base.with_overrides(more).model_dump()) for more in ({}, change, change))
    layer(inputs())
    loaded.load_state_dict(layer.state_dict())
    assert torch.equal(loaded(inputs()), fresh(inputs()))


def test_anchors_of_a_layer_of_another_name_are_solved_anew():
    """Its devices are others, though their weights are the same."""
    wires = {"r_wordline": 20.0, "terminations": "line", "anchor": "ladder", "refresh_interval": 10}
    spec = gx.CrossbarSpec.model_validate({"programming": {"device_spread": 0.3}, "parasitics": wires})
    layer, fresh, loaded = (AnalogLinear(20, 8, spec=spec, name=name) for name in "abb")
    fresh.load_state_dict({key: layer.state_dict()[key] for key in ("weight", "bias")}, strict=False)
    layer(inputs())
    loaded.load_state_dict(layer.state_dict())
    assert torch.equal(loaded(inputs()), fresh(inputs()))


def test_gradients_of_values_are_driven_in_one_phase():
    """Whatever the polarity of an unsigned DAC without bits says."""
    layer = linear(dac={"signed": False, "polarity": "two_phase"}, adc={"bits": 12, "range": "worst_case"})
    x = inputs().abs().requires_grad_()
    grad = torch.randn(32, 8, generator=torch.Generator().manual_seed(2))
    layer(x).backward(grad)
    ideal = grad @ layer.weight.detach()
    assert (x.grad - ideal).abs().max() < 0.02 * ideal.abs().max()


@pytest.mark.parametrize("last", [False, True])
def test_gradients_of_gradients_are_refused(last):
    """They would lack what goes through the arrays, where digital layers let the rest through; where the layer is the last one, all
    of it."""
    layer, x = linear(dac={"bits": 8}), inputs().requires_grad_()
    y = layer(x.sin())
    (grad,) = torch.autograd.grad((y if last else y.square()).sum(), x, create_graph=True)
    with pytest.raises(ValueError, match="must not be differentiated again, got a second derivative"):
        grad.square().sum().backward(retain_graph=True)
    with pytest.raises(ValueError, match="must not be differentiated again"):
        torch.autograd.grad(grad.square().sum(), layer.weight, allow_unused=True)


@pytest.mark.parametrize("kind", [nn.Linear, nn.RNN, nn.LSTM])
def test_products_with_a_hessian_are_refused(kind):
    """By `torch.autograd.grad`, which looks only where it is asked to, and would find zeros."""
    spec = gx.CrossbarSpec.model_validate({"dac": {"bits": 8}})
    model, _ = gx.convert(nn.Sequential(kind(6, 5)), spec)
    x, weights = torch.randn(4, 3, 6), [p for p in model.parameters() if p.dim() > 1]
    y = model(x)
    grads = torch.autograd.grad((y if kind is nn.Linear else y[0]).square().sum(), weights, create_graph=True)
    for weight, grad in zip(weights, grads, strict=True):
        with pytest.raises(ValueError, match="must not be differentiated again"):
            torch.autograd.grad(grad.sum(), weight, allow_unused=True, retain_graph=True)


def test_gradients_that_nothing_trained_has_a_part_in_are_refused_too():
    """Of a frozen last layer, beside a penalty that has a gradient."""
    layer, x = linear(dac={"bits": 8}).requires_grad_(False), inputs().requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(ValueError, match="must not be differentiated again"):
        (grad.square().sum() + x.square().sum()).backward()


def test_products_with_a_hessian_through_a_frozen_layer_are_refused():
    layer, first = linear(dac={"bits": 8}).requires_grad_(False), nn.Linear(6, 20)
    y = layer(first(torch.randn(4, 6)))
    (grad,) = torch.autograd.grad(y.square().sum(), first.weight, create_graph=True)
    with pytest.raises(ValueError, match="must not be differentiated again"):
        torch.autograd.grad(grad.sum(), first.weight, allow_unused=True)


@pytest.mark.parametrize("algorithm", ["InSituSGD", "MixedPrecision", "TikiTaka"])
@pytest.mark.parametrize("bad", ["nan", "weight", "programmed", "idle", "rate"])
def test_a_step_is_refused_before_it_changes_anything(algorithm, bad):
    forgets = {"retention": {"tau": 50.0}} if bad == "idle" else {}
    model = nn.Sequential(linear(**TRAINED), nn.Linear(8, 8), linear(**TRAINED, **forgets, seed=1))
    groups = [{"params": [*part.parameters()]} for part in model]  # looked at before any is written
    optimiser = getattr(gx.optim, algorithm)(groups, lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    last, text = model[2], "`weight` must"
    if bad == "nan":
        last.weight.grad[1, 1], text = torch.nan, f"{algorithm}: the gradient of linear must be finite, got 1"
    elif bad == "weight":
        last.weight.data[0, 0] += 1.0
        torch.autograd.graph.increment_version(last.weight)
    elif bad == "rate":
        optimiser.param_groups[-1]["lr"], text = torch.inf, f"{algorithm}: `lr` must be finite and at least 0"
    else:
        gx.program(last)
        if bad == "idle":  # not updated, but its devices would decay
            last.weight.grad = None
    before, kept = state_of(model), copy.deepcopy(optimiser.state_dict())
    with pytest.raises(ValueError, match=text):
        optimiser.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert str(optimiser.state_dict()) == str(kept)


@pytest.mark.parametrize(
    ("op", "act"),
    [
        ("calibrate", lambda model: gx.calibrate(model, [inputs()])),
        ("program", gx.program),
        ("InSituSGD", lambda model: gx.optim.InSituSGD(model.parameters(), lr=0.1)),
    ],
)
def test_layers_of_one_seed_are_refused(op, act):
    """Made by hand, without names: their devices and noise would be the same."""
    model = nn.Sequential(linear(**TRAINED), nn.Linear(8, 20), linear(**TRAINED))
    with pytest.raises(
        ValueError,
        match=rf"{op}: crossbar layers must each have a name, .*, got 'linear' twice; their .* by specs of other seeds",
    ):
        act(model)
    assert not any(model[k].in_situ or model[k].programmed for k in (0, 2))
    shared = nn.Sequential(model[0], nn.Linear(8, 20), model[0])  # one layer in two places is one array
    act(shared)


DRAWS = [
    {"read_noise": {"sigma": 1e-8}}, {"read_noise": {"sigma_g": 1e-8}}, {"programming": {"write_noise": 1e-8}},
    {"programming": {"device_spread": 0.1}}, {"programming": {"stuck_at_g_max": 0.1}}, {"drift": {"nu_std": 0.1}},
    {"drift": {"flicker": 0.1}}, {"adc": {"bits": 8, "range": "worst_case", "gain_std": 0.1}},
    {"backward": {"adc": {"bits": 8, "range": "worst_case", "offset_std": 1e-8}}},
]  # fmt: skip


@pytest.mark.parametrize("settings", DRAWS)
def test_layers_of_one_seed_that_draw_nothing_are_no_less_apart(settings):
    ideal = {"drift": {"nu": 0.1}, "dac": {"bits": 8}, "adc": {"bits": 8, "range": "worst_case"}}
    model = nn.Sequential(
        linear(**ideal), nn.Linear(8, 20), linear(**ideal), nn.Linear(8, 20), linear(**settings)
    )
    gx.program(model)
    with pytest.raises(ValueError, match="got 'linear' twice"):
        gx.program(nn.Sequential(model, nn.Linear(8, 20), linear(**settings)))


def test_errors_of_pulse_trains_are_refused_before_a_step_changes_anything():
    model = nn.Sequential(linear(**TRAINED), linear(**TRAINED, pulses={}, seed=1))
    optimiser = gx.optim.InSituSGD(model.parameters(), lr=0.1)
    model[0].weight.grad = torch.ones(8, 20)
    model[1](inputs()).sum().mul(torch.nan).backward()
    before = state_of(model)
    with pytest.raises(ValueError, match="InSituSGD: the gradient of linear must be finite, got 256 NaN"):
        optimiser.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_refused_group_does_not_stay():
    model = nn.Sequential(linear(**TRAINED), linear(**TRAINED))
    optimiser = gx.optim.InSituSGD([model[0].weight], lr=0.1)
    with pytest.raises(ValueError, match="`lr` must be above 0, got -1"):
        optimiser.add_param_group({"params": [model[1].weight], "lr": -1})
    with pytest.raises(TypeError, match="`lr` must be above 0, got 'fast'"):
        optimiser.add_param_group({"params": [model[1].weight], "lr": "fast"})
    with pytest.raises(ValueError, match=r"crossbar layers must each have a name, .*, got 'linear' twice"):
        optimiser.add_param_group({"params": [model[1].weight]})
    assert len(optimiser.param_groups) == 1
    assert not model[1].in_situ


def test_settings_of_other_optimisers_are_refused():
    """Which torch would keep in the group, where nothing looks at them."""
    group = {"params": [linear(**TRAINED).weight], "weight_decay": 1e-4}
    with pytest.raises(
        ValueError, match=r"InSituSGD: `weight_decay` must be left out of a group, got 0\.0001"
    ):
        gx.optim.InSituSGD([group], lr=0.1)


def test_settings_of_a_scheduler_are_looked_at():
    """Torch's one-cycle schedule sets a momentum, which pulse trains have not."""
    layer = linear(**TRAINED, pulses={})
    optimiser = gx.optim.InSituSGD([layer.weight], lr=0.1)
    torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.1, total_steps=9)
    layer(inputs()).sum().backward()
    with pytest.raises(ValueError, match=r"`momentum` must be 0 for layers with pulse trains, got 0\.95"):
        optimiser.step()


@pytest.mark.parametrize("how", [copy.deepcopy, saved])
@pytest.mark.parametrize("algorithm", ["InSituSGD", "AGAD"])
def test_an_optimiser_is_copied_with_its_model(algorithm, how):
    layer = linear(**TRAINED)
    optimiser = getattr(gx.optim, algorithm)([layer.weight], lr=0.1)
    runs = (layer, optimiser), how((layer, optimiser))
    for one, its_optimiser in runs:
        for _ in range(2):
            its_optimiser.zero_grad()
            one(inputs()).square().mean().backward()
            its_optimiser.step()
    assert not torch.equal(layer.weight, linear().weight)
    assert torch.equal(layer.weight, runs[1][0].weight)
    assert str(optimiser.state_dict()) == str(runs[1][1].state_dict())
    for _ in range(2):
        runs[1][1].load_state_dict(optimiser.state_dict())


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 6e4), (torch.float32, 3e38)])
def test_gradients_whose_sum_overflows_are_finite(dtype, value):
    require_finite_gradient(torch.full((9,), value, dtype=dtype), "it")


@pytest.mark.parametrize("settings", [{"momentum": 0.9}, {"transfer_every": 5}])
def test_what_is_kept_of_gradients_takes_in_no_nan(settings):
    layer = linear(**TRAINED)
    optimiser = gx.optim.MixedPrecision([layer.weight], lr=0.1, **settings)
    for _ in range(2):
        layer(inputs()).square().mean().backward()
        optimiser.step()
    layer.weight.grad[0, 0] = torch.inf
    before, kept = state_of(layer), copy.deepcopy(optimiser.state_dict())
    with pytest.raises(
        ValueError, match="MixedPrecision: the gradient of linear must be finite, got 1 NaN or infinite"
    ):
        optimiser.step()
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    assert torch.equal(optimiser.state_dict()["parts"][0]["waiting"], kept["parts"][0]["waiting"])
    for key, value in kept["state"].get(0, {}).items():
        assert torch.equal(optimiser.state_dict()["state"][0][key], value)


@pytest.mark.parametrize(
    "how", [{"pulses": {}}, {"carry": {"scheme": "streamed"}, "mapping": {"slices": 2, "slice_bits": 4}}]
)
def test_a_rate_of_nothing_moves_nothing(how):
    layer = linear(**TRAINED, **how)
    optimiser = gx.optim.InSituSGD([layer.weight], lr=0.1)
    warm = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: step / 2)
    moved = []
    for _ in range(2):
        before = layer.g_cells.clone()
        layer(inputs()).square().mean().backward()
        optimiser.step()
        moved.append(not torch.equal(layer.g_cells, before))
        warm.step()
    assert moved == [False, True]
    assert layer.update_step == 3  # with the first writing


def test_a_layer_trains_after_it_was_written_anew_in_inference_mode():
    layer = linear()
    with torch.inference_mode():
        layer(inputs())
        layer.rewrite()
    layer(inputs()).sum().backward()
    assert layer.weight.grad is not None


def images_and_loss(model):
    return model(torch.linspace(-1, 1, 60).view(5, 12)).square().mean()


@pytest.mark.parametrize("spec", [gx.presets.pcm(), gx.presets.reram()], ids=["pcm", "reram"])
@pytest.mark.parametrize("wires", [{}, {"r_wordline": 1.0, "anchor": "ladder", "refresh_interval": 2}])
def test_what_is_made_in_inference_mode_trains_elsewhere(spec, wires):
    spec = spec.with_overrides({"parasitics": wires})
    with torch.inference_mode():
        model, _ = gx.convert(nn.Sequential(nn.Linear(12, 4)), spec)
        gx.program(model, 1)
        images_and_loss(model)
    images_and_loss(model).backward()  # to its bias
    with torch.inference_mode():
        gx.age(model, "1h")
    images_and_loss(model).backward()
    with torch.inference_mode():
        model[0].set_conductances(model[0].g_programmed)
    images_and_loss(model).backward()
    with torch.inference_mode():
        saved = {name: value.clone() for name, value in model.state_dict().items()}
        gx.unprogram(model)
        images_and_loss(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    images_and_loss(model).backward()
    optimiser.step()
    with torch.inference_mode():
        model.load_state_dict(saved)
    images_and_loss(model).backward()
    gx.age(model, "1d")


@pytest.mark.parametrize("way", ["programmed", "in situ"])
def test_a_layer_is_copied_in_inference_mode(way):
    """Whose tensors count no changes; that another weight is there is seen all the same."""
    model, _ = gx.convert(nn.Sequential(nn.Linear(12, 4)), gx.CrossbarSpec(update={"law": "soft_bounds"}))
    if way == "programmed":
        gx.program(model)
    else:
        gx.optim.InSituSGD(model.parameters(), lr=0.1)
    model.eval()
    with torch.inference_mode():
        copied = copy.deepcopy(model)
        assert torch.equal(images_and_loss(copied), images_and_loss(model))
        copied[0].weight += 1
        with pytest.raises(ValueError, match="0: `weight` must"):
            images_and_loss(copied)


@pytest.mark.parametrize("name", ["sgd", "mixed-precision", "tiki-taka-v2", "agad"])
def test_in_situ_training_begins_and_resumes_in_inference_mode(name):
    spec = gx.CrossbarSpec(update={"law": "soft_bounds"})
    with torch.inference_mode():
        plain = nn.Sequential(nn.Linear(12, 4))
        models = [gx.convert(plain, spec)[0] for _ in range(3)]
        optimisers = [gx.optim.build_optimizer(name, model, lr=0.1, momentum=0.5) for model in models[:2]]
        models[2][0].begin_in_situ()
    optimisers.append(gx.optim.build_optimizer(name, models[2], lr=0.1, momentum=0.5))
    for _ in range(2):
        for model, optimiser in zip(models, optimisers, strict=True):
            optimiser.zero_grad()
            images_and_loss(model).backward()
            optimiser.step()
        with torch.inference_mode():
            models[1].load_state_dict(models[0].state_dict())
            optimisers[1].load_state_dict(optimisers[0].state_dict())
    assert all(torch.equal(models[0][0].weight, model[0].weight) for model in models[1:])


def test_a_device_map_of_inference_mode_is_loaded_elsewhere():
    spec = gx.CrossbarSpec(update={"law": "soft_bounds", "step_spread": 0.1})
    model, _ = gx.convert(nn.Sequential(nn.Linear(12, 4)), spec)
    drawn = gx.ops.draw_device_map(spec.update, (2, 12, 4), seed=1)
    with torch.inference_mode():
        model[0].set_device_map(drawn)
    model.load_state_dict(model.state_dict())


@pytest.mark.parametrize("assign", [True, False])
def test_a_layer_without_memory_is_not_loaded(assign):
    """It would have no memory for its devices."""
    with torch.device("meta"):
        layer = AnalogLinear(20, 8, spec=gx.CrossbarSpec())
    with pytest.raises(
        ValueError,
        match=r"linear: a crossbar layer must have its values .* got a state dict .*load the model before gpuxbar\.convert",
    ):
        layer.load_state_dict(linear().state_dict(), assign=assign)


def test_a_layer_without_memory_gets_none_unset():
    model, _ = gx.convert(nn.Sequential(nn.Linear(20, 8)), gx.CrossbarSpec(adc={"bits": 8, "gain_std": 0.1}))
    with pytest.raises(
        ValueError, match=r"0: a crossbar layer must have its values .*; call to_empty\(\) and load the model"
    ):
        model.to("meta").to_empty(device="cpu")


@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize("law", [{}, {"write_noise": 1e-7}])
def test_cells_keep_their_weight_through_another_precision(law, read):
    layer = linear(update={"law": "constant_step", **law})
    layer.begin_in_situ()
    before = state_of(layer)
    layer.half()
    if read:
        layer(inputs().half())
    layer.float()
    assert torch.equal(layer.weight, before["weight"])
    assert torch.equal(layer.g_cells, before["g_cells"])
    assert layer.update_step == before["update_step"]
    layer(inputs())


def test_a_weight_that_the_cells_do_not_read_stays_refused_in_another_precision():
    layer = held(False)
    with torch.no_grad():
        layer.weight.mul_(0.5)
    with pytest.raises(ValueError, match="linear: `weight` must be what the cells read"):
        layer.double()(inputs().double())


def test_averaged_weights_are_read_once_they_are_written_to_cells():
    layer = held(False)
    optimiser, averaged = gx.optim.InSituSGD(layer.parameters(), lr=0.5), AveragedModel(layer)
    for _ in range(3):
        optimiser.zero_grad()
        layer(inputs()).square().mean().backward()
        optimiser.step()
        averaged.update_parameters(layer)
    expected = averaged.module.weight.detach().clone()
    with pytest.raises(ValueError, match=r"or write it to them anew by its begin_in_situ\(\), as averages"):
        averaged(inputs())
    digital, _ = gx.convert(averaged.module, gx.CrossbarSpec(), rules={"*": None})
    averaged.module.begin_in_situ()
    torch.testing.assert_close(averaged.module.weight, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(averaged(inputs()), digital(inputs()), rtol=1e-4, atol=1e-4)
