"""Layers, conversion, gradients and training on the CPU."""

from __future__ import annotations

import copy
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.nn.utils.prune import l1_unstructured
from torch.utils.checkpoint import checkpoint

import gpuxbar as gx
from gpuxbar import reference
from gpuxbar.experiments.data import load_data
from gpuxbar.nn import AnalogConv2d, AnalogLinear

NOISY = {
    "tile": {"rows": 32, "cols": 32},
    "mapping": {"scheme": "subtracted"},
    "dac": {"bits": 8},
    "adc": {"bits": 8, "percentile": 100},
    "read_noise": {"sigma": 2e-8},
}


def spec(**parts):
    return gx.CrossbarSpec.model_validate(parts)


@pytest.mark.parametrize("scheme", ["differential", "subtracted", "offset"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"groups": 2, "stride": 2},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": "same", "dilation": 2},
    ],
)
def test_ideal_convolution_is_torchs(options, scheme):
    layer = AnalogConv2d(
        4,
        6,
        3,
        **options,
        spec=spec(mapping={"scheme": scheme, "scale": "column"}, tile={"rows": 7, "cols": 2}),
    )
    plain = nn.Conv2d(4, 6, 3, **options)
    plain.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(3, 4, 9, 8)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    ys = [layer(xs[0]), plain(xs[1])]
    torch.testing.assert_close(ys[0], ys[1], rtol=1e-4, atol=1e-5)
    for y in ys:
        (y * torch.arange(y.numel()).reshape(y.shape).sin()).sum().backward()
    torch.testing.assert_close(xs[0].grad, xs[1].grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "mapping", [{"slices": 4, "slice_bits": 2}, {"slices": 12, "slice_bits": 2, "scheme": "subtracted"}]
)
def test_sliced_weights_with_a_fine_adc_approach_the_ideal(mapping):
    parts = {
        "mapping": mapping,
        "dac": {"bits": 8, "stream_bits": 1},
        "adc": {"bits": 16, "range": "worst_case"},
    }
    layer = AnalogLinear(40, 9, spec=spec(tile={"rows": 16}, **parts))
    x = torch.randn(5, 40)
    ideal = nn.functional.linear(x, layer.weight, layer.bias)
    assert (layer(x) - ideal).abs().max() < 0.02 * ideal.abs().max()


def test_a_clipped_adc_passes_no_gradient():
    layer = AnalogLinear(8, 3, spec=spec(adc={"bits": 4, "range": "fixed", "i_max": 1e-12}))
    x = torch.randn(2, 8, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() == 0
    assert layer.weight.grad.abs().max() == 0


def test_reads_draw_anew_and_versions_program_once():
    parts = {**NOISY, "programming": {"write_noise": 1e-7}}
    layer = AnalogLinear(64, 8, spec=spec(**{**parts, "adc": {"bits": 8, "range": "worst_case"}}))
    x = torch.randn(4, 64)
    first, g = layer(x), layer.conductances()[0].clone()
    assert not torch.equal(first, layer(x))
    assert torch.equal(g, layer.conductances()[0])
    with torch.no_grad():
        layer.weight.mul_(1.0)
    assert torch.equal(g, layer.conductances()[0])  # same weights, same write
    layer.rewrite()
    assert not torch.equal(g, layer.conductances()[0])
    layer.write_step.zero_()
    with torch.no_grad():
        layer.weight[3, 5] *= 1 + 1e-6
    again = layer.conductances()[0]
    assert (again != g).float().mean() > 0.9


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


class Experts(nn.Module):
    """Each sees the samples that it is chosen for, which may be none."""

    def __init__(self):
        super().__init__()
        self.chosen, self.left = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return torch.cat([self.chosen(x), self.left(x[:0])])


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
        _, report = gx.convert(Blocks(hold), gx.CrossbarSpec())
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


@pytest.mark.parametrize("more", [{}, {"pulses": {}}])
def test_experts_of_no_sample_learn_nothing(more):
    model, _ = gx.convert(Experts(), spec(**NOISY, update={"law": "constant_step"}, **more))
    optimiser = gx.optim.InSituSGD(model.parameters(), lr=0.1)
    x = torch.randn(6, 4)
    gx.calibrate(model, [x])
    before = model.left.weight.detach().clone(), model.chosen.weight.detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.square().sum().backward()
    optimiser.step()
    assert y.shape == (6, 4)
    assert torch.equal(model.left.weight, before[0])
    assert not torch.equal(model.chosen.weight, before[1])
    assert (model.left.read_step.item(), model.left.weight.grad is None) == (0, bool(more))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(4, 3), (0, 5, 4)), (nn.Conv1d(4, 6, 3, stride=2, groups=2), (0, 4, 9)),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (0, 4, 5, 5)), (nn.Conv3d(2, 3, 2), (0, 2, 3, 4, 5)),
        (nn.ConvTranspose2d(2, 3, 2), (0, 2, 3, 3)), (nn.GRU(4, 3), (5, 0, 4)), (nn.LSTMCell(4, 3), (0, 4)),
    ],
)  # fmt: skip
def test_no_samples_have_the_shape_of_torchs(module, shape):
    x = torch.zeros(shape)
    found, expected = (each(x) for each in (gx.convert(module, spec(**NOISY))[0], module))
    shapes = [
        tuple(y.shape for y in (each if isinstance(each, tuple) else (each,))) for each in (found, expected)
    ]
    assert shapes[0] == shapes[1]


class FrozenBelow(nn.Module):
    """Asks for no gradient of its first layer, nor through its second."""

    def __init__(self):
        super().__init__()
        self.below, self.above, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.LSTM(8, 4, batch_first=True)

    def forward(self, x):
        with torch.no_grad():
            x = self.above(self.below(x))
        return self.head(x[None])[0]


def test_layers_that_no_gradient_passes_need_no_range_of_the_transposed_read():
    model, _ = gx.convert(FrozenBelow(), spec(adc={"bits": 8}))
    x = torch.randn(5, 6)
    gx.calibrate(model, [x])
    assert [layer.back_calibrated for layer in (model.below, model.above, model.head.hh_l0)] == [
        False,
        False,
        True,
    ]
    model(x).sum().backward()
    with pytest.raises(ValueError, match=r"above: the ADC range of the transposed read must be calibrated"):
        model.above(x.new_ones(2, 8).requires_grad_()).sum().backward()
    model.head.hh_l0.back_adc_range.fill_(torch.nan)
    model.head.hh_l0.look_at_ranges()
    with pytest.raises(ValueError, match=r"hh_l0: the ADC range of the transposed read must be calibrated"):
        model(x).sum().backward()
    with torch.no_grad():
        model(x)


def test_ranges_of_transposed_reads_follow_the_dac_of_every_sample():
    x, scale = torch.randn(40, 6), torch.logspace(3, 0, 40)[:, None]
    found = []
    for factor in (1.0, scale):
        model, _ = gx.convert(
            nn.Sequential(nn.Linear(6, 5)), spec(adc={"bits": 8}, dac={"bits": 8, "range": "sample"})
        )
        with torch.no_grad():
            model[0].weight.copy_(torch.linspace(-1, 1, 30).view(5, 6))
        gx.calibrate(model, [x], step=lambda x, model=model, factor=factor: (factor * model(x).sin()).sum())
        found.append(model[0].back_adc_range)
    torch.testing.assert_close(*found, rtol=0.05, atol=0)  # codes on a rounding edge


def test_calibration_leaves_a_running_dac_range():
    model, _ = gx.convert(
        nn.Sequential(nn.Linear(6, 5)), spec(adc={"bits": 8}, dac={"bits": 8, "range": "ema"})
    )
    before = model[0].dac_max.clone()
    gx.calibrate(model, [torch.randn(9, 6)], step=lambda x: model.train()(x))
    assert torch.equal(model[0].dac_max, before)


def test_nothing_in_another_precision_stays_so():
    model, _ = gx.convert(nn.Sequential(nn.Linear(6, 5)), spec())
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.empty(0, 6)).dtype == model(torch.ones(1, 6)).dtype


