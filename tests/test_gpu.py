"""The ops on a GPU, through CuPy, against the float64 oracle; skipped without one, and never run on the CPU instead."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from test_anchored_conductance import drifting
from test_capture import SETTINGS, Run, fuse, same
from test_carry import SCHEMES, carried, lie, pairs_of
from test_carry import cells as sliced_cells
from test_drift import G_MAX as DRIFT_G_MAX
from test_drift import LAWS as DRIFTS
from test_drift import SEED as DRIFT_SEED
from test_drift import YEAR
from test_drift import case as drift_case
from test_drift import oracle as drift_oracle
from test_effective_conductance import WIRES, tiles, wires
from test_endurance import case as wear_case
from test_fused_implicit import BY_POSITION
from test_fused_implicit import READS as CONVOLUTIONS
from test_fused_implicit import convolution as images_and_kernels
from test_fused_implicit import read as read_images
from test_fused_int8 import BASE as BYTE_SETTINGS
from test_fused_int8 import READS as BYTES
from test_fused_int8 import int8
from test_fused_int8 import operands as levels
from test_packed_conductance import READS as KEPT
from test_packed_conductance import Kept
from test_program import DEVICES, G_MIN, MAPPINGS, RANGE, WINDOW, assert_programmed, told, weights
from test_program import SEED as WRITE_SEED
from test_program import SHAPES as WEIGHT_SHAPES
from test_tile_mvm import (
    G_MAX,
    MODES,
    SEED,
    SHAPES,
    assert_convolution_matches,
    assert_matches,
    assert_reads,
    case,
    convolution,
)

from gpuxbar import ops, reference
from gpuxbar.spec import Agarwal, ConstantStep, Endurance, PulseTrain, Retention

pytestmark = pytest.mark.gpu

REPEATS = 10
ORACLE_IS_SLOW = pytest.mark.slow  # so that it runs first


def to_gpu(value):
    """NumPy arrays, those of `ops.Drivers` too, as CuPy arrays on the current stream, anything else as it is."""
    import cupy

    if isinstance(value, ops.Drivers):
        return replace(value, error=to_gpu(value.error))
    return cupy.asarray(value) if isinstance(value, np.ndarray) else value


def from_gpu(value):
    """CuPy arrays (and tuples of them) as NumPy arrays; waits for the current stream."""
    import cupy

    return tuple(map(from_gpu, value)) if isinstance(value, tuple) else cupy.asnumpy(value)


def run(device, op, *arrays, **settings):
    """An op on the GPU, from NumPy arrays to NumPy arrays."""
    arrays = [to_gpu(array) for array in arrays]
    return from_gpu(op(*arrays, device=device, **{name: to_gpu(value) for name, value in settings.items()}))


# ---- reading


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_reads_match_oracle(cuda_device, shape, mode, groups, transposed):
    assert_reads(partial(run, cuda_device, ops.tile_mvm), shape, mode, groups, transposed)


def noisy_read(generator="exact"):
    """A read of several tiles with 16-byte columns: (codes, g, settings)."""
    codes, g = case(300, 200, 88)
    s = {
        "v_lsb": 1e-3,
        "adc_bits": 8,
        "adc_lsb": 1e-7,
        "read_noise": 3e-7,
        "seed": SEED,
        "generator": generator,
    }
    return codes, g, s


@pytest.mark.parametrize("generator", ["exact", "fast"])
def test_a_read_repeats_bit_for_bit(cuda_device, generator):
    """Ten times, in chunks of any workspace, on another stream."""
    import cupy

    codes, g, s = noisy_read(generator)
    first = run(cuda_device, ops.tile_mvm, codes, g, tile_rows=64, **s)
    assert_matches(first, reference.tile_mvm(codes, g, tile=64, **s), 1e-7)
    for _ in range(REPEATS):
        np.testing.assert_array_equal(run(cuda_device, ops.tile_mvm, codes, g, tile_rows=64, **s), first)
    for workspace in (1 << 16, 1 << 18):
        # cuBLAS may sum in another order for another number of rows: a code off by one on a rounding edge
        part = run(cuda_device.like(workspace=workspace), ops.tile_mvm, codes, g, tile_rows=64, **s)
        assert_matches(part, first, 1e-7)
    with cupy.cuda.Stream(non_blocking=True):
        np.testing.assert_array_equal(run(cuda_device, ops.tile_mvm, codes, g, tile_rows=64, **s), first)


@pytest.mark.parametrize("workspace", [1 << 14, 1 << 16, 64 << 20])
def test_noise_does_not_depend_on_the_workspace(cuda_device, workspace):
    """Without inputs the currents are the noise alone, whatever order the products sum in."""
    codes, g, s = noisy_read()
    codes[...] = 0
    whole = run(cuda_device, ops.tile_mvm, codes, g, tile_rows=64, **s)
    assert np.abs(whole).max() > 0
    part = run(cuda_device.like(workspace=workspace), ops.tile_mvm, codes, g, tile_rows=64, **s)
    np.testing.assert_array_equal(part, whole)


def test_scalars_may_live_on_the_device(cuda_device):
    codes, g, s = noisy_read()
    by_value = run(cuda_device, ops.tile_mvm, codes, g, step=5, **s)
    assert np.isfinite(by_value).all()
    arrays = {
        "adc_lsb": np.full(1, 1e-7, np.float32),
        "read_noise": np.full(1, 3e-7, np.float32),
        "step": np.full(1, 5),
    }
    np.testing.assert_array_equal(run(cuda_device, ops.tile_mvm, codes, g, **{**s, **arrays}), by_value)


@pytest.mark.parametrize(("precision", "bits"), [("fp32", 20), ("tf32", 9), ("fp16", 10), ("fp16x2", 20)])
def test_precisions(cuda_device, precision, bits):
    """Codes are exact in every format; what is left are roundings of conductances and of float32 sums."""
    codes, g = case(40, 60, 24)
    expected = reference.tile_mvm(codes, g, tile=32, v_lsb=1e-3)
    y = run(cuda_device, ops.tile_mvm, codes, g, tile_rows=32, v_lsb=1e-3, precision=precision, g_range=G_MAX)
    scale = (np.abs(codes.astype(np.float64)) @ np.abs(g[0])).max() * 1e-3
    assert np.abs(y - expected).max() < 2.0**-bits * scale
    if precision == "fp16":
        assert np.abs(y - expected).max() > 2.0**-18 * scale


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [((3, 3), (1, 1), (1, 1), (1, 1)), ((2, 3), (2, 1), (0, 2), (1, 2)), ((5, 2), (2, 3), (3, 1), (2, 1))],
)
def test_convolutions_match_oracle(cuda_device, kernel, stride, padding, dilation, groups, transposed):
    codes, g, s = convolution(kernel, stride, padding, dilation, groups, transposed)
    expected = reference.tile_mvm(codes, g, tile=4, **s)
    for workspace in (1 << 14, 64 << 20):
        device = cuda_device.like(workspace=workspace)
        y = run(device, ops.tile_mvm, codes, g, tile_rows=4, tile_cols=4, **s)
        assert_convolution_matches(y, expected)


def test_a_read_of_no_rows(cuda_device):
    y = run(cuda_device, ops.tile_mvm, np.zeros((0, 12), np.float32), np.ones((12, 5), np.float32))
    assert y.shape == (0, 5)


FUSED = [
    pytest.param(strategy, tile, id=f"{strategy}-{tile}")
    for strategy in ("fused", "wgmma", "cluster")
    for tile in (64, 100, 128, 256, 512)
]


def fused_read(cuda_device, strategy, tile, noise):
    """A read of several row and column blocks with an odd edge each: (codes, g, settings)."""
    if strategy != "fused" and cuda_device.arch != "sm_90":
        pytest.skip(f"{cuda_device.arch} has no wgmma")
    codes, g = case(261, 1100, 392)
    g = (g * 2**26).astype(np.float16).astype(np.float32) / 2**26  # fp16 holds it
    s = {
        "v_lsb": 1e-3, "adc_bits": 8, "adc_lsb": 1e-7, "seed": SEED, "step": 7, "read_noise": 0.0 if noise == "none" else 3e-7,
        "generator": "fast" if noise == "fast" else "exact",
    }  # fmt: skip
    if noise == "variance":  # numbers that bf16 holds
        codes %= 16
        s["noise_var"] = (np.abs(g * 1e-6).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return codes, g, s, {"tile_rows": tile, "precision": "fp16", "g_range": G_MAX, "strategy": strategy}


@pytest.mark.parametrize("noise", ["none", "exact", "fast", "variance"])
@pytest.mark.parametrize(("strategy", "tile"), FUSED)
def test_fused_reads_match_oracle_and_repeat(cuda_device, strategy, tile, noise):
    codes, g, s, way = fused_read(cuda_device, strategy, tile, noise)
    y = run(cuda_device, ops.tile_mvm, codes, g, **s, **way)
    assert_matches(y, reference.tile_mvm(codes, g, tile=tile, **s), 1e-7)
    for _ in range(REPEATS):
        np.testing.assert_array_equal(run(cuda_device, ops.tile_mvm, codes, g, **s, **way), y)


@pytest.mark.parametrize("change", ["gate", "column", "streams", "two halves", "transposed"])
@pytest.mark.parametrize(("strategy", "tile"), FUSED[::5])
def test_fused_reads_are_those_of_the_epilogue(cuda_device, strategy, tile, change):
    """Integer conductances: partial sums are exact, so every bit is the same."""
    codes, g, s, way = fused_read(cuda_device, strategy, tile, "exact")
    g = np.random.default_rng(4).integers(-8, 9, g.shape).astype(np.float32)
    s |= {"v_lsb": 1.0, "adc_lsb": 55.0, "read_noise": 30.0}
    way["g_range"] = 8.0
    if change == "gate":
        s["want_gate"] = True
    elif change == "column":
        s["adc_lsb"] = np.linspace(50, 60, g.shape[2], dtype=np.float32)
    elif change == "streams":
        s |= {"stream_bits": 4, "streams": 2, "phases": 2, "adc_signed": True}
    elif change == "two halves":
        way["precision"] = "fp16x2"
    else:
        way |= {"transposed": True, "tile_cols": tile}
        codes = np.random.default_rng(2).integers(-127, 128, (261, 392)).astype(np.int16)
    got = run(cuda_device, ops.tile_mvm, codes, g, **s, **way)
    wanted = run(cuda_device, ops.tile_mvm, codes, g, **s, **{**way, "strategy": "epilogue"})
    for one, other in zip(*(r if change == "gate" else (r,) for r in (got, wanted)), strict=True):
        np.testing.assert_array_equal(one, other)
        assert np.isfinite(one).all()


@pytest.mark.parametrize("name", BYTES)
def test_bytes_are_the_oracle_bit_for_bit(cuda_device, name):
    rows, inputs, outputs, tile, planes, groups, offset, s = BYTES[name]
    codes, g = levels(rows, inputs, outputs, planes, groups, offset)
    s = {**BYTE_SETTINGS, "groups": groups, **s}
    expected = reference.tile_mvm(codes, g, tile=tile, **s)
    for _ in range(REPEATS):
        y = run(cuda_device, int8, codes, g, offset=offset, tile_rows=tile, **s)
        y, wanted = (r[0] if s.get("want_gate") else r for r in (y, expected))
        np.testing.assert_array_equal(y, wanted.astype(np.float32))


@pytest.mark.parametrize("name", KEPT)
def test_packed_conductances_are_kept_until_the_version_is_another(cuda_device, name):
    if KEPT[name][0] == "wgmma" and cuda_device.arch != "sm_90":
        pytest.skip(f"{cuda_device.arch} has no wgmma")
    kept = Kept(name)
    packed = kept.packed._replace(**{key: to_gpu(value) for key, value in kept.packed._asdict().items()})
    conv = kept.s.pop("conv", None)

    def read(packed=packed):
        return run(cuda_device, ops.tile_mvm, kept.codes, kept.g, packed=packed, conv=conv, **kept.s)

    fresh = read(None)
    assert np.isfinite(fresh).all()
    for version in range(3, 3 + REPEATS):
        packed.version.fill(version)
        packed.memory.fill(0)
        np.testing.assert_array_equal(read(), fresh)
        np.testing.assert_array_equal(read(), fresh)
        packed.memory.fill(0)
        assert not np.array_equal(read(), fresh)
        assert not from_gpu(packed.memory).any()


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_gathered_patches_are_the_unfolded_read(cuda_device, name):
    """Bit for bit, and again: partial sums are integers."""
    conv, groups, images, tile, planes, s, _ = CONVOLUTIONS[name]
    codes, g = images_and_kernels(conv, groups, images, 8, planes)
    s = {**s, "groups": groups, "conv": conv, "tile": tile}
    unfolded = run(cuda_device, read_images, codes, g, strategy="epilogue", **s)
    assert np.isfinite(unfolded).all()
    hopper = ("implicit-wgmma",) * (cuda_device.arch == "sm_90" and name in BY_POSITION)
    for strategy in ("implicit", *hopper) * REPEATS:
        gathered = run(cuda_device, read_images, codes, g, strategy=strategy, **s)
        np.testing.assert_array_equal(np.stack(gathered), np.stack(unfolded))


# ---- converting


@pytest.mark.parametrize("shape", [(7, 33), (8, 32), (1, 1), (3, 2, 5), (0, 4), (4099, 1031)])
def test_dac_codes_match_oracle(cuda_device, shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for lsb in (0.02, np.linspace(0.01, 0.05, len(x)).astype(np.float32)):
        codes = run(cuda_device, ops.dac_quantize, x, lsb=lsb, code_max=127)
        expected = reference.dac_quantize(x, lsb=np.asarray(lsb), code_max=127)
        assert codes.dtype == np.int16
        off = codes.astype(int) - expected
        # x times 1 / lsb in float32 may fall to the other side of a rounding edge
        assert np.abs(off).max(initial=0) <= 1
        assert (off != 0).sum() <= 1e-4 * x.size


@pytest.mark.parametrize("signed", [True, False])
def test_gradients_of_a_dac_range_match_oracle(cuda_device, signed):
    import torch

    from gpuxbar.bridge.dac_clip import dac_clip_gradient

    grad, x = np.random.default_rng(0).normal(size=(2, 4099, 31)).astype(np.float32)
    arrays = (torch.from_numpy(a).cuda() for a in (grad, x))
    grad_x, grad_top = dac_clip_gradient(*arrays, torch.tensor([1.5]).cuda(), 7, signed)
    expected, slope = reference.dac_clip_gradient(grad, x, top=1.5, code_max=7, signed=signed)
    np.testing.assert_array_equal(grad_x.cpu(), expected)
    assert grad_top.item() == pytest.approx(slope, abs=1e-6 * float(np.abs(grad).sum()))


# ---- ageing


@pytest.mark.parametrize("shape", [(2, 5, 67), (3, 130, 72), (0, 3, 3)])
def test_drift_matches_oracle(cuda_device, shape):
    g, law = drift_case(shape), DRIFTS["pcm"]
    for age in (0.0, YEAR):
        found = run(cuda_device, ops.drift, g, age=age, law=law, g_max=DRIFT_G_MAX, seed=DRIFT_SEED, step=9)
        np.testing.assert_allclose(found, drift_oracle(g, age, law), rtol=0, atol=1e-5 * DRIFT_G_MAX)


@pytest.mark.parametrize("shape", [(2, 5, 67), (2, 130, 72), (2, 0, 4)])
def test_relaxing_matches_oracle(cuda_device, shape):
    g, law = drift_case(shape), Retention(tau=3.0, spread=0.5, g_rest=5e-6)
    count = np.random.default_rng(1).integers(-1, 2, shape).astype(np.int32)
    pairs = ops.Pairs(
        to_gpu(g), law=ConstantStep(), endurance=Endurance(pulses=9), pulse_count=to_gpu(count), g_min=1e-6, g_max=DRIFT_G_MAX,
        seed=7,
    )  # fmt: skip
    ops.relax(pairs, law, device=cuda_device)
    expected = np.where(count < 0, g, reference.relax(g, g_rest=5e-6, rate=1 / 3, spread=0.5, seed=7))
    np.testing.assert_allclose(from_gpu(pairs.g), expected, rtol=0, atol=1e-5 * DRIFT_G_MAX)


@pytest.mark.parametrize("strategy", ["fused", "epilogue"])
def test_a_dac_on_the_way_gives_the_same_bits(cuda_device, strategy):
    rng = np.random.default_rng(0)
    x, g = (
        rng.normal(size=(300, 200)).astype(np.float32),
        rng.integers(-8, 9, (1, 200, 72)).astype(np.float32),
    )
    s = {
        "tile_rows": 64,
        "adc_bits": 8,
        "adc_lsb": 40.0,
        "precision": "fp16",
        "g_range": 8.0,
        "strategy": strategy,
    }
    lsb, codes = (
        to_gpu(rng.uniform(0.01, 0.03, 300).astype(np.float32)),
        to_gpu(np.zeros((300, 200), np.int16)),
    )
    apart = ops.dac_quantize(to_gpu(x), lsb=lsb, code_max=127, device=cuda_device)
    dac = ops.Dac(lsb, 127, codes=codes)
    y = ops.tile_mvm(to_gpu(x), to_gpu(g), dac=dac, device=cuda_device, **s)
    np.testing.assert_array_equal(from_gpu(codes), from_gpu(apart))
    np.testing.assert_array_equal(from_gpu(y), run(cuda_device, ops.tile_mvm, from_gpu(apart), g, **s))


def test_chopping_matches_oracle(cuda_device):
    sign, lines = np.ones((3, 700), np.float32), np.random.default_rng(0).permutation(700)[:300]
    expected = reference.chop(sign, lines, flip=0.3, step=9, seed=7)
    chopped = to_gpu(sign)
    ops.chop(chopped, to_gpu(lines), flip=0.3, step=to_gpu(np.array([9])), seed=7, device=cuda_device)
    np.testing.assert_array_equal(from_gpu(chopped), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_slices_match_oracle(cuda_device, scheme):
    """Updates, then carries whose time is told in device memory."""
    s = lie(3, 2, 2, scheme=scheme, interval=3)
    g, w_max = sliced_cells(6, 74, 35), np.ones(70, np.float32)
    dw = np.random.default_rng(1).normal(0, 0.1, (2, 35, 37)).astype(np.float32)
    plain = pairs_of(g, s, Agarwal(nu=2.0), seed=7).plain
    expected, _, weights = reference.device_update(g, dw, w_max=w_max, step=3, **plain)
    pairs = pairs_of(to_gpu(g), s, Agarwal(nu=2.0), seed=7)
    read = ops.device_update(pairs, to_gpu(dw), w_max=to_gpu(w_max), step=3, device=cuda_device)
    np.testing.assert_allclose(from_gpu(pairs.g), expected, rtol=0, atol=1e-5 * RANGE)
    np.testing.assert_allclose(from_gpu(read), weights, rtol=0, atol=1e-4)
    before = from_gpu(pairs.g)
    for updates in (2, 3, 48):
        pairs = pairs_of(to_gpu(before), s, write_noise=1e-7, stuck_at_g_min=0.1, seed=7)
        expected, written = carried(before, pairs, updates)
        ops.carry(pairs, updates=to_gpu(np.full(1, updates)), device=cuda_device)
        close = np.abs(from_gpu(pairs.g) - expected) <= 1e-5 * RANGE
        assert close.mean() > 1 - 1e-3  # digits on an edge
        assert written.any() == (updates != 2)


@pytest.mark.parametrize("mode", ["exact", "aggregated"])
def test_slices_are_pulsed_as_the_oracle_says(cuda_device, mode):
    s, rng = lie(3, 2, 2, scheme="periodic"), np.random.default_rng(1)
    g, w_max = sliced_cells(6, 74, 35), np.ones(70, np.float32)
    x, d = (rng.normal(size=(40, n)).astype(np.float32) for n in (74, 70))
    law, train = ConstantStep(pulses=200, cycle=0.3, step_spread=0.3), PulseTrain(mode=mode)
    how, plain = {"rate": 0.01, "groups": 2, "step": 3}, pairs_of(g, s, law, seed=7).plain
    expected, _, weights = reference.pulse_update(
        g, x, d, train=train.model_dump(), w_max=w_max, **plain, **how
    )
    pairs = pairs_of(to_gpu(g), s, law, seed=7)
    read = ops.pulse_update(
        pairs, to_gpu(x), to_gpu(d), train=train, w_max=to_gpu(w_max), device=cuda_device, **how
    )
    np.testing.assert_allclose(from_gpu(pairs.g), expected, rtol=0, atol=1e-5 * RANGE)
    np.testing.assert_allclose(from_gpu(read), weights, rtol=0, atol=1e-4)


@pytest.mark.parametrize("images", [False, True], ids=["matrix", "images"])
def test_slices_are_streamed_as_the_oracle_says(cuda_device, images):
    """Of whole codes and units in powers of two, which no backend can cut otherwise."""
    s, rng = lie(3, 2, 3, scheme="streamed", input_bits=6), np.random.default_rng(1)
    conv = ops.ConvGeometry(2, 7, 9, (3, 3), stride=(2, 1), padding=(1, 1)) if images else None
    inputs = conv.inputs if conv else 37
    shapes = ((3, 4, 7, 9), (3, 10, *conv.out)) if conv else ((40, 74), (40, 10))
    x, d = (rng.integers(-63, 64, shape).astype(np.float32) for shape in shapes)
    x[0].fill(63)
    g, w_max = sliced_cells(6, 2 * inputs, 5), np.full(10, 63, np.float32)
    law = Agarwal(nu=1, gamma=0.05)
    how, plain = {"rate": 2.0**-7, "groups": 2, "conv": conv, "step": 3}, pairs_of(g, s, law, seed=7).plain
    expected, _, weights = reference.streamed_update(g, x, d, w_max=w_max, **plain, **how)
    pairs = pairs_of(to_gpu(g), s, law, seed=7)
    read = ops.streamed_update(pairs, to_gpu(x), to_gpu(d), w_max=to_gpu(w_max), device=cuda_device, **how)
    np.testing.assert_allclose(from_gpu(pairs.g), expected, rtol=0, atol=1e-5 * RANGE)
    np.testing.assert_allclose(from_gpu(read), weights, rtol=0, atol=1e-4 * 63)


@pytest.mark.parametrize("write_noise", [0.0, 1e-7])
@pytest.mark.parametrize("op", ["device_update", "pulse_update"])
def test_devices_wear_out_as_the_oracle_says(cuda_device, op, write_noise):
    rng, g, count, w_max = wear_case(2, 37, 35)
    law, endurance = (
        ConstantStep(pulses=50, write_noise=write_noise),
        Endurance(pulses=100, spread=0.5, failed="g_max"),
    )
    made, how = {"law": law, "endurance": endurance, **WINDOW, "seed": 7}, {"w_max": w_max, "step": 3}
    if op == "device_update":
        arrays, trains = [rng.normal(0, 0.6, (2, 37, 35)).astype(np.float32)], ({}, {})
    else:
        arrays = [rng.normal(0, 1, (6, n)).astype(np.float32) for n in (70, 74)]
        how |= {"rate": 0.3, "groups": 2}
        train = PulseTrain(length=31)
        trains = {"train": train}, {"train": train.model_dump()}
    taken, cells, wanted_count = to_gpu(count), to_gpu(g), count.copy()
    there = {name: to_gpu(value) for name, value in how.items()}
    held = g + np.float32(5e-8) if write_noise else None
    pairs = ops.Pairs(cells, pulse_count=taken, g_held=None if held is None else to_gpu(held), **made)
    getattr(ops, op)(pairs, *map(to_gpu, arrays), device=cuda_device, **there, **trains[0])
    plain = ops.Pairs(g, pulse_count=wanted_count, g_held=held, **made).plain
    wanted = getattr(reference, op)(g, *arrays, g_held=held, **plain, **how, **trains[1])[0]
    off = from_gpu(taken) != wanted_count
    assert off.mean() < 2e-3  # parts of a pulse on a rounding edge
    np.testing.assert_allclose(from_gpu(cells)[~off], wanted[~off], rtol=0, atol=1e-4 * 9e-6)


@pytest.mark.parametrize("mode", ["exact", "aggregated"])
def test_images_pulse_as_the_oracle_says(cuda_device, mode):
    """Patches of images, gathered by the kernel that makes the trains."""
    rng, conv = np.random.default_rng(0), ops.ConvGeometry(2, 7, 9, (3, 3), stride=(2, 1), padding=(1, 1))
    g = rng.uniform(1e-6, 10e-6, (2, 2 * conv.inputs, 5)).astype(np.float32)
    x = np.maximum(rng.normal(0.3, 1, (3, 4, 7, 9)), 0).astype(np.float32)
    d = rng.normal(0, 0.1, (3, 10, *conv.out)).astype(np.float32)
    law, train = ConstantStep(pulses=200, step_spread=0.3), PulseTrain(mode=mode)
    how = {"rate": 0.1, "w_max": np.ones(10, np.float32), "groups": 2, "conv": conv}
    plain = ops.Pairs(g, law=law, seed=7, **WINDOW).plain
    wanted, *_ = reference.pulse_update(g, x, d, train=train.model_dump(), **plain, **how)
    pairs = ops.Pairs(to_gpu(g), law=law, seed=7, **WINDOW)
    there = {name: to_gpu(value) for name, value in how.items()}
    ops.pulse_update(pairs, to_gpu(x), to_gpu(d), train=train, device=cuda_device, **there)
    np.testing.assert_allclose(from_gpu(pairs.g), wanted, rtol=0, atol=1e-4 * 9e-6)


# ---- programming


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("shape", WEIGHT_SHAPES)
def test_programming_matches_oracle(cuda_device, shape, mapping, device):
    weight, w_max = weights(shape)
    s = {
        "w_max": w_max,
        **WINDOW,
        **MAPPINGS[mapping],
        **DEVICES[device],
        "seed": WRITE_SEED,
        "step": 2**33 + 9,
    }
    s |= {"sigma_g": 0.3e-6, "exponent": 0.7}
    g, variance = run(cuda_device, ops.program, weight, **told(s))
    expected, expected_variance = reference.program(weight, **s)
    assert_programmed(g, expected, s)
    if variance.size:
        off = np.abs(variance - expected_variance)
        assert (off <= 1e-5 * expected_variance.max()).mean() >= 1 - 5e-3
    again = run(cuda_device, ops.program, weight, **told(s))
    np.testing.assert_array_equal(again[0], g)
    np.testing.assert_array_equal(again[1], variance)


def test_weights_that_are_not_finite_poison_their_cells(cuda_device):
    weight, w_max = weights((2, 9, 7))
    weight[1, 5, 2] = np.nan
    g = run(cuda_device, ops.program, weight, w_max=w_max, **WINDOW)
    where = np.zeros(g.shape[1:], bool)
    where[7 + 2, 5] = True
    assert np.isnan(g[:, where]).all()
    assert np.isfinite(g[:, ~where]).all()


class Layer:
    """The arrays of a layer on the GPU."""

    def __init__(self, weight):
        import cupy

        groups, outputs, inputs = weight.shape
        self.weight = cupy.asarray(weight)
        self.g = cupy.full((2, groups * inputs, outputs), np.nan, "float32")
        self.w_max = cupy.full(groups * outputs, np.nan, "float32")
        self.state, self.write_step = cupy.zeros(2, "int64"), cupy.zeros(1, "int64")

    def reprogram(self, device, **s):
        s = {**WINDOW, "write_noise": 1e-7, "seed": WRITE_SEED, "write_step": self.write_step} | s
        ops.reprogram(self.weight, self.g, self.w_max, self.state, device=device, **told(s))

    def wrote(self, device, **s):
        """Call `reprogram`; whether it filled `g`, which is kept if not."""
        before = self.g.copy()
        self.g.fill(np.nan)
        self.reprogram(device, **s)
        unwritten = np.isnan(from_gpu(self.g))
        if not unwritten.any():
            return True
        assert unwritten.all()
        self.g[...] = before
        return False


def assert_is_programmed(layer, weight, w_max, write_step=0):
    """State and scale are exact, conductances those of the oracle."""
    version = (reference.fingerprint(weight) + write_step) % 2**64
    np.testing.assert_array_equal(from_gpu(layer.state).view(np.uint64), np.uint64(version))
    np.testing.assert_array_equal(from_gpu(layer.w_max), w_max)
    s = {"w_max": w_max, **WINDOW, "write_noise": 1e-7, "seed": WRITE_SEED, "step": version & 0xFFFFFFFF}
    assert_programmed(from_gpu(layer.g), reference.program(weight, **s), s)


@pytest.mark.parametrize("scale", ["tensor", "column"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 19, 71), (2, 17, 2500), (1, 1031, 509)])
def test_reprogramming_follows_the_weights(cuda_device, shape, scale):
    weight, _ = weights(shape)
    layer = Layer(weight)

    def largest(weight):
        top = np.abs(weight).max(axis=2).ravel()
        top = top if scale == "column" else np.full_like(top, top.max())
        return np.maximum(top, np.float32(1e-30))

    assert layer.wrote(cuda_device, scale=scale)
    assert_is_programmed(layer, weight, largest(weight))
    first = from_gpu(layer.g)
    for _ in range(REPEATS):
        assert not layer.wrote(cuda_device, scale=scale)
    changed = weight.copy()
    changed[-1, -1, -1] = np.nextafter(weight[-1, -1, -1], np.float32(9))
    layer.weight[...] = to_gpu(changed)
    assert layer.wrote(cuda_device, scale=scale)
    assert_is_programmed(layer, changed, largest(changed))
    layer.weight[...] = to_gpu(weight)
    assert layer.wrote(cuda_device, scale=scale)
    np.testing.assert_array_equal(from_gpu(layer.g), first)  # bit-equal: a function of the weights
    layer.write_step += 1
    assert layer.wrote(cuda_device, scale=scale)
    assert_is_programmed(layer, weight, largest(weight), write_step=1)


def test_a_full_weight_clips(cuda_device):
    weight, _ = weights((2, 19, 33))
    layer = Layer(weight)
    assert layer.wrote(cuda_device, full_weight=0.25)
    assert_is_programmed(layer, weight, np.full(38, 0.25, np.float32))


# ---- CUDA graphs: a warm-up compiles and loads; what is allocated during the capture must live as long as the graph


def test_a_captured_read_replays_with_fresh_noise(cuda_device):
    import cupy

    codes, g, s = noisy_read()
    device = cuda_device.like(keep=True)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        v, planes, step = to_gpu(codes), to_gpu(g), cupy.zeros(1, "int64")

        def read():
            nonlocal step
            step += 1
            return ops.tile_mvm(v, planes, tile_rows=64, step=step, device=device, **s)

        eager = [from_gpu(read()) for _ in range(3)]
        step.fill(0)
        stream.begin_capture()
        y = read()
        graph = stream.end_capture()
        for expected in eager:
            graph.launch()
            np.testing.assert_array_equal(from_gpu(y), expected)
    assert not np.array_equal(eager[0], eager[1])


def test_a_captured_step_reprograms_what_changed(cuda_device):
    """One graph: change the weights on the device, program them, read them."""
    import cupy

    weight, _ = weights((1, 40, 96))
    codes, _ = case(32, 96, 1)
    device = cuda_device.like(keep=True)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        layer, v, change = Layer(weight), to_gpu(codes), cupy.zeros(1, "float32")

        def step():
            layer.weight += change
            layer.reprogram(device)
            return ops.tile_mvm(v, layer.g, slice_scale=slice_scale, device=device)

        slice_scale = to_gpu(np.array([1.0, -1.0], np.float32))
        step()
        stream.begin_capture()
        y = step()
        graph = stream.end_capture()
        w = weight.copy()
        for amount in (0.0, 0.5, 0.0, -0.25):
            change.fill(amount)
            layer.g.fill(np.nan)
            graph.launch()
            w += np.float32(amount)
            if amount:
                assert_is_programmed(layer, w, np.full(40, np.abs(w).max(), np.float32))
                expected = reference.tile_mvm(codes, from_gpu(layer.g), slice_scale=[1.0, -1.0])
                assert_matches(from_gpu(y), expected, 0.0)
            else:
                assert np.isnan(from_gpu(layer.g)).all()  # unchanged weights are not written again


def test_layers_of_a_window_read_what_was_programmed(cuda_device):
    """Program, then read every wordline alone: Ohm's law on each device."""
    weight, w_max = weights((1, 13, 17))
    g = run(cuda_device, ops.program, weight, w_max=w_max, **WINDOW)
    y = run(cuda_device, ops.tile_mvm, np.eye(17, dtype=np.float32), g[:1])
    np.testing.assert_allclose(y, G_MIN + np.clip((weight[0] / w_max[:, None]).T, 0, 1) * RANGE, rtol=1e-5)


