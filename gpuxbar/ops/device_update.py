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
    check_integers,
    check_numbers,
    check_stuck,
    check_window,
    check_written,
    integer,
    require_finite,
)
from gpuxbar.ops.device_map import by_name, check_map
from gpuxbar.ops.endurance import Wear, check_endurance
from gpuxbar.ops.laws import Parameters, parameters
from gpuxbar.ops.slices import Slices, check_slices
from gpuxbar.spec import Carry, Endurance, UpdateLaw

__all__ = ["KERNEL", "device_update"]

OP = "device_update"


def device_update(
    g: Any,
    dw: Any,
    *,
    factor: float = 1.0,
    out: Any = None,
    digits: Any = None,
    law: UpdateLaw,
    w_max: Any,
    g_min: float,
    g_max: float,
    slices: int = 1,
    slice_bits: int | None = None,
    carry: Carry | None = None,
    hidden: Any = None,
    endurance: Endurance | None = None,
    pulse_count: Any = None,
    device_map: Any = None,
    stuck_at_g_min: float = 0.0,
    stuck_at_g_max: float = 0.0,
    seed: int = 0,
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
        g: Conductances of the positive devices, least significant slice first, then of the negative ones, float32
            [2 slices, G * I, O], S; updated in place.
        dw: Wanted weight changes over `factor`, float32 [G, O, I]; finite. None with `digits`.
        digits: Wanted changes of the digits of sliced weights, in place of those of `dw`: float32 [slices, G, I, O], units of
            each digit; finite. None: those of `dw`.
        factor: What `dw` is multiplied by, such as minus a learning rate; finite.
        out: Where the weights go, float32 [G, O, I]; None: a new array.
        law: An update law of the spec.
        w_max: Weight of a full pair (of slices: whose digits are all 2**slice_bits - 1), float32 [G * O], above 0.
        g_min, g_max: Conductance window, S.
        slices, slice_bits, carry: Pairs of a weight, bits of each, and how they share a change; 1, None and None for one pair.
        hidden: Conductances that devices with write noise hold, like `g` and updated in place; `g` is then what they
            show. None for a law without write noise.
        endurance: How many pulses devices bear; those that have failed never move again. None: any number.
        pulse_count: Pulses that devices have taken, int32 like `g` and updated in place, zeros at first; given with an
            endurance and only with it. A device that failed has minus its count.
        device_map: Normals of the devices, float16 [K, 2 slices, G * I, O], in place of those that the seed draws; see
            `ops.device_map`. None: drawn.
        stuck_at_g_min, stuck_at_g_max: Rates of stuck cells, the same cells as `program` draws for this seed.
        seed, step: Device spread depends on the seed, the noise of an update on both; `step` is an integer or an
            int64 array of one element.
        device: Where CuPy arrays are allocated and run; None: CuPy's current device and memory pool.

    Returns:
        Weights after the update, float32 [G, O, I], `out` where given: w_max (g_pos - g_neg) / (g_max - g_min) of one pair;
        of slices, w_max / (2**(slices slice_bits) - 1) times the sum of their digits times 2**(k slice_bits).

    Raises:
        TypeError: An array has another dtype.
        ValueError: Shapes disagree, an array is not contiguous or must not be written to, a setting is out of range, or a change
            holds NaN or infinity (checked on the CPU; on a GPU no value is read back, and such a change moves its cells to a bound); `g` and `out` are unchanged.

    Source:
        Each law's own; see `spec.laws`.
    """
    check_array(OP, "g", g, "float32", 3)
    check_array(OP, "w_max", w_max, "float32", 1)
    for name, array in (("hidden", hidden), ("out", out)):
        if array is not None:
            check_array(OP, name, array, "float32", 3)
    if not math.isfinite(factor):
        raise ValueError(f"{OP}: `factor` must be finite, got {factor:g}; lower the rate")
    check_slices(OP, slices, slice_bits, carry)
    name, change, (groups, outputs, inputs) = _change(dw, digits, slices)
    for other, array, shape in (
        ("g", g, (2 * slices, groups * inputs, outputs)),
        ("w_max", w_max, (groups * outputs,)),
        ("hidden", hidden, (2 * slices, groups * inputs, outputs)),
        ("out", out, (groups, outputs, inputs)),
    ):
        if array is not None and tuple(array.shape) != shape:
            raise ValueError(
                f"{OP}: `{other}` must have shape {shape} for {name} {tuple(change.shape)}, got {tuple(array.shape)}; check "
                "the axes"
            )
    if (hidden is None) != (law.write_noise == 0):
        raise ValueError(
            f"{OP}: `hidden` must go with a law of write noise and only with it, got {'none' if hidden is None else 'one'} "
            f"for write_noise={law.write_noise:g} S; pass the conductances that the devices hold"
        )
    check_endurance(OP, endurance, pulse_count, law, g.shape)
    check_window(OP, g_min, g_max)
    check_stuck(OP, stuck_at_g_min, stuck_at_g_max)
    check_integers(OP, seed=seed)
    check_numbers(OP, "w_max", w_max, "", "use the largest weight")
    check_written(OP, g=g, hidden=hidden, out=out, pulse_count=pulse_count)
    check_map(OP, device_map, law, g.shape)
    window: dict[str, Any] = {
        "g_min": g_min, "g_max": g_max, "stuck_at_g_min": stuck_at_g_min, "stuck_at_g_max": stuck_at_g_max,
    }  # fmt: skip
    where = "cuda" if device is not None else backend(g)
    if where == "cuda":
        return _cuda(
            device or cuda_device(), g, hidden, pulse_count, device_map, dw, digits, factor, out, (groups, outputs, inputs), law,
            Wear.of(endurance), Slices.of(slices, slice_bits, carry), w_max, step, seed, window,
        )  # fmt: skip
    step = integer(OP, "step", step)
    if where == "reference":
        require_finite(OP, name, int((~np.isfinite(change)).sum()), "lower the rate")
        sliced: dict[str, Any] = {
            "slices": slices,
            "slice_bits": slice_bits,
            "carry": None if carry is None else carry.model_dump(),
        }
        shown, held, _ = reference.device_update(
            g, dw, digits=digits, factor=factor, law=law.model_dump(), w_max=w_max, hidden=hidden,
            endurance=None if endurance is None else endurance.model_dump(), pulse_count=pulse_count,
            device_map=by_name(device_map, law), seed=seed, step=step, **sliced, **window,
        )  # fmt: skip
        g[...] = shown
        if hidden is not None:
            hidden[...] = held
        # of the cells as they are kept, in float32
        read = reference.read_out(g, w_max=w_max, groups=groups, g_min=g_min, g_max=g_max, **sliced)
        weights = np.empty((groups, outputs, inputs), np.float32) if out is None else out
        weights[...] = read
        return weights
    weights = np.empty((groups, outputs, inputs), np.float32) if out is None else out
    bad = np.zeros(1, np.int64)
    if weights.size:
        update = Update(
            law=parameters(law, g_min, g_max), endurance=Wear.of(endurance),
            slices=Slices.of(slices, slice_bits, carry), groups=groups, inputs=inputs, outputs=outputs, step=step, seed=seed,
            g_min=g_min, range=g_max - g_min, stuck_low=stuck_at_g_min, stuck_high=stuck_at_g_max, factor=factor,
        )  # fmt: skip
        host_call(
            library(), "gpuxbar_device_update", g, hidden, pulse_count, device_map, dw, digits, weights, w_max,
            np.frombuffer(bytes(update), np.uint8), bad,
        )  # fmt: skip
    require_finite(OP, name, int(bad[0]), "lower the rate")
    return weights


def _change(dw: Any, digits: Any, slices: int) -> tuple[str, Any, tuple[int, int, int]]:
    """Name and array of what is wanted, and the shape of the weights, [G, O, I]."""
    if digits is None:
        check_array(OP, "dw", dw, "float32", 3)
        return "dw", dw, dw.shape
    check_array(OP, "digits", digits, "float32", 4)
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


def _cuda(
    device: Device, g: Any, hidden: Any, pulse_count: Any, device_map: Any, dw: Any, digits: Any, factor: float, out: Any,
    shape: tuple[int, int, int], law: UpdateLaw, endurance: Wear, slices: Slices, w_max: Any, step: Any, seed: int,
    window: dict[str, Any],
) -> Any:  # fmt: skip
    groups, outputs, inputs = shape
    weights = device.empty(shape, "float32") if out is None else out
    by_value = isinstance(step, int)
    settings = parameters(law, window["g_min"], window["g_max"])
    device.launch(
        KERNEL, (-(-outputs // 32), -(-inputs // 32), groups), (256,),
        {"g": g, "hidden": hidden, "pulse_count": pulse_count, "device_map": device_map, "endurance": endurance, "slices": slices,
         "dw": dw, "digits": digits, "w": weights, "w_max": w_max, "step": None if by_value else step.reshape(-1),
         "law": settings, "factor": factor, "step_value": step if by_value else 0, "seed": seed, "g_min": window["g_min"],
         "range": window["g_max"] - window["g_min"], "stuck_low": window["stuck_at_g_min"],
         "stuck_high": window["stuck_at_g_max"], "groups": groups, "inputs": inputs, "outputs": outputs},
        {"LAW": settings.law, "COUNTED": int(pulse_count is not None), "SLICED": int(slices.count > 1), "DIGITS": int(digits is not None)},
    )  # fmt: skip
    return weights


KERNEL = Kernel(
    "device_update.cu",
    g=InOut("float32", "S R O"), hidden=InOut("float32", "S R O", optional=True),
    pulse_count=InOut("int32", "S R O", optional=True), device_map=In("float16", "K S R O", optional=True), dw=In("float32", "G O I", optional=True),
    digits=In("float32", "D G I O", optional=True), w=Out("float32", "G O I"), w_max=In("float32", "C"),
    step=In("int64", "one", optional=True), law=Struct("UpdateLaw", Parameters), endurance=Struct("Endurance", Wear), slices=Struct("Slices", Slices), factor=Scalar("float32"), step_value=Scalar("int64"),
    seed=Scalar("uint64"), g_min=Scalar("float32"), range=Scalar("float32"), stuck_low=Scalar("float32"),
    stuck_high=Scalar("float32"), groups=Scalar("int32"), inputs=Scalar("int32"), outputs=Scalar("int32"),
)  # fmt: skip