class PassedBy(nn.Module):
    """Computes with the weight of a layer that it never calls, as torchvision's shifted windows do; `tied`: an embedding's too."""

    def __init__(self, tied):
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.tied = tied
        if tied:
            self.inner.weight = self.embed.weight

    def forward(self, x):
        y = x @ self.embed.weight if self.tied else nn.functional.linear(x, self.inner.weight)
        return self.head(y)


def test_layers_that_a_model_passes_by_are_refused():
    x = torch.randn(5, 6)
    model, _ = gx.convert(PassedBy(tied=False), spec(adc={"bits": 8}))
    with pytest.raises(
        ValueError, match=r"computes with the weights of inner itself; keep them digital by rules"
    ):
        gx.calibrate(model, [x])
    model, _ = gx.convert(PassedBy(tied=False), spec(adc={"bits": 8}), rules={"inner": None})
    gx.calibrate(model, [x])
    model(x).sum().backward()
    model, _ = gx.convert(PassedBy(tied=True), spec(adc={"bits": 8}))
    gx.calibrate(model, [x])  # the embedding's use of it


def test_layers_that_are_not_called_cost_no_walk_through_the_model_each():
    """Of thousands of experts a batch calls a few."""

    class Experts(nn.Module):
        walks = 0

        def __init__(self, count):
            super().__init__()
            self.each = nn.ModuleList(nn.Linear(6, 6) for _ in range(count))

        def modules(self):
            Experts.walks += 1
            return super().modules()

        def forward(self, x):
            return self.each[0](x)

    walks = []
    for count in (2, 20):
        model, _ = gx.convert(Experts(count), spec(adc={"bits": 8}))
        Experts.walks = 0
        gx.calibrate(model, [torch.randn(5, 6)])
        walks.append(Experts.walks)
    assert walks[0] == walks[1] > 0


def test_penalties_of_layers_that_are_not_called_pass_none_by():
    """Their gradients are the same whatever the batch; one batch, or several alike, do not tell."""
    x, other = torch.randn(2, 5, 6)
    model, _ = gx.convert(PassedBy(tied=False), spec(adc={"bits": 8}))

    def calibrate(network, *batches):
        def step(x):
            return network(x).square().mean() + sum(p.square().sum() for p in model.parameters())

        gx.calibrate(model, batches, step=step)

    for network, *batches in ((model.head, x), (model.head, x, x), (model, x, other)):
        with pytest.raises(
            ValueError, match=r"of inner itself; .* several batches if the loss has penalties"
        ):
            calibrate(network, *batches)
    calibrate(model.head, x, other)
    assert model.head.calibrated
    losses = iter([model.head, model.head, model])  # passed by in one batch alone
    with pytest.raises(ValueError, match="of inner itself"):
        gx.calibrate(model, [x, other, other], step=lambda x: next(losses)(x).square().mean())


def test_lines_that_carry_nothing_have_the_worst_range_beside_others():
    parts = {"adc": {"bits": 8, "per": "column"}, "mapping": {"scheme": "subtracted"}}
    layer = AnalogLinear(6, 3, bias=False, spec=spec(**parts))
    with torch.no_grad():
        layer.weight[1] = 0.0
    gx.calibrate(layer, [torch.randn(9, 6)])
    worst = 6 * layer.spec.device.g_max * layer.spec.dac.v_read
    assert layer.adc_range[1].item() == pytest.approx(worst)
    assert (layer.adc_range[[0, 2]] < worst / 2).all()


class Heads(nn.Module):
    """One whose output the loss may not use, as the pooler of a BERT, and one that runs in training alone, as in Inception."""

    def __init__(self):
        super().__init__()
        self.trunk, self.pooler, self.auxiliary = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = self.trunk(x)
        return x, self.pooler(x), self.auxiliary(x) if self.training else None


def test_heads_that_the_loss_leaves_out_or_only_training_has_are_calibrated():
    model, _ = gx.convert(Heads(), spec(adc={"bits": 8}))
    x = torch.randn(5, 6)
    gx.calibrate(model, [x], step=lambda x: model(x)[0].square().sum())
    model.eval()(x)[0].sum().backward()
    with pytest.raises(ValueError, match=r"pooler: the ADC range of the transposed read must be calibrated"):
        model(x)[1].sum().backward()
    with pytest.raises(
        ValueError,
        match=r"auxiliary: .* on batches that reach the layer, with a step that calls model.train\(\)",
    ):
        model.train()(x)
    gx.calibrate(model.eval(), [x], step=lambda x: sum(y.sum() for y in model.train()(x)))
    assert not model.training
    sum(y.sum() for y in model.train()(x)).backward()


def test_a_compiled_graph_takes_no_head_without_a_range_for_the_gradient_that_it_may_have():
    """Which one of the worst case is."""
    x, crossbar = torch.randn(5, 6), spec(adc={"bits": 8})
    bare = {"pooler": {"backward": {"adc": {"bits": 8, "range": "worst_case"}}}, "auxiliary": None}
    models = [gx.convert(Heads(), crossbar, rules=rules)[0] for rules in ({"auxiliary": None}, bare)]
    for model in models:
        gx.calibrate(model, [x], step=lambda x, model=model: model(x)[0].square().sum())
    refused, compiled = (torch.compile(model, backend="aot_eager", fullgraph=True) for model in models)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"pooler: .* or a rule .*worst_case.* left out"):
        refused(x)
    grads = []
    for run in (models[1], compiled):
        run.zero_grad()
        run(x)[0].sum().backward()
        grads.append(models[1].trunk.weight.grad.clone())
    assert torch.equal(*grads)


@pytest.mark.parametrize("which", ["outputs", "h", "c"])
def test_gradients_of_an_lstms_states_alone_are_refused_without_a_range(which):
    lstm, _ = gx.convert(nn.LSTM(6, 5), spec(dac={"bits": 8}, adc={"bits": 8}))
    x = torch.randn(4, 3, 6)
    gx.calibrate(lstm, [x], step=lambda x: lstm(x)[0].sum())

    def backward():
        outputs, (h, c) = lstm(x)
        {"outputs": outputs, "h": h, "c": c}[which].sum().backward()

    backward()
    lstm.hh_l0.back_adc_range.fill_(torch.nan)
    lstm.hh_l0.look_at_ranges()
    with pytest.raises(ValueError, match=r"hh_l0: the ADC range of the transposed read must be calibrated"):
        backward()


