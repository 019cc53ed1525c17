"""Replacing the layers of a model by crossbar layers, by rules."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from gpuxbar.bridge.internals import _NormBase
from gpuxbar.nn.analog_layer import AnalogLayer
from gpuxbar.nn.forms import (
    ANALOG,
    FUSED,
    LAYERS,
    analog,
    as_layers,
    form_of,
    is_layer,
    obstacle,
    of_torch,
    type_of,
)
from gpuxbar.nn.models import holders, known_name, require_module
from gpuxbar.nn.report import Report, Row, counts, macs, positions_of
from gpuxbar.spec import CrossbarSpec
from gpuxbar.spec.errors import nearest

__all__ = ["convert"]

NO_FORM = "no crossbar form of this type"
TIED = "its weight is another module's too, and would be laid out otherwise: untie it"
# parameters that scale, shift or are looked up, and are multiplied by no matrix
NO_PRODUCTS = _NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.Embedding, nn.EmbeddingBag, nn.PReLU


@torch.inference_mode(False)  # whose tensors nothing could train elsewhere
def convert(
    model: nn.Module,
    spec: CrossbarSpec,
    rules: dict[str, dict[str, Any] | None] | None = None,
    example: Tensor | tuple[Any, ...] | dict[str, Any] | None = None,
) -> tuple[nn.Module, Report]:
    """A copy of a model with its layers on crossbars, and the report.

    Linear, Conv1d and Conv2d run there, and so do the products with weights of MultiheadAttention, of LSTM, GRU, RNN and their
    cells, of Conv3d, and of ConvTranspose1d and ConvTranspose2d, which become layers of their own, such as `attention.q_proj`
    or `lstm.ih_l0`; Conv1D of the transformers library becomes a Linear. Subclasses that compute as these do become what these do;
    layers of other types stay digital and are named in the report. Layers that are no submodules, as those in a plain list, stay as
    they are, of which a warning tells, unless a rule says that the attribute which holds them is to be digital.

    Layers on other crossbars than `spec` and `rules` say move there with their weights (what was read of them, where trained in
    situ) and the DAC ranges that they learned, without other ranges, devices and counts: so a trained network is tried on other
    crossbars, and `rules={"*": None}` makes modules of torch of it again, fused ones where all of their layers leave (but those
    with hooks, tied to others, or frozen in part). Those whose crossbars are the same stay as they are, and so do subclasses of
    crossbar layers.

    State dicts of `model` load into the converted one with strict=False: they lack its counts and ranges, which stay.

    Args:
        model: Any model; it is not changed.
        spec: The crossbars of every layer.
        rules: Glob patterns of module names, as they are before a model is compiled or wrapped, to overrides of the spec, or to
            None: digital. Of those that match a layer the last one counts, and overrides of the others do not add to it. The name of
            a module that becomes layers stands for them.
        example: A batch, or a tuple or dict of the model's arguments; one pass of it through `model` counts the
            multiply-accumulates of a sample, and finds layers that are never called, whose weights something else may use
            digitally.

    Returns:
        The model and the report.

    Raises:
        TypeError: `model` is no module, `spec` is not a CrossbarSpec, or `rules` hold something else than overrides.
        ValueError: A rule matches no layer, a layer with ADCs has no values yet, or the weight of one that would leave its crossbar
            is computed of others.
    """
    require_module("convert", model)
    if not isinstance(spec, CrossbarSpec):
        raise TypeError(
            f"convert: `spec` must be a CrossbarSpec, got {type(spec).__name__}; make one of settings by CrossbarSpec(**settings), or call "
            "one of gpuxbar.presets, as demo()"
        )
    choices = _Rules(model, spec, rules or {})
    model, learned = _off_others(_copied(model), choices)
    model, tied = _unfuse(_fuse(model, choices), choices)
    owners = _owners(model)
    positions = positions_of(model, example)
    rows = []
    for module, names in _places(model).items():
        label, kind = ", ".join(map(choices.known, names)), type(module).__name__
        if type(module) in FUSED.values():  # a bias, beside layers that follow
            continue
        if isinstance(module, AnalogLayer):
            why = "already so" if type_of(module) in ANALOG else "of a type that stays as it is"
            rows.append(Row(label, kind, "analog", why, *counts(module, names, positions)))
        elif not is_layer(module):
            why = TIED if module in tied else _why_not(module, names, choices)
            rows.append(Row(label, kind, "digital", why, macs=0 if isinstance(module, NO_PRODUCTS) else None))
        else:
            chosen, why = choices.of([*names, *owners.get(module, ())])
            if positions is not None and names[0] not in positions:
                why += ", but not called by the example"
            if chosen is None:
                rows.append(Row(label, kind, "digital", why, macs=macs(module, names, positions)))
                continue
            layer = analog(module, chosen, choices.known(names[0]))
            if chosen.dac.range == "learned" and module in learned:
                layer.dac_max = learned[module]
                layer.look_at_ranges()
            model = _replaced(model, names, layer)
            rows.append(Row(label, kind, "analog", why, *counts(layer, names, positions), layer.clip_rate()))
    _warn_of_hidden(model, choices)
    choices.require_used([row.module for row in rows if row.why != NO_FORM])
    _call_layers(model)
    return model, Report(tuple(rows))


class _Rules:
    """Which spec a layer of a model gets, and which of the rules said so of any layer."""

    def __init__(self, model: nn.Module, spec: CrossbarSpec, rules: dict[str, dict[str, Any] | None]):
        if not isinstance(rules, dict):
            raise TypeError(
                f"convert: `rules` must be a dict of patterns of names, got {type(rules).__name__}; for instance "
                '{"classifier": None}'
            )
        for pattern, change in rules.items():
            if not isinstance(pattern, str):
                raise TypeError(
                    f"convert: `rules` must be by patterns of names, got {pattern!r}; write {str(pattern)!r}"
                )
            if change is not None and not isinstance(change, dict):
                raise TypeError(
                    f"convert: `rules` must hold overrides of the spec or None, got {type(change).__name__} for {pattern!r}; for "
                    'instance {"adc": {"bits": 6}}, or None to stay digital'
                )
        self.model, self.spec, self.rules = model, spec, rules
        self.used: set[str] = set()

    def known(self, name: str) -> str:
        """A name as rules and the report have it."""
        return known_name(self.model, name)

    def of(self, names: Iterable[str]) -> tuple[CrossbarSpec | None, str]:
        """The spec of a layer with these names, None to be digital, and why."""
        found: tuple[dict[str, Any] | None, str] = {}, "default"
        known = [self.known(name) for name in names]
        for pattern, change in self.rules.items():
            if any(fnmatchcase(name, pattern) for name in known):
                self.used.add(pattern)
                found = change, f"rule {pattern}"
        overrides, why = found
        return None if overrides is None else self.spec.with_overrides(overrides), why

    def require_used(self, layers: list[str]) -> None:
        """Refuse rules that matched nothing."""
        unused = [pattern for pattern in self.rules if pattern not in self.used]
        if unused:
            raise ValueError(
                f"convert: `rules` must each match a layer, got no match for {unused}; {nearest(unused[0], layers)}"
            )


def _copied(model: nn.Module) -> nn.Module:
    """A copy that may be changed."""
    # what passes have left in attributes, as weights that are computed of others, is no leaf, and torch copies leaves alone
    left = (
        value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)
    )
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in left if not value.is_leaf})


def _off_others(model: nn.Module, rules: _Rules) -> tuple[nn.Module, dict[nn.Module, Tensor]]:
    """The model with layers of torch where layers are on other crossbars than the rules want, and DAC ranges that they learned."""
    owners, learned = _owners(model), {}
    for module, names in _places(model).items():
        if not isinstance(module, AnalogLayer):
            continue
        kind = type_of(module)
        chosen, _ = rules.of([*names, *owners.get(module, ())])
        if kind not in ANALOG or chosen == module.spec:
            continue
        why_not = obstacle(module)
        if why_not:
            raise ValueError(
                f"convert: `model` must let its layers leave their crossbars, got {rules.known(names[0])}: {why_not}"
            )
        plain = of_torch(module, ANALOG[kind])
        if module.spec.dac.range == "learned" and module.dac_begun:
            learned[plain] = module.dac_max
        model = _replaced(model, names, plain)
    return model, learned


def _why_not(module: nn.Module, names: list[str], rules: _Rules) -> str:
    """Why a module of another type stays digital."""
    if isinstance(module, LazyModuleMixin):
        return "lazy: pass a batch through it first"
    if form_of(module) not in LAYERS and as_layers(module) is None:
        return NO_FORM
    return obstacle(module) or rules.of(names)[1]


def _places(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Modules that hold parameters, with all their names."""
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if any(True for _ in module.parameters(recurse=False)):
            places.setdefault(module, []).append(name)
    return places


