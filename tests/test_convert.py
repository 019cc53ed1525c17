"""What `convert` makes of a model, and its report."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import pytest
import torch
from test_layers import CONVERTED, spec
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.nn.utils.prune import l1_unstructured

import gpuxbar as gx
from gpuxbar.nn import AnalogLinear


def test_convert_reports_every_module():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 10), nn.Linear(10, 2)
    )
    settings = spec(tile={"rows": 8, "cols": 4}, mapping={"w_max": 0.2})
    converted, report = gx.convert(
        model, settings, rules={"4": None, "3": {"adc": {"bits": 6}}}, example=torch.randn(5, 1, 4, 4)
    )
    assert [(row.module, row.runs, row.tiles, row.macs, row.conversions) for row in report.rows] == [
        ("0", "analog", 2 * 2 * 1, 4 * 36, 4 * 2 * 2 * 4),
        ("1", "digital", 0, 0, 0),
        ("3", "analog", 2 * 2 * 3, 160, 2 * 2 * 10),
        ("4", "digital", 0, 20, 0),
    ]
    clipped = (model[0].weight.abs() > 0.2).float().mean().item()
    assert 0 < clipped < 1
    assert report.rows[0].clipped == pytest.approx(clipped)
    assert converted[3].spec.adc.bits == 6
    assert "no crossbar form" in str(report)
    assert f"{clipped:.2%}" in str(report)
    assert type(model[0]) is nn.Conv2d
    assert model[1].num_batches_tracked == 0
    with pytest.raises(ValueError, match=r"no match for \['head'\]; (did you mean|known: )"):
        gx.convert(model, spec(), rules={"head": None})


def test_products_that_are_not_known_are_not_counted_as_none():
    class Own(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight)

    parts = {"own": Own(4, 4), "norm": nn.LayerNorm(4), "words": nn.Embedding(5, 4), "lstm": nn.LSTM(4, 4)}
    _, report = gx.convert(nn.ModuleDict(parts | {"head": nn.Linear(4, 2)}), spec(), rules={"lstm": None})
    assert {row.module: row.macs for row in report.rows} == {
        "own": None, "norm": 0, "words": 0, "lstm": None, "head": 8,
    }  # fmt: skip
    shown = {line.split()[0]: "unknown" in line for line in str(report).splitlines()[1:]}
    assert shown == {"own": True, "norm": False, "words": False, "lstm": True, "head": False}


@pytest.mark.parametrize(
    ("settings", "conversions"),
    [
        ({"mapping": {"scheme": "subtracted", "slices": 3, "slice_bits": 2}}, 2 * 10 * 3),
        (
            {"mapping": {"scheme": "offset"}},
            2 * (10 + 3),
        ),  # a reference bitline for each of three column tiles
        ({"dac": {"bits": 8, "stream_bits": 2, "polarity": "two_phase"}}, 2 * 10 * 2 * 4 * 2),
    ],
)
def test_the_report_counts_conversions(settings, conversions):
    settings = spec(tile={"rows": 8, "cols": 4}, **settings)
    _, report = gx.convert(nn.Linear(16, 10), settings)
    assert report.rows[0].conversions == conversions
    _, report = gx.convert(nn.Conv2d(32, 20, 1, groups=2), settings, example=torch.zeros(3, 32, 5, 4))
    assert report.rows[0].conversions == 2 * 5 * 4 * conversions


def test_complex_layers_stay_digital():
    model = nn.Sequential(nn.Linear(8, 4, dtype=torch.complex64), nn.Linear(4, 2, dtype=torch.complex64))
    x = torch.randn(3, 8, dtype=torch.complex64)
    converted, report = gx.convert(model, spec(), example=x)
    assert {row.why for row in report.rows} == {
        "its weights are complex: take real and imaginary parts apart"
    }
    assert torch.equal(converted(x), model(x))


def test_the_report_knows_converted_and_lazy_layers():
    settings = spec(tile={"rows": 4, "cols": 4})
    once, report = gx.convert(nn.Sequential(nn.Linear(8, 4), nn.LazyLinear(3)), settings)
    assert report.rows[1].why == "lazy: pass a batch through it first"
    once = nn.Sequential(once[0], nn.Linear(4, 2))
    twice, again = gx.convert(once, settings, example=torch.randn(3, 8))
    assert again.rows[0] == replace(report.rows[0], type="AnalogLinear", why="already so")
    assert [row.runs for row in again.rows] == ["analog", "analog"]
    assert twice[0].spec == once[0].spec


def test_an_example_may_be_one_sample_behind_batch_norms_that_know_no_data():
    _, report = gx.convert(
        nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), spec(), example=torch.randn(1, 6)
    )
    assert report.rows[0].macs == 24


def test_convert_keeps_sharing_and_names_what_it_leaves():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.first = nn.Embedding(7, 6), nn.Linear(6, 6)
            self.again, self.head = self.first, nn.Linear(6, 7, bias=False)
            self.attention = nn.MultiheadAttention(6, 2)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            x = self.embed(tokens)
            return self.head(self.again(self.first(x)))

    model = Tied()
    converted, report = gx.convert(model, spec())
    assert converted.first is converted.again
    assert converted.head.weight is converted.embed.weight
    runs = {row.module: row.runs for row in report.rows}
    assert runs == {
        "embed": "digital", "first, again": "analog", "head": "analog",
        **{f"attention.{name}_proj": "analog" for name in ("q", "k", "v", "out")},
    }  # fmt: skip
    tokens = torch.randint(7, (5,))
    torch.testing.assert_close(converted(tokens), model(tokens), rtol=1e-4, atol=1e-5)
    converted(tokens).square().sum().backward()  # a layer used twice, a weight used twice
    model(tokens).square().sum().backward()
    torch.testing.assert_close(converted.first.weight.grad, model.first.weight.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(converted.embed.weight.grad, model.embed.weight.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("module", "name"), [(nn.Linear(3, 2), "linear"), (nn.Conv2d(3, 2, 1), "conv")])
def test_a_model_that_is_one_layer_has_the_name_of_a_layer_by_itself(module, name):
    """Errors name it, and it draws as such a layer does."""
    layer, _ = gx.convert(module, gx.CrossbarSpec(adc={"bits": 8}))
    with pytest.raises(ValueError, match=rf"^{name}: the ADC range must be calibrated"):
        layer(torch.rand(1, 3, 1, 3))


@dataclass
class Pair:
    teacher: nn.Module
    student: list
    later: nn.Module = field(init=False)


class Blocks(nn.Module):
    def __init__(self, hold):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        hold(self)


HIDDEN = {
    "list": (lambda m: setattr(m, "more", [nn.Linear(4, 4)]), "more"),
    "dict of lists of tuples": (lambda m: setattr(m, "more", {"a": [(3, nn.Sequential(nn.LSTM(4, 4)))]}), "more"),
    "dataclass": (lambda m: setattr(m, "more", [Pair(nn.Identity(), [nn.Linear(4, 4)])]), "more"),
    "attribute": (lambda m: m.second.__dict__.update(twin=nn.Conv2d(1, 1, 1)), "second.twin"),
    "on crossbars": (lambda m: setattr(m, "more", [AnalogLinear(4, 4, spec=gx.CrossbarSpec())]), "more"),
    "what was replaced": (lambda m: setattr(m, "order", [m.second[0], m.first]), "order"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HIDDEN)
def test_a_warning_tells_of_layers_that_are_no_submodules(kind):
    """They compute digitally, and the report has no row of them."""
    hold, where = HIDDEN[kind]
    with pytest.warns(
        RuntimeWarning, match=f"^gpuxbar: `{where}` of the model hold layers that are none of"
    ) as told:
        _, report = gx.convert(nn.DataParallel(Blocks(hold)), gx.CrossbarSpec())  # as without it
    assert told[0].filename == __file__
    assert [row.module for row in report.rows] == ["first", "second.0", "second.1"]


def in_itself(model):
    model.parts = [model]
    model.parts.append(model.parts)


@pytest.mark.parametrize(
    "hold",
    [
        in_itself,
        lambda m: setattr(m, "more", nn.ModuleList([nn.Linear(4, 4)])),
        lambda m: setattr(m, "norms", [m.second[1], nn.LayerNorm(4), {"model": m}]),
        lambda m: setattr(m, "kinds", [Pair, Pair(m, [nn.LayerNorm(4)])]),
    ],
)
def test_no_warning_tells_of_what_is_called_as_it_is(hold):
    gx.convert(Blocks(hold), gx.CrossbarSpec())  # warnings are errors


@pytest.mark.parametrize("kind", HIDDEN)
def test_rules_say_which_layers_are_kept_out_of_a_model(kind):
    """That such a layer is on crossbars, no rule changes."""
    hold, where = HIDDEN[kind]
    with (
        nullcontext()
        if kind != "on crossbars"
        else pytest.warns(RuntimeWarning, match=f"^gpuxbar: `{where}`")
    ):
        gx.convert(Blocks(hold), gx.CrossbarSpec(), rules={where: None})  # warnings are errors


def test_converted_layers_keep_hooks_and_computed_weights_stay_digital():
    called = []
    plain, pruned, attention = nn.Linear(4, 4), nn.Linear(4, 4), nn.MultiheadAttention(4, 2)
    plain.register_forward_pre_hook(lambda *_: called.append("before"))
    plain.register_forward_hook(lambda *_, **__: called.append("after"), with_kwargs=True)
    plain.register_full_backward_hook(lambda *_: called.append("backwards"))
    attention.register_forward_hook(lambda *_: called.append("attention"))
    l1_unstructured(pruned, "weight", 0.5)
    pruned.weight = pruned.weight.detach()  # as a forward pass without gradients leaves it
    model, report = gx.convert(nn.ModuleList([plain, pruned, attention]), spec(**{**CONVERTED, "adc": {}}))
    assert {row.module: row.why for row in report.rows}["1"].startswith("its weight is computed anew")
    assert (report.rows[0].runs, report.rows[1].runs) == ("analog", "digital")
    x = torch.randn(2, 4, requires_grad=True)
    model[0](x).sum().backward()
    model[2](x, x, x)
    assert called == ["before", "after", "backwards", "attention"]


def test_computed_weights_of_fused_modules_stay_digital():
    model = nn.ModuleList([nn.LSTM(3, 4), nn.Conv3d(2, 3, 2), nn.ConvTranspose2d(2, 3, 2), nn.Linear(4, 4)])
    attention = nn.MultiheadAttention(4, 2)
    l1_unstructured(attention.out_proj, "weight", 0.5)
    assert {row.runs for row in gx.convert(attention, spec())[1].rows} == {"digital"}
    with torch.no_grad():
        l1_unstructured(model[0], "weight_hh_l0", 0.5)
        spectral_norm(model[1])
        l1_unstructured(model[2], "bias", 0.5)
        l1_unstructured(model[3], "bias", 0.5)
    converted, report = gx.convert(model, spec())
    assert {(row.runs, row.why[:26]) for row in report.rows} == {("digital", "its weight is computed ane")}
    x = torch.randn(1, 2, 3, 3, 3)
    torch.testing.assert_close(converted.eval()[1](x), model.eval()[1](x))


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("norm", [weight_norm, parametrizations.weight_norm])
def test_normalised_weights_stay_digital_or_are_normalised_on_crossbars(norm):
    x = torch.randn(3, 4)
    plain = nn.Linear(4, 4)
    normalised = norm(copy.deepcopy(plain))
    normalised(x)  # leaves a weight that torch does not copy
    same, report = gx.convert(nn.Sequential(normalised), spec())
    assert report.rows[0].runs == "digital"
    assert report.rows[0].why.startswith("its weight is computed anew")
    after = norm(gx.convert(plain, spec())[0])
    torch.testing.assert_close(same(x), normalised(x))
    torch.testing.assert_close(after(x), normalised(x))


class Renamed(nn.Conv3d):
    def __init__(self):
        super().__init__(2, 3, 2, bias=False)

    def reset_parameters(self):
        nn.init.ones_(self.weight)


class Doubled(nn.Conv2d):
    def _conv_forward(self, *args):
        return 2 * super()._conv_forward(*args)


class Scaled(nn.Linear):
    """Holds what another module uses."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.scale = nn.Parameter(torch.ones(()))


