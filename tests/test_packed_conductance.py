"""Packed conductances kept between reads: when they are used, when they are made anew, and that neither changes a bit."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from cuda_shim import REVERSE, ShimDevice
from tape import gpu_path
from test_capture import fuse
from test_tile_mvm import G_MAX, SEED, case, convolution

import gpuxbar as gx
from gpuxbar import ops
from gpuxbar.nn import AnalogConv2d, AnalogLinear

READS = {  # strategy, settings
    "two-halves": ("fused", {"precision": "fp16x2"}),
    "variance": ("fused", {"precision": "fp16x2", "noise_var": True}),
    "transposed": ("fused", {"precision": "fp16", "transposed": True}),
    "implicit": ("implicit", {"precision": "fp16x2", "conv": True}),
    "wgmma": ("wgmma", {"precision": "fp16"}),
}  # fmt: skip


class Kept:
    """One array with what its reads keep."""

    def __init__(self, name):
        strategy, s = READS[name]
        s = {
            **s,
            "adc_bits": 8,
            "adc_lsb": 1e-7,
            "v_lsb": 1e-3,
            "g_range": G_MAX,
            "seed": SEED,
            "strategy": strategy,
        }
        if s.get("conv"):
            self.codes, self.g, more = convolution((2, 3), (1, 1), (0, 0), (1, 1), 2, False, 9, 8)
            self.codes = self.codes[:1].copy()
            s |= {key: more[key] for key in ("conv", "groups")} | {"tile_rows": 20}
        else:
            self.codes, self.g = case(9, 50, 50, planes=2)
            s |= {"tile_rows": 20, "tile_cols": 20}
        if s.get("noise_var"):
            s["noise_var"] = np.abs(self.g) * np.float32(1e-6)
        conv = s.get("conv")
        size = ops.PackedConductance.size(
            self.g.shape, tile=20, transposed=s.get("transposed", False), groups=s.get("groups", 1),
            precision=s["precision"], positions=conv.kernel[0] * conv.kernel[1] if conv else 0,
            noise_var="noise_var" in s,
        )  # fmt: skip
        self.s = s
        self.packed = ops.PackedConductance(
            np.full(size, 0xFF, np.uint8), np.zeros(2, np.int64), np.full(1, 2)
        )

    def read(self, packed="kept", **changes):
        device = ShimDevice(order=REVERSE)
        packed = self.packed if packed == "kept" else packed
        return ops.tile_mvm(self.codes, self.g, packed=packed, device=device, **{**self.s, **changes})


@pytest.mark.parametrize("name", READS)
def test_what_is_kept_is_read_until_the_version_is_another(name):
    """Memory that is wiped behind its back is read as it is: nothing packs it again, until there is a reason."""
    kept = Kept(name)
    fresh = kept.read(packed=None)
    np.testing.assert_array_equal(kept.read(), fresh)
    np.testing.assert_array_equal(kept.read(), fresh)
    held = kept.packed.memory.copy()
    kept.packed.memory[:] = 0
    wiped = kept.read()
    assert not np.array_equal(wiped, fresh)
    assert not kept.packed.memory.any()
    kept.g *= -1
    np.testing.assert_array_equal(kept.read(), wiped)
    kept.g *= -1
    for why in ("version", "state", "unknown"):
        kept.packed.memory[:] = 0
        if why == "version":
            kept.packed.version[0] -= 1
        elif why == "state":
            kept.packed.state[:] = 0
        else:
            kept.packed.version[0] = 0
        np.testing.assert_array_equal(kept.read(), fresh, err_msg=why)
        np.testing.assert_array_equal(kept.packed.memory[held != 0xFF], held[held != 0xFF])
        kept.packed.memory[:] = 0
        np.testing.assert_array_equal(
            kept.read(), fresh if kept.packed.version[0] == 0 else wiped, err_msg=why
        )


def test_every_layout_is_packed_anew():
    """What one read packed is never taken for another's."""
    variance = {"noise_var": np.abs(case(9, 50, 50, planes=2)[1]) * np.float32(1e-6)}
    every_layout([
        variance, {"precision": "fp16x2"}, variance, {"transposed": True}, {}, {"strategy": "wgmma"}, {"g_range": 3 * G_MAX},
        {"tile_rows": 25}, {"tile_rows": 20, "precision": "fp16x2", **variance},
    ])  # fmt: skip


