"""Ranges of converters: what calibration finds, who is refused without, and what becomes of copied ones."""

from __future__ import annotations

import copy

import pytest
import torch
from test_layers import CONVERTED, NOISY, small_network, spec, step_of
from torch import nn

import gpuxbar as gx
from gpuxbar.nn import AnalogLinear


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
        op(nn.DataParallel(model), [torch.randn(1, 1, 3, 3)])  # which names it as the model does
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
