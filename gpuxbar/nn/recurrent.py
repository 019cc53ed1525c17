"""`nn.LSTM`, `nn.GRU`, `nn.RNN` and their cells with each product a layer of its own, so that they can run on crossbars."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from gpuxbar.bridge.internals import _has_any_global_hook
from gpuxbar.bridge.lstm_gates import lstm_gates
from gpuxbar.bridge.lstm_sequence import lstm_sequence
from gpuxbar.nn.converters import CONVERTERS
from gpuxbar.nn.dense import require_dense
from gpuxbar.nn.layers import AnalogLinear
from gpuxbar.nn.linear import linear_of
from gpuxbar.nn.unfused import Called, require_shape

__all__ = ["UnfusedCell", "UnfusedRNN"]


class UnfusedCell(nn.Module):
    """An `nn.LSTMCell`, `nn.GRUCell` or `nn.RNNCell` as two layers, `ih` of the input and `hh` of the state.

    It computes the same, and loads its state dicts.

    Args:
        cell: The module to take parameters and options from.
    """

    def __init__(self, cell: nn.RNNCellBase):
        super().__init__()
        self.input_size, self.hidden_size = cell.input_size, cell.hidden_size
        if isinstance(cell, nn.RNNCell):
            self.mode = f"RNN_{cell.nonlinearity.upper()}"
        else:
            self.mode = "LSTM" if isinstance(cell, nn.LSTMCell) else "GRU"
        self.ih, self.hh = _layer(cell, "ih"), _layer(cell, "hh")
        self.train(cell.training)

    def fused(self) -> nn.RNNCellBase:
        """The module of torch with these parameters."""
        kinds = {"LSTM": nn.LSTMCell, "GRU": nn.GRUCell}
        sizes = self.input_size, self.hidden_size, self.ih.bias is not None
        if self.mode in kinds:
            cell = kinds[self.mode](*sizes, device="meta")
        else:
            cell = nn.RNNCell(*sizes, _bend(self.mode), device="meta")
        for part, layer in self.named_children():
            for kind in ("weight", "bias"):
                cell.register_parameter(f"{kind}_{part}", getattr(layer, kind))
        return cell.train(self.training)

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """As the cell's: a step from state `hx`, which of an LSTM is (h, c)."""
        _check_input(self, input, (), ("N",))
        batched = input.dim() == 2
        x = input if batched else input[None]
        if hx is None:
            h = c = x.new_zeros(len(x), self.hidden_size)
        else:
            h, c = _checked_states(self, hx, *((*input.shape[:-1], self.hidden_size),) * 2)
            h, c = (h, c) if batched else (h[None], c[None])
        h, c = _step(self.mode, self.ih(x), self.hh(h), h, c)
        h, c = (h, c) if batched else (h[0], c[0])
        return (h, c) if self.mode == "LSTM" else h

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        _rename(state_dict, prefix, ("ih", "hh"))
        super()._load_from_state_dict(state_dict, prefix, *more)


