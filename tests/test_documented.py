"""A layer against a simulation of it in a few lines, written from what the settings say and from nothing else.

Every case draws its settings: mapping, slices, levels, tiles, DACs and ADCs of both directions, whole or streamed inputs, and the
curve of devices.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gpuxbar as gx
from gpuxbar.nn import AnalogLinear

CASES = 60


def draw_dac(rng, backward):
    dac = {"v_read": rng.uniform(0.1, 0.5), "range": str(rng.choice(["sample", "tensor", "fixed"]))}
    if dac["range"] == "fixed":
        dac["max"] = rng.uniform(0.5, 2)
    if rng.random() < 0.8:
        dac["bits"] = int(rng.choice([2, 3, 6, 8]))
        dac["polarity"] = str(rng.choice(["bipolar", "two_phase"]))
        if rng.random() < 0.5:
            dac["stream_bits"] = int(rng.choice([1, 2, 3]))
    if "bits" in dac and dac["range"] == "fixed" and rng.random() < 0.5:
        dac["range"] = "learned"
    return {"bits": None} | dac | {"signed": bool(backward or rng.random() < 0.7)}


def draw_adc(rng):
    if rng.random() < 0.2:
        return {"bits": None}
    kind = str(rng.choice(["fixed", "worst_case"]))
    adc = {"bits": int(rng.choice([4, 8, 11])), "range": kind}
    return adc | ({"i_max": rng.uniform(3e-6, 1e-5)} if kind == "fixed" else {})


def draw_spec(rng, scheme):
    mapping = {"scheme": scheme, "scale": str(rng.choice(["tensor", "column"]))}
    device = {"g_min": float(rng.choice([0, 1e-6])), "g_max": rng.uniform(0.9e-5, 1.1e-5)}
    if rng.random() < 0.3:
        mapping["w_max"] = 0.15
    if scheme != "offset" and rng.random() < 0.4:
        mapping |= {"slices": int(rng.integers(1, 4)), "slice_bits": int(rng.integers(1, 4))}
    elif rng.random() < 0.3:
        device["levels"] = int(rng.choice([4, 33]))
    backward = {
        "mode": str(rng.choice(["analog", "ideal"])),
        "dac": draw_dac(rng, True) | {"range": "sample", "max": None},
    }
    dac = draw_dac(rng, False)
    if rng.random() < 0.3:
        device["v_sinh"] = rng.uniform(0.3, 2) * dac["v_read"]
        backward["dac"]["v_read"] = dac["v_read"]
    tile = {"rows": int(rng.choice([1, 3, 8, 64])), "cols": int(rng.choice([1, 3, 8, 64]))}
    return gx.CrossbarSpec(
        tile=tile, device=device, mapping=mapping, dac=dac, adc=draw_adc(rng),
        backward=backward | {"adc": draw_adc(rng)},
    )  # fmt: skip


def arrays(w, spec):
    """Weight of a full pair of every output, and (weight of a siemens, conductances, what is subtracted before) of each plane."""
    m, device = spec.mapping, spec.device
    low, span = device.g_min, device.g_max - device.g_min
    full = np.full(len(w), m.w_max or np.abs(w).max())
    if m.scale == "column" and not m.w_max:
        full = np.abs(w).max(1)
    share = np.clip(w / full[:, None], -1, 1).T
    sides = np.maximum(share, 0), np.maximum(-share, 0)
    if m.scheme == "offset":
        steps = 1 if device.levels is None else (device.levels - 1) // 2
        middle = 0.5 if device.levels is None else steps / (device.levels - 1)
        share = middle * (share if device.levels is None else np.rint(share * steps) / steps)
        line = np.full_like(share, low + middle * span)
        return full, [(1 / (middle * span), line + share * span, None), (-1 / (middle * span), line, None)]
    if m.slice_bits is None:
        top = (device.levels or 0) - 1
        digits = [[s if top < 0 else np.rint(s * top) / top for s in sides]]
        weights = [1 / span]
    else:
        base = 2**m.slice_bits
        codes = [np.rint(s * (base**m.slices - 1)) for s in sides]
        digits = [[c // base**k % base / (base - 1) for c in codes] for k in range(m.slices)]
        weights = [base**k * (base - 1) / (base**m.slices - 1) / span for k in range(m.slices)]
    pairs = [(u, low + p * span, low + n * span) for u, (p, n) in zip(weights, digits, strict=True)]
    if m.scheme == "subtracted":
        return full, pairs
    return full, [part for u, p, n in pairs for part in ((u, p, None), (-u, n, None))]


def driven(x, dac):
    """(value of a volt, volts) of every pass, and the values that they stand for."""
    top = {"sample": np.abs(x).max(1, keepdims=True), "tensor": np.abs(x).max()}.get(dac.range, dac.max)
    top = np.maximum(top, 1e-30)
    x = np.clip(x, -top if dac.signed else 0, top)
    if dac.bits is None:
        return [(top / dac.v_read, x / top * dac.v_read)], x
    most = 2 ** (dac.bits - 1) - 1 if dac.signed else 2**dac.bits - 1
    code, lsb = np.rint(x / top * most), top / most
    two = dac.signed and dac.polarity == "two_phase"
    passes = []
    for sign, part in [(1, np.maximum(code, 0)), (-1, np.maximum(-code, 0))] if two else [(1, code)]:
        bits = dac.stream_bits or most.bit_length()
        digit = 2**bits - 1 if dac.stream_bits or two else most  # the largest
        for first in range(0, most.bit_length(), bits):
            digits = np.sign(part) * ((np.abs(part).astype(int) >> first) % 2**bits)
            passes.append((sign * lsb * 2**first * digit / dac.v_read, digits / digit * dac.v_read))
    return passes, code * lsb


def converted(i, adc, largest, signed):
    """Currents after conversion, whether they were inside the range, and whether they are off the edges of codes."""
    if adc.bits is None:
        return i, np.ones_like(i), np.ones_like(i, bool)
    most = 2 ** (adc.bits - 1) - 1 if signed else 2**adc.bits - 1
    steps = i / (largest / most)
    off = np.abs(steps % 1 - 0.5) > 1e-3
    return (
        np.clip(np.rint(steps), -most if signed else 0, most) * largest / most,
        np.abs(steps) <= most + 0.5,
        off,
    )


def read(x, planes, spec, dac, adc, tile):
    """Sums of products in units of a full pair, share of conversions inside the range, what was driven, and which are certain."""
    passes, values = driven(x, dac)
    lines, outputs = planes[0][1].shape
    one_sign = not dac.signed or (dac.polarity == "two_phase" and dac.bits is not None)
    signed = spec.mapping.scheme == "subtracted" or not one_sign
    largest = adc.i_max or dac.v_read * spec.device.g_max * min(tile, lines)
    y, inside, weight, certain = 0, 0, 0, True
    v_sinh = spec.device.v_sinh
    for value, volts in passes:
        if v_sinh is not None:
            volts = dac.v_read * np.sinh(volts / v_sinh) / np.sinh(dac.v_read / v_sinh)
        for first in range(0, lines, tile):
            at = slice(first, first + tile)
            for unit, plane, other in planes:
                g = plane[at] if other is None else plane[at] - other[at]
                i, within, off = converted(volts[:, at] @ g, adc, largest, signed)
                y, certain = y + value * unit * i, certain & off
                if not (spec.mapping.scheme == "offset" and unit < 0):  # reference lines count as constant
                    inside, weight = inside + np.abs(value * unit) * within, weight + np.abs(value * unit)
    return y, inside / weight, values, certain


def assert_close(found, expected, certain):
    """But for what a rounding edge may have moved."""
    off = np.abs(found.detach().numpy() - expected) > 1e-4 * np.abs(expected).max() + 1e-9
    assert not (off & certain).any(), (off & certain).mean()


@pytest.mark.parametrize("scheme", ["differential", "subtracted", "offset"])
def test_a_layer_does_what_its_settings_say(scheme):
    rng = np.random.default_rng(0)
    for case in range(CASES):
        spec = draw_spec(rng, scheme)
        torch.manual_seed(case)
        layer = AnalogLinear(int(rng.choice([5, 17])), int(rng.choice([3, 9])), bias=False, spec=spec)
        x = torch.randn(4, layer.in_features, requires_grad=True)
        grad_y = torch.randn(4, layer.out_features)
        y = layer(x)
        y.backward(grad_y)
        full, planes = arrays(layer.weight.detach().double().numpy(), spec)
        inputs = x.detach().double().numpy()
        expected, inside, values, certain = read(inputs, planes, spec, spec.dac, spec.adc, spec.tile.rows)
        assert_close(y, expected * full, certain)

        through, certain = grad_y.double().numpy() * inside, certain.all()
        assert_close(layer.weight.grad, through.T @ values, certain)
        planes = [(unit, plane.T, None if other is None else other.T) for unit, plane, other in planes]
        if spec.backward.mode == "ideal":
            parts = [unit * (plane if other is None else plane - other) for unit, plane, other in planes]
            back = (through * full) @ np.sum(parts, 0)
        else:
            back, _, _, sure = read(
                through * full, planes, spec, spec.backward_dac, spec.backward_adc, spec.tile.cols
            )
            certain = certain & sure
        shut = (inputs <= 0) & (not spec.dac.signed) | (np.abs(inputs) > (spec.dac.max or np.inf))
        assert_close(x.grad, np.where(shut, 0, back), certain)