class Keyed(nn.Module):
    """Takes and gives dicts."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 4)

    def forward(self, x, scale=1.0):
        return {"y": self.body(x) * scale}


def test_models_and_batches_of_any_form_are_converted_and_calibrated():
    batch = {"x": torch.randn(6, 8), "scale": 2.0}
    for example in (batch, tuple(batch.values())):
        model, report = gx.convert(Keyed(), spec(**NOISY), example=example)
        assert report.rows[0].macs == 32
    gx.calibrate(model, [batch], step=lambda batch: model(**batch)["y"].square().mean())
    layer = model.body
    assert layer.calibrated
    alone, _ = gx.convert(nn.Sequential(model.body), spec(**NOISY))
    alone[0].weight.data.copy_(layer.weight)
    gx.calibrate(alone, [(batch["x"], None)], loss=lambda y, _: y.square().sum())
    for name in ("adc_range", "back_adc_range"):
        assert torch.equal(getattr(layer, name), getattr(alone[0], name))
    for frozen in layer.parameters():
        frozen.requires_grad_(False)
    gx.calibrate(model, [batch], step=lambda batch: model(**batch)["y"])


@torch.no_grad()
def without_gradients(y):
    return y.sum()


def test_calibration_takes_models_that_work_on_their_input_and_losses_without_gradients():
    model, _ = gx.convert(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 4)), spec(**NOISY))
    x = torch.randn(3, 8)
    before = x.clone()
    gx.calibrate(model, [x])
    assert torch.equal(x, before)
    found = model[1].back_adc_range.clone()
    gx.calibrate(model, [x], loss=lambda y, _: without_gradients(y))
    assert torch.equal(model[1].back_adc_range, found)


def test_layers_that_are_called_by_keyword_are_calibrated():
    layer = AnalogLinear(8, 4, spec=spec(**NOISY))
    gx.calibrate(layer, [torch.randn(3, 8)], step=lambda x: layer(input=x))
    assert layer.calibrated


def test_averaged_models_read_with_the_ranges_that_are_copied_to_them():
    model, _ = gx.convert(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3)), spec(**NOISY))
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    x = torch.randn(5, 8)
    gx.calibrate(model, [x])
    for _ in range(2):
        averaged.update_parameters(model)
        with torch.no_grad():
            model[0].weight.mul_(0.5)
        model(x)
    fresh, _ = gx.convert(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3)), spec(**NOISY))
    fresh.load_state_dict(averaged.module.state_dict())
    assert torch.equal(averaged(x), fresh(x))


def test_gradients_pass_by_ranges_that_were_copied():
    parts = {**NOISY, "adc": {"bits": 8, "range": "worst_case"}, "backward": {"adc": {"bits": 8}}}
    model = AnalogLinear(8, 6, spec=spec(**parts))
    averaged = copy.deepcopy(model)
    x = torch.randn(5, 8, requires_grad=True)
    with pytest.raises(ValueError, match="of the transposed read must be calibrated"):
        averaged(x).sum().backward()
    gx.calibrate(model, [x.detach()])
    averaged.back_adc_range.copy_(model.back_adc_range)
    averaged(x).sum().backward()
    assert x.grad.abs().max() > 0


def test_ranges_that_are_copied_to_a_calibrated_layer_count():
    """By way of the values of its state dict, which no method of the layer sees."""
    model = AnalogLinear(8, 6, spec=spec(**NOISY))
    x = torch.randn(5, 8)
    gx.calibrate(model, [x])
    average = copy.deepcopy(model)
    model(x)
    gx.calibrate(model, [0.3 * x.abs()])
    for mine, theirs in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        mine.copy_(theirs)
    model.eval(), average.eval()
    assert torch.equal(average(x), model(x))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("how", ["in place", "behind autograd", "for a call"])
def test_ranges_that_are_copied_are_read_at_once(how, compiled):
    """By ways that PyTorch does not count, too, and in a graph that was compiled before."""
    model, _ = gx.convert(nn.Sequential(nn.Linear(8, 6)), spec(dac={"bits": 8}, adc={"bits": 5}))
    x = torch.randn(5, 8)
    gx.calibrate(model, [x])
    source = copy.deepcopy(model)
    for name, factor in (("adc_range", 0.3), ("back_adc_range", 0.5)):
        source[0].get_buffer(name).mul_(factor)
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model

    def read(run, *state):
        driven = x.clone().requires_grad_()
        y = torch.func.functional_call(run, *state, (driven,)) if state else run(driven)
        return y, *torch.autograd.grad(y.square().sum(), driven)

    before, wanted, state = read(run), read(source), []
    if how == "for a call":
        state = [{f"{'_orig_mod.' * compiled}{k}": v for k, v in source.state_dict().items()}]
    else:
        for mine, theirs in zip(model.state_dict().values(), source.state_dict().values(), strict=True):
            (mine.data if how == "behind autograd" else mine).copy_(theirs)
    for found, old, new in zip(read(run, *state), before, wanted, strict=True):
        assert torch.equal(found, new)
        assert not torch.equal(found, old)


def test_calibrate_and_convert_refuse_by_name():
    model, _ = gx.convert(nn.Sequential(nn.Linear(8, 4)), spec(**NOISY))
    for batch, what in (({"x": 1}, "dict"), ((torch.ones(1, 8), 0, 0), "tuple of 3"), ((1, 2), "tuple of 2")):
        with pytest.raises(
            TypeError, match=rf"a batch of `loader` must be a tensor or a pair .* got {what}; pass step"
        ):
            gx.calibrate(model, [batch])
    x = torch.ones(2, 8)
    with pytest.raises(TypeError, match=r"of must be a tensor, got dict; pass loss=lambda output, target: "):
        gx.calibrate(model, [x], step=lambda x: {"logits": model(x)})
    with pytest.raises(ValueError, match="`loader` must give at least one batch"):
        gx.calibrate(model, [])
    with pytest.raises(ValueError, match="`loss` must be None with `step`"):
        gx.calibrate(model, [], loss=nn.functional.cross_entropy, step=print)
    with pytest.raises(
        TypeError, match=r"`loader` must give batches, got a tensor of shape \(2, 4\); pass \[tensor\]"
    ):
        gx.calibrate(model, torch.zeros(2, 4))
    images, labels = torch.zeros(2, 8), torch.tensor([0, 3])
    for pair in ((images, labels), [images, labels], (images, torch.zeros(2))):
        with pytest.raises(
            TypeError, match=r"got one: tensors of shapes \(2, 8\) and \(2,\); pass \[\(batch"
        ):
            gx.calibrate(model, pair, loss=nn.functional.cross_entropy)
    gx.calibrate(model, torch.randn(4, 8).split(2))
    gx.calibrate(model, (images, labels), step=lambda batch: model(batch.float().view(2, -1).expand(2, 8)))
    with pytest.raises(
        TypeError,
        match=r"`spec` must be a CrossbarSpec, got dict; make .* or call one of gpuxbar.presets, as demo",
    ):
        gx.convert(nn.Linear(2, 2), {"tile": {"rows": 64}})


@pytest.mark.parametrize("scheme", ["subtracted", "offset"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_opcheck(kind, scheme, monkeypatch):
    settings = spec(
        dac={"bits": 8, "range": "sample", "gain_std": 0.1}, adc={"bits": 8, "range": "worst_case", "gain_std": 0.1},
        read_noise={"sigma": 1e-7, "sigma_g": 1e-7}, mapping={"scheme": scheme},
    )  # fmt: skip
    if kind == "linear":
        layer, x = AnalogLinear(6, 3, spec=settings), torch.randn(2, 6)
    else:
        layer, x = AnalogConv2d(2, 3, 3, spec=settings), torch.randn(2, 2, 5, 4)
    g, back_g, noise_var, w_max, version = layer.conductances()
    step, plan = torch.zeros(1, dtype=torch.int64), layer.plan.dumps()
    for lsb in (torch.full((1,), 0.02), None):
        args = (
            x.requires_grad_(), layer.weight, g, back_g, noise_var, w_max, layer.bias, lsb, layer.adc_range, layer.back_adc_range,
            layer.adc_error, layer.back_adc_error, layer.dac_error, layer.back_dac_error, step, 1, layer.packed,
            layer.back_packed, layer.packed_state, version, plan, True,
        )  # fmt: skip
        torch.library.opcheck(torch.ops.gpuxbar.analog_mvm.default, args)
    for backend in ("host", "reference"):  # without backward to follow
        monkeypatch.setattr("gpuxbar.launch.host.WANTED", backend)
        torch.library.opcheck(
            torch.ops.gpuxbar.analog_mvm.default, (*args[:-1], False), test_utils="test_faketensor"
        )
    monkeypatch.undo()
    grad_y = torch.ones_like(layer(x)).detach()
    image = list(x.shape) if kind == "conv" else []
    weight = layer.weight.detach()
    back = (
        grad_y, weight, g, noise_var, w_max, layer.back_adc_range, layer.back_adc_error, layer.back_dac_error, step, image, plan,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.gpuxbar.analog_mvm_transposed.default, back)
    if kind == "linear" and scheme == "subtracted":
        saved = torch.ops.gpuxbar.analog_mvm.default(*args[:-1], True)
        for wanted in ((True, True, True), (False, True, False)):
            gradients = (
                grad_y,
                saved[2].detach(),
                saved[1],
                saved[3].detach(),
                g,
                noise_var,
                w_max,
                *back[5:9],
                plan,
                *wanted,
            )
            torch.library.opcheck(torch.ops.gpuxbar.matrix_gradients.default, gradients)
    packing = torch.zeros(8, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.int64), version
    torch.library.opcheck(torch.ops.gpuxbar.analog_mvm_transposed_packed.default, (*back, *packing))
    if scheme == "subtracted":
        settings_json = layer.spec.model_dump_json()
        torch.library.opcheck(
            torch.ops.gpuxbar.reprogram.default,
            (weight, g, noise_var, w_max, layer.written, layer.write_step, settings_json, "subtract", plan),
        )


def test_hardware_aware_training_comes_within_a_percent_of_ideal(learn):
    accuracy = []
    for convert in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))  # fmt: skip
        if convert:
            model, _ = gx.convert(model, spec(**NOISY))
            gx.calibrate(model, [load_data("digits").sample(200)])
        accuracy.append(learn(model, torch.optim.AdamW(model.parameters(), lr=3e-3), epochs=6, batch=64)[-1])
    ideal, analog = accuracy
    assert ideal > 0.96
    assert analog > ideal - 0.01


CONVERTED = {
    **NOISY, "dac": {"bits": 8, "range": "sample"}, "adc": {"bits": 10, "per": "column", "percentile": 100},
    "read_noise": {"sigma": 2e-8, "sigma_g": 2e-8},
}  # fmt: skip


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 20), nn.ReLU(),
        nn.Linear(20, 10),
    )  # fmt: skip


def step_of(model, x, t):
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(x), t)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("scheme", ["differential", "subtracted", "offset"])
def test_calibrated_layers_with_every_nonideality_stay_near_the_ideal(scheme):
    model = small_network()
    x, t = torch.randn(64, 1, 8, 8), torch.randint(10, (64,))
    parts = {**CONVERTED, "mapping": {"scheme": scheme}, "read_noise": {"sigma": 2e-9, "sigma_g": 5e-9}}
    parts["adc"] = {**parts["adc"], "gain_std": 0.0005, "offset_std": 1e-9, "inl": 1.0, "inl_std": 0.5}
    converted, _ = gx.convert(model, spec(**parts))
    with pytest.raises(ValueError, match="must be calibrated"):
        converted(x)
    gx.calibrate(converted, [(x, t)], loss=nn.functional.cross_entropy)
    assert converted[4].adc_range.shape == ((20 + 1) if scheme == "offset" else 20,)
    assert converted[4].back_adc_range.shape == ((128 + 4) if scheme == "offset" else 128,)
    assert converted[4].adc_range.std() > 0
    assert all(p.grad is None for p in converted.parameters())
    y, ideal = converted(x), model(x)
    assert 1e-4 < (y - ideal).abs().max() / ideal.abs().max() < 0.05
    (loss, grads), (ideal_loss, ideal_grads) = step_of(converted, x, t), step_of(model, x, t)
    assert (loss - ideal_loss).abs() < 0.01
    for grad, expected in zip(grads, ideal_grads, strict=True):
        assert 0 < (grad - expected).norm() / expected.norm() < (0.4 if scheme == "offset" else 0.15)


def test_calibration_leaves_no_trace():
    model, _ = gx.convert(small_network(), spec(**NOISY))
    model.insert(1, nn.BatchNorm2d(8))
    model[4].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    gx.calibrate(model, [torch.randn(16, 1, 8, 8)])
    after = model.state_dict()
    changed = [k for k in before if not torch.equal(before[k], after[k])]
    assert changed == [f"{k}.{lsb}" for k in (0, 5, 7) for lsb in ("adc_range", "back_adc_range")]
    assert [m.training for m in (model[0], model[4], model)] == [True, False, True]


def test_norms_that_know_no_data_yet_calibrate_by_that_of_the_batch():
    """As they begin they would pass on what training never shows the layer behind them: here, values of one sign."""
    x = torch.rand(64, 6) + 5
    spec = gx.CrossbarSpec(adc={"bits": 8}, backward={"mode": "ideal"})
    torch.manual_seed(0)
    fresh, _ = gx.convert(nn.Sequential(nn.BatchNorm1d(6, momentum=1.0), nn.Linear(6, 4)), spec)
    trained = copy.deepcopy(fresh)
    trained[0](x)
    gx.calibrate(fresh, [x])
    gx.calibrate(trained, [x])
    assert fresh[1].adc_range.item() == pytest.approx(trained[1].adc_range.item(), rel=1e-3)
    assert torch.equal(fresh[0].running_mean, torch.zeros(6))
    assert fresh[0].num_batches_tracked == 0
    assert fresh[0].training
    kept = trained[0].running_mean.clone()
    gx.calibrate(trained, [x - 5])  # statistics that were learned stand, whatever a batch has
    assert torch.equal(trained[0].running_mean, kept)
    assert trained[1].adc_range > 1.1 * fresh[1].adc_range


@pytest.mark.parametrize("op", [gx.calibrate, gx.conversion_errors])
def test_norms_that_know_no_data_yet_need_several_values_a_channel(op):
    model, _ = gx.convert(nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)), spec(adc={"bits": 8}))
    gx.calibrate(model, [torch.randn(1, 1, 3, 4)])
    text = rf"^{op.__name__}: 1, a batch norm with .* must get several values a channel, got .* \(1, 6, 1, 1\); give larger"
    with pytest.raises(ValueError, match=text):
        op(model, [torch.randn(1, 1, 3, 3)])
    op(model, [torch.randn(2, 1, 3, 3)])


def test_calibration_leaves_what_it_found_of_the_devices_to_the_next_read():
    wires = {"r_wordline": 5.0, "r_bitline": 5.0, "refresh_interval": 10, "anchor": "ladder"}
    settings = spec(**NOISY, parasitics=wires, programming={"write_noise": 1e-7})
    layer, _ = gx.convert(nn.Linear(40, 40), settings)
    fresh = copy.deepcopy(layer)
    x = torch.randn(16, 40)
    gx.calibrate(layer, [x])
    fresh.adc_range.copy_(layer.adc_range)
    fresh.look_at_ranges()
    seen = layer.seen.clone()
    assert layer.solved.item() == layer.written[0] != 0
    with torch.no_grad():
        assert torch.equal(layer(x), fresh(x))
    assert torch.equal(layer.seen, seen)
    assert {k for k, v in layer.state_dict().items() if not torch.equal(v, fresh.state_dict()[k])} == {
        "back_adc_range"
    }


def test_streams_are_calibrated_by_what_they_drive():
    """A bit stream drives full digits, so its currents exceed those of the whole value."""
    parts = {"tile": {"rows": 32}, "mapping": {"scheme": "subtracted"}, "adc": {"bits": 8, "percentile": 100}}
    found = []
    for stream_bits in (None, 1):
        torch.manual_seed(0)
        layer = AnalogLinear(32, 8, spec=spec(dac={"bits": 8, "stream_bits": stream_bits}, **parts))
        gx.calibrate(layer, [torch.randn(200, 32)])
        found.append(layer.adc_range.item())
    assert found[1] > 1.2 * found[0]


@pytest.mark.parametrize("percentile", [30.0, 75.0])
def test_a_range_is_the_percentile_of_the_partial_sums(percentile):
    """Of one tile without an ADC the partial sums are its products."""
    parts = {"tile": {"rows": 32}, "mapping": {"scheme": "subtracted"}, "dac": {"bits": 8}}
    x, ranges = torch.randn(50, 32), []
    ideal = AnalogLinear(32, 8, bias=False, spec=spec(**parts))
    for which in (percentile, 100.0):
        layer = AnalogLinear(32, 8, bias=False, spec=spec(adc={"bits": 8, "percentile": which}, **parts))
        layer.load_state_dict(ideal.state_dict(), strict=False)
        gx.calibrate(layer, [x])
        ranges.append(layer.adc_range.item())
    sums = ideal(x).detach().abs().flatten().sort().values
    wanted = sums[round(len(sums) * percentile / 100) - 1] / sums[-1]
    assert ranges[0] / ranges[1] == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("scheme", ["differential", "subtracted"])
def test_two_phases_read_what_one_does(scheme):
    """Of inputs of one sign too, which one of the phases drives alone."""
    parts = {"tile": {"rows": 16}, "mapping": {"scheme": scheme}, "adc": {"bits": 10, "percentile": 100}}
    layer = AnalogLinear(30, 20, spec=spec(dac={"bits": 8, "polarity": "two_phase"}, **parts))
    x, ranges = torch.randn(40, 30), []
    for inputs in (x, x.abs(), -x.abs()):
        gx.calibrate(layer, [inputs])
        ranges.append(layer.adc_range.item())
        ideal = nn.functional.linear(inputs, layer.weight, layer.bias)
        assert (layer(inputs) - ideal).abs().max() < 0.02 * ideal.abs().max()
    assert ranges[1] == ranges[2]


def test_converter_errors_are_of_the_converter():
    """Gain and offset are drawn once: two reads without noise agree; they bias each column by its own."""
    adc = {"bits": 14, "range": "worst_case", "gain_std": 0.05}
    layer = AnalogLinear(40, 300, bias=False, spec=spec(mapping={"scheme": "subtracted"}, adc=adc))
    x = torch.randn(6, 40)
    y, ideal = layer(x).detach(), nn.functional.linear(x, layer.weight).detach()
    assert torch.equal(y, layer(x))
    gain = (y * ideal).sum(0) / ideal.square().sum(0)
    assert gain.std() == pytest.approx(0.05, rel=0.2)
    same = AnalogLinear(40, 300, bias=False, spec=layer.spec)
    same.load_state_dict(layer.state_dict())
    assert torch.equal(same(x), y)
    other = AnalogLinear(40, 300, bias=False, spec=layer.spec, name="other")
    other.load_state_dict(layer.state_dict())
    assert not torch.equal(other(x), y)


def test_converters_err_apart():
    """Gains, offsets and curves, forwards and backwards: no two are alike."""
    adc = {"bits": 8, "range": "worst_case", "gain_std": 0.1, "offset_std": 1e-9, "inl": -3.0, "inl_std": 0.5}
    layer = AnalogLinear(
        400, 400, spec=spec(mapping={"scheme": "subtracted"}, tile={"rows": 512, "cols": 512}, adc=adc)
    )
    errors = torch.cat([layer.adc_error, layer.back_adc_error]).flatten(1)
    apart = torch.corrcoef(errors) - torch.eye(6)
    assert apart.abs().max() < 4 / 400**0.5
    assert errors.std(1) == pytest.approx([0.1, 1e-9, 0.5, 0.1, 1e-9, 0.5], rel=0.2)
    assert errors.mean(1)[[2, 5]] == pytest.approx([-3.0, -3.0], abs=0.1)


@pytest.mark.parametrize("batch", [1, 70], ids=["few", "block"])
def test_bent_converters_read_as_the_oracle_has_it(batch):
    """Both ways, by the curve of each."""
    adc = {"bits": 8, "range": "worst_case", "inl": 8.0, "inl_std": 4.0}
    layer = AnalogLinear(
        40, 12, bias=False, spec=spec(tile={"rows": 16, "cols": 8}, mapping={"scheme": "subtracted"}, adc=adc)
    )
    x = torch.randn(batch, 40, requires_grad=True)
    y, grad_y = layer(x), torch.randn(batch, 12)
    y.backward(grad_y)
    volts, w_max = layer.spec.dac.v_read, layer.weight.abs().max()
    for found, driven, full, tile, errors, transposed in (
        (y, x, layer.adc_range, 16, layer.adc_error, False),
        (x.grad, grad_y, layer.back_adc_range, 8, layer.back_adc_error, True),
    ):
        top = driven.detach().abs().max()
        gain, offset, inl = errors.numpy()
        expected = reference.tile_mvm(
            (driven.detach() / top * volts).numpy(), layer.cells.numpy(), tile=tile, transposed=transposed, adc_bits=8,
            adc_lsb=full.item() / 127, adc_gain=gain, adc_offset=offset, adc_inl=inl,
        ) * (top / volts * layer.planes.unit * w_max).item()  # fmt: skip
        step = full.item() / 127 * (top / volts * layer.planes.unit * w_max).item()
        off = np.abs(found.detach().numpy() - expected)
        assert (off < 1e-4 * step).mean() > 0.98  # others are on a rounding edge
        assert off.max() < 1.01 * step


def test_no_curve_of_a_converter_turns_back():
    adc = {"bits": 6, "range": "worst_case", "inl": 3.0, "inl_std": 5.0}
    layer = AnalogLinear(40, 200, spec=spec(adc=adc))
    inl, most = layer.adc_error[2], 32 / 6
    assert inl.abs().max() == pytest.approx(most)
    assert 0.1 < (inl == inl.max()).float().mean() < 0.6  # others are as they were drawn
    steps = np.linspace(-31, 31, 201)
    assert all((np.diff(reference.bent(steps, each, 31)) >= 0).all() for each in (-most, most))


def test_converters_add_their_offsets_to_nothing():
    """Where nothing is driven, products are what the offsets of their tiles' converters stand for, both ways."""
    fixed = {"bits": 8, "range": "fixed", "max": 0.5}
    parts = {
        "tile": {"rows": 8, "cols": 4}, "mapping": {"scheme": "subtracted"}, "dac": fixed, "backward": {"dac": fixed},
        "adc": {"bits": 12, "range": "worst_case", "offset_std": 1e-7},
    }  # fmt: skip
    layer = AnalogLinear(20, 6, bias=False, spec=spec(**parts))
    x = torch.zeros(2, 20, requires_grad=True)
    y = layer(x)
    y.backward(torch.zeros(2, 6))
    scale = 0.5 / layer.spec.dac.v_read * layer.planes.unit * layer.weight.abs().max().item()
    for found, offset, lsb in (
        (y, layer.adc_error[1, 0], layer.adc_range / 2047),
        (x.grad, layer.back_adc_error[1, 0], layer.back_adc_range / 2047),
    ):
        expected = ((offset / lsb).round() * lsb).sum(0) * scale
        assert expected.abs().min() > 0
        torch.testing.assert_close(found, expected.expand(2, -1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_read_noise_is_as_large_as_its_settings_say(direction):
    """Variance of a current: sigma^2 of each plane and tile, and v^2 sigma_g^2 (g / g_max)^3 of each device."""
    sigma, sigma_g = 3e-8, 1e-7
    noise = {"sigma": sigma, "sigma_g": sigma_g, "exponent": 1.5}
    layer = AnalogLinear(20, 15, bias=False, spec=spec(tile={"rows": 8, "cols": 8}, read_noise=noise))
    forward, device, w_max = direction == "forward", layer.spec.device, layer.weight.detach().abs().max()
    w = layer.weight.detach() / w_max
    sides = (device.g_min + w.mul(sign).clamp_min(0) * (device.g_max - device.g_min) for sign in (1, -1))
    of_pairs = sum(sigma_g**2 * (g / device.g_max) ** 3 for g in sides)
    value = torch.linspace(-1, 0.5, 20 if forward else 15)
    rows = value.expand(4000, -1).clone()
    if forward:
        with torch.no_grad():
            found, tiles, of_volts = layer(rows), 3, of_pairs.T
    else:
        x = torch.zeros(4000, 20, requires_grad=True)
        layer(x).backward(rows)
        found, tiles, of_volts = x.grad, 2, of_pairs
    volt = layer.spec.dac.v_read  # of the largest value, 1
    variance = 2 * tiles * sigma**2 + (volt * value).square() @ of_volts
    torch.testing.assert_close(
        found.std(0), variance.sqrt() / volt * w_max * layer.planes.unit, rtol=0.05, atol=0
    )


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize(
    "mapping",
    [
        {"scheme": "differential"},
        {"scheme": "subtracted"},
        {"scheme": "offset"},
        {"slices": 3, "slice_bits": 2},
    ],
    ids=str,
)
def test_a_plan_knows_the_largest_of_its_conductances(mapping, bits):
    """By which halves scale them, so that none overflows and few bits are lost."""
    adc = {"bits": bits, "range": "worst_case"}
    layer = AnalogLinear(6, 4, spec=spec(mapping=mapping, device={"g_min": 2e-6}, adc=adc))
    nn.init.constant_(layer.weight, 0.5)
    assert layer.conductances().g.abs().max().item() == pytest.approx(layer.plan.g_range, rel=1e-5)


def test_every_tile_has_reference_lines_of_its_own():
    parts = {"tile": {"rows": 4, "cols": 3}, "programming": {"device_spread": 0.05}}
    layer = AnalogLinear(11, 8, bias=False, spec=spec(mapping={"scheme": "offset"}, **parts))
    x, grad = torch.randn(5, 11, requires_grad=True), torch.randn(5, 8)
    y = layer(x)
    y.backward(grad)
    (g,), scale = layer.conductances().g, layer.planes.unit * layer.weight.abs().max().item()
    own, column, row = g[:11, :8], g[:11, 8 + torch.arange(8) // 3], g[11 + torch.arange(11) // 4, :8]
    for found, expected in (
        (y, x.detach() @ (own - column) * scale),
        (x.grad, grad @ (own - row).T * scale),
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_an_ideal_transposed_read_has_no_noise_of_cells():
    layer = AnalogLinear(20, 6, spec=spec(read_noise={"sigma_g": 1e-6}, backward={"mode": "ideal"}))
    x, grad = torch.randn(5, 20, requires_grad=True), torch.randn(5, 6)
    layer(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ layer.weight.detach(), rtol=0, atol=1e-5)


def test_the_transposed_read_is_calibrated_by_what_drives_it():
    """Gradients times the weights of full pairs, the largest of which drives v_read."""
    parts = {"mapping": {"scheme": "subtracted", "scale": "column"}, "adc": {"bits": 8, "percentile": 100}}
    layer = AnalogLinear(30, 6, bias=False, spec=spec(**parts))
    with torch.no_grad():
        layer.weight.mul_(torch.tensor([100.0, 1, 1, 1, 1, 1])[:, None])
    grad = torch.randn(8, 6)
    gx.calibrate(layer, [torch.randn(8, 30)], loss=lambda y, _: (y * grad).sum())
    device, w_max = layer.spec.device, layer.weight.detach().abs().amax(1)
    g = layer.weight.detach() / w_max[:, None] * (device.g_max - device.g_min)
    driven = grad * w_max
    currents = driven / driven.abs().max() * layer.spec.dac.v_read @ g
    assert layer.back_adc_range.item() == pytest.approx(currents.abs().max().item(), rel=1e-5)


def test_the_transposed_read_is_calibrated_through_its_wires_at_its_own_voltage():
    wires = {"r_wordline": 5.0, "r_bitline": 5.0, "r_source": 500.0, "terminations": "role"}
    parts = {"mapping": {"scheme": "subtracted"}, "adc": {"bits": 8, "percentile": 100}, "parasitics": wires}
    layer = AnalogLinear(30, 6, bias=False, spec=spec(**parts, backward={"dac": {"v_read": 0.1}}))
    grad = torch.randn(8, 6)
    gx.calibrate(layer, [torch.randn(8, 30)], loss=lambda y, _: (y * grad).sum())
    cells = layer.conductances()
    volts = 0.1 * grad / grad.abs().max()
    expected, other = ((volts @ g[0].mT).abs().max().item() for g in (cells.back_g, cells.g))
    assert layer.back_adc_range.item() == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(other, rel=1e-3)


def test_the_adc_of_the_transposed_read_is_calibrated_by_settings_of_its_own():
    own = {"adc": {"bits": 6, "per": "column", "percentile": 50}}
    parts = {"mapping": {"scheme": "subtracted"}, "adc": {"bits": 8, "range": "worst_case"}, "backward": own}
    layer = AnalogLinear(30, 6, bias=False, spec=spec(**parts))
    before = layer.adc_range.clone()
    grad = torch.randn(9, 6)
    gx.calibrate(layer, [torch.randn(9, 30)], loss=lambda y, _: (y * grad).sum())
    volts = layer.spec.dac.v_read * grad / grad.abs().max()
    currents = (volts @ layer.conductances().g[0].mT).abs()
    half = currents.sort(0).values[round(9 / 2) - 1]
    torch.testing.assert_close(layer.back_adc_range, half, rtol=1e-5, atol=0)
    assert torch.equal(layer.adc_range, before)


@pytest.mark.parametrize(("bits", "rounding"), [(8, 0.01), (None, 1e-6)])
def test_a_fixed_range_clips_gradients(bits, rounding):
    fixed = {"dac": {"bits": bits, "range": "fixed", "max": 0.5}}
    layer = AnalogLinear(4, 3, spec=spec(mapping={"scheme": "subtracted", "w_max": 1.0}, backward=fixed))
    x, grad = torch.randn(2, 4, requires_grad=True), torch.tensor([[9.0, -0.2, 0.1], [0.3, -7.0, 0.0]])
    layer(x).backward(grad)
    expected = grad.clamp(-0.5, 0.5) @ layer.weight.detach()
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=rounding * expected.abs().max().item())


@pytest.mark.parametrize("fitted", ["tensor", "sample"])
def test_what_an_unsigned_dac_cannot_drive_gets_no_gradient(fitted):
    layer = AnalogLinear(6, 4, spec=spec(dac={"bits": 8, "signed": False, "range": fitted}))
    x = torch.randn(5, 6, requires_grad=True)
    layer(x).sum().backward()
    assert torch.equal(x.grad != 0, x > 0)


def test_updates_draw_anew():
    """The same change twice from the same seed: what the device adds is independent."""
    law = {"law": "agarwal", "nu": 0.0, "gamma": 0.02}
    layer = AnalogLinear(60, 50, spec=spec(update=law))
    layer.begin_in_situ()
    change, held, noise = torch.full_like(layer.weight, 0.02), layer.weight.detach().clone(), []
    for _ in range(2):
        with torch.no_grad():
            layer.update_cells(change)
        noise.append((layer.weight - held - change).detach().flatten())
        held = layer.weight.detach().clone()
    assert torch.corrcoef(torch.stack(noise))[0, 1].abs() < 4 / 3000**0.5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # within inductor
@pytest.mark.parametrize(("in_situ", "backend"), [(False, "inductor"), (True, "aot_eager")])
def test_compiled_models_have_no_graph_break(in_situ, backend, monkeypatch, tmp_path):
    # an empty cache: a kept one knows a graph by its operators' names, not by what these have become
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, _ = gx.convert(small_network(), spec(**NOISY, update={"law": "agarwal", "nu": 0.1}))
    x, t = torch.randn(16, 1, 8, 8), torch.randint(10, (16,))
    if in_situ:
        gx.optim.InSituSGD(model.parameters(), lr=0.1)
    gx.calibrate(model, [x])
    state = {k: v.clone() for k, v in model.state_dict().items()}
    loss, grads = step_of(model, x, t)
    model.load_state_dict(state)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    found_loss, found = step_of(compiled, x, t)
    torch.testing.assert_close(found_loss, loss)
    torch.testing.assert_close(found, grads)
    assert not torch.equal(step_of(compiled, x, t)[0], loss)  # fresh noise
    with torch.no_grad():
        model[4].weight.mul_(0.5)  # a new weight version inside the same graph
    assert not torch.equal(step_of(compiled, x, t)[1][4], grads[4]) or in_situ


def test_mixed_precision():
    model, _ = gx.convert(small_network(), spec(**NOISY))
    x, t = torch.randn(16, 1, 8, 8), torch.randint(10, (16,))
    gx.calibrate(model, [x])
    model[0].read_step.zero_()
    _, grads = step_of(model, x, t)
    for layer in (model[0], model[4], model[6]):
        layer.read_step -= 1
    with torch.autocast("cpu", torch.bfloat16):
        loss = nn.functional.cross_entropy(model(x), t)
    model.zero_grad()
    loss.backward()
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert p.grad.dtype == torch.float32
        assert (p.grad - grad).norm() < 0.02 * grad.norm()


@pytest.fixture
def float64_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", [None, "sgd", "agad", "mixed-precision"])
def test_a_default_of_float64_changes_weights_alone(float64_default, name):
    wires = {"r_wordline": 1.0, "r_bitline": 1.0}
    settings = spec(
        **{**NOISY, "mapping": {}, "read_noise": {"sigma_g": 1e-8}},
        parasitics=wires,
        update={"law": "soft_bounds"},
    )
    model, _ = gx.convert(small_network(), settings)
    x, t = torch.randn(16, 1, 8, 8), torch.randint(10, (16,))
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)
    optimiser = sgd if name is None else gx.optim.build_optimizer(name, model, lr=0.01)
    gx.calibrate(model, [x])
    step_of(model, x, t)
    optimiser.step()
    gx.conversion_errors(model, [x])
    resumed, _ = gx.convert(small_network(), settings)
    resumed.load_state_dict(model.state_dict())
    assert torch.equal(resumed(x), model(x))
    if name is None:
        gx.program(model)
        gx.age(model, "1h")
    assert model(x).dtype == torch.float64
    held = {key: b.dtype for key, b in model.named_buffers() if b.is_floating_point()}
    assert {dtype for key, dtype in held.items() if not key.endswith(".age")} == {torch.float32}


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def other_default(request):
    yield lambda: torch.set_default_dtype(request.param)
    torch.set_default_dtype(torch.float32)


def test_a_default_precision_changes_no_number_of_layers(other_default):
    """Of worst-case ADC ranges under DACs with errors, and of read noise."""
    errors = spec(dac={"bits": 8, "gain_std": 0.1}, adc={"bits": 8, "range": "worst_case"})
    noise = spec(dac={"bits": 8}, adc={"bits": 6}, read_noise={"sigma": 1e-7})
    layer, x, found = nn.Linear(12, 9), torch.randn(7, 12), []
    for default in (lambda: None, other_default):
        default()
        told = []
        for settings in (errors, noise):
            model, _ = gx.convert(nn.Sequential(copy.deepcopy(layer)), settings)
            gx.calibrate(model, [x])
            told += [repr(gx.conversion_errors(model, [x])), model[0].adc_range.tolist()]
        found.append(told)
    assert found[0] == found[1]


def test_the_gradients_that_calibrate_follow_no_default(float64_default):
    model, _ = gx.convert(nn.Sequential(nn.Linear(8, 6, dtype=torch.float32)), spec(**NOISY))
    x, ranges = torch.randn(16, 8, dtype=torch.float32), []
    for dtype in (torch.float64, torch.float32):
        torch.set_default_dtype(dtype)
        gx.calibrate(model, [x])
        ranges.append(model[0].back_adc_range.clone())
    assert torch.equal(*ranges)


@pytest.mark.parametrize("kind", ["linear", "lstm", "packed"])
def test_a_default_device_holds_nothing_of_layers_elsewhere(kind):
    settings = spec(
        **{**NOISY, "dac": {"bits": 8, "gain_std": 0.01}},
        backward={"adc": {"bits": 8, "range": "worst_case"}},
        update={"law": "soft_bounds"},
    )
    layers = nn.Linear(8, 6) if kind == "linear" else nn.LSTM(8, 6)
    x = torch.randn(5, 3, 8)
    x = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3, 1])) if kind == "packed" else x
    with torch.device("meta"):  # which holds no values
        model, _ = gx.convert(nn.Sequential(layers), settings)

        def outputs(x):
            return model(x) if kind == "linear" else model(x)[1][0]

        gx.calibrate(model, [x], step=outputs)
        gx.conversion_errors(model, [x], step=outputs)
        gx.program(model)
        gx.age(model, "1h", compensate=True)
        outputs(x).sum().backward()
        gx.unprogram(model)
        optimiser = gx.optim.build_optimizer("agad", model, lr=0.01)
        gx.calibrate(model, [x], step=outputs)
        outputs(x).sum().backward()
        optimiser.step()
        model.load_state_dict(model.state_dict())
        assert outputs(x).isfinite().all()
    held = [
        *model.parameters(),
        *model.buffers(),
        *(t for p in optimiser.parts.values() for t in p.buffers()),
    ]
    assert {tensor.device.type for tensor in held} == {"cpu"}


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


