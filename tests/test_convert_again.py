"""Layers that are on crossbars move to others, or back to layers of torch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import gpuxbar as gx
from gpuxbar.nn import AnalogConv1d, AnalogConv2d, AnalogLinear

COARSE = {"tile": {"rows": 8, "cols": 8}, "dac": {"bits": 4}, "adc": {"bits": 4, "range": "worst_case"}}
FINE = {"tile": {"rows": 5, "cols": 7}, "dac": {"bits": 8}, "read_noise": {"sigma": 1e-8}, "seed": 3}
IN_SITU = {"update": {"law": "soft_bounds"}}


def spec(settings):
    return gx.CrossbarSpec.model_validate(settings)


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2, bias=False), nn.ReLU(), nn.Flatten(2), nn.Conv1d(4, 6, 3), nn.Flatten(),
        nn.Linear(42, 5),
    )  # fmt: skip


def images():
    return torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def trained(converted, optimiser):
    for _ in range(2):
        optimiser.zero_grad()
        converted(images()).square().mean().backward()
        optimiser.step()
    return converted


def test_layers_move_to_other_crossbars_with_their_weights():
    converted, _ = gx.convert(model(), spec(COARSE))
    trained(converted, torch.optim.SGD(converted.parameters(), 0.1))
    before = copy.deepcopy(converted.state_dict())
    moved, report = gx.convert(converted, spec(FINE), rules={"5": {"adc": {"bits": 6}}}, example=images())
    plain = model()
    plain.load_state_dict(converted.state_dict(), strict=False)
    expected, first = gx.convert(plain, spec(FINE), rules={"5": {"adc": {"bits": 6}}}, example=images())
    assert report == first
    assert [type(moved[k]) for k in (0, 3, 5)] == [AnalogConv2d, AnalogConv1d, AnalogLinear]
    for one in (moved, expected):
        gx.calibrate(one, [images()])
    assert torch.equal(moved(images()), expected(images()))
    assert all(torch.equal(value, before[name]) for name, value in converted.state_dict().items())


def test_layers_of_the_same_crossbars_stay_as_they_are():
    converted, _ = gx.convert(model(), spec(COARSE))
    gx.program(converted)
    again, report = gx.convert(converted, spec(COARSE), rules={"5": None})
    assert [row.why for row in report.rows] == ["already so", "already so", "rule 5"]
    assert again[0].programmed
    assert type(again[5]) is nn.Linear


@pytest.mark.parametrize("in_situ", [False, True])
def test_layers_become_torchs_own_with_trained_weights(in_situ):
    converted, _ = gx.convert(model(), spec(FINE | IN_SITU))
    parameters = converted.parameters()
    trained(converted, gx.optim.InSituSGD(parameters, 0.1) if in_situ else torch.optim.SGD(parameters, 0.1))
    plain, report = gx.convert(converted.eval(), spec({}), rules={"*": None})
    assert {row.runs for row in report.rows} == {"digital"}
    assert [type(layer) for layer in plain] == [type(layer) for layer in model()]
    assert not any(part.training for part in plain.modules())
    expected = model()
    expected.load_state_dict(plain.state_dict())
    assert all(torch.equal(value, converted.get_parameter(name)) for name, value in plain.named_parameters())
    assert torch.equal(plain(images()), expected(images()))


def test_moved_layers_train_in_situ_beside_digital_ones():
    converted, _ = gx.convert(model(), spec(IN_SITU))
    trained(converted, gx.optim.InSituSGD(converted.parameters(), 0.1))
    moved, _ = gx.convert(converted, spec(IN_SITU | {"seed": 1}), rules={"0": None})
    assert not moved[3].in_situ
    trained(moved, gx.optim.InSituSGD(moved.parameters(), 0.1))
    assert moved[3].in_situ
    assert moved[3].weight.ne(converted[3].weight).any()
    assert moved[0].weight.ne(converted[0].weight).any()


@pytest.mark.parametrize(("make", "layer"), [(nn.LSTM, "ih_l0"), (nn.MultiheadAttention, "q_proj")])
def test_modules_that_became_layers_move_by_their_name(make, layer):
    torch.manual_seed(0)
    fused = nn.ModuleDict({"a": make(4, 2), "b": nn.Linear(4, 4)})
    converted, _ = gx.convert(fused, spec(COARSE))
    moved, _ = gx.convert(converted, spec(COARSE), rules={"a": {"dac": {"bits": 5}}})
    assert (moved["a"].get_submodule(layer).spec.dac.bits, moved["b"].spec.dac.bits) == (5, 4)
    back, _ = gx.convert(converted, spec(COARSE), rules={"a": None})
    assert type(back["a"].get_submodule(layer)) is nn.Linear
    arguments = (torch.randn(3, 2, 4),) * (1 if make is nn.LSTM else 3)
    torch.testing.assert_close(back["a"](*arguments)[0], fused["a"](*arguments)[0])


def test_tied_weights_stay_tied_where_one_layer_moves():
    converted = nn.Sequential(*(AnalogLinear(4, 4, spec=spec(IN_SITU), name=str(k)) for k in range(3)))
    converted[2].weight = converted[1].weight = converted[0].weight
    moved, _ = gx.convert(converted, spec(IN_SITU), rules={"0": None})
    assert moved[0].weight is moved[1].weight
    with pytest.raises(ValueError, match="got one that 2 and 1 hold on arrays of their own"):
        gx.optim.InSituSGD(moved.parameters(), 0.1)


def test_computed_weights_do_not_move():
    converted, _ = gx.convert(model(), spec(COARSE))
    prune.random_unstructured(converted[5], "weight", 0.5)
    normed, _ = gx.convert(model(), spec(COARSE))
    nn.utils.parametrizations.weight_norm(normed[5])
    for one in (converted, normed):
        assert gx.convert(one, spec(COARSE))[1].rows[2].why == "already so"
        with pytest.raises(
            ValueError,
            match="let its layers leave their crossbars, got 5: its weight is computed anew: make it a parameter",
        ):
            gx.convert(one, spec(FINE))


def test_subclasses_of_crossbar_layers_stay():
    class Scaled(AnalogLinear):
        def forward(self, x):
            return 2 * super().forward(x)

    layers = nn.Sequential(Scaled(4, 4, spec=spec(COARSE), name="0"), nn.Linear(4, 4))
    again, report = gx.convert(layers, spec(FINE))
    assert type(again[0]) is Scaled
    assert [row.why for row in report.rows] == ["of a type that stays as it is", "default"]
    gx.convert(layers, spec(FINE), rules={"0": None})


def test_convolutions_keep_what_they_pad_by():
    convolution = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular", dilation=2)
    x = images()
    there, _ = gx.convert(convolution, spec({}))
    back, _ = gx.convert(there, spec({}), rules={"*": None})
    assert type(back) is nn.Conv2d
    torch.testing.assert_close(back(x), convolution(x))


def test_an_example_counts_what_is_not_calibrated_yet():
    calibrated = {**COARSE, "adc": {"bits": 4}}
    converted, report = gx.convert(model(), spec(calibrated), example=images())
    again = gx.convert(converted, spec(calibrated), example=images())[1]
    assert [row.macs for row in again.rows] == [row.macs for row in report.rows]
    with pytest.raises(ValueError, match="must be calibrated before use"):
        converted(images())


def test_an_optimiser_begins_with_groups_of_digital_parameters():
    converted, _ = gx.convert(model(), spec({**COARSE, **IN_SITU}), rules={"0": None})
    groups = [{"params": [converted[0].weight]}, {"params": [converted[5].weight]}]
    trained(converted, gx.optim.InSituSGD(groups, 0.1))
    assert converted[5].in_situ


def test_the_last_rule_counts_alone():
    rules = {"*": {"adc": {"bits": 9}}, "5": {"dac": {"bits": 3}}, "3": None}
    converted, _ = gx.convert(model(), spec(COARSE), rules=rules)
    assert (converted[0].spec.adc.bits, converted[0].spec.dac.bits) == (9, 4)
    assert (converted[5].spec.adc.bits, converted[5].spec.dac.bits) == (4, 3)
    assert type(converted[3]) is nn.Conv1d
    _, report = gx.convert(model(), spec(COARSE), rules={"*": None, "5": {}})
    assert [row.module for row in report.rows if row.runs == "analog"] == ["5"]


@pytest.mark.parametrize("rule", [False, spec(FINE)])
def test_rules_are_overrides(rule):
    with pytest.raises(
        TypeError,
        match=rf"`rules` must hold overrides of the spec or None, got {type(rule).__name__} for '5'; for",
    ):
        gx.convert(model(), spec({}), rules={"5": rule})


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        ({5: None}, "must be by patterns of names, got 5; write '5'"),
        (["5"], "must be a dict of patterns of names, got list"),
    ],
)
def test_rules_are_by_patterns(rules, text):
    with pytest.raises(TypeError, match=f"convert: `rules` {text}"):
        gx.convert(model(), spec({}), rules=rules)
