"""The order of a convolution's channels and positions on its wordlines: everywhere that a weight meets a line.

The oracle is the matrix: a convolution is the linear layer of its unfolded images, with the columns of its weight and of the
patches in the order of the lines, device for device and draw for draw.
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from test_wires_gradient import gpu_path
from torch import nn

import gpuxbar as gx
from gpuxbar import ops, reference
from gpuxbar.bridge.lines import by_line, fold_lines, of_lines, some_lines, unfold_lines, written
from gpuxbar.nn import AnalogConv2d, AnalogLinear
from gpuxbar.ops import ConvGeometry
from gpuxbar.optim import build_optimizer

ORDERS = ("channel_position", "position_channel")
CHANNELS, KERNEL = 5, (3, 2)
IMAGES = (3, CHANNELS, 6, 4)
# a permuted axis of channels and positions: line l holds element LINES[order][l] of torch's flattened weight
PLACES = np.arange(CHANNELS * 6).reshape(CHANNELS, 6)
LINES = {"channel_position": PLACES.ravel(), "position_channel": PLACES.T.ravel()}


def spec(order, **parts):
    parts["mapping"] = {**parts.get("mapping", {}), "line_order": order}
    return gx.CrossbarSpec.model_validate(parts)


NOISY = {
    "tile": {"rows": 8, "cols": 3},  # four tiles, none of which holds whole channels or positions
    "mapping": {"scheme": "subtracted", "scale": "column"},
    "dac": {"bits": 8},
    "adc": {"bits": 6, "range": "worst_case", "gain_std": 0.1, "offset_std": 1e-7},
    "read_noise": {"sigma": 1e-7, "sigma_g": 1e-7},
    "programming": {
        "write_noise": 2e-7,
        "device_spread": 0.1,
        "stuck_at_g_min": 0.05,
        "stuck_at_g_max": 0.05,
    },
    "seed": 2**40 + 1,
}
OFFSET = {**NOISY, "mapping": {"scheme": "offset"}}
SLICED = {**NOISY, "mapping": {"slices": 3, "slice_bits": 2}}
WIRED = {
    **NOISY,
    "parasitics": {"r_wordline": 3.0, "r_bitline": 2.0, "r_source": 20.0, "terminations": "role"},
}
GRADIENT = {**NOISY, "parasitics": {"r_wordline": 3.0, "r_bitline": 2.0, "gradient": "exact"}}


def twins(order, **parts):
    """A convolution, the linear layer of its patches, and the images and patches that both read."""
    torch.manual_seed(0)
    conv = AnalogConv2d(CHANNELS, 4, KERNEL, padding=1, stride=(1, 2), spec=spec(order, **parts), name="one")
    linear = AnalogLinear(CHANNELS * 6, 4, spec=spec("channel_position", **parts), name="one")
    with torch.no_grad():
        linear.weight.copy_(conv.weight.flatten(1)[:, LINES[order]])
        linear.bias.copy_(conv.bias)
    x = torch.randn(IMAGES)
    return conv, linear, x.clone().requires_grad_(), patches(x, order).requires_grad_()


def unfolded(x):
    return nn.functional.unfold(x, KERNEL, 1, 1, (1, 2))


def patches(x, order):
    return unfolded(x)[:, LINES[order]].transpose(1, 2).flatten(0, 1).contiguous()


def pixels(y):
    """Rows of a linear layer as the convolution's images have them."""
    return y.flatten(2).transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize(
    "parts", [NOISY, OFFSET, SLICED, WIRED, GRADIENT], ids=["pairs", "offset", "sliced", "wires", "exact"]
)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.usefixtures("backend")
def test_a_convolution_is_the_linear_layer_of_its_patches(order, parts):
    """Forwards bit for bit; backwards up to the order in which patches fold."""
    conv, linear, x, rows = twins(order, **parts)
    y, expected = conv(x), linear(rows)
    torch.testing.assert_close(pixels(y), expected, rtol=0, atol=0)
    grad = torch.randn(y.shape)
    y.backward(grad)
    expected.backward(pixels(grad))
    back = torch.empty_like(rows.grad)
    back[:, LINES[order]] = rows.grad
    back = back.unflatten(0, (IMAGES[0], -1)).transpose(1, 2)
    folded = nn.functional.fold(back, IMAGES[2:], KERNEL, 1, 1, (1, 2))
    torch.testing.assert_close(x.grad, folded, rtol=0, atol=1e-5 * folded.abs().max().item())
    off = conv.weight.grad.flatten(1)[:, LINES[order]] - linear.weight.grad
    assert off.abs().max() < 1e-5 * linear.weight.grad.abs().max()
    assert y.detach().unique().numel() > 30