def test_a_checkpoint_brings_calibrated_ranges_alone():
    """A range holds for any number of bits; fixed ones are the spec's, whatever was saved; a read without an ADC sets none."""
    bare = spec(dac={"bits": 4})
    specs = {
        "bare": bare,
        "fixed": bare.with_overrides({"adc": {"bits": 8, "range": "worst_case"}}),
        "fine": bare.with_overrides({"adc": {"bits": 12}}),
        "coarse": bare.with_overrides({"adc": {"bits": 8}}),
    }
    layers = {name: AnalogLinear(20, 6, spec=each) for name, each in specs.items()}
    x, state = torch.randn(50, 20), layers["bare"].state_dict()
    worst = layers["fixed"].adc_range.clone()
    for layer in layers.values():
        layer.load_state_dict(state)
    with pytest.raises(ValueError, match="the ADC range must be calibrated before use"):
        layers["coarse"](x)
    gx.calibrate(layers["fine"], [x])
    expected, state = layers["fine"](x), layers["fine"].state_dict()
    for layer in layers.values():
        layer.load_state_dict(state)
    assert torch.equal(layers["fixed"].adc_range, worst)
    assert 0 < (layers["coarse"](x) - expected).abs().max() < 0.05 * expected.abs().max()
    torch.testing.assert_close(layers["bare"](x), expected, rtol=0, atol=0.005)