def _owners(model: nn.Module) -> dict[nn.Module, list[str]]:
    """The names of the modules that became layers, by layer."""
    owners: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) in FUSED.values():
            for layer in module.modules():
                owners.setdefault(layer, []).append(name)
    return owners


def _fuse(model: nn.Module, rules: _Rules) -> nn.Module:
    """The model with modules of torch where these had become layers, none of which is to be analog."""
    owners: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) in FUSED.values():
            owners.setdefault(module, []).append(name)
    held = holders(model.modules())
    for module, names in owners.items():
        layers = dict(module.named_children())
        choices = [rules.of([*names, *(f"{name}.{leaf}" for name in names)])[0] for leaf in layers]
        if any(choice is not None for choice in choices) or obstacle(module):
            continue
        if any(not is_layer(layer) or any(_hooks(layer).values()) for layer in layers.values()):
            continue
        whole: nn.Module | None = module.fused()  # type: ignore[operator]
        if whole is None or any(held[p] > 1 for p in set(module.parameters()) - set(whole.parameters())):
            continue
        model = _replaced(model, names, whole)
    return model


def _unfuse(model: nn.Module, rules: _Rules) -> tuple[nn.Module, set[nn.Module]]:
    """The model with fused modules as layers, where any of these is to be analog; and modules whose layers would hold other
    parameters than now, which another module holds too."""
    tied: set[nn.Module] = set()
    places = _places(model)
    held = holders(places)
    for module, names in places.items():
        make = as_layers(module)
        if make is None or obstacle(module):
            continue
        parts = make(module)
        layers = {leaf: layer for leaf, layer in parts.named_modules() if type(layer) in LAYERS}
        choices = [rules.of([*names, *(f"{name}.{leaf}" for name in names)]) for leaf in layers]
        if all(chosen is None for chosen, _ in choices):
            continue
        remade = set(module.parameters()) - set(parts.parameters())
        if any(held[parameter] > 1 for parameter in remade):
            tied.add(module)
            continue
        model = _replaced(model, names, parts)
    return model, tied