@pytest.fixture
def deterministic():
    import torch

    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        yield


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_captured_training_step_is_the_step(cuda_device, deterministic, kind, monkeypatch):
    """Reads, transposed reads, update and reprogramming in one graph: losses and every state, bit for bit."""
    if "keep_packed" in SETTINGS[kind]:
        fuse(monkeypatch)
    eager, other = Run(kind, device="cuda"), Run(kind, device="cuda")
    before = other.state()
    step = other.captured()
    assert same(other.state()[: len(before)], before)
    for i in range(4):
        batch = [part.roll(i // 2, 0) for part in eager.batch]
        assert step(*batch) == eager.eager(*batch), i
        assert same(other.state(), eager.state()), i
    assert other.eager(*batch) == eager.eager(*batch)


def test_every_replay_draws_its_noise(cuda_device, deterministic):
    run = Run("digital", lr=1e-30, device="cuda")
    step = run.captured()
    losses = [step(*run.batch).item() for _ in range(3)]
    assert len(set(losses)) == 3
    for layer in (run.model[0], run.model[4]):
        layer.read_step.zero_()
    assert [step(*run.batch).item() for _ in range(3)] == losses


def test_a_step_is_captured_on_a_device_that_is_not_current(cuda_device, deterministic):
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU alone was found")
    eager, other = Run("digital", device="cuda:1"), Run("digital", device="cuda:1")
    step = other.captured()
    for _ in range(2):
        assert step(*eager.batch) == eager.eager(*eager.batch)
    assert same(other.state(), eager.state())


def test_tensors_of_two_devices_are_refused(cuda_device):
    import torch

    from gpuxbar.bridge.chop import chop

    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU alone was found")
    lines, step = (torch.arange(n, device="cuda:1") for n in (3, 1))
    with pytest.raises(
        ValueError,
        match=r"^gpuxbar: tensors of one call must be on one device, got one on cuda:1 and another on cuda:0;",
    ):
        chop(torch.ones(2, 5, device="cuda:0"), lines, step, 0.5, 7)


def test_a_residual_network_is_captured(cuda_device):
    from gpuxbar.bench.gpu.steps import check_steps

    assert check_steps() == "same bits as without capture"


# ---- wires


@pytest.mark.parametrize("method", reference.METHODS)
@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (20, 37), (70, 30), (128, 128), (200, 256)])
def test_wires_match_oracle(cuda_device, shape, method):
    g, w = tiles(3, *shape), wires("lines", *shape)
    found = run(cuda_device, ops.effective_conductance, g, method=method, **w)
    expected = reference.effective_conductance(g, method=method, **w)
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize(("arithmetic", "bound"), [("3xtf32", 5e-6), ("tf32", 2e-3)])
@pytest.mark.parametrize("shape", [(70, 30), (128, 128), (200, 256)])
def test_arithmetics_of_wires_are_as_exact_as_said(cuda_device, shape, arithmetic, bound):
    g, w = tiles(3, *shape), wires("lines", *shape)
    found = run(cuda_device, ops.effective_conductance, g, arithmetic=arithmetic, **w)
    expected = reference.effective_conductance(g, **w)
    assert np.linalg.norm(found - expected) < bound * np.linalg.norm(expected)


