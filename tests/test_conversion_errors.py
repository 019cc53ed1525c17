"""What clips in the reads of a model, and how much of their errors comes of what."""

from __future__ import annotations

from math import isnan

import pytest
import torch
from torch import nn

import gpuxbar as gx
from gpuxbar.bridge.analog_mvm import analog_mvm
from gpuxbar.nn import AnalogConv2d, AnalogLinear

TILES = {"tile": {"rows": 16, "cols": 8}}
WHOLE = {"bits": 8, "range": "fixed", "max": 127.0}  # of inputs that are codes
KINDS = "dac_clipping", "dac_rounding", "driving", "noise", "adc_clipping", "adc_rounding"
# settings that make one kind of error alone
ONE_KIND = {
    "dac_clipping": {"dac": {"range": "fixed", "max": 60.0}},
    "dac_rounding": {"dac": {"bits": 3, "range": "fixed", "max": 127.0}},
    "driving": {
        "dac": {**WHOLE, "gain_std": 0.1, "offset_std": 5e-3, "inl": 0.3, "inl_std": 0.1},
        "device": {"v_sinh": 0.1},
    },
    "noise": {"dac": WHOLE, "read_noise": {"sigma": 1e-7, "sigma_g": 1e-7}},
    "adc_clipping": {"dac": WHOLE, "adc": {"bits": 16, "range": "fixed", "i_max": 3e-6}},
    "adc_rounding": {"dac": WHOLE, "adc": {"bits": 6, "range": "worst_case"}},
}
STREAMED = {**WHOLE, "stream_bits": 2, "polarity": "two_phase"}
WITHOUT_DAC = {"dac": gx.CrossbarSpec().dac.model_dump()}
FORMS = {
    "subtracted": {"mapping": {"scheme": "subtracted", "scale": "column"}},
    "differential": {},
    "offset": {"mapping": {"scheme": "offset"}},
    "slices": {"mapping": {"slices": 3, "slice_bits": 2}},
    "streams": {"mapping": {"scheme": "subtracted"}, "dac": STREAMED},
}


def settings(*parts):
    spec = gx.CrossbarSpec(**TILES)
    for part in parts:
        spec = spec.with_overrides(part)
    return spec


def whole_numbers(*shape):
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(0)).float()


def layer_of(shape, spec, stride=1):
    """A convolution of stride 3 adds no patches up."""
    torch.manual_seed(0)
    if shape == "linear":
        return AnalogLinear(40, 10, bias=False, spec=spec)
    return AnalogConv2d(4, 6, 3, stride, groups=2, bias=False, spec=spec)


def error(found, exact):
    return ((found - exact).square().mean().sqrt() / exact.square().mean().sqrt()).item()


@pytest.mark.parametrize("shape", ["linear", "conv"])
@pytest.mark.parametrize(
    ("kind", "form"),
    # a DAC of whole codes makes no errors of its own
    [(kind, form) for kind in KINDS for form in FORMS if form != "streams" or "dac" not in kind.split("_")],
)
def test_each_kind_of_error_is_that_of_the_read(kind, form, shape):
    """Against the read itself, where one kind of error is all that it has."""
    spec = settings(ONE_KIND[kind], FORMS[form], {"backward": {"mode": "ideal"}})
    layer, exact = (layer_of(shape, each) for each in (spec, settings(FORMS[form], WITHOUT_DAC)))
    more = 12 if kind == "noise" else 1
    x = whole_numbers(more * 300, 40) if shape == "linear" else whole_numbers(more * 5, 4, 8, 8)
    (row,) = gx.conversion_errors(layer, [x], step=lambda x: layer(x).detach()).reads
    with torch.no_grad():
        expected = error(layer(x), exact(x))
    assert expected > 1e-3
    assert getattr(row, kind) == pytest.approx(expected, rel=0.02 if kind == "noise" else 1e-3)
    assert row.largest.lower().replace(" ", "_") == kind
    assert all(getattr(row, other) < 1e-3 * expected + 1e-4 for other in KINDS if other != kind)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "errors", [{"gain_std": 0.1, "offset_std": 1e-8}, {"inl": 300.0, "inl_std": 30.0}], ids=["gain", "inl"]
)
def test_errors_of_converters_count_as_noise(errors, form):
    spec = settings(
        {"dac": WHOLE, "adc": {"bits": 12, "range": "worst_case", **errors}},
        FORMS[form],
        {"backward": {"mode": "ideal"}},
    )
    layer, exact = (layer_of("linear", each) for each in (spec, settings(FORMS[form], WITHOUT_DAC)))
    x = whole_numbers(300, 40)
    (row,) = gx.conversion_errors(layer, [x], step=lambda x: layer(x).detach()).reads
    with torch.no_grad():
        expected = error(layer(x), exact(x))
    assert row.noise == pytest.approx(expected, rel=0.02)
    assert row.largest == "noise"


