"""Layers, conversion, gradients and training on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gpuxbar as gx
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


@pytest.mark.parametrize("scheme", ["differential", "subtracted"])
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
    torch.manual_seed(0)
    layer = AnalogConv2d(4, 6, 3, **options, spec=spec(mapping={"scheme": scheme}))
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
    torch.manual_seed(0)
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
    assert not torch.equal(g, layer.conductances()[0])


def test_convert_reports_every_module():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 10), nn.Linear(10, 2)
    )
    converted, report = gx.convert(model, spec(), rules={"4": None, "3": {"adc": {"bits": 6}}})
    assert [(row[0], row[2]) for row in report.rows] == [
        ("0", "analog"),
        ("1", "digital"),
        ("3", "analog"),
        ("4", "digital"),
    ]
    assert converted[3].spec.adc.bits == 6
    assert "no crossbar form" in str(report)
    assert type(model[0]) is nn.Conv2d
    with pytest.raises(ValueError, match="no match for"):
        gx.convert(model, spec(), rules={"head": None})


def test_uncalibrated_and_empty_are_refused():
    layer = AnalogLinear(4, 2, spec=spec(adc={"bits": 8}))
    with pytest.raises(ValueError, match="must be calibrated"):
        layer(torch.randn(2, 4))
    with pytest.raises(ValueError, match="at least one sample"):
        AnalogLinear(4, 2, spec=spec())(torch.empty(0, 4))


def test_opcheck():
    layer = AnalogLinear(6, 3, spec=spec(dac={"bits": 8}))
    g, w_max = layer.conductances()
    one = torch.full((1,), 0.02)
    args = (
        torch.randn(2, 6, requires_grad=True),
        layer.weight,
        g,
        w_max,
        layer.bias,
        one,
        one,
        one,
        torch.zeros(1, dtype=torch.int64),
    )
    torch.library.opcheck(torch.ops.gpuxbar.analog_mvm.default, (*args, layer.plan.dumps()))


def digits():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    x = torch.from_numpy(data.images).float()[:, None] / 16
    return [
        torch.as_tensor(a)
        for a in train_test_split(x, data.target, test_size=0.25, random_state=0, stratify=data.target)
    ]


def test_hardware_aware_training_comes_within_a_percent_of_ideal():
    x, x_test, t, t_test = digits()

    def trained(convert):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))  # fmt: skip
        if convert:
            model, _ = gx.convert(model, spec(**NOISY))
            gx.calibrate(model, [x[:200]])
        opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for epoch in range(6):
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
            for part in order.split(64):
                opt.zero_grad()
                nn.functional.cross_entropy(model(x[part]), t[part]).backward()
                opt.step()
        with torch.no_grad():
            return (model(x_test).argmax(1) == t_test).float().mean().item()

    ideal, analog = trained(False), trained(True)
    assert ideal > 0.96
    assert analog > ideal - 0.01
