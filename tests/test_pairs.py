"""Pairs of devices: what they refuse, and what they make of their settings."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from gpuxbar import ops
from gpuxbar.spec import Agarwal, Carry, ConstantStep, Endurance, Ideal

WINDOW = {"g_min": 1e-6, "g_max": 10e-6}  # S
STEP, SPREAD = ConstantStep(pulses=100), ConstantStep(step_spread=0.1)
NOISY = ConstantStep(write_noise=1e-8)
SLICED = {"slice_bits": 2, "carry": Carry()}
LIMIT = Endurance(pulses=9.0)


def cells(planes=2, dtype=np.float32, shape=(3, 4)):
    return np.full((planes, *shape), 5, dtype)


def read_only(array):
    array.setflags(write=False)
    return array


BAD = {
    "no-law": ({"law": None}, "`law` must be an update law of the spec, got None; build one"),
    "name": ({"law": "soft_bounds"}, "`law` must be an update law of the spec, got 'soft_bounds'"),
    "no-programming": ({"programming": None}, "`programming` must be a gpuxbar.spec.Programming, got NoneType; build one by"),
    "endurance": ({"endurance": 9.0}, "`endurance` must be a gpuxbar.spec.Endurance, got float; build one by"),
    "carry": ({"carry": "periodic"}, "`carry` must be a gpuxbar.spec.Carry, got str; build one by"),
    "dtype": ({"g": cells(dtype=float)}, "`g` must be an array of float32, got float64; convert it"),
    "list": ({"g": [[0.0]]}, "`g` must be an array of float32, got list"),
    "axes": ({"g": cells()[0]}, r"`g` must have 3 axes, got 2 \(shape \(3, 4\)\); reshape it"),
    "strides": ({"g": cells().transpose(0, 2, 1)}, "`g` must be C-contiguous, got strides"),
    "read-only": ({"g": read_only(cells())}, "`g` must be writable, got a read-only array; pass a copy"),
    "odd": ({"g": cells(3)}, "`g` must have 2 planes, or 4 and more by twos with slice_bits and a carry, got 3 with slice_bits=None and no carry"),
    "slices": ({"g": cells(6)}, "`g` must have 2 planes, .* got 6 with slice_bits=None and no carry; pass both or neither"),
    "odd-slices": ({"g": cells(5), **SLICED}, "`g` must have 2 planes, .* got 5 with slice_bits=2 and a carry"),
    "no-slices": (SLICED, "`g` must have 2 planes, .* got 2 with slice_bits=2 and a carry"),
    "no-carry": ({"g": cells(6), "slice_bits": 2}, "`g` must have 2 planes, .* got 6 with slice_bits=2 and no carry"),
    "no-bits": ({"g": cells(6), "carry": Carry()}, "`g` must have 2 planes, .* got 6 with slice_bits=None and a carry"),
    "bits": ({"g": cells(6), **SLICED, "slice_bits": 12}, "`slice_bits` must be 1 to 8 for 3 slices, got 12; a float32 weight holds 32 bits"),
    "many-bits": ({"g": cells(12), **SLICED, "slice_bits": 6}, "`slice_bits` must be 1 to 5 for 6 slices, got 6"),
    "half-bits": ({"g": cells(4), **SLICED, "slice_bits": 2.0}, "`slice_bits` must be an integer, got 2.0; give a whole number"),
    "seed": ({"seed": 1.0}, "`seed` must be an integer, got 1.0; give a whole number"),
    "window": ({"g_max": 1e-7}, "need 0 <= g_min < g_max, got 1e-06 S and 1e-07 S; widen or swap"),
    "endless": ({"g_max": float("inf")}, "`g_max` must be finite, got inf S; give the window's end"),
    "held": ({"g_held": cells()}, "`g_held` must go with a law of write noise and only with it, got one for write_noise=0 S; pass"),
    "not-held": ({"law": NOISY}, "`g_held` must go with a law of write noise and only with it, got none for write_noise=1e-08 S"),
    "held-shape": ({"law": NOISY, "g_held": cells(4)}, r"`g_held` must have shape \(2, 3, 4\) for this `g`, got \(4, 3, 4\); check"),
    "held-dtype": ({"law": NOISY, "g_held": cells(dtype=float)}, "`g_held` must be an array of float32, got float64"),
    "held-read-only": ({"law": NOISY, "g_held": read_only(cells())}, "`g_held` must be writable, got a read-only array"),
    "count": ({"pulse_count": cells(dtype=np.int32)}, "`pulse_count` must go with an endurance and only with it, got one for endurance.pulses=None"),
    "no-count": ({"endurance": LIMIT}, "`pulse_count` must go with an endurance and only with it, got none for endurance.pulses=9.0; pass"),
    "count-shape": ({"endurance": LIMIT, "pulse_count": cells(4, np.int32)}, r"`pulse_count` must have shape \(2, 3, 4\) for this `g`, got"),
    "count-dtype": ({"endurance": LIMIT, "pulse_count": cells(dtype=np.int64)}, "`pulse_count` must be an array of int32, got int64"),
    "count-read-only": ({"endurance": LIMIT, "pulse_count": read_only(cells(dtype=np.int32))}, "`pulse_count` must be writable"),
    "no-pulses": ({"law": Ideal(), "endurance": LIMIT, "pulse_count": cells(dtype=np.int32)}, "`law` must have pulses to count them, got 'ideal'"),
    "map-dtype": ({"law": SPREAD, "device_map": cells()[None]}, "`device_map` must be an array of float16, got float32"),
    "map-law": ({"device_map": cells(dtype=np.float16)[None]}, r"`device_map` must have shape \(0, 2, 3, 4\) for a law that spreads in nothing, got \(1, 2, 3, 4\); make it by"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_named(name):
    change, text = BAD[name]
    with pytest.raises((TypeError, ValueError), match=f"^Pairs: {text}"):
        ops.Pairs(**{"g": cells(), "law": STEP, **WINDOW, **change})


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        (ops.device_update, {"dw": None, "w_max": None}),
        (ops.pulse_update, {"x": None, "d": None, "rate": 1.0, "train": None, "w_max": None}),
        (ops.streamed_update, {"x": None, "d": None, "rate": 1.0, "w_max": None}),
        (ops.carry, {"updates": 1}),
        (ops.relax, {"law": None}),
    ],
)
def test_conductances_alone_are_no_pairs(op, arguments):
    text = rf"^{op.__name__}: `pairs` must be a gpuxbar\.ops\.Pairs, got ndarray; build one by Pairs"
    with pytest.raises(TypeError, match=text):
        op(cells(), **arguments)


@pytest.mark.parametrize(
    ("op", "arguments", "text"),
    [
        (ops.relax, {"law": {"tau": 1.0}}, r"`law` must be a gpuxbar\.spec\.Retention, got dict"),
        (
            ops.pulse_update,
            {"x": None, "d": None, "rate": 1.0, "train": {"length": 31}, "w_max": None},
            r"`train` must be a gpuxbar\.spec\.PulseTrain, got dict",
        ),
    ],
)
def test_settings_are_parts_of_the_spec(op, arguments, text):
    with pytest.raises(TypeError, match=f"^{op.__name__}: {text}"):
        op(ops.Pairs(cells(), law=STEP, **WINDOW), **arguments)


def test_pairs_know_their_slices():
    """By their planes; and they cannot be changed, only what their arrays hold."""
    pairs = ops.Pairs(cells(6), law=Agarwal(sides="one_sided"), **WINDOW, **SLICED)
    assert (pairs.slices, pairs.balanced, pairs.macros["SLICED"]) == (3, False, 1)
    alone = ops.Pairs(cells(), law=Agarwal(), **WINDOW)
    assert (alone.slices, alone.balanced, alone.macros["SLICED"]) == (1, True, 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        alone.seed = 1
