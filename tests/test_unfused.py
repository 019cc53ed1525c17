"""Attention and recurrent modules as layers: the same functions as torch's, then on crossbars."""

from __future__ import annotations

import copy
import re
import sys
import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

import gpuxbar as gx
from gpuxbar.bridge import outer_product
from gpuxbar.nn import AnalogConv1d, AnalogLinear, recurrent
from gpuxbar.nn.attention import UnfusedAttention
from gpuxbar.nn.recurrent import UnfusedCell, UnfusedRNN
from gpuxbar.nn.transposed import UnfusedConvTranspose
from gpuxbar.nn.volumes import UnfusedConv3d

CONVERTERS = {"dac": {"bits": 8}, "adc": {"bits": 8}, "tile": {"rows": 16, "cols": 16}}
RNNS = [
    (nn.LSTM, {}),
    (nn.LSTM, {"num_layers": 2, "bidirectional": True, "bias": False, "batch_first": True}),
    (nn.LSTM, {"num_layers": 2, "bidirectional": True, "proj_size": 5}),
    (nn.GRU, {"num_layers": 2, "bidirectional": True}),
    (nn.RNN, {"batch_first": True}),
    (nn.RNN, {"nonlinearity": "relu", "bidirectional": True}),
]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"kdim": 12, "vdim": 20}, {"add_bias_kv": True, "add_zero_attn": True}]
)
def test_attention_of_layers_is_torchs(options, batch_first):
    fused = nn.MultiheadAttention(16, 4, batch_first=batch_first, **options)
    parts = UnfusedAttention(nn.MultiheadAttention(16, 4, batch_first=batch_first, **options))
    parts.load_state_dict(fused.state_dict())
    inputs = torch.randn(3, 5, 16), torch.randn(3, 7, fused.kdim), torch.randn(3, 7, fused.vdim)
    if not batch_first:
        inputs = tuple(x.transpose(0, 1) for x in inputs)
    padding = torch.arange(7) >= torch.tensor([[3], [7], [5]])
    for mask in (None, torch.rand(5, 7) > 0.7, torch.randn(12, 5, 7)):
        if mask is not None and mask.dtype == torch.bool:
            mask[:, 0] = False
        for wanted in ((True, True), (True, False), (False, True)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # masks of two types
                expected = fused(*inputs, padding, wanted[0], mask, wanted[1])
            torch.testing.assert_close(parts(*inputs, padding, wanted[0], mask, wanted[1]), expected)
    one = [x.select(0 if batch_first else 1, 0) for x in inputs]
    torch.testing.assert_close(parts(*one, padding[0]), fused(*one, padding[0]))


def test_attention_gradients_and_dropout():
    fused = nn.MultiheadAttention(16, 4)
    parts = UnfusedAttention(fused)
    x = torch.randn(5, 3, 16)
    for module in (fused, parts):
        module(x, x, x)[0].sin().sum().backward()
    fused_rows = torch.cat([getattr(parts, f"{name}_proj").weight.grad for name in "qkv"])
    torch.testing.assert_close(fused_rows, fused.in_proj_weight.grad)
    parts.dropout = 0.5
    assert not torch.equal(parts(x, x, x)[0], parts(x, x, x)[0])
    assert torch.equal(parts.eval()(x, x, x)[0], parts(x, x, x)[0])
    with pytest.raises(ValueError, match="`attn_mask` must be given with `is_causal`, got None"):
        parts(x, x, x, is_causal=True)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(("kind", "options"), RNNS)
def test_recurrence_of_layers_is_torchs(kind, options):
    fused = kind(6, 9, **options)
    parts = UnfusedRNN(kind(6, 9, **options))
    parts.load_state_dict(fused.state_dict())
    x = torch.randn(4, 7, 6) if fused.batch_first else torch.randn(7, 4, 6)
    state = fused(x)[1]
    torch.testing.assert_close(parts(x), fused(x))
    torch.testing.assert_close(parts(x, state), fused(x, state))
    torch.testing.assert_close(parts(x[0]), fused(x[0]))
    for lengths in ([7, 5, 2, 1], [2, 7, 1, 5]):
        packed = pack_padded_sequence(x, torch.tensor(lengths), fused.batch_first, lengths == [7, 5, 2, 1])
        (y, last), (expected, expected_last) = parts(packed, state), fused(packed, state)
        torch.testing.assert_close(y.data, expected.data)
        torch.testing.assert_close(last, expected_last)
        assert torch.equal(y.batch_sizes, expected.batch_sizes)
        for order in ("sorted_indices", "unsorted_indices"):
            torch.testing.assert_close(getattr(y, order), getattr(expected, order))
    for module in (fused, parts):
        module.zero_grad()
        module(x)[0].sin().sum().backward()
    for name, layer in parts.named_children():
        torch.testing.assert_close(layer.weight.grad, getattr(fused, f"weight_{name}").grad)


def test_what_lies_between_the_layers_of_a_recurrence_drops_out():
    """And not what goes into the first: its last state is torch's, that of the second another at every call."""
    fused = nn.LSTM(6, 9, num_layers=2, dropout=0.5)
    parts, x = UnfusedRNN(fused), torch.randn(7, 4, 6)
    (_, (h, _)), (_, (other, _)), (_, (expected, _)) = parts(x), parts(x), fused(x)
    torch.testing.assert_close(h[0], expected[0])
    torch.testing.assert_close(h[0], other[0])
    assert not torch.isclose(h[1], other[1]).any()
    torch.testing.assert_close(parts.eval()(x), fused.eval()(x))


@pytest.mark.parametrize(
    "more",
    [
        {"programming": {"write_noise": 1e-7}, "read_noise": {"sigma": 1e-7, "sigma_g": 1e-7}},
        {"parasitics": {"r_wordline": 2.0, "r_bitline": 2.0, "terminations": "role"}},
    ],
    ids=["noise", "wires"],
)
def test_a_sequence_reads_its_devices_as_steps_would(more, monkeypatch):
    plain = nn.LSTM(6, 9, bidirectional=True, proj_size=5)
    models = [gx.convert(plain, gx.CrossbarSpec.model_validate({**CONVERTERS, **more}))[0] for _ in range(2)]
    x, outputs = torch.randn(5, 3, 6), []
    looks = {"of a sequence": 0, "of steps": 0}
    optimisers = [torch.optim.SGD(model.parameters(), 0.1) for model in models]
    for model, name in zip(models, looks, strict=True):
        gx.calibrate(model, [x], step=lambda batch, model=model: model(batch)[0])
        for layer in model.children():
            monkeypatch.setattr(layer, "conductances", counted(layer.conductances, looks, name))
    for one, other in zip(*map(changes, models, optimisers), strict=True):
        y, gradients = gradients_of(models[0], x)
        with monkeypatch.context() as patch:
            patch.setattr(recurrent, "_steady", lambda layer: layer)
            y_of_steps, gradients_of_steps = gradients_of(models[1], x)
        assert torch.equal(y, y_of_steps)
        torch.testing.assert_close(gradients, gradients_of_steps)  # sums in another order
        for p, gradient in zip(models[1].parameters(), gradients, strict=True):
            p.grad = gradient.clone()
        outputs.append(y)
        one(), other()
    assert not any(torch.equal(a, b) for a, b in pairwise(outputs))
    assert looks == {"of a sequence": 7 * 2 * 3, "of steps": 7 * 2 * (1 + 2 * 5)}


def gradients_of(model, x):
    """Outputs of a sequence, and new gradients of all parameters."""
    model.zero_grad()
    y = model(x)[0]
    y.sin().sum().backward()
    return y.detach(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize(
    "more", [{}, {"parasitics": {"r_wordline": 2.0, "gradient": "exact"}}], ids=["plain", "wires"]
)
def test_steps_share_one_gradient_of_a_weight(more, monkeypatch):
    """Whatever part of the graph a backward pass goes through, and how often."""
    model = gx.convert(nn.LSTM(6, 9), gx.CrossbarSpec(tile={"rows": 16, "cols": 16}, **more))[0]
    weight, x, made = model.hh_l0.weight, torch.randn(5, 3, 6, requires_grad=True), []
    product = outer_product.weight_gradient

    def counting(d, *rest):
        made.append(len(d))
        return product(d, *rest)

    for module in ("outer_product", "analog_mvm"):  # of all steps, and of one
        monkeypatch.setattr(sys.modules[f"gpuxbar.bridge.{module}"], "weight_gradient", counting)

    def gradient(*outputs):
        return torch.autograd.grad([y.sin().sum() for y in outputs], weight, retain_graph=True)[0]

    y = model(x)[0]
    whole = gradient(y)
    assert torch.equal(gradient(y), whole)  # once more
    torch.autograd.grad(y.sin().sum(), x, retain_graph=True)  # not as far as the weight
    assert torch.equal(gradient(y), whole)
    torch.testing.assert_close(gradient(y[:2]) + gradient(y[2:]), whole)
    torch.testing.assert_close(gradient(y, y[:3]), whole + gradient(y[:3]))
    assert ([n for n in made if n == 15] == made) == (not more)


def counted(function, counts, name):
    def call(*args, **named):
        counts[name] += 1
        return function(*args, **named)

    return call


def changes(model, optimiser):
    """Every way to change a recurrent weight between two forwards."""
    weight = model.get_submodule("hh_l0").weight
    state = copy.deepcopy(model.state_dict())

    def in_place():
        with torch.no_grad():
            weight.mul_(-1)

    def by_data():
        weight.data[3, 2] += 0.5

    def by_another_storage():
        weight.data = weight.detach() * 2

    def by_numpy():
        weight.detach().numpy()[0, 0] -= 1

    def loaded():
        model.load_state_dict(state)

    return [optimiser.step, in_place, by_data, by_another_storage, by_numpy, loaded, lambda: None]


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_of_layers_are_torchs(kind):
    fused, parts = kind(6, 9), UnfusedCell(kind(6, 9))
    parts.load_state_dict(fused.state_dict())
    x = torch.randn(4, 6)
    torch.testing.assert_close(parts(x), fused(x))
    torch.testing.assert_close(parts(x, fused(x)), fused(x, fused(x)))
    first = fused(x)
    first = tuple(s[0] for s in first) if kind is nn.LSTMCell else first[0]
    torch.testing.assert_close(parts(x[0], first), fused(x[0], first))


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2, "groups": 2}, {"padding": 2, "padding_mode": "reflect"}, {"padding": "same", "dilation": (2,)}]
)  # fmt: skip
def test_ideal_convolution_of_sequences_is_torchs(options):
    plain = nn.Conv1d(4, 6, 3, **options)
    layer = AnalogConv1d(4, 6, 3, **options, spec=gx.CrossbarSpec(tile={"rows": 7, "cols": 2}))
    layer.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(3, 4, 9)
    torch.testing.assert_close(layer(x), plain(x))
    torch.testing.assert_close(layer(x[0]), plain(x[0]))
    for module in (layer, plain):
        module(x).sin().sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)


