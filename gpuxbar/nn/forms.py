"""Which modules of torch have a form on crossbars, and the ways there and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized

from gpuxbar.nn.attention import UnfusedAttention
from gpuxbar.nn.layers import AnalogConv, AnalogConv1d, AnalogConv2d, AnalogLinear
from gpuxbar.nn.linear import linear_of
from gpuxbar.nn.recurrent import UnfusedCell, UnfusedRNN
from gpuxbar.nn.transposed import UnfusedConvTranspose
from gpuxbar.nn.volumes import UnfusedConv3d
from gpuxbar.spec import CrossbarSpec

__all__ = [
    "ANALOG",
    "FUSED",
    "LAYERS",
    "analog",
    "as_layers",
    "form_of",
    "is_layer",
    "obstacle",
    "of_torch",
    "type_of",
]

LAYERS = nn.Linear, nn.Conv1d, nn.Conv2d
ANALOG = {AnalogLinear: nn.Linear, AnalogConv1d: nn.Conv1d, AnalogConv2d: nn.Conv2d}
FUSED: dict[type[nn.Module], Any] = {
    nn.MultiheadAttention: UnfusedAttention,
    **dict.fromkeys((nn.LSTM, nn.GRU, nn.RNN), UnfusedRNN),
    **dict.fromkeys((nn.LSTMCell, nn.GRUCell, nn.RNNCell), UnfusedCell),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d), UnfusedConvTranspose),
    nn.Conv3d: UnfusedConv3d,
}
# subclasses of these may compute as they do
PLAIN = *LAYERS, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Conv3d


def type_of(module: nn.Module) -> Any:
    """The type of a module, whose parametrizations make another one of it."""
    return type(module).__base__ if is_parametrized(module) else type(module)


def form_of(module: nn.Module) -> type[nn.Module] | None:
    """The type with a crossbar form that a module is of, or computes as: a subclass that changes nothing but how it is made."""
    kind = type_of(module)
    if kind in LAYERS or kind in FUSED:
        return kind
    base = next((plain for plain in PLAIN if isinstance(module, plain)), None)
    # the weight of a NonDynamicallyQuantizableLinear is used by its owner
    if base is None or isinstance(module, (LazyModuleMixin, NonDynamicallyQuantizableLinear)):
        return None
    added = [item for part in kind.__mro__[: kind.__mro__.index(base)] for item in vars(part).items()]
    silent = all(
        name in ("reset_parameters", "extra_repr")
        or isinstance(value, staticmethod)
        or (name.startswith("__") and name != "__call__")
        for name, value in added
    )
    plain = base(1, 1, 1, device="meta")  # type: ignore[arg-type]
    held = ("_parameters", "_buffers", "_modules")
    alike = vars(module).keys() <= vars(plain).keys() and all(
        vars(module)[part].keys() <= vars(plain)[part].keys() for part in held
    )
    return base if silent and alike else None


def obstacle(module: nn.Module) -> str | None:
    """What keeps a module of a type that has a crossbar form digital, if anything does."""
    if "forward" in vars(module):
        return "its forward was replaced: undo that first"
    if any(weight.is_complex() for weight in module.parameters()):
        return "its weights are complex: take real and imaginary parts apart"
    computed = any(
        is_parametrized(part)
        or any(
            type(hook).__module__.startswith("torch.nn.utils.") for hook in part._forward_pre_hooks.values()
        )
        for part in module.modules()
    )
    if computed or (form_of(module) in LAYERS and "weight" not in module._parameters):
        return (
            "its weight is computed anew: make it a parameter, as torch.nn.utils.prune.remove and "
            "torch.nn.utils.parametrize.remove_parametrizations do, or convert before"
        )
    return None


def is_layer(module: nn.Module) -> bool:
    """Whether a module becomes an analog layer: one of the types, with a weight and a forward of its own."""
    return form_of(module) in LAYERS and obstacle(module) is None


def as_layers(module: nn.Module) -> Callable[[Any], nn.Module] | None:
    """What makes layers of a module, None where nothing does."""
    kind = type(module)
    if (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D"):
        return _transposed_linear
    form = form_of(module)
    return None if form is None else FUSED.get(form)


def _transposed_linear(module: nn.Module) -> nn.Linear:
    """The layer of GPT-2 in the transformers library, whose weight is [I, O], as a Linear."""
    weight = module.get_parameter("weight")
    by_output = nn.Parameter(weight.detach().t().contiguous(), weight.requires_grad)
    return linear_of(by_output, module.get_parameter("bias")).train(module.training)


def analog(module: nn.Module, spec: CrossbarSpec, name: str) -> AnalogLinear | AnalogConv:
    weight, bias = module.get_parameter("weight"), dict(module.named_parameters()).get("bias")
    where: dict[str, Any] = {"spec": spec, "device": weight.device, "dtype": weight.dtype}
    if name:  # else it is the whole model, and has the name of a layer by itself
        where["name"] = name
    layer: AnalogLinear | AnalogConv
    if isinstance(module, nn.Linear):
        layer = AnalogLinear(module.in_features, module.out_features, bias is not None, **where)
    else:
        assert isinstance(module, (nn.Conv1d, nn.Conv2d))
        options = _options(module, bias is not None)
        layer = (AnalogConv1d if isinstance(module, nn.Conv1d) else AnalogConv2d)(*options, **where)
    # the same Parameter objects, so that weights shared with other modules stay shared
    layer.weight = weight
    layer.bias = bias
    layer.train(module.training)
    return layer


def of_torch(layer: Any, kind: Any) -> nn.Module:
    """The layer of torch that takes over the parameters of an analog one."""
    weight, bias = layer.release_weight(), layer.bias
    if kind is nn.Linear:
        plain: nn.Module = linear_of(weight, bias)
    else:
        plain = kind(*_options(layer, bias is not None), device="meta")
        plain.weight = weight
        plain.register_parameter("bias", bias)
    return plain.train(layer.training)


def _options(conv: Any, bias: bool) -> tuple[Any, ...]:
    """What a convolution like this one is made by."""
    return (
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, bias,
        conv.padding_mode,
    )  # fmt: skip
