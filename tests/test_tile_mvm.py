"""tile_mvm: the host kernel against the float64 oracle, the oracle against closed forms, and the messages."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gpuxbar import ops, reference
from gpuxbar.launch import library, set_threads
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
    "streams": {"adc_bits": 8, "stream_bits": 2, "streams": 4},
    "two-phase": {"adc_bits": 8, "stream_bits": 7, "streams": 1, "phases": 2, "read_noise": 1e-6},
}


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
    if s.get("noise_var"):
        s["noise_var"] = np.abs(g) * np.float32(1e-6)
    if "adc_bits" in s:
        s["adc_lsb"] = 0.1 * G_MAX * 0.2 * np.sqrt(min(length, drive)) / 8
    return s, length


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_host_matches_oracle(shape, mode, groups, transposed):
    batch, rows, cols, tile = shape
    codes, g = case(batch, rows, cols, planes=2, groups=groups)
    if transposed:
        codes = np.random.default_rng(2).integers(-127, 128, (batch, groups * cols)).astype(np.int16)
    s, length = settings(mode, shape, g, groups, transposed)
    s["slice_scale"] = np.array([1.0, -4.0], np.float32)
    expected, gate = reference.tile_mvm(codes, g, tile=length, want_gate=True, **s)
    y, host_gate = ops.tile_mvm(codes, g, tile_rows=length, tile_cols=length, want_gate=True, **s)
    weight = 4 * 2 ** (s.get("stream_bits", 0) * (s.get("streams", 1) - 1))
    assert_matches(y, expected, s.get("adc_lsb", 0.0), weight)
    assert (np.abs(host_gate - gate) <= 1e-5).mean() > 1 - 2e-3


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
@pytest.mark.parametrize("mode", ["one-plane", "gate", "streams", "state-noise"])
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
    groups, channels, outputs, image, geometry, mode, line_order, transposed
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
    if mode == "state-noise":
        s["noise_var"] = np.abs(g) * np.float32(1e-6)
    expected = reference.tile_mvm(codes, g, tile=50, **s)
    found = []
    for threads in (1, 2):
        set_threads(threads)
        try:
            found.append(ops.tile_mvm(codes, g, tile_rows=50, tile_cols=50, **s))
        finally:
            set_threads(torch.get_num_threads())
        y, of_oracle = (found[-1][0], expected[0]) if s["want_gate"] else (found[-1], expected)
        assert_matches(y, of_oracle, 1e-7, weight=16 if mode == "streams" else 2 * 3, share=2e-2)
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize("line_order", ["channel_position", "position_channel"])
@pytest.mark.parametrize("mode", ["plain", "streams", "bias", "state-noise"])
def test_lines_of_whole_vectors_match_oracle(mode, line_order, transposed):
    conv = ConvGeometry(3, 4, 32, (3, 5), (1, 1), (1, 4), (1, 2), line_order)
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
    y = ops.tile_mvm(codes, g, tile_rows=20, tile_cols=20, **s)
    assert_convolution_matches(y, reference.tile_mvm(codes, g, tile=20, **s))


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
    import torch

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


def test_one_cell_is_ohms_law():
    y = ops.tile_mvm(np.array([[0.2]], np.float32), np.array([[5e-6]], np.float32))
    assert y[0, 0] == pytest.approx(1e-6, rel=1e-6)


def test_one_bit_adc_is_a_comparator_with_noise():
    """E[code] = Phi((i - lsb / 2) / sigma) for one unsigned bit."""
    from math import erf, sqrt

    v = np.full((20000, 1), 0.2, np.float32)
    g = np.full((1, 64), 3e-6, np.float32)
    y = ops.tile_mvm(v, g, adc_bits=1, adc_signed=False, adc_lsb=1e-6, read_noise=2e-7, seed=4)
    expected = 0.5 * (1 + erf((0.6e-6 - 0.5e-6) / 2e-7 / sqrt(2)))
    assert set(np.unique(y)) == {np.float32(0), np.float32(1e-6)}
    assert (y > 0).mean() == pytest.approx(expected, abs=4 * 0.5 / sqrt(y.size))


@pytest.mark.parametrize("generator", ["exact", "fast"])
def test_noise_statistics(generator):
    """Mean, variance, tails and independence of 2.6e6 read noises, within four standard errors."""
    from math import sqrt

    y = ops.tile_mvm(
        np.zeros((20000, 4), np.float32),
        np.zeros((4, 130), np.float32),
        read_noise=1.0,
        seed=SEED,
        generator=generator,
    )
    n = y.size
    assert abs(y.mean()) < 4 / sqrt(n)
    assert abs(y.var() - 1) < 4 * sqrt(2 / n)
    assert abs((y**4).mean() - 3) < 4 * sqrt(96 / n)
    for threshold, share in ((2, 4.550e-2), (3, 2.700e-3), (4, 6.33e-5)):
        assert abs((np.abs(y) > threshold).mean() - share) < 4 * sqrt(share / n)
    for other in (np.roll(y, 1, 0), np.roll(y, 1, 1), np.roll(y, 4, 1)):
        assert abs((y * other).mean()) < 4 / sqrt(n)
        assert abs(((y**2 - 1) * (other**2 - 1)).mean()) < 4 * 2 / sqrt(n)


def test_collapsed_noise_has_the_variance_of_the_tiles():
    v, g = case(4000, 256, 32, codes=False)
    tiled = ops.tile_mvm(v, g, tile_rows=64, read_noise=1e-6, seed=1)
    collapsed = ops.tile_mvm(v, g, read_noise=2e-6, seed=2)
    clean = ops.tile_mvm(v, g)
    n = clean.size
    assert np.std(tiled - clean) == pytest.approx(2e-6, rel=4 * np.sqrt(0.5 / n))
    assert np.std(collapsed - clean) == pytest.approx(2e-6, rel=4 * np.sqrt(0.5 / n))


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


def test_same_bits_for_any_chunk_of_the_batch():
    codes, g = case(101, 70, 37)
    s = {"tile_rows": 32, "adc_bits": 8, "adc_lsb": 1e-7, "read_noise": 1e-7, "v_lsb": 1e-3, "seed": SEED}
    whole = ops.tile_mvm(codes, g, **s)
    parts = [ops.tile_mvm(codes[i : i + 13], g, row_offset=i, **s) for i in range(0, 101, 13)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


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


def test_steps_seeds_and_directions_draw_apart():
    v, g = np.zeros((4, 8), np.float32), np.zeros((8, 8), np.float32)
    draw = lambda **s: ops.tile_mvm(v, g, read_noise=1.0, **s)  # noqa: E731
    base = draw(seed=1, step=1)
    np.testing.assert_array_equal(base, draw(seed=1, step=np.array([1])))
    for other in (draw(seed=2, step=1), draw(seed=1, step=2), draw(seed=1, step=1, transposed=True)):
        assert not np.isclose(base, other).any()


def test_empty_batch():
    assert ops.tile_mvm(np.empty((0, 3), np.float32), np.empty((3, 2), np.float32)).shape == (0, 2)


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


GOOD = {"v": np.zeros((2, 3), np.float32), "g": np.zeros((3, 4), np.float32)}
BAD = {
    "dtype": (
        {"v": np.zeros((2, 3))},
        TypeError,
        "tile_mvm: `v` must be an array of float32 or int16, got float64",
    ),
    "axes": ({"v": np.zeros(3, np.float32)}, ValueError, "`v` must have 2 axes, got 1"),
    "stride": ({"g": np.zeros((4, 3), np.float32).T}, ValueError, "`g` must be C-contiguous"),
    "shape": ({"v": np.zeros((2, 4), np.float32)}, ValueError, r"`v` must have shape \(2, 3\)"),
    "bits": ({"adc_bits": 17, "adc_lsb": 1.0}, ValueError, "`adc_bits` must be 1 to 16, got 17"),
    "sign": ({"adc_bits": 1, "adc_lsb": 1.0}, ValueError, "2 to 16 for signed currents, got 1"),
    "lsb-without-bits": ({"adc_lsb": 1e-7}, ValueError, "`adc_lsb` must go with adc_bits"),
    "gain-without-bits": (
        {"adc_gain": np.ones((1, 1, 3), np.float32)},
        ValueError,
        "`adc_gain` must go with adc_bits",
    ),
    "no-lsb": ({"adc_bits": 8}, ValueError, "`adc_lsb` must be given with adc_bits=8"),
    "lsb": ({"adc_bits": 8, "adc_lsb": 0.0}, ValueError, "`adc_lsb` must be above 0 A, got 0 A"),
    "tile": ({"tile_rows": 0}, ValueError, "`tile_rows` must be at least 1, got 0"),
    "conversions": (
        {
            "v": np.zeros((1, 2**20), np.int16),
            "g": np.zeros((2**20, 1), np.float32),
            "tile_rows": 1,
            "stream_bits": 1,
            "streams": 15,
            "phases": 2,
        },
        ValueError,
        r"`tile_rows` must make at most 2\^24 conversions of a result, got 1 planes x 1048576 tiles x 30 passes",
    ),
    "groups": ({"groups": 2}, ValueError, "`groups` must divide the 3 rows"),
    "bias": ({"bias": np.zeros(3, np.float32)}, ValueError, r"`bias` must have shape \(4,\), got \(3,\)"),
    "generator": ({"generator": "quick"}, ValueError, "`generator` must be 'exact' or 'fast', got 'quick'"),
    "list": ({"v": [[1.0]]}, TypeError, "got list"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_says_what_and_how(name):
    change, error, text = BAD[name]
    with pytest.raises(error, match=text):
        ops.tile_mvm(**{**GOOD, **change})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_dac_refuses_what_is_not_finite(value):
    x = np.zeros((3, 5), np.float32)
    x[1, 2] = value
    with pytest.raises(ValueError, match="`x` must be finite, got 1 NaN or infinite"):
        ops.dac_quantize(x, lsb=0.1, code_max=127)


def test_the_host_kernel_is_what_was_tested():
    assert library() is not None


def test_settings_of_another_type_are_refused_though_equal_ones_are_known():
    v, g = np.ones((1, 4), np.float32), np.ones((4, 2), np.float32)
    assert ops.tile_mvm(v, g, tile_rows=2).shape == (1, 2)
    with pytest.raises(TypeError, match=r"`tile_rows` must be an integer, got 2\.0"):
        ops.tile_mvm(v, g, tile_rows=2.0)
    with pytest.raises(TypeError, match=r"`tile_rows` must be an integer, got \[2\]"):
        ops.tile_mvm(v, g, tile_rows=[2])


def test_dac_messages_hold_the_values():
    x = np.zeros((3, 5), np.float32)
    with pytest.raises(ValueError, match="must be 1 to 32767, got 0"):
        ops.dac_quantize(x, lsb=0.1, code_max=0)
    with pytest.raises(ValueError, match="must have 1 or 3 values, got 2"):
        ops.dac_quantize(x, lsb=[0.1, 0.2], code_max=127)
