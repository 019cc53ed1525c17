"""Inference over time: a model's weights are written once, and its devices age."""

from __future__ import annotations

import re
from math import inf
from numbers import Integral, Real

import torch
from torch import nn

from gpuxbar.nn.analog_layer import AnalogLayer
from gpuxbar.nn.models import converted_layers, require_apart, require_whole
from gpuxbar.nn.programmed import APART

__all__ = ["age", "program", "unprogram"]

UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0, "y": 365.25 * 86400.0}  # s

CHIPS = APART  # those beyond would be counted as others are, and have their read noise


@torch.inference_mode(False)  # whose tensors nothing could train elsewhere
def program(model: nn.Module, chip: int = 0) -> None:
    """Write a model's weights to its arrays once; from now on its crossbar layers read these devices, at age 0.

    Write noise, spread and stuck cells are those of `spec.programming`. Write noise is drawn anew at every call; spread and stuck
    cells are those of a chip. Layers trained in situ are not written: their devices age as they stand. Weights of crossbar layers
    must not change while they are programmed; everything else may, digital layers and converter ranges for instance, and gradients
    flow as before. A weight that changed is refused at the next read, unless it is on a GPU and PyTorch does not count the change:
    one by an optimiser with fused=True, or in place through `weight.data`.
    The state dict keeps what was written and its age, so that an evaluation resumes bit for bit. `torch.distributed.checkpoint`
    loads only what the model has already: program it, with whatever weights, before it loads a programmed one.

    A network is judged on several chips by

        found = []
        for chip in range(10):
            gx.program(model, chip)
            found.append(accuracy(model))
        gx.unprogram(model)
        print(statistics.mean(found), statistics.stdev(found))

    Processes that begin with copies of one model, as forked workers do, may judge a chip each: devices, write noise and the read
    noise of eval mode are a chip's own (read noise for 65536 reads). On the same chip, and in training mode, such copies draw the
    same.

    Args:
        model: A converted model, or parts of one: others train on beside those that are programmed.
        chip: Which devices are written to: 0 are those of the model, as it was trained with if it is hardware-aware; each number
            up to 65535 has others. Converters, with their errors and ranges, and wires stay.

    Raises:
        TypeError: `model` is no module, or `chip` no whole number.
        ValueError: The model has no crossbar layers or is sharded, a weight is not finite, `chip` is out of range, or not 0 for
            layers trained in situ.

    Source:
        Joshi et al., Nature Communications 2020.
    """
    layers = _layers("program", model)
    require_whole("program", model)
    if not isinstance(chip, Integral):
        raise TypeError(f"program: `chip` must be a whole number, got {type(chip).__name__}; give one")
    if not 0 <= chip < CHIPS:
        raise ValueError(
            f"program: `chip` must be at least 0 and below {CHIPS}, got {chip}; more of them have a spec of another seed"
        )
    trained = [layer.name for layer in layers if layer.in_situ]
    if chip and trained:
        raise ValueError(
            f"program: `chip` must be 0 for layers trained in situ, whose devices hold what they learned, got {chip} for "
            f"{', '.join(trained)}; gpuxbar.convert(model, spec.with_overrides({{'seed': {chip}}})) moves what they read to others"
        )
    for layer in layers:
        layer.require_writable()  # before any is written
    for layer in layers:
        layer.write_once(int(chip))


@torch.inference_mode(False)  # whose tensors nothing could train elsewhere
def age(model: nn.Module, time: float | str, compensate: bool = False) -> None:
    """Let a programmed model grow older: reads find its devices `time` after they were programmed.

    Conductances follow `spec.drift`. Times are absolute, and any order of them gives the same devices: an age is a
    function of what was written, the seed and the time.

    Args:
        model: A model after `program`.
        time: Time since programming: seconds, at least 0, or text such as "30s", "5min", "1h", "2d", "1w", "1y".
        compensate: Multiply each layer's products by one factor, what a test read gave at age 0 over what it gives
            now: sum |y_0| / sum |y_t| over 32 fixed inputs. Both reads go through converters, noise and wires and
            count as reads. False leaves products uncompensated.

    Raises:
        TypeError: `model` is no module, or `time` is neither a number nor text.
        ValueError: The model has no crossbar layers or is not programmed, `time` is no time or beyond the last age of a table of
            drift, an ADC range that a test read needs is not calibrated, or a layer's test read finds nothing at that age.

    Source:
        Joshi et al., Nature Communications 2020; the factor: Le Gallo et al., Advanced Electronic Materials 2018.
    """
    seconds = _seconds(time)
    layers = _layers("age", model)
    idle = [layer.name for layer in layers if not layer.programmed]
    if idle:
        raise ValueError(
            f"age: `model` must be programmed, got layers that are not: {', '.join(idle)}; call gpuxbar.program(model) first"
        )
    last = min(layer.spec.drift.last for layer in layers)
    if seconds > last:
        raise ValueError(
            f"age: `time` must be at most {last:g} s, the last of the ages in `drift`, got {seconds:g} s; measure longer"
        )
    if compensate:
        for layer in layers:
            layer.require_calibrated()
    before = [layer.time() for layer in layers]
    try:
        for layer in layers:
            if compensate:
                layer.look_compensated(seconds)
            else:
                layer.look_after(seconds)
    except BaseException:
        for layer, time_of_layer in zip(layers, before, strict=True):
            layer.go_back(time_of_layer)
        raise


def unprogram(model: nn.Module) -> None:
    """Take a model out of the programmed state: layers read their own weights again, which it never changed.

    Raises:
        TypeError: `model` is no module.
        ValueError: It has no crossbar layers.
    """
    for layer in _layers("unprogram", model):
        if layer.programmed:
            layer.release()


def _layers(op: str, model: nn.Module) -> list[AnalogLayer]:
    layers = converted_layers(op, model)
    require_apart(op, layers)
    return layers


def _seconds(time: float | str) -> float:
    if isinstance(time, str):
        found = re.fullmatch(
            rf"\s*(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+)\s*({'|'.join(UNITS)})\s*", time, re.IGNORECASE
        )
        if found is None:
            raise ValueError(
                f'age: `time` must be a number with a unit of {", ".join(UNITS)}, got {time!r}; write "1h" or 3600'
            )
        return float(found[1]) * UNITS[found[2].lower()]
    if isinstance(time, bool) or not isinstance(time, Real):
        raise TypeError(
            f'age: `time` must be a number of seconds or text, got {type(time).__name__}; write 3600 or "1h"'
        )
    if not 0 <= time < inf:
        raise ValueError(
            f"age: `time` must be finite and at least 0, got {time:g} s; it counts from programming"
        )
    return float(time)