def test_sequences_keep_what_models_read_of_their_convolutions():
    plain = nn.Sequential(
        nn.Conv1d(4, 4, 3, stride=2, padding=1, groups=2), nn.Conv1d(4, 4, 3, padding="same")
    )
    plain[1].weight = nn.Parameter(torch.randn(4, 4, 3))
    tied = nn.Sequential(plain, nn.Conv1d(4, 4, 3))
    tied[1].weight = plain[1].weight
    model, _ = gx.convert(tied, gx.CrossbarSpec())
    for layer, before in zip((*model[0], model[1]), (*plain, tied[1]), strict=True):
        assert isinstance(layer, nn.Conv1d)
        for key in ("kernel_size", "stride", "padding", "dilation", "groups"):
            assert getattr(layer, key) == getattr(before, key)
        torch.testing.assert_close(layer.weight, before.weight)
    assert model[1].weight is model[0][1].weight
    tied.load_state_dict(model.state_dict(), strict=False)  # and the other way round


@pytest.mark.parametrize("order", ["channel_position", "position_channel"])
@pytest.mark.parametrize(
    "more", [{"update": {"law": "ideal"}}, {"update": {"law": "constant_step"}, "pulses": {}}]
)
def test_sequences_train_in_situ_as_their_gradient_says(more, order):
    plain = nn.Conv1d(3, 4, 5, stride=2)
    layer, _ = gx.convert(plain, gx.CrossbarSpec(mapping={"line_order": order}, **more))
    optimiser = gx.optim.InSituSGD(layer.parameters(), lr=0.1)
    x = torch.randn(2, 3, 11)
    for module in (layer, plain):
        module(x).square().sum().backward()
    before = layer.weight.detach().clone()
    optimiser.step()
    change, wanted = layer.weight.detach() - before, -0.1 * plain.weight.grad
    if "pulses" in more:  # few, and drawn
        assert torch.cosine_similarity(change.flatten(), wanted.flatten(), dim=0) > 0.7
    else:
        torch.testing.assert_close(change, wanted, rtol=0, atol=1e-5)