def every_layout(changes):
    """One memory for reads of other settings in turn."""
    codes, g = case(9, 50, 50, planes=2)
    size = ops.PackedConductance.size(g.shape, tile=20, precision="fp16x2", noise_var=True)
    packed = ops.PackedConductance(np.zeros(size, np.uint8), np.zeros(2, np.int64), np.ones(1, np.int64))
    s = {"adc_bits": 8, "adc_lsb": 1e-7, "v_lsb": 1e-3, "g_range": G_MAX, "precision": "fp16", "strategy": "fused", "tile_rows": 20, "tile_cols": 20}  # fmt: skip
    for change in changes:
        settings = {**s, **change}
        kept = ops.tile_mvm(codes, g, packed=packed, device=ShimDevice(), **settings)
        np.testing.assert_array_equal(kept, ops.tile_mvm(codes, g, device=ShimDevice(), **settings), change)


MUTANTS = {  # of pack_sensed.cu
    "version-not-looked-at": ("*version ^ layout", "layout"),
    "counter-left": (", state[1] = 0", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_seeded_bugs_are_found(name, seeded):
    seeded("pack_sensed.cu", *MUTANTS[name])
    with pytest.raises(AssertionError):
        test_what_is_kept_is_read_until_the_version_is_another("two-halves")


BAD = {
    "small": ({"memory": np.zeros(64, np.uint8)}, ValueError, "`packed.memory` must have 38400 bytes for this read, got 64"),
    "dtype": ({"memory": np.zeros(64, np.int8)}, TypeError, "`packed.memory` must be an array of uint8, got int8"),
    "state": ({"state": np.zeros(3, np.int64)}, ValueError, r"`packed.state` must have shape \(2,\), got \(3,\)"),
    "version": ({"version": np.zeros(1)}, TypeError, "`packed.version` must be an array of int64, got float64"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_memory_is_refused(name):
    change, error, text = BAD[name]
    kept = Kept("transposed")
    with pytest.raises(error, match=f"^tile_mvm: {text}"):
        kept.read(packed=kept.packed._replace(**change))


# ---- layers

BASE = {
    "tile": {"rows": 16, "cols": 16}, "dac": {"bits": 8}, "adc": {"bits": 8, "range": "worst_case"}, "precision": "fp16x2",
    "read_noise": {"sigma": 1e-7, "sigma_g": 1e-7}, "programming": {"write_noise": 1e-7}, "drift": {"nu": 0.05},
}  # fmt: skip
LAYERS = {
    "digital": {},
    "subtracted": {"mapping": {"scheme": "subtracted"}, "read_noise": {"sigma": 1e-7}},
    "offset": {"mapping": {"scheme": "offset"}},
    "role": {"parasitics": {"r_wordline": 5.0, "r_source": 50.0, "terminations": "role", "method": "ladder"}},
    "anchored": {"parasitics": {"r_wordline": 5.0, "r_bitline": 5.0, "anchor": "ladder", "refresh_interval": 2}},
    "in-situ": {"update": {"law": "agarwal", "nu": 1.0, "gamma": 0.01, "cycle": 0.01}, "retention": {"tau": 5.0}},
}  # fmt: skip


def fused_path(monkeypatch):
    fuse(monkeypatch)
    return gpu_path(monkeypatch)


def layer_of(kind, keep, conv):
    torch.manual_seed(0)
    spec = gx.CrossbarSpec.model_validate({**BASE, **LAYERS[kind], "keep_packed": keep})
    layer = AnalogConv2d(3, 6, 3, spec=spec) if conv else AnalogLinear(20, 11, spec=spec)
    if kind == "in-situ":
        layer.begin_in_situ()
    return layer


def both_ways(layer, x):
    x = x.clone().requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    return y.detach(), x.grad


def trained(layer):
    if layer.in_situ:
        layer.update_cells(0.1 * torch.sign(layer.weight.detach()))
    else:
        with torch.no_grad():
            layer.weight.mul_(0.9).add_(0.01)


def behind_the_back(layer):
    layer.weight.data.mul_(-1.0)  # no version counter of PyTorch's sees it


def aged(layer):
    layer.program()
    layer.look_after(0.0)
    layer.look_after(1e5)


def programmed_anew(layer):
    """The same count of looks at the devices, and other devices."""
    layer.release()
    layer.program()
    layer.look_after(0.0)
    layer.look_after(1e5)


def loaded(layer):
    """A state with the same number of updates, and other devices."""
    other = copy.deepcopy(layer)
    with torch.no_grad():
        if other.in_situ:
            other.g_cells.copy_(other.g_cells.flip(0))
            other._move(torch.zeros_like(other.weight))
            other.update_step.copy_(layer.update_step)
        else:
            other.weight.neg_()
    layer.load_state_dict(other.state_dict())


CHANGES = {
    "digital": (behind_the_back, AnalogLinear.rewrite, loaded, aged, programmed_anew, AnalogLinear.release),
    "subtracted": (trained,),  # a convolution
    "offset": (trained,),
    "role": (trained, AnalogLinear.rewrite),
    "anchored": (trained, AnalogLinear.restart_wires),
    "in-situ": (trained, AnalogLinear.relax, loaded, aged, AnalogLinear.release),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHANGES)
def test_a_layer_reads_what_it_holds(kind, monkeypatch):
    """Beside a layer that keeps nothing, forwards and backwards, after every change of its devices, bit for bit."""
    conv = kind == "subtracted"
    with fused_path(monkeypatch):
        kept, plain = (layer_of(kind, keep, conv) for keep in (True, False))
        x = torch.randn(2, 3, 4, 4) if conv else torch.randn(3, 20)
        for change in (lambda layer: None, *CHANGES[kind]):
            for layer in (kept, plain):
                change(layer)
            for mine, theirs in zip(both_ways(kept, x), both_ways(plain, x), strict=True):
                assert torch.equal(mine, theirs), change
            assert kept.packed_state[:, 0].all()
            held = kept.packed.clone()
            kept.packed.zero_()
            kept(x)
            assert not kept.packed.any()  # nothing is packed twice
            kept.packed.copy_(held)
            plain.read_step += 1
        moved = copy.deepcopy(kept)
        assert torch.equal(moved(x), plain(x))
        moved.packed.zero_()
        assert kept.packed.any()  # a copy keeps for itself


def test_backward_reads_the_devices_of_its_forward(monkeypatch):
    """Devices that age between the two do not end up under the number of those that came after."""
    with fused_path(monkeypatch):
        kept, plain = (layer_of("digital", keep, False) for keep in (True, False))
        for layer in (kept, plain):
            layer.program()
        x, results = torch.randn(9, 20), []
        for layer in (kept, plain):
            inputs = x.clone().requires_grad_()
            y = layer(inputs)
            layer.look_after(1e6)
            y.square().sum().backward()
            results.append((inputs.grad, *both_ways(layer, x)))
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_a_compiled_layer_keeps():
    kept, plain = (layer_of("digital", keep, False) for keep in (True, False))
    x = torch.randn(9, 20)
    compiled = torch.compile(kept, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(both_ways(compiled, x), both_ways(plain, x), strict=True):
        assert torch.equal(mine, theirs)


def test_only_what_is_packed_can_be_kept():
    with pytest.raises(
        ValueError, match=r"`keep_packed` must go with precision fp16, fp16x2, bf16 or int8, got 'fp32'"
    ):
        gx.CrossbarSpec(keep_packed=True)
    layer = AnalogLinear(
        20,
        11,
        spec=gx.CrossbarSpec.model_validate({**BASE, "keep_packed": True, "backward": {"mode": "ideal"}}),
    )
    assert layer.packed is not None
    assert layer.back_packed is None
    assert not [key for key in layer.state_dict() if "packed" in key]
