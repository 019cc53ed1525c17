"""The gradient of a convolution's weights against float64 and against torch's."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch.nn.grad import conv2d_weight

from gpuxbar import ops, reference
from gpuxbar.ops import ConvGeometry

SHAPES = [
    pytest.param((1, 1, 1), (1, 1), {}, 1, 1, id="one"),
    pytest.param((3, 9, 17), (3, 3), {"padding": (1, 1)}, 10, 1, id="a-line-more-than-a-vector"),
    pytest.param((2, 12, 11), (2, 3), {"stride": (2, 1), "padding": (0, 2)}, 4, 2, id="tall-strides"),
    pytest.param((5, 7, 13), (1, 1), {"stride": (3, 2)}, 8, 1, id="strides-past-the-kernel"),
    pytest.param(
        (2, 14, 12), (5, 2), {"stride": (2, 3), "padding": (3, 1), "dilation": (2, 1)}, 3, 2, id="dilation"
    ),
    pytest.param((1, 40, 60), (3, 3), {"padding": (1, 1)}, 2, 1, id="one-image-at-a-time"),
    pytest.param((1, 15, 13), (3, 3), {"stride": (2, 2), "padding": (1, 1)}, 1, 21, id="depthwise"),
    pytest.param(
        (2, 7, 7), (3, 5), {"padding": (1, 4), "dilation": (1, 2)}, 3, 5, id="few-outputs-of-groups"
    ),
    pytest.param((1, 60, 61), (3, 3), {"padding": (1, 1)}, 1, 9, id="groups-in-turns"),
]


def case(image, kernel, more, outputs, groups, codes=True):
    conv = ConvGeometry(*image, kernel, **more, line_order="position_channel")
    rng = np.random.default_rng(outputs)
    x = rng.integers(-127, 128, (9, groups * conv.channels, *image[1:]))
    d = rng.normal(size=(9, groups * outputs, *conv.out)).astype(np.float32)
    return d, x.astype(np.int16 if codes else np.float32), rng.uniform(0.01, 0.02, 9).astype(np.float32), conv


@pytest.mark.parametrize("codes", [True, False], ids=["codes", "floats"])
@pytest.mark.parametrize(("image", "kernel", "more", "outputs", "groups"), SHAPES)
def test_sums_match_the_oracle_and_torch(image, kernel, more, outputs, groups, codes):
    d, x, scale, conv = case(image, kernel, more, outputs, groups, codes)
    for unit in (scale, scale[:1]):
        found = ops.conv_outer_product(d, x, unit, conv, groups=groups)
        expected = reference.conv_outer_product(d, x, unit, conv, groups)
        driven = torch.from_numpy(x * unit[:, None, None, None])
        geometry = conv.stride, conv.padding, conv.dilation, groups
        plain = conv2d_weight(driven, found.shape, torch.from_numpy(d), *geometry).numpy()
        # no worse than twice what torch makes of it
        error = np.abs(plain - expected).max()
        assert error < 1e-5 * np.abs(expected).max()
        assert np.abs(found - expected).max() <= max(2 * error, 1e-6 * np.abs(expected).max())


@pytest.mark.parametrize(("outputs", "groups"), [(20, 1), (1, 11)], ids=["one-group", "depthwise"])
def test_bits_do_not_depend_on_threads(outputs, groups, same_on_threads):
    d, x, scale, conv = case((6 if groups == 1 else 1, 9, 17), (3, 3), {"padding": (1, 1)}, outputs, groups)
    same_on_threads(lambda: ops.conv_outer_product(d, x, scale, conv, groups=groups))


def test_no_image_is_no_gradient():
    d, x, scale, conv = case((2, 5, 6), (3, 3), {}, 4, 1)
    assert not ops.conv_outer_product(d[:0], x[:0], scale[:1], conv).any()


def test_without_a_compiler_the_reference_serves(monkeypatch):
    d, x, scale, conv = case((2, 5, 6), (3, 3), {}, 4, 1)
    monkeypatch.setattr("gpuxbar.launch.host.WANTED", "reference")
    expected = reference.conv_outer_product(d, x, scale, conv, 1).astype(np.float32)
    np.testing.assert_array_equal(ops.conv_outer_product(d, x, scale, conv), expected)


BAD = {
    "dtype": ({"x": np.zeros((9, 2, 5, 6))}, TypeError, "`x` must be an array of float32 or int16, got float64"),
    "axes": ({"d": np.zeros((9, 4), np.float32)}, ValueError, "`d` must have 4 axes, got 2"),
    "groups": ({"groups": 3}, ValueError, "`groups` must divide the 4 outputs of `d`, got 3"),
    "image": ({"x": np.zeros((9, 2, 5, 7), np.int16)}, ValueError, "`x` must have shape (9, 2, 5, 6), got (9, 2, 5, 7)"),
    "output": (
        {"d": np.zeros((9, 4, 3, 3), np.float32)},
        ValueError,
        "`d` must have shape (9, 4, 3, 4), got (9, 4, 3, 3)",
    ),
    "scale": ({"scale": np.ones(2, np.float32)}, ValueError, "`scale` must have 1 or 9 values, got 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    change, error, message = BAD[name]
    d, x, scale, conv = case((2, 5, 6), (3, 3), {}, 4, 1)
    good = {"d": d, "x": x, "scale": scale, "conv": conv}
    with pytest.raises(error, match=re.escape(f"conv_outer_product: {message}")):
        ops.conv_outer_product(**{**good, **change})


def test_operator_is_sound():
    d, x, scale, conv = case((2, 5, 6), (3, 3), {"padding": (1, 0)}, 4, 2)
    tensors = (torch.from_numpy(a) for a in (d, x, scale))
    more = [8, 2, 3, 3], list(conv.stride), list(conv.padding), list(conv.dilation)
    torch.library.opcheck(torch.ops.gpuxbar.conv_outer_product.default, (*tensors, *more))


def test_nothing_beyond_the_images_counts():
    """Of kernels as wide as the image, whose last dot products end beyond it, among memory full of NaN."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        kernel, height = int(rng.integers(2, 40)), int(rng.integers(1, 4))
        conv = ConvGeometry(1, height, kernel + int(rng.integers(0, 20)), (1, kernel))
        x = rng.integers(-5, 5, (1, 1, height, conv.width)).astype(np.int16)
        d = rng.normal(size=(1, 1, *conv.out)).astype(np.float32)
        freed = [np.full(int(size), np.nan, np.float32) for size in rng.integers(50, 1000, 400)]
        del freed
        assert np.isfinite(ops.conv_outer_product(d, x, np.ones(1, np.float32), conv)).all()