WRONG = {
    "key": ({"key": torch.randn(1, 4, 8)}, ValueError, "`key` must have 4 vectors for each of the 2 samples of `query`, got 4 for 1"),
    "value": ({"value": torch.randn(2, 5, 8)}, ValueError, "`value` must have 4 vectors for each of the 2 samples"),
    "bytes": ({"key_padding_mask": torch.ones(2, 4, dtype=torch.uint8)}, TypeError, "`key_padding_mask` must be bool"),
    "pairs": ({"attn_mask": torch.zeros(1, 4)}, ValueError, "`attn_mask` must have shape (3, 4) or (4, 3, 4), got (1, 4)"),
    "heads": ({"attn_mask": torch.zeros(2, 3, 4)}, ValueError, "`attn_mask` must have shape (3, 4) or (4, 3, 4), got (2, 3, 4)"),
    "padding": ({"key_padding_mask": torch.ones(1, 4).bool()}, ValueError, "`key_padding_mask` must have shape (2, 4), got (1, 4)"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_attention_broadcasts_nothing(name):
    change, kind, text = WRONG[name]
    parts = UnfusedAttention(nn.MultiheadAttention(8, 2, batch_first=True))
    arguments = {"query": torch.randn(2, 3, 8), "key": torch.randn(2, 4, 8), "value": torch.randn(2, 4, 8)}
    with pytest.raises(kind, match=re.escape(f"MultiheadAttention: {text}")):
        parts(**{**arguments, **change})


@pytest.mark.parametrize(
    ("kind", "x", "state", "text"),
    [
        (nn.LSTM, (5, 2, 3), [(1, 1, 4)] * 2, "LSTM: `hx` must be of shape (1, 2, 4) for this input, got (1, 1, 4)"),
        (nn.LSTM, (5, 2, 3), [(1, 2, 4), (2, 2, 4)], "LSTM: `hx` must be of shape (1, 2, 4) for this input, got (2, 2, 4)"),
        (nn.GRU, (5, 2, 3), [(2, 2, 4)], "GRU: `hx` must be of shape (1, 2, 4) for this input, got (2, 2, 4)"),
        (nn.LSTMCell, (2, 3), [(2, 4), (2, 1)], "LSTMCell: `hx` must be of shape (2, 4) for this input, got (2, 1)"),
        (nn.RNNCell, (2, 3), [(1, 4)], "RNNCell: `hx` must be of shape (2, 4) for this input, got (1, 4)"),
        (nn.GRU, (5, 3), [(1, 2, 4)], "GRU: `hx` must be of shape (1, 4) for this input, got (1, 2, 4)"),
        (nn.GRUCell, (3,), [(2, 4)], "GRUCell: `hx` must be of shape (4,) for this input, got (2, 4)"),
    ],
)  # fmt: skip
def test_states_are_not_broadcast(kind, x, state, text):
    model, _ = gx.convert(kind(3, 4), gx.CrossbarSpec())
    hx = tuple(map(torch.zeros, state))
    with pytest.raises(ValueError, match=re.escape(text)):
        model(torch.randn(x), hx if len(hx) > 1 else hx[0])


def packed(*shape):
    return pack_sequence([torch.zeros(3, *shape), torch.zeros(2, *shape)])


STATE = torch.zeros(1, 2, 4)
NOT_OF_SEQUENCES: dict[str, tuple[Any, dict[str, Any], tuple[Any, ...], type[Exception], str]] = {
    "one axis": (nn.RNN, {}, (torch.zeros(3),), ValueError, "rec (RNN): `input` must have shape [T, 3] or [T, N, 3], got (3,)"),
    "four axes": (
        nn.RNN, {"batch_first": True}, (torch.zeros(2, 2, 5, 3),), ValueError,
        "rec (RNN): `input` must have shape [T, 3] or [N, T, 3], got (2, 2, 5, 3)",
    ),
    "another size": (nn.GRU, {}, (torch.zeros(5, 2, 4),), ValueError, "rec (GRU): `input` must have shape [T, 3] or [T, N, 3], got"),
    "no step": (nn.LSTM, {}, (torch.zeros(0, 2, 3),), ValueError, "rec (LSTM): `input` must have a step at least, got shape (0, 2, 3)"),
    "packed size": (nn.LSTM, {}, (packed(4),), ValueError, "rec (LSTM): `input` must have shape [sum of lengths, 3], got (5, 4)"),
    "packed axes": (nn.GRU, {}, (packed(2, 3),), ValueError, "rec (GRU): `input` must have shape [sum of lengths, 3], got (5, 2, 3)"),
    "one state": (nn.LSTM, {}, (torch.zeros(5, 2, 3), STATE), TypeError, "rec (LSTM): `hx` must be tensors (h, c), got Tensor; leave"),
    "three states": (
        nn.LSTM, {}, (torch.zeros(5, 2, 3), (STATE,) * 3), TypeError, "rec (LSTM): `hx` must be tensors (h, c), got Tensor, Tensor, Tensor",
    ),
    "two states": (nn.GRU, {}, (torch.zeros(5, 2, 3), (STATE,) * 2), TypeError, "rec (GRU): `hx` must be a tensor, got tuple; leave it"),
    "step of three axes": (
        nn.RNNCell, {}, (torch.zeros(5, 2, 3),), ValueError, "rec (RNNCell): `input` must have shape [3] or [N, 3], got (5, 2, 3)",
    ),
    "packed step": (nn.GRUCell, {}, (packed(3),), TypeError, "rec (GRUCell): `input` must be a tensor, got PackedSequence; convert"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_OF_SEQUENCES)
def test_what_is_no_sequence_or_state_is_refused_by_name(name):
    kind, options, arguments, error, text = NOT_OF_SEQUENCES[name]
    model, _ = gx.convert(nn.ModuleDict({"rec": kind(3, 4, **options)}), gx.CrossbarSpec())
    with pytest.raises(error, match=re.escape(text)):
        model["rec"](*arguments)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.ConvTranspose2d, {}),
        (nn.ConvTranspose2d, {"stride": (2, 3), "padding": (1, 0), "output_padding": (1, 2), "groups": 2}),
        (nn.ConvTranspose2d, {"dilation": 2, "bias": False}),
        (nn.ConvTranspose1d, {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2}),
        (nn.ConvTranspose2d, {"dilation": 3, "padding": 1, "output_padding": (2, 1)}),
    ],
)
def test_transposed_convolution_of_a_layer_is_torchs(kind, options):
    fused = kind(4, 6, 3, **options)
    parts = UnfusedConvTranspose(kind(4, 6, 3, **options))
    parts.load_state_dict(fused.state_dict())
    x = torch.randn(3, 4, *(5, 4)[: fused.weight.dim() - 2])
    torch.testing.assert_close(parts(x), fused(x))
    torch.testing.assert_close(parts(x[0]), fused(x[0]))
    larger = [n + s - 1 for n, s in zip(fused(x).shape[2:], fused.stride, strict=True)]
    larger = [n - more for n, more in zip(larger, fused.output_padding, strict=True)]
    torch.testing.assert_close(parts(x, larger), fused(x, larger))
    taken = UnfusedConvTranspose(fused)
    torch.testing.assert_close(taken(x), fused(x))
    for module in (taken, fused):
        module(x).sin().sum().backward()
    torch.testing.assert_close(taken.product.weight.grad, taken._by_output(fused.weight.grad))
    with pytest.raises(ValueError, match="`output_size` must be from"):
        parts(x, [99, 99])