@pytest.mark.parametrize(
    "change",
    [
        {"tile": {"rows": 8}},
        {"device": {"g_max": 2e-5}},
        {"mapping": {"scheme": "subtracted"}},
        {"dac": {"v_read": 0.1}},
    ],
)
def test_ranges_of_other_currents_are_forgotten(change):
    base = spec(dac={"bits": 4}, adc={"bits": 8}, read_noise={"sigma": 0.0})
    layer, alike, other = (
        AnalogLinear(20, 6, spec=base.with_overrides(more))
        for more in ({}, {"read_noise": {"sigma": 1e-9}}, change)
    )
    x = torch.randn(50, 20)
    gx.calibrate(layer, [x])
    for one in (alike, other):
        gx.calibrate(one, [2 * x])
        one.load_state_dict(layer.state_dict())
    assert torch.equal(alike.adc_range, layer.adc_range)
    with pytest.raises(ValueError, match="the ADC range must be calibrated before use"):
        other(x)
    gx.calibrate(other, [x])
    again = AnalogLinear(20, 6, spec=other.spec)
    again.load_state_dict(other.state_dict())
    assert torch.equal(again(x), other(x))


def test_ranges_of_programmed_pairs_are_not_those_of_pairs_trained_in_situ():
    layer = AnalogLinear(20, 6, spec=spec(adc={"bits": 8}, update={"law": "constant_step"}))
    gx.calibrate(layer, [torch.randn(50, 20)])
    programmed = copy.deepcopy(layer.state_dict())
    gx.optim.InSituSGD(layer.parameters(), lr=0.1)
    gx.calibrate(layer, [torch.randn(50, 20)])
    layer.load_state_dict(programmed, strict=False)
    with pytest.raises(ValueError, match="the ADC range must be calibrated before use"):
        layer(torch.randn(50, 20))