@pytest.mark.parametrize("shape", [(2, 3, 9, 6), (3, 2, 70, 30), (1, 4, 128, 128)])
def test_shared_drivers_match_oracle(cuda_device, shape):
    g, w = tiles(*shape), wires("lines", *shape[-2:])
    for each in (w, {**w, "r_source": 70.0}):
        found = run(cuda_device, ops.effective_conductance, g, shared_drivers=True, **each)
        expected = reference.effective_conductance(g, shared_drivers=True, **each)
        assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 16, 16), (3, 20, 37), (3, 70, 30), (1, 128, 128)])
def test_gradients_through_wires_match_oracle(cuda_device, monkeypatch, shape):
    """Of one large tile alone: the oracle takes seconds for each."""
    g, w = tiles(*shape), wires("lines", *shape[1:])
    grad = np.random.default_rng(1).normal(size=g.shape).astype(np.float32)
    found = run(cuda_device, ops.effective_conductance_gradient, g, grad, **w)
    expected = reference.effective_conductance_gradient(g, grad, **w)
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()
    for _ in range(REPEATS):
        again = run(cuda_device, ops.effective_conductance_gradient, g, grad, **w)
        np.testing.assert_array_equal(found, again)
    monkeypatch.setattr(cuda_device, "workspace", 1)
    alone = run(cuda_device, ops.effective_conductance_gradient, g, grad, **w)
    assert np.abs(alone - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("batch", "rows", "cols"),
    [(1, 1, 1), (3, 20, 37), (4, 128, 128), pytest.param(2, 200, 513, marks=ORACLE_IS_SLOW)],
)
def test_given_inputs_through_wires_match_oracle(cuda_device, monkeypatch, batch, rows, cols):
    """Currents and gradients, and the same bits again, and with memory for one input at a time."""
    rng = np.random.default_rng(1)
    g, w = tiles(3, rows, cols), wires("lines", rows, cols)
    v, grad_i = (rng.normal(size=(3, batch, n)).astype(np.float32) for n in (rows, cols))

    def found():
        return (
            run(cuda_device, ops.solve_for_inputs, v, g, **w),
            *run(cuda_device, ops.solve_for_inputs_gradient, v, g, grad_i, **w),
        )

    expected = (
        reference.solve_for_inputs(v, g, **w),
        *reference.solve_for_inputs_gradient(v, g, grad_i, **w),
    )
    first = found()
    for mine, oracle in zip(first, expected, strict=True):
        assert np.abs(mine - oracle).max() < 2e-5 * np.abs(oracle).max()
    for _ in range(REPEATS):
        for mine, before in zip(found(), first, strict=True):
            np.testing.assert_array_equal(mine, before)
    monkeypatch.setattr(cuda_device, "workspace", 1)
    for mine, before in zip(found(), first, strict=True):
        np.testing.assert_array_equal(mine, before)


