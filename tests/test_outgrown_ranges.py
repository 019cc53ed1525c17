"""What a layer says in training of a calibrated ADC range that its currents have outgrown."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import gpuxbar as gx
from gpuxbar.nn import AnalogLinear

SPEC = {"dac": {"bits": 8}, "adc": {"bits": 8, "percentile": 100}}
SMALL = torch.eye(16)  # one line drives at a time
LARGE = torch.ones(4, 16)
NAMED = "must follow currents"


def layer(**parts):
    """Of weights of one sign, calibrated by inputs with which a 16th of the lines of LARGE carry current."""
    made = AnalogLinear(16, 4, bias=False, spec=gx.CrossbarSpec.model_validate(SPEC | parts))
    torch.nn.init.uniform_(made.weight, 0.5, 1.0)
    gx.calibrate(made, [SMALL])
    return made


def read(model, x, times):
    """Times at which a read warns of its range, counted from 1."""
    heard = []
    for count in range(1, times + 1):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(x)
        heard += [count for warning in caught if NAMED in str(warning.message)]
    return heard


def test_currents_beyond_a_calibrated_range_are_told_of():
    assert read(layer(), LARGE, 300) == [64, 128, 256]


def test_what_a_calibration_left_inside_or_outside_is_not():
    assert read(layer(), SMALL, 70) == []
    adc = {"bits": 8, "percentile": 10}
    clipping = layer(adc=adc)
    assert gx.conversion_errors(clipping, [SMALL]).reads[0].adc_clipped > 0.4
    assert read(clipping, SMALL, 70) == []


@pytest.mark.parametrize(("rows", "low", "high", "told"), [(2, 0.1, 0.2, []), (5, 0.2, 0.25, [64])])
def test_more_than_a_fifth_that_clips_is_told_of(rows, low, high, told):
    model, some = layer(mapping={"scheme": "subtracted"}), torch.cat([SMALL, LARGE[:1].expand(rows, 16)])
    assert low < gx.conversion_errors(model, [some]).reads[0].adc_clipped < high
    assert read(model, some, 70) == told


def test_reads_are_counted_from_the_last_calibration():
    model = layer()
    assert read(model, LARGE, 60) == []
    gx.calibrate(model, [SMALL])
    assert read(model, LARGE, 66) == [64]
    gx.calibrate(model, [LARGE])
    assert read(model, LARGE, 70) == []


def test_reads_without_gradients_or_of_evaluation_are_not_looked_at():
    model = layer()
    with torch.no_grad():
        assert read(model, LARGE, 70) == []
    assert read(model.eval(), LARGE, 70) == []
    assert read(model.train(), LARGE, 64) == [64]


def test_compiled_graphs_do_not_look():
    model = layer()
    assert read(torch.compile(model, fullgraph=True, backend="eager"), LARGE, 70) == []
    assert read(model, LARGE, 64) == [64]  # counts its own reads alone


@pytest.mark.parametrize("adc", [{"bits": 8, "range": "fixed", "i_max": 1e-9}, {"bits": None}])
def test_ranges_that_the_spec_gives_may_clip(adc):
    assert read(layer(adc=adc), LARGE, 70) == []


def test_what_is_looked_at_changes_no_gradient():
    model, grads = layer(), []
    for _ in range(65):
        x = SMALL.clone().requires_grad_()
        model.weight.grad = None
        model(x).square().sum().backward()
        grads.append((x.grad, model.weight.grad))
    for grad_x, grad_w in grads[1:]:
        assert torch.equal(grad_x, grads[0][0])
        assert torch.equal(grad_w, grads[0][1])


def traced(model):
    return make_fx(model)(LARGE)


def shaped(model):
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        return model(fake.from_tensor(LARGE))


@pytest.mark.parametrize("read_once", [traced, shaped])
def test_tracers_which_have_no_values_are_not_looked_at(read_once):
    model = layer()
    assert read(model, LARGE, 63) == []
    read_once(model)
    assert read(model, LARGE, 64) == [64]  # the 128th
