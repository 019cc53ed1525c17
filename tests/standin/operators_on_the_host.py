"""PyTorch's operators of CUDA tensors, whose memory is the host's here: those of the CPU take their place."""

from __future__ import annotations

import ctypes
import itertools
import warnings

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
# Operators that launch no kernel, and stay: memory, views, a number for the host.
REAL = {
    "as_strided", "view", "_reshape_alias", "set_", "resize_", "record_stream", "_local_scalar_dense", "unfold", "is_pinned", "empty",
    "empty_strided", "_pin_memory",
}  # fmt: skip


def _batch_norm(x, weight, bias, mean, var, training, momentum, eps):
    found = aten.native_batch_norm(x, weight, bias, mean, var, training, momentum, eps)
    return *found, torch.empty(0, dtype=torch.uint8)


def _batch_norm_backward(x, grad, weight, mean, var, saved_mean, saved_var, eps, _):
    how = True, eps, [True, True, True]
    return aten.native_batch_norm_backward(grad, x, weight, mean, var, saved_mean, saved_var, *how)


def _convolution(x, weight, padding, stride, dilation, groups, *_):
    return aten.convolution(x, weight, None, stride, padding, dilation, False, [0], groups)


CUDNN = {  # the CPU has these by other names
    "cudnn_batch_norm": _batch_norm, "cudnn_batch_norm_backward": _batch_norm_backward, "cudnn_convolution": _convolution,
}  # fmt: skip


def _on_host(t):
    """A CUDA tensor's memory as a tensor of the CPU, which does not keep it."""
    if not t.is_cuda:
        return t
    storage = t.untyped_storage()
    memory = storage.data_ptr(), torch.device("cpu"), storage.nbytes()
    there = torch._C._construct_storage_from_data_pointer(*memory)
    return torch.empty(0, dtype=t.dtype).set_(there, t.storage_offset(), t.size(), t.stride())


def _on_device(t):
    """A new CUDA tensor with the values of one of the CPU."""
    made = torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="cuda")
    _on_host(made).copy_(t)
    return made


def _for_host(tree):
    tree = tree_map_only(torch.Tensor, _on_host, tree)
    tree = tree_map_only(torch.device, lambda _: torch.device("cpu"), tree)
    return tree_map_only(torch.Generator, lambda _: None, tree)


class Operator:
    """One, called with CUDA tensors. While its stream is captured it runs only for the shapes of what it makes, and is taped."""

    def __init__(self, name, tape):
        base, _, overload = name.removeprefix("aten::").partition(".")
        self.name, self.tape, self.overloads = name, tape, getattr(aten, base)
        function = getattr(self.overloads, overload or "default")
        self.function, schema = CUDNN.get(base, function), function._schema
        self.names = [a.name for a in schema.arguments]
        self.tensors = [a.name for a in schema.arguments if str(a.type) == "Tensor"]
        self.written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
        self.in_place = all(r.alias_info for r in schema.returns)
        self.returns = len(schema.returns)

    def __call__(self, *args, **kwargs):
        given = dict(zip(self.names, args, strict=False)) | kwargs
        captured = self.tape.captured()
        if captured and any(isinstance(a, torch.Tensor) and a.is_cpu and a.ndim for a in given.values()):
            raise RuntimeError(
                f"CUDA error: {self.name} takes memory of the host while its stream is captured"
            )
        compute = self._computation(len(args), tuple(kwargs))
        values = _for_host(given)
        unsized = [n for n in self.written if isinstance(given[n], torch.Tensor) and not given[n].numel()]
        if captured or unsized:  # what it writes stays, or is as large only afterwards, as out=torch.empty(0)
            values = tree_map_only(torch.Tensor, torch.clone, values)
        found = compute(values)
        for n in unsized:
            _on_host(given[n].resize_(values[n].shape)).copy_(values[n])
        made = None if self.in_place else tree_map_only(torch.Tensor, _on_device, found)
        if captured:
            self._record(compute, _for_host(given), _for_host(made))
        if not self.in_place or not self.returns:
            return made
        outputs = tuple(given[n] for n in self.written)
        return outputs if self.returns > 1 else outputs[0]

    def _computation(self, count, named):
        """A call of so many arguments by place, and of these by name; it holds none of them, and so no graph of autograd."""

        def compute(values):
            plain = any(isinstance(values.get(n), (int, float)) for n in self.tensors)  # as the 4 in x % 4
            function = self.overloads if plain else self.function
            return function(*(values[n] for n in self.names[:count]), **{n: values[n] for n in named})

        return compute

    def _record(self, compute, values, places):
        def again():
            found = compute(values)
            for place, new in zip(tree_leaves(places), tree_leaves(found), strict=False):
                if isinstance(place, torch.Tensor):
                    place.copy_(new)

        self.tape.record(again)


class Tape:
    """What graphs play again, by number; the stand-in's library tells when."""

    def __init__(self, library):
        self.library, self.steps, self.numbers = library, {}, itertools.count(1)
        self.play = ctypes.CFUNCTYPE(None, ctypes.c_ulonglong)(self._play)
        library.standin_play_by(self.play)

    @torch.no_grad()
    def _play(self, number):
        self.steps[number]()

    def _tell(self, number):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        return self.library.standin_tape(stream, ctypes.c_ulonglong(number))

    def captured(self):
        """Whether PyTorch's current stream is."""
        return bool(self._tell(0))

    def record(self, step):
        number = next(self.numbers)
        self.steps[number] = step
        self._tell(number)


def replace_operators(library):
    global replaced  # must live on
    replaced, tape = torch.library.Library("aten", "IMPL"), Tape(library)
    for fused in ("flash", "mem_efficient", "cudnn"):  # attention, which is done by products then
        getattr(torch.backends.cuda, f"enable_{fused}_sdp")(False)
    listed = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns of each that is replaced
        for name in sorted({n for n in listed if n.startswith("aten::")} | {"aten::copy_"}):
            short = name.removeprefix("aten::")
            base, _, overload = short.partition(".")
            if base not in REAL and (overload or "default") in getattr(aten, base).overloads():
                replaced.impl(short, Operator(name, tape).__call__, "CUDA", allow_override=True)
