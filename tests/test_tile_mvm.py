"""tile_mvm: the host kernel against the float64 oracle, the oracle against closed forms, and the messages."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gpuxbar import ops, reference
from gpuxbar.ops import ConvGeometry

SEED = 2**40 + 12345  # above 2**32 on purpose
G_MAX = 10e-6  # S


def case(batch, rows, cols, planes=1, groups=1, codes=True, seed=1):
    rng = np.random.default_rng(seed)
    g = rng.uniform(-G_MAX, G_MAX, (planes, groups * rows, cols)).astype(np.float32)
    if codes:
        return rng.integers(-127, 128, (batch, groups * rows)).astype(np.int16), g
    return rng.uniform(-0.2, 0.2, (batch, groups * rows)).astype(np.float32), g


def assert_matches(y, expected, lsb, weight=1.0, share=2e-3):
    """Equal within float32 error but for codes on a rounding edge: one step each, rare."""
    off = np.abs(y - expected)
    close = off <= 1e-5 * np.abs(expected).max() + 1e-12
    assert (off[~close] <= 1.01 * weight * lsb).all(), off.max() / lsb
    assert (~close).mean() <= share


SHAPES = [
    pytest.param((1, 1, 1, None), id="one-cell"),
    pytest.param((7, 37, 11, 16), id="prime"),
    pytest.param((53, 129, 70, 64), id="short-last-tile"),
    pytest.param((100, 64, 33, 64), id="one-tile"),
]
MODES = {
    "plain": {},
    "adc": {"adc_bits": 8},
    "noise": {"adc_bits": 8, "read_noise": 2e-6},
    "fast": {"adc_bits": 6, "read_noise": 2e-6, "generator": "fast"},
    "ideal-noise": {"read_noise": 2e-6},
    "variance": {"adc_bits": 8, "read_noise": 1e-6, "noise_var": True},
    "errors": {"adc_bits": 8, "errors": True},
    "bent": {"adc_bits": 6, "adc_signed": False, "errors": True, "inl": True, "read_noise": 1e-6},
    "drivers": {"adc_bits": 8, "drivers": (True, None)},
    "sinh": {"adc_bits": 8, "drivers": (False, 0.08), "noise_var": True},
    "driven-streams": {
        "adc_bits": 8,
        "stream_bits": 2,
        "streams": 4,
        "phases": 2,
        "drivers": (True, 0.1),
        "read_noise": 1e-6,
    },
    "summed-streams": {
        "stream_bits": 2,
        "streams": 4,
        "phases": 2,
        "drivers": (True, 0.1),
        "read_noise": 2e-6,
    },
    "variance-of-streams": {"stream_bits": 2, "streams": 4, "phases": 2, "noise_var": True},
    "streams": {"adc_bits": 8, "stream_bits": 2, "streams": 4},
    "two-phase": {"adc_bits": 8, "stream_bits": 7, "streams": 1, "phases": 2, "read_noise": 1e-6},
}


def drivers(flawed, v_sinh, lines, bits=7):
    """Settings of drivers with errors, and of devices that are not ohmic; the largest digit has so many bits."""
    rng = np.random.default_rng(4)
    error = rng.normal([[1], [0], [-1]], [[0.05], [0.01], [bits]], (3, lines)).astype(np.float32)
    given = ops.Drivers(v_read=0.2, error=error if flawed else None, v_sinh=v_sinh)
    return {"drivers": given, "v_lsb": 0.2 / (2**bits - 1)}


def settings(mode, shape, g, groups, transposed):
    batch, rows, cols, tile = shape
    rng = np.random.default_rng(3)
    s = dict(
        MODES[mode], v_lsb=0.2 / 127, groups=groups, transposed=transposed, seed=SEED, step=7, row_offset=5
    )
    drive, sense = (cols, rows) if transposed else (rows, cols)
    length = tile or drive
    if s.pop("errors", None):
        size = (g.shape[0], -(-drive // length), groups * sense)
        s["adc_gain"] = rng.normal(1, 0.05, size).astype(np.float32)
        s["adc_offset"] = rng.normal(0, 1e-6, size).astype(np.float32)
    if s.pop("inl", None):
        s["adc_inl"] = rng.normal(-0.7, 2, size).astype(np.float32)
    if "drivers" in s:
        s |= drivers(*s["drivers"], groups * drive, s.get("stream_bits", 7))
    if s.get("noise_var"):
        s["noise_var"] = np.abs(g) * np.float32(1e-6)
    if "adc_bits" in s:
        s["adc_lsb"] = 0.1 * G_MAX * 0.2 * np.sqrt(min(length, drive)) / 8
    return s, length


def assert_reads(read, shape, mode, groups=1, transposed=False, bf16=False):
    """Two planes and their gate as the oracle has them; `bf16`: of variances and squares that it holds."""
    batch, rows, cols, _ = shape
    codes, g = case(batch, rows, cols, planes=2, groups=groups)
    if transposed:
        codes = np.random.default_rng(2).integers(-127, 128, (batch, groups * cols)).astype(np.int16)
    s, length = settings(mode, shape, g, groups, transposed)
    s["slice_scale"] = np.array([1.0, -4.0], np.float32)
    if mode == "variance" and bf16:
        codes %= 16
        s["noise_var"] = (s["noise_var"].view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    expected, gate = reference.tile_mvm(codes, g, tile=length, want_gate=True, **s)
    y, found = read(codes, g, tile_rows=length, tile_cols=length, want_gate=True, **s)
    weight = 4 * 2 ** (s.get("stream_bits", 0) * (s.get("streams", 1) - 1))
    assert_matches(y, expected, s.get("adc_lsb", 0.0), weight)
    assert (np.abs(found - gate) <= 1e-5).mean() > 1 - 2e-3


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_host_matches_oracle(shape, mode, groups, transposed):
    assert_reads(ops.tile_mvm, shape, mode, groups, transposed)


def convolution(kernel, stride, padding, dilation, groups, transposed, channels=3, outputs=7):
    """(codes, conductances, settings) of a read of two planes with every part of a convolution, in tiles of 4 lines."""
    conv = ConvGeometry(channels, 11, 13, kernel, stride, padding, dilation)
    rng = np.random.default_rng(0)
    g = rng.uniform(-G_MAX, G_MAX, (2, groups * conv.inputs, outputs)).astype(np.float32)
    shape = (5, groups * outputs, *conv.out) if transposed else (5, groups * channels, 11, 13)
    codes = rng.integers(-127, 128, shape).astype(np.int16)
    s = {
        "groups": groups, "transposed": transposed, "conv": conv, "v_lsb": 0.2 / 127, "adc_bits": 8,
        "adc_lsb": 1e-7, "read_noise": 1e-7, "seed": SEED, "step": 3, "want_gate": not transposed,
        "row_scale": np.linspace(1, 2, 5).astype(np.float32), "bias": None if transposed else np.arange(groups * outputs, dtype=np.float32) * 1e-6,
    }  # fmt: skip
    return codes, g, s


def assert_convolution_matches(y, expected):
    """The results of `convolution`, with the gate where there is one."""
    assert isinstance(y, tuple) == isinstance(expected, tuple)
    if isinstance(y, tuple):
        assert (np.abs(y[1] - expected[1]) <= 1e-5).mean() > 1 - 2e-3
        y, expected = y[0], expected[0]
    assert_matches(y, expected, 1e-7, weight=2 * 3, share=2e-2)


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        ((3, 3), (1, 1), (1, 1), (1, 1)),
        ((2, 3), (2, 1), (0, 2), (1, 2)),
        ((1, 1), (3, 2), (0, 0), (1, 1)),
        ((1, 1), (1, 1), (0, 0), (1, 1)),  # pixels are patches; all but so are not
        ((1, 1), (1, 2), (0, 0), (1, 1)),
        ((1, 1), (1, 1), (1, 1), (1, 1)),
        ((3, 1), (1, 1), (0, 0), (1, 1)),
        ((5, 2), (2, 3), (3, 1), (2, 1)),
    ],
)
def test_convolution_matches_oracle(kernel, stride, padding, dilation, groups, transposed):
    codes, g, s = convolution(kernel, stride, padding, dilation, groups, transposed)
    y = ops.tile_mvm(codes, g, tile_rows=4, tile_cols=4, **s)
    expected = reference.tile_mvm(codes, g, tile=4, **s)
    assert_convolution_matches(y, expected)


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize("line_order", ["channel_position", "position_channel"])
@pytest.mark.parametrize("mode", ["one-plane", "gate", "streams", "state-noise", "drivers"])
@pytest.mark.parametrize(
    ("groups", "channels", "outputs", "image", "geometry"),
    [
        pytest.param(35, 1, 1, (8, 16), ((3, 3), (1, 1), (1, 1)), id="depthwise"),
        pytest.param(19, 1, 2, (15, 13), ((3, 5), (2, 2), (1, 2)), id="strides"),
        pytest.param(18, 1, 1, (9, 11), ((3, 3), (1, 1), (2, 2), (2, 2)), id="dilation"),
        pytest.param(17, 1, 1, (5, 5), ((2, 3), (3, 1), (0, 1)), id="short-lines"),
        pytest.param(7, 3, 6, (7, 7), ((3, 3), (1, 2), (1, 1)), id="few-channels"),
        pytest.param(2, 70, 24, (5, 13), ((3, 3), (1, 1), (1, 1)), id="too-many-lines-for-a-bundle"),
        pytest.param(3, 6, 7, (9, 15), ((1, 1),), id="pixels"),
    ],
)
def test_groups_read_together_match_oracle(
    groups, channels, outputs, image, geometry, mode, line_order, transposed, same_on_threads
):
    conv = ConvGeometry(channels, *image, *geometry, line_order=line_order)
    rng = np.random.default_rng(5)
    planes = 1 if mode == "one-plane" else 2
    g = rng.uniform(-G_MAX, G_MAX, (planes, groups * conv.inputs, outputs)).astype(np.float32)
    shape = (2, groups * outputs, *conv.out) if transposed else (2, groups * channels, *image)
    codes = rng.integers(-127, 128, shape).astype(np.int16)
    s = {
        "transposed": transposed, "conv": conv, "groups": groups, "v_lsb": 0.2 / 127, "adc_bits": 8, "adc_lsb": 1e-7,
        "read_noise": 1e-7, "seed": SEED, "step": 3, "want_gate": mode == "gate" and not transposed,
    }  # fmt: skip
    if mode == "streams":
        s |= {"stream_bits": 4, "streams": 2, "phases": 2}
    if mode in ("state-noise", "drivers"):
        s["noise_var"] = np.abs(g) * np.float32(1e-6)
    if mode == "drivers":
        s |= drivers(True, 0.1, groups * (outputs if transposed else conv.inputs))
    expected = reference.tile_mvm(codes, g, tile=50, **s)
    y = same_on_threads(lambda: ops.tile_mvm(codes, g, tile_rows=50, tile_cols=50, **s))
    y, expected = (y[0], expected[0]) if s["want_gate"] else (y, expected)
    assert_matches(y, expected, 1e-7, weight=16 if mode == "streams" else 2 * 3, share=2e-2)


DRIVEN = {
    "flawed": (True, None),
    "drivers": (True, 0.1),
    "sinh": (False, 0.1),
    "nearly-ohmic": (True, 0.5),
}


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize("line_order", ["channel_position", "position_channel"])
@pytest.mark.parametrize("stride", [1, 2, 3])  # of 3, lines are not whole vectors
@pytest.mark.parametrize(
    "mode", ["plain", "streams", "bias", "state-noise", "flawed", "drivers", "sinh", "nearly-ohmic"]
)
def test_lines_of_whole_vectors_match_oracle(mode, stride, line_order, transposed):
    conv = ConvGeometry(3, 4, 32, (3, 5), (1, stride), (1, 4), (1, 2), line_order)
    rng = np.random.default_rng(5)
    g = rng.uniform(-G_MAX, G_MAX, (2 if mode == "streams" else 1, conv.inputs, 9)).astype(np.float32)
    codes = rng.integers(-127, 128, (3, 9, *conv.out) if transposed else (3, 3, 4, 32)).astype(np.int16)
    s = {
        "transposed": transposed, "conv": conv, "v_lsb": 0.2 / 127, "adc_bits": 8, "adc_lsb": 1e-7, "read_noise": 1e-7,
        "seed": SEED, "step": 3, "want_gate": not transposed, "row_scale": np.linspace(1, 2, 3).astype(np.float32),
    }  # fmt: skip
    if mode == "streams":
        s |= {"stream_bits": 4, "streams": 2, "phases": 2, "slice_scale": np.array([1.0, -0.5], np.float32)}
    elif mode == "bias" and not transposed:
        s |= {
            name: rng.normal(size=9).astype(np.float32) * scale
            for name, scale in (("bias", 1e-6), ("col_scale", 1.0))
        }
    elif mode == "state-noise":
        s["noise_var"] = rng.uniform(0, 1e-13, g.shape).astype(np.float32)
    elif mode in DRIVEN:
        s |= drivers(*DRIVEN[mode], 9 if transposed else conv.inputs)
    y = ops.tile_mvm(codes, g, tile_rows=20, tile_cols=20, **s)
    assert_convolution_matches(y, reference.tile_mvm(codes, g, tile=20, **s))


@pytest.mark.parametrize(
    "shape", [(3, 70), (60, 70), (2, 3, 8, 16), (2, 3, 7, 9)], ids=["few", "block", "lines", "patches"]
)
def test_streams_are_summed_before_what_nothing_converts(shape):
    """Digits times their weights are the codes again, so that both reads have the same bits."""
    conv = ConvGeometry(*shape[1:], (3, 3), padding=(1, 1)) if len(shape) == 4 else None
    rng = np.random.default_rng(0)
    g = rng.uniform(-G_MAX, G_MAX, (2, conv.inputs if conv else 70, 9)).astype(np.float32)
    codes = rng.integers(-127, 128, shape).astype(np.int16)
    whole, summed = (
        ops.tile_mvm(codes, g, tile_rows=20, conv=conv, **passes)
        for passes in ({}, {"stream_bits": 2, "streams": 4, "phases": 2})
    )
    np.testing.assert_array_equal(summed, whole)


def test_groups_read_together_are_driven_in_all_phases_that_one_of_them_has():
    groups, conv = 20, ConvGeometry(1, 8, 8, (3, 3), padding=(1, 1))
    rng = np.random.default_rng(0)
    g = rng.uniform(-G_MAX, G_MAX, (1, groups * 9, 1)).astype(np.float32)
    codes = rng.integers(-127, 128, (1, groups, 8, 8)).astype(np.int16)
    codes[:, 0] = np.abs(codes[:, 0])
    s = {
        "conv": conv,
        "groups": groups,
        "v_lsb": 0.2 / 127,
        "adc_bits": 8,
        "adc_lsb": 1e-7,
        "stream_bits": 7,
        "phases": 2,
    }
    y = ops.tile_mvm(codes, g, tile_rows=50, **s)
    assert_matches(y, reference.tile_mvm(codes, g, tile=50, **s), 1e-7)


def test_unfold_is_the_convolution_of_torch():

    conv = ConvGeometry(2, 9, 8, (3, 2), (2, 1), (1, 1), (1, 2))
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(4, 2, 9, 8)), rng.normal(size=(5, 2, 3, 2))
    expected = torch.nn.functional.conv2d(
        torch.from_numpy(x), torch.from_numpy(w), None, (2, 1), (1, 1), (1, 2)
    )
    y = (reference.unfold(x, conv) @ w.reshape(5, -1).T).reshape(4, conv.pixels, 5).transpose(0, 2, 1)
    np.testing.assert_allclose(y.reshape(4, 5, *conv.out), expected.numpy(), rtol=1e-12, atol=1e-12)
    back = rng.normal(size=(4 * conv.pixels, conv.inputs))
    assert np.vdot(reference.fold(back, 4, conv), x) == pytest.approx(
        np.vdot(back, reference.unfold(x, conv))
    )


@pytest.mark.parametrize(
    "shape", [(70, 40, 24, 3), (49, 40, 1040, 30), (49, 1040, 1040, 2)], ids=["all", "planes", "panels"]
)
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
def test_silent_passes_and_many_planes_match_oracle(shape, transposed):
    """Inputs of one sign leave a phase undriven, small ones the high bits; noise and offsets are converted all the same.
    More planes and panels than are packed at a time give what few do."""
    batch, rows, cols, planes = shape
    _, g = case(batch, rows, cols, planes=planes)
    codes = np.random.default_rng(2).integers(0, 32, (batch, cols if transposed else rows)).astype(np.int16)
    s, _ = settings("errors", (batch, rows, cols, 128), g, 1, transposed)
    s |= {"stream_bits": 4, "streams": 2, "phases": 2, "read_noise": 1e-6 if cols < 1000 else 0.0}
    s["slice_scale"] = np.linspace(1, -0.5, planes).astype(np.float32)
    y = ops.tile_mvm(codes, g, tile_rows=128, tile_cols=128, **s)
    expected = reference.tile_mvm(codes, g, tile=128, **s)
    assert_matches(y, expected, s["adc_lsb"], weight=16, share=1e-2)


@pytest.mark.parametrize("read", [ops.tile_mvm, reference.tile_mvm], ids=["host", "oracle"])
@pytest.mark.parametrize("batch", [1, 60], ids=["few", "block"])
@pytest.mark.parametrize("inl", [20.0, -20.0])
def test_a_bent_converter_is_off_by_its_inl_at_most(read, batch, inl):
    """Largest at 1 / sqrt(3) of the range, the other way below 0; right at 0, at both ends, and all that clips."""
    code_max = 2**11 - 1
    above = np.linspace(0, 1.2, 1201) * code_max
    n = np.concatenate([-above[:0:-1], above])  # steps
    g = n.astype(np.float32)[None, None, :]
    converters = np.full((1, 1, n.size), inl, np.float32)
    code = read(np.ones((batch, 1), np.float32), g, adc_bits=12, adc_lsb=1.0, adc_inl=converters)[-1]
    straight = np.clip(np.rint(n), -code_max, code_max)
    off, inside = code - straight, np.abs(n) < code_max
    assert np.abs(off).max() == abs(inl)
    assert np.isin(off[np.abs(n - code_max / np.sqrt(3)) < 0.005 * code_max], [inl - np.sign(inl), inl]).all()
    np.testing.assert_array_equal(off, -off[::-1])
    np.testing.assert_array_equal(off[~inside | (n == 0)], 0)
    assert (np.diff(code) >= 0).all()


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
def test_few_vectors_that_threads_share_are_read_alike(transposed, same_on_threads):
    lines = (300, 200)[:: -1 if transposed else 1]
    _, g = case(1, 300, 200, planes=2, groups=2)
    codes = np.random.default_rng(2).integers(-127, 128, (40, 2 * lines[0])).astype(np.int16)
    s = {"adc_bits": 8, "adc_lsb": 1e-6, "read_noise": 1e-6, "v_lsb": 1e-3, "seed": SEED}
    y = same_on_threads(lambda: ops.tile_mvm(codes, g, transposed=transposed, groups=2, **s), (2, 3, 8))
    assert_matches(y, reference.tile_mvm(codes, g, transposed=transposed, groups=2, **s), 1e-6, weight=2)


def test_values_that_threads_share_become_the_same_codes(same_on_threads):
    x = np.random.default_rng(2).normal(0, 1, (300, 5000)).astype(np.float32)
    codes, lsb = same_on_threads(lambda: ops.dac_fit(x, code_max=127, per_sample=True), (2, 3, 8))
    again = same_on_threads(lambda: ops.dac_quantize(x, lsb=lsb, code_max=127), (2, 3, 8))
    np.testing.assert_array_equal(lsb, np.abs(x).max(1) / np.float32(127))
    np.testing.assert_array_equal(again, codes)


@pytest.mark.parametrize("batch", [5, 60], ids=["few", "block"])
def test_codes_of_one_sign_drive_every_stream(batch):
    """A stream of negative digits alone is not silent."""
    _, g = case(1, 40, 24)
    codes = -np.random.default_rng(2).integers(1, 128, (batch, 40)).astype(np.int16)
    s = {"stream_bits": 4, "streams": 2, "v_lsb": 1e-3}
    y, expected = ops.tile_mvm(codes, g, **s), reference.tile_mvm(codes, g, **s)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_folded_panels_and_planes_that_take_turns_add_up():
    """A transposed convolution of more planes and panels than are packed at a time."""
    conv = ConvGeometry(64, 6, 6, (3, 3))
    rng = np.random.default_rng(5)
    g = rng.uniform(-G_MAX, G_MAX, (2, conv.inputs, 2048)).astype(np.float32)
    v = rng.uniform(-1, 1, (1, 2048, *conv.out)).astype(np.float32)
    s = {"conv": conv, "transposed": True, "slice_scale": np.array([1.0, -0.5], np.float32)}
    assert_convolution_matches(ops.tile_mvm(v, g, **s), reference.tile_mvm(v, g, **s))


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_few_vectors_are_read_as_many_are(mode, groups, transposed):
    shape = (
        (61, 150, 300, 48) if not transposed else (61, 300, 150, 48)
    )  # of whole strips of bitlines, and parts of them
    batch, rows, cols, tile = shape
    rng = np.random.default_rng(0)
    _, g = case(1, rows, cols, planes=2, groups=groups)
    s, _ = settings(mode, shape, g, groups, transposed)
    drive, sensed = (cols, groups * rows) if transposed else (rows, groups * cols)
    codes = rng.integers(-127, 128, (batch, groups * drive)).astype(np.int16)
    scale = rng.uniform(0.5, 2.0, batch).astype(np.float32)
    s |= {
        "slice_scale": np.array([1.0, -4.0], np.float32),
        "tile_rows": tile,
        "tile_cols": tile,
        "want_gate": True,
    }
    s |= {name: rng.normal(size=sensed).astype(np.float32) for name in ("col_scale", "bias")}
    if "adc_lsb" in s:
        s["adc_lsb"] = (s["adc_lsb"] * rng.uniform(0.5, 2.0, sensed)).astype(np.float32)
    whole = ops.tile_mvm(codes, g, row_scale=scale, **s)
    for part in (slice(0, 1), slice(1, 3), slice(3, 20), slice(13, 61)):
        s["row_offset"] = 5 + part.start
        few = ops.tile_mvm(codes[part], g, row_scale=scale[part], **s)
        for of_whole, found in zip(whole, few, strict=True):
            np.testing.assert_array_equal(found, of_whole[part])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", [(1, 3), (5, 6), (4, 40), (3, 70)], ids=["dot", "small", "lines", "wide"])
def test_same_bits_for_any_chunk_of_images(size, transposed):
    conv = ConvGeometry(3, *size, (3, 3), padding=(1, 1))
    rng = np.random.default_rng(4)
    g = rng.uniform(-G_MAX, G_MAX, (conv.inputs, 5)).astype(np.float32)
    codes = rng.integers(-127, 128, (11, 5 if transposed else 3, *size)).astype(np.int16)
    s = {
        "adc_bits": 8,
        "adc_lsb": 1e-7,
        "read_noise": 1e-7,
        "v_lsb": 1e-3,
        "seed": SEED,
        "conv": conv,
        "transposed": transposed,
    }
    whole = ops.tile_mvm(codes, g, **s)
    parts = [ops.tile_mvm(codes[i : i + 3], g, row_offset=i * conv.pixels, **s) for i in range(0, 11, 3)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    expected = reference.tile_mvm(codes, g[None], tile=conv.inputs, **s)
    assert_matches(whole, expected, 1e-7, weight=3, share=2e-2)


def test_dac_codes_match_oracle():
    x = np.random.default_rng(0).normal(size=(7, 33)).astype(np.float32)
    for lsb in (np.array([0.02], np.float32), np.linspace(0.01, 0.05, 7).astype(np.float32)):
        for signed in (True, False):
            codes = ops.dac_quantize(x, lsb=lsb, code_max=127, signed=signed)
            expected = reference.dac_quantize(x, lsb=lsb, code_max=127, signed=signed)
            steps = x / lsb[:, None]
            on_edge = np.abs(steps - np.floor(steps) - 0.5) < 1e-4
            assert ((codes == expected) | on_edge).all()
    assert codes.min() == 0


FITTED = [
    pytest.param((7, 33), False, id="matrix"),
    pytest.param((3, 5, 4, 9), False, id="images"),
    pytest.param((3, 5, 4, 9), True, id="a-range-each"),
    pytest.param((1, 40, 1, 1), True, id="one-pixel"),
    pytest.param((3, 1, 5, 7), False, id="one-channel"),
    pytest.param((0, 3), False, id="empty"),
]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("shape", "per_sample"), FITTED)
def test_fitted_dac_is_a_dac_with_the_range_of_its_values(shape, per_sample, signed):
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32) * 1e-4
    scale = rng.uniform(0.5, 2.0, shape[1]).astype(np.float32)
    codes, lsb = ops.dac_fit(x, scale, code_max=127, signed=signed, per_sample=per_sample)
    values = x * scale.reshape(-1, *[1] * (len(shape) - 2))
    np.testing.assert_array_equal(
        codes, ops.dac_quantize(values, lsb=lsb, code_max=127, signed=signed) if x.size else codes
    )
    expected, step = reference.dac_fit(x, scale, code_max=127, signed=signed, per_sample=per_sample)
    np.testing.assert_allclose(lsb, step, rtol=3e-7)  # a product and a quotient in float32
    assert codes.shape == shape
    assert np.abs(codes - expected).max(initial=0) <= 1
    assert np.count_nonzero(codes != expected) <= 1e-3 * x.size


def test_fitted_dac_of_unscaled_values():
    x = np.random.default_rng(0).normal(size=(3, 5, 2)).astype(np.float32)
    found, expected = (ops.dac_fit(x, *scale, code_max=127) for scale in ((), (np.ones(5, np.float32),)))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_fitted_dac_of_nothing_drives_nothing():
    codes, lsb = ops.dac_fit(np.zeros((2, 3), np.float32), np.ones(3, np.float32), code_max=7)
    assert not codes.any()
    assert lsb == pytest.approx([1e-30 / 7], rel=1e-6, abs=0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_fitted_dac_refuses_what_is_not_finite(value):
    x = np.ones((3, 5, 2, 2), np.float32)
    x[1, 2, 0], x[2, 0, 1, 1] = value, 3e38
    scale = np.array([2, 1, 1, 1, 1], np.float32)  # the product is infinite
    with pytest.raises(ValueError, match=r"^dac_fit: `x` must be finite, got 3 NaN or infinite"):
        ops.dac_fit(x, scale, code_max=127)
    with pytest.raises(ValueError, match=r"^a gradient must be finite, got 3 NaN or infinite"):
        ops.dac_fit(x, scale, code_max=127, what="a gradient")


def test_fitted_dac_refuses_scales_of_other_channels():
    x = np.ones((3, 5), np.float32)
    with pytest.raises(ValueError, match=r"^dac_fit: `scale` must have 5 values, got 3; give one for each"):
        ops.dac_fit(x, np.ones(3, np.float32), code_max=127)
    with pytest.raises(ValueError, match=r"^dac_fit: `code_max` must be 1 to 32767, got 0"):
        ops.dac_fit(x, np.ones(5, np.float32), code_max=0)


def test_settings_of_another_type_are_refused_though_equal_ones_are_known():
    v, g = np.ones((1, 4), np.float32), np.ones((4, 2), np.float32)
    assert ops.tile_mvm(v, g, tile_rows=2).shape == (1, 2)
    with pytest.raises(TypeError, match=r"`tile_rows` must be an integer, got 2\.0"):
        ops.tile_mvm(v, g, tile_rows=2.0)
    with pytest.raises(TypeError, match=r"`tile_rows` must be an integer, got \[2\]"):
        ops.tile_mvm(v, g, tile_rows=[2])


@pytest.mark.parametrize("rows", [1, 64])
def test_what_is_beyond_the_range_stays_there_where_converters_bend(rows):
    v = np.repeat(np.float32([[2.0], [-2.0]]), rows, axis=0)
    y = ops.tile_mvm(
        v, np.ones((1, 3), np.float32), tile_rows=1, adc_bits=8, adc_lsb=1 / 127, adc_inl=np.float32([[[21.0, -21.0, 0.0]]])
    )  # fmt: skip
    np.testing.assert_allclose(y, np.repeat([[1.0], [-1.0]], rows, axis=0) * np.ones(3), rtol=1e-6)
    beyond = np.array([254.0, -254.0])
    np.testing.assert_array_equal(reference.bent(beyond, 21.0, 127), beyond)