def test_the_order_decides_which_weights_share_a_tile():
    """With partial sums converted apart, the two orders err apart."""
    y = [
        twins(order, **{**NOISY, "read_noise": {}, "programming": {}})[0](torch.ones(IMAGES))
        for order in ORDERS
    ]
    assert 0.01 < (y[0] - y[1]).norm() / y[0].norm() < 1


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("scheme", ["differential", "offset"])
def test_ideal_layers_are_torchs_in_either_order(groups, scheme):
    """Groups and depthwise convolutions, in tiles that cut them anywhere; weights in either memory format."""
    torch.manual_seed(1)
    plain = nn.Conv2d(4, 8, 3, groups=groups, padding=(0, 1), dilation=(2, 1))
    x = torch.randn(2, 4, 7, 6)
    grads = []
    for order, memory in (
        (None, None),
        *((o, m) for o in ORDERS for m in ("contiguous_format", "channels_last")),
    ):
        layer = plain
        if order is not None:
            layer, _ = gx.convert(plain, spec(order, tile={"rows": 7, "cols": 3}, mapping={"scheme": scheme}))
            layer = layer.to(memory_format=getattr(torch, memory))
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        layer.zero_grad()
        (y * torch.arange(y.numel()).view(y.shape).sin()).sum().backward()
        grads.append((y.detach(), inputs.grad, layer.weight.grad.clone()))
    for found in grads[1:]:
        for got, wanted in zip(found, grads[0], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


LAW = {"law": "constant_step", "pulses": 200, "step_spread": 0.3, "cycle": 0.3}
IN_SITU = {**{k: v for k, v in NOISY.items() if k != "read_noise"}, "update": LAW}
SETTINGS = {
    "sgd": {"momentum": 0.5},
    "mixed-precision": {},
    "tiki-taka-v2": {"lines": 7},
    "chopped-tiki-taka-v2": {"lines": 7, "flip": 0.4},
}


def steps(layer, x, optimizer, count):
    for _ in range(count):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", SETTINGS)
def test_algorithms_write_the_devices_of_the_linear_layer(name):
    """The same gradients, so the same devices; the weight keeps torch's layout."""
    conv, linear, _, _ = twins("position_channel", **IN_SITU)
    mine, theirs = (build_optimizer(name, layer, lr=0.5, **SETTINGS[name]) for layer in (conv, linear))
    torch.testing.assert_close(conv.g_cells, linear.g_cells, rtol=0, atol=0)
    start = conv.g_cells.clone()
    for _ in range(4):
        grad = torch.randn(conv.weight.shape)
        conv.weight.grad, linear.weight.grad = (
            grad,
            grad.flatten(1)[:, LINES["position_channel"]].contiguous(),
        )
        mine.step(), theirs.step()
    torch.testing.assert_close(conv.g_cells, linear.g_cells, rtol=0, atol=0)
    torch.testing.assert_close(
        conv.weight.flatten(1)[:, LINES["position_channel"]], linear.weight, rtol=0, atol=0
    )
    assert (conv.g_cells != start).float().mean() > 0.3


@pytest.mark.parametrize(("name", "mode"), [("sgd", "exact"), ("sgd", "aggregated"), ("tiki-taka", "exact")])
def test_pulse_trains_of_lines(name, mode):
    """Samples are the patches, and a line has its trains, whichever order it is in; images of several sizes too."""
    parts = {**IN_SITU, "pulses": {"length": 15, "mode": mode}, "endurance": {"pulses": 500, "spread": 0.1}}
    conv, linear, x, rows = twins("position_channel", **parts)
    grad = torch.randn(conv(x).shape)
    for layer, inputs, d in ((conv, x, grad), (linear, rows, pixels(grad))):
        more = {} if name == "sgd" else {"lines": 99}
        optimizer = build_optimizer(name, layer, lr=0.5, **more)
        layer.streams.pairs = [(inputs.detach(), d.contiguous())]
        optimizer.step()
    torch.testing.assert_close(conv.g_cells, linear.g_cells, rtol=0, atol=0)
    torch.testing.assert_close(conv.pulse_count, linear.pulse_count, rtol=0, atol=0)
    read = conv.weight.flatten(1)[:, LINES["position_channel"]]
    torch.testing.assert_close(read, linear.weight, rtol=0, atol=0)
    assert conv.pulse_count.float().mean() > 1
    lines, errors = conv.as_lines(x.detach(), grad)
    torch.testing.assert_close(lines, rows, rtol=0, atol=0)
    torch.testing.assert_close(errors, pixels(grad), rtol=0, atol=0)


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_are_written_alike_in_either_order(groups):
    """Devices without spread and noise take the same weights to the same place wherever they lie."""
    weights = []
    for order in ORDERS:
        torch.manual_seed(2)
        law = {"law": "soft_bounds", "pulses": 300}
        layer = AnalogConv2d(4, 4, 3, groups=groups, spec=spec(order, update=law))
        steps(layer, torch.randn(3, 4, 6, 5), build_optimizer("tiki-taka", layer, lr=0.5, lines=99), 2)
        weights.append(layer.weight.detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=2e-6 * weights[0].abs().max().item())


def test_a_run_resumes_bit_for_bit():
    """A checkpoint holds devices by line; one of the other order is refused."""

    def build(order):
        layer, _, x, _ = twins(order, **IN_SITU)
        return layer, build_optimizer("tiki-taka-v2", layer, lr=0.5, lines=7), x

    layer, optimizer, x = build("position_channel")
    steps(layer, x, optimizer, 2)
    saved = {k: v.clone() for k, v in layer.state_dict().items()}, optimizer.state_dict()
    again, resumed, _ = build("position_channel")
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for one, way in ((layer, optimizer), (again, resumed)):
        steps(one, x, way, 2)
    for key, value in layer.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, rtol=0, atol=0, msg=key)
    other, _, _ = build("channel_position")
    other.load_state_dict(saved[0])
    with pytest.raises(ValueError, match="`weight` must be what the cells read"):
        other(x)


