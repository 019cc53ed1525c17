"""A recorded training run: the order of its batches, and what its losses and accuracies are of."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from torch import nn

from gpuxbar.experiments import Run, train
from gpuxbar.experiments.data import Data
from gpuxbar.experiments.networks import network
from gpuxbar.spec import CrossbarSpec, presets

BATCHES = []


class Watched(Data):
    """Data that writes down which training images are taken."""

    def batch(self, part, *, test=False, device="cpu"):
        if not test:
            BATCHES.append(part.tolist())
        return super().batch(part, test=test, device=device)


@pytest.fixture
def data(monkeypatch):
    """150 random images to train on and 300 to test on."""
    rng = torch.Generator().manual_seed(0)
    x, x_test = (torch.randint(256, (n, 1, 8, 8), generator=rng, dtype=torch.uint8) for n in (150, 300))
    t, t_test = (torch.randint(3, (n,), generator=rng) for n in (150, 300))
    made = Watched("noise", x, t, x_test, t_test, torch.full((1, 1, 1), 128.0), torch.full((1, 1, 1), 74.0))
    monkeypatch.setattr(import_module("gpuxbar.experiments.train"), "load_data", lambda *_: made)
    BATCHES.clear()
    return made


def test_what_is_recorded_is_of_every_image_once(data, tmp_path):
    """At a rate of 0, of the untrained network; the last batches are short ones."""
    records = train(
        Run(tmp_path / "run", CrossbarSpec(), modes=("ideal",), epochs=2, batch=64, lr=0.0, seed=3)
    )
    torch.manual_seed(3)
    model = network(data.shape, 3)[1]
    with torch.no_grad():
        x, t = Data.batch(data, slice(None))
        loss = nn.functional.cross_entropy(model(x), t).item()
        x, t = Data.batch(data, slice(None), test=True)
        accuracy = (model(x).argmax(1) == t).double().mean().item()
    assert [record["loss"] for record in records] == pytest.approx([loss, loss], rel=1e-6)
    assert [record["accuracy"] for record in records] == [accuracy, accuracy]


def test_every_epoch_has_an_order_of_its_own_and_every_mode_the_same(data, tmp_path):
    train(Run(tmp_path / "run", CrossbarSpec(), modes=("ideal", "hardware-aware"), epochs=2, batch=64))
    epochs = [part for part in BATCHES if len(part) < 150]  # not what converters are calibrated by
    sizes = [len(part) for part in epochs]
    assert sizes == [64, 64, 22] * 4
    orders = [[k for part in epochs[i : i + 3] for k in part] for i in range(0, 12, 3)]
    assert all(sorted(order) == list(range(150)) for order in orders)
    assert orders[0] != orders[1]
    assert orders[:2] == orders[2:]


def test_converters_are_calibrated_as_steps_double_and_before_every_epoch_by_the_loss_of_the_same_images(
    data, tmp_path, monkeypatch
):
    """Resumed, at the same steps; the rest of the batches seen is those of training."""
    module, calls = import_module("gpuxbar.experiments.train"), []

    def seen(model, loader, loss):
        calls.append((len(BATCHES) - 1 - len(calls), loader[0], loss))
        assert model.training  # after an evaluation, too

    monkeypatch.setattr(module, "calibrate", seen)
    run = Run(tmp_path / "run", CrossbarSpec(), modes=("hardware-aware",), epochs=3, batch=64)
    train(replace(run, epochs=1))
    train(replace(run, resume=True))
    assert [step for step, *_ in calls] == [0, 1, 2, 3, 4, 6, 8]
    assert {loss for *_, loss in calls} == {nn.functional.cross_entropy}
    assert all(torch.equal(sample[0], calls[0][1][0]) for _, sample, _ in calls)


def test_the_ideal_network_is_not_calibrated(data, tmp_path, monkeypatch):
    monkeypatch.setattr(import_module("gpuxbar.experiments.train"), "calibrate", pytest.fail)
    train(Run(tmp_path / "run", CrossbarSpec(), modes=("ideal",), epochs=1, batch=64))


def test_a_mode_that_diverges_ends_there_and_the_others_go_on(data, tmp_path):
    """In JSON, which knows no NaN; and a run that is resumed leaves it as it is."""
    run = Run(tmp_path / "run", presets.demo(), epochs=2, batch=64, lr=1e20, in_situ_lr=0.01)
    train(run)
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    ends = [(record["mode"], record["epoch"], record["accuracy"] is None) for record in records]
    assert ends == [
        ("ideal", 0, True),
        ("hardware-aware", 0, True),
        ("in-situ", 0, False),
        ("in-situ", 1, False),
    ]
    assert [record["loss"] is None for record in records] == [True, True, False, False]
    assert (run.folder / "curves.png").stat().st_size
    assert train(replace(run, resume=True)) == records


@pytest.mark.parametrize("mode", ["ideal", "hardware-aware"])
def test_weights_that_the_last_step_made_infinite_are_told_of(data, tmp_path, mode):
    """The losses of that epoch, of one step, are finite."""
    [record] = train(
        Run(tmp_path / "run", CrossbarSpec(dac={"bits": 8}), modes=(mode,), epochs=2, batch=150, lr=1e37)
    )
    assert (record["epoch"], record["accuracy"]) == (0, None)
    assert 0 < record["loss"] < 10


@pytest.mark.parametrize(
    ("spec", "optimizer", "momentum"),
    [({}, "sgd", 0.9), ({"pulses": {}}, "sgd", 0.0), ({"pulses": {}}, "agad", 0.9)],
    ids=["changes", "trains", "trains to a fast array"],
)
def test_momentum_is_what_the_updates_allow_unless_it_is_said(data, tmp_path, spec, optimizer, momentum):
    spec = CrossbarSpec.model_validate({"update": {"law": "constant_step"}, **spec})
    run = Run(tmp_path / "left out", spec, modes=("in-situ",), epochs=1, optimizer=optimizer)
    (found,) = train(run)
    (told,) = train(Run(**vars(run) | {"folder": tmp_path / "told", "momentum": momentum}))
    assert found["loss"] == told["loss"]