VOLUMES = {
    "plain": {},
    "options": {"stride": (2, 1, 2), "padding": (1, 0, 2), "dilation": (2, 1, 1), "groups": 2, "bias": False},
    "reflected": {"padding": (2, 1, 1), "padding_mode": "reflect", "stride": 2},
    "same": {"padding": "same", "dilation": (1, 2, 3)},
}  # fmt: skip


@pytest.mark.parametrize("name", VOLUMES)
def test_convolution_of_volumes_by_images_is_torchs(name):
    fused = nn.Conv3d(4, 6, (3, 2, 3), **VOLUMES[name])
    parts = UnfusedConv3d(nn.Conv3d(4, 6, (3, 2, 3), **VOLUMES[name]))
    parts.load_state_dict(fused.state_dict())
    x = torch.randn(2, 4, 7, 6, 5)
    torch.testing.assert_close(parts(x), fused(x))
    torch.testing.assert_close(parts(x[0]), fused(x[0]))
    taken = UnfusedConv3d(fused)
    for module in (taken, fused):
        module(x).sin().sum().backward()
    torch.testing.assert_close(taken.product.weight.grad, fused.weight.grad.flatten(1, 2))
    if fused.bias is not None:
        torch.testing.assert_close(taken(x), fused(x))


def test_convolutions_stay_frozen_and_as_they_run():
    conv = nn.Conv3d(2, 4, 3).requires_grad_(False).eval()
    parts = UnfusedConv3d(conv)
    assert not any(parameter.requires_grad for parameter in parts.parameters())
    assert not any(module.training for module in parts.modules())
    assert all(module.training for module in UnfusedConv3d(conv.train()).modules())
    flat = gx.convert(nn.Conv1d(2, 4, 3).requires_grad_(False), gx.CrossbarSpec())[0]
    assert not any(parameter.requires_grad for parameter in flat.parameters())


