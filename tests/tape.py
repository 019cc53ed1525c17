"""A CUDA graph on the CPU: a step through the CUDA path is taped, operation by operation, and can be played again.

The tape holds what a graph would: kernel launches, and operators of PyTorch, on memory of their own. Numbers of the host
are in it as they were, so a counter that Python keeps repeats its noise. What would wait for the device, or read memory
of the host, is refused while taping.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from cuda_shim import ShimDevice
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
WAITS = {aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_consecutive}  # fmt: skip
COPIES = {aten.lift_fresh}  # torch.tensor(...)
MODULES = (
    "analog_mvm", "reprogram", "carry", "device_update", "pulse_update", "streamed_update", "wires", "effective_conductance", "chop",
    "relax", "pairs",
)  # fmt: skip


class Refused(AssertionError):
    """What a capture would not survive."""


class DeviceArray:
    """An array as CuPy's: the host cannot see its values; what it computes is taped."""

    def __init__(self, values, tape):
        self.values, self.tape = values, tape

    def __getattr__(self, name):
        if name in ("dtype", "shape", "ndim", "size", "nbytes", "flags", "strides", "itemsize"):
            return getattr(self.values, name)
        raise AttributeError(name)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, at):
        return DeviceArray(self.values[at], self.tape)

    def __setitem__(self, at, value):
        def assign():
            self.values[at] = value.values if isinstance(value, DeviceArray) else value

        assign()
        self.tape.record(assign)

    def reshape(self, *shape):
        view = self.values.reshape(*shape)
        assert np.shares_memory(view, self.values) or not view.size
        return DeviceArray(view, self.tape)

    def view(self, *kind):
        return DeviceArray(self.values.view(*kind), self.tape)

    def computed(self, function):
        out = DeviceArray(np.asarray(function()), self.tape)
        self.tape.record(lambda: np.copyto(out.values, function()))
        return out

    def __truediv__(self, other):
        return self.computed(lambda: self.values / other)

    def __rtruediv__(self, other):
        return self.computed(lambda: (other / self.values).astype(self.dtype))

    def __abs__(self):
        return self.computed(lambda: abs(self.values))

    def max(self, axis):
        return self.computed(lambda: self.values.max(axis))

    def min(self, axis):
        return self.computed(lambda: self.values.min(axis))

    def fill(self, value):
        self.values.fill(value)
        self.tape.record(lambda: self.values.fill(value))

    def __array_function__(self, function, types, args, kwargs):
        return self.size if function is np.size else self.refuse()

    def refuse(self, *_, **__):
        raise Refused("the host reads an array of the device")

    __array__ = __bool__ = __int__ = __float__ = __index__ = item = tolist = get = refuse


DeviceArray.__module__ = "cupy"  # `launch.is_cupy` asks


class TapedDevice(ShimDevice):
    """Launches are run and taped."""

    def __init__(self, tape, **settings):
        super().__init__(**settings)
        self.tape = tape

    def empty(self, shape, dtype):
        return DeviceArray(super().empty(shape, dtype), self.tape)

    def launch(self, kernel, grid, block, values, macros=None, shared=0):
        plain = {k: v.values if isinstance(v, DeviceArray) else v for k, v in values.items()}
        self._run(super().launch, kernel, grid, block, plain, macros, shared)

    def matmul(self, a, b, c, *more):
        self._run(super().matmul, a.values, b.values, c.values, *more)

    def _run(self, function, *arguments):
        function(*arguments)
        self.tape.record(lambda: function(*arguments))


class Tape(TorchDispatchMode):
    """Tapes while it is entered, if `on`."""

    def __init__(self):
        super().__init__()
        self.on, self.steps = False, []

    def record(self, step):
        if self.on:
            self.steps.append(step)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "gpuxbar":  # its own operators: look inside
            with self:
                return function._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
        packet = function.overloadpacket
        if self.on and (packet in WAITS or (packet is aten.index and _masked(args))):
            raise Refused(f"{function} waits for the device")
        if self.on and packet in COPIES:
            raise Refused(f"{function} copies from the host")
        out = function(*args, **kwargs)
        if "empty" not in function.name():
            self.record(lambda: _again(function, args, kwargs, out))
        return out

    @torch.no_grad()
    def play(self):
        for step in self.steps:
            step()


def _masked(args):
    return any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1])


def _again(function, args, kwargs, out):
    for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs)), strict=True):
        if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
            old.copy_(new)


def bridge_to(monkeypatch, device, array, tensor):
    """Every operator runs on a device, with these in place of `bridge.arrays`' ways from tensors to arrays and back."""
    replacements = {"on_device": lambda *_: nullcontext(device), "array": array, "tensor": tensor}
    for module in MODULES:
        for name, replacement in replacements.items():
            found = sys.modules[f"gpuxbar.bridge.{module}"]
            if hasattr(found, name):
                monkeypatch.setattr(found, name, replacement)


@contextmanager
def gpu_path(monkeypatch, **settings):
    """CPU tensors take the CUDA path, over the CPU build of its kernels, and the tape of steps is given."""
    tape = Tape()
    device = TapedDevice(tape, **settings)

    def array(t):
        return DeviceArray(t.detach().contiguous().numpy(), tape)

    def tensor(a):
        with _disable_current_modes():
            return torch.from_numpy(a.values)

    bridge_to(monkeypatch, device, array, tensor)
    for module in ("analog_mvm", "outer_product", "dac_clip", "reprogram"):
        monkeypatch.setattr(sys.modules[f"gpuxbar.bridge.{module}"], "on_cpu", lambda _: False)
    scales = sys.modules["gpuxbar.bridge.analog_mvm"]._slice_scale
    scales.cache_clear()  # arrays of the one kind are not for the other
    try:
        with tape:
            yield tape
    finally:
        scales.cache_clear()


def taped(tape):
    """In place of `capture._captured`: a graph that is being captured runs nothing, so what taping ran is undone."""

    def captured(step, restore):
        for _ in range(2):
            step()
        restore()
        tape.on, tape.steps = True, []
        try:
            loss = step()
        finally:
            tape.on = False
        restore()
        return loss, tape.play

    return captured
