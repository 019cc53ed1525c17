"""The weight update of an array: wanted changes through the device's own law, and the weights read out."""

from __future__ import annotations

import ctypes
import math
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
    check_numbers,
    check_shape,
    check_written,
    counter,
    integer,
    require_finite,
)
from gpuxbar.ops.laws import Parameters
from gpuxbar.ops.pairs import Pairs, Slices, Wear
from gpuxbar.ops.round_keys import RoundKeys

__all__ = ["KERNEL", "device_update", "update_on_host"]

OP = "device_update"


def device_update(
    pairs: Pairs,
    dw: Any,
    *,
    w_max: Any,
    digits: Any = None,
    factor: float = 1.0,
    out: Any = None,
    step: Any = 0,
    device: Device | None = None,
) -> Any:
    """Apply wanted weight changes to pairs of devices, in place, and read the weights out.

    Half of a change goes to each side of a pair, as +-factor dw / (2 w_max) of the window, or all of it to one side (see
    `spec.Law.sides`), at most the whole window; there it goes through the device's law (see `spec.laws`). A change of 0
    moves nothing and draws no noise; stuck cells never move; results are kept inside the device's window.

    A sliced weight is a number of base 2**slice_bits; with a carry of scheme "accumulate", every slice takes its own digit of
    the change in that way, the lowest one also what is below a unit; with "periodic", the lowest slice takes all of it. A
    digit's unit and its share of the window are told in `spec.Carry`; digits are put in order by `ops.carry`.

    Args:
        pairs: The devices; changed in place.
        dw: Wanted weight changes over `factor`, float32 [G, O, I]; finite. None with `digits`.
        w_max: Weight of a full pair (of slices: whose digits are all 2**slice_bits - 1), float32 [G * O], above 0.
        digits: Wanted changes of the digits of sliced weights, in place of those of `dw`: float32 [slices, G, I, O], units of
            each digit; finite. None: those of `dw`.
        factor: What `dw` is multiplied by, such as minus a learning rate; finite.
        out: Where the weights go, float32 [G, O, I]; None: a new array.
        step: With the seed of the pairs, of the noise of an update: an integer or an int64 array of one element.
        device: Where CuPy arrays are allocated and run; None: CuPy's current device and memory pool.

    Returns:
        Weights after the update, float32 [G, O, I], `out` where given: w_max (g_pos - g_neg) / (g_max - g_min) of one pair;
        of slices, w_max / (2**(slices slice_bits) - 1) times the sum of their digits times 2**(k slice_bits).

    Raises:
        TypeError: An array has another dtype, or `pairs` are no `ops.Pairs`.
        ValueError: Shapes disagree, an array is not contiguous or must not be written to, a setting is out of range, or a change
            holds NaN or infinity (checked on the CPU; on a GPU no value is read back, and such a change moves its cells to a
            bound); pairs and `out` are unchanged.

    Source:
        Each law's own; see `spec.laws`.
    """
    check_kind(OP, "pairs", pairs, Pairs)
    check_array(OP, "w_max", w_max, "float32", 1)
    if out is not None:
        check_array(OP, "out", out, "float32", 3)
    if not math.isfinite(factor):
        raise ValueError(f"{OP}: `factor` must be finite, got {factor:g}; lower the rate")
    name, change, (groups, outputs, inputs) = _change(pairs, dw, digits)
    shape = (groups, outputs, inputs)
    for other, array, wanted in (
        ("g", pairs.g, (len(pairs.g), groups * inputs, outputs)),
        ("w_max", w_max, (groups * outputs,)),
        ("out", out, shape),
    ):
        if array is not None:
            check_shape(OP, other, array, wanted, "check the axes", f"{name} {tuple(change.shape)}")
    check_numbers(OP, "w_max", w_max, "", "use the largest weight")
    check_written(OP, out=out)
    size = {"groups": groups, "inputs": inputs, "outputs": outputs}
    where = "cuda" if device is not None else backend(pairs.g)
    if where == "cuda":
        device = device or cuda_device()
        weights = device.empty(shape, "float32") if out is None else out
        device.launch(
            KERNEL, (-(-outputs // 32), -(-inputs // 32), groups), (256,),
            {"g": pairs.g, "g_held": pairs.g_held, "pulse_count": pairs.pulse_count, "device_map": pairs.device_map,
             "dw": dw, "digits": digits, "w": weights, "w_max": w_max, "factor": factor, **counter("step", step),
             **pairs.on_device, **size},
            {**pairs.macros, "DIGITS": int(digits is not None)},
        )  # fmt: skip
        return weights
    step = integer(OP, "step", step)
    weights = np.empty(shape, np.float32) if out is None else out
    if where == "reference":
        require_finite(OP, name, int((~np.isfinite(change)).sum()), "lower the rate")
        shown, held, _ = reference.device_update(
            pairs.g, dw, digits=digits, factor=factor, w_max=w_max, g_held=pairs.g_held, step=step, **pairs.plain
        )  # fmt: skip
        pairs.g[...] = shown
        if pairs.g_held is not None:
            pairs.g_held[...] = held
        weights[...] = pairs.read_out(w_max, groups)
        return weights
    if weights.size:
        update = Update(**pairs.settings, **size, step=step, factor=factor)
        devices = pairs.g, pairs.g_held, pairs.pulse_count, pairs.device_map
        update_on_host(update, devices, dw, digits, weights, w_max, name)
    return weights


def update_on_host(
    update: Update, devices: tuple[Any, Any, Any, Any], dw: Any, digits: Any, weights: Any, w_max: Any, name: str = "dw"
) -> None:  # fmt: skip
    """`device_update` of arrays or addresses; `devices` are g, g_held, pulse_count and device_map."""
    bad = ctypes.c_int64()
    host_call(library(), "gpuxbar_device_update", *devices, dw, digits, weights, w_max, update, bad)
    require_finite(OP, name, bad.value, "lower the rate")


def _change(pairs: Pairs, dw: Any, digits: Any) -> tuple[str, Any, tuple[int, int, int]]:
    """Name and array of what is wanted, and the shape of the weights, [G, O, I]."""
    if digits is None:
        check_array(OP, "dw", dw, "float32", 3)
        return "dw", dw, dw.shape
    check_array(OP, "digits", digits, "float32", 4)
    slices = pairs.slices
    if dw is not None or slices == 1 or len(digits) != slices:
        raise ValueError(
            f"{OP}: `digits` must be those of slices, in place of dw, got {len(digits)} for {slices} "
            f"slice{'s' if slices > 1 else ''} {'with' if dw is not None else 'without'} dw; pass one of dw and digits"
        )
    _, groups, inputs, outputs = digits.shape
    return "digits", digits, (groups, outputs, inputs)


class Update(ctypes.Structure):
    """Twin of `struct Update` in kernels/host/device_update.cpp."""

    _fields_ = [
        ("law", Parameters), ("endurance", Wear), ("slices", Slices),
        *((name, ctypes.c_int64) for name in ("groups", "inputs", "outputs", "step")), ("seed", ctypes.c_uint64),
        *((name, ctypes.c_float) for name in ("g_min", "range", "stuck_low", "stuck_high", "factor")),
    ]  # fmt: skip


KERNEL = Kernel(
    "device_update.cu",
    g=InOut("float32", "S R O"), g_held=InOut("float32", "S R O", optional=True),
    pulse_count=InOut("int32", "S R O", optional=True), device_map=In("float16", "K S R O", optional=True), dw=In("float32", "G O I", optional=True),
    digits=In("float32", "D G I O", optional=True), w=Out("float32", "G O I"), w_max=In("float32", "C"),
    step=In("int64", "one", optional=True), law=Struct("UpdateLaw", Parameters), endurance=Struct("Endurance", Wear), slices=Struct("Slices", Slices), factor=Scalar("float32"), step_value=Scalar("int64"),
    keys=Struct("RoundKeys", RoundKeys), g_min=Scalar("float32"), range=Scalar("float32"), stuck_low=Scalar("float32"),
    stuck_high=Scalar("float32"), groups=Scalar("int32"), inputs=Scalar("int32"), outputs=Scalar("int32"),
)  # fmt: skip
