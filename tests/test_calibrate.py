"""Calibrating where a model is compiled, or evaluates without gradients, or in another precision: the ranges are the same."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import cross_entropy

import gpuxbar as gx

X = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
TARGET = torch.arange(64) % 4


def network(**settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    spec = {"dac": {"bits": 8}, "adc": {"bits": 8}} | settings
    return gx.convert(model, gx.CrossbarSpec.model_validate(spec))[0]


def calibrated(model, called=None, batches=((X, TARGET),)):
    """Ranges of both ways of a model's layers, calibrated by calling it, or what is made of it."""
    gx.calibrate(model if called is None else called, batches, loss=cross_entropy)
    layers = model[0], model[2]
    return [full.item() for layer in layers for full in (layer.adc_range, layer.back_adc_range)]


def compiled_in_place(module):
    module.compile(backend="eager")


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_itself(model):
    compiled_in_place(model)


def compiled_layers(model):
    model.apply(compiled_in_place)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # what torch.compile looks at
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("make", [compiled, compiled_itself, compiled_layers])
def test_compiled_models_are_calibrated_as_they_were_before(make, used):
    model, right = network(), calibrated(network())
    if used:
        calibrated(model)
    called = make(model)
    if used:
        cross_entropy((called or model)(X), TARGET).backward()
        calibrated(model, called, [(2 * X.abs(), TARGET)])
    assert calibrated(model, called) == right


def test_calibrating_compiles_nothing_anew():
    model, counter = network(), CompileCounter()
    called = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(3):
        calibrated(model, called)
        cross_entropy(called(X), TARGET).backward()
    assert counter.frame_count == 1


def test_errors_of_conversions_are_those_of_a_compiled_model_too():
    def found():
        return str(gx.conversion_errors(model, [(X, TARGET)], loss=cross_entropy))

    model = network()
    calibrated(model)
    before = found()
    compiled_itself(model)
    assert found() == before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_models_are_calibrated_where_gradients_are_off(mode):
    model, right = network(), calibrated(network())
    with mode():
        found = calibrated(model, batches=[(X.clone(), TARGET.clone())])
    assert found == right
    model(X).sum().backward()


def test_batches_of_inference_mode_calibrate():
    with torch.inference_mode():
        batch = X.clone(), TARGET.clone()
    assert calibrated(network(), batches=[batch]) == calibrated(network())


def test_currents_are_not_rounded_by_autocast():
    right = calibrated(network())
    with torch.autocast("cpu", torch.bfloat16):
        assert calibrated(network()) == right


def test_errors_of_conversions_are_not_rounded_by_autocast():
    model = network(mapping={"slices": 2, "slice_bits": 3})
    calibrated(model)
    found = gx.conversion_errors(model, [(X, TARGET)], loss=cross_entropy).reads
    with torch.autocast("cpu", torch.bfloat16):
        assert gx.conversion_errors(model, [(X, TARGET)], loss=cross_entropy).reads == found


def test_a_norm_of_the_meta_device_that_is_not_called_is_left_there():
    model = network()
    model[0].norm = nn.BatchNorm1d(3, device="meta")
    assert calibrated(model) == calibrated(network())


def test_no_more_batches_are_taken_than_are_used():
    batches = iter([X, X, X])
    gx.calibrate(network(), batches, 2)
    assert len(list(batches)) == 1


def test_one_batch_by_names_is_no_loader():
    said = "calibrate: `loader` must give batches, got one: a dict; pass [batch]"
    model, batch = network(), {"x": X, "labels": TARGET}
    with pytest.raises(TypeError, match=re.escape(said)):
        gx.calibrate(model, batch, step=lambda each: cross_entropy(model(each["x"]), each["labels"]))


def test_models_are_converted_by_an_example_in_inference_mode():
    with torch.inference_mode():
        model, report = gx.convert(nn.Sequential(nn.Linear(16, 32)), gx.presets.demo(), example=X)
    assert "512" in str(report)