def test_volumes_train_on_crossbars():
    network = nn.Sequential(
        nn.Conv3d(2, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)
    )
    x = torch.randn(6, 2, 4, 4, 4)
    spec = gx.CrossbarSpec(tile={"rows": 16, "cols": 16}, update={"law": "agarwal"})
    model, report = gx.convert(network, spec, example=x)
    row = next(row for row in report.rows if row.module == "0.product")
    assert (row.runs, row.macs, row.tiles) == ("analog", 4 * 54 * 8, 8)
    torch.testing.assert_close(model(x), network(x), rtol=1e-4, atol=1e-5)
    optimiser = gx.optim.InSituSGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(x), torch.arange(6) % 3)
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.7 * losses[0]
    shallow = UnfusedConv3d(nn.Conv3d(2, 4, 3))
    with pytest.raises(
        ValueError, match=re.escape("`input` must be at least 3 planes deep with its padding, got 2;")
    ):
        shallow(torch.zeros(1, 2, 2, 4, 4))
    _, report = gx.convert(network, spec, rules={"0": None})
    assert {row.module: row.runs for row in report.rows} == {"0": "digital", "3": "analog"}


class Network(nn.Module):
    """One of everything that reads weights without a layer of torch's that crossbars have."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.up = nn.ConvTranspose1d(16, 16, 2, stride=2)
        self.lstm = nn.LSTM(16, 8, batch_first=True)
        self.cell = nn.GRUCell(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x, padding=None):
        x = self.encoder(x, src_key_padding_mask=padding)
        x = self.lstm(self.up(self.conv(x.transpose(1, 2))).transpose(1, 2))[0]
        return self.head(self.cell(x[:, -1]))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return Network()


def test_conversion_reaches_every_product_with_weights(network):
    x = torch.randn(2, 5, 16)
    model, report = gx.convert(network, gx.CrossbarSpec(), example=x)
    rows = {row.module: row for row in report.rows}
    assert {name for name, row in rows.items() if row.runs == "digital"} == {
        f"encoder.layers.{i}.norm{k}" for i in (0, 1) for k in (1, 2)
    }
    assert rows["encoder.layers.1.self_attn.v_proj"].macs == 16 * 16 * 5
    assert rows["lstm.hh_l0"].macs == 32 * 8 * 10
    assert rows["up.product"].macs == 16 * 32 * 5
    assert rows["cell.ih"].macs == 24 * 8
    assert rows["conv"].macs == 16 * 48 * 5
    torch.testing.assert_close(model(x), network(x), rtol=1e-4, atol=1e-5)
    loaded, _ = gx.convert(Network(), gx.CrossbarSpec())
    loaded.load_state_dict(network.state_dict(), strict=False)
    torch.testing.assert_close(loaded(x), network(x), rtol=1e-4, atol=1e-5)


class TiedAutoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(4, 2, 3)
        self.decoder.weight = self.encoder.weight

    def forward(self, x):
        return self.decoder(self.encoder(x).tanh())


def test_a_weight_that_layers_would_hold_otherwise_stays_tied():
    model = TiedAutoencoder()
    converted, report = gx.convert(model, gx.CrossbarSpec())
    assert [(row.runs, row.why[:31]) for row in report.rows] == [
        ("analog", "default"), ("digital", "its weight is another module's "),
    ]  # fmt: skip
    x = torch.randn(1, 2, 6, 6)
    for each in (model, converted):
        each(x).square().sum().backward()
    torch.testing.assert_close(converted.encoder.weight.grad, model.encoder.weight.grad)


def test_rules_name_fused_modules_or_their_layers(network):
    rules = {
        "encoder.layers.*": {"adc": {"bits": 6}},
        "encoder.layers.1.self_attn": None,
        "lstm": None,
        "encoder.layers.0.self_attn.q_proj": None,
    }
    model, report = gx.convert(network, gx.CrossbarSpec(), rules)
    rows = {row.module: (row.type, row.runs, row.why) for row in report.rows}
    assert rows["lstm"] == ("LSTM", "digital", "rule lstm")
    assert rows["encoder.layers.1.self_attn"][:2] == ("MultiheadAttention", "digital")
    assert rows["encoder.layers.0.self_attn.q_proj"][1:] == (
        "digital",
        "rule encoder.layers.0.self_attn.q_proj",
    )
    assert rows["encoder.layers.0.self_attn.k_proj"][1:] == ("analog", "rule encoder.layers.*")
    assert model.encoder.layers[0].self_attn.k_proj.spec.adc.bits == 6
    with pytest.raises(ValueError, match=r"did you mean `encoder\.layers\.0\.self_attn\.q_proj`"):
        gx.convert(network, gx.CrossbarSpec(), {"encoder.layers.0.self_attn.q_prj": None})


def test_layers_of_gpt_2_are_linear():
    """`Conv1D` of the transformers library, which tests do without: known by its name, a product with [I, O]."""

    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4))

        def forward(self, x):
            return x @ self.weight + self.bias

    Conv1D.__module__ = "transformers.pytorch_utils"
    block = nn.ModuleDict({"c_attn": Conv1D(), "c_proj": Conv1D()})
    model, report = gx.convert(block, gx.CrossbarSpec(), {"c_proj": None})
    assert [(row.type, row.runs) for row in report.rows] == [("Linear", "analog"), ("Conv1D", "digital")]
    x = torch.randn(3, 6)
    torch.testing.assert_close(model["c_attn"](x), block["c_attn"](x))


@pytest.mark.filterwarnings("ignore:calibrate:RuntimeWarning")  # a cell begins with a state of zeros
@pytest.mark.parametrize("rules", [{}, {"*self_attn": None}])
@pytest.mark.parametrize("padded", [False, True])
def test_inference_of_encoders_calls_the_layers(network, rules, padded):
    """Without gradients torch fuses an encoder's layer, from its weights: converters would never be seen."""
    model, _ = gx.convert(network, gx.CrossbarSpec.model_validate(CONVERTERS), rules)
    x = torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    gx.calibrate(model, [x])
    model.eval()
    again = copy.deepcopy(model)
    with torch.no_grad():
        y = model(x, padding)
    assert all(layer.reads for layer in gx.telemetry(model).layers)
    torch.testing.assert_close(y, again(x, padding).detach())