def test_inputs_that_do_not_converge_are_nan(cuda_device):
    g = tiles(2, 20, 37)
    v = np.random.default_rng(1).normal(size=(2, 3, 20)).astype(np.float32)
    first = run(cuda_device, ops.solve_for_inputs, v, g, **WIRES["strong"])
    v[1, 2, 7] = np.nan
    found = run(cuda_device, ops.solve_for_inputs, v, g, **WIRES["strong"])
    assert np.isnan(found[1, 2]).all()
    found[1, 2] = first[1, 2]
    np.testing.assert_array_equal(found, first)


def test_layers_and_tensors_have_the_gradient_through_wires(cuda_device):
    import torch

    import gpuxbar as gx
    from gpuxbar import bridge

    wires = {"r_wordline": 20.0, "r_bitline": 10.0, "r_source": 500.0, "r_sink": 100.0}
    spec = {
        "tile": {"rows": 20, "cols": 30},
        "parasitics": {**wires, "terminations": "line", "gradient": "exact"},
    }
    grads = {}
    for place in ("cpu", "cuda"):
        torch.manual_seed(0)
        layer = gx.nn.AnalogLinear(50, 70, spec=gx.CrossbarSpec.model_validate(spec)).to(place)
        layer(torch.randn(9, 50).to(place)).square().sum().backward()
        g = torch.rand(2, 30, 40).mul(1e-4).to(place).requires_grad_()
        lines = {**wires, "r_sink": torch.linspace(0, 200, 40).to(place)}
        bridge.effective_conductance(g, **lines).square().sum().backward()
        grads[place] = [x.grad.cpu() for x in (layer.weight, g)]
    for host, device in zip(grads["cpu"], grads["cuda"], strict=True):
        assert (device - host).abs().max() < 1e-4 * host.abs().max()