@pytest.mark.parametrize("shape", ["linear", "conv"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("backward", "largest"),
    [
        ({"adc": {"bits": 6, "range": "worst_case"}}, "ADC rounding"),
        ({"dac": {"bits": 8, "range": "sample", "gain_std": 0.1, "offset_std": 1e-3, "inl": 2.0}}, "driving"),
    ],
    ids=["adc", "dac"],
)
def test_errors_of_a_transposed_read_are_those_of_the_gradient(backward, largest, form, shape):
    spec = settings(FORMS[form], {"dac": {"range": "sample", "max": None, "bits": 8}, "backward": backward})
    layer, exact = (layer_of(shape, each, stride=3) for each in (spec, settings(FORMS[form], WITHOUT_DAC)))
    x = torch.zeros(50, 40) if shape == "linear" else torch.zeros(5, 4, 9, 9)
    grad = whole_numbers(*layer(x).shape)
    grad *= torch.logspace(0, 2, len(grad)).view(-1, *[1] * (grad.dim() - 1))  # a range for each sample
    found = []
    for each in (layer, exact):
        inputs = x.clone().requires_grad_()
        each(inputs).backward(grad)
        found.append(inputs.grad)
    rows = gx.conversion_errors(layer, [x], loss=lambda y, _: (y * grad).sum()).reads
    assert [row.read for row in rows] == ["forward", "backward"]
    assert rows[0].largest == "none"  # nothing is driven
    whole = sum(getattr(rows[1], kind) ** 2 for kind in KINDS) ** 0.5
    assert whole == pytest.approx(error(*found), rel=0.02)
    assert rows[1].largest == largest


@pytest.mark.parametrize("shape", ["linear", "conv"])
def test_noise_follows_the_gradients_of_each_sample_where_that_ranges_its_own(shape):
    """Else those of the largest: by how much more is a matter of these alone."""
    x = torch.zeros(50, 40) if shape == "linear" else torch.zeros(50, 4, 9, 9)
    noise, largest = {}, torch.logspace(-2, 0, 50)
    for kind in ("tensor", "sample"):
        spec = settings(
            FORMS["subtracted"], {"dac": {"bits": 8, "range": kind}, "read_noise": {"sigma": 1e-7}}
        )
        layer = layer_of(shape, spec)
        grad = torch.randn(layer(x).shape, generator=torch.Generator().manual_seed(0))
        tops = grad.abs().flatten(1).amax(1)
        grad *= (largest / tops).view(-1, *[1] * (grad.dim() - 1))
        rows = gx.conversion_errors(layer, [x], loss=lambda y, _, grad=grad: (y * grad).sum()).reads
        noise[kind] = rows[1].noise
        assert rows[1].largest == "noise"
    expected = (len(x) / largest.square().sum()).sqrt().item()
    assert noise["tensor"] / noise["sample"] == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("form", ["subtracted", "differential"])
def test_conversions_that_clip_are_those_that_gradients_do_not_pass(form):
    """By the gate of the kernels: of planes and passes of one weight, its mean is the share of conversions inside the range."""
    more = {"mapping": {"scheme": form}, "dac": {**WHOLE, "signed": form == "subtracted"}}
    adc = {
        "bits": 5,
        "range": "fixed",
        "i_max": 4e-6,
        "gain_std": 0.2,
        "offset_std": 3e-7,
        "inl": 1.5,
        "inl_std": 0.5,
    }
    layer = layer_of("linear", settings({"adc": adc}, more))
    x = whole_numbers(200, 40)
    (row, _) = gx.conversion_errors(layer, [x]).reads
    top = layer.dac_top(x)
    driven, lsb = layer.dac_inputs(x, top)
    cells, packing = layer.conductances(), (None,) * 4
    gate = analog_mvm(
        driven, layer.weight.detach(), *cells[:4], None, lsb, layer.adc_range, layer.back_adc_range, layer.adc_error,
        layer.back_adc_error, layer.dac_error, layer.back_dac_error, layer.read_step, 1, *packing, layer.static[0], True,
    )[2]  # fmt: skip
    assert 0.05 < row.adc_clipped < 0.95
    assert row.adc_clipped == pytest.approx(1 - gate.mean().item(), abs=1e-4)
    cut = 0.0 if layer.spec.dac.signed else (x < 0).float().mean().item()
    assert row.dac_clipped == pytest.approx(cut)


def test_rounding_of_float32_is_no_error():
    layer = layer_of("linear", settings({"dac": {**WHOLE, "max": 0.3 * 127}}))
    x = 0.3 * whole_numbers(50, 40)
    (row,) = gx.conversion_errors(layer, [x], step=lambda x: layer(x).detach()).reads
    assert row.largest == "none"
    assert row.dac_rounding > 0


@pytest.mark.parametrize("shape", ["linear", "conv"])
def test_rounding_is_by_the_range_of_each_sample(shape):
    spec = settings({"dac": {"bits": 3, "range": "sample"}, "backward": {"mode": "ideal"}})
    layer, exact = (layer_of(shape, each) for each in (spec, settings(WITHOUT_DAC)))
    x = torch.randn(50, 40) if shape == "linear" else torch.randn(5, 4, 8, 8)  # on no edge of rounding
    x *= torch.logspace(0, 2, len(x)).view(-1, *[1] * (x.dim() - 1))
    (row,) = gx.conversion_errors(layer, [x]).reads
    with torch.no_grad():
        assert row.dac_rounding == pytest.approx(error(layer(x), exact(x)), rel=1e-3)


def test_ideal_transposed_reads_have_no_errors_to_tell():
    layer = layer_of("linear", settings({"backward": {"mode": "ideal"}}))
    assert [row.read for row in gx.conversion_errors(layer, [whole_numbers(5, 40)]).reads] == ["forward"]


def test_values_beyond_a_range_are_counted_over_all_batches():
    layer = layer_of("linear", settings({"dac": {"bits": 8, "range": "fixed", "max": 60.0}}))
    batches = [whole_numbers(1000, 40), torch.zeros(31_000, 40)]  # more rows than are looked at
    (row,) = gx.conversion_errors(layer, batches, step=lambda x: layer(x).detach()).reads
    beyond = (batches[0].abs() > 60).float().mean().item()
    assert row.dac_clipped == pytest.approx(beyond / 32)
    (row,) = gx.conversion_errors(layer, batches, batches=1, step=lambda x: layer(x).detach()).reads
    assert row.dac_clipped == pytest.approx(beyond)


NOISY = {
    "mapping": {"scheme": "subtracted"}, "dac": {"bits": 8, "range": "ema"}, "adc": {"bits": 8}, "read_noise": {"sigma": 1e-8},
}  # fmt: skip


def network():
    torch.manual_seed(0)
    digital = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    return gx.convert(digital, settings(NOISY))[0]


def test_looking_leaves_no_trace_and_reads_with_the_adcs():
    model, x = network(), torch.randn(6, 1, 8, 8)
    with pytest.raises(ValueError, match="0: the ADC range must be calibrated before use"):
        gx.conversion_errors(model, [x])
    gx.calibrate(model, [x])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first = gx.conversion_errors(model, [x], step=lambda x: model.train()(x))
    assert gx.conversion_errors(model, [x], step=lambda x: model.train()(x)) == first
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model[0].training
    assert all(p.grad is None for p in model.parameters())
    assert [(row.layer, row.read) for row in first.reads] == [
        (layer, read) for layer in ("0", "4") for read in ("forward", "backward")
    ]
    narrow = model[0].adc_range * 0.01
    model[0].adc_range.copy_(narrow)
    found = gx.conversion_errors(model, [x]).reads
    assert found[0].adc_clipped > 0.5
    assert found[2].adc_clipping != first.reads[2].adc_clipping  # what the next layer reads has changed
    assert torch.equal(model[0].adc_range, narrow)


def test_the_table_and_the_picture_have_a_place_for_every_read():
    model, x = network(), torch.randn(6, 1, 8, 8)
    gx.calibrate(model, [x])
    found = gx.conversion_errors(model, [x])
    head, *rows = str(found).splitlines()
    names = "layer read DAC clips error DAC rounding driving noise ADC clips error ADC rounding largest"
    assert " ".join(head.split()) == names
    assert [row.split()[:2] for row in rows] == [[row.layer, row.read] for row in found.reads]
    axes = found.draw().axes
    assert [axis.get_title() for axis in axes] == ["forward reads", "backward reads"]
    assert [text.get_text() for text in axes[0].get_xticklabels()] == ["0", "4"]
    drawn = dict(zip(KINDS, ([*line.get_ydata()] for line in axes[1].get_lines()), strict=True))
    assert drawn["noise"] == [100 * row.noise for row in found.reads if row.read == "backward"]
    assert found.reads[1].dac_clipping == 0
    assert isnan(drawn["dac_clipping"][0])  # no point of a logarithmic axis
    part = gx.conversion_errors(nn.ModuleDict({"body": model}), [x], step=lambda x: model(x)).reads
    assert [row.layer for row in part] == ["body.0", "body.0", "body.4", "body.4"]
    digital = nn.Linear(3, 2)
    none = gx.conversion_errors(digital, [x])
    assert (none.reads, none.draw().axes) == ((), [])


def test_what_cannot_be_looked_at_is_refused_by_name():
    model, x = network(), torch.randn(6, 1, 8, 8)
    gx.calibrate(model, [x])
    with pytest.raises(ValueError, match="conversion_errors: `loss` must be None with `step`, got both"):
        gx.conversion_errors(model, [x], loss=print, step=print)
    with pytest.raises(TypeError, match="conversion_errors: `loader` must give batches, got a tensor"):
        gx.conversion_errors(model, x)
    with pytest.raises(ValueError, match="conversion_errors: `loader` must give at least one batch"):
        gx.conversion_errors(model, [])
    with pytest.raises(ValueError, match="conversion_errors: crossbar layers must each have a name"):
        gx.conversion_errors(nn.Sequential(*(AnalogLinear(4, 4, spec=settings(NOISY)) for _ in "12")), [x])