class UnfusedRNN(nn.Module):
    """An `nn.LSTM`, `nn.GRU` or `nn.RNN` as layers `ih_l0`, `hh_l0` and so on, stepped through in time.

    It computes the same, and loads its state dicts. All inputs of a layer are read at once, states one step after another;
    crossbars look for changed weights once a sequence, and a weight gets one gradient from the samples of all steps.

    On the CPU, the steps of an LSTM in float32 are one function, in which the layer `hh` is not called; outputs and gradients
    are those of single steps bit for bit, but for the order of the sums that make the gradients of weight and bias. Single
    steps are taken where the layer has hooks, is updated by products in its array, feels its wires in the gradient or has a
    DAC range other than that of the state's values, and with a projection or sequences of several lengths.

    Args:
        rnn: The module to take parameters and options from.
    """

    def __init__(self, rnn: nn.RNNBase):
        super().__init__()
        self.mode, self.input_size, self.hidden_size = rnn.mode, rnn.input_size, rnn.hidden_size
        self.num_layers, self.bias, self.batch_first = rnn.num_layers, rnn.bias, rnn.batch_first
        self.dropout, self.bidirectional, self.proj_size = rnn.dropout, rnn.bidirectional, rnn.proj_size
        self.suffixes = [
            f"_l{depth}{way}"
            for depth in range(rnn.num_layers)
            for way in ("", "_reverse")[: 1 + rnn.bidirectional]
        ]
        self.parts = ("ih", "hh", "hr") if rnn.proj_size else ("ih", "hh")
        for suffix in self.suffixes:
            for part in self.parts:
                self.add_module(part + suffix, _layer(rnn, part + suffix))
        self.train(rnn.training)

    def fused(self) -> nn.RNNBase:
        """The module of torch with these parameters."""
        options: dict[str, Any] = {
            "num_layers": self.num_layers, "bias": self.bias, "batch_first": self.batch_first, "dropout": self.dropout,
            "bidirectional": self.bidirectional, "device": "meta",
        }  # fmt: skip
        sizes = self.input_size, self.hidden_size
        rnn: nn.RNNBase
        if self.mode == "LSTM":
            rnn = nn.LSTM(*sizes, proj_size=self.proj_size, **options)
        elif self.mode == "GRU":
            rnn = nn.GRU(*sizes, **options)
        else:
            rnn = nn.RNN(*sizes, nonlinearity=_bend(self.mode), **options)
        for part, layer in self.named_children():
            for kind, parameter in layer.named_parameters():
                setattr(rnn, f"{kind}_{part}", parameter)
        rnn.flatten_parameters()
        return rnn.train(self.training)

    def flatten_parameters(self) -> None:
        """Nothing to flatten; here so that models which call it go on to work."""

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> Any:
        """As the module's: the output of every step, and the last state, which of an LSTM is (h, c)."""
        packed, lengths, batched = None, None, True
        if isinstance(input, PackedSequence):
            _check_input(self, input.data, ("sum of lengths",))
            packed = input
            x, lengths = pad_packed_sequence(packed)
        else:
            _check_input(self, input, ("T",), ("N", "T") if self.batch_first else ("T", "N"))
            batched = input.dim() == 3
            x = input if batched else input[:, None]
            x = x.transpose(0, 1) if self.batch_first and batched else x
            if not len(x):
                raise ValueError(
                    f"{_called(self)}: `input` must have a step at least, got shape {tuple(input.shape)}; leave such sequences out"
                )
        h, c = self._states(x, hx, batched)
        ways = 1 + self.bidirectional
        states = []
        for depth in range(self.num_layers):
            source = functional.dropout(x, self.dropout, self.training) if depth else x
            both = range(depth * ways, (depth + 1) * ways)
            found = [self._run(self.suffixes[i], source, h[i], c[i], lengths) for i in both]
            x = torch.cat([outputs for outputs, _ in found], 2) if len(found) > 1 else found[0][0]
            states += [state for _, state in found]
        last_h, last_c = zip(*states, strict=True)
        h, c = torch.stack(last_h), torch.stack(last_c)
        h, c = (h, c) if batched else (h[:, 0], c[:, 0])
        state = (h, c) if self.mode == "LSTM" else h
        if packed is not None:
            assert lengths is not None
            return pack_padded_sequence(x, lengths, enforce_sorted=packed.sorted_indices is None), state
        if not batched:
            return x[:, 0], state
        return x.transpose(0, 1) if self.batch_first else x, state

    def _states(self, x: Tensor, hx: Any, batched: bool) -> tuple[Tensor, Tensor]:
        """First states of all layers, [layers, N, H]."""
        if hx is None:
            shape = len(self.suffixes), x.shape[1]
            return x.new_zeros(*shape, self.proj_size or self.hidden_size), x.new_zeros(
                *shape, self.hidden_size
            )
        where = len(self.suffixes), *x.shape[1 : 1 + batched]
        h, c = _checked_states(
            self, hx, (*where, self.proj_size or self.hidden_size), (*where, self.hidden_size)
        )
        return (h, c) if batched else (h[:, None], c[:, None])

    def _run(
        self, suffix: str, x: Tensor, h: Tensor, c: Tensor, lengths: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Outputs and last state of a layer in one direction over x [T, N, I]; states stand still beyond a sequence's length."""
        layers = dict(self.named_children())
        # rows sample by sample, as in larger batches
        products = layers["ih" + suffix](x.transpose(0, 1)).transpose(0, 1)
        order = range(len(x))[:: -1 if suffix.endswith("_reverse") else 1]
        layer = layers["hh" + suffix]
        if (
            self.mode == "LSTM"
            and lengths is None
            and not self.proj_size
            and _unwatched(layer, products, h, c)
        ):
            return _lstm_at_once(layer, products, h, c, order)
        hh, hr = (_steady(layers.get(part + suffix)) for part in ("hh", "hr"))
        assert hh is not None
        gates = products.unbind()
        alive = None
        if lengths is not None:
            alive = (torch.arange(len(x), device=lengths.device)[:, None] < lengths)[..., None].to(x.device)
        outputs = [h] * len(x)
        for t in order:
            new_h, new_c = _step(self.mode, gates[t], hh(h), h, c)
            new_h = new_h if hr is None else hr(new_h)
            if alive is not None:
                new_h, new_c = torch.where(alive[t], new_h, h), torch.where(alive[t], new_c, c)
            h, c = new_h, new_c
            outputs[t] = h
        return torch.stack(outputs), (h, c)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        _rename(state_dict, prefix, tuple(part + suffix for part in self.parts for suffix in self.suffixes))
        super()._load_from_state_dict(state_dict, prefix, *more)


def _bend(mode: str) -> str:
    """The non-linearity of an `nn.RNN` of a mode."""
    return mode.removeprefix("RNN_").lower()


def _called(module: UnfusedCell | UnfusedRNN) -> Called:
    return Called(module, module.mode.partition("_")[0] + ("Cell" if isinstance(module, UnfusedCell) else ""))


def _check_input(module: UnfusedCell | UnfusedRNN, x: Any, *axes: tuple[str, ...]) -> None:
    """Refuse what is no input of a module, which has one of these groups of axes before that of its values."""
    also = " or a PackedSequence" if isinstance(module, UnfusedRNN) else ""
    called = _called(module)
    require_dense(called, "input", x, also)
    require_shape(called, "input", x, *((*before, module.input_size) for before in axes))


def _checked_states(
    module: UnfusedCell | UnfusedRNN, hx: Any, *shapes: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """The states (h, c) that `hx` holds, of these shapes: others would be broadcast, or some of them not be used."""
    pair = module.mode == "LSTM"
    states = list(hx) if pair and isinstance(hx, (tuple, list)) else [hx]
    if len(states) != 1 + pair or not all(isinstance(state, Tensor) for state in states):
        kinds = ", ".join(type(state).__name__ for state in states)
        raise TypeError(
            f"{_called(module)}: `hx` must be {'tensors (h, c)' if pair else 'a tensor'}, got {kinds}; leave it out to begin with zeros"
        )
    for state, shape in zip(states, shapes, strict=False):
        if tuple(state.shape) != shape:
            raise ValueError(
                f"{_called(module)}: `hx` must be of shape {shape} for this input, got {tuple(state.shape)}; give a state for every layer "
                "and sample"
            )
    return states[0], states[-1]


def _step(mode: str, x: Tensor, y: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The next state (h, c) from the products x of the input and y of the state; c is used by the LSTM alone."""
    if mode == "LSTM" and all(v.is_cpu and v.dtype == torch.float32 for v in (x, y, c)):
        h, c, _ = lstm_gates(x, y, c)
        return h, c
    if mode == "LSTM":
        i, f, g, o = (x + y).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    if mode == "GRU":
        (xr, xz, xn), (yr, yz, yn) = x.chunk(3, 1), y.chunk(3, 1)
        n, z = (xn + (xr + yr).sigmoid() * yn).tanh(), (xz + yz).sigmoid()
        h = n + z * (h - n)
        return h, h
    h = (x + y).tanh() if mode == "RNN_TANH" else (x + y).relu()
    return h, h


def _unwatched(layer: nn.Module, *values: Tensor) -> TypeGuard[AnalogLinear]:
    """Whether a layer's reads on the CPU need no call and no graph each: none looks at them, and they pass gradients straight."""
    if type(layer) is not AnalogLinear or torch.compiler.is_compiling() or _has_any_global_hook():
        return False
    hooks = layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks
    return (
        not any(hooks)
        and not layer.keeps_operands
        and not layer.spec.parasitics.exact_gradient
        and layer.fits_inputs
        and all(len(v) and v.is_cpu and v.dtype == torch.float32 for v in (*values, layer.weight))
        and all(type(v) in (Tensor, nn.Parameter) for v in values)
    )


def _lstm_at_once(
    layer: AnalogLinear, products: Tensor, h: Tensor, c: Tensor, order: range
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`_run` of an LSTM whose layer of the state is `_unwatched`."""
    layer.require_calibrated()
    layer.require_ranks()
    cells = layer.conductances()
    counter, way = layer.counter()
    steps = counter + way * torch.arange(1, len(order) + 1, device=counter.device)
    converters = tuple(getattr(layer, name) for name in CONVERTERS)
    outputs, h, c = lstm_sequence(
        products, h, c, layer.weight, layer.bias, cells[:4], converters, steps, layer.static[0], order
    )  # fmt: skip
    counter += way * len(order)
    for found in (outputs, h, c):
        layer.await_gradient(found)
    return outputs, (h, c)


def _steady(layer: nn.Module | None) -> Callable[[Tensor], Tensor] | None:
    """A layer to be called over and over before anything changes its weights: its devices are looked at now.

    Not where hooks come first, which may set the weight, as pruning does.
    """
    if isinstance(layer, AnalogLinear) and not layer._forward_pre_hooks:
        return partial(layer, steady=layer.steady())
    return layer


def _layer(source: nn.Module, name: str) -> nn.Linear:
    """A Linear of `weight_{name}` and, where there is one, `bias_{name}`."""
    bias = dict(source.named_parameters()).get(f"bias_{name}")
    return linear_of(source.get_parameter(f"weight_{name}"), bias)


def _rename(state_dict: dict[str, Any], prefix: str, names: tuple[str, ...]) -> None:
    """Keys of the fused module become those of its layers."""
    for name in names:
        for kind in ("weight", "bias"):
            if f"{prefix}{kind}_{name}" in state_dict:
                state_dict[f"{prefix}{name}.{kind}"] = state_dict.pop(f"{prefix}{kind}_{name}")