def test_wires_do_not_depend_on_the_workspace_and_repeat(cuda_device, monkeypatch):
    g = tiles(9, 70, 40)
    first = run(cuda_device, ops.effective_conductance, g, **WIRES["strong"])
    for _ in range(REPEATS):
        np.testing.assert_array_equal(
            first, run(cuda_device, ops.effective_conductance, g, **WIRES["strong"])
        )
    monkeypatch.setattr(cuda_device, "workspace", 1 << 20)
    found = run(cuda_device, ops.effective_conductance, g, **WIRES["strong"])
    np.testing.assert_allclose(found, first, rtol=0, atol=2e-6 * first.max())


@pytest.mark.parametrize("approximation", ["ladder", "mean_field"])
@pytest.mark.parametrize("shape", [(5, 20, 12), (700, 5, 3)])
def test_anchored_wires_follow_the_host(cuda_device, shape, approximation):
    """Tiles due by age, by their error, and out of turn; an update without a change changes nothing."""
    host, anchor = ops.Anchor.new(shape), ops.Anchor(*map(to_gpu, ops.Anchor.new(shape)))
    for step, g in enumerate(drifting(shape, 8)):
        g[step % 4] *= 1.0 + 0.1 * step
        s = {"refresh_interval": 3, "approximation": approximation, "solve_all": step == 0, **WIRES["strong"]}
        moved = np.array([step != 5], np.int32)
        expected = ops.anchored_conductance(g, host, update=step != 5, **s)
        found = from_gpu(
            ops.anchored_conductance(to_gpu(g), anchor, update=to_gpu(moved), device=cuda_device, **s)
        )
        np.testing.assert_allclose(found, expected, atol=2e-6 * expected.max())
        np.testing.assert_array_equal(from_gpu(anchor.age), host.age)
        np.testing.assert_array_equal(from_gpu(anchor.g), host.g)


