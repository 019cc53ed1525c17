"""Every kernel at work on a device of the tests: small shapes with odd edges, most options at once."""

from __future__ import annotations

import numpy as np

from gpuxbar import ops
from gpuxbar.bench import ceilings
from gpuxbar.ops import ConvGeometry
from gpuxbar.spec import (
    Agarwal,
    Carry,
    ConstantStep,
    Endurance,
    Programming,
    PulseTrain,
    Retention,
    presets,
)

__all__ = ["run"]


def run(device):
    """Launches all of them."""
    rng = np.random.default_rng(0)
    conv = ConvGeometry(3, 7, 5, (3, 2), (2, 1), (1, 1))
    x = rng.normal(size=(3, 3, 7, 5)).astype(np.float32)
    codes = ops.dac_quantize(x, lsb=0.02, code_max=127, device=device)
    g = rng.normal(size=(2, conv.inputs, 7)).astype(np.float32)
    s = {
        "conv": conv,
        "adc_bits": 8,
        "adc_lsb": 1.0,
        "read_noise": 1.0,
        "device": device,
        "precision": "fp16x2",
        "g_range": 4.0,
    }
    ops.tile_mvm(codes, g, tile_rows=5, noise_var=np.abs(g), strategy="wgmma", **s)
    for strategy in ("epilogue", "fused", "implicit"):
        ops.tile_mvm(
            codes,
            g,
            tile_rows=5,
            want_gate=True,
            noise_var=np.abs(g),
            generator="fast",
            strategy=strategy,
            **s,
        )
    back = rng.integers(-9, 9, (3, 7, *conv.out)).astype(np.int16)
    ops.tile_mvm(back, g, tile_cols=3, transposed=True, **s)
    ops.tile_mvm(codes.reshape(3, -1)[:, :18].copy(), g, device=device)
    cells, ones = np.abs(rng.normal(size=(2, 18, 7))).astype(np.float32), np.ones(7, np.float32)
    law = Agarwal(nu=1, gamma=0.1, spread=0.1)
    wear = {
        "endurance": Endurance(pulses=20, spread=0.5, failed="g_max"),
        "pulse_count": np.zeros((2, 18, 7), np.int32),
    }
    ops.device_update(
        cells,
        rng.normal(size=(1, 7, 18)).astype(np.float32),
        law=law,
        w_max=ones,
        g_min=0,
        g_max=1,
        **wear,
        device=device,
    )
    for mode in ("exact", "aggregated"):
        ops.pulse_update(
            cells,
            rng.normal(size=(3, 18)).astype(np.float32),
            rng.normal(size=(3, 7)).astype(np.float32),
            rate=0.1,
            train=PulseTrain(mode=mode),
            law=ConstantStep(pulses=50),
            w_max=ones,
            g_min=0,
            g_max=1,
            **wear,
            device=device,
        )
    slices = {
        "slices": 3,
        "slice_bits": 2,
        "g_min": 0,
        "g_max": 1,
        "hidden": np.zeros((6, 18, 7), np.float32),
        "device": device,
    }
    digits = rng.uniform(size=(6, 18, 7)).astype(np.float32)
    ops.carry(
        digits,
        rule=Carry(),
        updates=64,
        programming=Programming(write_noise=0.01, stuck_at_g_min=0.1),
        pulse_count=np.zeros((6, 18, 7), np.int32),
        **slices,
    )
    ops.device_update(
        digits,
        rng.normal(size=(1, 7, 18)).astype(np.float32),
        law=Agarwal(write_noise=0.01),
        w_max=ones,
        carry=Carry(),
        **slices,
    )
    streamed = dict(
        rate=1.0,
        law=Agarwal(write_noise=0.01),
        w_max=ones,
        carry=Carry(scheme="streamed", input_bits=5),
        **slices,
    )
    ops.streamed_update(
        digits,
        rng.normal(size=(3, 18)).astype(np.float32),
        rng.normal(size=(3, 7)).astype(np.float32),
        **streamed,
    )
    ops.streamed_update(
        digits, x, rng.normal(size=(3, 7, *conv.out)).astype(np.float32), conv=conv, **streamed
    )
    del slices["hidden"]
    for mode in ("exact", "aggregated"):
        ops.pulse_update(
            digits,
            rng.normal(size=(3, 18)).astype(np.float32),
            rng.normal(size=(3, 7)).astype(np.float32),
            rate=0.1,
            train=PulseTrain(mode=mode),
            law=ConstantStep(pulses=50),
            w_max=ones,
            carry=Carry(scheme="periodic"),
            **slices,
        )
    ops.relax(
        cells,
        law=Retention(tau=3.0, spread=0.1),
        g_min=0,
        g_max=1,
        pulse_count=wear["pulse_count"],
        stuck_at_g_min=0.1,
        device=device,
    )
    ops.chop(np.ones((2, 9), np.float32), np.arange(3, 8), flip=0.5, step=1, device=device)
    ops.drift(cells, 60.0, law=presets.pcm().drift, g_max=1.0, device=device)
    weight = rng.normal(size=(3, 37, 11)).astype(np.float32)
    window = {
        "g_min": 1e-6,
        "g_max": 1e-5,
        "device_spread": 0.1,
        "write_noise": 1e-7,
        "stuck_at_g_min": 0.1,
        "sigma_g": 1e-7,
        "device": device,
    }
    planes, variance = np.empty((2, 6, 33, 37), np.float32)
    for scale in ("tensor", "column"):
        ops.reprogram(
            weight,
            planes,
            np.empty(111, np.float32),
            np.zeros(2, np.int64),
            variance,
            scale=scale,
            slices=3,
            slice_bits=2,
            write_step=np.ones(1, np.int64),
            **window,
        )
    ops.program(weight, w_max=np.ones(1, np.float32), merge="all", **window)
    wires = {"r_wordline": 2.0, "r_bitline": 3.0, "r_source": ones[:1], "r_sink": 0.5, "device": device}
    for method, shared in (("mean_field", False), ("exact", True)):
        ops.effective_conductance(
            np.full((2, 40, 20), 1e-4, np.float32),
            method=method,
            shared_drivers=shared,
            arithmetic="3xtf32",
            **wires,
        )
    ops.effective_conductance_gradient(*np.full((2, 1, 20, 9), 1e-4, np.float32), **wires)
    ops.anchored_conductance(
        np.full((3, 9, 7), 1e-4, np.float32), ops.Anchor.new((3, 9, 7)), update=np.ones(1, np.int32), **wires
    )
    ceilings.check(device, np.asarray, np.asarray, ceilings.units_of(device.arch))