@pytest.mark.filterwarnings("ignore:calibrate:RuntimeWarning")  # a cell begins with a state of zeros
def test_all_of_it_trains_in_situ(network):
    spec = gx.CrossbarSpec.model_validate(
        {**CONVERTERS, "update": {"law": "soft_bounds", "up": 2, "down": 2}}
    )
    model, _ = gx.convert(network, spec)
    torch.manual_seed(0)
    target = torch.arange(16) % 4
    x = torch.randn(4, 1, 16)[target] + 0.3 * torch.randn(16, 5, 16)
    optimiser = gx.optim.InSituSGD(model.parameters(), lr=3.0)
    gx.calibrate(model, [x])
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_second_derivatives_through_a_shared_weight_are_refused(kind):
    model, _ = gx.convert(kind(6, 5), gx.CrossbarSpec.model_validate({"dac": {"bits": 8}}))
    x = torch.randn(1, 3, 6)  # a single step, whose gradient no other read passes on
    (grad,) = torch.autograd.grad(model(x)[0].square().sum(), model.hh_l0.weight, create_graph=True)
    with pytest.raises(ValueError, match="must not be differentiated again"):
        grad.square().sum().backward()


@pytest.mark.parametrize("clips", [False, True])
def test_a_shared_weight_gets_the_gradient_of_all_its_products_and_of_other_uses(clips):
    adc = {"bits": 6, "range": "fixed", "i_max": 2e-6 if clips else 2e-5}
    dac = {"bits": 8, "range": "sample"}
    layer = AnalogLinear(20, 8, spec=gx.CrossbarSpec.model_validate({"dac": dac, "adc": adc}))
    x = torch.randn(12, 20) * torch.arange(1.0, 13.0)[:, None]
    expected = torch.autograd.grad(layer(x).sum() + layer.weight.square().sum(), layer.weight)[0]
    steady = layer.steady()
    y = [layer(part, steady=steady) for part in x.split(5)]
    loss = torch.cat(y).sum() + steady.weight.square().sum()
    for _ in range(2):
        found = torch.autograd.grad(loss, layer.weight, retain_graph=True)[0]
        torch.testing.assert_close(found, expected)
