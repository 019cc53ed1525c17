"""Layers, gradients and training on the CPU."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

import gpuxbar as gx
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


class Experts(nn.Module):
    """Each sees the samples that it is chosen for, which may be none."""

    def __init__(self):
        super().__init__()
        self.chosen, self.left = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return torch.cat([self.chosen(x), self.left(x[:0])])


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


def test_nothing_in_another_precision_stays_so():
    model, _ = gx.convert(nn.Sequential(nn.Linear(6, 5)), spec())
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.empty(0, 6)).dtype == model(torch.ones(1, 6)).dtype


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
