"""Every kernel at work on a device of the tests: small shapes with odd edges, most options at once."""

from __future__ import annotations

from functools import partial

import numpy as np

from gpuxbar import ops
from gpuxbar.bench.gpu import ceilings
from gpuxbar.ops import ConvGeometry
from gpuxbar.spec import (
    Agarwal,
    Carry,
    ConstantStep,
    Endurance,
    Programming,
    PulseTrain,
    Retention,
    SoftBounds,
    presets,
)

__all__ = ["run"]

CONV = ConvGeometry(3, 7, 5, (3, 2), (2, 1), (1, 1))


def run(device):
    """Launches all of them."""
    rng = np.random.default_rng(0)
    x = normal(rng, 3, 3, 7, 5)
    reads(device, rng, x)
    cells = np.abs(normal(rng, 2, 18, 7))
    updates(device, rng, x, cells)
    programs(device, rng, cells)
    wires(device)
    ceilings.check(device, np.asarray, np.asarray, ceilings.units_of(device.arch))


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def reads(device, rng, x):
    codes = ops.dac_quantize(x, lsb=0.02, code_max=127, device=device)
    g = normal(rng, 2, CONV.inputs, 7)
    read = partial(
        ops.tile_mvm, conv=CONV, adc_bits=8, adc_lsb=1.0, read_noise=1.0, device=device, precision="fp16x2", g_range=4.0
    )  # fmt: skip
    if device.arch == "sm_90":
        read(codes, g, tile_rows=5, noise_var=np.abs(g), strategy="wgmma")
    for strategy in ("epilogue", "fused", "implicit"):
        read(codes, g, tile_rows=5, want_gate=True, noise_var=np.abs(g), generator="fast", strategy=strategy)
    for strategy in ("epilogue", "fused"):
        read(codes, g, tile_rows=5, noise_var=np.abs(g), strategy=strategy, precision="bf16")
    back = rng.integers(-9, 9, (3, 7, *CONV.out)).astype(np.int16)
    read(back, g, tile_cols=3, transposed=True, adc_inl=normal(rng, 2, 3, CONV.inputs))
    drivers = ops.Drivers(v_read=127.0, error=1 + 0.1 * normal(rng, 3, 18), v_sinh=60.0)
    ops.tile_mvm(codes.reshape(3, -1)[:, :18].copy(), g, device=device, drivers=drivers)


def updates(device, rng, x, cells):
    """Of pairs `cells`, and of three slices."""
    how = {"w_max": np.ones(7, np.float32), "device": device}
    window = {"g_min": 0, "g_max": 1}
    wear = {
        "endurance": Endurance(pulses=20, spread=0.5, failed="g_max"),
        "pulse_count": np.zeros((2, 18, 7), np.int32),
    }
    inputs, errors, change = normal(rng, 3, 18), normal(rng, 3, 7), normal(rng, 1, 7, 18)
    pair = ops.Pairs(cells, law=Agarwal(nu=1, gamma=0.1, spread=0.1), **wear, **window)
    ops.device_update(pair, change, **how)

    digits, held = rng.uniform(size=(6, 18, 7)).astype(np.float32), np.zeros((6, 18, 7), np.float32)

    def slices(carry, law, **more):
        return ops.Pairs(digits, law=law, slice_bits=2, carry=carry, **window, **more)

    noisy = Agarwal(write_noise=0.01)
    counted = {"endurance": wear["endurance"], "pulse_count": np.zeros((6, 18, 7), np.int32)}
    writes = Programming(write_noise=0.01, stuck_at_g_min=0.1)
    ops.carry(slices(Carry(), noisy, g_held=held, programming=writes, **counted), updates=64, device=device)
    ops.device_update(slices(Carry(), noisy, g_held=held), change, **how)
    streams = slices(Carry(scheme="streamed", input_bits=5), noisy, g_held=held)
    ops.streamed_update(streams, inputs, errors, rate=1.0, **how)
    ops.streamed_update(streams, x, normal(rng, 3, 7, *CONV.out), rate=1.0, conv=CONV, **how)

    step = ConstantStep(pulses=50)
    counting = ops.Pairs(cells, law=step, programming=Programming(stuck_at_g_min=0.1), **wear, **window)
    for mode in ("exact", "aggregated"):
        for pairs in (ops.Pairs(cells, law=step, **wear, **window), slices(Carry(scheme="periodic"), step)):
            ops.pulse_update(pairs, inputs, errors, rate=0.1, train=PulseTrain(mode=mode), **how)
    shown = ops.Pairs(cells, law=ConstantStep(write_noise=0.01), g_held=cells.copy(), **wear, **window)
    ops.pulse_update(shown, inputs, errors, rate=0.1, train=PulseTrain(), **how)
    ops.relax(counting, Retention(tau=3.0, spread=0.1), device=device)
    ops.chop(np.ones((2, 9), np.float32), np.arange(3, 8), flip=0.5, step=1, device=device)

    soft, shape = SoftBounds(spread=0.1, low_spread=0.1), (2, 18, 8)
    devices = ops.draw_device_map(soft, shape, seed=1)
    mapped = ops.Pairs(np.abs(normal(rng, *shape)), law=soft, device_map=devices, **window)
    ops.device_update(mapped, normal(rng, 1, 8, 18), w_max=np.ones(8, np.float32), device=device)


def programs(device, rng, cells):
    for aged in (presets.pcm(), presets.reram()):
        ops.drift(cells, 60.0, law=aged.drift, g_max=1.0, device=device)
    weight = normal(rng, 3, 37, 11)
    writes = Programming(device_spread=0.1, write_noise=1e-7, stuck_at_g_min=0.1)
    window = {"g_min": 1e-6, "g_max": 1e-5, "programming": writes, "sigma_g": 1e-7, "device": device}
    planes, variance = np.empty((2, 6, 33, 37), np.float32)
    for scale in ("tensor", "column"):
        ops.reprogram(
            weight, planes, np.empty(111, np.float32), np.zeros(2, np.int64), variance, scale=scale, slices=3, slice_bits=2,
            write_step=np.ones(1, np.int64), **window,
        )  # fmt: skip
    ops.program(weight, w_max=np.ones(1, np.float32), merge="all", **window)


def wires(device):
    lines = {
        "r_wordline": 2.0, "r_bitline": 3.0, "r_source": np.ones(1, np.float32), "r_sink": 0.5, "device": device,
    }  # fmt: skip

    def tiles(*shape):
        return np.full(shape, 1e-4, np.float32)

    for method, shared in (("mean_field", False), ("exact", True)):
        ops.effective_conductance(
            tiles(2, 40, 20), method=method, shared_drivers=shared, arithmetic="3xtf32", **lines
        )
    ops.effective_conductance_gradient(tiles(1, 20, 9), tiles(1, 20, 9), **lines)
    ops.solve_for_inputs(tiles(2, 3, 20), tiles(2, 20, 9), **lines)
    ops.solve_for_inputs_gradient(tiles(2, 3, 5), tiles(2, 5, 130), tiles(2, 3, 130), **lines)
    ops.anchored_conductance(tiles(3, 9, 7), ops.Anchor.new((3, 9, 7)), update=np.ones(1, np.int32), **lines)
