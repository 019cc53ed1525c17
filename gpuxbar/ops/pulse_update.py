"""The weight update of an array by pulse trains on its lines, and the weights read out."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from gpuxbar import reference
from gpuxbar.launch import (
    Device,
    In,
    InOut,
    Kernel,
    Out,
    Scalar,
    Struct,
    backend,
    cuda_device,
    host_call,
    library,
)
from gpuxbar.ops.checks import (
    check_array,
    check_kind,
    check_lines,
    check_numbers,
    check_shape,
    check_written,
    counter,
    integer,
    require_finite,
)
from gpuxbar.ops.images import Conv
from gpuxbar.ops.laws import Parameters
from gpuxbar.ops.pairs import Pairs, Slices, Wear
from gpuxbar.ops.round_keys import RoundKeys
from gpuxbar.reference.tile_mvm import ConvGeometry
from gpuxbar.spec import PulseTrain, UpdateLaw, check_train

__all__ = ["KERNELS", "Update", "check_pulses", "check_sign", "pulse_on_host", "pulse_update", "pulses_of"]

OP = "pulse_update"
SAMPLES = 2**23  # draws tell that many apart


def pulse_update(
    pairs: Pairs,
    x: Any,
    d: Any,
    *,
    rate: float,
    train: PulseTrain,
    w_max: Any,
    groups: int = 1,
    conv: ConvGeometry | None = None,
    sign: Any = None,
    out: Any = None,
    step: Any = 0,
    device: Device | None = None,
) -> Any:
    """Pulse the lines of an array for a batch of inputs and errors, in place, and read the weights out.

    Devices move by one pulse of their law for every coincidence of a wordline's and a bitline's train, sample by sample
    or once for the batch (see `spec.PulseTrain`); weights so change by -rate d^T x in the mean, as long as devices make
    nominal steps and no train is clipped. One pulse of a pair is 2 w_max / pulses of weight, of one side w_max / pulses.
    Of a sliced weight the lowest slice is pulsed; its window spans w_max (2**(slice_bits + headroom_bits) - 1) /
    (2**(slices slice_bits) - 1), and its pulses are that much smaller. `ops.carry` moves up what it gathers.
    Stuck cells never move; results are kept inside the device's window; devices that fail do so after the batch. The outer
    product of the batch is never formed.

    Args:
        pairs: The devices, of a law with pulses, slices with a carry of scheme "periodic"; changed in place.
        x: Inputs, float32 [B, G * I]; finite. With `conv` the images [N, G * channels, height, width] whose patches are the
            samples, image by image.
        d: Errors, the gradient of the loss by the outputs, float32 [B, G * O]; finite. With `conv` images of the outputs,
            [N, G * O, height, width].
        rate: Learning rate, above 0.
        train: The pulse trains.
        w_max: Weight of a full pair (of slices: whose digits are all 2**slice_bits - 1), float32 [G * O], above 0.
        groups: Arrays side by side, G.
        conv: Shape of the convolution whose patches drive the wordlines; no patch matrix is made.
        sign: What the driver of each wordline multiplies its inputs by, 1 or -1, float32 [G * I], as choppers do; None: 1.
        out: Where the weights go, float32 [G, O, I]; None: a new array.
        step: With the seed of the pairs, of the trains and the noise of pulses: an integer or an int64 array of one element.
        device: Where CuPy arrays are allocated and run; None: CuPy's current device and memory pool.

    Returns:
        Weights after the update, float32 [G, O, I], as `device_update` reads them; `out` where given.

    Raises:
        TypeError: An array has another dtype, `pairs` are no `ops.Pairs`, or `train` is no `spec.PulseTrain`.
        ValueError: Shapes disagree, an array is not contiguous or must not be written to, the law and the trains do not go
            together, or a value is not finite (checked on the CPU; on a GPU no value is read back); pairs and `out` are unchanged.

    Source:
        Gokmen and Vlasov, Frontiers in Neuroscience 2016.
    """
    size = check_pulses(pairs, x, d, train, w_max, groups, conv)
    pulses = pulses_of(pairs.law, pairs.settings["slices"], rate)
    shape = groups, size["outputs"], size["inputs"]
    if sign is not None:
        check_sign(sign, groups * size["inputs"])
    if out is not None:
        check_array(OP, "out", out, "float32", 3)
        check_shape(OP, "out", out, shape, "check the axes", "these lines")
        check_written(OP, out=out)
    where = "cuda" if device is not None else backend(pairs.g)
    if where == "cuda":
        device = device or cuda_device()
        weights = device.empty(shape, "float32") if out is None else out
        _cuda(device, pairs, x, d, pulses / w_max, train, weights, w_max, conv, sign, step, size)
        return weights
    step = integer(OP, "step", step)
    weights = np.empty(shape, np.float32) if out is None else out
    if where == "reference" and pairs.g.size:
        for name, array in (("x", x), ("d", d)):
            require_finite(OP, name, int((~np.isfinite(array)).sum()), "bad data")
        shown, held, _ = reference.pulse_update(
            pairs.g, x, d, rate=rate, train=train.model_dump(), w_max=w_max, groups=groups, conv=conv, sign=sign, step=step,
            g_held=pairs.g_held, **pairs.plain,
        )  # fmt: skip
        pairs.g[...] = shown
        if pairs.g_held is not None:
            pairs.g_held[...] = held
        weights[...] = pairs.read_out(w_max, groups)
    elif weights.size:
        update = Update.of(pairs, train, conv, size)
        update.step, update.pulses = step, pulses
        devices = pairs.g, pairs.g_held, pairs.pulse_count, pairs.device_map
        pulse_on_host(update, devices, x, d, sign, weights, w_max)
    return weights


def check_pulses(
    pairs: Pairs, x: Any, d: Any, train: PulseTrain, w_max: Any, groups: int, conv: ConvGeometry | None
) -> dict[str, int]:
    """Refuse pairs, trains and arrays that do not go together; returns the sizes."""
    check_kind(OP, "pairs", pairs, Pairs)
    check_kind(OP, "train", train, PulseTrain)
    check_train(OP, train, pairs.law, pairs.carry)
    batch, inputs, outputs = check_lines(OP, pairs.g, x, d, w_max, groups, conv)
    if batch > SAMPLES:
        raise ValueError(
            f"{OP}: `x` must hold at most {SAMPLES} samples, got {batch}; split the batch into several steps"
        )
    return {"batch": batch, "groups": groups, "inputs": inputs, "outputs": outputs}


def pulses_of(law: UpdateLaw, slices: Slices, rate: float) -> float:
    """Pulses wanted for an input, an error and a full weight of 1."""
    check_numbers(OP, "rate", rate, "", "give the learning rate")
    assert law.nominal_pulses is not None
    sides = 2 if law.sides == "both" else 1
    # a NumPy scalar would make float64 of what it divides
    return float(rate) * law.nominal_pulses / (sides * slices.lowest_share)


def pulse_on_host(
    update: Update, devices: tuple[Any, Any, Any, Any], x: Any, d: Any, sign: Any, weights: Any, w_max: Any
) -> None:  # fmt: skip
    """`pulse_update` of arrays or addresses; `devices` are g, g_held, pulse_count and device_map."""
    bad = (ctypes.c_int64 * 3)()
    host_call(library(), "gpuxbar_pulse_update", *devices, x, d, sign, weights, w_max, update, bad)
    require_finite(OP, "x", bad[0], "bad data")
    require_finite(OP, "d", bad[1], "bad data")
    if bad[2]:
        raise ValueError(
            f"{OP}: `w_max` must be finite and above 0, got {bad[2]} other values; use the largest weight"
        )


def check_sign(sign: Any, lines: int) -> None:
    """Refuse signs that are not those of so many wordlines."""
    check_array(OP, "sign", sign, "float32", 1)
    check_shape(OP, "sign", sign, (lines,), "give one for each wordline", "this `g`")
    if isinstance(sign, np.ndarray) and not (np.abs(sign) == 1).all():
        raise ValueError(
            f"{OP}: `sign` must be 1 or -1, got {sign[np.abs(sign) != 1][0]:g}; multiply the inputs by other factors"
        )


class Train(ctypes.Structure):
    """Twin of `struct Train` in kernels/include/gpuxbar/pulses.cuh."""

    _fields_ = [
        (name, ctypes.c_int32) for name in ("length", "implicit", "update_management", "bound_management")
    ]

    @classmethod
    def of(cls, train: PulseTrain) -> Train:
        implicit = train.scheme == "deterministic_implicit"
        return cls(train.length, implicit, train.update_management, train.bound_management)


class Update(ctypes.Structure):
    """Twin of `struct Update` in kernels/host/pulse_update.hpp."""

    _fields_ = [
        ("law", Parameters), ("train", Train), ("endurance", Wear), ("slices", Slices), ("conv", Conv),
        *((name, ctypes.c_int64) for name in ("batch", "groups", "inputs", "outputs", "step", "aggregated", "weights_held")),
        ("seed", ctypes.c_uint64),
        *((name, ctypes.c_float) for name in ("g_min", "range", "stuck_low", "stuck_high", "pulses")),
    ]  # fmt: skip

    @classmethod
    def of(cls, pairs: Pairs, train: PulseTrain, conv: ConvGeometry | None, size: dict[str, int]) -> Update:
        """With all but the step and `pulses_of` the rate."""
        aggregated = train.mode == "aggregated"
        return cls(train=Train.of(train), conv=Conv.of(conv), aggregated=aggregated, **size, **pairs.settings)


def _cuda(
    device: Device, pairs: Pairs, x: Any, d: Any, scale: Any, train: PulseTrain, weights: Any, w_max: Any, conv: ConvGeometry | None,
    sign: Any, step: Any, size: dict[str, int],
) -> None:  # fmt: skip
    batch, groups, inputs, outputs = size.values()
    if not weights.size:
        return
    common = {
        "input_words": device.empty((batch, groups * inputs), "uint32"),
        "error_words": device.empty((batch, groups * outputs), "uint32"),
        "length": device.empty((batch, groups), "float32"), **counter("step", step), **size,
    }  # fmt: skip
    if batch:
        unit = scale.reshape(groups, outputs).min(1)
        device.launch(
            PULSE_TRAINS, (-(-batch // 8), groups), (256,),
            {"x": x.reshape(-1), "d": d.reshape(-1), "scale": scale, "unit": unit, "sign": sign,
             "train": Train.of(train), "conv": Conv.of(conv), "seed": pairs.seed, **common}, {"CONV": int(conv is not None)},
        )  # fmt: skip
    implicit, aggregated = train.scheme == "deterministic_implicit", train.mode == "aggregated"
    device.launch(
        PULSE_UPDATE, (-(-outputs // 32), -(-inputs // 32), groups), (256,),
        {"g": pairs.g, "g_held": pairs.g_held, "pulse_count": pairs.pulse_count, "device_map": pairs.device_map, "w": weights, "w_max": w_max,
         **pairs.on_device, **common},
        {"AGGREGATED": int(aggregated), "IMPLIED": int(implicit), **pairs.macros},
    )  # fmt: skip


PULSE_TRAINS = Kernel(
    "pulse_trains.cu",
    x=In("float32", "source"), d=In("float32", "errors"), scale=In("float32", "D"), unit=In("float32", "G"),
    sign=In("float32", "X", optional=True), step=In("int64", "one", optional=True), input_words=Out("uint32", "B X"),
    error_words=Out("uint32", "B D"), length=Out("float32", "B G"), train=Struct("Train", Train), conv=Struct("Conv", Conv),
    step_value=Scalar("int64"), seed=Scalar("uint64"), batch=Scalar("int32"), groups=Scalar("int32"), inputs=Scalar("int32"),
    outputs=Scalar("int32"),
)  # fmt: skip
PULSE_UPDATE = Kernel(
    "pulse_update.cu",
    g=InOut("float32", "S X O"), g_held=InOut("float32", "S X O", optional=True), pulse_count=InOut("int32", "S X O", optional=True), device_map=In("float16", "K S X O", optional=True), input_words=In("uint32", "B X"), error_words=In("uint32", "B D"), length=In("float32", "B G"),
    w=Out("float32", "G O I"), w_max=In("float32", "D"), step=In("int64", "one", optional=True),
    law=Struct("UpdateLaw", Parameters), endurance=Struct("Endurance", Wear), slices=Struct("Slices", Slices), step_value=Scalar("int64"), keys=Struct("RoundKeys", RoundKeys), g_min=Scalar("float32"),
    range=Scalar("float32"), stuck_low=Scalar("float32"), stuck_high=Scalar("float32"), batch=Scalar("int32"),
    groups=Scalar("int32"), inputs=Scalar("int32"), outputs=Scalar("int32"),
)  # fmt: skip
KERNELS = (PULSE_TRAINS, PULSE_UPDATE)
