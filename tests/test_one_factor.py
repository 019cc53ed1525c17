"""A partial sum becomes ADC steps by one factor: on every path the same bits, whatever volts and amperes it is made of."""

from __future__ import annotations

import re

import numpy as np
import pytest
from cuda_shim import ShimDevice
from test_tile_mvm import SEED

from gpuxbar import ops

ROWS, LINES, COLUMNS, TILE = 19, 100, 24, 48
UNIT = 2.0**-20  # S of a level
VOLTS = 0.2 / 127  # no power of 2, nor is any LSB below: only sums are whole
WAYS = {  # precision and strategy; None: on the CPU
    "host": None,
    "fp32": ("fp32", "epilogue"),
    "epilogue": ("fp16", "epilogue"),
    "fused": ("fp16", "fused"),
    "wgmma": ("fp16", "wgmma"),
    "int8": ("int8", "fused"),
}


@pytest.fixture(scope="module")
def operands():
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (ROWS, LINES)).astype(np.int16)
    levels = rng.integers(-15, 16, (1, LINES, COLUMNS))
    return codes, levels


def read(way, codes, levels, **s):
    more = {"tile_rows": TILE, "v_lsb": VOLTS, "adc_bits": 8, "seed": SEED, "step": 3}
    if WAYS[way]:
        precision, strategy = WAYS[way]
        more |= {"precision": precision, "strategy": strategy, "g_range": 16 * UNIT, "g_step": UNIT}
        more["device"] = ShimDevice(arch="sm_90", multiprocessors=1)
    return ops.tile_mvm(codes, (levels * UNIT).astype(np.float32), **{**more, **s})


LSB = VOLTS * UNIT * 37.7  # a current of 37.7 sums of 1
LSBS = np.linspace(0.7, 1.6, COLUMNS, dtype=np.float32) * np.float32(LSB)
GAINS = {"adc_gain": np.linspace(0.8, 1.3, 3 * COLUMNS, dtype=np.float32).reshape(1, 3, COLUMNS)}
OFFSETS = {"adc_offset": np.linspace(-9 * LSB, 7 * LSB, 3 * COLUMNS, dtype=np.float32).reshape(1, 3, COLUMNS)}
APART = [way for way in WAYS if way != "wgmma"]  # whose converters may differ
CASES = {  # the ways that can, settings
    "quiet": (WAYS, {"adc_lsb": LSB}),
    "exact": (WAYS, {"adc_lsb": LSB, "read_noise": 1.3 * LSB}),
    "columns": (WAYS, {"adc_lsb": LSBS, "read_noise": 1.3 * LSB, "generator": "fast", "want_gate": True}),
    "converters": (APART, {"adc_lsb": LSBS, "read_noise": 1.3 * LSB, **GAINS, **OFFSETS}),
    "gains": (APART, {"adc_lsb": LSB, **GAINS}),
    "offsets": (APART, {"adc_lsb": LSB, **OFFSETS}),
    "streams": (WAYS, {"adc_lsb": LSB / 8, "stream_bits": 3, "streams": 3, "phases": 2}),
    "no-adc": (["fp32", "epilogue"], {"adc_bits": None, "read_noise": LSB}),
}


@pytest.mark.parametrize("name", CASES)
def test_every_path_converts_alike(operands, name):
    ways, s = CASES[name]
    results = [read(way, *operands, **s) for way in ways]
    for result in results[1:]:
        np.testing.assert_array_equal(np.stack(result), np.stack(results[0]))
    y = results[0][0] if s.get("want_gate") else results[0]
    assert np.unique(y).size > y.size / 5


def test_every_path_adds_variances_alike(operands):
    """Of squares and variances that bf16 holds."""
    codes, levels = operands
    s = {
        "adc_lsb": LSB / 8,
        "read_noise": LSB / 9,
        "generator": "fast",
        "noise_var": (levels % 4 * UNIT**2).astype(np.float32),
    }
    results = [read(way, codes // 9, levels, **s) for way in ("host", "fp32", "epilogue", "fused", "wgmma")]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])
    quiet = read("host", codes // 9, levels, **{**s, "noise_var": None})
    assert (quiet != results[0]).mean() > 0.5


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("volts", [VOLTS, 1e-3, 0.3 / 7])
def test_halves_round_to_even_and_whole_steps_are_whole(operands, volts, way):
    """Where an LSB is 2^n partial sums of 1 (or 1/3 of one), the factor is exact, whatever a volt is."""
    codes, levels = operands
    sums = [
        codes[:, at : at + TILE].astype(np.int64) @ levels[0, at : at + TILE] for at in range(0, LINES, TILE)
    ]
    for lsb, steps in (
        (2.0, [s / 2 for s in sums]),
        (16.0, [s / 16 for s in sums]),
        (1 / 3, [3 * s for s in sums]),
    ):
        amperes = np.float32(np.float32(volts) * lsb * UNIT)
        y = read(way, codes, levels, v_lsb=volts, adc_bits=16, adc_lsb=float(amperes))
        expected = sum(np.clip(np.rint(s), -32767, 32767) for s in steps)
        np.testing.assert_array_equal(np.rint(y / amperes), expected)


@pytest.mark.parametrize("way", WAYS)
def test_steps_too_small_for_their_number_cut_off(operands, way):
    """Steps of which a partial sum of 1 has more than float32 counts: no current is still 0 steps."""
    codes, levels = operands
    codes = np.where(np.arange(ROWS) % 2, codes.T, 0).T.copy()
    lsb = 2.0**-149
    s = {"v_lsb": 2.0**20, "adc_lsb": lsb, "tile_rows": None, "adc_bits": 8}
    y = read(way, codes, levels, **s)
    expected = np.sign(codes.astype(np.int64) @ levels[0]) * 127
    np.testing.assert_array_equal(y, (expected * lsb).astype(np.float32))


@pytest.mark.parametrize(
    ("way", "volts", "scale"),
    [("host", 1e-39, 1), ("host", 1e39, 1), ("fused", 1e-30, 2**29), ("epilogue", 1e-30, 2**29)],
)
def test_volts_that_float32_does_not_hold_are_refused(operands, way, volts, scale):
    text = (
        f"tile_mvm: `v_lsb` must be a normal number of float32 over {scale:g}, got {volts:g} V; use SI units"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        read(way, *operands, v_lsb=volts, adc_lsb=LSB)