def test_programmed_devices_age_by_line():
    conv, linear, x, rows = twins("position_channel", **{**NOISY, "drift": {"nu": 0.06, "nu_std": 0.3}})
    for layer in (conv, linear):
        gx.program(layer)
        gx.age(layer, 3600.0)
    torch.testing.assert_close(pixels(conv(x)), linear(rows), rtol=0, atol=0)


def test_ranges_are_those_of_the_tiles():
    parts = {**NOISY, "adc": {"bits": 6, "per": "column"}}
    for order in ORDERS:
        conv, linear, x, rows = twins(order, **parts)
        for layer, inputs in ((conv, x), (linear, rows)):
            gx.calibrate(layer, [inputs.detach()], loss=lambda y, _: (y**2).sum())
        torch.testing.assert_close(conv.adc_range, linear.adc_range, rtol=0, atol=0)
        torch.testing.assert_close(conv.back_adc_range, linear.back_adc_range, rtol=1e-5, atol=0)


def test_a_layer_on_a_gpu_keeps_what_it_packed(monkeypatch):
    """Gathered or unfolded, what is packed fits the memory that is kept; reads are those of the CPU but for rounding edges."""
    parts = {
        "dac": {"bits": 8},
        "adc": {"bits": 8, "range": "worst_case"},
        "precision": "fp16x2",
        "tile": {"rows": 24},
    }
    x, found = torch.randn(2, 8, 5, 5), []
    for path, keep in ((nullcontext(), False), (gpu_path(monkeypatch), True)):
        torch.manual_seed(3)
        layer = AnalogConv2d(8, 8, 3, padding=1, spec=spec("position_channel", keep_packed=keep, **parts))
        inputs = x.clone().requires_grad_()
        with path:
            y = layer(inputs)
            y.square().sum().backward()
        found.append((y.detach(), inputs.grad, layer.weight.grad))
    for got, wanted in zip(found[1], found[0], strict=True):
        assert (got - wanted).norm() < 0.01 * wanted.norm()


