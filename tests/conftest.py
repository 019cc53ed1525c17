"""Fixtures shared by the tests."""

from __future__ import annotations

import shutil
import sys
from functools import partial

import cuda_shim
import numpy as np
import pytest
import torch

from gpuxbar.bench import study
from gpuxbar.experiments.data import load_data
from gpuxbar.launch import CudaDevice, set_threads, threads
from gpuxbar.launch.sources import kernel_dir

# for what modules draw when they are imported; PyTorch begins elsewhere in every process
torch.manual_seed(0)


def pytest_runtest_setup():
    """Every test draws the same numbers, and compiles models as often as it may, wherever and whenever it runs."""
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def pytest_collection_modifyitems(items):
    """The longest tests first, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture
def cuda_device():
    """CuPy's current device, new arrays of which hold NaN; skips where there is no CuPy or no GPU."""
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed", exc_type=ImportError)
    if not cupy.cuda.is_available():
        pytest.skip("no NVIDIA GPU or driver was found")
    return PoisonedDevice()


@pytest.fixture(scope="session")
def learn():
    """Trains a network on the bundled digits, 8 x 8, and gives its accuracy after every epoch."""
    data = load_data("digits")
    images, judge = torch.arange(len(data.x)), data.batch(slice(None), test=True)
    return partial(study.learn, data=data, images=images, judge=judge, advance=lambda count: None)


@pytest.fixture
def same_on_threads():
    """Gives what a call returns on one thread of the host kernels, and sees the same bits on two, or as many as are asked for."""
    before = threads()

    def same(call, counts=(2,)):
        found = []
        for count in (1, *counts):
            set_threads(count)
            found.append(call())
            np.testing.assert_equal(found[-1], found[0])
        return found[0]

    yield same
    set_threads(before)


@pytest.fixture(params=["host", "reference"])
def backend(request, monkeypatch):
    """The test runs on each backend of the CPU, whose name this is."""
    monkeypatch.setattr("gpuxbar.launch.host.WANTED", request.param)
    return request.param


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """The test runs in a folder of its own, given here."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def seeded(tmp_path, monkeypatch):
    """Builds the kernels for the CPU with one text replaced in one of them."""
    root = tmp_path / "kernels"
    shutil.copytree(kernel_dir(), root)
    monkeypatch.setattr(cuda_shim, "kernel_dir", lambda: root)

    def seed(file, old, new):
        text = (root / file).read_text()
        assert old in text, f"{old} is not in {file}"
        (root / file).write_text(text.replace(old, new))

    return seed


class PoisonedDevice(CudaDevice):
    """Fills new arrays with ones bits (NaN, -1), so that what a kernel does not write shows; `kept` of them live on."""

    def __init__(self, workspace=64 << 20, keep=False):
        import cupy

        kept = []

        def empty(shape, dtype):
            array = cupy.empty(shape, dtype)
            if array.nbytes:
                array.data.memset_async(0xFF, array.nbytes)
            if keep:
                kept.append(array)
            return array

        super().__init__(empty, workspace)
        self.kept = kept

    def like(self, **settings):
        """Another device of this kind with other settings."""
        return type(self)(**settings)