def _replaced(model: nn.Module, names: list[str], module: nn.Module) -> nn.Module:
    """The model with another module under these names, and with the hooks of the one that was there."""
    for kind, value in _hooks(model.get_submodule(names[0])).items():
        setattr(module, kind, value)
    for name in names:
        parent, _, leaf = name.rpartition(".")
        if not name:
            return module
        setattr(model.get_submodule(parent), leaf, module)
    return model


def _hooks(module: nn.Module) -> dict[str, Any]:
    """What a module keeps of its hooks."""
    kinds = "_forward_", "_backward_", "_is_full_backward_hook"
    return {kind: value for kind, value in vars(module).items() if kind.startswith(kinds)}


def _call_layers(model: nn.Module) -> None:
    """Keep torch's encoders from their fused inference, which takes the weights of layers and never calls them."""
    for module in model.modules():
        if any(isinstance(layer, AnalogLayer) for layer in module.modules()):
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0
            elif isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False


def _warn_of_hidden(model: nn.Module, rules: _Rules) -> None:
    """Warn of layers that a module holds otherwise than as submodules, as in a plain list, if these are not as the rules want."""
    known = set(model.modules())
    hidden = []
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            layers = [layer for held in _held(value) if held not in known for layer in held.modules()]
            if any(isinstance(layer, AnalogLayer) or form_of(layer) is not None for layer in layers):
                where = rules.known(f"{name}.{attribute}" if name else attribute)
                chosen, _ = rules.of([where])
                if chosen is not None or any(isinstance(layer, AnalogLayer) for layer in layers):
                    hidden.append(where)
    if hidden:
        warnings.warn(
            f"gpuxbar: {', '.join(f'`{where}`' for where in hidden)} of the model hold layers that are none of its submodules, as lists "
            "and dicts of Python do; these stay as they are, and out of the report: keep layers in nn.ModuleList or nn.ModuleDict; where "
            f"they are to stay digital, say so by rules={{{hidden[0]!r}: None}}",
            RuntimeWarning,
            stacklevel=4,
        )


def _held(value: Any, depth: int = 3) -> Iterator[nn.Module]:
    """Modules that a value is or, so many containers deep, holds."""
    if isinstance(value, nn.Module):
        yield value
    elif depth:
        parts: Iterable[Any] = ()
        if isinstance(value, dict):
            parts = value.values()
        elif isinstance(value, (list, tuple, set)):
            parts = value
        elif is_dataclass(value):
            parts = [getattr(value, field.name, None) for field in fields(value)]
        for part in parts:
            yield from _held(part, depth - 1)