def test_in_situ_training_asks_for_ranges_of_its_own():
    """Pairs amid their window carry other currents than programmed ones."""
    model, _ = gx.convert(small_network(), spec(**CONVERTED, update={"law": "ideal"}))
    x = torch.randn(16, 1, 8, 8)
    gx.calibrate(model, [x])
    ideal = model(x)
    gx.optim.InSituSGD(model.parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match="calibrated before use, and anew once an in-situ optimiser has begun"
    ):
        model(x)
    gx.calibrate(model, [x])
    assert (model(x) - ideal).abs().max() < 0.3 * ideal.abs().max()


def model_of_lstm():
    return nn.Sequential(nn.LSTM(5, 4, batch_first=True))


@pytest.mark.parametrize("create_graph", [False, True])
def test_checkpointed_layers_read_the_same_twice(create_graph):
    model, _ = gx.convert(small_network(), spec(**{**NOISY, "dac": {"bits": 8, "range": "ema"}}))
    x, t = torch.randn(16, 1, 8, 8), torch.randint(10, (16,))
    gx.calibrate(model, [x])
    state = {k: v.clone() for k, v in model.state_dict().items()}
    loss, grads = step_of(model, x, t)
    after = {k: v.clone() for k, v in model.state_dict().items()}

    def again(x):
        return checkpoint(model, x, use_reentrant=False, context_fn=lambda: gx.same_reads(model))

    model.load_state_dict(state)
    model.zero_grad()
    found = nn.functional.cross_entropy(again(x), t)
    again_grads = torch.autograd.grad(found, list(model.parameters()), create_graph=create_graph)
    assert torch.equal(found, loss)
    assert all(torch.equal(g, grad) for g, grad in zip(again_grads, grads, strict=True))
    assert all(torch.equal(v, after[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "draws",
    [
        {"read_noise": {"sigma": 1e-8}},
        {"read_noise": {"sigma_g": 1e-7}},
        {"dac": {"bits": 8, "range": "ema"}},
    ],
)
def test_checkpoints_whose_second_reads_would_be_others_are_refused(draws, reentrant):
    model, _ = gx.convert(model_of_lstm(), spec(**draws))
    x = torch.randn(2, 3, 5, requires_grad=True)
    y, _ = checkpoint(model, x, use_reentrant=reentrant)
    with pytest.raises(
        ValueError, match=r"ih_l0: .* must find what the first one found.*gpuxbar\.same_reads"
    ):
        y.sum().backward()
    # the layer of the state alone, which one function steps through
    model, _ = gx.convert(model_of_lstm(), spec(**draws), rules={"0.ih_l0": None})
    y, _ = checkpoint(model, x, use_reentrant=reentrant)
    with pytest.raises(ValueError, match=r"hh_l0: .* must find what the first one found"):
        y.sum().backward()


class WithoutGradient(nn.Module):
    """A layer that no gradient passes, before one that it does."""

    def __init__(self):
        super().__init__()
        self.below, self.above = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        with torch.no_grad():
            y = self.below(x)
        return self.above(x + y)


def test_checkpoints_of_layers_that_no_gradient_passes_are_refused():
    model, _ = gx.convert(
        WithoutGradient(), spec(read_noise={"sigma": 1e-8}), rules={"above": {"read_noise": {"sigma": 0}}}
    )
    y = checkpoint(model, torch.randn(3, 6, requires_grad=True), use_reentrant=False)
    with pytest.raises(ValueError, match=r"below: .* must find what the first one found"):
        y.sum().backward()


def test_compiled_blocks_are_checkpointed_like_others():
    model, _ = gx.convert(
        nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), spec(read_noise={"sigma": 1e-8})
    )
    x = torch.randn(3, 6, requires_grad=True)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    model.load_state_dict(state)
    block = torch.compile(model, backend="aot_eager")
    y = checkpoint(block, x, use_reentrant=False, context_fn=lambda: gx.same_reads(model))
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], expected)
    y = checkpoint(block, x, use_reentrant=False)  # contexts end with their pass
    with pytest.raises(ValueError, match=r"must find what the first one found"):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_that_read_the_same_by_themselves_need_no_context(reentrant):
    model, _ = gx.convert(
        nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), spec(adc={"bits": 8}, dac={"bits": 8})
    )
    x = torch.randn(3, 6, requires_grad=True)
    gx.calibrate(model, [x])
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_other_precisions(dtype):
    """Weights, inputs and outputs change; ranges and arrays do not."""
    model, _ = gx.convert(nn.Sequential(nn.Linear(20, 6), nn.LayerNorm(6), nn.Linear(6, 3)), spec(**NOISY))
    x = torch.randn(9, 20)
    gx.calibrate(model, [x])
    full = model[0].adc_range.clone()
    with torch.no_grad():  # weights that every precision has
        for p in model.parameters():
            p.copy_(p.bfloat16())
    other = copy.deepcopy(model).to(dtype)
    for m in (model, other):
        m[2](m[1](m[0](x.bfloat16().to(m[0].weight.dtype)))).square().sum().backward()
    assert torch.equal(other[0].adc_range, full)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert q.grad.dtype == dtype
        assert (q.grad - p.grad).norm() < 0.1 * p.grad.norm()


