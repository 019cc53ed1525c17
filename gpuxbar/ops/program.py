"""Programming weights onto conductance planes: once, or again whenever they have changed."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from gpuxbar import reference
from gpuxbar.launch import Device, backend, cuda_device, host_call, library
from gpuxbar.ops.checks import (
    check_array,
    check_integers,
    check_kind,
    check_shape,
    check_window,
    check_written,
    integer,
    kept,
    require_finite,
)
from gpuxbar.ops.program_cuda import Deviation, program_cuda, reprogram_cuda
from gpuxbar.spec import Programming

__all__ = [
    "IDEAL",
    "Write",
    "Writing",
    "checksum",
    "program",
    "reprogram",
    "reprogram_on_host",
    "write_values",
    "writing",
]

IDEAL = Programming()
LOWER = "lower the rate"
INTEGERS = ("slices", "slice_bits", "headroom_bits", "levels", "seed")
MERGES = ("none", "subtract", "all", "offset")  # in the order of `enum Merge` in programming.cuh


def program(
    weight: Any,
    *,
    w_max: Any,
    g_min: float,
    g_max: float,
    slices: int = 1,
    slice_bits: int | None = None,
    headroom_bits: int = 0,
    balanced: bool = False,
    levels: int | None = None,
    merge: str = "none",
    programming: Programming = IDEAL,
    sigma_g: float = 0.0,
    exponent: float = 0.5,
    seed: int = 0,
    step: Any = 0,
    device: Device | None = None,
) -> Any:
    """Write weights to devices, and return the conductances that the writes leave.

    w      = clip(weight / w_max, -1, 1)
    target = g_min + share (g_max - g_min), with share = |w| on its side of a pair (0 on the other), a digit of |w|
             over 2**(slice_bits + headroom_bits) - 1, or (1 + w) / 2 of a single device; rounded to levels
    g      = max(0, target (1 + device_spread z1) + noise z2), or g_min or g_max where stuck
    noise  = write_noise, or sum_k write_noise[k] r**k with r = target / g_max

    Args:
        weight: Weights, float32 [G, O, I]; finite.
        w_max: Weight of a full pair, float32 [1] or [G * O], above 0; larger weights are clipped.
        g_min, g_max: Conductance window, S.
        slices, slice_bits: Devices of a magnitude and bits of each, 32 bits together; `slice_bits=None` is one
            continuous slice.
        headroom_bits: Bits by which the window of a slice's device exceeds its digit.
        balanced: Pairs lie half of their share above and below the middle of the window, instead of one device at `g_min`.
        levels: Levels of an unsliced device, at least 2; None: continuous. "offset" centres them: the middle one,
            (levels - 1) // 2, is weight 0, and an even number leaves the last unused.
        merge: Which planes are stored. "none": both sides of the pairs, [2 slices], positive ones first, least
            significant slice first; "subtract": their difference, [slices]; "all": sum_k 2**(k slice_bits) of the
            differences, [1]; "offset": a single device for each weight, around the middle of the window, [1].
        programming: What a write leaves: its noise, redrawn with every `step`, and the spread and stuck cells of the
            devices, drawn once per seed.
        sigma_g: Conductance fluctuation of a read of a device at `g_max`, S; see `spec.ReadNoise`.
        exponent: Of its growth with g / g_max, 0 to 4.
        seed, step: Same pair, same noise; `step` is an integer or an int64 array of one element.
        device: Where CuPy arrays are allocated and run; None: CuPy's current device and memory pool.

    Returns:
        Conductances, float32 [planes, G * I, O], S. With `sigma_g` also the variance of a read of each stored plane
        per squared volt, of that shape, A**2/V**2: (sigma_g (g / g_max)**exponent)**2, summed over the devices of the
        plane with the squares of their weights.

    Raises:
        TypeError: An array has another dtype, or `programming` is no `spec.Programming`.
        ValueError: Shapes disagree, an array is not contiguous, a setting is out of range, or a weight is NaN or
            infinite (checked on the CPU; on a GPU its conductances become NaN, and no value is read back).
    """
    op = "program"
    check_array(op, "weight", weight, "float32", 3)
    check_array(op, "w_max", w_max, "float32", 1)
    groups, outputs, inputs = weight.shape
    if w_max.size not in (1, groups * outputs):
        raise ValueError(
            f"{op}: `w_max` must have 1 or {groups * outputs} values, got {w_max.size}; give one, or one per output of "
            "each group"
        )
    write = writing(
        op, weight.shape, w_max.size, g_min, g_max, slices, slice_bits, headroom_bits, balanced, levels, merge, programming,
        sigma_g, exponent, seed,
    )  # fmt: skip
    where = "cuda" if device is not None else backend(weight)
    if where == "cuda":
        device = device or cuda_device()
        g, noise_var = (
            device.empty(write.shape, "float32") if wanted else None for wanted in (True, sigma_g)
        )
        number = isinstance(step, int)
        values = {**write.values, "step": step if number else 0}
        program_cuda(device, weight, w_max, g, noise_var, values, step=None if number else step)
        return g if noise_var is None else (g, noise_var)
    if not (w_max > 0).all() or not np.isfinite(w_max).all():
        raise ValueError(
            f"{op}: `w_max` must be finite and above 0, got {w_max.min():g} to {w_max.max():g}; use the largest weight"
        )
    step = integer(op, "step", step)
    if where == "reference":
        require_finite(op, "weight", int((~np.isfinite(weight)).sum()), LOWER)
        return reference.program(weight, w_max=w_max, step=step, **write.settings)
    g = np.empty(write.shape, np.float32)
    noise_var = np.empty(write.shape, np.float32) if sigma_g else None
    if g.size:
        bad = np.zeros(1, np.int64)
        host_call(library(), "gpuxbar_program", write.at(step), weight, w_max, g, noise_var, bad)
        require_finite(op, "weight", int(bad[0]), LOWER)
    return g if noise_var is None else (g, noise_var)


def reprogram(
    weight: Any,
    g: Any,
    w_max: Any,
    state: Any,
    noise_var: Any = None,
    *,
    g_min: float,
    g_max: float,
    write_step: Any,
    scale: str = "tensor",
    full_weight: float | None = None,
    slices: int = 1,
    slice_bits: int | None = None,
    headroom_bits: int = 0,
    balanced: bool = False,
    levels: int | None = None,
    merge: str = "none",
    programming: Programming = IDEAL,
    sigma_g: float = 0.0,
    exponent: float = 0.5,
    seed: int = 0,
    device: Device | None = None,
) -> None:
    """Program weights again if they have changed, in place.

    version = fingerprint(weight) + write_step, mod 2**64. Where it is not state[0], `w_max` is set, `g` (and
    `noise_var`) become `program(weight, w_max, step=low 32 bits of version)`, and state[0] = version. So the
    conductances are a function of weight, write step and seed alone, and nothing else needs to be kept for a resumed
    run. The fingerprint is the sum over all places of the bits of a weight times an odd 64-bit number of its place:
    any single changed weight changes it, two changes cancel with a probability of 2**-64.

    Args:
        weight: Weights, float32 [G, O, I]; finite.
        g: Conductances, float32 [planes, G * I, O], S; see `program`.
        w_max: Weight of a full pair of each output, float32 [G * O].
        state: int64 [2]: the version that is programmed, and that of the last call. Zeros say that nothing is
            programmed (a version of 0 is programmed in every call). It belongs to one `g` and one group of settings.
        noise_var: Variance of a read, float32, shape of `g`, A**2/V**2; given with `sigma_g` and only with it.
        write_step: int64 [1]; another value programs the same weights anew, with other write noise.
        scale: "tensor": `w_max` is the largest weight; "column": the largest of each output. At least 1e-30.
        full_weight: Sets `w_max` instead, above 0; larger weights are clipped.
        g_min, ..., seed, device: See `program`.

    Raises:
        TypeError: An array has another dtype.
        ValueError: Shapes disagree, an array is not contiguous, a setting is out of range, or a weight is NaN or
            infinite (checked on the CPU, where nothing is written then; on a GPU its conductances and, unless
            `full_weight` is given, its `w_max` become NaN or infinite, and no value is read back).
    """
    op = "reprogram"
    check_array(op, "weight", weight, "float32", 3)
    groups, outputs, inputs = weight.shape
    write = writing(
        op, weight.shape, groups * outputs, g_min, g_max, slices, slice_bits, headroom_bits, balanced, levels, merge,
        programming, sigma_g, exponent, seed,
    )  # fmt: skip
    if scale not in ("tensor", "column"):
        raise ValueError(f"{op}: `scale` must be 'tensor' or 'column', got {scale!r}; choose one")
    if full_weight is not None and not 0 < full_weight < float("inf"):
        raise ValueError(
            f"{op}: `full_weight` must be finite and above 0, got {full_weight:g}; None takes the largest weight"
        )
    if (noise_var is None) == bool(sigma_g):
        raise ValueError(
            f"{op}: `noise_var` must be given with sigma_g above 0 and only then, got sigma_g={sigma_g:g} S and "
            f"{'none' if noise_var is None else 'an array'}; pass both or neither"
        )
    for name, array, dtype, want in (
        ("g", g, "float32", write.shape),
        ("noise_var", noise_var, "float32", write.shape),
        ("w_max", w_max, "float32", (groups * outputs,)),
        ("state", state, "int64", (2,)),
        ("write_step", write_step, "int64", (1,)),
    ):
        if name == "noise_var" and array is None:
            continue
        check_array(op, name, array, dtype, len(want))
        check_shape(op, name, array, want, "check the axes", f"weight {tuple(weight.shape)}")
    check_written(op, g=g, w_max=w_max, state=state, noise_var=noise_var)
    where = "cuda" if device is not None else backend(weight)
    if where == "cuda":
        reprogram_cuda(
            device or cuda_device(), weight, g, w_max, state, noise_var, write_step, write.values, scale, full_weight
        )  # fmt: skip
        return
    if where == "reference":
        require_finite(op, "weight", int((~np.isfinite(weight)).sum()), LOWER)
        reference.reprogram(
            weight, g, w_max, state, noise_var, write_step=int(write_step[0]), scale=scale, full_weight=full_weight,
            **write.settings,
        )  # fmt: skip
        return
    reprogram_on_host(write.at(int(write_step[0])), weight, w_max, g, noise_var, state, scale, full_weight)


def reprogram_on_host(
    write: Any, weight: Any, w_max: Any, g: Any, noise_var: Any, state: Any, scale: str, full_weight: float | None
) -> None:  # fmt: skip
    """`reprogram` of arrays or addresses."""
    bad = ctypes.c_int64()
    host_call(
        library(), "gpuxbar_reprogram", write, weight, w_max, g, noise_var, state, scale == "column",
        float(full_weight or 0.0), bad,
    )  # fmt: skip
    require_finite("reprogram", "weight", bad.value, LOWER)


def checksum(weight: np.ndarray) -> int:
    """Of a weight on a CPU, float32 of any shape and C-contiguous: another one where a value is another, and nearly always where
    several are."""
    if backend(weight) == "reference":
        return reference.fingerprint(weight)
    return host_call(library(), "gpuxbar_checksum", weight, weight.size)


@dataclass(frozen=True)
class Writing:
    """What shapes and settings alone say of writes: they are looked at once for all writes alike.

    Attributes:
        shape: Of the conductances.
        settings: As `reference.program` takes them.
        values: The fields of `struct Programming` at step 0, by name.
        packed: The struct, as bytes.
        weights, cells: How many there are.
    """

    shape: tuple[int, int, int]
    settings: dict[str, Any]
    values: dict[str, Any]
    packed: bytes
    weights: int
    cells: int

    def at(self, step: int) -> Write:
        """The struct at a step."""
        write = Write.from_buffer_copy(self.packed)
        write.step = step
        return write


@kept
def writing(
    op: str, weight: tuple[int, int, int], scale_count: int, g_min: float, g_max: float, slices: int,
    slice_bits: int | None, headroom_bits: int, balanced: bool, levels: int | None, merge: str, programming: Programming,
    sigma_g: float, exponent: float, seed: int,
) -> Writing:  # fmt: skip
    """Check the settings of writes of weights of a shape [G, O, I]."""
    check_kind(op, "programming", programming, Programming)
    s: dict[str, Any] = {
        "g_min": g_min, "g_max": g_max, "slices": slices, "slice_bits": slice_bits, "headroom_bits": headroom_bits,
        "balanced": balanced, "levels": levels, "merge": merge, "sigma_g": sigma_g, "exponent": exponent, "seed": seed,
        **programming.model_dump(),
    }  # fmt: skip
    _check_settings(op, s)
    groups, outputs, inputs = weight
    planes = {"none": 2 * slices, "subtract": slices, "all": 1, "offset": 1}[merge]
    values = {
        "groups": groups, "inputs": inputs, "outputs": outputs, "slices": slices, "slice_bits": slice_bits or 0,
        "merge": MERGES.index(merge), "scale_count": scale_count, "step": 0,
        "steps": 0 if levels is None or slice_bits else levels - 1, "read_var": sigma_g**2, "read_power": 2.0 * exponent,
        **write_values(s),
    }  # fmt: skip
    shape = planes, groups * inputs, outputs
    return Writing(shape, s, values, bytes(Write(**values)), prod(weight), prod(shape))


def _check_settings(op: str, s: dict[str, Any]) -> None:
    """Refuse settings out of range."""
    check_window(op, s["g_min"], s["g_max"])
    if s["merge"] not in MERGES:
        raise ValueError(f"{op}: `merge` must be one of {', '.join(MERGES)}, got {s['merge']!r}; choose one")
    check_integers(op, **{name: s[name] for name in INTEGERS})
    slices, bits, levels, offset = s["slices"], s["slice_bits"], s["levels"], s["merge"] == "offset"
    if slices < 1 or (bits is None and slices > 1) or (bits is not None and not 1 <= bits <= 32 // slices):
        raise ValueError(
            f"{op}: `slices` must be at least 1 and `slice_bits` 1 to 32 // slices (None for one slice), got {slices} of "
            f"{bits} bits; a float32 weight holds no more"
        )
    if offset and bits is not None:
        raise ValueError(
            f"{op}: `slice_bits` must be None with merge='offset', got {bits}; sliced weights need pairs"
        )
    if levels is not None and not (3 if offset else 2) <= levels <= 65536:
        raise ValueError(
            f"{op}: `levels` must be {3 if offset else 2} to 65536 with merge={s['merge']!r}, got {levels}; None is "
            "continuous"
        )
    headroom = s["headroom_bits"]
    if not 0 <= headroom <= 8 or (headroom and bits is None):
        raise ValueError(
            f"{op}: `headroom_bits` must be 0 to 8, and 0 without slices, got {headroom}; it widens a slice's window"
        )
    if s["balanced"] and offset:
        raise ValueError(
            f"{op}: `balanced` must be False with merge='offset', got True; it places the devices of pairs"
        )
    if levels is not None and bits is not None and levels != 2**bits:
        raise ValueError(
            f"{op}: `levels` must be 2**slice_bits = {2**bits} for sliced weights, got {levels}; leave it None"
        )
    if levels is not None and bits is not None and (headroom or s["balanced"]):
        raise ValueError(
            f"{op}: `levels` must be None for slices with headroom or in balanced pairs, got {levels}; leave it out"
        )
    if not 0 <= s["sigma_g"] < float("inf"):
        raise ValueError(f"{op}: `sigma_g` must be at least 0, got {s['sigma_g']:g} S; 0 switches it off")
    if not 0 <= s["exponent"] <= 4:
        raise ValueError(
            f"{op}: `exponent` must be 0 to 4, got {s['exponent']:g}; 0.5 is the square-root law, 1 a constant relative "
            "fluctuation"
        )


class Write(ctypes.Structure):
    """Twin of `struct Programming` in kernels/include/gpuxbar/programming.cuh."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in (
            "groups", "inputs", "outputs", "slices", "slice_bits", "merge", "scale_count", "step", "balanced")),
        ("seed", ctypes.c_uint64),
        *((name, ctypes.c_float) for name in (
            "digit_max", "steps", "g_min", "g_max", "spread")),
        ("noise", Deviation),
        *((name, ctypes.c_float) for name in ("stuck_low", "stuck_high", "read_var", "read_power")),
    ]  # fmt: skip


def write_values(s: dict[str, Any]) -> dict[str, Any]:
    """Those fields that say what a write of a device does."""
    return {
        "balanced": int(s["balanced"]), "seed": s["seed"] & 0xFFFFFFFFFFFFFFFF,
        "digit_max": 2 ** ((s["slice_bits"] or 0) + s["headroom_bits"]) - 1, "g_min": s["g_min"], "g_max": s["g_max"],
        "spread": s["device_spread"], "noise": Deviation.of(s["write_noise"]), "stuck_low": s["stuck_at_g_min"],
        "stuck_high": 1.0 - s["stuck_at_g_max"],
    }  # fmt: skip