class Counted(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.calls = 0


class Told(nn.Linear):
    def told(self):
        return self.weight.sum()


def test_subclasses_that_hold_or_tell_more_stay_digital():
    model = nn.ModuleList([Scaled(4, 2), Counted(4, 2), Told(4, 2)])
    converted, report = gx.convert(model, spec())
    assert {row.runs for row in report.rows} == {"digital"}
    assert [type(layer) for layer in converted] == [Scaled, Counted, Told]


def test_subclasses_that_compute_the_same_run_on_crossbars():
    """The output layer of attention is one, whose weight the attention uses itself."""
    model = nn.ModuleList([Renamed(), Doubled(2, 3, 2), nn.MultiheadAttention(4, 2)])
    converted, report = gx.convert(model, spec(), rules={"2": None})
    found = {row.module: row.runs for row in report.rows}
    assert found["0.product"] == "analog"
    assert found["1"] == found["2"] == found["2.out_proj"] == "digital"
    x = torch.randn(1, 2, 3, 3, 3)
    torch.testing.assert_close(converted[0](x), model[0](x))


def test_a_model_without_values_is_refused():
    with pytest.raises(
        ValueError, match=r"0: a layer with ADCs must be on a device that holds values, got meta"
    ):
        gx.convert(nn.Sequential(nn.Linear(4, 4, device="meta")), spec(adc={"bits": 8}))


class Digital(nn.ModuleDict):
    def __init__(self):
        super().__init__(
            {name: nn.Linear(4, 4) for name in ("own", "used", "called")} | {"lstm": nn.LSTM(4, 4)}
        )
        self.own.forward = self.lstm.forward = lambda x: 2 * x

    def forward(self, x):
        return self.called(nn.functional.linear(self.own(x), self.used.weight))


def test_the_report_names_layers_whose_products_are_digital():
    """Of a replaced forward, which a crossbar layer would lose, and of a weight that something else uses."""
    x = torch.randn(3, 4)
    model, report = gx.convert(Digital(), spec(), example=x)
    rows = {row.module: (row.runs, row.why) for row in report.rows}
    assert rows["own"] == rows["lstm"] == ("digital", "its forward was replaced: undo that first")
    assert rows["used"] == ("analog", "default, but not called by the example")
    assert rows["called"] == ("analog", "default")
    assert [row.macs for row in report.rows if row.module in ("used", "called")] == [0, 16]
    assert torch.equal(model.own(x), 2 * x)