@pytest.mark.parametrize("scheme", ["differential", "subtracted", "offset"])
@pytest.mark.parametrize("precision", ["fp32", "fp16x2"])
def test_the_cuda_path_trains_like_the_host(scheme, precision, monkeypatch):
    """A training step through the CUDA kernels, run on the CPU: the same codes but for rounding edges."""
    from contextlib import contextmanager

    from cuda_shim import ShimDevice

    law = None if scheme == "offset" else {"law": "agarwal", "nu": 0.1, "gamma": 0.01}
    parts = {**CONVERTED, "mapping": {"scheme": scheme}, "precision": precision, "update": law}
    parts["programming"] = {"write_noise": 1e-8, "device_spread": 0.01, "stuck_at_g_min": 0.01}
    x, t = torch.randn(6, 1, 8, 8, requires_grad=True), torch.randint(10, (6,))
    results = []
    for shim in (False, True):
        network = small_network()
        network[2] = nn.AvgPool2d(2)  # the largest of equal codes is chosen by their last bits
        model, _ = gx.convert(network, spec(**parts))
        gx.calibrate(model, [x.detach()])
        if shim:
            device = ShimDevice(order=11)

            @contextmanager
            def on_device(*_, device=device):
                yield device

            for module in ("analog_mvm", "reprogram", "device_update"):
                monkeypatch.setattr(sys.modules[f"gpuxbar.bridge.{module}"], "on_device", on_device)
            monkeypatch.setattr(sys.modules["gpuxbar.bridge.analog_mvm"], "on_cpu", lambda _: False)
        x.grad = None
        results.append(step_of(model, x, t))
        results[-1][1].append(x.grad)
        if law:
            optimiser = gx.optim.InSituSGD(model.parameters(), lr=0.1)
            gx.calibrate(model, [x.detach()])
            optimiser.step()
            results[-1][1].append(model[4].weight.detach().clone())
            results[-1][1].append(model(x).detach())
    assert {"program", "adc_accumulate", "pack_inputs"} <= {
        name.split("_kernel")[0] for name in device.launches
    }
    for host, cuda in zip(results[0][1], results[1][1], strict=True):
        assert (host - cuda).norm() < 0.03 * host.norm()  # codes on a rounding edge