def test_anchored_wires_stay_near_the_oracle(cuda_device):
    anchor = ops.Anchor(*map(to_gpu, ops.Anchor.new((6, 33, 70))))
    for step, g in enumerate(drifting((6, 33, 70), 7)):
        s = {"refresh_interval": 3, "solve_all": step == 0, "device": cuda_device, **WIRES["strong"]}
        found = from_gpu(ops.anchored_conductance(to_gpu(g), anchor, **s))
        expected = reference.effective_conductance(g, **WIRES["strong"])
        off, size = (np.linalg.norm(x, axis=(1, 2)) for x in (found - expected, expected))
        assert (off / size).max() < 1e-3
        solved = (from_gpu(anchor.g) == g).all((1, 2))
        assert solved.any()
        assert (off / size)[solved].max() < 5e-6


def test_a_captured_update_chooses_its_tiles_anew(cuda_device):
    """One graph, whatever is due at its replays."""
    import cupy

    shape = (7, 20, 12)
    host, device = ops.Anchor.new(shape), cuda_device.like(keep=True)
    s = {"refresh_interval": 3, **WIRES["strong"]}
    first, *later = drifting(shape, 9)
    ops.anchored_conductance(first, host, solve_all=True, **s)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        g, moved = to_gpu(first), cupy.zeros(1, "int32")
        anchor = ops.Anchor(*map(to_gpu, ops.Anchor.new(shape)))
        ops.anchored_conductance(g, anchor, solve_all=True, device=device, **s)

        def update():
            return ops.anchored_conductance(g, anchor, update=moved, device=device, **s)

        update()
        stream.begin_capture()
        found = update()
        graph = stream.end_capture()
        moved.fill(1)
        for step, now in enumerate(later):
            now[step % 4] *= 1.0 + 0.1 * step
            g.set(now)
            graph.launch()
            expected = ops.anchored_conductance(now, host, **s)
            np.testing.assert_allclose(from_gpu(found), expected, atol=2e-6 * expected.max())
            np.testing.assert_array_equal(from_gpu(anchor.age), host.age)
