"""Tiki-Taka and its kin: gradients go to a fast array, whose lines are read and moved to the layer's own, slow one.

The fast array A forgets: up and down steps of its devices are alike only at their symmetry points, and opposite
writes lead them there. So it keeps the recent gradient and loses its noise, and the slow array C is written only where
the gradient has a direction. What the algorithms differ in is the way from A to C, and what they need of A:

    v1          C += lr v                               A at its symmetry point reads 0 (`zero_shift`)
    v2          H += lr v, whole pulses of H to C       the same, less strictly
    v2 chopped  the sign of A flips at random           offsets of A average out
    AGAD        the sign of A flips regularly           offsets of A are measured before each flip and subtracted

Weights of C may be sliced; A is one pair for each of them, and pulses of C are those of its lowest slice.

v is what A reads, in units of the gradient. A weight changes by its gradient times `fast_lr` of its range over the largest
gradient of the layer (a running mean), and v is A's weight divided by the same, so `lr` is a rate in the sense of SGD, times
the number of reads for which A remembers.

Where a spec has `pulses`, A moves by pulse trains of inputs and errors, sample by sample, and no gradient is formed. The largest is
then taken to be the mean over samples of max|x| max|d|, which drivers of lines can know, times the root of their number: that of
one sample, and about that of many alike whose signs are independent. Opposite samples do not cancel before they are written, but
lead A to its symmetry points as well, so that it remembers for fewer steps the more samples they have. What goes to C goes by
pulses, too: in version 1 by trains, a sample for each line read; whole pulses of the others are as many coincidences for certain.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from gpuxbar.bridge.chop import chop
from gpuxbar.bridge.lines import largest_on_lines
from gpuxbar.nn.analog_layer import AnalogLayer
from gpuxbar.nn.auxiliary import AuxiliaryArray, pulse_weight
from gpuxbar.optim.base import COUNT, LR, MOMENTUM, InSituOptimizer, Rule, is_count

__all__ = ["AGAD", "ChoppedTikiTakaV2", "TikiTaka", "TikiTakaV2"]

SCALE_MEMORY = 0.99  # of the running mean of the largest gradient
LEAST = 1e-30  # to divide by
TAIL = 5  # AGAD's offset is measured over about the last fifth of a period

FAST = {
    "lr": LR,
    "momentum": MOMENTUM,
    "fast_lr": Rule("above 0 and at most 1", lambda value: 0 < value <= 1, "0.1"),
    "transfer_every": COUNT,
    "lines": COUNT,
    "zero_shift": Rule("a whole number of at least 0", lambda value: is_count(value) and value >= 0, "100"),
}
BUFFERED = {**FAST, "max_pulses": COUNT}


class Lines(NamedTuple):
    """Wordlines of a fast array: which, int64 [n]; how often each was read before, int64 [n]; what they read in units of the
    gradient, float32 [G, O, n]."""

    at: Tensor
    sweeps: Tensor
    values: Tensor


class Fast(nn.Module):
    """The fast array of a layer, and what its transfer keeps digitally; all of it is in the state dict.

    Buffers: `scale`, running mean of the largest gradient, float32 [1]; `sign` that gradients are written with,
    float32 [G, 1, I]; `waiting`, the buffer H in pulses, `offset`, what A read before its last flip, and `mean`, its
    running mean since: float32 [G, O, I], empty where the algorithm has none; `reads` of wordlines, int64 [1].
    Counter of the host: `steps`, for `transfer_every` above 1.
    """

    scale: Tensor
    sign: Tensor
    waiting: Tensor
    offset: Tensor
    mean: Tensor
    reads: Tensor

    def __init__(self, layer: AnalogLayer, zero_shift: int, buffers: tuple[str, ...]):
        super().__init__()
        self.array = AuxiliaryArray(layer, "fast")
        if zero_shift:
            self.array.shift_zero(zero_shift)
        shape, device = (layer.groups_, layer.outputs, layer.inputs), layer.weight.device
        self.register_buffer("scale", torch.zeros(1, dtype=torch.float32, device=device))
        self.register_buffer(
            "sign", torch.ones(layer.groups_, 1, layer.inputs, dtype=torch.float32, device=device)
        )
        for name in ("waiting", "offset", "mean"):
            self.register_buffer(
                name, torch.zeros(shape if name in buffers else 0, dtype=torch.float32, device=device)
            )
        self.register_buffer("reads", torch.zeros(1, dtype=torch.int64, device=device))
        self.steps = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"steps": self.steps}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]

    def collect(self, grad: Tensor, fast_lr: float) -> None:
        """Write a gradient [G, O, I] to the array."""
        scale = self._following(grad.abs().amax())
        change = -grad * self.sign * self.unit(fast_lr, scale)
        self.array.update_cells(change.view_as(self.array.weight))
        self._count(scale)

    def pulse(self, x: Tensor, d: Tensor, fast_lr: float) -> None:
        """Write the products of inputs and errors, as `take_operands` gives them, to the array, by pulse trains."""
        array, groups = self.array, self.array.groups_
        assert array.w_max is not None
        top_x = largest_on_lines(x, groups, array.patch if x.dim() == 4 else None)
        tops = (top_x * largest_on_lines(d, groups)).transpose(0, 1).flatten(1)
        scale = self._following(tops.mean(1).amax() * tops.shape[1] ** 0.5)
        full = array.w_max.view(groups, -1)
        top = full.amax(1, keepdim=True)
        root = (top / scale.clamp_min(LEAST)).sqrt()  # each takes its share of what scales the products
        x, d = _scaled(x, root), _scaled(d, full / top * root)
        array.update_in_array(x, d, fast_lr, self.sign.flatten())
        self._count(scale)

    def _following(self, largest: Tensor) -> Tensor:
        """The running mean with one more of what it is of."""
        mean = SCALE_MEMORY * self.scale + (1 - SCALE_MEMORY) * largest
        return torch.where(self.scale > 0, mean, largest)

    def _count(self, scale: Tensor) -> None:
        self.scale.copy_(scale)
        self.steps += 1

    def read(self, count: int, fast_lr: float) -> Lines:
        """Read the next lines."""
        inputs = self.array.inputs
        count = min(count, inputs)
        ahead = self.reads + torch.arange(count, device=self.reads.device)
        at = ahead % inputs
        values = self.array.read_lines(at) / self.unit(fast_lr, self.scale)
        self.reads += count
        return Lines(at, ahead // inputs, values)

    def unit(self, fast_lr: float, scale: Tensor) -> Tensor:
        """Change of a weight of the array for a gradient of 1, [G, O, 1]."""
        assert self.array.w_max is not None
        return fast_lr * self.array.w_max.view(self.array.groups_, -1, 1) / scale.clamp_min(LEAST)


def _scaled(operand: Tensor, factor: Tensor) -> Tensor:
    """Lines [B, G * lines] or images [N, G * channels, height, width] by factors of a group, [G, 1], or of each of its channels."""
    groups = len(factor)
    parts = operand.unflatten(1, (groups, -1))
    return (parts * factor.view(groups, -1, *(1,) * (operand.dim() - 2))).flatten(1, 2)


class TikiTaka(InSituOptimizer):
    """Tiki-Taka, version 1: what a line of the fast array reads is written to the slow one.

    A <- A - fast_lr grad (scaled);  every `transfer_every` steps, for the next `lines` wordlines:  C <- C + lr v

    The network reads C alone (the paper's gamma is 0). A must read 0 at its symmetry point: `zero_shift` leads it there and
    takes what it reads for its zero. Digital parameters: as in `InSituSGD`; crossbar weights have no momentum, the fast array is
    one. With `spec.pulses` both writes are pulse trains; a transfer is one of inputs 1 on the line read, 0 on others, and errors
    -v, at most `pulses.length` pulses.

    Args:
        params, lr, momentum: As for `InSituSGD`.
        fast_lr: Share of the range of A that the largest gradient of a layer moves a weight by.
        transfer_every: Steps between transfers.
        lines: Wordlines read at a transfer; all, where a layer has fewer. In hardware, about as many as samples are written.
        zero_shift: Pairs of up and down trains that lead A to its symmetry points first; 0: none. Each is 170 pulses, which
            `spec.endurance` counts.

    Source:
        Gokmen and Haensch, "Algorithm for training neural networks on resistive device arrays", Frontiers in
        Neuroscience 2020; Rasch et al., aihwkit, AICAS 2021 (transfers by trains).
    """

    rules: ClassVar[dict[str, Rule]] = FAST
    in_array: ClassVar[tuple[str, ...]] = ("pulses",)
    buffers: tuple[str, ...] = ()

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.0,
        fast_lr: float = 0.1,
        transfer_every: int = 1,
        lines: int = 32,
        zero_shift: int = 0,
        **more: Any,
    ):
        settings = {
            "fast_lr": fast_lr,
            "transfer_every": transfer_every,
            "lines": lines,
            "zero_shift": zero_shift,
        }
        super().__init__(params, lr=lr, momentum=momentum, **settings, **more)

    def _begin(self, layer: AnalogLayer, group: dict[str, Any]) -> nn.Module:
        return Fast(layer, group["zero_shift"], self.buffers)

    def _write(self, layer: AnalogLayer, weight: Tensor, group: dict[str, Any]) -> None:
        fast = self.parts[weight]
        assert isinstance(fast, Fast)
        if layer.keeps_operands:
            fast.pulse(*layer.take_operands(), group["fast_lr"])
        else:
            assert weight.grad is not None
            fast.collect(layer.by_line(weight.grad.float()), group["fast_lr"])
        if fast.steps % group["transfer_every"] == 0:
            self._transfer(layer, fast, fast.read(group["lines"], group["fast_lr"]), group)

    def _transfer(self, layer: AnalogLayer, fast: Fast, lines: Lines, group: dict[str, Any]) -> None:
        """Write to a layer what the lines read say."""
        if layer.keeps_operands:
            errors = -lines.values.permute(2, 0, 1).flatten(1)
            layer.change_in_array(fast.array.driven(lines.at), errors, group["lr"])
        else:
            self._change(layer, lines, group["lr"] * lines.values)

    def _change(self, layer: AnalogLayer, lines: Lines, values: Tensor) -> None:
        """Change the weights of the lines read by these, float32 [G, O, n]."""
        change = values.new_zeros(layer.groups_, layer.outputs, layer.inputs)
        change[..., lines.at] = values
        layer.change_cells(layer.of_lines(change))


class TikiTakaV2(TikiTaka):
    """Tiki-Taka, version 2: what the fast array reads adds up in a digital buffer, which is written in whole pulses.

    H <- H + lr v / pulse,  n = trunc(H) within +-max_pulses,  H <- H - n,  write n pulses to C

    The buffer filters the noise of reads and the offset of A that is smaller than the gradient. It keeps what was not
    written; by default, aihwkit's forgets all but a tenth once it writes. Whole pulses need no trains: with `spec.pulses`, those
    write to A alone.

    Args:
        params, lr, momentum, fast_lr, transfer_every, lines, zero_shift: As for `TikiTaka`.
        max_pulses: Most pulses of a transfer; 1 in the paper, which writes after every sample.

    Source:
        Gokmen, "Enabling training of neural networks on noisy hardware", Frontiers in Artificial Intelligence 2021.
    """

    rules: ClassVar[dict[str, Rule]] = BUFFERED
    buffers: tuple[str, ...] = ("waiting",)

    def __init__(
        self, params: Any, lr: float, momentum: float = 0.0, *, max_pulses: int = 31, **settings: Any
    ):
        super().__init__(params, lr, momentum, max_pulses=max_pulses, **settings)

    def _transfer(self, layer: AnalogLayer, fast: Fast, lines: Lines, group: dict[str, Any]) -> None:
        pulse = pulse_weight(layer)
        waiting = fast.waiting[..., lines.at] + group["lr"] * lines.values / pulse
        pulses = waiting.trunc().clamp(-group["max_pulses"], group["max_pulses"])
        fast.waiting[..., lines.at] = waiting - pulses
        self._change(layer, lines, pulses * pulse)


class ChoppedTikiTakaV2(TikiTakaV2):
    """Tiki-Taka version 2 with choppers: gradients of a wordline are written to A and read with a sign that flips.

    The sign flips with probability `flip` after each read of the line, so that the offset of A from its reference adds to
    the buffer with either sign and averages out.

    Args:
        params, lr, momentum, fast_lr, transfer_every, lines, zero_shift, max_pulses: As for `TikiTakaV2`.
        flip: Probability of a flip, 0 to 0.5 (0.1 in aihwkit). Between flips A must have time to forget what it holds with the
            old sign: the smaller `fast_lr`, the rarer the flips.

    Source:
        Rasch et al., "Fast and robust analog in-memory deep neural network training", Nature Communications 2024.
    """

    rules: ClassVar[dict[str, Rule]] = {
        **BUFFERED,
        "flip": Rule("0 to 0.5", lambda value: 0 <= value <= 0.5, "0.02"),
    }

    def __init__(self, params: Any, lr: float, momentum: float = 0.0, *, flip: float = 0.02, **settings: Any):
        super().__init__(params, lr, momentum, flip=flip, **settings)

    def _transfer(self, layer: AnalogLayer, fast: Fast, lines: Lines, group: dict[str, Any]) -> None:
        signed = lines._replace(values=lines.values * fast.sign[..., lines.at])
        super()._transfer(layer, fast, signed, group)
        transfers = fast.reads // len(lines.at)
        chop(fast.sign.squeeze(1), lines.at, transfers, group["flip"], fast.array.seed_of_cells)


class AGAD(TikiTakaV2):
    """Analog gradient accumulation with dynamic reference: regular flips, and the offset measured before each.

    With c the sign of a line and v what it reads:  H <- H + lr c (v - offset) / pulse,  mean <- mean + beta (v - mean);
    after `period` reads:  offset <- mean,  c <- -c.  beta = min(5 / period, 1). Whole pulses of H are written to C as
    in version 2, after the first period, which only measures (in aihwkit that and the read after it go to H, too, and are lost
    where they make pulses).

    The offset is learnt while training: A needs no symmetry point near its zero, and may even be symmetric. A period takes
    period * I / lines transfers of a layer with I wordlines (by default 40 where I is 128), and no fewer than `period`. Nothing is
    written in the first. What reaches C is what A gathers in a period: where that is much less than A remembers, it is noisier, and
    opposite pulses pull C to its symmetry points, whatever `lr` is. So more `lines` than a step has samples need a longer `period`.

    Args:
        params, lr, momentum, fast_lr, transfer_every, lines, zero_shift, max_pulses: As for `TikiTakaV2`.
        period: Reads of a line between flips of its sign, at least 1.

    Source:
        Rasch et al., "Fast and robust analog in-memory deep neural network training", Nature Communications 2024.
    """

    rules: ClassVar[dict[str, Rule]] = {**BUFFERED, "period": COUNT}
    buffers: tuple[str, ...] = ("waiting", "offset", "mean")

    def __init__(self, params: Any, lr: float, momentum: float = 0.0, *, period: int = 10, **settings: Any):
        super().__init__(params, lr, momentum, period=period, **settings)

    def _transfer(self, layer: AnalogLayer, fast: Fast, lines: Lines, group: dict[str, Any]) -> None:
        period, at = group["period"], lines.at
        # offsets are kept as weights: the scale of the gradient drifts
        unit = fast.unit(group["fast_lr"], fast.scale)
        moved = (lines.values - fast.offset[..., at] / unit) * fast.sign[..., at]
        known = lines.sweeps >= period
        super()._transfer(layer, fast, lines._replace(values=moved * known), group)
        mean = fast.mean[..., at]
        mean = mean + min(TAIL / period, 1.0) * (lines.values * unit - mean)
        fast.mean[..., at] = mean
        ends = (lines.sweeps + 1) % period == 0
        fast.offset[..., at] = torch.where(ends, mean, fast.offset[..., at])
        fast.sign[..., at] *= torch.where(ends, -1.0, 1.0)