def test_noise_about_no_current_shuts_no_gate():
    """Inputs of one sign leave the phase of the other undriven: its conversions are noise around 0, the end of the range."""
    x, gradients = torch.rand(16, 30), []
    for sigma in (0.0, 1e-9):
        spec = gx.presets.isaac().with_overrides({"tile": {"rows": 8}, "read_noise": {"sigma": sigma}})
        layer = AnalogLinear(30, 5, spec=spec)
        nn.init.constant_(layer.weight, 0.5)
        rows = x.clone().requires_grad_()
        layer(rows).sum().backward()
        gradients.append(rows.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_a_printed_layer_says_what_it_runs_on():
    made = {
        "tiles=3x2 of 128x128": gx.CrossbarSpec(),
        "tiles=3x2 of 128x128, dac=8 bits, adc=8 bits": gx.presets.demo(),
        "tiles=3x2 of 128x128, slices=2 of 2 bits": gx.CrossbarSpec(
            mapping={"scheme": "subtracted", "slices": 2, "slice_bits": 2}
        ),
        "tiles=5x3 of 64x64, slices=16 of 2 bits, dac=8 bits, adc=10 bits": gx.presets.txsim(),
    }
    for said, spec in made.items():
        model, _ = gx.convert(nn.Sequential(nn.Linear(300, 150)), spec)
        assert repr(model[0]) == f"AnalogLinear(in_features=300, out_features=150, bias=True, {said})"
    conv = AnalogConv2d(8, 4, 3, groups=2, spec=gx.CrossbarSpec(tile={"rows": 16}))
    assert repr(conv).endswith("groups=2, tiles=6x1 of 16x128)")
    conv.program()
    assert repr(conv).endswith("of 16x128, programmed=True)")
    model, _ = gx.convert(nn.Linear(4, 3), gx.presets.demo())
    gx.optim.InSituSGD(model.parameters(), lr=0.1)
    assert repr(model).endswith("adc=8 bits, in_situ=agarwal)")
