"""Operators of the namespace "gpuxbar", for CPU and CUDA tensors.

`torch.library.custom_op` does the same with checks around every call that cost more than a small layer; these are left to
`torch.library.opcheck` in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from gpuxbar.bridge.internals import (
    _are_functorch_transforms_active,
    _AutoDispatchBelowAutograd,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _profiler_enabled,
    is_legacy_batchedtensor,
)
from gpuxbar.mapping.plan import ReadPlan
from gpuxbar.ops import ConvGeometry
from gpuxbar.spec import CrossbarSpec

__all__ = ["alone", "call", "conv_of", "gradient", "once", "operator", "plan_of", "spec_of"]

ORDINARY = {Tensor, torch.nn.Parameter, NoneType, str, bool, int, float, list, tuple, torch.Size}
LIBRARY = torch.library.Library("gpuxbar", "DEF")

# operators take specs and plans as JSON, so that a compiled graph sees a constant
spec_of = lru_cache(maxsize=4096)(CrossbarSpec.model_validate_json)
plan_of = lru_cache(maxsize=4096)(ReadPlan.loads)


def conv_of(patch: list[int] | None, x: Tensor, groups: int, crossbar: CrossbarSpec) -> ConvGeometry | None:
    """The convolution of images x by a kernel, stride, padding and dilation, two numbers each."""
    if patch is None:
        return None
    kernel, stride, padding, dilation = ((patch[i], patch[i + 1]) for i in range(0, 8, 2))
    return ConvGeometry(
        x.shape[1] // groups,
        x.shape[2],
        x.shape[3],
        kernel,
        stride,
        padding,
        dilation,
        crossbar.mapping.line_order,
    )


def operator(
    fake: Callable[..., Any], mutates_args: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Any]:
    """Make a function an operator of its name; its annotations are the schema. The function itself is its `plain`.

    Args:
        fake: Shapes and dtypes of the results, for tracing.
        mutates_args: Arguments that it changes in place.
    """

    def wrap(function: Callable[..., Any]) -> Any:
        name = function.__name__
        schema = torch.library.infer_schema(function, mutates_args=mutates_args)
        LIBRARY.define(name + schema, tags=[torch.Tag.needs_exact_strides])
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(name, function, key)
        torch.library.register_fake(f"gpuxbar::{name}", fake, lib=LIBRARY)
        found = getattr(torch.ops.gpuxbar, name).default
        found.__doc__, found.plain, found.eager = function.__doc__, function, function
        return found

    return wrap


def call(op: Any, *args: Any) -> Any:
    """Run an operator: at once where nothing looks on, since finding it takes longer than small layers compute."""
    if torch.compiler.is_dynamo_compiling():
        return op(*args)
    return op.eager(*args) if alone(args) else op(*args)


def alone(args: tuple[Any, ...]) -> bool:
    """Whether no mode, tracer, profiler or kind of tensor is to see an operator called; the first argument tells of batches."""
    first = args[0]
    return (
        ORDINARY.issuperset(map(type, args))
        # holds its values as they are, on a CPU or a GPU: dispatch keys tell, too, but slowly
        and (first.is_cpu or first.is_cuda)
        and not (first.is_neg() or first._is_zerotensor() or is_legacy_batchedtensor(first))
        and not _are_functorch_transforms_active()
        and not _len_torch_dispatch_stack()
        and _get_tracing_state() is None
        and not _profiler_enabled()
    )


def gradient(
    op: Any,
    backward: Callable[..., Any],
    setup_context: Callable[..., None],
    wrt: tuple[int, ...],
    results: int | None = None,
) -> None:
    """Give an operator its gradient.

    `torch.library.register_autograd` reads the schema anew at every call, which costs more than a small layer; autograd looks at
    every argument that it is given, so it is given those `wrt` alone. Gradients of gradients are refused: see `once`.

    Args:
        backward: Gives the gradients of the arguments `wrt`, in their order, which is that of `ctx.needs_input_grad` too.
        setup_context: Called with the context, all arguments and the output.
        wrt: Places of the arguments that have a gradient.
        results: How many there are but for those at the end that backward alone needs, which are not shown to autograd where an
            operator that gives several runs at once, and not returned there; None: all.
    """
    name = op._schema.name.split("::")[1]
    first = once(backward)

    def with_none(ctx: Any, *grads: Any) -> Any:
        found = first(ctx, *grads)
        return *(found if isinstance(found, tuple) else (found,)), None

    def below(*args: Any) -> Any:
        # alone in a compiled graph, too: to dispatch once more takes longer than small layers compute
        if alone(args):
            return op.plain(*args)
        with _AutoDispatchBelowAutograd():
            return op(*args)

    def differentiable(run: Callable[..., Any], results: int | None, seen: bool) -> Callable[..., Any]:
        """What runs an operator so, with its gradient where one is wanted; `seen`: transforms of functorch may look on."""

        def forward(ctx: Any, *inputs: Any) -> Any:
            args = inputs[-1]
            output = run(*args)
            setup_context(ctx, args, output)
            return output if results is None else output[:results]

        body = {"forward": staticmethod(forward), "backward": staticmethod(with_none)}
        function: Any = type(f"{name}_gradient", (torch.autograd.Function,), body)
        # else without a look for them at every argument
        apply = function.apply if seen else super(torch.autograd.Function, function).apply

        def call_it(*args: Any) -> Any:
            if torch.is_grad_enabled():
                inputs = [args[place] for place in wrt]
                for x in inputs:
                    if x is not None and x.requires_grad:
                        return apply(*inputs, args)
            return run(*args)

        return call_it

    op.eager = differentiable(op.plain, results, seen=False)
    LIBRARY.impl(name, differentiable(below, None, seen=True), "Autograd")


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward function whose gradients refuse to be differentiated, even those in which a derivative would be missed in silence:
    of a last layer, say, whose weight alone they depend on."""

    def wrap(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        kept = _Unpacked(ctx)
        with torch.no_grad():
            found = backward(kept, *grads)
        several = found if isinstance(found, tuple) else (found,)
        # beside what they depend on, so that torch.autograd.grad finds its way here too
        anchors = torch.zeros(0, requires_grad=True), *grads, *kept.saved_tensors
        refusing = _Once.apply(len(several), *several, *anchors)  # type: ignore[no-untyped-call]
        return refusing if isinstance(found, tuple) else refusing[0]

    return wrap


class _Unpacked:
    """A context whose tensors may be looked at again, which activation checkpoints give once."""

    def __init__(self, ctx: Any):
        self.ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ctx, name)


class _Once(torch.autograd.Function):
    """Gradients as they are, `count` of the tensors."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Any) -> Any:
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise ValueError(
            "gpuxbar: a gradient that passed crossbar layers must not be differentiated again, got a second derivative, as of a gradient "
            "penalty; take the penalty of a difference of outputs, or keep these layers digital by rules of gpuxbar.convert"
        )
