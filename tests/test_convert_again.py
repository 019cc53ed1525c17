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
    fused = nn.ModuleDict({"a": make(4, 2), "b": nn.Linear(4, 4)})
    converted, _ = gx.convert(fused, spec(COARSE))
    moved, _ = gx.convert(converted, spec(COARSE), rules={"a": {"dac": {"bits": 5}}})
    assert (moved["a"].get_submodule(layer).spec.dac.bits, moved["b"].spec.dac.bits) == (5, 4)
    back, _ = gx.convert(converted, spec(COARSE), rules={f"a.{layer}": None})
    assert type(back["a"].get_submodule(layer)) is nn.Linear


SPLIT = {
    "attention": (lambda: nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True), (5, 3, 8)),
    "attention of others": (lambda: nn.MultiheadAttention(8, 2, bias=False, kdim=6, vdim=4, add_zero_attn=True), (5, 3, 8)),
    "attention with rows": (lambda: nn.MultiheadAttention(8, 4, add_bias_kv=True), (5, 3, 8)),
    "lstm": (lambda: nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True, dropout=0.1), (4, 3, 6)),
    "projected": (lambda: nn.LSTM(6, 5, bias=False, proj_size=2), (4, 3, 6)),
    "gru": (lambda: nn.GRU(6, 5, bidirectional=True), (4, 3, 6)),
    "rnn": (lambda: nn.RNN(6, 5, nonlinearity="relu"), (4, 3, 6)),
    "lstm cell": (lambda: nn.LSTMCell(6, 5), (3, 6)),
    "gru cell": (lambda: nn.GRUCell(6, 5, bias=False), (3, 6)),
    "rnn cell": (lambda: nn.RNNCell(6, 5, nonlinearity="relu"), (3, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 0), 2, True, (1, 2)), (2, 4, 5, 4)),
    "transposed of sequences": (lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, bias=False), (2, 4, 5)),
    "volumes": (lambda: nn.Conv3d(4, 6, (2, 3, 1), (1, 2, 1), 1, (2, 1, 1), 2, padding_mode="circular"), (2, 4, 5, 6, 3)),
    "padded volumes": (lambda: nn.Conv3d(2, 3, (3, 1, 2), padding="same", bias=False), (2, 2, 4, 5, 3)),
}  # fmt: skip


def outputs(module, shape):
    x = [torch.randn(shape, generator=torch.Generator().manual_seed(2))]
    if hasattr(module, "num_heads"):
        x += [
            torch.randn(*shape[:2], size, generator=torch.Generator().manual_seed(size))
            for size in (module.kdim, module.vdim)
        ]
    y = module(*x)
    while isinstance(y, tuple):
        y = y[0]
    return y


@pytest.mark.filterwarnings("ignore:LSTM with projections", "ignore:Using padding='same'")
@pytest.mark.parametrize("name", SPLIT)
def test_modules_that_became_layers_become_torchs_own_with_their_weights(name):
    make, shape = SPLIT[name]
    plain = nn.ModuleList([make()]).eval()
    converted, _ = gx.convert(plain, spec({}))
    back, report = gx.convert(converted, spec({}), rules={"0": None})
    assert {row.runs for row in report.rows} == {"digital"}
    assert repr(back) == repr(plain)
    assert not any(part.training for part in back.modules())
    assert back.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(value, plain.get_parameter(key)) for key, value in back.named_parameters())
    assert torch.equal(outputs(back[0], shape), outputs(plain[0], shape))
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.mul_(1 + torch.rand_like(parameter))
    back, _ = gx.convert(converted.requires_grad_(False), spec({}), rules={"*": None})
    torch.testing.assert_close(outputs(back[0], shape), outputs(converted[0], shape), rtol=1e-4, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in back.parameters())


class OfAnother(nn.Linear):
    """What computes otherwise than torch's."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("make", "act"),
    [
        (nn.MultiheadAttention, lambda model: model[0].k_proj.weight.requires_grad_(False)),
        (nn.MultiheadAttention, lambda model: model[0].v_proj.bias.requires_grad_(False)),
        (nn.MultiheadAttention, lambda model: setattr(model[1], "weight", model[0].q_proj.weight)),
        (nn.LSTM, lambda model: model[0].hh_l0.register_forward_hook(lambda *_: None)),
        (nn.LSTM, lambda model: setattr(model[0], "forward", model[0].forward)),
        (nn.LSTM, lambda model: setattr(model[0], "hh_l0", OfAnother(2, 8))),
    ],
    ids=["frozen in part", "frozen bias", "tied", "hook", "forward", "another layer"],
)  # fmt: skip
def test_layers_that_torchs_modules_cannot_hold_stay_apart(make, act):
    converted, _ = gx.convert(nn.ModuleList([make(4, 2), nn.Linear(4, 4)]), spec({}))
    act(converted)
    back, report = gx.convert(converted, spec({}), rules={"*": None})
    assert {row.runs for row in report.rows} == {"digital"}
    assert type(back[0]) is type(converted[0])
    assert [p.requires_grad for p in back.parameters()] == [p.requires_grad for p in converted.parameters()]


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
            gx.convert(nn.DataParallel(one), spec(FINE))  # which names it as the model does


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
