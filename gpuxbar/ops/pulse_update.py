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
    check_integers,
    check_lines,
    check_numbers,
    check_stuck,
    check_window,
    check_written,
    integer,
    require_finite,
)
from gpuxbar.ops.device_map import by_name, check_map
from gpuxbar.ops.endurance import Wear, check_endurance
from gpuxbar.ops.images import Conv
from gpuxbar.ops.laws import Parameters, parameters
from gpuxbar.ops.slices import Slices, check_slices
from gpuxbar.reference.tile_mvm import ConvGeometry
from gpuxbar.spec import Carry, Endurance, PulseTrain, UpdateLaw, check_train

__all__ = ["KERNELS", "pulse_update"]

OP = "pulse_update"
SAMPLES = 2**23  # draws tell that many apart
TOGETHER = 32  # samples of a block: SAMPLES in kernels/host/pulse_update.cpp


def pulse_update(
    g: Any,
    x: Any,
    d: Any,
    *,
    rate: float,
    train: PulseTrain,
    law: UpdateLaw,
    w_max: Any,
    g_min: float,
    g_max: float,
    groups: int = 1,
    conv: ConvGeometry | None = None,
    slices: int = 1,
    slice_bits: int | None = None,
    carry: Carry | None = None,
    endurance: Endurance | None = None,
    pulse_count: Any = None,
    device_map: Any = None,
    stuck_at_g_min: float = 0.0,
    stuck_at_g_max: float = 0.0,
    seed: int = 0,
    step: Any = 0,
    device: Device | None = None,
) -> Any:
    """Pulse the lines of an array for a batch of inputs and errors, in place, and read the weights out.

    Devices move by one pulse of their law for every coincidence of a wordline's and a bitline's train, sample by sample
    or once for the batch (see `spec.PulseTrain`); weights so change by -rate d^T x in the mean, as long as devices make
    nominal steps and no train is clipped. One pulse of a pair is 2 w_max / pulses of weight, of one side w_max / pulses.
    Of a sliced weight the lowest slice is pulsed; its window spans w_max (2**(slice_bits + headroom_bits) - 1) /
    (2**(slices slice_bits) - 1), and its pulses are that much smaller. `ops.carry` moves up what it gathers.
    Stuck cells never move; results are kept inside the device's window. The outer product of the batch is never formed.

    Args:
        g: Conductances of the positive devices, least significant slice first, then of the negative ones, float32
            [2 slices, G * I, O], S; updated in place.
        x: Inputs, float32 [B, G * I]; finite. With `conv` the images [N, G * channels, height, width] whose patches are the
            samples, image by image.
        d: Errors, the gradient of the loss by the outputs, float32 [B, G * O]; finite. With `conv` images of the outputs,
            [N, G * O, height, width].
        rate: Learning rate, above 0.
        train: The pulse trains.
        law: An update law of the spec with pulses and without write noise.
        w_max: Weight of a full pair (of slices: whose digits are all 2**slice_bits - 1), float32 [G * O], above 0.
        g_min, g_max: Conductance window, S.
        groups: Arrays side by side, G.
        conv: Shape of the convolution whose patches drive the wordlines; no patch matrix is made.
        slices, slice_bits, carry: Pairs of a weight, bits of each, and a carry of scheme "periodic"; 1, None and None for one
            pair.
        endurance: How many pulses devices bear; None: any number. Devices that fail do so after the batch, and never move
            again.
        pulse_count: Pulses that devices have taken, int32 like `g` and updated in place, zeros at first; given with an
            endurance and only with it. A device that failed has minus its count.
        device_map: Normals of the devices, float16 [K, 2 slices, G * I, O], in place of those that the seed draws; see
            `ops.device_map`. None: drawn.
        stuck_at_g_min, stuck_at_g_max: Rates of stuck cells, the same cells as `program` draws for this seed.
        seed, step: Device spread depends on the seed, trains and the noise of pulses on both; `step` is an integer or an
            int64 array of one element.
        device: Where CuPy arrays are allocated and run; None: CuPy's current device and memory pool.

    Returns:
        Weights after the update, float32 [G, O, I], as `device_update` reads them.

    Raises:
        TypeError: An array has another dtype.
        ValueError: Shapes disagree, an array is not contiguous, the law and the trains do not go together, or a value is
            not finite (checked on the CPU; on a GPU no value is read back); `g` is unchanged.

    Source:
        Gokmen and Vlasov, Frontiers in Neuroscience 2016.
    """
    check_train(OP, train, law, carry)
    assert law.nominal_pulses is not None
    check_array(OP, "g", g, "float32", 3)
    check_numbers(OP, "rate", rate, "", "give the learning rate")
    check_slices(OP, slices, slice_bits, carry)
    batch, inputs, outputs = check_lines(OP, g, x, d, w_max, groups, conv, slices)
    if batch > SAMPLES:
        raise ValueError(
            f"{OP}: `x` must hold at most {SAMPLES} samples, got {batch}; split the batch into several steps"
        )
    check_endurance(OP, endurance, pulse_count, law, g.shape)
    check_window(OP, g_min, g_max)
    check_stuck(OP, stuck_at_g_min, stuck_at_g_max)
    check_integers(OP, seed=seed)
    check_written(OP, g=g, pulse_count=pulse_count)
    check_map(OP, device_map, law, g.shape)
    lie = Slices.of(slices, slice_bits, carry)
    sides = 2 if law.sides == "both" else 1
    # pulses for an input and an error of 1; a NumPy scalar would make float64 of it
    scale = float(rate) * law.nominal_pulses / (sides * lie.lowest_share) / w_max
    update: dict[str, Any] = {
        "law": parameters(law, g_min, g_max), "endurance": Wear.of(endurance), "slices": lie, "seed": seed,
        "g_min": g_min, "range": g_max - g_min, "stuck_low": stuck_at_g_min, "stuck_high": stuck_at_g_max, "groups": groups,
        "inputs": inputs, "outputs": outputs,
    }  # fmt: skip
    where = "cuda" if device is not None else backend(g)
    if where == "cuda":
        return _cuda(
            device or cuda_device(),
            g,
            pulse_count,
            device_map,
            x,
            d,
            batch,
            conv,
            scale,
            w_max,
            train,
            law,
            step,
            update,
        )
    step = integer(OP, "step", step)
    shape = (groups, outputs, inputs)
    if where == "reference" and g.size:
        for name, array in (("x", x), ("d", d)):
            require_finite(OP, name, int((~np.isfinite(array)).sum()), "bad data")
        sliced: dict[str, Any] = {
            "slices": slices,
            "slice_bits": slice_bits,
            "carry": None if carry is None else carry.model_dump(),
        }
        span: dict[str, Any] = {"g_min": g_min, "g_max": g_max}
        cells, _ = reference.pulse_update(
            g, x, d, rate=rate, train=train.model_dump(), law=law.model_dump(), w_max=w_max, groups=groups, conv=conv,
            endurance=None if endurance is None else endurance.model_dump(), pulse_count=pulse_count,
            device_map=by_name(device_map, law), stuck_at_g_min=stuck_at_g_min, stuck_at_g_max=stuck_at_g_max, seed=seed, step=step,
            **sliced, **span,
        )  # fmt: skip
        g[...] = cells
        # of the cells as they are kept, in float32
        return reference.read_out(g, w_max=w_max, groups=groups, **sliced, **span).astype(np.float32)
    weights, bad = np.empty(shape, np.float32), np.zeros(2, np.int64)
    if weights.size:
        blocks = -(-batch // TOGETHER)
        words = (
            np.empty(groups * _padded(n, train) * blocks * TOGETHER, np.uint32) for n in (inputs, outputs)
        )
        length, slots = np.empty(groups * blocks * TOGETHER, np.float32), np.empty(groups * blocks, np.int32)
        settings = Update(train=Train.of(train), conv=Conv.of(conv), batch=batch, step=step, **update)
        host_call(
            library(), "gpuxbar_pulse_update", g, pulse_count, device_map, x, x.size, d, d.size, scale,
            scale.reshape(groups, outputs).min(1), weights, w_max, *words, length, slots, np.frombuffer(bytes(settings), np.uint8), train.mode == "aggregated", bad,
        )  # fmt: skip
    for name, count in zip("xd", bad.tolist(), strict=True):
        require_finite(OP, name, count, "bad data")
    return weights


def _padded(lines: int, train: PulseTrain) -> int:
    """Lines of a group as the host kernel stores them: more where it holds planes of slots."""
    together = 32 if train.mode == "aggregated" and train.scheme == "stochastic" else 8
    return -(-lines // together) * together


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
    """Twin of `struct Update` in kernels/host/pulse_update.cpp."""

    _fields_ = [
        ("law", Parameters), ("train", Train), ("endurance", Wear), ("slices", Slices), ("conv", Conv),
        *((name, ctypes.c_int64) for name in ("batch", "groups", "inputs", "outputs", "step")), ("seed", ctypes.c_uint64),
        *((name, ctypes.c_float) for name in ("g_min", "range", "stuck_low", "stuck_high")),
    ]  # fmt: skip


def _cuda(
    device: Device, g: Any, pulse_count: Any, device_map: Any, x: Any, d: Any, batch: int, conv: ConvGeometry | None, scale: Any,
    w_max: Any, train: PulseTrain, law: UpdateLaw, step: Any, update: dict[str, Any],
) -> Any:  # fmt: skip
    groups, inputs, outputs = update["groups"], update["inputs"], update["outputs"]
    weights = device.empty((groups, outputs, inputs), "float32")
    trains = {
        "input_words": device.empty((batch, groups * inputs), "uint32"),
        "error_words": device.empty((batch, groups * outputs), "uint32"),
        "length": device.empty((batch, groups), "float32"),
    }  # fmt: skip
    by_value = isinstance(step, int)
    when = {"step": None if by_value else step.reshape(-1), "step_value": step if by_value else 0}
    shape = {name: update[name] for name in ("seed", "groups", "inputs", "outputs")}
    if not weights.size:
        return weights
    if batch:
        unit = scale.reshape(groups, outputs).min(1)
        device.launch(
            PULSE_TRAINS, (-(-batch // 8), groups), (256,),
            {"x": x.reshape(-1), "d": d.reshape(-1), "scale": scale, "unit": unit, "train": Train.of(train), "conv": Conv.of(conv),
             "batch": batch, **trains, **when, **shape}, {"CONV": int(conv is not None)},
        )  # fmt: skip
    implicit, aggregated = train.scheme == "deterministic_implicit", train.mode == "aggregated"
    device.launch(
        PULSE_UPDATE, (-(-outputs // 32), -(-inputs // 32), groups), (256,),
        {"g": g, "pulse_count": pulse_count, "device_map": device_map, "w": weights, "w_max": w_max, "batch": batch, **trains, **when, **update},
        {"LAW": update["law"].law, "AGGREGATED": int(aggregated), "IMPLIED": int(implicit),
         "COUNTED": int(pulse_count is not None), "SLICED": int(update["slices"].count > 1)},
    )  # fmt: skip
    return weights


PULSE_TRAINS = Kernel(
    "pulse_trains.cu",
    x=In("float32", "source"), d=In("float32", "errors"), scale=In("float32", "D"), unit=In("float32", "G"),
    step=In("int64", "one", optional=True), input_words=Out("uint32", "B X"), error_words=Out("uint32", "B D"),
    length=Out("float32", "B G"), train=Struct("Train", Train), conv=Struct("Conv", Conv), step_value=Scalar("int64"),
    seed=Scalar("uint64"), batch=Scalar("int32"), groups=Scalar("int32"), inputs=Scalar("int32"), outputs=Scalar("int32"),
)  # fmt: skip
PULSE_UPDATE = Kernel(
    "pulse_update.cu",
    g=InOut("float32", "S X O"), pulse_count=InOut("int32", "S X O", optional=True), device_map=In("float16", "K S X O", optional=True), input_words=In("uint32", "B X"), error_words=In("uint32", "B D"), length=In("float32", "B G"),
    w=Out("float32", "G O I"), w_max=In("float32", "D"), step=In("int64", "one", optional=True),
    law=Struct("UpdateLaw", Parameters), endurance=Struct("Endurance", Wear), slices=Struct("Slices", Slices), step_value=Scalar("int64"), seed=Scalar("uint64"), g_min=Scalar("float32"),
    range=Scalar("float32"), stuck_low=Scalar("float32"), stuck_high=Scalar("float32"), batch=Scalar("int32"),
    groups=Scalar("int32"), inputs=Scalar("int32"), outputs=Scalar("int32"),
)  # fmt: skip
KERNELS = (PULSE_TRAINS, PULSE_UPDATE)
