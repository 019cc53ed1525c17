"""What layers call on the CPU by address against the same calls of the ops on arrays, whose oracle is the reference."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn, profiler
from torch.utils._python_dispatch import TorchDispatchMode

import gpuxbar as gx
from gpuxbar.bridge import host
from gpuxbar.nn import AnalogConv2d, AnalogLinear
from gpuxbar.ops import ConvGeometry
from gpuxbar.ops.images import Conv

TILES = {
    "tile": {"rows": 16, "cols": 8},
    "dac": {"bits": 6},
    "adc": {"bits": 7},
    "read_noise": {"sigma": 2e-8},
}
ERRORS = {"bits": 7, "per": "column", "gain_std": 0.02, "offset_std": 1e-8, "inl": 1.0, "inl_std": 0.5}
SOFT = {"law": "soft_bounds", "spread": 0.2, "cycle": 0.1, "pulses": 200}
SPECS = {
    "pairs": TILES,
    "subtracted": {**TILES, "mapping": {"scheme": "subtracted"}, "adc": ERRORS, "backward": {"adc": ERRORS}},
    "offset": {**TILES, "mapping": {"scheme": "offset"}},
    "streams": {
        **TILES,
        "dac": {"bits": 6, "stream_bits": 2, "polarity": "two_phase"},
        "mapping": {"slices": 2, "slice_bits": 3},
    },
    "samples": {
        **TILES,
        "dac": {"bits": 6, "range": "sample"},
        "backward": {"dac": {"bits": 6, "range": "sample"}},
    },
    "offset samples": {
        **TILES,
        "mapping": {"scheme": "offset"},
        "dac": {"bits": 6, "range": "sample"},
        "backward": {"dac": {"bits": 6, "range": "sample"}},
    },
    "fixed": {
        **TILES,
        "dac": {"bits": 6, "range": "fixed", "max": 2.0},
        "backward": {"dac": {"bits": 6, "range": "fixed", "max": 0.01}},
    },
    "running": {**TILES, "dac": {"bits": 6, "range": "ema", "signed": False}},
    "learned": {**TILES, "dac": {"bits": 6, "range": "learned"}},
    "states": {**TILES, "read_noise": {"sigma_g": 1e-7}, "generator": "fast"},
    "no converters": {"tile": {"rows": 16, "cols": 8}, "read_noise": {"sigma": 1e-8}},
    "samples as they are": {
        "tile": {"rows": 16, "cols": 8},
        "dac": {"range": "sample"},
        "backward": {"dac": {"range": "sample"}},
    },
    "written": {**TILES, "programming": {"write_noise": 1e-7, "stuck_at_g_min": 0.02}},
    "in situ": {**TILES, "update": SOFT},
    "pulsed": {**TILES, "update": SOFT, "pulses": {}},
    "counted": {
        **TILES,
        "update": {"law": "constant_step"},
        "pulses": {"mode": "aggregated"},
        "endurance": {"pulses": 1e4},
    },
    "pulsed held": {**TILES, "update": {**SOFT, "write_noise": 1e-8}, "pulses": {}},
    "held": {**TILES, "update": {**SOFT, "write_noise": 1e-8}, "endurance": {"pulses": 1e4, "spread": 0.1}},
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, padding=1, stride=2, groups=2)
        self.linear = nn.Linear(8 * 16, 12)

    def forward(self, x):
        return self.linear(torch.relu(self.conv(x)).flatten(1))


def trained(parts, steps=2):
    """All that two steps leave: outputs, gradients of inputs and biases, and the state of the layers, whose biases stay."""
    torch.manual_seed(3)
    x, found, biases = torch.randn(5, 2, 8, 8), [], []
    model, _ = gx.convert(Net(), gx.CrossbarSpec(**parts))
    optimiser = (gx.optim.InSituSGD if "update" in parts else torch.optim.SGD)(model.parameters(), lr=0.05)
    if "adc" in parts:
        gx.calibrate(model, [x], loss=lambda y, _: y.square().mean())
    for _ in range(steps):
        image = x.clone().requires_grad_()
        y = model(image)
        optimiser.zero_grad()
        y.square().mean().backward()
        for layer in (model.conv, model.linear):
            biases.append(layer.bias.grad)
            layer.bias.grad = None
        optimiser.step()
        found += [y.detach(), image.grad]
    return found + list(model.state_dict().values()), biases


@pytest.mark.parametrize("case", SPECS)
def test_calls_by_address_give_the_bits_of_the_ops(case, monkeypatch):
    by_address, sums = trained(SPECS[case])
    calls = []
    monkeypatch.setattr(host, "serves", lambda device: calls.append(device) and False)
    on_arrays, sums_of_torch = trained(SPECS[case])
    assert calls
    assert all(map(torch.equal, by_address, on_arrays))
    torch.testing.assert_close(sums, sums_of_torch, rtol=1e-6, atol=1e-9)  # of five rows, in another order
    assert by_address[0].abs().max() > 0


def layer(inputs=6, outputs=7, **parts):
    torch.manual_seed(0)
    fixed = {"bits": 7, "range": "worst_case"}
    return AnalogLinear(
        inputs, outputs, spec=gx.CrossbarSpec(**{**TILES, "adc": fixed, "backward": {"adc": fixed}, **parts})
    )


def step_of(module, x, grad):
    y = module(x)
    (to_x,) = torch.autograd.grad(y, x, grad)
    return y.detach(), to_x


def test_the_reference_is_asked_where_it_is_wanted(monkeypatch):
    monkeypatch.setattr("gpuxbar.launch.host.WANTED", "reference")
    monkeypatch.setattr(host, "address", None)
    module, x = layer(), torch.randn(3, 6, requires_grad=True)
    y, to_x = step_of(module, x, torch.ones(3, 7))
    assert y.abs().max() > 0
    assert to_x.abs().max() > 0


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradients_are_the_same_whichever_are_wanted(wanted):
    module, x, grad = layer(), torch.randn(5, 6), torch.randn(5, 7)
    module.adc_range *= 0.05  # so that some conversions clip, and gates count

    def found(*asked):
        module.read_step.zero_()
        tensors = x.clone(), module.weight, module.bias
        for tensor, one in zip(tensors, asked, strict=True):
            tensor.requires_grad_(one)
        some = [tensor for tensor, one in zip(tensors, asked, strict=True) if one]
        return torch.autograd.grad(module(tensors[0]), some, grad)

    (alone,) = found(*wanted)
    assert alone.abs().max() > 0
    assert torch.equal(alone, found(True, True, True)[wanted.index(True)])


def test_the_gradient_of_a_bias_keeps_its_digits_over_many_samples():
    module = layer()
    grad = torch.rand(100_003, 7)
    (found,) = torch.autograd.grad(module(torch.randn(len(grad), 6)), module.bias, grad)
    torch.testing.assert_close(found.double(), grad.double().sum(0), rtol=3e-7, atol=0)


def test_gradients_that_are_not_finite_are_left_to_be_found():
    module, x, grad = layer(), torch.randn(5, 6, requires_grad=True), torch.ones(5, 7)
    grad[2, 3] = torch.inf
    to_x, to_weight, to_bias = torch.autograd.grad(module(x), (x, module.weight, module.bias), grad)
    assert to_x.isnan().all()
    assert to_weight.isfinite().all(1).tolist() == [True] * 3 + [False] + [True] * 3
    assert to_bias.isinf().tolist() == [False] * 3 + [True] + [False] * 3


@pytest.mark.parametrize("bad", ["weight", "x"])
def test_a_read_that_is_refused_leaves_no_trace(bad):
    module, x = layer(), torch.randn(3, 6)
    module(x)
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with torch.no_grad():
        (module.weight if bad == "weight" else x)[1, 2] = torch.nan
    with pytest.raises(ValueError, match=f"`{bad}` must be finite, got 1 NaN"):
        module(x)
    assert all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())


@pytest.mark.parametrize(("wanted", "backend"), [("reference", "reference"), ("", "host")])
def test_the_environment_is_asked_as_python_imports(wanted, backend):
    done = subprocess.run(
        [sys.executable, "-c", "from gpuxbar.launch import explain; print(*explain())"],
        env={**os.environ, "GPUXBAR_BACKEND": wanted},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(backend)


def test_convolutions_are_read_after_those_of_many_other_shapes():
    """What a kept read points to stays, though structs of convolutions are kept for 4096 of them alone."""
    conv = AnalogConv2d(1, 2, 3, spec=gx.CrossbarSpec(dac={"bits": 8}))
    image = torch.randn(1, 1, 9, 9)
    with torch.no_grad():
        before = conv(image)
        for width in range(4200):
            Conv.of(ConvGeometry(1, 3, 3 + width, (3, 3)))
        assert torch.equal(conv(image), before)


@pytest.mark.parametrize("kind", ["transposed", "expanded"])
def test_weights_and_biases_of_any_strides_are_read(kind):
    module, x = layer(), torch.randn(3, 6)
    with torch.no_grad():
        module.bias.fill_(0.3)
        expected = module(x)
        module.read_step.zero_()
        if kind == "transposed":
            module.weight = nn.Parameter(module.weight.t().contiguous().t())
            assert not module.weight.is_contiguous()
        else:
            del module._parameters["bias"]
            module.bias = torch.full((1,), 0.3).expand(7)
        assert torch.equal(module(x), expected)


def test_a_batch_of_one_sample_is_read_backwards_with_reference_lines():
    conv = AnalogConv2d(3, 4, 1, spec=gx.CrossbarSpec(mapping={"scheme": "offset"}))
    x = torch.randn(1, 3, 4, 5, requires_grad=True)
    conv(x).sum().backward()
    expected = conv.weight.detach().sum((0, 2, 3)).view(1, 3, 1, 1).expand(1, 3, 4, 5)
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-5)


def test_tensors_that_are_not_what_lies_in_memory_are_resolved_first():
    module, x = layer(), torch.randn(3, 6)

    def fresh(x, grad):
        module.read_step.zero_()
        return step_of(module, x.requires_grad_(), grad)

    ones = torch.ones(3, 7)
    for found, expected in zip(fresh(torch._neg_view(x), ones), fresh(-x, ones), strict=True):
        assert torch.equal(found, expected)
    assert fresh(x, torch._efficientzerotensor((3, 7)))[1].abs().max() < 1e-6
    module.read_step.zero_()
    (many,) = torch.autograd.grad(module(x), x, torch.ones(2, 3, 7), is_grads_batched=True)
    torch.testing.assert_close(many, fresh(x, ones)[1].expand(2, 3, 6))


def test_layers_are_read_within_a_transform_of_what_they_do_not_read():
    module, x = layer(), torch.randn(3, 6)
    y = module(x)
    module.read_step.zero_()
    found = torch.func.vmap(lambda factor: factor * module(x))(torch.ones(2))
    torch.testing.assert_close(found, y.expand(2, 3, 7))


@pytest.mark.parametrize("onlooker", ["profiler", "mode"])
def test_onlookers_see_operators_called(onlooker):
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    module, x = layer(), torch.randn(3, 6, requires_grad=True)
    with Mode() if onlooker == "mode" else profiler.profile(acc_events=True) as found:
        module(x).sum().backward()
    if onlooker == "profiler":
        seen = [event.key for event in found.key_averages()]
    assert {f"gpuxbar::{name}" for name in ("reprogram", "analog_mvm", "matrix_gradients")} <= set(seen)


def test_planes_that_the_plan_does_not_know_are_refused():
    module = layer(mapping={"slices": 2, "slice_bits": 3}, update={"law": "ideal"}, carry={})
    module.begin_in_situ()
    module.g_cells = torch.cat([module.g_cells] * 2)
    with pytest.raises(ValueError, match=r"must have .* 4 planes, got 1, 1 and 8"):
        module(torch.randn(3, 6))


def test_a_range_of_no_weight_is_refused_before_any_device_moves():
    module = layer(update={"law": "ideal"})
    module.begin_in_situ()
    before = module.g_cells.clone()
    module.w_max[2] = float("nan")
    with pytest.raises(ValueError, match="`w_max` must be finite and above 0, got nan to nan"):
        module.update_cells(torch.full((7, 6), 0.1))
    assert torch.equal(module.g_cells, before)


def test_a_weight_that_something_else_set_is_refused_before_any_pulse():
    module = layer(update={"law": "soft_bounds"}, pulses={})
    module.begin_in_situ()
    before = module.g_cells.clone()
    with torch.no_grad():
        module.weight[0, 0] += 0.1
    with pytest.raises(
        ValueError, match="`weight` must be what the cells read once trained in situ, got 1 other"
    ):
        module.update_in_array(torch.ones(2, 6), torch.ones(2, 7), 0.1)
    assert torch.equal(module.g_cells, before)


@pytest.mark.parametrize("value", [0.0, float("inf")])
def test_a_range_of_no_weight_is_refused_before_any_pulse(value):
    module = layer(update={"law": "soft_bounds"}, pulses={})
    module.begin_in_situ()
    before = module.g_cells.clone()
    module.w_max[2:4] = value
    with pytest.raises(
        ValueError, match="`w_max` must be finite and above 0, got 2 other values; use the largest"
    ):
        module.change_in_array(torch.ones(2, 6), torch.ones(2, 7), 0.1)
    assert torch.equal(module.g_cells, before)


@pytest.mark.parametrize(
    "wrong", [torch.zeros(3), torch.zeros(4).double(), torch.zeros(8)[::2]], ids=["size", "type", "strides"]
)
def test_what_would_leave_a_tensors_memory_is_refused(wrong):
    with pytest.raises(
        ValueError,
        match=r"`g` must be a contiguous tensor of 4 values of torch\.float32 in the CPU's memory, got shape",
    ):
        host.address("g", wrong, 4)
