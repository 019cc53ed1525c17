"""Layers that begin with zeros, as LoRA's B and the last ones of residual branches do: their scale and their ADC ranges."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import gpuxbar as gx
from gpuxbar import reference
from gpuxbar.nn import AnalogConv2d, AnalogLinear

LAW = {"law": "soft_bounds", "up": 1.5, "down": 2.2, "pulses": 200, "spread": 0.1, "cycle": 0.3}
ADAPTER = {"mapping": {"w_max": 0.4}}
# single pairs, pulse trains, one-sided pairs that are refreshed, slices, bit streams
KINDS = {
    "pairs": {},
    "pulses": {"pulses": {"length": 7}},
    "one-sided": {"update": {**LAW, "sides": "one_sided"}, "refresh": {"interval": 2, "above": 0.5}},
    "slices": {"mapping": {"slices": 3, "slice_bits": 2}, "carry": {"interval": 2}},
    "streams": {"mapping": {"slices": 3, "slice_bits": 2}, "carry": {"scheme": "streamed", "interval": 2}},
}
COARSE = "calibrate: ADC ranges must follow currents, got none of lora_B forwards, lora_B backwards"
NOISE = {"read_noise": {"sigma": 1e-8}, "programming": {"write_noise": 1e-8}}


def spec(**parts):
    settings = gx.CrossbarSpec(mapping={"scheme": "subtracted"}, update=LAW)
    return settings.with_overrides(ADAPTER).with_overrides(parts)


class LoRA(nn.Module):
    """A frozen layer with an adapter of low rank, whose B is 0."""

    def __init__(self):
        super().__init__()
        self.base, self.lora_A = nn.Linear(12, 6), nn.Linear(12, 3, bias=False)
        self.lora_B = nn.Linear(3, 6, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        self.base.requires_grad_(False)

    def forward(self, x):
        return self.base(x) + self.lora_B(self.lora_A(x))


def adapter(rules, **parts):
    torch.manual_seed(0)
    settings = gx.CrossbarSpec.model_validate({"mapping": {"scheme": "subtracted"}, "update": LAW, **parts})
    model, _ = gx.convert(LoRA(), settings, rules={"lora_B": rules} if rules else None)
    return model, [p for p in model.parameters() if p.requires_grad]


def train(model, optimiser, steps, seed=0):
    draw, losses = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        x = torch.randn(32, 12, generator=draw)
        optimiser.zero_grad()
        loss = (model(x) - x[:, :6]).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_begin_as_the_reference_programs_them_on_the_scale_given(kind):
    layer = AnalogLinear(5, 4, bias=False, spec=spec(**KINDS[kind]))
    nn.init.zeros_(layer.weight)
    layer.begin_in_situ()
    assert (layer.w_max == np.float32(0.4)).all()
    settings, one_sided = layer.spec, kind == "one-sided"
    lie = {"slices": 3, "slice_bits": 2, "headroom_bits": settings.headroom_bits} if settings.carry else {}
    cells = reference.program(
        np.zeros((1, 4, 5), np.float32),
        w_max=np.ones(1),
        g_min=1e-6,
        g_max=1e-5,
        balanced=not one_sided,
        **lie,
    )
    np.testing.assert_allclose(layer.g_cells, cells, rtol=1e-6)
    assert layer.weight.abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_of_zeros_trains_and_resumes_bit_for_bit(kind):
    def fresh():
        torch.manual_seed(0)
        layer = AnalogLinear(12, 6, spec=spec(**NOISE, **KINDS[kind]))
        nn.init.zeros_(layer.weight)
        return layer, gx.optim.InSituSGD(layer.parameters(), lr=0.3)

    whole, optimiser = fresh()
    first = train(whole, optimiser, 8)
    state = copy.deepcopy((whole.state_dict(), optimiser.state_dict()))
    last = train(whole, optimiser, 8, seed=1)
    assert last[-1] < 0.8 * first[0]
    layer, optimiser = fresh()
    layer.load_state_dict(state[0])
    optimiser.load_state_dict(state[1])
    assert train(layer, optimiser, 8, seed=1) == last
    assert torch.equal(layer.g_cells, whole.g_cells)


def test_an_adapter_trains_in_situ_beside_a_frozen_layer():
    model, trained = adapter({**ADAPTER, "adc": {"range": "worst_case"}}, dac={"bits": 8}, adc={"bits": 8})
    optimiser = gx.optim.InSituSGD(trained, lr=0.3)
    with pytest.warns(
        RuntimeWarning, match="got none of lora_A backwards, whose weights or inputs are zeros"
    ):
        gx.calibrate(model, [(torch.randn(64, 12),) * 2], loss=lambda y, x: (y - x[:, :6]).square().mean())
    losses = train(model, optimiser, 60)
    assert losses[-1] < 0.8 * losses[0]
    assert [model.base.in_situ, model.lora_A.in_situ, model.lora_B.in_situ] == [False, True, True]


def test_zeros_without_a_scale_are_refused_before_any_layer_begins():
    model, trained = adapter(None)
    with pytest.raises(
        ValueError,
        match=r"lora_B: `mapping.w_max` must be set to train a layer in situ that begins with zeros, got None; .*"
        r"\(2.3 would follow from torch's own initialisation\)",
    ):
        gx.optim.InSituSGD(trained, lr=0.1)
    assert not model.lora_A.in_situ
    with torch.no_grad():
        model.lora_B.weight[0, 0] = torch.inf
    with pytest.raises(
        ValueError, match="lora_B: `weight` must be finite to train in situ, got a largest magnitude of inf"
    ):
        gx.optim.InSituSGD(trained, lr=0.1)


@pytest.mark.parametrize("scale", ["tensor", "column"])
def test_weights_beyond_the_scale_given_clip_in_situ_and_are_counted(scale):
    layer = AnalogConv2d(2, 4, 2, groups=2, bias=False, spec=spec(mapping={"scale": scale}))
    weight = torch.linspace(-0.9, 0.7, 16).view_as(layer.weight)
    with torch.no_grad():
        layer.weight.copy_(weight)
    before = layer.clip_rate()
    layer.begin_in_situ()
    torch.testing.assert_close(layer.weight.detach(), weight.clamp(-0.4, 0.4), rtol=0, atol=1e-6)
    clipped = (weight.abs() > 0.4).float().mean().item()
    assert before == clipped == gx.telemetry(layer).layers[0].clipped


def test_a_checkpoint_brings_its_own_scale():
    free, bound = (AnalogLinear(5, 4, spec=spec(mapping={"w_max": scale})) for scale in (None, 0.4))
    free.begin_in_situ()
    bound.load_state_dict(free.state_dict())
    x = torch.randn(3, 5)
    assert torch.equal(bound.w_max, free.w_max)
    assert torch.equal(bound(x), free(x))


WRITING = {"write_noise": 1e-7, "device_spread": 0.05}


@pytest.mark.parametrize(
    ("in_situ", "programming"), [(False, {}), (False, WRITING), (True, {}), (True, WRITING)]
)
@pytest.mark.parametrize("scheme", ["subtracted", "differential"])
def test_calibrated_layers_of_zeros_train(scheme, in_situ, programming):
    """Zeros, and what noise writes of them, tell nothing of the currents to come: the ranges are those of the worst case."""
    parts = {
        "mapping": {"scheme": scheme},
        "dac": {"bits": 8},
        "adc": {"bits": 8},
        "programming": programming,
    }
    model, trained = adapter(ADAPTER if in_situ else {}, **parts)
    optimiser = (gx.optim.InSituSGD if in_situ else torch.optim.SGD)(trained, lr=0.3)
    with pytest.warns(RuntimeWarning, match=COARSE):
        gx.calibrate(model, [(torch.randn(64, 12),) * 2], loss=lambda y, x: (y - x[:, :6]).square().mean())
    worst = 0.2 * 1e-5 * torch.tensor([3, 6])
    torch.testing.assert_close(torch.cat([model.lora_B.adc_range, model.lora_B.back_adc_range]), worst)
    losses = train(model, optimiser, 40)
    assert losses[-1] < 0.9 * losses[0]


def test_layers_on_which_a_loss_does_not_depend_yet_get_gradients_once_it_does():
    """As in a residual branch that ends with a scale of 0."""
    settings = gx.CrossbarSpec(mapping={"scheme": "subtracted"}, dac={"bits": 8}, adc={"bits": 8})
    layer, scale = AnalogLinear(8, 6, spec=settings), nn.Parameter(torch.zeros(1))
    x = torch.randn(16, 8, requires_grad=True)
    with pytest.warns(RuntimeWarning, match="got none of linear backwards"):
        gx.calibrate(layer, [x.detach()], step=lambda x: (scale * layer(x)).square().sum() + scale.sum())
    with torch.no_grad():
        scale += 1
    (scale * layer(x)).square().sum().backward()
    ideal = 2 * (x @ layer.weight.T + layer.bias) @ layer.weight
    assert (x.grad - ideal).norm() < 0.3 * ideal.norm()