def test_lines_there_and_back():
    """Of weights, and of patches as NumPy unfolds them."""
    rng = np.random.default_rng(0)
    weight = torch.from_numpy(rng.normal(size=(6, 3, 2, 4)))
    for order in ORDERS:
        lines = by_line(weight, 2, order)
        assert lines.shape == (2, 3, 24)
        torch.testing.assert_close(of_lines(lines, weight.shape, order), weight, rtol=0, atol=0)
        line = 2 * 8 + 1 * 4 + 3 if order == "channel_position" else (1 * 4 + 3) * 3 + 2
        assert lines[1, 2, line] == weight[5, 2, 1, 3]
        layer = AnalogConv2d(6, 6, (2, 4), (2, 1), (1, 4), (1, 2), groups=2, spec=spec(order))
        conv = ConvGeometry(3, 5, 6, (2, 4), (2, 1), (1, 4), (1, 2), line_order=order)
        x = torch.from_numpy(rng.normal(size=(2, 6, 5, 6)))
        patches = unfold_lines(x, layer.weight.shape, layer.plan)
        np.testing.assert_array_equal(patches, reference.unfold(x.numpy(), conv))
        rows = torch.tensor([0, 3, len(patches) - 1])
        assert torch.equal(some_lines(x, rows, layer.weight.shape, layer.plan), patches[rows])
        images = fold_lines(patches, (2, 6, 5, 6), layer.weight.shape, layer.plan)
        np.testing.assert_allclose(images, reference.fold(patches.numpy(), 2, conv), rtol=1e-12)
    kept = weight.to(memory_format=torch.channels_last)
    assert by_line(kept, 2, "position_channel").data_ptr() == kept.data_ptr()


def test_weights_that_lie_as_their_lines_are_written_from_where_they_lie():
    weight = torch.randn(4, CHANNELS, *KERNEL)
    for order, memory in zip(ORDERS, (torch.contiguous_format, torch.channels_last), strict=True):
        weight, layer = weight.to(memory_format=memory), AnalogConv2d(CHANNELS, 4, KERNEL, spec=spec(order))
        assert written(weight, layer.plan).data_ptr() == weight.data_ptr()


def test_it_is_a_setting_of_the_mapping():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2, 2))
    by_position = {"mapping": {"line_order": "position_channel"}}
    rules = {"[01]": by_position, "1": {**by_position, "tile": {"rows": 9}}}
    converted, report = gx.convert(model, gx.CrossbarSpec(), rules=rules)
    assert [m.plan.line_order for m in (converted[0], converted[1], converted[3])] == [
        *ORDERS[1:] * 2,
        ORDERS[0],
    ]
    assert [row.tiles for row in report.rows] == [2, 6, 2]
    again = gx.CrossbarSpec.model_validate_json(converted[0].spec.model_dump_json())
    assert again.mapping.line_order == "position_channel"
    assert gx.CrossbarSpec().mapping.line_order == "channel_position"
    with pytest.raises(
        ValueError,
        match=r"^ConvGeometry: `line_order` must be one of channel_position, position_channel, got 'nhwc'",
    ):
        ConvGeometry(1, 3, 3, (2, 2), line_order="nhwc")
    g = np.ones((4, 1), np.float32)
    read = [
        ops.tile_mvm(np.ones((1, 1, 2, 2), np.float32), g, conv=ConvGeometry(1, 2, 2, (2, 2), line_order=o))
        for o in ORDERS
    ]
    np.testing.assert_array_equal(*read)
