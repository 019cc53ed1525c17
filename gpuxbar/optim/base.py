"""What the in-situ optimisers share: settings, digital parameters, arrays beside the layers' own, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from numbers import Integral
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from gpuxbar.bridge.device_update import require_finite_gradient
from gpuxbar.bridge.internals import _disable_dynamo
from gpuxbar.nn.analog_layer import AnalogLayer
from gpuxbar.nn.in_situ import InSitu
from gpuxbar.nn.models import require_apart
from gpuxbar.nn.owners import layer_of

__all__ = ["COUNT", "LR", "MOMENTUM", "InSituOptimizer", "Rule", "is_count"]


class Rule(NamedTuple):
    """What a setting of an `InSituOptimizer` must be, in words and as a test, and a value to try."""

    text: str
    holds: Callable[[Any], bool]
    example: str

    def broken_by(self, value: Any) -> type[Exception] | None:
        """The error that a value is, if it is one."""
        try:
            return None if self.holds(value) else ValueError
        except (TypeError, RuntimeError, ValueError):  # of text, say, or of several values
            return TypeError


def is_count(value: Any) -> bool:
    """Whether a value is a whole number."""
    return isinstance(value, Integral)


LR = Rule("above 0", lambda value: value > 0, "0.05")
COUNT = Rule("a whole number of at least 1", lambda value: is_count(value) and value >= 1, "1")
OTHERS = ("weight_decay", "dampening", "nesterov", "maximize")  # settings of torch's SGD
MOMENTUM = Rule("at least 0 and below 1", lambda value: 0 <= value < 1, "0.9")


class InSituOptimizer(torch.optim.Optimizer):
    """An optimiser that writes crossbar weights through their devices, and others by SGD with momentum.

    A step that meets a layer it cannot write, settings that do not go with it, or on a CPU a gradient of a layer that is not
    finite, is refused before it changes anything. Nothing else may set a crossbar weight: that is refused at the next read or step,
    unless it is on a GPU and PyTorch does not count the change, as one by an optimiser with fused=True, or in place through
    `weight.data`. Averages of weights, as of `torch.optim.swa_utils.AveragedModel`, are on no array: `begin_in_situ()` of a
    layer writes them to cells, and `gpuxbar.convert(model, spec, rules={"*": None})` makes a digital model of them. Make the
    averaged model once there is an optimiser, which gives layers the buffers of their cells.

    A subclass adds to `rules` one for each setting of its own, and has `_write`, which turns a gradient into writes of a layer's
    cells: `layer.change_cells(change, factor)` moves them by factor * change, of the shape of the weight, through the law. Where
    `layer.keeps_operands` there is no gradient, but what `layer.take_operands()` gives, for `layer.change_in_array`: one that
    deals with such layers says so by `in_array`, of "pulses" and "streamed"; else they are refused. What it keeps for a layer
    beyond its cells is the module that `_begin` returns, `self.parts[weight]` from then on. At the end of a step all cells lose
    what `spec.retention` says, whether they were written or not. The state dict holds these modules too: with the model's it
    resumes a run bit for bit. `torch.distributed.checkpoint` loads only what a model has already, which devices are once it has
    an optimiser: build that before.

    Gradients may be accumulated over several batches or scaled by a `GradScaler`, and `lr` may follow any
    scheduler: they end in one gradient and one rate at each step.

    A layer whose spec has `pulses`, or a carry of scheme "streamed", is updated by products in an array of the inputs and
    errors of its backward passes since the last step, of those that reach its weight. The weight gets no gradient, and one of
    another use of it, as in a tied embedding or a penalty, is refused. `zero_grad` of this optimiser forgets the operands; that of
    a module does not, nor does clipping gradients reach them. Those of a layer that no optimiser has any more pile up: freeze it by
    `weight.requires_grad_(False)`. A `GradScaler` may scale the loss; its `unscale_`, which reaches gradients alone, is refused.
    """

    rules: ClassVar[dict[str, Rule]] = {"lr": LR, "momentum": MOMENTUM}
    in_array: ClassVar[tuple[str, ...]] = ()  # products in the array that `_write` makes
    _begins = True  # what is added
    grad_scale: Any  # of a `GradScaler`, and there only while it steps with layers that keep operands; so is found_inf
    found_inf: Any

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        if not set(cls.in_array) <= {"pulses", "streamed"}:
            raise TypeError(
                f'{cls.__name__}: `in_array` must hold names of "pulses" and "streamed", got {cls.in_array!r}; write ("pulses",)'
            )

    def __init__(self, params: Any, lr: float, momentum: float = 0.0, **settings: Any):
        unknown = sorted(settings.keys() - self.rules.keys())
        if unknown:
            raise TypeError(
                f"{type(self).__name__}: settings must be of {', '.join(self.rules)}, got {', '.join(unknown)}; leave that out"
            )
        self.parts: dict[Tensor, nn.Module] = {}
        self._begins = False  # until all groups are known to be right
        super().__init__(params, {"lr": lr, "momentum": momentum, **settings})
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        if all(layer_of(parameter) is None for parameter in parameters):
            raise ValueError(
                f"{type(self).__name__}: `params` must hold the weight of a crossbar layer, got none; pass those of the model that "
                "gpuxbar.convert returned, with weights that are neither computed of other parameters (undo weight_norm by "
                "remove_parametrizations or remove_weight_norm) nor shards (use gpuxbar.distribute in place of fully_shard)"
            )
        self._begins = True
        for group in self.param_groups:
            self._begin_group(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            layers = self._checked(group)
            known = [layer_of(parameter) for each in self.param_groups for parameter in each["params"]]
            require_apart(type(self).__name__, (layer for layer in known if isinstance(layer, AnalogLayer)))
            for layer in layers:
                if not layer.in_situ:
                    layer.full_weights()  # refuses what cannot begin, before any does
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        if self._begins:
            self._begin_group(group)

    @torch.inference_mode(False)  # whose tensors nothing could train elsewhere
    def _begin_group(self, group: dict[str, Any]) -> None:
        """Begin in-situ training of a group's layers, unless they have begun."""
        for layer in filter(None, map(layer_of, group["params"])):
            if not layer.in_situ:
                layer.begin_in_situ()
            assert isinstance(layer, AnalogLayer)
            part = self._begin(layer, group)
            if part is not None:
                self.parts[layer.weight] = part

    def _checked(self, group: dict[str, Any]) -> list[InSitu]:
        """The crossbar layers of a group, whose settings and layers are those that this algorithm can train."""
        for key, rule in self.rules.items():
            error = rule.broken_by(group[key])
            if error is not None:
                raise error(
                    f"{type(self).__name__}: `{key}` must be {rule.text}, got {group[key]!r}; try {rule.example}"
                )
        for key in OTHERS:
            if group.get(key):
                raise ValueError(
                    f"{type(self).__name__}: `{key}` must be left out of a group, got {group[key]}: it knows none; leave it out"
                )
        layers = [layer for layer in map(layer_of, group["params"]) if layer is not None]
        for layer in layers:
            self._check(layer, group)
        return layers

    def _check(self, layer: InSitu, group: dict[str, Any]) -> None:
        """Refuse a layer that this algorithm cannot train, before any begins, and settings that were changed since."""
        layer.require_law()
        if not layer.spec.updates_in_array:
            return
        if layer.spec.pulses is not None and "pulses" not in self.in_array:
            raise ValueError(
                f"{type(self).__name__}: `spec.pulses` must be None, got a pulse train for {layer.name}: this algorithm writes "
                "gradients, which pulse trains make none of; set pulses=None, or train by another algorithm"
            )
        if layer.spec.pulses is None and "streamed" not in self.in_array:
            raise ValueError(
                f"{type(self).__name__}: `spec.carry.scheme` must be accumulate or periodic, got 'streamed' for {layer.name}; "
                "bit streams are InSituSGD's"
            )

    def _begin(self, layer: AnalogLayer, group: dict[str, Any]) -> nn.Module | None:
        """What is kept for a layer beside its cells; `group` holds the settings."""
        return None

    def _write(self, layer: AnalogLayer, weight: Tensor, group: dict[str, Any]) -> None:
        """Write a layer's cells after `weight.grad`, or after the operands of one that keeps these."""
        raise NotImplementedError

    @_disable_dynamo  # as torch's own zero_grad
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update what has a gradient, or whose layer kept inputs and errors; returns the loss of `closure`, if given."""
        if not self._unscale():
            return None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ready = [self._require_ready(group) for group in self.param_groups]
        for group, layers in zip(self.param_groups, ready, strict=True):
            for parameter, layer in zip(group["params"], layers, strict=True):
                grad = parameter.grad
                if layer is None:
                    if grad is not None:
                        parameter.add_(self._velocity(parameter, group["momentum"]), alpha=-group["lr"])
                    continue
                moves = bool(layer.streams.pairs) if layer.keeps_operands else grad is not None
                if moves:
                    assert isinstance(layer, AnalogLayer)
                    self._write(layer, parameter, group)
                self._relax(layer, self.parts.get(parameter))
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether `step` itself undoes what a `GradScaler` did, which asks before it looks for gradients that are not finite: it
        finds the errors of layers that make none."""
        layers = [layer for layer in self._layers() if layer.keeps_operands]
        for layer in layers:
            if not layer.streams.pairs:
                continue
            looked_at = layer.streams.finite(layer.weight)
            if layer.weight.grad is None:
                layer.weight.grad = looked_at
            else:  # of zeros, as `DistributedDataParallel` makes them, or one that `step` will refuse
                layer.weight.grad += looked_at
        return bool(layers)

    def _unscale(self) -> bool:
        """Undo what a `GradScaler` did where it leaves that to `step`; whether there is a step to make."""
        for layer in self._layers():
            grad = layer.weight.grad
            if layer.keeps_operands and grad is not None and grad.is_sparse and not grad.dense_dim():
                layer.weight.grad = None  # of `Streams.finite`; those of an embedding are dense in rows
        if not hasattr(self, "found_inf"):
            return True
        if self.grad_scale is None:
            raise ValueError(
                f"{type(self).__name__}: `scaler.unscale_` must not be called with pulse trains or bit streams, whose errors it "
                "does not reach; leave it out, `scaler.step` unscales"
            )
        if self.found_inf:
            self._forget_operands()
            return False
        scale = float(self.grad_scale)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad /= scale
        for layer in self._layers():
            layer.streams.pairs = [(x, grad_y / scale) for x, grad_y in layer.streams.pairs]
        return True

    @_disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._forget_operands()

    def _layers(self) -> list[InSitu]:
        found = (layer_of(parameter) for group in self.param_groups for parameter in group["params"])
        return [layer for layer in found if layer is not None]

    def _forget_operands(self) -> None:
        for layer in self._layers():
            layer.streams.forget()

    def _relax(self, layer: InSitu, part: nn.Module | None) -> None:
        """Let a step's time pass for a layer's cells, and for the arrays beside them."""
        beside = [] if part is None else [module for module in part.modules() if isinstance(module, InSitu)]
        for array in (layer, *beside):
            array.relax()

    def _velocity(self, parameter: Tensor, momentum: float) -> Tensor:
        """momentum * velocity + gradient."""
        assert parameter.grad is not None
        if not momentum:
            return parameter.grad
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = parameter.grad.clone()
        else:
            state["momentum"].mul_(momentum).add_(parameter.grad)
        velocity: Tensor = state["momentum"]
        return velocity

    def _require_ready(self, group: dict[str, Any]) -> list[InSitu | None]:
        """Refuse a rate that is none, a layer that cannot be written, and a gradient that cannot be written to it. The layers of the
        group's parameters, where they have one."""
        if not 0 <= group["lr"] < inf:
            raise ValueError(
                f"{type(self).__name__}: `lr` must be finite and at least 0, got {group['lr']}; look at the scheduler"
            )
        layers = [layer_of(parameter) for parameter in group["params"]]
        for parameter, layer in zip(group["params"], layers, strict=True):
            if layer is None:
                continue
            self._check(layer, group)
            if layer.keeps_operands and parameter.grad is not None:
                self._require_no_gradient(layer, parameter.grad)
            errors = [] if parameter.grad is None else [parameter.grad]
            if layer.streams.group is None:  # else all ranks refuse together, once they have each other's
                errors += [grad_y for _, grad_y in layer.streams.pairs]
            if errors or layer.streams.pairs or layer.spec.retention.tau is not None:
                layer.require_unprogrammed("weight")
                layer.require_read_out()
            for error in errors:
                require_finite_gradient(error, f"{type(self).__name__}: the gradient of {layer.name}")
        return layers

    def _require_no_gradient(self, layer: InSitu, grad: Tensor) -> None:
        """Refuse a gradient that products in the array do not make. `DistributedDataParallel` makes zeros, at which a GPU would
        wait to look."""
        if layer.streams.group is None or (grad.device.type == "cpu" and grad.any()):
            raise ValueError(
                f"{type(self).__name__}: `weight` of {layer.name} must have no gradient with pulse trains or bit streams, which take "
                "none, got one, as of a tied embedding, a product outside the layer or a penalty; keep the layer digital by a rule, or leave "
                "that out; call zero_grad() if it is an old one"
            )

    def _named_parts(self) -> dict[int, nn.Module]:
        """Modules by the place of their weight among all parameters."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        return {i: self.parts[parameter] for i, parameter in enumerate(parameters) if parameter in self.parts}

    def state_dict(self) -> dict[str, Any]:
        """torch's, with the state of `parts` under its own key, and the settings that go with it."""
        parts = {i: part.state_dict() for i, part in self._named_parts().items()}
        return super().state_dict() | ({"parts": parts, "settings": sorted(self.rules)} if parts else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave; the model's own state dict holds the layers' cells."""
        if not isinstance(state_dict, dict) or "param_groups" not in state_dict:
            raise ValueError(
                f"{type(self).__name__}: `state_dict` must be what state_dict() of an optimiser gave, got {type(state_dict).__name__} "
                "without param_groups; pass that, not the model's"
            )
        saved, parts = state_dict.get("parts", {}), self._named_parts()
        if saved.keys() != parts.keys():
            raise ValueError(
                f"{type(self).__name__}: `state_dict` must be of the same algorithm and layers, got arrays of parameters "
                f"{sorted(saved)} where {sorted(parts)} have them; build the optimiser that was saved"
            )
        more = sorted(
            {*state_dict.get("settings", ())} - self.rules.keys()
        )  # groups have those of schedulers too
        missing = sorted(
            {key for group in state_dict["param_groups"] for key in self.rules.keys() - group.keys()}
        )
        if more or missing:
            got = f"one without {', '.join(missing)}" if missing else f"one with {', '.join(more)}"
            raise ValueError(
                f"{type(self).__name__}: `state_dict` must be of the same algorithm, got {got}; build the optimiser that was saved"
            )
        for i, part in parts.items():
            part.load_state_dict(saved[i])
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # torch's, which knows no more than its own
        return state | {"parts": self.parts}
