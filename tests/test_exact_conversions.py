"""Conversions that change no current are left out: the same outputs and gradients, from one product."""

import numpy as np
import pytest
import torch

import gpuxbar as gx
from gpuxbar.mapping import plan_reads
from gpuxbar.nn import AnalogConv2d, AnalogLinear

INPUTS, OUTPUTS = 19, 11
SLICED = {"slices": 3, "slice_bits": 2}
# a level is 3 uS here, a unit of current 0.2 V times 1 uS
WINDOW = {"g_min": 1e-6, "g_max": 1e-5}
EXACT = {
    "txsim": gx.presets.txsim(tile=7).model_dump(),
    "stuck cells": {
        "tile": {"rows": 8, "cols": 5}, "device": WINDOW, "mapping": SLICED,
        "dac": {"bits": 4, "stream_bits": 1, "polarity": "two_phase"}, "adc": {"bits": 7, "range": "fixed", "i_max": 127 * 2e-7},
        "programming": {"stuck_at_g_min": 0.1, "stuck_at_g_max": 0.1},
    },
    "subtracted, signed": {
        "tile": {"rows": 8, "cols": 5}, "device": WINDOW, "mapping": {**SLICED, "scheme": "subtracted"},
        "dac": {"bits": 3}, "adc": {"bits": 10, "range": "fixed", "i_max": 511 * 2e-7},
    },
    "levels without slices": {
        "tile": {"rows": 8, "cols": 5}, "device": {"g_min": 0.0, "g_max": 1e-5, "levels": 6},
        "dac": {"bits": 3}, "adc": {"bits": 9, "range": "fixed", "i_max": 255 * 2e-6 * 0.2 / 3},
        "backward": {"mode": "ideal"},
    },
    "worst case": {
        "tile": {"rows": 3, "cols": 3}, "device": {"g_min": 0.0, "g_max": 7e-6}, "mapping": {"slices": 2, "slice_bits": 3},
        "dac": {"bits": 4, "stream_bits": 3, "polarity": "two_phase"}, "adc": {"bits": 10, "range": "fixed", "i_max": 1023 * 0.2e-6 / 7},
    },
}  # fmt: skip


def merged(spec):
    plan, planes = plan_reads(spec, inputs=INPUTS, outputs=OUTPUTS, groups=1, seed=0)
    return planes.merge == "all" and plan.forward.adc_bits == plan.backward.adc_bits == 0


def passes(layer, x):
    """Output and both gradients."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)))
    return y.detach(), x.grad, layer.weight.grad


@pytest.mark.parametrize("name", EXACT)
def test_reads_are_those_of_every_conversion(name):
    spec = gx.CrossbarSpec.model_validate(EXACT[name])
    # an offset of a billionth of a step: every conversion is computed
    every = spec.with_overrides({"adc": {"offset_std": 1e-16}})
    assert merged(spec)
    assert not merged(every)
    for make, shape in (
        (lambda spec: AnalogLinear(INPUTS, OUTPUTS, spec=spec), (13, INPUTS)),
        (lambda spec: AnalogConv2d(2, 5, 3, spec=spec), (2, 2, 6, 5)),
    ):
        torch.manual_seed(0)
        one = make(spec)
        other = make(every)
        other.load_state_dict(one.state_dict())
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        for a, b in zip(passes(one, x), passes(other, x), strict=True):
            assert b.abs().max() > 0
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * b.abs().max())


@pytest.mark.parametrize(
    "change",
    [
        {"read_noise": {"sigma": 1e-9}},
        {"read_noise": {"sigma_g": 1e-9}},
        {"adc": {"gain_std": 0.01}},
        {"adc": {"inl": 0.1}},
        {"adc": {"range": "calibrated", "i_max": None}},
        {"adc": {"i_max": 62 * 2e-7}},  # the step is no part of a current
        {"adc": {"bits": 6, "i_max": 63 * 2e-7}},  # 8 lines of 10 units are cut off
        {"adc": {"bits": 6, "i_max": 63 * 4e-7}},  # the step is two units
        {"device": {"g_max": 1.05e-5}},
        {"dac": {"bits": None, "stream_bits": None, "polarity": "bipolar"}},
        {"mapping": {"slices": 1, "slice_bits": None}},
        {"programming": {"write_noise": 1e-9}},
        {"programming": {"device_spread": 0.01}},
        {"parasitics": {"r_bitline": 1.0}},
        {"drift": {"nu_min": 0.05, "nu_max": 0.05}},
        {"mapping": {"slices": 1, "slice_bits": None}, "update": {"law": "ideal"}},
        {"precision": "fp16"},
        {"backward": {"adc": {"bits": 4}}},
    ],
    ids=str,
)
def test_what_is_not_exact_is_converted(change):
    spec = gx.CrossbarSpec.model_validate(EXACT["stuck cells"])
    assert merged(spec)
    assert not merged(spec.with_overrides(change))


def test_lines_that_a_tile_has_not_cut_nothing_off():
    """A transposed read drives no more bitlines than there are outputs: 11 of 10 units, where 16 would be cut off at 127."""
    spec = gx.CrossbarSpec.model_validate(EXACT["stuck cells"])
    same = {"adc": {"i_max": spec.adc.i_max}}
    assert merged(spec.with_overrides({"tile": {"cols": 16}, **same}))
    assert not merged(spec.with_overrides({"tile": {"rows": 16}, **same}))


def test_an_ideal_gradient_needs_no_exact_converter():
    spec = gx.CrossbarSpec.model_validate(EXACT["stuck cells"])
    assert merged(spec.with_overrides({"backward": {"mode": "ideal", "adc": {"bits": 4}}}))


def test_a_plan_says_why():
    spec = gx.CrossbarSpec.model_validate(EXACT["txsim"])
    plan, _ = plan_reads(spec, inputs=INPUTS, outputs=OUTPUTS, groups=1, seed=0)
    assert plan.why == (
        "tiles, planes and streams merge: every current is a whole number of ADC steps, and none is cut off",
    )
