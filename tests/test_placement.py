"""Whole training steps on the meta device, which computes nothing: whatever a layer or an optimiser makes lies where its weights
do. On the CPU alone a forgotten `device=` would show nowhere, and on a GPU too late."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from tape import bridge_to
from test_capture import ALGORITHMS, SETTINGS
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gpuxbar as gx
from gpuxbar.nn.analog_layer import AnalogLayer
from gpuxbar.nn.in_situ import InSitu

aten = torch.ops.aten
capture = sys.modules["gpuxbar.optim.capture"]


class Idle:
    """A device that checks launches and runs none."""

    workspace, arch, multiprocessors = 1 << 26, "sm_90", 132

    def __init__(self):
        self.launches = 0

    def empty(self, shape, dtype):
        return np.empty(shape, dtype)

    zeros = empty

    def launch(self, kernel, grid, block, values, macros=None, shared=0):
        kernel.bind(values)
        kernel.check_grid(grid)
        self.launches += 1

    def matmul(self, *operands):
        self.launches += 1


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of the CPU, but for numbers; looks inside operators of gpuxbar."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "gpuxbar":
            with self:
                return function._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if any(t.device.type == "meta" for t in tensors):
            elsewhere = [tuple(t.shape) for t in tensors if t.device.type == "cpu" and t.dim()]
            assert not elsewhere, f"{function} of tensors on two devices, {elsewhere} on the CPU"
        if function.overloadpacket is aten._local_scalar_dense:
            return 1.0
        return function(*args, **kwargs)


@pytest.fixture
def idle(monkeypatch):
    """The CUDA path of every operator for tensors of the meta device, and what none of their values can say."""
    device = Idle()

    def array(t):
        assert t.device.type == "meta"
        return np.ones(t.shape, str(t.dtype).removeprefix("torch."))

    def tensor(a):
        return torch.empty(a.shape, dtype=getattr(torch, a.dtype.name), device="meta")

    def ready(layer):
        layer.calibrated = layer.back_calibrated = layer.dac_begun = True

    bridge_to(monkeypatch, device, array, tensor)
    monkeypatch.setattr(AnalogLayer, "look_at_ranges", ready)
    monkeypatch.setattr(InSitu, "_compare_read_out", lambda layer: setattr(layer, "_read", layer.mark()))
    return device


@pytest.mark.parametrize("kind", SETTINGS)
def test_nothing_is_left_on_the_cpu(idle, kind):
    x = torch.randn(3, 2, 4, 4, device="meta")
    target = torch.zeros(3, dtype=torch.int64, device="meta")
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5))
    settings = SETTINGS[kind]
    with OneDevice():
        model, _ = gx.convert(model.to("meta"), gx.CrossbarSpec.model_validate(settings))
        if kind in ALGORITHMS:
            optimizer = gx.optim.build_optimizer(kind, model, lr=0.1, **ALGORITHMS[kind])
        elif "update" in settings:
            optimizer = gx.optim.InSituSGD(model.parameters(), lr=0.1)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gx.calibrate(model, [x])
        for _ in range(2):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), target).backward()
            optimizer.step()
        capture._keeper(model, optimizer)()
    parts = nn.ModuleList([model, *getattr(optimizer, "parts", {}).values()])
    assert {t.device.type for t in (*parts.parameters(), *parts.buffers())} == {"meta"}
    assert idle.launches > 20
